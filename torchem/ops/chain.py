"""Chains of discrete states: log normaliser, posteriors, best paths and draws, batched over sequences and replicas.

A chain has potentials ``initial [*b, K]``, ``transition [*b, K, K]`` (rows: from) or ``[*b, T−1, K, K]`` where steps
differ (entry t: from frame t to t + 1), and ``emission [*b, T, K]``: unnormalised logarithms, any entry −inf. All have
the same number of leading axes, which broadcast; ``lengths [*b]`` says how many frames are valid. Then

    Z = Σ_z exp(initial(z_1) + Σ_t transition(z_t, z_{t+1}) + Σ_t emission_t(z_t)).

`reference` says just that, in the log domain, for autograd to differentiate to any order. All else runs on kernels of
one signature, picked in `dispatch`: blocks of time in torch (`scan`) or compiled loops (`numba_.chain`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from torchem.ops import reduce, scan
from torchem.ops.dispatch import compiled_chain


def reference(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None, plus: Any = reduce.logsumexp
) -> Tensor:
    """log Z by the forward recursion, ``[*b]``; with ``plus=reduce.maximum`` the score of the best path.

    Source: L. E. Baum, T. Petrie, G. Soules, N. Weiss (1970).

    Example:
        >>> flat = torch.zeros(2)
        >>> reference(flat, torch.zeros(2, 2), torch.zeros(3, 2)).exp()  # 2³ paths
        tensor(8.)
    """
    homogeneous = transition.dim() == emission.dim()
    message = initial + emission[..., 0, :]
    for t in range(1, emission.shape[-2]):
        step = transition if homogeneous else transition[..., t - 1, :, :]
        new = plus(message.unsqueeze(-1) + step, -2) + emission[..., t, :]
        message = new if lengths is None else torch.where((t < lengths).unsqueeze(-1), new, message)
    return plus(message, -1)


def chain_kernel(emission: Tensor) -> ModuleType:
    """The kernels that run on potentials like these."""
    return compiled_chain(emission.device) or scan


# ---- from broadcast axes to the layout of kernels ------------------------------------------------------------------


@dataclass(frozen=True)
class Chains:
    """Potentials with one axis of sequences, as kernels read them, and the way back."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None
    lead: torch.Size

    def restored(self, value: Tensor) -> Tensor:
        """``[S, …]`` with the leading axes of the problem."""
        return value.unflatten(0, self.lead) if self.lead else value.squeeze(0)


def _flat(value: Tensor, lead: torch.Size, event: int) -> Tensor:
    """``[G, …]``: leading axes as far as they differ, the rest (ones) left out."""
    own = value.shape[: value.dim() - event]
    own = (1,) * (len(lead) - len(own)) + tuple(own)
    kept = max((i + 1 for i, size in enumerate(own) if size != 1), default=0)
    value = value.reshape(*own[:kept], *value.shape[value.dim() - event :])
    return value.expand(*lead[:kept], *value.shape[value.dim() - event :]).flatten(0, kept - 1) if kept else value[None]


