"""What tables of probabilities have in common: rows that sum to one over the cells that are allowed."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Conjugate, Factor, Prior
from torchem.priors import Dirichlet
from torchem.stats import Stats

#: Share of the average component that every emission starts with, so that none of its probabilities begins at zero.
SMOOTH = 0.01
#: How far emissions start at least from the frequencies in all data: root mean square of their log-ratios ...
_SPREAD = 0.5
#: ... as far as differences below rounding need not be blown up for it.
_MOST = 1e4


class Table(Factor, Conjugate):
    """Rows of probabilities, softmax of logits over each row's support, and their statistics ``counts``.

    Args:
        *shape: Sizes of the axes, rows along the last.
    """

    handles_missing: ClassVar[bool] = True
    views: ClassVar = {"probs": "logits"}
    splits: ClassVar = frozenset({"probs"})

    logits: Tensor
    support: Tensor

    def __init__(self, *shape: int):
        super().__init__()
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

    # ---- EM ---------------------------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters from responsibilities, such that states differ and no probability is zero."""
        return self.maximize(self.first_stats(batch, expected))

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
        if self.restricted:
            alpha = torch.where(self.support, posterior["counts"], 1.0)
            total = torch.where(self.support, posterior["counts"], 0.0).sum(-1)
            rows = torch.where(self.support, alpha.lgamma(), 0.0).sum(-1) - total.lgamma()
        else:
            rows = posterior["counts"].lgamma().sum(-1) - posterior["counts"].sum(-1).lgamma()
        return rows.flatten(len(self.replicas)).sum(-1) if rows.dim() > len(self.replicas) else rows

    def expected_natural(self, posterior: Stats) -> Stats:
        """E[log p_j] = ψ(α_j) − ψ(Σ α), zero off the support.

        Where cells are frozen the others share what these leave, r, in proportions that are Dirichlet whatever it is
        (a Dirichlet law is neutral): log r + ψ(α_j) − ψ(Σ α) with sums over the free cells.
        """
        if not self.restricted and self.frozen("logits") is None:
            alpha = posterior["counts"]
            return Stats(counts=alpha.digamma() - alpha.sum(-1, keepdim=True).digamma())
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

    def _forbidding(self, logs: Tensor) -> Tensor:
        return torch.where(self.support, logs, -torch.inf) if self.restricted else logs

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        return self._inner(stats, prior.expected_natural(self, posterior)["counts"])

    def _inner(self, stats: Stats, logs: Tensor) -> Tensor:
        return (self._supported(stats["counts"]) * self._supported(logs)).sum(tuple(range(-len(self.shape), 0)))

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        # The mean of a Dirichlet: what the parameters hold.
        return self.log_prob(batch)

    def n_parameters(self) -> int:
        free = self.support
        mask = self.frozen("logits")
        if mask is not None:
            free = free & ~mask
        return int((free.sum(-1) - 1).clamp(min=0).sum())


def domain(x: Tensor, categories: int) -> tuple[str, str]:
    """What a column of categories may be, and what to do about one that is something else."""
    low, high = (float(value) for value in x.nan_to_num(nan=1.0).aminmax())
    shifted = low >= 1 and high == categories
    remedy = "subtract 1: codes count from 0" if shifted else "recode the categories, NaN where one is missing"
    return f"whole numbers from 0 to {categories - 1}", remedy


def apart(counts: Tensor) -> Tensor:
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
