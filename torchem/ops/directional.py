"""Laws of directions: Bessel functions that stay in range, concentrations from mean resultants, and draws.

With ν = D/2 − 1 the density of a unit vector of D numbers is κ^ν exp(κ μᵀx) / ((2π)^{D/2} I_ν(κ)).

*Bessel functions.* I_n(κ) for large n, or κ, is Debye's uniform expansion in 1/√(n² + κ²) (DLMF 10.41.3). Lower orders
follow from I_{ν−1} = I_{ν+1} + 2ν/κ I_ν, downwards, the stable way, as a continued fraction of ratios. Both are smooth
at κ = 0 in the form I_ν(κ) / κ^ν, hold for every real order, and are differentiated as they stand.

Source: NIST Digital Library of Mathematical Functions, sections 10.29 and 10.41; K. V. Mardia, P. E. Jupp (2000).
"""

import functools
import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

#: Order from which the expansion is exact to rounding, with so many terms.
_ORDER, _TERMS = 12, 16
#: Steps of Newton's method, each of which doubles the digits of a start that has one.
_NEWTON = 6
#: Concentrations, for each column, from which A′ is its leading term: the exact difference would cancel.
_LARGE = 1e5


@functools.cache
def _debye() -> list[list[float]]:
    """Coefficients of U_k(p) / p^k in powers of p² (DLMF 10.41.9)."""
    terms: list[dict[int, Fraction]] = [{0: Fraction(1)}]
    for _ in range(_TERMS):
        new: dict[int, Fraction] = {}
        for n, c in terms[-1].items():
            # U′ = ½ p² (1 − p²) dU/dp + ⅛ ∫ (1 − 5t²) U dt
            new[n + 1] = new.get(n + 1, Fraction(0)) + c * n / 2 + c / (8 * (n + 1))
            new[n + 3] = new.get(n + 3, Fraction(0)) - c * n / 2 - 5 * c / (8 * (n + 3))
        terms.append(new)
    return [[float(own.get(k + 2 * j, 0)) for j in range(_TERMS + 1)] for k, own in enumerate(terms)]


def _series(n: float, w: Tensor) -> Tensor:
    """log Σ_k U_k(n/w) / n^k for w = √(n² + κ²)."""
    table = torch.tensor(_debye(), dtype=w.dtype, device=w.device)
    power = torch.arange(_TERMS + 1, dtype=w.dtype, device=w.device)
    inverse = w.reciprocal().unsqueeze(-1)
    return ((inverse**power) @ table * (n * inverse).square() ** power).sum(-1).log()


