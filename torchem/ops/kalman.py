"""Gauss–Markov chains under quadratic potentials: the Kalman filter and the Rauch–Tung–Striebel smoother.

    z_1 ~ N(m, P),  z_t = A_t z_{t−1} + b_t + w_t,  w_t ~ N(0, Q_t),  each frame weighted by exp(hᵀz − ½ zᵀJz).

An observation x = C z + v, v ~ N(0, R), is such a potential, J = CᵀR⁻¹C and h = CᵀR⁻¹x, however many columns it has;
one that is missing is J = 0; expectations under a posterior of the parameters are others. Nothing here has the size of
an observation.

Covariances depend on J, A and Q alone, not on what was observed. So sequences of one pattern (a length, what is
missing where) are a *group* and share one recursion; means of all sequences are then affine recursions

    f_t = F_t f_{t−1} + k_t,  and backwards  s_t = G_t s_{t+1} + l_t,

matrix products of all sequences of a group at once.

*Roots.* A filtered covariance is (P⁻¹ + J)⁻¹ = KᵀK with K = S⁻¹Lᵀ, P = L Lᵀ and S Sᵀ = I + LᵀJL: never a difference,
and S is at least the identity. The smoothed one is a sum of squares too (Joseph's form). With ``square_root`` L and S
come of orthogonal triangularisations, so that no covariance is ever squared: what float32 needs where noises are of
very different size.

*Parallel in time.* The filter's covariances are a composition of the maps P ↦ Φ (P⁻¹ + Γ)⁻¹ Φᵀ + Σ, one for each step,
which compose to such a map again; means and smoothed covariances are compositions of affine maps. A long series is
therefore cut into blocks: their maps side by side, the states at their boundaries one after the other, and then all
blocks from there side by side, in O(blocks + T / blocks) sequential steps.

Layout: ``*r`` replicas, G groups, N sequences, T frames, L latents. Groups and sequences come before time where given;
results have time first: ``[*r, T, N, L]`` and ``[*r, T, G, L, L]``.

Source: R. E. Kalman (1960); H. E. Rauch, F. Tung, C. T. Striebel (1965); G. J. Bierman (1977) for the roots;
S. Särkkä, Á. F. García-Fernández (2021), section III for the maps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchem.ops import linalg
from torchem.ops.dispatch import compiled_kalman, kalman_blocks


@dataclass(frozen=True)
class GaussMarkov:
    """The chain; one entry along an axis of groups or frames serves all of them.

    Attributes:
        mean: ``[*r, L]`` of the first state.
        covariance: ``[*r, L, L]`` of the first state.
        dynamics: A, ``[*r, G or 1, T or 1, L, L]``; entry t leads into frame t, entry 0 is not read.
        noise: Q, likewise.
        information: J, ``[*r, G or 1, T or 1, L, L]``.
        linear: h, ``[*r, N, T, L]``.
        drift: b, ``[*r, N, T, L]``; entry 0 is not read. None for zero.
        which: ``[N]`` group of each sequence; None where there is one group, or each sequence is its own.
        valid: ``[G or 1, T]`` Boolean, True where a group has a frame; None where all have all. Potentials of other
            frames must be zero.
        half: U with J = UᵀU, ``[*r, G or 1, T or 1, H, L]``, for roots; None to take one from the spectrum of J, whose
            derivative needs J to be regular.
    """

    mean: Tensor
    covariance: Tensor
    dynamics: Tensor
    noise: Tensor
    information: Tensor
    linear: Tensor
    drift: Tensor | None = None
    which: Tensor | None = None
    valid: Tensor | None = None
    half: Tensor | None = None

    @property
    def frames(self) -> int:
        """T."""
        return self.linear.shape[-2]

    def at(self, name: str, t: int) -> Tensor:
        """A matrix of frame t, ``[*r, G or 1, L, L]``."""
        value = getattr(self, name)
        return value[..., t if value.shape[-3] > 1 else 0, :, :]

    def every(self, name: str) -> Tensor:
        """The matrices of all frames, time first: ``[*r, T or 1, G or 1, L, L]``."""
        return getattr(self, name).transpose(-4, -3)

    def applied(self, matrix: Tensor, vector: Tensor) -> Tensor:
        """Matrices ``[…, G or 1, L, L]`` times vectors ``[…, N, L]`` of the sequences of each group."""
        if matrix.shape[-3] == 1:
            return vector @ matrix.squeeze(-3).mT
        if self.which is not None:
            matrix = matrix.index_select(-3, self.which)
        return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

    def by_sequence(self, value: Tensor, dim: int) -> Tensor:
        """What groups have along an axis, for each sequence."""
        if self.which is not None:
            return value.index_select(dim, self.which)
        shape = list(value.shape)
        shape[dim] = self.linear.shape[-3]
        return value.expand(shape)


@dataclass(frozen=True)
class Filtered:
    """The laws of states given the frames so far.

    Attributes:
        mean: ``[*r, T, N, L]``.
        covariance: ``[*r, T, G, L, L]``.
        predicted_mean: Of each state given the frames before, ``[*r, T, N, L]``.
        predicted_root: A lower root of its covariance, ``[*r, T, G, L, L]``.
        log_weight: ``[*r, T, N]``: log ∫ N(z_t | predicted) exp(φ_t(z_t)) dz_t less φ_t at the filtered mean. That
            difference has no terms that cancel; see `log_normalizer`.
    """

    mean: Tensor
    covariance: Tensor
    predicted_mean: Tensor
    predicted_root: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class Smoothed:
    """The laws of states given all frames.

    Attributes:
        filtered: Those given the frames so far.
        mean: ``[*r, T, N, L]``.
        covariance: ``[*r, T, G, L, L]``.
        cross: Cov(z_{t+1}, z_t), ``[*r, T − 1, G, L, L]``.
    """

    filtered: Filtered
    mean: Tensor
    covariance: Tensor
    cross: Tensor


def log_normalizer(chain: GaussMarkov) -> Tensor:
    """log ∫ p(z) exp Σ_t (h_tᵀz_t − ½ z_tᵀJ_t z_t) dz of each sequence, ``[*r, N]``: its gradient are moments.

    ∂/∂h_t = E z_t and ∂/∂J_t = −½ E z_t z_tᵀ.

    Example:
        >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        >>> chain = GaussMarkov(one[0, 0, 0], one[0, 0], one, one, one, torch.zeros(1, 1, 1, dtype=torch.float64))
        >>> float(log_normalizer(chain))  # log ∫ N(z | 1, 1) exp(−z²/2) dz = −½ log 2 − ¼
        -0.596573...
    """
    found = filtered(chain)
    h = chain.linear.transpose(-3, -2)
    value = ((h - 0.5 * chain.applied(chain.every("information"), found.mean)) * found.mean).sum(-1)
    return (value + found.log_weight).sum(-2)


def filtered(chain: GaussMarkov, square_root: bool = False, blocks: int | None = None) -> Filtered:
    """The Kalman filter.

    Args:
        chain: The chain.
        square_root: Whether roots come of orthogonal triangularisations.
        blocks: Number of blocks of time that run side by side; None to choose by shape.

    Example:
        >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        >>> chain = GaussMarkov(one[0, 0, 0], one[0, 0], one, one, one, torch.zeros(1, 5, 1, dtype=torch.float64))
        >>> filtered(chain).mean.shape
        torch.Size([5, 1, 1])
    """
    t = chain.frames
    blocks = _blocks(chain, square_root) if blocks is None else blocks
    root, inner, factor = _riccati(chain, square_root, blocks)
    covariance = inner.mT @ inner
    kept = torch.eye(covariance.shape[-1]).to(covariance) - covariance @ chain.every("information")
    pull = chain.applied(covariance, chain.linear.transpose(-3, -2))
    # f_t = E_t (A_t f_{t−1} + b_t) + P_t h_t, with E = I − P J.
    step = kept @ chain.every("dynamics")
    shift = pull if chain.drift is None else pull + chain.applied(kept, chain.drift.transpose(-3, -2))
    if chain.valid is not None:
        # Beyond the end of a sequence nothing moves.
        step = torch.where(chain.valid.mT[..., None, None], step, torch.eye(step.shape[-1]).to(step))
        shift = torch.where(chain.by_sequence(chain.valid, 0).mT.unsqueeze(-1), shift, 0.0)
    first = chain.mean.unsqueeze(-2)
    first = chain.applied(kept[..., 0, :, :, :], first.expand_as(pull[..., 0, :, :])) + pull[..., 0, :, :]
    which = chain.which if step.shape[-3] > 1 else None
    mean = _recursion(first, _frames(step, 1, t), shift[..., 1:, :, :], chain.applied, blocks, 2, which)
    ahead = chain.applied(_frames(chain.every("dynamics"), 1, t), mean[..., :-1, :, :])
    if chain.drift is not None:
        ahead = ahead + chain.drift.transpose(-3, -2)[..., 1:, :, :]
    start = chain.mean.unsqueeze(-2).expand_as(mean[..., 0, :, :]).unsqueeze(-3)
    predicted = torch.cat([start, ahead], -3)
    if chain.valid is not None:
        inside = chain.by_sequence(chain.valid, 0).mT.unsqueeze(-1)
        predicted = torch.where(inside, predicted, torch.cat([start, mean[..., :-1, :, :]], -3))
    # With the predicted law as a sum of squares: −½ |L⁻¹(f − m)|² − ½ log |I + LᵀJL|.
    gap = chain.applied(torch.linalg.solve_triangular(root, torch.eye(root.shape[-1]).to(root), upper=False),
                        mean - predicted)  # fmt: skip
    log_det = factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    log_weight = -0.5 * gap.square().sum(-1) - chain.by_sequence(log_det, -1)
    return Filtered(mean, covariance, predicted, root, log_weight)


def smoothed(chain: GaussMarkov, square_root: bool = False, blocks: int | None = None) -> Smoothed:
    """The Rauch–Tung–Striebel smoother.

    Args:
        chain: The chain.
        square_root: As for `filtered`.
        blocks: As for `filtered`.

    Example:
        >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        >>> chain = GaussMarkov(one[0, 0, 0], one[0, 0], one, one, one, torch.zeros(1, 5, 1, dtype=torch.float64))
        >>> smoothed(chain).cross.shape
        torch.Size([4, 1, 1, 1])
    """
    found = filtered(chain, square_root, blocks)
    t = chain.frames
    blocks = _blocks(chain, square_root) if blocks is None else blocks
    if t == 1:
        return Smoothed(found, found.mean, found.covariance, found.covariance[..., :0, :, :, :])
    dynamics, noise = (_frames(chain.every(name), 1, t) for name in ("dynamics", "noise"))
    before = found.covariance[..., :-1, :, :, :]
    # G = P Aᵀ P⁻₊₁⁻¹
    gain = torch.cholesky_solve(dynamics @ before, found.predicted_root[..., 1:, :, :, :]).mT
    rest = torch.eye(gain.shape[-1]).to(gain) - gain @ dynamics
    left = rest @ before @ rest.mT + gain @ noise @ gain.mT
    shift = found.mean[..., :-1, :, :] - chain.applied(gain, found.predicted_mean[..., 1:, :, :])
    if chain.valid is not None:
        goes_on = chain.valid[:, 1:].mT[..., None, None]
        gain, left = torch.where(goes_on, gain, 0.0), torch.where(goes_on, left, before)
        there = chain.by_sequence(chain.valid[:, 1:], 0).mT.unsqueeze(-1)
        shift = torch.where(there, shift, found.mean[..., :-1, :, :])
    which = chain.which if gain.shape[-3] > 1 else None
    mean = _recursion(found.mean[..., -1, :, :], gain.flip(-4), shift.flip(-3), chain.applied, blocks, 2, which).flip(
        -3
    )
    last = found.covariance[..., -1, :, :, :]
    covariance = _recursion(last, gain.flip(-4), left.flip(-4), _congruence, blocks, 3).flip(-4)
    return Smoothed(found, mean, covariance, covariance[..., 1:, :, :, :] @ gain.mT)


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """Compiled recursions, where there are some for these tensors: nothing follows their derivatives."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    followed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return None if followed else compiled_kalman(tensors[0].device)


