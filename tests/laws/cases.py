"""The cases that laws run on: each factor's and model's own examples, and hard ones generated from them.

A class joins by existing: `torchem.factors.__all__` and `torchem.models.__all__` are read here. A class may offer
several examples through a classmethod ``examples()``; without it ``example()`` is the only one.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.families import Counts
from torchem import factors, masks, priors
from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors import Categorical, Gaussian
from torchem.model import LatentModel
from torchem.models import (
    HMM,
    HSMM,
    AmortizedModel,
    BayesianNetwork,
    FactorialHMM,
    GaussianHMM,
    GaussianHSMM,
    GaussianMixture,
    LinearGaussianStateSpace,
    Mixture,
    SwitchingLinearDynamics,
)

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng(seed), dtype=torch.float64)


# ---- factors ------------------------------------------------------------------------------------------------------


@dataclass
class FactorCase:
    """A factor as an observed child, observations, and expectations that carry weights."""

    factor: Factor
    batch: Batch
    expected: Tensor

    def to(self, device: torch.device) -> "FactorCase":
        return FactorCase(self.factor.to(device), self.batch.to(device), self.expected.to(device))


def soft(n: int, k: int, seed: int = 1) -> Tensor:
    """Responsibilities times uneven weights."""
    return randn(n, k, seed=seed).mul(1.5).softmax(-1) * (0.5 + rand(n, 1, seed=seed))


def gaussian(k: int, d: int, covariance_type: str, seed: int = 0, spread: float = 1.5) -> Gaussian:
    """Random means about an origin that is not zero; random healthy covariances."""
    g = Gaussian(k, d, covariance_type).double()  # pyright: ignore[reportArgumentType]
    g.means = spread * randn(k, d, seed=seed) + 0.3
    g.scale.data = 0.3 * randn(*g.scale.shape, seed=seed + 1)
    if covariance_type in ("full", "tied"):
        g.scale.data = g.scale.data.tril()
    return g


def _scaled(g: Gaussian, a: float, b: float) -> Gaussian:
    """The law of ``a x + b``, told about the data's scale as `prepare` would."""
    means, covariances = g.means.detach() * a + b, g.covariances.detach() * a * a
    g.means, g.covariances = means, covariances
    g.unit = g.unit * a * a
    return g


def _gaussian_cases() -> Iterator[tuple[str, Callable[[], FactorCase]]]:
    for kind in COVARIANCE_TYPES:
        for k, d, n in ((3, 2, 40), (1, 3, 20), (4, 1, 30), (1, 1, 7), (2, 5, 1)):

            def plain(kind: str = kind, k: int = k, d: int = d, n: int = n) -> FactorCase:
                return FactorCase(gaussian(k, d, kind), Batch(2 * randn(n, d, seed=5) + 0.5), soft(n, k))

            yield f"Gaussian-{kind}-K{k}-D{d}-N{n}", plain
        for a, b in ((1e6, 3e6), (1e-6, 2e-6), (1.0, 50.0)):

            def scaled(kind: str = kind, a: float = a, b: float = b) -> FactorCase:
                x = (2 * randn(40, 3, seed=6) + 0.5) * a + b
                return FactorCase(_scaled(gaussian(3, 3, kind), a, b), Batch(x), soft(40, 3))

            yield f"Gaussian-{kind}-scale{a:g}-shift{b:g}", scaled

        def flat(kind: str = kind) -> FactorCase:
            x = randn(25, 3, seed=7)
            x[:, 2] = 0.25
            return FactorCase(gaussian(2, 3, kind), Batch(x), soft(25, 2))

        def line(kind: str = kind) -> FactorCase:
            x = randn(25, 1, seed=8) * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
            return FactorCase(gaussian(2, 3, kind), Batch(x), soft(25, 2))

        yield f"Gaussian-{kind}-constant-column", flat
        yield f"Gaussian-{kind}-rank-1", line


def _categorical_cases() -> Iterator[tuple[str, Callable[[], FactorCase]]]:
    def table(k: int, m: int, n: int) -> FactorCase:
        c = Categorical(k, m).double()
        c.probs = (2 * randn(k, m, seed=2)).softmax(-1)
        return FactorCase(c, Batch(torch.randint(0, m, (n, 1), generator=rng(4))), soft(n, k))

    for k, m, n in ((3, 4, 30), (1, 5, 12), (3, 1, 8), (1, 1, 3), (4, 3, 1)):
        yield f"Categorical-K{k}-M{m}-N{n}", lambda k=k, m=m, n=n: table(k, m, n)

    def forbidden() -> FactorCase:
        case = table(3, 4, 30)
        probs = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
        case.factor.probs = probs  # pyright: ignore[reportAttributeAccessIssue]
        possible = (probs > 0)[:, case.batch.x[:, 0]].mT
        return replace(case, expected=torch.where(possible, case.expected, 0.0))

    yield "Categorical-support-zeros", forbidden


