"""Where the nodes and edges of a directed graph go on paper: in layers, parents above their children."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Sweeps that order the nodes of layers by their neighbours.
_SWEEPS = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """A graph on paper, y downwards.

    Attributes:
        centers: Of each node's box.
        lines: Points of each edge ``(parent, child)`` from the lower side of one box to the upper side of the other.
        width: Of the whole.
        height: Of the whole.
    """

    centers: dict[str, Point]
    lines: dict[tuple[str, str], list[Point]]
    width: float
    height: float


def layered(
    parents: Mapping[str, Sequence[str]], boxes: Mapping[str, Point], across: float = 0.5, down: float = 0.6
) -> Layout:
    """Place nodes in layers, each below its parents; ordered so that edges cross seldom.

    An edge that passes a layer takes a place in it, as a node without width would.

    Args:
        parents: Of each node; every parent is a node.
        boxes: Width and height of each node.
        across: Room between the boxes of a layer.
        down: Room between layers.

    Source: K. Sugiyama, S. Tagawa, M. Toda (1981).

    Example:
        >>> found = layered({"a": [], "b": ["a"], "c": ["a"]}, dict.fromkeys("abc", (1.0, 1.0)), 0.5, 1.0)
        >>> found.centers
        {'a': (1.25, 0.5), 'b': (0.5, 2.5), 'c': (2.0, 2.5)}
    """
    depth: dict[str, int] = {}

    def deep(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((deep(p) for p in parents[name]), default=-1)
        return depth[name]

    for name in parents:
        deep(name)
    # A node without parents stands just above its first child.
    for name in parents:
        children = [depth[c] for c, own in parents.items() if name in own]
        if not parents[name] and children:
            depth[name] = min(children) - 1
    layers: list[list[str]] = [[] for _ in range(1 + max(depth.values()))]
    for name in parents:
        layers[depth[name]].append(name)
    sizes = dict(boxes)
    chains: dict[tuple[str, str], list[str]] = {}
    for child, own in parents.items():
        for parent in own:
            bends = [f"{parent}\n{child}\n{i}" for i in range(depth[parent] + 1, depth[child])]
            for bend, i in zip(bends, range(depth[parent] + 1, depth[child]), strict=True):
                layers[i].append(bend)
                sizes[bend] = (0.0, 0.0)
            chains[parent, child] = [parent, *bends, child]
    links = [pair for chain in chains.values() for pair in itertools.pairwise(chain)]
    layers = _ordered(layers, links)
    x = _across(layers, sizes, links, across)
    heights = [max(sizes[name][1] for name in layer) for layer in layers]
    tops = [sum(heights[:i]) + i * down for i in range(len(layers))]
    y = {name: tops[i] + heights[i] / 2 for i, layer in enumerate(layers) for name in layer}
    right = max(x[name] + sizes[name][0] / 2 for name in x)
    lines = {}
    for (parent, child), chain in chains.items():
        # Edges into a box come in the order of where they come from, and lie apart.
        lasts = sorted((c[-2] for e, c in chains.items() if e[1] == child), key=x.__getitem__)
        share = (lasts.index(chain[-2]) + 1) / (len(lasts) + 1) - 0.5
        end = (x[child] + share * sizes[child][0] * 0.7, y[child] - sizes[child][1] / 2)
        lines[parent, child] = [
            (x[parent], y[parent] + sizes[parent][1] / 2),
            *((x[b], y[b]) for b in chain[1:-1]),
            end,
        ]
    return Layout({name: (x[name], y[name]) for name in parents}, lines, right, tops[-1] + heights[-1])


def _ordered(layers: list[list[str]], links: list[tuple[str, str]]) -> list[list[str]]:
    """Layers sorted by the mean place of their neighbours above and below, the best of some sweeps."""
    best, least = layers, _crossings(layers, links)
    for sweep in range(_SWEEPS):
        place = {name: (i + 0.5) / len(layer) for layer in layers for i, name in enumerate(layer)}

        def mean(name: str, down: bool = sweep % 2 == 0, place: dict[str, float] = place) -> float:
            near = [place[a if down else b] for a, b in links if (b if down else a) == name]
            return sum(near) / len(near) if near else place[name]

        order = range(len(layers)) if sweep % 2 == 0 else reversed(range(len(layers)))
        layers = list(layers)
        for i in order:
            layers[i] = sorted(layers[i], key=mean)
            place |= {name: (j + 0.5) / len(layers[i]) for j, name in enumerate(layers[i])}
        if (found := _crossings(layers, links)) < least:
            best, least = layers, found
    return best


def _crossings(layers: list[list[str]], links: list[tuple[str, str]]) -> int:
    place = {name: (i, j) for i, layer in enumerate(layers) for j, name in enumerate(layer)}
    ends = [(place[a][0], place[a][1], place[b][1]) for a, b in links]
    return sum(p[0] == q[0] and (p[1] - q[1]) * (p[2] - q[2]) < 0 for p, q in itertools.combinations(ends, 2))


def _across(
    layers: list[list[str]], sizes: Mapping[str, Point], links: list[tuple[str, str]], gap: float
) -> dict[str, float]:
    """Middles of boxes: layers side by side, then each drawn towards its neighbours as far as there is room."""
    x: dict[str, float] = {}
    widest = max(sum(sizes[n][0] for n in layer) + gap * (len(layer) - 1) for layer in layers)
    for layer in layers:
        left = (widest - sum(sizes[n][0] for n in layer) - gap * (len(layer) - 1)) / 2
        for name in layer:
            x[name] = left + sizes[name][0] / 2
            left += sizes[name][0] + gap
    near: dict[str, list[str]] = {name: [] for name in x}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    for _ in range(20):
        for layer in layers:
            for i, name in enumerate(layer):
                if not near[name]:
                    continue
                low, high = -math.inf, math.inf
                if i:
                    low = x[layer[i - 1]] + (sizes[layer[i - 1]][0] + sizes[name][0]) / 2 + gap
                if i + 1 < len(layer):
                    high = x[layer[i + 1]] - (sizes[layer[i + 1]][0] + sizes[name][0]) / 2 - gap
                wanted = sum(x[other] for other in near[name]) / len(near[name])
                if low <= high:
                    x[name] = min(max(wanted, low), high)
    start = min(x[name] - sizes[name][0] / 2 for name in x)
    return {name: value - start for name, value in x.items()}
