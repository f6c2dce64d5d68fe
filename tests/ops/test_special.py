"""Equations with the digamma function: their solutions, bounds and derivatives."""

import torch

from tests.laws.cases import close
from torchem.ops.special import inverse_digamma, shape_from_gap


def test_solutions() -> None:
    a = torch.logspace(-3, 5, 60, dtype=torch.float64)
    close(shape_from_gap(a.log() - a.digamma(), 1e-4, 1e6), a, rtol=1e-7)
    close(inverse_digamma(a.digamma(), 1e-4, 1e6), a, rtol=1e-9)


def test_bounds() -> None:
    wild = torch.tensor([-1.0, 0.0, 1e-20, 1e9], dtype=torch.float64)
    close(shape_from_gap(wild, 0.5, 100.0), torch.tensor([100.0, 100.0, 100.0, 0.5]))
    close(inverse_digamma(torch.tensor([-1e9, 1e3], dtype=torch.float64), 0.5, 100.0), torch.tensor([0.5, 100.0]))


def test_derivatives_are_those_of_the_solutions() -> None:
    a = torch.tensor([0.02, 0.7, 3.0, 400.0], dtype=torch.float64)
    gap, value = (a.log() - a.digamma()).requires_grad_(), a.digamma().requires_grad_()
    (slope,) = torch.autograd.grad(shape_from_gap(gap, 1e-3, 1e6).sum(), gap)
    close(slope, 1 / (1 / a - torch.polygamma(1, a)), rtol=1e-5)
    (slope,) = torch.autograd.grad(inverse_digamma(value, 1e-3, 1e6).sum(), value)
    close(slope, 1 / torch.polygamma(1, a), rtol=1e-6)