def _offered(kind: type) -> list[tuple[Factor, Batch]]:
    if kind is Gaussian:
        return [(gaussian(3, 2, c), Batch(2 * randn(20, 2, seed=5))) for c in COVARIANCE_TYPES]
    return list(getattr(kind, "examples", lambda: [kind.example()])())  # pyright: ignore


def concrete_factors() -> list[type[Factor]]:
    """Every factor that torchem exports and that has an M-step of its own, and the tests' own."""
    return [*(kind for kind in every_family() if kind.sufficient), Counts]


def every_family() -> list[type[Factor]]:
    """Every factor that torchem exports and that can be built."""
    names = (getattr(torchem.factors, name) for name in torchem.factors.__all__)
    return [c for c in names if inspect.isclass(c) and issubclass(c, Factor) and not inspect.isabstract(c)]


def _example_cases() -> Iterator[tuple[str, Callable[[], FactorCase]]]:
    """Each example as it is, on one row, with empty rows and components, and with hard expectations."""
    for kind in concrete_factors():
        for i, (factor, _) in enumerate(_offered(kind)):
            if factor.n_components is None:
                continue
            k = factor.n_components ** (factor.memory + 1)

            def example(kind: type = kind, i: int = i, k: int = k) -> FactorCase:
                factor, batch = _offered(kind)[i]
                return FactorCase(factor, batch, soft(len(batch), k))

            def one_row(example: Callable[[], FactorCase] = example) -> FactorCase:
                case = example()
                return FactorCase(case.factor, case.batch[:1], case.expected[:1])

            def masked(example: Callable[[], FactorCase] = example) -> FactorCase:
                case = example()
                case.expected[::3] = 0.0
                return case

            def empty(example: Callable[[], FactorCase] = example) -> FactorCase:
                case = example()
                case.expected[:, 0] = 0.0
                return case

            def hard(example: Callable[[], FactorCase] = example) -> FactorCase:
                case = example()
                return replace(case, expected=(case.expected == case.expected.amax(-1, keepdim=True)).double())

            name = f"{kind.__name__}-example{i or ''}"
            yield name, example
            yield f"{name}-one-row", one_row
            yield f"{name}-zero-weights", masked
            yield f"{name}-empty-component", empty
            yield f"{name}-hard", hard


FACTOR_CASES = dict([*_example_cases(), *_gaussian_cases(), *_categorical_cases()])


