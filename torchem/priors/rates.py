"""Priors over probabilities of ones and rates of counts."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from torchem.errors import invalid
from torchem.factor import Factor, Moments, Prior, conjugate
from torchem.priors._hyper import chosen, expand, hyper, plain
from torchem.stats import Stats


class _Cells(Prior, ABC):
    """Independent laws over the cells ``[K, D]`` of a family of columns, those that the user fixed left out."""

    #: The view that such a prior stands over.
    view: str

    @abstractmethod
    def pseudo(self, factor: Factor) -> tuple[Tensor, Tensor]:
        """``count`` and ``total`` of the prior ``[K, D]``, as if they had been observed."""

    @abstractmethod
    def surplus(self, factor: Factor) -> tuple[float, float]:
        """What these exceed the exponents of the density by: ``count`` and ``total`` of no observation."""

    def _cells(self, factor: Factor, name: str, value: Tensor) -> Tensor:
        parameter = getattr(factor, getattr(factor, "parameter", ""), None)
        if parameter is None or self.view not in factor.views:
            family = {"probs": "Bernoulli", "rates": "Poisson or Exponential"}[self.view]
            raise invalid("prior", f"{family} columns to stand over", type(factor).__name__, "use its own prior")
        return expand(name, value, tuple(parameter.shape[len(factor.replicas) :]), parameter)

    def posterior_stats(self, factor: Factor) -> Stats:
        count, total = self.pseudo(factor)
        return Stats(count=count, total=total)

    def mode_stats(self, factor: Factor) -> Stats:
        (count, total), (more, ones) = self.pseudo(factor), self.surplus(factor)
        return Stats(count=count - more, total=total - ones)

    def log_prob(self, factor: Factor) -> Tensor:
        # The density has the exponents of the mode, and the norm of the posterior; what is fixed counts for nothing.
        norm = conjugate(factor).log_normalizer(self.posterior_stats(factor))
        return factor.expected_log_prob(self.mode_stats(factor)) - norm


class Beta(_Cells):
    """Probabilities of a `Bernoulli` a priori Beta: p(π) ∝ π^{a − 1} (1 − π)^{b − 1}.

    Args:
        a: One number or a tensor that broadcasts to ``[K, D]``; at least 1 for a mode inside.
        b: Likewise.

    Raises:
        InvalidArgument: If an entry is not positive.

    Source: A. Gelman et al. (2013), section 2.4.

    Example:
        >>> import torchem
        >>> coins = torchem.factors.Bernoulli(1, 1)
        >>> coins.prior = Beta(2.0, 3.0)
        >>> coins.prior.mode_stats(coins)
        {'count': tensor([[3.]], dtype=torch.float64), 'total': tensor([[1.]], dtype=torch.float64)}
    """

    view = "probs"

    def __init__(self, a: Any = 1.0, b: Any = 1.0):
        first, second = hyper("a", a, positive=True), hyper("b", b, positive=True)
        if first is None or second is None:
            raise invalid("a, b", "positive finite numbers", "None", "1 and 1 are the uniform law")
        self.a, self.b = first, second

    def selected(self, factor: Factor, keep: Tensor) -> Prior:
        return Beta(chosen(self.a, keep, 2), chosen(self.b, keep, 2))

    def pseudo(self, factor: Factor) -> tuple[Tensor, Tensor]:
        a, b = self._cells(factor, "a", self.a), self._cells(factor, "b", self.b)
        return a + b, a

    def surplus(self, factor: Factor) -> tuple[float, float]:
        return 2.0, 1.0

    def check(self, factor: Factor) -> None:
        self.pseudo(factor)
        for name, value in (("a", self.a), ("b", self.b)):
            if bool((value < 1).any()):
                raise invalid(
                    name, "at least 1 (the mode of a lower one is at a bound)", float(value.min()),
                    "raise it, or use variational EM",
                )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"a": plain(self.a), "b": plain(self.b)}


class Gamma(_Cells):
    """Rates of a `Poisson` or an `Exponential` a priori Gamma: p(λ) ∝ λ^{shape − 1} exp(−rate · λ).

    Those of a `PoissonDuration`, whose law is cut off above D frames, have instead the conjugate of what is left,

        p(λ) ∝ λ^{shape − 1} Z(λ)^{−rate},  Z(λ) = Σ_{y < D} λ^y / y!,

    which is Gamma where nothing is cut off, for Z(λ) is then exp λ. Its norm is an integral over log λ by quadrature;
    expectations under it have no closed form, so it serves modes and no posteriors (`torchem.Variational`).

    Args:
        shape: One number or a tensor that broadcasts to ``[K, D]`` (of durations to ``[K]``); at least 1 for a mode
            inside.
        rate: Likewise, in observations (of waiting times, in their units); None for the one under which the law has a
            priori the mean of the data (of durations: the rates that they begin with, D / 4).

    Raises:
        InvalidArgument: If an entry is not positive.

    Source: A. Gelman et al. (2013), section 2.6; P. Diaconis, D. Ylvisaker (1979) for durations.

    Example:
        >>> import torchem
        >>> counts = torchem.factors.Poisson(1, 1)
        >>> counts.prior = Gamma(3.0, 2.0)
        >>> counts.prior.mode_stats(counts)
        {'count': tensor([[2.]], dtype=torch.float64), 'total': tensor([[2.]], dtype=torch.float64)}
    """

    view = "rates"

    def __init__(self, shape: Any = 1.0, rate: Any = None):
        value = hyper("shape", shape, positive=True)
        if value is None:
            raise invalid("shape", "positive finite numbers", "None", "1 is an exponential law")
        self.shape, self.rate = value, hyper("rate", rate, positive=True)
        self._open = self.rate is None

    def completed(self, factor: Factor, moments: Moments) -> Prior:
        if not self._open or self._lasting(factor) or moments.mean.shape != (factor.n_features,):
            return self
        mean = moments.mean.to(torch.float64)
        # A column of zeros has no scale of its own.
        mean = torch.where(mean > 0, mean, 1.0)
        out = Gamma(self.shape, self.shape * mean if self._times(factor) else self.shape / mean)
        out._open = True
        return out

    def selected(self, factor: Factor, keep: Tensor) -> Prior:
        rank = 1 if self._lasting(factor) else 2
        out = Gamma(chosen(self.shape, keep, rank), chosen(self.rate, keep, rank))
        out._open = self._open
        return out

    @staticmethod
    def _times(factor: Factor) -> bool:
        """Whether rates are multiplied by times observed, and counted by observations; else it is the other way."""
        return getattr(factor, "exposure", "count") == "total"

    @staticmethod
    def _lasting(factor: Factor) -> bool:
        """Whether the rates are those of durations."""
        return hasattr(factor, "prior_counts")

    def _of_durations(self, factor: Any) -> tuple[Tensor, Tensor]:
        """Shape and rate of each state, ``[K]``."""
        rate = 4 * self.shape / factor.max_duration if self.rate is None else self.rate
        size, like = (factor.n_states,), factor.log_rate
        return expand("shape", self.shape, size, like), expand("rate", rate, size, like)

    def posterior_stats(self, factor: Any) -> Stats:
        if not self._lasting(factor):
            return super().posterior_stats(factor)
        return Stats(counts=factor.prior_counts(*self._of_durations(factor)))

    def mode_stats(self, factor: Any) -> Stats:
        if not self._lasting(factor):
            return super().mode_stats(factor)
        shape, rate = self._of_durations(factor)
        return Stats(counts=factor.prior_counts(shape - 1, rate))

    def log_prob(self, factor: Any) -> Tensor:
        if not self._lasting(factor):
            return super().log_prob(factor)
        return factor.expected_log_prob(self.mode_stats(factor)) - factor.prior_norm(*self._of_durations(factor))

    def pseudo(self, factor: Factor) -> tuple[Tensor, Tensor]:
        rate = self.shape if self.rate is None else self.rate
        exposure, events = self._cells(factor, "rate", rate), self._cells(factor, "shape", self.shape)
        return (events, exposure) if self._times(factor) else (exposure, events)

    def surplus(self, factor: Factor) -> tuple[float, float]:
        return (1.0, 0.0) if self._times(factor) else (0.0, 1.0)

    def check(self, factor: Any) -> None:
        if self._lasting(factor):
            shape, rate = self._of_durations(factor)
            if bool((rate * (factor.max_duration - 1) <= shape).any()):
                raise invalid(
                    "rate", f"above shape / {factor.max_duration - 1}: else the law is improper, for durations are cut "
                    "off", float((rate / shape).min()), "raise it",
                )  # fmt: skip
        else:
            self.pseudo(factor)
        if bool((self.shape < 1).any()):
            raise invalid(
                "shape", "at least 1 (the mode of a lower one is at zero)", float(self.shape.min()),
                "raise it, or use variational EM",
            )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"shape": plain(self.shape), "rate": plain(self.rate)}
