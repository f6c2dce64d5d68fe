"""torchem: Expectation–Maximization on PyTorch.

Models are ``nn.Module``s made of factors; `fit` runs EM on them, on CPU or CUDA; everything is differentiable.
"""

from typing import TYPE_CHECKING, Any

from torchem import errors, factors, masks, priors
from torchem.accumulate import FullBatch, Incremental, Stochastic
from torchem.batch import Batch
from torchem.direct import Direct
from torchem.evaluate import Criteria, criteria
from torchem.factor import Conjugate, ExponentialFamily, Factor
from torchem.gradient import Gradient
from torchem.model import DiscreteModel, LatentModel, em_map
from torchem.models import (
    HMM,
    HSMM,
    AmortizedModel,
    BayesianNetwork,
    FactorAnalysis,
    FactorialHMM,
    GaussianHMM,
    GaussianHSMM,
    GaussianMixture,
    LinearGaussianStateSpace,
    Mixture,
    SwitchingLinearDynamics,
)
from torchem.result import Progress, Result
from torchem.search import perturb, split_merge
from torchem.stats import Stats
from torchem.trainer import Trainer, fit, partial_fit
from torchem.variational import Variational, variational

if TYPE_CHECKING:
    from torchem import plot
    from torchem.files import load, save

__version__ = "0.1.0"

__all__ = [
    "AmortizedModel",
    "Batch",
    "BayesianNetwork",
    "Conjugate",
    "Criteria",
    "Direct",
    "DiscreteModel",
    "ExponentialFamily",
    "Factor",
    "FactorAnalysis",
    "FactorialHMM",
    "FullBatch",
    "GaussianHMM",
    "GaussianHSMM",
    "GaussianMixture",
    "Gradient",
    "HMM",
    "HSMM",
    "Incremental",
    "LatentModel",
    "LinearGaussianStateSpace",
    "Mixture",
    "Progress",
    "Result",
    "Stats",
    "Stochastic",
    "SwitchingLinearDynamics",
    "Trainer",
    "Variational",
    "criteria",
    "em_map",
    "errors",
    "factors",
    "fit",
    "load",
    "masks",
    "partial_fit",
    "perturb",
    "plot",
    "priors",
    "save",
    "split_merge",
    "variational",
]


def __getattr__(name: str) -> Any:
    # What most programs never touch is imported when it is first named.
    from importlib import import_module

    if name in ("load", "save"):
        return getattr(import_module("torchem.files"), name)
    if name in ("plot",):
        return import_module("torchem.plot")
    raise AttributeError(f"module 'torchem' has no attribute {name!r}")
