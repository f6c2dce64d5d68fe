#!/usr/bin/env python
"""Draw the pictures of docs/modes and docs/models: one for each page, from fits that take seconds.

    python scripts/pictures.py                     # all of them, into docs/images/modes and docs/images/models
    python scripts/pictures.py stochastic counts   # some

Backgrounds are transparent and lines grey, so that pages may be light or dark.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torchem  # noqa: E402
from scripts import pictures_durations, pictures_dynamics, pictures_networks, pictures_sequences  # noqa: E402
from torchem import priors  # noqa: E402

GREY = "#848484"
BLUE, ORANGE, GREEN, VIOLET = "#2f8fd8", "#e8762c", "#2fa37c", "#b565c8"
COLOURS = [BLUE, ORANGE, GREEN, VIOLET, "#c9a227", "#e05780", "#5f6fd0", "#8a6d4f"]
STYLE = {
    "figure.dpi": 130, "savefig.transparent": True, "font.size": 11, "axes.titlesize": 11, "legend.fontsize": 10,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2,
}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def figure(*widths: float, height: float = 3.2, **options: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(
        1, len(widths), figsize=(8, height), width_ratios=widths, layout="constrained", squeeze=False, **options
    )


def ellipses(ax: Any, model: Any, colours: Any = None, **options: Any) -> None:
    """Two standard deviations of each component; the line is as wide as the component is heavy."""
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    means, covariances = model.means.detach().numpy(), model.covariances.detach().numpy()
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        values, vectors = np.linalg.eigh(covariance)
        line = mean[:, None] + 2 * (vectors * np.sqrt(values)) @ circle
        ax.plot(*line, color=(colours or COLOURS)[k % 8], **options)


def blobs(n: int, gap: float = 3.0, seed: int = 0) -> Tensor:
    """Three clusters in the plane."""
    truth = torchem.GaussianMixture(3, 2).double()
    truth.means = gap * torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.3]]).double()
    truth.covariances = torch.tensor([[[1.0, 0.4], [0.4, 0.6]], [[0.8, -0.3], [-0.3, 0.9]], [[1.2, 0.0], [0.0, 0.4]]])
    return truth.sample(n, generator=rng(seed))


def mixture(k: int = 3, d: int = 2, kind: str = "full") -> torchem.GaussianMixture:
    return torchem.GaussianMixture(k, d, kind).double()  # pyright: ignore[reportArgumentType]


def faithful() -> Tensor:
    path = ROOT / "torchem" / "datasets" / "faithful.csv"
    return torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1))


# ---- one picture for each mode ------------------------------------------------------------------------------------


def full_batch() -> Any:
    """Old Faithful from a poor start: ellipses on their way, and the log-likelihood."""
    x = faithful()
    fig, axes = figure(1, 1)
    left, right = axes[0]
    left.plot(*x.T, ".", color=GREY, alpha=0.45, markersize=4)
    model = mixture(2)
    model.means, model.covariances = [[3.2, 60.0], [3.6, 80.0]], x.T.cov().repeat(2, 1, 1)
    shown = {0: (0.5, ":"), 8: (0.7, "--"), 40: (1.0, "-")}
    done = torchem.fit(
        model, x, init=None, max_iter=40, tol=0,
        callbacks=[lambda now: ellipses(left, now.model, alpha=shown[now.iteration][0], ls=shown[now.iteration][1])
                   if now.iteration in shown else None],
    )  # fmt: skip
    left.set(xlabel="eruption, minutes", ylabel="waiting time, minutes", title="dotted: start, dashed: pass 8")
    right.plot(done.history, color=BLUE)
    right.plot([*shown], [done.history[i] for i in shown], "o", color=BLUE)
    right.set(xlabel="pass", title="log-likelihood: it never falls")
    return fig


def stochastic() -> Any:
    """Held-out score after so many observations."""
    x, held = blobs(20_000, 1.6), blobs(5000, 1.6, seed=1)
    truth = mixture()
    torchem.fit(truth, x, seed=0, tol=1e-7, max_iter=1000)
    best = float(truth.log_prob(held).detach().mean())
    start = mixture()
    torchem.fit(start, x[:100], init="random_from_data", max_iter=1, tol=0, seed=4)
    lines: dict[str, tuple[list[float], list[float], str]] = {}
    marks = {round(value) for value in np.geomspace(1, 1600, 60)}
    full, seen, score = copy_of(start), [], []
    torchem.fit(
        full, x, init=None, max_iter=20, tol=0,
        callbacks=[lambda now: (seen.append(now.iteration), score.append(held_out(now.model, held)))[:0]],
    )  # fmt: skip
    lines["full batch"] = seen, score, GREY
    for name, rule, colour in (
        ("ρ = (t + 2)$^{-1}$", torchem.Stochastic(exponent=1.0), GREEN),
        ("ρ = (t + 2)$^{-0.6}$", torchem.Stochastic(exponent=0.6), ORANGE),
        ("ρ = (t + 2)$^{-0.6}$, averaged", torchem.Stochastic(exponent=0.6, average=True), BLUE),
    ):
        model, seen, score = copy_of(start), [], []
        for step, batch in enumerate(x.repeat(8, 1).split(100), 1):
            torchem.partial_fit(model, batch, rule)
            if step in marks:
                shown = copy_of(model)
                if rule.average and (mean := rule.flush()) is not None:
                    shown.m_step(mean)
                seen.append(step / 200)
                score.append(held_out(shown, held))
        lines[name] = seen, score, colour
    fig, axes = figure(1)
    ax = axes[0, 0]
    for name, (seen, score, colour) in lines.items():
        ax.plot(seen, [best - value for value in score], color=colour, label=name)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="passes over the data",
        title="held-out score below the optimum, nats per observation",
    )
    ax.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.legend(loc="lower left")
    return fig


def copy_of(model: Any) -> Any:
    import copy

    return copy.deepcopy(model)


def held_out(model: Any, x: Tensor) -> float:
    return float(model.log_prob(x).detach().mean())


def incremental() -> Any:
    """Distance from the optimum by passes, for ever more batches."""
    x = blobs(4000, 1.2)
    start = mixture()
    torchem.fit(start, x, init="random_from_data", max_iter=1, tol=0, seed=3)
    best = torchem.fit(copy_of(start), x, init=None, accelerate="anderson", tol=0, max_iter=400).bound
    fig, axes = figure(1)
    ax = axes[0, 0]
    for batches, colour in ((1, GREY), (5, GREEN), (20, ORANGE), (100, BLUE)):
        rule = torchem.FullBatch() if batches == 1 else torchem.Incremental()
        done = torchem.fit(
            copy_of(start), x, init=None, accumulate=rule, batch_size=len(x) // batches, tol=0, max_iter=120
        )
        name = "full batch" if batches == 1 else f"{batches} batches"
        ax.plot([max(best - value, 1e-6) for value in done.history[1:]], color=colour, label=name)
    ax.set(yscale="log", ylim=(3e-2, 500), xlabel="pass", title="bound below the optimum, nats")
    ax.legend()
    return fig


def maximum_a_posteriori() -> Any:
    """Eighteen observations, three components: without and with priors."""
    x = blobs(18, 1.6, seed=5)
    fig, axes = figure(1, 1, sharex=True, sharey=True)
    held = blobs(5000, 1.6, seed=6)
    for ax, careful in zip(axes[0], (False, True), strict=True):
        model = mixture()
        if careful:
            model.mixing.prior, model.component.prior = priors.Dirichlet(2.0), priors.NormalInverseWishart()
        torchem.fit(model, x, restarts=20, seed=0, max_iter=500)
        ax.plot(*x.T, "o", color=GREY, markersize=4)
        ellipses(ax, model)
        score = f"{held_out(model, held):.1f}".replace("-", "−")
        ax.set(title=f"{'MAP' if careful else 'maximum likelihood'}: held-out {score}")
    return fig


def variational_parameters() -> Any:
    """Eight components for three clusters."""
    x = blobs(600, 3.0)
    fig, axes = figure(1, 1, 0.9)
    plain, bayes = mixture(8), mixture(8)
    torchem.variational(bayes, mixing=priors.StickBreaking(1.0))
    for ax, model, name in ((axes[0, 0], plain, "maximum likelihood"), (axes[0, 1], bayes, "variational")):
        torchem.fit(model, x, restarts=10, seed=0, max_iter=2000, tol=1e-6)
        ax.plot(*x.T, ".", color=GREY, alpha=0.45, markersize=4)
        alive = model.weights.detach() > 0.01
        shown = mixture(int(alive.sum()))
        shown.means, shown.covariances = model.means.detach()[alive], model.covariances.detach()[alive]
        ellipses(ax, shown)
        ax.set(title=name, xticks=[], yticks=[])
    ax = axes[0, 2]
    for model, shift, colour, name in ((plain, -0.2, GREY, "max. likelihood"), (bayes, 0.2, BLUE, "variational")):
        weights = model.weights.detach().sort(descending=True).values
        ax.bar(torch.arange(1, 9) + shift, weights, 0.4, color=colour, label=name)
    ax.set(xlabel="component", title="weights", xticks=range(1, 9), ylim=(0, 0.5))
    ax.legend()
    return fig


def variational_latents() -> Any:
    """Two hidden chains behind one signal, and what a factorial HMM says of them."""
    truth = torchem.FactorialHMM.gaussian([2, 2], 1).double()
    truth.contributions = [[[-3.0], [3.0]], [[-1.0], [1.0]]]
    for chain, stay in zip(truth.transitions, (0.93, 0.97), strict=True):
        chain.probs = [[stay, 1 - stay], [1 - stay, stay]]
    x, states = truth.sample(20, 100, latents=True, generator=rng(3))
    model = torchem.FactorialHMM.gaussian([2, 2], 1).double()
    torchem.fit(model, x, restarts=6, max_iter=100, seed=0)
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(3, 1, figsize=(8, 4.2), layout="constrained", sharex=True, height_ratios=[2, 1, 1])
    axes[0].plot(x[0, :, 0], ".", color=GREY)
    found = model.posterior(x[:1])
    contributions = [c.detach() for c in model.contributions]
    signal = torch.stack([p[0] @ c for p, c in zip(found, contributions, strict=True)]).sum(0)
    axes[0].plot(signal[:, 0].detach(), color=VIOLET, lw=1.5)
    axes[0].set(title="one sequence, and what both chains together explain")
    # Chains have no names: the one of the larger steps first.
    order = sorted(range(2), key=lambda m: -float((contributions[m][1] - contributions[m][0]).abs()))
    for true, m in enumerate(order):
        up = int(contributions[m][1, 0] > contributions[m][0, 0])
        p = found[m][0, :, up].detach()
        ax = axes[true + 1]
        ax.step(range(100), states[0, :, true], color=GREY, lw=5, alpha=0.35, where="mid")
        ax.step(range(100), p, color=(BLUE, ORANGE)[true], where="mid")
        ax.set(ylim=(-0.15, 1.15), yticks=[0, 1], title=f"chain {true + 1}: q(upper state); wide: the truth")
    axes[-1].set(xlabel="frame")
    return fig


def annealing() -> Any:
    """Where runs from random points end: single, annealed, the best of ten."""
    options: dict[str, Any] = {"init": "random_from_data", "max_iter": 800, "tol": 1e-6, "seed": 0}
    better: dict[str, Any] = options | {"init": "kmeans++"}
    fig, axes = figure(1, 1)
    left, right = axes[0]
    ways = ("one start", "annealed", "k-means++", "best of ten starts")
    for group, (side, k) in enumerate(((5, 5), (3, 9))):
        x = lattice(side, k)
        single = torchem.fit(mixture(k, 2, "spherical"), x, restarts=400, **options)
        cooled = torchem.fit(
            mixture(k, 2, "spherical"), x, restarts=60, anneal=[0.1 * 1.3**i for i in range(9)], **options
        )
        clever = torchem.fit(mixture(k, 2, "spherical"), x, restarts=60, **better)
        ten = [max(single.restarts[i : i + 10]) for i in range(0, 400, 10)]
        ends = (single.restarts, cooled.restarts, clever.restarts, ten)
        best = max(map(max, ends))
        shares = [100 * sum(value > best - 1 for value in values) / len(values) for values in ends]
        places = np.arange(4) + (-0.2 if group == 0 else 0.2)
        label = "five clusters in a row" if group == 0 else "nine on a lattice"
        left.barh(places, shares, 0.4, color=(BLUE, ORANGE)[group], label=label)
        for place, share in zip(places, shares, strict=True):
            left.text(share - 2, place, f"{share:.0f}", color="white", ha="right", va="center", fontsize=9)
        print(label, dict(zip(ways, shares, strict=True)))
        if group == 0:
            for history in single.histories[:10]:
                right.plot(history, color=GREY, lw=1.2)
            right.plot(max(single.histories[:10], key=lambda h: h[-1]), color=BLUE)
    left.set_yticks(range(4), ways)
    left.set(title="runs that find the best optimum, %", xlim=(0, 100))
    left.invert_yaxis()
    left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2)
    right.set(xlim=(0, 40), xlabel="pass", title="ten starts: log-likelihood")
    return fig


def lattice(side: int, k: int) -> Tensor:
    """Round clusters, as many in each row."""
    places = torch.stack([torch.arange(k) % side, torch.arange(k) // side], -1).double()
    noise = torch.stack([torch.randn(60, 2, generator=rng(i)).double() for i in range(k)])
    return (4 * places.unsqueeze(1) + 0.6 * noise).flatten(0, 1)


def acceleration() -> Any:
    """Hasselblad's deaths: distance from the optimum by passes."""
    deaths = torch.arange(10.0).double().unsqueeze(-1)
    days = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1])
    fig, axes = figure(1)
    ax = axes[0, 0]
    methods: list[tuple[Any, str]] = [(None, GREY), ("squarem", ORANGE), ("anderson", BLUE)]
    for method, colour in methods:
        model: Any = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.Poisson(2, 1)).double()
        model.weights, model.component.rates = [0.3, 0.7], [[1.0], [2.5]]
        done = torchem.fit(
            model, deaths, weights=days, init=None, accelerate=method, tol=0, max_iter=2000,
            callbacks=[lambda now: now.objective[0] > -1989.945859 - 1e-6],
        )  # fmt: skip
        gap = [max(-1989.945859 - value, 1e-7) for value in done.history]
        ax.plot(range(1, len(gap) + 1), gap, color=colour, label=f"{method or 'EM'}: {len(gap)}")
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(5e-7, 10),
        xlabel="pass, of those that were kept",
        title="log-likelihood below the optimum, nats",
    )
    ax.legend(loc="lower left")
    return fig


