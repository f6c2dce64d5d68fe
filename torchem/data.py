"""Where batches come from: tensors, data loaders, files; and what a fit must know of them before it starts."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchem import distributed
from torchem.batch import Batch, concatenate
from torchem.errors import invalid, wrong_type
from torchem.model import LatentModel

#: Rows read at a time where only moments are taken.
_SURVEY = 1 << 13


class Source:
    """Passes over data as ``(key, batch)`` pairs. Keys name the parts of a fixed partition.

    Args:
        model: Validates each batch.
        data: A tensor, array, nested list, `Batch`, path, ``Dataset``, ``DataLoader`` or another iterable that can be
            passed over repeatedly and yields batches.
        batch_size: Rows per batch; None for the whole at once (tensors) or 4096 (data sets).
        weight: Weight of each row, where data are held in memory.
        u: Covariates of each row, likewise.
    """

    def __init__(self, model: LatentModel, data: Any, batch_size: int | None = None, weight: Any = None, u: Any = None):
        if batch_size is not None and (
            not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1
        ):
            raise invalid(
                "batch_size", "a positive whole number", repr(batch_size), "give the rows of a batch, or None"
            )
        if isinstance(data, (str, Path)):
            from torchem.tables import read_table

            data = read_table(data).values
        self.model = model
        self.whole: Batch | None = None
        self.batch_size = batch_size
        self.loader: Iterable[Any] = ()
        # What a rank without data contributes: a batch without rows, in the shape of the others' once that is known.
        self.nothing = Batch(torch.empty(0, 1)) if distributed.active() else None
        if isinstance(data, Dataset):
            data = DataLoader(data, batch_size=batch_size or 4096)
        batches = isinstance(data, (list, tuple)) and len(data) > 0 and all(isinstance(b, Batch) for b in data)
        if (
            batches
            or isinstance(data, DataLoader)
            or (not isinstance(data, (Tensor, Batch, list, tuple)) and not hasattr(data, "__array__"))
        ):
            self._open(data, weight, u)
            return
        self.whole = _settled(model.batch(data, weight=weight, u=u, allow_empty=distributed.active()), model.device)
        if batch_size is not None and batch_size > len(self.whole) > 0:
            raise invalid("batch_size", f"at most {len(self.whole)} (the observations)", batch_size, "leave it out")

    def _open(self, loader: Any, weight: Any, u: Any) -> None:
        if not isinstance(loader, Iterable):
            raise wrong_type("data", "a tensor, array, Batch, path, Dataset or DataLoader", loader, "convert it")
        if isinstance(loader, Iterator):
            raise wrong_type(
                "data", "something to pass over repeatedly", loader, "pass a DataLoader or a list of batches"
            )
        if weight is not None or u is not None:
            raise invalid(
                "weights, inputs", "nothing beside a loader", "a tensor",
                "let the loader yield Batch objects that carry weight and u",
            )  # fmt: skip
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Hashable, Batch]]:
        if self.whole is None:
            key = -1
            for key, item in enumerate(self.loader):
                yield key, self._read(item)
            if key < 0 and self.nothing is not None:
                yield 0, self.nothing
        else:
            yield from enumerate(self.whole.split(self.batch_size or max(1, len(self.whole))))

    def _read(self, item: Any) -> Batch:
        if isinstance(item, (list, tuple)):
            # A TensorDataset yields tuples: observations, then (by convention) their weights.
            if len(item) not in (1, 2) or not all(isinstance(part, Tensor) for part in item):
                raise invalid(
                    "data", "batches of x or (x, weight)", f"{len(item)} parts", "yield Batch objects instead"
                )
            return self.model.batch(*item[:1], weight=item[1] if len(item) == 2 else None)
        return self.model.batch(item)

    def survey(self, limit: int, generator: torch.Generator) -> "Survey":
        """One pass: moments of the columns and a random sample of at most ``limit`` rows, over all ranks."""
        try:
            moments, rows, sample = self._local_survey(limit, generator)
        except Exception as error:
            distributed.agree(error)
            raise
        distributed.agree()
        if distributed.active():
            parts = distributed.gather((moments, rows, sample.map(Tensor.cpu)))
            rows = sum(part[1] for part in parts)
            moments = Moments.merged([part[0] for part in parts])
            share = [p[2][: max(1, limit * len(p[2]) // max(1, sum(len(q[2]) for q in parts)))] for p in parts]
            sample = concatenate([p for p in share if len(p)] or share[:1])
            self.nothing = sample[:0]
        if rows == 0:
            raise invalid("data", "at least one observation", "none on any process", "check the shards")
        return Survey(moments, sample.to(self.model.device), rows)

    def _local_survey(self, limit: int, generator: torch.Generator) -> tuple["Moments", int, Batch]:
        moments = Moments()
        pool: list[tuple[Tensor, Batch]] = []
        rows = 0
        for batch in [self.whole] if self.whole is not None else (batch for _, batch in self):
            for piece in batch.split(_SURVEY):
                moments.add(piece)
            pool.append(_draw(batch, limit, generator))
            rows += len(batch)
            if self.whole is None:
                pool = [_best(pool, limit)]
        if not pool:
            raise invalid("data", "at least one batch", "an empty loader", "check the sampler")
        return moments, rows, _best(pool, limit)[1]


@dataclass
class Survey:
    """What one pass tells: moments, a sample of rows, and how many rows there are."""

    moments: "Moments"
    sample: Batch
    rows: int


class Moments:
    """Weighted mean and variance of each column, merged stably.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque (1983).
    """

    def __init__(self) -> None:
        self.weight: Tensor = torch.zeros((), dtype=torch.float64)
        self._mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.scatter: Tensor = torch.zeros((), dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of each column."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Weighted variance of each column."""
        return self.scatter / self.weight.clamp(min=torch.finfo(torch.float64).tiny)

    def add(self, batch: Batch) -> None:
        """Take in a piece of data; missing entries count as the mean."""
        x = batch.x.detach().to(torch.float64).flatten(0, -2)
        if not len(x):
            return
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device) if batch.weight is None else batch.weight
        total = weight.sum()
        if float(total) == 0:
            return
        if bool(x.isnan().any()):
            x = torch.where(x.isnan(), x.nanmean(0), x)
        mean = (weight @ x) / total
        self._merge(total, mean, weight @ (x - mean).square())

    def _merge(self, weight: Tensor, mean: Tensor, scatter: Tensor) -> None:
        weight, mean, scatter = (t.to("cpu") for t in (weight, mean, scatter))
        total = self.weight + weight
        gap = mean - self._mean
        self.scatter = self.scatter + scatter + gap.square() * (self.weight * weight / total)
        self._mean = self._mean + gap * (weight / total)
        self.weight = total

    @classmethod
    def merged(cls, parts: list["Moments"]) -> "Moments":
        """The moments of several shards together."""
        out = cls()
        for part in parts:
            if float(part.weight) > 0:
                out._merge(part.weight, part.mean, part.scatter)
        return out


