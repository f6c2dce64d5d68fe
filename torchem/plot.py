"""Pictures of fitted models: clusters, the rise of the bound, segmented images. Needs the extra ``plot``."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchem.batch import as_tensor
from torchem.errors import invalid, require
from torchem.images import mean_colours
from torchem.model import LatentModel

#: Colours that colour-blind readers tell apart, the most distinct first. Source: M. Okabe, K. Ito (2008).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F", "#595959")

#: Observations drawn at most; more hide each other.
_DRAWN = 20_000
_INK, _FAINT = "#1a1a1a", "#8a8a8a"


def palette(n: int) -> np.ndarray:
    """RGB colours ``[n, 3]`` of n components, in [0, 1].

    Example:
        >>> palette(3).shape
        (3, 3)
    """
    colours: Any = require("matplotlib.colors", "plot")
    named = [colours.to_rgb(colour) for colour in PALETTE[:n]]
    # Beyond the named ones no set is distinct for all; evenly spaced hues at least stay apart.
    extra = max(0, n - len(PALETTE))
    named += [
        colours.hsv_to_rgb((i / max(1, extra), 0.55 + 0.25 * (i % 2), 0.85 - 0.25 * (i % 3) / 2)) for i in range(extra)
    ]
    return np.array(named).reshape(n, 3)


def clusters(model: LatentModel, x: Any, columns: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draw data in the colours of their components, blended by posterior probability, with 1σ and 2σ ellipses.

    One column becomes a histogram under the density. More than two are projected onto the plane in which the
    components lie furthest apart relative to the spread of the data; see `pairs` for all columns against each other.

    Args:
        model: A mixture.
        x: ``[N, D]`` observations.
        columns: Names of the columns.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Source: R. A. Fisher (1936), for the plane.

    Example:
        >>> import matplotlib, torchem
        >>> matplotlib.use("Agg")
        >>> model = torchem.GaussianMixture(2, 2)
        >>> clusters(model, torch.randn(50, 2), ["width", "height"]).get_xlabel()
        'width'
    """
    data, names = _data(model, x, columns)
    ax = _axes(ax)
    if data.shape[1] == 1:
        return _histogram(model, data, names[0], ax)
    if data.shape[1] == 2:
        basis = np.eye(2)
    else:
        basis = _plane(model, data)
        names = ["first discriminant", "second discriminant"]
    _scatter(model, data, basis, ax)
    ax.set(xlabel=names[0], ylabel=names[1])
    _legend(model, ax)
    return ax


def pairs(model: LatentModel, x: Any, columns: Sequence[str] | None = None) -> Any:
    """Draw every column against every other, below a diagonal of histograms.

    Args:
        model: A mixture.
        x: ``[N, D]`` observations, 2 ≤ D ≤ 8.
        columns: Names of the columns.

    Returns:
        Axes ``[D, D]``; those above the diagonal are hidden.

    Raises:
        InvalidArgument: For one column or more than eight.
    """
    data, names = _data(model, x, columns)
    d = data.shape[1]
    if not 2 <= d <= 8:
        raise invalid("x", "2 to 8 columns", d, "use clusters")
    pyplot: Any = require("matplotlib.pyplot", "plot")
    size = (1.2 + 2.1 * d, 0.8 + 2.0 * d)
    axes = pyplot.subplots(d, d, figsize=size, squeeze=False, layout="constrained")[1]
    for row in range(d):
        for column in range(d):
            ax = axes[row, column]
            if column > row:
                ax.set_axis_off()
                continue
            _style(ax)
            if column == row:
                _histogram(model, data, "", ax, which=row, legend=False)
                ax.set_ylabel("")
                ax.set_yticks([])
            else:
                _scatter(model, data, np.eye(d)[:, [column, row]], ax)
                ax.sharex(axes[column, column])
            ax.set_xlabel(names[column] if row == d - 1 else "")
            ax.set_ylabel(names[row] if column == 0 and row else "")
            ax.tick_params(labelbottom=row == d - 1, labelleft=column == 0 and row > 0)
    _legend(model, axes[0, -1], loc="upper right")
    return axes


