"""Several processes as one: what they exchange, and that no rank is left waiting when another one has bad luck."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch

import torchem
from tests.regressions import ranks
from tests.regressions.common import blobs, fit, mixture, parameters, started
from torchem import distributed

N = 60


def data() -> torch.Tensor:
    return blobs(N, 2, 2, gap=3.0)


def mine(rank: int, world: int) -> torch.Tensor:
    return data()[rank::world].clone()


# ---- alone --------------------------------------------------------------------------------------------------------


def test_alone() -> None:
    stats = torchem.Stats(n=torch.tensor([1.0, 2.0]))
    model = mixture(2, 2)
    assert (distributed.active(), distributed.rank()) == (False, 0)
    assert distributed.all_reduce(stats) is stats
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    distributed.broadcast(model)


# ---- together -----------------------------------------------------------------------------------------------------


def _exchange(rank: int, world: int) -> dict[str, Any]:
    inner = torchem.Stats(a=torch.full((2,), float(rank + 1), dtype=torch.float64), shared={"a"}, version=3)
    total = distributed.all_reduce(torchem.Stats(inner=inner, n=torch.tensor(rank, dtype=torch.float64)))
    model = mixture(2, 2)
    model.weights = [1.0, 0.0] if rank == 0 else [0.5, 0.5]
    model.means = torch.full((2, 2), float(rank))
    distributed.broadcast(model)
    return {
        "active": distributed.active(), "rank": distributed.rank(), "gathered": distributed.gather(("x", rank)),
        "sum": total["inner"]["a"].tolist(), "n": float(total["n"]), "version": total["inner"].version,
        "shared": sorted(total["inner"].shared), "means": model.means.tolist(),
        "support": model.mixing.support.tolist(),
    }  # fmt: skip


def _unseeded(rank: int, world: int) -> Any:
    result = fit(mixture(3, 2), mine(rank, world), seed=None, init="random", max_iter=3)
    return {name: value.tolist() for name, value in parameters(result.model).items()}


def _seed_per_rank(rank: int, world: int) -> Any:
    result = fit(mixture(3, 2), mine(rank, world), seed=0, init="kmeans", restarts=4, max_iter=3, dead="respawn")
    return result.restarts, result.alignment


def _batches(rank: int, world: int) -> Any:
    # Ranks may cut their shards into different numbers of batches.
    rows = data()[:50] if rank == 0 else data()[50:]
    return fit(started(data(), 2), rows, init=None, batch_size=7 if rank == 0 else 10, tol=0.0, max_iter=5).history


def _rules(rank: int, world: int) -> Any:
    """Eight batches on one rank, one on the other."""
    rows = data()[:50] if rank == 0 else data()[50:]
    size = 7 if rank == 0 else 10
    found = []
    for rule in (torchem.Incremental(), torchem.Stochastic(burn_in=3, average=True)):
        model = started(data(), 2)
        result = fit(model, rows, init=None, batch_size=size, tol=0.0, max_iter=30, accumulate=rule)
        found.append((result.history, model.means.tolist()))
    return found


class Columns(torch.nn.Module):
    """A network that is a normal law."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor([[-1.0, 1.0], [4.0, -4.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -0.5 * (x.unsqueeze(-2) - self.mean).square().sum(-1) - math.log(2 * math.pi)


def networks(rows: torch.Tensor, size: int) -> list[Any]:
    found = []
    options: list[dict[str, Any]] = [
        {}, {"direct": True}, {"accumulate": torchem.Incremental()}, {"accumulate": torchem.Stochastic()}
    ]  # fmt: skip
    for option in options:
        network = torchem.Gradient(torchem.factors.Neural(Columns(), 2), torch.optim.Adam, steps=2, lr=0.1)
        model = torchem.Mixture(torchem.factors.Categorical(2), network).double()
        result = fit(model, rows, init=None, batch_size=size, tol=0.0, max_iter=5, **option)
        found.append((result.history, model.component.factor.module.mean.tolist()))
    return found


def _networks(rank: int, world: int) -> Any:
    return networks(data()[:50] if rank == 0 else data()[50:], 7 if rank == 0 else 10)


def _inf(rank: int, world: int) -> None:
    x = mine(rank, world)
    if rank == 1:
        x[4, 1] = math.inf
    fit(mixture(2, 2), x)


def _shape(rank: int, world: int) -> None:
    fit(mixture(2, 2), mine(rank, world) if rank == 0 else mine(rank, world)[:, :1])


