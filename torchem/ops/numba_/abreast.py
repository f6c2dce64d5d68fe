"""Four sequences abreast, one in each lane of a vector: forward–backward for few states.

A frame of the recursion is a chain of operations, each of which waits for the one before: a product, a sum, a division.
With few states there is little else to do meanwhile. Four sequences side by side wait once, and their sums need not
cross lanes. The equations are those of `torchem.ops.numba_.chain`; nothing is watched here but the sums, so transitions
must be such that no other mass can be flushed, and whatever fails is left to the caller.

Layout: rows of ``width`` vectors, one for each state, with those beyond K zero. A lane whose sequence has ended goes on
at b = 1 and takes part in nothing.
"""

import math
from typing import NamedTuple

import numpy as np

from torchem.ops.numba_ import vectors as vec

#: Masses below this are not exact.
SAFE = 1e-140
#: What is smaller counts for nothing in γ and w.
_TINY = 1e-150
#: Frames that are worked on together, so that what two passes share stays in the first cache.
_BLOCK = 32


class Space(NamedTuple):
    """Scratch for four sequences of at most so many frames."""

    b: np.ndarray  # [T, width, 4] exponentials of emissions, then w
    u: np.ndarray  # [T, width, 4]
    inverse: np.ndarray  # [T, 4] 1 / Σ u
    v: np.ndarray  # [width, 4] b β of the frame after
    beta: np.ndarray  # [width, 4]
    pairs: np.ndarray  # [width, width, 4] Σ u ⊗ w
    ends: np.ndarray  # [4] frames of each lane
    log: np.ndarray  # [4] logarithm of the scale, NaN where a lane failed
    spare: np.ndarray  # [4]
    begin: np.ndarray  # [4] where emissions of each lane begin
    start: np.ndarray  # [4] and the initial law


@vec.compiled
def make_space(frames, width):
    """Scratch for sequences of at most so many frames."""
    row = width * vec.LANES
    return Space(
        np.empty(frames * row),
        np.empty(frames * row),
        np.empty(frames * vec.LANES),
        np.empty(row),
        np.empty(row),
        np.empty(width * row),
        np.empty(vec.LANES),
        np.empty(vec.LANES),
        np.empty(vec.LANES),
        np.empty(vec.LANES, np.int64),
        np.empty(vec.LANES, np.int64),
    )


@vec.inlined
def _transposed(source, a, b, c, d, k, out, row):
    """Rows of K numbers at four places as K vectors."""
    whole = k - k % 4
    for j in range(0, whole, 4):
        w, x, y, z = vec.load(source, a + j), vec.load(source, b + j), vec.load(source, c + j), vec.load(source, d + j)
        vec.store(out, row + 4 * j, vec.lane0(w, x, y, z))
        vec.store(out, row + 4 * j + 4, vec.lane1(w, x, y, z))
        vec.store(out, row + 4 * j + 8, vec.lane2(w, x, y, z))
        vec.store(out, row + 4 * j + 12, vec.lane3(w, x, y, z))
    for j in range(whole, k):
        vec.store(out, row + 4 * j, vec.gather(source, a + j, b + j, c + j, d + j))


@vec.inlined
def _written(values, scale, tiny, space, t, k, out):
    """K vectors as rows of each lane that has not ended, times a scale; what is close to denormal becomes zero."""
    begin, ends, whole = space.begin, space.ends, k - k % 4
    a, b, c, d = begin[0] + t * k, begin[1] + t * k, begin[2] + t * k, begin[3] + t * k
    for j in range(0, whole, 4):
        w = vec.times(scale, vec.unless_below(vec.load(values, 4 * j), tiny))
        x = vec.times(scale, vec.unless_below(vec.load(values, 4 * j + 4), tiny))
        y = vec.times(scale, vec.unless_below(vec.load(values, 4 * j + 8), tiny))
        z = vec.times(scale, vec.unless_below(vec.load(values, 4 * j + 12), tiny))
        if t < ends[0]:
            vec.store(out, a + j, vec.lane0(w, x, y, z))
        if t < ends[1]:
            vec.store(out, b + j, vec.lane1(w, x, y, z))
        if t < ends[2]:
            vec.store(out, c + j, vec.lane2(w, x, y, z))
        if t < ends[3]:
            vec.store(out, d + j, vec.lane3(w, x, y, z))
    for j in range(whole, k):
        vec.store(space.spare, 0, vec.times(scale, vec.unless_below(vec.load(values, 4 * j), tiny)))
        for lane in range(4):
            if t < ends[lane]:
                out[begin[lane] + t * k + j] = space.spare[lane]


