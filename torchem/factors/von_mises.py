"""Independent columns of angles."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, refuse_entries
from torchem.errors import invalid
from torchem.factor import ExponentialFamily, Factor
from torchem.factors._directions import LEAST, assign_concentrations, check_sizes, movable, selected
from torchem.ops import directional
from torchem.stats import Stats


class VonMises(ExponentialFamily):
    """Independent von Mises columns given the state: angles in radians, whose ends meet.

    log p(x | k) = Σ_d κ_kd cos(x_d − μ_kd) − log 2π I₀(κ_kd), over the entries observed (NaN is missing).

    It is `VonMisesFisher` in two dimensions for each column. It starts at means of zero and concentrations of one.

    *M-step.* With C = Σ γ cos x, S = Σ γ sin x and n = Σ γ of a cell: μ = atan2(S, C), and κ solves
    I₁(κ) / I₀(κ) = √(C² + S²) / n by Newton's method.

    Angles have no mean as numbers have. What is missing is filled in by the mean direction, and ``variance=True`` gives
    the circular variance 1 − R, from 0 (certain) to 1 (anywhere); see `Factor.circular`.

    A component on a single angle stays at ``concentration_cap``, and is named in ``result.floored``. Components start
    at random data points, for clusters of numbers would be cut where the angles' ends meet. In float32 concentrations
    beyond some 10⁴ lose digits of the density: use ``model.double()`` there.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        concentration_cap: Largest concentration; 1/√κ is about the standard deviation, in radians.

    Raises:
        InvalidArgument: For sizes below one, or a cap that is not above one.

    Source: K. V. Mardia, P. E. Jupp (2000), sections 3.5.4 and 5.3.1.

    Example:
        >>> v = VonMises(2, 1)
        >>> v.means, v.concentrations = [[0.0], [3.0]], [[2.0], [5.0]]
        >>> v.log_prob(Batch(torch.tensor([[-3.0]])))
        tensor([[-4.6419, -0.3417]], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "the normaliser of one over concentrations has no closed form"
    views: ClassVar = {"means": "mean", "concentrations": "log_concentration"}
    handles_missing: ClassVar[bool] = True
    independent = True
    default_init: ClassVar[str] = "random_from_data"

    mean: Tensor
    log_concentration: Tensor

    def __init__(self, n_components: int, n_features: int, concentration_cap: float = 1e6):
        super().__init__()
        check_sizes(n_components, n_features, concentration_cap, least=1)
        self._k, self._d, self.concentration_cap = n_components, n_features, concentration_cap
        self.new_parameter("mean", torch.zeros(n_components, n_features))
        self.new_parameter("log_concentration", torch.zeros(n_components, n_features))

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    @property
    def means(self) -> Tensor:
        """Mean angles ``[*r, K, D]`` from −π to π; assignable, any angles."""
        return _wrapped(self.mean)

    @means.setter
    def means(self, value: Any) -> None:
        value = as_tensor(value, "means").to(self.device, torch.float64)
        if value.shape != self.mean.shape:
            raise invalid("means", f"shape {list(self.mean.shape)}", list(value.shape), "give one row per component")
        if not bool(value.isfinite().all()):
            raise invalid("means", "finite angles", "NaN or infinity", "correct that entry")
        with torch.no_grad():
            self.mean.copy_(_wrapped(value))

    @property
    def concentrations(self) -> Tensor:
        """Concentrations κ ``[*r, K, D]``; assignable."""
        return self.log_concentration.exp()

    @concentrations.setter
    def concentrations(self, value: Any) -> None:
        assign_concentrations(self.log_concentration, value, self.concentration_cap)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        remedy = "convert degrees (torch.deg2rad), and wrap what was unwrapped: torch.remainder(x, 2 * torch.pi)"
        bad = batch.x.detach().abs() > 2 * math.pi + 1e-3
        refuse_entries(batch, bad, "angles in radians, from −2π to 2π", remedy)

    # ---- the family -------------------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        """Cosines, sines, and what was seen, ``[*n, 3 D]`` in float64: κ times what a cosine is rounded by is a lot."""
        x = batch.x.to(torch.float64)
        missing = x.isnan()
        x, seen = torch.where(missing, 0.0, x), (~missing).to(x)
        return torch.cat([x.cos() * seen, x.sin() * seen, seen], -1)

    def natural(self) -> tuple[Tensor, Tensor]:
        eta = self._natural()
        return eta, torch.zeros_like(eta[..., 0])

    def _natural(self) -> Tensor:
        """κ cos μ, κ sin μ and −log 2π I₀(κ) ``[*r, K, 3 D]`` in float64: for large κ their sums cancel."""
        kappa, mean = self.log_concentration.to(torch.float64).exp(), self.mean.to(torch.float64)
        normalizer = kappa + directional.log_normalizer(2, kappa)
        return torch.cat([kappa * mean.cos(), kappa * mean.sin(), -normalizer], -1)

    def row_size(self) -> int:
        return 5 * self._d + 4 * self._k

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return (stats["features"] * self._natural()).sum((-2, -1))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        cosine, sine, count = stats["features"].split(self._d, -1)
        alive = count > 0
        pointed = alive & (cosine.square() + sine.square() > 0)
        old = self.mean.to(torch.float64)
        found = torch.atan2(torch.where(pointed, sine, old.sin()), torch.where(pointed, cosine, old.cos()))
        # The nearest of the angles that are the same: what extrapolates sees no jump.
        mean = torch.where(pointed, (old + _wrapped(found - old)).to(self.dtype), self.mean)
        mean = self.keep_frozen("mean", mean)
        angle = mean.to(torch.float64)
        resultant = (angle.cos() * cosine + angle.sin() * sine) / torch.where(alive, count, 1.0)
        kappa = directional.concentration(resultant, 2, LEAST, self.concentration_cap)
        value = movable(alive, kappa, self.log_concentration)
        return {"mean": mean, "log_concentration": self.keep_frozen("log_concentration", value)}

    def project(self) -> None:
        self.log_concentration.data = self.log_concentration.data.exp().clamp(LEAST, self.concentration_cap).log()

    def degenerate(self) -> Tensor:
        return (self.concentrations.detach() >= self.concentration_cap * (1 - 1e-5)).any(-1)

    # ---- what is missing --------------------------------------------------------------------------------------

    @property
    def circular(self) -> list[bool]:
        return [True] * self._d

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean direction and circular variance 1 − A(κ) of each entry, ``[*r, *n, K, D]``; 0 where it was observed."""
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self._k, self._d)
        spread = 1 - directional.mean_resultant(2, self.concentrations.to(torch.float64)).to(self.dtype)
        missing, x = batch.x.isnan().unsqueeze(-2), batch.x.to(self.dtype).unsqueeze(-2)
        return torch.where(missing, self.means.reshape(shape), x), torch.where(missing, spread.reshape(shape), 0.0)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        masks = [self.frozen(name) for name in self.views.values()]
        return sum((self._k - (0 if mask is None else int(mask.expand(self._k).sum()))) * self._d for mask in masks)

    def select(self, keep: Tensor) -> "VonMises":
        return selected(self, keep, lambda k: VonMises(k, self._d, self.concentration_cap))

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        kappa = self.concentrations.detach().to(torch.float64)[z]
        distance = directional.draw_distance(2, kappa.reshape(-1), generator).reshape(kappa.shape)
        side = torch.rand(kappa.shape, dtype=kappa.dtype, device=kappa.device, generator=generator) < 0.5
        angle = 2 * (distance / 2).clamp(max=1.0).sqrt().asin()  # 1 − cos α = 2 sin² ½α
        return _wrapped(self.means.detach()[z] + torch.where(side, angle, -angle)).to(self.dtype)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Two columns with missing entries."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, 2).double()
        family.means = 2 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
        family.concentrations = 0.5 + 5 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
        x = 2 * torch.pi * torch.rand(40, 2, generator=generator, dtype=torch.float64) - torch.pi
        holes = torch.rand(40, 2, generator=generator) < 0.2
        return family, Batch(x.masked_fill(holes, torch.nan))


def _wrapped(angle: Tensor) -> Tensor:
    """The same angle from −π to π; itself, bit for bit, where it lies there."""
    return torch.where(angle.abs() <= math.pi, angle, torch.remainder(angle + math.pi, 2 * math.pi) - math.pi)