def bound(result: Any, ax: Any = None) -> Any:
    """Draw how the objective rose in each restart, the best one in colour.

    Args:
        result: A `torchem.Result`, one history, or a list of histories.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Raises:
        InvalidArgument: If there is nothing to draw.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> bound([-20.0, -12.0, -11.5]).get_ylabel()
        'objective (nats)'
    """
    histories = _histories(result)
    ends = [next((v for v in reversed(h) if math.isfinite(v)), -math.inf) for h in histories]
    if not any(math.isfinite(end) for end in ends):
        raise invalid("result", "a history of finite numbers", "none", "pass what torchem.fit returned")
    best = getattr(result, "history", None)
    chosen = max(range(len(ends)), key=lambda r: (histories[r] == best, ends[r], -r))
    ax = _axes(ax)
    for r, history in enumerate(histories):
        if r != chosen:
            ax.plot(range(len(history)), history, color=_FAINT, linewidth=0.9, alpha=0.7, zorder=2)
    history = histories[chosen]
    label = "best restart" if len(histories) > 1 else None
    ax.plot(range(len(history)), history, color=PALETTE[0], linewidth=2.0, label=label, zorder=4)
    ax.plot(len(history) - 1, history[-1], "o", color=PALETTE[0], markersize=5, zorder=5)
    note = f"{ends[chosen]:.2f}".replace("-", "−")
    ax.annotate(
        note, (len(history) - 1, ends[chosen]), xytext=(0, 6), textcoords="offset points", ha="right", color=PALETTE[0]
    )
    if len(histories) > 1:
        others = "the other restart" if len(histories) == 2 else f"{len(histories) - 1} other restarts"
        ax.plot([], [], color=_FAINT, linewidth=0.9, label=others)
        ax.legend(frameon=False, loc="lower right")
    ax.set(xlabel="iteration", ylabel="objective (nats)")
    ax.margins(x=0.03, y=0.12)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.ticklabel_format(axis="y", useOffset=False, style="plain")
    return ax


def segmentation(image: Any, labels: Any, colours: Any = None, ax: Any = None) -> Any:
    """Draw an image beside its segments, each in its component's colour, over a bar of the components' shares.

    Args:
        image: ``[H, W, 3]`` RGB in [0, 1] or 0 … 255.
        labels: ``[H, W]`` component of each pixel.
        colours: ``[K, 3]`` RGB of each component, in [0, 1]; the mean colour of its pixels when None.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Raises:
        InvalidArgument: If the shapes disagree.
    """
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise invalid("image", "shape [H, W, 3]", list(picture.shape), "convert it to RGB")
    picture = picture / 255.0 if picture.dtype.kind in "iu" else picture
    index = as_tensor(labels, "labels").cpu().numpy()
    if index.shape != picture.shape[:2]:
        raise invalid("labels", f"shape {list(picture.shape[:2])}", list(index.shape), "give one label per pixel")
    paint = mean_colours(picture, index) if colours is None else np.asarray(colours, dtype=float)
    if paint.ndim != 2 or paint.shape[1] != 3 or len(paint) <= index.max():
        raise invalid("colours", f"shape [{index.max() + 1}, 3]", list(paint.shape), "give one colour per component")
    height, width = index.shape
    gap = max(2, width // 60)
    sheet = np.ones((height, 2 * width + gap, 3))
    sheet[:, :width] = picture
    sheet[:, width + gap :] = paint.clip(0, 1)[index]
    if ax is None:
        figure = _figure(9.0, 9.0 * height / sheet.shape[1] + 0.75)
        ax = figure.add_axes((0.01, 0.1, 0.98, 0.82))
    ax.imshow(sheet, interpolation="antialiased")
    ax.set_axis_off()
    for centre, title in ((width / 2, "image"), (width * 1.5 + gap, f"{len(paint)} components")):
        ax.annotate(title, (centre, 0), xytext=(0, 5), textcoords="offset points", ha="center", color=_INK)
    _shares(ax, np.bincount(index.ravel(), minlength=len(paint)) / index.size, paint, (width + gap, height, width))
    return ax


# ---- pieces -------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    pyplot: Any = require("matplotlib.pyplot", "plot")
    return pyplot.figure(figsize=(width, height))


def _axes(ax: Any) -> Any:
    if ax is None:
        pyplot: Any = require("matplotlib.pyplot", "plot")
        ax = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")[1]
    return _style(ax)


def _style(ax: Any) -> Any:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_FAINT)
    ax.tick_params(color=_FAINT)
    ax.set_axisbelow(True)
    return ax


