"""Hidden semi-Markov models: what an E-step costs by the longest duration, and beside the expanded chain."""

import argparse
import statistics
import time
from typing import Any

import torch

import torchem
from benchmarks.measure import PeakMemory, clock, spread
from torchem.factors import Categorical, Gaussian


def drawn(d: int, k: int, sequences: int, frames: int) -> tuple[torchem.GaussianHSMM, torch.Tensor]:
    """A model whose states last D / 2 frames on average, and sequences of it."""
    model = torchem.GaussianHSMM(k, 2, d).double()
    generator = torch.Generator().manual_seed(0)
    model.means = 2 * torch.randn(k, 2, generator=generator, dtype=torch.float64)
    model.duration_probs = torch.randn(k, d, generator=generator, dtype=torch.float64).softmax(-1)
    return model, model.sample(sequences, frames, generator=generator)


def expanded(model: torchem.GaussianHSMM) -> torchem.HMM:
    """The chain on states and frames left, its emissions tied by copies."""
    k, d = model.n_components, model.max_duration
    law, step, first = model.duration_probs.detach(), model.transition_matrix.detach(), model.initial_probs.detach()
    matrix = torch.zeros(k, d, k, d, dtype=torch.float64)
    for left in range(1, d):
        matrix[torch.arange(k), left, torch.arange(k), left - 1] = 1.0
    matrix[:, 0] = step.unsqueeze(-1) * law
    emission = Gaussian(k * d, 2, "diag").double()
    emission.means = model.means.detach().repeat_interleave(d, 0)
    emission.covariances = model.covariances.detach().repeat_interleave(d, 0)
    chain = torchem.HMM(Categorical(k * d), Categorical(k * d, k * d), emission).double()
    chain.initial_probs = (first.unsqueeze(-1) * law).flatten()
    chain.transition_matrix = matrix.reshape(k * d, k * d)
    return chain


def semi_markov(options: argparse.Namespace, sizes: Any = None) -> list[dict]:
    """Seconds of an E-step for longest durations that double, and those of the chain that says the same."""
    k, sequences, frames, longest = sizes or (4, 4, 500 if options.quick else 5000, (25, 50, 100, 200, 400))
    rows: list[dict] = []
    for d in longest:
        model, x = drawn(d, k, sequences, frames)
        batch = model.batch(x)
        chain = expanded(model) if k * d <= 128 else None
        with torch.no_grad():
            model.e_step(batch)  # compiles
            times: dict[str, list[float]] = {"semi-Markov": [], "expanded": []}
            if chain is not None:
                gap = float((chain.e_step(batch)["log_likelihood"] - model.e_step(batch)["log_likelihood"]).abs())
                assert gap < 1e-6 * sequences * frames
            for _ in range(options.rounds):
                times["semi-Markov"].append(clock(lambda m=model, b=batch: m.e_step(b), "cpu"))
                if chain is not None:
                    times["expanded"].append(clock(lambda c=chain, b=batch: c.e_step(b), "cpu"))
            with PeakMemory() as peak:
                model.e_step(batch)
        own = statistics.median(times["semi-Markov"])
        row = {"D": d, "K": k, "N": sequences, "T": frames, "seconds": times, "extra_bytes": peak.extra}
        ratios = [b / a for a, b in zip(times["semi-Markov"], times["expanded"], strict=False)]
        beside = f", expanded chain {spread(ratios)} × as long" if ratios else ""
        before = statistics.median(rows[-1]["seconds"]["semi-Markov"]) if rows else None
        growth = "" if before is None else f", {own / before:.2f} × that of half the duration (linear: 2)"
        each = 1e9 * own / (sequences * frames * k * d)
        print(
            f"semi-Markov, D = {d}: {1e3 * own:.1f} ms an E-step ({each:.1f} ns a frame, state and duration), "
            f"{peak.extra / 1e6:.0f} MB extra{growth}{beside}",
            flush=True,
        )
        rows.append(row | {"ratios": ratios})
    return rows


def decode(options: argparse.Namespace, sizes: Any = None) -> list[dict]:
    """Seconds of the best path, and of a fit's iteration with each family of durations."""
    k, sequences, frames, d = sizes or (4, 4, 500 if options.quick else 5000, 100)
    model, x = drawn(d, k, sequences, frames)
    rows = []
    with torch.no_grad():
        model.most_likely(x)
        seconds = [clock(lambda: model.most_likely(x), "cpu") for _ in range(options.rounds)]
    print(f"semi-Markov, best paths: {1e3 * statistics.median(seconds):.1f} ms", flush=True)
    rows.append({"what": "best paths", "seconds": seconds})
    for duration in ("categorical", "poisson", "negative_binomial"):
        own = torchem.GaussianHSMM(k, 2, d, duration).double()  # pyright: ignore[reportArgumentType]
        own.means = model.means.detach()
        options_of = {"init": None, "tol": 0.0, "seed": 0, "progress": False}
        torchem.fit(own, x, max_iter=1, **options_of)
        began = time.perf_counter()
        torchem.fit(own, x, max_iter=options.rounds + 1, **options_of)
        each = (time.perf_counter() - began) / (options.rounds + 1)
        print(f"semi-Markov, {duration}: {1e3 * each:.1f} ms an iteration", flush=True)
        rows.append({"what": duration, "seconds": [each]})
    return rows


PARTS = {"semi_markov": semi_markov, "semi_markov_fit": decode}
