"""The objective never falls by more than 1e-9 of its size in float64, from 50 starts on each of three kinds of data."""

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, largest_fall, mixture, randn

#: Data sets times restarts: 50 starts for each kind of data.
DATA_SEEDS = range(5)
RESTARTS = 10


def noise(seed: int) -> torch.Tensor:
    return randn(60, 2, seed=seed)


def tight(seed: int) -> torch.Tensor:
    return blobs(60, 2, 4, gap=1e3, seed=seed)


def duplicates(seed: int) -> torch.Tensor:
    x = randn(60, 2, seed=seed)
    return torch.cat([x[:1].expand(30, 2), x[1:11].repeat(2, 1), x[11:21]])


@pytest.mark.parametrize("make", [noise, tight, duplicates])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_objective_never_falls(covariance_type: str, make: object, device: torch.device) -> None:
    for seed in DATA_SEEDS:
        x = make(seed).to(device)  # pyright: ignore[reportCallIssue]
        result = fit(
            mixture(5, 2, covariance_type, device=device),
            x,
            restarts=RESTARTS,
            tol=0.0,
            max_iter=30,
            seed=seed,
            init="random",
        )
        assert result.statuses == ["max_iter"] * RESTARTS
        for history in result.histories:
            assert len(history) == 31
            assert largest_fall(history) <= 1e-9


@pytest.mark.parametrize("init", ["kmeans++", "random_from_data"])
@pytest.mark.parametrize("make", [noise, tight, duplicates])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_objective_never_falls_from_clusters_and_points(
    covariance_type: str, make: object, init: str, device: torch.device
) -> None:
    x = make(11).to(device)  # pyright: ignore[reportCallIssue]
    for floor_type, floor in (("relative", 1e-6), ("relative", 0.1), ("absolute", 0.05)):
        model = mixture(5, 2, covariance_type, device=device, covariance_floor=floor, floor_type=floor_type)
        result = fit(model, x, restarts=5, tol=0.0, max_iter=20, init=init)
        assert max(map(largest_fall, result.histories)) <= 1e-9


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_objective_never_falls_on_the_features_route(covariance_type: str, device: torch.device) -> None:
    x = blobs(12_000, 3, 6, gap=2.0).to(device)
    model = mixture(6, 3, covariance_type, device=device)
    result = fit(model, x, tol=0.0, max_iter=25)
    assert model.component.direct is False
    assert largest_fall(result.history) <= 1e-9
