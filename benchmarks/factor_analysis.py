"""Factor analysis beside scikit-learn's, to the same likelihood."""

import argparse
import statistics
from importlib.util import find_spec
from typing import Any

import torch

import torchem
from benchmarks.measure import PeakMemory, clock, spread

#: How far below the likelihood that scikit-learn stops at ours may be, in nats per row.
_SLACK = 1e-6


def columns(n: int, d: int, q: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    noise = 0.3 + torch.rand(d, generator=generator, dtype=torch.float64)
    return randn(n, q) @ randn(q, d) + randn(n, d) * noise


def factor_analysis(options: argparse.Namespace, sizes: Any = None) -> list[dict]:
    """A whole fit, until the likelihood is that at which scikit-learn's fit with its defaults ends."""
    if find_spec("sklearn") is None:
        print("factor analysis: scikit-learn is not installed, nothing to compare with", flush=True)
        return []
    from sklearn import decomposition

    n, d, q = sizes or (10_000 if options.quick else 100_000, 64, 8)
    x = columns(n, d, q)
    rows = []
    for method in ("randomized", "lapack"):
        peer = decomposition.FactorAnalysis(q, svd_method=method, random_state=0).fit(x.numpy())
        goal = float(peer.score(x.numpy()))
        iterations = _enough(x, q, goal)

        def ours(iterations: int = iterations) -> torchem.FactorAnalysis:
            model = torchem.FactorAnalysis(d, q).double()
            torchem.fit(model, x, max_iter=iterations, tol=0.0, seed=0, progress=False)
            return model

        def theirs(method: str = method) -> Any:
            return decomposition.FactorAnalysis(q, svd_method=method, random_state=0).fit(x.numpy())

        times: dict[str, list[float]] = {"scikit-learn": [], "torchem": []}
        for _ in range(options.rounds):
            times["torchem"].append(clock(ours, "cpu"))
            times["scikit-learn"].append(clock(theirs, "cpu"))
        with PeakMemory() as peak:
            found = ours()
        reached = float(found.log_prob(x).mean().detach())
        ratios = [a / b for a, b in zip(times["scikit-learn"], times["torchem"], strict=True)]
        print(
            f"factor analysis ({n}, {d}, {q}), scikit-learn {method}: {spread(ratios)} × as fast (goal ≥ 3); "
            f"{statistics.median(times['torchem']):.2f} s for {iterations} iterations and the start, "
            f"{statistics.median(times['scikit-learn']):.2f} s for {peer.n_iter_}; nats a row {reached:.6f} and "
            f"{goal:.6f}; {peak.extra / 1e6:.0f} MB extra",
            flush=True,
        )
        rows.append(
            {
                "method": method, "N": n, "D": d, "q": q, "seconds": times, "ratios": ratios, "goal": 3,
                "iterations": {"torchem": iterations, "scikit-learn": int(peer.n_iter_)},
                "loglik": {"torchem": reached, "scikit-learn": goal}, "extra_bytes": peak.extra,
            }
        )  # fmt: skip
    return rows


def _enough(x: torch.Tensor, q: int, goal: float) -> int:
    """EM iterations after which the likelihood per row is no less than the goal."""
    for iterations in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000):
        model = torchem.FactorAnalysis(x.shape[-1], q).double()
        result = torchem.fit(model, x, max_iter=iterations, tol=0.0, seed=0, progress=False)
        if result.bound / len(x) >= goal - _SLACK:
            return iterations
    raise SystemExit("benchmarks/factor_analysis.py: the likelihood of scikit-learn was not reached")


PARTS = {"factor_analysis": factor_analysis}
