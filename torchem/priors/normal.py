"""Priors over means, coefficients and covariances of normal families.

In units of the statistics such a prior is what κ observations at the prior mean and ν degrees of freedom with scatter
Ψ would leave. Densities are of covariances: against those of precisions they have |Σ|^−(D+1) more, so the mode counts
more degrees of freedom than the posterior does.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from torchem.errors import invalid
from torchem.factor import Factor, Moments, Prior, conjugate
from torchem.ops import linalg
from torchem.ops.gaussian import LOG_2PI, Common, Entrywise, Structure
from torchem.priors._hyper import chosen, expand, hyper, number, plain
from torchem.stats import Stats

#: Alternations of loadings with the relevance of each of their columns in an M-step; none lowers the bound.
_ROUNDS = 3


class _Normal(Prior, ABC):
    """What is common: degrees of freedom, the scale, and how the mode's statistics come from the posterior's."""

    #: Axes of a mean that each component has to itself.
    mean_rank: ClassVar[int] = 2
    mean: Tensor | None
    dof: float | None
    scale: Tensor | None
    _open: frozenset[str]

    # ---- what differs -----------------------------------------------------------------------------------------

    @abstractmethod
    def _structure(self, factor: Factor) -> Structure:
        """The covariances' structure; refuses what the prior cannot stand over."""

    @abstractmethod
    def posterior_stats(self, factor: Factor) -> Stats: ...

    # ---- hyper-parameters -------------------------------------------------------------------------------------

    def _freedom(self, factor: Factor) -> float:
        """ν; by default D, for variances of entries as for matrices."""
        d = factor.n_features
        assert d is not None
        least = self._structure(factor).least_freedom(d)
        value = float(d) if self.dof is None else self.dof
        if not value > least:
            raise invalid("dof", f"more than {least} degrees of freedom for {d} features", value, "raise it")
        return value

    def _scale(self, factor: Factor) -> Tensor:
        """Ψ in the layout of the covariances; that of the data's variances where it is open."""
        structure, k, d = self._structure(factor), factor.n_components, factor.n_features
        assert k is not None and d is not None
        shape, unit = structure.prior_shape(k, d), _of(factor, "unit")
        if self.scale is None:
            return self._scale_of_data(structure, unit).expand(shape)
        eye = torch.eye(d, dtype=torch.float64)
        given = self.scale * eye if self.scale.dim() == 0 and not isinstance(structure, Entrywise) else self.scale
        return expand("scale", given, shape, unit)

    @staticmethod
    def _scale_of_data(structure: Structure, unit: Tensor) -> Tensor:
        """Ψ from the variance of each column."""
        if not isinstance(structure, Entrywise):
            return torch.diag_embed(unit)
        return unit if structure.shape(2, 2) == (2, 2) else unit.mean()

    def completed(self, factor: Factor, moments: Moments) -> Prior:
        if not self._open or moments.mean.shape != (factor.n_features,):
            return self
        # The factor knows the variances by now, without those of constant columns.
        known = {"mean": moments.mean, "scale": self._scale_of_data(self._structure(factor), _of(factor, "unit"))}
        given = {name: getattr(self, name) for name in self.config()}
        out = type(self)(**given | {name: known[name] for name in self._open})
        # Another fit completes it from other data.
        out._open = self._open
        return out

    def selected(self, factor: Factor, keep: Tensor) -> Prior:
        structure, k, d = self._structure(factor), factor.n_components, factor.n_features
        assert k is not None and d is not None
        given = {name: getattr(self, name) for name in self.config()}
        given["mean"] = chosen(self.mean, keep, self.mean_rank)
        if not structure.shared:
            given["scale"] = chosen(self.scale, keep, len(structure.shape(k, d)))
        out = type(self)(**given)
        out._open = self._open
        return out

    @abstractmethod
    def config(self) -> dict[str, Any]: ...

    # ---- densities --------------------------------------------------------------------------------------------

    def mode_stats(self, factor: Factor) -> Stats:
        stats = self.posterior_stats(factor)
        k, d = factor.n_components, factor.n_features
        assert k is not None and d is not None
        return stats.like({**stats, "dof": stats["dof"] + self._structure(factor).jacobian(k, d)})

    def log_prob(self, factor: Factor) -> Tensor:
        stats, d = self.mode_stats(factor), factor.n_features
        assert d is not None
        # What Q counts of 2π with each degree of freedom is no part of the density: the normaliser has its own.
        dof = stats["dof"]
        constant = dof.sum() * ((1 if dof.dim() > 1 else d) * LOG_2PI / 2)
        norm = conjugate(factor).log_normalizer(self.posterior_stats(factor))
        return factor.expected_log_prob(stats) + constant - norm

    def check(self, factor: Factor) -> None:
        posterior = self.posterior_stats(factor)
        if not bool(conjugate(factor).log_normalizer(posterior).isfinite().all()):
            raise invalid("scale", "positive definite", "a matrix that is not", "add a small multiple of I")


