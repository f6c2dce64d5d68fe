"""Multivariate normal components with full, tied, diagonal or spherical covariances."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Adjustment, Conjugate, Factor, Kernel, Moments, Prior, Quadratic, normal_cdf
from torchem.factors._scale import column_variances
from torchem.ops import gaussian as ops
from torchem.ops import missing, tails
from torchem.ops.geometry import GEOMETRIES, NAMES
from torchem.priors import NormalInverseGamma, NormalInverseWishart
from torchem.stats import Stats

CovarianceType = Literal[
    "full", "tied", "diag", "spherical",
    "EII", "VII", "EEI", "VEI", "EVI", "VVI", "EEE", "VEE", "EVE", "VVE", "EEV", "VEV", "EVV", "VVV",
]  # fmt: skip
FloorType = Literal["relative", "absolute", "additive"]

#: Largest bound on the rounding of a log-density, in nats per feature, at which moments about one origin are used.
_TOLERANCE = {torch.float64: 2.5e-10, torch.float32: 5e-4}
#: A mean further than this many standard deviations from its origin asks for a new one.
_REACH = 30.0
#: Observations × components × features up to which differences cost no more than one product.
_SMALL = 1 << 16
#: Mass below which a component keeps its parameters.
_EMPTY = 1e-30
#: M-steps of a start from rows with missing entries: what they were first completed by is then forgotten.
_START = 4


class Gaussian(Factor, Conjugate):
    """Multivariate normal components.

    log N(x | μ_k, Σ_k) = −½ [(x − μ_k)ᵀ Σ_k⁻¹ (x − μ_k) + log |Σ_k| + D log 2π].

    NaN entries of x are missing at random: the density is the marginal of what was observed. Full and tied
    covariances complete the moments by conditional expectations; diagonal and spherical ones count entries,
    ``[*r, K, D]``, so that one M-step is exact.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        covariance_type: ``"full"`` [K, D, D], ``"tied"`` [D, D], ``"diag"`` [K, D] or ``"spherical"`` [K]; or a
            geometry Σ_k = λ_k D_k A_k D_kᵀ by mclust's letters for volume, shape and orientation, each E (equal), V
            (varying) or I (identity): ``"EII"``, ``"VII"`` [K], ``"EEI"``, ``"VEI"``, ``"EVI"``, ``"VVI"`` [K, D],
            ``"EEE"`` [D, D], ``"VEE"``, ``"EVE"``, ``"VVE"``, ``"EEV"``, ``"VEV"``, ``"EVV"``, ``"VVV"`` [K, D, D].
            VII, VVI, EEE and VVV are the first four in another order. What is assigned of the others is moved into the
            geometry when a fit begins; of them EII and EEI have a conjugate prior.
        covariance_floor: Smallest variance that the M-step allows.
        floor_type: ``"relative"``: eigenvalues of Δ^−½ Σ Δ^−½ are clipped at the floor, Δ the data's variance per
            column, which is the exact maximiser under that constraint and independent of units; ``"absolute"``:
            eigenvalues of Σ are clipped; ``"additive"``: the floor is added to every variance, scikit-learn's
            ``reg_covar`` (not exactly monotone).

    Raises:
        InvalidArgument: For sizes below one, an unknown option or a negative floor.

    Source: C. M. Bishop (2006), section 9.2; for the clip, M. Ingrassia (2004); for the geometries, G. Celeux,
        G. Govaert (1995).

    Example:
        >>> g = Gaussian(2, 3, covariance_type="diag")
        >>> g.covariances = torch.ones(2, 3)
        >>> g.log_prob(Batch(torch.zeros(5, 3))).shape
        torch.Size([5, 2])
    """

    views: ClassVar = {"means": "mean", "covariances": "scale"}
    splits: ClassVar = frozenset({"means", "covariances"})
    handles_missing: ClassVar[bool] = True
    default_init: ClassVar[str] = "kmeans"

    mean: Tensor
    scale: Tensor
    origin: Tensor
    unit: Tensor

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: CovarianceType = "full",
        covariance_floor: float = 1e-6,
        floor_type: FloorType = "relative",
    ):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        one_of("covariance_type", covariance_type, get_args(CovarianceType))
        one_of("floor_type", floor_type, ("relative", "absolute", "additive"))
        if not (isinstance(covariance_floor, (int, float)) and 0 <= covariance_floor < math.inf):
            raise invalid("covariance_floor", "a finite number of at least 0", covariance_floor, "use the default 1e-6")
        self._k, self._d = n_components, n_features
        self.covariance_type: CovarianceType = covariance_type
        self.covariance_floor = float(covariance_floor)
        self.floor_type: FloorType = floor_type
        #: What components share of their covariances, beyond what the structure says.
        self.geometry = GEOMETRIES.get(covariance_type)
        name = NAMES.get(covariance_type, covariance_type)
        self.structure = self.geometry.structure if self.geometry is not None else ops.STRUCTURES[name]
        coupled = self.structure.shared or self.geometry is not None
        self.shared_parameters = frozenset({"scale"} if coupled else ())
        self.new_parameter("mean", torch.zeros(n_components, n_features))
        self.new_parameter("scale", torch.zeros(self.structure.shape(n_components, n_features)))
        self.new_buffer("origin", torch.zeros(1, n_features))
        self.register_buffer("unit", torch.ones(n_features))
        #: Whether potentials go through features about one origin (fast) or differences (always exact).
        self.direct = True
        #: Counts the changes of origin; statistics of different versions do not add.
        self.version = 0

    def replicate(self, replicas: int) -> None:
        # A common origin stays common: all replicas then share one set of features.
        origin = self.origin
        super().replicate(replicas)
        if origin.shape[-2] == 1:
            self.origin = origin

    def refresh(self) -> None:
        self.direct, self.version = True, self.version + 1

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    @property
    def means(self) -> Tensor:
        """Means ``[*r, K, D]``; assignable."""
        return self.mean

    @means.setter
    def means(self, value: Any) -> None:
        means = as_tensor(value, "means").to(self.device, torch.float64)
        if means.shape != self.mean.shape:
            raise invalid("means", f"shape {list(self.mean.shape)}", list(means.shape), "give one row per component")
        if not bool(means.isfinite().all()):
            raise invalid("means", "finite numbers", "NaN or infinity", "correct that entry")
        with torch.no_grad():
            self.mean.copy_(means)
            self.origin = means.reshape(-1, self._d).mean(0, keepdim=True).to(self.dtype)
        self.direct, self.version = True, self.version + 1

    @property
    def covariances(self) -> Tensor:
        """Covariances in scikit-learn's shapes; assignable, must be symmetric and positive definite."""
        return self.structure.covariances(self.scale)

    @covariances.setter
    def covariances(self, value: Any) -> None:
        covariances = as_tensor(value, "covariances").to(self.device, torch.float64)
        if covariances.shape != self.scale.shape:
            raise invalid(
                "covariances", f"shape {list(self.scale.shape)} ({self.covariance_type})", list(covariances.shape),
                "see covariance_type for the shape",
            )  # fmt: skip
        if not isinstance(self.structure, ops.Entrywise):
            size = covariances.abs().amax() + torch.finfo(torch.float64).tiny
            if bool(((covariances - covariances.mT).abs() > 1e-5 * size).any()):
                raise invalid("covariances", "symmetric matrices", "an asymmetric one", "pass (C + C.mT) / 2")
            covariances = (covariances + covariances.mT) / 2
        raw = self.structure.raw(covariances)
        if not bool(raw.isfinite().all()):
            raise invalid("covariances", "positive definite matrices", "one that is not", "add a small multiple of I")
        with torch.no_grad():
            self.scale.copy_(raw)
        self.direct = True

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        x = _observed(batch)
        value = self._pass(direct=True).log_prob(x.reshape(-1, self._d))
        return value.mT.unflatten(-2, x.shape[:-1])

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count``, ``dof`` [*r, K] or [*r, K, D], ``first`` [*r, K, D] and ``second`` about the origin."""
        sweep = self._pass(direct=True)
        sweep.read(_observed(batch).reshape(-1, self._d))
        sweep.collect(expected.reshape(*self.replicas, -1, self._k).mT)
        return self._stats(sweep)

    def _pass(self, direct: bool) -> missing.Pass:
        return missing.Pass(self.structure, self.mean, self.scale, self.origin, direct)

    def _stats(self, sweep: missing.Pass) -> Stats:
        count, first, second = sweep.moments()
        # Two counts, for the mean and for the log-determinant: a normal–inverse-Wishart prior differs in them.
        return Stats(
            count=count, dof=count, first=first, second=second, shared=self.structure.shared, version=self.version
        )

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and marginal variances, ``[*r, 1s, K, D]``."""
        lead, ones = self.replicas, [1] * (batch.x.dim() - 1)
        variance = self.structure.variances(self.scale, self._k, self._d)
        return self.means.reshape(*lead, *ones, self._k, self._d), variance.reshape(*lead, *ones, self._k, self._d)

    def cdf(self, batch: Batch) -> Tensor:
        return normal_cdf(*self.moments(batch))(batch.x)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return normal_cdf(*self.conditional(batch))

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of every entry under each component, given the entries of its row that were observed.

        Args:
            batch: Rows ``[*n, D]``, NaN where an entry is missing.

        Returns:
            Both ``[*r, *n, K, D]``; an observed entry is its own mean, without variance.

        Example:
            >>> g = Gaussian(1, 2)
            >>> g.covariances = [[[1.0, 0.5], [0.5, 1.0]]]
            >>> mean, variance = g.conditional(Batch(torch.tensor([[2.0, torch.nan]])))
            >>> mean.tolist(), variance.tolist()
            ([[[2.0, 1.0]]], [[[0.0, 0.75]]])
        """
        x = _observed(batch)
        found = missing.conditional(self.structure, self.mean, self.scale, x.reshape(-1, self._d))
        mean, variance = (value.to(self.dtype).transpose(-3, -2).unflatten(-3, x.shape[:-1]) for value in found)
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        x = _observed(batch)
        root = self.structure.dense(self.scale.to(torch.float64), self._k, self._d)
        return missing.left_over(root @ root.mT, x.reshape(-1, self._d)).to(self.dtype).unflatten(-4, x.shape[:-1])

    def tail(self, limit: Tensor, upper: bool) -> tails.Tail:
        """What lies at or beyond limits of each column, broadcast to ``[*r, …, K, D]``; see `torchem.ops.tails`."""
        scale = self.structure.variances(self.scale, self._k, self._d).sqrt()
        return tails.normal(tails.against(self.mean, limit), tails.against(scale, limit), limit, upper)

    def expected_tail(self, posterior: Stats, prior: Prior, limit: Tensor, upper: bool) -> tails.Tail:
        """`tail` of exp E log N, which is that at posterior means but for a constant."""
        log_p, first, second = self.tail(limit, upper)
        return log_p + tails.against(self._blur(posterior), limit), first, second

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows with missing entries drawn; see `Factor.complete`.

        A draw x* of all columns is moved by what its observed ones lack: x*_m + E[x_m | x_o] − E[x_m | x*_o] has the
        conditional law (for the difference of a normal vector from its regression is independent of what it is
        regressed on).

        Source: A. G. Journel, Ch. J. Huijbregts (1978), chapter VII.
        """
        x = batch.x.to(torch.float64)
        drawn = self.sample(z, None, generator).to(torch.float64)
        if not isinstance(self.structure, ops.Entrywise):
            mean, scale = self.mean.detach().to(torch.float64), self.scale.detach().to(torch.float64)
            for k in range(self._k):
                own = (z == k).nonzero()[:, 0]
                if not len(own):
                    continue
                part, raw = slice(k, k + 1), scale if self.structure.shared else scale[k : k + 1]
                moved = mean[k] + x[own] - drawn[own]
                drawn[own] += missing.conditional(self.structure, mean[part], raw, moved)[0][0] - mean[k]
        return torch.where(batch.x.isnan(), drawn.to(batch.x), batch.x)

    def kernel(self) -> Kernel:
        return _GaussianKernel(self)

    def row_size(self) -> int:
        if self.direct:
            return 3 * self._k * self._d + 4 * self._k
        return self.structure.n_features(self._d) + 2 * self._d + 4 * self._k

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count, mass = self.structure.by_column(stats["count"]), self.structure.mass(stats["dof"])
        origin = self.origin.to(torch.float64)
        mean = origin + stats["first"] / count.clamp(min=_EMPTY)
        mean = torch.where(count > _EMPTY, mean, self.mean.to(torch.float64))
        mean = self.keep_frozen("mean", mean).to(torch.float64)
        scatter = self.structure.scatter(stats["count"], stats["first"], stats["second"], mean - origin)
        if self.geometry is not None:
            if self.floor_type == "additive":
                more = self.structure.add(torch.zeros_like(scatter), self.covariance_floor)
                scatter = scatter + self.structure.multiplied(more, mass)
            raw = self.structure.raw(self._shaped(scatter, stats["dof"], self.scale)).to(self.dtype)
            return {"mean": mean.to(self.dtype), "scale": self.keep_frozen("scale", raw)}
        covariances = self.structure.divided(scatter, mass.clamp(min=_EMPTY))
        raw = self.structure.raw(self._floored(covariances))
        # What received no mass stays; a covariance that is shared, as long as no component has any.
        enough = mass > _EMPTY
        event = raw.dim() - enough.dim()
        raw = torch.where(enough.reshape(*enough.shape, *[1] * event), raw.to(self.dtype), self.scale)
        return {"mean": mean.to(self.dtype), "scale": self.keep_frozen("scale", raw)}

    def _shaped(self, scatter: Tensor, dof: Tensor, raw: Tensor) -> Tensor:
        """Covariances of the geometry from their scatter, beginning at those of ``raw``."""
        assert self.geometry is not None
        floor = max(0.0 if self.floor_type == "additive" else self.covariance_floor, 1e-15)
        before = self.structure.covariances(raw.to(torch.float64))
        return self.geometry.estimate(scatter, dof, before, self._unit(), floor)

    def _nearest(self, raw: Tensor) -> Tensor:
        """Covariances of the geometry that are most likely for data with those of ``raw``."""
        covariances = self.structure.covariances(raw.to(torch.float64))
        ones = covariances.new_ones(*self.replicas, self._k)
        dof = self.structure.counts(ones, self._d)
        return self._shaped(self.structure.multiplied(covariances, self.structure.mass(dof)), dof, raw)

    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.geometry is not None:  # optimisers may leave it
            values = {**values, "scale": self.structure.raw(self._nearest(values["scale"])).to(values["scale"])}
        return super().kept(values)

    def _unit(self) -> Tensor:
        unit = self.unit.to(torch.float64)
        unit = unit if self.floor_type == "relative" else torch.ones_like(unit)
        return unit if self.geometry is None else self.geometry.unit(unit)

    def _floored(self, covariances: Tensor) -> Tensor:
        if self.floor_type == "additive":
            return self.structure.add(covariances, self.covariance_floor)
        # Even without a floor the M-step stays inside the floating-point cone of positive definite matrices.
        return self.structure.clip(covariances, self._unit(), max(self.covariance_floor, 1e-15))

    def expected_log_prob(self, stats: Stats) -> Tensor:
        delta = (self.mean - self.origin).to(torch.float64)
        raw = self.scale.to(torch.float64)
        scatter = self.structure.scatter(stats["count"], stats["first"], stats["second"], delta)
        normalizer = self.structure.normalizer(stats["dof"], raw, self._k, self._d)
        return -0.5 * (normalizer + self.structure.trace(raw, scatter))

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """An M-step; where entries are missing, EM under these responsibilities from the moments of the data."""
        if not missing.any_missing(_observed(batch)):
            return super().initialize(batch, expected)
        start = copy.deepcopy(self)
        unit = self.structure.clip(torch.zeros_like(self.covariances), self.unit, 1.0)
        values = {"mean": self.origin.expand_as(self.mean), "scale": self.structure.raw(unit)}
        for _ in range(_START):
            for name, value in values.items():
                getattr(start, name).data = self.keep_frozen(name, value)
            values = start.maximize(start.gather(batch, expected))
        return values

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Means at the chosen observations, covariances of the whole data."""
        size = len(batch)
        even = torch.full((*index.shape[:-1], size, self._k), 1.0 / size, dtype=self.dtype, device=batch.x.device)
        if batch.weight is not None:
            even = even * batch.weight.unsqueeze(-1).to(even)
        values = self.initialize(batch, even)
        chosen = _observed(batch).to(self.dtype)[index]
        # What an observation misses is at the mean of the data.
        return {**values, "mean": self.keep_frozen("mean", torch.where(chosen.isnan(), values["mean"], chosen))}

    def prepare(self, moments: Moments) -> None:
        self._learn(moments)
        super().prepare(moments)

    def _learn(self, moments: Moments) -> None:
        """Scale and origin from the moments of the data."""
        if moments.mean.shape != (self._d,):
            return
        unit = column_variances(moments, self.dtype)
        with torch.no_grad():
            self.unit = unit.to(self.unit)
            self.origin = moments.mean.to(self.origin).unsqueeze(0)
        self.direct, self.version = True, self.version + 1

    def project(self) -> None:
        if self.frozen("scale") is not None or (self.floor_type == "additive" and self.geometry is None):
            return
        with torch.no_grad():
            covariances = self.covariances.to(torch.float64)
            if self.geometry is None:
                clipped = self._floored(covariances)
                unit, floor = self._unit(), max(self.covariance_floor, 1e-15)
                changed = self.structure.below(covariances, self.scale, unit, floor, self._k)
            else:
                clipped = self._nearest(self.scale)
                # Of a geometry float32 keeps its own digits.
                tolerance = max(1e-9, 100 * torch.finfo(self.dtype).eps)
                changed = (clipped - covariances).abs() > tolerance * covariances.abs().amax()
            if bool(changed.any()):
                self.scale.data = self.structure.raw(clipped).to(self.scale)

    @torch.no_grad()
    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        retake = False
        small = rows * self._k * self._d <= _SMALL
        if small and iteration % 8 and iteration & (iteration - 1):
            return None  # the check costs as much as an iteration of so small a fit
        if small or self.structure.prefers_differences(self._k * math.prod(self.replicas), self._d):
            self.direct = True
        elif self.origin.numel() == self._d:  # one origin for all
            error = float(ops.rounding(self.structure, self.mean, self.scale, self.origin))
            before, self.direct = self.direct, not error <= _TOLERANCE.get(self.dtype, 0.0) * max(4, self._d)
            retake = self.direct and not before
        new = self.mean.detach().clone()
        if not self.direct or not float(ops.spread(self.structure, new, self.scale, self.origin)) > _REACH:
            return Adjustment(retake=True) if retake else None
        delta = (new - self.origin).to(torch.float64)
        self.origin, self.version = new, self.version + 1
        return Adjustment(lambda stats: self._translated(stats, delta), retake)

    def _translated(self, stats: Stats, delta: Tensor) -> Stats:
        """Statistics about an origin moved by ``delta``: t − nδ, tt − tδᵀ − δtᵀ + nδδᵀ."""
        count, first = stats["count"], stats["first"]
        second = self.structure.scatter(count, first, stats["second"], delta.expand_as(first))
        moved = first - self.structure.by_column(count) * delta
        out = stats.like({**stats, "first": moved, "second": second})
        out.version = self.version
        return out

    def degenerate(self) -> Tensor | None:
        unit = self._unit()
        least = self.structure.smallest(self.covariances.detach().to(torch.float64), unit, self._k)
        # What the parameters' own rounding makes of an eigenvalue at the floor.
        largest = (self.structure.variances(self.scale.detach(), self._k, self._d) / unit).amax(-1)
        return least <= max(self.covariance_floor, 1e-15) * 1.001 + 10 * torch.finfo(self.dtype).eps * largest

    # ---- conjugate prior: normal–inverse-Wishart and its diagonal kin ------------------------------------------

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """log ∫ Π_k |Λ_k|^{dof/2} exp(−½ tr Λ_k(second − first μᵀ − μ firstᵀ + count μμᵀ)) dμ dΛ.

        The prior is natural in the coordinates of the statistics: κ = count and, for full covariances, ν = dof + D.
        Diagonal and spherical covariances have both for each entry.
        """
        count, dof = posterior["count"], posterior["dof"]
        delta = posterior["first"] / self.structure.by_column(count)
        scatter = self.structure.scatter(count, posterior["first"], posterior["second"], delta)
        return self.structure.log_marginal(count, dof, scatter, self._d)

    def expected_natural(self, posterior: Stats) -> Stats:
        """Gradient of `log_normalizer`: what multiplies each statistic in the expected log-density."""
        delta, scatter, freedom = self._moments_of(posterior)
        found = self.structure.expected(posterior["count"], freedom, scatter, delta)
        return posterior.like(dict(zip(("count", "dof", "first", "second"), found, strict=True)))

    def weak_prior(self) -> NormalInverseWishart | NormalInverseGamma:
        """One observation at the mean of the data, and D degrees of freedom: scikit-learn's default."""
        entrywise = isinstance(self.structure, ops.Entrywise)
        return NormalInverseGamma() if entrywise else NormalInverseWishart()

    def _moments_of(self, posterior: Stats) -> tuple[Tensor, Tensor, Tensor]:
        """Means from the origin, scatter about them, and ν of a posterior."""
        count, first = posterior["count"], posterior["first"]
        delta = first / self.structure.by_column(count)
        held = self._held("mean", delta)
        if held is None:
            scatter = self.structure.about(posterior["second"], -first, delta)
        else:
            delta = torch.where(held, (self.mean - self.origin).to(torch.float64), delta)
            scatter = self.structure.scatter(count, first, posterior["second"], delta)
        return delta, scatter, self._freedom(posterior)

    def _held(self, parameter: str, like: Tensor) -> Tensor | None:
        """Components whose means or covariances are frozen, a Boolean that broadcasts to a tensor ``[*r, K, …]``."""
        mask = self.frozen(parameter)
        if mask is None:
            return None
        return mask.expand(self._k).reshape(self._k, *[1] * (like.dim() - len(self.replicas) - 1))

    def _freedom(self, posterior: Stats) -> Tensor:
        """ν of a posterior. A mean that is known takes away no degree of freedom."""
        dof = posterior["dof"]
        held = self._held("mean", dof)
        return self.structure.freedom(dof if held is None else dof + held, self._d)

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        """`log_normalizer` where means or covariances of components are frozen.

        Given μ the precision is Wishart with one degree of freedom more and the scatter about μ: an integral over μ
        would leave (2π/κ)^{D/2} |Λ|^{−½}, which κ = 2π and that degree undo. Given Λ the mean is normal with precision
        κΛ.
        """
        structure, (delta, scatter, _) = self.structure, self._moments_of(posterior)
        count, dof = posterior["count"], posterior["dof"]
        known = self._held("mean", count)
        if known is not None:
            count, dof = torch.where(known, 2 * math.pi, count), dof + known
        mask = self.frozen("scale")
        if mask is None:
            return structure.log_marginal(count, dof, scatter, self._d)
        raw = self.scale.to(torch.float64)
        columns = 1 if count.dim() == delta.dim() else self._d
        if structure.shared:
            means = -0.5 * columns * count.log().sum(-1)
            return means - 0.5 * structure.trace(raw, scatter)
        fixed = [self._held("scale", value) for value in (count, scatter)]
        assert fixed[0] is not None and fixed[1] is not None
        own = -0.5 * columns * torch.where(fixed[0], count, 1.0).log().flatten(len(self.replicas)).sum(-1)
        own = own - 0.5 * structure.trace(raw, torch.where(fixed[1], scatter, 0.0))
        # What stands for the components that are known adds a constant.
        unit = structure.covariances(torch.zeros_like(raw))
        count, dof = torch.where(fixed[0], 1.0, count), torch.where(fixed[0], float(self._d), dof)
        return own + structure.log_marginal(count, dof, torch.where(fixed[1], unit, scatter), self._d)

    def _sureness(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """κ and ν, infinite for what is frozen, but for rounding."""
        count, freedom = posterior["count"], self._freedom(posterior)
        held = self._held("mean", count)
        if held is not None:
            count = torch.where(held, torch.inf, count)
        held = self.frozen("scale")
        if held is not None:
            fixed = held if self.structure.shared else self._held("scale", freedom)
            assert fixed is not None
            freedom = torch.where(fixed, ops.CERTAIN, freedom)
        return count, freedom

    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        """Means, and the inverses of expected precisions, Ψ/ν, as covariances."""
        delta, scatter, freedom = self._moments_of(posterior)
        raw = self.structure.raw(self.structure.settled(scatter, freedom))
        mean = self.origin.to(torch.float64) + delta
        values = {"mean": mean.to(self.dtype), "scale": raw.to(self.dtype)}
        return {name: self.keep_frozen(name, value) for name, value in values.items()}

    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        freedom = self._freedom(posterior)
        return {
            "log_count": posterior["count"].log(),
            "log_freedom": (freedom - self.structure.least_freedom(self._d)).log(),
        }

    def sureness(self, strengths: dict[str, Tensor]) -> Stats:
        """κ and the degrees of freedom alone: the rest is in the current means and covariances."""
        if isinstance(self.structure, ops.Common):
            return self.posterior(strengths)
        count, _, dof = self._strong(strengths)
        return Stats(count=count, dof=dof, shared=self.structure.shared, version=self.version)

    def _strong(self, strengths: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """κ, ν and the degrees of freedom in the layout of the statistics."""
        count = strengths["log_count"].to(torch.float64).exp()
        freedom = strengths["log_freedom"].to(torch.float64).exp() + self.structure.least_freedom(self._d)
        dof = self.structure.dof(freedom, self._k, self._d)
        held = self._held("mean", dof)
        return count, freedom, dof if held is None else dof - held.to(dof)

    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        count, freedom, dof = self._strong(strengths)
        delta = (self.mean - self.origin).to(torch.float64)
        scatter = self.structure.unsettled(self.structure.covariances(self.scale.to(torch.float64)), freedom)
        first = self.structure.by_column(count) * delta
        return Stats(
            count=count, dof=dof, first=first,
            second=self.structure.about(scatter, first, delta), shared=self.structure.shared, version=self.version,
        )  # fmt: skip

    def _blur(self, posterior: Stats) -> Tensor:
        return self.structure.blur(*self._sureness(posterior), self._d)

    def blurs(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """What E log N(x | μ, Λ⁻¹) has beside log N(x | E μ, (E Λ)⁻¹): 1/κ, and ½ (E log |Λ| − log |E Λ|).

        In the layout of counts, ``[*r, K]`` of rows or ``[*r, K, D]`` of entries.
        """
        count, freedom = self._sureness(posterior)
        return 1 / count, self.structure.blur(torch.full_like(count, torch.inf), freedom, self._d)

    def quadratic(self) -> Quadratic:
        factor = self.structure.dense(self.scale, self._k, self._d)
        return Quadratic(factor, self.mean.unsqueeze(-1), torch.zeros_like(self.mean[..., 0]))

    def expected_quadratic(self, posterior: Stats) -> Quadratic:
        blur = self._blur(posterior).to(self.dtype)
        plain = self.quadratic()
        # Entrywise structures blur each entry by itself.
        offset = blur.sum(-1) if isinstance(self.structure, ops.Entrywise) else blur
        return Quadratic(plain.factor, plain.weight, plain.offset + offset)

    def moment_stats(self, count: Tensor, xx: Tensor, ux: Tensor, uu: Tensor) -> Stats:
        count, xx, ux = (value.to(torch.float64) for value in (count, xx, ux))
        origin = self.origin.to(torch.float64).expand(*ux.squeeze(-2).shape)
        first = ux.squeeze(-2) - count.unsqueeze(-1) * origin
        cross = ux.mT * origin.unsqueeze(-2)
        outer = count[..., None, None] * origin.unsqueeze(-1) * origin.unsqueeze(-2)
        about = xx - cross - cross.mT + outer
        second = self.structure.second(torch.eye(self._d).to(about).expand_as(about), about)
        counts = self.structure.counts(count, self._d)
        return Stats(
            count=counts, dof=counts, first=first, second=second, shared=self.structure.shared, version=self.version
        )

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _BlurredKernel(self, self._blur(posterior))

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        # Means are counted in weights of rows, log-determinants in rows: the two differ under scales of rows.
        unsure, blur = self.blurs(posterior)
        width = 1 if isinstance(self.structure, ops.Entrywise) else self._d
        each = blur * stats["dof"] - width / 2 * unsure * stats["count"]
        return self.expected_log_prob(stats) + each.flatten(len(self.replicas)).sum(-1)

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """Student's t (C. M. Bishop 2006, equation 10.81): of rows, or where columns are independent of entries.

        With a covariance that is known it is normal.
        """
        count, freedom = self._sureness(posterior)
        x = _observed(batch).to(torch.float64).reshape(-1, self._d)
        mean, raw = self.mean.to(torch.float64), self.scale.to(torch.float64)
        if isinstance(self.structure, ops.Entrywise):
            seen = ~x.isnan()
            variance = (1 + 1 / count) * self.structure.variances(raw, self._k, self._d)
            gap = torch.where(seen.unsqueeze(-2), x.unsqueeze(-2) - mean.unsqueeze(-3), 0.0)
            distance = gap.square() / variance.unsqueeze(-3)
            spread = torch.where(seen.unsqueeze(-2), variance.unsqueeze(-3).log(), 0.0)
            size = seen.to(distance).unsqueeze(-2)
            if freedom.dim() == count.dim():  # a variance for each entry
                value = ops.student_or_normal(distance, spread, size, freedom.unsqueeze(-3)).sum(-1)
            else:
                value = ops.student_or_normal(distance.sum(-1), spread.sum(-1), size.sum(-1), freedom.unsqueeze(-2))
        else:
            # Two normal densities of what was observed tell its distance and its determinant apart.
            wide = self.structure.raw(2 * self.structure.covariances(raw))
            one, two = (
                missing.Pass(self.structure, mean, scale, self.origin.to(mean), True).log_prob(x).mT
                for scale in (raw, wide)
            )
            seen = (~x.isnan()).sum(-1, keepdim=True).to(mean)
            distance = 4 * (two - one) + 2 * math.log(2) * seen
            spread = -2 * one - distance - seen * ops.LOG_2PI
            degrees = self.structure.per_component(freedom - self._d + 1)
            wider = ((1 + 1 / count) * self.structure.per_component(freedom) / degrees).unsqueeze(-2)
            value = ops.student_or_normal(distance / wider, spread + seen * wider.log(), seen, degrees.unsqueeze(-2))
        return value.to(self.dtype).unflatten(-2, batch.x.shape[:-1])

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        count, freedom = self._sureness(posterior)
        if isinstance(self.structure, ops.Entrywise):
            degrees = ratio = self.structure.by_entry(freedom) if freedom.dim() < count.dim() else freedom
            wider = (1 + 1 / count).sqrt()
        else:
            degrees = self.structure.per_component(freedom - self._d + 1).expand_as(count).unsqueeze(-1)
            ratio = self.structure.per_component(freedom).expand_as(count).unsqueeze(-1)
            wider = (1 + 1 / count).sqrt().unsqueeze(-1)
        half = torch._standard_gamma(degrees[z] / 2, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        mean = self.mean.detach()[z].to(torch.float64)
        noise = self.sample(z, None, generator) - mean
        return (mean + noise * wider[z] * (ratio[z] / (2 * half)).sqrt()).to(self.dtype)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        k, d = self._k, self._d
        total = 0
        covariances = self.structure if self.geometry is None else self.geometry
        for name, size in (("mean", k * d), ("scale", covariances.n_parameters(k, d))):
            mask = self.frozen(name)
            kept = 0.0 if mask is None else float(mask.double().mean())
            total += round(size * (1 - kept))
        return total

    def check_mask(self, name: str, mask: Tensor) -> None:
        if self.views[name] in self.shared_parameters and mask.dim():
            raise invalid(
                "mask", "no mask (components have covariances in common)", list(mask.shape), "freeze it whole"
            )
        super().check_mask(name, mask)

    def select(self, keep: Tensor) -> "Gaussian":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = Gaussian(len(index), self._d, self.covariance_type, self.covariance_floor, self.floor_type)
        small = small.to(self.device, self.dtype)
        with torch.no_grad():
            small.mean.copy_(self.mean[index])
            small.scale.copy_(self.scale if self.structure.shared else self.scale[index])
        small.origin = self.origin if self.origin.shape[0] == 1 else self.origin[index]
        small.unit, small.direct = self.unit, self.direct
        for name in ("mean", "scale"):
            mask = self.frozen(name)
            if mask is not None:
                small.register_buffer(f"frozen_{name}", mask[index] if mask.dim() else mask)
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        factors = self.structure.dense(self.scale, self._k, self._d)
        noise = torch.randn(len(z), self._d, dtype=self.dtype, device=self.device, generator=generator)
        draws = torch.empty_like(noise)
        for k in range(self._k):
            chosen = z == k
            draws[chosen] = self.mean[k] + noise[chosen] @ factors[k].mT
        return draws

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return _example("full")


def _example(covariance_type: CovarianceType) -> tuple[Gaussian, Batch]:
    generator = torch.Generator().manual_seed(0)
    g = Gaussian(3, 2, covariance_type).double()
    g.means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        g.scale.copy_(0.3 * torch.randn(g.scale.shape, generator=generator, dtype=torch.float64).tril())
    return g, Batch(torch.randn(20, 2, generator=generator, dtype=torch.float64))


def _observed(batch: Batch) -> Tensor:
    """Observations ``[*n, D]``, NaN where an entry is missing."""
    return batch.x if batch.observed is None else torch.where(batch.observed, batch.x, torch.nan)


class _GaussianKernel(Kernel):
    """A pass by the route that `Gaussian.tune` chose."""

    def __init__(self, factor: Gaussian):
        self.factor = factor
        self.sweep = factor._pass(factor.direct)

    def log_potential(self, batch: Batch) -> Tensor:
        x = _observed(batch)
        if x.dim() == 2:
            return self.sweep.log_prob(x).mT
        return self.sweep.log_prob(x.reshape(-1, x.shape[-1])).mT.unflatten(-2, x.shape[:-1])

    def revisit(self, batch: Batch) -> None:
        self.sweep.revisit(_observed(batch).reshape(-1, batch.x.shape[-1]))

    def collect(self, batch: Batch, expected: Tensor) -> None:
        if batch.x.dim() != 2:
            expected = expected.flatten(-1 - (batch.x.dim() - 1), -2)
        self.sweep.collect(expected.mT)

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        x = batch.x
        if x.dim() != 2:
            return None
        gaps = x.is_floating_point() and batch.remember("missing", lambda: missing.any_missing(x))
        found = self.sweep.mixed(x, batch.weight, log_weight.squeeze(-2), gaps)
        return None if found is None else (found[0], found[1].unsqueeze(-2))

    def stats(self) -> Stats:
        return self.factor._stats(self.sweep)

    def inner(self) -> Tensor:
        return self.sweep.inner()


class _BlurredKernel(_GaussianKernel):
    """A pass at posterior means of log-densities expected under a posterior: these differ by what no x moves."""

    def __init__(self, factor: Gaussian, blur: Tensor):
        super().__init__(factor)
        self.entrywise = isinstance(factor.structure, ops.Entrywise)
        self.blur = blur
        self.found: Stats | None = None

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.found = None
        super().collect(batch, expected)

    def stats(self) -> Stats:
        self.found = super().stats() if self.found is None else self.found
        return self.found

    def log_potential(self, batch: Batch) -> Tensor:
        value = super().log_potential(batch)
        x = _observed(batch)
        blur = self.blur.to(value)
        if not missing.any_missing(x):
            shift = (blur.sum(-1) if self.entrywise else blur).unsqueeze(-2)
            shift = shift.reshape(*shift.shape[:-2], *[1] * (x.dim() - 2), *shift.shape[-2:])
            return value + shift
        seen = (~x.isnan()).to(value)
        if self.entrywise:
            return value + (seen.flatten(0, -2) @ blur.mT).unflatten(-2, x.shape[:-1])
        # A row without an entry says nothing.
        return value + (seen.amax(-1).flatten().unsqueeze(-1) * blur.unsqueeze(-2)).unflatten(-2, x.shape[:-1])

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        self.found, x = None, batch.x
        # What is missing is not blurred, a whole row or single entries: weights of components cannot tell rows apart.
        lacking = missing.any_missing if self.entrywise else missing.any_blank
        if x.dim() == 2 and x.is_floating_point() and batch.remember("unblurred", lambda: lacking(x)):
            return None
        blur = self.blur.sum(-1) if self.entrywise else self.blur
        return super().mixed(batch, log_weight + blur.unsqueeze(-2).to(log_weight))

    def inner(self) -> Tensor:
        blur = self.blur * self.stats()["count"]
        return super().inner() + blur.flatten(len(self.factor.replicas)).sum(-1)
