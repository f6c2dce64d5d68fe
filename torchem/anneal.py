"""Deterministic annealing: EM on posteriors that start nearly uniform and sharpen.

At the inverse temperature β the E-step takes q(z) ∝ p(x, z)^β, which maximises the free energy

    F_β(q, θ) = E_q[log p(x, z | θ)] + H(q) / β,    at its optimum Σ log Z_β / β with Z_β = Σ_z p(x, z)^β.

Each M-step raises it, so EM at a fixed β is monotone; as β rises to 1 it becomes the log-likelihood. Small β smooth the
objective, and a fit followed from there depends less on its start. Components merge at small β and part again as it
rises; so that they can, the first pass after a change draws configurations instead of averaging over them. Gaussian
components with full covariances that have merged feel no force apart up to β = 1: for them do not start low, or let the
schedule rise a little above 1, to which it comes back at the end.

Source: N. Ueda, R. Nakano (1998); K. Rose (1998); I. Naim, D. Gildea (2012) for β above 1.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from torchem.errors import invalid

#: Passes that a temperature is held for, unless the schedule is a function of the pass. Merged components part with
#: gains that are hardly seen at first, so that a plateau says nothing.
_HOLD = 10


class Annealing:
    """Which inverse temperature a pass is made at.

    Args:
        schedule: Rising inverse temperatures, each held for ten passes (fewer where time is short), 1 at the end being
            understood; or a function of the pass 0, 1, … that comes to 1 and stays. None for 1.
        passes: How many there may be at most: each temperature has its share.

    Raises:
        InvalidArgument: For values that are not in (0, 2] or do not rise.

    Example:
        >>> annealing = Annealing([0.25, 0.5])
        >>> annealing.beta
        0.25
        >>> [annealing.advance() for _ in range(10)][-2:], annealing.beta
        ([False, True], 0.5)
    """

    def __init__(self, schedule: Iterable[float] | Callable[[int], float] | None = None, passes: int | None = None):
        self.function = schedule if callable(schedule) else None
        betas: list[Any] = [1.0] if schedule is None or callable(schedule) else [*schedule]
        steps = itertools.pairwise(betas)
        if not all(_is_beta(beta) for beta in betas) or not all(b > a for a, b in steps) or not betas:
            raise invalid(
                "anneal", "rising inverse temperatures in (0, 2], or a function of the pass", betas,
                "give for example [0.2, 0.4, 0.7]",
            )  # fmt: skip
        self.betas = betas if betas[-1] == 1 else [*betas, 1.0]
        self.hold = _HOLD if passes is None else max(1, min(_HOLD, passes // len(self.betas)))
        self.place = self.passes = 0

    def at(self, passes: int) -> float:
        """The inverse temperature after so many passes."""
        if self.function is not None:
            return self.function(passes)
        return self.betas[min(passes // self.hold, len(self.betas) - 1)]

    @property
    def beta(self) -> float:
        """The present inverse temperature."""
        if self.function is None or self.place:
            return float(self.betas[self.place])
        beta = self.function(self.passes)
        if not _is_beta(beta):
            raise invalid("anneal", "inverse temperatures in (0, 2]", beta, f"correct its value at pass {self.passes}")
        return float(beta)

    @property
    def done(self) -> bool:
        """Whether the temperature stays as it is: at 1."""
        return self.beta == 1 and (self.function is not None or self.place == len(self.betas) - 1)

    def advance(self) -> bool:
        """Count a pass; True if the next one is at another temperature."""
        before = self.beta
        self.passes += 1
        if self.function is None and self.passes % self.hold == 0 and self.place < len(self.betas) - 1:
            self.place += 1
        return self.beta != before


def _is_beta(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 2
