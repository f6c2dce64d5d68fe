"""Tails: probabilities and moments against quadrature and sums, far out as well; derivatives."""

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from tests.laws.cases import close
from torchem.ops import tails


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("alpha", [-30.0, -3.0, -1e-3, 0.0, 2.0, 30.0, 99.0, 101.0, 1e4])
def test_normal_tails_are_their_integrals(alpha: float, upper: bool) -> None:
    """Of y = |x − c| / σ the density is in proportion to exp(−α y − ½ y²)."""
    mean, scale = 1.5, 0.5
    sign = 1.0 if upper else -1.0
    found = tails.normal(wide(mean), wide(scale), wide(mean + sign * alpha * scale), upper)
    reach = 40.0 / alpha if alpha > 1 else 12.0 - min(alpha, 0.0)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    y, weights = (nodes + 1) * reach / 2, weights * reach / 2
    density = np.exp(-alpha * y - y**2 / 2 - min(alpha, 0.0) ** 2 / 2) * weights
    close(found[0], wide(float(special.log_ndtr(-alpha))), rtol=1e-12)
    close(found[1], wide(sign * scale * (density @ y) / density.sum()), rtol=1e-9)
    close(found[2], wide(scale**2 * (density @ y**2) / density.sum()), rtol=2e-8)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize(("rate", "limit"), [(2.0, 0.7), (0.5, 1e-3), (1e-4, 3.0), (3.0, 900.0), (0.3, 0.033)])
def test_exponential_tails_are_their_integrals(rate: float, limit: float, upper: bool) -> None:
    log_p, first, second = tails.exponential(wide(rate), wide(limit), upper)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    reach = 60.0 / rate if upper else limit
    # Of what lies below a far limit all is near zero.
    shift = 0.0 if upper else -limit
    start = 60.0 / rate if not upper and limit * rate > 60 else reach
    y, weights = (nodes + 1) * start / 2, weights * start / 2
    density = rate * np.exp(-rate * y) * weights
    offset = y + shift
    close(log_p, wide(float(np.log(density.sum())) - (rate * limit if upper else 0.0)), rtol=1e-10, atol=1e-12)
    close(first, wide((density @ offset) / density.sum()), rtol=1e-9)
    close(second, wide((density @ offset**2) / density.sum()), rtol=1e-8)


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize(
    ("rate", "limit", "digits"),
    [
        (2.0, 0.0, 1e-10),
        (2.0, 3.0, 1e-10),
        (7.5, 20.0, 1e-9),
        (0.01, 1.0, 1e-10),
        (3.0, 400.0, 1e-3),
        (900.0, 40.0, 3e-3),
    ],
)
def test_poisson_tails_are_their_sums(rate: float, limit: float, digits: float, upper: bool) -> None:
    found = tails.poisson(wide(rate), wide(limit), upper)
    x = np.arange(limit, limit + 3000) if upper else np.arange(0, limit + 1)
    logs = x * np.log(rate) - rate - special.gammaln(x + 1)
    share = np.exp(logs - logs.max())
    close(found[0], wide(float(np.log(share.sum()) + logs.max())), rtol=digits, atol=1e-12)
    share, offset = share / share.sum(), x - limit
    close(found[1], wide(float(share @ offset)), rtol=digits, atol=1e-9)
    close(found[2], wide(float(share @ offset**2)), rtol=3 * digits, atol=1e-9)


def test_nothing_lies_below_the_least_count() -> None:
    log_p, *rest = tails.poisson(wide(2.0), wide(-1.0), False)
    assert log_p.tolist() == [-torch.inf]
    assert all(bool((value == 0).all()) for value in rest)


def test_derivatives() -> None:
    parameter = wide(0.4, 2.0).requires_grad_()
    for upper in (True, False):
        for law in (tails.exponential, tails.poisson):
            assert torch.autograd.gradcheck(lambda p, law=law, upper=upper: law(p, wide(1.0, 3.0), upper), parameter)
        assert torch.autograd.gradcheck(
            lambda p, upper=upper: tails.normal(p, p, wide(-9.0, 400.0), upper), parameter, rtol=1e-4
        )


def test_differences_of_logarithms_keep_their_digits() -> None:
    large, small = wide(-1e-12, -500.0, 0.0), wide(-2e-12, -501.0, -1e3)
    exact = wide(float(np.log(1e-12)), -500 + float(np.log1p(-np.exp(-1.0))), 0.0)
    close(tails.log_difference(large, small), exact, rtol=1e-3, atol=1e-12)
    assert tails.log_difference(wide(-3.0), wide(-3.0)).tolist() == [-torch.inf]