def every_factor(*, only: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """Parametrise over builders of factor cases: each test gets a fresh one to change as it likes."""
    chosen = [pytest.param(build, id=name) for name, build in FACTOR_CASES.items() if only(name)]
    return pytest.mark.parametrize("build", chosen)


# ---- models -------------------------------------------------------------------------------------------------------


@dataclass
class ModelCase:
    """A model and data, weights and labels included."""

    model: LatentModel
    batch: Batch

    def to(self, device: torch.device) -> "ModelCase":
        return ModelCase(self.model.to(device), self.batch.to(device))


def blobs(n: int, d: int, k: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    centers = spread * randn(k, d, seed=seed)
    z = torch.randint(0, k, (n,), generator=rng(seed + 1))
    return centers[z] + randn(n, d, seed=seed + 2)


def mixture(k: int, d: int, kind: str, seed: int = 0) -> GaussianMixture:
    m = GaussianMixture(k, d, kind).double()  # pyright: ignore[reportArgumentType]
    g = gaussian(k, d, kind, seed)
    m.means, m.covariances = g.means.detach(), g.covariances.detach()
    m.weights = randn(k, seed=seed + 9).softmax(-1)
    return m


def _gmm_cases() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    for kind in COVARIANCE_TYPES:
        for k, d, n in ((3, 2, 60), (1, 2, 15), (3, 1, 40), (2, 3, 1)):
            yield (
                f"GaussianMixture-{kind}-K{k}-D{d}-N{n}",
                lambda kind=kind, k=k, d=d, n=n: ModelCase(mixture(k, d, kind), Batch(blobs(n, d, k))),
            )

        def weighted(kind: str = kind) -> ModelCase:
            weight = 2 * rand(50, seed=3)
            weight[::4] = 0
            return ModelCase(mixture(3, 2, kind), Batch(blobs(50, 2, 3), weight=weight))

        def labelled(kind: str = kind) -> ModelCase:
            evidence = torch.zeros(50, 3, dtype=torch.float64)
            evidence[:10] = -torch.inf
            evidence[torch.arange(10), torch.arange(10) % 3] = 0.0
            evidence[10:20, 1] = -torch.inf
            evidence[20:30] = randn(10, 3, seed=4)
            return ModelCase(mixture(3, 2, kind), Batch(blobs(50, 2, 3), evidence=evidence))

        def sparse(kind: str = kind) -> ModelCase:
            case = ModelCase(mixture(3, 2, kind), Batch(blobs(50, 2, 3)))
            case.model.weights = [0.6, 0.0, 0.4]  # pyright: ignore[reportAttributeAccessIssue]
            return case

        def scaled(a: float, b: float, kind: str = kind) -> ModelCase:
            case = ModelCase(mixture(3, 2, kind), Batch(blobs(50, 2, 3) * a + b))
            _scaled(case.model.component, a, b)  # pyright: ignore
            return case

        yield f"GaussianMixture-{kind}-weights", weighted
        yield f"GaussianMixture-{kind}-labels", labelled
        yield f"GaussianMixture-{kind}-support", sparse
        yield f"GaussianMixture-{kind}-1e6", lambda scaled=scaled: scaled(1e6, 2e6)
        yield f"GaussianMixture-{kind}-1e-6", lambda scaled=scaled: scaled(1e-6, 1e-6)


def latent_class(k: int = 3, m: int = 4) -> Mixture:
    model = Mixture(Categorical(k), Categorical(k, m)).double()
    model.weights = randn(k, seed=11).softmax(-1)
    model.component.probs = randn(k, m, seed=12).softmax(-1)  # pyright: ignore
    return model


def _mixture_cases() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    def classes() -> ModelCase:
        return ModelCase(latent_class(), Batch(torch.randint(0, 4, (40, 1), generator=rng(5))))

    def zeros() -> ModelCase:
        case = classes()
        case.model.component.probs = [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]]  # pyright: ignore
        return case

    def counts() -> ModelCase:
        model = Mixture(Categorical(3).double(), Counts.example()[0])
        model.weights = [0.5, 0.3, 0.2]
        return ModelCase(model, Counts.example()[1])

    yield "Mixture-Categorical", classes
    yield "Mixture-Categorical-zeros", zeros
    yield "Mixture-Counts", counts


# Hidden Markov models: eight sequences of at most five frames, so that all their paths can be listed.
SEQUENCES, FRAMES, STATES = 8, 5, 3
LENGTHS = torch.tensor([5, 1, 3, 5, 2, 4, 5, 1])


def regimes(k: int = STATES) -> Tensor:
    """States that stay for a while, ``[N, T]``: something to find."""
    return (torch.arange(FRAMES) // 2 + torch.arange(SEQUENCES).unsqueeze(-1)) % k


def ragged(x: Tensor, lengths: Tensor = LENGTHS, **fields: Tensor) -> Batch:
    """Sequences of several lengths, padded with copies of their first frames."""
    inside = (torch.arange(x.shape[1]) < lengths.unsqueeze(-1)).unsqueeze(-1)
    fields = {name: torch.where(inside, value, value[:, :1]) for name, value in fields.items()}
    return Batch(torch.where(inside, x, x[:, :1]), lengths=lengths, **fields)


def hmm(emission: Factor, seed: int = 0, **slots: Any) -> HMM:
    """A chain of random probabilities under an emission, which joins it in the type that laws compute with."""
    k = emission.n_components
    assert k is not None
    model = HMM(**{"initial": Categorical(k), "transition": Categorical(k, k), "emission": emission} | slots).double()
    if isinstance(model.initial, Categorical):
        model.initial_probs = randn(k, seed=seed + 20).softmax(-1)
    if isinstance(model.transition, Categorical) and model.transition is not emission:
        model.transition_matrix = (randn(k, k, seed=seed + 21) + torch.eye(k)).softmax(-1)
    return model


def frames(d: int, k: int = STATES, spread: float = 2.0) -> Tensor:
    return spread * randn(k, d, seed=31)[regimes(k)] + randn(SEQUENCES, FRAMES, d, seed=32)


def counts() -> Tensor:
    return torch.poisson(1.0 + 3 * regimes().double().unsqueeze(-1).expand(-1, -1, 2), generator=rng(33))


def classes(m: int) -> Tensor:
    return (regimes().unsqueeze(-1) + torch.randint(0, 2, (SEQUENCES, FRAMES, 1), generator=rng(34))) % m


def design(columns: int = 2) -> Tensor:
    """Covariates of which the first is one."""
    return torch.cat([torch.ones(SEQUENCES, FRAMES, 1), randn(SEQUENCES, FRAMES, columns - 1, seed=35)], -1).double()


def _emissions() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Each family of torchem behind a chain."""

    def bernoulli() -> ModelCase:
        factor = factors.Bernoulli(STATES, 2)
        factor.probs = 0.2 + 0.6 * rand(STATES, 2, seed=36)
        return ModelCase(hmm(factor), ragged((counts() > 3).double()))

    def categorical() -> ModelCase:
        factor = Categorical(STATES, 4)
        factor.probs = randn(STATES, 4, seed=37).softmax(-1)
        return ModelCase(hmm(factor), ragged(classes(4)))

    def categoricals() -> ModelCase:
        factor = factors.Categoricals(STATES, [2, 4])
        factor.tables = [randn(STATES, m, seed=53 + m).softmax(-1) for m in factor.sizes]
        return ModelCase(hmm(factor), ragged(torch.cat([(counts()[..., :1] > 3).double(), classes(4)], -1)))

    def angles() -> ModelCase:
        """Turning angles beside lengths of steps and headings."""
        turns, steps = factors.VonMises(STATES, 1), factors.Exponential(STATES, 1)
        headings = factors.VonMisesFisher(STATES, 2)
        headings.directions = torch.nn.functional.normalize(randn(STATES, 2, seed=62), dim=-1)
        headings.concentrations = 1 + 5 * rand(STATES, seed=63)
        turns.means, turns.concentrations = 2 * randn(STATES, 1, seed=54), 1 + 5 * rand(STATES, 1, seed=55)
        steps.rates = 0.5 + rand(STATES, 1, seed=51)
        angle = frames(1).clamp(-3, 3)
        x = torch.cat([angle, rand(SEQUENCES, FRAMES, 1, seed=52), (2 * angle).cos(), (2 * angle).sin()], -1)
        return ModelCase(hmm(factors.Product([turns, steps, headings])), ragged(x))

    def low_rank() -> ModelCase:
        factor = factors.LowRankGaussian(STATES, 3, 1)
        factor.means, factor.loadings = 2 * randn(STATES, 3, seed=64), randn(STATES, 3, 1, seed=65)
        factor.noise_variances = 0.5 + rand(STATES, 3, seed=66)
        return ModelCase(hmm(factor), ragged(frames(3)))

    def poisson() -> ModelCase:
        factor = factors.Poisson(STATES, 2)
        factor.rates = 1 + 6 * rand(STATES, 2, seed=38)
        return ModelCase(hmm(factor), ragged(counts()))

    def product() -> ModelCase:
        parts = [gaussian(STATES, 1, "full"), poisson().model.emission, categorical().model.emission]
        x = torch.cat([frames(1), counts(), classes(4)], -1)
        return ModelCase(hmm(factors.Product(parts)), ragged(x))  # pyright: ignore

    def stacked() -> ModelCase:
        """Two states with outliers and one of noise, beside a column of waiting times."""
        t = factors.StudentT(STATES - 1, 2)
        t.means, t.dof = 2 * randn(STATES - 1, 2, seed=50), [3.0, 6.0]
        noisy = factors.Stacked([t, factors.Uniform(1, 2, -20.0, 20.0)])
        times = factors.Exponential(STATES, 1)
        times.rates = 0.5 + rand(STATES, 1, seed=51)
        x = torch.cat([frames(2), rand(SEQUENCES, FRAMES, 1, seed=52)], -1)
        return ModelCase(hmm(factors.Product([noisy, times])), ragged(x))

    def tallies() -> ModelCase:
        """Counts of every kind, and one column that is sometimes not recorded."""
        votes, spread = factors.Multinomial(STATES, 2, trials=6), factors.NegativeBinomial(STATES, 1)
        votes.probs = randn(STATES, 2, seed=53).softmax(-1)
        spread.means, spread.dispersions = 1 + 6 * rand(STATES, 1, seed=54), 0.2 + rand(STATES, 1, seed=55)
        rare, some = factors.ZeroInflated(spread), factors.Poisson(STATES, 1)
        rare.zero_probs, some.rates = 0.1 + 0.6 * rand(STATES, 1, seed=56), 1 + 4 * rand(STATES, 1, seed=57)
        x = torch.cat([counts(), (counts()[..., :1] - 2).clamp(min=0), counts()[..., :1] + 1], -1)
        return ModelCase(hmm(factors.Product([votes, rare, factors.Truncated(some, low=1)])), ragged(x))

    def positive() -> ModelCase:
        sizes, times = factors.Gamma(STATES, 1), factors.Exponential(STATES, 1)
        sizes.shapes, sizes.rates = 0.5 + 3 * rand(STATES, 1, seed=58), 0.5 + rand(STATES, 1, seed=59)
        times.rates = 0.3 + rand(STATES, 1, seed=60)
        x = 0.1 + 2 * rand(SEQUENCES, FRAMES, 2, seed=61) * (1.0 + regimes().unsqueeze(-1))
        return ModelCase(hmm(factors.Product([sizes, factors.Censored(times, high=2.5)])), ragged(x))

    def parts() -> ModelCase:
        table = Categorical(STATES, 2)
        table.probs = randn(STATES, 2, seed=39).softmax(-1)
        return ModelCase(hmm(factors.Mixture(table, gaussian(2 * STATES, 2, "tied"))), ragged(frames(2)))

    def regression() -> ModelCase:
        factor = factors.LinearGaussian(STATES, 2, 1, "tied")
        factor.weight = randn(STATES, 1, 2, seed=40)
        return ModelCase(hmm(factor), ragged(frames(1), u=design()))

    def generalized(kind: Any, x: Tensor) -> ModelCase:
        factor = kind(STATES, 2, 2)
        factor.weight = 0.5 * randn(STATES, 2, 2, seed=53) + 0.5
        return ModelCase(hmm(factor), ragged(x, u=design()))

    def counted() -> ModelCase:
        x, offset = counts(), 0.2 * randn(SEQUENCES, FRAMES, seed=54)
        x[0, 1, 0] = x[3, :2] = torch.nan
        inside = torch.arange(FRAMES) < LENGTHS.unsqueeze(-1)
        case = generalized(factors.PoissonRegression, x)
        return replace(case, batch=replace(case.batch, offset=torch.where(inside, offset, offset[:, :1])))

    def successes() -> ModelCase:
        case = generalized(factors.BinomialRegression, counts().clamp(max=6))
        return replace(case, batch=replace(case.batch, trials=torch.full((SEQUENCES, FRAMES), 6.0)))

    def autoregressive() -> ModelCase:
        factor = factors.Autoregressive.gaussian(STATES, 2, 1, "diag")
        factor.weight = 0.4 * randn(STATES, 2, 3, seed=41)
        return ModelCase(hmm(factor), ragged(frames(2)))

    def adjusted(order: int = 1, switching: bool = False) -> ModelCase:
        factor = factors.MeanAdjustedAutoregression(2, order, switching)
        factor.means, factor.coefficients = [-1.0, 1.5], 0.4 * randn(order, seed=42)
        # Frames that are given tell nothing: there must be more of them.
        return ModelCase(hmm(factor), ragged(torch.cat([frames(1, 2), frames(1, 2).flip(0)[:, :3]], 1), LENGTHS + 3))

    for kind in COVARIANCE_TYPES:
        yield f"HMM-Gaussian-{kind}", lambda kind=kind: ModelCase(hmm(gaussian(STATES, 2, kind)), ragged(frames(2)))
    yield "HMM-Bernoulli", bernoulli
    yield "HMM-Categorical", categorical
    yield "HMM-Categoricals", categoricals
    yield "HMM-VonMises", angles
    yield "HMM-LowRankGaussian", low_rank
    yield "HMM-Poisson", poisson
    yield "HMM-Product", product
    yield "HMM-Counts", lambda: ModelCase(hmm(Counts.example()[0]), ragged(counts()))
    yield "HMM-Counts-Product", tallies
    yield "HMM-Positive", positive
    yield "HMM-Mixture", parts
    yield "HMM-Stacked", stacked
    yield "HMM-LinearGaussian", regression
    yield "HMM-PoissonRegression", counted
    yield "HMM-BinomialRegression", successes
    yield "HMM-Autoregressive", autoregressive
    yield "HMM-MeanAdjustedAutoregression", adjusted
    yield "HMM-MeanAdjustedAutoregression-order2", lambda: adjusted(2, True)


def _chains() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Every structure that a chain may have."""

    def plain(kind: str = "diag", **slots: Any) -> ModelCase:
        return ModelCase(hmm(gaussian(STATES, 2, kind), **slots), ragged(frames(2)))

    def weighted() -> ModelCase:
        weight = 2 * rand(SEQUENCES, seed=43)
        weight[::3] = 0
        case = plain("full")
        return replace(case, batch=replace(case.batch, weight=weight))

    def known() -> Tensor:
        """Labels, sets of states and soft evidence, all of them possible."""
        value = torch.zeros(SEQUENCES, FRAMES, STATES, dtype=torch.float64)
        value[0, 2] = torch.tensor([-torch.inf, 0, -torch.inf])
        value[3, :, 2] = -torch.inf
        value[4:6] = randn(2, FRAMES, STATES, seed=44)
        value[6, 0, 0] = -torch.inf
        return value

    def labelled() -> ModelCase:
        case = plain()
        return replace(case, batch=replace(case.batch, evidence=known()))

    def left_right() -> ModelCase:
        case = plain()
        case.model.restrict(masks.left_right(STATES, jump=1))  # pyright: ignore
        case.model.initial_probs = [0.7, 0.3, 0.0]  # pyright: ignore
        return case

    def cyclic() -> ModelCase:
        case = plain()
        case.model.restrict(masks.cyclic(STATES))  # pyright: ignore
        case.model.transition.prior = priors.Dirichlet(2.0)  # pyright: ignore
        case.model.initial.prior = priors.Dirichlet([1.0, 3.0, 1.5])  # pyright: ignore
        return case

    def sticky() -> ModelCase:
        case = plain("spherical")
        case.model.transition.prior = priors.StickyDirichlet(4.0, 1.5)  # pyright: ignore
        return case

    def stationary(zeros: bool = False) -> ModelCase:
        case = plain(initial="stationary")
        if zeros:
            case.model.restrict(masks.cyclic(STATES))  # pyright: ignore
            case.model.transition.prior = priors.Dirichlet(1.5)  # pyright: ignore
        return case

    def ending() -> ModelCase:
        case = labelled()
        case.model.end = Categorical(STATES, 2).double()  # pyright: ignore
        case.model.end_probs = [0.1, 0.5, 0.3]  # pyright: ignore
        return case

    def inputs(first: bool = False) -> ModelCase:
        gate = factors.SoftmaxRegression(STATES, 2, n_parents=STATES)
        gate.weight = randn(STATES, STATES, 2, seed=45)
        slots: dict[str, Any] = {"transition": gate}
        if first:
            slots["initial"] = factors.SoftmaxRegression(STATES, 2)
            slots["initial"].weight = randn(STATES, 2, seed=46)
        case = plain(**slots)
        return replace(case, batch=ragged(case.batch.x, u=design()))

    def tree() -> ModelCase:
        """A first state that is chosen at two forks."""
        gates = [factors.SoftmaxRegression(2, 2, columns=columns) for columns in ((0, 1), (1, 0))]
        for seed, gate in enumerate(gates):
            gate.weight = randn(2, 2, seed=55 + seed)
        case = plain("full", initial=factors.TreeGate(gates[0], [None, gates[1]]))
        return replace(case, batch=ragged(case.batch.x, u=design()))

    def impossible_steps() -> ModelCase:
        case = inputs()
        case.model.transition.support = masks.left_right(STATES)  # pyright: ignore
        return case

    def frozen() -> ModelCase:
        case = plain("full")
        case.model.transition.freeze("probs", mask=torch.eye(STATES, dtype=torch.bool))  # pyright: ignore
        case.model.emission.freeze("means", mask=torch.tensor([True, False, False]))  # pyright: ignore
        case.model.initial.freeze()  # pyright: ignore
        return case

    def missing(entries: bool = False) -> ModelCase:
        case = plain("full")
        x = case.batch.x.clone()
        x[0, 0] = x[2, 1:] = x[4] = torch.nan
        if entries:
            x[5, :3, 0] = x[6, 2, 1] = torch.nan
        return replace(case, batch=case.batch.with_x(x))

    def shared() -> ModelCase:
        table = Categorical(STATES, STATES)
        table.probs = (randn(STATES, STATES, seed=47) + torch.eye(STATES)).softmax(-1)
        return ModelCase(hmm(table, transition=table), ragged(classes(STATES)))

    def remembering() -> ModelCase:
        """Everything that acts on states where states are those of two frames."""
        factor = factors.MeanAdjustedAutoregression(2, 1)
        factor.means, factor.coefficients = [-1.0, 1.5], [0.4]
        case = ModelCase(hmm(factor, initial="stationary", end=Categorical(2, 2)), ragged(frames(1, 2)))
        case.model.end_probs = [0.2, 0.4]  # pyright: ignore
        case.model.transition.prior = priors.StickyDirichlet(2.0)  # pyright: ignore
        weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0, 1.0, 0.0], dtype=torch.float64)
        evidence = known()[..., :2].nan_to_num(neginf=-2.0)
        return replace(case, batch=replace(case.batch, weight=weight, evidence=evidence))

    def single(k: int, n: int, t: int) -> ModelCase:
        x = blobs(n * t, 2, max(k, 2)).view(n, t, 2)
        return ModelCase(hmm(gaussian(k, 2, "diag")), Batch(x))

    def convenient() -> ModelCase:
        model = GaussianHMM(STATES, 2, "tied").double()
        model.means, model.transition_matrix = 2 * randn(STATES, 2, seed=48), randn(3, 3, seed=49).softmax(-1)
        return ModelCase(model, Batch(frames(2)))

    yield "HMM-weights", weighted
    yield "HMM-labels", labelled
    yield "HMM-left-right", left_right
    yield "HMM-cyclic-dirichlet", cyclic
    yield "HMM-sticky", sticky
    yield "HMM-stationary", stationary
    yield "HMM-stationary-cyclic-dirichlet", lambda: stationary(zeros=True)
    yield "HMM-ends", ending
    yield "HMM-inputs", inputs
    yield "HMM-inputs-first", lambda: inputs(first=True)
    yield "HMM-inputs-tree", tree
    yield "HMM-inputs-support", impossible_steps
    yield "HMM-frozen", frozen
    yield "HMM-missing", missing
    yield "HMM-missing-entries", lambda: missing(entries=True)
    yield "HMM-shared", shared
    yield "HMM-memory", remembering
    yield "HMM-GaussianHMM", convenient
    yield "HMM-K1", lambda: single(1, 6, 4)
    yield "HMM-T1", lambda: single(3, 20, 1)
    yield "HMM-N1", lambda: single(2, 1, 9)


