"""Held-out data that judge a fit, observations seen, and budgets of them."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.regressions import ranks
from tests.regressions.common import as_users_run_it, blobs, fit, mixture, started
from torchem.errors import ConvergenceWarning, InvalidArgument
from torchem.factors import Categorical, LinearGaussian, Poisson
from torchem.stopping import stalled
from torchem.validation import Validation


def few() -> torch.Tensor:
    return blobs(40, 2, 2, gap=2.0)


def held_out() -> torch.Tensor:
    return blobs(200, 2, 2, gap=2.0, seed=1)


def score(model: torchem.LatentModel, x: Any, weights: torch.Tensor | None = None) -> float:
    with torch.no_grad():
        found = model.log_prob(x)
    return float(found.mean() if weights is None else (found * weights).sum() / weights.sum())


class Path:
    """A callback that keeps the model of a single start at each iterate."""

    def __init__(self) -> None:
        self.models: list[torchem.LatentModel] = []
        self.scores: list[float] = []

    def __call__(self, progress: torchem.Progress) -> None:
        assert progress.iteration == len(self.models)
        self.models.append(progress.model.replicate(1).take_replicas(0))
        self.scores += progress.scores or []


# ---- early stopping -----------------------------------------------------------------------------------------------


def test_overfitting_stops_early_at_the_best_held_out_parameters() -> None:
    path = Path()
    options: dict[str, Any] = {"init": "random_from_data", "max_iter": 200}
    result = fit(mixture(6, 2), few(), validation=held_out(), callbacks=[path], **options)
    assert result.status == "converged"
    assert result.validation is not None
    assert result.scores == [max(result.validation)]
    assert len(result.validation) == len(result.history) < 100
    assert 0 < result.n_iter < len(result.history) - 1, "it ended at the best iterate: nothing is shown"
    # Each score is that of its iterate, and what is returned has the greatest.
    again = [score(model, held_out()) for model in path.models]
    assert again == pytest.approx(result.validation, rel=1e-12)
    assert path.scores == result.validation
    assert result.validation[result.n_iter] == max(result.validation)
    assert score(result.model, held_out()) == pytest.approx(max(result.validation), rel=1e-12)
    assert result.bound == result.history[result.n_iter]
    assert float(result.model.log_prob(few()).detach().sum()) == pytest.approx(result.bound, rel=1e-12)
    # Without held-out data the fit goes on, to parameters that explain them worse.
    assert score(fit(mixture(6, 2), few(), **options).model, held_out()) < max(result.validation) - 0.5


def test_the_path_is_that_of_the_fit_without() -> None:
    plain, judged = (fit(mixture(3, 2), few(), max_iter=6, tol=0.0, **o) for o in ({}, {"validation": held_out()}))
    assert judged.history == plain.history
    assert judged.status == "max_iter"
    assert plain.validation is plain.scores is None


def test_the_best_restart_is_the_one_with_the_best_score() -> None:
    options: dict[str, Any] = {"restarts": 5, "init": "random_from_data", "validation": held_out(), "max_iter": 60}
    result = fit(mixture(4, 2), few(), **options)
    assert result.scores is not None
    assert result.validation is not None
    best = result.scores.index(max(result.scores))
    assert result.history == result.histories[best]
    assert result.bound == result.restarts[best] == result.history[result.n_iter]
    assert max(result.restarts) > result.bound, "the same restart has both: nothing is shown"
    assert score(result.model, held_out()) == pytest.approx(max(result.scores), rel=1e-12)


@pytest.mark.parametrize("rule", [torchem.Stochastic(average=True), torchem.Incremental()], ids=["online", "parts"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_rules_that_step_within_a_pass(rule: Any, restarts: int) -> None:
    result = fit(
        mixture(6, 2), few(), validation=held_out(), accumulate=rule, batch_size=10, max_iter=60, restarts=restarts,
        init="random_from_data",
    )  # fmt: skip
    assert result.status in ("converged", "diverged")
    assert result.validation is not None
    assert result.scores is not None
    assert result.validation[result.n_iter] == max(result.validation) == max(result.scores)
    assert score(result.model, held_out()) == pytest.approx(max(result.validation), rel=1e-9)
    # The last pass measures what is returned.
    assert result.bound == result.history[-1]
    assert float(result.model.log_prob(few()).detach().sum()) == pytest.approx(result.bound, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"e_step": "sample"}, {"e_step": "hard"}, {"anneal": [0.5, 0.8]}, {"accelerate": "squarem"}, {"dead": "prune"}],
    ids=["sampled", "hard", "annealed", "accelerated", "prune"],
)
def test_other_modes(options: dict[str, Any]) -> None:
    result = fit(mixture(4, 2), few(), validation=held_out(), max_iter=60, restarts=2, **options)
    assert result.validation is not None
    assert result.scores is not None
    assert len(result.validation) == len(result.history) == len(result.seen)
    assert score(result.model, held_out()) == pytest.approx(max(result.scores), rel=1e-9)
    assert result.bound == result.history[result.n_iter]
    if "anneal" in options:
        assert result.n_iter >= 20, "what is returned was found at another temperature"


def test_a_stochastic_fit_that_goes_astray_is_told() -> None:
    x = blobs(300, 2, 2)
    model = mixture(2, 2)
    best = fit(model, x, tol=1e-9, max_iter=200)
    start = score(model, x[:100])
    with pytest.warns(ConvergenceWarning, match="held-out score fell"):
        result = torchem.fit(
            model, x[torch.arange(300) % 2 == 0] + 1.0, validation=x[:100], accumulate=torchem.Stochastic(), init=None,
            batch_size=50, max_iter=30, seed=0, progress=False,
        )  # fmt: skip
    assert result.status == "diverged"
    assert (result.n_iter, score(result.model, x[:100])) == (0, pytest.approx(start, rel=1e-12))
    assert best.model is result.model


def test_warns_where_the_score_still_rose() -> None:
    with pytest.warns(ConvergenceWarning, match="held-out score was still rising; raise max_iter"):
        torchem.fit(mixture(2, 2), few(), validation=few(), max_iter=2, tol=1e-6, seed=0, progress=False, init="random")


def test_dead_components_are_asked_for_among_the_held_out() -> None:
    """A component that no recent batch needs is not dead while held-out observations need it."""
    x = torch.cat([blobs(20, 2, 1) + 50.0, blobs(800, 2, 1)])
    test = torch.cat([x[::10], x[:20]])
    options: dict[str, Any] = {
        "accumulate": torchem.Stochastic(0.9), "batch_size": 20, "init": None, "dead": "raise", "max_iter": 3,
    }  # fmt: skip

    def model() -> torchem.GaussianMixture:
        out = mixture(2, 2)
        out.means = [[0.0, 0.0], [50.0, 50.0]]
        return out

    with pytest.raises(torchem.errors.DegenerateComponent):
        fit(model(), x, **options)
    fit(model(), x, validation=test, **options)


# ---- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x, w: {"data": x, "weights": w},
        lambda x, w: torchem.Batch(x, weight=w),
        lambda x, w: [torchem.Batch(x[:150], weight=w[:150]), torchem.Batch(x[150:], weight=w[150:])],
        lambda x, w: DataLoader(TensorDataset(x, w), batch_size=64),
    ],
    ids=["dictionary", "Batch", "batches", "loader"],
)
def test_forms(form: Any) -> None:
    x, weights = held_out(), 0.5 + torch.rand(200, dtype=torch.float64)
    result = fit(mixture(3, 2), few(), validation=form(x, weights), max_iter=5, tol=0.0)
    assert result.scores == [pytest.approx(score(result.model, x, weights), rel=1e-12)]


def test_covariates_labels_and_sequences() -> None:
    u = torch.randn(60, 2, dtype=torch.float64)
    x = u[:, :1] * torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    lines = torchem.Mixture(Categorical(2), LinearGaussian(2, 2, 1)).double()
    labels = torch.arange(20) % 2
    test = {"data": x[40:], "inputs": u[40:], "labels": labels}
    result = fit(lines, x[:40], inputs=u[:40], validation=test, max_iter=5, tol=0.0)
    held = lines.batch(x[40:], u=u[40:], labels=labels)
    assert result.scores == [pytest.approx(score(lines, held), rel=1e-9)]
    hmm = torchem.GaussianHMM(2, 2).double()
    long = blobs(90, 2, 2)
    result = fit(hmm, long, lengths=[40, 50], validation={"data": long, "lengths": [30, 60]}, max_iter=5, tol=0.0)
    total = float(hmm.log_prob([long[:30], long[30:]]).detach().sum())
    assert result.scores == [pytest.approx(total / 90, rel=1e-9)]  # per frame


def test_models_of_other_kinds() -> None:
    chains = torchem.FactorialHMM.gaussian([40, 40], 2, q="mean_field").double()  # too large for log_prob
    x = few().reshape(2, 20, 2)
    assert Validation(chains, x).sums(chains)["score"].isfinite()
    vae = torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1, steps=1)
    result = fit(vae, few(), validation=held_out(), max_iter=4, restarts=2)
    assert result.validation is not None
    assert result.validation[result.n_iter] == pytest.approx(max(result.validation))


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(5, 3), ("validation: expected 2 features", "3")),
        (torch.empty(0, 2), ("validation: expected at least one observation",)),
        (torch.full((3, 2), math.inf), ("validation: expected", "inf at row 0")),
        ("no-such-file.csv", ("no-such-file.csv: expected a table",)),
        (3, ("validation: expected a tensor", "int")),
        ({"x": torch.zeros(5, 2)}, ("validation: expected data, or a dictionary of data, weights", "['x']")),
        ({"data": few(), "weights": torch.ones(3)}, ("validation weights: expected", "[40]", "[3]")),
        ([torchem.Batch(torch.zeros(5, 2)), torchem.Batch(torch.zeros(5, 3))], ("validation: expected 2 features",)),
    ],
    ids=["columns", "empty", "inf", "path", "number", "keys", "weights", "a later batch"],
)
def test_bad_input(value: Any, words: tuple[str, ...]) -> None:
    with as_users_run_it(), pytest.raises(torchem.errors.TorchemError) as error:
        torchem.fit(mixture(2, 2), few(), validation=value, progress=False)
    for word in words:
        assert word in str(error.value)


def test_impossible_held_out_data_are_named() -> None:
    model = torchem.Mixture(Categorical(1), Categorical(1, 3)).double()
    model.component.probs = [[0.5, 0.5, 0.0]]  # pyright: ignore
    with pytest.raises(InvalidArgument, match=r"validation: expected observations of positive.*zero at row 1"):
        fit(model, torch.tensor([[0], [1]]), init=None, validation=torch.tensor([[0], [2]]))


def test_scores_of_minus_infinity_are_worse_than_all_others() -> None:
    class Late(torchem.GaussianMixture):
        """Has no density for anything held out after its first score."""

        calls = 0

        def log_score(self, batch: torchem.Batch) -> torch.Tensor:
            Late.calls += 1
            found = super().log_score(batch)
            return found if Late.calls == 1 else torch.full_like(found, math.nan if Late.calls == 3 else -math.inf)

    result = fit(Late(2, 2).double(), few(), validation=held_out(), max_iter=30)
    assert (result.status, result.n_iter) == ("converged", 0)
    assert math.isfinite(result.bound)


@pytest.mark.parametrize(
    ("scores", "noisy", "expected"),
    [
        ([-1.0] * 5, False, None),  # too early
        ([-1.0] * 6, False, "converged"),
        ([-9.0, -8.0, -8.0, -8.0, -8.0, -8.0, -7.0], False, None),
        ([-9.0, *[-9.0 + 1e-5 * 1.5**i for i in range(7)]], False, None),  # near a saddle: slow, but faster each time
        ([-9.0, *[-9.0 + 1e-5 * 1.5**i for i in range(7)]], True, "converged"),
        ([-math.inf] * 7, False, "converged"),
        ([-2.0, *[math.nan] * 6], False, "converged"),
        ([-2.0, *[-3.0] * 6], True, "diverged"),
        ([-2.0, *[-3.0] * 6], False, "converged"),  # overfitting from the start
    ],
)
def test_stalled(scores: list[float], noisy: bool, expected: str | None) -> None:
    assert stalled(scores, 1e-3, noisy) == expected
    assert stalled(scores, 0.0, noisy) is None


# ---- observations seen --------------------------------------------------------------------------------------------


def test_seen_in_full_batches() -> None:
    x, weights = few(), 0.5 + torch.rand(40, dtype=torch.float64)
    for options, each in (({}, 40.0), ({"batch_size": 7}, 40.0), ({"weights": weights}, float(weights.sum()))):
        result = fit(mixture(2, 2), x, max_iter=4, tol=0.0, **options)
        assert result.seen == pytest.approx([each * i for i in range(5)])
    hmm = fit(torchem.GaussianHMM(2, 2).double(), x, lengths=[15, 25], max_iter=3, tol=0.0)
    assert hmm.seen == [0.0, 40.0, 80.0, 120.0]


def test_seen_counts_passes_that_left_no_entry() -> None:
    """Refused jumps, passes that are made again, and passes within M-steps."""
    counted = Counting(few())
    result = fit(mixture(4, 2), counted, accelerate="anderson", max_iter=60, tol=0.0, init="random")
    passes = counted.passes - 1  # the survey
    assert result.seen[-1] == 40.0 * (passes - 1)
    assert passes > len(result.history), "no jump was refused: nothing is shown"
    far = Counting(few() * 1e-3 + 1e4)
    result = fit(mixture(2, 2, dtype=torch.float32), far, max_iter=4, tol=0.0, init="random")
    assert result.seen[-1] == 40.0 * (far.passes - 2)
    vae = torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1, steps=3)
    inner = Counting(few())
    result = fit(vae, inner, max_iter=2, tol=0.0)
    assert result.seen[-1] == 40.0 * (inner.passes - 2)


class Counting:
    """Data that count how often they are passed over."""

    def __init__(self, x: torch.Tensor):
        self.x, self.passes = x, 0

    def __iter__(self) -> Iterator[torchem.Batch]:
        self.passes += 1
        yield torchem.Batch(self.x)


def test_a_budget_ends_full_batches_with_a_pass() -> None:
    result = fit(mixture(2, 2), few(), budget=100, tol=0.0)
    assert (result.status, result.n_iter, result.seen) == ("max_iter", 3, [0.0, 40.0, 80.0, 120.0])
    with pytest.warns(ConvergenceWarning, match="raise the budget, or tol"):
        torchem.fit(mixture(2, 2), few(), budget=40, tol=1e-9, seed=0, progress=False)


def test_a_budget_ends_online_passes_with_a_batch() -> None:
    x = blobs(400, 2, 2)
    rule = torchem.Stochastic()
    result = fit(started(x, 2), x, accumulate=rule, batch_size=50, budget=120, tol=0.0, init=None)
    assert result.seen == [0.0, 150.0]
    assert result.status == "max_iter"
    # The part that was seen is scored as if it were all, the end on all data.
    assert result.history[0] == pytest.approx(result.history[-1], rel=0.5)
    assert result.bound == pytest.approx(float(result.model.log_prob(x).detach().sum()), rel=1e-9)
    whole = fit(started(x, 2), x, accumulate=torchem.Stochastic(), batch_size=50, budget=800, tol=0.0, init=None)
    assert whole.seen == [0.0, 400.0, 800.0]


def test_a_budget_of_draws_ends_on_their_mean() -> None:
    options: dict[str, Any] = {"e_step": "sample", "tol": 0.0}
    one, other = (fit(mixture(2, 2), few(), **options, **o) for o in ({"budget": 240}, {"max_iter": 6}))
    assert one.history == other.history


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "3"])
def test_bad_budgets(value: Any) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match="budget: expected a positive number"):
        torchem.fit(mixture(2, 2), few(), budget=value)


# ---- several processes --------------------------------------------------------------------------------------------


def _shards(rank: int, world: int) -> Any:
    x, test = few(), held_out()
    own = test[:150] if rank == 0 else test[150:]
    judged = fit(started(x, 4), x[rank::world].clone(), init=None, validation=own, max_iter=8, tol=0.0)
    online = fit(
        started(x, 2), x[rank::world].clone(), init=None, accumulate=torchem.Stochastic(), batch_size=5, budget=23,
        validation=test if rank == 0 else test[:0],
    )  # fmt: skip
    return judged.validation, judged.seen, online.seen, online.validation


def _on_one_only(rank: int, world: int) -> None:
    fit(mixture(2, 2), few()[rank::world].clone(), validation=held_out() if rank == 0 else None)


def test_several_processes() -> None:
    single = fit(started(few(), 4), few(), init=None, validation=held_out(), max_iter=8, tol=0.0)
    shards, lonely = ranks.run(2, [_shards, _on_one_only])
    found = ranks.values(shards)
    for validation, seen, spent, scores in found:
        assert validation == pytest.approx(single.validation, rel=1e-9)
        assert seen == single.seen
        assert spent == [0.0, 30.0]
        assert scores == found[0][3]
    for outcome in lonely:
        assert outcome.error == "InvalidArgument"
        assert "validation: expected held-out data on each process" in outcome.message


def test_poisson_scores_are_per_observation() -> None:
    x = torch.poisson(torch.full((50, 1), 3.0)).double()
    model = torchem.Mixture(Categorical(2), Poisson(2, 1)).double()
    result = fit(model, x, validation=x[:10], max_iter=3, tol=0.0)
    assert result.scores == [pytest.approx(score(model, x[:10]), rel=1e-12)]
