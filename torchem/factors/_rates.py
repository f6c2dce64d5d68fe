"""What families of columns with a rate have in common: the rate's view, and its gamma prior and posterior."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factors._columns import Columns
from torchem.priors import Gamma
from torchem.stats import Stats


class Rates(Columns):
    """Independent columns given the state, each with a rate λ whose conjugate prior is gamma.

    Of the statistics ``count`` and ``total`` one is of events, the coefficient of log λ, and the other, `exposure`, of
    what rates are multiplied by. A posterior with them is λ ~ Gamma(events, exposure).
    """

    splits: ClassVar = frozenset({"rates"})
    views: ClassVar = {"rates": "log_rate"}
    parameter: ClassVar[str] = "log_rate"
    #: What rates must be, in words and as a check.
    demand: ClassVar[str] = "finite positive numbers"

    log_rate: Tensor

    @staticmethod
    def admits(rates: Tensor) -> Tensor:
        """Whether a rate may be assigned, entry by entry."""
        return (rates > 0) & rates.isfinite()

    @property
    def rates(self) -> Tensor:
        """Rates ``[*r, K, D]``; assignable."""
        rates = self.log_rate.exp()
        return torch.where(self.free(), rates, 0.0) if self.restricted else rates

    @rates.setter
    def rates(self, value: Any) -> None:
        rates = as_tensor(value, "rates").to(self.device, torch.float64)
        if rates.shape != self.log_rate.shape:
            raise invalid(
                "rates", f"shape {list(self.log_rate.shape)}", list(rates.shape), "give one row per component"
            )
        wrong = rates[~self.admits(rates)]
        if len(wrong):
            got = "zero" if bool((wrong == 0).all()) else "a negative or non-finite entry"
            raise invalid("rates", self.demand, got, "correct it")
        self.restrict(rates > 0)
        with torch.no_grad():
            self.log_rate.copy_(torch.where(rates > 0, rates, 1.0).log())

    def restrict(self, positive: Tensor) -> None:
        """Take note of rates that are zero for good, where a family has those."""

    @abstractmethod
    def drawn(self, rates: Tensor, generator: torch.Generator | None) -> Tensor:
        """One observation for each rate."""

    @abstractmethod
    def mixed(self, x: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
        """Log-density of entries whose rates are Gamma(shape, rate); broadcasts."""

    # ---- conjugate prior: gamma -------------------------------------------------------------------------------

    def _gamma(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """Shape and rate of the posterior, ``[*r, K, D]``."""
        count, total = self._movable(posterior)
        return (count, total) if self.exposure == "total" else (total, count)

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """Gamma: Σ log Γ(shape) − shape · log rate over the free cells."""
        shape, rate = self._gamma(posterior)
        return torch.where(self.free(), shape.lgamma() - shape * rate.log(), 0.0).sum((-2, -1))

    def expected_natural(self, posterior: Stats) -> Stats:
        """E log λ for the events and −E λ for the exposure, zero where a cell is fixed."""
        shape, rate = self._gamma(posterior)
        logs, means = shape.digamma() - rate.log(), -shape / rate
        own = {"count": logs, "total": means} if self.exposure == "total" else {"count": means, "total": logs}
        return Stats({name: torch.where(self.free(), value, 0.0) for name, value in own.items()})

    def weak_prior(self) -> Gamma:
        """A shape of one, and the mean of the data."""
        return Gamma(1.0)

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        shape, rate = (value.unsqueeze(-3) for value in self._gamma(posterior))
        x = batch.x.to(torch.float64).reshape(-1, 1, self.n_features)
        seen = ~x.isnan()
        x = torch.where(seen, x, 0.0)
        value = self.mixed(x, shape, rate)
        if self.restricted:
            value = torch.where(self.free().unsqueeze(-3), value, torch.where(x > 0, -torch.inf, 0.0))
        value = torch.where(seen, value, 0.0).sum(-1).to(self.dtype)
        held = self._held()
        if held is not None:
            value = torch.where(held[:, 0], self.log_prob(batch).reshape(value.shape), value)
        return value.unflatten(-2, batch.x.shape[:-1])

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        shape, rate = self._gamma(posterior)
        rates = torch._standard_gamma(shape[z], generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        rates, held = rates / rate[z], self._held()
        if held is not None:
            rates = torch.where(held[z], self.rates.detach()[z].to(rates), rates)
        if self.restricted:
            rates = torch.where(self.free()[z], rates, 0.0)
        return self.drawn(rates, generator).to(self.dtype)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self.drawn(self.rates.detach()[z], generator)
