"""Normal components whose covariances are of low rank but for the noise of each column: factor analysers."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Conjugate, Factor, Kernel, Moments, Prior, normal_cdf
from torchem.factors._scale import column_variances
from torchem.ops import linalg, missing
from torchem.ops.gaussian import CERTAIN, LOG_2PI, STRUCTURES, Entrywise
from torchem.ops.missing import any_missing
from torchem.priors import FactorLoadings
from torchem.stats import Stats

Noise = Literal["diag", "spherical"]

#: Mass below which a component keeps its parameters.
_EMPTY = 1e-30
#: Passes of a start, from which loadings come out as principal axes.
_START = 12


class LowRankGaussian(Factor, Conjugate):
    """Normal components x = μ_k + W_k z + e with scores z ~ N(0, I) of few dimensions and noise e ~ N(0, Ψ_k).

    log p(x | k) = log N(x; μ_k, W_k W_kᵀ + Ψ_k), with Ψ_k diagonal or a multiple of the identity.

    The scores are latent inside the factor. With M = I + Wᵀ Ψ⁻¹ W they have, given x, the covariance M⁻¹ and the mean
    ẑ = M⁻¹ Wᵀ Ψ⁻¹ (x − μ), and by Woodbury's identity

        (x − μ)ᵀ Σ⁻¹ (x − μ) = ‖x − μ − W ẑ‖²_Ψ + ‖ẑ‖²,  log |Σ| = log |Ψ| + log |M|:

    no D × D matrix is formed, and the statistics of a component are D (q + 2) + q (q + 1) + 1 numbers. Entries that are
    missing (NaN) leave their terms of M and of Wᵀ Ψ⁻¹ (x − μ) out, and are completed by their moments.

    *M-step.* The likelihood does not change when scores are N(m, R) instead and W and μ follow, so the bound may be
    taken at the best of these, in closed form: μ is then the mean of x, and W the coefficients of the regression of x
    on the scores times R^½, R the covariance found of the scores. This converges faster than EM at m = 0 and R = I, to
    which it falls back where parameters are frozen or have a prior.

    *Posterior of the parameters.* Given its scores each column is a regression on (1, z), whose coefficients and noise
    have a conjugate prior, `torchem.priors.FactorLoadings`; see `expected_kernel` for the scores under a posterior.

    Loadings are determined up to a rotation of the scores. A noise variance at its floor is a Heywood case; the
    component is then named in `Result.floored`.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        rank: q, the number of scores, below D.
        noise: ``"diag"`` (factor analysis) or ``"spherical"`` (probabilistic principal components).
        covariance_floor: Least noise variance.
        floor_type: ``"relative"`` to the data's variance of the column, ``"absolute"``, or ``"additive"``.

    Raises:
        InvalidArgument: For sizes out of range or options that do not exist.

    Source: Z. Ghahramani, G. E. Hinton (1996); M. E. Tipping, C. M. Bishop (1999); C. Liu, D. B. Rubin, Y. N. Wu (1998)
        for the expansion.

    Example:
        >>> g = LowRankGaussian(1, 3, rank=1)
        >>> g.loadings = [[[2.0], [1.0], [0.0]]]
        >>> g.covariances[0]
        tensor([[5., 2., 0.],
                [2., 2., 0.],
                [0., 0., 1.]], grad_fn=<SelectBackward0>)
    """

    views: ClassVar = {"means": "mean", "loadings": "loading", "noise_variances": "noise_scale"}
    splits: ClassVar = frozenset(views)
    latent: ClassVar[bool] = True
    handles_missing: ClassVar[bool] = True
    default_init: ClassVar[str] = "kmeans"

    mean: Tensor
    loading: Tensor
    noise_scale: Tensor
    origin: Tensor
    unit: Tensor

    def __init__(
        self,
        n_components: int,
        n_features: int,
        rank: int,
        noise: Noise = "diag",
        covariance_floor: float = 1e-6,
        floor_type: Literal["relative", "absolute", "additive"] = "relative",
    ):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < n_features:
            raise invalid(
                "rank", f"a whole number from 1 to n_features − 1 = {n_features - 1}", repr(rank),
                "take fewer scores than columns",
            )  # fmt: skip
        one_of("noise", noise, ("diag", "spherical"))
        one_of("floor_type", floor_type, ("relative", "absolute", "additive"))
        if not (isinstance(covariance_floor, (int, float)) and 0 <= covariance_floor < math.inf):
            raise invalid("covariance_floor", "a finite number of at least 0", covariance_floor, "use the default 1e-6")
        self._k, self._d, self.rank = n_components, n_features, rank
        self.noise: Noise = noise
        self.covariance_floor = float(covariance_floor)
        self.floor_type: Literal["relative", "absolute", "additive"] = floor_type
        structure = STRUCTURES[noise]
        assert isinstance(structure, Entrywise)
        self.noise_structure = structure
        self.new_parameter("mean", torch.zeros(n_components, n_features))
        self.new_parameter("loading", torch.zeros(n_components, n_features, rank))
        self.new_parameter("noise_scale", torch.zeros(self.noise_structure.shape(n_components, n_features)))
        self.register_buffer("origin", torch.zeros(n_features))
        self.register_buffer("unit", torch.ones(n_features))
        #: Counts the changes of origin; statistics of different versions do not add.
        self.version = 0

    def refresh(self) -> None:
        self.version = self.version + 1

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    @property
    def means(self) -> Tensor:
        """μ ``[*r, K, D]``; assignable."""
        return self.mean

    @means.setter
    def means(self, value: Any) -> None:
        means = self._given("means", value, self.mean)
        with torch.no_grad():
            self.mean.copy_(means)
            self.origin = means.reshape(-1, self._d).mean(0).to(self.dtype)
        self.version = self.version + 1

    @property
    def loadings(self) -> Tensor:
        """W ``[*r, K, D, q]``; assignable."""
        return self.loading

    @loadings.setter
    def loadings(self, value: Any) -> None:
        with torch.no_grad():
            self.loading.copy_(self._given("loadings", value, self.loading))

    @property
    def noise_variances(self) -> Tensor:
        """Ψ: ``[*r, K, D]``, spherical ``[*r, K]``; assignable, positive."""
        return self.noise_structure.covariances(self.noise_scale)

    @noise_variances.setter
    def noise_variances(self, value: Any) -> None:
        variances = self._given("noise_variances", value, self.noise_scale)
        if not bool((variances > 0).all()):
            raise invalid("noise_variances", "positive numbers", "one that is not", "add a small one")
        with torch.no_grad():
            self.noise_scale.copy_(self.noise_structure.raw(variances))

    def _given(self, name: str, value: Any, like: Tensor) -> Tensor:
        given = as_tensor(value, name).to(self.device, torch.float64)
        if given.shape != like.shape:
            raise invalid(name, f"shape {list(like.shape)}", list(given.shape), "give an entry per component first")
        if not bool(given.isfinite().all()):
            raise invalid(name, "finite numbers", "NaN or infinity", "correct that entry")
        return given

    @property
    def covariances(self) -> Tensor:
        """W Wᵀ + Ψ, ``[*r, K, D, D]``; assign loadings and noise variances instead."""
        return self.loading @ self.loading.mT + torch.diag_embed(self._variances())

    def _variances(self) -> Tensor:
        """Ψ of each column, ``[*r, K, D]``."""
        return self.noise_structure.variances(self.noise_scale, self._k, self._d)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return ScorePass(self).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Of completed rows, about the origin, with ẑ at these parameters.

        ``count`` and ``dof`` [*r, K], ``first`` Σ x and ``square`` Σ x² [*r, K, D], ``cross`` Σ x ẑᵀ [*r, K, D, q],
        ``score`` Σ ẑ [*r, K, q] and ``outer`` Σ E z zᵀ [*r, K, q, q].
        """
        kernel = ScorePass(self)
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return ScorePass(self)

    def row_size(self) -> int:
        return self._k * (6 * self._d + 4 * self.rank**2 + 4)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and marginal variances, ``[*r, 1s, K, D]``."""
        ones = [1] * (batch.x.dim() - 1)
        variance = self._variances() + self.loading.square().sum(-1)
        shape = (*self.replicas, *ones, self._k, self._d)
        return self.mean.reshape(shape), variance.reshape(shape)

    def cdf(self, batch: Batch) -> Tensor:
        return normal_cdf(*self.moments(batch))(batch.x)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return normal_cdf(*self.conditional(batch))

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of every entry under each component, given those of its row that were observed.

        Returns:
            Both ``[*r, *n, K, D]``; an observed entry is its own mean, without variance.
        """
        kernel = ScorePass(self)
        kernel.log_potential(batch)
        seen = ~kernel.x.isnan()
        guess = self.mean.unsqueeze(-2) + kernel.score @ self.loading.mT
        left = (self.loading.unsqueeze(-3) @ kernel.left * self.loading.unsqueeze(-3)).sum(-1)
        variance = (self._variances().unsqueeze(-2) + left).expand(guess.shape)
        found = torch.where(seen, kernel.x, guess), torch.where(seen, 0.0, variance)
        mean, variance = (value.transpose(-3, -2).unflatten(-3, batch.x.shape[:-1]) for value in found)
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        x = batch.x.reshape(-1, self._d)
        return missing.left_over(self.covariances.to(torch.float64), x).to(self.dtype).unflatten(-4, batch.x.shape[:-1])

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows with missing entries drawn as `Gaussian.complete` does, by differences from regressions."""
        drawn = self.sample(z, None, generator)
        own = (torch.arange(len(z), device=z.device), z)
        holes = batch.x.isnan()
        lacking = batch.with_x(drawn.masked_fill(holes, torch.nan))
        moved = self.conditional(batch)[0][own] + drawn - self.conditional(lacking)[0][own]
        return torch.where(holes, moved.detach().to(batch.x), batch.x)

    def variances(self) -> Tensor:
        """Ψ of each column, ``[*r, K, D]``, spherical or not."""
        return self._variances()

    def score_law(self, batch: Batch, kernel: Kernel | None = None) -> tuple[Tensor, Tensor]:
        """Mean ``[*r, *n, K, q]`` and covariance ``[*r, *n or 1, K, q, q]`` of the scores given each row.

        Args:
            batch: Rows.
            kernel: A pass of this family to take them by; that of the current parameters when None.
        """
        kernel = kernel if isinstance(kernel, ScorePass) else ScorePass(self)
        kernel.log_potential(batch)
        axes = batch.x.shape[:-1]
        mean = kernel.score.transpose(-3, -2).unflatten(-3, axes)
        left = kernel.left.movedim(-3, len(self.replicas))
        return mean, left.unflatten(len(self.replicas), axes if kernel.seen is not None else [1] * len(axes))

    def scores(self, batch: Batch) -> Tensor:
        """ẑ of each row under each component, ``[*r, *n, K, q]``.

        Example:
            >>> g = LowRankGaussian(1, 2, rank=1)
            >>> g.loadings = [[[1.0], [0.0]]]
            >>> g.scores(Batch(torch.tensor([[2.0, 5.0]])))
            tensor([[[1.]]], grad_fn=<ViewBackward0>)
        """
        kernel = ScorePass(self)
        kernel.log_potential(batch)
        return kernel.score.transpose(-3, -2).unflatten(-3, batch.x.shape[:-1])

    # ---- EM ---------------------------------------------------------------------------------------------------

    @property
    def expands(self) -> bool:
        """Whether the bound is taken at the best mean and covariance of the scores: no prior, nothing frozen."""
        return self._prior is None and all(self.frozen(name) is None for name in self.views.values())

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count = stats["count"]
        alive = count > _EMPTY
        n = torch.where(alive, count, 1.0)
        first, cross, root = _centred(stats, n, alive)
        if self.expands and not stats.mixed:
            delta, loading = first, cross / n.sqrt()[..., None, None]
            square = stats["square"] / n.unsqueeze(-1) - delta.square()
            rest = square - loading.square().sum(-1)
        else:
            delta, loading = self._constrained(stats, n, alive, first, cross @ root)
            rest = _residual(stats, delta, loading) / torch.where(alive, stats["dof"], 1.0).unsqueeze(-1)
        variances = rest if self.noise == "diag" else rest.mean(-1)
        raw = self.noise_structure.raw(self._floored(variances.clamp(min=0.0)))
        values = {"mean": self.origin.to(torch.float64) + delta, "loading": loading, "noise_scale": raw}
        for name, value in values.items():
            old = getattr(self, name)
            kept = alive.reshape(*alive.shape, *[1] * (old.dim() - alive.dim()))
            values[name] = self.keep_frozen(name, torch.where(kept, value.to(old.dtype), old))
        return values

    def _constrained(
        self, stats: Stats, n: Tensor, alive: Tensor, first: Tensor, loading: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Means from the origin and loadings by regression on the scores, ``loading`` where means are free."""
        score = (stats["score"] / n.unsqueeze(-1)).unsqueeze(-1)
        delta = (self.mean - self.origin).to(torch.float64)
        held = self._held("mean", loading)
        if held is not None:
            outer = torch.where(alive[..., None, None], stats["outer"], torch.eye(self.rank).to(n))
            about = stats["cross"] - delta.unsqueeze(-1) * stats["score"].unsqueeze(-2)
            inverse = linalg.inverse_factor(linalg.cholesky(outer))
            loading = torch.where(held, about @ inverse.mT @ inverse, loading)
        loading = self.keep_frozen("loading", loading).to(torch.float64)
        free = first - (loading @ score).squeeze(-1)
        held = self._held("mean", free)
        return free if held is None else torch.where(held, delta, free), loading

    def _held(self, name: str, like: Tensor) -> Tensor | None:
        """Components of which a parameter is frozen, against ``[*r, K, …]``."""
        mask = self.frozen(name)
        return None if mask is None else mask.expand(self._k).reshape(-1, *[1] * (like.dim() - len(self.replicas) - 1))

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """At the best linear map v = A (z − m) of the scores; at v = z where parameters are frozen or statistics mixed.

        With moments about means, S_zz = L Lᵀ, M = H Hᵀ and K = H⁻¹ Wᵀ Ψ⁻¹ S_xz L⁻ᵀ the part that depends on A is, in
        Z = Hᵀ A L, tr Kᵀ Z − ½ ‖Z‖² + n log |Z| − n log |H| − n log |L|: maximal where Z has the singular vectors of K
        and the singular values z = ½ (s + √(s² + 4n)). At the best m the means enter by −½ n (x̄ − μ)ᵀ Σ⁻¹ (x̄ − μ).
        """
        count = stats["count"]
        alive = count > _EMPTY
        n = torch.where(alive, count, 1.0)
        variance = self._variances().to(torch.float64)
        loading, delta = self.loading.to(torch.float64), (self.mean - self.origin).to(torch.float64)
        constant = torch.where(alive, stats["dof"], 1.0) * (self._d * LOG_2PI + variance.log().sum(-1))
        if not self.expands or stats.mixed:
            rest = (_residual(stats, delta, loading) / variance).sum(-1)
            if self.expands:  # as where they are not mixed, with the law of the scores
                rest = rest + stats["outer"].diagonal(dim1=-2, dim2=-1).sum(-1)
            return torch.where(alive, -0.5 * (constant + rest), 0.0).sum(-1)
        first, cross, root = _centred(stats, n, alive)
        weighted = loading / variance.unsqueeze(-1)
        inverse = linalg.inverse_factor(linalg.cholesky(_precision(loading, weighted)))
        gap = first - delta
        along = (inverse @ (weighted.mT @ gap.unsqueeze(-1))).squeeze(-1)
        distance = n * ((gap.square() / variance).sum(-1) - along.square().sum(-1))
        square = ((stats["square"] - n.unsqueeze(-1) * first.square()) / variance).sum(-1)
        s = torch.linalg.svdvals(inverse @ weighted.mT @ cross)
        z = (s + (s.square() + 4 * n.unsqueeze(-1)).sqrt()) / 2
        best = (s * z - z.square() / 2 + n.unsqueeze(-1) * z.log()).sum(-1)
        best = best + n * sum(f.diagonal(dim1=-2, dim2=-1).log().sum(-1) for f in (inverse, root))
        return torch.where(alive, best - 0.5 * (constant + distance + square), 0.0).sum(-1)

    # ---- conjugate prior: a regression of each column on (1, z) ------------------------------------------------

    def columns(self, stats: Stats) -> Stats:
        """Statistics in the natural coordinates of a posterior: of each column over the rows in which it was observed.

        ``count``, ``dof``, ``first``, ``square`` [*r, K, D], ``cross``, ``score`` [*r, K, D, q] and ``outer``
        [*r, K, D, q, q], from such, or from those of `stats`.
        """
        first, cross, outer = stats["first"], stats["cross"], stats["outer"]
        if outer.dim() > cross.dim():
            return stats
        own = {name: stats[name].unsqueeze(-1).expand_as(first) for name in ("count", "dof")}
        own["score"] = stats["score"].unsqueeze(-2).expand_as(cross)
        own["outer"] = outer.unsqueeze(-3).expand(*cross.shape, cross.shape[-1])
        return stats.like({**stats, **own})

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Those that a posterior begins with: of the scores at these parameters."""
        return self.gather(batch, expected, lambda rows, share: _collected(_ColumnPass(self), rows, share))

    def stats_under(self, posterior: Stats, batch: Batch, expected: Tensor) -> Stats:
        return _collected(_ExpectedPass(self, posterior), batch, expected)

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """log ∫ Π_kd λ^{dof/2} exp(−½ λ (square − 2 vᵀ (first, cross) + vᵀ S_kd v)) dv dλ, v = (μ − origin, w).

        S_kd is made of ``count``, ``score`` and ``outer``: a regression of x_d on (1, z), with λ the precision of its
        noise, common to all columns where that is spherical.
        """
        return self._marginal(*self._regressions(posterior, None))

    def _marginal(self, factor: Tensor, scatter: Tensor, dof: Tensor) -> Tensor:
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        own = (self.rank * LOG_2PI - log_det).sum((-2, -1)) / 2
        return own + self.noise_structure.log_marginal(torch.ones_like(dof), dof, scatter, self._d)

    def _regressions(self, posterior: Stats, held: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Lower factors of S_kd, scatter about the fits, and degrees of freedom as of means alone.

        Args:
            posterior: In natural coordinates.
            held: Coefficients that are known, ``[K, 1, q + 1]``: they take away no degree of freedom.
        """
        coefficient, factor = self._coefficients(posterior, held)
        return factor, self._scatter(posterior, coefficient), self._mean_dof(posterior, held)

    def _mean_dof(self, posterior: Stats, held: Tensor | None) -> Tensor:
        dof = self.columns(posterior)["dof"] - self.rank
        return dof if held is None else dof + held.sum(-1)

    def _coefficients(self, posterior: Stats, held: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior means of v ``[*r, K, D, q + 1]``, and lower factors of S_kd."""
        gram, right = self._normal(posterior)
        if held is not None:
            fixed = torch.where(held, self._current(), 0.0)
            right = torch.where(held, fixed, right - (gram @ fixed.unsqueeze(-1)).squeeze(-1))
            gram = _without(gram, held)
        factor = linalg.cholesky(gram)
        return torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1), factor

    def _normal(self, stats: Stats) -> tuple[Tensor, Tensor]:
        """Moments of (1, z) ``[*r, K, D, q + 1, q + 1]``, and with x ``[*r, K, D, q + 1]``."""
        own = self.columns(stats)
        top = torch.cat([own["count"].unsqueeze(-1), own["score"]], -1).unsqueeze(-2)
        below = torch.cat([own["score"].unsqueeze(-1), own["outer"]], -1)
        return torch.cat([top, below], -2), torch.cat([own["first"].unsqueeze(-1), own["cross"]], -1)

    def _current(self) -> Tensor:
        """v of the current parameters, ``[*r, K, D, q + 1]``, float64."""
        mean = (self.mean - self.origin).to(torch.float64)
        return torch.cat([mean.unsqueeze(-1), self.loading.to(torch.float64)], -1)

    def _known(self) -> Tensor | None:
        """Which entries of v are frozen, ``[K, 1, q + 1]``, if any are."""
        masks = [self.frozen(name) for name in ("mean", "loading")]
        if all(mask is None for mask in masks):
            return None
        none = torch.zeros(self._k, dtype=torch.bool, device=self.device)
        mean, loading = ((none if mask is None else mask.expand(self._k)).unsqueeze(-1) for mask in masks)
        return torch.cat([mean, loading.expand(self._k, self.rank)], -1).unsqueeze(-2)

    def _rests(self, stats: Stats, coefficient: Tensor) -> Tensor:
        """Σ (x − vᵀ (1, z))² of each column, ``[*r, K, D]``."""
        gram, right = self._normal(stats)
        return stats["square"] + (coefficient * ((gram @ coefficient.unsqueeze(-1)).squeeze(-1) - 2 * right)).sum(-1)

    def _scatter(self, stats: Stats, coefficient: Tensor) -> Tensor:
        return self.noise_structure.pooled(self._rests(stats, coefficient))

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        """`log_normalizer` where means, loadings or noise of components are frozen: as for a `LinearGaussian`."""
        structure = self.noise_structure
        factor, scatter, dof = self._regressions(posterior, self._known())
        if self.frozen("noise_scale") is None:
            return self._marginal(factor, scatter, dof)
        raw = self.noise_scale.to(torch.float64)
        fixed = [self._held("noise_scale", value) for value in (dof, scatter)]
        assert fixed[0] is not None and fixed[1] is not None
        # What stands for the components that are known adds a constant.
        unit = structure.covariances(torch.zeros_like(raw))
        own = -0.5 * structure.trace(raw, torch.where(fixed[1], scatter, 0.0))
        dof = torch.where(fixed[0], float(self._d), dof)
        return own + self._marginal(factor, torch.where(fixed[1], unit, scatter), dof)

    def expected_natural(self, posterior: Stats) -> Stats:
        """Gradient of `log_normalizer`."""
        leaves = dict(posterior)
        return posterior.like(torch.func.grad(lambda v: self.log_normalizer(posterior.like(v)).sum())(leaves))

    def weak_prior(self) -> FactorLoadings:
        """One observation at the mean of the data, loadings of about the size of the noise, D degrees of freedom."""
        return FactorLoadings()

    def _freedom(self, posterior: Stats) -> Tensor:
        return self.noise_structure.freedom(self._mean_dof(posterior, self._known()), self._d)

    def _sureness(self, posterior: Stats) -> Tensor:
        """ν, next to infinite where noise variances are frozen."""
        freedom = self._freedom(posterior)
        fixed = self._held("noise_scale", freedom)
        return freedom if fixed is None else torch.where(fixed, CERTAIN, freedom)

    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        """Means of the coefficients, and the inverses of expected precisions, scatter/ν, as noise variances."""
        coefficient, _ = self._coefficients(posterior, self._known())
        variances = self.noise_structure.divided(self._scatter(posterior, coefficient), self._freedom(posterior))
        values = {
            "mean": self.origin.to(torch.float64) + coefficient[..., 0], "loading": coefficient[..., 1:],
            "noise_scale": self.noise_structure.raw(variances),
        }  # fmt: skip
        return {name: self.keep_frozen(name, value.to(self.dtype)) for name, value in values.items()}

    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        return {
            "log_precision": linalg.log_cholesky(self._normal(posterior)[0]),
            "log_freedom": self._freedom(posterior).log(),
        }

    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        factor = linalg.from_log_cholesky(strengths["log_precision"].to(torch.float64))
        freedom, current = strengths["log_freedom"].to(torch.float64).exp(), self._current()
        structure, held = self.noise_structure, self._known()
        dof = structure.dof(freedom, self._k, self._d) + self.rank
        dof = dof if held is None else dof - held.sum(-1)
        gram = factor @ factor.mT
        right = (gram @ current.unsqueeze(-1)).squeeze(-1)
        scatter = structure.multiplied(structure.covariances(self.noise_scale.to(torch.float64)), freedom)
        spread = scatter if self.noise == "diag" else scatter.unsqueeze(-1) / self._d
        return Stats(
            count=gram[..., 0, 0], dof=dof, first=right[..., 0], square=spread + (right * current).sum(-1),
            cross=right[..., 1:], score=gram[..., 0, 1:], outer=gram[..., 1:, 1:], version=self.version,
        )  # fmt: skip

    def unsure(self, posterior: Stats) -> Tensor:
        """E (v − E v)(v − E v)ᵀ/ψ of each column, ``[*r, K, D, q + 1, q + 1]``: S⁻¹, whatever is known of ψ."""
        gram, held = self._normal(posterior)[0], self._known()
        root = linalg.inverse_factor(linalg.cholesky(gram if held is None else _without(gram, held)))
        spread = root.mT @ root
        return spread if held is None else torch.where(held.unsqueeze(-1) | held.unsqueeze(-2), 0.0, spread)

    def blur(self, posterior: Stats) -> Tensor:
        """½ (E log 1/ψ − log E 1/ψ) of each entry, ``[*r, K, D]``."""
        certain = torch.full_like(self.columns(posterior)["dof"], torch.inf)
        return self.noise_structure.blur(certain, self._sureness(posterior), self._d)

    def sizes(self, posterior: Stats) -> Tensor:
        """E w²/ψ of each loading, ``[*r, K, D, q]``: what tells the relevance of scores."""
        spread = self.unsure(posterior).diagonal(dim1=-2, dim2=-1)[..., 1:]
        return self.loading.to(torch.float64).square() / self._variances().to(torch.float64).unsqueeze(-1) + spread

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        """Potentials max_q(z) E log p(x, z) + H[q(z)] under the posterior of the parameters.

        With v = (μ, w) of column d, ψ its noise and S⁻¹ as of `unsure`,

            E log p(x_d | z) = log N(x_d; E vᵀ (1, z), 1/E ψ⁻¹) + ½ (E log ψ⁻¹ − log E ψ⁻¹) − ½ (1, z)ᵀ S⁻¹ (1, z):

        scores have the precision I + Σ_d (E w E wᵀ E ψ⁻¹ + [S⁻¹]_zz) over the columns that were observed, and are
        pulled by Σ_d (E w (x_d − E μ) E ψ⁻¹ − [S⁻¹]_z1).

        Source: C. M. Bishop (1999), Variational principal components; Z. Ghahramani, M. J. Beal (2000).
        """
        return _ExpectedPass(self, posterior)

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        return self.expected_sum(posterior, stats)

    def expected_sum(self, posterior: Stats, stats: Stats) -> Tensor:
        """Σ E log p(x | z) under a posterior, ``[*r]``."""
        own = self.columns(stats)
        variance = self._variances().to(torch.float64)
        rest = self._rests(own, self._current()) / variance
        unsure = (self.unsure(posterior) * self._normal(own)[0]).sum((-2, -1))
        each = own["dof"] * (self.blur(posterior) - 0.5 * (variance.log() + LOG_2PI)) - 0.5 * (rest + unsure)
        return each.sum((-2, -1))

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """Normal, with the mean and the covariance of the predictive, which has no closed form.

        Given the scores columns are t with ν degrees of freedom, of variance ψ ν/(ν − 2) (1 + (1, z)ᵀ S⁻¹ (1, z)); over
        z the loadings give W Wᵀ and the noise ψ ν/(ν − 2) (1 + tr S⁻¹). Below four degrees of freedom, where the
        variance says little of a density, twice the squared scale stands for it.
        """
        freedom = self.noise_structure.by_entry(self._sureness(posterior)).clamp(min=4.0)
        wider = 1 + self.unsure(posterior).diagonal(dim1=-2, dim2=-1).sum(-1)
        noise = self._variances().to(torch.float64) * (wider * freedom / (freedom - 2))
        return ScorePass(self, noise.to(self.dtype)).log_potential(batch)

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        """Scores first, then columns from their t given these."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device, "generator": generator}
        freedom = self.noise_structure.by_entry(self._sureness(posterior)).expand(self._k, self._d).detach()[z]
        ones = torch.ones(len(z), 1, dtype=torch.float64, device=self.device)
        scores = torch.cat([ones, torch.randn(len(z), self.rank, **options)], -1)
        wider = 1 + torch.einsum("np,ndpr,nr->nd", scores, self.unsure(posterior).detach()[z], scores)
        half = freedom if self.noise == "diag" else freedom[:, :1]  # one variance for all columns
        half = torch._standard_gamma(half / 2, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        noise = torch.randn(len(z), self._d, **options) * (wider * freedom / (2 * half)).sqrt()
        center = self.origin + (self._current().detach()[z] @ scores.unsqueeze(-1)).squeeze(-1)
        return (center + noise * self._variances().detach().to(torch.float64)[z].sqrt()).to(self.dtype)

    # ---- floors -----------------------------------------------------------------------------------------------

    def _unit(self) -> Tensor:
        unit = self.unit.to(torch.float64)
        return unit if self.floor_type == "relative" else torch.ones_like(unit)

    def _floored(self, variances: Tensor) -> Tensor:
        if self.floor_type == "additive":
            return self.noise_structure.add(variances, max(self.covariance_floor, 1e-15))
        return self.noise_structure.clip(variances, self._unit(), max(self.covariance_floor, 1e-15))

    # ---- starts and health ------------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """EM under these responsibilities, from loadings that no axis is orthogonal to: principal axes and scores."""
        return self.climbed(lambda start: start.gather(batch, expected))

    def climbed(self, statistics: Callable[["LowRankGaussian"], Stats]) -> dict[str, Tensor]:
        """First parameters: a few passes of EM, whose statistics are taken at a factor as it stands.

        Args:
            statistics: Of the data, by the factor that expects the scores.
        """
        start = copy.deepcopy(self)
        steps = torch.arange(1, self._d * self.rank + 1, dtype=torch.float64, device=self.device)
        # Multiples of an irrational number are spread evenly and never repeat.
        pattern = (steps * math.sqrt(2)).frac().sub(0.5).reshape(self._d, self.rank)
        scale = self.unit.to(torch.float64).sqrt()
        variances = self.noise_structure.clip(torch.zeros_like(self.noise_scale), self.unit, 1.0)
        values = {
            "mean": self.origin.expand_as(self.mean),
            "loading": (scale.unsqueeze(-1) * pattern).expand_as(self.loading),
            "noise_scale": self.noise_structure.raw(variances),
        }
        for _ in range(_START):
            for name, value in values.items():
                getattr(start, name).data = self.keep_frozen(name, value.to(self.dtype)).clone()
            values = start.maximize(statistics(start))
        return values

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Means at the chosen observations, covariances of the whole data."""
        size = len(batch)
        even = torch.full((*index.shape[:-1], size, self._k), 1.0 / size, dtype=self.dtype, device=batch.x.device)
        if batch.weight is not None:
            even = even * batch.weight.unsqueeze(-1).to(even)
        values = self.initialize(batch, even)
        chosen = _observed(batch).to(self.dtype)[index]
        return {**values, "mean": self.keep_frozen("mean", torch.where(chosen.isnan(), values["mean"], chosen))}

    def prepare(self, moments: Moments) -> None:
        if moments.mean.shape == (self._d,):
            self.unit = column_variances(moments, self.dtype).to(self.unit)
            self.origin = moments.mean.to(self.origin)
            self.version = self.version + 1
        super().prepare(moments)

    def project(self) -> None:
        if self.floor_type == "additive" or self.frozen("noise_scale") is not None:
            return
        with torch.no_grad():
            variances = self.noise_variances.to(torch.float64)
            clipped = self._floored(variances)
            if bool((clipped > variances * (1 + 1e-9)).any()):
                self.noise_scale.data = self.noise_structure.raw(clipped).to(self.noise_scale)

    def degenerate(self) -> Tensor | None:
        """Where a noise variance is at its floor: a Heywood case."""
        least = self.noise_structure.smallest(self.noise_variances.detach().to(torch.float64), self._unit(), self._k)
        return least <= max(self.covariance_floor, 1e-15) * 1.001

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """Of K components: D means, D q − q (q − 1) / 2 loadings (but for rotations) and D or 1 noise variances.

        Loadings and variances of a component count no more than the D (D + 1) / 2 covariances that they make up.

        Source: W. Ledermann (1937).
        """
        k, d, q = self._k, self._d, self.rank
        sizes = {"mean": d, "loading": d * q - q * (q - 1) // 2, "noise_scale": self.noise_structure.n_parameters(1, d)}
        none = torch.zeros(k, dtype=torch.bool, device=self.device)
        masks = {name: self.frozen(name) for name in sizes}
        free = {name: ~(none if mask is None else mask.expand(k)) for name, mask in masks.items()}
        spare = max(0, sizes["loading"] + sizes["noise_scale"] - d * (d + 1) // 2)
        both = int((free["loading"] & free["noise_scale"]).sum())
        return sum(size * int(free[name].sum()) for name, size in sizes.items()) - spare * both

    def select(self, keep: Tensor) -> "LowRankGaussian":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = LowRankGaussian(**{**self.config(), "n_components": len(index)}).to(self.device, self.dtype)
        for name in self.views.values():
            getattr(small, name).data = getattr(self, name).detach()[index].clone()
            mask = self.frozen(name)
            if mask is not None:
                small.register_buffer(f"frozen_{name}", mask[index] if mask.dim() else mask)
        small.origin, small.unit = self.origin, self.unit
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "generator": generator}
        scores = torch.randn(len(z), self.rank, **options)
        noise = torch.randn(len(z), self._d, **options)
        draws = torch.empty_like(noise)
        deviation = self._variances().detach().sqrt()
        for k in range(self._k):
            own = z == k
            draws[own] = self.mean.detach()[k] + scores[own] @ self.loading.detach()[k].mT + noise[own] * deviation[k]
        return draws

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Factor analysers of rows with missing entries, and probabilistic principal components."""
        generator = torch.Generator().manual_seed(0)
        found: list[tuple[Factor, Batch]] = []
        for noise, rank in (("diag", 2), ("spherical", 1)):
            family = cls(3, 4, rank, noise).double()  # pyright: ignore[reportArgumentType]
            family.means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
            family.loadings = torch.randn(3, 4, rank, generator=generator, dtype=torch.float64)
            family.noise_variances = 0.3 + torch.rand(family.noise_scale.shape, generator=generator).double()
            x = 2 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
            if noise == "diag":
                x[torch.rand(40, 4, generator=generator) < 0.2] = torch.nan
            found.append((family, Batch(x)))
        return found


def _observed(batch: Batch) -> Tensor:
    """Observations ``[*n, D]``, NaN where an entry is missing."""
    return batch.x if batch.observed is None else torch.where(batch.observed, batch.x, torch.nan)


def _precision(loading: Tensor, weighted: Tensor) -> Tensor:
    """M = I + Wᵀ Ψ⁻¹ W."""
    return torch.eye(loading.shape[-1], dtype=loading.dtype, device=loading.device) + loading.mT @ weighted


def _centred(stats: Stats, n: Tensor, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x̄ from the origin, S_xz L⁻ᵀ and L⁻¹ where S_zz = L Lᵀ, about means."""
    first, score = stats["first"] / n.unsqueeze(-1), stats["score"]
    cross = stats["cross"] - first.unsqueeze(-1) * score.unsqueeze(-2)
    outer = stats["outer"] - score.unsqueeze(-1) * score.unsqueeze(-2) / n[..., None, None]
    eye = torch.eye(outer.shape[-1], dtype=outer.dtype, device=outer.device)
    root = linalg.inverse_factor(linalg.cholesky(torch.where(alive[..., None, None], outer, eye)))
    return first, cross @ root.mT, root


def _residual(stats: Stats, delta: Tensor, loading: Tensor) -> Tensor:
    """Σ E (x − μ − W z)² of each column, ``[*r, K, D]``."""
    n = stats["count"].unsqueeze(-1)
    about = stats["cross"] - delta.unsqueeze(-1) * stats["score"].unsqueeze(-2)
    square = stats["square"] - 2 * delta * stats["first"] + n * delta.square()
    return square + (loading * (loading @ stats["outer"] - 2 * about)).sum(-1)


class ScorePass(Kernel):
    """Differences from each component's mean, scores, and what they leave."""

    def __init__(self, factor: LowRankGaussian, variance: Tensor | None = None):
        self.factor, self.mean, self.loading = factor, factor.mean, factor.loading
        self.variance = factor._variances() if variance is None else variance
        self.weighted = self.loading / self.variance.unsqueeze(-1)
        self.log_variance = self.variance.log()
        #: Of the parameters, if these are expectations under one.
        self.posterior: Stats | None = None
        self.total: Stats | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        x = _observed(batch)
        self.axes = x.shape[:-1]
        self.x = x.reshape(-1, x.shape[-1])
        gap = self.x - self.mean.unsqueeze(-2)
        self.seen: Tensor | None = None
        if any_missing(self.x):
            self.seen = ~self.x.isnan()
            gap = torch.where(self.seen, gap, 0.0)
        precision = self._precisions()
        inverse = linalg.inverse_factor(linalg.cholesky(precision))
        self.left = inverse.mT @ inverse
        # Rows that are all complete have one M.
        pull = self._pull(gap)
        self.score = pull @ self.left.squeeze(-3) if self.seen is None else (self.left @ pull.unsqueeze(-1)).squeeze(-1)
        rest = gap - self.score @ self.loading.mT
        if self.seen is not None:
            rest = torch.where(self.seen, rest, 0.0)
        distance = (rest.square() / self.variance.unsqueeze(-2)).sum(-1) + self.score.square().sum(-1)
        log_det = -2 * inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.seen is None:
            log_det = log_det + self.log_variance.sum(-1, keepdim=True) + x.shape[-1] * LOG_2PI
        else:
            log_det = log_det + (self.log_variance + LOG_2PI) @ self.seen.to(gap).mT
        value = -0.5 * (distance + log_det)
        return value.mT.unflatten(-2, self.axes) if len(self.axes) != 1 else value.mT

    def _pull(self, gap: Tensor) -> Tensor:
        """Wᵀ Ψ⁻¹ (x − μ), ``[*r, K, n, q]``."""
        return gap @ self.weighted

    def _precisions(self) -> Tensor:
        """M of each row, ``[*r, K, n or 1, q, q]``."""
        if self.seen is None:
            return _precision(self.loading, self.weighted).unsqueeze(-3)
        q = self.loading.shape[-1]
        products = (self.loading.unsqueeze(-1) * self.weighted.unsqueeze(-2)).flatten(-2)
        inner = (self.seen.to(products) @ products).unflatten(-1, (q, q))
        return inner + torch.eye(q, dtype=inner.dtype, device=inner.device)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        if len(self.axes) != 1:
            expected = expected.flatten(-1 - len(self.axes), -2)
        weight = expected.mT.to(torch.float64)
        score, loading = self.score.to(torch.float64), self.loading.to(torch.float64)
        mean, left = self.mean.to(torch.float64), self.left.to(torch.float64)
        gap = self.x.to(torch.float64) - mean.unsqueeze(-2)
        if self.seen is not None:  # nothing seen is nothing said
            weight = torch.where(self.seen.any(-1), weight, 0.0)
            gap = torch.where(self.seen, gap, score @ loading.mT)
        weighted, heavy = weight.unsqueeze(-1) * gap, weight.unsqueeze(-1) * score
        count = weight.sum(-1)
        spread = (weight[..., None, None] * left).sum(-3) if self.seen is not None else (
            count[..., None, None] * left.squeeze(-3)
        )  # fmt: skip
        own = Stats(
            count=count, dof=count, first=weighted.sum(-2), square=(weighted * gap).sum(-2), cross=weighted.mT @ score,
            score=heavy.sum(-2), outer=heavy.mT @ score + spread,
        )  # fmt: skip
        if self.seen is not None:
            own = own + self._unseen(weight, left, loading)
        self.total = own if self.total is None else self.total + own

    def _unseen(self, weight: Tensor, left: Tensor, loading: Tensor) -> Stats:
        """What squares and products of missing entries are expected at beyond those of their means."""
        assert self.seen is not None
        missing = (~self.seen).to(weight)
        # Σ_n over the rows without column j of their scores' covariances.
        spread = ((weight.unsqueeze(-2) * missing.mT) @ left.flatten(-2)).unflatten(-1, left.shape[-2:])
        cross = (spread @ loading.unsqueeze(-1)).squeeze(-1)
        noise = self.variance.to(torch.float64) * (weight @ missing)
        score, outer = weight.new_zeros(cross[..., 0, :].shape), weight.new_zeros(spread[..., 0, :, :].shape)
        square = noise + (cross * loading).sum(-1)
        return Stats(
            count=score[..., 0], dof=score[..., 0], first=torch.zeros_like(square), square=square, cross=cross,
            score=score, outer=outer,
        )  # fmt: skip

    def stats(self) -> Stats:
        """From moments about means to moments about the origin."""
        if self.total is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        own, shift = self.total, (self.mean - self.factor.origin).to(torch.float64)
        n, score = self._shifted(own)
        return Stats(
            count=own["count"], dof=own["dof"], first=own["first"] + n * shift,
            square=own["square"] + 2 * shift * own["first"] + n * shift.square(),
            cross=own["cross"] + shift.unsqueeze(-1) * score,
            score=own["score"], outer=own["outer"], version=self.factor.version,
        )  # fmt: skip

    def _shifted(self, own: Stats) -> tuple[Tensor, Tensor]:
        """Count and scores against columns."""
        return own["count"].unsqueeze(-1), own["score"].unsqueeze(-2)

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())


def _without(gram: Tensor, held: Tensor) -> Tensor:
    """What is known takes no part in a regression: its rows and columns are those of the identity."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.where(held.unsqueeze(-1) | held.unsqueeze(-2), eye, gram)


def _collected(kernel: Kernel, batch: Batch, expected: Tensor) -> Stats:
    kernel.log_potential(batch)
    kernel.collect(batch, expected)
    return kernel.stats()


class _ColumnPass(ScorePass):
    """A pass that gathers the statistics of each column over the rows in which it was observed."""

    def collect(self, batch: Batch, expected: Tensor) -> None:
        if len(self.axes) != 1:
            expected = expected.flatten(-1 - len(self.axes), -2)
        weight, score, left = (value.to(torch.float64) for value in (expected.mT, self.score, self.left))
        gap = self.x.to(torch.float64) - self.mean.to(torch.float64).unsqueeze(-2)
        heavy = weight.unsqueeze(-1) * score
        if self.seen is None:
            weighted, count = weight.unsqueeze(-1) * gap, weight.sum(-1)
            outer = heavy.mT @ score + count[..., None, None] * left.squeeze(-3)
            own = self.factor.columns(
                Stats(
                    count=count, dof=count, first=weighted.sum(-2), square=(weighted * gap).sum(-2),
                    cross=weighted.mT @ score, score=heavy.sum(-2), outer=outer,
                )
            )  # fmt: skip
        else:
            seen, gap = self.seen.to(weight), torch.where(self.seen, gap, 0.0)
            weighted, count = weight.unsqueeze(-1) * gap, weight @ seen
            second = weight[..., None, None] * (score.unsqueeze(-1) * score.unsqueeze(-2) + left)
            own = Stats(
                count=count, dof=count, first=weighted.sum(-2), square=(weighted * gap).sum(-2),
                cross=weighted.mT @ score, score=seen.mT @ heavy,
                outer=(seen.mT @ second.flatten(-2)).unflatten(-1, left.shape[-2:]),
            )  # fmt: skip
        self.total = own if self.total is None else self.total + own

    def _shifted(self, own: Stats) -> tuple[Tensor, Tensor]:
        return own["count"], own["score"]


class _ExpectedPass(_ColumnPass):
    """A pass of log-densities expected under a posterior of coefficients and noise variances."""

    def __init__(self, factor: LowRankGaussian, posterior: Stats):
        super().__init__(factor)
        self.posterior: Stats = posterior
        self.unsure, self.blur = factor.unsure(posterior).to(self.mean), factor.blur(posterior).to(self.mean)

    def _precisions(self) -> Tensor:
        #: Σ S⁻¹ over the columns that each row has, ``[*r, K, n or 1, q + 1, q + 1]``.
        self.penalty = self.unsure.sum(-3).unsqueeze(-3)
        if self.seen is not None:
            flat = self.seen.to(self.unsure) @ self.unsure.flatten(-2)
            self.penalty = flat.unflatten(-1, self.unsure.shape[-2:])
        return super()._precisions() + self.penalty[..., 1:, 1:]

    def _pull(self, gap: Tensor) -> Tensor:
        return super()._pull(gap) - self.penalty[..., 0, 1:]

    def log_potential(self, batch: Batch) -> Tensor:
        value = super().log_potential(batch)
        scores = torch.cat([torch.ones_like(self.score[..., :1]), self.score], -1)
        unsure = ((self.penalty @ scores.unsqueeze(-1)).squeeze(-1) * scores).sum(-1)
        blur = self.blur.sum(-1, keepdim=True) if self.seen is None else self.blur @ self.seen.to(self.blur).mT
        more = (blur - 0.5 * unsure).mT
        return value + (more.unflatten(-2, self.axes) if len(self.axes) != 1 else more)

    def inner(self) -> Tensor:
        return self.factor.expected_sum(self.posterior, self.stats())
