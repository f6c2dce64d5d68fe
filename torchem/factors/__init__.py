"""Factors: one family of distributions per file."""

from torchem.factors.autoregressive import Autoregressive
from torchem.factors.bernoulli import Bernoulli
from torchem.factors.categorical import Categorical
from torchem.factors.gaussian import Gaussian
from torchem.factors.linear_gaussian import LinearGaussian
from torchem.factors.mean_adjusted import MeanAdjustedAutoregression
from torchem.factors.mixture import Mixture
from torchem.factors.neural import Neural
from torchem.factors.poisson import Poisson
from torchem.factors.product import Product
from torchem.factors.softmax_regression import SoftmaxRegression

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "LinearGaussian",
    "MeanAdjustedAutoregression",
    "Mixture",
    "Neural",
    "Poisson",
    "Product",
    "SoftmaxRegression",
]
