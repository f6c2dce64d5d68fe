"""The ways to run EM against each other: what they reach, in how many passes, in which time and memory."""

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import torchem
from benchmarks.gmm import blobs, initial
from benchmarks.measure import PeakMemory, clock, per_iteration, spread
from torchem import priors
from torchem.factors import Categorical, Poisson


def mixture(start: tuple, x: Tensor, kind: str = "full") -> torchem.GaussianMixture:
    """A mixture at weights, means and covariances."""
    weights, means, covariances = start
    model = torchem.GaussianMixture(len(weights), x.shape[1], kind).to(x.device, x.dtype)  # pyright: ignore[reportArgumentType]
    model.weights, model.means, model.covariances = weights, means, covariances
    return model


def seeded(x: Tensor, k: int, seed: int, kind: str = "full") -> tuple:
    """Random data points and the data's variance, other ones for each seed."""
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 10 * k]
    return initial(x[index], k, kind)


def fit(model: Any, x: Any, **options: Any) -> torchem.Result:
    return torchem.fit(model, x, **{"init": None, "tol": 0.0, "seed": 0, "progress": False} | options)


@torch.no_grad()
def score(model: Any, x: Tensor) -> float:
    """Held-out log-likelihood per observation."""
    return float(model.log_prob(x).mean(dtype=torch.float64))


# ---- time and memory ----------------------------------------------------------------------------------------------


