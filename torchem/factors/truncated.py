"""Columns of which nothing beyond a limit is ever recorded."""

from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries
from torchem.errors import invalid
from torchem.factor import Factor, Kernel
from torchem.factors._around import marked, mass
from torchem.factors._bounded import Bounded
from torchem.ops import reduce
from torchem.ops.tails import Tail, log_difference
from torchem.stats import Stats

#: Largest logarithm of how many entries were not recorded for each that was.
_MOST = 600.0
#: Rounds of drawing again what fell outside.
_ROUNDS = 10_000


class Truncated(Bounded):
    """Independent columns of which only what lies within limits is recorded: nothing tells how often it did not.

    log p(x | k) = Σ_d log f(x_d | k) − log P_f(low_d ≤ X ≤ high_d | k), the limits included; missing entries (NaN) are
    left out. ``Truncated(Poisson(K, D), low=1)`` are counts without zeros.

    *E-step.* Each entry recorded stands for P_f(outside) / P_f(inside) more that were not, on average, distributed like
    the tails of f.

    *M-step.* That of the factor inside, on data completed by these.

    *Posterior of the parameters.* With a `torchem.Variational` inside P_f(outside) is the mass there of exp E log f,
    less than one, and P_f(inside) what it leaves; `log_prob` is that at posterior means.

    Args:
        factor: `Exponential`, `Poisson` or `Gaussian` with independent columns, with K components.
        low: Least values that are recorded: one number, or one for each column, None for a column without.
        high: Greatest ones.

    Raises:
        InvalidArgument: For another factor, limits that are not below each other, or none at all.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 4.2; G. J. McLachlan, P. N. Jones (1988).

    Example:
        >>> from torchem.factors import Poisson
        >>> Truncated(Poisson(1, 1), low=1).log_prob(Batch(torch.tensor([[1.0], [2.0]]))).exp()[:, 0]
        tensor([0.5820, 0.2910], grad_fn=<...>)
    """

    def __init__(self, factor: Factor, low: Any = None, high: Any = None):
        super().__init__(factor, low, high)
        if low is None and high is None:
            raise invalid("low, high", "a limit", "none", "use the factor itself")

    def check(self, batch: Batch) -> None:
        super().check(batch)
        self.factor.check(batch)
        bad = self._outside(self.entries(batch).detach())
        refuse_entries(batch, bad, "numbers within the limits", "drop that row, or set the entry to NaN")

    def _outside(self, x: Tensor) -> Tensor:
        low, high = self.limits().to(x.dtype)
        return (x < low) | (x > high)

    # ---- the distribution -------------------------------------------------------------------------------------

    def _tails(self, score: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tail]]]:
        """log P(inside), and for both sides where the outside begins and its tail, ``[*r, K, D]``.

        Args:
            score: At the means of a posterior of the parameters, if there is one.
        """
        low, high = self.limits()
        # Of counts the limits themselves are within.
        gap = 1.0 if self.discrete else 0.0
        ends = ((low - gap, False), (high + gap, True))
        outside = [(end, self.tail(end, upper, score)) for end, upper in ends]
        if self.factor.averages and not score:  # whose mass is less than one
            out = reduce.logsumexp(torch.stack([tail[0] for _, tail in outside], -1), -1)
            return log_difference(torch.zeros_like(out), out), outside
        from_low = torch.where(low.isfinite(), self.tail(low, True, score)[0], 0.0)
        to_high = torch.where(high.isfinite(), self.tail(high, False, score)[0], 0.0)
        # The difference of the smaller ones keeps more digits.
        upper = log_difference(from_low, outside[1][1][0])
        lower = log_difference(to_high, outside[0][1][0])
        return torch.where(from_low < to_high, upper, lower), outside

    def log_prob(self, batch: Batch) -> Tensor:
        return _TruncatedKernel(self, score=True).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``factor``: its own, of completed data."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _TruncatedKernel(self)

    def outcomes(self) -> list[Tensor | None]:
        if not self.discrete:
            return super().outcomes()
        return self._counted(self.moments(Batch(torch.zeros(1, self._d, device=self.device)))[0])

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mean, variance = self.factor.moments(batch)
        lead = len(self.replicas)
        shape = (*mean.shape[:lead], *[1] * (mean.dim() - lead - 2), self._k, self._d)
        inside, outside = self._tails(score=True)
        first, second = mean, variance + mean.square()
        for limit, tail in outside:
            log_p, excess, square = (value.reshape(shape) for value in tail)
            limit, p = torch.where(limit.isfinite(), limit, 0.0), log_p.exp()
            first = first - p * (limit + excess)
            second = second - p * (limit.square() + 2 * limit * excess + square)
        p = inside.exp().reshape(shape)
        first, second = first / p, second / p
        return first.to(mean.dtype), (second - first.square()).to(mean.dtype)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        x = self.factor.sample(z, batch, generator)
        for _ in range(_ROUNDS):
            rows = self._outside(x).any(-1).nonzero()[:, 0]
            if not len(rows):
                return x
            again = self.factor.sample(z[rows], None if batch is None else batch[rows], generator)
            x[rows] = torch.where(self._outside(x[rows]), again, x[rows])
        raise invalid(
            "sample", "a law with some of its mass within the limits", "none in many draws", "move the parameters"
        )

    # ---- starts, bookkeeping ----------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """As if nothing had been left out."""
        return self.joined({"factor": self.factor.initialize(batch, expected)})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return self.joined({"factor": self.factor.initialize_at(batch, index)})

    def select(self, keep: Tensor) -> "Truncated":
        small = Truncated(self.factor.pruned(keep), self.low, self.high)
        small.step = self.step.clone()
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Counts without zeros, with missing entries; normal columns between limits."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        counts, normal = factors.Poisson(3, 2).double(), factors.Gaussian(3, 2, "diag").double()
        counts.rates, normal.means = 1 + 3 * draw(3, 2), 2 * draw(3, 2) - 1
        x = (1 + 6 * draw(30, 2)).floor().masked_fill(draw(30, 2) < 0.15, torch.nan)
        found: list[tuple[Factor, Batch]] = [(cls(counts, low=1), Batch(x))]
        return [*found, (cls(normal, low=-2.0, high=[None, 2.5]), Batch(4 * draw(40, 2) - 2.0))]


class _TruncatedKernel(Kernel):
    """The pass of the factor inside, and how many entries were recorded."""

    def __init__(self, family: Truncated, score: bool = False):
        self.family = family
        self.inner_kernel = (family.factor.unwrapped if score else family.factor).kernel()
        self.inside, self.outside = family._tails(score)
        self.count: Tensor | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        x = self.family.entries(batch)
        self.seen = ~x.isnan()
        value = self.inner_kernel.log_potential(batch.with_x(x))
        value = value - marked(self.seen, self.inside.to(value.dtype))
        return torch.where(self.family._outside(x).any(-1, keepdim=True), -torch.inf, value)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.inner_kernel.collect(batch, expected)
        count = mass(self.seen, expected)
        self.count = count if self.count is None else self.count + count

    def stats(self) -> Stats:
        total = self.inner_kernel.stats()
        if self.count is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        for limit, (log_p, first, second) in self.outside:
            # Entries that were not recorded, for each that was; of a law far outside more than there are numbers for.
            weight = self.count * (log_p - self.inside).clamp(max=_MOST).exp()
            pivot = torch.where(limit.isfinite(), limit, 1.0)
            total = total + self.family.hidden_stats(pivot, weight, weight * first, weight * second)
        return Stats(factor=total)

    def inner(self) -> Tensor:
        return self.family.expected_log_prob(self.stats())
