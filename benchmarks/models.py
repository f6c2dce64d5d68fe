"""Models beyond the plain ones: what they cost beside what they are built on."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import torchem
from benchmarks.gmm import blobs, initial
from benchmarks.measure import PeakMemory, per_iteration, spread
from torchem import factors

#: Bytes beside the data that a fit with missing entries may take.
_BUDGET = 256 << 20


def missing(options: argparse.Namespace, sizes: tuple[int, int, int] | None = None, share: float = 0.3) -> list[dict]:
    """An EM iteration of Gaussian mixtures with entries missing at random, beside that on the complete data."""
    n, d, k = sizes or (10_000 if options.quick else 100_000, 16, 8)
    rows = []
    for kind in ("full", "tied", "diag", "spherical"):
        x = blobs(n, d, k, torch.float64)
        start = initial(x[: 10 * k], k, kind)
        holes = torch.rand(n, d, generator=torch.Generator().manual_seed(1)) < share
        gappy = x.masked_fill(holes, torch.nan)
        x, gappy = x.to(options.device), gappy.to(options.device)

        def fit(data: Any, iterations: int, kind: str = kind, start: Any = start) -> None:
            model = torchem.GaussianMixture(k, d, kind).to(data.device, data.dtype)  # pyright: ignore[reportArgumentType]
            model.weights, model.means, model.covariances = start
            torchem.fit(model, data, init=None, max_iter=iterations, tol=0.0, seed=0, progress=False)

        times: dict[str, list[float]] = {"complete": [], "missing": []}
        for _ in range(options.rounds):
            for name, data in (("complete", x), ("missing", gappy)):
                times[name].append(per_iteration(partial(fit, data), 1, 4, options.device))
        with PeakMemory() as peak:
            fit(gappy, 2)
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        patterns = len(holes.unique(dim=0))
        rows.append({"kind": kind, "N": n, "D": d, "K": k, "patterns": patterns, "seconds": times, "ratios": ratios})
        rows[-1]["extra_bytes"] = peak.extra
        goal, mega = " (goal ≤ 30)" if kind == "full" else "", peak.extra / 1e6
        seconds = statistics.median(times["missing"])
        print(
            f"missing, {kind}: {seconds:.3f} s an iteration, {spread(ratios)} × complete{goal}, "
            f"{patterns} patterns, {mega:.0f} MB extra (budget {_BUDGET / 1e6:.0f})",
            flush=True,
        )
    return rows


def _alternating(
    rounds: int, runs: dict[str, Callable[[int], Any]], few: int, many: int, device: str
) -> dict[str, list]:
    """Seconds of an iteration of each contestant, in turn, after one run of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(few)
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(per_iteration(run, few, many, device))
    return times


def _compared(name: str, times: dict[str, list[float]], goal: float, **what: Any) -> dict:
    """A row of figures: the first contestant's time over the second's."""
    first, second = times
    ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
    each = 1e3 * statistics.median(times[first])
    print(f"{name}: {each:.1f} ms an iteration, {spread(ratios)} × {second} (goal ≤ {goal})", flush=True)
    return {"model": name, **what, "seconds": times, "ratio": statistics.median(ratios), "ratios": ratios, "goal": goal}


def _fit(model: Any, x: Any, iterations: int, **data: Any) -> None:
    torchem.fit(model, x, init=None, max_iter=iterations, tol=0.0, seed=0, progress=False, **data)


