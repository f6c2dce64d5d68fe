"""Pictures of fitted models: clusters, sequences of states, the rise of the bound, segmented images.

Needs the extra ``plot``.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import TorchemError, invalid, require, whole_number
from torchem.graphs import layered
from torchem.images import mean_colours
from torchem.model import LatentModel
from torchem.sequences import as_buckets

#: Colours that colour-blind readers tell apart, the most distinct first. Source: M. Okabe, K. Ito (2008).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F", "#595959")

#: Observations drawn at most; more hide each other.
_DRAWN = 20_000
#: Frames of a sequence drawn one by one at most; of longer ones that many stretches. At most: bars, steps joined.
_STRETCHES, _BARS, _RISES = 2_000, 250, 300
#: Columns shown of a sequence, panels in a picture, states with names and numbers, at most.
_COLUMNS, _PANELS, _NUMBERED = 4, 6, 12
#: Durations marked one by one, loadings written as numbers, at most.
_STEPS, _CELLS = 40, 200
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


def prediction(
    model: Any,
    x: Any,
    inputs: Any,
    columns: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    ax: Any = None,
    *,
    offset: Any = None,
    trials: Any = None,
) -> Any:
    """Draw what a mixture predicts along a covariate: the mean, its components and a band of 90 %, over the data.

    Args:
        model: A mixture whose factors read covariates.
        x: ``[N, D]`` observations, of which the first column is drawn.
        inputs: ``[N, M]`` covariates; the first that is not constant is drawn, the others stay at their means.
        columns: Names of the columns of x.
        names: Names of the covariates.
        ax: Axes to draw in; new ones when None.
        offset: Known terms ``[N]`` of linear predictors; what is predicted is so at their mean.
        trials: Numbers of trials ``[N]``; what is predicted is so of their rounded mean.

    Returns:
        The axes.

    Example:
        >>> import matplotlib, torchem
        >>> from torchem.factors import Categorical, LinearGaussian
        >>> matplotlib.use("Agg")
        >>> model = torchem.Mixture(Categorical(2), LinearGaussian(2, 1, 1))
        >>> prediction(model, torch.randn(20, 1), torch.randn(20, 1), ["y"]).get_ylabel()
        'y'
    """
    # Together, so that both are thinned alike where there are many.
    x, u = (value.unsqueeze(-1) if value.dim() == 1 else value for value in (as_tensor(x, "x"), as_tensor(inputs, "u")))
    if len(u) != len(x):
        raise invalid("inputs", f"[{len(x)}, M]", f"shape {list(u.shape)}", "give a row for each of x")
    known = {
        name: as_tensor(value, name).detach().double().reshape(-1, 1)
        for name, value in (("offset", offset), ("trials", trials))
        if value is not None
    }
    for name, value in known.items():
        if len(value) != len(x):
            raise invalid(name, f"[{len(x)}]", f"shape {list(value.shape[:1])}", "give a number for each row of x")
    both, _ = _data(model, torch.cat([x.detach().double(), u.detach().double(), *known.values()], -1), None)
    data, u, rest = np.split(both, [x.shape[1], x.shape[1] + u.shape[1]], 1)
    fields = dict(zip(known, rest.T, strict=True))
    labels = _names(columns, x.shape[1])
    which = int(np.argmax(np.ptp(u, axis=0) > 0))
    ax = _axes(ax)
    span = np.linspace(u[:, which].min(), u[:, which].max(), 300)
    rows = np.repeat(u.mean(0, keepdims=True), len(span), 0)
    rows[:, which] = span
    with torch.no_grad():
        middle = {name: np.full(len(span), value.mean()) for name, value in fields.items()}
        if trials is not None:
            middle["trials"] = middle["trials"].round()
        law = model.predict(torch.from_numpy(rows), **middle)
        mean, parts, weights = _array(law.mean), _array(law.component_means), _array(law.weights)
        low, high = (_array(found)[:, 0] for found in law.quantile([0.05, 0.95]))
    colours = palette(weights.shape[1])
    ax.fill_between(span, low, high, color=_FAINT, alpha=0.25, linewidth=0, zorder=1)
    for k, colour in enumerate(colours):
        # A component is drawn as strongly as the gate calls for it.
        shade = np.column_stack([np.tile(colour, (len(span), 1)), weights[:, k].clip(0.0, 1.0)])
        ax.scatter(span, parts[:, k, 0], c=shade, s=4, linewidths=0, zorder=3)
    ax.plot(span, mean[:, 0], color=_INK, linewidth=1.6, zorder=4)
    with torch.no_grad():
        posterior = _array(model.posterior(model.batch(torch.from_numpy(data), inputs=u, **fields)))
    ax.scatter(u[:, which], data[:, 0], c=(posterior @ colours).clip(0, 1), s=16, alpha=0.8, linewidths=0, zorder=2)
    bottom, top = data[:, 0].min(), data[:, 0].max()
    room = 0.1 * (top - bottom)
    ax.set_ylim(min(bottom, np.percentile(low, 2)) - room, max(top, np.percentile(high, 98)) + room)
    ax.set(xlabel=f"covariate {which}" if names is None else names[which], ylabel=labels[0])
    return ax


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


def states(
    x: Any,
    path: Any,
    means: Any = None,
    *,
    lengths: Any = None,
    index: Any = None,
    columns: Sequence[str] | None = None,
    names: Sequence[Any] | None = None,
    ax: Any = None,
) -> Any:
    """Draw sequences, each frame in the colour of its state, under steps at the level of the state.

    Counts of a short series become bars, other numbers a line with points; of a long series the range of each stretch
    is drawn, and the state that holds most of it. The first few columns and sequences are shown, one above the other.

    Args:
        x: Sequences in any layout that `torchem.fit` takes: ``[T]`` or ``[T, D]`` is one.
        path: State of each frame, ``[T]``, ``[N, T]`` or a list; −1 where there is none.
        means: ``[K, D]`` level of each state; what its frames are on average when None.
        lengths: ``[N]`` frames of each sequence.
        index: Where each frame stands on the horizontal axis: numbers or dates ``[T]``; a list for several sequences.
        columns: Names of the columns.
        names: Names of the sequences.
        ax: Axes to draw in, for one column of one sequence; new ones when None.

    Returns:
        The axes; an array of them where several are drawn.

    Raises:
        InvalidArgument: If the shapes disagree or there is nothing to draw.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> states([1, 0, 7, 9], [0, 0, 1, 1], index=[1900, 1901, 1902, 1903], columns=["count"]).get_ylabel()
        'count'
    """
    series = _sequences(x, lengths)
    d = series[0].shape[1]
    labels = _names(columns, d)
    paths = _paths(path, [len(s) for s in series])
    k = 1 + max(int(p.max()) for p in paths)
    levels = _levels(series, paths, k) if means is None else _array(as_tensor(means, "means"))
    if levels.ndim != 2 or len(levels) < k or levels.shape[1] != d:
        raise invalid("means", f"shape [{k}, {d}]", list(levels.shape), "give a row for each state")
    shown = min(d, _COLUMNS)
    places = _Places(index, series)
    axes = _panels(shown * min(len(series), max(1, _PANELS // shown)), ax, 2.6)
    for row, panel in enumerate(axes):
        which, column = divmod(row, shown)
        at = places.set(panel, which)
        _frames(panel, at, series[which][:, column], paths[which], levels[:, column])
        panel.set_ylabel(labels[column])
        panel.tick_params(labelbottom=column == shown - 1)
        if len(series) > 1 and column == 0:
            _entitle(panel, which, names)
    _state_legend(axes[0], len(levels))
    return axes[0] if len(axes) == 1 else axes


def posterior(
    probs: Any, *, lengths: Any = None, index: Any = None, names: Sequence[Any] | None = None, ax: Any = None
) -> Any:
    """Draw the probabilities of states over time, as bands that share the height of each frame.

    Args:
        probs: ``[T, K]`` of one sequence, or several: ``[N, T, K]`` or a list.
        lengths: ``[N]`` frames of each sequence, where ``probs`` is padded.
        index: Where each frame stands on the horizontal axis, as for `states`.
        names: Names of the sequences.
        ax: Axes to draw in, for one sequence; new ones when None.

    Returns:
        The axes; an array of them for several sequences, of which the first few are shown.

    Raises:
        InvalidArgument: If the shape is another or there is nothing to draw.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> posterior([[0.9, 0.1], [0.2, 0.8]]).get_ylabel()
        'probability of state'
    """
    series = _sequences(probs, lengths)
    places = _Places(index, series)
    axes = _panels(min(len(series), _PANELS), ax, 1.8)
    colours = palette(series[0].shape[1])
    for which, panel in enumerate(axes):
        _bands(panel, places.set(panel, which), series[which], colours)
        if len(series) > 1:
            _entitle(panel, which, names)
    label = axes[0].set_ylabel if len(axes) == 1 else axes[0].figure.supylabel
    label("probability of state", fontsize="medium")
    _state_legend(axes[0], len(colours))
    return axes[0] if len(axes) == 1 else axes


def sequences(x: Any, label: Any, *, lengths: Any = None, columns: Sequence[str] | None = None, most: int = 8) -> Any:
    """Draw sequences by the cluster that each belongs to: one panel for each cluster, its sequences below one another.

    Args:
        x: ``[T, D]`` of one sequence, or several: ``[N, T, D]`` or a list; the first column is drawn.
        label: ``[N]`` cluster of each sequence, as a mixture of models gives it.
        lengths: ``[N]`` frames of each sequence, where ``x`` is padded.
        columns: Names of the columns.
        most: How many sequences of a cluster are drawn at most, the first ones.

    Returns:
        An array of axes, one for each cluster.

    Raises:
        InvalidArgument: If there is not one label for each sequence.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> axes = sequences([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]], [1, 0])
        >>> [ax.get_title() for ax in axes]
        ['cluster 0: 1 sequence', 'cluster 1: 1 sequence']
    """
    series, labels = _sequences(x, lengths), np.asarray(label)
    if labels.shape != (len(series),):
        raise invalid("label", f"one for each of {len(series)} sequences", list(labels.shape), "give most_likely(x)")
    whole_number("most", most, 1, "give how many to draw")
    k = int(labels.max()) + 1
    members = [np.flatnonzero(labels == cluster) for cluster in range(k)]
    seen = np.concatenate([own[np.isfinite(own[:, 0]), 0] for own in series])
    low, high = (seen.min(), seen.max()) if len(seen) else (0.0, 1.0)
    step = 1.15 * (high - low) or 1.0
    pyplot: Any = require("matplotlib.pyplot", "plot")
    rows = max(1, min(most, max(map(len, members))))
    size = (max(4.5, 3.2 * k), 1.0 + 0.42 * rows)
    axes = pyplot.subplots(1, k, figsize=size, squeeze=False, sharey=True, sharex=True, layout="constrained")[1][0]
    for cluster, (panel, colour) in enumerate(zip(axes, palette(k), strict=True)):
        for place, n in enumerate(members[cluster][:most]):
            panel.plot(series[n][:, 0] - place * step, color=colour, linewidth=1.0)
        count = len(members[cluster])
        panel.set_title(f"cluster {cluster}: {count} sequence{'s' * (count != 1)}", fontsize=9, color=_INK)
        _style(panel).set(yticks=[], xlabel="frame")
        panel.spines["left"].set_visible(False)
    axes[0].set_ylabel(_names(columns, series[0].shape[1])[0])
    return axes


def level(
    law: Any,
    x: Any = None,
    *,
    share: float = 0.9,
    lengths: Any = None,
    index: Any = None,
    columns: Sequence[str] | None = None,
    names: Sequence[Any] | None = None,
    ax: Any = None,
) -> Any:
    """Draw the law of a level over time: its mean, and a band that holds some of its probability in each frame.

    Args:
        law: ``mean`` and ``variance`` of each frame, ``[N, T, D]`` or ``[T, D]``: what `smooth`, `posterior` or
            `forecast` of a state space give.
        x: The observations behind it, drawn as points, in any layout that `torchem.fit` takes; None for none.
        share: Probability of the band.
        lengths: ``[N]`` frames of each sequence.
        index: Where each frame stands on the horizontal axis, as for `states`.
        columns: Names of the columns.
        names: Names of the sequences.
        ax: Axes to draw in, for one column of one sequence; new ones when None.

    Returns:
        The axes; an array of them where several are drawn: the first few columns of the first few sequences.

    Raises:
        InvalidArgument: If the shapes disagree, or for a share out of range.

    Example:
        >>> import matplotlib, torchem
        >>> matplotlib.use("Agg")
        >>> x = torch.tensor([1.0, 2.0, 4.0])
        >>> law = torchem.LinearGaussianStateSpace(1, 1).smooth(x)
        >>> level(law, x, index=[1900, 1901, 1902], columns=["count"]).get_ylabel()
        'count'
    """
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise invalid("share", "a probability between 0 and 1", share, "give for example 0.9")
    series = None if x is None else _sequences(x, lengths)
    if series is not None:
        most = (len(series), max(map(len, series)), series[0].shape[1])
        shape = (*[1] * (3 - law.mean.dim()), *law.mean.shape)
        if shape != most:
            raise invalid("x", f"sequences that fill {list(shape)}", list(most), "give those behind the law")
    sizes = lengths if series is None else torch.tensor([len(own) for own in series])
    means, variances = (_sequences(value.detach(), sizes if value.dim() > 2 else None)
                        for value in (law.mean, law.variance))  # fmt: skip
    d = means[0].shape[1]
    reach = math.sqrt(2) * float(torch.erfinv(torch.tensor(float(share), dtype=torch.float64)))
    labels, places = _names(columns, d), _Places(index, means)
    shown = min(d, _COLUMNS)
    axes = _panels(shown * min(len(means), max(1, _PANELS // shown)), ax, 2.6)
    for row, panel in enumerate(axes):
        which, column = divmod(row, shown)
        at, line = places.set(panel, which), means[which][:, column]
        spread = reach * np.sqrt(variances[which][:, column])
        panel.fill_between(at, line - spread, line + spread, color=PALETTE[0], alpha=0.25, linewidth=0)
        if series is not None:
            dots = max(2.0, min(5.0, 500 / len(line)))
            panel.plot(at, series[which][:, column], "o", color=_FAINT, markersize=dots, markeredgewidth=0)
        panel.plot(at, line, color=PALETTE[0], linewidth=1.8)
        panel.set_ylabel(labels[column])
        panel.tick_params(labelbottom=column == shown - 1)
        if len(means) > 1 and column == 0:
            _entitle(panel, which, names)
    return axes[0] if len(axes) == 1 else axes


def transitions(matrix: Any, ax: Any = None) -> Any:
    """Draw a transition matrix: the probability of each step, from the state of a row to that of a column.

    Args:
        matrix: ``[K, K]``; steps that are impossible stay blank.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Raises:
        InvalidArgument: If the matrix is not square.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> [text.get_text() for text in transitions([[0.9, 0.1], [0.0, 1.0]]).texts]
        ['0.900', '0.100', '1.000']
    """
    table = _array(as_tensor(matrix, "matrix"))
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not table.size:
        raise invalid("matrix", "shape [K, K]", list(table.shape), "pass model.transition_matrix")
    k = len(table)
    if ax is None:
        side = float(np.clip(1.5 + 0.72 * k, 3.0, 8.0))
        pyplot: Any = require("matplotlib.pyplot", "plot")
        ax = pyplot.subplots(figsize=(side, side), layout="constrained")[1]
    colours: Any = require("matplotlib.colors", "plot")
    # Grey: colours belong to the states.
    shades = colours.LinearSegmentedColormap.from_list("shades", ["#f4f4f2", "#b4bcc6", "#33414f"])
    most = 1.0 if k <= _NUMBERED else table.max()
    image = ax.imshow(np.where(table > 0, table, np.nan), cmap=shades, vmin=0, vmax=most)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="to state", ylabel="from state")
    ax.tick_params(which="both", length=0)
    if k > _NUMBERED:
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
        ax.figure.colorbar(image, ax=ax, shrink=0.6, label="probability").outline.set_visible(False)
        return ax
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(np.arange(1, k) - 0.5, minor=True)
        axis.set_ticks(range(k), range(k))
        for tick, colour in zip(axis.get_ticklabels(), palette(k), strict=True):
            tick.set(color=colour * 0.85, fontweight="bold", fontsize=11)
    ax.grid(which="minor", color="white", linewidth=2.5)
    for (i, j), p in np.ndenumerate(table):
        if p > 0:
            ax.text(j, i, _probability(p), ha="center", va="center", color="white" if p > 0.5 else _INK)
    return ax


def durations(probs: Any, ax: Any = None) -> Any:
    """Draw the laws of how long states last, a line for each.

    Args:
        probs: ``[K, D]`` probabilities of 1 … D frames: ``model.duration_probs``.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Raises:
        InvalidArgument: If it is no table.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> len(durations([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]).lines)
        2
    """
    table = _array(as_tensor(probs, "probs"))
    if table.ndim != 2 or not table.size:
        raise invalid("probs", "shape [K, D]", list(table.shape), "pass model.duration_probs")
    ax = _axes(ax)
    k, d = table.shape
    place = np.arange(1, d + 1)
    for state, (law, colour) in enumerate(zip(table, palette(k), strict=True)):
        label = f"state {state}: {law @ place:.3g} on average" if k <= _NUMBERED else None
        marker = "o" if d <= _STEPS else None
        ax.plot(place, law, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
    if k <= _NUMBERED:
        ax.legend(frameon=False)
    ax.set(xlabel="duration (frames)", ylabel="probability")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return ax


def loadings(weights: Any, columns: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draw what each factor adds to each column: blue where it raises it, orange where it lowers it.

    Args:
        weights: ``[D, q]``: ``model.loadings`` of `torchem.FactorAnalysis`, or a rotation of them.
        columns: Names of the columns.
        ax: Axes to draw in; new ones when None.

    Returns:
        The axes.

    Raises:
        InvalidArgument: If it is no table.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> [text.get_text() for text in loadings([[2.0, 0.0], [0.5, -1.0]]).texts]
        ['2.00', '0.00', '0.50', '−1.00']
    """
    table = _array(as_tensor(weights, "weights"))
    if table.ndim != 2 or not table.size:
        raise invalid("weights", "shape [D, q]", list(table.shape), "pass model.loadings")
    d, q = table.shape
    names = _names(columns, d)
    if ax is None:
        width, height = float(np.clip(2.2 + 0.8 * q, 3.2, 9.0)), float(np.clip(1.2 + 0.36 * d, 2.4, 9.0))
        pyplot: Any = require("matplotlib.pyplot", "plot")
        ax = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    colours: Any = require("matplotlib.colors", "plot")
    shades = colours.LinearSegmentedColormap.from_list("signed", [PALETTE[5], "#f4f4f2", PALETTE[0]])
    most = float(np.abs(table).max()) or 1.0
    image = ax.imshow(table, cmap=shades, vmin=-most, vmax=most, aspect="auto")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.xaxis.set_ticks(range(q), [f"factor {j}" for j in range(q)])
    if d * q > _CELLS:
        ax.figure.colorbar(image, ax=ax, shrink=0.6, label="loading").outline.set_visible(False)
        return ax
    ax.yaxis.set_ticks(range(d), names)
    for (i, j), value in np.ndenumerate(table):
        text = f"{value:.2f}".replace("-", "−")
        ax.text(j, i, text, ha="center", va="center", color="white" if abs(value) > 0.6 * most else _INK)
    return ax


