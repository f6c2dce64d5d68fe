"""Chains by blocks of time, in plain torch: many short recursions at once instead of one long one.

The frames of a sequence are cut into blocks. A first sweep multiplies the steps of each block to a transfer matrix, all
blocks side by side; a tree over blocks gives the messages at their boundaries; a second sweep runs all blocks from
there at once. That is O(T K³) work in O(T / blocks + log blocks) sequential steps instead of O(T K²) in T. Where there
are sequences enough to keep the device busy one block is best, and the first two sweeps fall away.

Messages are probabilities, rescaled as they go, with the logarithm of the scale kept in float64. What such a message
flushes to zero a later frame may need (left-right chains); a sequence in which that could have happened is done again
in the log domain.

Layout of all functions: ``initial [Gi, K]``, ``transition [Gt, K, K]`` (rows: from) or ``[Gt, T−1, K, K]`` (entry t:
from frame t to t + 1), ``emission [S, T, K]``, all unnormalised log-potentials; ``lengths [S]`` or None. Gi and Gt
divide S; sequence s reads row ``s // (S // G)``.

Source: L. R. Rabiner (1989), section III; S. Särkkä, Á. F. García-Fernández (2021) for the scan over time.
"""

import math

import torch
from torch import Tensor

from torchem.ops import reduce
from torchem.ops.dispatch import time_blocks

#: Scaled transition probabilities above this make every message safe: no state's share can be flushed.
_DENSE = {torch.float64: 1e-60, torch.float32: 1e-6}
#: Masses above this are exact: its square is far above the smallest normal number, below which products are flushed.
_SAFE = {torch.float64: 1e-140, torch.float32: 1e-15}
#: Frames whose K × K exponentials are held at once in the log domain, as numbers.
_PIECE = 1 << 22


