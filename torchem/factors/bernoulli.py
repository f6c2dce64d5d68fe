"""Independent binary columns."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from torchem.batch import Batch, as_tensor, refuse_entries
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.factors._columns import Columns
from torchem.priors import Beta
from torchem.stats import Stats


class Bernoulli(Columns):
    """Independent columns of zeros and ones given the state.

    log p(x | k) = Σ_d x_d log π_kd + (1 − x_d) log(1 − π_kd), over the entries observed (NaN is missing).

    It starts at one half. Probabilities of 0 and 1 that a user assigns to `probs` are structural: no M-step moves them,
    and what contradicts them has probability zero. Those that EM reaches are finite and tiny.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.

    Raises:
        InvalidArgument: For sizes below one.

    Source: C. M. Bishop (2006), section 9.3.3.

    Example:
        >>> b = Bernoulli(2, 3)
        >>> b.probs = [[0.5, 0.5, 0.0], [0.1, 0.2, 1.0]]
        >>> b.log_prob(Batch(torch.tensor([[1.0, 0.0, 1.0], [1.0, torch.nan, 0.0]])))
        tensor([[   -inf, -2.5257],
                [-0.6931,    -inf]], grad_fn=<...>)
    """

    splits: ClassVar = frozenset({"probs"})
    views: ClassVar = {"probs": "logits"}
    discrete: ClassVar[bool] = True
    parameter: ClassVar[str] = "logits"

    logits: Tensor

    def __init__(self, n_components: int, n_features: int):
        super().__init__(n_components, n_features)
        #: Which of the values 0 and 1 each cell may take.
        self.new_buffer("support", torch.ones(n_components, n_features, 2, dtype=torch.bool))

    @property
    def probs(self) -> Tensor:
        """Probabilities of one ``[*r, K, D]``; assignable."""
        probs = self.logits.sigmoid()
        return torch.where(self.free(), probs, self.support[..., 1].to(probs)) if self.restricted else probs

    @probs.setter
    def probs(self, value: Any) -> None:
        probs = as_tensor(value, "probs").to(self.device, torch.float64)
        if probs.shape != self.logits.shape:
            raise invalid("probs", f"shape {list(self.logits.shape)}", list(probs.shape), "give one row per component")
        if not bool(((probs >= 0) & (probs <= 1)).all()):
            raise invalid("probs", "probabilities from 0 to 1", "an entry outside, or NaN", "correct that entry")
        self.support.copy_(torch.stack([probs < 1, probs > 0], -1))
        self.refresh()
        with torch.no_grad():
            self.logits.copy_(torch.where(self.free(), probs, 0.5).logit())

    def check(self, batch: Batch) -> None:
        super().check(batch)
        x = batch.x.detach()
        bad = ~((x == 0) | (x == 1) | x.isnan())
        refuse_entries(batch, bad, "zeros and ones", "recode the columns, NaN where missing")

    # ---- the family -------------------------------------------------------------------------------------------

    def natural(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if not self.restricted:
            return value, softplus(value)
        free = self.free()
        return torch.where(free, value, 0.0), torch.where(free, softplus(value), 0.0)

    def estimate(self, count: Tensor, total: Tensor) -> Tensor:
        # Each from its own count: the complement of a probability near one would have no digits.
        tiny = torch.finfo(self.dtype).tiny
        return (total / count).clamp(min=tiny).log() - ((count - total) / count).clamp(min=tiny).log()

    def expectation(self, value: Tensor) -> Tensor:
        return value.sigmoid()

    def mean_variance(self) -> tuple[Tensor, Tensor]:
        probs = self.probs
        return probs, probs * (1 - probs)

    @staticmethod
    def distribution(x: Tensor, mean: Tensor) -> Tensor:
        return torch.where(x >= 1, 1.0, torch.where(x >= 0, 1 - mean, 0.0))

    def free(self) -> Tensor:
        return self.support.all(-1)

    def forbidden(self) -> tuple[Tensor, Tensor]:
        zero, one = (~self.support).to(torch.float64).unbind(-1)
        return one - zero, -zero

    # ---- conjugate prior: beta --------------------------------------------------------------------------------

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """Beta: Σ log B(total, count − total) over the free cells."""
        count, total = self._movable(posterior)
        value = total.lgamma() + (count - total).lgamma() - count.lgamma()
        return torch.where(self.free(), value, 0.0).sum((-2, -1))

    def expected_natural(self, posterior: Stats) -> Stats:
        """E log π/(1 − π) for each total and E log(1 − π) for each count, zero where a cell is fixed."""
        count, total = self._movable(posterior)
        rest = (count - total).digamma()
        natural = Stats(count=rest - count.digamma(), total=total.digamma() - rest)
        return natural.map(lambda leaf: torch.where(self.free(), leaf, 0.0))

    def weak_prior(self) -> Beta:
        """One observation, half of it a one."""
        return Beta(0.5, 0.5)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.probs.detach()[z], generator=generator)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 2, (30, 3), generator=generator).double()
        holes = torch.rand(30, 3, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 3).double()
            family.probs = torch.rand(3, 3, generator=generator, dtype=torch.float64) * 0.8 + 0.1
            found.append((family, Batch(data)))
        return found
