"""Generalised EM: walks against closed forms, networks against families, direct ascent against EM."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchem
from tests.laws import cases
from tests.laws import test_factor as laws
from tests.laws.cases import FactorCase, close, randn, state
from tests.regressions.common import as_users_run_it
from torchem import Direct, Gradient, gradient, priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidFile, InvalidType
from torchem.factor import Factor
from torchem.factors import (
    Categorical,
    Gaussian,
    LinearGaussian,
    Neural,
    PoissonRegression,
    Product,
    SoftmaxRegression,
)

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "LBFGS": (torch.optim.LBFGS, {}),
    "SGD": (torch.optim.SGD, {"lr": 1e6}),
    "Adam": (torch.optim.Adam, {"lr": 0.5}),
}


class Normal(nn.Module):
    """Independent normal columns, with a mean that may depend on covariates."""

    def __init__(self, k: int, d: int, inputs: int = 0, seed: int = 0):
        super().__init__()
        self.mean = nn.Parameter(2.0 * randn(k, d, seed=seed).float())
        self.log_scale = nn.Parameter(torch.zeros(k, d))
        self.slope = nn.Parameter(torch.zeros(k, d, inputs)) if inputs else None

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        mean = self.mean if self.slope is None else self.mean + torch.einsum("kdm,nm->nkd", self.slope, u)
        z = (x.unsqueeze(-2) - mean) * (-self.log_scale).exp()
        return -(0.5 * z.square() + self.log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def sample(self, z: Tensor) -> Tensor:
        return (self.mean[z] + self.log_scale.exp()[z] * torch.randn(len(z), self.mean.shape[-1])).detach()


def points(n: int = 120) -> Tensor:
    return cases.blobs(n, 2, 3, spread=2.0)


def network(k: int = 3, d: int = 2, optimizer: Any = torch.optim.LBFGS, steps: int = 10, **options: Any) -> Gradient:
    inputs = options.pop("inputs", 0)
    return Gradient(Neural(Normal(k, d, inputs), k, bool(inputs)), optimizer, steps, **options)


def mixture_of_networks(**options: Any) -> Any:
    return torchem.Mixture(Categorical(3), network(**options)).double()


def run(model: Any, data: Any, **options: Any) -> torchem.Result:
    options = {"seed": 0, "tol": 0.0, "max_iter": 8, "progress": False} | options
    return torchem.fit(model, data, **options)


def number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def never_falls(history: list[float], slack: float = 1e-9) -> None:
    assert len(history) > 2
    for before, after in itertools.pairwise(history):
        assert after >= before - slack * (1 + abs(before))


# ---- M-steps of sufficient factors --------------------------------------------------------------------------------


def regression() -> FactorCase:
    factor = LinearGaussian(2, 2, 1).double()
    factor.weight = randn(2, 1, 2, seed=3)
    return FactorCase(factor, Batch(randn(40, 1), u=randn(40, 2, seed=1)), cases.soft(40, 2))


def gate() -> FactorCase:
    factor, batch = SoftmaxRegression.example()
    return FactorCase(factor, batch, cases.soft(20, 3))


CASES: dict[str, Callable[[], FactorCase]] = {
    **{f"Gaussian-{kind}": cases.FACTOR_CASES[f"Gaussian-{kind}-K3-D2-N40"] for kind in cases.COVARIANCE_TYPES},
    "Categorical-zeros": cases.FACTOR_CASES["Categorical-support-zeros"],
    "Poisson-missing": cases.FACTOR_CASES["Poisson-example1"],
    "Product": cases.FACTOR_CASES["Product-example"],
    "LinearGaussian": regression,
    "SoftmaxRegression": gate,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_many_steps_reach_the_closed_form(name: str) -> None:
    case = CASES[name]()
    stats = case.factor.stats(case.batch, case.expected)
    best = laws.maximized(case.factor, stats)
    found = laws.maximized(Gradient(case.factor, steps=30), stats)
    gap = best.expected_log_prob(stats) - found.expected_log_prob(stats)
    assert -1e-9 <= float(gap.detach()) <= 1e-7 * float(case.expected.sum())
    for view in case.factor.views:
        close(getattr(found, view), getattr(best, view), rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_a_walk_never_loses(name: str, optimizer: str) -> None:
    case = CASES[name]()
    stats = case.factor.stats(case.batch, case.expected)
    kind, options = OPTIMIZERS[optimizer]
    found = laws.maximized(Gradient(case.factor, kind, 3, **options), stats)
    assert float(found.expected_log_prob(stats).detach()) > float(case.factor.expected_log_prob(stats).detach())


LAWS = [
    laws.test_shapes, laws.test_no_rows_are_no_statistics, laws.test_gradient_of_the_expected_density_is_that_of_q,
    laws.test_maximize_is_pure, laws.test_empty_components_keep_their_parameters,
    laws.test_kernel_equals_log_prob_and_stats, laws.test_replicas_equal_each_alone, laws.test_float32_near_float64,
    laws.test_copies_through_state_dict,
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("name", ["Gaussian-full", "Poisson-missing"])
def test_laws_of_factors(name: str, law: Callable[..., None]) -> None:
    def build() -> FactorCase:
        case = CASES[name]()
        return FactorCase(Gradient(case.factor, steps=20), case.batch, case.expected)

    law(build, torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_stacked_replicas_walk_as_each_alone(optimizer: str) -> None:
    kind, options = OPTIMIZERS[optimizer]

    def build() -> FactorCase:
        case = CASES["Poisson-missing"]()
        return FactorCase(Gradient(case.factor, kind, 5, **options), case.batch, case.expected)

    laws.test_replicas_equal_each_alone(build, torch.device("cpu"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_cells_and_components_stay(optimizer: str) -> None:
    kind, options = OPTIMIZERS[optimizer]
    table = Categorical(2, 4).double()
    table.probs = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.5, 0.0]]
    table.freeze("probs", mask=torch.tensor([[True, False, False, True], [False, True, False, False]]))
    counts = torchem.Stats(counts=torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 5.0, 2.0, 0.0]], dtype=torch.float64))
    best, found = laws.maximized(table, counts), laws.maximized(Gradient(table, kind, 100, **options), counts)
    close(found.probs, best.probs, rtol=0, atol=1e-3)
    close(found.probs[0, [0, 3]], table.probs[0, [0, 3]], rtol=1e-12)
    assert found.probs[1, 3] == 0
    case = CASES["Gaussian-full"]()
    wrapped = Gradient(case.factor, kind, 5, **options).freeze("means", mask=torch.tensor([True, False, False]))
    moved = laws.maximized(wrapped, case.factor.stats(case.batch, case.expected))
    assert torch.equal(moved.means[0], case.factor.means[0])
    assert not torch.equal(moved.means[1], case.factor.means[1])
    assert moved.n_parameters() == case.factor.n_parameters() < copy.deepcopy(wrapped).unfreeze().n_parameters()


def test_a_wrapper_is_read_and_assigned_as_what_it_wraps() -> None:
    model = torchem.GaussianMixture(2, 2)
    model.mixing, model.component = Gradient(model.mixing), Gradient(model.component)
    model.weights, model.means = [0.25, 0.75], [[0.0, 1.0], [2.0, 3.0]]
    close(model.weights, torch.tensor([0.25, 0.75]), rtol=1e-6)
    close(model.component.factor.means, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert model.component.covariance_type == "full"
    assert isinstance(model.component.unwrapped, Gaussian)
    model.mixing.prior = priors.Dirichlet(2.0)
    assert model.mixing.factor.prior is model.mixing.prior
    model.prune(torch.tensor([1]))
    assert isinstance(model.component, Gradient)
    assert model.mixing.prior is not None


# ---- fits ---------------------------------------------------------------------------------------------------------


def em(kind: str, optimizer: str | None) -> tuple[Any, dict[str, Any]]:
    """A model and its data, with or without an optimiser in each slot."""
    if kind == "mixture":
        model, given = torchem.GaussianMixture(3, 2).double(), {"data": points()}
        model.mixing.prior = priors.Dirichlet(2.0)
    elif kind == "HMM":
        model = torchem.HMM(Categorical(3), Categorical(3, 3), Categorical(3, 4)).double()
        given = {"data": cases.ragged(cases.classes(4))}
    else:
        model = torchem.Mixture(SoftmaxRegression(2, 2), LinearGaussian(2, 2, 1)).double()
        u = torch.cat([torch.ones(60, 1), randn(60, 1, seed=2).float()], -1).double()
        given = {"data": u[:, 1:].abs() + 0.1 * randn(60, 1), "inputs": u}
    if optimizer is not None:
        chosen, options = OPTIMIZERS[optimizer]
        for slot, factor in model.slots():
            setattr(model, slot, Gradient(factor, chosen, 3, **options))
    return model, given


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["mixture", "HMM", "experts"])
@pytest.mark.filterwarnings("ignore::torchem.errors.SymmetryWarning")
def test_the_bound_never_falls(kind: str, optimizer: str) -> None:
    model, given = em(kind, optimizer)
    result = run(model, **given, restarts=2, max_iter=4)
    for history in result.histories:
        never_falls(history)
        assert history[-1] > history[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fit_reaches_the_optimum_of_em(optimizer: str) -> None:
    best = run(*_pair(em("mixture", None)), max_iter=500, tol=1e-9)
    model, given = em("mixture", optimizer)
    found = run(model, **given, max_iter=500, tol=1e-9)
    assert found.bound == pytest.approx(best.bound, abs=1e-4)
    close(model.means, best.model.means, rtol=0, atol=0.02)


def _pair(made: tuple[Any, dict[str, Any]]) -> tuple[Any, Any]:
    return made[0], made[1]["data"]


def test_em_map_takes_walks_but_no_transforms() -> None:
    model, given = em("mixture", "LBFGS")
    batch = model.batch(given["data"])
    params = dict(model.named_parameters())
    before = state(model)
    new = torchem.em_map(model)(params, batch)
    cases.unchanged(model, before)
    model.m_step(model.e_step(batch))
    for name, value in model.named_parameters():
        close(new[name], value)
    with pytest.raises(InvalidArgument, match="Gradient: expected a plain call"):
        torch.func.vmap(torchem.em_map(model), (None, 0))(params, Batch(given["data"].unflatten(0, (2, -1))))


# ---- networks -----------------------------------------------------------------------------------------------------


def paired(slots: str = "mixture") -> tuple[Any, Any]:
    """A model with a network that is a normal law, and the same with the family, from one start."""
    ours = network(steps=20)
    family = Gaussian(3, 2, "diag", covariance_floor=0.0).double()
    family.means, family.covariances = ours.factor.module.mean.detach(), torch.ones(3, 2)
    if slots == "HMM":
        made = [torchem.HMM(Categorical(3), Categorical(3, 3), factor) for factor in (ours, family)]
    else:
        made = [torchem.Mixture(Categorical(3), factor) for factor in (ours, family)]
    return made[0].double(), made[1].double()


@pytest.mark.parametrize(
    "options",
    [
        {}, {"e_step": "hard"}, {"e_step": "sample"}, {"anneal": [0.5], "max_iter": 12},
        {"batch_size": 50}, {"weights": True},
    ],
    ids=["soft", "hard", "sampled", "annealed", "batches", "weights"],
)  # fmt: skip
def test_a_network_that_is_a_normal_law_takes_the_path_of_the_family(options: dict[str, Any]) -> None:
    """Statistics, draws and posteriors of each pass are those that the inner steps see."""
    given = dict(options)
    if given.pop("weights", False):
        given["weights"] = torch.arange(120.0) % 3
    ours, family = (run(model, points(), init=None, **{"max_iter": 6, **given}) for model in paired())
    close(number(ours.history), number(family.history), rtol=1e-5)
    close(ours.model.component.factor.module.mean, family.model.component.means, rtol=0, atol=5e-3)


def test_a_network_in_a_chain_takes_the_path_of_the_family() -> None:
    """Ragged, with missing frames, labels and weights; mixed with closed forms."""
    x = cases.frames(2).clone()
    x[0, 1] = x[3, 2] = torch.nan
    evidence = torch.zeros(cases.SEQUENCES, cases.FRAMES, 3).double()
    evidence[1, 0, 1:] = -torch.inf
    batch = cases.ragged(x, evidence=evidence)
    ours, family = (run(model, batch, init=None, max_iter=6) for model in paired("HMM"))
    close(number(ours.history), number(family.history), rtol=1e-5)
    never_falls(ours.history)
    close(ours.model.transition_matrix, family.model.transition_matrix, rtol=0, atol=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["full", "incremental", "hard"])
def test_the_bound_of_networks_never_falls(mode: str, optimizer: str) -> None:
    kind, options = OPTIMIZERS[optimizer]
    model = mixture_of_networks(optimizer=kind, steps=2, **options)
    given: dict[str, Any] = {"hard": {"e_step": "hard"}, "full": {}}.get(
        mode, {"accumulate": torchem.Incremental(), "batch_size": 40}
    )
    result = run(model, points(), **given)
    never_falls(result.history)
    assert result.history[-1] > result.history[0]
    batch = model.batch(points())
    with torch.no_grad():
        stats = model.e_step(batch, "hard" if mode == "hard" else "soft")
    close(stats["log_likelihood"], number(result.bound), rtol=1e-9)
    close(model.bound(stats), stats["log_likelihood"])


def test_how_data_are_cut_and_what_is_kept_is_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(mixture_of_networks(steps=2), points(), max_iter=3)
    monkeypatch.setattr(gradient, "_KEPT", 100)
    again = run(mixture_of_networks(steps=2), points(), max_iter=3, batch_size=17)
    close(number(again.history), number(whole.history))
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return (Batch(part) for part in points().split(17))

    streamed = run(mixture_of_networks(steps=2), Loader(), max_iter=3)
    close(number(streamed.history), number(whole.history))
    assert len(passes) > 15  # inner steps read the data again


def test_stochastic_steps_keep_their_optimiser() -> None:
    x = points(600)
    full = run(mixture_of_networks(), x, max_iter=30)
    online = mixture_of_networks(optimizer=torch.optim.Adam, steps=1, lr=0.03)
    found = run(online, x, accumulate=torchem.Stochastic(), batch_size=60, max_iter=8)
    assert found.bound > full.bound - 0.02 * len(x)
    stream, rule = mixture_of_networks(optimizer=torch.optim.Adam, steps=1, lr=0.03), torchem.Stochastic()
    with torch.no_grad():
        stream.component.factor.module.mean += 1.0
    before = float(stream.log_prob(x).sum().detach())
    scores = [torchem.partial_fit(stream, batch, rule) for batch in x.split(60)]
    assert float(stream.log_prob(x).sum().detach()) > before + 0.1 * len(x)
    walk = stream.component.walk()
    assert {int(kept["step"]) for kept in walk.optimizer.state.values()} == {len(scores)}


def test_a_part_of_a_product_may_be_a_network() -> None:
    parts = Product([network(3, 1, steps=2), Gaussian(3, 1)])
    model = torchem.Mixture(Categorical(3), parts).double()
    joint = torchem.Mixture(Categorical(3), Gradient(Product([Neural(Normal(3, 1), 3), Gaussian(3, 1)]))).double()
    found = run(joint, points(), max_iter=12)
    never_falls(found.history)
    result = run(model, points(), max_iter=12)
    never_falls(result.history)
    assert found.bound == pytest.approx(result.bound, abs=0.5)


def test_latents_that_a_factor_hides_beside_a_network_are_summed_out() -> None:
    table = Categorical(2, 2).double()
    table.probs = [[0.7, 0.3], [0.4, 0.6]]
    inner = torchem.factors.Mixture(table, network(4, 2, steps=1))
    model = torchem.Mixture(Categorical(2), inner).double()
    result = run(model, points(), max_iter=15)
    never_falls(result.history)
    assert result.bound > result.history[0]


def test_networks_read_covariates_and_keep_what_is_frozen() -> None:
    u = randn(150, 1, seed=2)
    x = torch.where(torch.arange(150).unsqueeze(-1) % 2 == 0, 3 * u, 4 - 2 * u) + 0.2 * randn(150, 1, seed=3)
    model = torchem.Mixture(Categorical(2), network(2, 1, inputs=1)).double()
    never_falls(run(model, x, inputs=u, max_iter=20).history)
    slopes = model.component.factor.module.slope.detach().flatten().sort().values
    close(slopes, torch.tensor([-2.0, 3.0]), rtol=0, atol=0.15)
    # A layer that requires no gradient, and a whole network.
    model.component.factor.module.slope.requires_grad_(False)
    before = state(model.component)
    run(model, x + 1.0, inputs=u, init=None, max_iter=2)
    assert torch.equal(model.component.factor.module.slope, before["factor.module.slope"])
    assert not torch.equal(model.component.factor.module.mean, before["factor.module.mean"])
    model.component.freeze()
    before, weights = state(model.component), model.weights.detach()
    run(model, x - 1.0, inputs=u, init=None, max_iter=2)
    cases.unchanged(model.component, before)
    assert not torch.equal(model.weights, weights)
    assert model.component.n_parameters() == 0
    assert model.component.unfreeze().n_parameters() == 4


def test_a_prior_of_a_network_joins_what_is_climbed() -> None:
    class Ridge(priors.Gamma):
        def log_prob(self, factor: Factor) -> Tensor:
            return -50.0 * sum(p.double().square().sum() for n, p in factor.named_parameters() if "mean" in n)  # pyright: ignore

        def check(self, factor: Factor) -> None:
            pass

        def completed(self, factor: Factor, moments: Any) -> Any:
            return self

    free, bound = mixture_of_networks(), mixture_of_networks()
    bound.component.prior = Ridge(1.0)
    run(free, points(), max_iter=6)
    never_falls(run(bound, points(), max_iter=6).history)
    means = [model.component.factor.module.mean.detach().norm() for model in (free, bound)]
    assert means[1] < 0.8 * means[0]


def test_a_network_is_scored_without_chance_and_can_be_sampled_and_pruned() -> None:
    class Noisy(Normal):
        def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    factor = Neural(Noisy(3, 2), 3)
    factor.train()
    x = Batch(points(20).float())
    assert torch.equal(factor.log_prob(x), factor.log_prob(x))
    some = factor.select(torch.tensor([2, 0]))
    close(some.log_prob(x), factor.log_prob(x)[:, [2, 0]])
    assert some.select(torch.tensor([False, True])).states == [0]
    model = torchem.Mixture(Categorical(2), some)
    assert model.sample(10).shape == (10, 2)
    with pytest.raises(NotImplementedError, match="sample"):
        Neural(nn.Linear(2, 3), 3).sample(torch.zeros(2).long())
    for init in ("random", "random_from_data"):
        result = run(mixture_of_networks(steps=1), points(), init=init, max_iter=3, dead="prune", restarts=2)
        assert result.restarts[0] != result.restarts[1]


def test_float32() -> None:
    model = mixture_of_networks(steps=3).float()
    result = run(model, points(), max_iter=5)
    never_falls(result.history, 1e-5)
    assert model.component.factor.module.mean.dtype == torch.float32


# ---- the whole objective ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["mixture", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("HMM", "experts"))]
)
@pytest.mark.filterwarnings("ignore::torchem.errors.SymmetryWarning")
def test_direct_ascent_reaches_the_optimum_of_em(kind: str) -> None:
    model, given = em(kind, None)
    # From somewhere on its way: where two ways may lead to different optima, they must agree about this one.
    near = run(model, **given, max_iter={"mixture": 0, "HMM": 20, "experts": 5}[kind])
    best = run(copy.deepcopy(model), **given, init=None, max_iter=60)
    found = run(model, **given, init=None, direct=True, max_iter=60, tol=1e-7)
    never_falls(found.history)
    assert found.history[0] == pytest.approx(near.bound, rel=1e-9)
    assert found.bound > best.bound - 1e-3
    if kind == "mixture":
        assert found.bound == pytest.approx(best.bound, abs=1e-5)


@pytest.mark.parametrize("direct", [True, Direct(torch.optim.Adam, steps=3, lr=0.05), Direct(torch.optim.SGD, lr=1e4)])
def test_direct_ascent_never_falls_keeps_what_is_frozen_and_takes_restarts(direct: bool | Direct) -> None:
    model = torchem.GaussianMixture(3, 2).double()
    model.weights = [0.2, 0.3, 0.5]
    model.mixing.freeze("probs", mask=torch.tensor([True, False, False]))
    model.component.freeze("means", mask=torch.tensor([False, False, True]))
    kept = model.component.means[2].detach().clone()
    result = run(model, points(), direct=direct, restarts=3, batch_size=50)
    assert len(result.restarts) == 3
    for history in result.histories:
        never_falls(history)
        assert history[-1] > history[0]
    close(model.weights[0], number(0.2))
    assert model.weights[1] != 0.3
    assert torch.equal(model.component.means[2], kept)
    assert model.component.means.requires_grad


def test_direct_ascent_of_a_network_needs_no_wrapper() -> None:
    model = torchem.Mixture(Categorical(3), Neural(Normal(3, 2), 3)).double()
    result = run(model, points(), init=None, direct=True, max_iter=60, tol=1e-8)
    best = run(paired()[1], points(), init=None, max_iter=500, tol=1e-9)
    assert result.bound == pytest.approx(best.bound, abs=1e-2)


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    factor = Gaussian(2, 1)
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: Gradient(factor, foreign), InvalidType, "over the parameters that it shall move, got SGD"),  # pyright: ignore
        (lambda: Gradient(factor, "SGD"), InvalidType, "optimizer: expected a class of torch.optim, got str"),  # pyright: ignore
        (lambda: Gradient(factor, dict), InvalidType, "optimizer: expected a class"),  # pyright: ignore
        (lambda: Gradient(factor, steps=0), InvalidArgument, "steps: expected a whole number of at least 1, got 0"),
        (lambda: Gradient(factor, steps=2.5), InvalidArgument, "steps: .* got 2.5"),  # pyright: ignore
        (lambda: Gradient(factor, torch.optim.Adam, rate=0.1), InvalidArgument, "options that Adam takes, got .*rate"),
        (lambda: Gradient(factor, torch.optim.Adam, lr=-1.0), InvalidArgument, "options that Adam takes, got .*-1.0"),
        (lambda: Gradient(factor, torch.optim.Adam, maximize=True), InvalidArgument, "maximize: expected nothing"),
        (lambda: Gradient(nn.Linear(1, 1)), InvalidType, "factor: expected a torchem factor, got Linear"),  # pyright: ignore
        (lambda: Gradient(torchem.Variational(Gaussian(2, 1))), InvalidArgument, "got a posterior of them"),
        (lambda: Gradient(Product([Gradient(Gaussian(2, 1))])), InvalidArgument, "got a Gradient"),
        (lambda: torchem.Variational(Gradient(factor)), InvalidArgument, "conjugate prior, got Gradient"),
        (lambda: Neural(lambda x: x, 2), InvalidType, "module: expected a torch module"),  # pyright: ignore
        (lambda: Neural(nn.Tanh(), 2), InvalidArgument, "a network with parameters"),
        (lambda: Neural(nn.Linear(1, 2), 0), InvalidArgument, "n_components: .* got 0"),
        (lambda: Neural(nn.Linear(1, 2), 2, states=[2]), InvalidArgument, "states: expected outputs from 0 to 1"),
        (lambda: Neural(nn.Linear(1, 2), 2).freeze("weight"), InvalidArgument, "freeze: expected no name"),
        (lambda: Direct(torch.optim.Adam, rate=1.0), InvalidArgument, "options that Adam takes"),
    ]  # fmt: skip
    with as_users_run_it():
        for make, kind, message in wrong:
            with pytest.raises(kind, match=message):
                make()


def bare() -> Any:
    return torchem.Mixture(Categorical(3), Neural(Normal(3, 2), 3)).double()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (bare, {}, "Neural: expected an optimiser to climb Q with.*wrap it: torchem.Gradient"),
        (mixture_of_networks, {"accelerate": "squarem"}, "accelerate: .*not a map to extrapolate"),
        (mixture_of_networks, {"direct": True, "e_step": "hard"}, "direct: .* got .'e_step'."),
        (mixture_of_networks, {"direct": True, "anneal": [0.5]}, "direct: .* got .'anneal'."),
        (mixture_of_networks, {"direct": True, "accelerate": "squarem"}, "direct: .* got .'accelerate'."),
        (mixture_of_networks, {"direct": True, "accumulate": torchem.Incremental()}, "direct: .* got .'accumulate'."),
        (mixture_of_networks, {"direct": "LBFGS"}, "direct: expected True, False or a torchem.Direct, got str"),
        (lambda: torchem.variational(torchem.GaussianMixture(3, 2)), {"direct": True}, "whose objective is a bound"),
        (lambda: torchem.FactorialHMM.gaussian([2, 2], 2), {"direct": True}, "whose objective is a bound"),
    ],
)  # fmt: skip
def test_what_fits_refuse(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with as_users_run_it(), pytest.raises((InvalidArgument, InvalidType), match=message):
        torchem.fit(make(), points(), progress=False, **options)


def test_what_is_no_function_of_statistics_says_so() -> None:
    model = mixture_of_networks()
    stats = model.e_step(model.batch(points()))
    with pytest.raises(InvalidArgument, match=r"m_step: .*Neural in slot 'component'; use torchem.fit"):
        model.m_step(stats)
    with pytest.raises(InvalidArgument, match=r"em_map: .*Neural"):
        torchem.em_map(model)
    with pytest.raises(InvalidArgument, match="wrap it"):
        bare().maximize(stats)
    with pytest.raises(InvalidArgument, match="Neural: expected an optimiser"):
        torchem.partial_fit(bare(), points(), torchem.Stochastic())
    chain = torchem.HMM("stationary", Categorical(2, 2), Gaussian(2, 1))
    chain.transition = Gradient(chain.transition)
    with pytest.raises(InvalidArgument, match=r"initial: .*Gradient has replaced"):
        chain.batch(torch.zeros(5, 1))


def test_networks_that_do_not_fit_their_data() -> None:
    with pytest.raises(InvalidArgument, match="data: expected rows that the network reads"):
        run(mixture_of_networks(), randn(20, 5))
    wide = torchem.Mixture(Categorical(2), Gradient(Neural(nn.Linear(2, 3), 2)))
    with pytest.raises(InvalidArgument, match=r"module: expected log-densities of shape \[1, 2\], got \[1, 3\]"):
        run(wide, points())
    reading = torchem.Mixture(Categorical(2), network(2, 2, inputs=1))
    with pytest.raises(InvalidArgument, match="inputs: expected covariates"):
        run(reading, points())


# ---- files --------------------------------------------------------------------------------------------------------


def test_files_keep_optimisers_by_name_and_take_networks(tmp_path: Any) -> None:
    path = tmp_path / "m.safetensors"
    model = torchem.GaussianMixture(2, 2)
    model.mixing.prior = priors.Dirichlet(3.0)
    model.mixing = Gradient(model.mixing, torch.optim.Adam, steps=3, lr=0.1, betas=(0.5, 0.9)).freeze()
    torchem.save(model, path)
    again = torchem.load(path)
    own = again.mixing.climber
    assert (own.optimizer, own.steps, own.options) == (torch.optim.Adam, 3, {"lr": 0.1, "betas": (0.5, 0.9)})
    assert repr(again.mixing.prior) == repr(model.mixing.prior)
    assert again.mixing.n_parameters() == 0
    made = mixture_of_networks()
    made.component = made.component.select(torch.tensor([0, 2]))
    made.mixing = made.mixing.select(torch.tensor([0, 2]))
    made.component.freeze()
    torchem.save(made, path)
    with pytest.raises(InvalidFile, match="Normal"):
        torchem.load(path)
    back = torchem.load(path, modules={"Normal": Normal(3, 2, seed=9)})
    close(back.log_prob(points()), made.log_prob(points()))
    assert back.component.factor.fixed

    class Own(torch.optim.SGD):
        pass

    model.mixing = Gradient(model.mixing.factor, Own)
    with pytest.raises(InvalidType, match="config"):
        torchem.save(model, path)


def test_copies_of_a_fitted_model_walk_alone() -> None:
    model = mixture_of_networks(optimizer=torch.optim.Adam, steps=1, lr=0.05)
    torchem.partial_fit(model, points(), torchem.Stochastic())
    twin = copy.deepcopy(model)
    before = state(model)
    torchem.partial_fit(twin, points(), torchem.Stochastic())
    cases.unchanged(model, before)


# ---- passes where they are not needed -----------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["mixing", "component"])
def test_passes_make_an_m_step_exact(slot: str) -> None:
    """Of a softmax gate and of Poisson experts, whose closed M-steps go one step uphill."""
    u, count = torch.cat([torch.ones(80, 1), randn(80, 1)], -1).double(), torch.arange(80).remainder(7).double()
    plain = torchem.Mixture(SoftmaxRegression(2, 2), PoissonRegression(2, 2)).double()
    plain.component.weight = [[[1.0, 0.4]], [[0.5, -0.3]]]
    exact, to_the_end = copy.deepcopy(plain), {"tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    setattr(exact, slot, Gradient(getattr(exact, slot), torch.optim.LBFGS, 10, True, **to_the_end))
    batch = plain.batch(count.unsqueeze(-1), inputs=u)
    share = plain.posterior(batch).detach()

    def q(model: torchem.Mixture) -> tuple[Tensor, Tensor]:
        factor: Any = getattr(model, slot).unwrapped
        value = (share * (factor.log_table(batch) if slot == "mixing" else factor.log_prob(batch))).sum()
        return value, torch.autograd.grad(value, factor.coefficient)[0]

    for model in (plain, exact):
        torchem.fit(model, batch, init=None, max_iter=1, tol=0.0, seed=0, progress=False)
    assert float(q(exact)[0].detach()) > float(q(plain)[0].detach())
    assert float(q(exact)[1].abs().max()) < 1e-5 < 1e-2 < float(q(plain)[1].abs().max())
    rows = [{}, {"restarts": 2}, {"accumulate": torchem.Incremental(), "batch_size": 40}, {"e_step": "hard"}]
    for options in rows:
        history = torchem.fit(exact, batch, max_iter=4, tol=0.0, seed=0, progress=False, **options).history
        assert all(b >= a - 1e-8 * abs(a) for a, b in itertools.pairwise(history))


def test_passes_are_saved_and_asked_for_by_name(tmp_path) -> None:
    model = torchem.Mixture(Gradient(SoftmaxRegression(2, 2), passes=True), LinearGaussian(2, 2, 1))
    torchem.save(model, tmp_path / "m.safetensors")
    again: Any = torchem.load(tmp_path / "m.safetensors")
    assert again.mixing.passes
    assert not again.mixing.sufficient
    with as_users_run_it(), pytest.raises(InvalidType, match="passes: expected True or False"):
        Gradient(SoftmaxRegression(2, 2), passes=3)  # pyright: ignore


# ---- networks under a gate ----------------------------------------------------------------------------------------


class Curve(nn.Module):
    """Log-densities, moments and distribution functions of normal outputs around a network's."""

    def __init__(self, k: int):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, k))
        self.log_scale = nn.Parameter(torch.zeros(k))

    def law(self, u: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(u), self.log_scale.exp(), validate_args=False)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return self.law(u).log_prob(x)

    def moments(self, u: Tensor) -> tuple[Tensor, Tensor]:
        law = self.law(u)
        return law.mean.unsqueeze(-1), law.variance.unsqueeze(-1)

    def cdf(self, x: Tensor, u: Tensor) -> Tensor:
        return self.law(u).cdf(x).unsqueeze(-1)

    def sample(self, z: Tensor, u: Tensor) -> Tensor:
        return self.mean(u).gather(-1, z.unsqueeze(-1)).detach()


