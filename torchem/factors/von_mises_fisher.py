"""Directions: unit vectors about a mean direction of each state."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchem.batch import Batch, as_tensor, entry_place, values_known
from torchem.errors import invalid, invalid_entry
from torchem.factor import ExponentialFamily, Factor, FamilyPass, Kernel
from torchem.factors._directions import LEAST, assign_concentrations, check_sizes, movable, selected
from torchem.ops import directional
from torchem.ops.missing import any_missing
from torchem.stats import Stats

#: How far the length of a row may be from one: rounding of float32, and of numbers that were written with five digits.
_UNIT = 1e-4


class VonMisesFisher(ExponentialFamily):
    """Von Mises–Fisher distributions of unit vectors, one per state: directions on the circle, the sphere, and beyond.

    log p(x | k) = κ_k μ_kᵀx + ν log κ_k − (ν + 1) log 2π − log I_ν(κ_k), ν = D/2 − 1, with respect to the surface of
    the unit sphere in D dimensions.

    For D = 2 it is the von Mises distribution on the circle; `VonMises` takes angles. It starts at concentrations of
    one, about the first axis.

    *Missing entries* are NaN. Of a row that misses m of its D entries the others (o) leave ρ = √(1 − |x_o|²) to these,
    whose direction is again of this family, with the concentration s = κ ρ |μ_m|; so

        p(x_o | k) = C_D(κ) exp(κ μ_oᵀx_o) ρ^{m−2} (2π)^{m/2} I_{m/2−1}(s) / s^{m/2−1},   with respect to dx_o,
        E[x_m | x_o, k] = ρ A_m(s) μ_m / |μ_m|.

    Where |x_o| = 1 nothing is left to what is missing, and ρ² is taken as 2⁻⁵². A row without an entry says nothing.

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

    Source: A. Banerjee, I. S. Dhillon, J. Ghosh, S. Sra (2005); K. V. Mardia, P. E. Jupp (2000), section 9.3.2. The
    marginal is the integral of the density over the directions of x_m, itself a normaliser of the family.

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
        x = batch.x.detach().to(torch.float64)
        length, partly = x.nan_to_num(nan=0.0).norm(dim=-1), x.isnan().any(-1)
        if bool((bad := torch.where(partly, length - 1, (length - 1).abs()) > _UNIT).any()):
            index = tuple(bad.nonzero()[0].tolist())
            kind = "unit vectors in rows, and at most of length one where entries are missing"
            raise invalid_entry(
                kind if bool(partly[index]) else "unit vectors in rows", f"length {float(length[index]):.6g}",
                entry_place(index, x.dim()), "normalise: x / x.norm(dim=-1, keepdim=True)",
            )  # fmt: skip

    # ---- the family -------------------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        """x, zero where an entry is missing, and whether any was seen, ``[*n, D + 1]``."""
        x = batch.x.to(self.dtype)
        missing = x.isnan()
        return torch.cat([torch.where(missing, 0.0, x), (~missing.all(-1, keepdim=True)).to(x)], -1)

    def natural(self) -> tuple[Tensor, Tensor]:
        eta = self._natural().to(self.dtype)
        return eta, torch.zeros_like(eta[..., 0])

    def _natural(self) -> Tensor:
        """κ μ and −log C ``[*r, K, D + 1]`` in float64: for large κ their sums cancel."""
        kappa = self.log_concentration.to(torch.float64).exp()
        normalizer = kappa + directional.log_normalizer(self._d, kappa)
        eta = kappa.unsqueeze(-1) * _unit(self.direction.to(torch.float64))
        return torch.cat([eta, -normalizer.unsqueeze(-1)], -1)

    def kernel(self) -> Kernel:
        return _DirectionsPass(self)

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

    # ---- what is missing --------------------------------------------------------------------------------------

    def marginal(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows ``[n, D]`` with missing entries, in float64, each ``[*r, n, K]``.

        Returns:
            log p(x_o | k); the factor of μ_m in E[x_m | x_o, k], κ ρ² A_m(s) / s, which is finite at s = 0; and s.
        """
        holes = x.isnan()
        seen, count = torch.where(holes, 0.0, x.to(torch.float64)), holes.sum(-1)
        kappa, mean = self.log_concentration.to(torch.float64).exp().unsqueeze(-2), self._means()
        left = (1 - seen.square().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float64).eps)
        # Derivatives of a square root are finite away from zero; those of what follows vanish there.
        length = (holes.to(mean) @ mean.square().mT).clamp(min=1e-300).sqrt()
        s = kappa * left.sqrt() * length
        log_norm, ratio = torch.zeros_like(s), torch.zeros_like(s)
        # The order of the Bessel functions is that of the number of missing entries.
        known = torch.arange(1, self._d + 1).tolist() if not values_known() else count.unique().tolist()
        for m in known:
            if m > 0:
                own = (count == m).unsqueeze(-1)
                log_norm = torch.where(own, directional.log_normalizer(m, s), log_norm)
                ratio = torch.where(own, directional.bessel_ratio(m / 2 - 1, s), ratio)
        whole = directional.log_normalizer(self._d, kappa)
        away = seen @ mean.mT + left.sqrt() * length - 1
        density = kappa * away - whole + log_norm + (count.unsqueeze(-1) / 2 - 1) * left.log()
        return torch.where(holes.all(-1, keepdim=True), 0.0, density), kappa * left * ratio, s

    def _means(self) -> Tensor:
        return _unit(self.direction.to(torch.float64))

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, mean, covariance = self._given(batch)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        missing = x.isnan().unsqueeze(-2)
        mean = torch.where(missing, mean, x.to(mean).unsqueeze(-2))
        mean, variance = (v.to(self.dtype).unflatten(-3, batch.x.shape[:-1]) for v in (mean, variance))
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        return self._given(batch)[2].to(self.dtype).unflatten(-4, batch.x.shape[:-1])

    def _given(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[n, D]``, means ``[*r, n, K, D]`` and covariances ``[*r, n, K, D, D]`` of what they miss."""
        x = batch.x.reshape(-1, self._d)
        holes = x.isnan()
        _, pull, _ = self.marginal(x)
        hidden = torch.where(holes.unsqueeze(-2), self._means().unsqueeze(-3), 0.0)
        mean = pull.unsqueeze(-1) * hidden
        # E v vᵀ = τ I + (1 − m τ) u uᵀ, with τ = A_m(s) / s, of a direction v about u in m dimensions; x_m = ρ v.
        left = 1 - torch.where(holes, 0.0, x.to(torch.float64)).square().sum(-1).clamp(max=1.0)
        tau = pull / self.log_concentration.to(torch.float64).exp().unsqueeze(-2)
        along = left.unsqueeze(-1) - holes.sum(-1, keepdim=True) * tau
        size = hidden.square().sum(-1).clamp(min=1e-300)
        second = tau.unsqueeze(-1).unsqueeze(-1) * torch.diag_embed(holes.to(tau)).unsqueeze(-3)
        outer = hidden.unsqueeze(-1) * hidden.unsqueeze(-2)
        second = second + (along / size)[..., None, None] * outer - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return x, mean, second

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        """Missing entries along their mean, as long as the row leaves them: it is then a unit vector."""
        holes = rows.x.isnan()
        some = torch.where(holes, value, 0.0)
        # Of a mean without a direction any direction is as good: the first column that is missing.
        first = nn.functional.one_hot(holes.to(torch.uint8).argmax(-1), self._d).to(some)
        some = torch.where((some.square().sum(-1, keepdim=True) > 0), some, torch.where(holes, first, 0.0))
        left = (1 - torch.where(holes, 0.0, rows.x.to(some)).square().sum(-1, keepdim=True)).clamp(min=0.0)
        return torch.where(holes, _unit(some) * left.sqrt(), value)

    @torch.no_grad()
    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Directions of what is missing, drawn from their own law, as long as the row leaves them."""
        x, drawn = batch.x, batch.x.clone()
        holes = x.isnan()
        s = self.marginal(x)[2].gather(-1, z.unsqueeze(-1)).squeeze(-1)
        for m in holes.sum(-1).unique().tolist():
            rows = (holes.sum(-1) == m).nonzero()[:, 0]
            if m == 0:
                continue
            own, among = s[rows], holes[rows]
            # The mean may have no share in these columns: then s = 0, and any direction is as good.
            mean = torch.where(among, self._means()[z[rows]], 0.0)
            first = nn.functional.one_hot(among.to(torch.uint8).argmax(-1), self._d).to(mean)
            mean = _unit(torch.where(mean.square().sum(-1, keepdim=True) > 0, mean, first))
            noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
            if m == 1:
                ahead = torch.rand(own.shape, dtype=own.dtype, device=own.device, generator=generator)
                way = torch.where((ahead < (2 * own).sigmoid()).unsqueeze(-1), mean, -mean)
            else:
                distance = directional.draw_distance(m, own, generator).unsqueeze(-1)
                noise = torch.where(among, noise, 0.0)
                across = _unit(noise - (noise * mean).sum(-1, keepdim=True) * mean)
                way = (1 - distance) * mean + (distance * (2 - distance)).sqrt() * across
            left = 1 - torch.where(among, 0.0, x[rows].to(mean)).square().sum(-1, keepdim=True).clamp(max=1.0)
            drawn[rows] = torch.where(among, (left.sqrt() * way).to(x), x[rows])
        return drawn

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
        """Directions in space, some of them missing, and entries of others."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, 3).double()
        family.directions = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        family.concentrations = [0.7, 3.0, 8.0]
        x = _unit(torch.randn(40, 3, generator=generator, dtype=torch.float64))
        x[5::9] = x[2::7, 1] = x[4::11, :2] = torch.nan
        return family, Batch(x)


class _DirectionsPass(FamilyPass):
    """A pass in which rows with missing entries have marginal densities and expected features."""

    family: VonMisesFisher

    def log_potential(self, batch: Batch) -> Tensor:
        value, family = super().log_potential(batch), self.family
        self.pull: Tensor | None = None
        if not any_missing(batch.x):
            return value
        x = batch.x.reshape(-1, family.n_features)
        self.holes = x.isnan()
        some = self.holes.any(-1) & ~self.holes.all(-1)
        self.rows = some.nonzero()[:, 0] if values_known() else torch.arange(len(x), device=x.device)
        if not len(self.rows):
            return value
        self.holes, some = self.holes[self.rows], some[self.rows].unsqueeze(-1)
        density, pull, _ = family.marginal(x[self.rows])
        self.pull = torch.where(some, pull, 0.0)
        flat = value.flatten(-1 - len(self.axes), -2)
        density = torch.where(some, density.to(flat), flat.index_select(-2, self.rows))
        return flat.index_copy(-2, self.rows, density).unflatten(-2, self.axes)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        super().collect(batch, expected)
        if self.pull is None:
            return
        flat = expected.flatten(-1 - len(self.axes), -2).index_select(-2, self.rows).to(torch.float64)
        # Σ γ E[x_m | x_o, k], column by column.
        share = (flat * self.pull).mT @ self.holes.to(torch.float64)
        self.total = self.total + nn.functional.pad(share * self.family._means(), (0, 1))


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()
