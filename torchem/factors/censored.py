"""Columns of which some entries are known only to lie beyond a limit."""

from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch, values_known
from torchem.errors import invalid
from torchem.factor import Factor, Kernel
from torchem.factors._around import marked, mass
from torchem.factors._bounded import Bounded
from torchem.ops.tails import Tail
from torchem.stats import Stats


class Censored(Bounded):
    """Independent columns of which entries at or beyond a limit are known only to lie there.

    log p(x | k) = Σ_d log f(x_d | k) where x_d lies within, log P_f(X ≤ low_d | k) where x_d ≤ low_d, and
    log P_f(X ≥ high_d | k) where x_d ≥ high_d; missing entries (NaN) are left out.

    Limits are those of the instrument, the same for all rows: a detection limit, a full scale. Where each entry has a
    limit of its own (survival times), record that limit and say so with ``marked=True``: ``inputs [N, D]`` are then 1
    where the truth lies above what was recorded, −1 where it lies below, 0 where it is exact.

    *E-step.* An entry beyond its limit is latent, with the tail of f as its law: E x = c + 1/λ above c for an
    exponential law, truncated normal means and variances for a normal one (Tobit).

    *Posterior of the parameters.* With a `torchem.Variational` inside the law of what is latent is the tail of
    exp E log f, which for these families is one of f at other parameters; `log_prob` is that at posterior means.

    *M-step.* That of the factor inside, on completed statistics. `sample` gives what would be recorded, `moments` those
    of f.

    Args:
        factor: `Exponential`, `Poisson` or `Gaussian` with independent columns, with K components.
        low: Limits below which entries are censored: one number, or one for each column, None for a column without.
        high: Likewise above.
        marked: Whether ``inputs`` mark entries that are censored at what was recorded.

    Raises:
        InvalidArgument: For another factor, limits that are not below each other, or none at all.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 4.2; G. J. McLachlan, T. Krishnan (2008), section
        1.4.3; T. Amemiya (1984), section 7.

    Example:
        >>> from torchem.factors import Exponential
        >>> c = Censored(Exponential(1, 1), high=2.0)
        >>> c.log_prob(Batch(torch.tensor([[1.0], [2.0]])))[:, 0]
        tensor([-1., -2.], grad_fn=<...>)
    """

    def __init__(self, factor: Factor, low: Any = None, high: Any = None, marked: bool = False):
        super().__init__(factor, low, high)
        if low is None and high is None and not marked:
            raise invalid("low, high", "a limit", "none", "give one, or say marked=True and mark entries by inputs")
        self.marked = marked

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Covariates, where they mark what is censored."""
        return frozenset({"u"} if self.marked else ())

    def check(self, batch: Batch) -> None:
        super().check(batch)
        self.factor.check(batch)
        if not self.marked:
            return
        if batch.u is None or batch.u.shape[-1] != self._d:
            got = "none" if batch.u is None else f"{batch.u.shape[-1]} columns"
            raise invalid("inputs", f"{self._d} columns that mark censored entries", got, "give 1, −1 or 0 for each")
        if values_known() and not bool(((batch.u == 0) | (batch.u.abs() == 1)).all()):
            raise invalid("inputs", "marks: 1 (above), −1 (below) or 0 (exact)", "another number", "correct it")

    # ---- the distribution -------------------------------------------------------------------------------------

    def split(self, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
        """Where entries lie below and above a limit, and the batch with these as missing."""
        x = self.entries(batch)
        low, high = self.limits().to(x.dtype)
        below, above = x <= low, x >= high
        if self.marked and batch.u is not None:
            below, above = below | (batch.u < 0), above | (batch.u > 0)
            below, above = below & ~x.isnan(), above & ~x.isnan()
        return below, above, batch.with_x(torch.where(below | above, torch.nan, x))

    def log_prob(self, batch: Batch) -> Tensor:
        return _CensoredKernel(self, score=True).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``factor``: its own, of completed data."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _CensoredKernel(self)

    def row_size(self) -> int:
        return super().row_size() + (8 * self._d * self._k if self.marked else 0)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of the law that is censored."""
        return self.factor.moments(batch)

    def cdf(self, batch: Batch) -> Tensor:
        """That of the law that is censored."""
        return self.factor.cdf(batch)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        x = self.factor.sample(z, batch, generator)
        low, high = self.limits().to(x.dtype)
        return torch.minimum(torch.maximum(x, low), high)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Missing entries drawn as they are, not as they would have been recorded; see `Factor.complete`."""
        return self.factor.complete(batch, z, generator)

    # ---- starts, bookkeeping ----------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """As if censored entries lay at their limits."""
        return self.joined({"factor": self.factor.initialize(batch, expected)})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return self.joined({"factor": self.factor.initialize_at(batch, index)})

    def select(self, keep: Tensor) -> "Censored":
        small = Censored(self.factor.pruned(keep), self.low, self.high, self.marked)
        small.step = self.step.clone()
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Normal columns between limits, with missing entries; waiting times that each row cuts off."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
        holes = torch.rand(40, 2, generator=generator) < 0.15
        normal = factors.Gaussian(3, 2, "diag").double()
        normal.means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        bounded = cls(normal, low=[-1.5, None], high=2.0)
        low, high = bounded.limits()
        x = torch.minimum(torch.maximum(x, low), high).masked_fill(holes, torch.nan)
        times = factors.Exponential(3, 2).double()
        times.rates = 0.3 + torch.rand(3, 2, generator=generator, dtype=torch.float64)
        waits = torch.rand(40, 2, generator=generator, dtype=torch.float64) * 4
        marks = torch.randint(-1, 2, (40, 2), generator=generator).double()
        return [(bounded, Batch(x)), (cls(times, marked=True), Batch(waits, u=marks))]


class _CensoredKernel(Kernel):
    """The pass of the factor inside over exact entries; of the others, what they are expected to be."""

    def __init__(self, family: Censored, score: bool = False):
        self.family, self.score = family, score
        self.inner_kernel = (family.factor.unwrapped if score else family.factor).kernel()
        self.limits = family.limits()
        # Limits common to all rows: their tails are computed once.
        self.common = None if family.marked else self._tails(list(self.limits))
        #: For both sides weight, Σ (x − p) and Σ (x − p)² about the pivots.
        self.sums: list[list[Tensor]] = []

    def _tails(self, limits: list[Tensor]) -> list[Tail]:
        return [self.family.tail(limit, upper, self.score) for limit, upper in zip(limits, (False, True), strict=True)]

    def _pivots(self) -> list[Tensor]:
        """Points about which latent entries are summed: the limits, one where there is none."""
        return [torch.where(limit.isfinite(), limit, 1.0) for limit in self.limits]

    def log_potential(self, batch: Batch) -> Tensor:
        family, d = self.family, self.family._d
        *self.masks, self.rest = family.split(batch)
        value = self.inner_kernel.log_potential(self.rest)
        if self.common is not None:
            logs = [tail[0].to(value.dtype) for tail in self.common]
            return value + marked(self.masks[0], logs[0]) + marked(self.masks[1], logs[1])
        # Each entry has its own limit: itself, or that of its column.
        x = family.entries(batch).to(torch.float64)
        given = torch.maximum(x, self.limits[0]), torch.minimum(x, self.limits[1])
        pairs = zip(self.masks, given, strict=True)
        self.own = [torch.where(mask, limit, torch.inf).reshape(-1, 1, d) for mask, limit in pairs]
        self.each = self._tails(self.own)
        for limit, (log_p, _, _) in zip(self.own, self.each, strict=True):
            total = torch.where(limit.isfinite(), log_p, 0.0).sum(-1).to(value.dtype)
            value = value + total.unflatten(-2, x.shape[:-1])
        return value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.inner_kernel.collect(self.rest, expected)
        found = [self._side(side, expected) for side in (0, 1)]
        if self.sums:
            found = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(self.sums, found, strict=True)]
        self.sums = found

    def _side(self, side: int, expected: Tensor) -> list[Tensor]:
        """Σ 1, Σ (x − p) and Σ (x − p)² of the latent entries of one side, ``[*r, K, D]``."""
        weight = mass(self.masks[side], expected)
        if self.common is not None:
            _, first, second = self.common[side]
            return [weight, weight * first, weight * second]
        # From limits of their own to the pivot.
        _, first, second = self.each[side]
        lead, k = len(self.family.replicas), self.family._k
        own = self.own[side].isfinite()
        shift = torch.where(own, self.own[side] - self._pivots()[side], 0.0)
        flat = expected.reshape(*expected.shape[:lead], -1, k, 1).to(torch.float64)
        square = shift.square() + 2 * shift * first + second
        return [weight, *((flat * torch.where(own, value, 0.0)).sum(-3) for value in (shift + first, square))]

    def stats(self) -> Stats:
        total = self.inner_kernel.stats()
        for sums, pivot in zip(self.sums, self._pivots(), strict=True):
            total = total + self.family.hidden_stats(pivot, *sums)
        return Stats(factor=total)

    def inner(self) -> Tensor:
        return self.family.expected_log_prob(self.stats())
