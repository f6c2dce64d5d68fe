"""The loop: what history, bound, status and n_iter mean, how a fit ends, and what it leaves behind."""

import copy
import io
import itertools
import math
import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torchem
from tests.regressions.common import (
    COVARIANCE_TYPES,
    blobs,
    dense,
    fit,
    gap,
    healthy,
    mixture,
    rand,
    randn,
    same,
    started,
)
from torchem.errors import ConvergenceWarning, DegenerateComponent, InvalidArgument
from torchem.result import Progress
from torchem.stopping import aitken, verdict

FIXED: dict[str, Any] = {"init": None, "tol": 0.0}


def data(device: Any = "cpu", n: int = 90) -> torch.Tensor:
    return blobs(n, 2, 3, gap=2.5).to(device)


def loglik(model: torchem.LatentModel, x: torch.Tensor) -> float:
    return float(model.log_prob(x).detach().double().sum())


class Recorder:
    """A callback that keeps what it is given, and the parameters at each iterate."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[tuple[int, list[float], list[int]]] = []
        self.models: list[torchem.LatentModel] = []
        self.stop_at = stop_at

    def __call__(self, progress: Progress) -> bool:
        self.seen.append((progress.iteration, progress.objective, progress.restarts))
        self.models.append(copy.deepcopy(progress.model))
        return progress.iteration == self.stop_at


# ---- history, bound, n_iter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_history_is_the_objective_at_each_iterate(covariance_type: str, device: torch.device) -> None:
    x, record = data(device), Recorder()
    result = fit(started(data(), 3, covariance_type, device=device), x, callbacks=[record], max_iter=10, **FIXED)
    assert (len(result.history), result.n_iter, len(record.models)) == (11, 10, 11)
    for value, model in zip(result.history, record.models, strict=True):
        assert loglik(model, x) == pytest.approx(value, rel=1e-12)
    assert [seen[:2] for seen in record.seen] == [(i, [v]) for i, v in enumerate(result.history)]


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_iterates_are_em_maps(covariance_type: str, device: torch.device) -> None:
    x, record = data(device), Recorder()
    fit(started(data(), 3, covariance_type, device=device), x, callbacks=[record], max_iter=4, **FIXED)
    for before, after in itertools.pairwise(record.models):
        step = torchem.em_map(before)(dict(before.named_parameters()), before.batch(x))
        for name, value in step.items():
            torch.testing.assert_close(after.get_parameter(name), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"tol": 1e-3}, {"tol": 0.0, "max_iter": 7}, {"tol": 0.0, "max_iter": 0}], ids=str)
@pytest.mark.parametrize("restarts", [1, 3])
def test_bound_is_of_the_returned_parameters(options: dict[str, Any], restarts: int, device: torch.device) -> None:
    x = data(device)
    model = mixture(3, 2, device=device)
    result = fit(model, x, restarts=restarts, **options)
    assert result.status in ("converged", "max_iter")
    assert result.model is model
    assert result.bound == result.history[-1]
    assert result.n_iter == len(result.history) - 1
    assert loglik(model, x) == pytest.approx(result.bound, rel=1e-12)


def test_converged_means_a_gain_below_tol_per_observation(device: torch.device) -> None:
    for tol in (1e-1, 1e-3, 1e-6):
        result = fit(started(data(), 3, device=device), data(device), init=None, tol=tol, max_iter=2000)
        gains = [b - a for a, b in itertools.pairwise(result.history)]
        assert result.converged
        assert gains[-1] < tol * 90
        assert gains[-1] <= gains[-2]
        # No earlier step was a plateau: it rose by more, by as much as the step before it, or more was left in all.
        for end, (before, gain) in enumerate(itertools.pairwise(gains[:-1]), 3):
            left = aitken(result.history[:end])
            assert gain >= tol * 90 or gain >= before or left is None or left >= tol * 90


def test_a_slow_beginning_is_no_plateau(device: torch.device) -> None:
    """Components that are almost equal part slowly at first: gains below tol that grow must not end the fit."""
    x = blobs(200, 1, 2, gap=3.0).to(device)
    model = mixture(2, 1, "spherical", device=device)
    middle = float(x.mean())
    model.means, model.covariances = [[middle - 1e-3], [middle + 1e-3]], [1.0, 1.0]
    model.component.freeze("covariances")
    result = fit(model, x, init=None, max_iter=500)
    gains = [b - a for a, b in itertools.pairwise(result.history)]
    assert gains[0] < gains[1] < 1e-3 * 200, "the start climbed at once: nothing is shown"
    assert result.converged
    assert float(model.means.detach().sort(0).values.diff(dim=0)) == pytest.approx(3.0, abs=0.3)


def test_tol_zero_runs_all_iterations(device: torch.device) -> None:
    result = fit(started(data(), 3, device=device), data(device), max_iter=150, **FIXED)
    assert (result.status, result.n_iter, len(result.history)) == ("max_iter", 150, 151)


def test_max_iter_zero_evaluates_only(device: torch.device) -> None:
    model = started(data(), 3, device=device)
    before = copy.deepcopy(model)
    result = fit(model, data(device), max_iter=0, **FIXED)
    assert (result.status, result.n_iter) == ("max_iter", 0)
    assert gap(model, before) < 1e-13
    assert result.bound == pytest.approx(loglik(before, data(device)), rel=1e-12)


def test_convergence_on_the_last_iteration_is_convergence(device: torch.device) -> None:
    free = fit(started(data(), 3, device=device), data(device), init=None, max_iter=1000)
    exact = fit(started(data(), 3, device=device), data(device), init=None, max_iter=free.n_iter)
    short = fit(started(data(), 3, device=device), data(device), init=None, max_iter=free.n_iter - 1)
    assert (exact.status, exact.history) == ("converged", free.history)
    assert short.status == "max_iter"


def test_a_fit_can_be_continued(device: torch.device) -> None:
    model = started(data(), 3, device=device)
    first = fit(model, data(device), max_iter=6, **FIXED)
    second = fit(model, data(device), max_iter=6, **FIXED)
    whole = fit(started(data(), 3, device=device), data(device), max_iter=12, **FIXED)
    assert first.history + second.history[1:] == pytest.approx(whole.history, rel=1e-12)
    assert gap(model, whole.model) < 1e-10


def test_seconds(device: torch.device) -> None:
    assert 0 < fit(mixture(2, 2, device=device), data(device), max_iter=1).seconds < 60


# ---- warnings -----------------------------------------------------------------------------------------------------


def test_no_warning_when_converged(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torchem.fit(mixture(3, 2, device=device), data(device), seed=0, max_iter=1000, progress=False).converged


def test_a_plain_sentence_when_stopped_while_climbing(device: torch.device) -> None:
    with pytest.warns(ConvergenceWarning) as record:
        result = torchem.fit(mixture(3, 2, device=device), data(device), tol=1e-9, max_iter=5, seed=0, progress=False)
    assert result.status == "max_iter"
    assert len(record) == 1
    text = str(record[0].message)
    assert re.fullmatch(
        r"fit: stopped after 5 iterations while still climbing "
        r"\(last gain [0-9.e+-]+ nats(, about [0-9.e+-]+ in all are left)?\); "
        r"raise max_iter, or tol if that is near enough\.",
        text,
    ), text


SCRIPT = """
import warnings
import torch, torchem

