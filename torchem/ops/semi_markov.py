"""Segments of states with durations of their own: log normaliser, posteriors, best paths and draws.

Segments (k_i, d_i) follow each other until they cover the T frames of a sequence. Its potentials are unnormalised
logarithms, any entry −inf: ``initial [*b, K]``, ``transition [*b, K, K]`` (rows: from), ``duration [*b, K, D]`` (entry
d − 1: a segment of d frames) and ``emission [*b, T, K]``; leading axes broadcast; ``lengths [*b]`` says how many frames
are valid. Then

    Z = Σ exp(initial(k_1) + Σ_i duration(k_i, d_i) + Σ_i transition(k_i, k_{i+1}) + Σ_t emission_t(k at t)),

where the last segment of a `censored` sequence may go on: it counts with its survival, Σ_{d' ≥ d} exp duration(k, d').
That sum is no choice of a configuration: it stays one where ``plus`` is a maximum or a draw.

`reference` says just that, in the log domain, for autograd to differentiate to any order. All else runs on compiled
loops (`numba_.semi_markov`) where there are any.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchem.ops import reduce
from torchem.ops.dispatch import compiled_semi_markov


def survival(duration: Tensor) -> Tensor:
    """log Σ_{d' ≥ d} exp duration(k, d'), ``[…, K, D]``; −inf, without NaN, where nothing is left.

    Example:
        >>> survival(torch.tensor([0.5, 0.25, 0.25]).log()).exp()
        tensor([1.0000, 0.5000, 0.2500])
    """
    return _from_end(duration)


def _from_end(x: Tensor) -> Tensor:
    """log Σ exp of what stands at a place or after it, in log₂ D steps, none of which subtracts."""
    shift = 1
    while shift < x.shape[-1]:
        later = torch.cat([x[..., shift:], torch.full_like(x[..., :shift], -torch.inf)], -1)
        x = reduce.logsumexp(torch.stack([x, later], -1), -1)
        shift *= 2
    return x


def remaining(counts: Tensor, duration: Tensor) -> Tensor:
    """Expected durations ``[…, K, D]`` of segments of which so many frames were seen, by the law given that.

    Example:
        >>> remaining(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.5, 0.25, 0.25]).log())
        tensor([0., 1., 1.])
    """
    alive = survival(duration)
    # Linear in the counts, which a derivative may weight by negative numbers; logarithms reach tails of any size.
    both = torch.stack([counts, -counts])
    some = (both > 0) & (alive > -torch.inf)
    rate = torch.where(some, both, 1.0).log() - torch.where(some, alive, 0.0)
    reached = _from_end(torch.where(some, rate, -torch.inf).flip(-1)).flip(-1)
    more, less = (duration + reached).exp()
    return more - less


def reference(
    initial: Tensor,
    transition: Tensor,
    duration: Tensor,
    emission: Tensor,
    lengths: Tensor | None = None,
    plus: Any = reduce.logsumexp,
    *,
    censored: bool = True,
) -> Tensor:
    """log Z ``[*b]`` by the forward recursion over the frames that a segment has lasted, in time and memory O(T K D).

    Source: K. P. Murphy (2002), Hidden semi-Markov models; S.-Z. Yu (2010), section 3, for censored ends.

    Example:
        >>> flat = torch.zeros(2)
        >>> apart = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
        >>> reference(flat, apart, torch.zeros(2, 3), torch.zeros(3, 2), censored=False).exp()  # 3, 1 + 2, 2 + 1, 1 × 3
        tensor(8.)
    """
    message = _forward(initial, transition, duration, emission, lengths, plus)
    return plus((message + (survival(duration) if censored else duration)).flatten(-2), -1)


def _forward(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None, plus: Any
) -> Tensor:
    """Messages ``[*b, K, D]`` at the last frame: entry e of segments that have lasted e + 1 frames, and go on."""
    *_, message = _messages(initial, transition, duration, emission, lengths, plus)
    return message


def _messages(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None, plus: Any
) -> Iterator[Tensor]:
    """Those of each frame; after the last frame of a sequence its messages stay."""
    size = torch.broadcast_shapes(initial.shape[:-1], duration.shape[:-2], emission.shape[:-2])
    start = initial.expand(*size, initial.shape[-1])
    lasted = torch.full((*size, *duration.shape[-2:-1], duration.shape[-1] - 1), -torch.inf).to(start)
    message = torch.cat([start.unsqueeze(-1), lasted], -1) + emission[..., 0, :, None]
    yield message
    for t in range(1, emission.shape[-2]):
        ended = plus(message + duration, -1)
        start = plus(ended.unsqueeze(-1) + transition, -2)
        new = torch.cat([start.unsqueeze(-1), message[..., :-1]], -1) + emission[..., t, :, None]
        message = new if lengths is None else torch.where((t < lengths)[..., None, None], new, message)
        yield message


def filter(  # noqa: A001  the field's name
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None = None,
    *, censored: bool = True,
) -> Tensor:  # fmt: skip
    """p(state of a frame | frames so far) ``[*b, T, K]``, in time O(T (K² + K D)).

    A segment that is under way counts with its survival; that it ends with an uncensored sequence is known at the last
    frame. Zero in the padding, and from where no path is possible.

    Example:
        >>> apart = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
        >>> lasts = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).log()  # state 0: two frames, state 1: one or two
        >>> filter(torch.tensor([0.5, 0.5]).log(), apart, lasts, torch.zeros(2, 2))
        tensor([[0.5000, 0.5000],
                [0.7500, 0.2500]])
    """
    parts, alive = (initial, transition, duration, emission), survival(duration)
    kernel = None if _followed(*parts) else _kernel(*parts)
    if kernel is not None:
        return kernel.filter(*parts[:3], alive, emission, lengths, not censored).to(emission.dtype)
    frames = emission.shape[-2]
    ends = torch.tensor(frames, device=emission.device) if lengths is None else lengths
    found = []
    for t, message in enumerate(_messages(*parts, lengths, reduce.logsumexp)):
        ended = (ends == t + 1)[..., None, None] & (not censored)
        law = reduce.logsumexp(message + torch.where(ended, duration, alive), -1)
        share = reduce.responsibilities(law)[1]
        found.append(torch.where((ends > t).unsqueeze(-1), share, 0.0))
    return torch.stack(found, -2)


@torch.no_grad()
def best_paths(
    potentials: tuple[Tensor, Tensor, Tensor, Tensor], count: int, lengths: Tensor | None, censored: bool
) -> tuple[Tensor, Tensor]:
    """The ``count`` best paths: scores ``[*b, count]``, falling, and states ``[*b, count, T]``.

    The list Viterbi algorithm over segments: of each state the best beginnings of segments at a frame are kept, and the
    best ends. Where there are fewer paths, scores are −inf and states −1. Time O(T K (D + K) count).

    Source: N. Seshadri, C.-E. W. Sundberg (1994).

    Example:
        >>> apart = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
        >>> parts = torch.zeros(2), apart, torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> best_paths(parts, 2, None, False)[1]
        tensor([[0, 0],
                [0, 1]])
    """
    size = torch.broadcast_shapes(*(v.shape[: v.dim() - r] for v, r in zip(potentials, (1, 2, 2, 2), strict=True)))
    flat = []
    for value, rank in zip(potentials, (1, 2, 2, 2), strict=True):
        own = value.shape[value.dim() - rank :]
        flat.append(value.detach().to(torch.float64).expand(*size, *own).reshape(-1, *own))
    initial, transition, duration, emission = flat
    (n, frames, k), d = emission.shape, duration.shape[-1]
    ends = torch.full((n,), frames, device=emission.device)
    ends = ends if lengths is None else lengths.expand(size).reshape(-1)
    tail = survival(duration) if censored else duration

    def best(value: Tensor) -> tuple[Tensor, Tensor]:
        found, place = value.sort(dim=-1, descending=True, stable=True)
        return found[..., :count], place[..., :count]

    # Begun [N, K, count], and all that is under way by how long it has lasted [N, K, D, count].
    begun = torch.full((n, k, count), -torch.inf).to(emission)
    begun[..., 0] = initial
    window = torch.full((n, k, d, count), -torch.inf).to(emission)
    origin = torch.zeros(frames, n, k, count, dtype=torch.long, device=emission.device)
    length = torch.zeros_like(origin)
    scores = torch.full((n, count), -torch.inf).to(emission)
    cell = torch.zeros(n, count, dtype=torch.long, device=emission.device)
    for t in range(frames):
        window = torch.cat([begun.unsqueeze(-2), window[..., :-1, :]], -2) + emission[:, t, :, None, None]
        ended, length[t] = best((window + duration.unsqueeze(-1)).flatten(-2))
        last = (ends == t + 1).unsqueeze(-1)
        value, place = (_filled_up(v, count, w) for v, w in zip(
            best((window + tail.unsqueeze(-1)).flatten(1)), (-torch.inf, 0), strict=True))  # fmt: skip
        scores, cell = torch.where(last, value, scores), torch.where(last, place, cell)
        if t + 1 < frames:
            arrivals = (ended.unsqueeze(-1) + transition.unsqueeze(-2)).flatten(1, 2).mT  # [N, to, K · count]
            begun, origin[t + 1] = best(arrivals)
    # Backwards: the state of a segment, frames of it that are left, and which of its beginnings.
    state, rest = cell // (d * count), cell % (d * count)
    left, rank = rest // count + 1, rest % count
    path = torch.full((n, count, frames), -1, dtype=torch.long, device=emission.device)
    for t in range(frames - 1, -1, -1):
        inside = (ends > t).unsqueeze(-1)
        path[..., t] = torch.where(inside, state, -1)
        left = torch.where(inside, left - 1, left)
        if t:
            turn = inside & (left == 0)
            came = origin[t].flatten(1).gather(-1, state * count + rank)
            before = length[t - 1].flatten(1).gather(-1, came)
            state = torch.where(turn, came // count, state)
            left, rank = torch.where(turn, before // count + 1, left), torch.where(turn, before % count, rank)
    path = torch.where((scores == -torch.inf).unsqueeze(-1), -1, path)
    return scores.to(potentials[-1].dtype).reshape(*size, count), path.reshape(*size, count, frames)


def _filled_up(value: Tensor, count: int, filler: float) -> Tensor:
    """The last axis brought up to a length."""
    return torch.nn.functional.pad(value, (0, count - value.shape[-1]), value=filler)


def lasting(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """p(state, frames that it has lasted) at the last frame given all, if the sequence goes on: ``[*b, K, D]``."""
    message = _forward(initial, transition, duration, emission, lengths, reduce.logsumexp) + survival(duration)
    return reduce.responsibilities(message.flatten(-2))[1].unflatten(-1, message.shape[-2:])


def onward(law: Tensor, transition: Tensor, duration: Tensor) -> Tensor:
    """The law of (state, frames that it has lasted) ``[*b, K, D]`` a frame later, by normalised tables.

    Example:
        >>> law, apart = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).log()
        >>> onward(law, apart, torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
        tensor([[0.0000, 0.7500],
                [0.2500, 0.0000]])
    """
    alive = survival(duration)
    some = alive > -torch.inf
    safe = torch.where(some, alive, 0.0)
    leave = torch.where(some, (duration - safe).exp(), 0.0)
    stay = torch.where(some[..., 1:], (alive[..., 1:] - safe[..., :-1]).exp(), 0.0)
    start = ((law * leave).sum(-1).unsqueeze(-2) @ transition.exp()).squeeze(-2)
    return torch.cat([start.unsqueeze(-1), law[..., :-1] * stay], -1)


def expectations(
    initial: Tensor,
    transition: Tensor,
    duration: Tensor,
    emission: Tensor,
    lengths: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    censored: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log Z ``[*b]``, and posterior expectations times ``weight [*b]`` in the shape of each potential.

    Those of durations count the whole of a segment that was cut off, by its law given that it lasted as long.

    Source: Y. Guédon (2003), equations 5 to 12; S.-Z. Yu (2010), section 2.2.
    """
    parts = (initial, transition, duration, emission)
    if _kernel(*parts) is None:
        return _reference_expectations(*parts, lengths, weight, censored)
    if _followed(*parts, *([] if weight is None else [weight])):
        lead = torch.broadcast_shapes(*(v.shape[: v.dim() - r] for v, r in zip(parts, (1, 2, 2, 2), strict=True)))
        mass = torch.ones(lead, dtype=emission.dtype) if weight is None else weight.to(emission).expand(lead)
        return _apply(_Expectations, *parts, lengths, mass, censored)
    return _compiled_expectations(*parts, lengths, weight, censored)


def log_normalizer(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None = None,
    *, censored: bool = True,
) -> Tensor:  # fmt: skip
    """log Z ``[*b]`` by the fastest way; differentiable to any order. Its gradient takes one pass of `expectations`."""
    parts = (initial, transition, duration, emission)
    if _kernel(*parts) is None:
        return reference(*parts, lengths, censored=censored)
    if _followed(*parts):
        return _apply(_LogNormalizer, *parts, lengths, censored)
    return _compiled_normalizer(*parts, lengths, censored)


def _reference_expectations(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None,
    weight: Tensor | None, censored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `expectations` gives, as the gradient of `reference`: itself differentiable."""

    def total(*given: Tensor) -> Tensor:
        return reference(*given, lengths=lengths, censored=censored)

    log_z, pull, *_ = torch.func.vjp(total, initial, transition, duration, emission)
    mass = torch.ones_like(log_z) if weight is None else weight.to(log_z).expand_as(log_z)
    return log_z, *pull(torch.where(log_z == -torch.inf, 0.0, mass))


def _compiled_expectations(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None,
    weight: Tensor | None, censored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parts, tail = (initial, transition, duration, emission), _tail(duration, censored)
    log_z, first, pairs, counts, cut, gamma = _kernel(*parts).expectations(*parts[:3], tail, emission, lengths, weight)
    counts = counts + (remaining(cut, duration.detach().to(cut)) if censored else cut)
    found = zip((first, pairs, counts, gamma), parts, strict=True)
    first, pairs, counts, gamma = (value.sum_to_size(p.shape).to(p.dtype) for value, p in found)
    return log_z.to(emission.dtype), first, pairs, counts, gamma


def _compiled_normalizer(
    initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Tensor | None, censored: bool
) -> Tensor:
    parts, tail = (initial, transition, duration, emission), _tail(duration, censored)
    return _kernel(*parts).log_normalizer(*parts[:3], tail, emission, lengths).to(emission.dtype)


class _Expectations(torch.autograd.Function):
    """Expectations by compiled loops; derivatives by the reference. Under ``torch.func`` there is only that."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        initial: Tensor,
        transition: Tensor,
        duration: Tensor,
        emission: Tensor,
        lengths: Any,
        weight: Any,
        censored: bool,
    ) -> tuple[Tensor, ...]:
        return _compiled_expectations(initial, transition, duration, emission, lengths, weight, censored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *parts, lengths, weight, ctx.censored = inputs
        ctx.save_for_backward(*parts, lengths, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        initial, transition, duration, emission, lengths, weight = ctx.saved_tensors
        parts = (initial, transition, duration, emission)

        def again(*given: Tensor) -> tuple[Tensor, ...]:
            first, step, law, frames, mass = given
            return _reference_expectations(first, step, law, frames, lengths, mass, ctx.censored)

        *slopes, mass = torch.func.vjp(again, *parts, weight)[1](grads)
        return *slopes, None, mass, None


class _LogNormalizer(torch.autograd.Function):
    """log Z; its gradient is `expectations`, in memory O(T K)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        initial: Tensor, transition: Tensor, duration: Tensor, emission: Tensor, lengths: Any, censored: bool
    ) -> Tensor:
        return _compiled_normalizer(initial, transition, duration, emission, lengths, censored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.censored = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        initial, transition, duration, emission, lengths = ctx.saved_tensors
        _, *slopes = expectations(initial, transition, duration, emission, lengths, grads[0], censored=ctx.censored)
        return *slopes, None, None


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def _followed(*given: Tensor) -> bool:
    """Whether something is to be differentiated."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in given)


def paths(
    potentials: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor | None,
    censored: bool,
    uniforms: Callable[[torch.Size], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Best segments, or with ``uniforms`` drawn ones: score or log Z ``[*b]``, states ``[*b, T]``, frames lasted.

    States are −1, and frames lasted zero, in the padding and where no path is possible. None where there is no
    compiled kernel: `reference` differentiated with another ``plus`` says the same.
    """
    kernel = _kernel(*potentials)
    if kernel is None:
        return None
    *tables, emission = potentials
    given = (*tables, _tail(tables[-1], censored), emission, lengths)
    if uniforms is None:
        score, path, lasted = kernel.viterbi(*given)
    else:
        size = torch.broadcast_shapes(*(value.shape[:-2] for value in (*tables[1:], emission)))
        score, path, lasted = kernel.sample(*given, uniforms(torch.Size((*size, emission.shape[-2] + 1, 2))))
    return score.to(emission.dtype), path, lasted


def _tail(duration: Tensor, censored: bool) -> Tensor:
    """Log weights of a last segment that has lasted d frames, float64."""
    duration = duration.detach().to(torch.float64)
    return survival(duration) if censored else duration


def _kernel(*given: Tensor) -> Any:
    """The compiled kernels, where they may run: outside of transforms, compilers and forward derivatives."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    # Tables of all sequences, not of each.
    ranks = zip(given[:3], (1, 2, 2), strict=True)
    shared = all(value.dim() <= rank or value.shape[-1 - rank] == 1 for value, rank in ranks)
    return compiled_semi_markov(given[0].device) if shared else None
