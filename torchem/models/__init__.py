"""Models: one file each, inference only."""

from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.mixture import GaussianMixture, Mixture

__all__ = ["HMM", "FactorialHMM", "GaussianHMM", "GaussianMixture", "Mixture"]
