"""The cases that laws run on: each factor's and model's own examples, and hard ones generated from them.

A class joins by existing: `torchem.factors.__all__` and `torchem.models.__all__` are read here. A class may offer
several examples through a classmethod ``examples()``; without it ``example()`` is the only one.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.families import Counts
from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors import Categorical, Gaussian
from torchem.model import LatentModel
from torchem.models import GaussianMixture, Mixture

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


def concrete_factors() -> list[type]:
    """Every factor that torchem exports and that can be built, and the tests' own."""
    names = (getattr(torchem.factors, name) for name in torchem.factors.__all__)
    found = [c for c in names if inspect.isclass(c) and issubclass(c, Factor) and not inspect.isabstract(c)]
    return [*found, Counts]


def _example_cases() -> Iterator[tuple[str, Callable[[], FactorCase]]]:
    """Each example as it is, on one row, with empty rows and components, and with hard expectations."""
    for kind in concrete_factors():
        for i, (factor, _) in enumerate(_offered(kind)):
            k = factor.n_components
            if k is None:
                continue

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


def _model_examples() -> Iterator[tuple[str, Callable[[], ModelCase]]]:
    """Models that offer examples themselves, as factors do."""
    for name in torchem.models.__all__:
        kind = getattr(torchem.models, name)
        offer = getattr(kind, "examples", None) or (lambda kind=kind: [kind.example()])
        if hasattr(kind, "examples") or hasattr(kind, "example"):
            for i in range(len(offer())):
                yield f"{name}-example{i or ''}", lambda offer=offer, i=i: ModelCase(*offer()[i])


MODEL_CASES = dict([*_model_examples(), *_gmm_cases(), *_mixture_cases()])


def every_model(*, only: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    chosen = [pytest.param(build, id=name) for name, build in MODEL_CASES.items() if only(name)]
    return pytest.mark.parametrize("build", chosen)


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