def hard() -> Any:
    """Clusters that overlap, in one dimension: hard assignments cut them."""
    truth = torchem.GaussianMixture(2, 1).double()
    truth.weights, truth.means, truth.covariances = [0.65, 0.35], [[-1.0], [1.0]], [[[1.0]], [[1.0]]]
    x = truth.sample(4000, generator=rng(2))
    at = torch.linspace(-5, 5, 400).double().unsqueeze(-1)
    fig, axes = figure(1, 1, sharey=True)
    for ax, kind, name in zip(axes[0], ("soft", "hard"), ('e_step="soft"', 'e_step="hard"'), strict=True):
        model = torchem.GaussianMixture(2, 1, "tied").double()
        torchem.fit(model, x, e_step=kind, restarts=5, seed=0, max_iter=2000, tol=1e-6)
        ax.hist(x[:, 0].numpy(), 60, density=True, color=GREY, alpha=0.3)
        joint = (model.component.log_prob(model.batch(at)) + model.weights.log()).exp().detach()
        for k, colour in enumerate((BLUE, ORANGE)):
            ax.plot(at, joint[:, k], color=colour)
        ax.plot(at, joint.sum(-1), color=GREY, ls="--", lw=1.5)
        means = ", ".join(f"{value:.2f}".replace("-", "−") for value in sorted(model.means.detach()[:, 0].tolist()))
        ax.set(title=f"{name}: means {means}")
    return fig


