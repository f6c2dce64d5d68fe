"""Multivariate t: a Gaussian whose observations have scales of their own, for data with outliers."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Adjustment, Factor, Kernel
from torchem.factors._composite import Composite
from torchem.factors.gaussian import CovarianceType, FloorType, Gaussian
from torchem.ops import gaussian as ops
from torchem.ops import missing
from torchem.ops.special import shape_from_gap
from torchem.stats import Stats

#: Degrees of freedom stay between these: the density of fewer has no use, more are a Gaussian's.
_LEAST, _MOST = 0.1, 1e6
#: What they start at: tails that notice outliers, and a variance.
_START = 10.0
#: Mass below which a component keeps its degrees of freedom.
_EMPTY = 1e-30
#: Steps of Newton's method for the degrees of freedom, and how far one goes at most, as a ratio.
_STEPS, _STRIDE = 12, 5.0
#: Variance of log ν over statistics up to which they count as taken at one ν: rounding.
_SAME = 1e-9


class StudentT(Composite):
    """Multivariate t distributions, one per state.

    log p(x | k) = log t_ν(x; μ_k, Σ_k) = log ∫ N(x; μ_k, Σ_k / u) Gamma(u; ν_k/2, ν_k/2) du.

    The scale u of an observation is latent: given the state its mean is (ν + D) / (ν + δ²), small for outliers, which
    so count little. Location and scale are those of the part ``normal``, the degrees of freedom ν are learnt for each
    state. Missing entries (NaN) are integrated out. Σ is not the covariance, which is Σ ν / (ν − 2) for ν > 2.

    *M-step.* The likelihood does not change when u has any mean α and Σ grows by it, so the bound may be taken at the
    best α: its maximum divides the scatter by Σ u instead of by the number of observations, and converges much faster
    than EM at α = 1, to which the M-step falls back where a covariance is shared or fixed, has a prior, or is floored.

    The degrees of freedom do not climb Q, along which they would crawl, but the likelihood itself (ECME), of which few
    statistics tell nearly all. With r = δ²/(ν₀ + δ²) at the present ν₀,

        log(1 + δ²/ν) = log(1 + δ²/ν₀) + log(1 + c r),    c = ν₀/ν − 1,

    and the fourth derivative of log(1 + c r) in r is negative. So Gauss's rule of two nodes, which has the first three
    moments of r, lies above its mean, and the likelihood as a function of ν above what that makes of it: a bound that
    touches in value and three derivatives, whose maximum over ν is found by Newton's method.

    *Posterior of the parameters.* Location and scale have that of a `Gaussian` (make the part ``normal`` a
    `torchem.Variational`, or the whole model by `torchem.variational`); degrees of freedom have no conjugate prior and
    stay points. Distances grow by D/κ, for a location is known as well as κ observations tell it.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        covariance_type: Of Σ; see `Gaussian`, as for the two that follow.
        covariance_floor: Least eigenvalue of Σ.
        floor_type: What that is relative to.

    Raises:
        InvalidArgument: For sizes below one or options that do not exist.

    Source: G. J. McLachlan, D. Peel (2000), chapter 7; C. Liu, D. B. Rubin, Y. N. Wu (1998) for the expansion;
    C. Liu, D. B. Rubin (1995), section 4, for ECME; W. Gautschi (2004), section 1.4, for the error of Gauss's rule;
    M. Svensén, C. M. Bishop (2005) for the posterior.

    Example:
        >>> t = StudentT(1, 1)
        >>> t.dof = [1.0]  # Cauchy
        >>> t.log_prob(Batch(torch.tensor([[0.0], [10.0]]))).exp()[:, 0]
        tensor([0.3183, 0.0032], grad_fn=<...>)
    """

    views: ClassVar = {"means": "normal.mean", "scales": "normal.scale", "dof": "log_freedom"}
    no_conjugate: ClassVar[str] = "degrees of freedom have no sufficient statistics; its part normal has one"
    points: ClassVar[bool] = True
    #: What the views of the normal part are called there.
    _inner: ClassVar = {"means": "normal.means", "scales": "normal.covariances"}

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
        self.normal: Any = Gaussian(n_components, n_features, covariance_type, covariance_floor, floor_type)
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
    def minorizes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """False while ν is learnt: it and Σ climb at once, each given what the other was."""
        mask = self.frozen("log_freedom")
        return mask is not None and bool(mask.all())

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
    def dof(self) -> Tensor:
        """Degrees of freedom ν, ``[*r, K]``; assignable."""
        return self.log_freedom.exp()

    @dof.setter
    def dof(self, value: Any) -> None:
        dof = as_tensor(value, "dof").to(self.device, torch.float64)
        if dof.shape != self.log_freedom.shape:
            raise invalid("dof", f"shape {list(self.log_freedom.shape)}", list(dof.shape), "one per component")
        if not bool(((dof >= _LEAST) & (dof <= _MOST)).all()):
            raise invalid(
                "dof", f"numbers from {_LEAST} to {_MOST:g}", "one outside, or NaN",
                "beyond the largest a Gaussian is the same",
            )  # fmt: skip
        with torch.no_grad():
            self.log_freedom.copy_(dof.log())

    def freeze(self, *names: str, mask: Tensor | None = None) -> "StudentT":
        """Keep views through every M-step: ``"means"``, ``"scales"``, ``"dof"``.

        Args:
            names: All of them when empty.
            mask: Boolean over the components, for exactly one name.

        Raises:
            InvalidArgument: For a name that is no view, or a mask that does not fit it.
        """
        for name in names:
            one_of("freeze", name, self.paths())
        if mask is not None and len(names) != 1:
            raise invalid("mask", "exactly one name to apply to", f"{len(names)} names", "freeze them one by one")
        for name in names or self.views:
            if name == "dof":
                Factor.freeze(self, name, mask=mask)
            else:
                super().freeze(self._inner.get(name, name), mask=mask)
        return self

    def unfreeze(self, *names: str) -> "StudentT":
        """Let the M-step move these views (all of them when empty) again."""
        for name in names:
            one_of("unfreeze", name, self.paths())
        for name in names or self.views:
            if name == "dof":
                Factor.unfreeze(self, name)
            else:
                super().unfreeze(self._inner.get(name, name))
        return self

    def paths(self) -> list[str]:
        return [*self.views, *super().paths()]

    # ---- the distribution -------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        return self.normal.cast(x)

    def check(self, batch: Batch) -> None:
        self.normal.check(batch)

    def log_prob(self, batch: Batch) -> Tensor:
        """Log-density ``[*r, *n, K]``; under a posterior a t about the location's mean, of a scale by 1 + 1/κ wider.

        What is not known of the scale is left out: the predictive itself has no closed form.
        """
        return _StudentKernel(self, direct=True, score=True).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``normal`` under expectations times E u; ``count``, ``scale`` Σ E u and ``log`` Σ E log u, ``[*r, K]``.

        What the likelihood says of ν: ``sizes [*r, K, D + 1]``, the mass of rows with so many entries; ``tails``
        ``[*r, K, 2, 4]``, Σ of log(1 + δ²/ν₀), r, r² and r³ and of these times the entries; and ``at [*r, K, 2]``,
        Σ of log ν₀ and its square, by which statistics that were taken at several ν₀ are known.
        """
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
        freedom = self.dof
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
        half = self.dof.detach().to(torch.float64)[z] / 2
        scale = torch._standard_gamma(half, generator=generator) / half  # pyright: ignore[reportPrivateImportUsage]
        mean, width = self.means.detach()[z], (1 / scale).unsqueeze(-1)
        if self.normal.averages:  # what a predictive has of the location's variance, 1/κ, is not scaled
            unsure = self.normal.unwrapped.blurs(self.normal.posterior())[0].detach()[z]
            unsure = unsure if self._entrywise else unsure.unsqueeze(-1)
            width = (width + unsure) / (1 + unsure)
        return mean + (self.normal.sample(z, None, generator) - mean) * width.sqrt().to(mean)

    # ---- EM ---------------------------------------------------------------------------------------------------

    @property
    def expands(self) -> bool:
        """Whether the bound is taken at the best mean of u, each component's own."""
        normal = self.normal
        coupled = "scale" in normal.shared_parameters
        return not coupled and normal.prior is None and normal.frozen("scale") is None

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """−½ Σ n log |Σ| − ½ (N + ν₀ n) log α − (B + ν₀ A) / 2α + n (½ν₀ log ½ν₀ − log Γ(½ν₀)) + ½ν₀ L + ℓ(ν) − ℓ(ν₀).

        With N = n D (or the entries observed), A = Σ u, B = Σ u δ², L = Σ log u, all expected at ν₀, at the best α or
        1, and ℓ what the likelihood says of ν. Of statistics that were taken at several ν₀ it is Q: ν stands for ν₀.
        """
        normal, structure = self.normal, self.normal.structure
        if normal.averages:
            half = self.log_freedom.to(torch.float64).exp() / 2
            own = stats["count"] * (half * half.log() - half.lgamma()) + half * (stats["log"] - stats["scale"])
            return normal.expected_log_prob(stats["normal"]) + own.sum(-1)
        count, scale, log = stats["count"], stats["scale"], stats["log"]
        raw, freedom = normal.scale.to(torch.float64), self.log_freedom.to(torch.float64).exp()
        distance = self._distances(stats["normal"], normal.mean, raw)
        value = -0.5 * structure.normalizer(stats["normal"]["dof"], raw, self.n_components, self.n_features)
        gain, old = 0.0, freedom
        if not stats.mixed:
            tails = _Tails(stats)
            old = torch.where(tails.same, tails.freedom, freedom)
            gain = tails.log_likelihood(freedom) - tails.log_likelihood(old)
        half = old / 2
        own = gain + count * (half * half.log() - half.lgamma()) + half * log
        if not self.expands or stats.mixed:
            return value + own.sum(-1) - (distance.sum(-1) + (old * scale).sum(-1)) / 2
        mass = self._entries(stats) + old * count
        mean = (distance + old * scale) / mass.clamp(min=_EMPTY)
        own = own - torch.where(count > _EMPTY, mass * (mean.clamp(min=1e-300).log() + 1), 0.0) / 2
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
        freedom = _freedom(target)
        if not stats.mixed:
            freedom = _Tails(stats).maximum(freedom)
        freedom = torch.where(alive, freedom.log().to(self.dtype), self.log_freedom)
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
            family.dof = [2.5, 4.0, 8.0]
            found.append((family, Batch(data)))
        return found