def _data(model: LatentModel, x: Any, columns: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    data = as_tensor(x, "x").detach().cpu().to(torch.float64).numpy()
    data = data[:, None] if data.ndim == 1 else data
    if data.ndim != 2 or not data.size:
        raise invalid("x", "a table [N, D]", f"shape {list(data.shape)}", "pass the observations")
    names = [f"$x_{{{i}}}$" for i in range(data.shape[1])] if columns is None else list(columns)
    if len(names) != data.shape[1]:
        raise invalid("columns", f"{data.shape[1]} names", len(names), "name each column")
    if len(data) > _DRAWN:
        data = data[np.random.default_rng(0).choice(len(data), _DRAWN, replace=False)]
    return data, names


@torch.no_grad()
def _posterior(model: LatentModel, data: np.ndarray) -> np.ndarray:
    return model.posterior(torch.from_numpy(data)).cpu().double().numpy()


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().double().numpy()


def _weights(model: Any) -> np.ndarray | None:
    """Mixing weights ``[K]``; None for a gate, whose weights depend on covariates."""
    probs = getattr(getattr(model, "mixing", None), "probs", None)
    return None if probs is None or probs.dim() != 1 else _array(probs)


def _gaussians(model: Any, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Weights ``[K]``, means ``[K, D]`` and dense covariances ``[K, D, D]`` of a mixture that has them."""
    component: Any = getattr(model, "component", None)
    weights = _weights(model)
    if weights is None or not (hasattr(component, "means") and hasattr(component, "covariances")):
        return None
    means, covariances = _array(component.means), _array(component.covariances)
    k = len(means)
    if covariances.shape == (k, d, d):
        dense = covariances
    elif covariances.shape == (d, d) and component.covariance_type == "tied":
        dense = np.broadcast_to(covariances, (k, d, d))
    else:
        dense = covariances.reshape(k, -1, 1) * np.eye(d)
    return weights, means, dense


def _plane(model: LatentModel, data: np.ndarray) -> np.ndarray:
    """``[D, 2]``: the plane that separates the components best; the principal plane when they do not span one."""
    posterior = _posterior(model, data)
    spread = data.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    z = (data - data.mean(0)) / spread
    mass = posterior.sum(0)
    means = (posterior.T @ z) / np.maximum(mass, 1e-12)[:, None]
    between = (means * (mass / len(z))[:, None]).T @ means
    total = z.T @ z / len(z) + 1e-9 * np.eye(z.shape[1])
    values, vectors = np.linalg.eigh(total)
    whiten = vectors / np.sqrt(values)
    # What separation leaves open (two components span a line only), principal axes decide.
    criterion = whiten.T @ between @ whiten + 1e-6 * np.diag(values / values.max())
    basis = (whiten @ np.linalg.eigh(criterion)[1][:, ::-1][:, :2]) / spread[:, None]
    return basis * np.sign(basis[np.abs(basis).argmax(0), [0, 1]])


def _scatter(model: LatentModel, data: np.ndarray, basis: np.ndarray, ax: Any) -> None:
    """Data and ellipses, seen along a linear basis ``[D, 2]``."""
    posterior = _posterior(model, data)
    colours = palette(posterior.shape[1])
    points = data @ basis
    size = float(np.clip(450 / np.sqrt(len(points)), 2, 26))
    blend = (posterior @ colours).clip(0, 1)
    ax.scatter(*points.T, c=blend, s=size, alpha=0.75, linewidths=0, zorder=2, rasterized=len(points) > 2000)
    found = _gaussians(model, data.shape[1])
    if found is None:
        return
    limits = ax.axis()
    for mean, covariance, colour in zip(found[1] @ basis, basis.T @ found[2] @ basis, colours, strict=True):
        for sigmas, width in ((1, 1.8), (2, 1.0)):
            ax.plot(*_ellipse(mean, covariance, sigmas).T, color=colour * 0.75, linewidth=width, zorder=3)
        ax.plot(*mean, "o", color="white", markeredgecolor=colour * 0.6, markeredgewidth=1.6, markersize=6.5, zorder=4)
    ax.axis(_united(limits, ax.axis()))


def _united(data: tuple[float, ...], drawn: tuple[float, ...]) -> tuple[float, ...]:
    """Limits that hold the data and, as far as that does not shrink them, the ellipses."""
    out = []
    for low, high, least, most in ((*data[:2], *drawn[:2]), (*data[2:], *drawn[2:])):
        slack = 0.25 * (high - low)
        out += [max(min(low, least), low - slack), min(max(high, most), high + slack)]
    return tuple(out)


def _ellipse(mean: np.ndarray, covariance: np.ndarray, sigmas: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    angle = np.linspace(0, 2 * np.pi, 181)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    return mean + sigmas * ((vectors * np.sqrt(values.clip(min=0))) @ circle).T


def _legend(model: LatentModel, ax: Any, **options: Any) -> None:
    weights = _weights(model)
    if weights is None or len(weights) > 12:
        return
    lines: Any = require("matplotlib.lines", "plot")
    handles = [
        lines.Line2D([], [], linestyle="", marker="o", markersize=7, color=colour, label=f"{k}  ({weight:.0%})")
        for k, (weight, colour) in enumerate(zip(weights, palette(len(weights)), strict=True))
    ]
    # Points may lie below: the legend stays readable over them.
    ax.legend(handles=handles, title="component", framealpha=0.85, edgecolor="none", handletextpad=0.2, **options)


def _histogram(model: LatentModel, data: np.ndarray, name: str, ax: Any, which: int = 0, legend: bool = True) -> Any:
    """One column: counts as a density, each Gaussian component under it, their sum above."""
    column = data[:, which]
    finite = np.unique(column)
    bins = np.histogram_bin_edges(column, "fd" if len(finite) > 20 else "auto")
    bins = bins if len(bins) <= 80 else 80
    ax.hist(column, bins=bins, density=True, color="#d9d9d9", edgecolor="white", linewidth=0.5, zorder=1)
    found = _gaussians(model, data.shape[1])
    if found is not None:
        low, high = column.min(), column.max()
        pad = 0.08 * (high - low or 1.0)
        grid = np.linspace(low - pad, high + pad, 400)
        curves = [
            w * np.exp(-0.5 * (grid - m[which]) ** 2 / c[which, which]) / np.sqrt(2 * np.pi * c[which, which])
            for w, m, c in zip(*found, strict=True)
        ]
        for curve, colour in zip(curves, palette(len(curves)), strict=True):
            ax.fill_between(grid, curve, color=colour, alpha=0.22, linewidth=0, zorder=2)
            ax.plot(grid, curve, color=colour, linewidth=1.6, zorder=3)
        ax.plot(grid, np.sum(curves, 0), color=_INK, linewidth=1.1, zorder=4)
        ax.set_ylim(0, max(ax.get_ylim()[1], 1.05 * float(np.sum(curves, 0).max())))
    ax.set(xlabel=name, ylabel="density")
    if legend:
        _legend(model, ax)
    return ax


def _histories(result: Any) -> list[list[float]]:
    found = getattr(result, "histories", None) or getattr(result, "history", None) or result
    if not isinstance(found, (list, tuple)) or not found:
        raise invalid(
            "result", "a fit's result or a list of numbers", repr(found)[:60], "pass what torchem.fit returned"
        )
    rows = found if isinstance(found[0], (list, tuple)) else [found]
    # Reports write null for what was not finite.
    return [[math.nan if v is None else float(v) for v in row] for row in rows if len(row)]


def _shares(ax: Any, share: np.ndarray, paint: np.ndarray, place: tuple[int, int, int]) -> None:
    """A bar under the segments (from ``left``, under ``top``, of ``width``): how much each component takes."""
    patches: Any = require("matplotlib.patches", "plot")
    left, top, width = map(float, place)
    base, height = top * 1.025, top * 0.05
    for k in np.argsort(-share):
        length = float(share[k]) * width
        box = patches.Rectangle((left, base), length, height, facecolor=paint[k].clip(0, 1), clip_on=False)
        ax.add_patch(box)
        if share[k] > 0.06:
            ink = "white" if paint[k] @ (0.299, 0.587, 0.114) < 0.5 else _INK
            middle = (left + length / 2, base + height / 2)
            options = {"ha": "center", "va": "center", "fontsize": 8, "annotation_clip": False}
            ax.annotate(f"{share[k]:.0%}", middle, color=ink, **options)
        left += length