def counts(options: argparse.Namespace, shapes: list[tuple[int, int, int]] | None = None) -> list[dict]:
    """Mixtures of discrete columns beside the two matrix products that an iteration needs."""
    rows = []
    for n, d, k in shapes or [(100_000, 64, 32), (100_000, 256, 32)]:
        n = n // 10 if options.quick and shapes is None else n
        generator = torch.Generator().manual_seed(0)
        rates = torch.rand(k, d, generator=generator, dtype=torch.float64)
        z = torch.randint(k, (n,), generator=generator)
        data = {
            "Poisson": torch.poisson(8 * rates[z], generator=generator),
            "Bernoulli": torch.bernoulli(rates[z], generator=generator),
            "Categoricals": (torch.rand(n, d, generator=generator, dtype=torch.float64) * 4 * rates[z].sqrt()).floor(),
        }
        for name, x in data.items():
            x = x.to(options.device)
            width = 4 * d if name == "Categoricals" else d
            left = torch.rand(k, width, dtype=torch.float64, device=x.device)
            right = torch.rand(n, width, dtype=torch.float64, device=x.device)

            def model(name: str = name, d: int = d, k: int = k, rates: torch.Tensor = rates) -> Any:
                family: Any = {
                    "Poisson": lambda: factors.Poisson(k, d),
                    "Bernoulli": lambda: factors.Bernoulli(k, d),
                    "Categoricals": lambda: factors.Categoricals(k, [4] * d),
                }[name]()
                if name == "Poisson":
                    family.rates = 1 + 8 * rates
                elif name == "Bernoulli":
                    family.probs = 0.1 + 0.8 * rates
                else:
                    family.tables = [torch.stack([1 + r, 2 - r, 1 + r, 2 - r], -1) / 6 for r in rates.mT]
                return torchem.Mixture(factors.Categorical(k), family).to(options.device, torch.float64)

            def products(count: int, left: torch.Tensor = left, right: torch.Tensor = right) -> None:
                # In pieces that fit the cache, as the model takes them: what the arithmetic alone costs.
                for _ in range(count):
                    total: Any = 0.0
                    for part in right.split(4096):
                        total = total + (left @ part.mT) @ part

            runs = {name: lambda count, x=x, model=model: _fit(model(), x, count), "its products": products}
            times = _alternating(options.rounds, runs, 1, 4, options.device)
            rows.append(_compared(f"{name} mixture, {n} × {d}, K={k}", times, 1.5, N=n, D=d, K=k))
    return rows


def experts(options: argparse.Namespace, sizes: tuple[int, int, int] | None = None) -> list[dict]:
    """A mixture of experts beside the plain mixture of regressions, one softmax gate's work apart."""
    n, m, k = sizes or (10_000 if options.quick else 100_000, 10, 8)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n, m, generator=generator, dtype=torch.float64)
    u[:, 0] = 1.0
    slopes = 2 * torch.randn(k, m, generator=generator, dtype=torch.float64)
    z = torch.randint(k, (n,), generator=generator)
    x = (u * slopes[z]).sum(-1, keepdim=True) + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x, u = x.to(options.device), u.to(options.device)

    def run(iterations: int, gated: bool) -> None:
        gate = factors.SoftmaxRegression(k, m) if gated else factors.Categorical(k)
        model: Any = torchem.Mixture(gate, factors.LinearGaussian(k, m, 1)).to(options.device, torch.float64)
        model.component.weight = 0.8 * slopes.unsqueeze(1)
        _fit(model, x, iterations, inputs=u)

    runs = {"experts": partial(run, gated=True), "the plain mixture of regressions": partial(run, gated=False)}
    times = _alternating(options.rounds, runs, 1, 6, options.device)
    return [_compared(f"mixture of experts, {n} × {m} inputs, K={k}", times, 3.0, N=n, M=m, K=k)]


def student(options: argparse.Namespace, shapes: list[tuple[int, int, int]] | None = None) -> list[dict]:
    """A mixture of t distributions beside the Gaussian one."""
    rows = []
    for n, d, k in shapes or [(100_000, 8, 8), (100_000, 32, 16)]:
        n = n // 10 if options.quick and shapes is None else n
        x = blobs(n, d, k, torch.float64)
        _, means, covariances = initial(x, k, "full")
        x = x.to(options.device)

        def run(
            iterations: int, heavy: bool, x: torch.Tensor = x, means: Any = means, scales: Any = covariances
        ) -> None:
            k, d = means.shape
            family: Any = factors.StudentT(k, d) if heavy else factors.Gaussian(k, d)
            family.means = means
            if heavy:
                family.scales = scales
            else:
                family.covariances = scales
            _fit(torchem.Mixture(factors.Categorical(k), family).to(x.device, x.dtype), x, iterations)

        runs = {"t": partial(run, heavy=True), "Gaussian": partial(run, heavy=False)}
        times = _alternating(options.rounds, runs, 1, 5, options.device)
        rows.append(_compared(f"Student's t mixture, {n} × {d}, K={k}", times, 2.0, N=n, D=d, K=k))
    return rows


#: What `scripts/benchmark.py models --part` may name.
PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "missing": missing, "counts": counts, "experts": experts, "student": student,
}  # fmt: skip


def run(options: argparse.Namespace) -> dict:
    """Every part that was asked for."""
    return {name: PARTS[name](options) for name in options.part}
