"""Independent columns of counts."""

from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor, Prior
from torchem.factors._counts import check_counts, with_factorials
from torchem.factors._rates import Rates
from torchem.ops import tails
from torchem.stats import Stats


class Poisson(Rates):
    """Independent columns of Poisson counts given the state.

    log p(x | k) = Σ_d x_d log λ_kd − λ_kd − log x_d!, over the entries observed (NaN is missing).

    It starts at rates of one. A rate of zero that a user assigns to `rates` is structural: no M-step moves it, and any
    other count has probability zero. Rates of zero that EM reaches are finite and tiny.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.

    Raises:
        InvalidArgument: For sizes below one.

    Source: G. J. McLachlan, D. Peel (2000), section 5.5.

    Example:
        >>> p = Poisson(2, 1)
        >>> p.rates = [[1.0], [4.0]]
        >>> p.log_prob(Batch(torch.tensor([[2.0]])))
        tensor([[-1.6931, -1.9206]], grad_fn=<...>)
    """

    discrete = True
    demand: ClassVar[str] = "finite numbers of at least zero"

    def __init__(self, n_components: int, n_features: int):
        super().__init__(n_components, n_features)
        #: Which cells may have counts above zero.
        self.new_buffer("support", torch.ones(n_components, n_features, dtype=torch.bool))

    @staticmethod
    def admits(rates: Tensor) -> Tensor:
        return (rates >= 0) & rates.isfinite()

    def restrict(self, positive: Tensor) -> None:
        self.support.copy_(positive)
        self.refresh()

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_counts(batch)

    # ---- the family -------------------------------------------------------------------------------------------

    def natural(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self.restricted:
            return value, value.exp()
        return torch.where(self.support, value, 0.0), torch.where(self.support, value.exp(), 0.0)

    def estimate(self, count: Tensor, total: Tensor) -> Tensor:
        return (total / count).clamp(min=torch.finfo(self.dtype).tiny).log()

    def expectation(self, value: Tensor) -> Tensor:
        return value.exp()

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        return self.rates, self.rates

    @staticmethod
    def distribution(x: Tensor, mean: Tensor) -> Tensor:
        below = torch.special.gammaincc(x.floor().clamp(min=0.0) + 1, mean)
        return torch.where(x >= 0, below, 0.0)

    def free(self) -> Tensor:
        return self.support

    def forbidden(self) -> tuple[Tensor, Tensor]:
        empty = (~self.support).to(torch.float64)
        return empty, torch.zeros_like(empty)

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, factorials = with_factorials(x)
        return x, -factorials

    def mixed(self, x: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
        """Negative binomial: a Poisson count whose rate is gamma (A. Gelman et al. 2013, section 2.6)."""
        value = (x + shape).lgamma() - shape.lgamma() - (x + 1).lgamma() - x * rate.log1p()
        return value - shape * rate.reciprocal().log1p()

    def drawn(self, rates: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(rates, generator=generator)

    def tail(self, limit: Tensor, upper: bool) -> tails.Tail:
        """What lies at or beyond limits that broadcast to ``[*r, …, K, D]``; see `torchem.ops.tails`."""
        tiny = torch.finfo(torch.float64).tiny
        return tails.poisson(tails.against(self.rates, limit).clamp(min=tiny), limit, upper)

    def expected_tail(self, posterior: Stats, prior: Prior, limit: Tensor, upper: bool) -> tails.Tail:
        """`tail` of exp E log p: of counts at the rate exp E log λ, but for a constant."""
        natural, free = self._expected(posterior, prior), self.free()
        rate = torch.where(free, natural["total"].exp(), torch.finfo(torch.float64).tiny)
        log_p, first, second = tails.poisson(tails.against(rate, limit), limit, upper)
        more = torch.where(free, natural["count"] + rate, 0.0)
        return log_p + tails.against(more, limit), first, second

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 7, (30, 2), generator=generator).double()
        holes = torch.rand(30, 2, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 2).double()
            family.rates = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 5 + 1
            found.append((family, Batch(data)))
        return found
