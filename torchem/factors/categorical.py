"""Probability tables: mixing weights, initial and transition laws, discrete emissions."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid
from torchem.factor import Conjugate, Factor, Kernel, Prior, StreamedPass
from torchem.priors import Dirichlet
from torchem.stats import Stats

#: Share of the average component that every emission starts with, so that none of its probabilities begins at zero.
_SMOOTH = 0.01
#: How far emissions start at least from the frequencies in all data: root mean square of their log-ratios ...
_SPREAD = 0.5
#: ... as far as differences below rounding need not be blown up for it.
_MOST = 1e4


class Categorical(Factor, Conjugate):
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

    handles_missing: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    views: ClassVar = {"probs": "logits"}
    splits: ClassVar = frozenset({"probs"})

    logits: Tensor
    support: Tensor

    def __init__(self, *shape: int):
        super().__init__()
        if not shape or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise invalid("shape", "one or more positive sizes", shape, "give (K,) for weights or (K, M) for a table")
        self.shape = tuple(shape)
        self.new_parameter("logits", torch.zeros(shape))
        self.new_buffer("support", torch.ones(shape, dtype=torch.bool))
        #: Whether any cell is outside the support; spares the masks of the common case.
        self.restricted = False

    def refresh(self) -> None:
        self.restricted = not bool(self.support.all())

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def probs(self) -> Tensor:
        """Probabilities ``[*r, *parents, child]``; assignable, rows must sum to one."""
        return self.log_probs().exp()

    @probs.setter
    def probs(self, value: Any) -> None:
        self.assign_probs(value, "probs")

    def assign_probs(self, value: Any, argument: str) -> None:
        """Set `probs` on behalf of the view ``argument``, which messages then name."""
        table = as_tensor(value, argument).to(self.device, torch.float64)
        if table.shape != self.logits.shape:
            raise invalid(argument, f"shape {list(self.logits.shape)}", list(table.shape), "give one entry per cell")
        if not bool(((table >= 0) & table.isfinite()).all()):
            raise invalid(
                argument, "finite probabilities of at least zero", "a negative or non-finite entry", "correct it"
            )
        self._check_rows(table, argument)
        self.support.copy_(table > 0)
        self.restricted = bool((table == 0).any())
        with torch.no_grad():
            self.logits.copy_(torch.where(table > 0, table, 1.0).log())

    def _check_rows(self, table: Tensor, argument: str) -> None:
        """Refuse a table with a row that does not sum to one, and name it."""
        gap = (table.sum(-1) - 1).abs()
        if not bool((gap > 1e-4).any()):
            return
        place = gap.flatten().argmax()
        row = [int(i) for i in torch.unravel_index(place, gap.shape)]
        where = f"row {row[0] if len(row) == 1 else tuple(row)} of {argument}" if row else "one"
        if bool((table[tuple(row)] == 0).all()):
            what = "has no successor" if self.shape[-2:-1] == self.shape[-1:] else "is zero throughout"
            raise invalid(argument, "rows that sum to one", f"zeros alone: {where} {what}", "allow one cell of it")
        got = f"{where} that is off by {float(gap.max()):.3g}"
        raise invalid(argument, "rows that sum to one", got, "divide each row by its sum")

    def log_probs(self) -> Tensor:
        """Normalised log-probabilities; −inf where the support is empty."""
        logits = self.logits.masked_fill(~self.support, -torch.inf) if self.restricted else self.logits
        return logits.log_softmax(-1)

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
        if batch.x.numel() == 0 or not values_known():
            return
        categories = self.shape[-1]
        x = batch.x.detach()
        if x.is_floating_point():
            x = x[~x.isnan()]
            if not len(x):
                return
        low, high = float(x.amin()), float(x.amax())
        if low < 0 or high >= categories or (x.is_floating_point() and bool((x != x.round()).any())):
            raise invalid(
                "data", f"whole numbers from 0 to {categories - 1}", f"values from {low:g} to {high:g}",
                "recode the categories",
            )  # fmt: skip

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

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters from responsibilities, such that states differ and no probability is zero."""
        return self.maximize(self.first_stats(batch, expected))

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        counts = self.gather(batch, expected)["counts"]
        # A probability of zero, as hard clusters often give, could never grow again.
        return Stats(counts=_apart(counts + _SMOOTH * counts.mean(-2, keepdim=True)))

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        counts = self._supported(stats["counts"])
        mask = self.frozen("logits")
        if mask is None:
            probs = self._normalized(counts)
        else:
            # Fixed cells keep their probability; the rest of the row is shared in proportion to the counts.
            kept = torch.where(mask, self.probs.to(torch.float64), 0.0)
            counts = torch.where(mask, 0.0, counts)
            probs = kept + (1 - kept.sum(-1, keepdim=True)) * self._normalized(counts)
        logits = self._supported(probs.clamp(min=torch.finfo(self.dtype).tiny).log()).to(self.dtype)
        return {"logits": torch.where(counts.sum(-1, keepdim=True) > 0, logits, self.logits)}

    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Frozen cells keep their probabilities, so that the others share what those leave."""
        mask = self.frozen("logits")
        if mask is None or not mask.dim():
            return {"logits": self.keep_frozen("logits", values["logits"])}
        old, tiny = self.probs.to(torch.float64), torch.finfo(torch.float64).tiny
        free = self.support & ~mask
        # A row without a free cell stays as it is.
        logits = torch.where(free.any(-1, keepdim=True), values["logits"], 0.0).to(torch.float64)
        share = torch.where(free | ~free.any(-1, keepdim=True), logits, -torch.inf).log_softmax(-1)
        left = (1 - torch.where(mask, old, 0.0).sum(-1, keepdim=True)).clamp(min=tiny).log()
        # Never −inf: only what is outside the support is impossible, and it is told by its mask.
        share = torch.where(free, share, 0.0) + left
        return {"logits": self._supported(torch.where(free, share, old.clamp(min=tiny).log())).to(values["logits"])}

    def _supported(self, value: Tensor) -> Tensor:
        return torch.where(self.support, value, 0.0) if self.restricted else value

    @staticmethod
    def _normalized(counts: Tensor) -> Tensor:
        return counts / counts.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)

    def check_mask(self, name: str, mask: Tensor) -> None:
        if mask.dim() and mask.shape != self.shape:
            raise invalid("mask", f"shape {list(self.shape)}", list(mask.shape), "mark single cells of the table")

    def expected_log_prob(self, stats: Stats) -> Tensor:
        log_probs = self._supported(self.log_probs())
        return (self._supported(stats["counts"]) * log_probs).sum(tuple(range(-len(self.shape), 0)))

    # ---- conjugate prior: Dirichlet ---------------------------------------------------------------------------

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """Dirichlet: Σ log Γ(α_j) − log Γ(Σ α_j) over the support, summed over rows."""
        alpha = torch.where(self.support, posterior["counts"], 1.0)
        total = torch.where(self.support, posterior["counts"], 0.0).sum(-1)
        rows = torch.where(self.support, alpha.lgamma(), 0.0).sum(-1) - total.lgamma()
        return rows.flatten(len(self.replicas)).sum(-1) if rows.dim() > len(self.replicas) else rows

    def expected_natural(self, posterior: Stats) -> Stats:
        """E[log p_j] = ψ(α_j) − ψ(Σ α), zero off the support.

        Where cells are frozen the others share what these leave, r, in proportions that are Dirichlet whatever it is
        (a Dirichlet law is neutral): log r + ψ(α_j) − ψ(Σ α) with sums over the free cells.
        """
        free = self._free()
        alpha = torch.where(free, posterior["counts"], 1.0)
        total = torch.where(free, posterior["counts"], 0.0).sum(-1, keepdim=True)
        # A row without free cells has no posterior.
        total = torch.where(free.any(-1, keepdim=True), total, 1.0)
        natural = torch.where(free, alpha.digamma() - total.digamma(), 0.0)
        if self.frozen("logits") is not None:
            kept = self._supported(self.log_probs().to(torch.float64))
            natural = torch.where(free, natural + self._left().log(), kept)
        return Stats(counts=natural)

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        """`log_normalizer` of the proportions in which free cells share what frozen ones leave."""
        free = self._free()
        alpha = torch.where(free, posterior["counts"], 1.0)
        total = torch.where(free, posterior["counts"], 0.0).sum(-1)
        some = free.any(-1)
        rows = torch.where(free, alpha.lgamma(), 0.0).sum(-1) - torch.where(some, total, 1.0).lgamma()
        rows, lead = torch.where(some, rows, 0.0), len(self.replicas)
        return rows.flatten(lead).sum(-1) if rows.dim() > lead else rows

    def _free(self) -> Tensor:
        """Cells that may move."""
        mask = self.frozen("logits")
        return self.support if mask is None else self.support & ~mask

    def _left(self) -> Tensor:
        """What frozen cells leave to the others of their rows, ``[*r, *parents, 1]``."""
        probs = self._supported(self.log_probs().to(torch.float64).exp())
        left = torch.where(self._free(), probs, 0.0).sum(-1, keepdim=True)
        return left.clamp(min=torch.finfo(torch.float64).tiny)

    def weak_prior(self) -> Dirichlet:
        """A total concentration of one for each row."""
        return Dirichlet(1.0 / self.shape[-1])

    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        counts = self._supported(posterior["counts"])
        tiny = torch.finfo(counts.dtype).tiny
        if self.frozen("logits") is not None:
            counts = torch.where(self._free(), counts, 0.0)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=tiny)
        if self.frozen("logits") is not None:
            share = torch.where(self._free(), share * self._left(), self.log_probs().to(torch.float64).exp())
        return {"logits": self._supported(share.clamp(min=torch.finfo(self.dtype).tiny).log()).to(self.dtype)}

    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        total = torch.where(self._free(), posterior["counts"], 0.0).sum(-1)
        return {"log_total": total.clamp(min=torch.finfo(self.dtype).tiny).log()}

    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        log_total = strengths["log_total"].to(torch.float64).unsqueeze(-1)
        logits = self.logits.to(torch.float64)
        if self.restricted:
            logits = logits.masked_fill(~self.support, -torch.inf)
        if self.frozen("logits") is not None:
            # Counts of frozen cells, of which nothing depends, are left as those of the whole row.
            logits = logits.log_softmax(-1) - self._left().log()
            return Stats(counts=(logits + log_total).exp())
        return Stats(counts=(logits.log_softmax(-1) + log_total).exp())

    def expected_table(self, posterior: Stats, prior: Prior) -> Tensor:
        logs = prior.expected_natural(self, posterior)["counts"]
        return self._forbidding(logs).to(self.dtype).unsqueeze(-1 - len(self.shape))

    def _forbidding(self, logs: Tensor) -> Tensor:
        return torch.where(self.support, logs, -torch.inf) if self.restricted else logs

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _ExpectedPass(self, prior.expected_natural(self, posterior)["counts"])

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        return self._inner(stats, prior.expected_natural(self, posterior)["counts"])

    def _inner(self, stats: Stats, logs: Tensor) -> Tensor:
        return (self._supported(stats["counts"]) * self._supported(logs)).sum(tuple(range(-len(self.shape), 0)))

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        # The mean of a Dirichlet: what the parameters hold.
        return self.log_prob(batch)

    def forbid(self, states: Tensor) -> None:
        left = self.support & ~states
        self.support, self.restricted = torch.where(left.any(-1, keepdim=True), left, self.support), True

    def n_parameters(self) -> int:
        free = self.support
        mask = self.frozen("logits")
        if mask is not None:
            free = free & ~mask
        return int((free.sum(-1) - 1).clamp(min=0).sum())

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


def _apart(counts: Tensor) -> Tensor:
    """Counts ``[*r, K, M]`` with the log-ratios of each row to all rows together scaled up where they are small.

    Random responsibilities of many observations give every state nearly the frequencies of all: a saddle, which EM
    leaves so slowly that it seems to have converged.
    """
    rows, overall = counts.sum(-1, keepdim=True), counts.sum(-2, keepdim=True)
    share = overall / overall.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    ratio = torch.where(counts > 0, counts / (rows * share), 1.0).log()
    size = (share * ratio.square()).sum(-1, keepdim=True).mean(-2, keepdim=True).sqrt()
    power = (_SPREAD / size.clamp(min=_SPREAD / _MOST)).clamp(min=1.0)
    return rows * share * (power * ratio).exp()
