"""Normal densities of rows with missing entries (NaN), and the moments that EM takes of such rows.

*Full, tied.* Given the entries that were observed (o), those that are missing (m) are normal with covariance Λ_mm⁻¹ and
mean μ_m − Λ_mm⁻¹ Λ_mo (x_o − μ_o), where Λ = Σ⁻¹. A row completed by this mean is as far from μ, in Mahalanobis' sense,
as its observed part is, and log |Σ_oo| = log |Σ| + log |Λ_mm|. So the formulas of complete rows serve for completed
ones, and all that a pattern of missing entries costs is a matrix of the size of what is missing. Patterns with equally
many missing entries are factorised together.

Where no derivatives are asked for, compiled loops do the same row by row, components along vectors.

*Diagonal, spherical.* Columns are independent given the component: a missing entry is left out and not counted.

Source: R. J. A. Little, D. B. Rubin (2002), section 11.2; Z. Ghahramani, M. I. Jordan (1994).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from torchem.ops import linalg
from torchem.ops.dispatch import compiled_completed
from torchem.ops.gaussian import LOG_2PI, DirectPass, Entrywise, FeaturesPass, Structure
from torchem.ops.reduce import watched

#: Numbers of the matrices that are factorised at a time: what stays in the cache.
_AT_ONCE = 1 << 18
#: Numbers of the matrices that are held between potentials and moments; others are made twice.
_HELD = 1 << 22
#: Rows of a pattern from which one product for all of them is faster than one for each.
_MANY = 64
#: Largest matrices that are inverted faster all at once than one by one, if there are many.
_SMALL = 12
#: Columns of a pattern that are packed into one number.
_BITS = 40
#: Components from which on, and columns up to which, compiled loops take differences of complete rows faster.
_FEW, _WIDEST = 3, 128
#: Mean of the cube of the number of missing entries from which on compiled loops take rows in order of their patterns.
_WORTH_SORTING = 1000.0
#: Rows that are sorted at a time.
_SORTED = 1 << 12


# ---- what is missing ----------------------------------------------------------------------------------------------


def _unwrapped(x: Tensor) -> Tensor:
    """The values of ``x`` outside all transforms of torch.func: with the axes that vmap took away."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.detach()


def any_missing(x: Float[Tensor, "..."]) -> bool:
    """Whether any entry is NaN; inside vmap, whether any is in the whole of what is mapped over.

    Example:
        >>> any_missing(torch.tensor([[1.0, torch.nan]]))
        True
    """
    if not torch._C._are_functorch_transforms_active():
        return _any_nan(x.detach())
    with torch._C._DisableFuncTorch():
        return _any_nan(_unwrapped(x))


def _any_nan(values: Tensor) -> bool:
    # A sum is finite unless some entry is not (or it overflows).
    return not math.isfinite(values.sum().item()) and bool(values.isnan().any())


def _patterns(x: Float[Tensor, "n d"]) -> Bool[Tensor, "n d"] | None:
    """Which entries are missing, as values that Python may look at; None where vmap maps over them."""
    with torch._C._DisableFuncTorch():
        values = _unwrapped(x)
        return values.isnan() if values.shape == x.shape else None


def any_blank(x: Float[Tensor, "n d"]) -> bool:
    """Whether a row may have no entry; True where vmap hides what is missing.

    Example:
        >>> any_blank(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]]))
        True
    """
    if not any_missing(x):
        return False
    patterns = _patterns(x)
    return patterns is None or bool(patterns.all(-1).any())


# ---- groups of rows -----------------------------------------------------------------------------------------------


class _Group(ABC):
    """Some rows, and how the missing columns of each stand in matrices that hold nothing else.

    Rows and patterns are the last axis of everything, so that arithmetic runs along contiguous memory however small
    the matrices are.
    """

    rows: slice

    @abstractmethod
    def block(self, matrix: Float[Tensor, "*k d d"]) -> Float[Tensor, "*k m m p"]:
        """Missing rows and columns of a matrix, for each pattern."""

    @abstractmethod
    def by_row(self, value: Float[Tensor, "*k p"]) -> Float[Tensor, "*k n"]:
        """What belongs to patterns, for each row."""

    @abstractmethod
    def completed(self, known: Tensor, pull: Tensor, covariance: Float[Tensor, "*j m m p"]) -> Float[Tensor, "*k d n"]:
        """``known [*k, D, n]`` with −covariance · pull at the missing entries of each row."""

    @abstractmethod
    def diagonal(self, matrix: Float[Tensor, "*k m m p"], d: int) -> Float[Tensor, "*k d n"]:
        """The diagonal of each row's matrix, in its places; zero at observed entries."""

    @abstractmethod
    def total(self, weight: Float[Tensor, "*k n"], matrix: Float[Tensor, "*j m m p"], d: int) -> Tensor:
        """Σ weight · matrix over the rows, in their places, ``[*k, D, D]``."""


