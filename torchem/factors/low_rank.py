"""Normal components whose covariances are of low rank but for the noise of each column: factor analysers."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Factor, Kernel, Moments, normal_cdf
from torchem.factors._scale import column_variances
from torchem.ops import linalg, missing
from torchem.ops.gaussian import LOG_2PI, STRUCTURES
from torchem.ops.missing import any_missing
from torchem.stats import Stats

Noise = Literal["diag", "spherical"]

#: Mass below which a component keeps its parameters.
_EMPTY = 1e-30
#: Passes of a start, from which loadings come out as principal axes.
_START = 12


class LowRankGaussian(Factor):
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
    which it falls back where parameters are frozen.

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
        self._structure = STRUCTURES[noise]
        self.new_parameter("mean", torch.zeros(n_components, n_features))
        self.new_parameter("loading", torch.zeros(n_components, n_features, rank))
        self.new_parameter("noise_scale", torch.zeros(self._structure.shape(n_components, n_features)))
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
        return self._structure.covariances(self.noise_scale)

    @noise_variances.setter
    def noise_variances(self, value: Any) -> None:
        variances = self._given("noise_variances", value, self.noise_scale)
        if not bool((variances > 0).all()):
            raise invalid("noise_variances", "positive numbers", "one that is not", "add a small one")
        with torch.no_grad():
            self.noise_scale.copy_(self._structure.raw(variances))

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
        return self._structure.variances(self.noise_scale, self._k, self._d)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return _Pass(self).log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Of completed rows, about the origin, with ẑ at these parameters.

        ``count`` [*r, K], ``first`` Σ x and ``square`` Σ x² [*r, K, D], ``cross`` Σ x ẑᵀ [*r, K, D, q], ``score`` Σ ẑ
        [*r, K, q] and ``outer`` Σ E z zᵀ [*r, K, q, q].
        """
        kernel = _Pass(self)
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _Pass(self)

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
        kernel = _Pass(self)
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

    def score_law(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean ``[*r, *n, K, q]`` and covariance ``[*r, *n or 1, K, q, q]`` of the scores given each row."""
        kernel = _Pass(self)
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
        kernel = _Pass(self)
        kernel.log_potential(batch)
        return kernel.score.transpose(-3, -2).unflatten(-3, batch.x.shape[:-1])

    # ---- EM ---------------------------------------------------------------------------------------------------

    @property
    def expands(self) -> bool:
        """Whether the bound is taken at the best mean and covariance of the scores."""
        return all(self.frozen(name) is None for name in self.views.values())

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
            rest = _residual(stats, delta, loading) / n.unsqueeze(-1)
        variances = rest if self.noise == "diag" else rest.mean(-1)
        raw = self._structure.raw(self._floored(variances.clamp(min=0.0)))
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
        constant = n * (self._d * LOG_2PI + variance.log().sum(-1))
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

    def _unit(self) -> Tensor:
        unit = self.unit.to(torch.float64)
        return unit if self.floor_type == "relative" else torch.ones_like(unit)

    def _floored(self, variances: Tensor) -> Tensor:
        if self.floor_type == "additive":
            return self._structure.add(variances, max(self.covariance_floor, 1e-15))
        return self._structure.clip(variances, self._unit(), max(self.covariance_floor, 1e-15))

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
        variances = self._structure.clip(torch.zeros_like(self.noise_scale), self.unit, 1.0)
        values = {
            "mean": self.origin.expand_as(self.mean),
            "loading": (scale.unsqueeze(-1) * pattern).expand_as(self.loading),
            "noise_scale": self._structure.raw(variances),
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
                self.noise_scale.data = self._structure.raw(clipped).to(self.noise_scale)

    def degenerate(self) -> Tensor | None:
        """Where a noise variance is at its floor: a Heywood case."""
        least = self._structure.smallest(self.noise_variances.detach().to(torch.float64), self._unit(), self._k)
        return least <= max(self.covariance_floor, 1e-15) * 1.001

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """Of K components: D means, D q − q (q − 1) / 2 loadings (but for rotations) and D or 1 noise variances.

        Loadings and variances of a component count no more than the D (D + 1) / 2 covariances that they make up.

        Source: W. Ledermann (1937).
        """
        k, d, q = self._k, self._d, self.rank
        sizes = {"mean": d, "loading": d * q - q * (q - 1) // 2, "noise_scale": self._structure.n_parameters(1, d)}
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


class _Pass(Kernel):
    """Differences from each component's mean, scores, and what they leave."""

    def __init__(self, factor: LowRankGaussian):
        self.factor, self.mean, self.loading = factor, factor.mean, factor.loading
        self.variance = factor._variances()
        self.weighted = self.loading / self.variance.unsqueeze(-1)
        self.log_variance = self.variance.log()
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
        pull = gap @ self.weighted
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
            count=count, first=weighted.sum(-2), square=(weighted * gap).sum(-2), cross=weighted.mT @ score,
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
            count=score[..., 0], first=torch.zeros_like(square), square=square, cross=cross, score=score, outer=outer
        )

    def stats(self) -> Stats:
        """From moments about means to moments about the origin."""
        if self.total is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        own, shift = self.total, (self.mean - self.factor.origin).to(torch.float64)
        n = own["count"].unsqueeze(-1)
        return Stats(
            count=own["count"], first=own["first"] + n * shift,
            square=own["square"] + 2 * shift * own["first"] + n * shift.square(),
            cross=own["cross"] + shift.unsqueeze(-1) * own["score"].unsqueeze(-2),
            score=own["score"], outer=own["outer"], version=self.factor.version,
        )  # fmt: skip

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())
