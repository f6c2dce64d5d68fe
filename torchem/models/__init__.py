"""Models: one file each, inference only."""

from torchem.models.amortized import AmortizedModel
from torchem.models.bayesian_network import BayesianNetwork
from torchem.models.factor_analysis import FactorAnalysis
from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.hsmm import HSMM, GaussianHSMM
from torchem.models.mixture import GaussianMixture, Mixture
from torchem.models.state_space import LinearGaussianStateSpace
from torchem.models.switching import SwitchingLinearDynamics

__all__ = [
    "AmortizedModel",
    "BayesianNetwork",
    "FactorAnalysis",
    "FactorialHMM",
    "GaussianHMM",
    "GaussianHSMM",
    "GaussianMixture",
    "HMM",
    "HSMM",
    "LinearGaussianStateSpace",
    "Mixture",
    "SwitchingLinearDynamics",
]