def _numbers(value: Tensor, lead: torch.Size, event: int) -> Any:
    """A tensor with one leading axis in place of ``lead``, as an array."""
    value = value.detach().expand(*lead, *value.shape[value.dim() - event :])
    return value.reshape(lead.numel(), *value.shape[value.dim() - event :]).contiguous().numpy()


def _blocks(chain: GaussMarkov, square_root: bool = False) -> int:
    """Blocks of time for a chain, by its shape; one where loops are compiled, whose steps cost next to nothing."""
    given = (value for value in vars(chain).values() if isinstance(value, Tensor))
    if not square_root and _kernels(*given) is not None:
        return 1
    groups = max(
        chain.information.shape[-4], chain.dynamics.shape[-4], 1 if chain.valid is None else chain.valid.shape[0]
    )
    k = chain.mean.shape[-1]
    return kalman_blocks(chain.mean.shape[:-1].numel() * groups, chain.frames, k, chain.mean.device)


def _frames(value: Tensor, start: int, stop: int) -> Tensor:
    """Matrices of some frames, time first; one that serves all serves these."""
    return value if value.shape[-4] == 1 else value[..., start:stop, :, :, :]


# ---- recursions ---------------------------------------------------------------------------------------------------


def half(matrix: Tensor) -> Tensor:
    """U with ``J = UᵀU`` for positive semidefinite matrices, by their spectrum.

    Example:
        >>> half(torch.tensor([[4.0]])).abs()
        tensor([[2.]])
    """
    values, vectors = linalg.eigh(matrix.to(torch.float64))
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)).mT.to(matrix.dtype)


