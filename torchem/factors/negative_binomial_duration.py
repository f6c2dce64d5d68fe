"""Durations that are shifted negative binomial counts."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors._durations import EMPTY, Durations
from torchem.ops import reduce
from torchem.stats import Stats

#: Bounds of μ and of the size r = 1/α: smaller sizes have their mass at one frame, larger ones are Poisson.
_MEANS, _SIZES = (1e-12, 1e9), (1e-3, 1e6)
#: Steps of Newton's method, the multiples of each that are tried, and how far it may go.
_STEPS, _TRIALS, _REACH = 12, (1.0, 4.0, 0.25, 0.05, 0.0), 4.0
#: Steps at the end that are taken as they are, where they are as short as this: derivatives need them.
_POLISH, _SHORT = 3, 1e-2


class NegativeBinomialDuration(Durations):
    """Durations of a state that are one more than negative binomial counts, cut off above D frames.

    p(d | k) ∝ Γ(y + r_k) / (Γ(r_k) y!) q_k^y,  y = d − 1 = 0 … D − 1,  q = μ / (μ + r),  r = 1/α,

    made to sum to one, with the mean μ and the variance μ + α μ² of y were it not cut off. Of size r = 1 (α = 1) they
    are geometric: the durations of a hidden Markov chain. For α → 0 they are Poisson.

    *M-step.* The two parameters of each state are climbed by Newton's method on the histogram in log μ and log r, a
    step being the best of some multiples of Newton's and never one down, from the better of the present values and
    those of the histogram's mean and variance. Dispersions stay between 1e-6 and 1e3. It starts at μ = D / 4 and α = 1.

    Args:
        n_states: K.
        max_duration: D, the longest duration.

    Raises:
        InvalidArgument: For sizes below one.

    Source: Y. Guédon (2003), section 3; J. M. Hilbe (2011), section 8.2, for the parameters.

    Example:
        >>> law = NegativeBinomialDuration(1, 3)
        >>> law.means, law.dispersions = [1.0], [1.0]
        >>> law.probs  # geometric: in proportion to 1, ½ and ¼
        tensor([[0.5714, 0.2857, 0.1429]], grad_fn=<ExpBackward0>)
    """

    no_conjugate: ClassVar[str] = "dispersions have no sufficient statistics"
    views: ClassVar = {"means": "log_mean", "dispersions": "log_dispersion"}

    log_mean: Tensor
    log_dispersion: Tensor

    def __init__(self, n_states: int, max_duration: int):
        super().__init__(n_states, max_duration)
        self.new_parameter("log_mean", torch.full((n_states,), math.log(max_duration / 4)))
        self.new_parameter("log_dispersion", torch.zeros(n_states))

    @property
    def means(self) -> Tensor:
        """μ ``[*r, K]``: the mean of d − 1, were it not cut off; assignable."""
        return self.log_mean.exp()

    @means.setter
    def means(self, value: Any) -> None:
        self.set_positive("means", value)

    @property
    def dispersions(self) -> Tensor:
        """α ``[*r, K]``: the variance of d − 1 is μ + α μ², were it not cut off; assignable."""
        return self.log_dispersion.exp()

    @dispersions.setter
    def dispersions(self, value: Any) -> None:
        self.set_positive("dispersions", value)

    def log_weights(self) -> Tensor:
        place = torch.stack([self.log_mean, -self.log_dispersion], -1).to(torch.float64)
        return self._weights(place)

    def _weights(self, place: Tensor) -> Tensor:
        """w at ``[…, 2]`` log μ and log r: y log μ + Σ_{j<y} log((r + j) / ((r + μ)(j + 1))), exact for any r."""
        mean, size = place.exp().unsqueeze(-1).unbind(-2)
        j = self.excess()[:-1]
        ratio = ((j - mean) / (size + mean)).clamp(min=1e-15 - 1).log1p() - (j + 1).log()
        steps = place[..., :1] + ratio
        return torch.nn.functional.pad(steps.cumsum(-1), (1, 0))

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count = stats["counts"].sum(-1)
        alive = count > EMPTY
        if self.max_duration == 1:  # one duration is certain
            return {"log_mean": self.log_mean.clone(), "log_dispersion": self.log_dispersion.clone()}
        share = torch.where(alive.unsqueeze(-1), stats["counts"], 1.0)
        share = share / share.sum(-1, keepdim=True)
        free = torch.stack([self._free("log_mean"), self._free("log_dispersion")], -1)
        place = self._start(share, free)
        for _ in range(_STEPS):
            step, _ = self._newton(place, share, free)
            trials = torch.stack([self._within(place + size * step) for size in _TRIALS])
            gain = (share * self._weights(trials).log_softmax(-1)).sum(-1)
            index = reduce.first_max(gain, 0)[None, ..., None].expand(1, *place.shape)
            place = trials.gather(0, index).squeeze(0)
        for _ in range(_POLISH):
            step, concave = self._newton(place, share, free)
            short = concave & (step.abs().amax(-1) < _SHORT)
            place = torch.where(short.unsqueeze(-1), self._within(place + step), place)
        mean, size = place.unbind(-1)
        return self.settled(alive, {"log_mean": mean, "log_dispersion": -size})

    def _free(self, name: str) -> Tensor:
        mask = self.frozen(name)
        none = torch.ones(self.n_states, dtype=torch.bool, device=self.device)
        return none if mask is None else ~mask.expand(self.n_states)

    @staticmethod
    def _within(place: Tensor) -> Tensor:
        bounds = zip(place.unbind(-1), (_MEANS, _SIZES), strict=True)
        return torch.stack([value.clamp(min=math.log(low), max=math.log(high)) for value, (low, high) in bounds], -1)

    def _start(self, share: Tensor, free: Tensor) -> Tensor:
        """The better of the present parameters and those that have the mean and variance of a histogram."""
        now = torch.stack([self.log_mean, -self.log_dispersion], -1).to(torch.float64).expand(*share.shape[:-1], 2)
        y = self.excess()
        mean = (share * y).sum(-1).clamp(min=_MEANS[0])
        variance = (share * (y - mean.unsqueeze(-1)).square()).sum(-1)
        size = mean.square() / (variance - mean).clamp(min=1e-3 * mean.square() + 1e-30)
        guess = torch.where(free, self._within(torch.stack([mean.log(), size.log()], -1)), now)
        both = torch.stack([self._within(now), guess])
        gain = (share * self._weights(both).log_softmax(-1)).sum(-1)
        return torch.where((gain[1] > gain[0]).unsqueeze(-1), both[1], torch.where(free, both[0], now))

    def _newton(self, place: Tensor, share: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Newton's step ``[…, 2]``, up a surface that is bent down where it is not, and whether it had to be."""
        gradient, curvature = self._derivatives(place, share)
        low = torch.tensor([math.log(_MEANS[0]), math.log(_SIZES[0])], dtype=place.dtype, device=place.device)
        high = torch.tensor([math.log(_MEANS[1]), math.log(_SIZES[1])], dtype=place.dtype, device=place.device)
        stuck = ~free | ((place <= low) & (gradient < 0)) | ((place >= high) & (gradient > 0))
        g_mean, g_size = torch.where(stuck, 0.0, gradient).unbind(-1)
        both = ~stuck.any(-1)
        a, c, b = curvature
        a, c = torch.where(stuck[..., 0], 1.0, a), torch.where(stuck[..., 1], 1.0, c)
        b = torch.where(both, b, 0.0)
        least = (a + c) / 2 - (((a - c) / 2).square() + b.square() + 1e-30).sqrt()
        size = (a.abs() + c.abs() + b.abs()).clamp(min=1e-12)
        lift = (1e-9 * size - least).clamp(min=0.0)
        # Where it is not concave the step is no longer than the gradient's own scale.
        lift = torch.where(lift > 0, lift + 0.1 * size, 0.0)
        a, c = a + lift, c + lift
        det = (a * c - b.square()).clamp(min=1e-300)
        step = torch.stack([(c * g_mean - b * g_size) / det, (a * g_size - b * g_mean) / det], -1)
        return torch.where(stuck, 0.0, step.clamp(min=-_REACH, max=_REACH)), lift == 0

    def _derivatives(self, place: Tensor, share: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Gradient of the mean log-probability in log μ and log r, and of minus its second derivatives aa, bb, ab.

        With w(y) = y η + c_y(r), η = log q: ∂η/∂a = 1 − q = −∂η/∂b and ∂c/∂b = h_y = Σ_{j<y} r / (r + j).
        """
        mean, size = place.exp().unbind(-1)
        y, j = self.excess(), self.excess()[:-1]
        q = (mean / (mean + size)).unsqueeze(-1)
        p = (size / (mean + size)).unsqueeze(-1)
        part = size.unsqueeze(-1) / (size.unsqueeze(-1) + j)
        bent = torch.nn.functional.pad((part * (1 - part)).cumsum(-1), (1, 0))
        # h_y − y (1 − q) term by term, which keeps the digits that a large r would lose.
        terms = part * (mean.unsqueeze(-1) - j) / (mean + size).unsqueeze(-1)
        first, second = p * y, torch.nn.functional.pad(terms.cumsum(-1), (1, 0))
        law = self._weights(place).log_softmax(-1).exp()
        gap = share - law
        gradient = torch.stack([(gap * first).sum(-1), (gap * second).sum(-1)], -1)
        one, two = ((law * value).sum(-1, keepdim=True) for value in (first, second))
        aa = (law * (first - one).square()).sum(-1) + (gap * q * p * y).sum(-1)
        bb = (law * (second - two).square()).sum(-1) - (gap * (bent - q * p * y)).sum(-1)
        ab = (law * (first - one) * (second - two)).sum(-1) - (gap * q * p * y).sum(-1)
        return gradient, (aa, bb, ab)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        law = cls(3, 12).double()
        law.means, law.dispersions = [1.0, 3.0, 5.0], [0.5, 1.0, 0.3]
        x = 1 + torch.poisson(8 * torch.rand(40, 1, generator=generator, dtype=torch.float64) ** 2, generator=generator)
        return law, Batch(x.clamp(max=12))
