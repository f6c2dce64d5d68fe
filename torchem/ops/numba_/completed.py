"""Normal densities and moments of rows with missing entries, one row after the other, for many components at once.

What `torchem.ops.missing` derives, in loops: each number of a row is a vector of components. Of a pattern of missing
entries Λ_mm is factorised as L D Lᵀ; rows that follow one another with the same pattern share that. Eight rows are
completed, and then their distances and moments taken by tiles of four by four sums that stay in registers.

*Layout.* Components are cut into blocks of one vector; tables are ``[blocks, …, lanes]``, so that what a block needs
stays in a core's own cache. Axes of columns are padded to whole tiles.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchem.ops import threads
from torchem.ops.numba_ import vectors as vec
from torchem.ops.numba_.mixture import keep, logged, normalized

#: Rows that are worked on together, in whole tiles.
_ROWS = 8
_TILE = 4
_WIDE = vec.WIDE
#: Pivots, none above one, that are multiplied before a logarithm is taken.
_PIVOTS = 8


class _Tables(NamedTuple):
    """Of one block after another, flat; differences are in units of conditional standard deviations."""

    mean: np.ndarray  # [D]
    rate: np.ndarray  # [D], one over the unit
    unit: np.ndarray  # [D]
    gap: np.ndarray  # [D], from the origin of moments to the mean
    level: np.ndarray  # [D], what a missing column takes from the constant: 2 log unit + log 2π
    constant: np.ndarray  # [1], log |Σ| + D log 2π
    precision: np.ndarray  # [D, D], of unit diagonal
    root: np.ndarray  # [padded, padded], lower triangular
    columns: int
    padded: int


@vec.inlined
def _tile(a, pa, sa, ta, b, pb, sb, tb, count, out, place, leap, held):
    """out[i, j] += Σ_t a[i, t] b[j, t] for four i and four j, in vectors: a[i, t] at pa + i sa + t ta, b likewise.

    With ``held`` sums begin with what ``out`` holds.
    """
    w, zero = _WIDE, vec.splat_wide(0.0)
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    d0, d1, d2, d3 = zero, zero, zero, zero
    q1, q2, q3 = place + leap, place + 2 * leap, place + 3 * leap
    if held:
        a0, a1 = vec.load_wide(out, place), vec.load_wide(out, place + w)
        a2, a3 = vec.load_wide(out, place + 2 * w), vec.load_wide(out, place + 3 * w)
        b0, b1 = vec.load_wide(out, q1), vec.load_wide(out, q1 + w)
        b2, b3 = vec.load_wide(out, q1 + 2 * w), vec.load_wide(out, q1 + 3 * w)
        c0, c1 = vec.load_wide(out, q2), vec.load_wide(out, q2 + w)
        c2, c3 = vec.load_wide(out, q2 + 2 * w), vec.load_wide(out, q2 + 3 * w)
        d0, d1 = vec.load_wide(out, q3), vec.load_wide(out, q3 + w)
        d2, d3 = vec.load_wide(out, q3 + 2 * w), vec.load_wide(out, q3 + 3 * w)
    for t in range(count):
        p, q = pa + t * ta, pb + t * tb
        y0, y1 = vec.load_wide(b, q), vec.load_wide(b, q + sb)
        y2, y3 = vec.load_wide(b, q + 2 * sb), vec.load_wide(b, q + 3 * sb)
        u = vec.load_wide(a, p)
        a0, a1, a2, a3 = vec.fused(u, y0, a0), vec.fused(u, y1, a1), vec.fused(u, y2, a2), vec.fused(u, y3, a3)
        u = vec.load_wide(a, p + sa)
        b0, b1, b2, b3 = vec.fused(u, y0, b0), vec.fused(u, y1, b1), vec.fused(u, y2, b2), vec.fused(u, y3, b3)
        u = vec.load_wide(a, p + 2 * sa)
        c0, c1, c2, c3 = vec.fused(u, y0, c0), vec.fused(u, y1, c1), vec.fused(u, y2, c2), vec.fused(u, y3, c3)
        u = vec.load_wide(a, p + 3 * sa)
        d0, d1, d2, d3 = vec.fused(u, y0, d0), vec.fused(u, y1, d1), vec.fused(u, y2, d2), vec.fused(u, y3, d3)
    keep(out, place, a0, a1, a2, a3)
    keep(out, q1, b0, b1, b2, b3)
    keep(out, q2, c0, c1, c2, c3)
    keep(out, q3, d0, d1, d2, d3)


class _Room(NamedTuple):
    """What is known of eight rows, one after the other, under each block of components."""

    z: np.ndarray  # [blocks, rows, padded], differences from the mean, completed
    lower: np.ndarray  # [blocks, rows, D, D], factors of what is missing
    rest: np.ndarray  # [blocks, rows], log |Λ_mm| less what missing columns take from the constant
    distance: np.ndarray  # [rows]
    holes: np.ndarray  # [rows, D + 1], missing columns, and a place beyond
    counts: np.ndarray  # [rows], their number
    slots: np.ndarray  # [rows], the first row of the same pattern
    mass: np.ndarray  # [rows], weights of patterns
    weighted: np.ndarray  # [rows, padded]
    inverse: np.ndarray  # [D, D]
    pull: np.ndarray  # [D]
    sums: np.ndarray  # [tile, tile]


class _Sums(NamedTuple):
    """Of one block after another."""

    count: np.ndarray  # [1]
    first: np.ndarray  # [D]
    second: np.ndarray  # [padded, padded], below the diagonal
    spread: np.ndarray  # [padded, padded], likewise


@vec.inlined
def _room(t, blocks):
    d, padded, w = t.columns, t.padded, _WIDE
    return _Room(
        np.zeros(blocks * _ROWS * padded * w), np.zeros(blocks * _ROWS * d * d * w), np.zeros(blocks * _ROWS * w),
        np.zeros(_ROWS * w), np.zeros(_ROWS * (d + 1), np.int64), np.zeros(_ROWS, np.int64), np.zeros(_ROWS, np.int64),
        np.zeros(_ROWS * w), np.zeros(_ROWS * padded * w), np.zeros(d * d * w), np.zeros(d * w),
        np.zeros(_TILE * _TILE * w),
    )  # fmt: skip


@vec.inlined
def _row(order, place):
    return order[place] if len(order) else place


@vec.inlined
def _patterns(x, order, start, n, d, room):
    """Which columns of rows are missing, and which rows share a pattern with the one before."""
    for i in range(n):
        place, at, m = _row(order, start + i) * d, i * (d + 1), 0
        for j in range(d):
            room.holes[at + m] = j
            m += 1 if x[place + j] != x[place + j] else 0
        room.counts[i], room.slots[i] = m, i
        if i and m == room.counts[i - 1]:
            same = True
            for k in range(m):
                same = same and room.holes[at + k] == room.holes[at - d - 1 + k]
            if same:
                room.slots[i] = room.slots[i - 1]


@vec.inlined
def _factorised(precision, base, columns, holes, at, m, lower, to):
    """L D Lᵀ of what is missing: L D below the diagonal of ``lower``, Lᵀ above it and 1/D on it. Returns log |D|."""
    w, one = _WIDE, vec.splat_wide(1.0)
    product, log_det, least = one, vec.splat_wide(0.0), one
    for j in range(m):
        column = base + holes[at + j] * w
        for i in range(j, m):
            value = vec.load_wide(precision, column + holes[at + i] * columns * w)
            p, q = to + i * m * w, to + j * w
            for k in range(j):
                value = vec.reduced(vec.load_wide(lower, p + k * w), vec.load_wide(lower, q + k * m * w), value)
            vec.store(lower, p + j * w, value)
        pivot = vec.load_wide(lower, to + (j * m + j) * w)
        inverse = vec.over(one, pivot)
        product, least = vec.times(product, pivot), vec.smaller(pivot, least)
        if (j + 1) % _PIVOTS == 0:
            log_det, product = vec.plus(log_det, vec.logarithm(product)), one
        vec.store(lower, to + (j * m + j) * w, inverse)
        for i in range(j + 1, m):
            value = vec.load_wide(lower, to + (i * m + j) * w)
            vec.store(lower, to + (j * m + i) * w, vec.times(value, inverse))
    log_det = vec.plus(log_det, vec.logarithm(product))
    # Two pivots below zero would multiply to one above.
    return vec.where_less(vec.splat_wide(0.0), least, log_det, vec.splat_wide(np.nan))


@vec.inlined
def _completed(t, b, holes, at, m, lower, to, pull, z, target):
    """−Λ_mm⁻¹ Λ_mo z_o in the missing places of z."""
    w, d, zero = _WIDE, t.columns, vec.splat_wide(0.0)
    for i in range(m):
        row, value = (b * d + holes[at + i]) * d * w, zero
        for j in range(d):
            value = vec.fused(vec.load_wide(t.precision, row + j * w), vec.load_wide(z, target + j * w), value)
        for k in range(i):  # L y = pull
            value = vec.reduced(vec.load_wide(lower, to + (k * m + i) * w), vec.load_wide(pull, k * w), value)
        vec.store(pull, i * w, value)
    for i in range(m - 1, -1, -1):  # D Lᵀ v = y
        p = to + i * m * w
        value = vec.times(vec.load_wide(pull, i * w), vec.load_wide(lower, p + i * w))
        for k in range(i + 1, m):
            value = vec.reduced(vec.load_wide(lower, p + k * w), vec.load_wide(pull, k * w), value)
        vec.store(pull, i * w, value)
        vec.store(z, target + holes[at + i] * w, vec.minus(zero, value))


@vec.inlined
def _opened(x, order, start, n, t, b, block, room):
    """Factors of patterns, and differences of rows from the means of block ``b``, completed, at ``block`` of the room.

    A row of which nothing was seen is at the mean.
    """
    w, d, padded, zero, less = _WIDE, t.columns, t.padded, vec.splat_wide(0.0), vec.splat_wide(0.0)
    for i in range(n):
        m, at, place = room.counts[i], i * (d + 1), _row(order, start + i) * d
        to, target = (block * _ROWS + room.slots[i]) * d * d * w, (block * _ROWS + i) * padded * w
        if room.slots[i] == i and m < d:
            less = _factorised(t.precision, b * d * d * w, d, room.holes, at, m, room.lower, to)
            for k in range(m):
                less = vec.minus(less, vec.load_wide(t.level, (b * d + room.holes[at + k]) * w))
        vec.store(room.rest, (block * _ROWS + i) * w, less)
        for j in range(d):
            difference = vec.minus(vec.splat_wide(float(x[place + j])), vec.load_wide(t.mean, (b * d + j) * w))
            vec.store(room.z, target + j * w, vec.times(difference, vec.load_wide(t.rate, (b * d + j) * w)))
        for k in range(m):
            vec.store(room.z, target + room.holes[at + k] * w, zero)
        if m < d:
            _completed(t, b, room.holes, at, m, room.lower, to, room.pull, room.z, target)


@vec.inlined
def _distances(t, b, block, n, room):
    """Squared distances of completed rows, plus the constant of their densities."""
    w, padded, root = _WIDE, t.padded, b * t.padded * t.padded * _WIDE
    for i in range(n):
        vec.store(room.distance, i * w, vec.load_wide(t.constant, b * w))
    for r in range(0, n, _TILE):
        for i in range(0, padded, _TILE):
            _tile(
                room.z, (block * _ROWS + r) * padded * w, padded * w, w, t.root, root + i * padded * w, padded * w, w,
                i + _TILE, room.sums, 0, _TILE * w, False,
            )  # fmt: skip
            for q in range(min(_TILE, n - r)):
                total = vec.load_wide(room.distance, (r + q) * w)
                for j in range(_TILE):
                    y = vec.load_wide(room.sums, (q * _TILE + j) * w)
                    total = vec.fused(y, y, total)
                vec.store(room.distance, (r + q) * w, total)


@vec.inlined
def _scored(t, b, block, i, room, value, place, inner, spot):
    """The log-density of a row, and the term of Q: what is missing is expected at a squared distance of its dimension.

    Both are zero where nothing was seen, which says nothing.
    """
    w, half, zero = _WIDE, vec.splat_wide(-0.5), vec.splat_wide(0.0)
    if room.counts[i] == t.columns:
        vec.store(value, place, zero)
        vec.store(inner, spot, zero)
    else:
        distance = vec.load_wide(room.distance, i * w)
        rest = vec.load_wide(room.rest, (block * _ROWS + i) * w)
        vec.store(value, place, vec.times(half, vec.plus(distance, rest)))
        vec.store(inner, spot, vec.times(half, vec.plus(distance, vec.splat_wide(float(room.counts[i])))))


@vec.inlined
def _spread(holes, at, m, padded, lower, to, inverse, mass, second, base):
    """second += mass · Λ_mm⁻¹ below the diagonal, in the places of what is missing, from L D Lᵀ."""
    w, one, zero = _WIDE, vec.splat_wide(1.0), vec.splat_wide(0.0)
    for j in range(m):  # L⁻¹, column by column
        vec.store(inverse, (j * m + j) * w, one)
        for i in range(j + 1, m):
            value = vec.load_wide(lower, to + (j * m + i) * w)
            for k in range(j + 1, i):
                left, right = vec.load_wide(lower, to + (k * m + i) * w), vec.load_wide(inverse, (k * m + j) * w)
                value = vec.fused(left, right, value)
            vec.store(inverse, (i * m + j) * w, vec.minus(zero, value))
    for i in range(m):  # L⁻ᵀ D⁻¹ L⁻¹
        for j in range(i + 1):
            value = zero
            for k in range(i, m):
                left = vec.times(vec.load_wide(lower, to + (k * m + k) * w), vec.load_wide(inverse, (k * m + i) * w))
                value = vec.fused(left, vec.load_wide(inverse, (k * m + j) * w), value)
            place = base + (holes[at + i] * padded + holes[at + j]) * w
            vec.store(second, place, vec.fused(mass, value, vec.load_wide(second, place)))


@vec.inlined
def _collected(order, start, n, t, b, block, room, weight, places, left, sums, s):
    """Sums over rows under weights at ``places[i]``, of what they leave open under ``left``, added at block ``s``."""
    w, d, padded = _WIDE, t.columns, t.padded
    matrix = s * padded * padded * w
    for i in range(n):
        target = (block * _ROWS + i) * padded * w
        y, mass = vec.load_wide(weight, places[i]), vec.load_wide(left, places[i])
        if room.counts[i] == d:
            y, mass = vec.splat_wide(0.0), vec.splat_wide(0.0)
        slot = room.slots[i] * w
        vec.store(room.mass, slot, mass if room.slots[i] == i else vec.plus(mass, vec.load_wide(room.mass, slot)))
        vec.store(sums.count, s * w, vec.plus(vec.load_wide(sums.count, s * w), y))
        for j in range(d):
            p, q, to = target + j * w, (b * d + j) * w, (s * d + j) * w
            e = vec.fused(vec.load_wide(room.z, p), vec.load_wide(t.unit, q), vec.load_wide(t.gap, q))
            vec.store(room.z, p, e)
            e = vec.times(e, y)
            vec.store(room.weighted, (i * padded + j) * w, e)
            vec.store(sums.first, to, vec.plus(vec.load_wide(sums.first, to), e))
    for i in range(0, padded, _TILE):
        for j in range(0, i + _TILE, _TILE):
            _tile(
                room.weighted, i * w, w, padded * w, room.z, (block * _ROWS * padded + j) * w, w, padded * w,
                n, sums.second, matrix + (i * padded + j) * w, padded * w, True,
            )  # fmt: skip
    for i in range(n):
        m, to = room.counts[i], (block * _ROWS + i) * d * d * w
        if room.slots[i] == i and 0 < m < d:
            mass = vec.load_wide(room.mass, i * w)
            _spread(room.holes, i * (d + 1), m, padded, room.lower, to, room.inverse, mass, sums.spread, matrix)


@vec.kernel
def _densities(b, first, last, x, order, t, width, value, inner):
    """Log-densities of the rows from ``first`` to ``last`` of an order under a block, and the terms of Q."""
    room = _room(t, 1)
    for start in range(first, last, _ROWS):
        n = min(_ROWS, last - start)
        _patterns(x, order, start, n, t.columns, room)
        _opened(x, order, start, n, t, b, 0, room)
        _distances(t, b, 0, n, room)
        for i in range(n):
            place = _row(order, start + i) * width + b * _WIDE
            _scored(t, b, 0, i, room, value, place, inner, place)


@vec.kernel
def _moments(b, first, last, x, order, t, width, weight, left, sums):
    """Sums over the rows from ``first`` to ``last`` of an order under a block, added to what is given."""
    room, places = _room(t, 1), np.zeros(_ROWS, np.int64)
    for start in range(first, last, _ROWS):
        n = min(_ROWS, last - start)
        _patterns(x, order, start, n, t.columns, room)
        _opened(x, order, start, n, t, b, 0, room)
        for i in range(n):
            places[i] = _row(order, start + i) * width + b * _WIDE
        _collected(order, start, n, t, b, 0, room, weight, places, left, sums, 0)


@vec.kernel
def _mixed(first, last, x, order, t, blocks, weight, log_weight, mass, sums):
    """The E-step of a mixture over the rows from ``first`` to ``last`` of an order; returns Σ w log Z and Q."""
    width, room, places = blocks * _WIDE, _room(t, blocks), np.zeros(_ROWS, np.int64)
    gamma, inner, heard = np.zeros(_ROWS * width), np.zeros(_ROWS * width), vec.splat_wide(0.0)
    value, product, zero = 0.0, 1.0, vec.splat_wide(0.0)
    for start in range(first, last, _ROWS):
        n = min(_ROWS, last - start)
        _patterns(x, order, start, n, t.columns, room)
        for b in range(blocks):
            _opened(x, order, start, n, t, b, b, room)
            _distances(t, b, b, n, room)
            for i in range(n):
                place = i * width + b * _WIDE
                _scored(t, b, b, i, room, gamma, place, inner, place)
        for i in range(n):
            w = weight[_row(order, start + i)] if len(weight) else 1.0
            peak, whole = normalized(gamma, i * width, log_weight, 0, mass, w, width)
            value, product = logged(value, product, peak, whole, w, len(weight))
        for b in range(blocks):
            for i in range(n):
                places[i] = i * width + b * _WIDE
                y, q = vec.load_wide(gamma, places[i]), vec.load_wide(inner, places[i])
                # A weight of zero silences a density that underflowed to −inf.
                heard = vec.plus(heard, vec.where_less(zero, y, vec.times(y, q), zero))
            _collected(order, start, n, t, b, b, room, gamma, places, gamma, sums, b)
    return value + math.log(product), vec.total(heard)


def _blocked(value: Tensor) -> Tensor:
    """Components, the first axis, as ``[blocks, …, lanes]``; lanes that nobody needs hold the last component."""
    value = value.detach().to(torch.float64)
    lanes = torch.arange(-(-len(value) // _WIDE) * _WIDE, device=value.device).clamp(max=len(value) - 1)
    return value[lanes].unflatten(0, (-1, _WIDE)).movedim(1, -1).contiguous()


def _numbers(x: Tensor) -> np.ndarray:
    """Rows ``[n, D]`` as flat numbers, of a type that loops are compiled for."""
    known = x.dtype in (torch.float64, torch.float32)
    return (x if known else x.to(torch.float64)).detach().contiguous().view(-1).numpy()


def _places(order: Tensor | None) -> np.ndarray:
    return np.empty(0, np.int64) if order is None else order.numpy()


def _flat(value: Tensor) -> np.ndarray:
    return value.view(-1).numpy()


class Rows:
    """Densities and moments of rows under components ``[J]``, of which each number is a float64.

    Args:
        mean: ``[J, D]``.
        unit: Conditional standard deviations, ``[J, D]``.
        gap: Means less the origin of moments, ``[J, D]``.
        level: 2 log unit + log 2π, ``[J, D]``.
        constant: log |Σ| + D log 2π, ``[J]``.
        precision: Σ⁻¹ in these units, of unit diagonal, ``[J, D, D]``.
        root: Its lower-triangular factor R with RᵀR = precision, ``[J, D, D]``.
    """

    def __init__(
        self, mean: Tensor, unit: Tensor, gap: Tensor, level: Tensor, constant: Tensor, precision: Tensor, root: Tensor
    ):
        self.count, d = mean.shape
        padded = -(-d // _TILE) * _TILE
        root = torch.nn.functional.pad(root, (0, padded - d, 0, padded - d))
        given = (mean, 1 / unit, unit, gap, level, constant.unsqueeze(-1), precision, root)
        tables: Any = (*(_flat(_blocked(value)) for value in given), d, padded)
        self.tables = _Tables(*tables)
        self.blocks = -(-self.count // _WIDE)
        self.sums = [value.squeeze(0) for value in self._zeros(1, self.blocks)]

    def densities(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-densities of what was observed of ``x [n, D]``, and what is summed to Q, ``[J, n]``; 0 where nothing was.

        Args:
            x: NaN where missing.
            order: In which rows are taken, ``[n]``: those with equal patterns one after the other; None as they are.
        """
        self.rows = _numbers(x), _places(order)
        width = self.blocks * _WIDE
        value, inner = (torch.empty(len(x), width, dtype=torch.float64) for _ in range(2))
        tasks = [(*part, *self.rows, self.tables, width, _flat(value), _flat(inner)) for part in self._parts(len(x))]
        threads.run(_densities, tasks, self._work(len(x)))
        return value[:, : self.count].mT, inner[:, : self.count].mT

    def collect(self, weight: Tensor, left: Tensor | None = None) -> None:
        """Add the rows last given to `densities` under ``weight [J, n]``, what they leave open under ``left``."""
        width, n = self.blocks * _WIDE, weight.shape[-1]

        def by_row(value: Tensor) -> np.ndarray:
            rows = torch.zeros(n, width, dtype=torch.float64)
            rows[:, : self.count] = value.detach().mT
            return _flat(rows)

        weights = by_row(weight)
        given = (weights, weights if left is None else by_row(left))
        parts = self._parts(n)
        sums = self._zeros(len(parts), 1)
        tasks = [
            (*part, *self.rows, self.tables, width, *given, _Sums(*(_flat(value[i]) for value in sums)))
            for i, part in enumerate(parts)
        ]
        threads.run(_moments, tasks, self._work(n))
        self._add(value.unflatten(0, (self.blocks, -1)).sum(1).squeeze(1) for value in sums)

    def mixed(
        self, x: Tensor, order: Tensor | None, weight: Tensor | None, log_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ w log Z, Σ w γ ``[J]`` and Q of a mixture of the components, collected.

        Args:
            x: As for `densities`, as is ``order``.
            order: In which rows are taken.
            weight: ``[n]`` or None.
            log_weight: Of the components, ``[J]``.
        """
        data = _numbers(x), _places(order), self.tables, self.blocks
        weights = np.empty(0) if weight is None else _flat(weight.detach().to(torch.float64).contiguous())
        parts, width = threads.ranges(len(x), self._work(len(x))), self.blocks * _WIDE
        constant = torch.full((width,), -torch.inf, dtype=torch.float64)
        constant[: self.count] = log_weight.detach()
        mass, sums = torch.zeros(len(parts), width, dtype=torch.float64), self._zeros(len(parts), self.blocks)
        tasks = [
            (*part, *data, weights, _flat(constant), _flat(mass[i]), _Sums(*(_flat(value[i]) for value in sums)))
            for i, part in enumerate(parts)
        ]
        values = torch.tensor(threads.run(_mixed, tasks, self._work(len(x))), dtype=torch.float64)
        self._add(value.sum(0) for value in sums)
        value, inner = values.sum(0).unbind()
        return value, mass.sum(0)[: self.count], inner

    def _zeros(self, parts: int, blocks: int) -> list[Tensor]:
        d, padded = self.tables.columns, self.tables.padded
        return [torch.zeros(parts, blocks, size, _WIDE, dtype=torch.float64) for size in (1, d, padded**2, padded**2)]

    def _add(self, sums: Iterable[Tensor]) -> None:
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)]

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ w ``[J]``, Σ w y ``[J, D]`` and Σ w y yᵀ of all that was collected, y being completed rows from the origin.

        The last is Σ w Λ_mm⁻¹ in the places of what is missing, in the units of the precision; both ``[J, D, D]``.
        """
        d, padded = self.tables.columns, self.tables.padded
        count, first, second, spread = (value.mT.flatten(0, 1)[: self.count] for value in self.sums)
        second, spread = (self._mirrored(value, d, padded) for value in (second, spread))
        return count.squeeze(-1), first, second, spread

    @staticmethod
    def _mirrored(value: Tensor, d: int, padded: int) -> Tensor:
        """The whole of symmetric matrices from their lower halves."""
        lower = value.unflatten(-1, (padded, padded))[..., :d, :d].tril()
        return lower + lower.tril(-1).mT

    def _work(self, n: int) -> int:
        return n * self.blocks * _WIDE * self.tables.columns * (self.tables.columns + 8)

    def _parts(self, n: int) -> list[tuple[int, int, int]]:
        each = threads.ranges(n, self._work(n) // self.blocks)
        return [(b, *part) for b in range(self.blocks) for part in each]
