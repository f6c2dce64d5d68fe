"""Unit-variance blobs far from the origin: raw second moments cancel in float32, differences about an origin do not."""

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, blobs, by_mean, dense, fit, healthy, mixture

OFFSETS = (1e2, 1e3, 1e4, 1e5)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
# Both routes of the E-step: differences for few rows, features about an origin for many.
@pytest.mark.parametrize("rows", [600, 20_000])
def test_float32_variances_at_an_offset(covariance_type: str, offset: float, rows: int, device: torch.device) -> None:
    x = (blobs(rows, 2, 2) + offset).float().to(device)
    single, double = (mixture(2, 2, covariance_type, dtype, device) for dtype in (torch.float32, torch.float64))
    result = fit(single, x)
    fit(double, x.double())

    healthy(single)
    assert result.status == "converged"
    assert result.floored == []
    # Rounding of the data themselves moves a variance by less than a thousandth, even at 1e5.
    variance = dense(single)[by_mean(single)].diagonal(dim1=-2, dim2=-1)
    reference = dense(double)[by_mean(double)].diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance, reference, rtol=0.02, atol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0.25, atol=0)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_log_prob_at_an_offset(covariance_type: str, device: torch.device) -> None:
    x = (blobs(400, 3, 2) + 1e4).float()
    model = mixture(2, 3, covariance_type, torch.float32, device)
    fit(model, x.to(device))
    exact = torch.empty(len(x), 2, dtype=torch.float64)
    for k, covariance in enumerate(dense(model)):
        mean = model.means[k].detach().double().cpu()
        exact[:, k] = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.double())
    exact = (exact + model.weights.detach().double().cpu().log()).logsumexp(-1)
    torch.testing.assert_close(model.log_prob(x.to(device)).detach().double().cpu(), exact, rtol=1e-4, atol=1e-3)