def test_experts_that_are_networks(tmp_path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Curve(3)
    u = torch.linspace(-3, 3, 120).double()
    x = torch.where(u < 0, 2 * u.sin(), 0.5 * u.square() - 3).unsqueeze(-1) + 0.2 * randn(120, 1)
    u = torch.stack([torch.ones(120).double(), u], -1)
    expert = Gradient(Neural(net, 3, inputs=True), torch.optim.Adam, steps=5, lr=0.03)
    model: Any = torchem.Mixture(SoftmaxRegression(3, 2), expert).double()
    result = torchem.fit(model, x, inputs=u, max_iter=15, tol=0.0, seed=0, progress=False)
    assert all(b >= a - 1e-8 * abs(a) for a, b in itertools.pairwise(result.history))
    line = torchem.Mixture(Categorical(1), LinearGaussian(1, 2, 1)).double()
    assert result.bound > torchem.fit(line, x, inputs=u, seed=0, progress=False).bound + 50
    p = model.predict(u[::20])
    value = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    mass = p.density(value).detach() * (value[1] - value[0])
    close(p.mean[:, 0].detach(), mass @ value, rtol=1e-6, atol=1e-6)
    close(p.variance[:, 0].detach(), mass @ value.square() - (mass @ value).square(), rtol=1e-5, atol=1e-5)
    close(p.cdf(p.quantile(0.9)).detach(), torch.full((6, 1), 0.9, dtype=torch.float64), rtol=1e-9)
    assert model.sample(120, inputs=u).shape == (120, 1)
    model.prune(torch.tensor([True, False, True]))
    assert model.predict(u[:2]).component_means.shape == (2, 2, 1)
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors", modules={"component.factor.module": Curve(3)})
    close(again.log_prob(again.batch(x, inputs=u)), model.log_prob(model.batch(x, inputs=u)))
    with pytest.raises(NotImplementedError, match=r"moments where its module has a method moments\(\)"):
        torchem.Mixture(model.mixing, Neural(Normal(2, 1), 2)).predict(u[:2]).mean  # noqa: B018


class Strict(Normal):
    """A network that refuses what is not a number."""

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("NaN")
        return super().forward(x, u)


@pytest.mark.parametrize("inputs", [False, True])
def test_networks_are_never_asked_about_missing_frames(inputs: bool) -> None:
    """Not by the check of their sizes either, which the first frame that is there answers."""
    x, u = randn(2, 12, 2), randn(2, 12, 2, seed=1) if inputs else None
    x[0, :3], x[1, 5] = torch.nan, torch.nan
    emission = Gradient(Neural(Strict(2, 2, 2 * inputs), 2, inputs), torch.optim.Adam, 2, lr=0.01)
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).double()
    result = torchem.fit(model, x, inputs=u, init=None, tol=100.0, progress=False)
    assert math.isfinite(result.bound)
    x[0] = torch.nan
    assert abs(float(model.log_prob(x, inputs=u)[0].detach())) < 1e-9


