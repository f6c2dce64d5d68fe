"""Structured models beside their peers: networks, chains of normal states, segments, factors, mixtures of models."""

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks import factor_analysis, nested, networks, semi_markov, state_space

#: What `scripts/benchmark.py structured --part` may name.
PARTS: dict[str, Callable[..., Any]] = {
    **networks.PARTS, **state_space.PARTS, **semi_markov.PARTS, **factor_analysis.PARTS, **nested.PARTS,
}  # fmt: skip


def run(options: argparse.Namespace) -> dict:
    """Every part that was asked for."""
    return {name: PARTS[name](options) for name in options.part}
