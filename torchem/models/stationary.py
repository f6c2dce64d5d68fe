"""The initial law of a chain that has been running for ever."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor
from torchem.factors import Categorical
from torchem.ops import reduce
from torchem.stats import Stats

#: Steps of the inner ascent, and how far each may be damped, in multiples of the largest gradient.
_STEPS = 40
_DAMPING = (0.0, 0.5, 2.0, 10.0, 100.0)
#: Relative difference of objectives that rounding explains.
_ROUNDING = 1e-14
#: Steps of Newton's method that derivatives are those of; the first may still be an ascent.
_NEWTON = 2
#: Probability below which a cell without counts is on its way to zero; what keeps a system regular, beside its size.
_GONE, _RIDGE = 1e-9, 1e-14
#: Share of a uniform law that makes the stationary one unique where the chain falls apart.
_MIX = 1e-13


class Stationary(Factor):
    """The stationary law π of a transition matrix, πA = π, as initial law: no parameters of its own.

    The M-step is that of the transition matrix, and joint: it climbs Σ n_i log π_i(A) + Σ n_ij log A_ij from the better
    of the current matrix and the closed form without π, by growth transforms

        A_ij ∝ n_ij + A_ij (g_ij + c),   g_ij = ∂ Σ n_i log π_i / ∂A_ij = π_i [Z (n/π)]_j,   Z = (I − A + 1π)⁻¹,

    whose fixed points are the stationary points of the objective, damped by c until the objective does not fall.

    Where derivatives are followed, steps of Newton's method θ′ = θ − H⁻¹ g come last. Near the maximum they change its
    value no more than rounding does, and they give it its derivative −H⁻¹ ∂g/∂S: that of θ itself cancels, for
    dθ′ = dθ − H⁻¹ (H dθ + ∂g/∂S dS) where g = 0. H has a row for each of the K² cells.

    Args:
        transition: The table of the same model.

    Source: P. J. Schweitzer (1968) for the derivative; P. S. Gopalakrishnan et al. (1991) for the transform; the
    implicit function theorem for derivatives of the maximum.

    Example:
        >>> from torchem.factors import Categorical
        >>> table = Categorical(2, 2)
        >>> table.probs = [[0.9, 0.1], [0.2, 0.8]]
        >>> Stationary(table).probs
        tensor([0.6667, 0.3333], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "it is a function of the transition, without parameters of its own"

    transition: Categorical

    def __init__(self, transition: Factor):
        super().__init__()
        if not isinstance(transition, Categorical):
            raise wrong_type(
                "initial", "a stationary law of a Categorical transition", transition, "use a free initial law"
            )
        # Not a submodule: the table belongs to the transition slot, and is one parameter there.
        object.__setattr__(self, "transition", transition)

    def _first(self) -> Tensor:
        return self.transition.logits

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.transition.replicas

    @property
    def probs(self) -> Tensor:
        """π ``[*r, K]``."""
        return _stationary(self.transition.probs.to(torch.float64)).to(self.dtype)

    def check(self, batch: Batch) -> None:
        """Refuse a chain that cannot come back: states that it leaves for good have no share in a stationary law.

        Raises:
            InvalidArgument: If some state cannot be reached from some other.
        """
        reach = self.transition.support.to(torch.float64)
        for _ in range(max(1, reach.shape[-1]).bit_length()):
            reach = ((reach + reach @ reach) > 0).to(torch.float64)
        # What nothing leads to has been taken out of the chain.
        lost = ((reach == 0) & self.transition.support.any(-2, keepdim=True)).nonzero()
        if len(lost):
            start, end = lost[0, -2:].tolist()
            raise invalid(
                "initial", "a chain that can reach every state from every other, for a stationary law",
                f"no way from state {start} to state {end}", "use a free initial law",
            )  # fmt: skip

    def log_table(self, batch: Batch) -> Tensor:
        probs = _stationary(self.transition.probs.to(torch.float64))
        return probs.clamp(min=torch.finfo(torch.float64).tiny).log().to(self.dtype).unsqueeze(-2)

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``counts [*r, K]`` of first states."""
        lead = len(self.replicas)
        return Stats(counts=expected.flatten(lead, -2).sum(lead, dtype=torch.float64))

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        raise NotImplementedError("Stationary is a latent child: it has table_stats")

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return _gain(self.transition.probs.to(torch.float64), stats["counts"])

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        return {}

    def maximize_jointly(self, first: Stats, steps: Stats) -> dict[str, Tensor]:
        """New logits of the transition matrix from the counts of first states and of steps (prior included). Pure."""
        table, starts, counts = self.transition, first["counts"], steps["counts"]
        best = self._best(table.logits, table.maximize(steps)["logits"].unsqueeze(0), starts, counts)
        damping = torch.tensor(_DAMPING, dtype=torch.float64, device=counts.device)
        for _ in range(_STEPS):
            probs = self._probs(best)
            gradient = _score(probs, starts)
            lowest = gradient.amin(-1, keepdim=True)
            size = (gradient - lowest).amax((-2, -1), keepdim=True)
            step = gradient - lowest + damping.view(-1, *[1] * probs.dim()) * size
            trials = table.maximize(steps.like({"counts": counts + probs * step}))["logits"]
            best = self._best(best, trials, starts, counts)
        for _ in range(_NEWTON if reduce.watched(counts) or reduce.watched(starts) else 0):
            best = self._stepped(best, starts, counts)
        return {"logits": best}

    def _stepped(self, logits: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """A step of Newton's method, taken unless the objective falls by more than rounding.

        In coordinates y = √A · δ(log A) of the cells that may move, in which counts alone have the curvature Σ_j n_ij
        in each row. With u = πᵀ dA and w = dA v, v = Z (n/π), the other part is

            d² Σ n_i log π_i = 2 u Z w − u Z diag(n/π²) Zᵀ uᵀ.
        """
        probs = self._probs(logits)
        law, k, tiny = _stationary(probs), probs.shape[-1], torch.finfo(probs.dtype).tiny
        ratio = (starts / law.clamp(min=tiny)).unsqueeze(-1)
        inverse = torch.linalg.inv(_fundamental(probs, law))
        value = (inverse @ ratio).squeeze(-1)
        # A cell that nothing counts and that has gone stays gone.
        free = self.transition._free() & ((counts > 0) | (probs > _GONE))
        own = torch.where(free, probs, 1.0)
        root = torch.where(free, own.sqrt(), 0.0)
        total = root.square().sum(-1, keepdim=True)
        each, share = torch.where(free, counts / own, 0.0), root / total.clamp(min=tiny).sqrt()

        def square(x: Tensor) -> Tensor:
            """A matrix of cells by cells, ``[…, K², K²]`` as ``[…, i, j, k, l]``."""
            return x.unflatten(-1, (k, k)).unflatten(-3, (k, k))

        def swapped(x: Tensor) -> Tensor:
            return x.movedim((-2, -1), (-4, -3))

        def tangent(x: Tensor) -> Tensor:
            """What of ``x [*r, i, j, …]`` leaves the sums over j as they are."""
            place = share.reshape(*share.shape, *[1] * (x.dim() - share.dim()))
            return x - place * (place * x).sum(share.dim() - 1, keepdim=True)

        mixed = law[..., :, None, None, None] * inverse[..., None, :, :, None] * value[..., None, None, None, :]
        around = inverse @ (ratio / law.clamp(min=tiny).unsqueeze(-1) * inverse.mT)
        bent = mixed + swapped(mixed)
        bent = bent - law[..., :, None, None, None] * law[..., None, None, :, None] * around[..., None, :, None, :]
        curved = square(each.flatten(-2).diag_embed()) - root[..., None, None] * bent * root[..., None, None, :, :]
        # What would change the sums of rows, and what does not move, is only kept from being singular.
        eye = torch.eye(k * k, dtype=probs.dtype, device=probs.device)
        moving = tangent(square(free.flatten(-2).to(eye).diag_embed()))
        size = ((counts.sum((-2, -1)) + starts.sum(-1)) / k).clamp(min=tiny)[..., None, None, None, None]
        curved = tangent(swapped(tangent(curved))) + size * ((1 + _RIDGE) * square(eye) - moving)
        slope = tangent(root * (each + law.unsqueeze(-1) * value.unsqueeze(-2)))
        step = torch.linalg.solve_ex(curved.flatten(-4, -3).flatten(-2), slope.flatten(-2).unsqueeze(-1))[0]
        grown = own * (step.squeeze(-1).unflatten(-1, (k, k)) / torch.where(free, root, 1.0)).exp()
        grown = torch.where(free, grown, 0.0)
        new = torch.where(free, grown * total / grown.sum(-1, keepdim=True).clamp(min=tiny), probs)
        gain = self._gained(probs, new, starts, counts)
        better = (gain >= -_ROUNDING * size[..., 0, 0, 0, 0])[..., None, None] & free.any(-1, keepdim=True)
        moved = torch.where(self.transition.support, new.clamp(min=torch.finfo(logits.dtype).tiny).log(), 0.0)
        return torch.where(better, moved.to(logits), logits)

    def _best(self, old: Tensor, trials: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """Of logits ``[n, *r, K, K]`` those that gain most on the old ones; these where none gains."""
        gain = self._gained(self._probs(old), self._probs(trials), starts, counts)
        most = gain.amax(0)
        place = reduce.first_max(gain, 0)[None, ..., None, None].expand(1, *old.shape)
        return torch.where((most > 0)[..., None, None], trials.gather(0, place).squeeze(0), old)

    def _gained(self, old: Tensor, new: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        """How much higher the objective is under new probabilities, from their changes.

        Near the maximum a difference of two objectives would be rounding alone, and so would be what is chosen by it.
        """
        support, tiny = self.transition.support, torch.finfo(old.dtype).tiny
        gone = torch.finfo(old.dtype).eps / 2 - 1
        change = new - old
        change = change - old * change.sum(-1, keepdim=True)
        before, after = _stationary(old), _stationary(new)
        # π′ − π = π′ (A′ − A) Z
        moved = torch.linalg.solve(_fundamental(old, before).mT, (after.unsqueeze(-2) @ change).mT).squeeze(-1)
        share = (moved / before.clamp(min=tiny)).clamp(min=gone).log1p()
        ratio = (change / torch.where(support, old, 1.0).clamp(min=tiny)).clamp(min=gone).log1p()
        first = torch.where(starts > 0, starts * share, 0.0).sum(-1)
        return first + torch.where(support & (counts > 0), counts * ratio, 0.0).sum((-2, -1))

    def _probs(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.float64)
        return logits.masked_fill(~self.transition.support, -torch.inf).softmax(-1)

    def n_parameters(self) -> int:
        return 0

    def config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        table = Categorical(3, 3).double()
        table.probs = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]
        return cls(table), Batch(torch.zeros(4, 1))


def _stationary(probs: Tensor) -> Tensor:
    """π with πA = π, Σπ = 1: the solution of π(I − A + 11ᵀ) = 1ᵀ."""
    k = probs.shape[-1]
    probs = (1 - _MIX) * probs + _MIX / k
    eye = torch.eye(k, dtype=probs.dtype, device=probs.device)
    law = torch.linalg.solve((eye - probs + 1.0).mT, torch.ones_like(probs[..., :1])).squeeze(-1)
    law = law.clamp(min=0)
    return law / law.sum(-1, keepdim=True)


def _fundamental(probs: Tensor, law: Tensor) -> Tensor:
    """I − A + 1π, whose inverse is Z."""
    return torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device) - probs + law.unsqueeze(-2)


def _gain(probs: Tensor, starts: Tensor) -> Tensor:
    """Σ n_i log π_i."""
    law = _stationary(probs)
    return torch.where(starts > 0, starts * law.clamp(min=torch.finfo(law.dtype).tiny).log(), 0.0).sum(-1)


def _score(probs: Tensor, starts: Tensor) -> Tensor:
    """∂ Σ n_i log π_i / ∂A_ij, up to a constant per row."""
    law = _stationary(probs)
    ratio = starts / law.clamp(min=torch.finfo(law.dtype).tiny)
    solved = torch.linalg.solve(_fundamental(probs, law), ratio.unsqueeze(-1)).mT
    return law.unsqueeze(-1) * solved
