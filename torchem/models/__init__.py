"""Models: one file each, inference only."""

from torchem.models.amortized import AmortizedModel
from torchem.models.factorial_hmm import FactorialHMM
from torchem.models.hmm import HMM, GaussianHMM
from torchem.models.mixture import GaussianMixture, Mixture
from torchem.models.state_space import LinearGaussianStateSpace
from torchem.models.switching import SwitchingLinearDynamics

__all__ = [
    "HMM",
    "AmortizedModel",
    "FactorialHMM",
    "GaussianHMM",
    "GaussianMixture",
    "LinearGaussianStateSpace",
    "Mixture",
    "SwitchingLinearDynamics",
]
