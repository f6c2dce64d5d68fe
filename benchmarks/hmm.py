"""Hidden Markov models against hmmlearn (and dynamax, where it is installed)."""

import argparse
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import torchem
from benchmarks.measure import PeakMemory, clock, per_iteration, spread
from torchem.ops import chain

#: Sequences, frames, states of the goals; with FEATURES columns each.
SHAPES = [(1, 50_000, 8), (64, 500, 8), (256, 500, 32), (1000, 100, 4)]
FEATURES = 2


class Problem:
    """Data drawn from a model, and the parameters that all sides start from."""

    def __init__(self, sequences: int, frames: int, states: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        truth = torchem.GaussianHMM(states, FEATURES).to(dtype)
        truth.means = 2 * torch.randn(states, FEATURES, generator=generator)
        table = torch.rand(states, states, generator=generator) + states * torch.eye(states)
        truth.transition_matrix = table / table.sum(-1, keepdim=True)
        truth.covariances = torch.ones(states, FEATURES)
        self.x = truth.sample(sequences, frames, generator=generator)
        self.lengths = [frames] * sequences
        self.states, self.dtype = states, dtype
        self.means = truth.means.detach().double() + 0.3 * torch.randn(states, FEATURES, generator=generator)
        self.table = truth.transition_matrix.detach().double()
        self.table = self.table / self.table.sum(-1, keepdim=True)

    def model(self, device: str = "cpu") -> torchem.GaussianHMM:
        """The start."""
        model = torchem.GaussianHMM(self.states, FEATURES).to(device, self.dtype)
        model.means, model.covariances = self.means, torch.ones(self.states, FEATURES)
        model.transition_matrix = self.table
        return model

    def torchem(self, device: str = "cpu", compiled: bool = True) -> Callable[[int], object]:
        """A function of the number of iterations that runs a fit."""
        x = self.x.to(device)

        def run(iterations: int) -> object:
            return torchem.fit(self.model(device), x, init=None, max_iter=iterations, tol=0, progress=False)

        return run if compiled else lambda iterations: without_numba(lambda: run(iterations))

    def peer(self, implementation: str) -> Any:
        """hmmlearn's model at the same start, without priors."""
        from hmmlearn.hmm import GaussianHMM

        model = GaussianHMM(
            self.states, "diag", implementation=implementation, init_params="", tol=-np.inf, startprob_prior=1.0,
            transmat_prior=1.0, means_weight=0.0, covars_prior=0.0, covars_weight=0.0, min_covar=1e-6,
        )  # fmt: skip
        model.startprob_ = np.full(self.states, 1 / self.states)
        model.transmat_, model.means_ = self.table.numpy(), self.means.numpy()
        model.covars_ = np.ones((self.states, FEATURES))
        return model

    def hmmlearn(self, implementation: str) -> Callable[[int], object] | None:
        """The same for hmmlearn; None where it is not installed."""
        if find_spec("hmmlearn") is None:
            return None
        rows = self.x.double().flatten(0, 1).numpy()

        def run(iterations: int) -> object:
            model = self.peer(implementation)
            model.n_iter = iterations
            return model.fit(rows, self.lengths)

        return run

    def dynamax(self) -> Callable[[int], object] | None:
        """The same for dynamax, in float32 and compiled; None where it is not installed."""
        try:
            import jax
            import jax.numpy as jnp
            from dynamax.hidden_markov_model import DiagonalGaussianHMM
        except ImportError:
            return None
        model = DiagonalGaussianHMM(self.states, FEATURES)
        emissions = jnp.asarray(self.x.float().numpy())
        params, props = model.initialize(
            jax.random.PRNGKey(0), initial_probs=jnp.full(self.states, 1 / self.states),
            transition_matrix=jnp.asarray(self.table.float().numpy()),
            emission_means=jnp.asarray(self.means.float().numpy()),
            emission_scale_diags=jnp.ones((self.states, FEATURES)),
        )  # fmt: skip

        @jax.jit
        def iteration(params: object, state: object) -> tuple:
            stats, log_prob = jax.vmap(lambda e: model.e_step(params, e))(emissions)
            params, state = model.m_step(params, props, stats, state)
            return params, state, log_prob.sum()

        def run(iterations: int) -> object:
            now, state = params, model.initialize_m_step_state(params, props)
            for _ in range(iterations):
                now, state, value = iteration(now, state)
            return jax.block_until_ready(value)

        return run


def without_numba(call: Callable[[], object]) -> object:
    """As if numba were not installed."""
    found, chain.compiled_chain = chain.compiled_chain, lambda device: None
    try:
        return call()
    finally:
        chain.compiled_chain = found


def shapes(quick: bool) -> list[tuple[int, int, int]]:
    """The goals' shapes, or a tenth of them."""
    return [(max(1, b // 10), t if b > 1 else t // 10, s) for b, t, s in SHAPES] if quick else SHAPES


def iteration(options: argparse.Namespace) -> list[dict]:
    """One EM iteration."""
    rows = []
    for b, t, s in shapes(options.quick):
        double, single = (Problem(b, t, s, dtype) for dtype in (torch.float64, torch.float32))
        runs = {
            "torchem": double.torchem(options.device), "torchem_float32": single.torchem(options.device),
            "torchem_without_numba": double.torchem(options.device, compiled=False),
            "hmmlearn_scaling": double.hmmlearn("scaling"), "hmmlearn_log": double.hmmlearn("log"),
            "dynamax_float32": single.dynamax(),
        }  # fmt: skip
        runs = {name: run for name, run in runs.items() if run is not None}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(2)  # a second iteration may compile anew, on what the first gave
        for _ in range(options.rounds):
            for name, run in runs.items():
                few, many = (1, 2) if name == "hmmlearn_log" else (1, 6)
                times[name].append(per_iteration(run, few, many, options.device))
        ratios = {
            "against_scaling": ("hmmlearn_scaling", "torchem"), "against_log": ("hmmlearn_log", "torchem"),
            "float32_against_dynamax": ("dynamax_float32", "torchem_float32"),
            "without_numba_against_scaling": ("hmmlearn_scaling", "torchem_without_numba"),
        }  # fmt: skip
        row: dict = {"B": b, "T": t, "S": s, "D": FEATURES}
        row |= {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
        print(f"B={b} T={t} S={s}: " + ", ".join(f"{n} {row[f'{n}_ms']:.2f} ms" for n in times), flush=True)
        for name, (peer, ours) in ratios.items():
            if peer in times and ours in times:
                each = [p / o for p, o in zip(times[peer], times[ours], strict=True)]
                row[name], row[f"{name}_each"] = statistics.median(each), each
                print(f"    {name.replace('_', ' ')}: {spread(each)}", flush=True)
        rows.append(row)
    return rows


def decode(options: argparse.Namespace) -> list[dict]:
    """The most likely path."""
    if find_spec("hmmlearn") is None:
        return []
    rows = []
    for b, t, s in shapes(options.quick):
        problem = Problem(b, t, s, torch.float64)
        model, peer = problem.model(options.device), problem.peer("log")
        x, flat = problem.x.to(options.device), problem.x.flatten(0, 1).numpy()
        # As after a fit, which chooses the numerics of the emissions.
        torchem.fit(model, x, init=None, max_iter=1, tol=0, progress=False)
        model.most_likely(x)
        each, mine, theirs = [], [], []
        for _ in range(options.rounds):
            mine.append(clock(lambda m=model, x=x: m.most_likely(x), options.device))
            theirs.append(clock(lambda p=peer, f=flat, q=problem: p.decode(f, q.lengths), "cpu"))
            each.append(theirs[-1] / mine[-1])
        rows.append({
            "B": b, "T": t, "S": s, "torchem_ms": 1e3 * statistics.median(mine),
            "hmmlearn_ms": 1e3 * statistics.median(theirs), "ratio": statistics.median(each), "ratios": each,
        })  # fmt: skip
        print(f"Viterbi B={b} T={t} S={s}: {rows[-1]['torchem_ms']:.2f} ms, {spread(each)} × hmmlearn", flush=True)
    return rows


def gradient(options: argparse.Namespace) -> list[dict]:
    """Backward through the log normaliser against its forward."""
    rows = []
    for b, t, s in shapes(options.quick):
        problem = Problem(b, t, s, torch.float64)
        device = options.device
        emission = torch.randn(b, t, s, dtype=torch.float64, device=device, requires_grad=True)
        table = problem.table.log().to(device).unsqueeze(0).requires_grad_()
        first = torch.zeros(1, s, dtype=torch.float64, device=device, requires_grad=True)
        forward, backward = [], []
        for _ in range(options.rounds + 1):
            values: list[torch.Tensor] = []
            forward.append(clock(lambda f=first, a=table, e=emission, v=values: v.append(
                chain.log_normalizer(f, a, e).sum()), device))  # fmt: skip
            backward.append(clock(lambda v=values, p=(first, table, emission): torch.autograd.grad(v[0], p), device))
        each = [back / ahead for back, ahead in zip(backward[1:], forward[1:], strict=True)]
        rows.append({
            "B": b, "T": t, "S": s, "forward_ms": 1e3 * statistics.median(forward[1:]),
            "backward_ms": 1e3 * statistics.median(backward[1:]), "ratio": statistics.median(each), "ratios": each,
        })  # fmt: skip
        print(f"backward / forward B={b} T={t} S={s}: {spread(each)}", flush=True)
    return rows


def memory(options: argparse.Namespace) -> list[dict]:
    """Peak extra memory of a fit, beside the B·T·S numbers of one table of posteriors."""
    rows = []
    for b, t, s in [(1, 100_000 if options.quick else 1_000_000, 8), *shapes(options.quick)[2:3]]:
        problem = Problem(b, t, s, torch.float64)
        run = problem.torchem(options.device)
        small = Problem(1, 1000, s, torch.float64).torchem(options.device)
        small(2)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            run(2)
            extra = torch.cuda.max_memory_allocated() - base
        else:
            with PeakMemory() as peak:
                run(2)
            extra = peak.extra
        table = b * t * s * 8
        rows.append({"B": b, "T": t, "S": s, "extra_bytes": extra, "posterior_bytes": table, "ratio": extra / table})
        print(f"memory B={b} T={t} S={s}: {extra / 1e6:.0f} MB, {extra / table:.1f} × the posteriors", flush=True)
    return rows


def time(options: argparse.Namespace) -> list[dict]:
    """One long sequence, ever longer: time per frame must not grow."""
    rows = []
    for t in (10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000):
        problem = Problem(1, t, 8, torch.float64)
        for name, run in (("torchem", problem.torchem(options.device)),
                          ("torchem_without_numba", problem.torchem(options.device, compiled=False))):  # fmt: skip
            run(1)
            times = [per_iteration(run, 1, 4, options.device) for _ in range(max(1, options.rounds // 2))]
            rows.append({"kernel": name, "T": t, "S": 8, "nanoseconds_per_frame": 1e9 * statistics.median(times) / t})
            print(f"{name} T={t}: {rows[-1]['nanoseconds_per_frame']:.0f} ns per frame", flush=True)
    return rows


def run(options: argparse.Namespace) -> dict:
    """Every part that was asked for."""
    parts = {"iteration": iteration, "decode": decode, "gradient": gradient, "memory": memory, "time": time}
    return {name: parts[name](options) for name in options.part}