@dataclass(frozen=True)
class _Patterns(_Group):
    """Patterns with equally many missing entries, whose rows follow one another.

    Attributes:
        rows: Where the rows stand.
        columns: Missing columns of each pattern.
        which: Pattern of each row.
    """

    rows: slice
    columns: Int[Tensor, "m p"]
    which: Int[Tensor, " n"]

    def _cells(self, d: int) -> Int[Tensor, "m m p"]:
        return self.columns.unsqueeze(1) * d + self.columns.unsqueeze(0)

    def _places(self, lead: torch.Size) -> Int[Tensor, "*k m n"]:
        places = self.columns[:, self.which]
        return places.expand(*lead, *places.shape)

    def block(self, matrix: Tensor) -> Tensor:
        return matrix.flatten(-2)[..., self._cells(matrix.shape[-1])]

    def by_row(self, value: Tensor) -> Tensor:
        return value if value.shape[-1] == len(self.which) else value.index_select(-1, self.which)

    def completed(self, known: Tensor, pull: Tensor, covariance: Tensor) -> Tensor:
        places = self._places(known.shape[:-2])
        pull = pull.gather(-2, places)
        if covariance.shape[-1] == 1:
            move = covariance.squeeze(-1) @ pull
        else:
            move = (self.by_row(covariance) * pull.unsqueeze(-3)).sum(-2)
        return known.scatter(-2, places, -move)

    def diagonal(self, matrix: Tensor, d: int) -> Tensor:
        values = self.by_row(matrix.diagonal(dim1=-3, dim2=-2).mT)
        lead = values.shape[:-2]
        return values.new_zeros(*lead, d, values.shape[-1]).scatter(-2, self._places(lead), values)

    def total(self, weight: Tensor, matrix: Tensor, d: int) -> Tensor:
        patterns = self.columns.shape[1]
        if patterns < len(self.which):
            weight = weight.new_zeros(*weight.shape[:-1], patterns).index_add(-1, self.which, weight)
        values = (weight[..., None, None, :] * matrix).flatten(-3)
        cells = self._cells(d).flatten().expand(values.shape)
        return values.new_zeros(*values.shape[:-1], d * d).scatter_add(-1, cells, values).unflatten(-1, (d, d))


@dataclass(frozen=True)
class _Masks(_Group):
    """Rows with patterns that cannot be looked at: all columns, the observed ones filled up with those of the identity.

    Attributes:
        rows: Where the rows stand.
        missing: True where an entry is missing.
    """

    rows: slice
    missing: Bool[Tensor, "d n"]

    def _both(self) -> Bool[Tensor, "d d n"]:
        return self.missing.unsqueeze(1) & self.missing.unsqueeze(0)

    def block(self, matrix: Tensor) -> Tensor:
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return torch.where(self._both(), matrix.unsqueeze(-1), eye.unsqueeze(-1))

    def by_row(self, value: Tensor) -> Tensor:
        return value

    def completed(self, known: Tensor, pull: Tensor, covariance: Tensor) -> Tensor:
        move = (covariance * torch.where(self.missing, pull, 0.0).unsqueeze(-3)).sum(-2)
        return torch.where(self.missing, -move, known)

    def diagonal(self, matrix: Tensor, d: int) -> Tensor:
        return torch.where(self.missing, matrix.diagonal(dim1=-3, dim2=-2).mT, 0.0)

    def total(self, weight: Tensor, matrix: Tensor, d: int) -> Tensor:
        return torch.where(self._both(), weight[..., None, None, :] * matrix, 0.0).sum(-1)


def _inverse(matrix: Float[Tensor, "*k m m p"]) -> tuple[Float[Tensor, "*k m m p"], Float[Tensor, "*k p"]]:
    """Inverses and log-determinants of positive definite matrices with unit diagonals; NaN where they are not."""
    m, p = matrix.shape[-2:]
    return _exchanged(matrix) if m <= _SMALL and p >= 6 * m else _factorised(matrix)