def _nested_cases() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Mixtures whose components are models."""

    def spread(model: Mixture) -> Mixture:
        for i, value in enumerate(model.component.parameters()):
            value.data = value.data + 0.4 * randn(*value.shape, seed=70 + i)
        model.weights = randn(model.n_components, seed=69).softmax(-1)
        return model

    def chains() -> ModelCase:
        model = spread(Mixture(Categorical(2), hmm(gaussian(STATES, 2, "diag"))).double())
        evidence = torch.zeros(SEQUENCES, FRAMES, 2, dtype=torch.float64)
        evidence[0, 0, 1], evidence[3:5] = -torch.inf, randn(2, FRAMES, 2, seed=71)
        weight = 2 * rand(SEQUENCES, seed=72)
        weight[::3] = 0
        inside = (torch.arange(FRAMES) < LENGTHS.unsqueeze(-1)).unsqueeze(-1)
        batch = ragged(frames(2))
        return ModelCase(model, replace(batch, evidence=torch.where(inside, evidence, 0.0), weight=weight))

    def several() -> ModelCase:
        """Chains that emit alike, and a chain that stays where it is."""
        table = Categorical(STATES, 4)
        table.probs, table.prior = randn(STATES, 4, seed=73).softmax(-1), priors.Dirichlet(1.5)
        still = hmm(table, 1)
        still.restrict(torch.eye(STATES))
        models = [hmm(table), still, hmm(Categorical(2, 4))]
        return ModelCase(Mixture(Categorical(3), models).double(), ragged(classes(4)))

    def mixtures() -> ModelCase:
        model = spread(Mixture(Categorical(2), mixture(2, 2, "tied")).double())
        return ModelCase(model, Batch(blobs(50, 2, 3)))

    yield "Mixture-HMMs", chains
    yield "Mixture-several", several
    yield "Mixture-mixtures", mixtures


def hsmm(duration: Factor, emission: Factor, seed: int = 0, **more: Any) -> HSMM:
    """Segments of random probabilities under laws of durations and emissions."""
    k = emission.n_components
    assert k is not None
    model = HSMM(Categorical(k), Categorical(k, k), duration, emission, **more).double()
    model.initial_probs = randn(k, seed=seed + 70).softmax(-1)
    apart = randn(k, k, seed=seed + 71).masked_fill(torch.eye(k, dtype=torch.bool), -torch.inf)
    model.transition_matrix = apart.softmax(-1)
    return model


def _segments() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Hidden semi-Markov models: tables of durations with zeros, and both families; censored and complete ends."""

    def table() -> ModelCase:
        durations = Categorical(STATES, 3)
        durations.probs = [[0.5, 0.3, 0.2], [0.0, 0.6, 0.4], [0.2, 0.2, 0.6]]
        weight = 2 * rand(SEQUENCES, seed=72)
        weight[::3] = 0
        evidence = torch.zeros(SEQUENCES, FRAMES, STATES, dtype=torch.float64)
        evidence[0, 2, 1] = evidence[5, 0, 0] = -torch.inf
        evidence[4:6] += randn(2, FRAMES, STATES, seed=73)
        batch = ragged(frames(2))
        x = batch.x.clone()
        x[2, 1] = x[0, 3, 0] = torch.nan
        model = hsmm(durations, gaussian(STATES, 2, "diag"))
        return ModelCase(model, replace(batch.with_x(x), weight=weight, evidence=evidence))

    def poisson() -> ModelCase:
        """States that may last longer than any sequence."""
        model = GaussianHSMM(STATES, 2, 7, "poisson", "full").double()
        model.duration.rates = [0.5, 1.0, 2.5]  # pyright: ignore
        model.means, model.transition.prior = 2 * randn(STATES, 2, seed=74), priors.Dirichlet(1.5)
        return ModelCase(model, ragged(frames(2)))

    def spread() -> ModelCase:
        durations = factors.NegativeBinomialDuration(2, 6)
        durations.means, durations.dispersions = [0.7, 2.0], [0.5, 1.5]
        return ModelCase(hsmm(durations, gaussian(2, 1, "diag"), censored=False), ragged(frames(1, 2)))

    yield "HSMM-table", table
    yield "HSMM-poisson", poisson
    yield "HSMM-negative-binomial", spread