class Marginal(Normal):
    """A network that integrates missing entries out: columns are independent."""

    def marginal(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        mean = self.mean if self.slope is None else self.mean + torch.einsum("kdm,nm->nkd", self.slope, u)
        z = (torch.where(x.isnan(), 0.0, x).unsqueeze(-2) - mean) * (-self.log_scale).exp()
        each = -(0.5 * z.square() + self.log_scale + 0.5 * math.log(2 * math.pi))
        return torch.where(x.isnan().unsqueeze(-2), 0.0, each).sum(-1)


@pytest.mark.parametrize("inputs", [0, 2])
def test_rows_and_entries_that_networks_miss(inputs: int) -> None:
    """As a family does that knows how; the network is never asked about rows of which nothing is there."""
    x, u = randn(60, 2), randn(60, 2, seed=1) if inputs else None
    x[::7], x[1::5, 0] = torch.nan, torch.nan
    seen = ~x.isnan().all(-1)
    models = [
        torchem.Mixture(Categorical(3), Gradient(Neural(net(3, 2, inputs), 3, bool(inputs)), steps=2)).double()
        for net in (Marginal, Strict)
    ]
    whole = torch.where(seen[:, None], randn(60, 2), torch.nan)
    for model, rows in zip(models, (x, whole), strict=True):
        result = torchem.fit(model, rows, inputs=u, init=None, max_iter=3, tol=0.0, progress=False)
        assert math.isfinite(result.bound)
        score = model.log_prob(rows, inputs=u).detach()
        assert not score[~seen].abs().gt(1e-12).any()
        alone = model.log_prob(rows[seen], inputs=None if u is None else u[seen]).detach()
        torch.testing.assert_close(score[seen], alone)
    if not inputs:
        net = models[0].component.unwrapped.module
        twin = torchem.Mixture(Categorical(3), Gaussian(3, 2, "diag")).double()
        twin.weights = models[0].weights
        twin.component.means, twin.component.covariances = net.mean, (2 * net.log_scale).exp()
        torch.testing.assert_close(models[0].log_prob(x), twin.log_prob(x))
    with pytest.raises(InvalidArgument, match=r"row 1, column 0.*marginal\(x\)"):
        models[1].log_prob(x, inputs=u)
