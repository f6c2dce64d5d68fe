"""How statistics of batches become the statistics that an M-step sees."""

from collections.abc import Callable, Hashable
from typing import Protocol, runtime_checkable

from torchem.stats import Stats


@runtime_checkable
class Accumulator(Protocol):
    """A rule that gathers batch statistics; linear, so reducing over ranks before or after it is the same.

    One object serves one fit at a time: the trainer calls `reset` when it begins.
    """

    def reset(self) -> None:
        """Forget everything."""
        ...

    def push(self, key: Hashable, stats: Stats) -> Stats | None:
        """Take the statistics of the batch named ``key``; returns what to maximise now, or None to wait."""
        ...

    def flush(self) -> Stats | None:
        """End a pass over the data; returns what to maximise, or None if there is nothing new."""
        ...

    def translate(self, move: Callable[[Stats], Stats]) -> None:
        """Carry everything kept into new coordinates (a Gaussian's origin has moved)."""
        ...


class FullBatch:
    """Classic EM: one M-step per pass, on the sum over all batches. How the data are cut up is invisible.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977).

    Example:
        >>> import torch
        >>> rule = FullBatch()
        >>> rule.push(0, Stats(n=torch.tensor(1.0))), rule.push(1, Stats(n=torch.tensor(2.0)))
        (None, None)
        >>> rule.flush()["n"]
        tensor(3.)
    """

    def __init__(self) -> None:
        self.total: Stats | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.total = None

    def push(self, key: Hashable, stats: Stats) -> Stats | None:
        """Add the statistics of a batch; an M-step waits for the end of the pass."""
        self.total = stats if self.total is None else self.total + stats
        return None

    def flush(self) -> Stats | None:
        """The sum over the pass."""
        total, self.total = self.total, None
        return total

    def translate(self, move: Callable[[Stats], Stats]) -> None:
        """Carry the running sum into new coordinates."""
        self.total = None if self.total is None else move(self.total)