def layout(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Chains:
    """Potentials of any leading axes in the layout of kernels."""
    extra = transition.dim() - emission.dim()
    leads = [initial.shape[:-1], transition.shape[: -2 - extra], emission.shape[:-2]]
    lead = torch.broadcast_shapes(*leads, *([] if lengths is None else [lengths.shape]))
    flat = emission.expand(*lead, *emission.shape[-2:]).reshape(-1, *emission.shape[-2:])
    ends = None if lengths is None else lengths.expand(lead).reshape(-1)
    if initial.dtype != flat.dtype or transition.dtype != flat.dtype:
        initial, transition = initial.to(flat), transition.to(flat)
    return Chains(_flat(initial, lead, 1), _flat(transition, lead, 2 + extra), flat, ends, lead)


def _summed(value: Tensor, like: Tensor, event: int, lead: torch.Size) -> Tensor:
    """``[G, …]`` expectations summed to the shape of a potential with its own leading axes."""
    own = tuple(like.shape[: like.dim() - event])
    kept = max((i + 1 for i, size in enumerate((1,) * (len(lead) - len(own)) + own) if size != 1), default=0)
    out = value.reshape(*lead[:kept], *[1] * (len(lead) - kept), *value.shape[1:])
    return out.sum_to_size(like.shape)


def _normalize(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
    chains = layout(initial, transition, emission, lengths)
    kernel = chain_kernel(chains.emission)
    return chains.restored(kernel.log_normalizer(chains.initial, chains.transition, chains.emission, chains.lengths))


def _expect(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Z ``[*b]`` and weighted expectations in the shape of each potential."""
    chains = layout(initial, transition, emission, lengths)
    lead = chains.lead
    each = None if weight is None else weight.expand(lead).reshape(-1)
    log_z, pairs, gamma = chain_kernel(chains.emission).smooth(
        chains.initial, chains.transition, chains.emission, chains.lengths, each
    )
    groups, size = len(chains.initial), len(gamma)
    first = gamma[:, 0] if groups == size else gamma[:, 0].to(torch.float64).reshape(groups, -1, gamma.shape[-1]).sum(1)
    extra = transition.dim() - emission.dim()
    return (
        chains.restored(log_z),
        _summed(first, initial, 1, lead),
        _summed(pairs, transition, 2 + extra, lead),
        chains.restored(gamma).sum_to_size(emission.shape),
    )


# ---- autograd -----------------------------------------------------------------------------------------------------


def _reference_expectations(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `expectations` gives, as the gradient of `reference`: itself differentiable."""
    log_z, pull, *_ = torch.func.vjp(lambda i, t, e: reference(i, t, e, lengths), initial, transition, emission)
    return log_z, *pull(weight.expand_as(log_z))


def _batched(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, Any]:
    """vmap by one more leading axis, which kernels have anyway."""
    rank = args[2].dim() - (in_dims[2] is not None) - 2  # pyright: ignore[reportOptionalMemberAccess]
    moved: list[Tensor | None] = []
    for place, (value, axis) in enumerate(zip(args, in_dims, strict=True)):
        if value is None:
            moved.append(None)
            continue
        value = value.unsqueeze(0).expand(info.batch_size, *value.shape) if axis is None else value.movedim(axis, 0)
        if place > 2:  # lengths and weights may lack leading axes
            value = value.reshape(value.shape[0], *[1] * (rank + 1 - value.dim()), *value.shape[1:])
        moved.append(value)
    out = function(*moved)
    return out, (0,) * len(out) if isinstance(out, tuple) else 0


class _Expectations(torch.autograd.Function):
    """log Z and expectations by the kernels; derivatives by the reference, whose graph runs over time."""

    @staticmethod
    def forward(
        initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_z, *expected = _expect(initial, transition, emission, lengths, weight)
        first, pairs, gamma = (e.to(p) for e, p in zip(expected, (initial, transition, emission), strict=True))
        return log_z, first, pairs, gamma

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        initial, transition, emission, lengths, weight = inputs
        ctx.save_for_backward(initial, transition, emission, lengths, weight)
        ctx.save_for_forward(initial, transition, emission, lengths, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        initial, transition, emission, lengths, weight = ctx.saved_tensors
        _, pull, *_ = torch.func.vjp(
            lambda i, t, e, w: _reference_expectations(i, t, e, lengths, w), initial, transition, emission, weight
        )
        first, pairs, gamma, mass = pull(grads)
        return first, pairs, gamma, None, mass

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        initial, transition, emission, lengths, weight = ctx.saved_tensors
        primals = (initial, transition, emission, weight)
        given = [tangents[i] for i in (0, 1, 2, 4)]
        moved = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, given, strict=True))
        return torch.func.jvp(lambda i, t, e, w: _reference_expectations(i, t, e, lengths, w), primals, moved)[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _batched(functools.partial(_apply, _Expectations), info, in_dims, *args)


class _LogNormalizer(torch.autograd.Function):
    """log Z; its gradient is the posterior, from one smoother and O(T K) memory."""

    @staticmethod
    def forward(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
        return _normalize(initial, transition, emission, lengths)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        initial, transition, emission, lengths = ctx.saved_tensors
        _, first, pairs, gamma = _apply(_Expectations, initial, transition, emission, lengths, grads[0])
        return first, pairs, gamma, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        initial, transition, emission, lengths = ctx.saved_tensors
        primals = (initial, transition, emission)
        moved = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=False))
        return torch.func.jvp(lambda i, t, e: reference(i, t, e, lengths), primals, moved)[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _batched(functools.partial(_apply, _LogNormalizer), info, in_dims, *args)


def log_normalizer(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log Z ``[*b]`` by the fastest kernel; differentiable twice, and under ``torch.func``.

    Its gradient takes one pass of the smoother and memory O(T K); the second derivative goes through `reference`.

    Example:
        >>> emission = torch.zeros(3, 2, requires_grad=True)
        >>> log_z = log_normalizer(torch.zeros(2), torch.zeros(2, 2), emission)
        >>> torch.autograd.grad(log_z, emission)[0][0]  # the posterior of the first state
        tensor([0.5000, 0.5000])
    """
    if torch.compiler.is_compiling():
        return _normalize_op(initial, transition, emission, lengths)
    if _dual():
        return reference(initial, transition, emission, lengths)
    if _plain(initial, transition, emission):
        return _normalize(initial, transition, emission, lengths)
    return _apply(_LogNormalizer, initial, transition, emission, lengths)


def expectations(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log Z ``[*b]``, and posterior expectations times ``weight [*b]`` in the shape of each potential.

    For broadcast potentials these are sums: with one transition for all sequences and frames, the expected number of
    steps ``[K, K]``, made without a tensor of T K². A chain without any possible path has log Z = −inf and zeros.

    Source: L. R. Rabiner (1989), equations 27 and 37.
    """
    given = [initial, transition, emission, *([] if weight is None else [weight])]
    if not torch.compiler.is_compiling() and not _dual() and _plain(*given):
        return _expect(initial, transition, emission, lengths, weight)
    lead = layout(initial, transition, emission, lengths).lead
    weight = torch.ones(lead, dtype=emission.dtype, device=emission.device) if weight is None else weight.to(emission)
    weight = weight.expand(lead)
    if torch.compiler.is_compiling():
        return _expect_op(initial, transition, emission, lengths, weight)
    if _dual():
        return _reference_expectations(initial, transition, emission, lengths, weight)
    return _apply(_Expectations, initial, transition, emission, lengths, weight)


def _apply(function: type[torch.autograd.Function], *args: Tensor | None) -> Any:
    return function.apply(*args)


# ---- for torch.compile --------------------------------------------------------------------------------------------
# Kernels look at values and leave torch, so to a compiler they are operators of their own.


@library.custom_op("torchem::chain_log_normalizer", mutates_args=())
def _normalize_op(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
    return _normalize(initial, transition, emission, lengths).contiguous()


@library.custom_op("torchem::chain_expectations", mutates_args=())
def _expect_op(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_z, *expected = _expect(initial, transition, emission, lengths, weight)
    first, pairs, gamma = (e.to(p).contiguous() for e, p in zip(expected, (initial, transition, emission), strict=True))
    return log_z.contiguous(), first, pairs, gamma


def _lead(initial: Tensor, transition: Tensor, emission: Tensor) -> torch.Size:
    rank = emission.dim() - 2
    return torch.broadcast_shapes(initial.shape[:-1], transition.shape[:rank], emission.shape[:-2])


@_normalize_op.register_fake
def _(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
    return emission.new_empty(_lead(initial, transition, emission))


@_expect_op.register_fake
def _(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_z = emission.new_empty(_lead(initial, transition, emission))
    potentials = (initial, transition, emission)
    first, pairs, gamma = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in potentials)
    return log_z, first, pairs, gamma


def _op_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_expect_op(*ctx.saved_tensors, grad)[1:], None


_normalize_op.register_autograd(_op_backward, setup_context=_op_context)


def _dual() -> bool:
    """Whether tensors carry tangents outside of ``torch.func``, where rules of jvp cannot nest."""
    return torch.autograd.forward_ad._current_level >= 0 and not torch._C._are_functorch_transforms_active()


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing is to be differentiated or transformed, so that autograd need not be told."""
    if torch._C._are_functorch_transforms_active():
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors)


# ---- steps that differ, streamed over time ------------------------------------------------------------------------


@torch.no_grad()
def stream_expectations(
    initial: Tensor,
    table: Callable[[int, int], Tensor],
    emission: Tensor,
    lengths: Tensor | None,
    weight: Tensor | None,
    block: int,
    collect: Callable[[int, int, Tensor], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`expectations` of a chain whose steps differ, without ever holding more than ``block`` of its K × K tables.

    Tables are made twice: a forward pass keeps the message at each block's start, a backward pass takes the blocks as
    short chains between the messages from both sides.

    Args:
        initial: ``[*b, K]``.
        table: Gives the potentials ``[*b, stop − start, K, K]`` of the steps into frames ``start … stop − 1``.
        emission: ``[*b, T, K]``.
        lengths: ``[*b]`` or None.
        weight: ``[*b]`` or None.
        block: Frames per block.
        collect: Takes ``(start, stop, expected)``: weighted expectations in the shape of the table. None to spare them.

    Returns:
        log Z ``[*b]``, expectations of the first state in the shape of ``initial``, posteriors ``[*b, T, K]``.
    """
    frames, part = emission.shape[-2], _blocks(table, emission, lengths, block)
    starts, log_z, messages = _messages(initial, part, emission, block)
    # Only at its end is a chain known to be impossible.
    mass = torch.ones_like(log_z) if weight is None else weight.to(log_z).expand_as(log_z)
    weight = torch.where(log_z == -torch.inf, 0.0, mass)
    behind = torch.zeros_like(emission[..., 0, :])
    gamma = torch.empty_like(emission)
    for start, message in zip(reversed(starts), reversed(messages), strict=True):
        steps, inside, left = part(start)
        last = _last_frames(inside, left)
        inside = torch.where(last.unsqueeze(-1), inside + behind.unsqueeze(-2), inside)
        _, first, pairs, share = expectations(message, steps, inside, left, weight)
        gamma[..., start : start + block, :] = share if start == 0 else share[..., 1:, :]
        if collect is not None:
            stop = min(start + block, frames)
            # No step leads into the first frame of all.
            collect(start, stop, torch.nn.functional.pad(pairs, (0, 0, 0, 0, 1, 0)) if start == 0 else pairs)
        behind = torch.where(message == -torch.inf, -torch.inf, share[..., 0, :].log() - message)
        behind = torch.where((behind == -torch.inf).all(-1, keepdim=True), 0.0, behind).to(emission)
    return log_z.to(emission), first, gamma


_Block = tuple[Tensor, Tensor, Tensor | None]


def _blocks(
    table: Callable[[int, int], Tensor], emission: Tensor, lengths: Tensor | None, block: int
) -> Callable[[int], _Block]:
    """Gives steps, emissions and lengths of the chain from the frame before a block (silent) to its last."""
    frames = emission.shape[-2]

    def part(start: int) -> _Block:
        stop = min(start + block, frames)
        inside = emission[..., start:stop, :]
        steps = table(max(start, 1), stop)
        left = None if lengths is None else (lengths - start).clamp(max=stop - start)
        if start:
            inside = torch.cat([torch.zeros_like(inside[..., :1, :]), inside], -2)
            left = None if left is None else (left + 1).clamp(min=1)
        return steps, inside, left

    return part


def _messages(
    initial: Tensor, part: Callable[[int], _Block], emission: Tensor, block: int
) -> tuple[list[int], Tensor, list[Tensor]]:
    """Where blocks start, log Z ``[*b]``, and the message at the start of each."""
    starts = list(range(0, emission.shape[-2], block))
    log_z = torch.zeros(emission.shape[:-2], dtype=torch.float64, device=emission.device)
    message, messages = initial, []
    for start in starts:
        messages.append(message)
        gain, message = _last_message(message, *part(start))
        log_z += gain
    return starts, log_z, messages


def _last_frames(inside: Tensor, left: Tensor | None) -> Tensor:
    """``[*b or 1, T]`` Boolean, True at the last valid frame."""
    ends = torch.tensor(inside.shape[-2] - 1, device=inside.device) if left is None else left - 1
    return torch.arange(inside.shape[-2], device=inside.device) == ends.unsqueeze(-1)


@torch.no_grad()
def stream_sample(
    initial: Tensor,
    table: Callable[[int, int], Tensor],
    emission: Tensor,
    lengths: Tensor | None,
    uniforms: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """log Z ``[*b]`` and what `sample` draws from the same uniform numbers ``[*b, T]``, block by block of steps.

    From the last block back, each ends in the state that the block after it has drawn. Arguments as of
    `stream_expectations`.
    """
    part = _blocks(table, emission, lengths, block)
    starts, log_z, messages = _messages(initial, part, emission, block)
    path = torch.full(emission.shape[:-1], -1, dtype=torch.long, device=emission.device)
    states = torch.arange(emission.shape[-1], device=emission.device)
    after: Tensor | None = None
    for start, message in zip(reversed(starts), reversed(messages), strict=True):
        steps, inside, left = part(start)
        stop = min(start + block, emission.shape[-2])
        if after is not None:
            # A sequence that has ended by then is free.
            goes_on = torch.ones_like(after, dtype=torch.bool) if lengths is None else (lengths > stop).expand_as(after)
            other = states != after.unsqueeze(-1)
            forced = goes_on[..., None, None] & _last_frames(inside, left).unsqueeze(-1) & other.unsqueeze(-2)
            inside = inside.masked_fill(forced, -torch.inf)
        drawn = sample(message, steps, inside, left, uniforms=uniforms[..., max(start - 1, 0) : stop])
        path[..., start:stop] = drawn[..., 1:] if start else drawn
        after = drawn[..., 0]
    return log_z.to(emission), torch.where((log_z == -torch.inf).unsqueeze(-1), -1, path)


def _last_message(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log Z and the normalised log forward message at the end of each chain."""
    chains = layout(initial, transition, emission, lengths)
    # Structural zeros may make a later frame need what a probability flushes: then the logarithms are kept.
    kernel = scan if bool((chains.transition == -torch.inf).any()) else chain_kernel(chains.emission)
    take = kernel.log_filter if kernel is scan else kernel.filter
    log_z, value = take(chains.initial, chains.transition, chains.emission, chains.lengths)
    ends = value.new_full((len(value),), value.shape[1], dtype=torch.long) if lengths is None else chains.lengths
    assert ends is not None
    last = value.gather(1, (ends - 1)[:, None, None].expand(-1, 1, value.shape[-1])).squeeze(1)
    return chains.restored(log_z), chains.restored(last if kernel is scan else last.log())


# ---- posteriors and paths -----------------------------------------------------------------------------------------


@torch.no_grad()
def filter(  # noqa: A001  the field's name
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log Z ``[*b]`` and p(z_t | x_1…t), ``[*b, T, K]``; zeros in the padding and where no path is possible."""
    chains = layout(initial, transition, emission, lengths)
    kernel = chain_kernel(chains.emission)
    log_z, alpha = kernel.filter(chains.initial, chains.transition, chains.emission, chains.lengths)
    return chains.restored(log_z), chains.restored(alpha)


@torch.no_grad()
def viterbi(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Score ``[*b]`` and states ``[*b, T]`` of the most likely path; −1 in the padding and where no path is possible.

    Ties go to the lowest state.

    Source: A. J. Viterbi (1967).

    Example:
        >>> stay = torch.tensor([[0.0, -3.0], [-3.0, 0.0]])
        >>> viterbi(torch.zeros(2), stay, torch.tensor([[2.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))[1]
        tensor([0, 0, 0])
    """
    chains = layout(initial, transition, emission, lengths)
    kernel = chain_kernel(chains.emission)
    score, path = kernel.viterbi(chains.initial, chains.transition, chains.emission, chains.lengths)
    return chains.restored(score), chains.restored(path)


@torch.no_grad()
def sample(
    initial: Tensor,
    transition: Tensor,
    emission: Tensor,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> Tensor:
    """States ``[*b, T]`` drawn from the posterior of paths; −1 in the padding and where no path is possible.

    Uniform numbers ``[*b, T]`` may be given instead of the generator that they are drawn from.

    Source: C. K. Carter, R. Kohn (1994).
    """
    chains = layout(initial, transition, emission, lengths)
    if uniforms is None:
        uniforms = torch.rand(chains.emission.shape[:2], generator=generator, dtype=torch.float64)
    uniforms = uniforms.reshape(chains.emission.shape[:2]).to(emission.device, torch.float64)
    kernel = chain_kernel(chains.emission)
    path = kernel.sample(chains.initial, chains.transition, chains.emission, chains.lengths, uniforms)
    return chains.restored(path)


@torch.no_grad()
def best_paths(
    initial: Tensor, transition: Tensor, emission: Tensor, count: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``count`` most likely paths: scores ``[*b, count]``, falling, and states ``[*b, count, T]``.

    Each state keeps its ``count`` best arrivals. Where there are fewer paths, scores are −inf and states −1.

    Source: N. Seshadri, C.-E. W. Sundberg (1994): the parallel list Viterbi algorithm.

    Example:
        >>> scores, _ = best_paths(torch.zeros(2), torch.zeros(2, 2), torch.tensor([[1.0, 0.0]]), 2)
        >>> scores
        tensor([1., 0.])
    """
    chains = layout(initial, transition, emission, lengths)
    s, t, k = chains.emission.shape
    ends = torch.full((s,), t, device=emission.device) if chains.lengths is None else chains.lengths
    steps = chains.transition.repeat_interleave(s // max(1, len(chains.transition)), 0)
    start = chains.initial.repeat_interleave(s // max(1, len(chains.initial)), 0)
    value = torch.full((s, k, count), -torch.inf, dtype=torch.float64, device=emission.device)
    value[..., 0] = (start + chains.emission[:, 0]).to(torch.float64)
    back = torch.zeros(t, s, k, count, dtype=torch.int32, device=emission.device)
    for place in range(1, t):
        step = steps if chains.transition.dim() == 3 else steps[:, place - 1]
        arrivals = (value.unsqueeze(-1) + step.unsqueeze(2)).flatten(1, 2)  # [S, K · count, K], from the best down
        best, origin = arrivals.mT.sort(dim=-1, descending=True, stable=True)
        new = best[..., :count] + chains.emission[:, place].unsqueeze(-1)
        value = torch.where((place < ends)[:, None, None], new, value)
        back[place] = origin[..., :count].to(torch.int32)
    scores, place_of = value.flatten(1).sort(dim=-1, descending=True, stable=True)
    scores, cell = scores[:, :count], place_of[:, :count]
    path = torch.full((s, count, t), -1, dtype=torch.long, device=emission.device)
    for place in range(t - 1, -1, -1):
        inside = (place < ends).unsqueeze(-1)
        path[..., place] = torch.where(inside, cell // count, -1)
        if place:
            cell = torch.where(inside, back[place].flatten(1).gather(-1, cell).long(), cell)
    path = torch.where((scores == -torch.inf).unsqueeze(-1), -1, path)
    return chains.restored(scores.to(emission.dtype)), chains.restored(path)
