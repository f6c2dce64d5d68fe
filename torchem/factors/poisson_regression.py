"""Counts whose rates are log-linear in covariates."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors._glm import Expansion, GeneralizedLinear

#: Rise of the log rate within which quadratics lie below the log-density, and how much more they bend for it.
_REACH = 1.0
_BEND = 2 * (math.exp(_REACH) - 1 - _REACH) / _REACH**2
#: Log rate beyond which all rates count as equal: float64 would overflow.
_MOST = 500.0


class PoissonRegression(GeneralizedLinear):
    """Poisson counts in each state, with log rates linear in covariates: mixtures of regressions, experts, emissions.

    log p(x | u, k) = Σ_d x_d η_kd − exp η_kd − log x_d!,   η_kd = offset + w_kd · u.

    ``Batch.offset`` is the logarithm of the exposure. There is no intercept unless u has a column of ones. Entries of x
    that are NaN are missing.

    No quadratic lies below −exp η everywhere. Those of the M-step (see `GeneralizedLinear`) have the curvature

        c = max(κ μ, (x − μ) / (log x − log μ)),   μ = exp η,   κ = 2(e − 2).

    The first holds for all log rates up to η + 1; the second, a logarithmic mean, for all up to log x and somewhat
    beyond, and takes a rate that is much too low straight to the count. So steps are those of Newton, shortened by κ,
    near the optimum, and bounded by the data far from it. In a fit, which knows how large each input is, a step is
    halved where it might lower Q: by a bound that needs no data, so that it serves within passes as well.

    Args:
        n_components: K, the number of states.
        n_inputs: M, the number of columns of u that it reads.
        n_outputs: D, the number of columns of x.
        shared: Inputs whose coefficients all states have in common, or ``"all"``.
        columns: Which columns of u are the inputs; all of them when None.

    Raises:
        InvalidArgument: For sizes below one, or a column that u has not.

    Source: P. Wang, M. L. Puterman, I. Cockburn, N. Le (1996).

    Example:
        >>> counts = PoissonRegression(2, 2)
        >>> counts.weight = [[[0.0, 1.0]], [[1.0, 0.0]]]
        >>> u = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> counts.moments(Batch(torch.zeros(2, 1), u=u))[0][..., 0]
        tensor([[1.0000, 2.7183],
                [7.3891, 2.7183]], grad_fn=<...>)
    """

    minorizes: ClassVar[bool] = False
    exponential: ClassVar[bool] = True

    def expand(self, eta: Tensor, y: Tensor, trials: Tensor) -> Expansion:
        rate = eta.clamp(max=_MOST).exp()
        low = y > 1.5 * rate
        gap = torch.where(low, y.clamp(min=1e-300).log() - eta, 1.0)
        secant = torch.where(low, (y - rate) / gap, 0.0)
        return Expansion(y * eta - rate, y - rate, torch.maximum(_BEND * rate, secant), rate)

    def base_measure(self, y: Tensor, trials: Tensor) -> Tensor:
        return -(y + 1).lgamma()

    def mean_variance(self, eta: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        rate = eta.exp()
        return rate, rate

    def draw(self, eta: Tensor, trials: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(eta.exp(), generator=generator)

    def distribution(self, y: Tensor, eta: Tensor, trials: Tensor) -> Tensor:
        y = y.floor()
        below = torch.special.gammaincc(y.clamp(min=0.0) + 1, eta.exp())
        return torch.where(y >= 0, below, 0.0)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Counts with offsets and missing entries."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, 2, 2).double()
        family.weight = 0.5 * torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) + 0.5
        u = torch.randn(30, 2, generator=generator, dtype=torch.float64)
        u[:, 0] = 1.0
        x = torch.randint(0, 6, (30, 2), generator=generator).double()
        x[::7, 0] = torch.nan
        return family, Batch(x, u=u, offset=0.3 * torch.randn(30, generator=generator, dtype=torch.float64))