def _networks() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Two hidden nodes, tied tables, zeros, a prior, a frozen table, weights, labels and gaps at once."""

    def everything() -> ModelCase:
        tied = Categorical(2, 3)
        net = BayesianNetwork(
            {"G": 2, "H": 2, "A": 3, "B": 3, "C": 2, "D": 2},
            [("G", "A"), ("H", "B"), ("G", "H"), ("A", "C"), ("B", "C"), ("H", "D")],
            hidden=("G", "H"), conditionals={"A": tied, "B": tied},
        ).double()  # fmt: skip
        for seed, name in enumerate("GHAD"):
            net.tables[name] = randn(*net.tables[name].shape, seed=70 + seed).softmax(-1)
        c = randn(3, 3, 2, seed=75).softmax(-1)
        c[0, 1] = torch.tensor([0.0, 1.0])
        net.tables["C"] = c
        net.conditionals["D"].freeze()
        net.conditionals["H"].prior = priors.Dirichlet(2.0)
        x = net.sample(40, generator=rng(76)).double()
        holes = rand(40, 4, seed=77) < 0.2
        evidence = torch.zeros(40, 4, dtype=torch.float64)
        evidence[:8, 0] = evidence[4:12, 3] = -torch.inf
        evidence[12:20] = randn(8, 4, seed=78)
        weight = 2 * rand(40, seed=79)
        weight[::6] = 0.0
        return ModelCase(net, Batch(x.masked_fill(holes, torch.nan), weight=weight, evidence=evidence))

    yield "BayesianNetwork-everything", everything


#: Models whose bound is not the log-likelihood, or whose latents are continuous: not all laws are theirs, and those
#: that are stand in tests/models.
APPROXIMATE: set[type] = {AmortizedModel, FactorialHMM, LinearGaussianStateSpace, SwitchingLinearDynamics}


def _model_examples() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Models that offer examples themselves, as factors do."""
    for name in torchem.models.__all__:
        kind = getattr(torchem.models, name)
        if kind in APPROXIMATE:
            continue
        offer = getattr(kind, "examples", None) or (lambda kind=kind: [kind.example()])
        if hasattr(kind, "examples") or hasattr(kind, "example"):
            for i in range(len(offer())):
                yield f"{name}-example{i or ''}", lambda offer=offer, i=i: ModelCase(*offer()[i])


