"""Models: one file each, inference only."""

from torchem.models.amortized import AmortizedModel
from torchem.models.factor_analysis import FactorAnalysis
from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.hsmm import HSMM, GaussianHSMM
from torchem.models.mixture import GaussianMixture, Mixture
from torchem.models.state_space import LinearGaussianStateSpace

__all__ = [
    "HMM",
    "AmortizedModel",
    "FactorialHMM",
    "GaussianHMM",
    "GaussianMixture",
    "LinearGaussianStateSpace",
    "HSMM",
    "FactorAnalysis",
    "GaussianHSMM",
    "Mixture",
]
