"""The laws of accumulation: full batch, stochastic and incremental rules, for every model."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

import torchem
from tests.laws import cases
from tests.laws.cases import ModelCase, close, close_dict, close_stats, every_model
from torchem.accumulate import Accumulator, FullBatch, Incremental, Stochastic
from torchem.batch import Batch
from torchem.model import LatentModel
from torchem.stats import Stats

pytestmark = pytest.mark.usefixtures("_routes_by_rounding")


def stochastic(rate: Callable[[int], float] | float, total: float, start: Stats | None = None) -> Stochastic:
    rule = Stochastic(rate)
    if start is None:
        rule.weight = total
    else:
        rule.begin(total, start)
    return rule


ROOMY = every_model(only=lambda name: "N1" not in name)


def parts(batch: Batch, count: int) -> list[tuple[int, Batch]]:
    return list(enumerate(batch.split(-(-len(batch) // count))))


def one_pass(model: LatentModel, data: Iterable[tuple[int, Batch]], rule: Accumulator) -> Iterator[float]:
    """The loop that every algorithm shares; yields the bound at the statistics of each M-step, just before it."""
    for key, batch in data:
        stats = rule.push(key, model.e_step(batch))
        if stats is not None:
            yield float(model.bound(stats))
            model.m_step(stats)
    stats = rule.flush()
    if stats is not None:
        yield float(model.bound(stats))
        model.m_step(stats)


def run(model: LatentModel, data: list[tuple[int, Batch]], rule: Accumulator, passes: int) -> list[float]:
    with torch.no_grad():
        return [value for _ in range(passes) for value in one_pass(model, data, rule)]


def same_parameters(a: LatentModel, b: LatentModel, rtol: float) -> None:
    close_dict(dict(a.named_parameters()), dict(b.named_parameters()), rtol)


def test_the_rules_are_accumulators() -> None:
    for rule in (FullBatch, Stochastic, Incremental):
        assert isinstance(rule(), Accumulator)
        assert getattr(torchem, rule.__name__) is rule


@ROOMY
def test_full_batch_is_em_however_the_data_are_cut(build, device: torch.device) -> None:
    case = build().to(device)
    classic = copy.deepcopy(case.model)
    for _ in range(3):
        classic.m_step(classic.e_step(case.batch))
    for count in (1, 2, 7):
        model = copy.deepcopy(case.model)
        bounds = run(model, parts(case.batch, count), FullBatch(), 3)
        assert len(bounds) == 3
        same_parameters(model, classic, 1e-8)


def test_full_batch_between_passes() -> None:
    rule, one = FullBatch(), Stats(n=torch.ones(2, dtype=torch.float64))
    assert rule.flush() is None
    assert rule.push("a", one) is None
    assert rule.push("b", one * 2) is None
    close_stats(rule.flush(), one * 3)
    assert rule.flush() is None, "a pass must not leak into the next"
    rule.push("a", one)
    rule.translate(lambda stats: stats * 10)
    close_stats(rule.flush(), one * 10)
    rule.push("a", one)
    rule.reset()
    assert rule.flush() is None
    assert torch.equal(one["n"], torch.ones(2, dtype=torch.float64)), "what was pushed must not be changed"


@ROOMY
def test_stochastic_of_rate_one_on_one_batch_is_em(build, device: torch.device) -> None:
    case = build().to(device)
    model, classic = copy.deepcopy(case.model), copy.deepcopy(case.model)
    total = float(case.batch.total_weight())
    # Whatever the statistics began as, rate one forgets it.
    start = model.e_step(case.batch) * 17.0
    run(model, parts(case.batch, 1), stochastic(1.0, total, start), 4)
    for _ in range(4):
        classic.m_step(classic.e_step(case.batch))
    same_parameters(model, classic, 1e-8)


def test_stochastic_converges_to_the_optimum_of_em(device: torch.device) -> None:
    x = cases.blobs(600, 2, 3, spread=5.0)
    model = cases.mixture(3, 2, "full")
    model.means = x[[0, 1, 2]]
    case = ModelCase(model, Batch(x)).to(device)
    classic = copy.deepcopy(case.model)
    for _ in range(60):
        classic.m_step(classic.e_step(case.batch))
    model = copy.deepcopy(case.model)
    rule = stochastic(lambda step: (step + 2) ** -0.7, 600.0, model.e_step(case.batch))
    # The last batch is short: the scale must follow it.
    run(model, parts(case.batch, 7), rule, 60)
    close(model.log_prob(case.batch).mean(), classic.log_prob(case.batch).mean(), rtol=2e-3)


@ROOMY
def test_incremental_bound_never_falls_after_the_first_pass(build, device: torch.device) -> None:
    case = build().to(device)
    case.model.project()
    data = parts(case.batch, 4)
    bounds = run(case.model, data, Incremental(), 7)
    # The end of a pass is a step too, on the same total summed anew.
    assert len(bounds) == 6 * (len(data) + 1) + 1
    for before, after in itertools.pairwise(bounds):
        assert after >= before - 1e-9 * (1 + abs(before))


@every_model(only=lambda name: "K3-D2" in name or "labels" in name or name.startswith("Mixture"))
def test_incremental_rests_where_em_rests(build, device: torch.device) -> None:
    """At a fixed point of EM the memos are the batch statistics, and nothing moves."""
    case = build().to(device)
    case.model.project()
    with torch.no_grad():
        for _ in range(200):
            case.model.m_step(case.model.e_step(case.batch))
    rested = copy.deepcopy(case.model)
    data = parts(case.batch, 4)
    run(case.model, data, Incremental(), 3)
    before, after = rested.log_prob(case.batch).sum(), case.model.log_prob(case.batch).sum()
    assert float((after - before).detach()) >= -1e-6 * (1 + abs(float(before.detach())))
    close(before, after, rtol=1e-3, atol=1e-3)


def change_of_origin(model: LatentModel) -> Callable[[Stats], Stats] | None:
    """Let the model adapt as for a very long pass; the map for older statistics, if it moved."""
    adjustment = model.tune(1 << 40)
    return None if adjustment is None else adjustment.move


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
@pytest.mark.parametrize("rule", ["full", "stochastic", "incremental"])
def test_origins_may_move_in_the_middle(kind: str, rule: str, device: torch.device) -> None:
    """Tight clusters far apart: what was accumulated follows the origins, and the result is as without a move."""
    x = cases.blobs(80, 2, 3, spread=3e4)
    model = cases.mixture(3, 2, kind)
    model.means = 3e4 * cases.randn(3, 2)  # where the blobs are
    case = ModelCase(model, Batch(x)).to(device)
    data = parts(case.batch, 4)
    make = {
        "full": FullBatch,
        "stochastic": lambda: stochastic(0.6, 80.0),
        "incremental": Incremental,
    }[rule]
    plain, moved = copy.deepcopy(case.model), copy.deepcopy(case.model)
    left, right = make(), make()
    versions = {moved.component.version}
    with torch.no_grad():
        for _ in range(3):
            for key, batch in data:
                for model, accumulator in ((plain, left), (moved, right)):
                    stats = accumulator.push(key, model.e_step(batch))
                    if stats is not None:
                        model.m_step(stats)
                move = change_of_origin(moved)
                if move is not None:
                    right.translate(move)
                versions.add(moved.component.version)
            for model, accumulator in ((plain, left), (moved, right)):
                stats = accumulator.flush()
                if stats is not None:
                    model.m_step(stats)
    assert len(versions) > 1, "the case must move an origin"
    close(moved.means, plain.means, rtol=1e-9)
    # About the far origin second moments lose what the move is there to save.
    close(moved.covariances, plain.covariances, rtol=1e-5, atol=1e-4)


def test_statistics_about_different_origins_refuse_to_add() -> None:
    x = cases.blobs(40, 2, 3, spread=3e4)
    model = cases.mixture(3, 2, "full")
    model.means = x[[0, 1, 5]]
    before = model.e_step(Batch(x))
    move = change_of_origin(model)
    assert move is not None
    after = model.e_step(Batch(x))
    with pytest.raises(torchem.errors.InvalidArgument, match="origin"):
        before + after
    close_stats(move(before), after, rtol=1e-7)
    close(model.bound(move(before)), model.bound(after), rtol=1e-9)