def chain(
    x: Any,
    path: Any,
    probs: Any,
    matrix: Any,
    means: Any = None,
    *,
    index: Any = None,
    columns: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw one sequence at a glance: its frames and states, the probabilities of states, the transition matrix.

    Args:
        x: One sequence ``[T]`` or ``[T, D]``; the first few columns are shown.
        path: State of each frame, as for `states`.
        probs: ``[T, K]`` probabilities of the states of each frame.
        matrix: ``[K, K]`` transition matrix.
        means: ``[K, D]`` level of each state, as for `states`.
        index: Where each frame stands on the horizontal axis, as for `states`.
        columns: Names of the columns.

    Returns:
        The axes: those of the columns, of the probabilities and of the matrix.

    Raises:
        InvalidArgument: If there are several sequences, or the shapes disagree.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> len(chain([1.0, 2.0, 9.0], [0, 0, 1], [[1, 0], [0.8, 0.2], [0, 1]], [[0.5, 0.5], [0.1, 0.9]]))
        3
    """
    series = _sequences(x, None)
    if len(series) > 1:
        raise invalid("x", "one sequence", f"{len(series)}", "draw them with states and posterior")
    frames, d = series[0], series[0].shape[1]
    paths, shares = _paths(path, [len(frames)]), _sequences(probs, None)
    levels = _levels(series, paths, shares[0].shape[1]) if means is None else _array(as_tensor(means, "means"))
    labels, shown = _names(columns, d), min(d, _COLUMNS)
    figure = _figure(11.5, 2.9 + 1.6 * shown)
    figure.set_layout_engine("constrained", wspace=0.06)
    grid = figure.add_gridspec(shown + 1, 2, width_ratios=(2.3, 1), height_ratios=(*[1.7] * shown, 1))
    axes = [figure.add_subplot(grid[row, 0]) for row in range(shown + 1)]
    for i, ax in enumerate(axes[:-1]):
        states(frames[:, [i]], paths[0], levels[:, [i]], index=index, columns=[labels[i]], ax=ax)
        ax.tick_params(labelbottom=False)
    posterior(shares[0], index=index, ax=axes[-1])
    for ax in axes[1:]:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    axes[-1].set_ylabel("probability")
    figure.align_ylabels(axes)
    return np.array([*axes, transitions(matrix, figure.add_subplot(grid[:, 1]))])


def network(model: Any, ax: Any = None, tables: bool = True) -> Any:
    """Draw a Bayesian network in layers, each node a box with its table; hidden nodes are dashed, leaves rounded.

    A row of a table is a state of all parents, a column a state of the node; the darker a cell, the likelier. Tables of
    more than 12 rows or 6 columns are left out. Leaves show means and standard deviations, where they have some.

    Args:
        model: A `torchem.BayesianNetwork`.
        ax: Axes to draw in; new ones when None.
        tables: Whether to draw tables.

    Returns:
        The axes.

    Example:
        >>> import matplotlib, torchem
        >>> matplotlib.use("Agg")
        >>> ax = network(torchem.BayesianNetwork({"rain": 2, "wet": 2}, [("rain", "wet")]))
        >>> [text.get_text() for text in ax.texts][:2]
        ['rain', '0']
    """
    patches = require("matplotlib.patches", "plot")
    grids = {name: _conditional(model, name) if tables else None for name in model.parents}
    boxes = {name: _box(name, grid) for name, grid in grids.items()}
    layout = layered(model.parents, boxes, down=0.55)
    if ax is None:
        ax = _figure(0.2 + layout.width, 0.2 + layout.height).add_axes((0, 0, 1, 1))
    ax.set_xlim(-0.1, layout.width + 0.1)
    ax.set_ylim(layout.height + 0.1, -0.1)
    ax.set_aspect("equal")
    ax.axis("off")
    for line in layout.lines.values():
        _arrow(ax, patches, line)
    for name, (x, y) in layout.centers.items():
        width, height = boxes[name]
        rounded = name not in model.cardinalities
        ax.add_patch(patches.FancyBboxPatch(  # pyright: ignore[reportAttributeAccessIssue]
            (x - width / 2 + 0.1, y - height / 2 + 0.1), width - 0.2, height - 0.2,
            boxstyle=f"round,pad=0.1,rounding_size={0.2 if rounded else 0.05}", facecolor="white", edgecolor=_INK,
            linestyle="--" if name in model.hidden else "-", linewidth=1.1, zorder=2,
        ))  # fmt: skip
        ax.text(x, y - height / 2 + 0.19, name, ha="center", va="center", color=_INK, fontsize=10, zorder=4)
        grid = grids[name]
        if grid is not None:
            _table(ax, patches, grid, x, y - height / 2 + 0.4)
    return ax


#: A cell's width and height, and the width of a letter in the names of rows, in inches.
_CELL, _LINE, _LETTER = 0.52, 0.21, 0.068
#: Rows and columns of a table that is drawn, at most.
_ROWS, _WIDE = 12, 6


class _Grid:
    """A table as it is drawn: what rows are states of, names of rows and columns, text and darkness of cells."""

    def __init__(self, head: str, rows: list[str], columns: list[str], cells: list[list[str]], shade: np.ndarray):
        self.head, self.rows, self.columns, self.cells, self.shade = head, rows, columns, cells, shade
        letters = max((len(cell) for row in [columns, *cells] for cell in row), default=0)
        self.cell = max(_CELL, _LETTER * letters + 0.1)
        self.label = _LETTER * max(map(len, [head, *rows])) + 0.1 if any(rows) else 0.0

    @property
    def width(self) -> float:
        return self.label + self.cell * len(self.columns)

    @property
    def height(self) -> float:
        return _LINE * (len(self.rows) + 1)


def _conditional(model: Any, name: str) -> _Grid | None:
    """The table of a node, or the means of a leaf."""
    sizes = [model.cardinalities[parent] for parent in model.parents[name]]
    named = [[str(s) for s in model.states.get(p, range(k))] for p, k in zip(model.parents[name], sizes, strict=True)]
    rows = [", ".join(part) for part in itertools.product(*named)]
    if len(rows) > _ROWS:
        return None
    head = ", ".join(model.parents[name])
    if name in model.cardinalities:
        size = model.cardinalities[name]
        factor = model.conditionals[name]
        if size > _WIDE or not hasattr(factor, "assign_probs") or model.replicas:
            return None
        values = _array(factor.probs).reshape(-1, size)
        columns = [str(s) for s in model.states.get(name, range(size))]
        return _Grid(head, rows, columns, [[_probability(float(p)) for p in row] for row in values], values)
    try:
        mean, variance = model.conditionals[name].moments(Batch(torch.zeros(1, 1, dtype=model.dtype)))
    except (NotImplementedError, AttributeError, RuntimeError, TorchemError):
        return None
    center, spread = (_array(value).reshape(len(rows), -1)[:, :_WIDE] for value in (mean, variance.sqrt()))
    cells = [[f"{m:.3g} ± {s:.2g}" for m, s in zip(*pair, strict=True)] for pair in zip(center, spread, strict=True)]
    return _Grid(head, rows, ["mean ± sd"] * center.shape[1], cells, np.zeros_like(center))


def _box(name: str, grid: _Grid | None) -> tuple[float, float]:
    width = 0.085 * len(name) + 0.35
    if grid is None:
        return width, 0.42
    return max(width, grid.width + 0.2), 0.48 + grid.height


def _table(ax: Any, patches: Any, grid: _Grid, x: float, top: float) -> None:
    left = x - grid.width / 2
    options = {"va": "center", "color": _INK, "fontsize": 7.5, "zorder": 4}
    for j, column in enumerate(grid.columns):
        middle = left + grid.label + (j + 0.5) * grid.cell
        ax.text(middle, top + _LINE / 2, column, ha="center", **options | {"color": "#595959"})
    ax.text(left + grid.label - 0.06, top + _LINE / 2, grid.head, ha="right", **options | {"color": "#595959"})
    for i, row in enumerate(grid.rows):
        level = top + (i + 1.5) * _LINE
        if row:
            ax.text(left + grid.label - 0.06, level, row, ha="right", **options | {"color": "#595959"})
        for j, cell in enumerate(grid.cells[i]):
            start = left + grid.label + j * grid.cell
            corner = (start + 0.01, level - _LINE / 2 + 0.01)
            shade = (*palette(1)[0], 0.08 + 0.5 * float(grid.shade[i, j]))
            ax.add_patch(
                patches.Rectangle(corner, grid.cell - 0.02, _LINE - 0.02, facecolor=shade, linewidth=0, zorder=3)
            )
            ax.text(start + grid.cell / 2, level, cell, ha="center", **options)


def _arrow(ax: Any, patches: Any, line: list[tuple[float, float]]) -> None:
    """A line through points, smooth where it turns, with a head at its end."""
    path = require("matplotlib.path", "plot").Path  # pyright: ignore[reportAttributeAccessIssue]
    points, codes = [line[0]], [path.MOVETO]
    for (a, b), (c, d) in itertools.pairwise(line):
        points += [(a, (b + d) / 2), (c, (b + d) / 2), (c, d)]
        codes += [path.CURVE4] * 3
    ax.add_patch(patches.FancyArrowPatch(
        path=path(points, codes), arrowstyle="-|>", mutation_scale=10, color=_FAINT, linewidth=1.1, zorder=1,
    ))  # fmt: skip


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
    names = _names(columns, data.shape[1])
    if len(data) > _DRAWN:
        data = data[np.random.default_rng(0).choice(len(data), _DRAWN, replace=False)]
    return data, names


def _names(columns: Sequence[str] | None, d: int) -> list[str]:
    names = [f"$x_{{{i}}}$" for i in range(d)] if columns is None else list(columns)
    if len(names) != d:
        raise invalid("columns", f"{d} names", len(names), "name each column")
    return names


@torch.no_grad()
def _posterior(model: LatentModel, data: np.ndarray) -> np.ndarray:
    return model.posterior(torch.from_numpy(data)).cpu().double().numpy()


def _completed(model: LatentModel, data: np.ndarray) -> np.ndarray:
    """Data with their gaps at conditional means."""
    return model.impute(torch.from_numpy(data), "mean").numpy() if np.isnan(data).any() else data


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
    elif covariances.shape == (d, d) and component.structure.shared:
        dense = np.broadcast_to(covariances, (k, d, d))
    else:
        dense = covariances.reshape(k, -1, 1) * np.eye(d)
    return weights, means, dense


def _plane(model: LatentModel, data: np.ndarray) -> np.ndarray:
    """``[D, 2]``: the plane that separates the components best; the principal plane when they do not span one."""
    posterior, data = _posterior(model, data), _completed(model, data)
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
    points = _completed(model, data) @ basis
    size = float(np.clip(450 / np.sqrt(len(points)), 2, 26))
    blend = (posterior @ colours).clip(0, 1)
    seen = ~np.isnan(data[:, np.abs(basis).sum(1) > 0]).any(1)
    options: dict[str, Any] = {"s": size, "zorder": 2, "rasterized": len(points) > 2000}
    ax.scatter(*points[seen].T, c=blend[seen], alpha=0.75, linewidths=0, **options)
    if not seen.all():  # what was filled in is a ring
        ax.scatter(*points[~seen].T, facecolors="none", edgecolors=blend[~seen], linewidths=0.8, **options)
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
    column = data[~np.isnan(data[:, which]), which]
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


# ---- series -------------------------------------------------------------------------------------------------------


def _sequences(value: Any, lengths: Any) -> list[np.ndarray]:
    """Each sequence as ``[T_i, D]``."""
    found: dict[int, np.ndarray] = {}
    for numbers, batch in as_buckets(value, lengths=lengths, allow_missing=True):
        rows = zip(_array(batch.x), batch.frames().tolist(), strict=True)
        found |= {
            i: row[:n]
            for i, (row, n) in zip(range(len(batch)) if numbers is None else numbers.tolist(), rows, strict=True)
        }
    return [found[i] for i in sorted(found)]


def _paths(path: Any, sizes: list[int]) -> list[np.ndarray]:
    """The states of each sequence, cut to its frames; −1 where there is none."""
    if isinstance(path, (list, tuple)) and len(path) and not np.isscalar(path[0]):
        rows = [as_tensor(row, "path") for row in path]
    else:
        table = as_tensor(path, "path")
        rows = table.split(sizes) if table.shape == (sum(sizes),) else torch.atleast_2d(table)
    found = [_array(row.flatten()[:n]) for row, n in zip(rows, sizes, strict=False)]
    if [len(row) for row in found] != sizes:
        got = f"{sum(map(len, found))} in {len(found)} sequences"
        raise invalid("path", f"a state for each of {sum(sizes)} frames", got, "pass model.most_likely(x)")
    return [np.where(np.isfinite(row), row, -1).astype(int) for row in found]


def _levels(series: list[np.ndarray], paths: list[np.ndarray], k: int) -> np.ndarray:
    """``[K, D]``: mean of the frames of each state; NaN for a state that has none."""
    x, path = np.concatenate(series), np.concatenate(paths)
    levels = np.full((k, x.shape[1]), np.nan)
    for state in np.unique(path[path >= 0]):
        own = np.ma.masked_invalid(x[path == state])
        levels[state] = own.mean(0).filled(np.nan)
    return levels


class _Places:
    """Where the frames of each sequence stand on the horizontal axis."""

    def __init__(self, index: Any, series: list[np.ndarray]):
        sizes = [len(s) for s in series]
        if index is None:
            self.dated, self.at = False, [np.arange(n, dtype=float) for n in sizes]
            return
        given = [np.asarray(i) for i in (index if len(series) > 1 else [index])]
        if [i.shape for i in given] != [(n,) for n in sizes]:
            got = [list(i.shape) for i in given][:5]
            raise invalid("index", f"a place for each of {sizes[:5]} frames", f"shapes {got}", "leave it out to count")
        self.dated = any(i.dtype.kind not in "iufb" for i in given)
        self.at = [_days(i) if self.dated else i.astype(float) for i in given]
        if not all(np.isfinite(at).all() and (np.diff(at) > 0).all() for at in self.at):
            raise invalid("index", "places that rise from frame to frame", "some that do not", "sort the frames by it")

    def set(self, panel: Any, which: int) -> np.ndarray:
        """Prepare an axis for a sequence; returns its places."""
        if self.dated:
            dates: Any = require("matplotlib.dates", "plot")
            locator = dates.AutoDateLocator()
            panel.xaxis.set_major_locator(locator)
            panel.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        else:
            panel.ticklabel_format(axis="x", useOffset=False, style="plain")
            if not (self.at[which] % 1).any():
                panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlim(*_edges(self.at[which])[[0, -1]])
        return self.at[which]


def _days(dates: np.ndarray) -> np.ndarray:
    """Dates, or text that gives them as 2001-12-31, as matplotlib's days."""
    module: Any = require("matplotlib.dates", "plot")
    try:
        return module.date2num(dates.astype("datetime64[s]"))
    except ValueError as error:
        raise invalid("index", "numbers or dates such as 2001-12-31", error, "leave it out to count frames") from error


def _edges(at: np.ndarray) -> np.ndarray:
    """``[T + 1]``: where each frame begins and ends, halfway to its neighbours."""
    gaps = np.diff(at) / 2 if len(at) > 1 else np.array([0.5])
    return np.concatenate([[at[0] - gaps[0]], at[:-1] + np.diff(at) / 2, [at[-1] + gaps[-1]]])


def _stretches(frames: int) -> np.ndarray:
    """First frames of the stretches that are drawn as one, and the end: single frames unless there are very many."""
    return np.linspace(0, frames, min(frames, _STRETCHES) + 1).astype(int)


def _frames(panel: Any, at: np.ndarray, x: np.ndarray, path: np.ndarray, level: np.ndarray) -> None:
    """One column of one sequence: its frames, and steps at the level of the state."""
    cuts, colours = _stretches(len(at)), palette(len(level))
    edges = _edges(at)[cuts]
    votes = np.stack([np.add.reduceat(path == k, cuts[:-1]) for k in range(len(level))], 1)
    state = np.where(votes.any(1), votes.argmax(1), -1)
    ink = np.vstack([colours, [0.6, 0.6, 0.6]])[state]
    light = ink + 0.55 * (1 - ink)
    if len(edges) <= len(at):
        low, high = np.fmin.reduceat(x, cuts[:-1]), np.fmax.reduceat(x, cuts[:-1])
        _boxes(panel, edges, low, high, light)
    elif len(x) <= _BARS and np.isfinite(x).any() and not (np.nan_to_num(x) % 1).any() and np.nanmin(x) >= 0:
        panel.bar(at, x, 0.84 * np.diff(edges), color=light, linewidth=0, zorder=1)
    else:
        panel.plot(at, x, color="#c8c8c8", linewidth=0.7, zorder=1)
        size = float(np.clip(5000 / len(x), 3, 16))
        panel.scatter(at, x, s=size, c=ink, alpha=0.75, linewidths=0, zorder=2, rasterized=len(x) > 500)
    _steps(panel, edges, state, level, colours)
    panel.margins(y=0.08)


def _boxes(panel: Any, edges: np.ndarray, low: np.ndarray, high: np.ndarray, colours: np.ndarray) -> None:
    """The range of each stretch."""
    collections: Any = require("matplotlib.collections", "plot")
    left, right = edges[:-1], edges[1:]
    corners = [(left, low), (left, high), (right, high), (right, low)]
    boxes = np.stack([np.stack(corner, 1) for corner in corners], 1)
    known = np.isfinite(boxes).all((1, 2))
    panel.add_collection(collections.PolyCollection(boxes[known], facecolors=colours[known], linewidths=0, zorder=1))


def _steps(panel: Any, edges: np.ndarray, state: np.ndarray, level: np.ndarray, colours: np.ndarray) -> None:
    """A line at the level of the state, from where a state begins to where it ends."""
    collections: Any = require("matplotlib.collections", "plot")
    first = np.concatenate([[0], np.flatnonzero(np.diff(state)) + 1])
    begin, end, held = edges[first], edges[np.append(first[1:], len(state))], state[first]
    y = np.where(held >= 0, level[held], np.nan)
    if len(held) <= _RISES:
        rises = np.stack([np.stack([begin[1:], begin[1:]], 1), np.stack([y[:-1], y[1:]], 1)], -1)
        panel.add_collection(collections.LineCollection(list(rises), colors=_FAINT, linewidths=0.8, zorder=3))
    runs = np.stack([np.stack([begin, end], 1), np.stack([y, y], 1)], -1)
    lines = collections.LineCollection(list(runs), colors=0.85 * colours[held], linewidths=2.4, zorder=4)
    lines.set_capstyle("butt")
    panel.add_collection(lines)
    panel.autoscale_view(scalex=False)


def _bands(panel: Any, at: np.ndarray, probs: np.ndarray, colours: np.ndarray) -> None:
    cuts = _stretches(len(at))
    share = np.add.reduceat(probs, cuts[:-1]) / np.diff(cuts)[:, None]
    top = np.concatenate([np.zeros((len(share), 1)), share.cumsum(1)], 1)
    top = np.vstack([top, top[-1:]])
    for k, colour in enumerate(colours):
        panel.fill_between(
            _edges(at)[cuts], top[:, k], top[:, k + 1], step="post", color=colour, alpha=0.85, linewidth=0
        )
    panel.set(ylim=(0, 1), yticks=(0, 0.5, 1))


def _panels(count: int, ax: Any, height: float) -> np.ndarray:
    """Axes one above the other."""
    if ax is not None:
        if count > 1:
            raise invalid("ax", "one column of one sequence to draw in it", f"{count} panels", "leave it out")
        return np.array([_style(ax)])
    pyplot: Any = require("matplotlib.pyplot", "plot")
    size = (9.0, 0.7 + height * count**0.8)
    axes = pyplot.subplots(count, 1, figsize=size, squeeze=False, layout="constrained")[1][:, 0]
    return np.array([_style(panel) for panel in axes])


def _entitle(panel: Any, which: int, names: Sequence[Any] | None) -> None:
    name = f"sequence {which}" if names is None else str(names[which])
    panel.set_title(name, loc="left", fontsize=9, color=_INK, pad=3)


def _state_legend(panel: Any, k: int) -> None:
    if not 1 < k <= _NUMBERED:
        return
    patches: Any = require("matplotlib.patches", "plot")
    handles = [patches.Patch(color=colour, label=str(i)) for i, colour in enumerate(palette(k))]
    box = {"handlelength": 1.0, "handleheight": 1.0, "handletextpad": 0.4, "columnspacing": 1.2}
    label = patches.Patch(alpha=0, label="state")
    panel.legend(
        handles=[label, *handles], ncols=k + 1, loc="lower right", bbox_to_anchor=(1, 1), frameon=False,
        borderaxespad=0.2, **box,
    )  # fmt: skip


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "< .001"
