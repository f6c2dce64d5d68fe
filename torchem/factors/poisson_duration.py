"""Durations that are shifted Poisson counts."""

import functools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors._durations import EMPTY, Durations
from torchem.stats import Stats

#: Steps of Newton's method, and how far each may go.
_STEPS, _REACH = 12, 3.0
#: Points at which a prior is integrated, and nats by which it has fallen at the ends.
_POINTS, _FALL = 8001, 45.0
#: How near to its bounds a mean is taken to be, as a share of what lies between them.
_NEAR = 1e-12


class PoissonDuration(Durations):
    """Durations of a state that are one more than Poisson counts, cut off above D frames and made to sum to one.

    p(d | k) ∝ λ_k^(d − 1) / (d − 1)!,  d = 1 … D.

    An exponential family of log λ with the statistic d − 1. *M-step.* The mean of d − 1 under the law is made that of
    the data: log E and log(D − 1 − E) are nearly linear in log λ, each at its end, so Newton's method on their
    difference needs a handful of steps. It starts at λ = D / 4.

    Args:
        n_states: K.
        max_duration: D, the longest duration.

    Raises:
        InvalidArgument: For sizes below one.

    Source: J. D. Ferguson (1980) for explicit durations; Y. Guédon (2003), section 3, for shifted families.

    Example:
        >>> law = PoissonDuration(1, 3)
        >>> law.rates = [2.0]
        >>> law.probs  # in proportion to 1, 2 and 2
        tensor([[0.2000, 0.4000, 0.4000]], grad_fn=<ExpBackward0>)
    """

    no_conjugate: ClassVar[str] = "the normaliser of a law that is cut off has no closed form"
    views: ClassVar = {"rates": "log_rate"}

    log_rate: Tensor

    def __init__(self, n_states: int, max_duration: int):
        super().__init__(n_states, max_duration)
        self.new_parameter("log_rate", torch.full((n_states,), math.log(max_duration / 4)))

    @property
    def rates(self) -> Tensor:
        """λ ``[*r, K]``: the mean of d − 1, were it not cut off; assignable."""
        return self.log_rate.exp()

    @rates.setter
    def rates(self, value: Any) -> None:
        self.set_positive("rates", value)

    def log_weights(self) -> Tensor:
        return self._weights(self.log_rate.to(torch.float64))

    def _weights(self, log_rate: Tensor) -> Tensor:
        y = self.excess()
        return log_rate.unsqueeze(-1) * y - (y + 1).lgamma()

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count = stats["counts"].sum(-1)
        alive, y, most = count > EMPTY, self.excess(), self.max_duration - 1
        if most == 0:  # one duration is certain
            return {"log_rate": self.log_rate.clone()}
        # What lies below the mean and what above, as shares of what is between the bounds.
        mass = torch.where(alive, count, 1.0).unsqueeze(-1)
        counts = torch.where(alive.unsqueeze(-1), stats["counts"], 1.0) / mass
        below = (counts * y).sum(-1).clamp(min=_NEAR * most)
        above = (counts * (most - y)).sum(-1).clamp(min=_NEAR * most)
        target = below.log() - above.log()
        value = (below * most / above).log()
        for _ in range(_STEPS):
            law = self._weights(value).softmax(-1)
            low, high = (law * y).sum(-1), (law * (most - y)).sum(-1)
            variance = (law * (y - low.unsqueeze(-1)).square()).sum(-1)
            slope = variance * most / (low * high)
            step = (target - low.log() + high.log()) / slope
            value = value + step.clamp(min=-_REACH, max=_REACH)
        return self.settled(alive, {"log_rate": value})

    # ---- conjugate prior --------------------------------------------------------------------------------------

    def prior_counts(self, excess: Tensor, count: Tensor) -> Tensor:
        """As if durations ``count [K]`` had been counted whose y add up to ``excess [K]``: ``[K, D]``.

        Statistics matter by these two sums alone; where one frame is more than certain a count is negative.
        """
        counts = torch.zeros(self.n_states, self.max_duration, dtype=torch.float64, device=self.device)
        counts[:, 0], counts[:, 1] = count - excess, excess
        return counts

    def prior_norm(self, shape: Tensor, rate: Tensor) -> Tensor:
        """Σ_k log ∫ λ^(a − 1) Z(λ)^−b dλ of shapes a and rates b ``[K]``, a number."""
        pairs = zip(shape.tolist(), rate.tolist(), strict=True)
        total = sum(_log_norm(a, b, self.max_duration) for a, b in pairs)
        return torch.tensor(total, dtype=torch.float64, device=self.device)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        law = cls(3, 9).double()
        law.rates = [1.0, 3.0, 6.0]
        return law, Batch(torch.randint(1, 10, (30, 1), generator=generator).double())


@functools.cache
def _log_norm(shape: float, rate: float, most: int) -> float:
    """log ∫ exp(a η − b log Z(e^η)) dη, of a log-concave function, by the trapezoidal rule.

    That falls off to nothing at both ends, so the rule's error falls exponentially with the number of points.
    """
    y = torch.arange(most, dtype=torch.float64)

    def height(eta: Tensor) -> Tensor:
        return shape * eta - rate * (eta.unsqueeze(-1) * y - (y + 1).lgamma()).logsumexp(-1)

    def far(side: float, mode: Tensor) -> float:
        step = 1.0
        while float(height(mode) - height(mode + side * step)) < _FALL:
            step *= 2
        return float(mode) + side * step

    # The mode lies where the mean of y is a / b: by halving.
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(((middle * y - (y + 1).lgamma()).softmax(-1) * y).sum())
        low, high = (middle, high) if rate * mean < shape else (low, middle)
    mode = torch.tensor(low, dtype=torch.float64)
    eta = torch.linspace(far(-1.0, mode), far(1.0, mode), _POINTS, dtype=torch.float64)
    return float(height(eta).logsumexp(0)) + math.log(float(eta[1] - eta[0]))
