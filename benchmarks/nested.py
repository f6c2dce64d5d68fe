"""Mixtures of models: what clustering sequences costs beside the chains that it is made of."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import torchem
from benchmarks.measure import PeakMemory
from benchmarks.models import _alternating, _compared, _fit
from torchem.factors import Categorical

#: Bytes beside the data that an iteration may take.
_BUDGET = 256 << 20


def _started(model: Any, x: torch.Tensor) -> Any:
    """Parameters that are not alike, means spread over the data."""
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data = value.data + 0.3 * torch.randn(value.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, torchem.factors.Gaussian):
            module.mean.data = module.mean.data * 3 * x.std()
    return model.double()


def chains(options: argparse.Namespace, sizes: tuple[int, int, int, int] | None = None) -> list[dict]:
    """An EM iteration of a mixture of K chains of S states, beside K chains alone and the one chain of K S states.

    The first is what no mixture can be cheaper than (each chain under weights of its own, as many as restarts); the
    second is the same model, spelt out.
    """
    n, t, s, k = sizes or ((100, 50, 8, 4) if options.quick else (1000, 100, 8, 4))
    x = torch.randn(n, t, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    built: dict[str, Callable[[], Any]] = {
        "mixture": lambda: torchem.Mixture(Categorical(k), torchem.GaussianHMM(s, 2)),
        "K chains": lambda: torchem.GaussianHMM(s, 2).replicate(k),
        "one chain": lambda: torchem.GaussianHMM(k * s, 2),
    }
    models = {name: _started(build(), x) for name, build in built.items()}

    def iterate(name: str, iterations: int) -> None:
        model = models[name]
        batch = model.batch(x)
        with torch.no_grad():
            for _ in range(iterations):
                model.m_step(model.e_step(batch))

    times = _alternating(options.rounds, {name: partial(iterate, name) for name in models}, 1, 4, options.device)
    with PeakMemory() as peak:
        _fit(models["mixture"], x, 2)
    what = {"N": n, "T": t, "S": s, "K": k, "extra_bytes": peak.extra}
    rows = [
        _compared(f"mixture of {k} chains", {"mixture": times["mixture"], other: times[other]}, goal, **what)
        for other, goal in (("K chains", 2.0), ("one chain", 2.0))
    ]
    print(f"    {peak.extra / 1e6:.0f} MB extra (budget {_BUDGET / 1e6:.0f})", flush=True)
    return rows


#: Parts of the suite, by name.
PARTS: dict[str, Callable[..., list[dict]]] = {"nested": chains}