MODEL_CASES = dict(
    [
        *_model_examples(), *_gmm_cases(), *_mixture_cases(), *_nested_cases(), *_emissions(), *_chains(), *_segments(),
        *_networks(),
    ]
)  # fmt: skip


def every_model(*, only: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    chosen = [pytest.param(build, id=name) for name, build in MODEL_CASES.items() if only(name)]
    return pytest.mark.parametrize("build", chosen)


def posterior(model: LatentModel, data: Any) -> Tensor:
    """The posterior as numbers: probabilities of states, or the moments of a normal law."""
    found = model.posterior(data)
    if isinstance(found, Tensor):
        return found
    return torch.cat([found.mean, found.covariance_matrix.flatten(-2)], -1)


# ---- comparisons --------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False, check_device=False, equal_nan=False)


def _size(*leaves: Tensor) -> float:
    finite = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
    finite = finite[finite.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def close_stats(a: torchem.Stats, b: torchem.Stats, rtol: float = 1e-9) -> None:
    """Leaf by leaf, to within the size of the largest entry of the leaf."""
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        if isinstance(leaf, torchem.Stats):
            close_stats(leaf, b[name], rtol)
            continue
        # Entropy is the difference of the likelihood and Q: it is as exact as these are.
        size = _size(leaf, b[name], *([1 + a["log_likelihood"].abs()] if name == "entropy" else []))
        torch.testing.assert_close(leaf, b[name], rtol=rtol, atol=rtol * size, msg=lambda m, n=name: f"{n}: {m}")


def close_dict(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-9) -> None:
    close_stats(torchem.Stats(a), torchem.Stats(b), rtol)


def assign(module: torch.nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        module.get_parameter(name).data = value.detach().clone()


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(module: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} was assigned"