def online(options: argparse.Namespace, sizes: tuple[int, int, int] | None = None, starts: int = 10) -> dict:
    """One pass of stochastic EM against thirty full-batch iterations from the same start."""
    n, d, k = sizes or (200_000 if options.quick else 2_000_000, 16, 32)
    device, held = options.device, min(100_000, n // 10)
    data = blobs(n + held, d, k, torch.float32)
    x, new = data[:n].to(device), data[n:].to(device)
    # Steps gather what is learnt, and noise with it: of 500 to 5000 rows a batch 2000 are best in most starts, and 5000
    # cost half as many M-steps.
    batch = max(1, n // 400)
    rows = []
    for seed in range(starts):
        start = seeded(x, k, seed)
        full, streamed, fitted = (mixture(start, x) for _ in range(3))
        # The mean over the second half of the steps takes the noise away.
        rules = [torchem.Stochastic(exponent=0.6, average=n // batch // 2) for _ in range(2)]

        def stream(model: Any = streamed, rule: Any = rules[0]) -> None:
            for part in x.split(batch):
                torchem.partial_fit(model, part, rule)
            model.m_step(rule.flush())

        times = {
            "full": clock(lambda model=full: fit(model, x, max_iter=30), device),
            "stream": clock(stream, device),
            # This one measures its bound in a pass of its own.
            "fit": clock(
                lambda model=fitted, rule=rules[1]: fit(model, x, max_iter=1, batch_size=batch, accumulate=rule),
                device,
            ),
        }
        scores = {"full": score(full, new), "stream": score(streamed, new), "fit": score(fitted, new)}
        rows.append({"seed": seed, "seconds": times, "held_out": scores})
        print(
            f"online, start {seed}: held-out {scores['stream'] - scores['full']:+.4f} nats of full batch, "
            f"{times['stream'] / times['full']:.3f} of its time",
            flush=True,
        )
    result: dict = {"N": n, "D": d, "K": k, "batch_size": batch, "starts": rows}
    for name in ("stream", "fit"):
        gaps = [row["held_out"][name] - row["held_out"]["full"] for row in rows]
        ratios = [row["seconds"][name] / row["seconds"]["full"] for row in rows]
        result[name] = {"gap": statistics.median(gaps), "ratio": statistics.median(ratios), "ratios": ratios}
        print(
            f"online, {name}: median gap {statistics.median(gaps):+.4f} nats (goal ≥ −0.01), "
            f"time {spread(ratios)} of 30 full iterations (goal ≤ 0.1)"
        )
    return result


def file(options: argparse.Namespace, sizes: tuple[int, ...] | None = None) -> list[dict]:
    """Peak of extra memory in fits that read a mapped file, ever longer; pages of the file do not count."""
    rows, d, k = [], 16, 8
    sizes = sizes or ((50_000, 200_000, 800_000) if options.quick else (500_000, 2_000_000, 8_000_000))
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            path = Path(folder) / f"{n}.npy"
            table = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
            for begin in range(0, n, 50_000):
                part = table[begin : begin + 50_000]
                part[:] = blobs(len(part), d, k, torch.float32, seed=begin).numpy()
            del table, part
            for name, rule in (("full batch", torchem.FullBatch), ("stochastic", torchem.Stochastic)):
                run = partial(
                    torchem.fit, data=path, max_iter=1, tol=0.0, seed=0, progress=False,
                    batch_size=None if name == "full batch" else 10_000,
                )  # fmt: skip
                if n == sizes[0]:
                    run(torchem.GaussianMixture(k, d), accumulate=rule())
                with PeakMemory(mapped=False) as peak:
                    run(torchem.GaussianMixture(k, d), accumulate=rule())
                rows.append({"mode": name, "N": n, "extra_bytes": peak.extra, "file_bytes": n * d * 4})
                print(f"mapped file, N={n}, {name}: {peak.extra / 1e6:.0f} MB beside {n * d * 4 / 1e6:.0f}", flush=True)
            path.unlink()
    return rows


def faithful() -> Tensor:
    path = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "faithful.csv"
    return torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))


def restarts(options: argparse.Namespace, count: int = 64, n: int | None = None) -> list[dict]:
    """As many restarts in one fit as fits one by one, from starts of their own."""
    many = blobs(n or (1_000 if options.quick else 10_000), 8, 8, torch.float64)
    rows = []
    for name, x, k, goal in (("faithful", faithful(), 2, 0.1), ("10k × 8", many, 8, 0.7)):
        x = x.to(options.device)
        common: dict[str, Any] = {"init": "random_from_data", "max_iter": 30}

        def together(x: Tensor = x, k: int = k, common: dict[str, Any] = common) -> None:
            fit(torchem.GaussianMixture(k, x.shape[1]).to(x.device, x.dtype), x, restarts=count, **common)

        def apart(x: Tensor = x, k: int = k, common: dict[str, Any] = common) -> None:
            for seed in range(count):
                fit(torchem.GaussianMixture(k, x.shape[1]).to(x.device, x.dtype), x, **common | {"seed": seed})

        together()
        rounds = max(1, options.rounds)
        batch, single = [], []
        for _ in range(rounds):
            batch.append(clock(together, options.device))
            single.append(clock(apart, options.device))
        ratios = [a / b for a, b in zip(batch, single, strict=True)]
        rows.append({
            "data": name, "N": len(x), "K": k, "restarts": count, "ratio": statistics.median(ratios), "ratios": ratios,
            "seconds": statistics.median(batch), "goal": goal if options.device == "cpu" else 0.1,
        })  # fmt: skip
        print(f"{count} restarts, {name}: {spread(ratios)} of {count} runs one by one (goal ≤ {rows[-1]['goal']})")
    return rows


def variational(options: argparse.Namespace, shapes: list[tuple[int, int, int]] | None = None) -> list[dict]:
    """An iteration of variational Bayes against one of maximum likelihood."""
    rows = []
    for n, d, k in shapes or [(272, 2, 2), (10_000, 8, 8), (100_000, 16, 16), (2_000_000, 16, 32)]:
        if shapes is None and options.quick and n > 1000:
            n //= 10
        x = (faithful() if n == 272 else blobs(n, d, k, torch.float64)).to(options.device)
        start = initial(x.cpu(), k, "full")

        def run(iterations: int, bayes: bool, x: Tensor = x, start: tuple = start) -> None:
            model: Any = mixture(start, x)
            fit(torchem.variational(model) if bayes else model, x, max_iter=iterations)

        # Differences of short runs are noise.
        few, many = (20, 220) if n <= 10_000 else (1, 6) if n <= 100_000 else (1, 4)
        plain, bayes = partial(run, bayes=False), partial(run, bayes=True)
        plain(few), bayes(few)
        pairs = [
            (per_iteration(bayes, few, many, options.device), per_iteration(plain, few, many, options.device))
            for _ in range(2 * options.rounds + 1)
        ]
        ratios = [a / b for a, b in pairs]
        rows.append({
            "N": n, "D": d, "K": k, "ratio": statistics.median(ratios), "ratios": ratios, "goal": 1.3,
            "variational_ms": 1e3 * statistics.median(a for a, _ in pairs),
            "likelihood_ms": 1e3 * statistics.median(b for _, b in pairs),
        })  # fmt: skip
        print(f"variational, {n} × {d}, K={k}: {spread(ratios)} of a maximum-likelihood iteration (goal ≤ 1.3)")
    return rows


# ---- trade-offs that no machine changes -----------------------------------------------------------------------------


def passes_to(history: list[float], goal: float) -> int | None:
    """The first entry that reaches a value."""
    return next((place for place, value in enumerate(history) if value >= goal), None)


def first(values: list[int | None]) -> float | None:
    """Median, where what never came is late; None if that is in the middle."""
    middle = statistics.median(math.inf if value is None else value for value in values)
    return middle if math.isfinite(middle) else None


def of_size(starts: int = 5) -> dict:
    """Passes until a held-out score is that of thirty full-batch passes from the same start, less 0.01 nat."""
    out: dict = {}
    for n, batch in ((1_000, 100), (10_000, 500), (50_000, 500)):
        x, new = (blobs(n + 5_000, 4, 8, torch.float64)[part] for part in (slice(5_000, None), slice(5_000)))
        found: dict[str, list[int | None]] = {}
        for seed in range(starts):
            start = seeded(x, 8, seed)
            end = mixture(start, x)
            fit(end, x, max_iter=30)
            goal = score(end, new) - 0.01
            for name, rule, size in (
                ("full batch", torchem.FullBatch(), n),
                ("incremental, 20 batches", torchem.Incremental(), n // 20),
                (f"stochastic, κ = 0.6, batches of {batch}", torchem.Stochastic(exponent=0.6), batch),
                (f"stochastic, κ = 1, batches of {batch}", torchem.Stochastic(exponent=1.0), batch),
            ):
                found.setdefault(name, []).append(_passes(mixture(start, x), x, new, goal, rule, size))
        out[str(n)] = {name: first(values) for name, values in found.items()}
        print(f"passes to 30 full ones, N={n}: {out[str(n)]}", flush=True)
    return out


def _passes(model: Any, x: Tensor, new: Tensor, goal: float, rule: Any, size: int) -> int | None:
    seen: list[float] = []
    fit(
        model, x, accumulate=rule, batch_size=size, max_iter=30,
        callbacks=[lambda now: (seen.append(score(now.model, new)), seen[-1] >= goal)[1]],
    )  # fmt: skip
    # Rules that move within a pass have moved in it when they are asked; full batches move after it.
    place = passes_to(seen, goal)
    return None if place is None else place + (not isinstance(rule, torchem.FullBatch))


def of_optima(runs: int = 60) -> dict:
    """Share of runs that end within a nat of the best known optimum."""
    out: dict = {}
    for name, side, k in (("five in a row", 5, 5), ("nine on a lattice", 3, 9)):
        places = 4 * torch.stack([torch.arange(k) % side, torch.arange(k) // side], -1).double().unsqueeze(1)
        noise = [torch.randn(60, 2, generator=torch.Generator().manual_seed(i)).double() for i in range(k)]
        x = (places + 0.6 * torch.stack(noise)).flatten(0, 1)

        def ends(restarts: int = runs, x: Tensor = x, k: int = k, **more: Any) -> list[float]:
            model = torchem.GaussianMixture(k, 2, "spherical").double()
            options: dict[str, Any] = {"init": "random_from_data", "max_iter": 800, "tol": 1e-6, "restarts": restarts}
            return fit(model, x, **options | more).restarts

        plain = ends(10 * runs)
        found = {
            "random points": plain,
            "random points, annealed": ends(anneal=[0.1 * 1.3**i for i in range(9)]),
            "random points, drawn": ends(e_step="sample", max_iter=60, tol=0.0),
            "k-means++": ends(init="kmeans++"),
            "hierarchical": ends(init="hierarchical"),
            "best of 10 random points": [max(plain[i : i + 10]) for i in range(0, 10 * runs, 10)],
        }
        best = max(map(max, found.values()))
        # Draws end near an optimum, not at it.
        out[name] = {way: sum(v > best - (15 if "drawn" in way else 1) for v in values) / len(values)
                     for way, values in found.items()}  # fmt: skip
        print(f"share at the best optimum, {name}: {out[name]}", flush=True)
    return out


class Counted:
    """A loader of one batch that counts the passes over it."""

    def __init__(self, batch: torchem.Batch):
        self.batch, self.passes = batch, 0

    def __iter__(self) -> Iterator[torchem.Batch]:
        self.passes += 1
        yield self.batch


def of_slowness() -> dict:
    """Passes, refused ones included, to within 1e-4 nats of the optimum."""
    deaths, days = torch.arange(10.0).double().unsqueeze(-1), torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1])
    poissons: Any = torchem.Mixture(Categorical(2), Poisson(2, 1)).double()
    poissons.weights, poissons.component.rates = [0.3, 0.7], [[1.0], [2.5]]
    cases: list[tuple[str, Any, torchem.Batch]] = [
        ("Poisson mixture (deaths)", poissons, torchem.Batch(deaths, weight=days.double()))
    ]
    for gap in (4.0, 2.0, 1.5):
        truth = torchem.GaussianMixture(2, 2, "spherical").double()
        truth.means = [[-gap / 2, 0.0], [gap / 2, 0.0]]
        x = truth.sample(2_000, generator=torch.Generator().manual_seed(0))
        cases.append((f"two Gaussians {gap:g} σ apart", mixture(seeded(x, 2, 0, "spherical"), x, "spherical"),
                      torchem.Batch(x)))  # fmt: skip
    out: dict = {}
    for name, model, batch in cases:
        best = max(
            fit(copy.deepcopy(model), [batch], accelerate=how, max_iter=3000).bound for how in ("squarem", "anderson")
        )
        out[name] = {}
        for how in (None, "squarem", "anderson"):
            data = Counted(batch)
            near = [lambda now, best=best: now.objective[0] > best - 1e-4]
            end = fit(copy.deepcopy(model), data, accelerate=how, max_iter=20_000, callbacks=near)
            # One pass surveys the data.
            out[name][how or "EM"] = data.passes - 1 if end.bound > best - 1e-4 else None
        print(f"passes to 1e-4 nats, {name}: {out[name]}", flush=True)
    return out


def clusters(n: int, seed: int, gap: float = 3.0) -> Tensor:
    """Three clusters in the plane."""
    truth = torchem.GaussianMixture(3, 2).double()
    truth.means = gap * torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.3]]).double()
    return truth.sample(n, generator=torch.Generator().manual_seed(seed))