x = torch.arange(40.0).reshape(20, 2) ** 1.5
options = dict(tol=1e-9, max_iter=2, seed=0, progress=False)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    torchem.fit(torchem.GaussianMixture(3, 2), x, **options)
    torchem.Trainer(**options).fit(torchem.GaussianMixture(3, 2), x)
    torchem.fit(torchem.GaussianMixture(3, 2), x, init=None, **options)
    torchem.Trainer(init=None, **options).fit(torchem.GaussianMixture(3, 2), x)
print(*sorted({(w.category.__name__, w.lineno) for w in found if w.filename == "<string>"}), sep="\\n")
print(sum(w.filename != "<string>" for w in found), "elsewhere")
"""


def test_warnings_point_to_the_line_that_called() -> None:
    # In a process of its own: the checks of annotations that tests run under are frames that users do not have.
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    expected = [("ConvergenceWarning", line) for line in (9, 10)] + [("SymmetryWarning", line) for line in (11, 12)]
    assert run.stdout.splitlines() == [*map(str, expected), "0 elsewhere"]


@pytest.mark.parametrize("max_iter", [0, 5])
def test_no_warning_where_a_fixed_number_was_asked_for(max_iter: int, device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchem.fit(mixture(3, 2, device=device), data(device), tol=0, max_iter=max_iter, seed=0, progress=False)


def test_no_warning_where_the_callback_stopped(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchem.fit(mixture(3, 2, device=device), data(device), seed=0, callbacks=[lambda p: True], progress=False)


# ---- verdict and Aitken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "tolerance", "expected"),
    [
        ([], 1.0, None),
        ([-5.0], 1.0, None),
        ([-5.0, -4.5], 1.0, None),
        ([-6.0, -5.0, -4.5], 1.0, "converged"),
        ([-5.5, -5.0, -4.5], 1.0, None),
        ([-5.7, -5.0, -4.5], 1.0, None),  # more than one is left
        ([-5.2, -5.0, -4.5], 1.0, None),
        ([-8.0, -5.0, -4.0], 1.0, None),
        ([-5.0, -3.0], 1.0, None),
        ([-5.0, -5.0], 1.0, "converged"),
        ([-5.0, -5.0], 0.0, None),
        ([-5.0, -5.0 - 1e-12], 1.0, "converged"),
        ([-5.0, -5.0 - 1e-12], 0.0, None),
        ([-5.0, -5.1], 1.0, "diverged"),
        ([-5.0, -5.1], 0.0, "diverged"),
        ([0.0, -1e-12], 1.0, "converged"),
        ([-1e9, -1e9 - 0.5], 0.1, "converged"),
        ([-1e9, -1e9 - 5.0], 0.1, "diverged"),
        ([-100.0, -5.0, -5.0], 1.0, "converged"),
        ([1.0, math.nan], 1.0, "nonfinite"),
        ([math.nan, 1.0], 1.0, None),
        ([1.0, math.inf], 0.0, "nonfinite"),
        ([1.0, -math.inf], 0.0, "nonfinite"),
    ],
)
def test_verdict(history: list[float], tolerance: float, expected: str | None) -> None:
    assert verdict(history, tolerance, 1e-9) == expected


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(0.01, 0.99), st.integers(3, 12))
def test_aitken_is_exact_on_a_geometric_tail(limit: float, size: float, rate: float, n: int) -> None:
    history = [limit - size * rate**i for i in range(n)]
    left = size * rate ** (n - 1)
    estimate = aitken(history)
    # Only where rounding leaves the differences their meaning.
    if left > 1e-4 * max(1.0, abs(limit)) and rate < 0.9:
        assert estimate == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], None),
        ([1.0, 2.0], None),
        ([0.0, 4.0, 6.0], 2.0),
        ([0.0, 1.0, 1.0], 0.0),
        ([0.0, 1.0, 0.5], 0.0),
        ([0.0, 1.0, 2.0], None),
        ([0.0, 1.0, 3.0], None),
        ([0.0, -1.0, 1.0], None),
        ([math.nan, 1.0, 1.5], None),
        ([-math.inf, 1.0, 1.5], None),
        ([math.nan, 0.0, 4.0, 6.0], 2.0),
    ],
)
def test_aitken(history: list[float], expected: float | None) -> None:
    assert aitken(history) == expected


def test_what_remains_is_estimated(device: torch.device) -> None:
    x = blobs(200, 1, 2, gap=3.0).to(device)
    final = fit(started(x.cpu(), 2, device=device), x, max_iter=800, **FIXED).bound
    result = fit(started(x.cpu(), 2, device=device), x, max_iter=60, **FIXED)
    assert result.remaining is not None
    assert result.remaining == pytest.approx(final - result.bound, rel=0.5, abs=1e-6)


# ---- interruption -------------------------------------------------------------------------------------------------


class Interrupting(torchem.GaussianMixture):
    """Ctrl-C at a given call of a given method, as it may come anywhere."""

    where: tuple[str, int] = ("", 0)
    calls: dict[str, int]

    def _strike(self, name: str) -> None:
        calls = Interrupting.calls
        calls[name] = calls.get(name, 0) + 1
        if (name, calls[name] - 1) == Interrupting.where:
            raise KeyboardInterrupt

    def e_step(self, batch: torchem.Batch) -> torchem.Stats:
        stats = super().e_step(batch)
        self._strike("e_step")
        return stats

    def maximize(self, stats: torchem.Stats) -> dict[str, torch.Tensor]:
        values = super().maximize(stats)
        self._strike("maximize")
        return values

    def assign(self, values: dict[str, torch.Tensor]) -> None:
        super().assign(values)
        self._strike("assign")


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("moment", [0, 1, 4])
@pytest.mark.parametrize("name", ["e_step", "maximize", "callback", "stop"])
def test_ctrl_c_returns_the_best_so_far(name: str, moment: int, restarts: int, device: torch.device) -> None:
    x = data(device)
    Interrupting.calls, Interrupting.where = {}, (name, moment)

    def strike(progress: Progress) -> bool:
        if name == "callback" and progress.iteration == moment:
            raise KeyboardInterrupt
        return name == "stop" and progress.iteration == moment

    model = Interrupting(3, 2).double().to(device)
    result = fit(model, x, restarts=restarts, tol=0.0, max_iter=20, callbacks=[strike])
    assert (result.status, result.converged) == ("interrupted", False)
    assert result.statuses == ["interrupted"] * restarts
    assert result.model is model
    healthy(model)
    # The E-step that was cut short never told its objective.
    known = moment if name == "e_step" else moment + 1
    assert len(result.history) == known
    if known:
        assert result.n_iter == known - 1
        assert result.bound == result.history[-1] == max(result.restarts)
        assert loglik(model, x) == pytest.approx(result.bound, rel=1e-12)
    else:
        assert result.n_iter == 0


def test_ctrl_c_after_some_restarts_have_ended(device: torch.device) -> None:
    x = data(device)
    full = fit(mixture(3, 2, device=device), x, restarts=6, init="random_from_data", max_iter=500)
    ends = sorted(len(history) for history in full.histories)
    assert ends[0] < ends[-1] - 1, "all restarts stopped together: nothing is shown"

    def strike(progress: Progress) -> None:
        if progress.iteration == ends[0] + 1:
            raise KeyboardInterrupt

    model = mixture(3, 2, device=device)
    result = fit(model, x, restarts=6, init="random_from_data", max_iter=500, callbacks=[strike])
    assert set(result.statuses) == {"converged", "interrupted"}
    assert result.bound == max(result.restarts)
    assert loglik(model, x) == pytest.approx(result.bound, rel=1e-12)


def test_ctrl_c_before_the_loop_is_the_users(device: torch.device) -> None:
    class Slow:
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    model = started(data(), 3, device=device)
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Slow())
    assert same(model, before)


# ---- exceptions ---------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("init", ["auto", "random"])
@pytest.mark.parametrize("moment", [0, 1, 3])
def test_an_exception_leaves_the_model_as_it_was(moment: int, init: str, restarts: int, device: torch.device) -> None:
    def explode(progress: Progress) -> None:
        if progress.iteration == moment:
            raise Boom

    model = started(data(), 3, device=device)
    before = copy.deepcopy(model)
    with pytest.raises(Boom):
        fit(model, data(device), init=init, restarts=restarts, callbacks=[explode])
    assert same(model, before)
    assert vars(model.component)["direct"] == vars(before.component)["direct"]
    assert model.component.version == before.component.version


def test_a_loader_that_fails_leaves_the_model_as_it_was(device: torch.device) -> None:
    class Loader:
        passes = 0

        def __iter__(self) -> Any:
            yield torchem.Batch(data())
            self.passes += 1
            if self.passes > 3:
                raise Boom

    model = started(data(), 3, device=device)
    before = copy.deepcopy(model)
    with pytest.raises(Boom):
        fit(model, Loader(), max_iter=20, **FIXED)
    assert same(model, before)


def test_parameters_are_the_same_objects_after_a_fit(device: torch.device) -> None:
    """An optimiser or a user who holds a parameter keeps the one that the model uses."""
    model = started(data(), 3, device=device)
    held = dict(model.named_parameters())
    fit(model, data(device), restarts=2)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in held.items())
    assert all(value.requires_grad and value.is_leaf for value in after.values())


def test_requires_grad_and_training_mode_are_left_as_found(device: torch.device) -> None:
    model = started(data(), 3, device=device).eval()
    model.component.mean.requires_grad_(False)
    fit(model, data(device), restarts=2)
    assert not model.training
    assert [p.requires_grad for p in (model.component.mean, model.component.scale)] == [False, True]


# ---- dead and collapsed components --------------------------------------------------------------------------------


def with_a_dead_one(device: torch.device, covariance_type: str = "full") -> torchem.GaussianMixture:
    model = started(data(), 3, covariance_type, device=device)
    means = model.means.detach().clone()
    means[1] = 1e3
    model.means = means
    return model


def collapsing(device: Any = "cpu") -> torch.Tensor:
    """Thirty equal rows, on which one of two components must collapse, and a cloud."""
    return torch.cat([torch.zeros(30, 2, dtype=torch.float64), randn(60, 2, seed=3) + 20]).to(device)


def test_floor_keeps_and_names_the_dead(device: torch.device) -> None:
    model = with_a_dead_one(device)
    result = fit(model, data(device), init=None)
    assert (result.dead, result.pruned) == ([1], [])
    assert model.n_components == 3
    assert torch.equal(model.means[1].detach().cpu(), torch.full((2,), 1e3).double())


def test_floor_keeps_and_names_the_collapsed(device: torch.device) -> None:
    model = mixture(2, 2, device=device)
    result = fit(model, collapsing(device), init="kmeans")
    collapsed = int(model.most_likely(torch.zeros(1, 2).to(device)))
    assert (result.floored, result.dead) == ([collapsed], [])


def test_nothing_is_named_where_all_is_well(device: torch.device) -> None:
    for restarts in (1, 3):
        result = fit(mixture(3, 2, device=device), data(device), restarts=restarts)
        assert (result.dead, result.floored, result.pruned) == ([], [], [])


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_respawn_brings_the_dead_back(covariance_type: str, device: torch.device) -> None:
    x = data(device)
    kept = fit(with_a_dead_one(device, covariance_type), x, init=None)
    model = with_a_dead_one(device, covariance_type)
    result = fit(model, x, init=None, dead="respawn", max_iter=300)
    assert result.dead == []
    assert result.status in ("converged", "max_iter")
    assert float(model.weights.detach().min()) > 0.01
    assert float(model.means.detach().abs().max()) < 100
    assert result.bound > kept.bound
    assert loglik(model, x) == pytest.approx(result.bound, rel=1e-12)


def test_respawn_comes_to_an_end(device: torch.device) -> None:
    # Components that collapse on duplicates collapse again and again: the fit must not reseed for ever.
    x = torch.zeros(40, 2, dtype=torch.float64, device=device)
    x[20:] = 1.0
    model = mixture(6, 2, device=device)
    result = fit(model, x, dead="respawn", max_iter=400)
    healthy(model)
    assert result.status == "converged"
    assert result.n_iter < 400


@pytest.mark.parametrize("restarts", [1, 4])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_prune_takes_the_dead_out(covariance_type: str, restarts: int, device: torch.device) -> None:
    x = data(device)
    if restarts == 1:
        model = with_a_dead_one(device, covariance_type)
        result = fit(model, x, init=None, dead="prune")
        assert (result.pruned, model.n_components) == ([1], 2)
        if covariance_type != "tied":
            two = started(data(), 3, covariance_type, device=device)
            two.prune(torch.tensor([0, 2], device=device))
            fit(two, x, init=None)
            # The weights differ at the start, the optimum does not.
            assert two.means.shape == model.means.shape
    else:
        model = mixture(8, 2, covariance_type, device=device)
        result = fit(model, collapsing(device), dead="prune", restarts=restarts, init="random_from_data")
        assert model.n_components == 8 - len(result.pruned) >= 1
    healthy(model)
    k = model.n_components
    shapes = {"full": (k, 2, 2), "tied": (2, 2), "diag": (k, 2), "spherical": (k,)}
    assert (model.weights.shape, model.means.shape) == ((k,), (k, 2))
    assert model.covariances.shape == shapes[covariance_type]
    assert result.dead == []
    assert set(result.floored) <= set(range(k))
    rows = x if restarts == 1 else collapsing(device)
    assert model.posterior(rows).shape == (90, k)
    assert loglik(model, rows) == pytest.approx(result.bound, rel=1e-9)


def test_a_pruned_model_is_a_model_of_its_own(device: torch.device) -> None:
    model = with_a_dead_one(device)
    fit(model, data(device), init=None, dead="prune")
    assert torchem.GaussianMixture(**model.config()).means.shape == (2, 2)
    assert model.n_parameters() == mixture(2, 2).n_parameters()
    again = fit(model, data(device), init=None)
    assert again.converged
    assert model.sample(5).shape == (5, 2)


def test_prune_never_takes_the_last(device: torch.device) -> None:
    model = mixture(3, 2, device=device)
    result = fit(model, torch.ones(20, 2, dtype=torch.float64, device=device), dead="prune")
    assert model.n_components >= 1
    assert len(result.pruned) == 3 - model.n_components
    healthy(model)


def test_raise_names_the_dead(device: torch.device) -> None:
    model = with_a_dead_one(device)
    before = copy.deepcopy(model)
    with pytest.raises(DegenerateComponent) as error:
        fit(model, data(device), init=None, dead="raise")
    assert str(error.value) == (
        "component 1 of restart 0 has lost its mass; lower n_components, raise the floor, "
        "or choose dead='floor', 'respawn' or 'prune'."
    )
    assert same(model, before)


def test_raise_names_the_collapsed(device: torch.device) -> None:
    with pytest.raises(DegenerateComponent, match=r"component [01] of restart [0-2] has collapsed"):
        fit(mixture(2, 2, device=device), collapsing(device), init="kmeans", dead="raise", restarts=3)


@pytest.mark.parametrize("dead", ["respawn", "prune", "raise"])
def test_a_policy_that_is_not_needed_changes_nothing(dead: Any, device: torch.device) -> None:
    plain = fit(mixture(3, 2, device=device), data(device), restarts=2)
    other = fit(mixture(3, 2, device=device), data(device), restarts=2, dead=dead)
    assert other.histories == plain.histories
    assert gap(plain.model, other.model) == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_mass_is_judged_relative_to_the_weights(scale: float, device: torch.device) -> None:
    weights = torch.full((90,), scale)
    result = fit(with_a_dead_one(device), data(device), init=None, weights=weights)
    assert result.dead == [1]
    assert fit(mixture(3, 2, device=device), data(device), weights=weights).dead == []


def test_a_light_component_is_not_dead(device: torch.device) -> None:
    x = torch.cat([blobs(20_000, 2, 1), torch.tensor([[500.0, 500.0], [501.0, 500.0], [500.0, 501.0]]).double()])
    model = mixture(2, 2, device=device)
    model.means = [[0.0, 0.0], [500.0, 500.0]]
    result = fit(model, x.to(device), init=None)
    assert result.dead == []
    assert float(model.weights.detach()[1]) == pytest.approx(3 / 20_003, rel=1e-3)


# ---- freezing, tying, one component -------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("view", ["means", "covariances"])
def test_what_is_frozen_stays(view: str, covariance_type: str, device: torch.device) -> None:
    model = started(data(), 3, covariance_type, device=device)
    model.component.freeze(view)
    before = {name: getattr(model, name).detach().clone() for name in ("means", "covariances", "weights")}
    result = fit(model, data(device), max_iter=30, **FIXED)
    for name, value in before.items():
        assert torch.equal(getattr(model, name).detach(), value) == (name == view)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


def test_frozen_weights(device: torch.device) -> None:
    model = started(data(), 3, device=device)
    model.weights = [0.2, 0.3, 0.5]
    model.mixing.freeze()
    fit(model, data(device), max_iter=10, **FIXED)
    torch.testing.assert_close(model.weights.detach().cpu(), torch.tensor([0.2, 0.3, 0.5]).double())


def test_everything_frozen_converges_at_once(device: torch.device) -> None:
    model = started(data(), 3, device=device)
    before = copy.deepcopy(model)
    model.component.freeze()
    model.mixing.freeze()
    result = fit(model, data(device), init=None)
    assert (result.status, result.n_iter) == ("converged", 1)
    assert gap(model, before) == 0


def test_one_frozen_mean(device: torch.device) -> None:
    model = started(data(), 3, device=device)
    pinned = model.means[1].detach().clone()
    model.component.freeze("means", mask=torch.tensor([False, True, False]))
    fit(model, data(device), max_iter=10, **FIXED)
    assert torch.equal(model.means[1].detach(), pinned)
    assert not torch.equal(model.means[0].detach(), started(data(), 3, device=device).means[0].detach())


def test_tied_is_one_covariance(device: torch.device) -> None:
    x = blobs(300, 2, 3, gap=20.0)
    model = mixture(3, 2, "tied", device=device)
    fit(model, x.to(device))
    assert model.covariances.shape == (2, 2)
    within = torch.stack([x[c::3].mT.cov(correction=0) for c in range(3)]).mean(0)
    torch.testing.assert_close(model.covariances.detach().cpu(), within, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("restarts", [1, 2])
def test_one_component_is_the_closed_form(covariance_type: str, restarts: int, device: torch.device) -> None:
    x = randn(70, 3, seed=6) * torch.tensor([1.0, 3.0, 0.1]) + 2
    weights = rand(70, seed=7)
    model = mixture(1, 3, covariance_type, device=device)
    result = fit(model, x.to(device), weights=weights, restarts=restarts)
    mean = (weights.unsqueeze(-1) * x).sum(0) / weights.sum()
    covariance = (weights.unsqueeze(-1) * (x - mean)).mT @ (x - mean) / weights.sum()
    expected = {
        "full": covariance, "tied": covariance, "diag": covariance.diagonal().diag(),
        "spherical": covariance.diagonal().mean() * torch.eye(3).double(),
    }[covariance_type]  # fmt: skip
    assert result.converged
    assert result.n_iter <= 2
    torch.testing.assert_close(model.means.detach().cpu()[0], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dense(model)[0], expected, rtol=1e-10, atol=1e-10)
    assert float(model.weights.detach()[0]) == 1.0


# ---- data types, callbacks, options -------------------------------------------------------------------------------


def test_float32_model_and_float64_data(device: torch.device) -> None:
    """The model's type is what is computed in, the default one of torch; data come as they are."""
    x = data(device)
    assert x.dtype == torch.float64
    model = torchem.GaussianMixture(3, 2).to(device)
    result = fit(model, x)
    double = fit(mixture(3, 2, device=device), x)
    assert model.means.dtype == torch.float32
    assert model.log_prob(x).dtype == torch.float32
    assert isinstance(result.bound, float)
    assert result.bound == pytest.approx(double.bound, rel=1e-4)
    assert x.dtype == torch.float64