class _MeanAndCovariance(_Normal):
    """A normal mean whose variance is that of the data over κ."""

    def __init__(self, mean: Any = None, mean_precision: float = 1.0, dof: float | None = None, scale: Any = None):
        self.mean = hyper("mean", mean)
        self.mean_precision = number("mean_precision", mean_precision)
        self.dof = None if dof is None else number("dof", dof)
        self.scale = hyper("scale", scale)
        self._open = frozenset(name for name in ("mean", "scale") if getattr(self, name) is None)

    def _checked(self, factor: Factor, entrywise: bool, wanted: str) -> Structure:
        structure = getattr(factor, "structure", None)
        if structure is None or not hasattr(factor, "origin") or isinstance(structure, Entrywise) != entrywise:
            got = f"{type(factor).__name__} {getattr(factor, 'covariance_type', '')}".rstrip()
            raise invalid("prior", f"a Gaussian with {wanted} covariances to stand over", got, "use its own prior")
        geometry = getattr(factor, "geometry", None)
        if geometry is not None and not geometry.conjugate:
            raise invalid(
                "prior", "covariances that are full, tied, diag, spherical, EII or EEI (volumes, shapes or axes that "
                "are shared in part are factors of a covariance, which no prior is conjugate to)",
                getattr(factor, "covariance_type", ""), "use one of those, or no prior",
            )  # fmt: skip
        return structure

    def posterior_stats(self, factor: Factor) -> Stats:
        structure, k, d = self._structure(factor), factor.n_components, factor.n_features
        assert k is not None and d is not None
        origin = _of(factor, "origin")
        mean = torch.zeros(d, dtype=torch.float64) if self.mean is None else self.mean
        delta = expand("mean", mean, (k, d), origin) - origin
        count = structure.counts(torch.full((k,), self.mean_precision, dtype=torch.float64, device=origin.device), d)
        scale = structure.shared_out(self._scale(factor), k)
        freedom = torch.full((), self._freedom(factor), dtype=torch.float64, device=origin.device)
        lead = scale.shape if isinstance(structure, Entrywise) else scale.shape[:-2]
        first = structure.by_column(count) * delta
        return Stats(
            count=count, dof=structure.dof(freedom.expand(lead), k, d), first=first,
            second=structure.about(scale, first, delta), shared=structure.shared, version=getattr(factor, "version", 0),
        )  # fmt: skip

    def divergence(self, factor: Factor, posterior: Stats, start: Stats, norm: Tensor) -> Tensor:
        """KL(q ‖ prior) from means, degrees of freedom and C = Ψ/ν, without natural coordinates of q.

            A(prior) + ½ Σ c (κ₀/κ + log κ − 1 − log 2π) + ½ Σ tr C⁻¹ (Ψ₀ + κ₀ δδᵀ)
            + Σ [½ ν₀ (log |C| + D log ν/2) − log Γ_D(ν/2) + ½ (ν − ν₀) ψ_D(ν/2) − ½ ν D],

        with δ between the means, Γ_D and ψ_D multivariate, c = D columns behind each κ. Of variances of entries D and
        c are one.

        Source: W. D. Penny (2001), Kullback–Leibler divergences of normal, gamma, Dirichlet and Wishart densities.
        """
        structure, d, lead = self._structure(factor), factor.n_features, len(factor.replicas)
        assert d is not None
        if isinstance(structure, Common):
            return super().divergence(factor, posterior, start, norm)
        raw, count = _of(factor, "scale"), posterior["count"]
        entrywise = isinstance(structure, Entrywise)
        width = 1 if entrywise else d
        spread = raw if entrywise else raw.diagonal(dim1=-2, dim2=-1).sum(-1)
        nu, nu_0 = structure.freedom(posterior["dof"], d), structure.freedom(start["dof"], d)
        half = (nu.unsqueeze(-1) - torch.arange(width, dtype=nu.dtype, device=nu.device)) / 2
        each = nu_0 * (spread + width / 2 * (nu / 2).log()) + (nu - nu_0) / 2 * half.digamma().sum(-1)
        each = each - half.lgamma().sum(-1) - width / 2 * nu - width * (width - 1) / 4 * math.log(math.pi)
        means = (start["count"] / count + count.log() - (1 + LOG_2PI)) * (width / 2)
        total = norm + means.flatten(lead).sum(-1) + (each.flatten(lead).sum(-1) if each.dim() > lead else each)
        delta = _of(factor, "mean") - _of(factor, "origin")
        return (
            total + structure.trace(raw, structure.scatter(start["count"], start["first"], start["second"], delta)) / 2
        )

    def config(self) -> dict[str, Any]:
        return {
            "mean": plain(self.mean), "mean_precision": self.mean_precision, "dof": self.dof,
            "scale": plain(self.scale),
        }  # fmt: skip