def _expanded(n: float, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """``log(e^{−κ} I_n(κ) / κ^n)`` and ``I_{n+1}(κ) / (κ I_n(κ))`` of a high order."""
    square = kappa.square()
    w, above = (n * n + square).sqrt(), ((n + 1) ** 2 + square).sqrt()
    series = _series(n, w)
    # w − κ, and w one order above less w, without cancellation.
    value = n * n / (w + kappa) - n * (n + w).log() - 0.5 * (2 * math.pi * w).log() + series
    gap = (2 * n + 1) / (above + w)
    log_ratio = gap - (n + 1 + above).log() - n * ((1 + gap) / (n + w)).log1p() - 0.5 * (gap / w).log1p()
    return value, (log_ratio + _series(n + 1, above) - series).exp()


def bessel_ratio(order: float, kappa: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``I_{ν+1}(κ) / (κ I_ν(κ))``, for κ ≥ 0 in float64 and any real ν > −1."""
    steps = max(0, math.ceil(_ORDER - order))
    square, ratio = kappa.square(), _expanded(order + steps, kappa)[1]
    for lower in reversed(range(steps)):
        ratio = (2 * (order + lower + 1) + square * ratio).reciprocal()
    return ratio


def log_bessel(order: float, kappa: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """``log(e^{−κ} I_ν(κ) / κ^ν)``, for κ ≥ 0 in float64.

    Args:
        order: ν > −1, any real number.
        kappa: κ.

    Example:
        >>> log_bessel(0.5, torch.tensor(2.0, dtype=torch.float64)).exp() * torch.pi**0.5  # √2 e⁻² sinh 2 / 2
        tensor(0.3471, dtype=torch.float64)
    """
    steps = max(0, math.ceil(_ORDER - order))
    square = kappa.square()
    value, ratio = _expanded(order + steps, kappa)
    product = torch.ones_like(kappa)
    for lower in reversed(range(steps)):
        ratio = (2 * (order + lower + 1) + square * ratio).reciprocal()
        product = product * ratio  # of at most thirteen: in range up to κ = 10²⁰
    return value - product.log()


def log_normalizer(dimension: int, kappa: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Log ∫ exp(κ (μᵀx − 1)) dx over unit vectors: of a density that is one in the direction itself."""
    return dimension / 2 * math.log(2 * math.pi) + log_bessel(dimension / 2 - 1, kappa)


def mean_resultant(dimension: int, kappa: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A_D(κ) = I_{D/2}(κ) / I_{D/2−1}(κ): the length of the mean vector."""
    return kappa * bessel_ratio(dimension / 2 - 1, kappa)


def mixed(
    share: Float[Tensor, "*n k"], angle: Float[Tensor, "*n k d"], spread: Float[Tensor, "*n k d"]
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"]]:
    """Mean direction and circular variance 1 − R of mixtures of angles with those of their own.

    The mean resultant vector is Σ_k γ_k R_k (cos μ_k, sin μ_k).

    Source: K. V. Mardia, P. E. Jupp (2000), section 2.3.

    Example:
        >>> angles = torch.deg2rad(torch.tensor([[[350.0], [10.0]]]))
        >>> mean, variance = mixed(torch.tensor([[0.5, 0.5]]), angles, torch.zeros(1, 2, 1))
        >>> round(float(mean), 5), round(float(variance), 5)
        (-0.0, 0.01519)
    """
    length = share.unsqueeze(-1) * (1 - spread)
    cosine, sine = (length * angle.cos()).sum(-2), (length * angle.sin()).sum(-2)
    return torch.atan2(sine, cosine), 1 - torch.hypot(sine, cosine)


def concentration(resultant: Float[Tensor, "*n"], dimension: int, least: float, most: float) -> Float[Tensor, "*n"]:
    """κ with A_D(κ) = r, within bounds, by Newton's method from the start of Banerjee et al. (2005, equation 4.4).

    A is increasing and concave, so that a step from either side ends below the root, and the next ones climb to it.

    Source: S. Sra (2012), for the steps.

    Example:
        >>> concentration(torch.tensor(0.5, dtype=torch.float64), 3, 1e-6, 1e6)  # coth κ − 1/κ = 1/2
        tensor(1.7968, dtype=torch.float64)
    """
    d = dimension
    r = resultant.clamp(min=0.0).minimum(mean_resultant(d, resultant.new_full((), most)))
    kappa = (r * (d - r.square()) / (1 - r.square())).clamp(least, most)
    for _ in range(_NEWTON):
        rho = bessel_ratio(d / 2 - 1, kappa)
        mean = kappa * rho
        exact = 1 - mean.square() - (d - 1) * rho
        slope = torch.where(kappa > _LARGE * d, (d - 1) / (2 * kappa.square()), exact.clamp(min=1e-300))
        kappa = (kappa + (r - mean) / slope).clamp(least, most)
    return kappa


def draw_distance(dimension: int, kappa: Float[Tensor, " n"], generator: torch.Generator | None) -> Float[Tensor, " n"]:
    """1 − μᵀx of random unit vectors with these concentrations, by rejection from a law that lies close.

    Source: A. T. A. Wood (1994), algorithm VM*; the distance instead of the cosine, which keeps its digits.
    """
    m = dimension - 1
    b = m / (2 * kappa + (4 * kappa.square() + m * m).sqrt())
    edge, x0 = 2 * b / (1 + b), (1 - b) / (1 + b)
    highest = m * (4 * b / (1 + b).square()).log()
    found = torch.empty_like(kappa)
    left = torch.arange(len(kappa), device=kappa.device)
    while len(left):
        half = torch.full((2, len(left)), m / 2, dtype=kappa.dtype, device=kappa.device)
        one, two = torch._standard_gamma(half, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        z = one / (one + two)  # beta
        distance = 2 * b[left] * z / (1 - (1 - b[left]) * z)
        score = kappa[left] * (edge[left] - distance) + m * (edge[left] + x0[left] * distance).log() - highest[left]
        u = torch.rand(len(left), dtype=kappa.dtype, device=kappa.device, generator=generator)
        good = u.log() <= score
        found[left[good]] = distance[good]
        left = left[~good]
    return found
