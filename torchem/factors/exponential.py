"""Independent columns of waiting times."""

from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries
from torchem.errors import invalid
from torchem.factor import Factor, Moments, Prior
from torchem.factors._rates import Rates
from torchem.ops import tails
from torchem.stats import Stats


class Exponential(Rates):
    """Independent exponential columns given the state.

    log p(x | k) = Σ_d log λ_kd − λ_kd x_d, over the entries observed (NaN is missing).

    It starts at rates of one. A component that saw nothing but zeros would have an infinite likelihood: means stay
    above ``mean_floor`` times the mean of the data, which is the exact maximum under that bound.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        mean_floor: Least mean, relative to that of the column in the data.

    Raises:
        InvalidArgument: For sizes below one or a floor that is not positive.

    Source: G. J. McLachlan, D. Peel (2000), section 5.4.

    Example:
        >>> e = Exponential(2, 1)
        >>> e.rates = [[1.0], [0.5]]
        >>> e.log_prob(Batch(torch.tensor([[2.0]])))
        tensor([[-2.0000, -1.6931]], grad_fn=<...>)
    """

    exposure: ClassVar[str] = "total"

    unit: Tensor

    def __init__(self, n_components: int, n_features: int, mean_floor: float = 1e-6):
        super().__init__(n_components, n_features)
        if not 0 < mean_floor < 1:
            raise invalid("mean_floor", "a number between 0 and 1", mean_floor, "the default is 1e-6")
        self.mean_floor = mean_floor
        #: Mean of each column in the data; zero before any was seen.
        self.new_buffer("unit", torch.zeros(n_components, n_features))

    def refresh(self) -> None:
        """No cell is ever fixed at a bound."""

    def check(self, batch: Batch) -> None:
        super().check(batch)
        remedy = "correct that entry, or set it to NaN if it is missing"
        refuse_entries(batch, batch.x.detach() < 0, "numbers of at least zero", remedy)

    # ---- the family -------------------------------------------------------------------------------------------

    def natural(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return -value.exp(), -value

    def estimate(self, count: Tensor, total: Tensor) -> Tensor:
        return -torch.maximum(total / count, self._least()).log()

    def _least(self) -> Tensor:
        return (self.mean_floor * self.unit.to(torch.float64)).clamp(min=torch.finfo(self.dtype).tiny)

    def expectation(self, value: Tensor) -> Tensor:
        return (-value).exp()

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        mean = (-self.log_rate).exp()
        return mean, mean.square()

    @staticmethod
    def distribution(x: Tensor, mean: Tensor) -> Tensor:
        return -torch.expm1(-x.clamp(min=0.0) / mean)

    def free(self) -> Tensor:
        return torch.ones_like(self.log_rate, dtype=torch.bool)

    def forbidden(self) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.log_rate), torch.zeros_like(self.log_rate)

    # ---- the floor --------------------------------------------------------------------------------------------

    def prepare(self, moments: Moments) -> None:
        super().prepare(moments)
        if moments.mean.shape == (self.n_features,):
            self.unit.copy_(moments.mean)

    def project(self) -> None:
        self.log_rate.data = torch.minimum(self.log_rate.data, -self._least().log().to(self.dtype))

    def degenerate(self) -> Tensor:
        mean = (-self.log_rate.detach().to(torch.float64)).exp()
        return (mean <= self._least() * (1 + 1e-5)).any(-1)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def mixed(self, x: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
        """Lomax: an exponential time whose rate is gamma (N. L. Johnson et al. 1994, section 20.1)."""
        return shape.log() - rate.log() - (shape + 1) * (x / rate).log1p()

    def tail(self, limit: Tensor, upper: bool) -> tails.Tail:
        """What lies at or beyond limits that broadcast to ``[*r, …, K, D]``; see `torchem.ops.tails`."""
        return tails.exponential(tails.against(self.rates, limit), limit.clamp(min=0.0), upper)

    def expected_tail(self, posterior: Stats, prior: Prior, limit: Tensor, upper: bool) -> tails.Tail:
        """`tail` of exp E log p: of an exponential law at E λ, but for a constant."""
        natural = self._expected(posterior, prior)
        rate = -natural["total"]
        log_p, first, second = tails.exponential(tails.against(rate, limit), limit.clamp(min=0.0), upper)
        return log_p + tails.against(natural["count"] - rate.log(), limit), first, second

    def drawn(self, rates: Tensor, generator: torch.Generator | None) -> Tensor:
        return (torch.empty_like(rates).exponential_(generator=generator) / rates).to(self.dtype)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.empty(30, 2, dtype=torch.float64).exponential_(generator=generator)
        holes = torch.rand(30, 2, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 2).double()
            family.rates = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 3 + 0.2
            found.append((family, Batch(data)))
        return found
