"""What families have in common whose expected log-density is no function of statistics: networks, torch's own laws."""

from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid
from torchem.factor import Factor, Kernel, StreamedPass
from torchem.stats import Stats


class Climbed(Factor):
    """An observed child whose M-step passes over the data again, under `torchem.Gradient`.

    What stands for statistics, ``value``, is Q itself, and true at the parameters of its E-step alone.
    """

    sufficient: ClassVar[bool] = False
    replicates: ClassVar[bool] = False
    default_init: ClassVar[str] = "kmeans"
    #: What such a family is, for messages.
    called: ClassVar[str] = "a family by itself"

    def kernel(self) -> Kernel:
        return _ClimbedPass(self)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``value []``: Σ expected · log p(x | z) at the current parameters."""
        return valued(self.log_prob(batch), expected)

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """Q of the parameters that the statistics were taken at: it is no function of statistics."""
        return stats["value"]

    def penalized(self, stats: Stats) -> Stats:
        """Statistics alone: a prior joins the objective that is climbed."""
        return stats

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        name = type(self).__name__
        raise invalid(
            name, "an optimiser to climb Q with, which is no function of statistics", self.called,
            f"wrap it: torchem.Gradient({name}(…), torch.optim.Adam, steps=10, lr=1e-2)",
        )  # fmt: skip


def valued(log_prob: Tensor, expected: Tensor) -> Stats:
    """What stands for statistics, given the log-densities."""
    terms = torch.where(expected > 0, expected * log_prob, 0.0)  # what is impossible may be −inf
    return Stats(value=terms.sum(dtype=torch.float64), shared=("value",))


class _ClimbedPass(StreamedPass):
    """A pass that asks for the densities of each piece once."""

    def log_potential(self, batch: Batch) -> Tensor:
        self.value = self.factor.log_prob(batch)
        return self.value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        stats = valued(self.value, expected)
        self.total = stats if self.total is None else self.total + stats
