"""The grid: every model under every way to run EM, by its law or by a refusal that says why."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchem
from torchem import priors
from torchem.errors import ConvergenceWarning, InvalidArgument, SymmetryWarning
from torchem.factors import (
    Bernoulli,
    BinomialRegression,
    Categorical,
    Categoricals,
    Censored,
    Exponential,
    FromDistribution,
    Gamma,
    Gaussian,
    LinearGaussian,
    Multinomial,
    NegativeBinomial,
    Neural,
    Poisson,
    PoissonRegression,
    Product,
    SoftmaxRegression,
    Stacked,
    StudentT,
    TreeGate,
    Truncated,
    Uniform,
    VonMises,
    VonMisesFisher,
    ZeroInflated,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points() -> dict[str, Any]:
    x = torch.randn(240, 2, generator=rng(), dtype=torch.float64)
    x[:80] += 3.0
    x[80:160, 0] -= 4.0
    return {"data": x[torch.randperm(240, generator=rng(1))]}


def abilities() -> dict[str, Any]:
    """Three columns that one score explains."""
    x = torch.randn(240, 3, generator=rng(), dtype=torch.float64)
    return {"data": x * 0.7 + torch.randn(240, 1, generator=rng(1), dtype=torch.float64)}


def counts() -> dict[str, Any]:
    rate = torch.tensor([2.0, 9.0]).repeat(120).unsqueeze(-1)
    return {"data": torch.poisson(rate, generator=rng()).double()}


def varied() -> dict[str, Any]:
    """Counts whose rates vary, some of them zero for a reason of their own."""
    rate = 2 * torch.tensor([2.0, 9.0]).repeat(120).unsqueeze(-1) * torch.rand(240, 1, generator=rng())
    return {"data": torch.poisson(rate, generator=rng()).double().index_fill(0, torch.arange(0, 240, 7), 0.0)}


def limited() -> dict[str, Any]:
    """Points between limits at which they were cut off."""
    return {"data": points()["data"].clamp(-3.0, 3.5)}


def votes() -> dict[str, Any]:
    """Rows of nine, of which one count is sometimes missing."""
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).repeat(120, 1)
    chosen = torch.multinomial(probs, 9, True, generator=rng())
    x = torch.stack([(chosen == c).sum(-1) for c in range(3)], -1).double()
    x[::9, 1] = torch.nan
    return {"data": x}


def lines() -> dict[str, Any]:
    u = torch.randn(240, 2, generator=rng(), dtype=torch.float64)
    u[:, 0] = 1.0
    slope = torch.where(torch.arange(240) % 2 == 0, 2.0, -2.0).double()
    noise = torch.randn(240, generator=rng(1), dtype=torch.float64)
    return {"data": (u[:, 1] * slope + 0.3 * noise).unsqueeze(-1), "inputs": u}


def experts() -> dict[str, Any]:
    u = lines()["inputs"]
    even = torch.arange(240) % 2 == 0
    rate = torch.where(even, (1 + 0.8 * u[:, 1]).exp(), (2 - 0.5 * u[:, 1]).exp())
    return {"data": torch.poisson(rate, generator=rng()).unsqueeze(-1), "inputs": u}


def choices() -> dict[str, Any]:
    given = experts()
    return given | {"data": (given["data"] > 4).double()}


def tree() -> TreeGate:
    return TreeGate(SoftmaxRegression(2, 2), [None, SoftmaxRegression(2, 2)])


def sequences() -> dict[str, Any]:
    truth = torchem.GaussianHMM(2, 2).double()
    truth.means, truth.transition_matrix = [[-1.5, 0.0], [1.5, 1.0]], [[0.9, 0.1], [0.2, 0.8]]
    return {"data": truth.sample(12, 15, generator=rng())}


def dialects() -> dict[str, Any]:
    """Sequences of two chains."""
    parts = []
    for seed, stay in enumerate((0.9, 0.3)):
        truth = torchem.GaussianHMM(2, 2).double()
        truth.means, truth.transition_matrix = [[-1.5, 0.0], [1.5, 1.0]], [[stay, 1 - stay], [1 - stay, stay]]
        parts.append(truth.sample(10, 15, generator=rng(seed)))
    return {"data": torch.stack(parts, 1).flatten(0, 1)}


def symbols() -> dict[str, Any]:
    truth = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    truth.emission.probs, truth.transition_matrix = [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], [[0.9, 0.1], [0.2, 0.8]]
    return {"data": truth.sample(12, 15, generator=rng())}


def answers() -> dict[str, Any]:
    truth = Categoricals(2, [2, 3]).double()
    truth.tables = [[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]]
    return {"data": truth.sample(torch.arange(240) % 2, generator=rng()).double()}


def walks() -> dict[str, Any]:
    truth = movement().double()
    turns, steps = truth.emission.factors
    turns.means, turns.concentrations, steps.rates = [[0.0], [2.5]], [[8.0], [2.0]], [[0.3], [3.0]]
    return {"data": truth.sample(12, 15, generator=rng())}


def causes(**options: Any) -> torchem.BayesianNetwork:
    """Two hidden causes of four answers, one of which depends on both."""
    edges = [("H", "A"), ("H", "B"), ("H", "C"), ("G", "C"), ("G", "D"), ("A", "D")]
    return torchem.BayesianNetwork({"H": 2, "G": 2, "A": 2, "B": 3, "C": 2, "D": 2}, edges, ("H", "G"), **options)


def effects() -> dict[str, Any]:
    truth = causes().double()
    truth.tables["A"], truth.tables["B"] = [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
    truth.tables["C"] = [[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.1, 0.9]]]
    truth.tables["D"] = [[[0.8, 0.2], [0.6, 0.4]], [[0.3, 0.7], [0.1, 0.9]]]
    return {"data": truth.sample(240, generator=rng())}


def measured() -> torchem.BayesianNetwork:
    """A hidden cause of an answer and of a measurement, which depends on the answer too."""
    leaves = {"X": (("H", "A"), Gaussian(4, 1))}
    return torchem.BayesianNetwork({"H": 2, "A": 2}, [("H", "A")], ("H",), leaves)


def measurements() -> dict[str, Any]:
    truth = measured().double()
    truth.tables["H"], truth.tables["A"] = [0.7, 0.3], [[0.9, 0.1], [0.2, 0.8]]
    truth.conditionals["X"].means = [[-2.0], [1.0], [1.5], [4.0]]
    return {"data": truth.sample(240, generator=rng())}


def movement() -> torchem.HMM:
    return torchem.HMM(Categorical(2), Categorical(2, 2), Product([VonMises(2, 1), Exponential(2, 1)]))


def prior() -> torchem.GaussianMixture:
    model = torchem.GaussianMixture(3, 2)
    model.mixing.prior, model.component.prior = priors.Dirichlet(2.0), priors.NormalInverseWishart()
    return model


def series() -> dict[str, Any]:
    truth = torchem.LinearGaussianStateSpace(1, 2).double()
    truth.dynamics, truth.loadings = [[0.9]], [[1.0], [-0.5]]
    return {"data": truth.sample(10, 12, generator=rng())}


def turns() -> dict[str, Any]:
    truth = torchem.SwitchingLinearDynamics(2, 1, 2).double()
    truth.dynamics, truth.loadings = [[[0.95]], [[-0.9]]], [[1.0], [-0.5]]
    truth.transition_matrix = [[0.9, 0.1], [0.1, 0.9]]
    return {"data": truth.sample(10, 6, generator=rng())}


def amortized() -> torchem.AmortizedModel:
    torch.manual_seed(0)
    return torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1, steps=2)


class Normal(torch.nn.Module):
    """A network that gives normalised log-densities of each state: here of normal columns."""

    def __init__(self, k: int, d: int):
        super().__init__()
        self.mean, self.log_scale = torch.nn.Parameter(torch.randn(k, d)), torch.nn.Parameter(torch.zeros(k, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x.unsqueeze(-2) - self.mean) * (-self.log_scale).exp()
        return -(0.5 * z.square() + self.log_scale + 0.9189385332046727).sum(-1)

    def marginal(self, x: torch.Tensor) -> torch.Tensor:
        z = (torch.where(x.isnan(), 0.0, x).unsqueeze(-2) - self.mean) * (-self.log_scale).exp()
        each = -(0.5 * z.square() + self.log_scale + 0.9189385332046727)
        return torch.where(x.isnan().unsqueeze(-2), 0.0, each).sum(-1)


def network(k: int) -> torchem.Gradient:
    torch.manual_seed(0)
    return torchem.Gradient(Neural(Normal(k, 2), k), torch.optim.Adam, steps=2, lr=0.1)


def kinds() -> torchem.Mixture:
    """A cluster in parts, and one with outliers."""
    outliers = torchem.Mixture(Categorical(1), StudentT(1, 2))
    return torchem.Mixture(Categorical(2), [torchem.GaussianMixture(2, 2), outliers])


def climbed() -> torchem.GaussianMixture:
    model = torchem.GaussianMixture(3, 2)
    model.component = torchem.Gradient(model.component, torch.optim.Adam, steps=2, lr=0.1)
    return model


def laplace() -> torchem.Mixture:
    family = FromDistribution(torch.distributions.Laplace, 3, 2)
    return torchem.Mixture(Categorical(3), torchem.Gradient(family, torch.optim.Adam, steps=2, lr=0.1))


#: Models and their data.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "Gaussian mixture": (lambda: torchem.GaussianMixture(3, 2), points),
    "Poisson mixture": (lambda: torchem.Mixture(Categorical(2), Poisson(2, 1)), counts),
    "Student's t mixture": (lambda: torchem.Mixture(Categorical(3), StudentT(3, 2)), points),
    "clusters and noise": (
        lambda: torchem.Mixture(Categorical(4), Stacked([Gaussian(3, 2), Uniform(1, 2)])),
        points,
    ),
    "zero-inflated counts": (
        lambda: torchem.Mixture(Categorical(2), ZeroInflated(NegativeBinomial(2, 1))),
        varied,
    ),
    "censored mixture": (
        lambda: torchem.Mixture(Categorical(3), Censored(Gaussian(3, 2, "diag"), low=-3.0, high=3.5)),
        limited,
    ),
    "latent classes": (lambda: torchem.Mixture(Categorical(2), Categoricals(2, [2, 3])), answers),
    "VEV mixture": (lambda: torchem.GaussianMixture(3, 2, "VEV"), points),
    "mixture of factor analysers": (lambda: torchem.GaussianMixture(3, 2, "low_rank", rank=1), points),
    "factor analysis": (lambda: torchem.FactorAnalysis(3, 1), abilities),
    "Bernoulli mixture": (
        lambda: torchem.Mixture(Categorical(2), Bernoulli(2, 2)),
        lambda: {"data": (points()["data"] > 0).double()},
    ),
    "exponential mixture": (
        lambda: torchem.Mixture(Categorical(2), Exponential(2, 2)),
        lambda: {"data": points()["data"].exp()},
    ),
    "gamma mixture": (
        lambda: torchem.Mixture(Categorical(2), Gamma(2, 2)),
        lambda: {"data": points()["data"].exp()},
    ),
    "multinomial mixture": (lambda: torchem.Mixture(Categorical(2), Multinomial(2, 3)), votes),
    "truncated mixture": (
        lambda: torchem.Mixture(Categorical(3), Truncated(Gaussian(3, 2, "diag"), low=-9.0, high=9.0)),
        points,
    ),
    "mixture of directions": (
        lambda: torchem.Mixture(Categorical(3), VonMisesFisher(3, 2)),
        lambda: {"data": torch.nn.functional.normalize(points()["data"] + 2, dim=-1)},
    ),
    "Laplace mixture": (laplace, points),
    "mixture of regressions": (lambda: torchem.Mixture(Categorical(2), LinearGaussian(2, 2, 1)), lines),
    "mixture of experts": (lambda: torchem.Mixture(SoftmaxRegression(2, 2), LinearGaussian(2, 2, 1)), lines),
    "Poisson experts": (lambda: torchem.Mixture(SoftmaxRegression(2, 2), PoissonRegression(2, 2)), experts),
    "tree of logistic experts": (lambda: torchem.Mixture(tree(), BinomialRegression(3, 2)), choices),
    "Gaussian HMM": (lambda: torchem.GaussianHMM(2, 2), sequences),
    "categorical HMM": (lambda: torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)), symbols),
    "movement HMM": (movement, walks),
    "stationary HMM": (lambda: torchem.HMM("stationary", Categorical(2, 2), Gaussian(2, 2)), sequences),
    "semi-Markov HMM": (lambda: torchem.GaussianHSMM(2, 2, 9, "poisson"), sequences),
    "MAP": (prior, points),
    "variational mixture": (lambda: torchem.variational(torchem.GaussianMixture(3, 2)), points),
    "variational multinomial": (
        lambda: torchem.variational(torchem.Mixture(Categorical(2), Multinomial(2, 3))),
        votes,
    ),
    "variational zero-inflated": (
        lambda: torchem.variational(torchem.Mixture(Categorical(2), ZeroInflated(Poisson(2, 1)))),
        varied,
    ),
    "variational Student's t": (
        lambda: torchem.variational(torchem.Mixture(Categorical(3), StudentT(3, 2))),
        points,
    ),
    "variational factor analysers": (
        lambda: torchem.variational(torchem.GaussianMixture(3, 2, "low_rank", rank=1)),
        points,
    ),
    "variational factor analysis": (lambda: torchem.variational(torchem.FactorAnalysis(3, 1)), abilities),
    "variational HMM": (lambda: torchem.variational(torchem.GaussianHMM(2, 2)), sequences),
    "variational semi-Markov HMM": (lambda: torchem.variational(torchem.GaussianHSMM(2, 2, 9)), sequences),
    "factorial HMM": (lambda: torchem.FactorialHMM.gaussian([2, 2], 2), sequences),
    "mixture of HMMs": (lambda: torchem.Mixture(Categorical(2), torchem.GaussianHMM(2, 2)), dialects),
    "mixture of models": (kinds, points),
    "mixture of state spaces": (
        lambda: torchem.Mixture(Categorical(2), torchem.LinearGaussianStateSpace(1, 2)),
        lambda: {"data": series()["data"][:, :6]},
    ),
    "mixture of networks": (lambda: torchem.Mixture(Categorical(2), causes()), effects),
    "state space": (lambda: torchem.LinearGaussianStateSpace(1, 2), series),
    "variational state space": (lambda: torchem.variational(torchem.LinearGaussianStateSpace(1, 2)), series),
    "Bayesian network": (causes, effects),
    "conditional Gaussian network": (measured, measurements),
    "variational network": (lambda: torchem.variational(causes()), effects),
    "switching dynamics": (lambda: torchem.SwitchingLinearDynamics(2, 1, 2), turns),
    "amortized model": (amortized, points),
    "gradient mixture": (climbed, points),
    "neural HMM": (lambda: torchem.HMM(Categorical(2), Categorical(2, 2), network(2)), sequences),
}

#: Options, and whether the objective may fall from pass to pass.
MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "full batch": ({}, False),
    "restarts": ({"restarts": 3}, False),
    "stochastic": ({"accumulate": torchem.Stochastic, "max_iter": 8}, True),
    "incremental": ({"accumulate": torchem.Incremental, "max_iter": 8}, False),
    "hard": ({"e_step": "hard"}, False),
    "sampled": ({"e_step": "sample", "max_iter": 12}, True),
    "annealed": ({"anneal": [0.5, 0.8], "max_iter": 24}, True),
    "squarem": ({"accelerate": "squarem"}, False),
    "anderson": ({"accelerate": "anderson"}, False),
    "direct": ({"direct": True, "max_iter": 10}, False),
}

#: All that is refused, with a word of the sentence that says why.
REFUSED = {
    **{
        (kind, mode): why
        for kind in ("factor analysis", "variational factor analysis")
        for mode, why in (("hard", "one of soft"), ("sampled", "one of soft"), ("annealed", "temperature"))
    },
    ("amortized model", "hard"): "configurations",
    ("amortized model", "sampled"): "configurations",
    ("amortized model", "annealed"): "temperature",
    ("amortized model", "squarem"): "map to extrapolate",
    ("amortized model", "anderson"): "map to extrapolate",
    **{
        (kind, mode): why
        for kind in ("state space", "variational state space", "switching dynamics")
        for mode, why in (("hard", "configurations"), ("sampled", "configurations"), ("annealed", "temperature"))
    },
    ("variational state space", "direct"): "a bound on it",
    ("switching dynamics", "direct"): "a bound on it",
    ("neural HMM", "squarem"): "map to extrapolate",
    ("neural HMM", "anderson"): "map to extrapolate",
    ("variational mixture", "direct"): "a bound on it",
    ("variational HMM", "direct"): "a bound on it",
    ("variational Student's t", "direct"): "a bound on it",
    ("variational factor analysers", "direct"): "a bound on it",
    ("variational factor analysis", "direct"): "a bound on it",
    ("variational semi-Markov HMM", "direct"): "a bound on it",
    ("variational network", "direct"): "a bound on it",
    ("factorial HMM", "direct"): "a bound on it",
    ("amortized model", "direct"): "a bound on it",
    ("variational multinomial", "direct"): "a bound on it",
    ("variational zero-inflated", "direct"): "a bound on it",
    ("Laplace mixture", "squarem"): "map to extrapolate",
    ("Laplace mixture", "anderson"): "map to extrapolate",
}


def run(model: str, mode: str, **more: Any) -> tuple[torchem.Result, dict[str, Any]]:
    build, data = MODELS[model]
    given = data()
    options = {"max_iter": 15, "tol": 0.0, "seed": 0, "progress": False} | MODES[mode][0] | more
    # Walks of optimisers take long.
    if model in ("gradient mixture", "neural HMM", "Laplace mixture"):
        options["max_iter"] = min(options["max_iter"], 24 if mode == "annealed" else 8)
    if "accumulate" in options:
        options["accumulate"], options["batch_size"] = options["accumulate"](), len(given["data"]) // 5
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, SymmetryWarning):
            warnings.simplefilter("ignore", category)
        return torchem.fit(build().double(), given["data"], inputs=given.get("inputs"), **options), given


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_the_grid(model: str, mode: str) -> None:
    if (model, mode) in REFUSED:
        with pytest.raises(InvalidArgument, match=REFUSED[model, mode]):
            run(model, mode)
        return
    result, given = run(model, mode)
    assert result.status in ("max_iter", "converged")
    assert all(torch.isfinite(torch.tensor(result.history)))
    # The first pass tells how things stood; free energies at other temperatures do not compare.
    if mode != "annealed":
        assert result.bound > result.history[0]
    if not MODES[mode][1]:
        # Rounding of float64; the inner ascents of approximate posteriors end at their tolerance.
        slack = 1e-6 if model in ("factorial HMM", "amortized model", "switching dynamics") else 1e-9
        for before, after in itertools.pairwise(result.history):
            assert after >= before - slack * (1 + abs(before))
    assert_bound_is_the_objective(result, given, mode)


def assert_bound_is_the_objective(result: torchem.Result, given: dict[str, Any], mode: str) -> None:
    """`bound` belongs to the parameters that are returned."""
    model = result.model
    if not isinstance(model, torchem.DiscreteModel):
        return
    batch = model.batch(given["data"], u=given.get("inputs"))
    with torch.no_grad():
        stats = model.e_step(batch, "hard" if mode == "hard" else "soft")
        value = float((stats["log_likelihood"] + model.log_prior()).reshape(()))
    assert result.bound == pytest.approx(value, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("model", ["Gaussian mixture", "Poisson mixture", "Gaussian HMM", "categorical HMM"])
def test_all_ways_lead_to_one_optimum(model: str) -> None:
    best = run(model, "restarts", max_iter=300, tol=1e-8)[0].bound
    for mode in ("stochastic", "incremental", "sampled", "squarem", "anderson"):
        found = run(model, mode, max_iter=40, tol=0.0)[0]
        size = 240 if "mixture" in model else 180
        assert found.bound > best - 0.03 * size, mode


@pytest.mark.parametrize(
    "options",
    [
        {"anneal": [0.5], "accelerate": "squarem", "restarts": 2},
        {"accumulate": torchem.Stochastic, "e_step": "sample", "restarts": 2},
        {"accumulate": torchem.Incremental, "anneal": [0.5], "restarts": 2},
        {"accumulate": torchem.Incremental, "e_step": "hard"},
        {"accumulate": torchem.Stochastic, "dead": "respawn"},
        {"e_step": "sample", "anneal": [0.5], "dead": "prune"},
    ],
    ids=["annealed-accelerated", "SAEM", "annealed-incremental", "incremental-hard", "online-respawn", "SEM-annealed"],
)  # fmt: skip
@pytest.mark.parametrize(
    "model",
    ["Gaussian mixture", "MAP", "variational mixture", "Poisson mixture",
     pytest.param("factorial HMM", marks=pytest.mark.slow)],
)  # fmt: skip
def test_modes_compose(model: str, options: dict[str, Any]) -> None:
    result, given = run(model, "full batch", **options)
    assert result.status in ("max_iter", "converged")
    assert_bound_is_the_objective(
        result, given, options.get("e_step", "soft") if options.get("e_step") == "hard" else ""
    )
