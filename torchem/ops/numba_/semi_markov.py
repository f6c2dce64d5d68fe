"""Segments with durations as compiled loops on the CPU: time O(T (K² + K D)), memory O(T K) for each sequence.

Everything is a logarithm in float64, less the largest emission of each frame. Of state k let s_t be the log weight of
all that leads to a segment that begins at frame t, and e_t that of all that ends with one at t. A window holds, for
each segment that is under way, s_τ + Σ_{τ ≤ i ≤ t} emission_i, in order of beginning: a frame adds its emission to
each, and

    e_t = log Σ_d exp(window_{t − d + 1} + duration(d)),   s_{t+1}(j) = log Σ_k exp(e_t(k) + transition(k, j)).

Backwards the same window runs over where segments end. Its exponentials are, but for a factor, the posterior of each
segment; those are added up to expected durations, and by running sums to the posteriors of frames: no differences.

A window that is full moves to the front of its room of 2 D numbers (and a vector): once every D frames.

Layout: ``initial [G, K]``, ``transition [G, K, K]``, ``duration [G, K, D]``, ``emission [S, T, K]``, ``lengths [S]``;
sequence s reads row ``s // (S // G)``.

Source: Y. Guédon (2003); S.-Z. Yu, H. Kobayashi (2003) for the order of the computation.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchem.ops import threads
from torchem.ops.numba_ import vectors as vec

#: Sequences are taken in so many parts at most, whatever the number of threads: sums are the same to the bit.
_PARTS = 16
#: Posteriors of all segments that begin at a frame in a state which may be left out together.
_NOTHING = 1e-40


class _Problem(NamedTuple):
    """Potentials as flat float64 arrays, and sizes."""

    initial: np.ndarray  # [G · K]
    transition: np.ndarray  # [G · K · K]
    law: np.ndarray  # [G · K · D] durations, the longest first
    tail: np.ndarray  # [G · K · D] their survivals, or where ends are complete the durations again, likewise
    emission: np.ndarray  # [S · T · K]
    lengths: np.ndarray  # [S]
    shared: int  # sequences of a group
    frames: int
    k: int
    d: int


@vec.compiled
def _sum_exp(values, count):
    """log Σ exp of the first numbers of an array, which become exponentials less the largest; and the largest."""
    whole = count - count % vec.LANES
    most = vec.splat(-np.inf)
    for i in range(0, whole, vec.LANES):
        most = vec.larger(vec.load(values, i), most)
    top = vec.largest(most)
    for i in range(whole, count):
        top = max(top, values[i])
    if top == -np.inf:
        return -np.inf, -np.inf
    shift, sums = vec.splat(top), vec.splat(0.0)
    for i in range(0, whole, vec.LANES):
        x = vec.exponential(vec.minus(vec.load(values, i), shift))
        vec.store(values, i, x)
        sums = vec.plus(sums, x)
    total = vec.total(sums)
    for i in range(whole, count):
        x = math.exp(values[i] - top)
        values[i] = x
        total += x
    return top + math.log(total), top


@vec.compiled
def _entered(window, k, d, start, size, value):
    """Append a number to the window of state k; returns where it starts and how many it holds."""
    room = k * (2 * d)
    if size == d:
        start, size = start + 1, size - 1
    if start + size == 2 * d:
        for i in range(size):
            window[room + i] = window[room + start + i]
        start = 0
    window[room + start + size] = value
    return start, size + 1


@vec.compiled
def _grown(window, place, size, gain, law, law_place, out):
    """Add a frame's emission to a window, and write it with durations added, the longest first."""
    for i in range(size):
        value = window[place + i] + gain
        window[place + i] = value
        out[i] = value + law[law_place + i]


@vec.compiled
def _relative(p, s):
    """Emissions of a sequence less the largest of each frame, ``[T · K]``, and the sum of these; NaN if any is."""
    frames = p.lengths[s]
    out, total = np.empty(frames * p.k), 0.0
    for t in range(frames):
        top = -np.inf
        for j in range(p.k):
            x = p.emission[(s * p.frames + t) * p.k + j]
            top = max(top, x)
            total += x - x if x != x else 0.0
        top = top if top > -np.inf else 0.0
        total += top
        for j in range(p.k):
            out[t * p.k + j] = p.emission[(s * p.frames + t) * p.k + j] - top
    return out, total


