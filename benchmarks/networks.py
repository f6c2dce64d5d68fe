"""A Bayesian network with hidden nodes beside pgmpy's EM."""

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torchem
from benchmarks.measure import PeakMemory, clock, per_iteration, spread

#: Rows that pgmpy is timed on: its cost is that of distinct rows, which it goes through one by one in Python.
_FEW = 200


def network(nodes: int, hidden: int, seed: int = 0) -> torchem.BayesianNetwork:
    """Binary nodes with two parents each among those before; some of the early ones hidden."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"v{i}" for i in range(nodes)]
    edges = [
        (names[parent], names[child])
        for child in range(1, nodes)
        for parent in torch.randperm(child, generator=generator)[: min(child, 2)].tolist()
    ]
    net = torchem.BayesianNetwork(dict.fromkeys(names, 2), edges, names[2 : 2 + 3 * hidden : 3]).double()
    for name in names:
        table = torch.rand(net.tables[name].shape, generator=generator, dtype=torch.float64) + 0.1
        net.tables[name] = table / table.sum(-1, keepdim=True)
    return net


def _pgmpy(net: torchem.BayesianNetwork, x: Tensor) -> Callable[[int], list[Any]] | None:
    """pgmpy's EM from the tables of a network, if it is installed."""
    try:
        import pandas as pd  # pyright: ignore[reportMissingImports]
        from pgmpy.estimators import ExpectationMaximization  # pyright: ignore[reportMissingImports]
        from pgmpy.factors.discrete import TabularCPD  # pyright: ignore[reportMissingImports]
        from pgmpy.models import DiscreteBayesianNetwork  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        print(f"pgmpy: not compared, {error}", flush=True)
        return None
    data = pd.DataFrame(x.long().numpy(), columns=net.columns)
    sizes = dict(net.cardinalities)
    start = {}
    for name, size in sizes.items():
        parents = list(net.parents[name])
        values = net.tables[name].detach().reshape(-1, size).mT.tolist()
        names = {v: list(range(sizes[v])) for v in (name, *parents)}
        start[name] = TabularCPD(name, size, values, parents, [sizes[p] for p in parents], names)

    def run(iterations: int) -> list[Any]:
        model = DiscreteBayesianNetwork(list(net.edges), latents=set(net.hidden))
        estimator = ExpectationMaximization(model, data)
        card = {name: sizes[name] for name in net.hidden}
        options = {"atol": 0.0, "show_progress": False, "init_cpds": dict(start)}
        return estimator.get_parameters(latent_card=card, max_iter=iterations, **options)

    return run


def tables(options: argparse.Namespace, sizes: tuple[int, int, int] | None = None) -> list[dict]:
    """EM iterations of 20 binary nodes, 3 hidden, 1e5 rows: complete, beside pgmpy, and a tenth missing."""
    n, nodes, hidden = sizes or (10_000 if options.quick else 100_000, 20, 3)
    net = network(nodes, hidden)
    generator = torch.Generator().manual_seed(1)
    x = net.sample(n, generator=generator)
    holes = torch.rand(x.shape, generator=generator) < 0.1
    start = {name: net.tables[name].detach().clone() for name in net.tables}

    def fit(data: Tensor, iterations: int) -> torchem.BayesianNetwork:
        model = network(nodes, hidden).to(options.device)
        for name, value in start.items():
            model.tables[name] = value
        torchem.fit(model, data, init=None, max_iter=iterations, tol=0.0, seed=0, progress=False)
        return model

    few = x[: min(_FEW, n)]
    runs = {"torchem": (partial(fit, x.to(options.device)), 2, 22), "same rows": (partial(fit, few), 2, 22)}
    gaps = x.masked_fill(holes, torch.nan).to(options.device)
    runs["missing"] = (partial(fit, gaps), 2, 12)
    peer = _pgmpy(net, few)
    if peer is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(net, fit(few, 1), peer(1))
    times: dict[str, list[float]] = {name: [] for name in (*runs, *(["pgmpy"] if peer is not None else []))}
    for _ in range(options.rounds):
        for name, (run, least, most) in runs.items():
            times[name].append(per_iteration(run, least, most, options.device))
        if peer is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                times["pgmpy"].append(clock(partial(peer, 1), "cpu"))
    with PeakMemory() as peak:
        fit(x, 3)
    with PeakMemory() as wide:
        fit(gaps, 3)
    cases = [len(rows.unique(dim=0)) for rows in (x, few)]
    each = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"network, {nodes} binary nodes, {hidden} hidden, {n} rows ({cases[0]} distinct): "
        f"{1e3 * each['torchem']:.1f} ms an iteration, {peak.extra / 1e6:.0f} MB extra; with 10 % "
        f"of entries missing {1e3 * each['missing']:.0f} ms, {1e9 * each['missing'] / n:.0f} ns a row, "
        f"{wide.extra / 1e6:.0f} MB",
        flush=True,
    )
    row: dict[str, Any] = {"N": n, "nodes": nodes, "hidden": hidden, "distinct": cases, "seconds": times}
    row |= {"extra_bytes": peak.extra, "extra_bytes_missing": wide.extra, "goal": 100.0}
    if peer is not None:
        same = [b / a for a, b in zip(times["same rows"], times["pgmpy"], strict=True)]
        # Its time is in proportion to the distinct rows; that of so many is reckoned, not waited for.
        scaled = [b * cases[0] / cases[1] / a for a, b in zip(times["torchem"], times["pgmpy"], strict=True)]
        print(
            f"pgmpy: {each['pgmpy']:.1f} s an iteration on {len(few)} rows, {spread(same)} × torchem on the same rows; "
            f"reckoned by distinct rows {spread(scaled)} × on all (goal ≥ 100)",
            flush=True,
        )
        row |= {"ratios": scaled, "ratios_same_rows": same}
    return [row]


def _check(net: torchem.BayesianNetwork, ours: torchem.BayesianNetwork, theirs: list[Any]) -> None:
    """One iteration of both is the same."""
    for cpd in theirs:
        name = cpd.variable
        order = [*cpd.variables[1:], name]
        wanted = [*net.parents[name], name]
        found = torch.as_tensor(cpd.values).movedim(0, -1).permute([order.index(v) for v in wanted])
        gap = float((found - ours.tables[name].detach().cpu()).abs().max())
        if gap > 1e-6:
            raise RuntimeError(f"pgmpy's table of {name} differs by {gap:.2g} after an iteration")


#: What `scripts/benchmark.py structured --part` may name.
PARTS: dict[str, Callable[..., list[dict]]] = {"network": tables}
