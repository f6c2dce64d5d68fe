"""Directions: unit vectors about a mean direction of each state."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid
from torchem.factor import ExponentialFamily, Factor
from torchem.factors._directions import LEAST, assign_concentrations, check_sizes, movable, selected
from torchem.ops import directional
from torchem.stats import Stats

#: How far the length of a row may be from one: rounding of float32, and of numbers that were written with five digits.
_UNIT = 1e-4


class VonMisesFisher(ExponentialFamily):
    """Von Mises–Fisher distributions of unit vectors, one per state: directions on the circle, the sphere, and beyond.

    log p(x | k) = κ_k μ_kᵀx + ν log κ_k − (ν + 1) log 2π − log I_ν(κ_k), ν = D/2 − 1, with respect to the surface of
    the unit sphere in D dimensions.

    For D = 2 it is the von Mises distribution on the circle; `VonMises` takes angles. A row that is missing (NaN in all
    columns) says nothing. It starts at concentrations of one, about the first axis.

    *M-step.* With R = Σ γ x and n = Σ γ of a state: μ = R / |R|, and κ solves A_D(κ) = |R| / n by Newton's method.

    A component on a single direction would have an infinite concentration: it stays at ``concentration_cap``, the exact
    maximum under that bound, and is named in ``result.floored``. Components without any direction have 10⁻⁶. In float32
    concentrations beyond some 10⁴ lose digits of the density: use ``model.double()`` there.

    Args:
        n_components: K, the number of states.
        n_features: D, at least 2: the length of the vectors.
        concentration_cap: Largest concentration; 1/√κ is about the standard deviation of an angle, in radians.

    Raises:
        InvalidArgument: For sizes below these, or a cap that is not above one.

    Source: A. Banerjee, I. S. Dhillon, J. Ghosh, S. Sra (2005); K. V. Mardia, P. E. Jupp (2000), section 9.3.2.

    Example:
        >>> v = VonMisesFisher(2, 3)
        >>> v.directions, v.concentrations = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [1.0, 10.0]
        >>> v.log_prob(Batch(torch.tensor([[0.0, 0.0, 1.0]])))
        tensor([[-2.6925,  0.4647]], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "the normaliser of one over concentrations has no closed form"
    views: ClassVar = {"directions": "direction", "concentrations": "log_concentration"}
    handles_missing: ClassVar[bool] = True
    default_init: ClassVar[str] = "kmeans"

    direction: Tensor
    log_concentration: Tensor

    def __init__(self, n_components: int, n_features: int, concentration_cap: float = 1e6):
        super().__init__()
        check_sizes(n_components, n_features, concentration_cap, least=2)
        self._k, self._d, self.concentration_cap = n_components, n_features, concentration_cap
        self.new_parameter("direction", torch.eye(1, n_features).repeat(n_components, 1))
        self.new_parameter("log_concentration", torch.zeros(n_components))

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    @property
    def directions(self) -> Tensor:
        """Mean directions ``[*r, K, D]``, unit vectors; assignable, rows of any length but zero."""
        return _unit(self.direction)

    @directions.setter
    def directions(self, value: Any) -> None:
        value = as_tensor(value, "directions").to(self.device, torch.float64)
        if value.shape != self.direction.shape:
            raise invalid(
                "directions", f"shape {list(self.direction.shape)}", list(value.shape), "give one row per component"
            )
        if not bool(value.isfinite().all() & (value.norm(dim=-1) > 0).all()):
            raise invalid("directions", "finite rows that are not zero", "another one", "correct it")
        with torch.no_grad():
            self.direction.copy_(_unit(value))

    @property
    def concentrations(self) -> Tensor:
        """Concentrations κ ``[*r, K]``; assignable."""
        return self.log_concentration.exp()

    @concentrations.setter
    def concentrations(self, value: Any) -> None:
        assign_concentrations(self.log_concentration, value, self.concentration_cap)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        if not values_known():
            return
        x = batch.x.detach().to(torch.float64).reshape(-1, self._d)
        length, missing = x.norm(dim=-1), x.isnan()
        partly = missing.any(-1) & ~missing.all(-1)
        if bool(partly.any()):
            raise invalid(
                "data", "directions that are whole, or missing in all columns",
                f"NaN in part of row {int(partly.nonzero()[0])}", "set the whole row to NaN",
            )  # fmt: skip
        if bool((bad := (length - 1).abs() > _UNIT).any()):
            row = int(bad.nonzero()[0])
            raise invalid(
                "data", "unit vectors in rows", f"length {float(length[row]):.6g} in row {row}",
                "normalise: x / x.norm(dim=-1, keepdim=True)",
            )  # fmt: skip

    # ---- the family -------------------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        """x, and whether it was seen, ``[*n, D + 1]``."""
        x = batch.x.to(self.dtype)
        missing = x.isnan()
        return torch.cat([torch.where(missing, 0.0, x), (~missing[..., :1]).to(x)], -1)

    def natural(self) -> tuple[Tensor, Tensor]:
        eta = self._natural().to(self.dtype)
        return eta, torch.zeros_like(eta[..., 0])

    def _natural(self) -> Tensor:
        """κ μ and −log C ``[*r, K, D + 1]`` in float64: for large κ their sums cancel."""
        kappa = self.log_concentration.to(torch.float64).exp()
        normalizer = kappa + directional.log_normalizer(self._d, kappa)
        eta = kappa.unsqueeze(-1) * _unit(self.direction.to(torch.float64))
        return torch.cat([eta, -normalizer.unsqueeze(-1)], -1)

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return (stats["features"] * self._natural()).sum((-2, -1))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        total, count = stats["features"][..., :-1], stats["features"][..., -1]
        alive = count > 0
        pointed = alive & (total.square().sum(-1) > 0)
        old = self.direction
        mean = torch.where(pointed.unsqueeze(-1), total, old.to(torch.float64))
        direction = self.keep_frozen("direction", torch.where(pointed.unsqueeze(-1), _unit(mean).to(old.dtype), old))
        # Along the direction that is kept, or was found: the length of the mean vector.
        along = (_unit(direction.to(torch.float64)) * total).sum(-1)
        resultant = along / torch.where(alive, count, 1.0)
        kappa = directional.concentration(resultant, self._d, LEAST, self.concentration_cap)
        value = movable(alive, kappa, self.log_concentration)
        return {"direction": direction, "log_concentration": self.keep_frozen("log_concentration", value)}

    def project(self) -> None:
        self.log_concentration.data = self.log_concentration.data.exp().clamp(LEAST, self.concentration_cap).log()

    def degenerate(self) -> Tensor:
        return self.concentrations.detach() >= self.concentration_cap * (1 - 1e-5)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        kappa, d = self.log_concentration.to(torch.float64).exp(), self._d
        ratio = directional.bessel_ratio(d / 2 - 1, kappa).unsqueeze(-1)
        mean = ratio * kappa.unsqueeze(-1) * self.directions
        # E x xᵀ = ρ I + (1 − D ρ) μ μᵀ with ρ = A(κ) / κ.
        variance = ratio + (1 - d * ratio) * self.directions.square() - mean.square()
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self._k, d)
        return mean.to(self.dtype).reshape(shape), variance.to(self.dtype).reshape(shape)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        own = (("direction", self._d - 1), ("log_concentration", 1))
        masks = [(self.frozen(name), size) for name, size in own]
        return sum((self._k - (0 if m is None else int(m.expand(self._k).sum()))) * size for m, size in masks)

    def select(self, keep: Tensor) -> "VonMisesFisher":
        return selected(self, keep, lambda k: VonMisesFisher(k, self._d, self.concentration_cap))

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        mean = self.directions.detach().to(torch.float64)[z]
        kappa = self.concentrations.detach().to(torch.float64)[z]
        distance = directional.draw_distance(self._d, kappa, generator).unsqueeze(-1)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        across = _unit(noise - (noise * mean).sum(-1, keepdim=True) * mean)
        return ((1 - distance) * mean + (distance * (2 - distance)).sqrt() * across).to(self.dtype)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Directions in space, some of them missing."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, 3).double()
        family.directions = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        family.concentrations = [0.7, 3.0, 8.0]
        x = _unit(torch.randn(40, 3, generator=generator, dtype=torch.float64))
        x[5::9] = torch.nan
        return family, Batch(x)


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()
