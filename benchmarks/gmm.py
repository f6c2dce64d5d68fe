"""Gaussian mixtures against scikit-learn: large data, memory, and the cost of calls on small data."""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import torchem
from benchmarks.measure import PeakMemory, matrix_rate, per_iteration, spread

SHAPES = [(200_000, 16, 16), (100_000, 64, 16), (200_000, 32, 64)]
GOALS = {("float64", "full"): (4.0, 1.5), ("float64", "diag"): (3.0, 1.3), ("float32", "full"): (3.0, 1.0),
         ("float32", "diag"): (1.8, 1.0)}  # fmt: skip


# ---- the two contestants ------------------------------------------------------------------------------------------


def blobs(n: int, d: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Overlapping clusters, so that responsibilities are soft."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    label = torch.randint(k, (n,), generator=generator)
    return (centers[label] + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


def initial(x: torch.Tensor, k: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and covariances that both sides start from."""
    d = x.shape[1]
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:k]
    variance = float(x.double().var(0).mean())
    shapes = {
        "full": np.tile(np.eye(d), (k, 1, 1)),
        "tied": np.eye(d),
        "diag": np.ones((k, d)),
        "spherical": np.ones(k),
    }
    weights = np.full(k, 1 / k)
    return weights / weights.sum(), x[index].double().numpy(), variance * shapes[kind]


def torchem_fit(x: torch.Tensor, k: int, kind: str, device: str, start: tuple, restarts: int = 1) -> Callable:
    """A function of the iteration count that runs a fit of torchem."""
    weights, means, covariances = start

    def run(iterations: int) -> torchem.Result:
        model = torchem.GaussianMixture(k, x.shape[1], kind).to(device=device, dtype=x.dtype)
        model.weights, model.means, model.covariances = weights, means, covariances
        init = None if restarts == 1 else "random_from_data"
        return torchem.fit(model, x, init=init, restarts=restarts, max_iter=iterations, tol=0, seed=0, progress=False)

    return run


def sklearn_fit(x: np.ndarray, k: int, kind: str, start: tuple) -> Callable:
    """The same for scikit-learn."""
    from sklearn.mixture import GaussianMixture

    weights, means, covariances = (part.astype(x.dtype) for part in start)
    weights = weights / weights.sum()
    precisions = np.linalg.inv(covariances) if kind in ("full", "tied") else 1 / covariances

    def run(iterations: int) -> object:
        model = GaussianMixture(
            k, covariance_type=kind, tol=0, max_iter=iterations, weights_init=weights, means_init=means,
            precisions_init=precisions,
        )  # fmt: skip
        return model.fit(x)

    return run


# ---- the tables ---------------------------------------------------------------------------------------------------


def large(device: str, rounds: int, quick: bool) -> list[dict]:
    """One EM iteration at the shapes of the goals."""
    rows = []
    for dtype in (torch.float64, torch.float32):
        rate = matrix_rate(dtype, device)
        for kind in ("full", "diag", "tied", "spherical"):
            for n, d, k in SHAPES:
                n = n // 10 if quick else n
                x = blobs(n, d, k, dtype)
                start = initial(x, k, kind)
                ours = torchem_fit(x.to(device), k, kind, device, start)
                theirs = sklearn_fit(x.numpy(), k, kind, start)
                ours(1)
                ratios, mine, peer = [], [], []
                for _ in range(rounds):
                    mine.append(per_iteration(ours, 1, 4, device))
                    peer.append(per_iteration(theirs, 1, 3))
                    ratios.append(peer[-1] / mine[-1])
                work = flops(n, d, k, kind)
                rows.append({
                    "dtype": str(dtype).split(".")[1], "covariance_type": kind, "N": n, "D": d, "K": k,
                    "torchem_ms": 1e3 * statistics.median(mine), "sklearn_ms": 1e3 * statistics.median(peer),
                    "ratio": statistics.median(ratios), "ratios": ratios,
                    "matrix_rate_share": work / statistics.median(mine) / rate,
                })  # fmt: skip
                report(rows[-1], ratios)
    return rows


def flops(n: int, d: int, k: int, kind: str) -> float:
    """Operations of the two matrix products that an iteration cannot do without."""
    features = {"full": (d + 1) * (d + 2) / 2, "tied": d + 1, "diag": 2 * d + 1, "spherical": d + 2}[kind]
    shared = 2 * 2 * n * d * d if kind == "tied" else 0
    return 2 * 2 * n * features * k + shared


def report(row: dict, ratios: list[float]) -> None:
    """Print a row of the table."""
    share = f"{100 * row['matrix_rate_share']:5.1f} % of matrix rate" if "matrix_rate_share" in row else ""
    print(
        f"{row['dtype']}  {row['covariance_type']:<9}  N={row['N']:<7} D={row['D']:<3} K={row['K']:<3} "
        f"torchem {row['torchem_ms']:9.2f} ms  scikit-learn {row['sklearn_ms']:9.2f} ms  "
        f"ratio {spread(ratios):<20} " + share,
        flush=True,
    )


def small(rounds: int) -> list[dict]:
    """Old Faithful: what matters here is the cost of a call, not of arithmetic."""
    path = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "faithful.csv"
    x = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))
    rows = []
    for kind in ("full", "tied", "diag", "spherical"):
        for k in range(2, 9):
            start = initial(x, k, kind)
            ours, theirs = torchem_fit(x, k, kind, "cpu", start), sklearn_fit(x.numpy(), k, kind, start)
            ours(2)
            mine, peer, ratios = [], [], []
            for _ in range(2 * rounds + 1):
                mine.append(per_iteration(ours, 20, 320))
                peer.append(per_iteration(theirs, 20, 320))
                ratios.append(peer[-1] / mine[-1])
            rows.append({
                "dtype": "float64", "covariance_type": kind, "N": len(x), "D": 2, "K": k,
                "torchem_ms": 1e3 * statistics.median(mine), "sklearn_ms": 1e3 * statistics.median(peer),
                "ratio": statistics.median(ratios), "ratios": ratios,
            })  # fmt: skip
            report(rows[-1], ratios)
    return rows


def batched(rounds: int) -> list[dict]:
    """Sixteen restarts together against one, per iteration."""
    path = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "faithful.csv"
    x = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))
    rows = []
    for k in (2, 3, 5, 8):
        start = initial(x, k, "full")
        one, many = torchem_fit(x, k, "full", "cpu", start), torchem_fit(x, k, "full", "cpu", start, 16)
        many(2)
        ratios = [per_iteration(many, 10, 60) / per_iteration(one, 10, 60) for _ in range(2 * rounds + 1)]
        rows.append({"K": k, "restarts": 16, "cost_of_one": statistics.median(ratios), "ratios": ratios})
        print(f"16 restarts, faithful, K={k}: {spread(ratios)} × one fit", flush=True)
    return rows


def memory(device: str, quick: bool) -> dict:
    """Peak extra memory of a fit on a million observations."""
    n, d, k = (100_000 if quick else 1_000_000), 32, 64
    x = blobs(n, d, k, torch.float64).to(device)
    run = torchem_fit(x, k, "full", device, initial(x.cpu(), k, "full"))
    if device == "cuda":
        run(1)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run(2)
        extra = torch.cuda.max_memory_allocated() - base
    else:
        torchem_fit(x[:5000], k, "full", device, initial(x[:5000], k, "full"))(1)
        with PeakMemory() as peak:
            run(2)
        extra = peak.extra
    print(f"peak extra memory, N={n} D={d} K={k}, full, float64: {extra / 1e6:.1f} MB", flush=True)
    return {"N": n, "D": d, "K": k, "extra_bytes": extra, "data_bytes": x.numel() * 8}


def summary(rows: list[dict]) -> list[dict]:
    """Geometric means against the goals."""
    out = []
    for (dtype, kind), (goal, least) in GOALS.items():
        ratios = [r["ratio"] for r in rows if (r["dtype"], r["covariance_type"]) == (dtype, kind)]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        out.append({"dtype": dtype, "covariance_type": kind, "geometric_mean": mean, "least": min(ratios),
                    "goal": goal, "goal_least": least})  # fmt: skip
        print(f"{dtype} {kind}: geometric mean {mean:.2f} (goal {goal}), least {min(ratios):.2f} (goal {least})")
    return out


def run(options: argparse.Namespace) -> dict:
    """Gaussian mixtures against scikit-learn."""
    result: dict = {}
    if "large" in options.part:
        rows = large(options.device, options.rounds, options.quick)
        result |= {"large": rows, "summary": summary(rows)}
    if "memory" in options.part:
        result["memory"] = memory(options.device, options.quick)
    if "small" in options.part and options.device == "cpu":
        tiny = small(1 if options.quick else options.rounds)
        for kind in ("full", "tied", "diag", "spherical"):
            ratios = [r["ratio"] for r in tiny if r["covariance_type"] == kind]
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            print(f"faithful, {kind}: geometric mean {mean:.2f}, least {min(ratios):.2f} × scikit-learn's speed")
        result |= {"small": tiny, "restarts": batched(1 if options.quick else options.rounds)}
    return result
