"""Models: one file each, inference only."""

from torchem.models.amortized import AmortizedModel
from torchem.models.factor_analysis import FactorAnalysis
from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.hsmm import HSMM, GaussianHSMM
from torchem.models.mixture import GaussianMixture, Mixture

__all__ = [
    "HMM",
    "HSMM",
    "AmortizedModel",
    "FactorAnalysis",
    "FactorialHMM",
    "GaussianHMM",
    "GaussianHSMM",
    "GaussianMixture",
    "Mixture",
]
