"""Covariances that components share in part: volume, shape and orientation, each equal or varying.

Σ_k = λ_k D_k A_k D_kᵀ with volume λ_k, shape A_k (diagonal, |A_k| = 1) and orientation D_k (orthogonal). A name has a
letter for each: E, equal among components; V, varying; I, the identity. Given scatter W_k with n_k degrees of freedom
an M-step minimises

    Σ_k n_k log |Σ_k| + tr(W_k Σ_k⁻¹).

Along given axes this separates into columns, and four rules for their variances (volume E or V × shape E or V) serve
every orientation: along the coordinates (I) they take the diagonals of W_k, along a component's own axes (V), which
are the eigenvectors of W_k, its eigenvalues, and along common axes (E) the diagonals of Dᵀ W_k D.

Source: J. D. Banfield, A. E. Raftery (1993); G. Celeux, G. Govaert (1995); for common axes B. N. Flury (1984).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from torchem.ops import linalg
from torchem.ops.gaussian import STRUCTURES, CommonDiag, CommonSpherical, Entrywise, Structure

#: Mass below which a component keeps what is its own.
_EMPTY = 1e-30
#: Alternations of volumes with a common shape: each begins at the current ones, and none lowers Q.
_ROUNDS = 12
#: Turns of common axes, of which the same holds.
_TURNS = 12
#: How far along the best turns of pairs of axes, each taken by itself, all of them together are tried; zero stays.
_STEPS = (1.0, 0.5, 0.2, 0.05, 0.0)
#: Newton's steps for the volume that floored shapes have in common.
_NEWTON = 8

#: Variances ``[*r, K, D]`` along given axes from scatter, degrees of freedom and variances before.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Geometry:
    """What components share of their covariances, as a map from scatter to covariances.

    Args:
        volume: ``"E"`` or ``"V"``.
        shape: ``"E"``, ``"V"`` or ``"I"`` (spheres).
        orientation: ``"E"``, ``"V"`` or ``"I"`` (along the coordinates).

    Example:
        >>> scatter = torch.tensor([[4.0, 1.0], [2.0, 1.0]])
        >>> GEOMETRIES["EEI"].estimate(scatter, torch.ones(2, 2), torch.ones(2, 2), torch.ones(2), 1e-6)
        tensor([[3., 1.],
                [3., 1.]])
    """

    volume: str
    shape: str
    orientation: str

    @property
    def structure(self) -> Structure:
        """How such covariances are stored, scored and gathered."""
        if self.conjugate:
            return _COMMON[self.shape]
        return STRUCTURES["spherical" if self.shape == "I" else "diag" if self.orientation == "I" else "full"]

    @property
    def conjugate(self) -> bool:
        """Whether there is a conjugate prior: of variances that are common to all, by column or altogether.

        A volume or a shape of its own multiplies what is common, and determinants of one are no linear constraint.
        """
        return self.volume == "E" and self.shape in "EI" and self.orientation == "I"

    def n_parameters(self, k: int, d: int) -> int:
        """Free numbers of K covariances."""
        volumes = k if self.volume == "V" else 1
        shapes = (d - 1) * {"I": 0, "E": 1, "V": k}[self.shape]
        return volumes + shapes + d * (d - 1) // 2 * {"I": 0, "E": 1, "V": k}[self.orientation]

    def unit(self, unit: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """What floors are relative to, from the variance of each column.

        Only some geometries follow a change of the units of single columns: for the others it is one number.
        """
        if self.shape == "I":
            return unit.amax().expand(unit.shape)
        follows = self.orientation == "I" or (self.shape == self.orientation and self.volume != self.shape)
        return unit if follows else unit.amin().expand(unit.shape)

    def estimate(self, scatter: Tensor, dof: Tensor, previous: Tensor, unit: Tensor, floor: float) -> Tensor:
        """Covariances under the constraint, from their scatter.

        What a component without mass has to itself stays as it was.

        Args:
            scatter: W_k in the layout of `structure`.
            dof: Degrees of freedom: of rows ``[*r, K]``, or of entries ``[*r, K, D]``.
            previous: Covariances to begin at.
            unit: Δ ``[D]``, as from `unit`.
            floor: Least eigenvalue of Δ^−½ Σ Δ^−½.
        """
        entrywise = isinstance(self.structure, Entrywise)
        if self.shape == "I":
            scale = unit[0]
            column = (dof.sum(-1, keepdim=True), previous.unsqueeze(-1) / scale, floor)
            found = _equal((scatter / scale).unsqueeze(-1), *column).squeeze(-1)
        else:
            scale = unit if entrywise else unit.sqrt().unsqueeze(-1) * unit.sqrt()
            n = dof if entrywise else dof.unsqueeze(-1).expand(*dof.shape, len(unit))
            found = self._shaped(scatter / scale, n, previous / scale, floor)
        mass = dof.sum((-2, -1) if entrywise else -1)
        seen = (mass > _EMPTY).reshape(*mass.shape, *[1] * (previous.dim() - mass.dim()))
        return torch.where(seen, found * scale, previous)

    def _shaped(self, w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
        rule: Rule = partial(_RULES[self.volume + self.shape], floor=floor)
        if self.orientation == "I":
            return rule(w, n, v)
        alive = n[..., :1, None] > _EMPTY
        if self.orientation == "V":
            return _own_axes(torch.where(alive, w, v), n, v, rule)
        w = torch.where(alive, w, 0.0)
        return _common_shape(w, n, v, floor) if self.shape == "E" else _common_axes(w, n, v, rule)


# ---- variances along given axes -----------------------------------------------------------------------------------


def _equal(w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
    """EE: the scatter of all components together."""
    w = torch.where(n > _EMPTY, w, 0.0)
    return (w.sum(-2, keepdim=True) / n.sum(-2, keepdim=True).clamp(min=_EMPTY)).clamp(min=floor).expand_as(v)


def _free(w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
    """VV: each by itself."""
    return torch.where(n > _EMPTY, (w / n.clamp(min=_EMPTY)).clamp(min=floor), v)


def _volumes(w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
    """VE: λ_k = Σ_j (w_kj / a_j) / Σ_j n_kj and a_j = Σ_k (w_kj / λ_k) / Σ_k n_kj in turn."""
    alive = n.amax(-1, keepdim=True) > _EMPTY
    w, total = torch.where(alive, w, 0.0), n.sum(-2, keepdim=True).clamp(min=_EMPTY)
    rows = torch.where(alive, n.sum(-1, keepdim=True), 1.0)
    own = volume = v.clamp(min=1e-300).log().mean(-1, keepdim=True).exp()
    shape = torch.ones_like(total)
    for _ in range(_ROUNDS):
        shape = (w / volume).sum(-2, keepdim=True) / total
        shape = torch.maximum(shape, floor / volume.amin(-2, keepdim=True))
        shape = shape / shape.log().mean(-1, keepdim=True).exp()
        volume = torch.where(alive, (w / shape).sum(-1, keepdim=True) / rows, own)
        volume = torch.maximum(volume, (floor / shape).amax(-1, keepdim=True))
    return volume * shape


def _shapes(w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
    """EV: λ a_kj = max(w_kj / μ_k, floor), with Σ_j log a_kj = 0 and the multipliers Σ_k μ_k = Σ_k n_k.

    Without the floor μ_k λ is the geometric mean of w_kj. With it log μ_k at a given d log λ is the largest of d lines,
    one for each number of columns above the floor, and log Σ_k μ_k convex in it: Newton's steps come from one side.
    """
    rows = n.amax(-1, keepdim=True)
    alive = rows > _EMPTY
    # A missing entry is expected at its variance.
    log = torch.where(alive, w + (rows - n) * v, v).clamp(min=1e-300).log()
    d = log.shape[-1]
    above = torch.arange(1, d + 1, dtype=log.dtype, device=log.device)
    least = math.log(floor)
    line = (log.sort(-1, descending=True).values.cumsum(-1) + (d - above) * least) / above
    total = rows.sum(-2, keepdim=True).clamp(min=_EMPTY).log()
    volume = d * (_silenced(log.mean(-1, keepdim=True), alive).logsumexp(-2, keepdim=True) - total)
    for _ in range(_NEWTON):
        level, at = (line - volume / above).max(-1, keepdim=True)
        level = _silenced(level, alive)
        slope = (level.softmax(-2) / above[at]).sum(-2, keepdim=True)
        volume = volume + (level.logsumexp(-2, keepdim=True) - total) / slope
    volume = volume.clamp(min=d * least)
    level = (line - volume / above).amax(-1, keepdim=True)
    return (log - level).clamp(min=least).exp()


def _silenced(level: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, level, -1e4)


_RULES: dict[str, Callable[..., Tensor]] = {"EE": _equal, "VE": _volumes, "EV": _shapes, "VV": _free}


# ---- axes ---------------------------------------------------------------------------------------------------------


def _spanned(axes: Tensor, values: Tensor) -> Tensor:
    """Σ_j value_j · axis_j axis_jᵀ."""
    return (axes * values.unsqueeze(-2)) @ axes.mT


def _along(axes: Tensor, w: Tensor) -> Tensor:
    """Diagonals of Dᵀ W_k D."""
    return (axes * (w @ axes)).sum(-2)


def _own_axes(w: Tensor, n: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Each component along its principal axes: a common shape is matched best by the order of the eigenvalues."""
    values, axes = linalg.eigh(w)
    return _spanned(axes, rule(values.clamp(min=0.0), n, linalg.eigh(v)[0].clamp(min=0.0)))


