"""Models: one file each, inference only."""

from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.mixture import GaussianMixture, Mixture

__all__ = ["HMM", "GaussianHMM", "GaussianMixture", "Mixture"]