@vec.inlined
def _exponentiated(values, row, k, width):
    """exp(x − max) in place of x, with zeros beyond K; returns the maxima."""
    peak, zero = vec.splat(-np.inf), vec.splat(0.0)
    for j in range(row, row + 4 * k, 4):
        peak = vec.larger(vec.load(values, j), peak)
    shift = vec.where_less(vec.splat(-np.inf), peak, peak, zero)
    for j in range(row, row + 4 * k, 4):
        vec.store(values, j, vec.exponential(vec.minus(vec.load(values, j), shift)))
    for j in range(row + 4 * k, row + 4 * width, 4):
        vec.store(values, j, zero)
    return peak


@vec.inlined
def _emissions(p, longest, space):
    """b_t = exp(e_t − max e_t) of all frames; returns the sums of the maxima."""
    k, width, b, begin, zero = p.k, p.width, space.b, space.begin, vec.splat(0.0)
    ends, peaks = vec.load(space.ends, 0), vec.splat(0.0)
    for t in range(longest):
        row, now, here = 4 * t * width, vec.splat(np.float64(t)), t * k
        _transposed(p.emission, begin[0] + here, begin[1] + here, begin[2] + here, begin[3] + here, k, b, row)
        for j in range(row, row + 4 * k, 4):
            vec.store(b, j, vec.where_less(now, ends, vec.load(b, j), zero))
        peaks = vec.plus(peaks, _exponentiated(b, row, k, width))
    return peaks


@vec.inlined
def _scaled(y, b, place, scale, total, out):
    x = vec.times(vec.unless_below(y, vec.splat(SAFE)), vec.times(scale, vec.load(b, place)))
    vec.store(out, place, x)
    return vec.plus(total, x)


@vec.inlined
def _logged(product, space):
    """Take the logarithm of each lane's product."""
    vec.store(space.spare, 0, product)
    for lane in range(4):
        space.log[lane] += math.log(space.spare[lane])


@vec.inlined
def _forward(p, table, longest, space):
    """u_t of all frames; returns the least sum."""
    k, width, tables, u, b, start = p.k, p.width, p.table, space.u, space.b, space.start
    one, zero, ends = vec.splat(1.0), vec.splat(0.0), vec.load(space.ends, 0)
    scale, product, least = one, one, one
    for t in range(longest):
        row, now, total = 4 * t * width, vec.splat(np.float64(t)), zero
        if t == 0:
            _transposed(p.initial, start[0], start[1], start[2], start[3], k, u, 0)
            vec.store(space.log, 0, _exponentiated(u, 0, k, width))
            for j in range(0, 4 * width, 4):
                total = _scaled(vec.load(u, j), b, j, one, total, u)
        else:
            before = row - 4 * width
            for j in range(0, width, 4):
                y0, y1, y2, y3 = zero, zero, zero, zero
                for i in range(k):
                    x, q = vec.load(u, before + 4 * i), table + i * width + j
                    y0 = vec.fused(x, vec.splat(tables[q]), y0)
                    y1 = vec.fused(x, vec.splat(tables[q + 1]), y1)
                    y2 = vec.fused(x, vec.splat(tables[q + 2]), y2)
                    y3 = vec.fused(x, vec.splat(tables[q + 3]), y3)
                place = row + 4 * j
                total = _scaled(y0, b, place, scale, total, u)
                total = _scaled(y1, b, place + 4, scale, total, u)
                total = _scaled(y2, b, place + 8, scale, total, u)
                total = _scaled(y3, b, place + 12, scale, total, u)
        scale = vec.over(one, total)
        vec.store(space.inverse, 4 * t, scale)
        total = vec.where_less(now, ends, total, one)
        least, product = vec.smaller(total, least), vec.times(product, total)
        if vec.less(product, vec.splat(1e-100)) | vec.less(vec.splat(1e100), product):
            _logged(product, space)
            product = one
    _logged(product, space)
    return least


