"""The pictures of networks; see `scripts/pictures.py`, which draws them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchem
from torchem import plot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import clinic


def bayesian_network() -> Any:
    """The network of `examples/clinic.py`, fitted, with its tables."""
    net = clinic.network()
    torchem.fit(net, clinic.generate(), restarts=5, seed=0, tol=1e-6, max_iter=1000, progress=False)
    return plot.network(net).figure


#: Those of docs/models.
MODELS: dict[str, Callable[[], Any]] = {"bayesian-network": bayesian_network}
