"""Multivariate t: a Gaussian whose observations have scales of their own, for data with outliers."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Adjustment, Factor, Kernel
from torchem.factors._composite import Composite
from torchem.factors.gaussian import CovarianceType, FloorType, Gaussian
from torchem.ops import gaussian as ops
from torchem.ops import missing
from torchem.ops.special import shape_from_gap
from torchem.stats import Stats

#: Degrees of freedom stay between these: the density of fewer has no use, more are a Gaussian's.
_LEAST, _MOST = 0.1, 1e4
#: What they start at: tails that notice outliers, and a variance.
_START = 10.0
#: Mass below which a component keeps its degrees of freedom.
_EMPTY = 1e-30


class StudentT(Composite):
    """Multivariate t distributions, one per state.

    log p(x | k) = log t_ν(x; μ_k, Σ_k) = log ∫ N(x; μ_k, Σ_k / u) Gamma(u; ν_k/2, ν_k/2) du.

    The scale u of an observation is latent: given the state its mean is (ν + D) / (ν + δ²), small for outliers, which
    so count little. Location and scale are those of the part ``normal``, the degrees of freedom ν are learnt for each
    state. Missing entries (NaN) are integrated out. Σ is not the covariance, which is Σ ν / (ν − 2) for ν > 2.

    *M-step.* The likelihood does not change when u has any mean α and Σ grows by it, so the bound may be taken at the
    best α: its maximum divides the scatter by Σ u instead of by the number of observations, and converges much faster
    than EM at α = 1, to which the M-step falls back where a covariance is shared or fixed, has a prior, or is floored.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        covariance_type: Of Σ; see `Gaussian`, as for the two that follow.
        covariance_floor: Least eigenvalue of Σ.
        floor_type: What that is relative to.

    Raises:
        InvalidArgument: For sizes below one or options that do not exist.

    Source: G. J. McLachlan, D. Peel (2000), chapter 7; C. Liu, D. B. Rubin, Y. N. Wu (1998) for the expansion.

    Example:
        >>> t = StudentT(1, 1)
        >>> t.freedom = [1.0]  # Cauchy
        >>> t.log_prob(Batch(torch.tensor([[0.0], [10.0]]))).exp()[:, 0]
        tensor([0.3183, 0.0032], grad_fn=<...>)
    """

    views: ClassVar = {"freedom": "log_freedom"}

    log_freedom: Tensor

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: CovarianceType = "full",
        covariance_floor: float = 1e-6,
        floor_type: FloorType = "relative",
    ):
        super().__init__()
        self.normal = Gaussian(n_components, n_features, covariance_type, covariance_floor, floor_type)
        self.covariance_type: CovarianceType = covariance_type
        self.covariance_floor = covariance_floor
        self.floor_type: FloorType = floor_type
        self.new_parameter("log_freedom", torch.full((n_components,), math.log(_START)))

    def parts(self) -> dict[str, Factor]:
        return {"normal": self.normal}

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int:
        return self.normal.n_components

    @property
    def n_features(self) -> int:
        return self.normal.n_features

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True."""
        return True

    @property
    def means(self) -> Tensor:
        """Locations ``[*r, K, D]``; assignable."""
        return self.normal.means

    @means.setter
    def means(self, value: Any) -> None:
        self.normal.means = value

    @property
    def scales(self) -> Tensor:
        """Σ in the shapes of `Gaussian.covariances`; assignable."""
        return self.normal.covariances

    @scales.setter
    def scales(self, value: Any) -> None:
        self.normal.covariances = value

    @property
    def freedom(self) -> Tensor:
        """Degrees of freedom ``[*r, K]``; assignable."""
        return self.log_freedom.exp()

    @freedom.setter
    def freedom(self, value: Any) -> None:
        freedom = as_tensor(value, "freedom").to(self.device, torch.float64)
        if freedom.shape != self.log_freedom.shape:
            raise invalid("freedom", f"shape {list(self.log_freedom.shape)}", list(freedom.shape), "one per component")
        if not bool(((freedom >= _LEAST) & (freedom <= _MOST)).all()):
            raise invalid(
                "freedom", f"numbers from {_LEAST} to {_MOST:g}", "one outside, or NaN",
                "beyond the largest a Gaussian is the same",
            )  # fmt: skip
        with torch.no_grad():
            self.log_freedom.copy_(freedom.log())

    def freeze(self, *names: str, mask: Tensor | None = None) -> "StudentT":
        """Keep views through every M-step: ``"freedom"``, ``"normal.means"``, ``"normal.covariances"``.

        Args:
            names: All of them when empty.
            mask: Boolean over the components, for exactly one name.
        """
        if "freedom" in names or not names:
            Factor.freeze(self, "freedom", mask=mask if len(names) == 1 else None)
        rest = tuple(name for name in names if name != "freedom")
        if rest or not names:
            super().freeze(*rest, mask=mask)
        return self

    def unfreeze(self, *names: str) -> "StudentT":
        """Let the M-step move these views (all of them when empty) again."""
        if "freedom" in names or not names:
            Factor.unfreeze(self, "freedom")
        rest = tuple(name for name in names if name != "freedom")
        if rest or not names:
            super().unfreeze(*rest)
        return self

    def paths(self) -> list[str]:
        return [*super().paths(), "freedom"]

    # ---- the distribution -------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        return self.normal.cast(x)

    def check(self, batch: Batch) -> None:
        self.normal.check(batch)

    def log_prob(self, batch: Batch) -> Tensor:
        return _StudentKernel(self, direct=True).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``normal`` under expectations times E u; ``count``, ``scale`` Σ E u and ``log`` Σ E log u, ``[*r, K]``."""
        kernel = _StudentKernel(self, direct=True)
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _StudentKernel(self, self.normal.direct)

    def row_size(self) -> int:
        return self.normal.row_size() + 4 * self.n_components

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and variances; these are infinite up to two degrees of freedom."""
        mean, spread = self.normal.moments(batch)
        freedom = self.freedom
        ratio = torch.where(freedom > 2, freedom / (freedom - 2), torch.inf)
        return mean, spread * ratio.reshape(*self.replicas, *[1] * (batch.x.dim() - 1), -1, 1)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of a t given o of its entries at distance δ: those of the normal part, variances times (ν + δ²)/(ν + o − 2).

        They are infinite up to two degrees of freedom in all; see `Factor.conditional`.
        """
        center, spread = self.normal.conditional(batch)
        # Where nothing is missing there is no variance, however it is scaled.
        return center, torch.where(spread > 0, spread * self._inflation(batch).unsqueeze(-1), 0.0)

    def conditional_covariance(self, batch: Batch) -> Tensor:
        spread = self.normal.conditional_covariance(batch)
        return torch.where(spread != 0, spread * self._inflation(batch)[..., None, None], 0.0)

    def _inflation(self, batch: Batch) -> Tensor:
        """E 1/u given the state and what was observed, ``[*r, *n, K]``."""
        shape, rate = self._posterior_scale(batch)
        return torch.where(shape > 1, rate / (shape - 1), torch.inf)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows with missing entries drawn: the scale given what was observed, then they given both."""
        pick = z.unsqueeze(-1)
        shape, rate = (value.detach().gather(-1, pick).to(torch.float64) for value in self._posterior_scale(batch))
        scale = torch._standard_gamma(shape, generator=generator) / rate  # pyright: ignore[reportPrivateImportUsage]
        center = self.normal.conditional(batch)[0].detach()
        center = center.gather(-2, pick.unsqueeze(-1).expand(-1, -1, center.shape[-1])).squeeze(-2)
        drawn = self.normal.complete(batch, z, generator)
        return torch.where(batch.x.isnan(), center + (drawn - center) * scale.rsqrt().to(center), batch.x)

    def _posterior_scale(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """u given the state and what was observed is Gamma((ν + o)/2, (ν + δ²)/2): both, ``[*r, *n, K]``."""
        kernel = _StudentKernel(self, direct=True)
        kernel.log_potential(batch)
        axes = batch.x.shape[:-1]
        size = (~batch.x.isnan()).sum(-1).reshape(-1).to(kernel.mean)
        shape = (kernel.freedom + size) / 2
        shape, rate = (v.mT.unflatten(-2, axes) for v in (shape, shape / kernel.mean))
        return shape, rate

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        half = self.freedom.detach().to(torch.float64)[z] / 2
        scale = torch._standard_gamma(half, generator=generator) / half  # pyright: ignore[reportPrivateImportUsage]
        mean = self.means.detach()[z]
        return mean + (self.normal.sample(z, None, generator) - mean) * scale.rsqrt().unsqueeze(-1).to(mean)

    # ---- EM ---------------------------------------------------------------------------------------------------

    @property
    def expands(self) -> bool:
        """Whether the bound is taken at the best mean of u, each component's own."""
        normal = self.normal
        coupled = "scale" in normal.shared_parameters
        return not coupled and normal.prior is None and normal.frozen("scale") is None

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """−½ Σ n log |Σ| − ½ (N + ν n) log α − (B + ν A) / 2α + n (½ν log ½ν − log Γ(½ν)) + ½ν L, at the best α or 1.

        With N = n D (or the entries observed), A = Σ u, B = Σ u δ², L = Σ log u, all expected.
        """
        normal, structure = self.normal, self.normal.structure
        count, scale, log = stats["count"], stats["scale"], stats["log"]
        raw, half = normal.scale.to(torch.float64), self.log_freedom.to(torch.float64).exp() / 2
        distance = self._distances(stats["normal"], normal.mean, raw)
        value = -0.5 * structure.normalizer(stats["normal"]["dof"], raw, self.n_components, self.n_features)
        own = count * (half * half.log() - half.lgamma()) + half * log
        if not self.expands or stats.mixed:
            return value + own.sum(-1) - (distance.sum(-1) + 2 * (half * scale).sum(-1)) / 2
        freedom = self._entries(stats) + 2 * half * count
        mean = (distance + 2 * half * scale) / freedom.clamp(min=_EMPTY)
        own = own - torch.where(count > _EMPTY, freedom * (mean.clamp(min=1e-300).log() + 1), 0.0) / 2
        return value + own.sum(-1)

    def _distances(self, stats: Stats, mean: Tensor, raw: Tensor) -> Tensor:
        """B, ``[*r, K or 1]``."""
        delta = (mean - self.normal.origin).to(torch.float64)
        scatter = self.normal.structure.scatter(stats["count"], stats["first"], stats["second"], delta)
        return self.normal.structure.traces(raw.to(torch.float64), scatter)

    def _entries(self, stats: Stats) -> Tensor:
        """N, ``[*r, K]``."""
        dof = stats["normal"]["dof"]
        return dof.sum(-1) if self._entrywise else dof * self.n_features

    @property
    def _entrywise(self) -> bool:
        return isinstance(self.normal.structure, ops.Entrywise)

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        normal = stats["normal"]
        alive = stats["count"] > _EMPTY
        count = torch.where(alive, stats["count"], 1.0)
        ratio, log = torch.where(alive, stats["scale"], 1.0) / count, torch.where(alive, stats["log"], -1.0) / count
        values = self.normal.maximize(normal)
        target = ratio - 1 - log
        if self.expands and not stats.mixed:
            each = ratio.unsqueeze(-1) if self._entrywise else ratio
            wider = self.normal.maximize(normal.like({**normal, "dof": normal["dof"] * each}))
            # Where nothing was floored the scatter is what the covariance says.
            expected = ratio * self._entries(stats)
            found = self._distances(normal, wider["mean"], wider["scale"])
            tolerance = 1e-6 if self.dtype == torch.float64 else 1e-3
            free = (found - expected).abs() <= tolerance * expected
            target = torch.where(free, ratio.log() - log, target)
            shape = free.reshape(*free.shape, *[1] * (wider["scale"].dim() - free.dim()))
            values["scale"] = torch.where(shape, wider["scale"], values["scale"])
        freedom = torch.where(alive, _freedom(target).log().to(self.dtype), self.log_freedom)
        return {"log_freedom": self.keep_frozen("log_freedom", freedom)} | self.joined({"normal": values})

    def opened(self, stats: Stats) -> dict[str, Stats]:
        return {"normal": stats["normal"]}

    def penalized(self, stats: Stats) -> Stats:
        return stats.like({**stats, "normal": self.normal.penalized(stats["normal"])})

    def project(self) -> None:
        super().project()
        if self.frozen("log_freedom") is None:
            # An M-step would end there, too, and lower what a point beyond has gained.
            self.log_freedom.data.clamp_(math.log(_LEAST), math.log(_MOST))

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        found = self.normal.tune(rows, iteration)
        if found is None or found.move is None:
            return found
        move = found.move
        return Adjustment(lambda stats: stats.like({**stats, "normal": move(stats["normal"])}), found.retake)

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """Those of a Gaussian; degrees of freedom stay."""
        return {"log_freedom": self.log_freedom} | self.joined({"normal": self.normal.initialize(batch, expected)})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return {"log_freedom": self.log_freedom} | self.joined({"normal": self.normal.initialize_at(batch, index)})

    def replace_components(self, which: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own = torch.where(which, values["log_freedom"], self.log_freedom)
        return {"log_freedom": own} | super().replace_components(which, values)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        mask = self.frozen("log_freedom")
        kept = 0 if mask is None else int(mask.expand(self.n_components).sum())
        return self.normal.n_parameters() + self.n_components - kept

    def select(self, keep: Tensor) -> "StudentT":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = StudentT(len(index), self.n_features, self.covariance_type, self.covariance_floor, self.floor_type)
        small = small.to(self.device, self.dtype)
        small.normal = self.normal.pruned(keep)
        small.log_freedom.data = self.log_freedom.detach()[index].clone()
        mask = self.frozen("log_freedom")
        if mask is not None:
            small.register_buffer("frozen_log_freedom", mask[index] if mask.dim() else mask)
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Full and diagonal scales, complete rows and some with missing entries; a shared scale."""
        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
        x[::9] *= 6
        holes = torch.rand(40, 2, generator=generator) < 0.2
        cases: list[tuple[CovarianceType, Tensor]] = [
            ("full", x), ("full", x.masked_fill(holes, torch.nan)), ("diag", x.masked_fill(holes, torch.nan)),
            ("tied", x),
        ]  # fmt: skip
        found: list[tuple[Factor, Batch]] = []
        for kind, data in cases:
            family = cls(3, 2, kind).double()
            family.means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
            family.normal.scale.data = (
                0.3 * torch.randn(family.normal.scale.shape, generator=generator, dtype=torch.float64).tril()
            )
            family.freedom = [2.5, 4.0, 8.0]
            found.append((family, Batch(data)))
        return found


def _freedom(target: Tensor) -> Tensor:
    """ν with log ½ν − ψ(½ν) = target, within bounds."""
    return 2 * shape_from_gap(target, _LEAST / 2, _MOST / 2)


class _StudentKernel(Kernel):
    """A pass of the Gaussian; distances tell the scales of the observations."""

    def __init__(self, factor: StudentT, direct: bool):
        self.factor, normal = factor, factor.normal
        self.sweep = normal._pass(direct)
        self.structure, self.d = normal.structure, normal.n_features
        self.freedom = factor.freedom.unsqueeze(-1)
        self.log_det = normal.structure.log_det(normal.scale, normal.n_components, self.d).unsqueeze(-1)
        self.arguments = (
            normal.mean,
            normal.structure.raw(2 * normal.structure.covariances(normal.scale)),
            normal.origin,
        )
        self.count: Tensor | float = 0.0
        self.scale: Tensor | float = 0.0
        self.log: Tensor | float = 0.0
        self.dof: Tensor | float = 0.0

    def log_potential(self, batch: Batch) -> Tensor:
        x = batch.x if batch.observed is None else torch.where(batch.observed, batch.x, torch.nan)
        self.axes = x.shape[:-1]
        flat = x.reshape(-1, self.d)
        value = self.sweep.log_prob(flat)
        self.seen: Tensor | None = None
        size, log_det = torch.full_like(value[..., :1], self.d), self.log_det
        if missing.any_missing(flat):
            self.seen = ~flat.isnan()
            size = self.seen.sum(-1).to(value)
            # Two normal densities of what was observed tell its distance and its determinant apart.
            wide = missing.Pass(self.structure, *self.arguments, True).log_prob(flat)
            distance = 4 * (wide - value) + 2 * math.log(2) * size
            log_det = -2 * value - distance - size * ops.LOG_2PI
        else:
            distance = -2 * value - (log_det + self.d * ops.LOG_2PI)
        distance = distance.clamp(min=0.0)
        half = (self.freedom + size) / 2
        # One logarithm of each distance serves the density and the expected logarithm of the scale.
        beyond = (distance / self.freedom).log1p()
        self.mean = 2 * half / (self.freedom + distance)
        self.mean_log = half.digamma() - (self.freedom / 2).log() - beyond
        value = (ops.student_constant(log_det, size, self.freedom) - half * beyond).mT
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        if len(self.axes) != 1:
            expected = expected.flatten(-1 - len(self.axes), -2)
        weight = expected.mT
        if self.seen is not None:  # nothing seen is nothing said
            weight = torch.where(self.seen.any(-1), weight, 0.0)
        scaled, total = weight * self.mean, weight.sum(-1, dtype=torch.float64)
        self.sweep.collect(scaled, weight)
        self.count = self.count + total
        self.scale = self.scale + scaled.sum(-1, dtype=torch.float64)
        self.log = self.log + (weight * self.mean_log).sum(-1, dtype=torch.float64)
        if self.seen is not None and isinstance(self.structure, ops.Entrywise):
            self.dof = self.dof + (weight @ self.seen.to(weight)).to(torch.float64)
        else:
            self.dof = self.dof + self.structure.counts(total, self.d)

    def stats(self) -> Stats:
        count, first, second = self.sweep.moments()
        normal = Stats(
            count=count, dof=self.dof, first=first, second=second, shared=self.structure.shared,
            version=self.factor.normal.version,
        )  # fmt: skip
        return Stats(normal=normal, count=self.count, scale=self.scale, log=self.log)

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())