def _freedom(target: Tensor) -> Tensor:
    """ν with log ½ν − ψ(½ν) = target, within bounds."""
    return 2 * shape_from_gap(target, _LEAST / 2, _MOST / 2)


class _Tails:
    """The bound of the likelihood as a function of ν, ``[*r, K]``, that statistics tell: all of it in float64.

    Σ log Γ(½(ν + o)) − n log Γ(½ν) − ½ O log ν − ½ Σ (ν + o) log(1 + δ²/ν), with o entries in a row and O in all.
    """

    def __init__(self, stats: Stats):
        alive = stats["count"] > _EMPTY
        at = stats["at"] / torch.where(alive, stats["count"], 1.0).unsqueeze(-1)
        #: ν₀, and whether all statistics are of it.
        self.freedom = at[..., 0].exp()
        self.same = alive & (at[..., 1] - at[..., 0].square() <= _SAME)
        self.sizes = stats["sizes"]
        self.size = torch.arange(self.sizes.shape[-1], device=self.sizes.device, dtype=torch.float64)
        #: Rows and entries, ``[2, *r, K]``, and Σ log(1 + δ²/ν₀) over both.
        self.mass = torch.stack([self.sizes.sum(-1), self.sizes @ self.size])
        tails = stats["tails"].movedim(-2, 0)
        self.log, moments = tails[..., 0], tails[..., 1:] / self.mass.clamp(min=_EMPTY).unsqueeze(-1)
        self.nodes, self.weights = _gauss(*moments.unbind(-1))

    def log_likelihood(self, freedom: Tensor) -> Tensor:
        half = freedom / 2
        own = (self.sizes * (half.unsqueeze(-1) + self.size / 2).lgamma()).sum(-1) - self.mass[0] * half.lgamma()
        ratio = (self.freedom / freedom - 1).unsqueeze(-1)
        rows, entries = self.log + self.mass * (self.weights * (ratio * self.nodes).log1p()).sum(-1)
        return own - (self.mass[1] * freedom.log() + freedom * rows + entries) / 2

    def maximum(self, otherwise: Tensor) -> Tensor:
        """The ν within bounds that maximises, by Newton's method in 1/ν, in which the end of the scale is near.

        Args:
            otherwise: ν where statistics are not of one ν₀, or the way led down.
        """
        start = self.freedom.clamp(min=_LEAST, max=_MOST)
        freedom = start
        for _ in range(_STEPS):
            slope, bend = self._derivatives(freedom)
            # Both times ν: in s = 1/ν the step is −s slope / |2 slope + bend|, upwards where that is not concave too.
            curvature = (2 * slope + bend).abs()
            change = 1 - slope / curvature.clamp(min=1e-300)
            freedom = (freedom / change.clamp(min=1 / _STRIDE, max=_STRIDE)).clamp(min=_LEAST, max=_MOST)
        before, after = self.log_likelihood(start), self.log_likelihood(freedom)
        good = self.same & (after >= before - 1e-9 * (1 + before.abs()))
        return torch.where(good, freedom, otherwise)

    def _derivatives(self, freedom: Tensor) -> tuple[Tensor, Tensor]:
        """ν L′ and ν² L″."""
        half, each = freedom / 2, freedom.unsqueeze(-1) / 2 + self.size / 2
        ratio = (self.freedom / freedom).unsqueeze(-1)
        inner = (ratio - 1) * self.nodes
        # ν times the derivative of log(1 + c r) is −q, with q = r ν₀/ν / (1 + c r).
        q = ratio * self.nodes / (1 + inner)
        total = self.log + self.mass * (self.weights * inner.log1p()).sum(-1)
        first = self.mass * (self.weights * q).sum(-1)
        second = self.mass * (self.weights * q * (2 - q)).sum(-1)
        count, entries = self.mass
        slope = (self.sizes * each.digamma()).sum(-1) - count * half.digamma() - total[0] + first[0]
        slope = (freedom * slope - entries + first[1]) / 2
        bend = (self.sizes * torch.polygamma(1, each)).sum(-1) - count * torch.polygamma(1, half)
        bend = freedom * (freedom * bend / 2 + 2 * first[0] - second[0]) + entries - second[1]
        return slope, bend / 2


