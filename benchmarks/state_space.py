"""Linear Gaussian state spaces against statsmodels and dynamax, and long series in blocks against single steps."""

import argparse
import statistics
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch

import torchem
from benchmarks.measure import clock, per_iteration, spread
from torchem.ops import kalman
from torchem.ops.dispatch import kalman_blocks


def _truth(latents: int, observed: int) -> Any:
    """A stable system with modes that turn."""
    generator = torch.Generator().manual_seed(0)
    model = torchem.LinearGaussianStateSpace(latents, observed).double()
    turn = torch.linalg.qr(torch.randn(latents, latents, generator=generator, dtype=torch.float64)).Q
    model.dynamics = 0.95 * turn
    model.loadings = torch.randn(observed, latents, generator=generator, dtype=torch.float64)
    model.dynamics_covariance = 0.1 * torch.eye(latents)
    model.observation_covariance = 0.5 * torch.eye(observed)
    return model


def _dynamax(x: torch.Tensor, start: Any) -> Any:
    """Iterations of dynamax's EM as a function of their number; None where it is not installed."""
    if find_spec("dynamax") is None:
        print("dynamax is not installed: left out", flush=True)
        return None
    import jax
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    jax.config.update("jax_enable_x64", True)
    latents, observed = start.n_latents, start.n_features
    model = LinearGaussianSSM(latents, observed, has_dynamics_bias=False, has_emissions_bias=False)
    views = {
        "initial_mean": start.initial_mean, "initial_covariance": start.initial_covariance,
        "dynamics_weights": start.dynamics, "dynamics_covariance": start.dynamics_covariance,
        "emission_weights": start.loadings, "emission_covariance": start.observation_covariance,
    }  # fmt: skip
    given = {name: jnp.asarray(value.detach().numpy()) for name, value in views.items()}
    params, props = model.initialize(jax.random.PRNGKey(0), **given)
    data = jnp.asarray(x.numpy())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        stats, value = jax.vmap(lambda y: model.e_step(params, y))(data)
        new, state = model.m_step(params, props, stats, state)
        return new, state, value.sum()

    def run(iterations: int) -> float:
        own, state = params, model.initialize_m_step_state(params, props)
        value: Any = 0.0
        for _ in range(iterations):
            own, state, value = step(own, state)
        return float(value)

    return run


def _statsmodels(x: torch.Tensor, start: Any) -> Any:
    """Smoothing passes of statsmodels over all sequences, the E-step alone; None where it is not installed.

    It has no EM for a general system with many sequences: its M-step would come on top.
    """
    if find_spec("statsmodels") is None:
        print("statsmodels is not installed: left out", flush=True)
        return None
    import numpy as np
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother  # pyright: ignore[reportMissingImports]

    k, d = start.n_latents, start.n_features
    own = KalmanSmoother(k_endog=d, k_states=k, k_posdef=k)
    own["design"], own["transition"] = start.loadings.detach().numpy(), start.dynamics.detach().numpy()
    own["selection"], own["state_cov"] = np.eye(k), start.dynamics_covariance.detach().numpy()
    own["obs_cov"] = start.observation_covariance.detach().numpy()
    own.initialize_known(start.initial_mean.detach().numpy(), start.initial_covariance.detach().numpy())

    def run(iterations: int) -> None:
        for _ in range(iterations):
            for sequence in x.numpy():
                own.bind(np.ascontiguousarray(sequence))
                own.smooth()

    return run


def em(options: argparse.Namespace, sizes: tuple[int, int, int, int] | None = None) -> list[dict]:
    """An EM iteration of many sequences beside dynamax's, and beside the smoothing passes of statsmodels."""
    n, t, latents, observed = sizes or ((8, 100, 4, 8) if options.quick else (64, 500, 8, 16))
    start = _truth(latents, observed)
    x = start.sample(n, t, generator=torch.Generator().manual_seed(1))
    here = x.to(options.device)

    def ours(iterations: int) -> float:
        model = _truth(latents, observed).to(options.device)
        result = torchem.fit(model, here, init=None, max_iter=iterations, tol=0.0, seed=0, progress=False)
        return result.bound

    rows = []
    peers = {"dynamax": (_dynamax(x, start), 2.0), "statsmodels": (_statsmodels(x, start), 5.0)}
    for name, (peer, goal) in peers.items():
        if peer is None:
            continue
        times: dict[str, list[float]] = {"torchem": [], name: []}
        peer(7), ours(5)
        for _ in range(options.rounds):
            times["torchem"].append(per_iteration(ours, 5, 45, options.device))
            times[name].append(per_iteration(peer, 1, 7, "cpu"))
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        each = 1e3 * statistics.median(times["torchem"])
        size = f"{n} × {t} frames, {latents} → {observed}"
        print(f"EM, {size}: {each:.1f} ms an iteration, {name} {spread(ratios)} × that (goal ≥ {goal:g})", flush=True)
        rows.append({"what": "em", "peer": name, "sizes": [n, t, latents, observed], "seconds": times,
                     "ratios": ratios, "goal": goal})  # fmt: skip
    return rows


def scan(options: argparse.Namespace, sizes: tuple[int, int, int] | None = None) -> list[dict]:
    """Smoothing one long series in blocks of time, beside one step after the other."""
    t, latents, observed = sizes or (10_000 if options.quick else 100_000, 4, 4)
    model = _truth(latents, observed)
    x = model.sample(1, t, generator=torch.Generator().manual_seed(1)).to(options.device)
    with torch.no_grad():
        chain = model.to(options.device)._plan(model.batch(x)).chain()
        blocks = kalman_blocks(1, t, latents, chain.mean.device)
        times: dict[str, list[float]] = {"blocks": [], "sequential": [], "chosen": []}
        kalman.smoothed(chain)
        for _ in range(max(1, options.rounds // 2)):
            times["chosen"].append(clock(partial(kalman.smoothed, chain), options.device))
            # Both in plain torch: what an accelerator, or a machine without a compiler, would run.
            with patch.object(kalman, "compiled_kalman", lambda device: None):
                for name, count in (("blocks", blocks), ("sequential", 1)):
                    times[name].append(clock(partial(kalman.smoothed, chain, blocks=count), options.device))
    ratios = [b / a for a, b in zip(times["blocks"], times["sequential"], strict=True)]
    took = {name: statistics.median(values) for name, values in times.items()}
    cut = f"{took['blocks']:.2f} s in {blocks} blocks, sequential {spread(ratios)} × that (goal ≥ 3)"
    print(f"scan, {t} frames: {cut}; {took['chosen']:.2f} s by what is chosen here", flush=True)
    return [{"what": "scan", "sizes": [t, latents, observed], "seconds": times, "ratios": ratios, "goal": 3.0}]


PARTS = {"kalman": em, "scan": scan}
