"""Independent columns of counts."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.factors._columns import Columns
from torchem.priors import Gamma
from torchem.stats import Stats

#: log x! of small counts, for which float32 is exact enough.
_LOG_FACTORIALS = (torch.arange(256, dtype=torch.float64) + 1).lgamma()


class Poisson(Columns):
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

    splits: ClassVar = frozenset({"rates"})
    views: ClassVar = {"rates": "log_rate"}
    discrete: ClassVar[bool] = True
    parameter: ClassVar[str] = "log_rate"

    log_rate: Tensor

    def __init__(self, n_components: int, n_features: int):
        super().__init__(n_components, n_features)
        #: Which cells may have counts above zero.
        self.new_buffer("support", torch.ones(n_components, n_features, dtype=torch.bool))

    @property
    def rates(self) -> Tensor:
        """Rates ``[*r, K, D]``: expected counts; assignable."""
        rates = self.log_rate.exp()
        return torch.where(self.support, rates, 0.0) if self.restricted else rates

    @rates.setter
    def rates(self, value: Any) -> None:
        rates = as_tensor(value, "rates").to(self.device, torch.float64)
        if rates.shape != self.log_rate.shape:
            raise invalid(
                "rates", f"shape {list(self.log_rate.shape)}", list(rates.shape), "give one row per component"
            )
        if not bool(((rates >= 0) & rates.isfinite()).all()):
            raise invalid("rates", "finite numbers of at least zero", "a negative or non-finite entry", "correct it")
        self.support.copy_(rates > 0)
        self.refresh()
        with torch.no_grad():
            self.log_rate.copy_(torch.where(self.support, rates, 1.0).log())

    def check(self, batch: Batch) -> None:
        super().check(batch)
        x = batch.x.detach()
        if not values_known():
            return
        bad = (x < 0) | ((x != x.round()) & ~x.isnan()) if x.is_floating_point() else x < 0
        if bool(bad.any()):
            raise invalid(
                "data", "counts: whole numbers of at least zero", f"{x[bad][0].item():g}",
                "correct that entry, or set it to NaN if it is missing",
            )  # fmt: skip

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

    def free(self) -> Tensor:
        return self.support

    def forbidden(self) -> tuple[Tensor, Tensor]:
        empty = (~self.support).to(torch.float64)
        return empty, torch.zeros_like(empty)

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        # Looking up is several times faster than lgamma, but has no derivative in x.
        if values_known() and not x.requires_grad and x.numel() and float(x.max()) < len(_LOG_FACTORIALS):
            return x, -_LOG_FACTORIALS.to(x).take(x.to(torch.long))
        # The terms of large counts are large and cancel: float32 would leave errors of a nat at a million.
        x = x.to(torch.float64)
        return x, -(x + 1).lgamma()

    # ---- conjugate prior: gamma -------------------------------------------------------------------------------

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """Gamma: Σ log Γ(total) − total log count over the free cells."""
        count, total = self._movable(posterior)
        return torch.where(self.free(), total.lgamma() - total * count.log(), 0.0).sum((-2, -1))

    def expected_natural(self, posterior: Stats) -> Stats:
        """E log λ for each total and −E λ for each count, zero where a cell is fixed."""
        count, total = self._movable(posterior)
        natural = Stats(count=-total / count, total=total.digamma() - count.log())
        return natural.map(lambda leaf: torch.where(self.free(), leaf, 0.0))

    def weak_prior(self) -> Gamma:
        """A shape of one, and the mean of the data."""
        return Gamma(1.0)

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """Negative binomial: a Poisson count whose rate is gamma (A. Gelman et al. 2013, section 2.6)."""
        count, total = (value.unsqueeze(-3) for value in self._movable(posterior))
        x = batch.x.to(torch.float64).reshape(-1, 1, self.n_features)
        seen = ~x.isnan()
        x = torch.where(seen, x, 0.0)
        value = (x + total).lgamma() - total.lgamma() - (x + 1).lgamma() - x * count.log1p()
        value = value - total * count.reciprocal().log1p()
        if self.restricted:
            free = self.free().unsqueeze(-3)
            value = torch.where(free, value, torch.where(x > 0, -torch.inf, 0.0))
        value = torch.where(seen, value, 0.0).sum(-1).to(self.dtype)
        held = self._held()
        if held is not None:
            value = torch.where(held[:, 0], self.log_prob(batch).reshape(value.shape), value)
        return value.unflatten(-2, batch.x.shape[:-1])

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        count, total = self._movable(posterior)
        rates = torch._standard_gamma(total[z], generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        rates = rates / count[z]
        held = self._held()
        if held is not None:
            rates = torch.where(held[z], self.rates.detach()[z].to(rates), rates)
        if self.restricted:
            rates = torch.where(self.free()[z], rates, 0.0)
        return torch.poisson(rates, generator=generator).to(self.dtype)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(self.rates.detach()[z], generator=generator)

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
