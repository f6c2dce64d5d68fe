"""Bessel functions in logarithms and concentrations, against SciPy, closed forms and each other."""

import math

import numpy as np
import pytest
import torch
from scipy import special

from tests.laws.cases import close
from torchem.ops import directional

KAPPA = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 80)]).double()


@pytest.mark.parametrize("order", [-0.5, -0.3, 0.0, 0.5, 1.0, 1.3, 7.25, 24.0, 60.5])
def test_bessel_functions_are_those_of_scipy(order: float) -> None:
    kappa = KAPPA[KAPPA > 1e-2] if order > 2 else KAPPA[1:]  # where SciPy's do not underflow
    value, ratio = directional.log_bessel(order, kappa), directional.bessel_ratio(order, kappa)
    x = kappa.numpy()
    close(value, torch.from_numpy(np.log(special.ive(order, x)) - order * np.log(x)), rtol=1e-13, atol=1e-13)
    close(ratio, torch.from_numpy(special.ive(order + 1, x) / special.ive(order, x) / x), rtol=3e-13)


def test_at_zero_and_in_many_dimensions() -> None:
    """κ^−ν I_ν(κ) is 2^−ν / Γ(ν + 1) at zero; at order 500 SciPy has underflown, its series has not."""
    for order in (-0.5, 0.0, 2.5, 24.0, 500.0):
        value, ratio = directional.log_bessel(order, KAPPA[:1]), directional.bessel_ratio(order, KAPPA[:1])
        exact = [-order * math.log(2) - math.lgamma(order + 1), 1 / (2 * order + 2)]
        close(torch.stack([value, ratio])[:, 0], torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-13)
    kappa = torch.tensor([3.0, 40.0, 300.0], dtype=torch.float64)
    terms = torch.arange(400.0).double()
    series = (2 * terms * (kappa / 2).log().unsqueeze(-1) - (terms + 1).lgamma() - (terms + 501).lgamma()).logsumexp(-1)
    close(directional.log_bessel(500.0, kappa), series - 500 * math.log(2) - kappa, rtol=1e-13)


@pytest.mark.parametrize("dimension", [2, 3, 5, 80])
def test_derivatives(dimension: int) -> None:
    """Of the log-normaliser it is the mean resultant less one, whose own is 1 − A² − (D − 1) A / κ."""
    kappa = torch.logspace(-3, 3, 25, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(directional.log_normalizer(dimension, kappa).sum(), kappa, create_graph=True)
    mean = directional.mean_resultant(dimension, kappa)
    close(slope, mean - 1, rtol=1e-9, atol=1e-12)
    (curvature,) = torch.autograd.grad(slope.sum(), kappa)
    close(curvature, 1 - mean.square() - (dimension - 1) * mean / kappa, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dimension", [2, 3, 4, 17, 400])
def test_concentrations_invert_mean_resultants(dimension: int) -> None:
    kappa = torch.logspace(-5, 5, 60, dtype=torch.float64)
    mean = directional.mean_resultant(dimension, kappa)
    # Where all rows point one way a digit of the mean is ten of the concentration.
    close(directional.concentration(mean, dimension, 1e-6, 1e6), kappa, rtol=2e-9)
    bounds = directional.concentration(torch.tensor([-0.3, 0.0, 1.0, 1.1]).double(), dimension, 1e-6, 1e4)
    close(bounds, torch.tensor([1e-6, 1e-6, 1e4, 1e4]), rtol=1e-9)
    # The slope is that of the inverse: 1 / A′.
    inner, slope = torch.func.jvp(
        lambda r: directional.concentration(r, dimension, 1e-6, 1e6), (mean[20:45],), (torch.ones(25).double(),)
    )
    exact = 1 - mean.square() - (dimension - 1) * mean / kappa
    close(slope * exact[20:45], torch.ones(25), rtol=1e-5)
    close(inner, kappa[20:45], rtol=2e-9)
