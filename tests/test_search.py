"""Better optima: races of restarts, kicks, and moves that split and merge."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchem
from tests.regressions.common import as_users_run_it, blobs, fit, gap, mixture, rng
from torchem import priors
from torchem.errors import ConvergenceWarning, InvalidArgument, InvalidType
from torchem.factors import Categorical, LinearGaussian, Poisson, SoftmaxRegression
from torchem.search import ranked

CENTERS = 6.0 * torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).double()
#: From K observations EM ends with two components on one cluster and one on two others, more often than not.
HARD: dict[str, Any] = {"init": "random_from_data", "tol": 1e-4, "max_iter": 300}


def clusters(seed: int = 0) -> torch.Tensor:
    """Nine clusters on a grid."""
    return CENTERS[torch.arange(400) % 9] + torch.randn(400, 2, generator=rng(seed), dtype=torch.float64)


def known(x: torch.Tensor) -> float:
    """The objective of a fit from the truth."""
    model = mixture(9, 2)
    model.means = CENTERS
    return fit(model, x, init=None, tol=1e-4, max_iter=300).bound


def stuck() -> torchem.GaussianMixture:
    """Two components on one cluster, and one that covers two."""
    model = mixture(9, 2)
    model.means = torch.cat([CENTERS[:7], (CENTERS[7:8] + CENTERS[8:]) / 2, CENTERS[:1] + 0.5])
    return model


def search(method: Any, model: Any, data: Any, **options: Any) -> torchem.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return method(model, data, **{"seed": 0, "progress": False, "tol": 1e-4, "max_iter": 300, **options})


# ---- races --------------------------------------------------------------------------------------------------------


def test_a_race_that_is_too_late_is_none() -> None:
    x, options = blobs(80, 2, 4, gap=2.5), {"restarts": 4, "init": "random_from_data", "max_iter": 20, "tol": 0.0}
    plain, late = fit(mixture(4, 2), x, **options), fit(mixture(4, 2), x, race=20, **options)
    assert late.histories == plain.histories
    assert late.statuses == plain.statuses == ["max_iter"] * 4
    assert gap(plain.model, late.model) == 0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"accelerate": "squarem"},
        {"anneal": [0.8]},
        {"e_step": "sample"},
        {"accumulate": torchem.Stochastic, "batch_size": 40},
        {"accumulate": torchem.Incremental, "batch_size": 40},
    ],
    ids=["full", "accelerated", "annealed", "sampled", "stochastic", "incremental"],
)
def test_the_worse_half_is_dropped_and_the_others_run_as_if_alone(more: dict[str, Any]) -> None:
    x = blobs(80, 2, 4, gap=2.5)
    options = {"restarts": 7, "init": "random_from_data", "max_iter": 14, "tol": 0.0, **more}

    def run(**race: Any) -> torchem.Result:
        rule = {"accumulate": more["accumulate"]()} if "accumulate" in more else {}
        return fit(mixture(4, 2), x, **{**options, **rule, **race})

    plain, raced = run(), run(race=4)
    going = list(range(7))
    for cut, left in ((4, 4), (8, 2), (12, 1)):
        if "accelerate" in more:
            break  # refused jumps count as passes but leave no entry
        keep = sorted(going, key=lambda r: -plain.histories[r][cut])[:left]
        for r in set(going) - set(keep):
            assert len(raced.histories[r]) == cut + 1
        going = sorted(keep)
    assert raced.statuses.count("dropped") == 6
    winner = raced.statuses.index("max_iter")
    for r, history in enumerate(raced.histories):
        both = min(len(history), len(plain.histories[r]))
        assert history[:both] == pytest.approx(plain.histories[r][:both], rel=1e-12)
        assert len(history) >= len(plain.histories[r]) or r != winner
    assert raced.history == raced.histories[winner]
    assert raced.bound == raced.restarts[winner]
    assert raced.status == "max_iter"


def test_what_converged_before_a_race_is_over_can_win_it() -> None:
    x = blobs(80, 2, 4, gap=2.5)
    result = fit(mixture(4, 2), x, restarts=16, race=12, init="random_from_data", max_iter=500)
    assert {"converged", "dropped"} == set(result.statuses)
    assert result.bound == max(b for b, s in zip(result.restarts, result.statuses, strict=True) if s == "converged")


def test_held_out_scores_decide_a_race() -> None:
    x, test = blobs(60, 2, 3, gap=2.0), blobs(200, 2, 3, gap=2.0, seed=1)
    options = {"restarts": 6, "init": "random_from_data", "max_iter": 12, "tol": 0.0, "validation": test}
    raced = fit(mixture(5, 2), x, race=3, **options)
    assert raced.scores is not None
    kept = [score for score, status in zip(raced.scores, raced.statuses, strict=True) if status != "dropped"]
    assert kept == [pytest.approx(float(raced.model.log_prob(test).detach().mean()), rel=1e-12)]


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5"])
def test_bad_races(value: Any) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match="race: expected a whole number"):
        torchem.fit(mixture(2, 2), blobs(20, 2, 2), restarts=4, race=value)


def test_races_without_opponents() -> None:
    with pytest.raises(InvalidArgument, match="race: expected None for a single start, got 5; give restarts"):
        fit(mixture(2, 2), blobs(20, 2, 2), race=5)
    vae = torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1)
    with pytest.raises(
        InvalidArgument,
        match="race: expected None for AmortizedModel, got 5; leave it out: its restarts run one after the other",
    ):
        fit(vae, blobs(20, 2, 2), restarts=2, race=5)


# ---- searches -----------------------------------------------------------------------------------------------------


def regressions() -> dict[str, Any]:
    u = torch.randn(150, 2, generator=rng(), dtype=torch.float64)
    slope = torch.tensor([-3.0, 0.0, 3.0]).double()[torch.arange(150) % 3]
    noise = 0.3 * torch.randn(150, generator=rng(1), dtype=torch.float64)
    return {"data": (slope * u[:, 0] + noise).unsqueeze(-1), "inputs": u}


def sequences() -> dict[str, Any]:
    return {"data": blobs(120, 2, 3).reshape(40, 3, 2)[torch.randperm(40, generator=rng())].reshape(4, 30, 2)}


def penalised() -> torchem.GaussianMixture:
    model = torchem.GaussianMixture(3, 2)
    model.mixing.prior, model.component.prior = priors.Dirichlet(2.0), priors.NormalInverseWishart()
    return model


points: dict[str, Any] = {"data": blobs(90, 2, 3, gap=3.0)}
some = torch.where(torch.arange(90) % 2 == 0, torch.arange(90) % 3, -1)
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mixture": (lambda: torchem.GaussianMixture(4, 2), points),
    "tied": (lambda: torchem.GaussianMixture(4, 2, "tied"), points),
    "weights": (lambda: torchem.GaussianMixture(4, 2), {**points, "weights": torch.arange(90) % 4 + 0.5}),
    "labels": (lambda: torchem.GaussianMixture(3, 2), {**points, "labels": some}),
    "missing": (
        lambda: torchem.GaussianMixture(3, 2, "diag"),
        {"data": points["data"].masked_fill(torch.rand(90, 2, generator=rng()) < 0.1, float("nan"))},
    ),
    "MAP": (penalised, points),
    "variational": (lambda: torchem.variational(torchem.GaussianMixture(4, 2)), points),
    "counts": (
        lambda: torchem.Mixture(Categorical(3), Poisson(3, 1)),
        {"data": torch.poisson(torch.tensor([1.0, 6.0, 20.0]).repeat(30), generator=rng()).unsqueeze(-1)},
    ),
    "regressions": (lambda: torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 1)), regressions()),
    "experts": (lambda: torchem.Mixture(SoftmaxRegression(3, 2), LinearGaussian(3, 2, 1)), regressions()),
    "HMM": (lambda: torchem.GaussianHMM(3, 2), sequences()),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [(torchem.perturb, name) for name in ("mixture", "labels", "variational", "experts", "HMM")]
    + [(torchem.split_merge, name) for name in MODELS if name != "HMM"],
)
def test_the_objective_never_falls(method: Any, name: str) -> None:
    build, given = MODELS[name]
    model = build().double()
    options = {"max_iter": 12, "tol": 1e-3, "init": "random", "restarts": 2}
    width = {"kicks": 3} if method is torchem.perturb else {"candidates": 3}
    result = search(method, model, rounds=2, **width, **given, **options)
    first = fit(build().double(), **given, **options)
    assert result.model is model
    assert result.rounds is not None
    assert result.rounds[0] == pytest.approx(first.bound, rel=1e-12)
    assert result.rounds == sorted(result.rounds)
    assert result.bound == result.rounds[-1] >= first.bound
    fields = {"weights": "weight", "inputs": "u", "labels": "labels"}
    batch = model.batch(given["data"], **{fields[n]: v for n, v in given.items() if n != "data"})
    with torch.no_grad():
        stats = model.e_step(batch)
        assert float(stats["log_likelihood"] + model.log_prior()) == pytest.approx(result.bound, rel=1e-9)


@pytest.mark.parametrize("method", [torchem.perturb, torchem.split_merge])
def test_a_search_leaves_a_bad_optimum(method: Any) -> None:
    x = clusters()
    best, before = known(x), fit(stuck(), x, init=None, tol=1e-4, max_iter=300).bound
    model = stuck()
    with as_users_run_it():  # faster
        result = search(method, model, x, init=None, rounds=5)
    assert before < best - 20
    assert result.bound > best - 1
    assert result.rounds is not None
    assert result.rounds[0] == before
    assert float(model.log_prob(x).detach().sum()) == pytest.approx(result.bound, rel=1e-12)


def test_searches_repeat_and_differ_by_seed() -> None:
    x = clusters()[:150]
    options = {"rounds": 1, "init": "random_from_data", "max_iter": 15}
    one, same, other = (search(torchem.perturb, mixture(9, 2), x, seed=s, **options) for s in (1, 1, 2))
    assert one.rounds == same.rounds != other.rounds
    assert gap(one.model, same.model) == 0


def test_searches_with_modes() -> None:
    x, test = clusters()[:200], clusters(1)
    options = {"rounds": 1, "max_iter": 12, "restarts": 3, "init": "random_from_data"}
    judged = search(torchem.perturb, mixture(9, 2), x, validation=test, race=4, anneal=[0.7], **options)
    assert judged.rounds is not None
    assert judged.rounds[-1] == pytest.approx(float(judged.model.log_prob(test).detach().mean()), rel=1e-12)
    online = search(torchem.split_merge, mixture(9, 2), x, accumulate=torchem.Stochastic(), batch_size=50, **options)
    assert online.rounds is not None
    assert online.bound == online.rounds[-1] >= online.rounds[0]
    small = search(torchem.split_merge, mixture(9, 2, dtype=torch.float32), x, accelerate="squarem", **options)
    assert small.model.dtype == torch.float32


def test_an_interrupted_search_keeps_the_best() -> None:
    passes = 0

    def stop(progress: torchem.Progress) -> bool:
        nonlocal passes
        passes += 1
        return passes > 40

    x = clusters()
    model = stuck()
    result = search(torchem.perturb, model, x, init=None, callbacks=[stop])
    assert result.rounds is not None
    assert len(result.rounds) < 11
    assert float(model.log_prob(x).detach().sum()) == pytest.approx(result.bound, rel=1e-12)


def test_moves_are_ranked_by_what_the_components_share_and_miss() -> None:
    x = clusters()
    model = stuck()
    batch = torchem.Batch(x)
    with torch.no_grad():
        shares = model.posterior(x)
        first = ranked(shares, model.component.log_prob(batch), torch.ones(400, 1).double())[0]
    assert first == (0, 8, 7)


def test_components_that_are_not_moved_stay() -> None:
    x, model = clusters(), stuck()
    before = model.means.detach().clone()
    which = torch.arange(9) > 6
    model.regroup(torchem.Batch(x), which, model.posterior(x).detach())
    assert torch.equal(model.means[:7].detach(), before[:7])
    assert (model.means[7:].detach() - before[7:]).abs().amin() > 0


@pytest.mark.parametrize(
    ("method", "model", "options", "words"),
    [
        (torchem.split_merge, lambda: torchem.GaussianHMM(3, 2), {}, "model: expected a mixture, for split_merge"),
        (torchem.split_merge, lambda: torchem.GaussianMixture(2, 2), {}, "model: expected at least 3 components"),
        (torchem.perturb, lambda: torchem.GaussianMixture(1, 2), {}, "model: expected at least 2 components"),
        (
            torchem.perturb,
            lambda: torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1),
            {},
            "model: expected a mixture or a hidden",
        ),
        (torchem.perturb, lambda: torchem.GaussianMixture(3, 2), {"rounds": 0}, "rounds: expected a whole number"),
        (torchem.perturb, lambda: torchem.GaussianMixture(3, 2), {"kicks": 1.5}, "kicks: expected a whole number"),
        (torchem.perturb, lambda: torchem.GaussianMixture(3, 2), {"strength": 4}, "strength: expected at most 3"),
        (torchem.split_merge, lambda: torchem.GaussianMixture(3, 2), {"candidates": True}, "candidates: expected a"),
        (torchem.perturb, lambda: torchem.GaussianMixture(3, 2), {"dead": "prune"}, "dead: expected 'floor'"),
        (torchem.perturb, lambda: torchem.GaussianMixture(3, 2), {"tol": -1}, "tol: expected a finite number"),
        (torchem.perturb, lambda: torch.nn.Linear(2, 2), {}, "model: expected a mixture or a hidden Markov model"),
    ],
)
def test_bad_input(method: Any, model: Any, options: dict[str, Any], words: str) -> None:
    with as_users_run_it(), pytest.raises((InvalidArgument, InvalidType), match=words):
        method(model(), blobs(30, 2, 3), progress=False, **options)


# ---- how often the best optimum is found --------------------------------------------------------------------------


@pytest.mark.slow
def test_searches_find_what_single_starts_miss() -> None:
    """Nine clusters, twenty seeds. Measured: 2 single starts, 17 of 32 restarts, 17 races of 64, 19 and 19 searches."""
    ways: dict[str, Callable[..., torchem.Result]] = {
        "single": lambda x, s: fit(mixture(9, 2), x, seed=s, **HARD),
        "restarts": lambda x, s: fit(mixture(9, 2), x, seed=s, restarts=32, **HARD),
        "race": lambda x, s: fit(mixture(9, 2), x, seed=s, restarts=64, race=10, **HARD),
        "perturb": lambda x, s: search(torchem.perturb, mixture(9, 2), x, seed=s, init="random_from_data"),
        "split_merge": lambda x, s: search(torchem.split_merge, mixture(9, 2), x, seed=s, init="random_from_data"),
    }
    data = [clusters(seed) for seed in range(20)]
    best = [known(x) for x in data]
    with as_users_run_it():
        found = {name: sum(run(x, s).bound > best[s] - 2 for s, x in enumerate(data)) for name, run in ways.items()}
    assert found["single"] <= 5, found
    assert min(found[name] for name in ("restarts", "race")) >= 14, found
    assert min(found[name] for name in ("perturb", "split_merge")) >= 16, found
