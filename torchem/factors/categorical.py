"""Probability tables: mixing weights, initial and transition laws, discrete emissions."""

from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries, values_known
from torchem.errors import invalid
from torchem.factor import Factor, Kernel, Prior, StreamedPass
from torchem.factors._tables import SMOOTH, Table, apart, domain
from torchem.stats import Stats


class Categorical(Table):
    """A table of probabilities whose last axis sums to one.

    log p(x = j | parents = i) = log softmax_j(logits_i + log support_ij).

    ``Categorical(K)`` holds mixing weights or initial probabilities, ``Categorical(K, K)`` a transition matrix,
    ``Categorical(K, M)`` an emission of M categories, NaN where one is missing. It starts uniform. Zeros that a user
    assigns to `probs` are structural: no M-step revives them. A zero that EM reaches is a finite, tiny probability.

    Args:
        *shape: Sizes of the parents' axes, then of the child's.

    Raises:
        InvalidArgument: If a size is less than one or none is given.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 4.3.

    Example:
        >>> table = Categorical(2, 3)
        >>> table.probs = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
        >>> table.n_parameters()
        3
    """

    def __init__(self, *shape: int):
        if not shape or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise invalid("shape", "one or more positive sizes", shape, "give (K,) for weights or (K, M) for a table")
        super().__init__(*shape)

    @property
    def n_components(self) -> int | None:
        return self.shape[0] if len(self.shape) > 1 else None

    # ---- as a latent child ------------------------------------------------------------------------------------

    def log_table(self, batch: Batch) -> Tensor:
        """``[*r, 1, *parents, child]``: the same for every observation."""
        return self.log_probs().unsqueeze(-1 - len(self.shape))

    # ---- as an observed child ---------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        """Categories as whole numbers, −1 where one is missing."""
        return (x.nan_to_num(nan=-1.0) if x.is_floating_point() else x).to(torch.long)

    def check(self, batch: Batch) -> None:
        if batch.x.shape[-1] != 1:
            raise invalid(
                "data", "one column of categories", f"{batch.x.shape[-1]} columns", "use one factor per column"
            )
        x, categories = batch.x.detach(), self.shape[-1]
        bad = (x < 0) | (x >= categories)
        bad = bad | (x != x.round()) & ~x.isnan() if x.is_floating_point() else bad
        if values_known() and bool(bad.any()):
            refuse_entries(batch, bad, *domain(x, categories))

    def log_prob(self, batch: Batch) -> Tensor:
        return self._looked_up(self.log_probs(), batch)

    def _looked_up(self, table: Tensor, batch: Batch) -> Tensor:
        """Entries ``[*r, *n, K]`` of a table for the categories observed."""
        # −1 picks the last column: a category that is missing says nothing.
        table = torch.nn.functional.pad(table, (0, 1))
        return table[..., self.cast(batch.x)[..., 0]].movedim(len(self.replicas), -1)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the indicators of the categories, ``[*r, 1s, K, M]``."""
        probs = self.probs.reshape(*self.replicas, *[1] * (batch.x.dim() - 1), *self.shape)
        return probs, probs * (1 - probs)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the category's number, ``[*r, *n, K, 1]``; see `Factor.conditional`."""
        number = torch.arange(self.shape[-1], dtype=self.dtype, device=self.device)
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), *self.shape[:-1], 1)
        center = (self.probs @ number).reshape(shape)
        spread = ((self.probs @ number.square()).reshape(shape) - center.square()).clamp(min=0.0)
        missing = batch.x.isnan().unsqueeze(-2)
        return torch.where(missing, center, batch.x.to(center).unsqueeze(-2)), torch.where(missing, spread, 0.0)

    def outcomes(self) -> list[Tensor | None]:
        return [torch.arange(self.shape[-1], dtype=self.dtype, device=self.device)]

    @property
    def nominal(self) -> list[bool]:
        return [True]

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        lead = len(self.replicas)
        return Stats(counts=expected.flatten(lead, -1 - len(self.shape)).sum(lead, dtype=torch.float64))

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``counts [*r, K, M]`` of observed categories."""
        category, size = self.cast(batch.x)[..., 0].reshape(-1), self.shape[-1]
        flat = expected.reshape(*self.replicas, len(category), self.shape[0]).mT.to(torch.float64)
        # What is missing is counted in a column of its own, which is left out.
        counts = flat.new_zeros(*self.replicas, self.shape[0], size + 1)
        counts = counts.index_add(-1, torch.where(category < 0, size, category), flat)
        return Stats(counts=counts[..., :size].contiguous())

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        counts = self.gather(batch, expected)["counts"]
        # A probability of zero, as hard clusters often give, could never grow again.
        return Stats(counts=apart(counts + SMOOTH * counts.mean(-2, keepdim=True)))

    # ---- conjugate prior: Dirichlet ---------------------------------------------------------------------------

    def expected_table(self, posterior: Stats, prior: Prior) -> Tensor:
        logs = prior.expected_natural(self, posterior)["counts"]
        return self._forbidding(logs).to(self.dtype).unsqueeze(-1 - len(self.shape))

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _ExpectedPass(self, prior.expected_natural(self, posterior)["counts"])

    def forbid(self, states: Tensor) -> None:
        left = self.support & ~states
        self.support, self.restricted = torch.where(left.any(-1, keepdim=True), left, self.support), True

    def select(self, keep: Tensor) -> "Categorical":
        """Keep some categories of the last axis (as weights) or some parents (as an emission)."""
        axis = 0 if len(self.shape) == 2 else -1
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        shape = list(self.shape)
        shape[axis] = len(index)
        small = Categorical(*shape).to(self.device, self.dtype)
        probs = self.probs.detach().to(torch.float64).index_select(axis, index)
        small.probs = probs / probs.sum(-1, keepdim=True)
        mask = self.frozen("logits")
        if mask is not None:
            small.register_buffer("frozen_logits", mask.index_select(axis, index) if mask.dim() else mask)
        return small

    def among(self, index: Tensor) -> "Categorical":
        """A transition matrix among some of its states; rows are renormalised, or even where nothing is left."""
        probs = self.probs.detach().to(torch.float64)[index][:, index]
        small = Categorical(len(index), len(index)).to(self.device, self.dtype)
        total = probs.sum(-1, keepdim=True)
        small.probs = torch.where(total > 0, probs / total.clamp(min=1e-300), 1.0 / len(index))
        mask = self.frozen("logits")
        if mask is not None:
            small.register_buffer("frozen_logits", mask[index][:, index] if mask.dim() else mask)
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return torch.multinomial(self.probs[z], 1, generator=generator)

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.shape)}

    @classmethod
    def rebuild(cls, shape: list[int]) -> "Categorical":
        """The table of a saved configuration."""
        return cls(*shape)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        table = cls(3, 4).double()
        table.probs = torch.rand(3, 4, generator=generator, dtype=torch.float64).softmax(-1)
        return table, Batch(torch.randint(0, 4, (12, 1), generator=generator))


class _ExpectedPass(StreamedPass):
    """A pass of observed categories at expected log-probabilities."""

    def __init__(self, factor: Categorical, logs: Tensor):
        super().__init__(factor)
        self.categories = factor
        self.table, self.logs = factor._forbidding(logs).to(factor.dtype), logs

    def log_potential(self, batch: Batch) -> Tensor:
        return self.categories._looked_up(self.table, batch)

    def inner(self) -> Tensor:
        return self.categories._inner(self.stats(), self.logs)
