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


#: What `scripts/benchmark.py models --part` may name.
PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"missing": missing}


def run(options: argparse.Namespace) -> dict:
    """Every part that was asked for."""
    return {name: PARTS[name](options) for name in options.part}
