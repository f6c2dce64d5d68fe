"""Tight clusters far apart (σ : distance = 1 : 1e4): moments about one origin would cancel, in float32 to nothing."""

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, DTYPES, blobs, by_mean, dense, fit, healthy, mixture

#: Below (σ / spread)² ≈ 1e-8, so that the floor leaves the clusters their shape.
FLOOR = 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
# The second size is large enough for the route over features; it must notice that it may not take it.
@pytest.mark.parametrize("rows", [300, 30_000])
def test_tight_clusters(covariance_type: str, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x = blobs(rows, 2, 3, gap=1e4).to(dtype)
    model = mixture(3, 2, covariance_type, dtype, device, covariance_floor=FLOOR)
    result = fit(model, x.to(device))

    healthy(model)
    assert result.converged
    assert result.floored == []
    parts = [x[k::3].double() for k in range(3)]
    means = torch.stack([part.mean(0) for part in parts])
    scatters = torch.stack([part.mT.cov(correction=0) for part in parts])
    expected = {
        "full": scatters,
        "tied": scatters.mean(0).expand(3, 2, 2),
        "diag": torch.diag_embed(scatters.diagonal(dim1=-2, dim2=-1)),
        "spherical": torch.eye(2) * scatters.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None],
    }[covariance_type]
    order, wanted = by_mean(model), means.sum(-1).argsort()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(dense(model)[order], expected[wanted].double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        model.means.detach().double().cpu()[order], means[wanted], rtol=1e-7, atol=1e-9 if tolerance < 1e-6 else 1e-2
    )
    torch.testing.assert_close(
        model.weights.detach().cpu().double(), torch.full((3,), 1 / 3).double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_float32_bound_is_near_float64(covariance_type: str, device: torch.device) -> None:
    x = blobs(30_000, 2, 3, gap=1e4).float().to(device)
    single, double = (mixture(3, 2, covariance_type, dtype, device, covariance_floor=FLOOR) for dtype in DTYPES)
    assert fit(single, x).bound == pytest.approx(fit(double, x.double()).bound, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_clusters_below_the_default_floor_are_named(
    covariance_type: str, dtype: torch.dtype, device: torch.device
) -> None:
    x = blobs(300, 2, 3, gap=1e4).to(dtype)
    model = mixture(3, 2, covariance_type, dtype, device)
    result = fit(model, x.to(device))

    healthy(model)
    assert result.floored == [0, 1, 2]
    variances = dense(model).diagonal(dim1=-2, dim2=-1)
    floor = 1e-6 * x.double().var(0, correction=0)
    torch.testing.assert_close(variances, floor.max().expand_as(variances), rtol=1e-3, atol=0)
