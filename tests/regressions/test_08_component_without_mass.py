"""A component that no observation reaches: everything stays finite, weights sum to one, and the report names it."""

import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, DTYPES, blobs, dense, fit, healthy, mixture


def away(
    covariance_type: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torchem.GaussianMixture]:
    """Two components on the data and one at a thousand standard deviations."""
    x = blobs(100, 2, 2).to(dtype).to(device)
    model = mixture(3, 2, covariance_type, dtype, device)
    model.means = [[0.0, 0.0], [6.0, -6.0], [1e3, 1e3]]
    return x, model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_component_far_from_everything(covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    x, model = away(covariance_type, dtype, device)
    covariance = dense(model)[2]
    result = fit(model, x, init=None)

    healthy(model)
    assert result.status in ("converged", "max_iter")
    assert result.dead == [2]
    assert float(model.weights[2].detach()) < 1e-30
    # Without mass there is nothing to estimate from: the parameters are kept.
    torch.testing.assert_close(model.means[2].detach().cpu(), torch.tensor([1e3, 1e3], dtype=dtype))
    if covariance_type != "tied":
        torch.testing.assert_close(dense(model)[2], covariance)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[:, 0]))
    assert bool((posterior[:, 2] == 0).all())


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_the_others_are_fitted_as_if_it_were_absent(covariance_type: str, device: torch.device) -> None:
    x, model = away(covariance_type, torch.float64, device)
    fit(model, x, init=None, tol=0.0, max_iter=10)
    two = mixture(2, 2, covariance_type, device=device)
    two.means = [[0.0, 0.0], [6.0, -6.0]]
    fit(two, x, init=None, tol=0.0, max_iter=10)
    torch.testing.assert_close(model.means[:2], two.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense(model)[:2], dense(two), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.weights[:2], two.weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_beyond_the_reach_of_the_exponent(dtype: torch.dtype, device: torch.device) -> None:
    # e^-½·(1e6)² underflows in every type; the row still belongs to someone.
    x = torch.cat([blobs(40, 1, 2), torch.tensor([[1e6]], dtype=torch.float64)]).to(dtype).to(device)
    model = mixture(2, 1, "full", dtype, device)
    model.means = [[0.0], [6.0]]
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[:, 0]))
    assert bool(model.log_prob(x).isfinite().all())
    result = fit(model, x, init=None)
    healthy(model)
    assert result.status in ("converged", "max_iter")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_component_that_is_forbidden(covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    # Of weight zero amid the data: there is nothing to estimate from, though its place would suit.
    x = blobs(100, 2, 2).to(dtype).to(device)
    model = mixture(3, 2, covariance_type, dtype, device)
    model.weights, model.means = [0.5, 0.5, 0.0], [[0.0, 0.0], [6.0, -6.0], [1.0, -2.0]]
    result = fit(model, x, init=None)
    healthy(model)
    assert result.dead == [2]
    assert model.weights.tolist()[2] == 0.0
    assert model.means.tolist()[2] == [1.0, -2.0]
