"""Tails of laws of one number: how probable they are, and what is expected there, to the last digits.

Each function is given a limit c and tells, of what lies at or beyond it, log P, E (x − c) and E (x − c)²; everything
broadcasts.
"""

import math

import torch
from torch import Tensor

#: log P, E (x − c), E (x − c)².
Tail = tuple[Tensor, Tensor, Tensor]

#: From here the mean excess over a limit, in standard deviations, is known to more digits by its series.
_FAR = 100.0
#: λ c from which a series tells more digits of what lies below c.
_SMALL = 1e-2
#: Probabilities below this one are computed from their largest term.
_RARE = 1e-250


def against(parameter: Tensor, limit: Tensor) -> Tensor:
    """Parameters ``[*r, K, D]`` in float64, against limits ``[D]`` or ``[n, 1, D]``."""
    wide = parameter.to(torch.float64)
    return wide if limit.dim() < 3 else wide.unsqueeze(-3)


def normal(mean: Tensor, scale: Tensor, limit: Tensor, upper: bool) -> Tail:
    """Tail of a normal law.

    With α the distance of the limit from the mean in standard deviations and λ = φ(α) / Φ(−α): E y = λ − α and
    E y² = 1 − α (λ − α), for y = |x − c| / σ.

    Source: N. L. Johnson, S. Kotz, N. Balakrishnan (1994), section 13.10.1.

    Example:
        >>> log_p, mean, _ = normal(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(40.0), True)
        >>> round(float(log_p), 3), round(float(mean), 5)
        (-804.608, 0.02497)
    """
    sign = 1.0 if upper else -1.0
    alpha = sign * (limit - mean) / scale
    log_p = torch.special.log_ndtr(-alpha)
    near, far = alpha.clamp(max=0.0), alpha.clamp(min=_FAR)
    middle = alpha.clamp(min=0.0, max=_FAR)
    # What is not chosen stays finite, so that it has no share in derivatives.
    below = (-near.square() / 2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(-near)).exp() - near
    within = math.sqrt(2 / math.pi) / torch.special.erfcx(middle / math.sqrt(2)) - middle
    inverse = far.reciprocal().square()
    beyond = (1 - inverse * (2 - inverse * (10 - 74 * inverse))) / far
    excess = torch.where(alpha < 0, below, torch.where(alpha > _FAR, beyond, within))
    spread = torch.where(alpha > _FAR, inverse * (2 - inverse * (10 - 74 * inverse)), 1 - alpha * excess)
    return log_p, sign * scale * excess, scale.square() * spread


def exponential(rate: Tensor, limit: Tensor, upper: bool) -> Tail:
    """Tail of an exponential law; the limit is at least zero.

    Example:
        >>> exponential(torch.tensor(0.5), torch.tensor(3.0), True)[:2]
        (tensor(-1.5000), tensor(2.))
    """
    load = rate * limit
    if upper:
        mean = rate.reciprocal().expand_as(load)
        return -load, mean, 2 * mean.square()
    small = load < _SMALL
    some = torch.where(small, load, 0.0)
    safe = torch.where(small, 1.0, load.clamp(max=700.0))
    log_p = torch.where(
        small, load.clamp(min=1e-300).log() + some * (some / 24 - 0.5), (-torch.expm1(-safe)).log()
    )  # fmt: skip
    # In units of 1/λ: E x = 1 − l / (e^l − 1) and var x = 1 − (½ l / sinh ½l)² with l = λ c.
    squares = some.square()
    mean = torch.where(small, some * (0.5 - some * (1 / 12 - squares / 720)), 1 - safe / torch.expm1(safe)) - load
    half = safe / 2
    spread = torch.where(small, squares * (1 / 12 - squares / 240), 1 - (half / half.sinh()).square())
    log_p = torch.where(load > 0, log_p, -torch.inf)
    return log_p, mean / rate, (spread + mean.square()) / rate.square()


def poisson(rate: Tensor, limit: Tensor, upper: bool) -> Tail:
    """Tail of a Poisson law, with the limit itself; below zero there is none.

    From E [x; x ≥ c] = λ P(x ≥ c − 1), E [x (x − 1); x ≥ c] = λ² P(x ≥ c − 2) and the like below. Where a probability
    has no digits left it is its largest term p(c) times a geometric series.

    Source: N. L. Johnson, A. W. Kemp, S. Kotz (2005), section 4.3.

    Example:
        >>> log_p, mean, _ = poisson(torch.tensor(2.0), torch.tensor(0.0), False)
        >>> float(log_p), float(mean)
        (-2.0, 0.0)
    """
    rate, limit = torch.broadcast_tensors(rate, limit)
    at = limit.clamp(min=0.0)
    top = at * rate.log() - rate - (at + 1).lgamma()
    reach = _at_least if upper else _at_most
    ratio = ((rate / (at + 1)) if upper else (at / rate)).clamp(max=0.999)
    p, once, twice = (reach(at - i, rate) for i in range(3))
    rare = p < _RARE
    safe = torch.where(rare, 1.0, p)
    log_p = torch.where(rare, top - (1 - ratio).log(), safe.log())
    first, falling = rate * once / safe, rate.square() * twice / safe
    step = ratio / (1 - ratio)
    mean = torch.where(rare, step if upper else -step, first - at)
    square = torch.where(rare, step * (1 + 2 * step), falling + first * (1 - 2 * at) + at.square())
    if upper:
        all_of = limit <= 0
        mean, square = torch.where(all_of, rate - at, mean), torch.where(all_of, rate + (rate - at).square(), square)
        return torch.where(all_of, 0.0, log_p), mean, square
    some = limit > 0
    return torch.where(limit >= 0, log_p, -torch.inf), torch.where(some, mean, 0.0), torch.where(some, square, 0.0)


def _at_least(count: Tensor, rate: Tensor) -> Tensor:
    """P(x ≥ count)."""
    return torch.where(count > 0, torch.special.gammainc(count.clamp(min=1.0), rate), 1.0)


def _at_most(count: Tensor, rate: Tensor) -> Tensor:
    """P(x ≤ count)."""
    return torch.where(count >= 0, torch.special.gammaincc(count.clamp(min=0.0) + 1, rate), 0.0)


def log_difference(large: Tensor, small: Tensor) -> Tensor:
    """log (exp large − exp small), −∞ where nothing is left.

    Example:
        >>> log_difference(torch.tensor([0.0, -1.0]), torch.tensor([-torch.inf, -1.0]))
        tensor([0., -inf])
    """
    gap = small - large
    some = gap < 0
    gap = torch.where(some, gap, -1.0)
    # log(1 − e^gap), by the half that keeps its digits.
    close = gap > -math.log(2)
    near = (-torch.expm1(torch.where(close, gap, -1.0))).log()
    far = torch.log1p(-torch.where(close, -1.0, gap).exp())
    return torch.where(some, large + torch.where(close, near, far), -torch.inf)