@vec.compiled
def _forward(p, s, b, begin, end):
    """Fill s and e of a sequence; returns log Z, less what was taken off the emissions."""
    k, d, frames, g = p.k, p.d, p.lengths[s], s // p.shared
    window, out, few = np.empty(k * 2 * d), np.empty(d), np.empty(k)
    start, size = 0, 0
    last = np.empty(k)
    for j in range(k):
        begin[j] = p.initial[g * k + j]
    for t in range(frames):
        new_start, new_size = start, size
        for j in range(k):
            new_start, new_size = _entered(window, j, d, start, size, begin[t * k + j])
            place, row = j * 2 * d + new_start, (g * k + j) * d + d - new_size
            _grown(window, place, new_size, b[t * k + j], p.law, row, out)
            end[t * k + j] = _sum_exp(out, new_size)[0]
            if t == frames - 1:
                for i in range(new_size):
                    out[i] = window[place + i] + p.tail[row + i]
                last[j] = _sum_exp(out, new_size)[0]
        start, size = new_start, new_size
        if t < frames - 1:
            for j in range(k):
                for i in range(k):
                    few[i] = end[t * k + i] + p.transition[(g * k + i) * k + j]
                begin[(t + 1) * k + j] = _sum_exp(few, k)[0]
    return _sum_exp(last, k)[0]


@vec.compiled
def _backward(p, s, b, begin, end, log_z, weight, first, pairs, counts, cut, gamma):
    """Add expectations of a sequence."""
    k, d, frames, g = p.k, p.d, p.lengths[s], s // p.shared
    window, out, few = np.empty(k * 2 * d), np.empty(d), np.empty(k)
    ahead, behind = np.zeros(k), np.empty(k)
    start, size = 0, 0
    for t in range(frames - 1, -1, -1):
        new_start, new_size = start, size
        for j in range(k):
            new_start, new_size = _entered(window, j, d, start, size, ahead[j])
            place, row = j * 2 * d + new_start, (g * k + j) * d + d - new_size
            _grown(window, place, new_size, b[t * k + j], p.law, row, out)
            # The segment that reaches the end of the sequence: its duration is only bounded.
            whole = frames - t <= d
            if whole:
                out[0] = window[place] + p.tail[row]
            value, top = _sum_exp(out, new_size)
            behind[j] = value
            if value == -np.inf or math.exp(value + begin[t * k + j] - log_z) < _NOTHING:
                continue
            scale = weight * math.exp(top + begin[t * k + j] - log_z)
            running = 0.0
            for i in range(new_size):
                share = out[i] * scale
                if whole and i == 0:
                    cut[row] += share
                else:
                    counts[row + i] += share
                running += share
                gamma[(t + new_size - 1 - i) * k + j] += running
        start, size = new_start, new_size
        if t == 0:
            for j in range(k):
                first[g * k + j] += weight * math.exp(begin[j] + behind[j] - log_z)
            break
        for i in range(k):
            for j in range(k):
                few[j] = p.transition[(g * k + i) * k + j] + behind[j]
            for j in range(k):
                pairs[(g * k + i) * k + j] += weight * math.exp(end[(t - 1) * k + i] + few[j] - log_z)
            ahead[i] = _sum_exp(few, k)[0]
    # Logarithms of long sequences are large: what rounding of them leaves is taken off.
    for t in range(frames):
        total = 0.0
        for j in range(k):
            total += gamma[t * k + j]
        for j in range(k):
            gamma[t * k + j] *= weight / total


@vec.kernel
def _normalize_many(p, begin_at, stop, log_z):
    for s in range(begin_at, stop):
        b, total = _relative(p, s)
        begin, end = np.empty(p.lengths[s] * p.k), np.empty(p.lengths[s] * p.k)
        log_z[s] = _forward(p, s, b, begin, end) + total