@vec.inlined
def _turned(y, place, now, last, scale, mass, space):
    """One state's β, one where a lane has not begun yet, and its share of the sum."""
    beta = vec.where_less(now, last, vec.times(scale, y), vec.splat(1.0))
    beta = vec.unless_below(beta, vec.splat(vec.FLUSH))
    vec.store(space.beta, place, beta)
    return vec.plus(mass, beta)


@vec.inlined
def _backward(p, table, longest, weight, space, gamma):
    """β_t, γ_t and w_t (in place of b_t) from the end, and Σ u ⊗ w; returns the least overlap."""
    k, width, tables, u, b, v, beta = p.k, p.width, p.table, space.u, space.b, space.v, space.beta
    one, zero, tiny = vec.splat(1.0), vec.splat(0.0), vec.splat(_TINY)
    ends, flush = vec.load(space.ends, 0), vec.splat(vec.FLUSH)
    last, least, scale = vec.minus(ends, one), one, one
    size, close = vec.larger(weight, vec.minus(zero, weight)), vec.splat(1e-30 if gamma.itemsize == 4 else 1e-200)
    for stop in range(longest, 0, -_BLOCK):
        first = max(stop - _BLOCK, 0)
        for t in range(stop - 1, first - 1, -1):
            row, now, mass, overlap = 4 * t * width, vec.splat(np.float64(t)), zero, zero
            for i in range(0, width, 4):
                y0, y1, y2, y3 = zero, zero, zero, zero
                if t < longest - 1:
                    for j in range(k):
                        x, q = vec.load(v, 4 * j), table + i * width + j
                        y0 = vec.fused(x, vec.splat(tables[q]), y0)
                        y1 = vec.fused(x, vec.splat(tables[q + width]), y1)
                        y2 = vec.fused(x, vec.splat(tables[q + 2 * width]), y2)
                        y3 = vec.fused(x, vec.splat(tables[q + 3 * width]), y3)
                mass = _turned(y0, 4 * i, now, last, scale, mass, space)
                mass = _turned(y1, 4 * i + 4, now, last, scale, mass, space)
                mass = _turned(y2, 4 * i + 8, now, last, scale, mass, space)
                mass = _turned(y3, 4 * i + 12, now, last, scale, mass, space)
            scale = vec.over(one, mass)
            for j in range(0, 4 * k, 4):
                y = vec.load(beta, j)
                vec.store(v, j, vec.unless_below(vec.times(y, vec.load(b, row + j)), flush))
                y = vec.unless_below(y, tiny)
                overlap = vec.fused(vec.unless_below(vec.load(u, row + j), tiny), y, overlap)
            least = vec.smaller(vec.where_less(now, ends, overlap, one), least)
            factor = vec.over(one, overlap)
            after = vec.times(vec.times(size, factor), vec.load(space.inverse, 4 * max(t - 1, 0)))
            after = vec.where_less(now, ends, after, zero)
            for j in range(0, 4 * k, 4):
                y = vec.unless_below(vec.load(beta, j), tiny)
                w = vec.unless_below(vec.times(after, vec.times(y, vec.load(b, row + j))), tiny)
                # A gradient's weight may be negative; what is cut off is small in size.
                vec.store(b, row + j, vec.where_less(weight, zero, vec.minus(zero, w), w))
                x = vec.unless_below(vec.load(u, row + j), tiny)
                vec.store(beta, j, vec.times(y, vec.times(factor, x)))
            _written(beta, weight, close, space, t, k, gamma)
        _accumulate(k, width, max(first, 1), stop, space)
    return least