class NormalInverseWishart(_MeanAndCovariance):
    """Means and covariances of a full or tied `Gaussian`: Σ ~ IW(ν, Ψ), μ_k | Σ ~ N(m, Σ/κ).

    p(Σ) ∝ |Σ|^−(ν+D+1)/2 exp(−½ tr Ψ Σ⁻¹). Tied: one Σ for all means.

    Args:
        mean: m, ``[D]`` or ``[K, D]``; None for the data's.
        mean_precision: κ, observations that m is worth.
        dof: ν, more than D − 1; None for D.
        scale: Ψ, one number (times the identity) or ``[D, D]`` (full: or ``[K, D, D]``); None for the diagonal of the
            data's variances.

    Raises:
        InvalidArgument: If κ or ν is out of range; where the prior is used, if Ψ is not positive definite.

    Source: A. Gelman et al. (2013), section 3.6; C. Fraley, A. E. Raftery (2007) for the mode.

    Example:
        >>> import torchem
        >>> g = torchem.factors.Gaussian(1, 2)
        >>> g.prior = NormalInverseWishart(mean=[0.0, 0.0], dof=4.0, scale=1.0)
        >>> g.prior.mode_stats(g)["dof"]
        tensor([8.], dtype=torch.float64)
    """

    def _structure(self, factor: Factor) -> Structure:
        return self._checked(factor, False, "full or tied")


class NormalInverseGamma(_MeanAndCovariance):
    """Means and variances of a diagonal or spherical `Gaussian`: σ² ~ IG(ν/2, ψ/2), μ | σ² ~ N(m, σ²/κ).

    p(σ²) ∝ (σ²)^−(ν/2+1) exp(−ψ/2σ²): the inverse-Wishart law of one column. Spherical: one σ² for the means of all
    columns of a component. EEI and EII: one σ² for the means of all components, of a column or altogether.

    Args:
        mean: m, ``[D]`` or ``[K, D]``; None for the data's.
        mean_precision: κ, observations that m is worth.
        dof: ν, positive; None for D.
        scale: ψ, one number, ``[D]`` or ``[K, D]`` (spherical: ``[K]``; EEI: ``[D]``; EII: a number); None for the
            data's variances (spherical and EII: their mean).

    Raises:
        InvalidArgument: If κ, ν or ψ is not positive.

    Source: A. Gelman et al. (2013), section 3.3.

    Example:
        >>> import torchem
        >>> g = torchem.factors.Gaussian(1, 1, "diag")
        >>> g.prior = NormalInverseGamma(mean=0.0, dof=4.0, scale=1.0)
        >>> g.prior.mode_stats(g)["dof"]
        tensor([[7.]], dtype=torch.float64)
    """

    def __init__(self, mean: Any = None, mean_precision: float = 1.0, dof: float | None = None, scale: Any = None):
        super().__init__(mean, mean_precision, dof, scale)
        self.scale = hyper("scale", scale, positive=True)

    def _structure(self, factor: Factor) -> Structure:
        return self._checked(factor, True, "diag or spherical")


