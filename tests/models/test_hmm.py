"""Hidden Markov models: what the laws do not say of them."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close, close_stats, rand, randn, rng
from tests.laws.paths import all_paths
from tests.regressions.common import as_users_run_it
from torchem import factors, masks, priors
from torchem.batch import Batch
from torchem.errors import DegenerateComponent, InvalidArgument, SymmetryWarning
from torchem.factors import Autoregressive, Categorical, Gaussian, MeanAdjustedAutoregression, SoftmaxRegression
from torchem.models import HMM, GaussianHMM
from torchem.models.stationary import Stationary
from torchem.stats import Stats

QUIET: dict[str, Any] = {"progress": False, "seed": 0}
EXACT: dict[str, Any] = {**QUIET, "init": None, "tol": 0.0}


def table(k: int, seed: int, stay: float = 1.0) -> Tensor:
    return (randn(k, k, seed=seed) + stay * torch.eye(k)).softmax(-1)


def discrete(k: int = 2, m: int = 3, seed: int = 0, **slots: Any) -> HMM:
    """Categories behind a chain."""
    model = HMM(**{"initial": Categorical(k), "transition": Categorical(k, k), "emission": Categorical(k, m)} | slots)
    model = model.double()
    if isinstance(model.initial, Categorical):
        model.initial_probs = randn(k, seed=seed).softmax(-1)
    model.transition_matrix = table(k, seed + 1)
    model.emission.probs = (1.5 * randn(k, m, seed=seed + 2)).softmax(-1)  # pyright: ignore
    return model


def normal(k: int = 2, d: int = 1, kind: str = "diag", gap: float = 4.0) -> GaussianHMM:
    model = GaussianHMM(k, d, kind).double()  # pyright: ignore
    model.means = gap * torch.arange(k).unsqueeze(-1).expand(k, d).double()
    model.transition_matrix = table(k, 3, stay=2.0)
    model.initial_probs = randn(k, seed=4).softmax(-1)
    return model


def sequences(k: int = 2, d: int = 1, lengths: tuple[int, ...] = (30, 1, 12, 20), gap: float = 4.0) -> list[Tensor]:
    z = [(torch.arange(n) // 5) % k for n in lengths]
    return [gap * state.unsqueeze(-1).double() + randn(len(state), d, seed=i) for i, state in enumerate(z)]


def exact(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rising(history: list[float], slack: float = 1e-9) -> bool:
    return all(after >= before - slack * (1 + abs(before)) for before, after in itertools.pairwise(history))


# ---- construction and views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"initial": Categorical(3)}, r"initial: expected a table of shape \[2\]"),
        ({"transition": Categorical(2, 3)}, r"transition: expected a table of shape \[2, 2\]"),
        ({"transition": SoftmaxRegression(2, 1)}, r"transition: expected a table of shape \[2, 2\]"),
        ({"end": Categorical(2, 3)}, r"end: expected a table of shape \[2, 2\]"),
        ({"emission": Categorical(4)}, "emission: expected a factor with states"),
        ({"emission": torch.nn.Linear(1, 1)}, "emission: expected a torchem factor"),
        ({"end": 0.5}, "end: expected a torchem factor"),
        ({"initial": "stationary", "transition": SoftmaxRegression(2, 1, n_parents=2)}, "initial: .*Categorical"),
    ],
)
def test_slots_must_agree(slots: dict[str, Any], said: str) -> None:
    with as_users_run_it(), pytest.raises(torchem.errors.TorchemError, match=said):
        HMM(**{"initial": Categorical(2), "transition": Categorical(2, 2), "emission": Categorical(2, 3)} | slots)


def test_views_are_readable_and_assignable() -> None:
    model = discrete(end=Categorical(2, 2))
    model.initial_probs, model.transition_matrix = [0.25, 0.75], [[0.5, 0.5], [0.0, 1.0]]
    model.end_probs = [0.125, 0.5]
    close(model.initial_probs, exact(0.25, 0.75))
    close(model.transition_matrix, exact([0.5, 0.5], [0.0, 1.0]))
    close(model.end_probs, exact(0.125, 0.5))
    assert (model.n_states, model.n_components) == (2, 2)
    for view, value in (
        ("initial_probs", [0.5, 0.6]),
        ("transition_matrix", [[1.0, 0.5], [0, 1]]),
        ("end_probs", [2.0, 0]),
    ):
        with pytest.raises(InvalidArgument, match=view):
            setattr(model, view, value)
    with pytest.raises(InvalidArgument, match="transition"):
        HMM(Categorical(2), SoftmaxRegression(2, 1, 2), Categorical(2, 3)).transition_matrix  # noqa: B018
    with pytest.raises(InvalidArgument, match="initial"):
        discrete(initial="stationary").initial_probs = [0.5, 0.5]


def test_slots_are_assignable() -> None:
    model = discrete()
    model.emission = factors.Poisson(2, 1).double()
    model.initial = Stationary(model.transition)  # pyright: ignore
    value = model.log_prob(torch.tensor([[1.0], [2.0]]))
    assert value.isfinite().all()
    assert dict(model.slots())["emission"] is model.emission


def test_a_density_sums_to_one() -> None:
    every = torch.tensor(list(itertools.product(range(3), repeat=4))).unsqueeze(-1)
    for model in (discrete(), discrete(initial="stationary"), discrete(1, 3)):
        close(model.log_prob(every).exp().sum(), torch.ones(()))


def test_end_probabilities_make_a_law_of_length() -> None:
    """Over all sequences of up to seven frames: what is missing to one are the longer ones."""
    model = discrete(end=Categorical(2, 2))
    model.end_probs = [0.5, 0.7]
    total = torch.zeros((), dtype=torch.float64)
    state = model.initial_probs.detach()
    going = 1 - model.end_probs.detach()
    for length in range(1, 8):
        every = torch.tensor(list(itertools.product(range(3), repeat=length))).unsqueeze(-1)
        total = total + model.log_prob(every).exp().sum()
        state = state * going if length == 1 else (state @ model.transition_matrix.detach()) * going
    close(total.detach(), 1 - state.sum())


def test_end_probabilities_are_learned_from_labelled_sequences() -> None:
    """With all states known EM counts: ends over visits."""
    model = discrete(end=Categorical(2, 2))
    x = [torch.zeros(n, 1, dtype=torch.long) for n in (3, 1, 4)]
    labels = [[0, 1, 1], [1], [0, 0, 0, 1]]
    torchem.fit(model, x, labels=labels, max_iter=1, **EXACT)
    close(model.end_probs, exact(0.0, 3 / 4), atol=1e-12)
    close(model.initial_probs, exact(2 / 3, 1 / 3))
    close(model.transition_matrix, exact([2 / 4, 2 / 4], [0.0, 1.0]), atol=1e-12)


# ---- masks, frozen cells, shared factors --------------------------------------------------------------------------


def test_restrict_renormalises_and_restricts_further() -> None:
    model = normal(3)
    before = model.transition_matrix.detach().clone()
    model.restrict(masks.left_right(3))
    kept = before.triu() / before.triu().sum(-1, keepdim=True)
    close(model.transition_matrix, kept)
    model.restrict(masks.banded(3, 1))
    assert torch.equal(model.transition_matrix == 0, ~(masks.left_right(3) & masks.banded(3, 1)))
    # What is allowed but had no probability left starts even.
    model.restrict([[0, 0, 1], [1, 0, 0], [1, 1, 1]])
    assert model.transition_matrix[0].tolist() == [0, 0, 1]
    for mask, said in ((torch.ones(2, 3), r"\[3, 3\]"), (torch.zeros(3, 3), "state 0")):
        with pytest.raises(InvalidArgument, match=said):
            model.restrict(mask)


@pytest.mark.parametrize("prior", [None, priors.Dirichlet(3.0), priors.StickyDirichlet(5.0)], ids=str)
def test_frozen_cells_keep_their_probability(prior: Any) -> None:
    model = normal(3)
    model.restrict(masks.cyclic(3))
    model.transition_matrix = [[0.75, 0.25, 0], [0, 0.5, 0.5], [0.125, 0, 0.875]]
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 1] = mask[2] = True
    model.transition.freeze("probs", mask=mask)
    model.transition.prior = prior
    before = model.transition_matrix.detach().clone()
    result = torchem.fit(model, sequences(3), max_iter=20, **EXACT)
    close(model.transition_matrix[mask], before[mask], rtol=1e-14)
    assert not torch.equal(model.transition_matrix[1], before[1])
    close(model.transition_matrix.sum(-1), torch.ones(3), rtol=1e-14)
    assert rising(result.history)


def test_a_factor_in_two_slots_is_maximised_once_on_both_statistics() -> None:
    shared = Categorical(3, 3)
    model = HMM(Categorical(3), shared, shared).double()
    shared.probs = table(3, 1)
    batch = Batch(torch.randint(0, 3, (6, 8, 1), generator=rng(2)))
    stats = model.e_step(batch)
    values = model.maximize(stats)
    assert list(values) == ["initial.logits", "transition.logits"]
    counts = stats["transition"]["counts"] + stats["emission"]["counts"]
    close(values["transition.logits"].softmax(-1), counts / counts.sum(-1, keepdim=True))
    assert model.n_parameters() == 2 + 6
    result = torchem.fit(model, batch, max_iter=30, **EXACT)
    assert rising(result.history)
    assert model.transition is model.emission
    close(model.transition_matrix, model.emission.probs)  # pyright: ignore


def test_an_emission_may_serve_two_models() -> None:
    emission = Gaussian(2, 1).double()
    emission.means = [[0.0], [4.0]]
    first, second = (HMM(Categorical(2), Categorical(2, 2), emission).double() for _ in range(2))
    before = second.log_prob(sequences()).detach()
    torchem.fit(first, sequences(), max_iter=5, **EXACT)
    assert second.emission is first.emission
    assert not torch.equal(second.log_prob(sequences()).detach(), before)


# ---- the stationary initial law -----------------------------------------------------------------------------------


def joint_objective(probs: Tensor, starts: Tensor, counts: Tensor, support: Tensor) -> Tensor:
    """Σ n_i log π_i(A) + Σ n_ij log A_ij, with π by the power of A that stands for its limit."""
    k = probs.shape[-1]
    eye = torch.eye(k, dtype=probs.dtype)
    system = torch.cat([(eye - probs).mT[:-1], torch.ones(1, k, dtype=probs.dtype)])
    law = torch.linalg.solve(system, eye[-1])
    return (starts * law.log()).sum() + torch.where(support, counts * torch.where(support, probs, 1.0).log(), 0.0).sum()


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("zeros", [False, True])
def test_repeated_joint_m_steps_reach_the_optimum(k: int, zeros: bool) -> None:
    """A quasi-Newton ascent of the same objective from the same place reaches nothing higher."""
    for seed in range(3):
        factor = Categorical(k, k).double()
        support = masks.cyclic(k) | (rand(k, k, seed=seed) < 0.3) if zeros else torch.ones(k, k, dtype=torch.bool)
        probs = table(k, seed) * support
        factor.probs = probs / probs.sum(-1, keepdim=True)
        starts, counts = 20 * rand(k, seed=seed + 5), 10 * rand(k, k, seed=seed + 6)
        law = Stationary(factor)
        logits = factor.logits.detach().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def loss(logits: Tensor = logits, optimizer: Any = optimizer, args: Any = (starts, counts, support)) -> Tensor:
            optimizer.zero_grad()
            value = -joint_objective(logits.masked_fill(~args[2], -math.inf).softmax(-1), *args)
            value.backward()
            return value

        optimizer.step(loss)
        best = -float(loss().detach())
        reached = []
        with torch.no_grad():
            for _ in range(15):
                reached.append(float(joint_objective(factor.probs, starts, counts, support)))
                new = law.maximize_jointly(Stats(counts=starts), Stats(counts=counts))
                factor.logits.data = new["logits"]
        assert rising(reached, 1e-12)
        assert reached[-1] >= best - 1e-7 * abs(best)
        assert torch.equal(factor.probs == 0, ~support)


@pytest.mark.parametrize("zeros", [False, True])
def test_stationary_fits_are_monotone_from_many_starts(zeros: bool) -> None:
    """Twenty random starts at once, as replicas; short sequences, so that the initial law has a say."""
    for k in (2, 4, 6):
        model = HMM("stationary", Categorical(k, k), Categorical(k, 5)).double()
        model.transition_matrix = table(k, k)
        if zeros:
            model.restrict(masks.cyclic(k))
        x = torch.randint(0, 5, (40, 3, 1), generator=rng(k))
        many = model.replicate(20)
        many.emission.logits.data = randn(20, k, 5, seed=1)  # pyright: ignore
        many.transition.logits.data = 2 * randn(20, k, k, seed=2)  # pyright: ignore
        batch, before = model.batch(x), torch.full((20,), -math.inf, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(12):
                stats = many.e_step(batch)
                assert (stats["log_likelihood"] >= before - 1e-9 * stats["log_likelihood"].abs()).all()
                before = stats["log_likelihood"]
                many.m_step(stats)
        law, steps = many.initial_probs, many.transition_matrix  # pyright: ignore
        close((law.unsqueeze(-2) @ steps).squeeze(-2), law, atol=1e-9)
        if zeros:
            assert torch.equal(steps == 0, ~masks.cyclic(k).expand_as(steps))


# ---- labels -------------------------------------------------------------------------------------------------------


def test_labels_of_each_kind_are_evidence() -> None:
    model = normal(3, gap=1.0)
    x = torch.stack(sequences(3, lengths=(6, 6)))
    numbers = torch.tensor([[0, -1, 2, -1, -1, 1], [-1] * 6])
    sets = torch.ones(2, 6, 3, dtype=torch.bool)
    soft = torch.ones(2, 6, 3)
    for n, t in (numbers >= 0).nonzero().tolist():
        sets[n, t] = soft[n, t] = 0
        sets[n, t, numbers[n, t]], soft[n, t, numbers[n, t]] = True, 0.25
    evidence = torch.zeros(2, 6, 3, dtype=torch.float64).masked_fill(~sets, -math.inf)
    wanted = model.posterior(Batch(x, evidence=evidence))
    for labels in (numbers, sets, soft):
        close(model.posterior(x, labels=labels), wanted)
        assert torch.equal(model.most_likely(x, labels=labels), model.most_likely(Batch(x, evidence=evidence)))
        close(model.filter(x, labels=labels), model.filter(Batch(x, evidence=evidence)))
    weak = 0.1 + rand(2, 6, 3, seed=7)
    close(model.posterior(x, labels=weak), model.posterior(Batch(x, evidence=weak.log())))
    concatenated = x.flatten(0, 1)
    close(model.posterior(concatenated, lengths=[6, 6], labels=numbers.flatten()), wanted)
    found = [
        torchem.fit(model.take_replicas(0), x, labels=labels, max_iter=4, **EXACT) for labels in (numbers, sets, soft)
    ]
    for result in found[1:]:
        assert result.history == pytest.approx(found[0].history, rel=1e-12)


def test_labels_name_the_states_of_a_fit() -> None:
    """Whatever the start, a few labels decide which state is which."""
    x, z = sequences(2, lengths=(40, 40), gap=6.0), torch.arange(40) // 5 % 2
    for wanted in (0, 1):
        labels = [torch.full((40,), -1), torch.full((40,), -1)]
        labels[0][:10] = z[:10] if wanted == 0 else 1 - z[:10]
        model = GaussianHMM(2, 1).double()
        torchem.fit(model, x, labels=labels, **QUIET)
        assert int(model.means.argmin()) == wanted
        assert torch.equal(model.most_likely(x[1])[0], z if wanted == 0 else 1 - z)


def test_all_labelled_is_counting() -> None:
    x, z = torch.stack(sequences(2, lengths=(25, 25))), torch.randint(0, 2, (2, 25), generator=rng(3))
    model = normal()
    torchem.fit(model, x, labels=z, max_iter=1, **EXACT)
    for k in (0, 1):
        close(model.means[k], x[z == k].mean(0))
        close(model.covariances[k], x[z == k].var(0, unbiased=False))
    counts = torch.zeros(2, 2).double()
    for path in z.tolist():
        for a, b in itertools.pairwise(path):
            counts[a, b] += 1
    close(model.transition_matrix, counts / counts.sum(-1, keepdim=True))


# ---- paths --------------------------------------------------------------------------------------------------------

PATHS = ["HMM-Gaussian-diag", "HMM-left-right", "HMM-labels", "HMM-ends", "HMM-inputs", "HMM-memory", "HMM-missing"]


@pytest.mark.parametrize("name", PATHS)
def test_best_paths_are_the_best_of_all(name: str) -> None:
    case = cases.MODEL_CASES[name]()
    model, batch = case.model, case.batch
    assert isinstance(model, HMM)
    scores, states = model.best_paths(batch, 6)
    for n, each in enumerate(all_paths(model, batch)):
        length = each.states.shape[1]
        best = each.log_joint.detach().sort(descending=True).values[:6]
        best = best[best > -math.inf]
        close(scores[n, : len(best)], best)
        assert (scores[n, len(best) :] == -math.inf).all()
        assert (states[n, len(best) :] == -1).all()
        assert (states[n, :, length:] == -1).all()
        found = [tuple(path) for path in states[n, : len(best), :length].tolist()]
        assert len(set(found)) == len(found)
        value = dict(zip(map(tuple, each.states.tolist()), each.log_joint.tolist(), strict=True))
        close(exact(*(value[path] for path in found)), best)
    close(scores[:, 0], model.infer_hard({s: k.log_potential(batch) for s, k in model._kernels().items()}, batch)[0])
    assert torch.equal(states[:, 0], model.most_likely(batch))


@pytest.mark.parametrize("name", PATHS)
def test_posterior_draws_have_the_frequencies_of_the_posterior(name: str) -> None:
    case = cases.MODEL_CASES[name]()
    model, batch, draws = case.model, case.batch[:4], 600
    assert isinstance(model, HMM)
    k = model.n_components
    found = model.sample_posterior(batch, draws, generator=rng(1))
    assert found.shape == (draws, 4, batch.x.shape[1])
    for n, each in enumerate(all_paths(model, batch)):
        length = each.states.shape[1]
        assert (found[:, n, length:] == -1).all()
        code = (found[:, n, :length] * k ** torch.arange(length - 1, -1, -1)).sum(-1)
        share = torch.bincount(code, minlength=k**length).double() / draws
        assert (share[each.shares == 0] == 0).all()
        assert ((share - each.shares).abs() <= 5 * (each.shares / draws).sqrt() + 5 / draws).all()
    assert torch.equal(model.sample_posterior(batch, 2, generator=rng(1)), found[:2])


@pytest.mark.parametrize("count", [0, 1.5, True])
def test_best_paths_need_a_number(count: Any) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match="count"):
        discrete().best_paths([[0], [1]], count)


# ---- forecasts ----------------------------------------------------------------------------------------------------


def test_forecasts_are_powers_of_the_matrix() -> None:
    model = normal(3, 2, "full")
    x = torch.stack(sequences(3, 2, lengths=(9, 9, 9)))
    lengths = torch.tensor([9, 4, 1])
    ahead = model.forecast(x, 6, lengths=lengths)
    matrix = model.transition_matrix.detach()
    for n, length in enumerate(lengths.tolist()):
        state = model.posterior(x[n, :length])[0, -1].detach()
        for h in range(6):
            law = state @ torch.linalg.matrix_power(matrix, h + 1)
            close(ahead.states[n, h], law)
            mean = law @ model.means.detach()
            second = model.covariances.detach().diagonal(dim1=-2, dim2=-1) + model.means.detach() ** 2
            close(ahead.mean[n, h], mean)
            close(ahead.variance[n, h], law @ second - mean**2)
    assert ahead.draws is None
    law = model.forecast(x[:1], 400).states[0, -1]
    close(law @ matrix, law)


def test_forecasts_agree_with_simulation() -> None:
    """Drawn continuations, and whole sequences whose beginning is that of the data."""
    model = normal(2, gap=3.0)
    x = torch.tensor([[[0.2], [2.9], [3.1]]]).double()
    ahead = model.forecast(x, 3, n=4000, generator=rng(5))
    assert ahead.draws is not None
    assert ahead.draws.shape == (4000, 1, 3, 1)
    spread = (ahead.variance / 4000).sqrt()
    assert ((ahead.draws.mean(0) - ahead.mean).abs() < 5 * spread).all()
    close(ahead.draws.var(0), ahead.variance, rtol=0.15)
    # Neighbours hang together: the chain is drawn as one.
    filtered = model.filter(x)[0, -1]
    joint = filtered @ model.transition_matrix
    pair = joint.unsqueeze(-1) * model.transition_matrix
    center = model.means[:, 0]
    covariance = (pair * center.unsqueeze(-1) * center).sum() - (joint @ center) * (pair.sum(0) @ center)
    drawn = ahead.draws[:, 0, :2, 0]
    assert float(torch.cov(drawn.mT)[0, 1]) == pytest.approx(float(covariance.detach()), abs=0.3)


def test_forecasts_under_inputs() -> None:
    case = cases.MODEL_CASES["HMM-inputs"]()
    model, batch = case.model, case.batch
    assert isinstance(model, HMM)
    u = cases.design()[:, :3] + 0.5
    ahead = model.forecast(batch, 3, inputs=u, n=2)
    filtered = model.filter(batch)
    tables = model.transition.log_table(Batch(torch.zeros(8, 3, 1), u=u)).exp()
    for n, length in enumerate(batch.frames().tolist()):
        law = filtered[n, length - 1]
        for h in range(3):
            law = law @ tables[n, h]
            close(ahead.states[n, h], law)
    close(model.forecast(batch, 3, inputs=u[0]).states[0], ahead.states[0])
    with pytest.raises(InvalidArgument, match="inputs"):
        model.forecast(batch, 3)


def test_a_forecast_goes_on() -> None:
    """What follows a sequence follows one that has not ended, whatever the odds that it does."""
    plain, ended = discrete(2), discrete(2, end=Categorical(2, 2))
    for never in ([0.0, 0.0], [0.3, 0.3]):
        ended.end_probs = never
        close(ended.forecast([[0], [1], [2]], 4).states, plain.forecast([[0], [1], [2]], 4).states)


def test_forecasts_of_families() -> None:
    assert discrete().forecast([[0], [1]], 2).mean.shape == (1, 2, 3)  # pyright: ignore
    with pytest.raises(InvalidArgument, match="steps"):
        discrete().forecast([[0], [1]], 0)


def test_forecasts_of_autoregressions_follow_from_the_last_frames() -> None:
    """Two states that alternate for certain: the mean of each frame is a recursion from the frames before."""
    emission = Autoregressive.gaussian(2, 1, lags=2).double()
    emission.weight = [[[1.0, 0.5, 0.2]], [[-1.0, 0.3, 0.1]]]
    emission.covariances = torch.full((2, 1, 1), 0.04)
    model = HMM(Categorical(2), Categorical(2, 2), emission).double()
    model.initial_probs, model.transition_matrix = [1.0, 0.0], [[0.0, 1.0], [1.0, 0.0]]
    x = torch.tensor([[[0.3], [2.0], [1.0]], [[0.1], [-0.4], [0.0]]]).double()
    ahead = model.forecast(x, 4, lengths=[3, 2], n=3000, generator=rng(3))
    assert ahead.mean is not None
    assert ahead.variance is not None
    for n, length in enumerate((3, 2)):
        before, now = x[n, length - 2, 0], x[n, length - 1, 0]
        for h in range(4):
            constant, near, far = emission.weight.detach()[(length + h) % 2, 0]
            before, now = now, constant + near * now + far * before
            assert float(ahead.mean[n, h, 0]) == pytest.approx(float(now), abs=0.03)
            assert float(ahead.states[n, h, (length + h) % 2]) == pytest.approx(1.0)
        assert float(ahead.variance[n, 0, 0]) == pytest.approx(0.04, rel=0.15)
    alone = model.forecast(x, 2)
    assert [alone.mean, alone.variance, alone.draws] == [None] * 3
    with pytest.raises(InvalidArgument, match="at least 2 frames"):
        model.forecast(x, 2, lengths=[3, 1])


def test_forecasts_of_mean_adjusted_autoregressions_remember_states() -> None:
    """x_t − μ(z_t) = φ (x_{t−1} − μ(z_{t−1})), with states that are known: state 0 up to the last frame, then 1."""
    emission = MeanAdjustedAutoregression(2, 1).double()
    emission.means, emission.coefficients, emission.variances = [0.0, 10.0], [0.5], [0.01]
    model = HMM(Categorical(2), Categorical(2, 2), emission).double()
    model.initial_probs, model.transition_matrix = [1.0, 0.0], [[0.5, 0.5], [0.0, 1.0]]
    ahead = model.forecast([[0.2], [0.0], [0.4]], 2, n=4000, generator=rng(4))
    assert ahead.draws is not None
    first, second = ahead.draws[:, 0, 0, 0], ahead.draws[:, 0, 1, 0]
    moved = first > 5
    assert float(moved.double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(first[moved].mean()) == pytest.approx(10 + 0.5 * 0.4, abs=0.02)
    assert float(first[~moved].mean()) == pytest.approx(0.5 * 0.4, abs=0.02)
    # After the change x is 0.2 above the new mean, of which half is left.
    assert float(second[moved].mean()) == pytest.approx(10 + 0.5 * 0.2, abs=0.02)


# ---- samples ------------------------------------------------------------------------------------------------------


def test_samples_have_the_law_that_log_prob_says() -> None:
    """Every sequence of three categories, within five standard deviations of its probability."""
    for model in (discrete(), discrete(initial="stationary")):
        n = 20_000
        x = model.sample(n, 3, generator=rng(0))
        assert x.shape == (n, 3, 1)
        every = torch.tensor(list(itertools.product(range(3), repeat=3)))
        law = model.log_prob(every.unsqueeze(-1)).exp().detach()
        code = (x[..., 0] * torch.tensor([9, 3, 1])).sum(-1)
        share = torch.bincount(code, minlength=27) / n
        assert ((share - law).abs() < 5 * (law * (1 - law) / n).sqrt()).all()


def test_samples_have_the_parameters() -> None:
    model = normal(3, 2, "full")
    x, z = model.sample(400, 25, latents=True, generator=rng(1))
    assert (x.shape, z.shape) == ((400, 25, 2), (400, 25))
    share = torch.bincount(z[:, 0], minlength=3) / 400
    close(share, model.initial_probs.detach(), atol=0.12)
    counts = torch.bincount(z[:, :-1].flatten() * 3 + z[:, 1:].flatten(), minlength=9).view(3, 3).double()
    close(counts / counts.sum(-1, keepdim=True), model.transition_matrix.detach(), atol=0.04)
    for k in range(3):
        close(x[z == k].mean(0), model.means[k].detach(), atol=0.1)
        close(torch.cov(x[z == k].mT), model.covariances[k].detach(), atol=0.1)
    # And they are what the model expects: their score has mean zero.
    score = torch.autograd.grad(model.log_prob(x).mean(), [model.emission.mean, model.transition.logits])
    assert all(g.abs().max() < 1.0 for g in score)


def test_samples_under_inputs_follow_them() -> None:
    gate = SoftmaxRegression(2, 2, n_parents=2)
    gate.weight = [[[0.0, 0.0], [-2.0, 4.0]], [[0.0, 0.0], [2.0, -4.0]]]
    model = HMM(SoftmaxRegression(2, 2), gate, Categorical(2, 2)).double()
    model.initial.weight = [[0.0, 0.0], [1.0, 1.0]]  # pyright: ignore
    u = torch.cat([torch.ones(40, 1), (torch.arange(40) % 3 == 0).double().unsqueeze(-1)], -1)
    _, z = model.sample(500, 40, latents=True, inputs=u, generator=rng(2))
    blank = Batch(torch.zeros(1, 40, 1), u=u.unsqueeze(0).double())
    tables = model.transition.log_table(blank)[0].exp().detach()
    close(z[:, 0].double().mean(), model.initial.log_table(blank)[0, 0, 1].exp(), atol=0.1)
    for t in (1, 2, 3, 17):
        for k in (0, 1):
            came = z[z[:, t - 1] == k, t].double()
            close(came.mean(), tables[t, k, 1], atol=5 * 0.5 / math.sqrt(len(came)))
    with pytest.raises(InvalidArgument, match="inputs"):
        model.sample(3, 39, inputs=u)


def test_samples_of_random_length() -> None:
    model = discrete(end=Categorical(2, 2))
    model.end_probs = [0.25, 0.25]
    x, z = model.sample(800, latents=True, generator=rng(3))
    lengths = torch.tensor([len(one) for one in x]).double()
    assert all(a.shape == (len(b), 1) for a, b in zip(x, z, strict=True))
    assert float(lengths.mean()) == pytest.approx(4.0, abs=5 * math.sqrt(12 / 800))
    assert float((lengths == 1).double().mean()) == pytest.approx(0.25, abs=0.08)
    model.end_probs = [0.0, 1.0]
    assert all(int(states[-1]) == 1 and not states[:-1].any() for states in model.sample(20, latents=True)[1])
    fixed = model.sample(3, 5)
    assert fixed.shape == (3, 5, 1)
    with pytest.raises(InvalidArgument, match="length"):
        discrete().sample(3)


@pytest.mark.parametrize(("n", "length"), [(-1, 3), (True, 3), (2, 0), (2, 1.5)])
def test_samples_need_numbers(n: Any, length: Any) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match="whole number"):
        discrete().sample(n, length)


def test_samples_repeat_and_leave_the_global_generator_alone() -> None:
    model, state = normal(2), torch.get_rng_state()
    assert torch.equal(model.sample(3, 7, generator=rng(1)), model.sample(3, 7, generator=rng(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.sample(0, 4).shape[:2] == (0, 4)


def test_autoregressive_samples_have_their_coefficients() -> None:
    emission = factors.Autoregressive.gaussian(2, 1, lags=2)
    emission.weight = [[[0.5, 0.6, -0.3]], [[-1.0, -0.4, 0.2]]]
    model = HMM(Categorical(2), Categorical(2, 2), emission).double()
    model.transition_matrix = [[0.95, 0.05], [0.05, 0.95]]
    x, z = model.sample(30, 200, latents=True, generator=rng(4))
    assert x.isfinite().all()
    now, before = x[:, 2:, 0], torch.stack([torch.ones_like(x[:, 2:, 0]), x[:, 1:-1, 0], x[:, :-2, 0]], -1)
    for k in range(2):
        mine = z[:, 2:] == k
        fitted = torch.linalg.lstsq(before[mine], now[mine].unsqueeze(-1)).solution[:, 0]
        close(fitted, emission.weight[k, 0].detach(), atol=0.08)
    # There is no run-up to be seen: the first frames spread as the last.
    assert float(x[:, :20].std()) == pytest.approx(float(x[:, -20:].std()), rel=0.2)


def test_mean_adjusted_samples_remember_their_states() -> None:
    emission = factors.MeanAdjustedAutoregression(2, 1)
    emission.means, emission.coefficients, emission.variances = [-3.0, 3.0], [0.7], [0.25]
    model = HMM(Categorical(2), Categorical(2, 2), emission).double()
    model.transition_matrix = [[0.8, 0.2], [0.3, 0.7]]
    x, z = model.sample(40, 100, latents=True, generator=rng(5))
    deviation = x[..., 0] - emission.means.detach()[z]
    noise = deviation[:, 1:] - 0.7 * deviation[:, :-1]
    assert abs(float(noise.mean())) < 0.05
    assert float(noise.var()) == pytest.approx(0.25, rel=0.1)
    assert abs(float((noise * deviation[:, :-1]).mean())) < 0.05


# ---- fits ---------------------------------------------------------------------------------------------------------


def test_a_fit_finds_the_chain() -> None:
    truth = normal(3, 2, "full", gap=5.0)
    truth.transition_matrix = [[0.9, 0.1, 0.0], [0.0, 0.85, 0.15], [0.2, 0.0, 0.8]]
    x, z = truth.sample(20, 60, latents=True, generator=rng(6))
    model = GaussianHMM(3, 2, "full").double()
    result = torchem.fit(model, x, **QUIET)
    assert result.converged
    assert rising(result.history)
    order = model.means[:, 0].argsort()
    close(model.means[order], truth.means, atol=0.2)
    close(model.transition_matrix[order][:, order], truth.transition_matrix, atol=0.05)
    place = order.argsort()
    assert float((place[model.most_likely(x)] == z).double().mean()) > 0.99


@pytest.mark.parametrize("name", ["HMM-Gaussian-full", "HMM-Poisson", "HMM-inputs", "HMM-memory", "HMM-left-right"])
def test_viterbi_training_climbs_its_own_objective(name: str) -> None:
    case = cases.MODEL_CASES[name]()
    result = torchem.fit(case.model, case.batch, e_step="hard", max_iter=15, **EXACT)
    assert rising(result.history)
    paths = all_paths(case.model, case.batch)  # pyright: ignore
    best = torch.stack([each.log_joint.max() for each in paths]).detach()
    weight = torch.ones(len(best)) if case.batch.weight is None else case.batch.weight
    objective = float(((weight * best).sum() + case.model.log_prior()).detach())
    assert result.bound == pytest.approx(objective, rel=1e-9)


@pytest.mark.parametrize("name", ["HMM-Gaussian-diag", "HMM-sticky", "HMM-memory", "HMM-Product", "HMM-inputs"])
def test_restarts_are_single_fits_and_the_best_is_kept(name: str) -> None:
    case = cases.MODEL_CASES[name]()
    options = {**QUIET, "max_iter": 6, "tol": 0.0}
    alone = torchem.fit(case.model, case.batch, **options)
    again = cases.MODEL_CASES[name]()
    many = torchem.fit(again.model, again.batch, restarts=3, **options)
    assert many.histories[0] == pytest.approx(alone.history, rel=1e-7)
    assert many.bound == max(many.restarts)
    stats = again.model.e_step(again.batch)
    objective = (stats["log_likelihood"] + again.model.log_prior()).detach()
    assert float(objective) == pytest.approx(many.bound, rel=1e-9)


@pytest.mark.parametrize("init", ["auto", "kmeans++", "kmeans", "random", "random_from_data", "hierarchical"])
def test_every_start(init: str) -> None:
    for name in ("HMM-Gaussian-full", "HMM-Categorical", "HMM-missing-entries", "HMM-Autoregressive", "HMM-memory"):
        case = cases.MODEL_CASES[name]()
        result = torchem.fit(case.model, case.batch, init=init, restarts=2, max_iter=4, tol=0.0, **QUIET)
        assert math.isfinite(result.bound)
        assert all(p.isfinite().all() for p in case.model.parameters())


def test_policies_for_dead_states() -> None:
    """A state far from everything dies: kept, taken out, put elsewhere, or refused."""

    def away() -> GaussianHMM:
        model = normal(3, 1, gap=4.0)
        model.means = [[0.0], [4.0], [1e4]]
        return model

    x = sequences(2)
    kept = torchem.fit(away(), x, max_iter=8, **EXACT)
    assert kept.dead == [2]
    pruned = torchem.fit(model := away(), x, dead="prune", max_iter=8, **EXACT)
    assert pruned.pruned == [2]
    assert model.n_states == 2
    assert model.transition_matrix.shape == (2, 2)
    close(model.transition_matrix.sum(-1), torch.ones(2))
    close(model.initial_probs.sum(), torch.ones(()))
    assert float(model.log_prob(x).sum().detach()) == pytest.approx(pruned.bound, rel=1e-6)
    torchem.fit(model := away(), x, dead="respawn", max_iter=20, **EXACT)
    assert float(model.means.detach().max()) < 20
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(DegenerateComponent, match="component 2"):
        torchem.fit(away(), x, dead="raise", max_iter=8, **EXACT)


def test_a_state_that_is_reseeded_is_entered_again() -> None:
    """One that no other leads to would stay dead wherever its emission lies; zeros and frozen cells are kept."""
    model = normal(3, 1, gap=4.0)
    model.means = [[0.0], [4.0], [1e4]]
    model.initial_probs, tiny = [0.5, 0.5 - 1e-12, 1e-12], 1e-12
    model.transition_matrix = [[0.9, 0.1 - tiny, tiny], [0.1 - tiny, 0.9, tiny], [0.0, tiny, 1 - tiny]]
    x = [*sequences(2), *(part + 10.0 for part in sequences(2))]
    before = model.transition_matrix.detach().clone()
    model.respawn(model.rows(model.batch(x)), torch.tensor([False, False, True]), torch.tensor([0, 0, 100]))
    matrix, ratio = model.transition_matrix.detach(), 1 / (1 + 1 / 3)
    close(matrix[:2, 2], torch.full((2,), ratio / 3))
    close(matrix[0, 0] / matrix[0, 1], before[0, 0] / before[0, 1])
    close(matrix[2], torch.tensor([0.0, 0.5, 0.5]))
    close(model.initial_probs[2], torch.tensor(ratio / 3))
    apart = normal(3, 1, gap=4.0)
    apart.means, apart.transition_matrix = [[0.0], [4.0], [1e4]], before
    apart.initial_probs = [0.5, 0.5 - 1e-12, 1e-12]
    result = torchem.fit(apart, x, dead="respawn", max_iter=40, **EXACT)
    assert not result.dead
    assert float(apart.means.detach().max()) > 8.0


@pytest.mark.parametrize("slots", [{"initial": "stationary"}, {"end": Categorical(3, 2)}], ids=["stationary", "end"])
def test_pruning_keeps_the_other_slots_in_step(slots: dict[str, Any]) -> None:
    emission = Gaussian(3, 1)
    emission.means = [[0.0], [4.0], [1e4]]
    model = HMM(**{"initial": Categorical(3), "transition": Categorical(3, 3), "emission": emission} | slots).double()
    if model.end is not None:
        model.end_probs = [0.1, 0.2, 0.3]
    result = torchem.fit(model, sequences(2), dead="prune", max_iter=6, **EXACT)
    assert result.pruned == [2]
    assert model.initial_probs.shape == (2,)
    if model.end is not None:
        assert model.end_probs.shape == (2,)
    if isinstance(model.initial, Stationary):
        assert model.initial.transition is model.transition
        close(model.initial_probs @ model.transition_matrix, model.initial_probs)
        whole = HMM("stationary", Categorical(3, 3), Gaussian(3, 1)).double()
        whole.forbid(torch.tensor([False, False, True]))
        assert float(whole.initial_probs[2].detach()) < 1e-9
        assert int(whole.most_likely(sequences(2)).max()) < 2
    torchem.fit(model, sequences(2), max_iter=3, **EXACT)


def test_equal_states_are_warned_of() -> None:
    model = GaussianHMM(2, 1).double()
    with pytest.warns(SymmetryWarning) as seen:
        torchem.fit(model, sequences(), max_iter=2, init=None, progress=False)
    assert "components 0 and 1 start identical" in str(seen[0].message)
    # What tells them apart may be the chain alone.
    model.transition_matrix = [[0.9, 0.1], [0.4, 0.6]]
    torchem.fit(model, sequences(), max_iter=2, init=None, progress=False, tol=0)


# ---- criteria, files, replicas ------------------------------------------------------------------------------------


def test_number_of_parameters() -> None:
    model = normal(3, 2, "diag")
    assert model.n_parameters() == 2 + 6 + 6 + 6
    model.restrict(masks.left_right(3, jump=1))
    assert model.n_parameters() == 2 + 2 + 12
    model.initial_probs = [1.0, 0.0, 0.0]
    assert model.n_parameters() == 2 + 12
    model.transition.freeze()
    assert model.n_parameters() == 12
    assert discrete(initial="stationary").n_parameters() == 2 + 4
    assert discrete(end=Categorical(2, 2)).n_parameters() == 1 + 2 + 4 + 2


@pytest.mark.parametrize("name", ["HMM-Gaussian-diag", "HMM-weights", "HMM-ends", "HMM-memory", "HMM-inputs"])
def test_criteria(name: str) -> None:
    case = cases.MODEL_CASES[name]()
    model, batch = case.model, case.batch
    weight = torch.ones(8).double() if batch.weight is None else batch.weight
    found = torchem.criteria(model, batch)  # pyright: ignore
    loglik = float((weight * model.log_prob(batch)).sum().detach())
    frames, k = float((weight * batch.frames()).sum()), model.n_parameters()
    entropy = sum(float(w * each.entropy) for w, each in zip(weight, all_paths(model, batch), strict=True))  # pyright: ignore
    assert (found.n, found.n_parameters) == (frames, k)
    assert found.loglik == pytest.approx(loglik)
    assert found.aic == pytest.approx(-2 * loglik + 2 * k)
    assert found.bic == pytest.approx(-2 * loglik + k * math.log(frames))
    assert found.icl == pytest.approx(found.bic + 2 * entropy)


@pytest.mark.parametrize(
    "name", [name for name in cases.MODEL_CASES if name.startswith("HMM") and "Counts" not in name]
)
def test_files_hold_every_chain(name: str, tmp_path: Any) -> None:
    case = cases.MODEL_CASES[name]()
    model, batch = case.model, case.batch
    model.m_step(model.e_step(batch))
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    assert type(again) is type(model)
    assert torch.equal(again.log_prob(batch), model.log_prob(batch))
    close_stats(again.e_step(batch), model.e_step(batch), rtol=1e-15)
    stats = model.e_step(batch)
    close(again.bound(stats), model.bound(stats), rtol=1e-15)
    for (path, a), (other, b) in zip(model.maximize(stats).items(), again.maximize(stats).items(), strict=True):
        assert path == other
        assert torch.equal(a, b)


def test_replicas_are_taken_apart() -> None:
    model = discrete(3)
    many = model.replicate(3)
    many.emission.logits.data = randn(3, 3, 3, seed=1)  # pyright: ignore
    x = torch.randint(0, 3, (4, 6, 1), generator=rng(1))
    for r in range(3):
        one = many.take_replicas(r)
        assert one.replicas == ()
        for use in ("log_prob", "posterior", "filter", "most_likely"):
            close(getattr(many, use)(x)[r].double(), getattr(one, use)(x).double())
        scores, paths = many.best_paths(x, 3)  # pyright: ignore
        mine = one.best_paths(x, 3)  # pyright: ignore
        close(scores[r], mine[0])
        assert torch.equal(paths[r], mine[1])


# ---- covariates, streamed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("name", ["HMM-inputs", "HMM-inputs-first", "HMM-inputs-support"])
def test_streamed_tables_give_the_same_statistics(name: str, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.MODEL_CASES[name]()
    model = case.model
    assert isinstance(model, HMM)
    lengths = torch.tensor([40, 17, 33, 1, 40, 16, 18, 25])
    x, u = (
        cases.blobs(8 * 40, 2, 3).view(8, 40, 2),
        torch.cat([torch.ones(8, 40, 1), randn(8, 40, 1, seed=9)], -1).double(),
    )
    batch = Batch(x, u=u, lengths=lengths, weight=rand(8, seed=3).round(decimals=1))

    def again() -> Any:
        generator = rng(6)
        return lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        whole, drawn = model.e_step(batch, beta=beta), model.e_step(batch, "sample", beta, again())
        monkeypatch.setattr("torchem.models.hmm._TABLES", 1)
        assert model._block(batch) == 16
        monkeypatch.setattr(HMM, "infer", lambda *given: pytest.fail("all tables at once"))
        close_stats(model.e_step(batch, beta=beta), whole)
        many = model.replicate(2)
        assert isinstance(many, HMM)
        monkeypatch.setattr(HMM, "infer_sample", lambda *given, **more: pytest.fail("all tables at once"))
        monkeypatch.setattr("torchem.models.hmm._TABLES", 1)
        close_stats(model.e_step(batch, "sample", beta, again()), drawn)
        close_stats(many.e_step(batch, beta=beta).map(lambda leaf: leaf[1]), whole)


def test_inputs_through_a_fit() -> None:
    """The frame that a step leads to decides: covariates laid out as the data are, in all forms."""
    case = cases.MODEL_CASES["HMM-inputs"]()
    x, u, lengths = case.batch.x, case.batch.u, case.batch.lengths
    assert u is not None
    assert lengths is not None
    listed = [x[n, :t] for n, t in enumerate(lengths.tolist())], [u[n, :t] for n, t in enumerate(lengths.tolist())]
    forms = [
        (listed[0], {"inputs": listed[1]}),
        (x, {"inputs": u, "lengths": lengths}),
        (torch.cat(listed[0]), {"inputs": torch.cat(listed[1]), "lengths": lengths}),
        (case.batch, {}),
    ]
    histories = []
    for data, fields in forms:
        model = cases.MODEL_CASES["HMM-inputs"]().model
        histories.append(torchem.fit(model, data, max_iter=6, **EXACT, **fields).history)
        assert rising(histories[-1])
    for history in histories[1:]:
        assert history == pytest.approx(histories[0], rel=1e-12)
    with pytest.raises(InvalidArgument, match="inputs"):
        torchem.fit(cases.MODEL_CASES["HMM-inputs"]().model, x, **EXACT)
