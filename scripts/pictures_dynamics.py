"""Pictures of models whose states move: see scripts/pictures.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchem

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE, ORANGE = "#848484", "#2f8fd8", "#e8762c"


def state_space() -> Any:
    """The level of the Nile with its band, without a break and with one, and what comes next."""
    import matplotlib.pyplot as plt

    table = np.loadtxt(ROOT / "torchem" / "datasets" / "nile.csv", delimiter=",", skiprows=1)
    year, volume, dam = (torch.from_numpy(column) for column in table.T)
    fig, axes = plt.subplots(2, 1, figsize=(8, 5.4), layout="constrained", sharex=True)
    titles = ("a level that walks", "and a step in 1899, when the dam was begun")
    for ax, step, colour, title in zip(axes, (False, True), (BLUE, ORANGE), titles, strict=True):
        model = torchem.LinearGaussianStateSpace.local_level(int(step)).double()
        given: dict[str, Any] = {"inputs": dam} if step else {}
        torchem.fit(model, volume, max_iter=500, tol=1e-6, accelerate="squarem", seed=0, progress=False, **given)
        with torch.no_grad():
            level = model.smooth(volume, **given)
            ahead = model.forecast(volume, 15, u=given.get("inputs"), inputs=torch.ones(15, 1) if step else None)
        ax.plot(year, volume, "o", color=GREY, markersize=3.2, markeredgewidth=0)
        for at, law, style in ((year, level, "-"), (torch.arange(1971, 1986), ahead, "--")):
            mean, spread = law.mean[0, :, 0], 1.645 * law.variance[0, :, 0].sqrt()
            ax.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.22, linewidth=0)
            ax.plot(at, mean, style, color=colour, linewidth=1.8)
        ax.set(ylabel="flow, 10⁸ m³", xlim=(1869, 1986))
        ax.set_title(title, loc="left")
    axes[1].set_xlabel("year")
    return fig


MODELS: dict[str, Callable[[], Any]] = {"state-space": state_space}