@vec.kernel
def _filter_many(p, begin_at, stop, ended, law):
    k, d = p.k, p.d
    for s in range(begin_at, stop):
        b, _ = _relative(p, s)
        frames, g = p.lengths[s], s // p.shared
        window, out, few = np.empty(k * 2 * d), np.empty(d), np.empty(k)
        begin, end, now = np.empty(k), np.empty(k), np.empty(k)
        start, size = 0, 0
        for j in range(k):
            begin[j] = p.initial[g * k + j]
        for t in range(frames):
            new_start, new_size = start, size
            for j in range(k):
                new_start, new_size = _entered(window, j, d, start, size, begin[j])
                place, row = j * 2 * d + new_start, (g * k + j) * d + d - new_size
                _grown(window, place, new_size, b[t * k + j], p.law, row, out)
                end[j] = _sum_exp(out, new_size)[0]
                now[j] = end[j]
                if not (ended and t == frames - 1):
                    for i in range(new_size):
                        out[i] = window[place + i] + p.tail[row + i]
                    now[j] = _sum_exp(out, new_size)[0]
            start, size = new_start, new_size
            total = _sum_exp(now, k)[0]
            if total == -np.inf:
                break
            whole = 0.0
            for j in range(k):
                whole += now[j]
            for j in range(k):
                law[(s * p.frames + t) * k + j] = now[j] / whole
            for j in range(k):
                for i in range(k):
                    few[i] = end[i] + p.transition[(g * k + i) * k + j]
                begin[j] = _sum_exp(few, k)[0]


@vec.kernel
def _expect_many(p, begin_at, stop, weight, log_z, gamma):
    g = len(p.initial)
    first, pairs = np.zeros(g), np.zeros(len(p.transition))
    counts, cut = np.zeros(len(p.law)), np.zeros(len(p.law))
    for s in range(begin_at, stop):
        b, total = _relative(p, s)
        begin, end = np.empty(p.lengths[s] * p.k), np.empty(p.lengths[s] * p.k)
        value = _forward(p, s, b, begin, end)
        log_z[s] = value + total
        if value > -np.inf and weight[s] != 0:  # a derivative's may be negative
            own = gamma[s * p.frames * p.k : (s + 1) * p.frames * p.k]
            _backward(p, s, b, begin, end, value, weight[s], first, pairs, counts, cut, own)
    return first, pairs, counts, cut


# ---- paths ----------------------------------------------------------------------------------------------------------


@vec.kernel
def _viterbi_many(p, begin_at, stop, score, path, lasted):
    k, d = p.k, p.d
    for s in range(begin_at, stop):
        frames, g = p.lengths[s], s // p.shared
        window, out = np.empty(k * 2 * d), np.empty(d)
        begin, end, origin = np.empty(k), np.empty(k), np.zeros((frames, k), np.int64)
        longest = np.zeros((frames, k), np.int64)
        start, size, best, state, length = 0, 0, -np.inf, 0, 0
        for j in range(k):
            begin[j] = p.initial[g * k + j]
        for t in range(frames):
            new_start, new_size = start, size
            for j in range(k):
                new_start, new_size = _entered(window, j, d, start, size, begin[j])
                place, row = j * 2 * d + new_start, (g * k + j) * d + d - new_size
                _grown(window, place, new_size, p.emission[(s * p.frames + t) * k + j], p.law, row, out)
                top = -np.inf
                for i in range(new_size - 1, -1, -1):  # the shortest first
                    if out[i] > top:
                        top, longest[t, j] = out[i], new_size - i
                end[j] = top
                if t == frames - 1:
                    for i in range(new_size - 1, -1, -1):
                        value = window[place + i] + p.tail[row + i]
                        if value > best:
                            best, state, length = value, j, new_size - i
            start, size = new_start, new_size
            for j in range(k):
                top = -np.inf
                for i in range(k):
                    value = end[i] + p.transition[(g * k + i) * k + j]
                    if value > top:
                        top, origin[t, j] = value, i
                begin[j] = top
        score[s] = best
        t = frames - 1
        while best > -np.inf and t >= 0:
            for i in range(length):
                path[s * p.frames + t - i] = state
                lasted[s * p.frames + t - i] = length - i
            t -= length
            if t >= 0:
                state = origin[t, state]
                length = longest[t, state]


