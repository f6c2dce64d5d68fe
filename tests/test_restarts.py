"""Restarts run as one: each stops where its single run would, the best is returned, and components are aligned."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import torchem
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, gap, mixture, rand, same
from torchem.restarts import align, assignment, compare
from torchem.result import Progress


class Starts:
    """A callback that keeps every restart's parameters at θ_0 as a model of its own."""

    def __init__(self) -> None:
        self.models: list[torchem.LatentModel] = []

    def __call__(self, progress: Progress) -> None:
        if progress.iteration == 0:
            model = progress.model
            self.models = [model.take_replicas(r) if model.replicas else model for r in progress.restarts]


def data(device: Any = "cpu") -> torch.Tensor:
    return blobs(60, 2, 4, gap=2.5).to(device)


# ---- equal to single runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["random", "random_from_data", "kmeans++"])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_each_restart_is_the_single_run_from_its_start(covariance_type: str, init: str, device: torch.device) -> None:
    starts = Starts()
    # Shares drawn at random lie near a saddle, where a coarse tolerance would stop all of them at once.
    options = {"tol": 1e-9 if init == "random" else 1e-3, "max_iter": 40}
    many = fit(
        mixture(4, 2, covariance_type, device=device),
        data(device),
        restarts=4,
        init=init,
        callbacks=[starts],
        **options,
    )
    assert len(starts.models) == 4
    lengths = {len(history) for history in many.histories}
    assert len(lengths) > 1 or init == "random", "all restarts stopped together: nothing is shown"
    for r, start in enumerate(starts.models):
        single = fit(start, data(device), init=None, **options)
        assert (single.status, single.n_iter) == (many.statuses[r], len(many.histories[r]) - 1)
        assert single.history == pytest.approx(many.histories[r], rel=1e-9)
        assert single.bound == pytest.approx(many.restarts[r], rel=1e-9)
        if many.restarts[r] == many.bound:
            assert gap(single.model, many.model) < 1e-6


@pytest.mark.parametrize("options", [{"batch_size": 35}, {"weights": 0.5 + rand(60)}], ids=["batches", "weights"])
def test_in_every_mode(options: dict[str, Any], device: torch.device) -> None:
    starts = Starts()
    many = fit(
        mixture(4, 2, device=device),
        data(device),
        restarts=4,
        init="random",
        max_iter=30,
        callbacks=[starts],
        **options,
    )
    for r, start in enumerate(starts.models):
        single = fit(start, data(device), init=None, max_iter=30, **options)
        assert single.history == pytest.approx(many.histories[r], rel=1e-9)


def test_float32(device: torch.device) -> None:
    starts = Starts()
    model = mixture(4, 2, dtype=torch.float32, device=device)
    many = fit(model, data(device), restarts=4, init="random", tol=0.0, max_iter=10, callbacks=[starts])
    for r, start in enumerate(starts.models):
        single = fit(start, data(device), init=None, tol=0.0, max_iter=10)
        assert single.history == pytest.approx(many.histories[r], rel=1e-4)


def test_frozen_parts_stay_in_every_restart(device: torch.device) -> None:
    model = mixture(4, 2, device=device)
    model.means = 10 * torch.eye(4, 2)
    model.component.freeze("means", mask=torch.tensor([True, False, False, False]))
    result = fit(model, data(device), restarts=3)
    assert torch.equal(model.means[0].detach().cpu(), torch.tensor([10.0, 0.0]).double())
    assert result.model is model


def test_structural_zeros_stay_in_every_restart(device: torch.device) -> None:
    model = torchem.Mixture(torchem.factors.Categorical(3), torchem.factors.Categorical(3, 4)).double().to(device)
    model.weights = [0.5, 0.5, 0.0]
    fit(model, (torch.arange(60) % 4).unsqueeze(-1).to(device), restarts=4, max_iter=5, tol=0.0)
    assert float(model.weights[2].detach()) == 0.0


# ---- what is reported ---------------------------------------------------------------------------------------------


def test_report(device: torch.device) -> None:
    result = fit(mixture(4, 2, device=device), data(device), restarts=5, init="random_from_data", max_iter=8, tol=1e-3)
    assert [len(v) for v in (result.restarts, result.histories, result.statuses)] == [5, 5, 5]
    assert result.alignment is not None
    assert result.agreement is not None
    assert [len(v) for v in (result.alignment, result.agreement)] == [5, 5]
    best = result.restarts.index(result.bound)
    assert result.bound == max(result.restarts)
    assert (result.history, result.status) == (result.histories[best], result.statuses[best])
    assert result.alignment[best] == [0, 1, 2, 3]
    assert result.agreement[best] == 1.0
    assert all(sorted(order) == [0, 1, 2, 3] for order in result.alignment)
    assert all(0 < share <= 1 for share in result.agreement)
    for history, bound in zip(result.histories, result.restarts, strict=True):
        assert history[-1] == bound