class _Blocks:
    """A problem laid out for sweeps: time within a block first, then group, then (sequence, block), then state."""

    def __init__(self, initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None):
        s, t, k = emission.shape
        self.g = transition.shape[0]
        self.n = s // self.g
        self.homogeneous = transition.dim() == 3
        self.initial, self.transition, self.emission, self.lengths = initial, transition, emission, lengths
        peak = _top(transition.flatten(1), -1)
        self.step_scale = peak.to(torch.float64).reshape(-1)
        self.a = (transition - peak.reshape(-1, *[1] * (transition.dim() - 1))).exp()
        smallest = float(self.a.amin()) if self.a.numel() else 1.0
        self.dense = smallest > _DENSE[emission.dtype]
        self.blocks = time_blocks(s, t, k, emission.device) if self.dense else 1
        self.size = -(-t // self.blocks)
        # Rescaling as often as the smallest transition demands keeps every message in range between two of them.
        room = math.log(_DENSE[emission.dtype]) / math.log(min(smallest, 0.5)) if self.dense else 1.0
        self.every = max(1, min(8, int(room)))
        top = _top(emission, -1)
        self.top = top.squeeze(-1)
        b = (emission - top).exp()
        self.b = self._blocked(b)
        first = (initial - (peak := _top(initial, -1))).exp()
        self.first_scale = peak.squeeze(-1).to(torch.float64).repeat_interleave(s // len(initial), 0)
        self.first = first.repeat_interleave(s // len(initial), 0).reshape(self.g, self.n, k)
        self.step = self._steps(self.a)
        self.alive = self._alive(s, t)

    def _steps(self, value: Tensor) -> Tensor:
        """Values in the shape of the transition as sweeps read them, the step into each frame at its place."""
        if self.homogeneous:
            return value
        s, k = len(self.emission), value.shape[-1]
        ahead = torch.cat([value.new_ones(len(value), 1, k, k), value], 1)  # the step into frame 0 is never read
        return self._blocked(ahead.repeat_interleave(s // len(ahead), 0).flatten(-2)).unflatten(-1, (k, k))

    def _blocked(self, value: Tensor) -> Tensor:
        """``[S, T, *]`` as ``[L, G, n·blocks, *]``, padded with copies of the last frame."""
        missing = self.blocks * self.size - value.shape[1]
        if missing:
            value = torch.cat([value, value[:, -1:].expand(-1, missing, -1)], 1)
        value = value.reshape(self.g, self.n * self.blocks, self.size, value.shape[-1])
        return value.movedim(2, 0).contiguous()

    def _unblocked(self, value: Tensor, t: int) -> Tensor:
        """The inverse of `_blocked`."""
        value = value.movedim(0, 2).reshape(self.g * self.n, self.blocks * self.size, *value.shape[3:])
        return value[:, :t]

    def _alive(self, s: int, t: int) -> list[Tensor | None]:
        """For each step of the sweeps the mask of frames that exist, None where all do."""
        total = self.blocks * self.size
        if self.lengths is None and total == t:
            return [None] * self.size
        device = self.b.device
        ends = torch.full((s,), t, device=device) if self.lengths is None else self.lengths.to(device)
        mask = self._blocked((torch.arange(total, device=device) < ends.unsqueeze(-1)).unsqueeze(-1))
        full = mask.flatten(1).all(-1).tolist()
        return [None if whole else m for whole, m in zip(full, mask.unbind(0), strict=True)]

    def log_scale(self) -> Tensor:
        """What potentials were divided by, ``[S]`` in float64: one step fewer than there are frames."""
        s, t, _ = self.emission.shape
        ends = torch.full((s,), t, device=self.b.device) if self.lengths is None else self.lengths
        inside = torch.arange(t, device=self.b.device) < ends.unsqueeze(-1)
        frames = torch.where(inside, self.top, 0.0).sum(-1, dtype=torch.float64)
        steps = self.step_scale.repeat_interleave(s // self.g, 0) * (ends - 1)
        return self.first_scale + frames + steps

    # ---- sweeps -----------------------------------------------------------------------------------------------

    def _product(self, message: Tensor, place: int, out: Tensor | None = None) -> Tensor:
        """``message [G, m, K]`` times the step into frame ``place``."""
        if self.homogeneous:
            return torch.matmul(message, self.step, out=out)
        value = (message.unsqueeze(-2) @ self.step[place]).squeeze(-2)
        return value if out is None else out.copy_(value)

    def transfers(self) -> tuple[Tensor, Tensor]:
        """The product of each block's steps, ``[G, n, blocks, K, K]`` with rows of sum one, and their log-scales."""
        k = self.b.shape[-1]
        m = self.n * self.blocks
        product = torch.eye(k, dtype=self.b.dtype, device=self.b.device).expand(self.g, m, k, k).contiguous()
        scale = torch.zeros(self.g, m, k, dtype=torch.float64, device=self.b.device)
        for place, (b, alive) in enumerate(zip(self.b.unbind(0), self.alive, strict=True)):
            if self.homogeneous:
                new = (product.reshape(self.g, m * k, k) @ self.step).reshape(self.g, m, k, k)
            else:
                new = product @ self.step[place]
            if place == 0:
                # Whatever comes before the first frame, the chain starts anew there.
                new.view(self.g, self.n, self.blocks, k, k)[:, :, 0] = self.first.unsqueeze(-2)
            new.mul_(b.unsqueeze(-2))
            product = new if alive is None else torch.where(alive.unsqueeze(-1), new, product)
            if place % self.every == self.every - 1 or place == self.size - 1:
                total = product.sum(-1)
                product = product / _nonzero(total).unsqueeze(-1)
                scale += total.to(torch.float64).log()
        shape = (self.g, self.n, self.blocks)
        return product.view(*shape, k, k), scale.view(*shape, k)

    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Messages into each block from the left and from the right, ``[G, n·blocks, K]``, in any scale.

        Transfers are multiplied pairwise up a tree; messages come down it: a left half passes its message from the left
        to the right half through its own transfer, and the other way round. The tree's root starts from nothing on
        either side, as its first row of steps begins the chain.

        Source: G. E. Blelloch (1990): the scan's up-sweep and down-sweep.
        """
        levels = [self.transfers()]
        while levels[-1][0].shape[2] > 1:
            levels.append(_joined(*levels[-1]))
        left = right = torch.ones_like(levels[-1][0][..., 0])
        for product, row in reversed(levels[:-1]):
            through, weight = product.unflatten(2, (-1, 2)), _shares(row).to(product).unflatten(2, (-1, 2))
            ahead = (left * weight[:, :, :, 0]).unsqueeze(-2) @ through[:, :, :, 0]
            back = weight[:, :, :, 1] * (through[:, :, :, 1] @ right.unsqueeze(-1)).squeeze(-1)
            left = torch.stack([left, _scaled(ahead.squeeze(-2))], 3).flatten(2, 3)
            right = torch.stack([_scaled(back), right], 3).flatten(2, 3)
        return left.flatten(1, 2), right.flatten(1, 2)

    def log_total(self) -> Tensor:
        """log Z (unscaled) of each sequence from the transfers alone, ``[S]``."""
        level = self.transfers()
        while level[0].shape[2] > 1:
            level = _joined(*level)
        return level[1][..., 0].reshape(-1)

    def forward(self, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Messages ``[L, G, m, K]`` after each frame, what each was divided by, and the logs of that over a block."""
        k = self.b.shape[-1]
        alpha = torch.empty_like(self.b)
        divisor = torch.ones(self.b.shape[:-1], dtype=self.b.dtype, device=self.b.device)
        log_scale = torch.zeros(self.b.shape[1:-1], dtype=torch.float64, device=self.b.device)
        message = left
        rows = zip(alpha.unbind(0), self.b.unbind(0), self.alive, strict=True)
        for place, (out, b, alive) in enumerate(rows):
            before = message
            self._product(message, place, out)
            if place == 0:
                out.view(self.g, self.n, self.blocks, k)[:, :, 0] = self.first
            out.mul_(b)
            if alive is not None:
                out.copy_(torch.where(alive, out, before))
            if place % self.every == self.every - 1 or place == self.size - 1:
                # A sequence that ended meanwhile is rescaled too: its total is not in the sum yet.
                total = out.sum(-1)
                out.div_(_nonzero(total).unsqueeze(-1))
                divisor[place] = total
                log_scale += total.to(torch.float64).log()
            message = out
        return alpha, divisor, log_scale

    def backward(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Messages ``[L, G, m, K]`` from after each frame, in any scale, and each times its emission."""
        beta, ahead = torch.empty_like(self.b), torch.empty_like(self.b)
        step = self.step.mT.contiguous() if self.homogeneous else self.step
        message = right
        rows = list(zip(beta.unbind(0), ahead.unbind(0), self.b.unbind(0), self.alive, strict=True))
        for place in range(self.size - 1, -1, -1):
            stored, product, b, alive = rows[place]
            if place % self.every == 0:
                message = message / _nonzero(message.sum(-1, keepdim=True))
            stored.copy_(message)
            torch.mul(b, message, out=product)
            new = product @ step if self.homogeneous else (step[place] @ product.unsqueeze(-1)).squeeze(-1)
            message = new if alive is None else torch.where(alive, new, message)
        return beta, ahead

    def doubtful(
        self, alpha: Tensor | None = None, divisor: Tensor | None = None, overlap: Tensor | None = None
    ) -> Tensor:
        """``[S]`` Boolean: sequences in which a mass fell so low that what was flushed to zero may matter.

        With dense transitions only the first frame can do that, when it denies what the initial law says. Otherwise a
        state may be cut off from all others: by induction over frames nothing is lost as long as each state that can be
        reached has a predicted mass of `_SAFE`, and so have a frame and the overlap of the messages from both sides.
        """
        k, safe = self.b.shape[-1], _SAFE[self.b.dtype]
        begin = self.b[0].view(self.g, self.n, self.blocks, k)[:, :, 0]
        doubt = ((self.first * begin).sum(-1) < safe).reshape(-1)
        if self.dense or alpha is None or divisor is None:
            return doubt
        step, allowed = self.step, self._steps((self.transition > -torch.inf).to(alpha))
        if not self.homogeneous:
            step, allowed = step[1:], allowed[1:]
        predicted = torch.cat([self.first.unsqueeze(0), _led(alpha[:-1], step)])
        reached = (predicted > 0) & (self._blocked(self.emission) > -torch.inf)
        starts = (self.initial > -torch.inf).repeat_interleave(len(doubt) // len(self.initial), 0)
        reached = torch.cat([starts.view_as(self.first).unsqueeze(0), _led(reached[:-1].to(alpha), allowed) > 0])
        low = (reached & (predicted < safe)).any(-1) | (divisor < safe)
        if overlap is not None:
            low = low | (overlap < safe)
        inside = self._unblocked(low.unsqueeze(-1), self.emission.shape[1]).squeeze(-1)
        if self.lengths is not None:
            inside = inside & (torch.arange(inside.shape[1], device=inside.device) < self.lengths.unsqueeze(-1))
        return doubt | inside.any(-1)


def _joined(product: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Transfers of pairs of neighbours ``[G, n, blocks / 2, K, K]`` with rows of sum one, and their log-scales."""
    first, second = product[:, :, ::2], product[:, :, 1::2]
    ahead = scale[:, :, 1::2]
    joint = (first * _shares(ahead).to(first).unsqueeze(-2)) @ second
    total = joint.sum(-1)
    log_total = scale[:, :, ::2] + _top(ahead, -1) + total.to(torch.float64).log()
    return joint.div_(_nonzero(total).unsqueeze(-1)), log_total


def _shares(scale: Tensor) -> Tensor:
    """Exponentials over the last axis, the largest of them one."""
    return (scale - _top(scale, -1)).exp()


def _scaled(value: Tensor) -> Tensor:
    return value / _nonzero(value.sum(-1, keepdim=True))


def _led(message: Tensor, step: Tensor) -> Tensor:
    """Messages ``[L, G, m, K]`` times steps ``[G, K, K]``, or ``[L, G, m, K, K]``."""
    return message @ step if step.dim() == 3 else (message.unsqueeze(-2) @ step).squeeze(-2)


def _top(value: Tensor, dim: int) -> Tensor:
    """The maximum along ``dim``, kept; zero where it is −inf."""
    if value.shape[dim] == 0:
        return value.new_zeros((*value.shape[:-1], 1))
    top = value.amax(dim, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, top)


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value == 0, 1.0, value)


def _edges(problem: _Blocks) -> tuple[Tensor, Tensor]:
    """Messages into the blocks from both sides."""
    if problem.blocks > 1:
        return problem.boundaries()
    uniform = torch.ones_like(problem.b[0])
    return uniform / uniform.shape[-1], uniform


def log_normalizer(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> Tensor:
    """log Z of each sequence, ``[S]``; −inf where no path is possible."""
    if not len(emission):
        return emission.new_zeros(0)
    problem = _Blocks(initial, transition, emission, lengths)
    if problem.blocks > 1:
        log_z, doubt = problem.log_total(), problem.doubtful()
    else:
        alpha, divisor, log_scale = problem.forward(_edges(problem)[0])
        log_z, doubt = log_scale.reshape(-1), problem.doubtful(alpha, divisor)
    redo = (log_z == -torch.inf) | doubt
    log_z = (log_z + problem.log_scale()).to(emission.dtype)
    if bool(redo.any()):
        which = redo.nonzero()[:, 0]
        again = log_domain(*_chosen(which, initial, transition, emission, lengths))[0]
        log_z = log_z.index_copy(0, which, again.to(emission.dtype))
    return log_z


def filter(  # noqa: A001  the field's name
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log Z ``[S]`` and p(z_t | x_1…t) ``[S, T, K]``; zero in the padding and where no path is possible."""
    log_z, alpha = log_filter(initial, transition, emission, lengths)
    return log_z, alpha.exp()


def log_filter(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """`filter` with logarithms of the probabilities, none of them flushed."""
    s, t, _ = emission.shape
    if not s:
        return emission.new_zeros(0), emission.clone()
    problem = _Blocks(initial, transition, emission, lengths)
    alpha, divisor, log_scale = problem.forward(_edges(problem)[0])
    log_z = log_scale.view(problem.g, problem.n, problem.blocks).sum(-1).reshape(-1)
    redo = (log_z == -torch.inf) | problem.doubtful(alpha, divisor)
    log_z = (log_z + problem.log_scale()).to(emission.dtype)
    value = problem._unblocked(alpha, t)
    value = (value / _nonzero(value.sum(-1, keepdim=True))).log()
    if bool(redo.any()):
        which = redo.nonzero()[:, 0]
        again, exact, *_ = log_domain(*_chosen(which, initial, transition, emission, lengths))
        log_z, value = log_z.index_copy(0, which, again.to(log_z)), value.index_copy(0, which, exact.to(value))
    impossible = (log_z == -torch.inf)[:, None, None]
    if lengths is not None:
        impossible = impossible | (torch.arange(t, device=value.device) >= lengths.unsqueeze(-1)).unsqueeze(-1)
    return log_z, torch.where(impossible, -torch.inf, value)


def smooth(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z ``[S]``, expected steps like ``transition`` (float64) and posteriors ``[S, T, K]``, both weighted."""
    s, t, _ = emission.shape
    if not s:
        return emission.new_zeros(0), torch.zeros_like(transition, dtype=torch.float64), emission.clone()
    problem = _Blocks(initial, transition, emission, lengths)
    left, right = _edges(problem)
    alpha, divisor, log_scale = problem.forward(left)
    beta, ahead = problem.backward(right)
    log_z = log_scale.view(problem.g, problem.n, problem.blocks).sum(-1).reshape(-1)
    gamma = alpha * beta
    share = gamma.sum(-1)
    redo = (log_z == -torch.inf) | problem.doubtful(alpha, divisor, share)
    log_z = (log_z + problem.log_scale()).to(emission.dtype)
    # Weights of the sequences that stand: the others count for nothing here.
    mass = torch.where(redo, 0.0, torch.ones_like(log_z) if weight is None else weight.to(log_z))
    each = mass.view(problem.g, problem.n, 1).expand(-1, -1, problem.blocks).reshape(problem.g, -1)
    factor = torch.where(each != 0, each / _nonzero(share), 0.0)
    if any(alive is not None for alive in problem.alive):
        inside = torch.stack([torch.ones_like(each) if a is None else a.squeeze(-1).to(each) for a in problem.alive])
        factor = factor * inside
    pairs = _pairs(problem, alpha, ahead.mul_((factor / _nonzero(divisor)).unsqueeze(-1)), left)
    gamma = problem._unblocked(gamma.mul_(factor.unsqueeze(-1)), t)
    if bool(redo.any()):
        which = redo.nonzero()[:, 0]
        parts = _chosen(which, initial, transition, emission, lengths)
        again, again_pairs, again_gamma = _log_smooth(*parts, None if weight is None else weight[which])
        log_z = log_z.index_copy(0, which, again.to(log_z))
        gamma = gamma.index_copy(0, which, again_gamma.to(gamma))
        pairs = pairs.index_add(0, which // problem.n, again_pairs)
    return log_z, pairs, gamma


def _pairs(problem: _Blocks, alpha: Tensor, ahead: Tensor, left: Tensor) -> Tensor:
    """Σ α_{t−1} ⊗ (b β)_t ∘ A over frames: one product over all of them where the chain is homogeneous."""
    k = alpha.shape[-1]
    shape = (problem.g, problem.n, problem.blocks, k)
    first = ahead[0].view(shape)[:, :, 1:]
    entering = left.view(shape)[:, :, 1:]
    if problem.homogeneous:
        before = alpha[:-1].movedim(1, 0).reshape(problem.g, -1, k)
        after = ahead[1:].movedim(1, 0).reshape(problem.g, -1, k)
        total = (before.mT @ after).to(torch.float64)
        total = total + (entering.reshape(problem.g, -1, k).mT @ first.reshape(problem.g, -1, k)).to(torch.float64)
        return total * problem.a.to(torch.float64)
    before = torch.cat([left.unsqueeze(0), alpha[:-1]])
    table = before.unsqueeze(-1) * problem.step * ahead.unsqueeze(-2)
    steps = problem._unblocked(table.flatten(-2), problem.emission.shape[1])[:, 1:].unflatten(-1, (k, k))
    return steps.reshape(problem.g, problem.n, *steps.shape[1:]).sum(1, dtype=torch.float64)


# ---- the log domain -----------------------------------------------------------------------------------------------


def _chosen(
    which: Tensor, initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Some of the sequences, each with its own initial and transition, in float64."""
    s = len(emission)
    parts = initial[which // (s // len(initial))], transition[which // (s // len(transition))], emission[which]
    a, b, c = (part.to(torch.float64) for part in parts)
    return a, b, c, None if lengths is None else lengths[which]


def log_domain(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, backward: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z ``[S]``, normalised log forward messages ``[S, T, K]`` and, if asked, log backward ones; a row each."""
    s, t, _ = emission.shape
    steps = transition.unsqueeze(1).expand(-1, max(t - 1, 0), -1, -1) if transition.dim() == 3 else transition
    ends = torch.full((s,), t, device=emission.device) if lengths is None else lengths
    alpha, beta = torch.empty_like(emission), torch.zeros_like(emission)
    log_z = torch.zeros(s, dtype=emission.dtype, device=emission.device)
    message = initial
    for place in range(t):
        if place:
            message = reduce.logsumexp(alpha[:, place - 1].unsqueeze(-1) + steps[:, place - 1], -2)
        new = message + emission[:, place]
        total = reduce.logsumexp(new, -1)
        inside = place < ends
        log_z = torch.where(inside, log_z + total, log_z)
        new = new - torch.where(total == -torch.inf, 0.0, total).unsqueeze(-1)
        alpha[:, place] = new if place == 0 else torch.where(inside.unsqueeze(-1), new, alpha[:, place - 1])
    if backward:
        for place in range(t - 2, -1, -1):
            ahead = emission[:, place + 1] + beta[:, place + 1]
            new = reduce.logsumexp(steps[:, place] + ahead.unsqueeze(-2), -1)
            new = new - _top(new, -1)
            beta[:, place] = torch.where((place + 1 < ends).unsqueeze(-1), new, beta[:, place + 1])
    return log_z, alpha, beta


def _log_smooth(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`smooth` in the log domain; expected steps of each sequence apart."""
    s, t, k = emission.shape
    log_z, alpha, beta = log_domain(initial, transition, emission, lengths, backward=True)
    mass = torch.ones_like(log_z) if weight is None else weight.to(log_z)
    mass = torch.where(log_z == -torch.inf, 0.0, mass)
    ends = torch.full((s,), t, device=emission.device) if lengths is None else lengths
    inside = torch.arange(t, device=emission.device) < ends.unsqueeze(-1)
    gamma = reduce.responsibilities(alpha + beta)[1] * torch.where(inside, mass.unsqueeze(-1), 0.0).unsqueeze(-1)
    pairs = torch.zeros_like(transition)
    rows = max(1, _PIECE // (s * k * k))
    for start in range(0, t - 1, rows):
        stop = min(start + rows, t - 1)
        after = (emission + beta)[:, start + 1 : stop + 1].unsqueeze(-2)
        step = transition.unsqueeze(1) if transition.dim() == 3 else transition[:, start:stop]
        joint = (alpha[:, start:stop].unsqueeze(-1) + step + after).flatten(-2)
        share = reduce.responsibilities(joint)[1].unflatten(-1, (k, k))
        share = share * torch.where(inside[:, start + 1 : stop + 1], mass.unsqueeze(-1), 0.0)[..., None, None]
        if transition.dim() == 3:
            pairs = pairs + share.sum(1)
        else:
            pairs[:, start:stop] = share
    return log_z, pairs.to(torch.float64), gamma


# ---- paths --------------------------------------------------------------------------------------------------------


def viterbi(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best path of each sequence: its score ``[S]`` and states ``[S, T]``, −1 in the padding and where none is.

    Ties go to the lowest state.

    Source: A. J. Viterbi (1967).
    """
    s, t, k = emission.shape
    path = torch.full((s, t), -1, dtype=torch.long, device=emission.device)
    if not s:
        return emission.new_zeros(0), path
    steps = transition.repeat_interleave(s // len(transition), 0)
    ends = torch.full((s,), t, device=emission.device) if lengths is None else lengths
    back = torch.zeros(t, s, k, dtype=torch.int32 if k > 255 else torch.uint8, device=emission.device)
    value = initial.repeat_interleave(s // len(initial), 0).to(torch.float64) + emission[:, 0]
    for place in range(1, t):
        joint = value.unsqueeze(-1) + (steps if transition.dim() == 3 else steps[:, place - 1])
        best = reduce.first_max(joint, -2)
        back[place] = best.to(back.dtype)
        new = joint.gather(-2, best.unsqueeze(-2)).squeeze(-2) + emission[:, place]
        value = torch.where((place < ends).unsqueeze(-1), new, value)
    state = reduce.first_max(value, -1)
    score = value.gather(-1, state.unsqueeze(-1)).squeeze(-1)
    for place in range(t - 1, -1, -1):
        path[:, place] = torch.where(place < ends, state, -1)
        earlier = back[place].gather(-1, state.unsqueeze(-1)).squeeze(-1).long()
        state = torch.where((place < ends) & (place > 0), earlier, state)
    return score.to(emission.dtype), torch.where((score == -torch.inf).unsqueeze(-1), -1, path)


def sample(initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None, uniforms: Tensor) -> Tensor:
    """A path of each sequence drawn from its posterior, ``[S, T]``, from uniform numbers ``[S, T]``.

    Source: C. K. Carter, R. Kohn (1994): forward filtering, backward sampling.
    """
    s, t, _ = emission.shape
    log_z, alpha = log_filter(initial, transition, emission, lengths)
    path = torch.full((s, t), -1, dtype=torch.long, device=emission.device)
    steps = transition.repeat_interleave(s // max(1, len(transition)), 0).to(torch.float64)
    ends = torch.full((s,), t, device=emission.device) if lengths is None else lengths
    state = torch.zeros(s, dtype=torch.long, device=emission.device)
    for place in range(t - 1, -1, -1):
        logits = alpha[:, place].to(torch.float64)
        if place < t - 1:
            step = steps if transition.dim() == 3 else steps[:, place]
            column = step.gather(-1, state[:, None, None].expand(-1, step.shape[-2], 1)).squeeze(-1)
            logits = torch.where((place + 1 < ends).unsqueeze(-1), logits + column, logits)
        share = reduce.responsibilities(logits)[1]
        state = torch.where(place < ends, reduce.draw(share, uniforms[:, place].to(share)), state)
        path[:, place] = torch.where(place < ends, state, -1)
    return torch.where((log_z == -torch.inf).unsqueeze(-1), -1, path)
