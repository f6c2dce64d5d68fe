"""Faster EM: extrapolation along the path of the EM map θ → θ′, in unconstrained coordinates.

EM converges linearly, at the rate of the missing information. Both methods here read that rate off a few maps and jump
ahead. A jump costs no pass over the data; where it lowers the objective the trainer goes back to the plain step.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Acceleration = Literal["squarem", "anderson"]


class Accelerator(ABC):
    """Where to go from a point and its image under the EM map; replicas side by side, each on its own."""

    @abstractmethod
    def propose(self, point: Float[Tensor, "r p"], image: Float[Tensor, "r p"]) -> Float[Tensor, "r p"]:
        """The next point, perhaps the image itself."""

    @abstractmethod
    def refuse(self, which: Bool[Tensor, "r"]) -> None:
        """Learn that some of the last proposals lowered the objective: the images were taken instead."""

    @abstractmethod
    def keep(self, index: Tensor) -> None:
        """Drop all replicas but some."""


def accelerator(name: Acceleration) -> Accelerator:
    """A fresh accelerator."""
    return Squarem() if name == "squarem" else Anderson()


class Squarem(Accelerator):
    """Squared extrapolation: two maps, a jump, and a map from there that settles what the jump stirred up.

    With r = θ₁ − θ₀ and v = (θ₂ − θ₁) − r the jump leads to θ₀ − 2αr + α²v, α = −max(1, ‖r‖ / ‖v‖).

    Source: R. Varadhan, C. Roland (2008), scheme S3.

    Example:
        >>> rate = torch.tensor([[0.5]])  # θ′ = θ / 2
        >>> method, point = Squarem(), torch.tensor([[1.0]])
        >>> for _ in range(2):
        ...     point = method.propose(point, rate * point)
        >>> point  # where the map rests
        tensor([[0.]])
    """

    #: Longest step in units of r at first; by how much it grows when it was reached, and shrinks after a refusal.
    _GROWTH = 4.0

    def __init__(self) -> None:
        self.stage = 0
        self.start: Tensor | None = None
        self.limit: Tensor | None = None

    def propose(self, point: Tensor, image: Tensor) -> Tensor:
        stage, self.stage = self.stage, (self.stage + 1) % 3
        if self.limit is None:
            self.limit = point.new_full((len(point),), self._GROWTH)
        if stage == 0:
            self.start = point
        if stage != 1:
            return image
        assert self.start is not None
        r = point - self.start
        v = image - point - r
        norm = v.norm(dim=-1)
        length = torch.where(norm > 0, r.norm(dim=-1) / torch.where(norm > 0, norm, 1.0), 1.0).clamp(min=1.0)
        step = torch.minimum(length, self.limit).unsqueeze(-1)
        self.limit = torch.where(length >= self.limit, self.limit * self._GROWTH, self.limit)
        jump = self.start + 2 * step * r + step.square() * v
        return torch.where((step > 1) & jump.isfinite().all(-1, keepdim=True), jump, image)

    def refuse(self, which: Tensor) -> None:
        if self.limit is not None:
            self.limit = torch.where(which, (self.limit / self._GROWTH).clamp(min=2.0), self.limit)

    def keep(self, index: Tensor) -> None:
        self.start = None if self.start is None else self.start[index]
        self.limit = None if self.limit is None else self.limit[index]


class Anderson(Accelerator):
    """Damped Anderson acceleration with restarts: the residual f = θ′ − θ is extrapolated to zero by least squares.

    With differences of the last points ΔΘ and residuals ΔF the next point is θ + f − (ΔΘ + ΔF) γ, where γ minimises
    ‖f − ΔF γ‖² + λ‖γ‖². λ shrinks ‖γ‖² to a share δ of its least-squares value; δ rises towards 1 while proposals are
    good and falls when they are refused.

    Args:
        order: Most differences used; they are forgotten together when there are more, as is old information.

    Source: N. C. Henderson, R. Varadhan (2019): DAAREM.

    Example:
        >>> rate = torch.diag(torch.tensor([0.9, 0.5]).double())
        >>> method, point = Anderson(), torch.tensor([[1.0, 1.0]]).double()
        >>> for _ in range(40):
        ...     point = method.propose(point, point @ rate)
        >>> bool(point.norm() < 1e-6), 0.9**40 < 1e-6
        (True, False)
    """

    #: δ = 1 / (1 + growth^(patience − s)) after s good proposals.
    _GROWTH, _PATIENCE = 1.2, 25.0

    def __init__(self, order: int = 10):
        self.order = order
        self.last: tuple[Tensor, Tensor] | None = None
        self.points: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.good: Tensor | None = None

    def propose(self, point: Tensor, image: Tensor) -> Tensor:
        residual = image - point
        if self.good is None:
            self.good = point.new_zeros(len(point))
        last, self.last = self.last, (point, residual)
        if last is None:
            return image
        if len(self.points) >= min(self.order, max(1, point.shape[-1] // 2)):
            self.points, self.residuals = [], []
        self.points.append(point - last[0])
        self.residuals.append(residual - last[1])
        moves, changes = torch.stack(self.points, -1), torch.stack(self.residuals, -1)
        share = 1 / (1 + self._GROWTH ** (self._PATIENCE - self.good))
        gamma = _damped(changes, residual, share).unsqueeze(-1)
        self.good = self.good + 1
        jump = image - ((moves + changes) @ gamma).squeeze(-1)
        return torch.where(jump.isfinite().all(-1, keepdim=True), jump, image)

    def refuse(self, which: Tensor) -> None:
        if self.good is not None:
            self.good = torch.where(which, (self.good - 2 * self.order).clamp(min=-self._PATIENCE), self.good)

    def keep(self, index: Tensor) -> None:
        self.last = None if self.last is None else (self.last[0][index], self.last[1][index])
        self.points, self.residuals = ([value[index] for value in values] for values in (self.points, self.residuals))
        self.good = None if self.good is None else self.good[index]


def _damped(
    matrix: Float[Tensor, "r p m"], target: Float[Tensor, "r p"], share: Float[Tensor, "r"]
) -> Float[Tensor, "r m"]:
    """Ridge regression whose coefficients have ``share`` of the squared norm of least squares."""
    u, d, vh = torch.linalg.svd(matrix, full_matrices=False)
    seen = d > d[..., :1] * 1e-12
    along = torch.where(seen, (u.mT @ target.unsqueeze(-1)).squeeze(-1), 0.0)
    d = torch.where(seen, d, 1.0)
    wanted = share * (along / d).square().sum(-1)
    # The norm falls with λ: halve the interval of its logarithm.
    scale = d.amax(-1).square()
    low, high = (scale * 1e-16).log(), (scale * 1e16).log()
    for _ in range(60):
        middle = (low + high) / 2
        long = (along * d / (d.square() + middle.exp().unsqueeze(-1))).square().sum(-1) > wanted
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    shrunk = along * d / (d.square() + low.exp().unsqueeze(-1))
    return (vh.mT @ shrunk.unsqueeze(-1)).squeeze(-1)
