"""Data that leave a covariance nothing to stand on: finite, positive definite, and the floored components named."""

from collections.abc import Callable

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, DTYPES, blobs, dense, fit, healthy, mixture, rand, randn, rng


def duplicates() -> torch.Tensor:
    return torch.cat([randn(1, 2, seed=1).expand(50, 2), randn(50, 2, seed=2) + 4])


def few_distinct() -> torch.Tensor:
    return torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]], dtype=torch.float64).repeat(8, 1)


def constant_column() -> torch.Tensor:
    x = blobs(60, 3, 2)
    x[:, 1] = 7.0
    return x


def rank_one() -> torch.Tensor:
    return randn(60, 1, seed=3) * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3


def all_equal() -> torch.Tensor:
    return torch.full((20, 2), 3.5, dtype=torch.float64)


def all_zero() -> torch.Tensor:
    return torch.zeros(20, 2, dtype=torch.float64)


DATA: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
    "duplicates": (duplicates, 3),
    "few distinct": (few_distinct, 5),
    "constant column": (constant_column, 2),
    "rank one": (rank_one, 2),
    "all equal": (all_equal, 2),
    "all zero": (all_zero, 3),
}
#: Where no covariance of the type can be healthy, so that each must be named.
FLOORED = {
    "constant column": ("full", "tied", "diag"),
    "rank one": ("full", "tied"),
    "all equal": COVARIANCE_TYPES,
    "all zero": COVARIANCE_TYPES,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("name", DATA)
def test_degenerate_data(name: str, covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    make, k = DATA[name]
    x = make().to(dtype).to(device)
    model = mixture(k, x.shape[-1], covariance_type, dtype, device)
    result = fit(model, x, restarts=2)

    healthy(model)
    assert result.status in ("converged", "max_iter")
    assert all(torch.tensor(result.history).isfinite())
    assert bool(model.log_prob(x).isfinite().all())
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[:, 0]), rtol=1e-4, atol=1e-4)
    if covariance_type in FLOORED.get(name, ()):
        assert result.floored == list(range(k))


def relative(covariances: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of covariances in units of the data's standard deviations: what the floor bounds."""
    scale = x.double().cpu().std(0, correction=0)
    return torch.linalg.eigvalsh(covariances / (scale.unsqueeze(-1) * scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_floored_component_is_the_one_on_the_duplicates(dtype: torch.dtype, device: torch.device) -> None:
    x = duplicates().to(dtype)
    model = mixture(2, 2, "full", dtype, device)
    result = fit(model, x.to(device), init="kmeans")
    on_duplicates = model.most_likely(x[:1].to(device)).tolist()
    assert result.floored == on_duplicates
    eigenvalues = relative(dense(model)[on_duplicates[0]], x)
    assert 0.5e-6 < float(eigenvalues.min()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_many_components_on_few_rows(covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    x = randn(1000, 12, seed=4).to(dtype).to(device)
    model = mixture(96, 12, covariance_type, dtype, device)
    result = fit(model, x, max_iter=15)

    healthy(model)
    assert result.status in ("converged", "max_iter")
    assert set(result.floored) <= set(range(96))
    # About ten rows for each covariance of twelve columns: most of the full ones are singular.
    if covariance_type == "full":
        assert result.floored
        smallest = relative(dense(model), x)[:, 0]
        assert bool((smallest[result.floored] < 3e-6).all())
        healthy_ones = [k for k in range(96) if k not in result.floored]
        assert bool((smallest[healthy_ones] > 0.5e-6).all())


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_rounding_is_no_spread(covariance_type: str, device: torch.device) -> None:
    """The weighted mean of a constant is not always that constant: what is left must not be taken for its variance."""
    for seed in range(20):
        value = 10 ** float(12 * rand(1, seed=seed) - 6)
        x = torch.cat([randn(29, 1, seed=seed), torch.full((29, 1), value, dtype=torch.float64)], -1)
        model = mixture(1, 2, covariance_type, device=device)
        result = fit(model, x.to(device), weights=torch.randint(0, 3, (29,), generator=rng(seed)), max_iter=2)
        assert result.floored == [0]
        variance = dense(model)[0].diagonal()
        assert float(variance[1] / variance[0]) == pytest.approx(1e-6, rel=1e-3)