def sampled() -> Any:
    """The mean of one component on its way, under EM, draws, and draws with falling steps."""
    x = blobs(1500, 1.2)
    start = mixture()
    torchem.fit(start, x, init="random_from_data", max_iter=1, tol=0, seed=2)
    fig, axes = figure(1, 1)
    left, right = axes[0]
    best = torchem.fit(copy_of(start), x, init=None, accelerate="anderson", tol=0, max_iter=500).bound
    ways: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("draws (SEM)", {"e_step": "sample"}, ORANGE),
        (
            "draws, falling steps (SAEM)",
            {"e_step": "sample", "accumulate": torchem.Stochastic(exponent=0.6), "batch_size": 150},
            BLUE,
        ),
        ("EM", {}, GREY),
    )
    for name, options, colour in ways:
        path: list[float] = []
        done = torchem.fit(
            copy_of(start), x, init=None, max_iter=100, tol=0, seed=1,
            callbacks=[lambda now, path=path: path.append(float(now.model.means[0, 0]))], **options,
        )  # fmt: skip
        left.plot(path, color=colour, label=name, lw=1.5)
        right.plot(done.history, color=colour, lw=1.5)
    left.set(xlabel="pass", title="first mean, first coordinate")
    right.set(xlabel="pass", ylim=(best - 30, best + 3), title="log-likelihood")
    left.legend()
    return fig


class Net(torch.nn.Module):
    """Means of K states by a network of one hidden layer, and their standard deviations."""

    def __init__(self, k: int):
        super().__init__()
        self.mean = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, k))
        self.log_scale = torch.nn.Parameter(torch.zeros(k))

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean(u), self.log_scale.exp()).log_prob(y)


def generalised() -> Any:
    """A chain that changes between two curves, whose means a network learns."""
    torch.manual_seed(0)
    u = torch.linspace(-3, 3, 400).unsqueeze(-1)
    other = torch.arange(400).unsqueeze(-1) // 50 % 2 == 1
    y = torch.where(other, 2 - u.cos(), u.sin()) + 0.1 * torch.randn(400, 1)
    emission = torchem.factors.Neural(Net(2), 2, inputs=True)
    emission = torchem.Gradient(emission, torch.optim.Adam, steps=10, lr=0.02)
    chain = torchem.HMM(torchem.factors.Categorical(2), torchem.factors.Categorical(2, 2), emission)
    done = torchem.fit(chain, y, inputs=u, max_iter=60, tol=0, seed=0)
    states = chain.most_likely(y, inputs=u)[0]
    fig, axes = figure(1.5, 1)
    left, right = axes[0]
    network: Any = emission.factor
    means = network.module.mean(u).detach()
    for k, colour in enumerate((BLUE, ORANGE)):
        mine = states == k
        left.plot(u[mine], y[mine], ".", color=colour, markersize=3, alpha=0.6)
        left.plot(u, means[:, k], color=colour)
    left.set(xlabel="u", title="points by decoded state, lines: the network")
    right.plot(done.history, color=BLUE)
    right.set(xlabel="iteration", title="log-likelihood")
    return fig


def held_out_data() -> Any:
    """Eight components on sixty points: what was learnt from, and what was held out."""
    x = blobs(1000)
    train, other = x[:60], x[60:]
    start, scores = mixture(8), []
    torchem.fit(start, train, init="random_from_data", max_iter=1, tol=0, seed=0)
    done = torchem.fit(
        copy_of(start), train, init=None, max_iter=40, tol=0,
        callbacks=[lambda now: scores.append(held_out(now.model, other))],
    )  # fmt: skip
    stopped = torchem.fit(copy_of(start), train, validation=other, init=None)
    fig, axes = figure(1, height=3.0)
    ax = axes[0][0]
    ax.plot([value / 60 for value in done.history], color=GREY, label="training data")
    ax.plot(scores, color=BLUE, label="held-out data")
    ax.plot(stopped.n_iter, stopped.validation[stopped.n_iter], "o", color=BLUE, label="what validation= returns")
    ax.set(xlabel="pass", ylabel="mean log p(x)", ylim=(min(scores) - 0.1, done.history[-1] / 60 + 0.1))
    ax.legend()
    return fig


def search() -> Any:
    """Nine clusters: where a fit came to rest, and where splitting and merging led it."""
    spots = 6 * torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).repeat(40, 1)
    spots = (spots + torch.randn(360, 2, generator=rng())).double()
    options: dict[str, Any] = {"init": "random_from_data", "max_iter": 300, "tol": 1e-4, "seed": 0}
    alone, moved = mixture(9), mixture(9)
    before = torchem.fit(alone, spots, **options)
    after = torchem.split_merge(moved, spots, **options)
    fig, axes = figure(1, 1, 0.8, height=3.0)
    for ax, model, title in ((axes[0][0], alone, "at rest"), (axes[0][1], moved, "after splits and merges")):
        ax.plot(*spots.T, ".", color=GREY, alpha=0.35, markersize=3)
        ellipses(ax, model)
        ax.set(title=title, xticks=[], yticks=[])
    axes[0][2].plot(after.rounds, "o-", color=BLUE)
    axes[0][2].axhline(before.bound, color=GREY, ls=":")
    axes[0][2].set(xlabel="round", title="log-likelihood", xticks=range(len(after.rounds)))
    return fig


