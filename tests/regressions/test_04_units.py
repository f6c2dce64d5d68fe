"""fit(aX + b) is the fit of X in other units: means aμ + b, covariances a²Σ, log-likelihood less N·D·log a."""

import math

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, blobs, dense, fit, healthy, mixture

SCALES = (1e-6, 1e-3, 1e3, 1e6)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_units(covariance_type: str, scale: float, shift: float, device: torch.device) -> None:
    x = blobs(90, 2, 3, gap=3.0)
    _compare(x, scale, shift * scale, covariance_type, torch.float64, device, tolerance=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_units_in_float32(covariance_type: str, scale: float, device: torch.device) -> None:
    _compare(blobs(90, 2, 3, gap=8.0), scale, 0.0, covariance_type, torch.float32, device, tolerance=1e-3)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_columns_in_different_units(covariance_type: str, device: torch.device) -> None:
    if covariance_type == "spherical":
        pytest.skip("one variance for all columns is no property of columns in different units")
    x = blobs(90, 2, 3, gap=3.0)
    scale = torch.tensor([1e-4, 1e5], dtype=torch.float64)
    _compare(x, scale, 0.0, covariance_type, torch.float64, device, tolerance=1e-6)


def test_small_spread_about_a_large_value(device: torch.device) -> None:
    # 1 + 1e-6·X: the rounding of the data, 1e-10 of their spread, is all that may be lost.
    _compare(blobs(90, 2, 3, gap=3.0), 1e-6, 1.0, "full", torch.float64, device, tolerance=1e-4)


def _compare(
    x: torch.Tensor,
    scale: float | torch.Tensor,
    shift: float,
    covariance_type: str,
    dtype: torch.dtype,
    device: torch.device,
    tolerance: float,
) -> None:
    n, d = x.shape
    plain, scaled = (mixture(3, d, covariance_type, dtype, device) for _ in range(2))
    # As many maps in both, whatever the units: a fixed number rather than a tolerance.
    options = {"tol": 0.0, "max_iter": 20}
    first = fit(plain, x.to(dtype).to(device), **options)
    second = fit(scaled, (x * scale + shift).to(dtype).to(device), **options)

    healthy(scaled)
    a = torch.as_tensor(scale, dtype=torch.float64).expand(d)
    means = plain.means.detach().double().cpu() * a + shift
    spread = float(plain.means.detach().double().std())
    torch.testing.assert_close(
        (scaled.means.detach().double().cpu() - means) / a, torch.zeros_like(means), rtol=0, atol=tolerance * spread
    )
    torch.testing.assert_close(dense(scaled) / (a.unsqueeze(-1) * a), dense(plain), rtol=tolerance, atol=tolerance)
    change = n * float(a.log().sum())
    assert second.bound + change == pytest.approx(first.bound, rel=tolerance)
    assert math.isfinite(second.bound)
