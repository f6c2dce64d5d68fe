"""The E-step of a mixture in one pass over the rows, where log-potentials are linear in them.

log p(x, k) = Σ_f t_f(x) slope_fk + constant_k, with features t that are the numbers of a row themselves or products of
them. A block of rows is read, and while it is in the first cache its potentials
are computed and normalised over the components, and the statistics Σ_n γ_nk and Σ_n γ_nk x_n summed: nothing as long
as the data is ever written. Rows may be numbers, or codes that stand for indicators of categories: a potential is then
a sum of rows of the table, one for each column, and so are statistics, with a fraction of the work of the products.

Student's t has a distance δ² that is linear in such features, log p(x, k) = −½ (ν + D) log(1 + δ²/ν) + constant_k, and
statistics in which observations count by E u = (ν + D) / (ν + δ²), their latent scale.

*Layout.* Components run along vectors, padded to whole ones with components of probability zero. Tables are
``[D, width]``. Products are taken by tiles of four rows, or columns, and four vectors: sixteen sums that stay in
registers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchem.ops import threads
from torchem.ops.numba_ import vectors as vec

#: Rows that are worked on together.
_ROWS = 32
#: The code of what is missing.
NONE = 255
#: What the features of numbers are.
NUMBERS, SQUARES, NORM, PAIRS, ENTRIES = range(5)
#: What numbers may be.
TYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8)
#: Cost of an entry of N × K beside its products, in multiply–adds.
_ENTRY = 16
#: And of one under Student's t.
_HEAVY = 48
#: Sums of a mass: Σ γ alone; and under Student's t with E u, log(1 + δ²/ν), r, r² and r³, where r = δ²/(ν + δ²).
_ALONE, _TAILS = 1, 6
_WIDE = vec.WIDE
_LEAST = -np.finfo(np.float64).max
#: Distances end here, that shares of them are numbers.
_FAR = 1e300


class _Tables(NamedTuple):
    """Of one replica after another, flat."""

    slope: np.ndarray  # [R, rows, width]
    constant: np.ndarray  # [R, width]
    width: int
    rows: int
    freedom: np.ndarray  # [R, width], or nothing
    offset: np.ndarray  # likewise, what is added to distances
    size: int  # D of the densities of Student's t


@vec.inlined
def _tile(x, place, step, count, jump, table, column, width, out, target, leap, held):
    """out[i, j] += Σ_d x_i[d] table[d, j] for four i and four vectors of j; x_i[d] at place + i step + d jump.

    With ``held`` sums begin with what ``out`` holds.
    """
    zero, w = vec.splat_wide(0.0), _WIDE
    t1, t2, t3 = target + leap, target + 2 * leap, target + 3 * leap
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    d0, d1, d2, d3 = zero, zero, zero, zero
    if held:
        a0, a1 = vec.load_wide(out, target), vec.load_wide(out, target + w)
        a2, a3 = vec.load_wide(out, target + 2 * w), vec.load_wide(out, target + 3 * w)
        b0, b1 = vec.load_wide(out, t1), vec.load_wide(out, t1 + w)
        b2, b3 = vec.load_wide(out, t1 + 2 * w), vec.load_wide(out, t1 + 3 * w)
        c0, c1 = vec.load_wide(out, t2), vec.load_wide(out, t2 + w)
        c2, c3 = vec.load_wide(out, t2 + 2 * w), vec.load_wide(out, t2 + 3 * w)
        d0, d1 = vec.load_wide(out, t3), vec.load_wide(out, t3 + w)
        d2, d3 = vec.load_wide(out, t3 + 2 * w), vec.load_wide(out, t3 + 3 * w)
    for d in range(count):
        q = column + d * width
        y0, y1 = vec.load_wide(table, q), vec.load_wide(table, q + w)
        y2, y3 = vec.load_wide(table, q + 2 * w), vec.load_wide(table, q + 3 * w)
        p = place + d * jump
        u = vec.spread_wide(x, p)
        a0, a1, a2, a3 = vec.fused(u, y0, a0), vec.fused(u, y1, a1), vec.fused(u, y2, a2), vec.fused(u, y3, a3)
        u = vec.spread_wide(x, p + step)
        b0, b1, b2, b3 = vec.fused(u, y0, b0), vec.fused(u, y1, b1), vec.fused(u, y2, b2), vec.fused(u, y3, b3)
        u = vec.spread_wide(x, p + 2 * step)
        c0, c1, c2, c3 = vec.fused(u, y0, c0), vec.fused(u, y1, c1), vec.fused(u, y2, c2), vec.fused(u, y3, c3)
        u = vec.spread_wide(x, p + 3 * step)
        d0, d1, d2, d3 = vec.fused(u, y0, d0), vec.fused(u, y1, d1), vec.fused(u, y2, d2), vec.fused(u, y3, d3)
    keep(out, target, a0, a1, a2, a3)
    keep(out, t1, b0, b1, b2, b3)
    keep(out, t2, c0, c1, c2, c3)
    keep(out, t3, d0, d1, d2, d3)


@vec.inlined
def keep(out, place, y0, y1, y2, y3):
    """Four vectors to places that follow one another."""
    vec.store(out, place, y0)
    vec.store(out, place + _WIDE, y1)
    vec.store(out, place + 2 * _WIDE, y2)
    vec.store(out, place + 3 * _WIDE, y3)


@vec.inlined
def _narrow_tile(x, place, step, count, jump, table, column, width, out, target, leap, held):
    """`_tile` for one vector."""
    zero = vec.splat_wide(0.0)
    t1, t2, t3 = target + leap, target + 2 * leap, target + 3 * leap
    a, b, c, e = zero, zero, zero, zero
    if held:
        a, b, c, e = vec.load_wide(out, target), vec.load_wide(out, t1), vec.load_wide(out, t2), vec.load_wide(out, t3)
    for d in range(count):
        y, p = vec.load_wide(table, column + d * width), place + d * jump
        a = vec.fused(vec.spread_wide(x, p), y, a)
        b = vec.fused(vec.spread_wide(x, p + step), y, b)
        c = vec.fused(vec.spread_wide(x, p + 2 * step), y, c)
        e = vec.fused(vec.spread_wide(x, p + 3 * step), y, e)
    vec.store(out, target, a)
    vec.store(out, t1, b)
    vec.store(out, t2, c)
    vec.store(out, t3, e)


@vec.inlined
def _product(x, place, step, rows, count, jump, table, width, out, held):
    """out[i] += Σ_d x_i[d] table[d] of groups of four i, all vectors."""
    for i in range(0, rows, 4):
        p, j = place + i * step, 0
        while j + 4 * _WIDE <= width:
            _tile(x, p, step, count, jump, table, j, width, out, i * width + j, width, held)
            j += 4 * _WIDE
        while j < width:
            _narrow_tile(x, p, step, count, jump, table, j, width, out, i * width + j, width, held)
            j += _WIDE


@vec.inlined
def normalized(gamma, place, constant, first, mass, weight, width):
    """Responsibilities times the weight in place of the potentials of a row, added to ``mass``.

    Returns the maximum, and the sum of exponentials below it, whose log is the rest of log Z.
    """
    top = vec.splat_wide(-np.inf)
    for j in range(0, width, _WIDE):
        x = vec.plus(vec.load_wide(gamma, place + j), vec.load_wide(constant, first + j))
        vec.store(gamma, place + j, x)
        top = vec.tainted(vec.larger(x, top), x)
    peak = vec.largest(top)
    # A row that no component explains has shares of zero. NaN stays.
    shift = vec.splat_wide(_LEAST if peak < _LEAST else peak)
    sums = vec.splat_wide(0.0)
    for j in range(0, width, _WIDE):
        y = vec.exponential(vec.minus(vec.load_wide(gamma, place + j), shift))
        vec.store(gamma, place + j, y)
        sums = vec.plus(sums, y)
    whole = vec.total(sums)
    share = vec.splat_wide(weight / whole if whole != 0.0 else 0.0)
    for j in range(0, width, _WIDE):
        y = vec.times(vec.load_wide(gamma, place + j), share)
        vec.store(gamma, place + j, y)
        vec.store(mass, j, vec.plus(vec.load_wide(mass, j), y))
    return peak, whole


@vec.inlined
def _stretched(gamma, place, t, first, seen):
    """−½ (ν + D) log(1 + δ²/ν) in place of the distances δ² of a row; E u, the log and r are ``seen``."""
    width, zero, far, one = t.width, vec.splat_wide(0.0), vec.splat_wide(_FAR), vec.splat_wide(1.0)
    size, half = vec.splat_wide(float(t.size)), vec.splat_wide(-0.5)
    for j in range(0, width, _WIDE):
        nu = vec.load_wide(t.freedom, first + j)
        given = vec.plus(vec.load_wide(gamma, place + j), vec.load_wide(t.offset, first + j))
        distance = vec.tainted(vec.smaller(vec.larger(given, zero), far), given)
        inverse, mass = vec.over(one, vec.plus(nu, distance)), vec.plus(nu, size)
        beyond = vec.log1p(vec.over(distance, nu))
        vec.store(gamma, place + j, vec.times(vec.times(half, mass), beyond))
        vec.store(seen, j, vec.times(mass, inverse))
        vec.store(seen, width + j, beyond)
        vec.store(seen, 2 * width + j, vec.times(distance, inverse))


@vec.inlined
def _scaled(gamma, place, width, seen, mass):
    """γ E u in place of the responsibilities γ of a row; sums of a mass after the first grow."""
    for j in range(0, width, _WIDE):
        y, r = vec.load_wide(gamma, place + j), vec.load_wide(seen, 2 * width + j)
        u = vec.times(y, vec.load_wide(seen, j))
        vec.store(gamma, place + j, u)
        q = width + j
        vec.store(mass, q, vec.plus(vec.load_wide(mass, q), u))
        q += width
        vec.store(mass, q, vec.fused(y, vec.load_wide(seen, width + j), vec.load_wide(mass, q)))
        for _ in range(3):
            q += width
            y = vec.times(y, r)
            vec.store(mass, q, vec.plus(vec.load_wide(mass, q), y))


@vec.inlined
def logged(value, product, peak, whole, weight, weighted):
    """Σ w log Z and a product of sums of exponentials whose log is still to be added, one row later."""
    if weighted:
        value += weight * (peak + math.log(whole)) if weight > 0.0 else 0.0
    else:
        value += peak
        product *= whole
        if not 1e-200 < product < 1e200:
            value, product = value + math.log(product), 1.0
    return value, product


@vec.inlined
def _features(x, place, columns, origin, kind, z, out, target):
    """The features of one row, of z = x − origin, where ``target`` begins in ``out``."""
    if kind == NUMBERS:
        for d in range(columns):
            out[target + d] = x[place + d]
    elif kind == SQUARES:
        for d in range(columns):
            y = x[place + d] - origin[d]
            out[target + d] = y
            out[target + columns + d] = y * y
    elif kind == NORM:
        norm = 0.0
        for d in range(columns):
            y = x[place + d] - origin[d]
            out[target + d] = y
            norm += y * y
        out[target + columns] = norm
    elif kind == ENTRIES:
        for d in range(columns):
            y = x[place + d] - origin[d]
            seen = y == y
            out[target + d] = 1.0 if seen else 0.0
            out[target + columns + d] = y if seen else 0.0
            out[target + 2 * columns + d] = y * y if seen else 0.0
    else:
        p = columns + 1
        half = p // 2 + 1
        z[0] = 1.0
        for d in range(columns):
            z[d + 1] = x[place + d] - origin[d]
        for d in range(p // 2):
            z[p + d] = z[d]
        for d in range(p):
            for shift in range(half):
                out[target + d * half + shift] = z[d] * z[d + shift]


@vec.kernel
def _numbers(r, first, last, x, doubles, columns, weight, t, origin, kind, mass, total):
    """Rows from ``first`` to ``last`` of numbers under replica r; returns Σ w log Z."""
    width = t.width
    slope = t.slope[r * t.rows * width : (r + 1) * t.rows * width]
    rows, gamma, z = np.zeros(_ROWS * t.rows), np.zeros(_ROWS * width), np.zeros(2 * columns + 2)
    heavy, seen = len(t.freedom) > 0, np.zeros(3 * width)
    value, product = 0.0, 1.0
    for start in range(first, last, _ROWS):
        n = min(_ROWS, last - start)
        place, source = 0, rows
        if len(doubles) and n == _ROWS:
            place, source = start * columns, doubles
            ahead = place + n * columns
            for line in range(ahead, min(ahead + n * columns, len(doubles)), 8):
                vec.prefetch(doubles, line)
        else:
            for i in range(n):
                _features(x, (start + i) * columns, columns, origin, kind, z, rows, i * t.rows)
        _product(source, place, t.rows, n, t.rows, 1, slope, width, gamma, False)
        for i in range(n):
            w = weight[start + i] if len(weight) else 1.0
            if heavy:
                _stretched(gamma, i * width, t, r * width, seen)
            peak, whole = normalized(gamma, i * width, t.constant, r * width, mass, w, width)
            value, product = logged(value, product, peak, whole, w, len(weight))
            if heavy:
                _scaled(gamma, i * width, width, seen, mass)
        # The same product, rows and columns exchanged.
        _product(source, place, 1, t.rows, n, t.rows, gamma, width, total, True)
    return value + math.log(product)


@vec.inlined
def _gathered(codes, place, columns, starts, table, width, out):
    """out = Σ_d table[cell of column d], four vectors at a time."""
    w, zero, j = _WIDE, vec.splat_wide(0.0), 0
    while j + 4 * w <= width:
        a, b, c, e = zero, zero, zero, zero
        for d in range(columns):
            code = codes[place + d]
            if code != NONE:
                q = (starts[d] + code) * width + j
                a, b = vec.plus(a, vec.load_wide(table, q)), vec.plus(b, vec.load_wide(table, q + w))
                c, e = vec.plus(c, vec.load_wide(table, q + 2 * w)), vec.plus(e, vec.load_wide(table, q + 3 * w))
        keep(out, j, a, b, c, e)
        j += 4 * w
    while j < width:
        a = zero
        for d in range(columns):
            code = codes[place + d]
            if code != NONE:
                a = vec.plus(a, vec.load_wide(table, (starts[d] + code) * width + j))
        vec.store(out, j, a)
        j += w


@vec.inlined
def _scattered(codes, place, columns, starts, gamma, width, out):
    """out[cell of column d] += γ of every column, four vectors at a time."""
    w, j = _WIDE, 0
    while j + 4 * w <= width:
        a, b = vec.load_wide(gamma, j), vec.load_wide(gamma, j + w)
        c, e = vec.load_wide(gamma, j + 2 * w), vec.load_wide(gamma, j + 3 * w)
        for d in range(columns):
            code = codes[place + d]
            if code != NONE:
                q = (starts[d] + code) * width + j
                keep(
                    out, q,
                    vec.plus(a, vec.load_wide(out, q)), vec.plus(b, vec.load_wide(out, q + w)),
                    vec.plus(c, vec.load_wide(out, q + 2 * w)), vec.plus(e, vec.load_wide(out, q + 3 * w)),
                )  # fmt: skip
        j += 4 * w
    while j < width:
        a = vec.load_wide(gamma, j)
        for d in range(columns):
            code = codes[place + d]
            if code != NONE:
                q = (starts[d] + code) * width + j
                vec.store(out, q, vec.plus(a, vec.load_wide(out, q)))
        j += w


@vec.kernel
def _categories(r, first, last, codes, columns, weight, t, starts, mass, total):
    """Rows from ``first`` to ``last`` of codes under replica r; returns Σ w log Z."""
    width = t.width
    table = t.slope[r * t.rows * width : (r + 1) * t.rows * width]
    gamma, value, product = np.zeros(width), 0.0, 1.0
    for i in range(first, last):
        w, place = weight[i] if len(weight) else 1.0, i * columns
        _gathered(codes, place, columns, starts, table, width, gamma)
        peak, whole = normalized(gamma, 0, t.constant, r * width, mass, w, width)
        value, product = logged(value, product, peak, whole, w, len(weight))
        _scattered(codes, place, columns, starts, gamma, width, total)
    return value + math.log(product)


def _tables(slope: Tensor, constant: Tensor, rows: int, tails: tuple[Tensor, Tensor, int] | None = None) -> _Tables:
    """Tables of slope ``[R, K, D]`` and constant ``[R, K]``, padded to whole vectors and ``rows``.

    ``tails`` are freedom and offset, in the shape of constant, and the size of Student's t.
    """
    k, d = slope.shape[-2:]
    width = -(-k // _WIDE) * _WIDE
    table = torch.zeros(len(slope), rows, width, dtype=torch.float64)
    table[:, :d, :k] = slope.detach().mT

    def padded(value: Tensor, fill: float) -> np.ndarray:
        more = torch.full((len(slope), width), fill, dtype=torch.float64)
        more[:, :k] = value.detach()
        return more.view(-1).numpy()

    common = table.view(-1).numpy(), padded(constant, -math.inf), width, rows
    if tails is None:
        return _Tables(*common, np.empty(0), np.empty(0), 0)
    return _Tables(*common, padded(tails[0], 1.0), padded(tails[1], 0.0), tails[2])


def _pass(kernel: Any, data: tuple[Any, ...], extra: tuple[Any, ...], n: int, t: _Tables, k: int, work: int) -> Any:
    """Σ w log Z ``[R]``, sums of a mass ``[R, sums, K]`` and Σ γ x ``[R, K, rows]``: those of ranges of rows added."""
    replicas, sums = len(t.constant) // t.width, _TAILS if len(t.freedom) else _ALONE
    parts = [(r, *part) for r in range(replicas) for part in threads.ranges(n, work // replicas)]
    mass, total = np.zeros((len(parts), sums * t.width)), np.zeros((len(parts), t.rows * t.width))
    tasks = [(*part, *data, t, *extra, mass[i], total[i]) for i, part in enumerate(parts)]
    values = torch.tensor(threads.run(kernel, tasks, work), dtype=torch.float64)
    each = (replicas, len(parts) // replicas)
    mass_ = torch.from_numpy(mass).view(*each, sums, t.width).sum(1)
    total_ = torch.from_numpy(total).view(*each, t.rows, t.width).sum(1)
    return values.view(each).sum(1), mass_[..., :k], total_.mT[:, :k]


def _flat(weight: Tensor | None) -> np.ndarray:
    return np.empty(0) if weight is None else weight.detach().to(torch.float64).contiguous().numpy()


def of_numbers(
    x: Tensor,
    weight: Tensor | None,
    slope: Tensor,
    constant: Tensor,
    kind: int = NUMBERS,
    origin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w log Z ``[R]``, Σ w γ ``[R, K]`` and Σ w γ t(x) ``[R, K, F]``, float64.

    Args:
        x: ``[N, D]``, one of `TYPES`, nothing missing but for `ENTRIES`.
        weight: ``[N]`` or None.
        slope: ``[R, K, F]``, finite.
        constant: ``[R, K]``, what is added, −inf where a component is impossible.
        kind: What the features are of z = x − origin: z itself, without origin (`NUMBERS`); z and the squares of its
            entries (`SQUARES`); z and its squared norm (`NORM`); the cyclic products of (1, z) with itself that
            `torchem.ops.gaussian` describes (`PAIRS`); ones, z and its squares, zero where missing (`ENTRIES`).
        origin: ``[D]``.
    """
    value, sums, total = _of_features(x, weight, slope, constant, kind, origin)
    return value, sums[:, 0], total