def test_callbacks_see_what_goes_on(device: torch.device) -> None:
    record, order = Recorder(), []
    result = fit(
        mixture(3, 2, device=device), data(device), restarts=3, init="random_from_data", max_iter=100,
        callbacks=[lambda p: order.append("first"), record, lambda p: order.append("second")],
    )  # fmt: skip
    longest = max(map(len, result.histories))
    assert [seen[0] for seen in record.seen] == list(range(longest))
    assert order == ["first", "second"] * longest
    for iteration, objective, restarts in record.seen:
        assert objective == [result.histories[r][iteration] for r in restarts]
        assert restarts == [r for r in range(3) if len(result.histories[r]) > iteration]


def test_a_true_answer_interrupts(device: torch.device) -> None:
    record = Recorder(stop_at=4)
    model = started(data(), 3, device=device)
    result = fit(model, data(device), callbacks=[record], max_iter=50, **FIXED)
    assert (result.status, result.n_iter, len(result.history)) == ("interrupted", 4, 5)
    assert loglik(model, data(device)) == pytest.approx(result.bound, rel=1e-12)
    reference = fit(started(data(), 3, device=device), data(device), max_iter=4, **FIXED)
    assert gap(model, reference.model) < 1e-12


def test_a_trainer_serves_many_fits(device: torch.device) -> None:
    trainer = torchem.Trainer(seed=0, tol=0.0, max_iter=5, progress=False)
    first = trainer.fit(mixture(3, 2, device=device), data(device))
    second = trainer.fit(mixture(2, 3, device=device), blobs(50, 3, 2).to(device))
    again = trainer.fit(mixture(3, 2, device=device), data(device))
    assert first.history == again.history
    assert second.n_iter == 5
    assert first.history == fit(mixture(3, 2, device=device), data(device), tol=0.0, max_iter=5).history