def of_prior(seeds: int = 20) -> dict:
    """Held-out score of three components, and how many of eight survive, by the number of observations."""
    new = clusters(10_000, 10_000, 1.6)
    out: dict = {}
    for n in (20, 50, 200, 1000):
        found: dict[str, list[float]] = {"maximum likelihood": [], "MAP": [], "variational": []}
        for seed in range(seeds):
            x = clusters(n, seed, 1.6)
            for name, values in found.items():
                model = torchem.GaussianMixture(3, 2).double()
                if name == "MAP":
                    model.mixing.prior, model.component.prior = priors.Dirichlet(2.0), priors.NormalInverseWishart()
                elif name == "variational":
                    torchem.variational(model)
                fit(model, x, init="auto", restarts=5, tol=1e-5, max_iter=500)
                values.append(score(model, new))
        out[f"held-out, {n} observations"] = {name: statistics.median(values) for name, values in found.items()}
        print(f"held-out score, N={n}: {out[f'held-out, {n} observations']}", flush=True)
    for tol in (1e-3, 1e-6):
        alive, chosen = [], []
        for seed in range(seeds):
            x = clusters(500, seed)
            bayes = torchem.GaussianMixture(8, 2).double()
            torchem.variational(bayes, mixing=priors.StickBreaking(1.0))
            fit(bayes, x, init="auto", restarts=5, tol=tol, max_iter=3000)
            alive.append(int((bayes.weights > 0.01).sum()))
            sizes = [torchem.GaussianMixture(k, 2).double() for k in range(1, 9)]
            for model in sizes:
                fit(model, x, init="auto", restarts=5, tol=tol, max_iter=3000)
            scores = [torchem.criteria(model, x).bic for model in sizes]
            chosen.append(1 + scores.index(min(scores)))
        out[f"three found, tol={tol:g}"] = {
            "variational, of eight": sum(k == 3 for k in alive) / seeds,
            "BIC, of one to eight": sum(k == 3 for k in chosen) / seeds,
        }  # fmt: skip
        print(f"three components found, tol={tol:g}: {out[f'three found, tol={tol:g}']}", flush=True)
    return out