def _common_shape(w: Tensor, n: Tensor, v: Tensor, floor: float) -> Tensor:
    """VEE: volumes and one matrix C in turn, as in `_volumes`."""
    rows, d = n[..., 0], n.shape[-1]
    alive, total = rows > _EMPTY, rows.sum(-1).clamp(min=_EMPTY)[..., None, None]
    own = volume = (2 * linalg.cholesky(v).diagonal(dim1=-2, dim2=-1).log().mean(-1)).exp()
    values, axes = n[..., 0, :], v[..., 0, :, :]
    for _ in range(_ROUNDS):
        values, axes = linalg.eigh((w / volume[..., None, None]).sum(-3) / total)
        values = torch.maximum(values, floor / volume.amin(-1, keepdim=True))
        values = values / values.log().mean(-1, keepdim=True).exp()
        each = (_along(axes.unsqueeze(-3), w) / values.unsqueeze(-2)).sum(-1)
        volume = torch.where(alive, each / (d * torch.where(alive, rows, 1.0)), own)
        volume = torch.maximum(volume, floor / values.amin(-1, keepdim=True))
    return volume[..., None, None] * _spanned(axes, values).unsqueeze(-3)


def _common_axes(w: Tensor, n: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """EVE, VVE: common axes D and the variances along them in turn.

    Given the variances, −½ Σ_k tr(W_k D V_k⁻¹ Dᵀ) is maximal in the plane of axes i and j at the turn θ with

        tan 2θ = 2 Y / X,  X = Σ_k (1/v_ki − 1/v_kj) (m_kii − m_kjj),  Y = Σ_k (1/v_ki − 1/v_kj) m_kij,  m_k = Dᵀ W_k D.

    All planes are turned at once by as much of this as lowers the trace most; a step of zero is among those tried.

    Source: B. N. Flury, W. Gautschi (1986) for the planes; R. P. Browne, P. D. McNicholas (2014) for all at once.
    """
    k, d = n.shape[-2:]
    eye = torch.eye(d, dtype=w.dtype, device=w.device)
    steps = torch.tensor(_STEPS, dtype=w.dtype, device=w.device)

    def variances(axes: Tensor) -> Tensor:
        axes = axes.unsqueeze(-3)
        return rule(_along(axes, w), n, _along(axes, v))

    def loss(axes: Tensor) -> Tensor:
        found = variances(axes)
        return (n * found.log() + _along(axes.unsqueeze(-3), w) / found).sum((-2, -1))

    # The axes that the covariances have in common, from a sum that keeps them apart; or those of all scatter.
    share = 1 / (torch.arange(1, k + 1, dtype=w.dtype, device=w.device) * v.diagonal(dim1=-2, dim2=-1).sum(-1))
    before = linalg.eigh((share[..., None, None] * v).sum(-3))[1]
    pooled = linalg.eigh(w.sum(-3))[1]
    axes = torch.where((loss(pooled) < loss(before))[..., None, None], pooled, before)
    tiny = 1e-12 * n.sum((-2, -1)).clamp(min=_EMPTY)[..., None, None]
    for _ in range(_TURNS):
        rate = 1 / variances(axes)
        m = axes.unsqueeze(-3).mT @ w @ axes.unsqueeze(-3)
        level = m.diagonal(dim1=-2, dim2=-1)
        gap = rate.unsqueeze(-1) - rate.unsqueeze(-2)
        x = (gap * (level.unsqueeze(-1) - level.unsqueeze(-2))).sum(-3)
        turn = (2 * (gap * m).sum(-3) / (x - tiny)).atan() / 2
        half = turn.mT * steps.reshape(-1, *[1] * turn.dim()) / 2
        # Cayley's transform: orthogonal whatever the size of the turns.
        tried = axes @ torch.linalg.solve(eye - half, eye + half)
        cost = (_along(tried.unsqueeze(-3), w) * rate).sum((-2, -1))
        axes = tried.take_along_dim(cost.argmin(0)[None, ..., None, None], 0).squeeze(0)
    return _spanned(axes.unsqueeze(-3), variances(axes))


#: What EII and EEI are, by their shapes.
_COMMON: dict[str, Structure] = {"I": CommonSpherical(), "E": CommonDiag()}

#: Geometries that are no structure by themselves.
GEOMETRIES: dict[str, Geometry] = {
    name: Geometry(*name) for name in ("EII", "EEI", "VEI", "EVI", "VEE", "EVE", "VVE", "EEV", "VEV", "EVV")
}
#: The others, by the structures that they are.
NAMES: dict[str, str] = {"VII": "spherical", "VVI": "diag", "EEE": "tied", "VVV": "full"}