# ---- models ----------------------------------------------------------------------------------------------------------


def dense(model: Any) -> np.ndarray:
    """Covariances [K, D, D] of a mixture of Gaussians, whatever their type."""
    g = model.component
    factor = g.structure.dense(g.scale.detach(), *g.means.shape)
    return (factor @ factor.mT).numpy()


def covered(ax: Any, means: Any, covariances: Any, **options: Any) -> None:
    """Ellipses at two standard deviations."""
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        line = np.asarray(mean)[:, None] + 2 * np.linalg.cholesky(np.asarray(covariance)) @ circle
        ax.plot(*line, **({"color": COLOURS[k]} | options))


def gaussian_shapes() -> Any:
    """Three clusters under the fourteen geometries, with their BIC."""
    import matplotlib.pyplot as plt

    truth = mixture()
    truth.means = [[-4.0, 0.0], [0.5, 3.0], [3.5, -1.5]]
    truth.covariances = [[[0.4, 0.2], [0.2, 1.7]], [[2.9, 1.6], [1.6, 1.7]], [[0.55, -0.4], [-0.4, 0.5]]]
    x = truth.sample(600, generator=rng(4))
    names = ["EII", "VII", "EEI", "VEI", "EVI", "VVI", "EEE", "VEE", "EVE", "VVE", "EEV", "VEV", "EVV", "VVV"]
    same = {"VII": "spherical", "VVI": "diag", "EEE": "tied", "VVV": "full"}
    fitted = {name: mixture(kind=name) for name in names}
    for model in fitted.values():
        torchem.fit(model, x, restarts=4, seed=0, max_iter=500, tol=1e-7)
    scores = {name: torchem.criteria(model, x).bic for name, model in fitted.items()}
    best = min(scores.values())
    fig, axes = plt.subplots(2, 7, figsize=(8, 3.0), layout="constrained", sharex=True, sharey=True)
    for ax, (name, model) in zip(axes.flat, fitted.items(), strict=True):
        ax.plot(*x.T, ".", color=GREY, alpha=0.25, markersize=1.5)
        order = model.means.detach()[:, 0].argsort()
        covered(ax, model.means.detach()[order], dense(model)[order], lw=1.5)
        ax.set(xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_visible(False)
        worse = scores[name] - best
        ax.set_title(f"{name} {same.get(name, '')}", fontsize=9)
        ax.set_xlabel(f"BIC +{worse:.0f}" if worse > 0 else "BIC: the best", fontsize=8.5)
    return fig


def low_rank() -> Any:
    """Curves of forty readings: the held-out score by the rank, and what the loadings are."""
    d = 40
    t = torch.linspace(0, 1, d).double()
    truth = torchem.GaussianMixture(2, d, "low_rank", 3).double()
    waves = torch.stack([(2 * torch.pi * f * t).cos() for f in (1.0, 2.0, 3.0)], -1)
    truth.means = torch.stack([2 * (-((t - 0.3) / 0.1).square()).exp(), 2 * (-((t - 0.65) / 0.12).square()).exp()])
    truth.component.loadings = torch.stack(
        [waves * torch.tensor([0.6, 0.4, 0.2]), waves * torch.tensor([0.2, 0.5, 0.5])]
    )
    truth.component.noise_variances = torch.full((2, d), 0.04)
    x, new = truth.sample(240, generator=rng(0)), truth.sample(4000, generator=rng(1))
    scores, ranks = [], range(1, 9)
    found: Any = None
    for rank in ranks:
        model = torchem.GaussianMixture(2, d, "low_rank", rank).double()
        torchem.fit(model, x, seed=0, max_iter=300, tol=1e-5)
        scores.append(held_out(model, new))
        found = model if rank == 3 else found
    others = {}
    for kind in ("full", "diag"):
        model = mixture(2, d, kind)
        torchem.fit(model, x, seed=0, max_iter=300, tol=1e-5)
        others[kind] = held_out(model, new)
    fig, axes = figure(1.4, 1)
    left, right = axes[0]
    labels = found.most_likely(x)
    for k in range(2):
        left.plot(t, x[labels == k][:8].T, color=COLOURS[k], alpha=0.35, lw=0.8)
        left.plot(t, found.means[k].detach(), color=COLOURS[k], lw=2.5)
    left.set(title="two kinds of curves of forty readings, and their means", xticks=[])
    right.plot(ranks, scores, "o-", color=BLUE, label="low_rank")
    for (kind, score), colour in zip(others.items(), (ORANGE, GREEN), strict=True):
        right.axhline(score, color=colour, ls="--", lw=1.5, label=kind)
    right.set(
        xlabel="rank", title="held-out score, nats a curve", xticks=ranks, ylim=(others["diag"] - 3, max(scores) + 3)
    )
    right.legend()
    return fig


def student_t() -> Any:
    """Two clusters and some outliers: ellipses of both families, and how much each point counts."""
    from torchem.factors import Categorical, StudentT

    truth = mixture(2)
    truth.means, truth.covariances = [[-2.0, 0.0], [2.0, 0.5]], [[[0.5, 0.2], [0.2, 0.4]], [[0.4, -0.2], [-0.2, 0.6]]]
    x = torch.cat([truth.sample(300, generator=rng(1)), 14 * torch.rand(24, 2, generator=rng(2)).double() - 7])
    normal, heavy = mixture(2), torchem.Mixture(Categorical(2), StudentT(2, 2)).double()
    for model in (normal, heavy):
        torchem.fit(model, x, restarts=6, seed=0, max_iter=500, tol=1e-7)
    part: Any = heavy.component
    gap = x.unsqueeze(1) - part.means.detach()
    distance = torch.einsum("nki,kij,nkj->nk", gap, torch.linalg.inv(part.scales.detach()), gap)
    freedom = part.dof.detach()
    scale = ((freedom + 2) / (freedom + distance) * heavy.posterior(x).detach()).sum(-1)
    fig, axes = figure(1, 1, sharex=True, sharey=True, height=3.6)
    left, right = axes[0]
    left.plot(*x.T, ".", color=GREY, alpha=0.5, markersize=4)
    covered(left, normal.means.detach(), normal.covariances.detach())
    left.set(title="Gaussian")
    dots = right.scatter(*x.T, c=scale, s=10, cmap="viridis", vmin=0)
    covered(right, part.means.detach(), part.scales.detach())
    bar = fig.colorbar(dots, ax=right, label="weight E u")
    bar.outline.set_visible(False)
    right.set(title="StudentT: degrees of freedom " + " and ".join(f"{value:.1f}" for value in freedom.tolist()))
    return fig


#: Articles of 915 biochemists (J. S. Long 1990; bioChemists of R's pscl), how often there were so many.
ARTICLES = {0: 275, 1: 246, 2: 178, 3: 84, 4: 67, 5: 27, 6: 17, 7: 12, 8: 1, 9: 2, 10: 1, 11: 1, 12: 2, 16: 1, 19: 1}


def one(factor: Any) -> Any:
    """A mixture of one component: the law itself."""
    return torchem.Mixture(torchem.factors.Categorical(1), factor).double()


def counts() -> Any:
    """Three laws for one column of counts; two groups of rows of three categories."""
    factors = torchem.factors
    x = torch.tensor([float(x) for x, n in ARTICLES.items() for _ in range(n)]).double().unsqueeze(-1)
    every = torch.arange(13.0).double().unsqueeze(-1)
    fig, axes = figure(1.2, 1, height=3.4)
    left, right = axes[0]
    left.bar(every[:, 0], [ARTICLES.get(i, 0) for i in range(13)], color=GREY, alpha=0.35, width=0.9)
    for shift, (name, factor, colour) in enumerate((
        ("Poisson", factors.Poisson(1, 1), ORANGE),
        ("zero-inflated Poisson", factors.ZeroInflated(factors.Poisson(1, 1)), GREEN),
        ("negative binomial", factors.NegativeBinomial(1, 1), BLUE),
    )):  # fmt: skip
        law = one(factor)
        torchem.fit(law, x, seed=0, tol=1e-9, max_iter=1000)
        expected = 915 * law.log_prob(every).exp().detach()
        left.plot(every[:, 0] + 0.2 * (shift - 1), expected, "o", color=colour, markersize=4.5, label=name)
    left.set(xlabel="articles", title="biochemists", yscale="log", ylim=(0.4, 500))
    left.legend()
    truth = factors.Multinomial(2, 3).double()
    truth.probs = [[0.6, 0.25, 0.15], [0.2, 0.3, 0.5]]
    rows = []
    for state in (0, 1):
        for size in range(10, 40):
            truth.size.fill_(size)
            rows.append(truth.sample(torch.full((5,), state), generator=rng(100 * state + size)))
    x = torch.cat(rows)
    model = torchem.Mixture(factors.Categorical(2), factors.Multinomial(2, 3)).double()
    torchem.fit(model, x, seed=0)
    label = model.most_likely(x)

    def place(share: Tensor) -> Tensor:
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]]).double()
        return share @ corners

    ring = place(torch.eye(3).double()[[0, 1, 2, 0]])
    right.plot(*ring.T, color=GREY, lw=1)
    for k in (0, 1):
        right.plot(*place(x / x.sum(-1, keepdim=True))[label == k].T, ".", color=(BLUE, ORANGE)[k], alpha=0.6)
        right.plot(*place(model.component.probs.detach())[k], "P", color=(BLUE, ORANGE)[k], markersize=13, mec="white")
    for corner, name, align in ((ring[0], "first", "right"), (ring[1], "second", "left"), (ring[2], "third", "center")):
        above = 0.03 if name == "third" else -0.03
        right.text(corner[0], corner[1] + above, name, ha=align, va="bottom" if above > 0 else "top")
    right.set(aspect="equal", xlim=(-0.18, 1.22), ylim=(-0.12, 1.0), title="shares of three categories")
    right.axis("off")
    return fig


