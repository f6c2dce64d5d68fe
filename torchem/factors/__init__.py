"""Factors: one family of distributions per file."""

from torchem.factors.autoregressive import Autoregressive
from torchem.factors.bernoulli import Bernoulli
from torchem.factors.binomial_regression import BinomialRegression
from torchem.factors.categorical import Categorical
from torchem.factors.categoricals import Categoricals
from torchem.factors.censored import Censored
from torchem.factors.exponential import Exponential
from torchem.factors.from_distribution import FromDistribution
from torchem.factors.gamma import Gamma
from torchem.factors.gaussian import Gaussian
from torchem.factors.linear_gaussian import LinearGaussian
from torchem.factors.low_rank import LowRankGaussian
from torchem.factors.mean_adjusted import MeanAdjustedAutoregression
from torchem.factors.mixture import Mixture
from torchem.factors.multinomial import Multinomial
from torchem.factors.negative_binomial import NegativeBinomial
from torchem.factors.negative_binomial_duration import NegativeBinomialDuration
from torchem.factors.neural import Neural
from torchem.factors.neural_gate import NeuralGate
from torchem.factors.poisson import Poisson
from torchem.factors.poisson_duration import PoissonDuration
from torchem.factors.poisson_regression import PoissonRegression
from torchem.factors.product import Product
from torchem.factors.softmax_regression import SoftmaxRegression
from torchem.factors.stacked import Stacked
from torchem.factors.student_t import StudentT
from torchem.factors.tree_gate import TreeGate
from torchem.factors.truncated import Truncated
from torchem.factors.uniform import Uniform
from torchem.factors.von_mises import VonMises
from torchem.factors.von_mises_fisher import VonMisesFisher
from torchem.factors.zero_inflated import ZeroInflated

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "BinomialRegression",
    "Categorical",
    "Categoricals",
    "Censored",
    "Exponential",
    "FromDistribution",
    "Gamma",
    "Gaussian",
    "LinearGaussian",
    "LowRankGaussian",
    "MeanAdjustedAutoregression",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "NegativeBinomialDuration",
    "Neural",
    "NeuralGate",
    "Poisson",
    "PoissonDuration",
    "PoissonRegression",
    "Product",
    "SoftmaxRegression",
    "Stacked",
    "StudentT",
    "TreeGate",
    "Truncated",
    "Uniform",
    "VonMises",
    "VonMisesFisher",
    "ZeroInflated",
]
