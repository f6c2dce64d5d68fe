"""When an iteration is over, and how much it has left: honest answers from the objective alone."""

import math
from collections.abc import Sequence
from typing import Literal

Status = Literal["converged", "max_iter", "diverged", "nonfinite", "interrupted", "dropped"]


def verdict(history: Sequence[float], tolerance: float, slack: float) -> Status | None:
    """Judge the last step of an objective.

    Args:
        history: Objective so far, one value per iterate.
        tolerance: A rise strictly below this (in total, not per observation) is a plateau if, by `aitken`, what is left
            is below it as well; 0 never is.
        slack: Relative fall that rounding explains.

    Returns:
        ``"converged"`` on a plateau, ``"diverged"`` after a fall beyond rounding, ``"nonfinite"`` at NaN or infinity,
        None to go on. A small rise that is greater than the one before it, or the first, is no plateau: near a saddle
        (components that are almost equal) EM starts slowly and accelerates.

    Example:
        >>> verdict([-11.0, -10.0, -9.999], 0.1, 1e-9), verdict([-10.0, -500.0], 0.1, 1e-9)
        ('converged', 'diverged')
        >>> verdict([-10.0, -9.99, -9.95], 0.1, 1e-9)
    """
    if not history:
        return None
    if not math.isfinite(history[-1]):
        return "nonfinite"
    if len(history) < 2:
        return None
    gain = history[-1] - history[-2]
    if gain < -slack * max(abs(history[-1]), abs(history[-2]), 1.0):
        return "diverged"
    if tolerance == 0 or gain >= tolerance:
        return None
    if gain <= 1e-3 * slack * max(abs(history[-1]), 1.0):  # what rounding may be
        return "converged"
    # Many small steps may be left, and lead far: gains alone say how slow an iteration is, not how near its end.
    left = aitken(history)
    return "converged" if left is not None and left < tolerance else None


#: Passes in a row that must bring nothing before an objective that jitters is called at rest.
_PATIENCE = 3


def settled(history: Sequence[float], tolerance: float) -> Status | None:
    """Judge an objective that may fall by chance: at rest when some passes in a row did not beat all before them.

    Args:
        history: Objective so far, one value per pass.
        tolerance: What counts as more, in total; 0 never rests.

    Example:
        >>> settled([-9.0, -5.0, -5.01, -5.02, -4.99], 0.1), settled([-9.0, -5.0, -4.0], 0.1)
        ('converged', None)
    """
    if not history or not math.isfinite(history[-1]):
        return "nonfinite" if history else None
    if tolerance == 0 or len(history) <= _PATIENCE:
        return None
    return "converged" if max(history[-_PATIENCE:]) < max(history[:-_PATIENCE]) + tolerance else None


#: The same for a held-out score, which moves less than the objective.
_HELD_OUT_PATIENCE = 5


def stalled(scores: Sequence[float], tolerance: float, noisy: bool = False) -> Status | None:
    """Judge held-out scores, which rise and then fall: at rest when some passes in a row did not beat all before them.

    Args:
        scores: Mean held-out log-likelihood so far, one value per pass; −∞ and NaN are worse than all others.
        tolerance: What counts as more; 0 never rests.
        noisy: Whether steps may lead down by chance. Where they do not, a rise that still grows is no rest, and scores
            below the first one are what overfitting does.

    Returns:
        ``"converged"`` at rest, ``"diverged"`` if noisy passes rest below where they began, None to go on.

    Source: L. Prechelt (1998), criterion UP.

    Example:
        >>> stalled([-5.0, -3.0, -3.1, -3.1, -3.2, -3.3, -3.4], 0.01)
        'converged'
        >>> stalled([-3.0, -4.0, -4.1, -4.1, -4.2, -4.3, -4.4], 0.01, noisy=True)
        'diverged'
    """
    if tolerance == 0 or len(scores) <= _HELD_OUT_PATIENCE:
        return None
    known = [-math.inf if math.isnan(score) else score for score in scores]
    recent, before = max(known[-_HELD_OUT_PATIENCE:]), max(known[:-_HELD_OUT_PATIENCE])
    if recent > -math.inf and recent >= before + tolerance:
        return None
    if noisy:
        return "diverged" if recent < known[0] - tolerance else "converged"
    gain, last = known[-1] - known[-2], known[-2] - known[-3]
    growing = gain > max(last, 1e-12 * abs(known[-1]))
    return None if growing else "converged"


def aitken(history: Sequence[float]) -> float | None:
    """Estimated rise that is left, in the units of the objective.

    EM converges linearly, so gains shrink by a nearly constant factor a: what is left is gain · a / (1 − a).

    Returns:
        The estimate; 0 when the last gain is not positive; None when three values do not show a linear tail.

    Source: G. J. McLachlan, T. Krishnan (2008), section 4.9; D. Böhning et al. (1994).

    Example:
        >>> aitken([0.0, 4.0, 6.0])
        2.0
    """
    if len(history) < 3 or not all(map(math.isfinite, history[-3:])):
        return None
    before, last = history[-2] - history[-3], history[-1] - history[-2]
    if last <= 0:
        return 0.0
    if before <= last:
        return None
    rate = last / before
    return last * rate / (1 - rate)