class MatrixNormalInverseWishart(_Normal):
    """Coefficients and covariances of a `LinearGaussian`: Σ ~ IW(ν, Ψ), W_k | Σ ~ MN(M, Σ, Λ⁻¹).

    p(W | Σ) ∝ exp(−½ tr Σ⁻¹ (W − M) Λ (W − M)ᵀ). Diagonal and spherical noise has σ² ~ IG(ν/2, ψ/2) instead.

    Args:
        mean: M, ``[D, M]`` or ``[K, D, M]``; None for zero.
        precision: Λ, one number (times the identity) or ``[M, M]``: observations that M is worth.
        dof: ν; None for D.
        scale: Ψ, as for `NormalInverseWishart` or `NormalInverseGamma`; None for the data's variances.

    Raises:
        InvalidArgument: If Λ or ν is out of range; where the prior is used, if Λ or Ψ is not positive definite, or some
            coefficients are common to all states.

    Source: T. P. Minka (2000), Bayesian linear regression.

    Example:
        >>> import torchem
        >>> line = torchem.factors.LinearGaussian(1, 2, 1)
        >>> line.prior = MatrixNormalInverseWishart(precision=0.1, dof=3.0, scale=1.0)
        >>> line.prior.mode_stats(line)["uu"]
        tensor([[[0.1000, 0.0000],
                 [0.0000, 0.1000]]], dtype=torch.float64)
    """

    mean_rank: ClassVar[int] = 3

    def __init__(self, mean: Any = None, precision: Any = 1.0, dof: float | None = None, scale: Any = None):
        self.mean = hyper("mean", mean)
        value = hyper("precision", precision)
        if value is None or (value.dim() == 0 and not bool(value > 0)):
            raise invalid("precision", "a positive number or matrix", precision, "1 is weak")
        if value.dim() and not bool(torch.linalg.cholesky_ex(value).info.eq(0).all()):
            raise invalid("precision", "a positive definite matrix", precision, "add a small multiple of I")
        self.precision = value
        self.dof = None if dof is None else number("dof", dof)
        self.scale = hyper("scale", scale)
        self._open = frozenset({"scale"} if self.scale is None else ())

    def _structure(self, factor: Factor) -> Structure:
        structure = getattr(factor, "structure", None)
        if structure is None or not hasattr(factor, "n_outputs"):
            raise invalid("prior", "a LinearGaussian to stand over", type(factor).__name__, "use its own prior")
        if getattr(factor, "shared", ()):
            raise invalid(
                "prior", "coefficients of each state alone (those in common have no conjugate prior)",
                "shared inputs", "use shared=()",
            )  # fmt: skip
        return structure

    def posterior_stats(self, factor: Factor) -> Stats:
        structure, k, d = self._structure(factor), factor.n_components, factor.n_features
        m = getattr(factor, "n_inputs", 0)
        assert k is not None and d is not None
        unit = _of(factor, "unit")
        mean = expand("mean", torch.zeros((), dtype=torch.float64) if self.mean is None else self.mean, (k, d, m), unit)
        precision = self.precision if self.precision.dim() else self.precision * torch.eye(m, dtype=torch.float64)
        uu = expand("precision", precision, (k, m, m), unit)
        ux = uu @ mean.mT
        scale = self._scale(factor)
        freedom = torch.full((), self._freedom(factor), dtype=torch.float64, device=unit.device)
        lead = scale.shape if isinstance(structure, Entrywise) else scale.shape[:-2]
        dof = structure.dof(freedom.expand(lead), k, d) + (m - 1)
        dof = dof[..., 0] if isinstance(structure, Entrywise) else dof
        root = linalg.cholesky(uu)
        rows = (mean @ root).mT
        count = torch.zeros(k, dtype=torch.float64, device=unit.device)
        return Stats(
            count=count, dof=dof, xx=scale + structure.second(rows, rows), ux=ux, uu=uu,
            shared=("xx",) if structure.shared else (),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {
            "mean": plain(self.mean), "precision": plain(self.precision), "dof": self.dof, "scale": plain(self.scale),
        }  # fmt: skip


class FactorLoadings(_Normal):
    """Means μ, loadings W and noise variances ψ of a `LowRankGaussian`: a regression of each column on (1, z).

        ψ_d ~ IG(ν/2, s_d/2),  μ_d | ψ_d ~ N(m_d, ψ_d/κ),  w_dj | ψ_d ~ N(0, ψ_d/α_j),

    with one ψ for all columns where the noise is spherical: in units of the noise loadings of score j have variance
    1/α_j.

    *Relevance.* α_j may itself be unknown: α_j ~ Gamma(a, b) for each score of each component. In variational Bayes it
    has a posterior Gamma(a + D/2, b + ½ Σ_d E w_dj²/ψ_d), whose mean takes the place of α_j; of a score that explains
    nothing it grows until its loadings are zero, so that more may be given than are needed. What the posterior of the
    loadings leaves to that of α is known in closed form: the bound is over both.

    Args:
        mean: m, ``[D]`` or ``[K, D]``; None for the data's.
        mean_precision: κ, observations that m is worth.
        precision: α, the same for all scores: observations that loadings of zero are worth.
        relevance: a and b (a shape and a rate) where α is unknown, for `torchem.Variational` alone.
        dof: ν, positive; None for D.
        scale: s, one number, ``[D]`` or ``[K, D]`` (spherical: ``[K]``); None for the data's variances
            (spherical: their mean).

    Raises:
        InvalidArgument: If κ, α, a, b, ν or s is not positive, or both α and a law of it are given.

    Source: Z. Ghahramani, M. J. Beal (2000); for relevance C. M. Bishop (1999), Variational principal components.

    Example:
        >>> import torchem
        >>> g = torchem.factors.LowRankGaussian(1, 3, rank=1)
        >>> g.prior = FactorLoadings(precision=0.1, dof=4.0, scale=1.0)
        >>> g.prior.mode_stats(g)["outer"]
        tensor([[[0.1000]]], dtype=torch.float64)
    """

    def __init__(
        self,
        mean: Any = None,
        mean_precision: float = 1.0,
        precision: float | None = None,
        relevance: Sequence[float] | Tensor | None = None,
        dof: float | None = None,
        scale: Any = None,
    ):
        self.mean = hyper("mean", mean)
        self.mean_precision = number("mean_precision", mean_precision)
        if precision is not None and relevance is not None:
            raise invalid("relevance", "None beside a precision that is known", "both", "give one of the two")
        self.precision = None if precision is None else number("precision", precision)
        self.relevance = hyper("relevance", relevance, positive=True)
        if self.relevance is not None and self.relevance.shape != (2,):
            raise invalid("relevance", "a shape and a rate", relevance, "pass for example (1e-3, 1e-3)")
        self.dof = None if dof is None else number("dof", dof)
        self.scale = hyper("scale", scale, positive=True)
        self._open = frozenset(name for name in ("mean", "scale") if getattr(self, name) is None)

    def config(self) -> dict[str, Any]:
        return {
            "mean": plain(self.mean), "mean_precision": self.mean_precision, "precision": self.precision,
            "relevance": plain(self.relevance), "dof": self.dof, "scale": plain(self.scale),
        }  # fmt: skip

    def check(self, factor: Factor) -> None:
        super().check(factor)
        if self.relevance is not None:
            raise invalid(
                "prior", "loadings of known precision (with α unknown the mode is at zero loadings, α without end)",
                repr(self), "give precision instead of relevance, or use it with torchem.Variational",
            )  # fmt: skip

    def check_given(self, kept: Sequence[str]) -> None:
        if self.relevance is not None:
            raise invalid(
                "freeze", f"all of a factor under {type(self).__name__} with a relevance, or nothing (what is kept of "
                "loadings has a law that α without bounds belongs to)", list(kept), "give precision instead",
            )  # fmt: skip

    def _structure(self, factor: Factor) -> Structure:
        structure = getattr(factor, "noise_structure", None)
        if structure is None:
            raise invalid("prior", "a LowRankGaussian to stand over", type(factor).__name__, "use its own prior")
        return structure

    @property
    def _first(self) -> float:
        """α, or where it is unknown its mean."""
        if self.relevance is None:
            return 1.0 if self.precision is None else self.precision
        return float(self.relevance[0] / self.relevance[1])

    # ---- in coordinates of the statistics ---------------------------------------------------------------------

    def _pseudo(self, factor: Factor) -> Stats:
        """As the statistics of complete rows: what κ rows at m with scores of zero would leave, and α of scores."""
        structure, k, d = self._structure(factor), factor.n_components, factor.n_features
        q = getattr(factor, "rank", 0)
        assert k is not None and d is not None
        origin = _of(factor, "origin")
        mean = torch.zeros((), dtype=torch.float64) if self.mean is None else self.mean
        delta = expand("mean", mean, (k, d), origin) - origin
        count = torch.full((k,), self.mean_precision, dtype=torch.float64, device=origin.device)
        first = count.unsqueeze(-1) * delta
        scale = self._scale(factor)
        spread = scale if structure.shape(2, 2) == (2, 2) else (scale / d).unsqueeze(-1)
        # Entries have the same ν: one number stands for a row.
        freedom = torch.full_like(count, self._freedom(factor))
        freedom = freedom if scale.dim() == 1 else freedom.unsqueeze(-1).expand(k, d)
        zero = torch.zeros(k, d, q, dtype=torch.float64, device=origin.device)
        return Stats(
            count=count, dof=structure.dof(freedom, k, d)[..., 0] + q, first=first, square=spread + first * delta,
            cross=zero, score=zero[:, 0], outer=self._first * torch.eye(q).to(zero).expand(k, q, q),
            version=getattr(factor, "version", 0),
        )  # fmt: skip

    def posterior_stats(self, factor: Factor) -> Stats:
        pseudo, family = self._pseudo(factor), cast(Any, factor)
        return family.columns(pseudo)

    def mode_stats(self, factor: Factor) -> Stats:
        stats, structure = self._pseudo(factor), self._structure(factor)
        k, d = factor.n_components, factor.n_features
        assert k is not None and d is not None
        return stats.like({**stats, "dof": stats["dof"] + structure.jacobian(k, d)})

    # ---- relevance --------------------------------------------------------------------------------------------

    def precisions(self, factor: Factor, posterior: Stats) -> Tensor:
        """E α of each score of each component under a posterior of the loadings, ``[*r, K, q]``.

        Example:
            >>> import torchem
            >>> m = torchem.FactorAnalysis(5, 3)
            >>> m.component = torchem.Variational(m.component, FactorLoadings(relevance=(1e-3, 1e-3)))
            >>> m.component.prior.precisions(m.component.factor, m.component.posterior()).shape
            torch.Size([1, 3])
        """
        if self.relevance is None:
            return torch.full_like(posterior["score"][..., 0, :], self._first)
        shape, rate = self._law(factor, posterior)
        return shape / rate

    def _law(self, factor: Factor, posterior: Stats) -> tuple[Tensor, Tensor]:
        """Shape and rate of the posterior of α given that of the loadings."""
        assert self.relevance is not None and factor.n_features is not None
        a, b = self.relevance.to(posterior["count"].device)
        family: Any = factor
        return a + factor.n_features / 2, b + family.sizes(posterior).sum(-2) / 2

    def combined(self, factor: Factor, start: Stats, stats: Stats, before: Callable[[], Stats]) -> Stats:
        """Prior and statistics; where α is unknown at its mean, which in turn follows the loadings."""
        found = start + stats
        if self.relevance is None:
            return found
        seen, outer = before(), found["outer"]
        for _ in range(_ROUNDS):
            more = (self.precisions(factor, seen) - self._first).diag_embed().unsqueeze(-3)
            seen = found.like({**found, "outer": outer + more})
        return seen

    def divergence(self, factor: Factor, posterior: Stats, start: Stats, norm: Tensor) -> Tensor:
        """That of loadings at the mean of α; where α is unknown with what its own law adds.

        ½ D Σ_j (log E α_j − E log α_j) + Σ_j KL(q(α_j) ‖ Gamma(a, b)).
        """
        if self.relevance is None:
            return super().divergence(factor, posterior, start, norm)
        shape, rate = self._law(factor, posterior)
        mean, log_mean = shape / rate, shape.digamma() - rate.log()
        start = start.map(lambda p, q: p.expand_as(q), posterior)  # a prior is common to all replicas
        at = start.like({**start, "outer": start["outer"] + (mean - self._first).diag_embed().unsqueeze(-3)})
        a, b = self.relevance.to(rate)
        gap = factor.n_features / 2 * (mean.log() - log_mean)  # pyright: ignore[reportOptionalOperand]
        gap = gap + shape * rate.log() - shape.lgamma() + a.lgamma() - a * b.log()
        gap = gap + (shape - a) * log_mean - (rate - b) * mean
        lead = len(factor.replicas)
        return super().divergence(factor, posterior, at, self.log_normalizer(factor, at)) + gap.flatten(lead).sum(-1)


def _of(factor: Factor, name: str) -> Tensor:
    """A buffer of the factor, without replicas where each has its own, float64."""
    return getattr(factor, name).to(torch.float64)