def of_distances(
    x: Tensor,
    weight: Tensor | None,
    slope: Tensor,
    offset: Tensor,
    freedom: Tensor,
    constant: Tensor,
    kind: int,
    origin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`of_numbers` under Student's t, where δ² = slope · t(x) + offset.

    Returns:
        Σ w log Z ``[R]``; Σ of w γ, w γ E u, w γ log(1 + δ²/ν), w γ r, w γ r² and w γ r³, ``[R, 6, K]``; and
        Σ w γ E u t(x) ``[R, K, F]``.

    Args:
        x: As for `of_numbers`.
        weight: As there.
        slope: ``[R, K, F]``, finite.
        offset: ``[R, K]``.
        freedom: ν, ``[R, K]``.
        constant: ``[R, K]``, log-potentials where δ² is zero.
        kind: What the features are, as there.
        origin: ``[D]``.
    """
    return _of_features(x, weight, slope, constant, kind, origin, (freedom, offset, x.shape[1]))


def _of_features(
    x: Tensor,
    weight: Tensor | None,
    slope: Tensor,
    constant: Tensor,
    kind: int,
    origin: Tensor | None,
    tails: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (n, d), (k, f) = x.shape, slope.shape[-2:]
    t = _tables(slope, constant, -(-f // 4) * 4, tails)
    work = len(slope) * n * t.width * (2 * f + (_ENTRY if tails is None else _HEAVY))
    flat = x.detach().contiguous().view(-1).numpy()
    # Blocks of doubles need no copy, if they end where tiles do.
    as_they_are = kind == NUMBERS and x.dtype == torch.float64 and d == t.rows
    data = (flat, flat if as_they_are else np.empty(0), d, _flat(weight))
    about = np.zeros(d) if origin is None else origin.detach().to(torch.float64).contiguous().numpy()
    value, sums, total = _pass(_numbers, data, (about, kind), n, t, k, work)
    return value, sums, total[..., :f]


def of_categories(
    codes: Tensor, starts: Tensor, weight: Tensor | None, table: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w log Z ``[R]``, Σ w γ ``[R, K]`` and, of each category of each column, Σ w γ ``[R, K, cells]``, float64.

    Args:
        codes: ``[N, D]`` bytes, contiguous, `NONE` where missing.
        starts: ``[D]``, the cell of each column's first category.
        weight: ``[N]`` or None.
        table: ``[R, K, cells]``, log-probabilities, finite.
        constant: ``[R, K]``, what is added, −inf where a component is impossible.
    """
    (n, d), (k, cells) = codes.shape, table.shape[-2:]
    t = _tables(table, constant, cells)
    work = len(table) * n * t.width * (2 * d + _ENTRY)
    data = (codes.view(-1).numpy(), d, _flat(weight))
    value, sums, total = _pass(_categories, data, (starts.to(torch.int64).numpy(),), n, t, k, work)
    return value, sums[:, 0], total