def _weights(rank: int, world: int) -> None:
    fit(mixture(2, 2), mine(rank, world), weights=torch.full((N // world,), 1.0 - 2 * rank))


def _loader_that_fails(rank: int, world: int) -> None:
    class Loader:
        def __iter__(self) -> Any:
            yield torchem.Batch(mine(rank, world))
            if rank == 1:
                yield torchem.Batch(torch.full((2, 2), math.inf, dtype=torch.float64))

    fit(mixture(2, 2), Loader())


def _impossible(rank: int, world: int) -> None:
    model = torchem.Mixture(torchem.factors.Categorical(1), torchem.factors.Categorical(1, 3)).double()
    model.component.probs = [[0.5, 0.5, 0.0]]  # pyright: ignore
    fit(model, torch.tensor([[0], [1], [2 if rank == 1 else 0]]), init=None)


def _nobody(rank: int, world: int) -> None:
    fit(mixture(2, 2), torch.empty(0, 2, dtype=torch.float64))


def _too_few(rank: int, world: int) -> None:
    fit(mixture(5, 2), mine(rank, world)[:2])


def _collapse(rank: int, world: int) -> None:
    x = torch.zeros(20, 1, dtype=torch.float64) if rank else torch.arange(20.0, dtype=torch.float64).unsqueeze(-1) + 50
    fit(mixture(2, 1), x, dead="raise")


def _callback(rank: int, world: int) -> Any:
    result = fit(
        started(data(), 2), mine(rank, world), init=None, tol=0.0, max_iter=20,
        callbacks=[lambda p: rank == 0 and p.iteration == 3],
    )  # fmt: skip
    return result.status, result.n_iter, len(result.history)


def _interrupt(rank: int, world: int) -> Any:
    def stop(progress: torchem.result.Progress) -> None:
        if rank == 0 and progress.iteration == 3:
            raise KeyboardInterrupt

    result = fit(started(data(), 2), mine(rank, world), init=None, tol=0.0, max_iter=20, callbacks=[stop])
    return result.status, result.n_iter, len(result.history)


#: All ranks must raise one of torchem's exceptions whose text has these words.
REFUSED = {
    "inf": (_inf, "inf at row 4, column 1"),
    "shape": (_shape, "2 features"),
    "weights": (_weights, "weights"),
    "loader": (_loader_that_fails, "inf"),
    "impossible": (_impossible, "row 2 of rank 1"),
    "nobody": (_nobody, "at least one observation"),
    "too few": (_too_few, "as many observations as components"),
    "collapse": (_collapse, "has collapsed"),
}
SHARED = {
    "exchange": _exchange, "unseeded": _unseeded, "seeded": _seed_per_rank, "batches": _batches, "rules": _rules,
    "callback": _callback, "interrupt": _interrupt, "networks": _networks,
}  # fmt: skip


@functools.cache
def _outcomes() -> dict[str, list[ranks.Outcome]]:
    jobs = SHARED | {name: function for name, (function, _) in REFUSED.items()}
    return dict(zip(jobs, ranks.run(2, list(jobs.values())), strict=True))


def test_exchange() -> None:
    found = ranks.values(_outcomes()["exchange"])
    for rank, one in enumerate(found):
        assert one["active"] is True
        assert one["rank"] == rank
        assert one["gathered"] == [("x", 0), ("x", 1)]
        assert (one["sum"], one["n"]) == ([3.0, 3.0], 1.0)
        assert (one["version"], one["shared"]) == (3, ["a"])
        assert one["means"] == [[0.0, 0.0], [0.0, 0.0]]
        assert one["support"] == [True, False]


@pytest.mark.parametrize("name", ["unseeded", "seeded"])
def test_ranks_draw_the_same(name: str) -> None:
    first, second = ranks.values(_outcomes()[name])
    assert first == second


def test_eager_rules_step_together() -> None:
    """However many batches a rank has: all hold the same parameters, and incremental EM comes to the optimum."""
    first, second = ranks.values(_outcomes()["rules"])
    assert first == second
    optimum = fit(started(data(), 2), data(), init=None, tol=0.0, max_iter=200).bound
    (incremental, _), (stochastic, _) = first
    assert incremental[-1] == pytest.approx(optimum, rel=1e-6)
    assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(incremental))
    assert stochastic[-1] == pytest.approx(optimum, abs=3.0)


def test_ranks_may_have_different_numbers_of_batches() -> None:
    first, second = ranks.values(_outcomes()["batches"])
    assert first == second
    alone = fit(started(data(), 2), data(), init=None, tol=0.0, max_iter=5)
    assert first == pytest.approx(alone.history, rel=1e-10)


def test_networks_share_their_gradients() -> None:
    first, second = ranks.values(_outcomes()["networks"])
    assert first == second
    for together, alone in zip(first[:2], networks(data(), 20)[:2], strict=True):
        assert together[0] == pytest.approx(alone[0], rel=1e-9)
        assert together[1] == [pytest.approx(row, rel=1e-5) for row in alone[1]]
    incremental = first[2][0]
    assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(incremental))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_luck_of_one_rank_is_raised_on_all(name: str) -> None:
    said = REFUSED[name][1]
    kinds = {kind.__name__ for kind in (torchem.errors.InvalidArgument, torchem.errors.DegenerateComponent)}
    for rank, outcome in enumerate(_outcomes()[name]):
        assert outcome.error in kinds, f"rank {rank}: {outcome.error}: {outcome.message}"
        assert said in outcome.message
        assert outcome.seconds < ranks.PATIENCE


@pytest.mark.parametrize("name", ["callback", "interrupt"])
def test_one_rank_that_stops_stops_all(name: str) -> None:
    for rank, outcome in enumerate(_outcomes()[name]):
        assert outcome.error is None, f"rank {rank}: {outcome.error}: {outcome.message}"
        assert outcome.value == ("interrupted", 3, 4)
        assert outcome.seconds < ranks.PATIENCE
