"""Priors over parameters, in data coordinates, for maximum a posteriori estimates and variational Bayes.

Give one to a factor, ``factor.prior = Dirichlet(2.0)``: its `mode_stats` join the statistics in every M-step, and its
log-density joins the objective that a fit climbs and reports. Or give it to `torchem.Variational`, which keeps the
posterior instead of its mode. Statistics themselves never hold a prior. Hyper-parameters left out are taken from the
moments of the data when a fit begins.
"""

from torchem.priors.coefficients import Normal
from torchem.priors.normal import (
    FactorLoadings,
    MatrixNormalInverseWishart,
    NormalInverseGamma,
    NormalInverseWishart,
)
from torchem.priors.rates import Beta, Gamma
from torchem.priors.tables import Dirichlet, StickBreaking, StickyDirichlet

__all__ = [
    "Beta",
    "Dirichlet",
    "FactorLoadings",
    "Gamma",
    "MatrixNormalInverseWishart",
    "Normal",
    "NormalInverseGamma",
    "NormalInverseWishart",
    "StickBreaking",
    "StickyDirichlet",
]