def of_overlap() -> dict:
    """What hard and soft E-steps say of two clusters of equal variance, and in how many passes."""
    out: dict = {}
    for gap in (6.0, 4.0, 3.0, 2.0):
        truth = torchem.GaussianMixture(2, 1, "tied").double()
        truth.means = [[-gap / 2], [gap / 2]]
        x = truth.sample(20_000, generator=torch.Generator().manual_seed(0))
        found = {}
        for kind in ("soft", "hard"):
            model = torchem.GaussianMixture(2, 1, "tied").double()
            end = fit(model, x, init="auto", e_step=kind, tol=1e-7, max_iter=5000)
            means = model.means.detach()[:, 0]
            found[kind] = {"distance": float((means[1] - means[0]).abs()), "passes": end.n_iter}
        out[f"{gap:g} σ"] = found
        print(f"distance of means that are {gap:g} σ apart: {found}", flush=True)
    return out


def of_latents() -> dict:
    """How far the bounds of a factorial HMM stay below the likelihood, per frame, at the parameters of each fit."""
    truth = torchem.FactorialHMM.gaussian([2, 2, 2], 1).double()
    truth.contributions = [[[-size], [size]] for size in (2.0, 1.0, 0.6)]
    for chain in truth.transitions:
        chain.probs = [[0.9, 0.1], [0.1, 0.9]]
    x = truth.sample(20, 50, generator=torch.Generator().manual_seed(0))
    out: dict = {}
    for q in ("exact", "structured", "mean_field"):
        model = torchem.FactorialHMM.gaussian([2, 2, 2], 1, q=q).double()  # pyright: ignore[reportArgumentType]
        end = fit(model, x, init="auto", restarts=6, max_iter=150, tol=1e-5)
        with torch.no_grad():
            likelihood = float(model.log_prob(x).sum())
        out[q] = {"log-likelihood": likelihood / 1000, "gap": (likelihood - end.bound) / 1000}
        print(f"factorial HMM, {q}: {out[q]}", flush=True)
    return out


#: Questions of the guide.
TRADEOFFS: dict[str, Callable[[], dict]] = {
    "size": of_size,
    "optima": of_optima,
    "slowness": of_slowness,
    "prior": of_prior,
    "overlap": of_overlap,
    "latents": of_latents,
}


def tradeoffs(options: argparse.Namespace) -> dict:
    """Passes, shares and scores: the same on every machine, but for rounding."""
    return {name: measure() for name, measure in TRADEOFFS.items()}


def run(options: argparse.Namespace) -> dict:
    """Every part that was asked for."""
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "online": online, "file": file, "restarts": restarts, "variational": variational, "tradeoffs": tradeoffs,
    }  # fmt: skip
    return {name: parts[name](options) for name in options.part}