def test_agreement_is_total_where_every_restart_finds_the_same(device: torch.device) -> None:
    x = blobs(90, 2, 3, gap=30.0).to(device)
    result = fit(mixture(3, 2, device=device), x, restarts=6, init="kmeans")
    assert result.agreement == [1.0] * 6
    assert result.alignment is not None
    assert len({tuple(order) for order in result.alignment}) > 1, "labels never differed: nothing is shown"


def test_a_single_run_has_nothing_to_align(device: torch.device) -> None:
    result = fit(mixture(3, 2, device=device), data(device))
    assert (result.alignment, result.agreement) == (None, None)
    assert (result.restarts, result.histories) == ([result.bound], [result.history])


def test_ties_go_to_the_first(device: torch.device) -> None:
    # One component has one optimum: the first restart is as good as any.
    first = fit(mixture(1, 2, device=device), data(device), restarts=4, seed=3)
    assert (
        same(first.model, fit(mixture(1, 2, device=device), data(device), seed=3).model)
        or gap(first.model, fit(mixture(1, 2, device=device), data(device), seed=3).model) < 1e-12
    )


def test_more_restarts_are_never_worse(device: torch.device) -> None:
    bounds = [
        fit(mixture(6, 2, device=device), data(device), restarts=r, init="random_from_data").bound for r in (1, 3, 8)
    ]
    assert bounds[0] <= bounds[1] + 1e-9 * abs(bounds[1])
    assert bounds[1] <= bounds[2] + 1e-9 * abs(bounds[2])


# ---- alignment ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_assignment_is_optimal(k: int, seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 3, (k, k)).astype(float) if tied else rng.normal(size=(k, k))
    found = assignment(torch.from_numpy(score))
    assert sorted(found) == list(range(k))
    rows, columns = linear_sum_assignment(score, maximize=True)
    assert score[np.arange(k), found].sum() == pytest.approx(score[rows, columns].sum(), abs=1e-12)
    if not tied:
        assert found == columns.tolist()


def test_assignment_of_many() -> None:
    score = rand(120, 120, seed=5)
    found = assignment(score)
    assert found == linear_sum_assignment(score.numpy(), maximize=True)[1].tolist()


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_relabelling_is_undone(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    best = torch.from_numpy(np.concatenate([np.arange(k), rng.integers(0, k, 40)]))
    order = torch.from_numpy(rng.permutation(k))
    assert align(best, order[best], k) == (order.tolist(), 1.0)


def test_partial_agreement() -> None:
    best = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    other = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 1])
    order, share = align(best, other, 2)
    assert order == [1, 0]
    assert share == pytest.approx(0.8)


def test_a_state_that_never_occurs_is_assigned_too() -> None:
    order, share = align(torch.tensor([0, 0, 1]), torch.tensor([2, 2, 0]), 3)
    assert order == [2, 0, 1]
    assert share == 1.0


def test_compare_models(device: torch.device) -> None:
    x = blobs(30, 1, 2, gap=20.0)[:, :1].to(device)
    one, two = (mixture(2, 1, device=device) for _ in range(2))
    one.means, two.means = [[0.0], [20.0]], [[20.0], [0.0]]
    orders, shares = compare([one, two], 0, torchem.Batch(x), 2)
    assert orders == [[0, 1], [1, 0]]
    assert shares == [1.0, 1.0]


def test_restarts_that_go_wrong_do_not_win(device: torch.device) -> None:
    """NaN is no bound: a restart that broke down must not be chosen over a sound one."""

    class Brittle(torchem.GaussianMixture):
        def e_step(self, batch: torchem.Batch) -> torchem.Stats:
            stats = super().e_step(batch)
            value = stats["log_likelihood"].clone()
            if self.replicas and len(value) == 3:
                value[0] = math.nan
                stats["log_likelihood"] = value
            return stats

    result = fit(Brittle(3, 2).double().to(device), data(device), restarts=3, init="random", max_iter=5, tol=0.0)
    assert result.statuses[0] == "nonfinite"
    assert result.restarts[0] == -math.inf
    assert result.statuses[1:] == ["max_iter", "max_iter"]
    assert math.isfinite(result.bound)