def _exchanged(matrix: Float[Tensor, "*k m m p"]) -> tuple[Float[Tensor, "*k m m p"], Float[Tensor, "*k p"]]:
    """Jordan exchanges of one column after the other, A − (a_j − e_j)(a_jᵀ + e_jᵀ)/a_jj, for all matrices at once.

    No pivot exceeds one, since the diagonal began with that: so nothing cancels.

    Source: N. J. Higham (2002), section 14.4.
    """
    unit = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device).unsqueeze(-1)
    log_det = matrix.new_zeros(matrix.shape[:-3] + matrix.shape[-1:])
    for j in range(len(unit)):
        pivot = matrix[..., j, j, :]
        log_det = log_det + pivot.log()
        column, row = matrix[..., :, j, :] - unit[j], (matrix[..., j, :, :] + unit[j]) / pivot.unsqueeze(-2)
        matrix = torch.addcmul(matrix, column.unsqueeze(-2), row.unsqueeze(-3), value=-1)
    return matrix, log_det


def _factorised(matrix: Float[Tensor, "*k m m p"]) -> tuple[Float[Tensor, "*k m m p"], Float[Tensor, "*k p"]]:
    """A Cholesky factor of each matrix."""
    factor, info = torch.linalg.cholesky_ex(matrix.movedim(-1, -3))
    root = linalg.inverse_factor(factor)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (root.mT @ root).movedim(-3, -1).contiguous(), torch.where(info == 0, log_det, torch.nan)