@vec.compiled
def _drawn(values, count, u):
    """A place among the first numbers, which are logarithms of weights."""
    _sum_exp(values, count)
    total = 0.0
    for i in range(count):
        total += values[i]
    below, last = 0.0, 0
    for i in range(count):
        if values[i] > 0:
            last = i
            below += values[i]
            if below > u * total:
                return i
    return last


@vec.kernel
def _sample_many(p, begin_at, stop, uniforms, log_z, path, lasted):
    k, d = p.k, p.d
    for s in range(begin_at, stop):
        frames, g = p.lengths[s], s // p.shared
        b, total = _relative(p, s)
        begin, end = np.empty(frames * k), np.empty(frames * k)
        value = _forward(p, s, b, begin, end)
        log_z[s] = value + total
        if value == -np.inf:
            continue
        u = s * (p.frames + 1) * 2
        out, few, t, state = np.empty(max(k, d)), np.empty(k), frames - 1, -1
        while t >= 0:
            if state < 0:  # the last segment: its state by what all of its beginnings add up to
                for j in range(k):
                    count = _beginnings(p, s, b, begin, t, j, p.tail, out)
                    few[j] = _sum_exp(out, count)[0]
                state = _drawn(few, k, uniforms[u + 2 * p.frames])
                count = _beginnings(p, s, b, begin, t, state, p.tail, out)
            else:
                for i in range(k):
                    few[i] = end[t * k + i] + p.transition[(g * k + i) * k + state]
                state = _drawn(few, k, uniforms[u + 2 * t + 1])
                count = _beginnings(p, s, b, begin, t, state, p.law, out)
            length = 1 + _drawn(out, count, uniforms[u + 2 * t])
            for i in range(length):
                path[s * p.frames + t - i] = state
                lasted[s * p.frames + t - i] = length - i
            t -= length


