"""What factors with limits for each column have in common: what is expected beyond a limit, as statistics."""

import math
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid
from torchem.factor import Factor, Moments
from torchem.factors._around import Around
from torchem.ops.tails import Tail
from torchem.stats import Stats

#: Names of the families that tell of their tails.
FAMILIES = "Exponential, Poisson or Gaussian (of covariance_type 'diag' or 'spherical')"


class Bounded(Around):
    """A factor around another, with lower and upper limits of each column.

    What lies beyond a limit is latent. The factor inside takes statistics of powers of x, up to the second: those of
    latent entries are linear in their expectations E x and E x², and so are those of a few entries at known points,
    weighted by the expectations of Lagrange's polynomials (one at one of the points, zero at the others). That is how
    they are handed to it, whatever its statistics are.
    """

    step: Tensor

    def __init__(self, factor: Factor, low: Any = None, high: Any = None):
        super().__init__(factor)
        if not hasattr(factor.unwrapped, "tail"):
            raise invalid("factor", FAMILIES, type(factor.unwrapped).__name__, "use one of those")
        self.low, self.high = (self._given(name, side) for name, side in (("low", low), ("high", high)))
        first, last = self.limits()
        if not bool((first < last).all()):
            raise invalid("high", "limits above low", self.high, "exchange the two")
        #: Distances of the points that stand for latent entries.
        self.register_buffer("step", torch.ones(self._d, dtype=factor.dtype, device=factor.device))

    def _given(self, name: str, side: Any) -> Any:
        """A side as numbers and None, checked."""
        if side is None:
            return None
        side = side.tolist() if hasattr(side, "tolist") else side
        listed = list(side) if isinstance(side, (list, tuple)) else [side]
        given = [v for v in listed if v is not None]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in given)
        if not (given and numbers) or len(listed) not in (1, self._d):
            raise invalid(
                name, f"finite numbers, one or {self._d}, None for a column without", side, "give one for each column"
            )
        if self.discrete and not all(float(v).is_integer() for v in given):
            raise invalid(name, "whole numbers for counts", side, "round it")
        return listed if isinstance(side, (list, tuple)) else float(side)

    def limits(self) -> Tensor:
        """Lower and upper limits ``[2, D]``, float64, infinite where there is none."""
        # No buffer: a limit keeps its digits when the model changes its type.
        sides = ((self.low, -math.inf), (self.high, math.inf))
        rows = [
            [none if value is None else value for value in (side if isinstance(side, list) else [side])]
            for side, none in sides
        ]
        wide = [row if len(row) == self._d else row * self._d for row in rows]
        return torch.tensor(wide, dtype=torch.float64, device=self.device)

    def prepare(self, moments: Moments) -> None:
        super().prepare(moments)
        if moments.variance.shape == (self._d,) and not self.discrete:
            scale = moments.variance.sqrt()
            self.step.copy_(torch.where(scale > 0, scale, 1.0))

    # ---- tails ------------------------------------------------------------------------------------------------

    def tail(self, limit: Tensor, upper: bool, score: bool = False) -> Tail:
        """What the factor inside tells of a tail, at limits that broadcast to ``[*r, …, K, D]``; empty at infinity.

        Under a posterior of its parameters it is the tail of exp E log f, for a score that at the parameters' means.
        """
        finite = limit.isfinite()
        family: Any = self.factor.unwrapped
        at = torch.where(finite, limit, 1.0)
        if self.factor.averages and not score:
            posterior: Any = self.factor
            log_p, first, second = family.expected_tail(posterior.posterior(), posterior.prior, at, upper)
        else:
            log_p, first, second = family.tail(at, upper)
        return (
            torch.where(finite, log_p, -torch.inf), torch.where(finite, first, 0.0), torch.where(finite, second, 0.0)
        )  # fmt: skip

    def hidden_stats(self, pivot: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Stats:
        """Statistics of latent entries of each column.

        Args:
            pivot: Points p near them, ``[D]``.
            weight: How many there are, ``[*r, K, D]``.
            first: Their Σ (x − p), ``[*r, K, D]``.
            second: Their Σ (x − p)².
        """
        step = self.step.to(torch.float64)
        slope, bend = first / step, second / step.square()
        shares = weight - 1.5 * slope + bend / 2, 2 * slope - bend, (bend - slope) / 2
        rows = torch.cat([self.alone(pivot + i * step).x for i in range(3)])
        return self.factor.stats(Batch(rows), torch.cat([share.mT for share in shares], -2).to(self.dtype))
