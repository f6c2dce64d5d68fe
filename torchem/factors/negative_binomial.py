"""Independent columns of counts that vary more than Poisson counts do."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors._cells import EMPTY, SMOOTH, Cells
from torchem.factors._counts import check_counts
from torchem.ops.special import shape_from_gap
from torchem.stats import Stats

#: Dispersions stay between these: less is Poisson, more has its mass at zero.
_LEAST, _MOST = 1e-6, 1e3


class NegativeBinomial(Cells):
    """Independent columns of negative binomial counts given the state: Poisson counts whose rates vary.

    p(x | k) = Π_d NB(x_d; μ_kd, α_kd), with mean μ and variance μ + α μ² (α is the dispersion), over the entries
    observed (NaN is missing). In other words, with r = 1/α and a latent factor u of each entry,

        x | u ~ Poisson(μ u),  u ~ Gamma(r, r),  log p(x) = log Γ(x + r) − log Γ(r) − log x! + r log r + x log μ
        − (x + r) log(r + μ).

    SciPy's `nbinom` has n = r and p = r / (r + μ); R's `dnbinom` ``size = r``, ``mu = μ``. It starts at means and
    dispersions of one. Dispersions stay between 1e-6 (Poisson) and 1e3.

    *E-step.* u given x is Gamma(r + x, r + μ): E u = (r + x) / (r + μ), E log u = ψ(r + x) − log(r + μ).

    *M-step.* The likelihood does not change when u has any mean ν and μ becomes μ / ν, so the bound may be taken at the
    best ν. Its maximum is at the mean of the data, and where log r − ψ(r) = log ū − mean of E log u: a gamma law's.
    Where counts vary no more than Poisson ones, α falls ever more slowly (``accelerate="squarem"`` helps).

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.

    Raises:
        InvalidArgument: For sizes below one.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 4, for the latent rates; C. Liu, D. B. Rubin,
        Y. N. Wu (1998) for the expansion; J. M. Hilbe (2011), section 8.2, for the parameters.

    Example:
        >>> counts = NegativeBinomial(1, 1)
        >>> counts.means, counts.dispersions = [[2.0]], [[0.5]]
        >>> counts.log_prob(Batch(torch.tensor([[0.0], [2.0]]))).exp()[:, 0]
        tensor([0.2500, 0.1875], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "dispersions have no sufficient statistics"
    views: ClassVar = {"means": "log_mean", "dispersions": "log_dispersion"}
    discrete = True

    log_mean: Tensor
    log_dispersion: Tensor

    def __init__(self, n_components: int, n_features: int):
        super().__init__(n_components, n_features)
        self.new_parameter("log_mean", torch.zeros(n_components, n_features))
        self.new_parameter("log_dispersion", torch.zeros(n_components, n_features))

    @property
    def means(self) -> Tensor:
        """Expected counts ``[*r, K, D]``; assignable."""
        return self.log_mean.exp()

    @means.setter
    def means(self, value: Any) -> None:
        self.set_positive("means", value)

    @property
    def dispersions(self) -> Tensor:
        """α ``[*r, K, D]``: variances are μ + α μ²; assignable."""
        return self.log_dispersion.exp()

    @dispersions.setter
    def dispersions(self, value: Any) -> None:
        self.set_positive("dispersions", value)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_counts(batch)

    # ---- the family -------------------------------------------------------------------------------------------

    def _size(self) -> Tensor:
        return (-self.wide("log_dispersion")).exp()

    def cells(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        log_mean, size = self.wide("log_mean").unsqueeze(-3), self._size().unsqueeze(-3)
        both = size + log_mean.exp()
        log_both, shape = both.log(), size + x
        value = shape.lgamma() - size.lgamma() - (x + 1).lgamma() + x * (log_mean - log_both)
        # r log(r / (r + μ)) of a large r keeps its digits.
        value = value - size * (log_mean.exp() / size).log1p()
        found = {"total": x.expand(value.shape), "scale": shape / both, "log": shape.digamma() - log_both}
        return value, found

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        mean = self.means
        return mean, mean + self.dispersions * mean.square()

    def cdf(self, batch: Batch) -> Tensor:
        # A sum over all outcomes up to the largest: torch has no incomplete beta function.
        x = batch.x.to(torch.float64).nan_to_num(nan=-1.0).floor()
        most = int(x.detach().amax().clamp(min=0.0)) if x.numel() else 0
        counts = torch.arange(most + 1, dtype=torch.float64, device=x.device).unsqueeze(-1)
        total = self.cells(counts.unsqueeze(-2))[0].exp().cumsum(-3).clamp(max=1.0)  # [*r, most + 1, K, D]
        place = x.reshape(-1, 1, self._d).clamp(min=0.0).long().expand(*self.replicas, -1, self._k, -1)
        value = torch.where(x.reshape(-1, 1, self._d) >= 0, total.gather(-3, place), 0.0).to(self.dtype)
        return value.unflatten(-3, batch.x.shape[:-1])

    # ---- EM ---------------------------------------------------------------------------------------------------

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """Σ X log μ − (X + n r) log ν − μ A / ν − r A / ν + n (r log r − log Γ(r)) + r L, at the best ν, or at 1.

        With X = Σ x, A = Σ u, L = Σ log u, all expected; the best ν is A (μ + r) / (X + n r). Where a mean is frozen,
        or statistics are mixed, ν is 1.
        """
        count, total, scale, log = (stats[name] for name in ("count", "total", "scale", "log"))
        log_mean, size = self.wide("log_mean"), self._size()
        mean = log_mean.exp()
        mass = total + count * size
        own = total * log_mean + count * (size * size.log() - size.lgamma()) + size * log
        plain = own - (mean + size) * scale
        best = scale * (mean + size) / mass.clamp(min=EMPTY)
        wide = own - torch.where(count > EMPTY, mass * (best.clamp(min=1e-300).log() + 1), 0.0)
        if stats.mixed:
            return plain.sum((-2, -1))
        held = self.held("log_mean")
        return (wide if held is None else torch.where(held, plain, wide)).sum((-2, -1))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        alive = stats["count"] > EMPTY
        count = torch.where(alive, stats["count"], 1.0)
        scale, log = torch.where(alive, stats["scale"], 1.0) / count, torch.where(alive, stats["log"], -1.0) / count
        mean = (torch.where(alive, stats["total"], 1.0) / count).clamp(min=torch.finfo(self.dtype).tiny)
        gap, held = scale.log() - log, self.held("log_mean")
        if stats.mixed:
            mean, gap = mean / scale, scale - 1 - log
        elif held is not None:
            gap = torch.where(held, scale - 1 - log, gap)
        dispersion = -shape_from_gap(gap, 1 / _MOST, 1 / _LEAST).log()
        new = {"log_mean": mean.log(), "log_dispersion": dispersion}
        return {
            name: self.keep_frozen(name, torch.where(alive, value.to(self.dtype), getattr(self, name)))
            for name, value in new.items()
        }

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """Means and dispersions that have the mean and variance of the observations of each state."""
        lead = len(self.replicas)
        x, seen = self.entries(batch)
        flat = expected.reshape(*expected.shape[:lead], -1, self._k).mT.to(torch.float64)
        count, total, square = (flat @ torch.where(seen, power, 0.0) for power in (torch.ones_like(x), x, x * x))
        # A little of the mean of all, so that none is zero.
        count, total, square = (
            leaf + SMOOTH * leaf.mean(lead, keepdim=True) + EMPTY * torch.ones_like(leaf)
            for leaf in (count, total, square)
        )
        mean = (total / count).clamp(min=torch.finfo(self.dtype).tiny)
        excess = (square / count - mean.square() - mean) / mean.square()
        new = {"log_mean": mean.log(), "log_dispersion": excess.clamp(min=0.01, max=_MOST).log()}
        return {name: self.keep_frozen(name, value.to(self.dtype)) for name, value in new.items()}

    def project(self) -> None:
        self.log_dispersion.data = self.log_dispersion.data.clamp(min=math.log(_LEAST), max=math.log(_MOST))

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def outcomes(self) -> list[Tensor | None]:
        return self._counted(self.means)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        size = self._size().detach()[z]
        rates = torch._standard_gamma(size, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        rates = rates / size * self.wide("log_mean").detach().exp()[z]
        return torch.poisson(rates, generator=generator).to(self.dtype)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.poisson(12 * torch.rand(30, 2, generator=generator, dtype=torch.float64) ** 2, generator=generator)
        holes = torch.rand(30, 2, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 2).double()
            family.means = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 4 + 1
            family.dispersions = torch.rand(3, 2, generator=generator, dtype=torch.float64) + 0.3
            found.append((family, Batch(data)))
        return found
