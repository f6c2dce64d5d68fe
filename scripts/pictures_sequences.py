"""Pictures of whole sequences and of regimes: docs/models/mixtures-of-models and docs/models/regimes."""

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchem
from torchem.factors import Categorical, MeanAdjustedAutoregression
from torchem.tables import read_table

GREY, BLUE, ORANGE, GREEN = "#848484", "#2f8fd8", "#e8762c", "#2fa37c"
DATASETS = Path(torchem.__file__).parent / "datasets"
#: Peaks and troughs of business cycles, National Bureau of Economic Research.
RECESSIONS = [
    ("1953-07", "1954-05"), ("1957-08", "1958-04"), ("1960-04", "1961-02"), ("1969-12", "1970-11"),
    ("1973-11", "1975-03"), ("1980-01", "1980-07"), ("1981-07", "1982-11"),
]  # fmt: skip


def mixtures_of_models() -> Any:
    """Walkers by their clusters, in the order of how often they change, and how each kind moves."""
    import matplotlib.pyplot as plt

    table = read_table(DATASETS / "gaits.csv").values
    walker, speed = table[:, 0], table[:, 2]
    series = [torch.from_numpy(speed[walker == n]).unsqueeze(-1) for n in np.unique(walker)]
    model = torchem.Mixture(Categorical(3), torchem.GaussianHMM(2, 1)).double()
    torchem.fit(model, series, restarts=10, seed=0, tol=1e-6, max_iter=1000, progress=False)
    label = model.most_likely(series).numpy()
    chains = list(model.component)
    order = np.argsort([-float(chain.transition_matrix.detach().diagonal().sum()) for chain in chains])
    fig, axes = plt.subplots(
        2, 3, figsize=(8, 5.2), height_ratios=(2.6, 1), layout="constrained", sharex="row", sharey="row"
    )
    for place, (k, colour) in enumerate(zip(order, (BLUE, ORANGE, GREEN), strict=True)):
        own = np.flatnonzero(label == k)
        for row, n in enumerate(own[:7]):
            axes[0, place].plot(series[n][:, 0] - 5.5 * row, color=colour, linewidth=1.3)
        axes[0, place].set(title=f"{len(own)} sequences", yticks=[], xlabel="frame")
        axes[0, place].spines["left"].set_visible(False)
        chain = chains[k]
        rest = np.argsort(chain.means.detach().numpy()[:, 0])
        matrix = chain.transition_matrix.detach().numpy()[np.ix_(rest, rest)]
        panel = axes[1, place]
        panel.imshow(matrix, cmap="Blues", vmin=0, vmax=1.2)
        for i, j in np.ndindex(2, 2):
            shade = "white" if matrix[i, j] > 0.5 else "#404040"
            panel.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=shade, fontweight="bold")
        panel.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["rest", "move"], yticklabels=["rest", "move"])
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
    axes[0, 0].set_ylabel("speed")
    axes[1, 0].set_ylabel("from")
    axes[1, 1].set_xlabel("to")
    return fig


def regimes() -> Any:
    """Growth above, the smoothed probability of recession below."""
    import matplotlib.pyplot as plt

    growth = torch.from_numpy(read_table(DATASETS / "rgnp.csv", ["growth"]).values)
    model = torchem.HMM("stationary", Categorical(2, 2), MeanAdjustedAutoregression(2, 4)).double()
    torchem.fit(model, growth, restarts=5, seed=0, tol=1e-7, max_iter=1000, progress=False)
    law: Any = model.emission
    low = int(law.means.argmin())
    probability = model.posterior(growth)[0, :, low].detach().numpy()
    dates = np.array([dt.date(1951 + (q + 1) // 4, 3 * ((q + 1) % 4) + 2, 15) for q in range(len(growth))])
    fig, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.4), sharex=True, height_ratios=(1.2, 1), layout="constrained"
    )
    for panel in (above, below):
        for start, end in RECESSIONS:
            begin, finish = (dt.date(*map(int, f"{month}-1".split("-"))) for month in (start, end))
            panel.axvspan(begin, finish, color=GREY, alpha=0.25, linewidth=0)
    above.axhline(0, color=GREY, linewidth=0.8)
    above.plot(dates, growth[:, 0], color=BLUE, linewidth=1.5)
    for k, colour in ((low, ORANGE), (1 - low, GREEN)):
        mean = float(law.means[k].detach())
        above.axhline(mean, color=colour, linewidth=1.2, linestyle="--")
        side = {"va": "bottom"} if k != low else {"va": "top"}
        above.text(dates[-1], mean, f"  {mean:.2f}".replace("-", "−"), color=colour, ha="left", **side)
    above.set_ylabel("growth, % a quarter")
    below.fill_between(dates, 0, probability, color=ORANGE, alpha=0.55, linewidth=0)
    below.plot(dates, probability, color=ORANGE, linewidth=1.5)
    below.set(ylabel="p(recession)", ylim=(0, 1.02), xlim=(dates[0], dt.date(1987, 9, 1)))
    return fig


MODELS: dict[str, Callable[[], Any]] = {"mixtures-of-models": mixtures_of_models, "regimes": regimes}
