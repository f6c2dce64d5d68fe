"""Gaussian log-densities and their moments for four covariance structures, by two routes.

*Features.* About one origin o, with z = (1, x − o), a log-density is linear in the products z_i z_j: potentials of all
components and replicas are one matrix product ``W @ t`` and moments are its transpose. The products are laid out as
cyclic shifts, t[d, s] = z_d · z_{d+s mod p}: one strided multiplication, each pair once. (In this order of axes the
product comes out contiguous; the other way round it would be copied, which costs as much again.)

*Direct.* Differences x − μ_k through triangular factors, and moments about an origin per component: exact where
tight clusters lie far apart, at more memory traffic.

`rounding` bounds the error of the first route, so that a caller can choose between them.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from types import ModuleType

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from torchem.ops import linalg
from torchem.ops.dispatch import compiled_mixture
from torchem.ops.reduce import watched

LOG_2PI = math.log(2 * math.pi)
#: Variances beyond so many times those of the data are of no fit.
_WILD = 100.0
#: Components from which on, and coefficients up to which, compiled passes are faster than products: components fill
#: a vector, coefficients a core's own cache. (They are in float64; products in float32 are as fast.)
_FEW, _TABLE = 8, 1 << 15
#: The same of passes under Student's t, whose densities and statistics cost as much as its products: in float32 too.
_FEW_HEAVY, _FLOATS = 4, (torch.float64, torch.float32)


def augment(x: Float[Tensor, "n d"], origin: Float[Tensor, "1 d"]) -> Float[Tensor, "d+1 n"]:
    """z = (1, x − o) as ``[D + 1, n]``: observations along contiguous memory."""
    shifted = (x - origin).mT
    return torch.cat([shifted.new_ones(1, shifted.shape[1]), shifted])


@lru_cache(maxsize=64)
def _pairs(p: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Where each cyclic product z_d z_{d+s} stands in a symmetric ``p × p`` matrix, how often, and the way back."""
    shift = torch.arange(p // 2 + 1)
    first = torch.arange(p).unsqueeze(-1).expand(p, p // 2 + 1)
    second = (first + shift) % p
    there = first * p + second
    # A pair appears once among the shifts, except that s = p/2 meets each twice; off the diagonal it stands for two.
    twice = torch.where((shift == 0) | (2 * shift == p), 1.0, 2.0).expand_as(there)
    back = torch.empty(p * p, dtype=torch.long)
    flat = torch.arange(there.numel())
    back[(second * p + first).reshape(-1)] = flat
    back[there.reshape(-1)] = flat
    return there.reshape(-1).to(device), twice.reshape(-1).to(torch.float64).to(device), back.to(device)


def student(distance: Tensor, log_det: Tensor, size: Tensor, freedom: Tensor) -> Tensor:
    """Log-density of a t with ``freedom``, of ``size`` columns, at a squared distance; 0 for no columns."""
    return student_constant(log_det, size, freedom) - (freedom + size) / 2 * (distance / freedom).log1p()


def student_constant(log_det: Tensor, size: Tensor, freedom: Tensor) -> Tensor:
    """`student` at the mean."""
    half = (freedom + size) / 2
    return half.lgamma() - (freedom / 2).lgamma() - (size * (freedom * math.pi).log() + log_det) / 2


#: Degrees of freedom of a covariance that is known: what they blur is below rounding.
CERTAIN = 1e18


def student_or_normal(distance: Tensor, log_det: Tensor, size: Tensor, freedom: Tensor) -> Tensor:
    """`student`, normal where there are `CERTAIN` degrees of freedom."""
    certain = freedom > CERTAIN / 2
    value = student(distance, log_det, size, torch.where(certain, 1.0, freedom))
    return torch.where(certain, -0.5 * (size * LOG_2PI + log_det + distance), value)


class Structure(ABC):
    """How a covariance is stored, scored, estimated and floored. Stateless; leading axes are replicas."""

    #: Statistics without a component axis.
    shared: frozenset[str] = frozenset()

    @abstractmethod
    def shape(self, k: int, d: int) -> tuple[int, ...]:
        """Shape of `covariances`, and of the unconstrained coordinates."""

    @abstractmethod
    def n_parameters(self, k: int, d: int) -> int:
        """Free entries of the covariances."""

    @abstractmethod
    def raw(self, covariances: Tensor) -> Tensor:
        """Unconstrained coordinates; NaN where a matrix is not positive definite."""

    @abstractmethod
    def covariances(self, raw: Tensor) -> Tensor:
        """Inverse of `raw`."""

    @abstractmethod
    def dense(self, raw: Tensor, k: int, d: int) -> Tensor:
        """Lower factors ``[*r, K, D, D]`` of every component, for sampling and export."""

    # -- features route ------------------------------------------------------------------------------------------

    @abstractmethod
    def n_features(self, d: int) -> int:
        """Rows of `features`."""

    @abstractmethod
    def features(self, z: Tensor) -> Tensor:
        """``[F, n]`` from the augmented ``z [D + 1, n]``."""

    #: What compiled passes call the features, but for a first one that is constant; None where they have none.
    compiled: str | None = None

    @abstractmethod
    def coefficients(self, delta: Tensor, raw: Tensor) -> Tensor:
        """``W [*r, K, F]`` with ``W @ features(z)`` the log-densities, but for `common`."""

    @abstractmethod
    def moments(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count ``[*r, K]``, first ``[*r, K, D]`` and second moments from ``responsibilities @ features(z).T``."""

    def common(self, raw: Tensor) -> Tensor | None:
        """Inverse factor of a quadratic term that all components share, if there is one."""
        return None

    def prefers_differences(self, k: int, d: int) -> bool:
        """Whether differences are faster than features for ``k`` components of ``d`` columns."""
        return False

    # -- direct route --------------------------------------------------------------------------------------------

    @abstractmethod
    def root(self, raw: Tensor) -> Tensor:
        """What `distance` multiplies differences by: inverse factors or inverse standard deviations."""

    @abstractmethod
    def distance(self, difference: Tensor, root: Tensor) -> Tensor:
        """Squared Mahalanobis norms ``[*r, K, n]`` of differences ``[*r, K, n, D]``."""

    @abstractmethod
    def second(self, difference: Tensor, weighted: Tensor) -> Tensor:
        """Second moments of differences whose weighted copy is ``weighted``."""

    # -- M-step --------------------------------------------------------------------------------------------------

    @abstractmethod
    def log_det(self, raw: Tensor, k: int, d: int) -> Tensor:
        """log |Σ_k|, ``[*r, K]`` (or broadcastable)."""

    def counts(self, count: Tensor, d: int) -> Tensor:
        """The counts of complete rows, ``[*r, K]``, in the layout of the statistics."""
        return count

    def by_column(self, count: Tensor) -> Tensor:
        """Counts against the columns of first moments, ``[*r, K, 1 or D]``."""
        return count.unsqueeze(-1)

    def normalizer(self, dof: Tensor, raw: Tensor, k: int, d: int) -> Tensor:
        """Σ dof · (log |Σ_k| + D log 2π), ``[*r]``: what −2 Q holds besides `trace`."""
        return (dof * (self.log_det(raw, k, d) + d * LOG_2PI)).sum(-1)

    @abstractmethod
    def scatter(self, count: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
        """Second moments about ``origin + delta`` instead of the origin."""

    def about(self, scatter: Tensor, first: Tensor, delta: Tensor) -> Tensor:
        """Second moments about the origin from those about means at ``delta``, with first moments κδ: + κδδᵀ."""
        return scatter + first.unsqueeze(-1) * delta.unsqueeze(-2)

    def mass(self, dof: Tensor) -> Tensor:
        """Degrees of freedom behind each covariance that is estimated by itself."""
        return dof

    def divided(self, scatter: Tensor, mass: Tensor) -> Tensor:
        """Covariances from scatter and their `mass`."""
        return scatter / mass[..., None, None]

    def estimate(self, scatter: Tensor, dof: Tensor, d: int) -> Tensor:
        """Covariances from scatter and the degrees of freedom ``[*r, K]`` of complete rows."""
        return self.divided(scatter, self.mass(self.counts(dof, d)))

    @abstractmethod
    def traces(self, raw: Tensor, scatter: Tensor) -> Tensor:
        """tr(Σ⁻¹ · scatter) of each covariance that is estimated by itself, ``[*r, K or 1]``."""

    def trace(self, raw: Tensor, scatter: Tensor) -> Tensor:
        """The sum of `traces`, ``[*r]``."""
        return self.traces(raw, scatter).sum(-1)

    @abstractmethod
    def clip(self, covariances: Tensor, unit: Tensor, floor: float) -> Tensor:
        """Nearest in likelihood with Δ^−½ Σ Δ^−½ ⪰ floor, Δ = diag(``unit``)."""

    @abstractmethod
    def smallest(self, covariances: Tensor, unit: Tensor, k: int) -> Tensor:
        """Smallest eigenvalue of Δ^−½ Σ_k Δ^−½, ``[*r, K]``."""

    def below(self, covariances: Tensor, raw: Tensor, unit: Tensor, floor: float, k: int) -> Tensor:
        """Where `clip` has something to do, ``[*r, K]``: more than what the rounding of ``raw`` explains.

        What counts is the smallest eigenvalue against the floor, not against the largest: the likelihood sees ratios.
        Where any matrix is far larger than the data a step went too far; to refuse it is left to the likelihood, which
        clipping would raise.
        """
        size = (self.variances(raw, k, unit.shape[-1]).to(unit) / unit).amax(-1)
        most = size.amax(-1, keepdim=True)
        rounding = torch.where(most > _WILD, 1e-9 * most, 4 * torch.finfo(raw.dtype).eps * size)
        return self.smallest(covariances, unit, k) < floor * (1 - 1e-9) - rounding

    @abstractmethod
    def add(self, covariances: Tensor, amount: float) -> Tensor:
        """Covariances with ``amount`` added to every variance."""

    @abstractmethod
    def variances(self, raw: Tensor, k: int, d: int) -> Tensor:
        """Marginal variances ``[*r, K, D]``."""

    @abstractmethod
    def conditioning(self, reach: Tensor, raw: Tensor) -> Tensor:
        """|reach|ᵀ |Σ⁻¹| |reach| per component: the size of the terms that the features route adds up."""

    # -- conjugate prior ---------------------------------------------------------------------------------------

    @abstractmethod
    def freedom(self, dof: Tensor, d: int) -> Tensor:
        """ν of the inverse-Wishart behind each covariance that is estimated by itself, from `dof` of the statistics."""

    @abstractmethod
    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        """The inverse of `freedom`, spread evenly, in the layout of the statistics."""

    @abstractmethod
    def jacobian(self, k: int, d: int) -> float:
        """What ``dof`` is more, in each entry, in densities of covariances than of precisions: dΛ = |Σ|^−(D+1) dΣ."""

    def least_freedom(self, d: int) -> int:
        """ν must exceed this."""
        return d - 1

    def prior_shape(self, k: int, d: int) -> tuple[int, ...]:
        """Shape of a prior's scatter."""
        return self.shape(k, d)

    def shared_out(self, scatter: Tensor, k: int) -> Tensor:
        """A prior's scatter in the layout of the statistics."""
        return scatter

    def settled(self, scatter: Tensor, freedom: Tensor) -> Tensor:
        """Inverses of expected precisions from a posterior's scatter and its degrees of freedom."""
        return self.divided(scatter, freedom)

    def unsettled(self, covariances: Tensor, freedom: Tensor) -> Tensor:
        """The inverse of `settled`, in the layout of the statistics."""
        return self.multiplied(covariances, freedom)

    def multiplied(self, covariances: Tensor, mass: Tensor) -> Tensor:
        """The inverse of `divided`."""
        return covariances * mass[..., None, None]

    def blur(self, count: Tensor, freedom: Tensor, d: int) -> Tensor:
        """E log N(x | μ, Λ) − log N(x | E μ, E Λ) of a row ``[*r, K]``, or of each entry ``[*r, K, D]``.

        ½ (E log |Λ| − log |E Λ|) − D / 2κ: the same for all x.
        """
        index = torch.arange(d, dtype=freedom.dtype, device=freedom.device)
        spread = ((freedom.unsqueeze(-1) - index) / 2).digamma().sum(-1) + d * (2 / freedom).log()
        return (self.per_component(spread) - d / count) / 2

    def per_component(self, value: Tensor) -> Tensor:
        """What belongs to each covariance against counts, ``[*r, K or 1]``."""
        return value

    def expected(self, count: Tensor, freedom: Tensor, scatter: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """What multiplies ``count``, ``dof``, ``first`` and ``second`` in E log N(x | μ, Λ), but for −½ log 2π.

        −½ (D/κ + mᵀ E Λ m), ½ E log |Λ|, E Λ m and −½ E Λ, with E Λ = ν Ψ⁻¹ (C. M. Bishop 2006, equations 10.64–10.65).
        """
        d = delta.shape[-1]
        factor = linalg.cholesky(scatter)
        root = linalg.inverse_factor(factor)
        precision = freedom[..., None, None] * (root.mT @ root)
        index = torch.arange(d, dtype=freedom.dtype, device=freedom.device)
        spread = ((freedom.unsqueeze(-1) - index) / 2).digamma().sum(-1) + d * math.log(2)
        log_det = self.per_component(spread - 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        linear = self.applied(precision, delta)
        constant = -0.5 * (d / count + (linear * delta).sum(-1))
        return constant, (log_det / 2).expand_as(count), linear, precision / -2

    def applied(self, precision: Tensor, delta: Tensor) -> Tensor:
        """Λ_k δ_k ``[*r, K, D]``."""
        return (precision @ delta.unsqueeze(-1)).squeeze(-1)

    @abstractmethod
    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        """log ∫ Π_k |Λ_k|^{dof/2} exp(−½ tr Λ_k (scatter_k + count_k δδᵀ)) dδ dΛ: the conjugate prior's normaliser."""


def _log_wishart(nu: Float[Tensor, "*n"], scatter: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n"]:
    """log ∫ |Λ|^{(ν − D − 1)/2} exp(−½ tr Λ·scatter) dΛ (C. M. Bishop 2006, equation B.79)."""
    d = scatter.shape[-1]
    log_det = 2 * linalg.log_cholesky(scatter).diagonal(dim1=-2, dim2=-1).sum(-1)
    return nu * d / 2 * math.log(2) + (nu / 2).mvlgamma(d) - nu / 2 * log_det


def _log_gamma(shape: Tensor, scatter: Tensor) -> Tensor:
    """log ∫ λ^{shape − 1} exp(−½ λ·scatter) dλ."""
    return shape.lgamma() - shape * (scatter / 2).log()


def _log_means(count: Tensor) -> Tensor:
    """The integral over one column of the means, but for the power of the precision that it leaves."""
    return (LOG_2PI - count.log()).sum(-1) / 2


def _precision(raw: Tensor) -> Tensor:
    root = linalg.inverse_factor(linalg.from_log_cholesky(raw))
    return root.mT @ root


def _shift(second: Tensor, first: Tensor, count: Tensor, delta: Tensor) -> Tensor:
    cross = first.unsqueeze(-1) * delta.unsqueeze(-2)
    square = count[..., None, None] * delta.unsqueeze(-1) * delta.unsqueeze(-2)
    return second - cross - cross.mT + square


class Full(Structure):
    """A covariance matrix per component; raw coordinates are Cholesky factors with logarithmic diagonal."""

    compiled = "PAIRS"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return k, d, d

    def n_parameters(self, k: int, d: int) -> int:
        return k * d * (d + 1) // 2

    def raw(self, covariances: Tensor) -> Tensor:
        return linalg.log_cholesky(covariances)

    def covariances(self, raw: Tensor) -> Tensor:
        factor = linalg.from_log_cholesky(raw)
        return factor @ factor.mT

    def dense(self, raw: Tensor, k: int, d: int) -> Tensor:
        return linalg.from_log_cholesky(raw)

    def n_features(self, d: int) -> int:
        return (d + 1) * ((d + 1) // 2 + 1)

    def features(self, z: Tensor) -> Tensor:
        p = z.shape[0]
        windows = torch.cat([z, z[: p // 2]]).unfold(0, p // 2 + 1, 1)
        return (windows.transpose(1, 2) * z.unsqueeze(1)).flatten(0, 1)

    def coefficients(self, delta: Tensor, raw: Tensor) -> Tensor:
        root = linalg.inverse_factor(linalg.from_log_cholesky(raw))
        y = root @ delta.unsqueeze(-1)
        linear = (root.mT @ y).squeeze(-1)
        d = delta.shape[-1]
        constant = -0.5 * (y.square().sum((-2, -1)) + d * LOG_2PI) - raw.diagonal(dim1=-2, dim2=-1).sum(-1)
        top = torch.cat([constant.unsqueeze(-1), linear / 2], -1).unsqueeze(-2)
        below = torch.cat([linear.unsqueeze(-1) / 2, root.mT @ root / -2], -1)
        there, twice, _ = _pairs(d + 1, str(delta.device))
        return torch.cat([top, below], -2).flatten(-2)[..., there] * twice.to(delta.dtype)

    def moments(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # F = p (⌊p/2⌋ + 1) has one solution p.
        p = next(p for p in range(1, product.shape[-1] + 1) if p * (p // 2 + 1) == product.shape[-1])
        gram = product[..., _pairs(p, str(product.device))[2]].unflatten(-1, (p, p))
        return gram[..., 0, 0], gram[..., 0, 1:], gram[..., 1:, 1:]

    def prefers_differences(self, k: int, d: int) -> bool:
        # D²/2 features are made once per row, K·D differences need none of them: measured on CPU, for D from 8 to 256
        # and both dtypes, the two cost the same near this line.
        return k <= 4 + d // 8

    def root(self, raw: Tensor) -> Tensor:
        return linalg.inverse_factor(linalg.from_log_cholesky(raw))

    def distance(self, difference: Tensor, root: Tensor) -> Tensor:
        return (difference @ root.mT).square().sum(-1)

    def second(self, difference: Tensor, weighted: Tensor) -> Tensor:
        return weighted.mT @ difference

    def log_det(self, raw: Tensor, k: int, d: int) -> Tensor:
        return 2 * raw.diagonal(dim1=-2, dim2=-1).sum(-1)

    def scatter(self, count: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
        return _shift(second, first, count, delta)

    def traces(self, raw: Tensor, scatter: Tensor) -> Tensor:
        return (_precision(raw) * scatter).sum((-2, -1))

    def clip(self, covariances: Tensor, unit: Tensor, floor: float) -> Tensor:
        scale = unit.sqrt()
        outer = scale.unsqueeze(-1) * scale
        return linalg.clip_spectrum(covariances / outer, floor) * outer

    def smallest(self, covariances: Tensor, unit: Tensor, k: int) -> Tensor:
        scale = unit.sqrt()
        return torch.linalg.eigvalsh(covariances / (scale.unsqueeze(-1) * scale))[..., 0]

    def add(self, covariances: Tensor, amount: float) -> Tensor:
        return covariances + amount * torch.eye(covariances.shape[-1]).to(covariances)

    def variances(self, raw: Tensor, k: int, d: int) -> Tensor:
        return linalg.from_log_cholesky(raw).square().sum(-1)

    def conditioning(self, reach: Tensor, raw: Tensor) -> Tensor:
        return ((_precision(raw).abs() @ reach.unsqueeze(-1)).squeeze(-1) * reach).sum(-1)

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return dof + d

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return freedom - d

    def jacobian(self, k: int, d: int) -> float:
        return 2.0 * (d + 1)

    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        return d * _log_means(count) + _log_wishart(dof + d, scatter).sum(-1)


class Tied(Structure):
    """One covariance matrix for all components: the quadratic term is common, the rest linear in x."""

    shared = frozenset({"second"})

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return d, d

    def n_parameters(self, k: int, d: int) -> int:
        return d * (d + 1) // 2

    def raw(self, covariances: Tensor) -> Tensor:
        return linalg.log_cholesky(covariances)

    def covariances(self, raw: Tensor) -> Tensor:
        factor = linalg.from_log_cholesky(raw)
        return factor @ factor.mT

    def dense(self, raw: Tensor, k: int, d: int) -> Tensor:
        factor = linalg.from_log_cholesky(raw).unsqueeze(-3)
        return factor.expand(*factor.shape[:-3], k, d, d)

    def n_features(self, d: int) -> int:
        return d + 1

    def features(self, z: Tensor) -> Tensor:
        return z

    def coefficients(self, delta: Tensor, raw: Tensor) -> Tensor:
        root = linalg.inverse_factor(linalg.from_log_cholesky(raw))
        y = delta @ root.mT
        d = delta.shape[-1]
        constant = -0.5 * (y.square().sum(-1) + d * LOG_2PI) - raw.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-1)
        return torch.cat([constant.unsqueeze(-1), y @ root], -1)

    def moments(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a tied second moment is gathered apart from the product")

    def common(self, raw: Tensor) -> Tensor | None:
        return linalg.inverse_factor(linalg.from_log_cholesky(raw))

    def root(self, raw: Tensor) -> Tensor:
        return linalg.inverse_factor(linalg.from_log_cholesky(raw)).unsqueeze(-3)

    def distance(self, difference: Tensor, root: Tensor) -> Tensor:
        return (difference @ root.mT).square().sum(-1)

    def second(self, difference: Tensor, weighted: Tensor) -> Tensor:
        return (weighted.mT @ difference).sum(-3)

    def log_det(self, raw: Tensor, k: int, d: int) -> Tensor:
        return 2 * raw.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-1)

    def scatter(self, count: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
        cross = first.mT @ delta
        return second - cross - cross.mT + delta.mT @ (count.unsqueeze(-1) * delta)

    def about(self, scatter: Tensor, first: Tensor, delta: Tensor) -> Tensor:
        return scatter + first.mT @ delta

    def mass(self, dof: Tensor) -> Tensor:
        return dof.sum(-1)

    def traces(self, raw: Tensor, scatter: Tensor) -> Tensor:
        return (_precision(raw) * scatter).sum((-2, -1)).unsqueeze(-1)

    clip = Full.clip

    def smallest(self, covariances: Tensor, unit: Tensor, k: int) -> Tensor:
        scale = unit.sqrt()
        least = torch.linalg.eigvalsh(covariances / (scale.unsqueeze(-1) * scale))[..., :1]
        return least.expand(*least.shape[:-1], k)

    add = Full.add

    def variances(self, raw: Tensor, k: int, d: int) -> Tensor:
        value = linalg.from_log_cholesky(raw).square().sum(-1).unsqueeze(-2)
        return value.expand(*value.shape[:-2], k, d)

    def conditioning(self, reach: Tensor, raw: Tensor) -> Tensor:
        return ((reach @ _precision(raw).abs()) * reach).sum(-1)

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return (dof - 1).sum(-1) + d + 1

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return ((freedom - d - 1) / k + 1).unsqueeze(-1).expand(*freedom.shape, k)

    def jacobian(self, k: int, d: int) -> float:
        return 2.0 * (d + 1) / k

    def per_component(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def applied(self, precision: Tensor, delta: Tensor) -> Tensor:
        return delta @ precision

    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        return d * _log_means(count) + _log_wishart(self.freedom(dof, d), scatter)


class Entrywise(Structure):
    """Columns that are independent given the component: statistics count entries, ``[*r, K, D]``, instead of rows."""

    @abstractmethod
    def deviations(self, raw: Tensor, d: int) -> Tensor:
        """Log standard deviations ``[*r, K, D]``."""

    @abstractmethod
    def pooled(self, second: Tensor) -> Tensor:
        """Second moments in the layout of the statistics from those of each entry, ``[*r, K, D]``."""

    def counts(self, count: Tensor, d: int) -> Tensor:
        return count.unsqueeze(-1).expand(*count.shape, d)

    def by_column(self, count: Tensor) -> Tensor:
        return count

    def normalizer(self, dof: Tensor, raw: Tensor, k: int, d: int) -> Tensor:
        return (dof * (2 * self.deviations(raw, d) + LOG_2PI)).sum((-2, -1))

    def about(self, scatter: Tensor, first: Tensor, delta: Tensor) -> Tensor:
        return scatter + self.pooled(first * delta)

    def divided(self, scatter: Tensor, mass: Tensor) -> Tensor:
        return scatter / mass

    def multiplied(self, covariances: Tensor, mass: Tensor) -> Tensor:
        return covariances * mass

    def least_freedom(self, d: int) -> int:
        return 0

    @abstractmethod
    def by_entry(self, value: Tensor) -> Tensor:
        """What belongs to each variance against entries, ``[*r, K, D or 1]``."""

    def expected(self, count: Tensor, freedom: Tensor, scatter: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        precision = freedom / scatter
        each = self.by_entry(precision)
        log_det = self.by_entry((freedom / 2).digamma() + math.log(2) - scatter.log())
        constant = -0.5 * (1 / count + each * delta.square())
        return constant, (log_det / 2).expand_as(count), each * delta, precision / -2

    def blur(self, count: Tensor, freedom: Tensor, d: int) -> Tensor:
        return (self.by_entry((freedom / 2).digamma() + (2 / freedom).log()) - 1 / count) / 2


class Diag(Entrywise):
    """Variances per component and column; raw coordinates are log standard deviations."""

    compiled = "SQUARES"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return k, d

    def n_parameters(self, k: int, d: int) -> int:
        return k * d

    def raw(self, covariances: Tensor) -> Tensor:
        return covariances.log() / 2

    def covariances(self, raw: Tensor) -> Tensor:
        return (2 * raw).exp()

    def deviations(self, raw: Tensor, d: int) -> Tensor:
        return raw

    def pooled(self, second: Tensor) -> Tensor:
        return second

    def dense(self, raw: Tensor, k: int, d: int) -> Tensor:
        return torch.diag_embed(raw.exp())

    def n_features(self, d: int) -> int:
        return 2 * d + 1

    def features(self, z: Tensor) -> Tensor:
        return torch.cat([z, z[1:].square()])

    def coefficients(self, delta: Tensor, raw: Tensor) -> Tensor:
        precision = (-2 * raw).exp()
        linear = precision * delta
        d = delta.shape[-1]
        constant = -0.5 * ((linear * delta).sum(-1) + d * LOG_2PI) - raw.sum(-1)
        return torch.cat([constant.unsqueeze(-1), linear, precision / -2], -1)

    def moments(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = (product.shape[-1] - 1) // 2
        return product[..., 0], product[..., 1 : d + 1], product[..., d + 1 :]

    def root(self, raw: Tensor) -> Tensor:
        return (-raw).exp().unsqueeze(-2)

    def distance(self, difference: Tensor, root: Tensor) -> Tensor:
        return (difference * root).square().sum(-1)

    def second(self, difference: Tensor, weighted: Tensor) -> Tensor:
        return (weighted * difference).sum(-2)

    def log_det(self, raw: Tensor, k: int, d: int) -> Tensor:
        return 2 * raw.sum(-1)

    def scatter(self, count: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
        return second - 2 * first * delta + count * delta.square()

    def traces(self, raw: Tensor, scatter: Tensor) -> Tensor:
        return ((-2 * raw).exp() * scatter).sum(-1)

    def clip(self, covariances: Tensor, unit: Tensor, floor: float) -> Tensor:
        return torch.maximum(covariances, floor * unit)

    def smallest(self, covariances: Tensor, unit: Tensor, k: int) -> Tensor:
        return (covariances / unit).amin(-1)

    def add(self, covariances: Tensor, amount: float) -> Tensor:
        return covariances + amount

    def variances(self, raw: Tensor, k: int, d: int) -> Tensor:
        return (2 * raw).exp()

    def conditioning(self, reach: Tensor, raw: Tensor) -> Tensor:
        return (reach.square() * (-2 * raw).exp()).sum(-1)

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return dof + 1

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return freedom - 1

    def jacobian(self, k: int, d: int) -> float:
        return 4.0

    def by_entry(self, value: Tensor) -> Tensor:
        return value

    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        return _log_means(count).sum(-1) + _log_gamma((dof + 1) / 2, scatter).sum((-2, -1))


class Spherical(Entrywise):
    """One variance per component; raw coordinates are log standard deviations."""

    compiled = "NORM"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (k,)

    def n_parameters(self, k: int, d: int) -> int:
        return k

    def raw(self, covariances: Tensor) -> Tensor:
        return covariances.log() / 2

    def covariances(self, raw: Tensor) -> Tensor:
        return (2 * raw).exp()

    def deviations(self, raw: Tensor, d: int) -> Tensor:
        return raw.unsqueeze(-1).expand(*raw.shape, d)

    def pooled(self, second: Tensor) -> Tensor:
        return second.sum(-1)

    def dense(self, raw: Tensor, k: int, d: int) -> Tensor:
        return torch.diag_embed(self.deviations(raw, d).exp())

    def n_features(self, d: int) -> int:
        return d + 2

    def features(self, z: Tensor) -> Tensor:
        return torch.cat([z, z[1:].square().sum(0, keepdim=True)])

    def coefficients(self, delta: Tensor, raw: Tensor) -> Tensor:
        precision = (-2 * raw).exp().unsqueeze(-1)
        linear = precision * delta
        d = delta.shape[-1]
        constant = -0.5 * ((linear * delta).sum(-1) + d * LOG_2PI) - d * raw
        return torch.cat([constant.unsqueeze(-1), linear, precision / -2], -1)

    def moments(self, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return product[..., 0], product[..., 1:-1], product[..., -1]

    def root(self, raw: Tensor) -> Tensor:
        return (-raw).exp()[..., None, None]

    def distance(self, difference: Tensor, root: Tensor) -> Tensor:
        return (difference * root).square().sum(-1)

    def second(self, difference: Tensor, weighted: Tensor) -> Tensor:
        return (weighted * difference).sum((-2, -1))

    def log_det(self, raw: Tensor, k: int, d: int) -> Tensor:
        return 2 * d * raw

    def scatter(self, count: Tensor, first: Tensor, second: Tensor, delta: Tensor) -> Tensor:
        return second + (count * delta.square() - 2 * first * delta).sum(-1)

    def mass(self, dof: Tensor) -> Tensor:
        return dof.sum(-1)

    def traces(self, raw: Tensor, scatter: Tensor) -> Tensor:
        return (-2 * raw).exp() * scatter

    def clip(self, covariances: Tensor, unit: Tensor, floor: float) -> Tensor:
        return torch.maximum(covariances, floor * unit.amax(-1))

    def smallest(self, covariances: Tensor, unit: Tensor, k: int) -> Tensor:
        return covariances / unit.amax(-1)

    def add(self, covariances: Tensor, amount: float) -> Tensor:
        return covariances + amount

    def variances(self, raw: Tensor, k: int, d: int) -> Tensor:
        return (2 * self.deviations(raw, d)).exp()

    def conditioning(self, reach: Tensor, raw: Tensor) -> Tensor:
        return reach.square().sum(-1) * (-2 * raw).exp()

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return (dof - 1).sum(-1) + 2

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return ((freedom - 2) / d + 1).unsqueeze(-1).expand(*freedom.shape, d)

    def jacobian(self, k: int, d: int) -> float:
        return 4.0 / d

    def by_entry(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        return _log_means(count).sum(-1) + _log_gamma((dof.sum(-1) - d) / 2 + 1, scatter).sum(-1)


class Common(Entrywise):
    """Variances that all components have in common, stored for each: one posterior, of which each holds a share."""

    #: Axes of counts of entries that one variance is made of, and the axis of components of variances.
    pools: tuple[int, ...]
    axis: int

    def prior_shape(self, k: int, d: int) -> tuple[int, ...]:
        return self.shape(k, d)[1:]

    def shared_out(self, scatter: Tensor, k: int) -> Tensor:
        return (scatter / k).expand(k, *scatter.shape)

    def settled(self, scatter: Tensor, freedom: Tensor) -> Tensor:
        return scatter.sum(self.axis, keepdim=True) / freedom

    def unsettled(self, covariances: Tensor, freedom: Tensor) -> Tensor:
        return covariances * freedom / covariances.shape[self.axis]

    def expected(self, count: Tensor, freedom: Tensor, scatter: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        return super().expected(count, freedom, scatter.sum(self.axis, keepdim=True).expand_as(scatter), delta)

    def jacobian(self, k: int, d: int) -> float:
        return super().jacobian(k, d) / k

    def log_marginal(self, count: Tensor, dof: Tensor, scatter: Tensor, d: int) -> Tensor:
        each = _log_gamma((dof - 1).sum(self.pools) / 2 + 1, scatter.sum(self.axis))
        return _log_means(count).sum(-1) + (each if each.dim() == dof.dim() - 2 else each.sum(-1))


class CommonDiag(Common, Diag):
    """Variances of columns: mclust's EEI."""

    pools, axis = (-2,), -2

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return ((dof - 1).sum(-2, keepdim=True) + 2).expand_as(dof)

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return (freedom - 2) / k + 1


class CommonSpherical(Common, Spherical):
    """One variance: mclust's EII."""

    pools, axis = (-2, -1), -1

    def freedom(self, dof: Tensor, d: int) -> Tensor:
        return ((dof - 1).sum((-2, -1)) + 2).unsqueeze(-1).expand(dof.shape[:-1])

    def dof(self, freedom: Tensor, k: int, d: int) -> Tensor:
        return ((freedom - 2) / (k * d) + 1).unsqueeze(-1).expand(*freedom.shape, d)


STRUCTURES: dict[str, Structure] = {"full": Full(), "tied": Tied(), "diag": Diag(), "spherical": Spherical()}


class FeaturesPass:
    """Potentials and moments by one matrix product over features about a common origin."""

    def __init__(self, structure: Structure, mean: Tensor, raw: Tensor, origin: Tensor):
        self.structure, self.origin = structure, origin
        self.weights = structure.coefficients(mean - origin, raw)
        self.common = structure.common(raw)
        self.product: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    @property
    def compiled(self) -> str | None:
        """What compiled passes call these features; None where there are none of them."""
        return self.structure.compiled

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of ``x [n, D]``."""
        self.see(x)
        value = self.weights @ self.t
        if self.common is None:
            return value
        return value - (self.common @ self.z[1:]).square().sum(-2, keepdim=True) / 2

    def see(self, x: Float[Tensor, "n d"]) -> None:
        """Make these the present rows: their features serve densities and moments."""
        self.z = augment(x, self.origin)
        self.t = self.structure.features(self.z)

    def collect(self, weight: Float[Tensor, "*r k n"]) -> None:
        """Add moments under weights ``[*r, K, n]``."""
        self.product = self.product + (weight @ self.t.mT).to(torch.float64)
        if self.common is not None:
            centred = self.z[1:]
            self.second = self.second + ((centred * weight.sum(-2, keepdim=True)) @ centred.mT).to(torch.float64)

    def mixed(
        self, x: Shaped[Tensor, "n d"], weight: Tensor | None, log_weight: Float[Tensor, "*r k"]
    ) -> tuple[Tensor, Tensor] | None:
        """The whole E-step of a mixture of these under log weights of its components, collected, where it is compiled.

        Returns:
            Σ w log Z ``[*r]`` and Σ w γ ``[*r, K]``, float64.
        """
        engine = self._compiled(x, weight, log_weight, least=_FEW)
        if engine is None:
            return None
        each = self.weights.shape[:-1]
        slope, constant, *features = self._linear(engine)
        constant = constant + log_weight.expand(each).reshape(constant.shape)
        value, mass, total = engine.of_numbers(x, weight, slope, constant, *features)
        self._summed(mass, total)
        return value.reshape(each[:-1]), mass.reshape(each)

    def mixed_heavy(
        self,
        x: Shaped[Tensor, "n d"],
        weight: Tensor | None,
        log_weight: Float[Tensor, "*r k"],
        freedom: Float[Tensor, "*r k"],
        log_det: Float[Tensor, "*r #k"],
    ) -> tuple[Tensor, Tensor] | None:
        """`mixed` under Student's t of these locations and scales; what is collected is weighted by E u.

        Returns:
            Σ w log Z ``[*r]`` and six sums ``[*r, 6, K]``: see `torchem.ops.numba_.mixture.of_distances`.
        """
        engine = self._compiled(x, weight, log_weight, freedom, least=_FEW_HEAVY, dtypes=_FLOATS)
        if engine is None:
            return None
        d, lead, (slope, constant, *features) = x.shape[1], freedom.shape[:-1], self._linear(engine)
        # In float64: of many degrees of freedom logarithms of Γ are large, and cancel.
        freedom, log_det = freedom.to(torch.float64), log_det.to(torch.float64)
        top = log_weight + student_constant(log_det, torch.full_like(freedom, d), freedom)
        # δ² = −2 log N(x) − log |Σ| − D log 2π
        offset = -2 * constant - (log_det + d * LOG_2PI).expand_as(freedom).reshape(constant.shape)
        given = (value.reshape(constant.shape) for value in (freedom, top))
        value, sums, total = engine.of_distances(x, weight, -2 * slope, offset, *given, *features)
        self._summed(sums[:, 1], total)
        return value.reshape(lead), sums.reshape(*lead, *sums.shape[1:])

    def _compiled(
        self,
        x: Tensor,
        weight: Tensor | None,
        *others: Tensor,
        least: int,
        dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    ) -> ModuleType | None:
        """The compiled passes, where they serve these rows and are the faster way.

        Args:
            x: The rows.
            weight: Theirs.
            others: What else derivatives may follow.
            least: Components from which on they are.
            dtypes: Of parameters for which they are.
        """
        slope = self.weights
        k, f = slope.shape[-2:]
        engine = compiled_mixture(x.device, len(x) * slope[..., 0].numel() * f)
        if engine is None or self.compiled is None or slope.dtype not in dtypes:
            return None
        if x.dtype not in engine.TYPES or k < least or k * f > _TABLE:
            return None
        given = (x, slope, *others) if weight is None else (x, slope, weight, *others)
        return None if any(watched(value) for value in given) else engine

    def _linear(self, engine: ModuleType) -> tuple[Tensor, Tensor, int, Tensor]:
        """Slope ``[R, K, F]`` and constant ``[R, K]`` in features of compiled passes, their kind and origin."""
        assert self.compiled is not None
        slope, kind = self.weights.reshape(-1, *self.weights.shape[-2:]), getattr(engine, self.compiled)
        if kind in (engine.PAIRS, engine.ENTRIES):  # in which the constant is the first, or in all entries
            return slope, torch.zeros_like(slope[..., 0]), kind, self.origin.reshape(-1)
        return slope[..., 1:], slope[..., 0], kind, self.origin.reshape(-1)

    def _summed(self, mass: Tensor, total: Tensor) -> None:
        """Collect what a compiled pass summed."""
        if total.shape[-1] < self.weights.shape[-1]:
            total = torch.cat([mass.unsqueeze(-1), total], -1)
        self.product = self.product + total.reshape(self.weights.shape)

    def inner(self) -> Tensor:
        """Σ weight · log-density of all that was collected, ``[*r]``: linear, so a product of what is at hand."""
        total = (self.weights.to(torch.float64) * self.product).sum((-2, -1))
        if self.common is None:
            return total
        common = self.common.to(torch.float64)
        return total - (common.mT @ common * self.second).sum((-2, -1)) / 2

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, first and second moments about the origin, float64."""
        assert isinstance(self.product, Tensor)
        if self.common is None:
            return self.structure.moments(self.product)
        assert isinstance(self.second, Tensor)
        return self.product[..., 0], self.product[..., 1:], self.second


class DirectPass:
    """Potentials and moments by differences from each component's own mean and origin ``[1 or K, D]``."""

    def __init__(self, structure: Structure, mean: Tensor, raw: Tensor, origin: Tensor):
        self.structure, self.mean, self.origin = structure, mean, origin
        k, d = mean.shape[-2:]
        self.root = structure.root(raw)
        self.constant = (structure.log_det(raw, k, d) + d * LOG_2PI).unsqueeze(-1)
        self.count: Tensor | float = 0.0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.value: Tensor | None = None

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of ``x [n, D]``."""
        self.x = x
        distance = self.structure.distance(x - self.mean.unsqueeze(-2), self.root)
        self.value = (distance + self.constant) * -0.5
        return self.value

    def collect(self, weight: Float[Tensor, "*r k n"]) -> None:
        """Add moments under weights ``[*r, K, n]``."""
        # In float64: what is summed here may be small beside its distance from the origin.
        difference = self.x.to(torch.float64) - self.origin.unsqueeze(-2).to(torch.float64)
        self._add(weight, difference)

    def _counts(self, weight: Tensor) -> Tensor:
        return weight.sum(-1, dtype=torch.float64)

    def _add(self, weight: Tensor, difference: Tensor) -> None:
        """Add the moments of ``difference [*r, K or 1, n, D]`` from the origin."""
        if self.value is not None:
            # A weight of zero silences a density that underflowed to −inf.
            heard = torch.where(weight > 0, self.value, 0.0)
            self.total = self.total + (weight * heard).sum((-2, -1), dtype=torch.float64)
        weighted = weight.unsqueeze(-1) * difference
        self.count = self.count + self._counts(weight).to(torch.float64)
        self.first = self.first + weighted.sum(-2, dtype=torch.float64)
        self.second = self.second + self.structure.second(difference, weighted).to(torch.float64)

    def inner(self) -> Tensor:
        """Σ weight · log-density of all that was collected, ``[*r]``."""
        assert isinstance(self.total, Tensor)
        return self.total

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, first and second moments about the origin, float64."""
        assert isinstance(self.count, Tensor) and isinstance(self.first, Tensor) and isinstance(self.second, Tensor)
        return self.count, self.first, self.second


def rounding(
    structure: Structure, mean: Float[Tensor, "*r k d"], raw: Tensor, origin: Float[Tensor, "1 d"]
) -> Float[Tensor, ""]:
    """Bound on the absolute rounding error of a log-density by the features route, over all components.

    The route adds terms |z_i P_ij z_j|; for points within three standard deviations of a mean their sum is at most
    reachᵀ|P|reach with reach = |μ − o| + 3σ. Pairwise summation of F terms multiplies the unit roundoff by log₂ F; the
    differences x − o, the products and the coefficients add three roundings more.

    Source: N. J. Higham (2002), section 4.2.
    """
    k, d = mean.shape[-2:]
    reach = (mean - origin).abs() + 3 * structure.variances(raw, k, d).sqrt()
    unit = torch.finfo(mean.dtype).eps / 2
    return structure.conditioning(reach, raw).amax() * (unit * (3 + math.log2(structure.n_features(d))))


def spread(
    structure: Structure, mean: Float[Tensor, "*r k d"], raw: Tensor, origin: Float[Tensor, "..."]
) -> Float[Tensor, ""]:
    """Largest distance of a mean from its origin in marginal standard deviations."""
    k, d = mean.shape[-2:]
    return ((mean - origin).abs() / structure.variances(raw, k, d).sqrt()).amax()