def positive() -> Any:
    """Two gamma components; survival under one and two exponential ones."""
    factors = torchem.factors
    x = faithful()[:, 1:].double()
    fig, axes = figure(1, 1, height=3.2)
    left, right = axes[0]
    model = torchem.Mixture(factors.Categorical(2), g := factors.Gamma(2, 1)).double()
    torchem.fit(model, x, seed=0, max_iter=2000, tol=1e-7, accelerate="squarem")
    grid = torch.linspace(40, 100, 300).double().unsqueeze(-1)
    left.hist(x[:, 0], bins=30, density=True, color=GREY, alpha=0.35)
    each = (model.weights * g.log_prob(torchem.Batch(grid)).exp()).detach()
    for k, colour in ((0, BLUE), (1, ORANGE)):
        left.fill_between(grid[:, 0], each[:, k], color=colour, alpha=0.25)
        left.plot(grid[:, 0], each[:, k], color=colour)
    left.set(xlabel="minutes between eruptions", yticks=[], title="two gamma components")
    times = torch.empty(400, 1, dtype=torch.float64).exponential_(generator=rng(3))
    times[::4] *= 9.0
    t = torch.linspace(0, 30, 200).double().unsqueeze(-1)
    right.step(times[:, 0].sort().values, torch.arange(400, 0, -1) / 400, color=GREY, where="post", label="data")
    for k, colour in ((1, ORANGE), (2, BLUE)):
        law = torchem.Mixture(factors.Categorical(k), e := factors.Exponential(k, 1)).double()
        torchem.fit(law, times, seed=0, restarts=5, tol=1e-8, max_iter=2000)
        share = ((-t * e.rates[:, 0]).exp() * law.weights).sum(-1).detach()
        right.plot(t[:, 0], share, color=colour, label=f"{k} component{'s' * (k > 1)}")
    right.set(xlabel="time t", title="share that lasts longer than t", yscale="log", ylim=(2e-3, 1.2), xlim=(0, 30))
    right.legend()
    return fig


def censored() -> Any:
    """A detection limit, and counts without zeros: as they are, and told of the limit."""
    factors = torchem.factors
    limit, fig_axes = 0.2, figure(1.2, 1, height=3.2)
    (fig, axes), group = fig_axes, torch.arange(1200) % 2
    left, right = axes[0]
    means, scales = torch.tensor([1.2, 5.0]).double(), torch.tensor([1.2, 1.0]).double()
    truth = means[group] + scales[group] * torch.randn(1200, generator=rng(1), dtype=torch.float64)
    x = truth.clamp(min=limit).unsqueeze(-1)
    grid = torch.linspace(-3.5, 8.5, 400).double().unsqueeze(-1)
    seen = x[x > limit]
    edges = np.arange(limit, 8.5, 0.3)
    left.hist(seen, bins=edges, weights=np.full(len(seen), 1 / (1200 * 0.3)), color=GREY, alpha=0.35)
    share = float((x <= limit).double().mean())
    left.bar(limit - 0.15, share / 0.3, width=0.3, color=GREY, alpha=0.7)
    exact = (torch.distributions.Normal(means, scales).log_prob(grid).exp() / 2).sum(-1)
    left.plot(grid[:, 0], exact, color=GREY, lw=5, alpha=0.5, label="truth")
    naive = mixture(2, 1, "diag")
    torchem.fit(naive, x, seed=0, tol=1e-7, max_iter=500)
    left.plot(grid[:, 0], naive.log_prob(grid).exp().detach(), "--", color=ORANGE, label="as recorded")
    inside = factors.Gaussian(2, 1, "diag")
    model = torchem.Mixture(factors.Categorical(2), factors.Censored(inside, low=limit)).double()
    torchem.fit(model, x, seed=0, tol=1e-8, max_iter=2000)
    model.component = inside
    left.plot(grid[:, 0], model.log_prob(grid).exp().detach(), color=BLUE, label="censored")
    left.axvline(limit, color=GREY, ls=":")
    left.set(title="a detection limit", yticks=[], ylim=(0, 0.6))
    left.legend(loc="upper right")
    drawn = torch.poisson(torch.full((600, 1), 1.6).double(), generator=rng(2))
    x, every = drawn[drawn[:, 0] > 0], torch.arange(9.0).double().unsqueeze(-1)
    right.bar(every[1:, 0], [int((x == i).sum()) for i in range(1, 9)], color=GREY, alpha=0.35, width=0.9)
    right.bar(0, int((drawn == 0).sum()), color="none", edgecolor=GREY, ls=":", width=0.9)
    plain, law = one(factors.Poisson(1, 1)), one(factors.Truncated(inner := factors.Poisson(1, 1), low=1))
    torchem.fit(plain, x, seed=0)
    torchem.fit(law, x, seed=0, tol=1e-9, max_iter=1000)
    rate = float(inner.rates.detach())
    law.component, total = inner, len(x) / (1 - np.exp(-rate))
    for model, size, colour, name in ((plain, len(x), ORANGE, "as recorded"), (law, total, BLUE, "truncated")):
        expected = size * model.log_prob(every).exp().detach()
        right.plot(every[:, 0], expected, "o--" if colour == ORANGE else "o-", color=colour, lw=1.2, label=name)
    right.set(title="counts without zeros", xlabel="count", yticks=[])
    right.legend()
    return fig


