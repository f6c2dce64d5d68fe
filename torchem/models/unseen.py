"""Laws of what was not seen of a row, given all that was: what fills gaps and predicts some columns from others."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor
from torchem.ops import directional, linalg, reduce
from torchem.ops.gaussian import LOG_2PI


class Unseen(ABC):
    """The law of the missing entries of rows ``x [G, D]``, each row by itself, given what was seen of it and beside it.

    Leading axes ``*r`` are those of replicas. What was seen is its own mean, without variance.

    Attributes:
        rows: The rows ``[G, D]``, NaN where an entry is missing.
        share: Probabilities of the states that the law is a mixture over, ``[*r, G, S]``; zeros where what was seen is
            impossible.
    """

    rows: Any  # a batch
    share: Any  # a tensor

    @property
    @abstractmethod
    def numbers(self) -> int:
        """Numbers held for a row while moments are taken."""

    @abstractmethod
    def __getitem__(self, index: Any) -> "Unseen":
        """The law of some rows: a slice, or an index tensor, which may repeat them."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each entry, ``[*r, G, D]``."""

    @abstractmethod
    def covariance(self) -> Tensor:
        """Covariances of the entries of each row, ``[*r, G, D, D]``; zero beside what was seen."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(entries that ``x [G, D]`` has and the rows have not | what was seen), ``[*r, G]``."""

    def mode(self) -> Tensor:
        """Means under the most probable state, ``[*r, G, D]``: what stands for the mode of a density."""
        return self.moments()[0]

    def placed(self, value: Tensor) -> Tensor:
        """Values ``[*r, G, D]`` of missing entries, moved to where observations lie."""
        return value

    def cdf(self, x: Tensor) -> Tensor:
        """Probability ``[*r, G, D]`` that each column is at most what it is in ``x``; for wholly missing rows."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution function")

    def conditional_cdf(self) -> Callable[[Tensor], Tensor]:
        """A function of x ``[G, D]`` that gives the probability that each missing entry is at most that."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution functions given what was seen")

    def log_chance(self, column: int, outcome: Tensor) -> Tensor:
        """log p(a column has some value | what was seen), ``[*r, G]``."""
        x = self.rows.x.clone()
        x[:, column] = outcome
        return self.log_prob(x)

    @property
    @abstractmethod
    def outcomes(self) -> list[Tensor | None]:
        """For each column the values among which the most probable one is; None where it is continuous."""

    @property
    @abstractmethod
    def nominal(self) -> list[bool]:
        """For each column whether its values are names."""

    @property
    def circular(self) -> list[bool]:
        """For each column whether its values are angles."""
        return [False] * self.rows.x.shape[-1]

    def possible(self) -> Tensor:
        """Whether what was seen is possible, ``[*r, G]``."""
        return self.share.sum(-1) > 0

    def _missing_pairs(self, covariance: Tensor) -> Tensor:
        holes = self.rows.x.isnan()
        return torch.where(holes.unsqueeze(-1) & holes.unsqueeze(-2), covariance, 0.0)


def total(share: Tensor, mean: Tensor, variance: Tensor, circular: Sequence[bool] = (False,)) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[…, D]`` of a mixture by shares ``[…, K]`` of parts ``[…, K, D]``.

    The variance is that within the parts and that between them, Σ_k γ_k (σ²_k + (μ_k − μ)²). Of columns of angles both
    are those of directions.
    """
    if any(circular):
        angles = torch.tensor(circular, device=mean.device)
        found = zip(directional.mixed(share, mean, variance), total(share, mean, variance), strict=True)
        center, spread = (torch.where(angles, *pair) for pair in found)
        return center, spread
    share = share.unsqueeze(-1)
    # A state that cannot be may have no variance that is finite.
    center = torch.where(share > 0, share * mean, 0.0).sum(-2)
    spread = variance + (mean - center.unsqueeze(-2)).square()
    return center, torch.where(share > 0, share * spread, 0.0).sum(-2)


def total_covariance(share: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Covariance ``[…, D, D]`` of a mixture by shares ``[…, K]`` of parts with means and covariances ``[…, K, D, D]``.

    Σ_k γ_k (C_k + (μ_k − μ)(μ_k − μ)ᵀ).
    """
    each = share.unsqueeze(-1)
    gap = mean - torch.where(each > 0, each * mean, 0.0).sum(-2, keepdim=True)
    spread, each = covariance + gap.unsqueeze(-1) * gap.unsqueeze(-2), each.unsqueeze(-1)
    return torch.where(each > 0, each * spread, 0.0).sum(-3)


