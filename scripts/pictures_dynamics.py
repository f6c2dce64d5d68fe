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


def turning() -> tuple[torchem.SwitchingLinearDynamics, torch.Tensor, torch.Tensor]:
    """A walker that turns to the left or to the right, where, and how."""
    truth = torchem.SwitchingLinearDynamics(2, 2, 2).double()
    turn = torch.tensor([0.6, -0.25]).double()
    rows = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1)
    truth.dynamics = 0.97 * rows.view(2, 2, 2)
    truth.dynamics_covariances = 0.05 * torch.eye(2).expand(2, 2, 2)
    truth.observation_covariance = 0.05 * torch.eye(2)
    truth.transition_matrix = [[0.96, 0.04], [0.04, 0.96]]
    x, (_, path) = truth.sample(8, 120, latents=True, generator=torch.Generator().manual_seed(2))
    return truth, x, path


def switching() -> Any:
    """One column of a sequence with its smoothed level, and what is known of its regime."""
    import matplotlib.pyplot as plt

    _, x, path = turning()
    model = torchem.SwitchingLinearDynamics(2, 2, 2).double()
    torchem.fit(model, x, restarts=2, max_iter=40, tol=1e-4, seed=0, progress=False)
    with torch.no_grad():
        level, q = model.smooth(x[:1]), model.posterior(x[:1]).regimes[0]
        same = (model.most_likely(x) == path).double().mean() > 0.5
    q = q if same else q.flip(-1)
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), height_ratios=[3, 1], layout="constrained", sharex=True)
    at, mean, spread = torch.arange(120), level.mean[0, :, 0], 1.645 * level.stddev[0, :, 0]
    top.fill_between(at, mean - spread, mean + spread, color=GREY, alpha=0.25, linewidth=0)
    top.plot(at, mean, color=GREY, linewidth=1)
    for k, (colour, name) in enumerate(((BLUE, "turning left"), (ORANGE, "turning right"))):
        own = q.argmax(-1) == k
        top.plot(at[own], x[0, own, 0], "o", color=colour, markersize=4, markeredgewidth=0, label=name)
    top.set(ylabel="first column", xlim=(-1, 120))
    top.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.14))
    bottom.fill_between(at, q[:, 1], color=ORANGE, alpha=0.35, linewidth=0)
    bottom.step(at, path[0].double(), color=GREY, linewidth=1.2, where="mid")
    bottom.set(xlabel="frame", ylabel="P(right)", ylim=(-0.04, 1.04))
    return fig


MODELS: dict[str, Callable[[], Any]] = {"state-space": state_space, "switching": switching}
