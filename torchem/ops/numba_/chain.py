"""Chains of discrete states as compiled loops on the CPU: two passes in O(T K²) time and O(T K) memory.

Messages are probabilities, normalised at each frame, with the logarithm of the scale kept in float64: with forward
messages u and backward messages β, frame by frame,

    u_t = b_t ∘ (u_{t−1} A) / Σ u_{t−1},    β_t = A (b_{t+1} ∘ β_{t+1}) / Σ β_{t+1},
    γ_t = u_t ∘ β_t / D_t  with  D_t = Σ u_t β_t,
    ξ = A ∘ Σ_t u_{t−1} ⊗ w_t  with  w_t = b_t ∘ β_t / (D_t Σ u_{t−1}),

where b and A are exponentials of the potentials less their largest. ξ is a product over frames, taken from blocks that
are still in the cache. A single long sequence is swept from both ends at once: the passes meet in the middle and each
goes on through what the other one left.

*What is flushed.* Such messages lose what is smaller than `FLUSH`, and a later frame may need it (left-right chains).
By induction over frames the loss does not matter as long as each state that can be reached has a predicted mass
(u_{t−1} A)_j of `_SAFE`, and D_t is no less; where all of A is above `_DENSE` this always holds. It is watched in every
other case, and a sequence that fails is done again with numbers m · 2^e whose exponents e are numbers too: exact,
without a logarithm per step, and in time proportional to the transitions that are not −inf.

*Vectors.* Loops run over rows padded to a multiple of `LANES`, by vectors of that many numbers. What a compiler
makes of plain loops over a few states is several times slower, and may sum in another order from one loop to the next;
this way results are the same to the bit for any number of threads. Where states are few, a vector holds a number of
four sequences instead (`torchem.ops.numba_.abreast`).

Layout of all functions: ``initial [Gi, K]``, ``transition [Gt, K, K]`` (rows: from) or ``[Gt, T−1, K, K]`` (t: from
frame t to t + 1), ``emission [S, T, K]``, all unnormalised log-potentials of one dtype; ``lengths [S]`` or None. Gi and
Gt divide S; sequence s reads row ``s // (S // G)``.

Source: L. R. Rabiner (1989), section V.A, for the scaling.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchem.ops import threads
from torchem.ops.numba_ import abreast
from torchem.ops.numba_ import vectors as vec

#: Masses above this are exact: what was flushed is smaller by 1e-20.
_SAFE = abreast.SAFE
#: Where masses are raised to that, the excess is followed in this many times its size; of all it may be 1e-20.
_MAGNIFIED, _DOUBT = 1e100, 1e80
#: Scaled transition probabilities above this keep every mass above `_SAFE`.
_DENSE = 1e-70
#: Numbers of one scratch array that are worked on together, so that a handful of them stays in the first cache.
_BLOCK = 2048
#: Up to so many states, and so many frames times states, sequences are taken four at a time.
_STATES, _FRAMES = 8, 1 << 15
#: Fewer sequences than this are cut in the middle when they are long.
_FEW = 8


# ---- a problem ------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """Potentials as flat arrays, tables of exponentials, and sizes; what kernels read."""

    initial: np.ndarray  # [Gi · K]
    transition: np.ndarray  # [Gt · steps · K · K]
    emission: np.ndarray  # [S · T · K]
    lengths: np.ndarray  # [S]
    table: np.ndarray  # [Gt · steps · width · width] exponentials; columns beyond K hold ones, rows beyond K zeros
    peak: np.ndarray  # [Gt · steps] what was subtracted before
    least: np.ndarray  # [Gt · steps] the smallest real entry of a table
    starts: int  # sequences that share a row of `initial`
    shared: int  # sequences that share a transition
    steps: int  # tables of one transition: one, or T − 1 where `varying`
    varying: bool
    frames: int  # T
    k: int
    width: int  # k, rounded up to whole vectors
    block: int  # frames that are worked on together


class _Space(NamedTuple):
    """Scratch for one sequence cut at frame `middle`; a row for each frame left or right of it, and one block more."""

    b: np.ndarray  # [T · width] exponentials of emissions, then w
    u: np.ndarray  # [(middle + 1 + block) · width]
    beta: np.ndarray  # [(T − middle + block) · width]
    inverse: np.ndarray  # [middle + 1 + block] 1 / Σ u
    v: np.ndarray  # [width + 1] b β at the frame that was last passed from the right, and 1 / Σ β
    reach: np.ndarray  # [3 K + 2] see `_reached`
    excess: np.ndarray  # [2 · width + 1] by how much u may be too large, magnified; then that of a frame in the making
    pairs: np.ndarray  # [width · width], or [steps · K · K] where transitions vary


@vec.compiled
def _space(p, frames, middle, pairs):
    return _Space(
        np.empty(frames * p.width),
        np.empty((middle + 1 + p.block) * p.width),
        np.empty((max(frames - middle, 0) + p.block) * p.width),
        np.empty(middle + 1 + p.block),
        np.empty(p.width + 1),
        np.zeros(3 * p.k + 2, np.int64),
        np.empty(2 * p.width + 1),
        np.empty(pairs),
    )


@vec.inlined
def _padded(source, start, k, out, place, width):
    """Copy K numbers as float64, padded by −inf; returns the largest."""
    whole = k - k % vec.LANES
    top = vec.splat(-np.inf)
    for j in range(0, whole, vec.LANES):
        x = vec.load(source, start + j)
        vec.store(out, place + j, x)
        top = vec.larger(x, top)
    peak = vec.largest(top)
    for j in range(whole, k):
        x = np.float64(source[start + j])
        out[place + j] = x
        peak = max(peak, x)
    for j in range(k, width):
        out[place + j] = -np.inf
    return peak


@vec.inlined
def _exponentiate(out, place, count, peak):
    """exp(x − peak) in place; peak −inf means that all are."""
    shift = vec.splat(peak if peak > -np.inf else 0.0)
    for j in range(place, place + count, vec.LANES):
        vec.store(out, j, vec.exponential(vec.minus(vec.load(out, j), shift)))


@vec.compiled
def _table(p, m):
    """Fill table m, its peak and its least entry."""
    k, width = p.k, p.width
    source, place = m * k * k, m * width * width
    peak, least = -np.inf, np.inf
    for i in range(k):
        peak = max(peak, _padded(p.transition, source + i * k, k, p.table, place + i * width, width))
        for j in range(k):
            least = min(least, np.float64(p.transition[source + i * k + j]))
    _exponentiate(p.table, place, k * width, peak)
    for i in range(k):
        p.table[place + i * width + k : place + (i + 1) * width] = 1.0
    p.table[place + k * width : place + width * width] = 0.0
    p.peak[m] = peak if peak > -np.inf else 0.0
    p.least[m] = math.exp(least - peak)


@vec.kernel
def _tables(p, first, stop):
    for m in range(first, stop):
        _table(p, m)


@vec.inlined
def _at(p, s, t):
    """Which table leads from frame t to t + 1."""
    return (s // p.shared) * p.steps + (t if p.varying else 0)


@vec.inlined
def _placed(p, s):
    """Where the first table of a sequence begins, and how far it is from one step's to the next."""
    size = p.width * p.width
    return _at(p, s, 0) * size, size if p.varying else 0


