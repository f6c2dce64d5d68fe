"""The pictures of docs/models/semi-markov.md and docs/models/factor-analysis.md; see scripts/pictures.py."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchem

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE, ORANGE, GREEN = "#848484", "#2f8fd8", "#e8762c", "#2fa37c"


def example(name: str) -> Any:
    """A script of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fitted(model: Any, x: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchem.fit(model.double(), x, **{"seed": 0, "progress": False, "max_iter": 500, "tol": 1e-6} | options)
    return model


@torch.no_grad()
def semi_markov() -> Any:
    """A sequence with its states as they are and as two models find them; how long these say that states last."""
    import matplotlib.pyplot as plt

    machine = example("machine")
    x, z = machine.read()
    truth = machine.truth()
    names, colours = ["idle", "heating", "running"], [BLUE, ORANGE, GREEN]
    models = {
        "semi-Markov": fitted(torchem.GaussianHSMM(3, 1, machine.LONGEST, "negative_binomial"), x, restarts=10),
        "Markov": fitted(torchem.GaussianHMM(3, 1), x, restarts=10),
    }
    # The states by their means: idle, running, heating.
    order = {name: model.means[:, 0].argsort()[[0, 2, 1]] for name, model in models.items()}
    shown = slice(0, 330)
    panels: Any = [["series"] * 3, ["strips"] * 3, names]
    plot, axes = plt.subplot_mosaic(panels, figsize=(8, 6), height_ratios=[2.2, 1.1, 2.4], layout="constrained")
    paint = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    time = np.arange(len(x))[shown]
    axes["series"].scatter(time, x[shown, 0], c=paint[z[shown]], s=7, linewidths=0)
    axes["series"].set(ylabel="watts", xlim=(time[0] - 1, time[-1] + 1), xticks=[])
    rows = [z.numpy()]
    for name, model in models.items():
        path = model.most_likely(x)[0]
        rows.append(order[name].argsort()[path].numpy())
    right = [f"{100 * (row == z.numpy()).mean():.0f} %" for row in rows[1:]]
    image = np.ones((5, len(time), 4)) * [1, 1, 1, 0]
    for place, row in enumerate(rows):
        image[2 * place] = np.concatenate([paint[row[shown]], np.ones((len(time), 1))], -1)
    axes["strips"].imshow(image, aspect="auto", interpolation="nearest", extent=(time[0], time[-1] + 1, 5, 0))
    labels = ["as they are", *(f"{name} ({share})" for name, share in zip(models, right, strict=True))]
    axes["strips"].set_yticks([0.5, 2.5, 4.5], labels)
    axes["strips"].set(xlabel="minute", xlim=(time[0] - 1, time[-1] + 1))
    axes["strips"].tick_params(length=0)
    axes["strips"].spines[:].set_visible(False)
    days = torch.arange(1, machine.LONGEST + 1)
    for state, name in enumerate(names):
        ax = axes[name]
        stay = models["Markov"].transition_matrix.diagonal()[order["Markov"][state]]
        ax.fill_between(days, truth.duration_probs[state], color=GREY, alpha=0.3, linewidth=0, label="as they are")
        law = models["semi-Markov"].duration_probs[order["semi-Markov"][state]]
        ax.plot(days, law, color=colours[state], label="semi-Markov")
        ax.plot(days, (1 - stay) * stay ** (days - 1), color=colours[state], linestyle="--", lw=1.4, label="Markov")
        ax.set_title(name, color=colours[state])
        ax.set_xlabel("minutes that it lasts")
        ax.set_ylim(bottom=0)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    axes["heating"].legend(handlelength=1.6)
    return plot


@torch.no_grad()
def factor_analysis() -> Any:
    """Loadings as they were and as they are found, turned towards them; scores; and how EM gets there."""
    import matplotlib.pyplot as plt

    abilities = example("abilities")
    x, truth = abilities.read(), abilities.truth()
    options = {"tol": 1e-9, "max_iter": 5000, "accelerate": "squarem"}
    model = fitted(torchem.FactorAnalysis(8, 2), x, **options)
    # Loadings are known up to a rotation: the one nearest to the truth (orthogonal Procrustes).
    u, _, vh = torch.linalg.svd(model.loadings.mT @ truth.loadings)
    found, scores = model.loadings @ (u @ vh), model.transform(x) @ (u @ vh)
    plot, axes = plt.subplots(1, 3, figsize=(8, 3.5), width_ratios=[1.2, 1.15, 0.9], layout="constrained")
    arrows, ax = axes[0], axes[1]
    beside = {"reading": (8.7, 1.9), "vocabulary": (8.5, -0.4), "grammar": (5.6, 2.5), "writing": (3.9, -0.6)}
    beside |= {"geometry": (1.5, 7.75), "puzzles": (4.5, 3.6), "sums": (3.1, 6.5)}
    for name, (a, b), (c, d) in zip(abilities.TESTS, found.tolist(), truth.loadings.tolist(), strict=True):
        colour = BLUE if c > d else GREEN if d > c else ORANGE
        arrows.annotate("", (a, b), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6})
        arrows.plot(c, d, "o", mfc="none", color=GREY, ms=5)
        arrows.text(*beside.get(name, (a + 0.3, b + 0.45)), name, color=colour, fontsize=8.5, va="center")
    arrows.plot([], [], "o", mfc="none", color=GREY, ms=5, label="as they were")
    arrows.legend(loc="upper right", handletextpad=0.2)
    arrows.set(xlabel="words", ylabel="numbers", xlim=(-1.2, 12.5), ylim=(-2, 11.5), title="loadings")
    whole = ~x.isnan().any(-1).numpy()
    for rows, fill, label in ((whole, BLUE, "all tests"), (~whole, "none", "some missing")):
        ax.scatter(*scores.numpy()[rows].T, s=11, facecolors=fill, edgecolors=BLUE, linewidths=0.7, label=label)
    ax.legend(loc="lower right", handletextpad=0.1, borderpad=0.1, fontsize=8.5)
    ax.set(xlabel="words", ylabel="numbers", title="expected scores", ylim=(-3.7, 3.4))
    values = [torchem.criteria(fitted(torchem.FactorAnalysis(8, q), x, **options), x).bic for q in (1, 2, 3, 4)]
    axes[2].plot(range(1, 5), np.array(values) - min(values), "o-", color=BLUE)
    axes[2].set(xlabel="factors", ylabel="BIC above the least", title="how many", xticks=range(1, 5))
    return plot


MODELS: dict[str, Callable[[], Any]] = {"semi-markov": semi_markov, "factor-analysis": factor_analysis}