def directions() -> Any:
    """Three clusters on the sphere, seen from above, and turning angles with what was found."""
    from torchem.factors import Categorical, VonMises, VonMisesFisher

    truth: Any = VonMisesFisher(3, 3).double()
    truth.directions, truth.concentrations = [[0.5, 0.1, 1.0], [-0.6, 0.5, 0.8], [0.0, -0.8, 0.7]], [60.0, 15.0, 30.0]
    x = truth.sample(torch.arange(600) % 3, generator=rng())
    model: Any = torchem.Mixture(Categorical(3), VonMisesFisher(3, 3)).double()
    torchem.fit(model, x, restarts=4, seed=0)
    fig, axes = figure(1, 1.3, height=3.4)
    left, right = axes[0]
    labels = model.most_likely(x)
    angle = torch.linspace(0, 2 * torch.pi, 200).double()
    left.plot(angle.cos(), angle.sin(), color=GREY, lw=1)
    for k in range(3):
        mean, kappa = model.component.directions.detach()[k], float(model.component.concentrations.detach()[k])
        mine = x[(labels == k) & (x[:, 2] > 0)]
        left.plot(mine[:, 0], mine[:, 1], ".", color=COLOURS[k], markersize=3, alpha=0.6)
        # Where the density has fallen by exp(−2), as at two standard deviations of a Gaussian.
        height = 1 - 2 / kappa
        one = torch.linalg.cross(mean, torch.tensor([1.0, 0.0, 0.0]).double())
        one = one / one.norm()
        two = torch.linalg.cross(mean, one)
        ring = height * mean.unsqueeze(-1) + (1 - height**2) ** 0.5 * (
            one.unsqueeze(-1) * angle.cos() + two.unsqueeze(-1) * angle.sin()
        )
        left.plot(ring[0], ring[1], color=COLOURS[k])
    left.set(aspect="equal", xticks=[], yticks=[], title="directions in space, from above")
    left.axis("off")
    turns: Any = VonMises(2, 1).double()
    turns.means, turns.concentrations = [[0.0], [3.0]], [[6.0], [1.5]]
    y = turns.sample((torch.arange(1500) % 3 == 0).long(), generator=rng(1))
    found: Any = torchem.Mixture(Categorical(2), VonMises(2, 1)).double()
    torchem.fit(found, y, restarts=5, seed=0, tol=1e-7, max_iter=500)
    at = torch.linspace(-torch.pi, torch.pi, 400).double().unsqueeze(-1)
    right.hist(y[:, 0].numpy(), 60, density=True, color=GREY, alpha=0.3)
    joint = (found.component.log_prob(found.batch(at)) + found.weights.log()).exp().detach()
    for k, colour in enumerate((BLUE, ORANGE)):
        right.plot(at, joint[:, k], color=colour)
    right.plot(at, joint.sum(-1), color=GREY, ls="--", lw=1.5)
    right.set_xticks([-torch.pi, -torch.pi / 2, 0, torch.pi / 2, torch.pi], ["−π", "−π/2", "0", "π/2", "π"])
    right.set(title="turning angles: the ends meet", yticks=[])
    return fig


def script(path: str) -> Any:
    """A file of examples as a module."""
    import runpy

    return runpy.run_path(str(ROOT / "examples" / path), run_name="example")


def latent_classes() -> Any:
    """Answers by class, and the criterion by the number of classes."""
    from torchem.factors import Categorical, Categoricals

    example = script("answers.py")
    x, questions = example["generate"](), example["QUESTIONS"]
    scores, found = {}, None
    for k in range(1, 6):
        model: Any = torchem.Mixture(Categorical(k), Categoricals(k, [len(a) for a in questions.values()])).double()
        torchem.fit(model, x, restarts=20, max_iter=2000, tol=1e-7, seed=0)
        scores[k] = torchem.criteria(model, x).bic
        found = model if k == 3 else found
    assert found is not None
    fig, axes = figure(3.2, 1, height=3.4)
    left, right = axes[0]
    order = found.weights.detach().argsort(descending=True).tolist()
    for row, k in enumerate(order):
        place = 0.0
        for table in found.component.tables:
            p = table[k].detach()
            left.bar(place + np.arange(len(p)), 0.8 * p, 0.8, bottom=-row, color=COLOURS[row])
            left.plot([place - 0.5, place + len(p) - 0.5], [-row, -row], color=GREY, lw=0.8)
            place += len(p) + 0.8
    middles, place = [], 0.0
    for answers in questions.values():
        middles.append(place + (len(answers) - 1) / 2)
        place += len(answers) + 0.8
    left.set_xticks(middles, [f"{q}\n{a[0]} …\n{a[-1]}" for q, a in questions.items()], fontsize=9)
    left.set_yticks([0.3 - row for row in range(3)], [f"{found.weights[k].item():.0%}" for k in order])
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    left.set(title="probabilities of the answers, by class and its share")
    right.plot([*scores], [*scores.values()], "o-", color=BLUE)
    right.set(xlabel="classes", title="BIC: lower is better", xticks=[*scores])
    return fig


