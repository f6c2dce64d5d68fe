"""Where batches come from: tensors, data loaders, files; and what a fit must know of them before it starts."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset, default_collate

from torchem import distributed
from torchem.batch import Batch, concatenate
from torchem.errors import invalid, wrong_type
from torchem.model import LatentModel
from torchem.sequences import as_buckets, numbered

#: Rows read at a time where only moments are taken.
_SURVEY = 1 << 13
#: Frames, padding included, of the sequences by which restarts are compared.
_GLANCE = 1 << 13
#: Frames, padding included, of the sequences that a start looks at where it looks at whole ones; at least so many.
_FRAMES = 1 << 16
#: Rows, or sequences, that a data set gives at a time.
_ROWS, _SEQUENCES = 4096, 256


class Source:
    """Passes over data as ``(key, batch)`` pairs. Keys name the parts of a fixed partition.

    Args:
        model: Validates each batch.
        data: A tensor, array, nested list, `Batch`, path, ``Dataset``, ``DataLoader`` or another iterable that can be
            passed over repeatedly and yields batches. For a model of sequences all forms that
            `torchem.sequences.as_sequences` reads; loaders then yield ``[B, T, D]``, ``(x, lengths)``, lists of
            sequences or `Batch` objects.
        batch_size: Rows, or sequences, per batch; None for the whole at once (in memory) or 4096 rows or 256 sequences
            (data sets).
        weight: Weight of each row or sequence, where data are held in memory.
        u: Covariates, likewise, laid out as the data.
        lengths: Frames of each sequence, likewise.
        labels: What is known of the latent states, likewise, laid out as the data.
        observed: False where an entry is missing, likewise, in the shape of the data.
        offset: Known terms of linear predictors, likewise.
        trials: Numbers of trials, likewise.
    """

    def __init__(
        self,
        model: LatentModel,
        data: Any,
        batch_size: int | None = None,
        weight: Any = None,
        u: Any = None,
        lengths: Any = None,
        labels: Any = None,
        observed: Any = None,
        offset: Any = None,
        trials: Any = None,
    ):
        if batch_size is not None and (
            not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1
        ):
            raise invalid(
                "batch_size", "a positive whole number", repr(batch_size), "give the rows of a batch, or None"
            )
        self.model = model
        self.sequential = bool(getattr(model, "sequential", False))
        self.batch_size = batch_size
        self.loader: Iterable[Any] = ()
        #: Batches of a pass, the most that any process has; known after the survey.
        self.batches = 0
        #: Data in memory: whole, or in buckets of sequences of similar length; None where a loader gives them.
        self.held: list[Batch] | None = None
        self._pieces: list[Batch] = []
        self._numbers: Tensor | None = None
        # What a rank without data contributes: a batch without rows, in the shape of the others' once that is known.
        empty = torch.empty(0, 1, 1) if self.sequential else torch.empty(0, 1)
        self.nothing = Batch(empty) if distributed.active() else None
        fields = {"weight": weight, "u": u, "lengths": lengths, "labels": labels, "observed": observed}
        fields |= {"offset": offset, "trials": trials}
        fields = {name: value for name, value in fields.items() if value is not None}
        if lengths is not None and not self.sequential:
            raise invalid("lengths", "none: the model reads single observations", "some", "leave them out")
        if isinstance(data, (str, Path)):
            from torchem.tables import read_table

            data = read_table(data).values
        if isinstance(data, Dataset):
            collate = _collate if self.sequential else None
            data = DataLoader(data, batch_size or (_SEQUENCES if self.sequential else _ROWS), collate_fn=collate)
        if self._is_loader(data):
            self._open(data, fields)
        else:
            self._hold(data, fields)

    @property
    def shuffled(self) -> bool:
        """Whether a pass draws batches in an order of its own."""
        sampler = getattr(self.loader, "sampler", None)
        return self.held is None and sampler is not None and not isinstance(sampler, SequentialSampler)

    def _is_loader(self, data: Any) -> bool:
        if isinstance(data, (list, tuple)):
            # A rank without data may have a list without sequences.
            return all(isinstance(item, Batch) for item in data) and (len(data) > 0 or self.nothing is not None)
        return isinstance(data, DataLoader) or not (isinstance(data, (Tensor, Batch)) or hasattr(data, "__array__"))

    def _open(self, loader: Any, fields: dict[str, Any]) -> None:
        if not isinstance(loader, Iterable):
            raise wrong_type("data", "a tensor, array, Batch, path, Dataset or DataLoader", loader, "convert it")
        if isinstance(loader, Iterator):
            raise wrong_type(
                "data", "something to pass over repeatedly", loader, "pass a DataLoader or a list of batches"
            )
        if fields and not (isinstance(loader, (list, tuple)) and not loader):
            raise invalid(
                "weights, inputs, lengths, labels, observed, offset, trials", "nothing beside a loader",
                ", ".join(fields),
                "let the loader yield Batch objects that carry weight and u",
            )  # fmt: skip
        rows = getattr(loader, "dataset", None)
        if self.sequential and isinstance(rows, TensorDataset) and rows.tensors[0].dim() < 3:
            # Batches of single frames, perhaps shuffled, would pass as sequences.
            raise invalid(
                "data", "a data set of sequences [N, T, D]", f"shape {list(rows.tensors[0].shape)}",
                "pass the tensor itself, with lengths if it holds several sequences",
            )  # fmt: skip
        self.loader = loader

    def _hold(self, data: Any, fields: dict[str, Any]) -> None:
        fields["allow_empty"] = distributed.active()
        if self.sequential:
            fields |= {
                "allow_missing": self.model.handles_missing,
                "n_states": self.model.labelled if fields.get("labels") is None else self.model.takes_labels(),
                "whole": self.model.whole,
            }
            found = [(number, self._checked(number, batch)) for number, batch in as_buckets(data, **fields)]
        else:
            found = [(None, self.model.batch(data, **fields))]
        numbers = [number for number, _ in found if number is not None]
        self._numbers = torch.cat(numbers) if numbers else None
        self.held = _settled([batch for _, batch in found], self.model.device)
        size = sum(map(len, self.held))
        if self.batch_size is not None and self.batch_size > size > 0:
            raise invalid("batch_size", f"at most {size} (the observations)", self.batch_size, "leave it out")
        whole = self.batch_size or max(1, size)
        self._pieces = [_trimmed(piece) for batch in self.held for piece in batch.split(whole)]

    def _checked(self, numbers: Tensor | None, batch: Batch) -> Batch:
        self.model.refuse_unread(batch)
        with numbered(numbers):
            return self.model.check(batch)

    def original(self, position: int) -> int:
        """Number, in the user's data, of the row or sequence that a pass comes to at ``position``."""
        return position if self._numbers is None else int(self._numbers[position])

    def __iter__(self) -> Iterator[tuple[Hashable, Batch]]:
        key = -1
        for key, batch in enumerate(map(self._read, self.loader) if self.held is None else self._pieces):
            yield key, batch
        if key < 0 and self.nothing is not None:
            yield 0, self.nothing

    def _read(self, item: Any) -> Batch:
        if self.sequential and not isinstance(item, Batch):
            return self._read_sequences(item)
        if isinstance(item, (list, tuple)):
            # A TensorDataset yields tuples: observations, then (by convention) their weights.
            if len(item) not in (1, 2) or not all(isinstance(part, Tensor) for part in item):
                raise invalid(
                    "data", "batches of x or (x, weight)", f"{len(item)} parts", "yield Batch objects instead"
                )
            return self.model.batch(*item[:1], weight=item[1] if len(item) == 2 else None)
        return self.model.batch(item)

    def _read_sequences(self, item: Any) -> Batch:
        parts = list(item) if isinstance(item, (list, tuple)) else [item]
        if parts and getattr(parts[0], "ndim", 0) == 3:
            if len(parts) > 2:
                raise invalid(
                    "data", "batches of x or (x, lengths)", f"{len(parts)} parts", "yield Batch objects instead"
                )
            return self.model.batch(parts[0], lengths=parts[1] if len(parts) == 2 else None)
        if parts[0] is item:
            shape = getattr(item, "shape", None)
            got = type(item).__name__ if shape is None else f"shape {list(shape)}"
            remedy = "yield a list of sequences [T, D], or Batch objects"
            raise invalid("data", "batches of sequences [B, T, D] from a loader", got, remedy)
        return self.model.batch(parts)

    # ---- the survey -------------------------------------------------------------------------------------------

    def survey(self, limit: int, generator: torch.Generator) -> "Survey":
        """One pass: moments of the columns and a random sample of at most ``limit`` rows, over all ranks.

        Rows are what the emissions of a model see: observations, or the frames of sequences.
        """
        try:
            moments, rows, weight, sample, glance = self._local_survey(limit, generator)
        except Exception as error:
            distributed.agree(error)
            raise
        distributed.agree()
        self.batches = max(distributed.gather(self.batches))
        if distributed.active():
            mine = (moments, rows, sample.map(Tensor.cpu), None if glance is None else glance.map(Tensor.cpu))
            parts = distributed.gather(mine)
            rows = sum(part[1] for part in parts)
            moments = Moments.merged([part[0] for part in parts])
            share = [p[2][: max(1, limit * len(p[2]) // max(1, sum(len(q[2]) for q in parts)))] for p in parts]
            sample = concatenate([p for p in share if len(p)] or share[:1])
            glance = next((part[3] for part in parts if part[3] is not None), None)
            self.nothing = sample[:0] if glance is None else glance[:0].with_frames(1)
        if rows == 0:
            raise invalid("data", "at least one observation", "none on any process", "check the shards")
        sample = sample.to(self.model.device)
        return Survey(moments, sample, rows, weight, sample if glance is None else glance.to(self.model.device))

    def _local_survey(
        self, limit: int, generator: torch.Generator
    ) -> tuple["Moments", int, float, Batch, Batch | None]:
        moments = Moments()
        pool: list[tuple[Tensor, Batch]] = []
        glance = _Glance()
        count, weight, self.batches = 0, 0.0, len(self._pieces)
        for batch in self.held or (batch for _, batch in self):
            weight += float(self.model.count(batch))
            self.batches += self.held is None
            if self.sequential:
                glance.add(batch)
            if self.model.whole:
                some = min(limit, max(_SEQUENCES, _FRAMES // batch.x.shape[1]))
                pool.append(_draw(batch, some, generator))
                if sum(len(priority) for priority, _ in pool) > 2 * some:
                    pool = [_best(pool, some)]
            for rows in self._rows(batch):
                # Nothing here may be as long as the data, which may be a file.
                for piece in rows.split(_SURVEY):
                    moments.add(piece)
                    if self.model.whole:
                        continue
                    pool.append(_draw(piece, limit, generator))
                    if sum(len(priority) for priority, _ in pool) > 2 * limit:
                        pool = [_best(pool, limit)]
                count += len(rows)
        if not pool:
            raise invalid("data", "at least one batch", "an empty loader", "check the sampler")
        return moments, count, weight, _best(pool, limit)[1], glance.batch

    def _rows(self, batch: Batch) -> Iterator[Batch]:
        """A batch as the emissions see it, a few sequences at a time."""
        if not self.sequential:
            yield batch
        elif len(batch) == 0:
            yield batch.rows()
        else:
            yield from map(self.model.rows, batch.split(max(1, _SURVEY // batch.x.shape[1])))


def _collate(items: list[Any]) -> Any:
    """Sequences of different length as a list; pairs of a padded one and its length as torch does it."""
    return items if hasattr(items[0], "ndim") else default_collate(items)


@dataclass
class Survey:
    """What one pass tells.

    Attributes:
        moments: Mean and variance of the columns.
        sample: Some rows, at random: observations, or frames of sequences.
        rows: How many there are.
        weight: Weight of the observations of this process.
        glance: A small batch as the model reads it: the sample, or the first sequences, cut where they are long.
    """

    moments: "Moments"
    sample: Batch
    rows: int
    weight: float
    glance: Batch


class _Glance:
    """The first sequences of a pass, as many as fit `_GLANCE` frames when padded together; the first one is cut."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.full = False

    def add(self, batch: Batch) -> None:
        """Take in the next sequences."""
        if self.full or len(batch) == 0:
            return
        lengths = batch.frames() if self.batch is None else torch.cat([self.batch.frames(), batch.frames()])
        size = lengths.cummax(0).values * torch.arange(1, len(lengths) + 1, device=lengths.device)
        had = 0 if self.batch is None else len(self.batch)
        take = max(int((size <= _GLANCE).sum()), 1) - had
        self.full = take < len(batch)
        if take > 0:
            new = batch[:take]
            new = new.with_frames(min(int(new.frames().max()), _GLANCE))
            self.batch = new if self.batch is None else concatenate([self.batch, new])


class Moments:
    """Weighted mean and variance of each column, of the entries that are not missing, merged stably.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque (1983).
    """

    #: The moments of the covariates, where there are some.
    inputs: "Moments | None" = None

    def __init__(self) -> None:
        #: ``[D]`` weight of the entries seen in each column.
        self.weight: Tensor = torch.zeros((), dtype=torch.float64)
        self._mean: Tensor = torch.zeros((), dtype=torch.float64)
        self.scatter: Tensor = torch.zeros((), dtype=torch.float64)
        #: ``[D]`` least and greatest entry of each column, of rows that have a weight.
        self.low: Tensor = torch.full((), torch.inf, dtype=torch.float64)
        self.high: Tensor = torch.full((), -torch.inf, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """Weighted mean of each column; zero where nothing was seen."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Weighted variance of each column; zero where nothing was seen."""
        return self.scatter / self.weight.clamp(min=_TINY)

    def add(self, batch: Batch) -> None:
        """Take in a piece of data, rows ``[n, D]``."""
        if batch.u is not None:
            self.inputs = self.inputs or Moments()
            self.inputs.add(Batch(batch.u, weight=batch.weight))
        x = batch.x.detach().to(torch.float64)
        if not len(x):
            return
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device) if batch.weight is None else batch.weight
        total = weight.sum().expand(x.shape[1])
        missing = x.isnan()
        some = bool(missing.any())
        if some:
            total = weight @ (~missing).to(torch.float64)
            x = x.masked_fill(missing, 0.0)
        mean = (weight @ x) / total.clamp(min=_TINY)
        gap = x - mean
        absent = missing if batch.weight is None else missing | (weight <= 0).unsqueeze(-1)
        hidden = some or batch.weight is not None
        low, high = ((x.masked_fill(absent, end) if hidden else x) for end in (torch.inf, -torch.inf))
        scatter = weight @ (gap.masked_fill(missing, 0.0) if some else gap).square()
        self._merge(total, mean, scatter, low.amin(0), high.amax(0))

    def _merge(self, weight: Tensor, mean: Tensor, scatter: Tensor, low: Tensor, high: Tensor) -> None:
        weight, mean, scatter, low, high = (t.to("cpu") for t in (weight, mean, scatter, low, high))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        total = self.weight + weight
        share = weight / total.clamp(min=_TINY)
        gap = mean - self._mean
        self.scatter = self.scatter + scatter + gap.square() * (self.weight * share)
        self._mean = self._mean + gap * share
        self.weight = total

    @classmethod
    def merged(cls, parts: list["Moments"]) -> "Moments":
        """The moments of several shards together."""
        out = cls()
        for part in parts:
            if part.weight.dim():
                out._merge(part.weight, part.mean, part.scatter, part.low, part.high)
        inputs = [part.inputs for part in parts if part.inputs is not None]
        out.inputs = cls.merged(inputs) if inputs else None
        return out


_TINY = torch.finfo(torch.float64).tiny


def _settled(batches: list[Batch], device: torch.device) -> list[Batch]:
    """Data on the accelerator if they fit into half of what is free; else they stay and are streamed.

    Only where the data live depends on free memory, never how they are cut up: results do not.
    """
    if device.type != "cuda" or all(batch.x.device == device for batch in batches):
        return batches
    present = [value for batch in batches for value in batch.values() if value is not None]
    size = sum(value.numel() * value.element_size() for value in present)
    fits = size <= torch.cuda.mem_get_info(device)[0] // 2
    return [batch.to(device) for batch in batches] if fits else batches


def _trimmed(batch: Batch) -> Batch:
    """A batch without the frames that are padding in each of its sequences."""
    if batch.lengths is None or not len(batch):
        return batch
    return batch.with_frames(int(batch.lengths.max()))


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