def test_device_moves_the_model(device: torch.device) -> None:
    model = mixture(3, 2)
    result = fit(model, data(), device=str(device))
    assert model.device.type == device.type
    assert result.model is model


@pytest.mark.parametrize("progress", [True, False])
def test_no_bar_where_there_is_no_terminal(progress: bool, device: torch.device, capsys: pytest.CaptureFixture) -> None:
    torchem.fit(mixture(2, 2, device=device), data(device), seed=0, tol=0.0, max_iter=5, progress=progress)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_on_a_terminal(progress: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    torchem.fit(mixture(2, 2, device=device), data(device), seed=0, tol=0.0, max_iter=5, progress=progress)
    assert ("EM" in terminal.getvalue()) == progress


def test_options_are_the_same_in_both() -> None:
    from inspect import signature

    options = {n: (p.default, p.kind) for n, p in signature(torchem.Trainer).parameters.items()}
    ours = {n: (p.default, p.kind) for n, p in signature(torchem.fit).parameters.items()}
    for name in (
        "model",
        "data",
        "weights",
        "inputs",
        "lengths",
        "labels",
        "observed",
        "offset",
        "trials",
        "validation",
    ):
        ours.pop(name)
    assert ours == options


def test_an_accumulator_of_ones_own(device: torch.device) -> None:
    """The rule that gathers statistics is a choice of the user; the loop must only follow its protocol."""

    class Noting(torchem.FullBatch):
        keys: list[Any]

        def reset(self) -> None:
            super().reset()
            self.keys = []

        def push(self, key: Any, stats: torchem.Stats) -> torchem.Stats | None:
            self.keys.append(key)
            return super().push(key, stats)

    rule = Noting()
    result = fit(started(data(), 3, device=device), data(device), accumulate=rule, batch_size=40, max_iter=2, **FIXED)
    assert rule.keys == [0, 1, 2] * 3
    assert rule.total is None
    assert result.history == pytest.approx(
        fit(started(data(), 3, device=device), data(device), max_iter=2, **FIXED).history, rel=1e-12
    )


def test_a_rule_that_never_answers_is_refused(device: torch.device) -> None:
    class Mute(torchem.FullBatch):
        def flush(self) -> torchem.Stats | None:
            return None

    with pytest.raises(InvalidArgument, match="at least one batch"):
        fit(mixture(2, 2, device=device), data(device), accumulate=Mute())