class _Steps:
    """One step of the filter's covariances, by plain factors or by orthogonal triangularisation."""

    def __init__(self, chain: GaussMarkov, square_root: bool, resting: bool = False):
        self.square_root, self.resting = square_root, resting
        self.noise = self._factor(chain.noise) if square_root else chain.noise
        self.node = chain.information
        if square_root:
            self.node = half(chain.information) if chain.half is None else chain.half
        self.dynamics, self.chain = chain.dynamics, chain
        self.eye = torch.eye(chain.mean.shape[-1]).to(chain.mean)

    def _factor(self, matrix: Tensor) -> Tensor:
        """Cholesky factors; zero of what is zero, where there is no noise because nothing moves."""
        if not self.resting:
            return linalg.cholesky(matrix)
        zero = (matrix == 0).all(-1).all(-1)[..., None, None]
        return torch.where(
            zero, 0.0, linalg.cholesky(torch.where(zero, torch.eye(matrix.shape[-1]).to(matrix), matrix))
        )

    def _triangle(self, rows: Tensor) -> Tensor:
        """Lower L with L Lᵀ = rowsᵀ rows, without the product."""
        if not self.resting:
            return torch.linalg.qr(rows).R.mT
        zero = (rows == 0).all(-1).all(-1)[..., None, None]
        unit = torch.eye(rows.shape[-2], rows.shape[-1]).to(rows)
        return torch.where(zero, 0.0, torch.linalg.qr(torch.where(zero, unit, rows)).R.mT)

    @staticmethod
    def at(value: Tensor, t: int) -> Tensor:
        return value[..., t if value.shape[-3] > 1 else 0, :, :]

    def update(self, root: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """K with KᵀK the filtered covariance, and S with S Sᵀ = I + LᵀJL."""
        node = self.at(self.node, t)
        if self.square_root:
            inner = node @ root
            stacked = torch.cat([self.eye.expand(*inner.shape[:-2], *self.eye.shape), inner], -2)
            factor = torch.linalg.qr(stacked).R.mT
        else:
            factor = linalg.cholesky(self.eye + root.mT @ node @ root)
        return torch.linalg.solve_triangular(factor, root.mT, upper=False), factor

    def predict(self, inner: Tensor, t: int) -> Tensor:
        """A lower root of the covariance of the state at frame t, from that before; beyond the end nothing moves."""
        dynamics, noise = self.at(self.dynamics, t), self.at(self.noise, t)
        moved, noise = torch.broadcast_tensors(inner @ dynamics.mT, noise)
        valid = None if self.chain.valid is None else self.chain.valid[:, t, None, None]
        if self.square_root:
            if valid is not None:
                moved, noise = torch.where(valid, moved, inner), torch.where(valid, noise, 0.0)
            return self._triangle(torch.cat([moved, noise.mT], -2))
        ahead = moved.mT @ moved + noise
        return self._factor(ahead if valid is None else torch.where(valid, ahead, inner.mT @ inner))


def _riccati(chain: GaussMarkov, square_root: bool, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Roots L of predicted covariances, K of filtered ones and S, all ``[*r, T, G, L, L]``."""
    groups = torch.broadcast_shapes(
        chain.information.shape[-4:-3], chain.dynamics.shape[-4:-3], chain.noise.shape[-4:-3],
        (1,) if chain.valid is None else chain.valid.shape[:1],
    )  # fmt: skip
    first = linalg.cholesky(chain.covariance).unsqueeze(-3)
    first = first.expand(*first.shape[:-3], *groups, *first.shape[-2:])
    if blocks == 1:
        return _sequential(_Steps(chain, square_root), chain.frames, first)
    cut = _cut_chain(chain, groups[0], blocks)
    steps = _Steps(cut, square_root, chain.valid is not None)
    starts = _boundaries(steps, first, blocks)
    found = _sequential(steps, cut.frames, starts.flatten(-4, -3))
    parts = (value.unflatten(-3, (groups[0], blocks)).movedim(-3, -5).flatten(-5, -4) for value in found)
    root, inner, factor = (value[..., : chain.frames, :, :, :] for value in parts)
    return root, inner, factor


def _sequential(steps: _Steps, frames: int, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = root, steps.dynamics, steps.noise, steps.node
    kernels = _kernels(*parts)
    if kernels is not None and not steps.square_root and not steps.resting:
        return _compiled(kernels, steps, frames, root)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(frames):
        inner, factor = steps.update(root, t)
        found.append((root, inner, factor))
        if t + 1 < frames:
            root = steps.predict(inner, t + 1)
    roots, inners, factors = zip(*found, strict=True)
    return torch.stack(roots, -4), torch.stack(inners, -4), torch.stack(factors, -4)


def _compiled(kernels: ModuleType, steps: _Steps, frames: int, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_sequential` by compiled loops."""
    lead = root.shape[:-2]
    # Matrices that all groups, or all replicas, share are those of each.
    parts = [_numbers(value.expand(*lead, *value.shape[-3:]), lead, 3)
             for value in (steps.dynamics, steps.noise, steps.node)]  # fmt: skip
    valid = steps.chain.valid
    inside = torch.empty(0, 0, dtype=torch.bool) if valid is None else valid.expand(*lead, frames).reshape(-1, frames)
    found = [root.new_empty(frames, lead.numel(), *root.shape[-2:]) for _ in range(3)]
    kernels.riccati(_numbers(root, lead, 2), *parts, inside.numpy(), *(value.numpy() for value in found))
    a, b, c = (value.unflatten(1, lead).movedim(0, len(lead) - 1) for value in found)
    return a, b, c


# ---- blocks of time -----------------------------------------------------------------------------------------------


def _cut(value: Tensor, blocks: int, dim: int) -> Tensor:
    """An axis of time as blocks of as many frames, ``[…, blocks, T / blocks, …]``, the last one repeated as need be."""
    frames = value.shape[dim]
    size = -(-frames // blocks)
    index = torch.arange(blocks * size, device=value.device).clamp(max=frames - 1)
    return value.index_select(dim, index).unflatten(dim, (blocks, size))


def _cut_chain(chain: GaussMarkov, groups: int, blocks: int) -> GaussMarkov:
    """A chain whose groups are the blocks of its groups, with the step out of the last frame of each as one frame more.

    What does not move, beyond the end of a sequence, moves by the identity and without noise.
    """
    frames, k = chain.frames, chain.mean.shape[-1]
    eye = torch.eye(k).to(chain.mean)
    dynamics, noise, node = chain.dynamics, chain.noise, chain.information
    half_ = chain.half
    if chain.valid is not None:
        inside = chain.valid[..., None, None]
        dynamics, noise = torch.where(inside, dynamics, eye), torch.where(inside, noise, 0.0)

    def laid(value: Tensor) -> Tensor:
        if value.shape[-3] == 1:
            value = value.expand(*value.shape[:-4], groups, *value.shape[-3:])
            return value.repeat_interleave(blocks, -4)
        value = value.expand(*value.shape[:-4], groups, *value.shape[-3:])
        value = _cut(value, blocks, -3)
        # The first frame of the next block, whose step leads there.
        ahead = torch.cat([value[..., 1:, :1, :, :], value[..., -1:, :1, :, :]], -4)
        return torch.cat([value, ahead], -3).flatten(-5, -4)

    size = -(-frames // blocks)
    linear = chain.linear[..., :1, :1, :].expand(*chain.linear.shape[:-3], groups * blocks, size, k)
    return GaussMarkov(
        chain.mean, chain.covariance, laid(dynamics), laid(noise), laid(node), linear,
        half=None if half_ is None else laid(half_),
    )  # fmt: skip


def _boundaries(steps: _Steps, first: Tensor, blocks: int) -> Tensor:
    """Roots of the predicted covariances at the first frame of each block, ``[*r, G, blocks, L, L]``.

    A block maps P to Φ (P⁻¹ + Γ)⁻¹ Φᵀ + Σ; it begins as the identity, Φ = I and Γ = Σ = 0.
    """
    frames = steps.chain.frames
    lead, groups = first.shape[:-3], first.shape[-3]
    eye = steps.eye.expand(*lead, groups * blocks, *steps.eye.shape)
    phi, gamma, root = eye, torch.zeros_like(eye), torch.zeros_like(eye)
    for t in range(frames):
        node = steps.at(steps.chain.information, t)
        inner, factor = steps.update(root, t)
        pull = inner @ node
        rest = steps.eye - inner.mT @ pull
        # J − J Σ⁺ J as a sum of squares.
        moved = torch.linalg.solve_triangular(factor.mT, pull, upper=True) @ phi
        phi = rest @ phi
        gamma = gamma + phi.mT @ node @ phi + moved.mT @ moved
        phi = steps.at(steps.dynamics, t + 1) @ phi
        root = steps.predict(inner, t + 1)
    phi, gamma, root = (value.unflatten(-3, (groups, blocks)) for value in (phi, gamma, root))
    starts = [first]
    for b in range(blocks - 1):
        before = starts[-1]
        factor = linalg.cholesky(steps.eye + before.mT @ gamma[..., b, :, :] @ before)
        through = torch.linalg.solve_triangular(factor, before.mT, upper=False) @ phi[..., b, :, :].mT
        if steps.square_root:
            starts.append(torch.linalg.qr(torch.cat([through, root[..., b, :, :].mT], -2)).R.mT)
        else:
            starts.append(linalg.cholesky(through.mT @ through + root[..., b, :, :] @ root[..., b, :, :].mT))
    return torch.stack(starts, -3)


def _recursion(
    first: Tensor,
    step: Tensor,
    shift: Tensor,
    act: Callable[[Tensor, Tensor], Tensor],
    blocks: int,
    event: int,
    which: Tensor | None = None,
) -> Tensor:
    """x_t = F_t · x_{t−1} + k_t from ``first``, which stands before them, ``[*r, T + 1, …]``.

    Args:
        first: Of the axes of an event.
        step: F ``[*r, T or 1, G or 1, L, L]``.
        shift: k, time before the axes of an event.
        act: How a step acts on a state.
        blocks: Blocks of time.
        event: Number of axes of a state.
        which: ``[N]`` group of each sequence, where states are of sequences.
    """
    kernels = _kernels(first, step, shift)
    if kernels is not None and blocks == 1:
        return _looped(kernels, first, step, shift, which, event)
    if blocks == 1 or shift.shape[-event - 1] < blocks:
        state, out = first, [first]
        for t in range(shift.shape[-event - 1]):
            state = act(step[..., t if step.shape[-4] > 1 else 0, :, :, :], state) + shift.select(-event - 1, t)
            out.append(state)
        return torch.stack(out, -event - 1)
    whole, same = shift.shape[-event - 1], step.shape[-4] == 1
    step = step.unsqueeze(-5) if same else _cut(step, blocks, step.dim() - 4)
    shift = _cut(shift, blocks, shift.dim() - event - 1)
    size = shift.shape[-event - 1]

    def at(t: int) -> Tensor:
        return step[..., 0 if same else t, :, :, :]

    state = torch.zeros_like(shift.select(-event - 1, 0))
    product = torch.eye(step.shape[-1]).to(step).expand_as(at(0))
    for t in range(size):
        state, product = act(at(t), state) + shift.select(-event - 1, t), at(t) @ product
    starts = [first]
    for b in range(blocks - 1):
        starts.append(act(product[..., 0 if same else b, :, :, :], starts[-1]) + state.select(-event - 1, b))
    state, out = torch.stack(starts, -event - 1), []
    for t in range(size):
        state = act(at(t), state) + shift.select(-event - 1, t)
        out.append(state)
    found = torch.stack(out, -event - 1).flatten(-event - 2, -event - 1)
    return torch.cat([first.unsqueeze(-event - 1), found.narrow(found.dim() - event - 1, 0, whole)], -event - 1)


def _looped(
    kernels: ModuleType, first: Tensor, step: Tensor, shift: Tensor, which: Tensor | None, event: int
) -> Tensor:
    """`_recursion` by compiled loops."""
    lead = torch.broadcast_shapes(shift.shape[: -event - 1], first.shape[:-event], step.shape[:-4])
    own = [_numbers(value, lead, axes) for value, axes in ((step, 4), (shift, event + 1), (first, event))]
    frames = shift.shape[-event - 1]
    out = first.new_empty(lead.numel(), frames + 1, *first.shape[-event:])
    if event == 3:
        kernels.congruent(*own, out.numpy())
    else:
        n = first.shape[-2]
        if which is None:
            which = torch.arange(n) if step.shape[-3] > 1 else torch.zeros(n, dtype=torch.long)
        kernels.affine(*own, which.numpy(), out.numpy())
    return out.unflatten(0, lead) if lead else out[0]


def _congruence(matrix: Tensor, state: Tensor) -> Tensor:
    return matrix @ state @ matrix.mT