def _gauss(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss's rule of two nodes for a law on [0, 1] of these moments: nodes and weights, ``[…, 2]``."""
    variance = second - first.square()
    # A law at one point has one node.
    wide = variance > 1e-12 * second
    variance = torch.where(wide, variance, 1.0)
    skew = torch.where(wide, (third - first * (3 * second - 2 * first.square())) / variance, 0.0)
    root = (skew.square() + 4 * variance).sqrt()
    nodes = torch.stack([first + (skew - root) / 2, first + (skew + root) / 2], -1).clamp(min=0.0, max=1.0)
    share = (1 + skew / root) / 2
    return torch.where(wide.unsqueeze(-1), nodes, first.unsqueeze(-1)), torch.stack([share, 1 - share], -1)


class _StudentKernel(Kernel):
    """A pass of the Gaussian; distances tell the scales of the observations."""

    def __init__(self, factor: StudentT, direct: bool, score: bool = False):
        self.factor, normal = factor, factor.normal.unwrapped
        self.sweep, self.score = normal._pass(direct), score
        #: Of the location 1/κ, and of the scale ½ (E log |Λ| − log |E Λ|), under a posterior.
        self.blurs: tuple[Tensor, Tensor] | None = None
        if factor.normal.averages:
            unsure, blur = normal.blurs(factor.normal.posterior())
            self.blurs = unsure.to(factor.dtype), blur.to(factor.dtype)
        self.structure, self.d = normal.structure, normal.n_features
        self.freedom = factor.dof.unsqueeze(-1)
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
        self.sizes: Tensor | float = 0.0
        self.tails: Tensor | float = 0.0

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
        if self.blurs is not None:
            distance, log_det = self._blurred(distance, log_det, size)
        # In float64: of many degrees of freedom logarithms of Γ are large, and cancel.
        freedom, size = self.freedom.to(torch.float64), size.to(torch.float64)
        half = (freedom + size) / 2
        constant = ops.student_constant(log_det.to(torch.float64), size, freedom).to(value)
        center, half = (half.digamma() - (freedom / 2).log()).to(value), half.to(value)
        self.distance, self.size = distance, size
        # One logarithm of each distance serves the density and the expected logarithm of the scale.
        self.beyond = beyond = (distance / self.freedom).log1p()
        self.mean = 2 * half / (self.freedom + distance)
        self.mean_log = center - beyond
        value = (constant - half * beyond).mT
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def _blurred(self, distance: Tensor, log_det: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Expected distances and log-determinants; for a score those of a scale that is wider by 1 + 1/κ."""
        assert self.blurs is not None
        unsure, blur = self.blurs
        entries = isinstance(self.structure, ops.Entrywise)
        if self.score:
            wider = 1 + (unsure.mean(-1) if entries else unsure).unsqueeze(-1)
            return distance / wider, log_det + size * wider.log()
        if entries:
            seen = torch.ones_like(unsure[..., :1, :]) if self.seen is None else self.seen.to(unsure)
            more, less = unsure @ seen.mT, 2 * blur @ seen.mT
        else:  # rows are completed; one without an entry says nothing
            said = 1.0 if self.seen is None else self.seen.any(-1).to(unsure)
            more, less = self.d * unsure.unsqueeze(-1) * said, 2 * blur.unsqueeze(-1) * said
        return distance + more, log_det - less

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
        self._collect_tails(weight, total)
        if self.seen is not None and isinstance(self.structure, ops.Entrywise):
            self.dof = self.dof + (weight @ self.seen.to(weight)).to(torch.float64)
        else:
            self.dof = self.dof + self.structure.counts(total, self.d)

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        x, sweep = batch.x, self.sweep.complete
        if not isinstance(sweep, ops.FeaturesPass) or x.dim() != 2 or self.blurs is not None:
            return None
        if x.is_floating_point() and batch.remember("missing", lambda: missing.any_missing(x)):
            return None
        freedom = self.freedom.squeeze(-1).to(torch.float64)
        found = sweep.mixed_heavy(x, batch.weight, log_weight.squeeze(-2), freedom, self.log_det.squeeze(-1))
        if found is None:
            return None
        total, scaled, beyond, *powers = found[1].unbind(-2)
        self.count, self.scale = self.count + total, self.scale + scaled
        center = ((freedom + self.d) / 2).digamma() - (freedom / 2).log()
        self.log = self.log + center * total - beyond
        self._add_tails(total, torch.stack([beyond, *powers], -1))
        self.dof = self.dof + self.structure.counts(total, self.d)
        return found[0], total.unsqueeze(-2)

    def _add_tails(self, total: Tensor, rows: Tensor) -> None:
        """Sums over complete rows."""
        self.sizes = self.sizes + torch.nn.functional.pad(total.unsqueeze(-1), (self.d, 0))
        self.tails = self.tails + torch.stack([rows, rows * self.d], -2)

    def _collect_tails(self, weight: Tensor, total: Tensor) -> None:
        # In float64: of the moments differences are taken.
        weight, beyond = weight.to(torch.float64), self.beyond.to(torch.float64)
        r = self.distance.to(torch.float64)
        r = r / (self.freedom + r)
        once = weight * r
        if self.seen is None:
            twice = once * r
            pairs = ((weight, beyond), (weight, r), (once, r), (twice, r))
            self._add_tails(total, torch.stack([torch.linalg.vecdot(*pair) for pair in pairs], -1))
            return
        terms, size = [weight * beyond, once, once * r, once * r * r], self.size.to(torch.float64)
        rows = torch.stack([term.sum(-1) for term in terms], -1)
        entries = torch.stack([term @ size for term in terms], -1)
        self.sizes = self.sizes + weight @ torch.nn.functional.one_hot(self.size.long(), self.d + 1).to(torch.float64)
        self.tails = self.tails + torch.stack([rows, entries], -2)

    def stats(self) -> Stats:
        count, first, second = self.sweep.moments()
        normal = Stats(
            count=count, dof=self.dof, first=first, second=second, shared=self.structure.shared,
            version=self.factor.normal.version,
        )  # fmt: skip
        at = self.factor.log_freedom.to(torch.float64)
        at = torch.stack([self.count * at, self.count * at.square()], -1)
        return Stats(
            normal=normal, count=self.count, scale=self.scale, log=self.log, sizes=self.sizes, tails=self.tails, at=at
        )

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())