def labels() -> Any:
    """Errors of a mixture on new points, by how many of 300 have a label."""
    truth = torchem.GaussianMixture(3, 2).double()
    truth.means = [[-1.4, 0.0], [1.4, 0.0], [0.0, 1.8]]
    test, right = truth.sample(5000, latents=True, generator=rng(999))
    counts = [9, 18, 36, 72, 150, 300]
    lines: dict[str, list[float]] = {"with all the others, unlabelled": [], "labelled points alone": []}
    for n in counts:
        for name, values in lines.items():
            wrong = []
            for seed in range(25):
                x, z = truth.sample(300, latents=True, generator=rng(seed))
                # Three points of each kind come first, so that all have a name.
                first = torch.cat([(z == k).nonzero()[:3, 0] for k in range(3)])
                order = torch.cat([first, torch.tensor([i for i in range(300) if i not in first.tolist()])])
                known = torch.where(torch.arange(300) < n, z[order], -1)
                rows = slice(0, n if name == "labelled points alone" else 300)
                model = mixture()
                torchem.fit(model, x[order][rows], labels=known[rows], seed=seed, max_iter=300, tol=1e-5)
                wrong.append(float((model.most_likely(test) != right).double().mean()))
            values.append(100 * float(np.mean(wrong)))
    fig, axes = figure(1, height=3.0)
    ax = axes[0, 0]
    for (name, values), colour in zip(lines.items(), (BLUE, ORANGE), strict=True):
        ax.plot(range(len(counts)), values, "o-", color=colour, label=name)
    ax.axhline(
        100 * float((truth.most_likely(test) != right).double().mean()), color=GREY, ls=":", label="the truth itself"
    )
    ax.set_xticks(range(len(counts)), [str(n) for n in counts])
    ax.set(xlabel="points with a label", title="errors on new points, %")
    ax.legend()
    return fig


def outliers() -> Any:
    """Three clusters and points anywhere: Gaussians, Student's t, and a component of noise."""
    from torchem.factors import Categorical, Gaussian, Stacked, StudentT, Uniform

    x = script("outliers.py")["generate"]()[0]
    models: dict[str, Any] = {
        "Gaussians": torchem.GaussianMixture(3, 2).double(),
        "Student’s t": torchem.Mixture(Categorical(3), StudentT(3, 2)).double(),
        "Gaussians and noise": torchem.Mixture(Categorical(4), Stacked([Gaussian(3, 2), Uniform(1, 2)])).double(),
    }
    fig, axes = figure(1, 1, 1, height=3.1, sharex=True, sharey=True)
    for ax, (name, model) in zip(axes[0], models.items(), strict=True):
        torchem.fit(model, x, restarts=20, seed=0, tol=1e-7, max_iter=1000)
        normal = model.component
        normal = getattr(normal, "normal", normal)
        normal = normal.factors[0] if hasattr(normal, "factors") else normal
        found = model.most_likely(x)
        for k in range(4):
            mine = found == k
            ax.plot(*x[mine].T, ".", color=COLOURS[k] if k < 3 else GREY, markersize=4, alpha=0.7)
        ellipses(ax, normal)
        ax.set(title=f"{name}\nBIC {torchem.criteria(model, x).bic:.0f}", xticks=[], yticks=[])
    return fig


def your_own() -> Any:
    """A family of one file, and a law of torch, on the same counts."""
    from torchem.factors import Categorical, FromDistribution, Poisson

    geometric = script("geometric.py")["Geometric"]
    truth: Any = torchem.Mixture(Categorical(2), geometric(2, 1)).double()
    truth.weights = [0.5, 0.5]
    truth.component.logits.data = torch.tensor([[1.5], [-2.2]], dtype=torch.float64)
    x = truth.sample(3000, generator=rng(2))
    families: dict[str, Any] = {
        "Geometric, one file": geometric(2, 1),
        "NegativeBinomial, from torch": torchem.Gradient(
            FromDistribution(torch.distributions.NegativeBinomial, 2, 1), torch.optim.Adam, steps=10, lr=0.05
        ),
        "Poisson, torchem’s own": Poisson(2, 1),
    }
    fig, axes = figure(1, height=3.0)
    ax = axes[0, 0]
    at = torch.arange(40.0).double().unsqueeze(-1)
    ax.hist(x[:, 0].numpy(), np.arange(41) - 0.5, density=True, color=GREY, alpha=0.3)
    for (name, family), colour in zip(families.items(), (BLUE, GREEN, ORANGE), strict=True):
        model = torchem.Mixture(Categorical(2), family).double()
        torchem.fit(model, x, restarts=3, seed=0, max_iter=100, tol=1e-6)
        score = f"{held_out(model, x):.3f}".replace("-", "−")
        ax.plot(at, model.log_prob(at).exp().detach(), color=colour, label=f"{name}: {score} nats an observation")
    ax.set(xlim=(-0.5, 39.5), ylim=(1e-4, 1), yscale="log", title="failures before a success, two kinds: shares")
    ax.legend()
    return fig


def missing() -> Any:
    """Ozone in New York, filled in with its uncertainty; and its law given the weather of single days."""
    path = ROOT / "torchem" / "datasets" / "airquality.csv"
    x = torch.from_numpy(np.genfromtxt(path, delimiter=",", skip_header=1))
    model = mixture(2, 4)
    torchem.fit(model, x, restarts=10, tol=1e-8, max_iter=1000, seed=0)
    filled, variance = model.impute(x, variance=True)
    gap = x[:, 0].isnan()
    fig, axes = figure(1.2, 1)
    left, right = axes[0]
    left.plot(filled[~gap, 3], filled[~gap, 0], ".", color=GREY, alpha=0.55, markersize=6, label="observed")
    left.errorbar(
        filled[gap, 3], filled[gap, 0], variance[gap, 0].sqrt(), fmt="o", color=BLUE, markersize=4, lw=1,
        markerfacecolor="none", label="filled in, ± sd",
    )  # fmt: skip
    left.set(xlabel="temperature, °F", title="ozone, ppb")
    left.legend(loc="upper left")
    grid = torch.linspace(-30, 170, 400, dtype=torch.float64)
    days = torch.tensor([[250.0, 7.0, 90.0], [190.0, 10.0, 78.0], [150.0, 13.0, 62.0]]).double()
    law = model.condition(days, columns=[1, 2, 3])
    density = law.log_prob(grid[:, None, None].expand(-1, 3, 1)).exp().detach()
    names = ("90 °F, 7 mph", "78 °F, 10 mph", "62 °F, 13 mph")
    for curve, mean, name, colour in zip(density.T, law.mean[:, 0].detach(), names, (ORANGE, GREEN, BLUE), strict=True):
        right.fill_between(grid, curve, color=colour, alpha=0.15)
        right.plot(grid, curve, color=colour, label=name)
        right.plot([mean] * 2, [0, float(curve.max())], ":", color=colour, lw=1)
    right.set(
        xlabel="ozone, ppb", title="density given the weather of a day", yticks=[], ylim=(0, None), xlim=(-30, 170)
    )
    right.legend()
    return fig


