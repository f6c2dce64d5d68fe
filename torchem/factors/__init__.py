"""Factors: one family of distributions per file."""

from torchem.factors.categorical import Categorical
from torchem.factors.gaussian import Gaussian

__all__ = ["Categorical", "Gaussian"]
