"""Independent columns of positive numbers."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries
from torchem.errors import invalid
from torchem.factor import ExponentialFamily, Factor
from torchem.factors._cells import EMPTY, SMOOTH, Grid
from torchem.ops.special import inverse_digamma, shape_from_gap
from torchem.stats import Stats

#: The smallest shape.
_LEAST = 1e-3


class Gamma(Grid, ExponentialFamily):
    """Independent gamma columns given the state.

    log p(x | k) = Σ_d a_kd log r_kd − log Γ(a_kd) + (a_kd − 1) log x_d − r_kd x_d, over the entries observed.

    With shape a and rate r the mean is a / r and the variance a / r². It starts at ones, exponential laws. Entries must
    be above zero (for zeros wrap it in `ZeroInflated`). A component that saw one value alone would have an infinite
    likelihood: shapes stay below ``shape_limit``, which is the exact maximum under that bound.

    *M-step.* The rate is a / x̄, and the shape solves log a − ψ(a) = log x̄ − mean of log x, by Newton's method.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        shape_limit: Largest shape: standard deviations are at least the mean divided by its root.

    Raises:
        InvalidArgument: For sizes below one or a limit that is not above one.

    Source: T. P. Minka (2002), Estimating a gamma distribution; G. J. McLachlan, D. Peel (2000), section 5.4.

    Example:
        >>> g = Gamma(2, 1)
        >>> g.shapes, g.rates = [[1.0], [4.0]], [[1.0], [2.0]]
        >>> g.log_prob(Batch(torch.tensor([[2.0]])))
        tensor([[-2.0000, -0.9397]], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "the normaliser of one over shapes has no closed form"
    views: ClassVar = {"shapes": "log_shape", "rates": "log_rate"}

    log_shape: Tensor
    log_rate: Tensor

    def __init__(self, n_components: int, n_features: int, shape_limit: float = 1e6):
        super().__init__(n_components, n_features)
        if not 1 < shape_limit < 1e9:
            raise invalid("shape_limit", "a number between 1 and 1e9", shape_limit, "the default is 1e6")
        self.shape_limit = shape_limit
        self.new_parameter("log_shape", torch.zeros(n_components, n_features))
        self.new_parameter("log_rate", torch.zeros(n_components, n_features))

    @property
    def shapes(self) -> Tensor:
        """Shapes ``[*r, K, D]``; assignable."""
        return self.log_shape.exp()

    @shapes.setter
    def shapes(self, value: Any) -> None:
        self.set_positive("shapes", value)

    @property
    def rates(self) -> Tensor:
        """Rates ``[*r, K, D]``, in reciprocal units of x; assignable."""
        return self.log_rate.exp()

    @rates.setter
    def rates(self, value: Any) -> None:
        self.set_positive("rates", value)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        remedy = "set it to NaN if it is missing, or wrap the factor in ZeroInflated if zeros are real"
        refuse_entries(batch, batch.x.detach() <= 0, "numbers above zero", remedy)

    # ---- the family -------------------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        # In float64: the terms of large shapes are large and cancel.
        x, seen = self.entries(batch)
        columns = torch.cat([seen.to(x), torch.where(seen, x, 0.0), x.log()], -1)
        return columns.unflatten(0, batch.x.shape[:-1])

    def natural(self) -> tuple[Tensor, Tensor]:
        shape, log_rate = self.wide("log_shape").exp(), self.wide("log_rate")
        eta = torch.cat([shape * log_rate - shape.lgamma(), -log_rate.exp(), shape], -1)
        return eta, eta.new_zeros(eta.shape[:-1])

    def base_measure(self, batch: Batch) -> Tensor:
        return -self.entries(batch)[0].log().sum(-1)

    def row_size(self) -> int:
        return 10 * self._d + 4 * self._k

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        mean = (self.log_shape - self.log_rate).exp()
        return mean, mean / self.rates

    def cdf(self, batch: Batch) -> Tensor:
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self._k, self._d)
        rate, form = (self.wide(name).exp().reshape(shape) for name in ("log_rate", "log_shape"))
        x = batch.x.to(torch.float64).unsqueeze(-2).clamp(min=0.0)
        return torch.special.gammainc(form, rate * x).to(self.dtype)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count, total, log = stats["features"].tensor_split(3, -1)
        alive = count > EMPTY
        count, log = torch.where(alive, count, 1.0), torch.where(alive, log, -1.0)
        mean, log = torch.where(alive, total, 1.0) / count, log / count
        shape = shape_from_gap(mean.log() - log, _LEAST, self.shape_limit)
        held = self.held("log_rate")
        if held is not None:
            alone = inverse_digamma(self.wide("log_rate") + log, _LEAST, self.shape_limit)
            shape = torch.where(held, alone, shape)
        log_shape = torch.where(alive, shape.log().to(self.dtype), self.log_shape)
        log_shape = self.keep_frozen("log_shape", log_shape)
        log_rate = torch.where(alive, (log_shape.to(torch.float64) - mean.log()).to(self.dtype), self.log_rate)
        return {"log_shape": log_shape, "log_rate": self.keep_frozen("log_rate", log_rate)}

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        stats = self.gather(batch, expected)
        # A component that begins with one value alone would never see another.
        return stats + stats.map(lambda leaf: SMOOTH * leaf.mean(len(self.replicas), keepdim=True).expand_as(leaf))

    def project(self) -> None:
        limit = torch.tensor(self.shape_limit, dtype=self.dtype, device=self.device).log()
        over = self.log_shape.data > limit
        if bool(over.any()):
            # Means stay.
            self.log_rate.data = torch.where(over, self.log_rate - self.log_shape + limit, self.log_rate).detach()
            self.log_shape.data = torch.where(over, limit, self.log_shape).detach()

    def degenerate(self) -> Tensor:
        return (self.log_shape.detach().to(torch.float64).exp() >= self.shape_limit * (1 - 1e-5)).any(-1)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        shape = self.shapes.detach().to(torch.float64)[z]
        draws = torch._standard_gamma(shape, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        # Of very small shapes most draws are below the smallest number.
        draws = (draws / self.rates.detach().to(torch.float64)[z]).to(self.dtype)
        return draws.clamp(min=torch.finfo(self.dtype).tiny)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.empty(30, 2, dtype=torch.float64).exponential_(generator=generator) + 0.1
        holes = torch.rand(30, 2, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 2).double()
            family.shapes = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 3 + 0.5
            family.rates = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 3 + 0.5
            found.append((family, Batch(data)))
        return found