def most_probable(law: Unseen, column: int, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable value of a column, ``[*r, G]``, and its probability among all outcomes."""
    best = mass = law.log_chance(column, outcomes[0])
    found = outcomes[0].expand(best.shape)
    for outcome in outcomes[1:]:
        value = law.log_chance(column, outcome)
        found = torch.where(value > best, outcome, found)
        best, mass = torch.maximum(best, value), torch.logaddexp(mass, value)
    return found, (best - mass).exp()


@dataclass(frozen=True)
class Among(Unseen):
    """A factor in one of its states: Σ_k γ_k p(x_u | x_o, k).

    Attributes:
        factor: What emitted the rows.
        rows: With what the factor reads besides.
        share: Posterior of the states ``[*r, G, K]``.
    """

    factor: Factor
    rows: Batch
    share: Tensor

    def __getitem__(self, index: Any) -> "Among":
        return Among(self.factor, self.rows[index], self.share[..., index, :])

    @property
    def numbers(self) -> int:
        replicas = math.prod(self.factor.replicas)
        return (self.factor.row_size() + 6 * self.share.shape[-1] * self.rows.x.shape[-1]) * replicas

    @property
    def outcomes(self) -> list[Tensor | None]:
        return self.factor.outcomes()

    @property
    def nominal(self) -> list[bool]:
        return self.factor.nominal

    @property
    def circular(self) -> list[bool]:
        return self.factor.circular

    def moments(self) -> tuple[Tensor, Tensor]:
        mean, variance = total(self.share, *self.factor.conditional(self.rows), self.circular)
        missing = self.rows.x.isnan()
        return torch.where(missing, mean, self.rows.x.to(mean)), torch.where(missing, variance, 0.0)

    def mode(self) -> Tensor:
        mean, share = self.factor.conditional(self.rows)[0], self.share
        best = reduce.first_max(share)[..., None, None].expand(*share.shape[:-1], 1, mean.shape[-1])
        return mean.expand(*share.shape, -1).gather(-2, best).squeeze(-2)

    def placed(self, value: Tensor) -> Tensor:
        return self.factor.placed(self.rows, value)

    def covariance(self) -> Tensor:
        mean = self.factor.conditional(self.rows)[0]
        return self._missing_pairs(total_covariance(self.share, mean, self.factor.conditional_covariance(self.rows)))

    @cached_property
    def _weight(self) -> Tensor:
        """log γ_k − log p(x_o | k)."""
        before = self.factor.log_prob(self.rows.with_x(self.factor.cast(self.rows.x)))
        return torch.where(self.share > 0, self.share.clamp(min=1e-300).log() - before, -torch.inf)

    def log_prob(self, x: Tensor) -> Tensor:
        return reduce.logsumexp(self._weight + self.factor.log_prob(self.rows.with_x(self.factor.cast(x))), -1)

    def cdf(self, x: Tensor) -> Tensor:
        return (self.share.unsqueeze(-1) * self.factor.cdf(self.rows.with_x(self.factor.cast(x)))).sum(-2)

    def conditional_cdf(self) -> Callable[[Tensor], Tensor]:
        share, cdf = self.share.unsqueeze(-1), self.factor.conditional_cdf(self.rows)
        return lambda x: torch.where(share > 0, share * cdf(x), 0.0).sum(-2)


@dataclass(frozen=True)
class Moments(Unseen):
    """What is known of continuous entries by their moments.

    Attributes:
        rows: ``[G, D]``.
        mean: ``[*r, G, D]``.
        variance: ``[*r, G, D]``.
        likely: What stands for the mode, ``[*r, G, D]``; None for the mean.
    """

    rows: Batch
    mean: Tensor
    variance: Tensor
    likely: Tensor | None = None

    def __getitem__(self, index: Any) -> "Moments":
        likely = None if self.likely is None else self.likely[..., index, :]
        return Moments(self.rows[index], self.mean[..., index, :], self.variance[..., index, :], likely)

    @property
    def share(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.ones_like(self.mean[..., :1])

    @property
    def numbers(self) -> int:
        return 4 * self.mean.shape[-1] * math.prod(self.mean.shape[:-2])

    @property
    def outcomes(self) -> list[Tensor | None]:
        return [None] * self.mean.shape[-1]

    @property
    def nominal(self) -> list[bool]:
        return [False] * self.mean.shape[-1]

    def moments(self) -> tuple[Tensor, Tensor]:
        missing = self.rows.x.isnan()
        return torch.where(missing, self.mean, self.rows.x.to(self.mean)), torch.where(missing, self.variance, 0.0)

    def mode(self) -> Tensor:
        return self.mean if self.likely is None else self.likely

    def covariance(self) -> Tensor:
        raise NotImplementedError("variances are known, and no covariances")

    def log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError("moments are known, and no density")


@dataclass(frozen=True)
class Normal(Moments):
    """A normal law of each row.

    Attributes:
        spread: Covariances of the entries, ``[*r, G, D, D]``.
    """

    spread: Tensor | None = None

    @classmethod
    def of(cls, rows: Batch, mean: Tensor, spread: Tensor) -> "Normal":
        """The law with a mean ``[*r, G, D]`` and covariances ``[*r, G, D, D]``."""
        return cls(rows, mean, spread.diagonal(dim1=-2, dim2=-1), None, spread)

    def __getitem__(self, index: Any) -> "Normal":
        assert self.spread is not None
        return Normal.of(self.rows[index], self.mean[..., index, :], self.spread[..., index, :, :])

    @property
    def numbers(self) -> int:
        return 4 * self.mean.shape[-1] * (self.mean.shape[-1] + 1) * math.prod(self.mean.shape[:-2])

    def conditional_cdf(self) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.special.ndtr((x - self.mean) / self.variance.sqrt())

    def covariance(self) -> Tensor:
        assert self.spread is not None
        return self._missing_pairs(self.spread)

    def log_prob(self, x: Tensor) -> Tensor:
        assert self.spread is not None
        asked = self.rows.x.isnan() & ~x.isnan()
        gap = torch.where(asked, x.to(self.mean) - self.mean, 0.0)
        # What is not asked for is given the unit's part alone.
        eye = torch.eye(x.shape[-1], dtype=self.mean.dtype, device=self.mean.device)
        both = asked.unsqueeze(-1) & asked.unsqueeze(-2)
        root = linalg.inverse_factor(linalg.cholesky(torch.where(both, self.spread, eye)))
        white = (root @ gap.unsqueeze(-1)).squeeze(-1)
        scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return scale - 0.5 * (white.square().sum(-1) + asked.sum(-1).to(scale) * LOG_2PI)

    def cdf(self, x: Tensor) -> Tensor:
        return torch.special.ndtr((x.to(self.mean) - self.mean) / self.variance.sqrt())


@dataclass(frozen=True)
class Blend(Unseen):
    """A mixture of laws: Σ_k γ_k p_k(x_u | what was seen).

    Attributes:
        share: Responsibilities ``[*r, G, K]``.
        parts: A law for each component; or one with the axis of components after those of replicas, ``[*r, K, G, …]``.
    """

    share: Tensor
    parts: list[Unseen] | Unseen

    @property
    def _each(self) -> list[Unseen]:
        return [self.parts] if isinstance(self.parts, Unseen) else self.parts

    def __getitem__(self, index: Any) -> "Blend":
        parts = self.parts
        some = parts[index] if isinstance(parts, Unseen) else [part[index] for part in parts]
        return Blend(self.share[..., index, :], some)

    @property
    def rows(self) -> Batch:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._each[0].rows

    @property
    def numbers(self) -> int:
        return sum(part.numbers for part in self._each)

    @property
    def outcomes(self) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for column in zip(*(part.outcomes for part in self._each), strict=True):
            listed = [own for own in column if own is not None]
            # A column that is continuous under one component has no value of positive probability there.
            found.append(max(listed, key=len) if len(listed) == len(column) else None)
        return found

    @property
    def nominal(self) -> list[bool]:
        return self._each[0].nominal

    @property
    def circular(self) -> list[bool]:
        return self._each[0].circular

    def stacked(self, function: Callable[[Unseen], Tensor]) -> Tensor:
        """A function of every part, the axis of components after that of rows: ``[*r, G, K, …]``."""
        lead = self.share.dim() - 2
        if isinstance(self.parts, Unseen):
            return function(self.parts).transpose(lead, lead + 1)
        return torch.stack([function(part) for part in self.parts], lead + 1)

    def component_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance under each component, ``[*r, G, K, D]``."""
        return self.stacked(lambda part: part.moments()[0]), self.stacked(lambda part: part.moments()[1])

    def moments(self) -> tuple[Tensor, Tensor]:
        return total(self.share, *self.component_moments(), self.circular)

    def mode(self) -> Tensor:
        each = self.stacked(lambda part: part.mode())
        best = reduce.first_max(self.share)[..., None, None].expand(*self.share.shape[:-1], 1, each.shape[-1])
        return each.gather(-2, best).squeeze(-2)

    def covariance(self) -> Tensor:
        return total_covariance(self.share, self.component_moments()[0], self.stacked(lambda part: part.covariance()))

    def _mixed(self, each: Tensor) -> Tensor:
        some = self.share > 0
        weight = torch.where(some, self.share, 1.0).log()
        return reduce.logsumexp(torch.where(some, weight + each, -torch.inf), -1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self._mixed(self.stacked(lambda part: part.log_prob(x)))

    def log_chance(self, column: int, outcome: Tensor) -> Tensor:
        return self._mixed(self.stacked(lambda part: part.log_chance(column, outcome)))

    def cdf(self, x: Tensor) -> Tensor:
        return (self.share.unsqueeze(-1) * self.stacked(lambda part: part.cdf(x))).sum(-2)


@dataclass(frozen=True)
class Names(Unseen):
    """One column of names, of which the most probable one stands for mean and mode.

    Attributes:
        rows: ``[G, 1]``.
        share: Probability of each name, ``[*r, G, S]``.
    """

    rows: Batch
    share: Tensor

    def __getitem__(self, index: Any) -> "Names":
        return Names(self.rows[index], self.share[..., index, :])

    @property
    def numbers(self) -> int:
        return 2 * self.share.shape[-1] * math.prod(self.share.shape[:-2])

    @property
    def outcomes(self) -> list[Tensor | None]:
        return [torch.arange(self.share.shape[-1], dtype=self.share.dtype, device=self.share.device)]

    @property
    def nominal(self) -> list[bool]:
        return [True]

    def moments(self) -> tuple[Tensor, Tensor]:
        best, missing = self.share.max(-1, keepdim=True), self.rows.x.isnan()
        value = torch.where(missing, best.indices.to(self.share), self.rows.x.to(self.share))
        return value, torch.where(missing, 1 - best.values, 0.0)

    def covariance(self) -> Tensor:
        raise NotImplementedError("names have no covariances")

    def log_prob(self, x: Tensor) -> Tensor:
        asked = (self.rows.x.isnan() & ~x.isnan())[..., 0]
        place = torch.where(asked, x[..., 0], 0.0).long().unsqueeze(-1).expand(*self.share.shape[:-1], 1)
        return torch.where(asked, self.share.gather(-1, place).squeeze(-1).log(), 0.0)


@dataclass(frozen=True)
class Beside(Unseen):
    """Columns with laws of their own.

    Attributes:
        rows: ``[G, D]``.
        parts: Numbers of columns, and their law.
        joint: log-density of whole rows, ``[*r, G]``: the columns depend on each other.
    """

    rows: Batch
    parts: list[tuple[list[int], Unseen]]
    joint: Callable[[Batch], Tensor]

    def __getitem__(self, index: Any) -> "Beside":
        return Beside(self.rows[index], [(columns, part[index]) for columns, part in self.parts], self.joint)

    @property
    def share(self) -> Tensor:
        return self.possible().unsqueeze(-1).to(self.rows.x.dtype)

    @property
    def numbers(self) -> int:
        return sum(part.numbers for _, part in self.parts)

    def _in_order(self, each: Callable[[Unseen], list[Any]]) -> list[Any]:
        found: dict[int, Any] = {}
        for columns, part in self.parts:
            found |= dict(zip(columns, each(part), strict=True))
        return [found[column] for column in sorted(found)]

    def _beside(self, each: Callable[[Unseen], Tensor]) -> Tensor:
        return torch.stack(self._in_order(lambda part: list(each(part).to(self.rows.x.dtype).unbind(-1))), -1)

    @property
    def outcomes(self) -> list[Tensor | None]:
        return self._in_order(lambda part: part.outcomes)

    @property
    def nominal(self) -> list[bool]:
        return self._in_order(lambda part: part.nominal)

    @property
    def circular(self) -> list[bool]:
        return self._in_order(lambda part: part.circular)

    def possible(self) -> Tensor:
        return torch.stack([part.possible() for _, part in self.parts]).all(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self._beside(lambda part: part.moments()[0]), self._beside(lambda part: part.moments()[1])

    def mode(self) -> Tensor:
        return self._beside(lambda part: part.mode())

    def covariance(self) -> Tensor:
        raise NotImplementedError("columns that depend on each other through names have no covariances here")

    def log_prob(self, x: Tensor) -> Tensor:
        return self.joint(self.rows.with_x(torch.where(x.isnan(), self.rows.x, x))) - self.joint(self.rows)

    def log_chance(self, column: int, outcome: Tensor) -> Tensor:
        columns, part = next(pair for pair in self.parts if column in pair[0])
        return part.log_chance(columns.index(column), outcome)


class Components:
    """The parts of a blend of wholly missing rows as if they were the components of a factor: ``[N, K, …]``."""

    def __init__(self, blend: Blend):
        self.blend = blend

    @property
    def discrete(self) -> bool:
        """Whether all columns are."""
        return all(values is not None for values in self.blend.outcomes)

    @property
    def circular(self) -> list[bool]:
        """For each column whether its values are angles."""
        return self.blend.circular

    def outcomes(self) -> list[Tensor | None]:
        """For each column the values among which the most probable one is; None where it is continuous."""
        return self.blend.outcomes

    def check(self, batch: Batch) -> None:
        """What the models read is read."""

    def cast(self, x: Tensor) -> Tensor:
        """As it is."""
        return x

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `moments`: nothing is observed."""
        return self.moments(batch)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column given the component."""
        return self.blend.component_moments()

    def conditional_covariance(self, batch: Batch) -> Tensor:
        """Covariances of the columns given the component."""
        return self.blend.stacked(lambda part: part.covariance())

    def log_prob(self, batch: Batch) -> Tensor:
        """log p(x | component)."""
        return self.blend.stacked(lambda part: part.log_prob(batch.x))

    def cdf(self, batch: Batch) -> Tensor:
        """Probability that each column is at most what it is, given the component."""
        return self.blend.stacked(lambda part: part.cdf(batch.x))