@vec.compiled
def _beginnings(p, s, b, begin, t, j, law, out):
    """Log weights of the segments of state j that end at frame t, the shortest first; returns how many."""
    row, seen, count = ((s // p.shared) * p.k + j) * p.d, 0.0, min(p.d, t + 1)
    for i in range(count):
        seen += b[(t - i) * p.k + j]
        out[i] = begin[(t - i) * p.k + j] + seen + law[row + p.d - 1 - i]
    return count


# ---- what others call -----------------------------------------------------------------------------------------------


def _layout(
    initial: Tensor, transition: Tensor, duration: Tensor, tail: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[_Problem, torch.Size]:
    """The problem, and the leading axes of its sequences."""
    given = ((initial, 1), (transition, 2), (duration, 2), (tail, 2))
    leads = [value.shape[: value.dim() - rank] for value, rank in given]
    lead = torch.broadcast_shapes(*leads, emission.shape[:-2], *([] if lengths is None else [lengths.shape]))
    # Tables are those of all sequences: they differ between replicas alone.
    own = torch.broadcast_shapes(*leads)

    def flat(value: Tensor, *shape: int) -> Tensor:
        return value.detach().to(torch.float64).expand(*shape, *value.shape[value.dim() - 1 :])

    k, d = duration.shape[-2:]
    frames, size = emission.shape[-2], lead.numel()
    ends = torch.full(lead, frames) if lengths is None else lengths.expand(lead)
    values = (
        flat(initial, *own), flat(transition, *own, k), flat(duration, *own, k).flip(-1), flat(tail, *own, k).flip(-1),
        flat(emission, *lead, frames), ends.to(torch.int64),
    )  # fmt: skip
    arrays = [value.contiguous().view(-1).numpy() for value in values]
    return _Problem(*arrays, shared=max(1, size // max(1, own.numel())), frames=frames, k=k, d=d), lead


def _parts(p: _Problem) -> list[tuple[int, int]]:
    count = len(p.lengths)
    pieces = max(1, min(count, _PARTS))
    edges = [count * i // pieces for i in range(pieces + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _work(p: _Problem) -> int:
    """Multiply–adds of one pass, exponentials counted as eight."""
    return 8 * len(p.lengths) * p.frames * p.k * (p.k + p.d)


def _restored(value: Tensor, lead: torch.Size) -> Tensor:
    return value.unflatten(0, lead) if lead else value.squeeze(0)


def log_normalizer(
    initial: Tensor, transition: Tensor, duration: Tensor, tail: Tensor, emission: Tensor, lengths: Tensor | None
) -> Tensor:
    """log Z ``[*b]``, float64; ``tail``: log weights of a last segment that has lasted so long."""
    p, lead = _layout(initial, transition, duration, tail, emission, lengths)
    log_z = torch.empty(len(p.lengths), dtype=torch.float64)
    threads.run(_normalize_many, [(p, *part, log_z.numpy()) for part in _parts(p)], _work(p))
    return _restored(log_z, lead)


def filter(  # noqa: A001  the field's name
    initial: Tensor, transition: Tensor, duration: Tensor, tail: Tensor, emission: Tensor, lengths: Tensor | None,
    ended: bool,
) -> Tensor:  # fmt: skip
    """p(state of a frame | frames so far) ``[*b, T, K]``, float64; ``tail``: survivals; ``ended``: with a segment."""
    p, lead = _layout(initial, transition, duration, tail, emission, lengths)
    law = torch.zeros(len(p.lengths) * p.frames * p.k, dtype=torch.float64)
    threads.run(_filter_many, [(p, *part, ended, law.numpy()) for part in _parts(p)], 2 * _work(p))
    return _restored(law.view(len(p.lengths), p.frames, p.k), lead)


def expectations(
    initial: Tensor,
    transition: Tensor,
    duration: Tensor,
    tail: Tensor,
    emission: Tensor,
    lengths: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """log Z ``[*b]``, and weighted expectations, all float64: of ``duration`` and of ``tail`` apart.

    Those of tables have the leading axes that the tables have together.
    """
    p, lead = _layout(initial, transition, duration, tail, emission, lengths)
    size = len(p.lengths)
    log_z, gamma = torch.empty(size, dtype=torch.float64), torch.zeros(size * p.frames * p.k, dtype=torch.float64)
    mass = torch.ones(size) if weight is None else weight.detach().expand(lead).reshape(-1)
    arrays = mass.to(torch.float64).contiguous().numpy(), log_z.numpy(), gamma.numpy()
    found = threads.run(_expect_many, [(p, *part, *arrays) for part in _parts(p)], 3 * _work(p))
    first, pairs, counts, cut = (torch.from_numpy(sum(parts)) for parts in zip(*found, strict=True))
    own = torch.broadcast_shapes(initial.shape[:-1], transition.shape[:-2], duration.shape[:-2], tail.shape[:-2])
    first, pairs = first.view(*own, p.k), pairs.view(*own, p.k, p.k)
    counts, cut = (value.view(*own, p.k, p.d).flip(-1) for value in (counts, cut))
    return _restored(log_z, lead), first, pairs, counts, cut, _restored(gamma.view(size, p.frames, p.k), lead)


def viterbi(
    initial: Tensor, transition: Tensor, duration: Tensor, tail: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, states and frames lasted of the best segments; see `torchem.ops.semi_markov.paths`."""
    p, lead = _layout(initial, transition, duration, tail, emission, lengths)
    return _filled(_viterbi_many, p, lead)


def sample(
    initial: Tensor,
    transition: Tensor,
    duration: Tensor,
    tail: Tensor,
    emission: Tensor,
    lengths: Tensor | None,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, states and frames lasted of drawn segments, from uniform numbers ``[*b, T + 1, 2]``."""
    p, lead = _layout(initial, transition, duration, tail, emission, lengths)
    given = uniforms.to(torch.float64).expand(*lead, p.frames + 1, 2).contiguous().view(-1)
    return _filled(_sample_many, p, lead, given.numpy())


def _filled(kernel: Any, p: _Problem, lead: torch.Size, *given: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    size = len(p.lengths) * p.frames
    score, path = torch.empty(len(p.lengths), dtype=torch.float64), torch.full((size,), -1)
    lasted = torch.zeros(size, dtype=torch.long)
    arrays = *given, score.numpy(), path.numpy(), lasted.numpy()
    threads.run(kernel, [(p, *part, *arrays) for part in _parts(p)], _work(p))
    path, lasted = (_restored(value.view(-1, p.frames), lead) for value in (path, lasted))
    return _restored(score, lead), path, lasted
