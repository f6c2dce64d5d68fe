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


# ---- states of a chain --------------------------------------------------------------------------------------------


def chain(dtype: torch.dtype, device: torch.device, k: int = 3) -> torchem.GaussianHMM:
    model = torchem.GaussianHMM(k, 1).to(device, dtype)
    model.means = [[4.0 * i] for i in range(k)]
    return model


def sound(model: torchem.HMM) -> None:
    """Finite parameters, tables whose rows sum to one."""
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    tolerance = 1e-12 if model.dtype == torch.float64 else 1e-5
    for probs in (model.initial_probs, model.transition_matrix):
        assert float((probs.detach().double().sum(-1) - 1).abs().max()) < tolerance


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unreachable_state(
    dtype: torch.dtype, compiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(torchem.ops.chain, "chain_kernel", lambda emission: torchem.ops.scan)
    model = chain(dtype, device)
    model.transition_matrix = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.3, 0.3, 0.4]]
    model.initial_probs = [0.5, 0.5, 0.0]
    before = model.transition_matrix[2].detach().clone(), model.means[2].detach().clone()
    x = blobs(60, 1, 2, gap=4.0).to(device, dtype)
    result = fit(model, x, init=None, tol=0.0, max_iter=30)
    sound(model)
    assert result.dead == [2]
    assert result.status in ("max_iter", "converged")
    # Nothing is known of it: its row and its emission are kept.
    torch.testing.assert_close(model.transition_matrix[2].detach(), before[0])
    torch.testing.assert_close(model.means[2].detach(), before[1])
    posterior = model.posterior(x)
    assert bool((posterior[..., 2] < 1e-9).all())
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[..., 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absorbing", [False, True])
def test_state_visited_only_at_the_last_frame(absorbing: bool, dtype: torch.dtype, device: torch.device) -> None:
    """No step leaves it: its row of the transition matrix has no mass and is kept."""
    model = chain(dtype, device)
    table = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0] if absorbing else [0.2, 0.2, 0.6]]
    model.transition_matrix = table
    x = torch.cat([blobs(59, 1, 2, gap=4.0), torch.tensor([[8.0]], dtype=torch.float64)]).to(device, dtype)
    labels = torch.cat([torch.arange(59) % 2, torch.tensor([2])])
    fit(model, x, init=None, labels=labels, tol=0.0, max_iter=10)
    sound(model)
    torch.testing.assert_close(model.transition_matrix[2].detach().cpu(), torch.tensor(table[2], dtype=dtype))
    assert float(model.transition_matrix[0, 2].detach()) > 0
    free = chain(dtype, device)
    fit(free, x, init=None, tol=0.0, max_iter=10)
    sound(free)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_of_one_frame(dtype: torch.dtype, device: torch.device) -> None:
    """No step at all: the transition matrix is kept, the rest is a mixture."""
    model = chain(dtype, device, 2)
    model.transition_matrix = [[0.7, 0.3], [0.2, 0.8]]
    x = blobs(40, 1, 2, gap=4.0).to(device, dtype).unsqueeze(1)
    fit(model, x, init=None, tol=0.0, max_iter=10)
    sound(model)
    wanted = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=dtype)
    torch.testing.assert_close(model.transition_matrix.detach().cpu(), wanted)
    same = mixture(2, 1, "diag", dtype, device)
    same.means = [[0.0], [4.0]]
    fit(same, x[:, 0], init=None, tol=0.0, max_iter=10)
    torch.testing.assert_close(model.means, same.means)
    torch.testing.assert_close(model.initial_probs, same.weights)
