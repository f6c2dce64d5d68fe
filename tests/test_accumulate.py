"""Stochastic and incremental EM through `fit`."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.regressions.common import as_users_run_it, blobs, mixture, rand
from torchem.accumulate import Incremental, Stochastic
from torchem.errors import ConvergenceWarning, InvalidArgument, InvalidType
from torchem.stats import Stats


def fit(model, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torchem.fit(model, data, progress=False, **{"seed": 0, **options})


def optimum(x: torch.Tensor, k: int = 3) -> float:
    return fit(mixture(k, x.shape[1]), x, restarts=5, tol=1e-8, max_iter=500).bound


def one(value: float, count: float = 1.0) -> Stats:
    return Stats(x=torch.tensor(value, dtype=torch.float64), count=torch.tensor(count, dtype=torch.float64))


# ---- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"exponent": 0.6, "delay": 10.0}, {"step_size": 0.3}])
def test_step_sizes(options: dict) -> None:
    """The recursion, written out."""
    rule = Stochastic(**options)
    rule.begin(10.0, one(3.0))
    state, largest, rng = 3.0, 0.0, np.random.default_rng(0)
    for t in range(20):
        value, size = float(rng.normal()), float(rng.integers(1, 5))
        rho = options.get("step_size") or (t + options.get("delay", 2.0)) ** -options.get("exponent", 0.7)
        largest = max(largest, size)
        rho = 1 - (1 - rho) ** (size / largest)
        state = (1 - rho) * state + rho * value / size
        found = rule.push(t, one(value, size))
        assert found is not None
        assert float(found["x"]) == pytest.approx(10 * state)
        assert float(found["count"]) == pytest.approx(10)


def test_a_stream_without_end_is_weighed_by_what_was_seen() -> None:
    rule = Stochastic(lambda t: 1 / (t + 1))
    for t, value in enumerate((2.0, 4.0, 9.0)):
        found = rule.push(t, one(value, 2.0))
    assert found is not None
    assert float(found["x"]) == pytest.approx(15.0)  # with 1 / t it is the sum of all
    assert float(found["count"]) == pytest.approx(6.0)


def test_a_burn_in_longer_than_a_pass_is_refused() -> None:
    rule = Stochastic(burn_in=4)
    with pytest.raises(InvalidArgument, match=r"^burn_in: expected fewer batches than the 4 of a pass, got 4"):
        torchem.fit(torchem.GaussianMixture(2, 1), torch.randn(20, 1), accumulate=rule, batch_size=5, progress=False)


def test_a_rule_serves_one_fit_at_a_time() -> None:
    x, rule = torch.randn(40, 1), Stochastic()
    options = {"accumulate": rule, "batch_size": 10, "max_iter": 2, "tol": 0, "progress": False}

    def within(now: Any) -> None:
        torchem.fit(torchem.GaussianMixture(2, 1), x, **options)

    with pytest.raises(InvalidArgument, match=r"^accumulate: .* got a Stochastic that another fit is using"):
        torchem.fit(torchem.GaussianMixture(2, 1), x, callbacks=[within], **options)
    model = torchem.GaussianMixture(2, 1)
    torchem.fit(model, x, **options)  # one after the other
    with pytest.raises(InvalidArgument, match=r"^rule: .* got one that a fit has used"):
        torchem.partial_fit(model, x, rule)
    rule.reset()
    torchem.partial_fit(model, x, rule)


def test_burn_in_and_averages() -> None:
    rule = Stochastic(0.5, burn_in=2, average=True)
    rule.begin(1.0, one(0.0))
    found = [rule.push(t, one(8.0)) for t in range(4)]
    assert [value is None for value in found] == [True, True, False, False]
    states = [4.0, 6.0, 7.0, 7.5]
    assert [float(value["x"]) for value in found[2:] if value] == pytest.approx(states[2:])
    mean = rule.flush()
    assert mean is not None
    assert float(mean["x"]) == pytest.approx(sum(states[2:]) / 2)
    rule.push(4, one(0.0, 0.0))
    again = rule.flush()
    assert again is not None
    assert float(again["x"]) == float(mean["x"]), "an empty batch must count for nothing"


def test_a_mean_that_begins_after_the_start() -> None:
    rule = Stochastic(0.5, average=3)
    rule.begin(1.0, one(0.0))
    for step in range(4):
        assert rule.push(step, one(8.0)) is not None
        if step < 3:
            last = rule.flush()
            assert last is not None
            assert float(last["x"]) == [4.0, 6.0, 7.0][step], "before there is a mean a pass ends where it stands"
    mean = rule.flush()
    assert mean is not None
    assert float(mean["x"]) == 7.5


@pytest.mark.parametrize(
    ("options", "name"),
    [({"step_size": 0.0}, "step_size"), ({"step_size": 1.5}, "step_size"), ({"exponent": 0.5}, "exponent"),
     ({"delay": -1.0}, "delay"), ({"burn_in": -1}, "burn_in"), ({"average": -1}, "average")],
)  # fmt: skip
def test_bad_options_are_named(options: dict, name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Stochastic(**options)


def test_a_bad_step_is_named() -> None:
    rule = Stochastic(lambda t: 2.0)
    with pytest.raises(InvalidArgument, match="at step 0"):
        rule.push(0, one(1.0))


@pytest.mark.parametrize("disk", [False, True])
def test_memos_in_memory_and_on_disk(disk: bool, tmp_path: Path) -> None:
    rule = Incremental(tmp_path / "memos" if disk else None)
    stats = [Stats(a=Stats(x=torch.randn(2, 3).double()), count=torch.tensor(5.0).double()) for _ in range(3)]
    assert [rule.push(key, value) for key, value in enumerate(stats)] == [None] * 3
    total = rule.flush()
    assert total is not None
    torch.testing.assert_close(total["a"]["x"], sum(s["a"]["x"] for s in stats))
    new = Stats(a=Stats(x=torch.ones(2, 3).double()), count=torch.tensor(5.0).double())
    after = rule.push(1, new)
    assert after is not None
    torch.testing.assert_close(after["a"]["x"], stats[0]["a"]["x"] + 1 + stats[2]["a"]["x"])
    rule.translate(lambda s: s * 2.0)
    flushed = rule.flush()
    assert flushed is not None
    torch.testing.assert_close(flushed["a"]["x"], 2 * after["a"]["x"])
    if disk:
        assert len(list((tmp_path / "memos").iterdir())) == 3


def test_a_partition_that_changes_is_refused() -> None:
    rule = Incremental()
    rule.push(0, one(1.0, 4.0))
    with pytest.raises(InvalidArgument, match="shuffle"):
        rule.push(0, one(1.0, 5.0))


# ---- fits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_stochastic_fits_come_near_the_optimum(average: bool) -> None:
    x = blobs(4000, 2, 3, gap=4.0)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    best = optimum(x)
    rule = Stochastic(burn_in=2, average=average)
    result = fit(mixture(3, 2), x, accumulate=rule, batch_size=100, max_iter=20, tol=1e-5)
    assert result.bound == pytest.approx(best, abs=2e-3 * len(x))
    assert result.bound == pytest.approx(float(result.model.log_prob(x).detach().sum()), rel=1e-10)


def test_one_batch_of_rate_one_is_em() -> None:
    x = blobs(200, 2, 3)
    plain = fit(mixture(3, 2), x, max_iter=7, tol=0)
    noisy = fit(mixture(3, 2), x, max_iter=7, tol=0, accumulate=Stochastic(1.0))
    torch.testing.assert_close(noisy.model.means, plain.model.means, rtol=1e-8, atol=1e-10)
    assert noisy.bound == pytest.approx(plain.bound, rel=1e-10)


def test_stochastic_stops_when_passes_bring_no_more() -> None:
    x = blobs(600, 2, 2, gap=6.0)
    result = fit(mixture(2, 2), x, accumulate=Stochastic(), batch_size=50, max_iter=200, tol=1e-3)
    assert result.status == "converged"
    assert result.n_iter < 50
    assert result.bound == pytest.approx(float(result.model.log_prob(x).detach().sum()), rel=1e-10)


def test_incremental_never_falls_and_is_ahead_of_em() -> None:
    x = blobs(800, 2, 3, gap=2.5)
    # Stirred, so that every batch has something of each cluster.
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    plain = fit(mixture(3, 2), x, tol=1e-6, max_iter=2000)
    parts = fit(mixture(3, 2), x, tol=1e-6, max_iter=2000, accumulate=Incremental(), batch_size=40)
    assert parts.status == plain.status == "converged"
    for before, after in itertools.pairwise(parts.history):
        assert after >= before - 1e-9 * abs(before)
    assert parts.bound >= plain.bound - 1e-3
    near = plain.bound - 0.1
    passes = [next(i for i, value in enumerate(r.history) if value > near) for r in (parts, plain)]
    assert passes[0] < passes[1]


def test_weights_and_short_batches() -> None:
    x, weights = blobs(403, 2, 2, gap=5.0), rand(403) + 0.5
    best = fit(mixture(2, 2), x, weights=weights, tol=1e-8).bound
    for rule in (Incremental(), Stochastic(average=True, burn_in=3)):
        found = fit(mixture(2, 2), x, weights=weights, accumulate=rule, batch_size=100, tol=1e-6, max_iter=60)
        assert found.bound == pytest.approx(best, abs=0.5)


@pytest.mark.parametrize("rule", [Incremental, Stochastic])
def test_restarts_that_end_at_different_times(rule) -> None:
    x = blobs(300, 2, 3, gap=3.0)
    together = fit(mixture(3, 2), x, accumulate=rule(), batch_size=60, restarts=4, max_iter=60, tol=1e-4)
    assert len(together.restarts) == 4
    assert together.bound == max(together.restarts)
    assert together.bound == pytest.approx(float(together.model.log_prob(x).detach().sum()), rel=1e-6)


@pytest.mark.parametrize("rule", [Incremental, Stochastic])
def test_sequences(rule) -> None:
    truth = torchem.GaussianHMM(2, 1).double()
    truth.means, truth.transition_matrix = [[-2.0], [2.0]], [[0.9, 0.1], [0.2, 0.8]]
    x = truth.sample(40, 30, generator=torch.Generator().manual_seed(0))
    best = fit(torchem.GaussianHMM(2, 1).double(), x, tol=1e-8, max_iter=500).bound
    model = torchem.GaussianHMM(2, 1).double()
    result = fit(model, x, accumulate=rule(), batch_size=8, max_iter=60, tol=1e-6)
    assert result.bound == pytest.approx(best, abs=2.0)


def test_far_clusters_move_origins_within_a_pass() -> None:
    """Tight clusters far apart: numerics follow the parameters between batches, and what is kept follows them."""
    x = torch.cat([blobs(100, 1, 1) + 3e4, blobs(100, 1, 1) - 3e4])
    x = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    best = fit(mixture(2, 1), x, tol=1e-8).bound
    for rule in (Incremental(), Stochastic()):
        found = fit(mixture(2, 1), x, accumulate=rule, batch_size=50, max_iter=40, tol=1e-6)
        assert found.bound == pytest.approx(best, abs=0.5)


def test_a_shuffled_loader_is_refused_by_incremental_em_and_welcome_to_stochastic() -> None:
    x = blobs(200, 2, 2, gap=5.0)
    loader = DataLoader(TensorDataset(x), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidArgument, match="shuffle=False"):
        fit(mixture(2, 2), loader, accumulate=Incremental())
    found = fit(mixture(2, 2), loader, accumulate=Stochastic(), max_iter=30)
    assert found.bound == pytest.approx(optimum(x, 2), abs=1.0)
    still = DataLoader(TensorDataset(x), batch_size=20)
    assert fit(mixture(2, 2), still, accumulate=Incremental(), tol=1e-6).bound == pytest.approx(optimum(x, 2), abs=0.1)


# ---- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_is_learnt_batch_by_batch() -> None:
    x = blobs(5000, 2, 3, gap=4.0)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    best = optimum(x)
    model, rule = mixture(3, 2), Stochastic()
    fit(model, x[:200])
    scores = [torchem.partial_fit(model, batch, rule) for batch in x.split(100)]
    assert rule.seen == 5000
    assert float(model.log_prob(x).detach().sum()) == pytest.approx(best, abs=0.01 * len(x))
    # What is returned is measured before the batch is learnt.
    fresh = mixture(3, 2)
    fresh.means = x[:3]
    score = torchem.partial_fit(fresh, x[:50], Stochastic())
    again = mixture(3, 2)
    again.means = x[:3]
    assert score == pytest.approx(float(again.log_prob(x[:50]).detach().mean()))
    assert sum(scores[-10:]) / 10 > sum(scores[:2]) / 2 - 0.2


def test_streams_of_sequences_and_weights() -> None:
    model, rule = torchem.GaussianHMM(2, 1).double(), Stochastic()
    model.means = [[-1.0], [1.0]]
    batch = [torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (5, 9, 30)]
    torchem.partial_fit(model, batch, rule, weights=[1.0, 2.0, 0.5])
    assert rule.seen == 5 + 18 + 15


def test_a_stream_needs_its_rule_and_possible_data() -> None:
    with as_users_run_it(), pytest.raises(InvalidType, match="rule"):
        torchem.partial_fit(mixture(2, 2), blobs(10, 2, 2), Incremental())  # pyright: ignore[reportArgumentType]
    model = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.Categorical(2, 3))
    model.component.probs = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    before = model.component.probs.clone()
    with pytest.raises(InvalidArgument, match="positive probability"):
        torchem.partial_fit(model, torch.tensor([[2]]), Stochastic())
    assert torch.equal(model.component.probs, before)
    begun, nothing = Stochastic(), DataLoader(TensorDataset(torch.empty(0, 2)))
    torchem.partial_fit(mixture(2, 2), blobs(10, 2, 2), begun)
    for rule in (Stochastic(), begun):
        with pytest.raises(InvalidArgument, match="at least one batch"):
            torchem.partial_fit(mixture(2, 2), nothing, rule)


def _free(model: torchem.GaussianMixture) -> torch.Tensor:
    """Weights but one, means, covariances on and above the diagonal: coordinates in which errors are measured."""
    upper = model.covariances[:, [0, 0, 1], [0, 1, 1]]
    return torch.cat([model.weights[:-1], model.means.flatten(), upper.flatten()]).detach()


def _log_density(free: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """log p of one observation, written out once more so that it has a gradient in these coordinates."""
    weights, means, upper = free[:2], free[2:8].reshape(3, 2), free[8:].reshape(3, 3)
    weights = torch.cat([weights, 1 - weights.sum(0, keepdim=True)])
    covariances = upper[:, [0, 1, 1, 2]].reshape(3, 2, 2)
    law = torch.distributions.MultivariateNormal(means, covariances, validate_args=False)
    return (weights.log() + law.log_prob(x)).logsumexp(0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_million_draws_once_are_as_good_as_the_optimum(seed: int) -> None:
    """One averaged pass over 10⁶ draws, from a fit of the first 5000, ends within a standard error of the optimum.

    The mean of the iterates and the maximum-likelihood estimate on the same draws have the same limiting law,
    N(θ*, I⁻¹/N) (Cappé and Moulines 2009), so they differ by less than its standard error (diag I⁻¹/N)^½, in every
    coordinate. I is the mean outer product of scores. The fit of 5000 lies (10⁶ / 5000)^½ ≈ 14 such errors away, the
    last iterate, which rests on some 500 · 2 / ρ_T ≈ 10⁵ draws, up to three.
    """
    truth = torchem.GaussianMixture(3, 2).double()
    truth.weights, truth.means = [0.5, 0.3, 0.2], [[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]
    truth.covariances = [[[1.0, 0.3], [0.3, 0.8]], [[0.7, -0.2], [-0.2, 1.0]], [[1.2, 0.0], [0.0, 0.5]]]
    x = truth.sample(1_000_000, generator=torch.Generator().manual_seed(seed))
    best = torchem.GaussianMixture(3, 2).double()
    best.load_state_dict(truth.state_dict())
    assert fit(best, x, init=None, accelerate="anderson", tol=1e-10, max_iter=200).converged

    scores = torch.func.vmap(torch.func.grad(_log_density), (None, 0))(_free(best), x[:50_000])
    error = torch.linalg.inv(scores.mT @ scores * (len(x) / len(scores))).diagonal().sqrt()

    model, rule = torchem.GaussianMixture(3, 2).double(), Stochastic(exponent=0.6, average=True)
    model.means = [[-1.0, 0.0], [1.0, 0.0], [0.0, 1.5]]
    fit(model, x[:5000], init=None, max_iter=1000, tol=1e-7)
    for batch in x.split(500):
        torchem.partial_fit(model, batch, rule)
    last = (_free(model) - _free(best)) / error
    mean = rule.flush()
    assert mean is not None
    model.m_step(mean)
    away = (_free(model) - _free(best)) / error
    assert away.abs().max() < 1
    assert away.square().mean() < last.square().mean() / 4