@vec.inlined
def _dense(p, s):
    m = (s // p.shared) * p.steps
    for i in range(p.steps):
        if not p.least[m + i] > _DENSE:
            return False
    return True


@vec.inlined
def _scale(p, s):
    """What the potentials of a sequence were lessened by, save those of emissions."""
    m, count = (s // p.shared) * p.steps, p.lengths[s] - 1
    if not p.varying:
        return p.peak[m] * count if count else 0.0
    total = 0.0
    for i in range(count):
        total += p.peak[m + i]
    return total


# ---- passes over blocks of frames -----------------------------------------------------------------------------------


@vec.compiled
def _emissions(p, s, start, stop, b, shift):
    """b_t = exp(e_t − max e_t), row t − shift; returns the sum of the maxima."""
    k, width, emission, peaks = p.k, p.width, p.emission, 0.0
    begin = s * p.frames * k
    for t in range(start, stop):
        row = (t - shift) * width
        peak = _padded(emission, begin + t * k, k, b, row, width)
        _exponentiate(b, row, width, peak)
        peaks += peak
    return peaks


@vec.inlined
def _from_left(table, m, u, place, out, target, width):
    """out = u A: sixteen columns at a time, then four."""
    zero = vec.splat(0.0)
    j = 0
    while j + 4 * vec.LANES <= width:
        y0, y1, y2, y3 = zero, zero, zero, zero
        for i in range(width):
            x, q = vec.splat(u[place + i]), m + i * width + j
            y0 = vec.fused(x, vec.load(table, q), y0)
            y1 = vec.fused(x, vec.load(table, q + vec.LANES), y1)
            y2 = vec.fused(x, vec.load(table, q + 2 * vec.LANES), y2)
            y3 = vec.fused(x, vec.load(table, q + 3 * vec.LANES), y3)
        vec.store(out, target + j, y0)
        vec.store(out, target + j + vec.LANES, y1)
        vec.store(out, target + j + 2 * vec.LANES, y2)
        vec.store(out, target + j + 3 * vec.LANES, y3)
        j += 4 * vec.LANES
    while j < width:
        y0, y1, y2, y3 = zero, zero, zero, zero
        for i in range(0, width, 4):
            q = m + i * width + j
            y0 = vec.fused(vec.splat(u[place + i]), vec.load(table, q), y0)
            y1 = vec.fused(vec.splat(u[place + i + 1]), vec.load(table, q + width), y1)
            y2 = vec.fused(vec.splat(u[place + i + 2]), vec.load(table, q + 2 * width), y2)
            y3 = vec.fused(vec.splat(u[place + i + 3]), vec.load(table, q + 3 * width), y3)
        vec.store(out, target + j, vec.plus(vec.plus(y0, y1), vec.plus(y2, y3)))
        j += vec.LANES


@vec.inlined
def _from_right(table, m, v, scale, out, target, width):
    """out = scale · A v: four rows at a time."""
    factor = vec.splat(scale)
    for i in range(0, width, vec.LANES):
        y0, y1, y2, y3 = vec.splat(0.0), vec.splat(0.0), vec.splat(0.0), vec.splat(0.0)
        for j in range(0, width, vec.LANES):
            x, q = vec.load(v, j), m + i * width + j
            y0 = vec.fused(x, vec.load(table, q), y0)
            y1 = vec.fused(x, vec.load(table, q + width), y1)
            y2 = vec.fused(x, vec.load(table, q + 2 * width), y2)
            y3 = vec.fused(x, vec.load(table, q + 3 * width), y3)
        vec.store(out, target + i, vec.times(factor, vec.sums(y0, y1, y2, y3)))


@vec.compiled
def _first(p, s, out, place):
    """exp(initial − max), padded by ones; returns the maximum."""
    peak = _padded(p.initial, (s // p.starts) * p.k, p.k, out, place, p.width)
    _exponentiate(out, place, p.width, peak)
    out[place + p.k : place + p.width] = 1.0
    return peak


@vec.inlined
def _reached(start, step, emission, place, t, k, varying, reach):
    """Which states can be reached at frame t: from k numbers on in ``reach``, and with its emission the first k.

    The next k hold what the former were derived from, and two more numbers its validity and the last frame.
    """
    if t == 0:
        for j in range(k):
            reach[k + j] = start[j] > -np.inf
        reach[3 * k] = 0
    else:
        if reach[3 * k + 1] != t - 1:  # all masses were large there, so all states were reached
            for j in range(k):
                reach[j] = emission[place - k + j] > -np.inf
        same = reach[3 * k] == 1 and not varying
        for j in range(k):
            same &= reach[j] == reach[2 * k + j]
            reach[2 * k + j] = reach[j]
        reach[3 * k] = 1
        if not same:
            reach[k : 2 * k] = 0
            for i in range(k):
                if reach[i]:
                    for j in range(k):
                        reach[k + j] |= step[i * k + j] > -np.inf
    for j in range(k):
        reach[j] = reach[k + j] and emission[place + j] > -np.inf
    reach[3 * k + 1] = t


@vec.inlined
def _raised(u, row, excess, width, k, reach):
    """Raise the mass of each state that can be reached to `_SAFE`, and add that to the excess; True if any was low."""
    raised = False
    for j in range(k):
        if reach[k + j] and u[row + j] < _SAFE:
            u[row + j] = _SAFE
            excess[width + j] += _SAFE * _MAGNIFIED
            raised = True
    return raised


@vec.inlined
def _scaled(u, place, scale, b, b_place, out, target, width):
    """out = scale · u ∘ b, and its sum."""
    factor, low, total = vec.splat(scale), vec.splat(_SAFE), vec.splat(0.0)
    for j in range(0, width, vec.LANES):
        x = vec.times(vec.unless_below(vec.load(u, place + j), low), vec.times(factor, vec.load(b, b_place + j)))
        vec.store(out, target + j, x)
        total = vec.plus(total, x)
    return vec.total(total)


@vec.compiled
def _forward(p, s, start, stop, space, b_shift, u_shift, dense):
    """u_t for some frames, row t − u_shift; the row before the first is read.

    Returns the logarithm of the scale, NaN where potentials are NaN, inf where the sequence must be done again.
    """
    width, table, first, step = p.width, p.table, *_placed(p, s)
    b, u, inverse, excess, reach = space.b, space.u, space.inverse, space.excess, space.reach
    k, begin, emission = p.k, s * p.frames * p.k, p.emission
    doubtful = start > 0 and excess[2 * width] > 0
    log, product = 0.0, 1.0
    for t in range(start, stop):
        row, b_row = (t - u_shift) * width, (t - b_shift) * width
        scale = 1.0
        if t == 0:
            log += _first(p, s, u, row)
        else:
            scale = inverse[t - 1 - u_shift]
            _from_left(table, first + (t - 1) * step, u, row - width, u, row, width)
        if not dense:
            if doubtful:
                _from_left(table, first + (t - 1) * step, excess, 0, excess, width, width)
            else:
                excess[width : 2 * width] = 0.0
            low = vec.load(u, row)
            for j in range(vec.LANES, width, vec.LANES):
                low = vec.smaller(vec.load(u, row + j), low)
            if vec.smallest(low) < _SAFE:
                here = p.transition[_at(p, s, max(t - 1, 0)) * k * k :]
                _reached(p.initial[(s // p.starts) * k :], here, emission, begin + t * k, t, k, p.varying, reach)
                doubtful = _raised(u, row, excess, width, k, reach) or doubtful
        total = _scaled(u, row, scale, b, b_row, u, row, width)
        if not total >= _SAFE:
            return np.nan if total != total else np.inf
        if doubtful and not _scaled(excess, width, scale, b, b_row, excess, 0, width) <= _DOUBT * total:
            return np.inf
        inverse[t - u_shift] = 1.0 / total
        product *= total
        if not 1e-100 < product < 1e100:
            log += math.log(product)
            product = 1.0
    excess[2 * width] = 1.0 if doubtful else 0.0
    return log + math.log(product)


@vec.compiled
def _backward(p, s, start, stop, space, shift):
    """β_t for some frames from the right, row t − shift; v is carried over."""
    k, width, table, first, step = p.k, p.width, p.table, *_placed(p, s)
    last, b, beta, v = p.lengths[s] - 1, space.b, space.beta, space.v
    for t in range(stop - 1, start - 1, -1):
        row = (t - shift) * width
        if t == last:
            beta[row : row + k] = 1.0
            beta[row + k : row + width] = 0.0
        else:
            _from_right(table, first + t * step, v, v[width], beta, row, width)
        total = vec.splat(0.0)
        for j in range(0, width, vec.LANES):
            x = vec.unless_below(vec.load(beta, row + j), vec.splat(vec.FLUSH))
            vec.store(beta, row + j, x)
            vec.store(v, j, vec.unless_below(vec.times(x, vec.load(b, t * width + j)), vec.splat(vec.FLUSH)))
            total = vec.plus(total, x)
        mass = vec.total(total)
        v[width] = 1.0 / mass if mass > 0 else 0.0


@vec.inlined
def _written(source, row, scale, out, place, k):
    """Write a row of probabilities times a scale; those close to denormal numbers, which are slow, become zero."""
    tiny = 1e-30 if out.itemsize == 4 else 1e-200
    whole = k - k % vec.LANES
    for j in range(0, whole, vec.LANES):
        vec.store(
            out, place + j, vec.times(vec.splat(scale), vec.unless_below(vec.load(source, row + j), vec.splat(tiny)))
        )
    for j in range(whole, k):
        x = source[row + j]
        out[place + j] = 0.0 if x < tiny else scale * x


@vec.compiled
def _combine(p, s, start, stop, space, u_shift, beta_shift, weight, gamma):
    """γ_t and w_t, which takes the place of b_t; False where the sequence must be done again."""
    k, width, b, u, beta, inverse = p.k, p.width, space.b, space.u, space.beta, space.inverse
    begin, tiny, sign = s * p.frames * k, vec.splat(1e-150), vec.splat(math.copysign(1.0, weight))
    for t in range(start, stop):
        u_row, row, w_row = (t - u_shift) * width, (t - beta_shift) * width, t * width
        total = vec.splat(0.0)
        for j in range(0, width, vec.LANES):
            x = vec.unless_below(vec.load(u, u_row + j), tiny)
            y = vec.unless_below(vec.load(beta, row + j), tiny)
            total = vec.fused(x, y, total)
        overlap = vec.total(total)
        if not overlap >= _SAFE:
            return False
        factor = vec.splat(1.0 / overlap)
        # A gradient's weight may be negative; what is cut off is small in size.
        after = vec.splat(abs(weight) / overlap * inverse[t - 1 - u_shift] if t else 0.0)
        for j in range(0, width, vec.LANES):
            x = vec.unless_below(vec.load(beta, row + j), tiny)
            vec.store(
                b,
                w_row + j,
                vec.times(sign, vec.unless_below(vec.times(after, vec.times(x, vec.load(b, w_row + j))), tiny)),
            )
            vec.store(beta, row + j, vec.times(x, vec.times(factor, vec.unless_below(vec.load(u, u_row + j), tiny))))
        _written(beta, row, weight, gamma, begin + t * k, k)
    return True


@vec.compiled
def _accumulate(p, s, start, stop, space, u_shift):
    """Σ u_{t−1} ⊗ w_t over frames of one transition, or each by itself, times its table, where transitions vary."""
    k, width, u, w, pairs = p.k, p.width, space.u, space.b, space.pairs
    start = max(start, 1)
    before = -(1 + u_shift) * width
    if p.varying:
        for t in range(start, stop):
            out, m = (t - 1) * k * k, _at(p, s, t - 1) * width * width
            for i in range(k):
                x = u[before + t * width + i]
                for j in range(k):
                    pairs[out + i * k + j] = x * p.table[m + i * width + j] * w[t * width + j]
        return
    begin, end = start * width, stop * width
    for i in range(0, width, 4):
        j = 0
        while j + 2 * vec.LANES <= width:
            q = i * width + j
            y0, z0 = vec.load(pairs, q), vec.load(pairs, q + vec.LANES)
            y1, z1 = vec.load(pairs, q + width), vec.load(pairs, q + width + vec.LANES)
            y2, z2 = vec.load(pairs, q + 2 * width), vec.load(pairs, q + 2 * width + vec.LANES)
            y3, z3 = vec.load(pairs, q + 3 * width), vec.load(pairs, q + 3 * width + vec.LANES)
            for t in range(begin, end, width):
                y, z, place = vec.load(w, t + j), vec.load(w, t + j + vec.LANES), before + t + i
                x0, x1, x2, x3 = (
                    vec.splat(u[place]),
                    vec.splat(u[place + 1]),
                    vec.splat(u[place + 2]),
                    vec.splat(u[place + 3]),
                )
                y0, z0 = vec.fused(x0, y, y0), vec.fused(x0, z, z0)
                y1, z1 = vec.fused(x1, y, y1), vec.fused(x1, z, z1)
                y2, z2 = vec.fused(x2, y, y2), vec.fused(x2, z, z2)
                y3, z3 = vec.fused(x3, y, y3), vec.fused(x3, z, z3)
            vec.store(pairs, q, y0)
            vec.store(pairs, q + vec.LANES, z0)
            vec.store(pairs, q + width, y1)
            vec.store(pairs, q + width + vec.LANES, z1)
            vec.store(pairs, q + 2 * width, y2)
            vec.store(pairs, q + 2 * width + vec.LANES, z2)
            vec.store(pairs, q + 3 * width, y3)
            vec.store(pairs, q + 3 * width + vec.LANES, z3)
            j += 2 * vec.LANES
        if j < width:
            q = i * width + j
            y0, y1 = vec.load(pairs, q), vec.load(pairs, q + width)
            y2, y3 = vec.load(pairs, q + 2 * width), vec.load(pairs, q + 3 * width)
            for t in range(begin, end, width):
                y, place = vec.load(w, t + j), before + t + i
                y0, y1 = vec.fused(vec.splat(u[place]), y, y0), vec.fused(vec.splat(u[place + 1]), y, y1)
                y2, y3 = vec.fused(vec.splat(u[place + 2]), y, y2), vec.fused(vec.splat(u[place + 3]), y, y3)
            vec.store(pairs, q, y0)
            vec.store(pairs, q + width, y1)
            vec.store(pairs, q + 2 * width, y2)
            vec.store(pairs, q + 3 * width, y3)


@vec.inlined
def _carry(p, space, t, row):
    """Move what the forward pass left at frame t − 1 to the row before those of a block; returns the block's shift.

    Rows `row` … are the block's; it was preceded by a whole one there, or by frame t − 1 at row t − 1.
    """
    width = p.width
    source = t - 1 if t == row - 1 else row + p.block - 1
    space.inverse[row - 1] = space.inverse[source]
    space.u[(row - 1) * width : row * width] = space.u[source * width : (source + 1) * width]
    return t - row


# ---- exactly, with exponents apart ----------------------------------------------------------------------------------

#: 2^(64 − i); what is smaller than a sum by more than the last counts for nothing in it.
_POWER = 2.0 ** np.arange(64.0, -257.0, -1.0)


#: log 2 in parts that are exact for larger multiples.
_LOG2_FINE = float.fromhex("0x0.B1721p0"), float.fromhex("0x0.7F7D1p-20"), float.fromhex("0x0.CF79ABC9E3B398p-40")


@vec.inlined
def _parts(x):
    """exp x as m · 2^e with 1 ≤ m < 2 and e a whole number, or m = 0 and e = −inf."""
    e = np.floor(x * (1 / math.log(2)))
    if e == -np.inf:
        return 0.0, e
    rest = ((x - e * _LOG2_FINE[0]) - e * _LOG2_FINE[1]) - e * _LOG2_FINE[2]
    return math.exp(min(max(rest, 0.0), math.log(2))), e


class _Steps(NamedTuple):
    """The possible transitions, by where they lead to or come from: their m and e, and where a state's begin."""

    start: np.ndarray  # [2, K + 1]
    state: np.ndarray  # [2, K · K]
    m: np.ndarray  # [2, K · K]
    e: np.ndarray  # [2, K · K]


@vec.compiled
def _steps(k):
    return _Steps(
        np.zeros((2, k + 1), np.int64), np.empty((2, k * k), np.int64), np.empty((2, k * k)), np.empty((2, k * k))
    )


@vec.compiled
def _list_steps(p, m, steps):
    k = p.k
    for side in range(2):
        q = 0
        for here in range(k):
            for there in range(k):
                x = p.transition[m * k * k + (here * k + there if side else there * k + here)]
                if x > -np.inf:
                    steps.state[side, q] = there
                    steps.m[side, q], steps.e[side, q] = _parts(np.float64(x))
                    q += 1
            steps.start[side, here + 1] = q


@vec.inlined
def _power(gap):
    """2^−gap; gap is negative where one of two equal numbers has been renormalised."""
    return _POWER[max(int(gap) + 64, 0)] if gap <= 256 else 0.0


@vec.compiled
def _summed(steps, side, m, e, out_m, out_e):
    """out_j = Σ over the transitions of state j, to it (side 0) or from it (side 1)."""
    for j in range(len(out_m)):
        first, stop = steps.start[side, j], steps.start[side, j + 1]
        top, total = -np.inf, 0.0
        for q in range(first, stop):
            top = max(top, e[steps.state[side, q]] + steps.e[side, q])
        if top > -np.inf:
            for q in range(first, stop):
                i = steps.state[side, q]
                total += m[i] * steps.m[side, q] * _power(top - e[i] - steps.e[side, q])
        out_m[j], out_e[j] = total, top


@vec.compiled
def _met(p, s, t, m, e):
    """Multiply by the exponentials of frame t."""
    for j in range(p.k):
        x, y = _parts(np.float64(p.emission[(s * p.frames + t) * p.k + j]))
        m[j] *= x
        e[j] += y
        if m[j] >= 2.0**32:
            m[j] *= 2.0**-32
            e[j] += 32


@vec.compiled
def _weighed(m, e, n, d, out):
    """Products over their largest power of two; returns its exponent, and their sum."""
    top, total = -np.inf, 0.0
    for j in range(len(m)):
        top = max(top, e[j] + d[j])
    for j in range(len(m)):
        out[j] = m[j] * n[j] * _power(top - e[j] - d[j])
        total += out[j]
    return top, total


@vec.compiled
def _undefined(p, s):
    """Whether a potential of the sequence is NaN, or infinite so that sums are."""
    k, length = p.k, p.lengths[s]
    first = (s // p.starts) * k
    for j in range(first, first + k):
        if not p.initial[j] < np.inf:
            return True
    first, steps = (s // p.shared) * p.steps * k * k, min(length - 1, p.steps)
    for j in range(first, first + steps * k * k):
        if not p.transition[j] < np.inf:
            return True
    first = s * p.frames * k
    for j in range(first, first + length * k):
        if not p.emission[j] < np.inf:
            return True
    return False


@vec.compiled
def _exact_forward(p, s, steps, m, e):
    """Messages ``[length, K]`` as m · 2^e, in no other scale; returns log Z."""
    k = p.k
    one, zero, share = np.ones(k), np.zeros(k), np.empty(k)
    for t in range(p.lengths[s]):
        if t == 0:
            for j in range(k):
                m[0, j], e[0, j] = _parts(np.float64(p.initial[(s // p.starts) * k + j]))
        else:
            if p.varying or t == 1:
                _list_steps(p, _at(p, s, t - 1), steps)
            _summed(steps, 0, m[t - 1], e[t - 1], m[t], e[t])
        _met(p, s, t, m[t], e[t])
    top, total = _weighed(m[p.lengths[s] - 1], e[p.lengths[s] - 1], one, zero, share)
    return math.log(total) + top * math.log(2) if top > -np.inf else -np.inf


@vec.compiled
def _exact_smooth(p, s, weight, gamma, pairs, out):
    """`smooth` for one sequence, whose steps are added to ``pairs``; returns log Z."""
    k, length = p.k, p.lengths[s]
    begin, end = s * p.frames * k, (s * p.frames + length) * k
    if _undefined(p, s):
        gamma[begin:end] = np.nan if weight != 0 else 0.0
        if weight != 0:
            pairs[out : out + p.steps * k * k] = np.nan
        return np.nan
    steps, m, e = _steps(k), np.empty((length, k)), np.empty((length, k))
    log_z = _exact_forward(p, s, steps, m, e)
    gamma[begin:end] = 0.0
    if log_z == -np.inf or weight == 0:
        return log_z
    n, d, share = np.ones(k), np.zeros(k), np.empty(k)
    for t in range(length - 1, -1, -1):
        top, total = _weighed(m[t], e[t], n, d, share)
        for j in range(k):
            gamma[begin + t * k + j] = weight * (share[j] / total)
        if t == 0:
            break
        _met(p, s, t, n, d)
        if p.varying:
            _list_steps(p, _at(p, s, t - 1), steps)
        place = out + (t - 1 if p.varying else 0) * k * k
        for i in range(k):
            for q in range(steps.start[1, i], steps.start[1, i + 1]):
                j = steps.state[1, q]
                x = _power(top - e[t - 1, i] - steps.e[1, q] - d[j]) * (m[t - 1, i] * steps.m[1, q] * n[j])
                pairs[place + i * k + j] += weight * (x / total)
        _summed(steps, 1, n.copy(), d.copy(), n, d)
    return log_z


# ---- smoothing ------------------------------------------------------------------------------------------------------


@vec.inlined
def _from_start(p, s, middle, space, dense):
    """Forward to the middle; returns the logarithm of the scale."""
    log = 0.0
    for t in range(0, middle, p.block):
        stop = min(t + p.block, middle)
        log += _emissions(p, s, t, stop, space.b, 0)
        log += _forward(p, s, t, stop, space, 0, 0, dense)
        if not log < np.inf:
            break
    return log


@vec.inlined
def _from_end(p, s, middle, space):
    """Backward to the middle; returns the sum of the maxima of emissions."""
    log = 0.0
    for stop in range(p.lengths[s], middle, -p.block):
        t = max(stop - p.block, middle)
        log += _emissions(p, s, t, stop, space.b, 0)
        _backward(p, s, t, stop, space, middle)
    return log


@vec.inlined
def _to_end(p, s, middle, space, dense, weight, gamma):
    """Forward from the middle, through what the backward pass left."""
    log = 0.0
    for t in range(middle, p.lengths[s], p.block):
        stop = min(t + p.block, p.lengths[s])
        shift = _carry(p, space, t, middle + 1)
        log += _forward(p, s, t, stop, space, 0, shift, dense)
        if not log < np.inf or not _combine(p, s, t, stop, space, shift, middle, weight, gamma):
            return log + np.inf
        _accumulate(p, s, t, stop, space, shift)
    return log


@vec.inlined
def _to_start(p, s, middle, space, weight, gamma):
    """Backward from the middle, through what the forward pass left; inf where the sequence must be done again."""
    for stop in range(middle, 0, -p.block):
        t = max(stop - p.block, 0)
        shift = t - (p.lengths[s] - middle)
        _backward(p, s, t, stop, space, shift)
        if not _combine(p, s, t, stop, space, 0, shift, weight, gamma):
            return np.inf
        _accumulate(p, s, t, stop, space, 0)
    return 0.0


@vec.inlined
def _collect(p, s, steps, pairs, out):
    """Add what was accumulated for one sequence to the steps of its transition."""
    k, width = p.k, p.width
    if p.varying:
        for q in range((p.lengths[s] - 1) * k * k):
            pairs[out + q] += steps[q]
        return
    m = _at(p, s, 0) * width * width
    for i in range(k):
        for j in range(k):
            pairs[out + i * k + j] += p.table[m + i * width + j] * steps[i * width + j]


@vec.kernel
def _smooth_many(p, weight, order, parts, first, stop, log_z, gamma, pairs):
    """Some parts of the sequences, one after the other or four abreast; the steps of each part are summed."""
    k, size, longest = p.k, p.steps * p.k * p.k, 0
    for i in range(parts[first], parts[stop]):
        longest = max(longest, p.lengths[order[i]])
    space = _space(p, longest, longest, size if p.varying else p.width * p.width)
    together = _abreast(p, longest)
    lanes = abreast.make_space(longest if together else 0, p.width)
    for part in range(first, stop):
        out = part * size
        pairs[out : out + size] = 0.0
        for i in range(parts[part], parts[part + 1], 4):
            end = min(i + 4, parts[part + 1])
            lanes.log[:] = np.nan
            if together and end - i > 1 and p.lengths[order[end - 1]] > 0 and _dense(p, order[i]):
                abreast.smooth(p, weight, order, i, end, lanes, gamma, pairs, out)
            for lane in range(end - i):
                s = order[i + lane]
                if math.isnan(lanes.log[lane]):
                    log_z[s] = _smoothed(p, s, weight[s], space, gamma, pairs, out)
                else:
                    log_z[s] = lanes.log[lane] + _scale(p, s)
                gamma[(s * p.frames + p.lengths[s]) * k : (s + 1) * p.frames * k] = 0.0


@vec.compiled
def _smoothed(p, s, weight, space, gamma, pairs, out):
    """One sequence; returns its log-normaliser."""
    length = p.lengths[s]
    space.pairs[: 0 if p.varying else p.width * p.width] = 0.0
    log = _from_start(p, s, length, space, _dense(p, s))
    if log < np.inf:
        log += _to_start(p, s, length, space, weight, gamma)
    if not log < np.inf:
        return _exact_smooth(p, s, weight, gamma, pairs, out)
    _collect(p, s, space.pairs, pairs, out)
    return log + _scale(p, s)


@vec.inlined
def _abreast(p, longest):
    """Whether sequences are taken four at a time: few states, and frames that the cache holds."""
    return not p.varying and p.k <= _STATES and longest * p.width <= _FRAMES


@vec.kernel
def _smooth_half(p, weight, s, middle, space, gamma, stage):
    """One of the four passes over a long sequence."""
    if stage == 0:
        return _from_start(p, s, middle, space, _dense(p, s))
    if stage == 1:
        return _from_end(p, s, middle, space)
    if stage == 2:
        return _to_end(p, s, middle, space, _dense(p, s), weight[s], gamma)
    return _to_start(p, s, middle, space, weight[s], gamma)


@vec.kernel
def _smooth_end(p, weight, s, log, left, right, log_z, gamma, pairs, out):
    """Put the halves of a long sequence together."""
    k = p.k
    if log < np.inf:
        _collect(p, s, left, pairs, out)
        if not p.varying:
            _collect(p, s, right, pairs, out)
        log_z[s] = log + _scale(p, s)
    else:
        log_z[s] = _exact_smooth(p, s, weight[s], gamma, pairs, out)
    gamma[(s * p.frames + p.lengths[s]) * k : (s + 1) * p.frames * k] = 0.0


# ---- filtering, sampling, the best path -----------------------------------------------------------------------------


@vec.kernel
def _filter_many(p, first, stop, log_z, alpha):
    """log Z of some sequences and, where there is room for them, the filtered posteriors."""
    k, wanted = p.k, len(alpha) > 0
    space = _space(p, p.block, 0, 0)
    for s in range(first, stop):
        length, dense, log = p.lengths[s], _dense(p, s), _scale(p, s)
        for t in range(0, length, p.block):
            end = min(t + p.block, length)
            shift = _carry(p, space, t, 1) if t else -1
            log += _emissions(p, s, t, end, space.b, t)
            log += _forward(p, s, t, end, space, t, shift, dense)
            if not log < np.inf:
                break
            if wanted:
                for i in range(t, end):
                    row = i - shift
                    _written(space.u, row * p.width, space.inverse[row], alpha, (s * p.frames + i) * k, k)
        if not log < np.inf:
            log = _exact_filter(p, s, alpha)
        if wanted:
            alpha[(s * p.frames + length) * k : (s + 1) * p.frames * k] = 0.0
        log_z[s] = log


@vec.compiled
def _exact_filter(p, s, alpha):
    k, length = p.k, p.lengths[s]
    begin, end = s * p.frames * k, (s * p.frames + length) * k
    if _undefined(p, s):
        alpha[begin:end] = np.nan
        return np.nan
    m, e = np.empty((length, k)), np.empty((length, k))
    log_z = _exact_forward(p, s, _steps(k), m, e)
    alpha[begin:end] = 0.0
    if log_z == -np.inf or len(alpha) == 0:
        return log_z
    one, zero, share = np.ones(k), np.zeros(k), np.empty(k)
    for t in range(length):
        _, total = _weighed(m[t], e[t], one, zero, share)
        for j in range(k):
            alpha[begin + t * k + j] = share[j] / total
    return log_z


@vec.compiled
def _drawn(share, u):
    """The first state whose cumulative share exceeds a uniform number, never one of share zero; −1 if all are."""
    total, state = 0.0, -1
    for j in range(len(share)):
        total += share[j]
    level, total = u * total, 0.0
    for j in range(len(share)):
        total += share[j]
        if share[j] > 0:
            state = j
            if total > level:
                break
    return state


@vec.kernel
def _sample_many(p, first, stop, uniforms, path):
    """Paths by forward filtering and backward sampling."""
    k, width = p.k, p.width
    longest = 0
    for s in range(first, stop):
        longest = max(longest, p.lengths[s])
    space, share = _space(p, p.block, longest, 0), np.empty(k)
    for s in range(first, stop):
        length, dense, log, begin = p.lengths[s], _dense(p, s), 0.0, s * p.frames
        path[begin : begin + p.frames] = -1
        for t in range(0, length, p.block):
            end = min(t + p.block, length)
            log += _emissions(p, s, t, end, space.b, t)
            log += _forward(p, s, t, end, space, t, 0, dense)
            if not log < np.inf:
                break
        if not log < np.inf:
            _exact_sample(p, s, uniforms, path)
            continue
        for t in range(length - 1, -1, -1):
            for i in range(k):
                share[i] = space.u[t * width + i]
            if t < length - 1:
                m = _at(p, s, t) * width * width + path[begin + t + 1]
                for i in range(k):
                    share[i] *= p.table[m + i * width]
            path[begin + t] = _drawn(share, uniforms[begin + t])
            if path[begin + t] < 0:  # drawn was a state that a raised mass alone led to
                _exact_sample(p, s, uniforms, path)
                break


@vec.compiled
def _exact_sample(p, s, uniforms, path):
    k, length, begin = p.k, p.lengths[s], s * p.frames
    m, e, steps = np.empty((length, k)), np.empty((length, k)), _steps(k)
    if _undefined(p, s) or _exact_forward(p, s, steps, m, e) == -np.inf:
        return
    n, d, share = np.ones(k), np.zeros(k), np.empty(k)
    for t in range(length - 1, -1, -1):
        if t < length - 1:
            if p.varying:
                _list_steps(p, _at(p, s, t), steps)
            n[:] = 0.0
            d[:] = -np.inf
            state = path[begin + t + 1]
            for q in range(steps.start[0, state], steps.start[0, state + 1]):
                n[steps.state[0, q]] = steps.m[0, q]
                d[steps.state[0, q]] = steps.e[0, q]
        _weighed(m[t], e[t], n, d, share)
        path[begin + t] = _drawn(share, uniforms[begin + t])


@vec.inlined
def _best(table, before, after, row, width, bad):
    """max_i of what is ``before`` a frame's transition plus A_ij, then with what is in ``after``."""
    none = vec.splat(-np.inf)
    here = row - width
    j = 0
    while j + 4 * vec.LANES <= width:
        y0, y1, y2, y3 = none, none, none, none
        for i in range(width):
            x, q = vec.splat(after[here + i]), i * width + j
            y0 = vec.larger(vec.plus(x, vec.load(table, q)), y0)
            y1 = vec.larger(vec.plus(x, vec.load(table, q + vec.LANES)), y1)
            y2 = vec.larger(vec.plus(x, vec.load(table, q + 2 * vec.LANES)), y2)
            y3 = vec.larger(vec.plus(x, vec.load(table, q + 3 * vec.LANES)), y3)
        bad = _scored(before, after, row + j, y0, bad)
        bad = _scored(before, after, row + j + vec.LANES, y1, bad)
        bad = _scored(before, after, row + j + 2 * vec.LANES, y2, bad)
        bad = _scored(before, after, row + j + 3 * vec.LANES, y3, bad)
        j += 4 * vec.LANES
    while j < width:
        y0, y1, y2, y3 = none, none, none, none
        for i in range(0, width, 4):
            q = i * width + j
            y0 = vec.larger(vec.plus(vec.splat(after[here + i]), vec.load(table, q)), y0)
            y1 = vec.larger(vec.plus(vec.splat(after[here + i + 1]), vec.load(table, q + width)), y1)
            y2 = vec.larger(vec.plus(vec.splat(after[here + i + 2]), vec.load(table, q + 2 * width)), y2)
            y3 = vec.larger(vec.plus(vec.splat(after[here + i + 3]), vec.load(table, q + 3 * width)), y3)
        bad = _scored(before, after, row + j, vec.larger(vec.larger(y0, y1), vec.larger(y2, y3)), bad)
        j += vec.LANES
    return bad


@vec.inlined
def _scored(before, after, place, score, bad):
    vec.store(before, place, score)
    score = vec.plus(score, vec.load(after, place))
    vec.store(after, place, score)
    return vec.tainted(bad, score)


@vec.inlined
def _before(after, here, column, c, target, width):
    """The lowest state from which a column of transitions leads to a score."""
    wanted = vec.splat(target)
    for start in range(0, width, 64):
        found = 0
        for j in range(start, min(start + 64, width), vec.LANES):
            found |= vec.equal(vec.plus(vec.load(after, here + j), vec.load(column, c + j)), wanted) << (j - start)
        if found:
            return start + vec.lowest(found)
    return 0


@vec.compiled
def _list_scores(p, m, table, columns):
    """Transition m and its transpose, padded by −inf; returns zero, or NaN where an entry is."""
    k, width, bad = p.k, p.width, vec.splat(0.0)
    for i in range(k):
        _padded(p.transition, (m * k + i) * k, k, table, i * width, width)
        for j in range(0, width, vec.LANES):
            bad = vec.tainted(bad, vec.load(table, i * width + j))
        for j in range(k):
            columns[j * width + i] = table[i * width + j]
    return vec.total(bad)


@vec.kernel
def _viterbi_many(p, first, stop, score, path):
    """Best paths of some sequences, traced back through scores before and after each frame's emission."""
    k, width, emission, step = p.k, p.width, p.emission, 1 if p.varying else 0
    longest = 0
    for s in range(first, stop):
        longest = max(longest, p.lengths[s])
    before, after = np.empty(longest * width), np.empty(longest * width)
    table, columns = np.full(width * width, -np.inf), np.full(width * width, -np.inf)
    listed, doubt = -1, 0.0
    for s in range(first, stop):
        length, begin, place = p.lengths[s], s * p.frames, _at(p, s, 0)
        bad = vec.splat(0.0)
        if step:
            listed, doubt = -1, 0.0
        for t in range(length):
            _padded(emission, (begin + t) * k, k, after, t * width, width)
            if t == 0:
                _padded(p.initial, (s // p.starts) * k, k, before, 0, width)
                for j in range(0, width, vec.LANES):
                    bad = _scored(before, after, j, vec.load(before, j), bad)
                continue
            m = place + (t - 1) * step
            if m != listed:
                doubt = _list_scores(p, m, table, columns) + (doubt if step else 0.0)
                listed = m
            bad = _best(table, before, after, t * width, width, bad)
        state, last = 0, (length - 1) * width
        for j in range(1, k):
            if after[last + j] > after[last + state]:
                state = j
        score[s] = after[last + state] + vec.total(bad) + (doubt if length > 1 else 0.0)
        path[begin : begin + p.frames] = -1
        if score[s] > -np.inf:
            path[begin + length - 1] = state
            for t in range(length - 2, -1, -1):
                if step:
                    for i in range(k):
                        columns[state * width + i] = p.transition[((place + t) * k + i) * k + state]
                target = before[(t + 1) * width + state]
                state = _before(after, t * width, columns, state * width, target, width)
                path[begin + t] = state


# ---- what others call -----------------------------------------------------------------------------------------------


def _flat(value: Tensor) -> np.ndarray:
    return value.detach().contiguous().view(-1).numpy()


def _aligned(count: int, dtype: torch.dtype = torch.float64) -> np.ndarray:
    """Memory that begins where a cache line does, as torch's does: no vector lies across two."""
    return torch.empty(count, dtype=dtype).numpy()


def _problem(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, tables: bool = True
) -> _Problem:
    """The problem as kernels read it, with its tables filled where they are wanted."""
    s, t, k = emission.shape
    varying = transition.dim() == 4
    count = len(transition) * (transition.shape[1] if varying else 1)
    width = -(-k // vec.LANES) * vec.LANES
    ends = np.full(s, t, dtype=np.int64) if lengths is None else _flat(lengths.to(torch.int64))
    made = count if tables else 0
    p = _Problem(
        _flat(initial),
        _flat(transition),
        _flat(emission),
        ends,
        _aligned(made * width * width),
        _aligned(made),
        _aligned(made),
        starts=s // max(1, len(initial)),
        shared=s // max(1, len(transition)),
        steps=transition.shape[1] if varying else 1,
        varying=varying,
        frames=t,
        k=k,
        width=width,
        block=max(16, _BLOCK // width),
    )
    work = 8 * made * width * width
    threads.run(_tables, [(p, *r) for r in threads.ranges(made, work)], work)
    return p


def _work(p: _Problem) -> int:
    """Multiply–adds of one pass, exponentials counted as eight."""
    return len(p.lengths) * p.frames * p.width * (p.width + 8)


def _run_ranges(kernel: Callable[..., Any], p: _Problem, *arrays: np.ndarray) -> None:
    work = _work(p)
    threads.run(kernel, [(p, *r, *arrays) for r in threads.ranges(len(p.lengths), work)], work)


def log_normalizer(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
    """log Z of each sequence, ``[S]``; −inf where no path is possible."""
    p = _problem(initial, transition, emission, lengths)
    log_z = np.empty(len(p.lengths))
    _run_ranges(_filter_many, p, log_z, np.empty(0, p.emission.dtype))
    return torch.from_numpy(log_z).to(emission.dtype)


def filter(  # noqa: A001  the field's name
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log Z ``[S]`` and p(z_t | x_1…t) ``[S, T, K]``; zero in the padding and where no path is possible."""
    p = _problem(initial, transition, emission, lengths)
    log_z, alpha = np.empty(len(p.lengths)), _aligned(p.emission.size, emission.dtype)
    _run_ranges(_filter_many, p, log_z, alpha)
    return torch.from_numpy(log_z).to(emission.dtype), torch.from_numpy(alpha).view(emission.shape)


def smooth(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z ``[S]``, expected steps in the shape of ``transition`` (float64), posteriors ``[S, T, K]``; both weighted.

    Source: L. R. Rabiner (1989), equations 27 and 37.
    """
    s = len(emission)
    if not s:
        return emission.new_zeros(0), torch.zeros_like(transition, dtype=torch.float64), torch.zeros_like(emission)
    p = _problem(initial, transition, emission, lengths)
    mass = np.ones(s) if weight is None else _flat(weight.to(torch.float64))
    log_z, gamma = np.empty(s), _aligned(p.emission.size, emission.dtype)
    long = s < _FEW and 2 * _work(p) >= 4 * s * threads.TASK and (p.shared == 1 or not p.varying)
    pairs = (_smooth_long if long else _smooth_short)(p, mass, log_z, gamma)
    shapes = torch.from_numpy(pairs).view(transition.shape), torch.from_numpy(gamma).view(emission.shape)
    return torch.from_numpy(log_z).to(emission.dtype), *shapes


def _smooth_short(p: _Problem, weight: np.ndarray, log_z: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Sequences of their own kind; how they are parted, and so how steps are summed, depends on shapes alone."""
    work, groups = 2 * _work(p), len(log_z) // p.shared
    many = 1 if p.varying else min(p.shared, max(1, min(64, work // threads.TASK, len(gamma) // p.width**2) // groups))
    parts = np.array([g * p.shared + p.shared * i // many for g in range(groups) for i in range(many)] + [len(log_z)])
    pairs = np.empty((groups, many, p.steps * p.k * p.k))
    order = np.arange(len(log_z))
    if p.lengths.min() < p.lengths.max():
        # Neighbours are of like lengths, the longest first.
        order = np.lexsort((-p.lengths, np.searchsorted(parts, order, side="right")))
    tasks = [
        (p, weight, order, parts, *r, log_z, gamma, pairs.reshape(-1)) for r in threads.ranges(len(parts) - 1, work)
    ]
    threads.run(_smooth_many, tasks, work)
    return pairs.sum(1) if many > 1 else pairs


def _smooth_long(p: _Problem, weight: np.ndarray, log_z: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Each sequence from both ends."""
    work, size = 2 * _work(p), p.steps * p.k * p.k
    groups = len(log_z) // p.shared
    pairs = np.zeros(groups * size)
    halves = []
    for s, length in enumerate(p.lengths.tolist()):
        middle = (length + 1) // 2
        left = _Space(
            b=_aligned(length * p.width),
            u=_aligned((middle + 1 + p.block) * p.width),
            beta=_aligned((length - middle + p.block) * p.width),
            inverse=_aligned(middle + 1 + p.block),
            v=_aligned(p.width + 1),
            reach=np.zeros(3 * p.k + 2, np.int64),
            excess=_aligned(2 * p.width + 1),
            pairs=np.zeros(size if p.varying else p.width**2),
        )
        right = left if p.varying else left._replace(pairs=np.zeros(p.width**2))
        halves += [(s, middle, left), (s, middle, right)]
    stages = []
    for stage in (0, 2):
        tasks = [(p, weight, *half, gamma, stage + i % 2) for i, half in enumerate(halves)]
        stages.append(threads.run(_smooth_half, tasks, work))
    for s, (first, second) in enumerate(zip(halves[::2], halves[1::2], strict=True)):
        log = sum(stage[2 * s] + stage[2 * s + 1] for stage in stages)
        out = s // p.shared * size
        _smooth_end(p, weight, s, log, first[2].pairs, second[2].pairs, log_z, gamma, pairs, out)
    return pairs


def viterbi(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best path of each sequence: its score ``[S]`` and states ``[S, T]``, −1 in the padding and where none is.

    Ties go to the lowest state.

    Source: A. J. Viterbi (1967).
    """
    p = _problem(initial, transition, emission, lengths, tables=False)
    score, path = np.empty(len(p.lengths)), np.empty(len(p.lengths) * p.frames, np.int64)
    _run_ranges(_viterbi_many, p, score, path)
    return torch.from_numpy(score).to(emission.dtype), torch.from_numpy(path).view(emission.shape[:2])


def sample(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, uniforms: Tensor) -> Tensor:
    """A path of each sequence drawn from its posterior, ``[S, T]``, from uniform numbers ``[S, T]``.

    Source: C. K. Carter, R. Kohn (1994): forward filtering, backward sampling.
    """
    p = _problem(initial, transition, emission, lengths)
    path = np.empty(len(p.lengths) * p.frames, np.int64)
    _run_ranges(_sample_many, p, _flat(uniforms.to(torch.float64)), path)
    return torch.from_numpy(path).view(emission.shape[:2])
