"""Data and fits that the regressions share: generated from seeds on the host, then moved to a device."""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor

import torchem
from torchem.errors import ConvergenceWarning

COVARIANCE_TYPES = ("full", "tied", "diag", "spherical")
DTYPES = (torch.float32, torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng(seed), dtype=torch.float64)


def blobs(n: int, d: int, k: int, *, gap: float = 6.0, seed: int = 0) -> Tensor:
    """Unit-variance clusters in turn, float64: row n belongs to cluster n mod k; neighbours lie ``gap`` apart."""
    centers = gap * torch.arange(k, dtype=torch.float64).unsqueeze(-1) * torch.ones(d, dtype=torch.float64)
    centers[:, 1::2] *= -1
    return centers[torch.arange(n) % k] + randn(n, d, seed=seed)


def mixture(
    k: int,
    d: int,
    covariance_type: str = "full",
    dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
    **options: Any,
) -> torchem.GaussianMixture:
    return torchem.GaussianMixture(k, d, covariance_type, **options).to(device, dtype)  # pyright: ignore


def started(
    x: Tensor, k: int, covariance_type: str = "full", dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> torchem.GaussianMixture:
    """A mixture at a deterministic start in the data: means at spread-out rows, the data's variances."""
    model = mixture(k, x.shape[-1], covariance_type, dtype, device)
    x = x.double()
    model.means = x[torch.linspace(0, len(x) - 1, k).long()] + 0.01 * randn(k, x.shape[-1], seed=3) * x.std(0)
    variance = x.var(0)
    model.covariances = {
        "full": variance.diag().expand(k, -1, -1),
        "tied": variance.diag(),
        "diag": variance.expand(k, -1),
        "spherical": variance.mean().expand(k),
    }[covariance_type]
    return model


def fit(model: torchem.LatentModel, data: Any, **options: Any) -> torchem.Result:
    """A seeded, silent fit; where a run ends is the test's business, so its warning is not an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torchem.fit(model, data, **{"seed": 0, "progress": False, **options})


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the run-time check of annotations, which would speak before torchem does and draws random numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def dense(model: torchem.GaussianMixture) -> Tensor:
    """Covariance matrices ``[K, D, D]`` whatever the covariance type, float64 on the host."""
    value = model.covariances.detach().double().cpu()
    k, d = model.n_components, model.n_features
    if model.covariance_type == "full":
        return value
    if model.covariance_type == "tied":
        return value.expand(k, d, d)
    return torch.diag_embed(value if value.dim() == 2 else value.unsqueeze(-1).expand(k, d))


def by_mean(model: torchem.GaussianMixture) -> Tensor:
    """Order of the components along their means, so that two solutions can be compared."""
    return model.means.detach().double().cpu().sum(-1).argsort()


def healthy(model: torchem.GaussianMixture) -> None:
    """Finite parameters, weights that sum to one, positive definite covariances."""
    for name, value in model.state_dict().items():
        assert bool(value.isfinite().all()), f"{name} is not finite"
    assert abs(float(model.weights.detach().double().sum()) - 1) < (1e-12 if model.dtype == torch.float64 else 1e-5)
    covariances = dense(model)
    scale = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    # Of correlations: eigenvalues of columns in very different units would be lost to rounding.
    eigenvalues = torch.linalg.eigvalsh(covariances / (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    assert bool((eigenvalues > 0).all()), f"smallest eigenvalue {float(eigenvalues.min()):.3g}"


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().cpu() for name, value in model.named_parameters()}


def gap(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """Largest difference of two models' parameters, relative to the size of each tensor."""
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    return max(
        float((value - second[name]).abs().max()) / max(1.0, float(value.abs().max())) for name, value in first.items()
    )


def largest_fall(history: Iterable[float]) -> float:
    """The largest fall of an objective between neighbours, relative to its size; 0 if it never falls."""
    values = list(history)
    falls = [(a - b) / max(abs(a), 1e-300) for a, b in itertools.pairwise(values)]
    assert all(map(math.isfinite, values))
    return max([0.0, *falls])


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same state, bit for bit."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