def _settled(batch: Batch, device: torch.device) -> Batch:
    """The batch on the accelerator if it fits into half of what is free; else it stays and is streamed.

    Only where the data live depends on free memory, never how they are cut up: results do not.
    """
    if device.type != "cuda" or batch.x.device == device:
        return batch
    size = sum(value.numel() * value.element_size() for value in batch.values() if value is not None)
    return batch.to(device) if size <= torch.cuda.mem_get_info(device)[0] // 2 else batch


def _draw(batch: Batch, limit: int, generator: torch.Generator) -> tuple[Tensor, Batch]:
    """Random priorities and the rows of the ``limit`` highest, in their order; all rows when they are few."""
    size = len(batch)
    priority = torch.rand(size, generator=generator, dtype=torch.float64)
    if size > limit:
        index = priority.topk(limit).indices.sort().values
        return priority[index], batch[index.to(batch.x.device)]
    return priority, batch


def _best(pool: list[tuple[Tensor, Batch]], limit: int) -> tuple[Tensor, Batch]:
    if len(pool) == 1:
        return pool[0]
    priority = torch.cat([p for p, _ in pool])
    batch = concatenate([b for _, b in pool])
    index = priority.topk(min(limit, len(priority))).indices.sort().values
    return priority[index], batch[index.to(batch.x.device)]