def _order(missing: Bool[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """An order of rows in which equal patterns stand together, those with fewer missing entries first."""
    words = missing.to(torch.int64).split(_BITS, -1)
    packed = [(word << torch.arange(word.shape[-1], device=word.device)).sum(-1) for word in words]
    packed[-1] = packed[-1] | missing.sum(-1) << _BITS
    order = packed[0].argsort(stable=True)
    for key in packed[1:]:
        order = order[key[order].argsort(stable=True)]
    return order


def _inverse_order(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _grouped(missing: Bool[Tensor, "n d"], copies: int) -> tuple[Tensor, list[_Group]]:
    """The order of rows, and the groups that they then form.

    Args:
        missing: Values, True where an entry is missing.
        copies: Matrices per pattern (components × replicas): bounds the size of groups.
    """
    order = _order(missing)
    rows = missing[order]
    first = _changes((rows[1:] != rows[:-1]).any(-1))
    which = first.cumsum(0) - 1
    starts = first.nonzero()[:, 0]
    patterns = rows[starts]
    size, m = starts.diff(append=starts.new_tensor([len(rows)])), patterns.sum(-1)
    alone = size >= _MANY
    share = torch.where(alone, 0, size * m * m * copies).cumsum(0) // _AT_ONCE
    group = _changes((m.diff() != 0) | alone[1:] | alone[:-1] | (share.diff() != 0)).nonzero()[:, 0]
    patterns_of = pairwise([*group.tolist(), len(patterns)])
    rows_of = pairwise([*starts[group].tolist(), len(rows)])
    groups: list[_Group] = []
    for (p, q), (start, stop), width in zip(patterns_of, rows_of, m[group].tolist(), strict=True):
        columns = patterns[p:q].nonzero()[:, 1].view(q - p, width).mT.contiguous()
        groups.append(_Patterns(slice(start, stop), columns, which[start:stop] - p))
    return order, groups


def _changes(new: Bool[Tensor, " n"]) -> Bool[Tensor, " n+1"]:
    """Where runs begin: at the first place, and where the next one is new."""
    return torch.cat([new.new_ones(1), new])


def _masked(missing: Bool[Tensor, "n d"], copies: int) -> list[_Group]:
    """All rows as they stand, in groups of bounded size."""
    n, d = missing.shape
    step = max(1, _AT_ONCE // (copies * d * d))
    return [_Masks(slice(i, i + step), missing[i : i + step].mT) for i in range(0, n, step)]


# ---- passes -------------------------------------------------------------------------------------------------------


class CompletedPass(DirectPass):
    """Rows completed by their conditional means, under full and tied covariances.

    Computes in the type of its arguments. Differences are held in units of conditional standard deviations, in which
    precisions have a unit diagonal.
    """

    def __init__(self, structure: Structure, mean: Tensor, raw: Tensor, origin: Tensor):
        super().__init__(structure, mean, raw, origin)
        precision = self.root.mT @ self.root
        self.unit = precision.diagonal(dim1=-2, dim2=-1).rsqrt().unsqueeze(-1)
        self.rate = 1 / self.unit
        self.precision = precision * self.unit * self.unit.mT
        self.root = self.root * self.unit.mT

    def log_prob(
        self, x: Float[Tensor, "n d"], center: Float[Tensor, "*r k n d"] | None = None
    ) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``; ``center``: means of each row's own."""
        rows, groups = self._arrange(x.to(self.mean.dtype))
        missing = rows.isnan()
        mean = self.mean.unsqueeze(-1) if center is None else self._ordered(center.mT)
        gap = (torch.where(missing, 0.0, rows) - mean) * self.rate
        known = torch.where(missing, 0.0, gap)
        pull = self.precision @ known
        self.left, parts, log_dets, held = [], [], [], 0
        for group in groups:
            covariance, log_det = _inverse(group.block(self.precision))
            held += covariance.numel()
            self.left.append((group, covariance if held <= _HELD else None))
            parts.append(group.completed(known[..., group.rows], pull[..., group.rows], covariance))
            log_dets.append(group.by_row(log_det))
        self.difference = torch.cat(parts, -1)
        distance = self.structure.distance(self.difference.mT, self.root) + self.constant
        absent = missing.sum(0, dtype=distance.dtype)
        # Summed this is Q: what is missing is expected at a squared distance of its dimension.
        self.value = (distance + absent) * -0.5
        # Nothing seen is nothing said: neither a density nor a statistic.
        self.seen = absent < x.shape[-1]
        # log |Σ_oo| + o log 2π = log |Σ| + D log 2π + log |Λ_mm| − m log 2π
        units = (2 * self.unit.log() + LOG_2PI).squeeze(-1) @ missing.to(distance)
        value = (distance + torch.cat(log_dets, -1) - units) * -0.5
        return self._restored(torch.where(self.seen, value, 0.0), -1)

    def _arrange(self, x: Tensor) -> tuple[Tensor, list[_Group]]:
        """The rows as ``[D, n]``, in the order of the groups that they form."""
        copies = self.mean.shape[:-1].numel()
        patterns = _patterns(x)
        if patterns is None:
            self.order = None
            return x.mT, _masked(x.isnan(), copies)
        with torch._C._DisableFuncTorch():
            self.order, groups = _grouped(patterns, copies)
        return x.mT.index_select(-1, self.order), groups

    def _ordered(self, value: Tensor) -> Tensor:
        """What has an axis of rows last, in the order that they were put in."""
        return value if self.order is None else value.index_select(-1, self.order)

    def _restored(self, value: Tensor, dim: int) -> Tensor:
        """``value`` in the order that rows came in."""
        return value if self.order is None else value.index_select(dim, _inverse_order(self.order))

    def _covariances(self) -> Iterator[tuple[_Group, Tensor]]:
        """The covariance that each pattern leaves, made again where it was not held."""
        for group, covariance in self.left:
            yield group, _inverse(group.block(self.precision))[0] if covariance is None else covariance

    def collect(self, weight: Float[Tensor, "*r k n"], left: Float[Tensor, "*r k n"] | None = None) -> None:
        """Add completed moments under weights ``[*r, K, n]``; covariances of what is missing under ``left``."""
        weight, mass = self._arranged(weight), None if left is None else self._arranged(left)
        gap = (self.mean - self.origin).unsqueeze(-1)
        self._add(weight, torch.addcmul(gap, self.difference, self.unit).mT)
        self.second = self.second + self._spread(weight if mass is None else mass)

    def _spread(self, weight: Tensor) -> Tensor:
        """Σ weight · covariance of what is missing, float64, for weights in the order of the rows."""
        tied, d = bool(self.structure.shared), self.precision.shape[-1]
        each = weight.sum(-2, keepdim=True) if tied else weight
        rest = sum(group.total(each[..., group.rows], covariance, d) for group, covariance in self._covariances())
        rest = (rest * self.unit * self.unit.mT).to(torch.float64)
        return rest.squeeze(-3) if tied else rest

    def residuals(self) -> Float[Tensor, "*r k n d"]:
        """The rows less their means, completed."""
        return self._restored((self.difference * self.unit).mT, -2)

    def spread(self, weight: Float[Tensor, "*r k n"]) -> Tensor:
        """Σ weight · covariance of what is missing, as the structure has second moments; nothing where nothing seen."""
        return self._spread(self._arranged(weight))

    def _arranged(self, weight: Tensor) -> Tensor:
        """Weights in the order of the rows, zero where nothing was seen."""
        return torch.where(self.seen, self._ordered(weight).to(self.mean.dtype), 0.0)

    def conditional(
        self, x: Float[Tensor, "n d"], center: Float[Tensor, "*r k n d"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means and variances ``[*r, K, n, D]`` of all entries given those observed."""
        self.log_prob(x, center)
        mean = self.mean.unsqueeze(-1) if center is None else self._ordered(center.mT)
        mean = torch.addcmul(mean, self.difference, self.unit).mT
        variance = torch.cat([group.diagonal(c, x.shape[-1]) for group, c in self._covariances()], -1)
        variance = (variance * self.unit.square()).mT.expand(mean.shape)
        mean, variance = (self._restored(value, -2) for value in (mean, variance))
        return torch.where(x.isnan(), mean, x.to(mean)), variance


def _worth_sorting(x: Float[Tensor, "n d"]) -> bool:
    """Whether compiled loops should take rows in order of their patterns, by the first of them."""
    # Factorising takes m³ / 6 products, finding rows that may share one a sort.
    return bool((x[:_SORTED].isnan().sum(-1).to(torch.float64) ** 3).mean() > _WORTH_SORTING)


class CompiledPass(CompletedPass):
    """`CompletedPass` by compiled loops, where no derivatives are asked for: the same numbers, many times faster."""

    def __init__(self, engine: ModuleType, structure: Structure, mean: Tensor, raw: Tensor, origin: Tensor):
        super().__init__(structure, mean, raw, origin)
        self.lead, d = mean.shape[:-1], mean.shape[-1]
        unit = self.unit.squeeze(-1).expand_as(mean)
        square = (*self.lead, d, d)
        constant = self.constant.squeeze(-1).expand(self.lead)
        matrices = self.precision.expand(square), self.root.expand(square)
        #: Of each replica's components: what they are made of.
        self.tables = (mean, unit, mean - origin, 2 * unit.log() + LOG_2PI, constant, *matrices)
        self.engine, self.axes = engine, len(self.lead)
        self._loops: Any = None
        #: Moments of whole passes, ``[J, …]``.
        self.found: list[list[Tensor]] = []

    @property
    def loops(self) -> Any:
        """The loops over all replicas' components side by side."""
        if self._loops is None:
            self._loops = self.engine.Rows(*(value.flatten(0, self.axes - 1) for value in self.tables))
        return self._loops

    def log_prob(self, x: Float[Tensor, "n d"], center: Tensor | None = None) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``."""
        assert center is None
        missing = x.isnan()
        self.seen = ~missing.all(-1)
        value, inner = self.loops.densities(x, _order(missing) if _worth_sorting(x) else None)
        self.value = inner.reshape(*self.lead, -1)
        return value.reshape(*self.lead, -1).to(self.mean.dtype)

    def collect(self, weight: Float[Tensor, "*r k n"], left: Float[Tensor, "*r k n"] | None = None) -> None:
        """Add completed moments under weights ``[*r, K, n]``; covariances of what is missing under ``left``."""
        assert self.value is not None
        heard = torch.where((weight > 0) & self.seen, self.value, 0.0)
        self.total = self.total + (weight * heard).sum((-2, -1), dtype=torch.float64)
        self.loops.collect(*(None if value is None else value.flatten(0, -2) for value in (weight, left)))

    def mixed(
        self, x: Float[Tensor, "n d"], weight: Tensor | None, log_weight: Float[Tensor, "*r k"]
    ) -> tuple[Tensor, Tensor]:
        """The whole E-step of a mixture of these under log weights of its components, collected.

        Returns:
            Σ w log Z ``[*r]`` and Σ w γ ``[*r, K]``, float64.
        """
        replicas = [value.reshape(-1, *value.shape[self.axes - 1 :]) for value in self.tables]
        loops = [self.engine.Rows(*tables) for tables in zip(*replicas, strict=True)]
        own = log_weight.expand(self.lead).reshape(len(loops), -1)
        # Sorted by as many as are fast to sort, and take little memory beside the data.
        ordered = _worth_sorting(x)
        pieces = x.split(_SORTED) if ordered else (x,)
        weights = [None] * len(pieces) if weight is None else weight.split(len(pieces[0]))
        found: list[tuple[Tensor, ...]] = []
        for piece, each in zip(pieces, weights, strict=True):
            order = _order(piece.isnan()) if ordered else None
            passes = [rows.mixed(piece, order, each, logs) for rows, logs in zip(loops, own, strict=True)]
            found.append(tuple(torch.stack(values) for values in zip(*passes, strict=True)))
        value, mass, inner = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
        moments = [torch.stack(values) for values in zip(*(rows.moments() for rows in loops), strict=True)]
        self.total = self.total + inner.reshape(self.lead[:-1])
        self.found.append([moment.flatten(0, 1) for moment in moments])
        return value.reshape(self.lead[:-1]), mass.reshape(self.lead)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, first and second moments about the origin, float64."""
        found = self.found if self._loops is None else [*self.found, self._loops.moments()]
        each = (torch.stack(values).sum(0) for values in zip(*found, strict=True))
        count, first, second, spread = (value.unflatten(0, self.lead) for value in each)
        unit = self.unit.to(torch.float64)
        second = second + spread * unit * unit.mT
        return count, first, second.sum(-3) if self.structure.shared else second


def left_over(covariance: Float[Tensor, "*r k d d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "*r n k d d"]:
    """Covariances of missing entries given those observed, Σ_mm − Σ_mo Σ_oo⁻¹ Σ_om, and zero beside them.

    Source: T. W. Anderson (2003), theorem 2.5.1.

    Example:
        >>> left_over(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), torch.tensor([[2.0, torch.nan]]))[0, 0]
        tensor([[0.0000, 0.0000],
                [0.0000, 0.7500]])
    """
    holes = x.isnan()
    # Units apart: columns may differ by many orders of magnitude.
    unit = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    matrix = (covariance / unit.unsqueeze(-1) / unit.unsqueeze(-2)).unsqueeze(-4)
    row, column = holes[:, None, :, None], holes[:, None, None, :]
    known = torch.where(~row & ~column, matrix, torch.eye(x.shape[-1], dtype=matrix.dtype, device=matrix.device))
    mixed = torch.where(~row, matrix, 0.0)
    left = torch.where(row & column, matrix - mixed.mT @ torch.linalg.solve(known, mixed), 0.0)
    return left * (unit.unsqueeze(-1) * unit.unsqueeze(-2)).unsqueeze(-4)


class EntryFeaturesPass(FeaturesPass):
    """Observed entries alone, under diagonal and spherical covariances: one product over features."""

    structure: Entrywise
    compiled = "ENTRIES"  # pyright: ignore[reportAssignmentType]

    def __init__(self, structure: Entrywise, mean: Tensor, raw: Tensor, origin: Tensor):
        delta = mean - origin
        deviations = structure.deviations(raw, mean.shape[-1])
        precision = (-2 * deviations).exp()
        constant = -0.5 * (precision * delta.square() + LOG_2PI) - deviations
        self.structure, self.origin, self.common, self.product = structure, origin, None, 0.0
        self.weights = torch.cat([constant, precision * delta, precision / -2], -1)

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``."""
        missing = x.isnan().mT
        z = torch.where(missing, 0.0, (x - self.origin).mT)
        self.t = torch.cat([(~missing).to(z), z, z.square()])
        return self.weights @ self.t

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts and first moments ``[*r, K, D]`` of the entries observed, second ones as the structure has them."""
        assert isinstance(self.product, Tensor)
        count, first, second = self.product.unflatten(-1, (3, -1)).unbind(-2)
        return count, first, self.structure.pooled(second)


class EntryPass(DirectPass):
    """Observed entries alone, under diagonal and spherical covariances, by differences."""

    def __init__(self, structure: Entrywise, mean: Tensor, raw: Tensor, origin: Tensor):
        super().__init__(structure, mean, raw, origin)
        self.normalizer = 2 * structure.deviations(raw, mean.shape[-1]) + LOG_2PI

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``."""
        self.x, self.missing = x.to(self.mean.dtype), x.isnan()
        difference = torch.where(self.missing, 0.0, self.x - self.mean.unsqueeze(-2))
        constant = self.normalizer @ (~self.missing).to(difference).mT
        self.value = (self.structure.distance(difference, self.root) + constant) * -0.5
        return self.value

    def collect(self, weight: Float[Tensor, "*r k n"]) -> None:
        """Add moments of the entries observed under weights ``[*r, K, n]``."""
        weight = weight.to(self.mean.dtype)
        self._add(weight, torch.where(self.missing, 0.0, self.x - self.origin.unsqueeze(-2)))

    def _counts(self, weight: Tensor) -> Tensor:
        return weight @ (~self.missing).to(weight)


class EntryResiduals:
    """`CompletedPass` for rows about means of their own under diagonal and spherical covariances."""

    def __init__(self, structure: Entrywise, mean: Tensor, raw: Tensor):
        k, d = mean.shape[-2:]
        self.structure, self.root, self.raw = structure, structure.root(raw), raw
        self.normalizer = 2 * structure.deviations(raw, d) + LOG_2PI
        self.variances = structure.variances(raw, k, d)

    def log_prob(self, x: Float[Tensor, "n d"], center: Float[Tensor, "*r k n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``."""
        self.missing = x.isnan()
        self.difference = torch.where(self.missing, 0.0, x.to(center) - center)
        constant = self.normalizer @ (~self.missing).to(center).mT
        return (self.structure.distance(self.difference, self.root) + constant) * -0.5

    def residuals(self) -> Float[Tensor, "*r k n d"]:
        """The rows less their means, completed."""
        return self.difference

    def spread(self, weight: Float[Tensor, "*r k n"]) -> Tensor:
        """Σ weight · variance of what is missing, as the structure has second moments; nothing where nothing seen."""
        left = self.missing & ~self.missing.all(-1, keepdim=True)
        each = (weight.to(self.variances) @ left.to(self.variances)) * self.variances
        return self.structure.pooled(each)

    def conditional(self, x: Float[Tensor, "n d"], center: Float[Tensor, "*r k n d"]) -> tuple[Tensor, Tensor]:
        """Means and variances ``[*r, K, n, D]`` of all entries given those observed."""
        missing = x.isnan()
        spread = torch.where(missing, self.variances.unsqueeze(-2), 0.0)
        return torch.where(missing, center, x.to(center)), spread.expand(center.shape)


def residual_pass(structure: Structure, raw: Tensor, k: int, d: int) -> "CompletedPass | EntryResiduals":
    """The pass over rows with missing entries about means of their own, as regressions give them.

    Args:
        structure: The kind of covariance.
        raw: Unconstrained coordinates of the covariances.
        k: Number of components.
        d: Number of columns.
    """
    lead = raw.shape[: raw.dim() - len(structure.shape(k, d))]
    zero = raw.new_zeros(*lead, k, d)
    if isinstance(structure, Entrywise):
        return EntryResiduals(structure, zero, raw)
    return CompletedPass(structure, zero, raw, zero)


class Pass:
    """Potentials and moments of rows of which entries may be missing.

    Rows without a missing entry take the route that complete data take, and pieces of such rows take it bit for bit.
    Compiled passes of mixtures (`mixed`) take all rows alike as soon as any entry is missing.

    Args:
        structure: The kind of covariance.
        mean: ``[*r, K, D]``.
        raw: Unconstrained coordinates of the covariances.
        origin: ``[1 or K, D]``, what moments are taken about.
        direct: Whether to take differences rather than features.
    """

    def __init__(self, structure: Structure, mean: Tensor, raw: Tensor, origin: Tensor, direct: bool):
        self.structure, self.arguments = structure, (mean, raw, origin)
        self.complete = (DirectPass if direct else FeaturesPass)(structure, *self.arguments)
        self.incomplete: CompletedPass | EntryFeaturesPass | EntryPass | None = None
        #: Whether all rows took the way of compiled loops.
        self.alone = False
        #: Rows of the present piece that take either route; None where all are complete.
        self.rows: tuple[Tensor, Tensor] | None = None

    def log_prob(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "*r k n"]:
        """``[*r, K, n]`` log-densities of what was observed of ``x [n, D]``; 0 where nothing was."""
        if not any_missing(x):
            self.rows = None
            return self.complete.log_prob(x)
        some: Callable[[Tensor], Tensor] = self._log_prob_of_some
        if torch.compiler.is_compiling():
            # Values decide what is computed: there is nothing to compile once for all.
            some = torch.compiler.disable(some)  # pyright: ignore[reportAssignmentType]
        return some(x)

    def _log_prob_of_some(self, x: Tensor) -> Tensor:
        self.rows = _divided(x)
        complete, incomplete = (x.index_select(0, rows) for rows in self.rows)
        self.incomplete = self.incomplete or self._route(incomplete)
        value = [self.complete.log_prob(complete), self.incomplete.log_prob(incomplete).to(x.dtype)]
        return torch.cat(value, -1).index_select(-1, _inverse_order(torch.cat(self.rows)))

    def mixed(
        self, x: Shaped[Tensor, "n d"], weight: Tensor | None, log_weight: Float[Tensor, "*r k"], gaps: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The whole E-step of a mixture of these under log weights of its components, collected, where it is compiled.

        Args:
            x: The rows.
            weight: ``[n]`` or None.
            log_weight: Of the components.
            gaps: Whether entries are missing.

        Returns:
            Σ w log Z ``[*r]`` and Σ w γ ``[*r, K]``, float64.
        """
        if not gaps and isinstance(self.complete, FeaturesPass):
            return self.complete.mixed(x, weight, log_weight)
        k, d = self.arguments[0].shape[-2:]
        if (not gaps and (k < _FEW or d > _WIDEST)) or x.dtype not in (torch.float64, torch.float32):
            return None
        # What completes rows takes differences, and serves complete ones.
        route = self.incomplete or self._route(x)
        followed = any(watched(value) for value in (log_weight, weight) if value is not None)
        if followed or not isinstance(route, (CompiledPass, EntryFeaturesPass)):
            return None
        found = route.mixed(x, weight, log_weight)
        if found is not None:
            self.incomplete, self.alone = route, True
        return found

    def read(self, x: Float[Tensor, "n d"]) -> None:
        """Take rows in for `collect` alone: without densities where moments do not need them."""
        if isinstance(self.complete, DirectPass) and not any_missing(x):
            self.rows, self.complete.x = None, x
        else:
            self.log_prob(x)

    def revisit(self, x: Float[Tensor, "n d"]) -> None:
        """Make rows whose densities are known the present ones again."""
        if isinstance(self.complete, FeaturesPass) and not any_missing(x):
            self.rows = None
            self.complete.see(x)
        else:
            self.log_prob(x)

    def _route(self, x: Tensor) -> CompletedPass | EntryFeaturesPass | EntryPass:
        """The route of rows with missing entries; in float64 where features would be too coarse."""
        direct = isinstance(self.complete, DirectPass)
        arguments = [value.to(torch.float64) for value in self.arguments] if direct else self.arguments
        if not isinstance(self.structure, Entrywise):
            engine = compiled_completed(x.device, arguments[0].numel() * x.numel())
            if engine is None or any(watched(value) for value in (x, *arguments)):
                return CompletedPass(self.structure, *arguments)
            return CompiledPass(engine, self.structure, *arguments)
        return (EntryPass if direct else EntryFeaturesPass)(self.structure, *arguments)

    def collect(self, weight: Float[Tensor, "*r k n"], left: Float[Tensor, "*r k n"] | None = None) -> None:
        """Add the moments of the rows last given to `log_prob`, under weights ``[*r, K, n]``.

        With ``left`` the covariances of what is missing have weights of their own: where observations have scales, what
        is missing shares them, and its expected square does not depend on them.
        """
        if self.rows is None:
            self.complete.collect(weight)
            return
        assert self.incomplete is not None
        self.complete.collect(weight.index_select(-1, self.rows[0]))
        some = weight.index_select(-1, self.rows[1])
        if left is not None and isinstance(self.incomplete, CompletedPass):
            self.incomplete.collect(some, left.index_select(-1, self.rows[1]))
        else:
            self.incomplete.collect(some)

    def inner(self) -> Tensor:
        """Q of all that was collected, ``[*r]``."""
        if self.alone and self.incomplete is not None:
            return self.incomplete.inner()
        total = self.complete.inner()
        return total if self.incomplete is None else total + self.incomplete.inner()

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts as the structure has them, first and second moments about the origin, float64."""
        if self.alone and self.incomplete is not None:
            return self.incomplete.moments()
        count, first, second = self.complete.moments()
        count = self.structure.counts(count, first.shape[-1])
        if self.incomplete is None:
            return count, first, second
        others = self.incomplete.moments()
        return count + others[0], first + others[1], second + others[2]


def _divided(x: Float[Tensor, "n d"]) -> tuple[Int[Tensor, " c"], Int[Tensor, " i"]]:
    """The rows that are complete and the others; all count among the others where vmap hides what is missing."""
    with torch._C._DisableFuncTorch():
        patterns = _patterns(x)
        whole = torch.zeros(len(x), dtype=torch.bool, device=x.device) if patterns is None else ~patterns.any(-1)
        return whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]


def conditional(
    structure: Structure, mean: Float[Tensor, "*r k d"], raw: Tensor, x: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "*r k n d"], Float[Tensor, "*r k n d"]]:
    """Means and variances of all entries of rows, given those observed: these themselves, without variance."""
    k, d = mean.shape[-2:]
    if any_missing(x) and not isinstance(structure, Entrywise):
        mean, raw = mean.to(torch.float64), raw.to(torch.float64)
        return CompletedPass(structure, mean, raw, mean).conditional(x)
    missing = x.isnan()
    variance = structure.variances(raw, k, d).unsqueeze(-2)
    return torch.where(missing, mean.unsqueeze(-2), x), torch.where(missing, variance, 0.0)
