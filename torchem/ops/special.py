"""Equations with the digamma function, solved by so many steps of Newton that they are pure and differentiable."""

import math

import torch
from torch import Tensor

#: Steps of Newton's method, each of which doubles the digits.
_STEPS = 8
#: ψ(1).
_PSI_1 = -0.5772156649015329


def shape_from_gap(gap: Tensor, least: float, most: float) -> Tensor:
    """a with log a − ψ(a) = gap, within bounds: the shape of a gamma law from log E x − E log x.

    The left side is close to 1/2a + 1/12a²: convex in 1/a, along which Newton's steps come from one side.

    Args:
        gap: Positive; what is smaller than any shape within the bounds has, gives ``most``.
        least: Smallest shape.
        most: Largest shape.

    Source: T. P. Minka (2002), Estimating a gamma distribution, for Newton's method in 1/a.

    Example:
        >>> a = torch.tensor([0.3, 2.0, 500.0], dtype=torch.float64)
        >>> shape_from_gap(a.log() - a.digamma(), 1e-3, 1e6)
        tensor([3.0000e-01, 2.0000e+00, 5.0000e+02], dtype=torch.float64)
    """
    gap = gap.clamp(min=1e-12)
    # y is 1/2a throughout.
    y = 1.5 * ((1 + 4 * gap / 3).sqrt() - 1)
    for _ in range(_STEPS):
        a = 1 / (2 * y)
        value = a.log() - a.digamma() - gap
        # d/dy (log a − ψ(a)) = (a ψ′(a) − 1) / y
        y = (y - value * y / (a * torch.polygamma(1, a) - 1)).clamp(min=0.25 / most, max=1 / least)
    return (0.5 / y).clamp(min=least, max=most)


def inverse_digamma(value: Tensor, least: float, most: float) -> Tensor:
    """a with ψ(a) = value, within bounds.

    Source: T. P. Minka (2000), Estimating a Dirichlet distribution, appendix C.

    Example:
        >>> a = torch.tensor([0.05, 2.0, 500.0], dtype=torch.float64)
        >>> inverse_digamma(a.digamma(), 1e-3, 1e6)
        tensor([5.0000e-02, 2.0000e+00, 5.0000e+02], dtype=torch.float64)
    """
    # ψ(a) < log a: no bound is cut off.
    value = value.clamp(max=math.log(2 * most))
    a = torch.where(value >= -2.22, value.clamp(min=-2.22).exp() + 0.5, -1 / (value.clamp(max=-2.22) - _PSI_1))
    for _ in range(_STEPS):
        a = (a - (a.digamma() - value) / torch.polygamma(1, a)).clamp(min=0.5 * least)
    return a.clamp(min=least, max=most)
