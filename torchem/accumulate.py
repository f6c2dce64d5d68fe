"""How statistics of batches become the statistics that an M-step sees."""

import math
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch

from torchem.errors import invalid
from torchem.stats import Stats

_TINY = torch.finfo(torch.float64).tiny


@runtime_checkable
class Accumulator(Protocol):
    """A rule that gathers batch statistics; linear, so reducing over ranks before or after it is the same.

    One object serves one fit at a time: the trainer calls `reset` when it begins, and then ``begin(weight, start)``, if
    there is such a method, with the weight of all data and the statistics of the initial model on some of them. A rule
    whose steps may lower the objective says so by ``noisy = True``: a fit then judges whole passes, with patience.
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


class Stochastic:
    """Online EM: an M-step after every batch, on statistics that forget.

        S̄ ← (1 − ρ_t) S̄ + ρ_t · s_b / w_b,    ρ_t = (t + delay)^−exponent

    in statistics per observation; what is maximised is S̄ times the weight of all data (of a stream: of what was seen so
    far). With ρ = 1 on one batch this is EM. A batch of a smaller weight than the largest so far (the last of a pass)
    moves S̄ less, as a share of such a batch would: 1 − (1 − ρ)^share.

    Args:
        step_size: ρ: a constant, or a function of t = 0, 1, …; None for the Robbins–Monro sequence above.
        exponent: κ in (0.5, 1]: smaller forgets faster.
        delay: At least 0; damps the first steps.
        burn_in: Batches whose statistics gather before the first M-step.
        average: End every pass on the mean of S̄ since the burn-in (Polyak–Ruppert): variance falls as 1 / t whatever
            the exponent. A number of batches lets the mean begin after as many, so that it is not one of the start.

    Raises:
        InvalidArgument: For values outside these ranges.

    Source: O. Cappé, E. Moulines (2009); B. T. Polyak, A. B. Juditsky (1992).

    Example:
        >>> import torch
        >>> rule = Stochastic(0.5)
        >>> for value in (2.0, 4.0):
        ...     found = rule.push(0, Stats(x=torch.tensor(value), count=torch.tensor(2.0)))
        >>> found["x"]  # (1 + 2) / 2 per observation, four of which were seen
        tensor(6.)
    """

    noisy: ClassVar[bool] = True

    def __init__(
        self,
        step_size: float | Callable[[int], float] | None = None,
        *,
        exponent: float = 0.7,
        delay: float = 2.0,
        burn_in: int = 0,
        average: bool | int = False,
    ):
        if not callable(step_size) and step_size is not None and not 0 < step_size <= 1:
            raise invalid("step_size", "a number in (0, 1], or a function of the step", step_size, "give None for κ")
        if not 0.5 < exponent <= 1:
            raise invalid("exponent", "a number in (0.5, 1]", exponent, "0.6 to 0.8 are usual")
        if not 0 <= delay < math.inf:
            raise invalid("delay", "a finite number of at least 0", delay, "the default is 2")
        if not isinstance(burn_in, int) or isinstance(burn_in, bool) or burn_in < 0:
            raise invalid("burn_in", "a whole number of batches", repr(burn_in), "0 for none")
        if not isinstance(average, int) or average < 0:
            raise invalid("average", "True, False or a whole number of batches", repr(average), "give False for none")
        self.step_size, self.exponent, self.delay = step_size, exponent, delay
        self.burn_in, self.average = burn_in, average
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        #: Batches taken, those that were not empty, and how many of them are in the mean.
        self.pushed = self.step = self.averaged = 0
        #: Statistics per observation, and their mean since the burn-in.
        self.rate: Stats | None = None
        self.mean: Stats | None = None
        #: Weight of all data where it is known; and of what was seen.
        self.weight: float | None = None
        self.seen = self.largest = 0.0

    def begin(self, weight: float, start: Stats) -> None:
        """Start from the statistics of the initial model on some of the data, and know the weight of all."""
        self.weight = weight
        self.rate = _per_observation(start)

    def push(self, key: Hashable, stats: Stats) -> Stats | None:
        """Forget a little and learn a batch; returns what to maximise once the burn-in is over."""
        size = float(stats["count"].max())
        if size > 0:
            self.seen += size
            new = _per_observation(stats)
            self.largest = max(self.largest, size)
            rho = 1 - (1 - self._rho()) ** (size / self.largest)
            self.rate = new if self.rate is None else self.rate.lerp(new, rho)
            self.step += 1
            if self.average and self.pushed >= max(self.burn_in, 0 if self.average is True else self.average):
                self.averaged += 1
                self.mean = self.rate if self.mean is None else self.mean.lerp(self.rate, 1 / self.averaged)
        self.pushed += 1
        return None if self.pushed <= self.burn_in else self._whole(self.rate)

    def _rho(self) -> float:
        if self.step_size is None:
            # Before anything was learnt there is nothing to forget.
            return min(1.0, (self.step + self.delay) ** -self.exponent) if self.step + self.delay > 0 else 1.0
        rho = self.step_size(self.step) if callable(self.step_size) else self.step_size
        if not 0 < rho <= 1:
            raise invalid("step_size", "values in (0, 1]", rho, f"correct it at step {self.step}")
        return rho

    def _whole(self, rate: Stats | None) -> Stats | None:
        return None if rate is None else rate * (self.seen if self.weight is None else self.weight)

    def flush(self) -> Stats | None:
        """The averaged statistics, if averages are taken."""
        if not self.average or self.pushed <= self.burn_in:
            return None
        return self._whole(self.rate if self.mean is None else self.mean)

    def translate(self, move: Callable[[Stats], Stats]) -> None:
        """Carry what is kept into new coordinates."""
        self.rate = None if self.rate is None else move(self.rate)
        self.mean = None if self.mean is None else move(self.mean)


def _per_observation(stats: Stats) -> Stats:
    return stats * (1 / stats["count"].clamp(min=_TINY))


class Incremental:
    """EM by parts: an M-step after every batch, on the statistics of all, each as it was when last seen.

        S ← S − s_b(old) + s_b(new)

    From the second pass on the bound at S never falls, and a pass takes as many M-steps as there are batches. Keys must
    name a fixed partition of the data: batches of a shuffled loader do not.

    Args:
        folder: Where to keep the statistics of the batches, one file each; None keeps them in memory.

    Source: R. M. Neal, G. E. Hinton (1998); for variational posteriors M. C. Hughes, E. B. Sudderth (2013).

    Example:
        >>> import torch
        >>> rule = Incremental()
        >>> one = Stats(x=torch.tensor(1.0), count=torch.tensor(1.0))
        >>> rule.push(0, one), rule.push(1, one), rule.flush()["x"]
        (None, None, tensor(2.))
        >>> rule.push(0, one * 3.0 + one * -2.0)["x"]
        tensor(2.)
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.memo: MutableMapping[Hashable, Stats] = {} if self.folder is None else _OnDisk(self.folder)
        self.total: Stats | None = None
        self.ready = False

    def push(self, key: Hashable, stats: Stats) -> Stats | None:
        """Swap the statistics of a batch; returns the total from the second pass on.

        Raises:
            InvalidArgument: If the batch of that key has another weight than before.
        """
        old = self.memo.get(key)
        if old is not None and not torch.allclose(old["count"], stats["count"], rtol=1e-9, atol=0):
            raise invalid(
                "data", f"the same batches in every pass (batch {key!r} had weight {float(old['count'].max()):g})",
                f"{float(stats['count'].max()):g}", "do not shuffle: incremental EM needs a fixed partition",
            )  # fmt: skip
        self.memo[key] = stats
        if self.total is None:
            self.total = stats
        else:
            self.total = self.total + stats if old is None else self.total - old + stats
        return self.total.mix() if self.ready else None

    def flush(self) -> Stats | None:
        """The total, summed anew: running sums drift, memos do not."""
        self.ready = True
        self.total = None
        for stats in self.memo.values():
            self.total = stats if self.total is None else self.total + stats
        return None if self.total is None else self.total.mix()

    def translate(self, move: Callable[[Stats], Stats]) -> None:
        """Carry what is kept into new coordinates."""
        for key in list(self.memo):
            self.memo[key] = move(self.memo[key])
        self.total = None if self.total is None else move(self.total)


class _OnDisk(MutableMapping[Hashable, Stats]):
    """Statistics of batches as files; the structure, the same for all, stays in memory."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.places: dict[Hashable, tuple[Path, Stats]] = {}

    def __getitem__(self, key: Hashable) -> Stats:
        path, like = self.places[key]
        return like.unflatten(torch.from_numpy(np.load(path)).to(like.leaves()[0].device))

    def __setitem__(self, key: Hashable, stats: Stats) -> None:
        path = self.places[key][0] if key in self.places else self.folder / f"{len(self.places)}.npy"
        np.save(path, stats.flatten().cpu().numpy())
        # What has the structure but none of the numbers.
        self.places[key] = path, stats.map(lambda leaf: leaf.new_empty(()).expand(leaf.shape))

    def __delitem__(self, key: Hashable) -> None:
        self.places.pop(key)[0].unlink()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
