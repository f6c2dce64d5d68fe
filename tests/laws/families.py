"""Families that torchem does not ship: they prove that the contracts carry what users write."""

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import ExponentialFamily, Factor
from torchem.stats import Stats


class Counts(ExponentialFamily):
    """Poisson counts, one rate per component and column, written from the exponential-family contract alone."""

    views = {"rates": "log_rate"}

    def __init__(self, k: int, d: int):
        super().__init__()
        self.k, self.d = k, d
        self.new_parameter("log_rate", torch.zeros(k, d))

    @property
    def n_components(self) -> int:
        return self.k

    @property
    def n_features(self) -> int:
        return self.d

    @property
    def rates(self) -> Tensor:
        return self.log_rate.exp()

    def features(self, batch: Batch) -> Tensor:
        return batch.x.to(self.dtype)

    def natural(self) -> tuple[Tensor, Tensor]:
        return self.log_rate, self.log_rate.exp().sum(-1)

    def base_measure(self, batch: Batch) -> Tensor:
        return -(batch.x.to(self.dtype) + 1).lgamma().sum(-1)

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count = stats["count"].unsqueeze(-1)
        rate = stats["features"] / torch.where(count > 0, count, 1.0)
        value = rate.clamp(min=1e-300).log().to(self.dtype)
        return {"log_rate": self.keep_frozen("log_rate", torch.where(count > 0, value, self.log_rate))}

    def n_parameters(self) -> int:
        mask = self.frozen("log_rate")
        kept = 0 if mask is None else int(mask.expand(self.k).sum())
        return (self.k - kept) * self.d

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(self.rates.detach()[z], generator=generator)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(3)
        family = cls(3, 2).double()
        with torch.no_grad():
            family.log_rate.copy_(torch.rand(3, 2, generator=generator, dtype=torch.float64) * 2)
        return family, Batch(torch.randint(0, 7, (30, 2), generator=generator).double())
