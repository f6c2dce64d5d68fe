"""What laws of durations have in common: for each state a law over 1 … D frames, read as a table or as observations."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, refuse_entries
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.stats import Stats

#: Mass below which a state keeps its parameters.
EMPTY = 1e-30
#: Share of the average state that every state starts with.
_SMOOTH = 0.01


class Durations(Factor):
    """A law of d = 1 … D frames for each of K states, of few parameters: p(d | k) ∝ exp w_k(d), made to sum to one.

    As a latent child it is the table that `torchem.HSMM` reads, ``[K, D]``; as an observed child it describes columns
    of durations that were counted (NaN is missing). Statistics are the histogram ``counts [*r, K, D]`` either way.

    Args:
        n_states: K.
        max_duration: D, the longest duration.

    Raises:
        InvalidArgument: For sizes below one.
    """

    handles_missing: ClassVar[bool] = True
    independent = True
    discrete = True
    #: Numbers per state.
    width: ClassVar[int]

    def __init__(self, n_states: int, max_duration: int):
        super().__init__()
        for name, size in (("n_states", n_states), ("max_duration", max_duration)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        self.n_states, self.max_duration = n_states, max_duration

    @property
    def shape(self) -> tuple[int, int]:
        """States and durations, as of a table."""
        return self.n_states, self.max_duration

    @property
    def n_components(self) -> int:
        return self.n_states

    @property
    def n_features(self) -> int:
        return 1

    @abstractmethod
    def log_weights(self) -> Tensor:
        """w ``[*r, K, D]``, float64."""

    def excess(self) -> Tensor:
        """d − 1, ``[D]``, float64."""
        return torch.arange(self.max_duration, dtype=torch.float64, device=self.device)

    def log_probs(self) -> Tensor:
        """Log-probabilities ``[*r, K, D]``."""
        return self.log_weights().log_softmax(-1).to(self.dtype)

    @property
    def probs(self) -> Tensor:
        """Probabilities ``[*r, K, D]`` of durations 1 … D."""
        return self.log_probs().exp()

    @property
    def mean_durations(self) -> Tensor:
        """Expected duration ``[*r, K]`` of each state, in frames."""
        return 1 + (self.probs * self.excess().to(self.dtype)).sum(-1)

    def set_positive(self, view: str, value: Any) -> None:
        """Assign a view that is the exponential of its parameter."""
        parameter = self.get_parameter(self.views[view])
        given = as_tensor(value, view).to(self.device, torch.float64)
        if given.shape != parameter.shape:
            raise invalid(view, f"shape {list(parameter.shape)}", list(given.shape), "give one number per state")
        if not bool(((given > 0) & given.isfinite()).all()):
            raise invalid(view, "finite positive numbers", "another entry", "correct it")
        with torch.no_grad():
            parameter.copy_(given.log())

    # ---- as a latent child ------------------------------------------------------------------------------------

    def log_table(self, batch: Batch) -> Tensor:
        """``[*r, 1, K, D]``."""
        return self.log_probs().unsqueeze(-3)

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        lead = len(self.replicas)
        return Stats(counts=expected.flatten(lead, -3).sum(lead, dtype=torch.float64))

    # ---- as an observed child ---------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        super().check(batch)
        x = batch.x.detach()
        bad = (x < 1) | (x > self.max_duration)
        bad = bad | (x != x.round()) & ~x.isnan() if x.is_floating_point() else bad
        refuse_entries(
            batch, bad, f"whole numbers from 1 to {self.max_duration}", "count frames, or raise max_duration"
        )

    def _place(self, batch: Batch) -> Tensor:
        """``[*n]``: d − 1, D for what is missing and D + 1 for what is impossible."""
        x = batch.x[..., 0].to(torch.float64)
        within = (x >= 1) & (x <= self.max_duration) & (x == x.round())
        place = torch.where(within, x - 1, self.max_duration + 1.0)
        return torch.where(x.isnan(), float(self.max_duration), place).long()

    def log_prob(self, batch: Batch) -> Tensor:
        table = self.log_probs()
        ends = torch.stack([torch.zeros_like(table[..., 0]), torch.full_like(table[..., 0], -torch.inf)], -1)
        return torch.cat([table, ends], -1)[..., self._place(batch)].movedim(len(self.replicas), -1)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``counts [*r, K, D]`` of observed durations."""
        place = self._place(batch).reshape(-1)
        flat = expected.reshape(*self.replicas, len(place), self.n_states).mT.to(torch.float64)
        counts = flat.new_zeros(*self.replicas, self.n_states, self.max_duration + 2).index_add(-1, place, flat)
        return Stats(counts=counts[..., : self.max_duration].contiguous())

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        probs, d = self.probs, 1 + self.excess().to(self.dtype)
        mean = (probs * d).sum(-1)
        variance = (probs * (d - mean.unsqueeze(-1)).square()).sum(-1)
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self.n_states, 1)
        return mean.reshape(shape), variance.reshape(shape)

    def outcomes(self) -> list[Tensor | None]:
        return [1 + self.excess().to(self.dtype)]

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        counts = self.gather(batch, expected)["counts"]
        return Stats(counts=counts + _SMOOTH * counts.mean(-2, keepdim=True))

    # ---- EM ---------------------------------------------------------------------------------------------------

    def expected_log_prob(self, stats: Stats) -> Tensor:
        # A weight that underflows takes its logarithm with it only where nothing was counted.
        return (stats["counts"] * self.log_weights().log_softmax(-1)).sum((-2, -1))

    def settled(self, alive: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """New parameters where a state has mass and is not frozen, the old ones elsewhere."""
        return {
            name: self.keep_frozen(name, torch.where(alive, value.to(self.dtype), getattr(self, name)))
            for name, value in values.items()
        }

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        masks = [self.frozen(name) for name in self.views.values()]
        return sum(self.n_states if m is None else self.n_states - int(m.expand(self.n_states).sum()) for m in masks)

    def select(self, keep: Tensor) -> "Durations":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = type(self)(len(index), self.max_duration).to(self.device, self.dtype)
        for name in self.views.values():
            small.get_parameter(name).data = self.get_parameter(name).detach()[index].clone()
            mask = self.frozen(name)
            if mask is not None:
                small.register_buffer(f"frozen_{name}", mask[index] if mask.dim() else mask)
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return 1 + torch.multinomial(self.probs.detach()[z], 1, generator=generator).to(self.dtype)
