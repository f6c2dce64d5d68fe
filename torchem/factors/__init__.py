"""Factors: one family of distributions per file."""

from torchem.factors.autoregressive import Autoregressive
from torchem.factors.bernoulli import Bernoulli
from torchem.factors.binomial_regression import BinomialRegression
from torchem.factors.categorical import Categorical
from torchem.factors.exponential import Exponential
from torchem.factors.gaussian import Gaussian
from torchem.factors.linear_gaussian import LinearGaussian
from torchem.factors.mean_adjusted import MeanAdjustedAutoregression
from torchem.factors.mixture import Mixture
from torchem.factors.neural import Neural
from torchem.factors.neural_gate import NeuralGate
from torchem.factors.poisson import Poisson
from torchem.factors.poisson_regression import PoissonRegression
from torchem.factors.product import Product
from torchem.factors.softmax_regression import SoftmaxRegression
from torchem.factors.stacked import Stacked
from torchem.factors.student_t import StudentT
from torchem.factors.tree_gate import TreeGate
from torchem.factors.uniform import Uniform

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "BinomialRegression",
    "Categorical",
    "Exponential",
    "Gaussian",
    "LinearGaussian",
    "MeanAdjustedAutoregression",
    "Mixture",
    "Neural",
    "NeuralGate",
    "Poisson",
    "PoissonRegression",
    "Product",
    "SoftmaxRegression",
    "Stacked",
    "StudentT",
    "TreeGate",
    "Uniform",
]
