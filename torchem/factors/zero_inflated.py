"""Columns with more zeros than their family has."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor, Kernel
from torchem.factors._around import Around, marked, mass
from torchem.factors.bernoulli import Bernoulli
from torchem.ops import reduce
from torchem.stats import Stats

#: Share of the zeros of counts that are taken for structural ones at the start.
_HALF = 0.5


class ZeroInflated(Around):
    """Independent columns that are zero with a probability of their own, and else follow another factor.

    p(x | k) = Π_d π_kd [x_d = 0] + (1 − π_kd) f(x_d | k), over the entries observed (NaN is missing).

    A zero is *structural* with probability π; what is not follows ``factor``, whose views are read and assigned through
    this one. Around counts (Poisson, negative binomial) a zero may be of either kind. Around continuous columns
    (exponential, gamma, normal) a zero is structural for certain, and the density is with respect to Lebesgue measure
    and a unit mass at zero: log π at zero, log(1 − π) f(x) elsewhere. Around counts without zeros (`Truncated`) it is a
    hurdle model of counts.

    *E-step.* A zero in column d of state k is structural with probability π / (π + (1 − π) f(0)).

    *M-step.* π is the share of structural zeros (a part, ``inflation``, with a prior of its own: a `Bernoulli` of
    structural zeros); the factor inside takes the other entries.

    Args:
        factor: Independent columns with K components.

    Raises:
        InvalidArgument: If the columns are not independent given the state.

    Source: D. Lambert (1992), without covariates.

    Example:
        >>> from torchem.factors import Poisson
        >>> z = ZeroInflated(Poisson(1, 1))
        >>> z.zero_probs, z.rates = [[0.5]], [[2.0]]
        >>> z.log_prob(Batch(torch.tensor([[0.0], [1.0]]))).exp()[:, 0]
        tensor([0.5677, 0.1353], grad_fn=<...>)
    """

    own: ClassVar = {"zero_probs": ("inflation", "probs")}

    inflation: Factor

    def __init__(self, factor: Factor):
        super().__init__(factor)
        self.inflation = Bernoulli(self._k, self._d).to(factor.device, factor.dtype)

    def parts(self) -> dict[str, Factor]:
        return {"inflation": self.inflation, "factor": self.factor}

    @property
    def zero_probs(self) -> Tensor:
        """Probabilities of structural zeros, π ``[*r, K, D]``; assignable."""
        return self.inflation.probs  # pyright: ignore[reportReturnType]

    @zero_probs.setter
    def zero_probs(self, value: Any) -> None:
        self.inflation.probs = value

    def check(self, batch: Batch) -> None:
        super().check(batch)
        x = batch.x
        # Whether zeros are in the domain of the factor does not matter.
        self.factor.check(batch.with_x(torch.where(x == 0, torch.nan, x.to(self.dtype))))

    # ---- the distribution -------------------------------------------------------------------------------------

    def _constant(self, value: float) -> Batch:
        return self.alone(torch.full((self._d,), value))

    def _logs(self, score: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """log p(0), log(1 − π), and the probability that a zero is structural, ``[*r, K, D]``."""

        def potential(factor: Factor, value: float) -> Tensor:
            batch = self._constant(value)
            return (factor.log_prob(batch) if score else factor.log_potential(batch)).mT

        one, rest = potential(self.inflation, 1.0), potential(self.inflation, 0.0)
        if not self.discrete:
            return one, rest, torch.ones_like(one)
        both = torch.stack([one, rest + potential(self.factor, 0.0)], -1)
        zero, share = reduce.responsibilities(both)
        return zero, rest, share[..., 0]

    def _split(self, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
        """Where entries are zero, where they are seen and not, and the batch with zeros as missing."""
        x = self.entries(batch)
        zero = x == 0
        return zero, ~(zero | x.isnan()), batch.with_x(torch.where(zero, torch.nan, x))

    def log_prob(self, batch: Batch) -> Tensor:
        zero, other, rest = self._split(batch)
        at_zero, kept, _ = self._logs(score=True)
        return self.factor.log_prob(rest) + marked(zero, at_zero) + marked(other, kept)

    def log_potential(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``inflation`` and ``factor``, those of the two parts."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _ZeroInflatedKernel(self)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mean, variance = self.factor.moments(batch)
        kept = 1 - self.inflation.moments(batch)[0]
        return kept * mean, kept * (variance + (1 - kept) * mean.square())

    def cdf(self, batch: Batch) -> Tensor:
        zero = self.inflation.moments(batch)[0]
        return zero * (batch.x.unsqueeze(-2) >= 0) + (1 - zero) * self.factor.cdf(batch)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        x = self.factor.sample(z, batch, generator)
        return torch.where(self.inflation.sample(z, batch, generator) > 0, 0.0, x)

    # ---- starts, bookkeeping ----------------------------------------------------------------------------------

    def _started(self, batch: Batch) -> tuple[Batch, Batch]:
        """What the two parts start from."""
        zero, _, rest = self._split(batch)
        x = self.entries(batch)
        structural = torch.where(zero, _HALF if self.discrete else 1.0, torch.where(x.isnan(), torch.nan, 0.0))
        return batch.with_x(structural), batch.with_x(x) if self.discrete else rest

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        zeros, rest = self._started(batch)
        own = {"inflation": self.inflation.initialize(zeros, expected)}
        return self.joined(own | {"factor": self.factor.initialize(rest, expected)})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        zeros, rest = self._started(batch)
        own = {"inflation": self.inflation.initialize_at(zeros, index)}
        return self.joined(own | {"factor": self.factor.initialize_at(rest, index)})

    def select(self, keep: Tensor) -> "ZeroInflated":
        small = ZeroInflated(self.factor.pruned(keep))
        small.inflation = self.inflation.pruned(keep)
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Counts with missing entries, and a continuous family."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        counts, times = factors.Poisson(3, 2).double(), factors.Gamma(3, 2).double()
        counts.rates, times.shapes, times.rates = 1 + 4 * draw(3, 2), 0.5 + 2 * draw(3, 2), 0.5 + 2 * draw(3, 2)
        x = (6 * draw(30, 2)).floor().masked_fill(draw(30, 2) < 0.15, torch.nan)
        found: list[tuple[Factor, Batch]] = []
        for inner, data in ((counts, x), (times, (4 * draw(30, 2) - 1).clamp(min=0.0))):
            family = cls(inner)
            family.zero_probs = 0.1 + 0.5 * draw(3, 2)
            found.append((family, Batch(data)))
        return found


class _ZeroInflatedKernel(Kernel):
    """The pass of the factor inside over entries that are not zero; zeros of a column are alike and only counted."""

    def __init__(self, family: ZeroInflated):
        self.family, self.inner_kernel = family, family.factor.kernel()
        self.at_zero, self.kept, self.structural = family._logs()
        self.zeros: Tensor | float = 0.0
        self.others: Tensor | float = 0.0

    def log_potential(self, batch: Batch) -> Tensor:
        self.zero, self.other, self.rest = self.family._split(batch)
        value = self.inner_kernel.log_potential(self.rest)
        return value + marked(self.zero, self.at_zero) + marked(self.other, self.kept)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.inner_kernel.collect(self.rest, expected)
        self.zeros = self.zeros + mass(self.zero, expected)
        self.others = self.others + mass(self.other, expected)

    def stats(self) -> Stats:
        family, share = self.family, self.structural.to(torch.float64)
        if not isinstance(self.zeros, Tensor):
            raise RuntimeError("a kernel has no statistics before its first piece")
        zero, one = family._constant(0.0), family._constant(1.0)
        chosen, left = share * self.zeros, (1 - share) * self.zeros
        inflation = family.inflation.stats(one, chosen.mT) + family.inflation.stats(zero, (left + self.others).mT)
        inner = self.inner_kernel.stats()
        if family.discrete:
            inner = inner + family.factor.stats(zero, left.mT)
        return Stats(inflation=inflation, factor=inner)

    def inner(self) -> Tensor:
        return self.family.expected_log_prob(self.stats())