@vec.inlined
def _accumulate(k, width, first, stop, space):
    """Σ u_{t−1} ⊗ w_t over some frames."""
    u, w, pairs = space.u, space.b, space.pairs
    row = 4 * width
    for i in range(0, k, 2):
        for j in range(0, width, 4):
            q, r = 4 * (i * width + j), 4 * ((i + 1) * width + j)
            y0, y1, y2, y3 = vec.load(pairs, q), vec.load(pairs, q + 4), vec.load(pairs, q + 8), vec.load(pairs, q + 12)
            z0, z1, z2, z3 = vec.load(pairs, r), vec.load(pairs, r + 4), vec.load(pairs, r + 8), vec.load(pairs, r + 12)
            for t in range(first * row, stop * row, row):
                a, b, c = vec.load(u, t - row + 4 * i), vec.load(u, t - row + 4 * i + 4), t + 4 * j
                w0, w1, w2, w3 = vec.load(w, c), vec.load(w, c + 4), vec.load(w, c + 8), vec.load(w, c + 12)
                y0, y1, y2, y3 = vec.fused(a, w0, y0), vec.fused(a, w1, y1), vec.fused(a, w2, y2), vec.fused(a, w3, y3)
                z0, z1, z2, z3 = vec.fused(b, w0, z0), vec.fused(b, w1, z1), vec.fused(b, w2, z2), vec.fused(b, w3, z3)
            vec.store(pairs, q, y0)
            vec.store(pairs, q + 4, y1)
            vec.store(pairs, q + 8, y2)
            vec.store(pairs, q + 12, y3)
            vec.store(pairs, r, z0)
            vec.store(pairs, r + 4, z1)
            vec.store(pairs, r + 8, z2)
            vec.store(pairs, r + 12, z3)


@vec.compiled
def smooth(p, weight, order, first, stop, space, gamma, pairs, out):
    """Posteriors and expected steps of at most four sequences of one dense transition, the longest of them first.

    Leaves the logarithm of each one's scale in ``space.log``; NaN for one that failed, which adds nothing to ``pairs``.

    Args:
        p: The problem.
        weight: Of each sequence.
        order: Sequences; those at ``first`` up to ``stop`` are meant.
        first: See there.
        stop: See there.
        space: Scratch.
        gamma: ``[S · T · K]``, to be written.
        pairs: Expected steps, added to from place ``out`` on.
        out: See there.
    """
    k, width, ends = p.k, p.width, space.ends
    longest = 0
    for lane in range(4):
        s = order[min(first + lane, stop - 1)]
        ends[lane] = p.lengths[s] if first + lane < stop else 0
        longest = max(longest, p.lengths[s])
        space.begin[lane], space.start[lane] = s * p.frames * k, (s // p.starts) * k
        space.spare[lane] = weight[s]
    scale, table = vec.load(space.spare, 0), order[first] // p.shared * width * width
    space.pairs[:] = 0.0
    peaks = _emissions(p, longest, space)
    least = _forward(p, table, longest, space)
    least = vec.smaller(_backward(p, table, longest, scale, space, gamma), least)
    log = vec.plus(vec.load(space.log, 0), peaks)
    log = vec.where_less(least, vec.splat(SAFE), vec.splat(np.nan), log)
    # Infinite where potentials are.
    log = vec.minus(vec.plus(log, log), log)
    vec.store(space.log, 0, log)
    for lane in range(stop - first):
        if not math.isnan(space.log[lane]):
            for i in range(k):
                for j in range(k):
                    q = i * width + j
                    pairs[out + i * k + j] += p.table[table + q] * space.pairs[4 * q + lane]
