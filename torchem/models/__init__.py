"""Models: one file each, inference only."""

from torchem.models.amortized import AmortizedModel
from torchem.models.bayesian_network import BayesianNetwork
from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.mixture import GaussianMixture, Mixture

__all__ = ["HMM", "AmortizedModel", "BayesianNetwork", "FactorialHMM", "GaussianHMM", "GaussianMixture", "Mixture"]