def lines_of(ax: Any, model: Any, u: Tensor, x: Tensor, span: Tensor, rows: Tensor, top: float = 0.9) -> None:
    """Data in the colours of their components, what each predicts, and the band of all together."""
    with torch.no_grad():
        law = model.predict(rows)
        low, high = law.quantile([(1 - top) / 2, (1 + top) / 2])[..., 0].numpy()
        parts, weights, mean = law.component_means[..., 0].numpy(), law.weights.numpy(), law.mean[:, 0].numpy()
        label = model.most_likely(model.batch(x, inputs=u)).numpy()
    ax.fill_between(span, low, high, color=GREY, alpha=0.2, linewidth=0)
    at = u[:, -1].numpy()
    ax.scatter(at, x[:, 0], c=[COLOURS[k] for k in label], s=11, linewidths=0, alpha=0.75)
    for k in range(parts.shape[1]):
        shade = [mpl.colors.to_rgba(COLOURS[k], float(w)) for w in weights[:, k]]
        ax.scatter(span, parts[:, k], c=shade, s=3, linewidths=0)
    if weights.shape[0] and float(np.ptp(weights, axis=0).max()) > 0.01:
        ax.plot(span, mean, color=GREY, linewidth=1.6)


def with_ones(v: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(v), v], -1)


def regressions() -> Any:
    """Two crossing lines with a slope that they share or not."""
    v = 4 * torch.rand(300, generator=rng(1), dtype=torch.float64)
    first = torch.rand(300, generator=rng(2)) < 0.6
    noise = 0.35 * torch.randn(300, generator=rng(3), dtype=torch.float64)
    fig, axes = figure(1, 1)
    span = torch.linspace(0, 4, 300, dtype=torch.float64)
    cases = [((), torch.where(first, 0.5 + 1.0 * v, 3.5 - 0.8 * v), "each its own slope"),
             ([1], torch.where(first, 0.5 + 0.7 * v, 2.5 + 0.7 * v), "a slope in common")]  # fmt: skip
    for ax, (shared, x, title) in zip(axes[0], cases, strict=True):
        model = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.LinearGaussian(2, 2, 1, shared=shared))
        u, x = with_ones(v), (x + noise).unsqueeze(-1)
        torchem.fit(model.double(), x, inputs=u, restarts=10, seed=0, max_iter=500, progress=False)
        lines_of(ax, model, u, x, span, with_ones(span))
        ax.set(title=title, xlabel="u", ylabel="x")
    return fig


def experts() -> Any:
    """The motorcycle: what the gate says, and the band."""
    path = ROOT / "torchem" / "datasets" / "mcycle.csv"
    t, x = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)).split(1, -1)
    model = torchem.Mixture(torchem.factors.SoftmaxRegression(4, 2), torchem.factors.LinearGaussian(4, 2, 1)).double()
    u = with_ones(t[:, 0])
    torchem.fit(model, x, inputs=u, restarts=20, seed=0, max_iter=800, tol=1e-5, accelerate="squarem", progress=False)
    import matplotlib.pyplot as plt

    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), height_ratios=[3, 1], layout="constrained", sharex=True)
    span = torch.linspace(2.4, 57.6, 600, dtype=torch.float64)
    lines_of(top, model, u, x, span, with_ones(span))
    top.set(ylabel="acceleration (g)", ylim=(-150, 95))
    with torch.no_grad():
        gate = model.predict(with_ones(span)).weights.numpy()
    for k in range(4):
        bottom.plot(span, gate[:, k], color=COLOURS[k])
    bottom.set(xlabel="time after the impact (ms)", ylabel="gate", ylim=(0, 1.03))
    return fig


def generalized() -> Any:
    """Counts by two log-linear rates, and shares of successes by two logistic curves."""
    v = 4 * torch.rand(400, generator=rng(1), dtype=torch.float64) - 2
    first, u = torch.rand(400, generator=rng(2)) < 0.5, with_ones(v)
    counts = torch.poisson(torch.where(first, (1 + 0.9 * v).exp(), (2.2 - 0.5 * v).exp()), generator=rng(3))
    odds = torch.where(first, -1 + 2.0 * v, 1 - 1.5 * v).sigmoid()
    trials = torch.full((400,), 20.0, dtype=torch.float64)
    successes = torch.binomial(trials, odds, generator=rng(4))
    fig, axes = figure(1, 1)
    span = torch.linspace(-2, 2, 400, dtype=torch.float64)
    for ax, family, x, n, title in (
        (axes[0, 0], torchem.factors.PoissonRegression(2, 2), counts, None, "counts"),
        (axes[0, 1], torchem.factors.BinomialRegression(2, 2), successes, trials, "successes of 20"),
    ):
        model = torchem.Mixture(torchem.factors.Categorical(2), family).double()
        torchem.fit(model, x.unsqueeze(-1), inputs=u, trials=n, restarts=5, seed=0, max_iter=300, progress=False)
        with torch.no_grad():
            law = model.predict(with_ones(span), trials=n)
            label = model.most_likely(model.batch(x.unsqueeze(-1), inputs=u, trials=n))
            low, high = law.quantile([0.05, 0.95])[..., 0].numpy()
            means = law.component_means[..., 0].numpy()
        ax.fill_between(span, low, high, color=GREY, alpha=0.2, linewidth=0, step="mid")
        jitter = 0.3 * (torch.rand(400, generator=rng(5)) - 0.5)
        ax.scatter(v, x + jitter, c=[COLOURS[k] for k in label.tolist()], s=9, linewidths=0, alpha=0.7)
        for k in range(2):
            ax.plot(span, means[:, k], color=COLOURS[k])
        ax.set(title=title, xlabel="u")
    return fig


#: Pictures of docs/modes.
MODES: dict[str, Callable[[], Any]] = {
    "full-batch": full_batch,
    "stochastic": stochastic,
    "incremental": incremental,
    "map": maximum_a_posteriori,
    "variational-parameters": variational_parameters,
    "variational-latents": variational_latents,
    "generalised": generalised,
    "held-out": held_out_data,
    "annealing": annealing,
    "search": search,
    "acceleration": acceleration,
    "hard": hard,
    "sampled": sampled,
}
#: Those of docs/models.
MODELS: dict[str, Callable[[], Any]] = {
    "gaussian": gaussian_shapes,
    "low-rank": low_rank,
    "student-t": student_t,
    "counts": counts,
    "positive": positive,
    "censored": censored,
    "directions": directions,
    "latent-classes": latent_classes,
    "labels": labels,
    "outliers": outliers,
    "your-own": your_own,
    "missing": missing,
    "regressions": regressions,
    "experts": experts,
    "glm": generalized,
    **pictures_durations.MODELS,
    **pictures_dynamics.MODELS,
    **pictures_networks.MODELS,
    **pictures_sequences.MODELS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = MODES | MODELS
    parser.add_argument("names", nargs="*", help=", ".join(every))
    options = parser.parse_args()
    unknown = set(options.names) - set(every)
    if unknown:
        parser.error(f"expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    mpl.use("Agg")
    warnings.filterwarnings("ignore")
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        for name in options.names or every:
            folder = ROOT / "docs" / "images" / ("models" if name in MODELS else "modes")
            folder.mkdir(parents=True, exist_ok=True)
            fig = every[name]()
            # No version and no date: the same picture is the same file.
            fig.savefig(folder / f"{name}.png", metadata={"Software": None})
            print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
