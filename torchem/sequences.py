"""Where sequences enter: padded, concatenated or a list, validated once and brought into one form, ``[N, T, D]``."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchem.batch import (
    FRAMED,
    Batch,
    as_tensor,
    check_rows,
    check_weight,
    complete_frames,
    evidence_from_labels,
    full_lengths,
    given_or,
    masked,
    padding_index,
    silenced,
    values_known,
)
from torchem.errors import InvalidEntry, invalid

#: Bytes of padding that nobody minds.
_PADDING = 8 << 20


def as_sequences(
    data: Any,
    *,
    lengths: Any = None,
    weight: Any = None,
    u: Any = None,
    evidence: Any = None,
    labels: Any = None,
    observed: Any = None,
    n_states: int | tuple[int, ...] | None = None,
    offset: Any = None,
    trials: Any = None,
    allow_missing: bool = False,
    allow_empty: bool = False,
    whole: bool = False,
) -> Batch:
    """Build a validated `Batch` of N sequences, ``x [N, T, D]``, from any of the forms in which sequences come.

    - ``[T, D]`` or ``[T]``: one sequence.
    - ``[F, D]`` or ``[F]`` with ``lengths``: sequences one after the other; the lengths add up to F.
    - ``[N, T, D]``: N sequences, padded where ``lengths`` says so; what stands in the padding never matters.
    - A list or tuple of ``[T_i, D]`` or ``[T_i]``: N sequences, as tensors, arrays or nested lists.
    - A `Batch`: x in one of the array forms, its other fields laid out alike.

    Vectors are sequences of one feature. A list whose elements are tensors or arrays is a list of sequences. Nested
    lists of numbers are the array that they make: ``[[1, 2], [3, 4]]`` is one sequence of two frames of two features,
    ``[[[1], [2]], [[3], [4]]]`` are two sequences; where they make none, as ``[[1, 2, 3], [4, 5]]``, they are a list of
    sequences.

    A frame that is NaN in all columns is missing; any model of sequences can do without it. Padding repeats a frame of
    its own sequence (the first that is complete), so it is valid data for any family.

    Args:
        data: See above.
        lengths: ``[N]`` frames of each sequence.
        weight: ``[N]`` non-negative weight of each sequence.
        u: Covariates in the layout of the data: with M columns, or without that axis for one.
        evidence: Log-potentials on the states in the layout of the data, with K columns.
        labels: What is known of the states, in the layout of the data, see `torchem.batch.evidence_from_labels`; adds
            to ``evidence``.
        observed: In the layout of the data, False where an entry is missing.
        n_states: K, for labels that are numbers.
        offset: Known terms of linear predictors in the layout of the data, without the axis of columns.
        trials: Numbers of trials, likewise.
        allow_missing: Whether single entries may be NaN too, not only whole frames.
        allow_empty: Whether there may be no sequences.
        whole: Whether labels are of sequences, ``[N]`` or ``[N, K]``, rather than of frames. What they say then stands
            at the first frame of each.

    Returns:
        A batch whose ``lengths`` are None where every sequence fills T.

    Raises:
        InvalidArgument: For a wrong shape, sequences without frames or of different columns, lengths that do not fit,
            ±inf, NaN that is not allowed, weights or labels out of range.
        InvalidType: For data that are not real numbers.

    Example:
        >>> batch = as_sequences([[1.0, 2.0, 3.0], [4.0, 5.0]])
        >>> batch.x.shape, batch.lengths
        (torch.Size([2, 3, 1]), tensor([3, 2]))
    """
    return _read(
        data, lengths=lengths, weight=weight, u=u, evidence=evidence, labels=labels, observed=observed,
        n_states=n_states, offset=offset, trials=trials, allow_missing=allow_missing, allow_empty=allow_empty,
        whole=whole,
    ).padded()  # fmt: skip


def as_buckets(data: Any, **fields: Any) -> list[tuple[Tensor | None, Batch]]:
    """As `as_sequences`, but where padding to one length would waste memory, in batches of sequences of similar length.

    One sequence of a million frames and a thousand of ten would take 10⁹ frames padded together; in batches whose
    sequences are more than half as long as the longest of them they never take more than twice the frames there are.

    Returns:
        Numbers of the sequences in each batch, None where one batch holds all, and the batch; long sequences first.

    Example:
        >>> [(numbers, batch.x.shape) for numbers, batch in as_buckets([[1.0, 2.0], [3.0]])]
        [(None, torch.Size([2, 2, 1]))]
    """
    frames = _read(data, **fields)
    return [(numbers, frames.padded(numbers)) for numbers in frames.groups()]


@contextmanager
def numbered(numbers: Tensor | None) -> Iterator[None]:
    """Where checks name a sequence of one of several batches: the number that it has in all data.

    Args:
        numbers: Those of the sequences of the batch; None where it holds all in their order.
    """
    try:
        yield
    except InvalidEntry as error:
        if numbers is None or "sequence" not in error.index:
            raise
        raise error.moved(sequence=int(numbers[error.index["sequence"]])) from error


# ---- frames before padding ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frames:
    """Sequences as rows, one frame each.

    Args:
        rows: ``x [F, D]`` and what else runs along the frames; of padded data, padding too.
        lengths: ``[N]`` frames of each sequence; None where all fill T.
        starts: ``[N]`` row at which each sequence starts.
        frames: T.
        weight: ``[N]`` of each sequence.
    """

    rows: Batch
    lengths: Tensor | None
    starts: Tensor
    frames: int
    weight: Tensor | None = None

    def padded(self, numbers: Tensor | None = None) -> Batch:
        """Some of the sequences, or all, padded to the longest of them."""
        size = len(self.starts)
        if numbers is None and len(self.rows) == size * self.frames:
            batch = self.rows.map(lambda value: value.reshape(size, self.frames, *value.shape[1:]))
            return self._finished(replace(batch, lengths=self.lengths, weight=self.weight))
        assert self.lengths is not None
        pick = slice(None) if numbers is None else numbers
        lengths, starts = self.lengths[pick], self.starts[pick].unsqueeze(-1)
        frames = int(lengths.max())
        place = starts + torch.arange(frames, device=starts.device).minimum(lengths.unsqueeze(-1) - 1)
        complete = complete_frames(self.rows.x)
        take = starts + padding_index(None if complete is None else complete[place], lengths, frames)
        batch = self.rows.map(lambda value: value[take])
        weight = None if self.weight is None else self.weight[pick]
        return self._finished(replace(batch, lengths=full_lengths(lengths, frames), weight=weight))

    @staticmethod
    def _finished(batch: Batch) -> Batch:
        mask = batch.frames_mask()
        if batch.evidence is None or mask is None:
            return batch
        return replace(batch, evidence=silenced(batch.evidence, mask))

    def groups(self) -> list[Tensor | None]:
        """Numbers of the sequences to pad together, long ones first; one None where all may be."""
        if self.lengths is None:
            return [None]
        real, most = int(self.lengths.sum()), int(self.lengths.max())
        padding = len(self.lengths) * most - real
        if padding <= real or padding * _bytes_per_row(self.rows) <= _PADDING:
            return [None]
        halvings = (most / self.lengths.to(torch.float64)).log2().floor()
        return [(halvings == halving).nonzero()[:, 0] for halving in halvings.unique()]


def _bytes_per_row(rows: Batch) -> int:
    present = [value for value in rows.values() if value is not None]
    return sum(value.numel() * value.element_size() for value in present) // max(1, len(rows))


def _read(
    data: Any,
    *,
    lengths: Any = None,
    weight: Any = None,
    u: Any = None,
    evidence: Any = None,
    labels: Any = None,
    observed: Any = None,
    n_states: int | tuple[int, ...] | None = None,
    offset: Any = None,
    trials: Any = None,
    allow_missing: bool = False,
    allow_empty: bool = False,
    whole: bool = False,
) -> _Frames:
    known = data if isinstance(data, Batch) else None
    x = data if known is None else known.x
    x = x if observed is None else _masked(x, observed)
    layout = _layout(x, lengths if known is None else _or(lengths, known.lengths))
    if not len(layout.starts) and not allow_empty:
        raise invalid("data", "at least one sequence of at least one frame", "none", "check the filter that made it")
    along = {"u": u, "evidence": evidence, "offset": offset, "trials": trials}
    rows = {
        name: layout.lay(_or(along.get(name), getattr(known, name, None)), "inputs" if name == "u" else name)
        for name in FRAMED
        if name != "x"
    }
    batch = check_rows(
        Batch(layout.x, **rows), labels=None if whole else layout.lay(labels, "labels"), n_states=n_states,
        place=layout.place, allow_missing=allow_missing, allow_missing_rows=True,
    )  # fmt: skip
    if whole and labels is not None:
        batch = _labelled(batch, labels, n_states, layout.starts)
    weights = given_or(weight, None if known is None else known.weight, "weights", batch.x.device)
    weights = check_weight(weights, len(layout.starts), "sequence")
    return _Frames(batch, layout.lengths, layout.starts, layout.frames, weights)


def _labelled(batch: Batch, labels: Any, n_states: int | tuple[int, ...] | None, starts: Tensor) -> Batch:
    """Rows with what labels say of the sequences that start at some of them."""
    known = evidence_from_labels(labels, n_states, (len(starts),), place=lambda n: f"sequence {n}").to(batch.x.device)
    before = batch.evidence
    if before is None:
        before = known.new_zeros(len(batch), known.shape[-1])
    return replace(batch, evidence=before.to(known).index_add(0, starts, known))


def _masked(data: Any, observed: Any) -> Any:
    """The data, one array or a list of sequences, with NaN where ``observed`` is False."""
    items = _listed(data)
    if items is None:
        return masked(as_tensor(data, "data"), observed)
    counts = [len(item) for item in items]
    masks = _parts(observed, "observed", counts)
    return [
        masked(as_tensor(item, f"data[{i}]"), mask) for i, (item, mask) in enumerate(zip(items, masks, strict=True))
    ]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# ---- layouts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the frames of each sequence lie in what was given; every other field must lie alike.

    Args:
        x: ``[F, D]`` rows.
        axes: Leading axes of a field that is one array.
        lengths: ``[N]``; None where every sequence fills T.
        starts: ``[N]`` first row of each sequence.
        frames: T.
        counts: Frames of each sequence, where they came as a list.
        source: ``[F]``: the row whose value each row of padded data takes.
    """

    x: Tensor
    axes: tuple[int, ...]
    lengths: Tensor | None
    starts: Tensor
    frames: int
    counts: list[int] | None = None
    source: Tensor | None = None

    def lay(self, value: Any, argument: str) -> Tensor | None:
        """A field as rows, one for each of ``x``."""
        if value is None:
            return None
        if self.counts is not None:
            return _join(_parts(value, argument, self.counts), self.x.device)
        tensor = as_tensor(value, argument).to(self.x.device)
        if tensor.shape[: len(self.axes)] != self.axes:
            axes = ", ".join(map(str, self.axes))
            raise invalid(argument, f"shape [{axes}, …], laid out as the data", f"{list(tensor.shape)}", "reshape it")
        rows = tensor.flatten(0, len(self.axes) - 1)
        if self.source is None:
            return rows
        if argument == "evidence" and rows.dim() == 2:
            return silenced(rows, self.source == torch.arange(len(rows), device=rows.device))
        return _filled(rows, self.source)

    def place(self, row: int) -> str:
        """Where a row lies, in the words of messages."""
        if len(self.axes) > 1 or self.lengths is None:
            sequence, frame = divmod(row, self.frames)
        else:
            starts = self.starts.tolist()
            sequence = bisect_right(starts, row) - 1
            frame = row - starts[sequence]
        return f"sequence {sequence}, frame {frame}"


def _filled(rows: Tensor, source: Tensor) -> Tensor:
    """Rows of padded data with the padding replaced; as they are where it is right already."""
    if values_known():
        padding = source != torch.arange(len(rows), device=rows.device)
        if torch.equal(rows[padding], rows[source[padding]]):
            return rows
    return rows[source]


def _layout(data: Any, lengths: Any) -> _Layout:
    items = _listed(data)
    if items is not None:
        if lengths is not None:
            raise invalid("lengths", "none beside a list of sequences", "some", "leave them out: the list has its own")
        return _of_list(items)
    x = as_tensor(data, "data")
    if x.dim() not in (1, 2, 3):
        raise invalid(
            "data", "sequences [T, D] or [N, T, D], or a list of them", f"shape {list(x.shape)}", "reshape it"
        )
    return _of_padded(x, lengths) if x.dim() == 3 else _of_rows(x, lengths)


def _of_rows(x: Tensor, lengths: Any) -> _Layout:
    """One sequence, or several one after the other."""
    size = len(x)
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if lengths is None:
        counts = [size] if size else []
    else:
        counts = _checked_lengths(lengths).tolist()
        if sum(counts) != size:
            got = f"{sum(counts)} in all"
            raise invalid("lengths", f"numbers that add up to {size}, the rows of the data", got, "correct them")
    return _one_after_the_other(x, counts)


def _one_after_the_other(x: Tensor, counts: list[int], listed: bool = False) -> _Layout:
    lengths = torch.tensor(counts, dtype=torch.int64, device=x.device)
    starts = lengths.cumsum(0) - lengths
    frames = max(counts, default=1)
    ragged = any(count != frames for count in counts)
    return _Layout(x, (len(x),), lengths if ragged else None, starts, frames, counts if listed else None)


def _of_padded(x: Tensor, lengths: Any) -> _Layout:
    size, frames = x.shape[:2]
    if frames == 0:
        raise invalid("data", "sequences of at least one frame", f"shape {list(x.shape)}", "drop empty sequences")
    starts = torch.arange(size, device=x.device) * frames
    rows, axes = x.flatten(0, 1), (size, frames)
    if lengths is not None:
        lengths = full_lengths(_checked_lengths(lengths, size, frames).to(x.device), frames)
    if lengths is None:
        return _Layout(rows, axes, None, starts, frames)
    source = (starts.unsqueeze(-1) + padding_index(complete_frames(x), lengths, frames)).flatten()
    return _Layout(_filled(rows, source), axes, lengths, starts, frames, source=source)


def _checked_lengths(lengths: Any, size: int | None = None, most: int | None = None) -> Tensor:
    """Lengths as ``[N]`` whole numbers from 1 to ``most``; any N, and no limit, where that is None."""
    value = as_tensor(lengths, "lengths").detach()
    if value.dim() != 1:
        raise invalid("lengths", "one number per sequence, [N]", f"shape {list(value.shape)}", "give a list of numbers")
    if size is not None and len(value) != size:
        raise invalid("lengths", f"one number for each of {size} sequences", len(value), "correct them")
    if values_known():
        limit = "at least 1" if most is None else f"1 to {most}, the frames of the padded data"
        bad = ~((value >= 1) & (value <= (torch.inf if most is None else most)) & (value % 1 == 0))
        if value.dtype == torch.bool or bool(bad.any()):
            first = 0 if value.dtype == torch.bool else int(bad.nonzero()[0])
            got = f"{value[first].item()} at sequence {first}"
            raise invalid("lengths", f"whole numbers, {limit}", got, "correct it, or drop a sequence without frames")
    return value.to(torch.int64)


# ---- lists --------------------------------------------------------------------------------------------------------


def _listed(data: Any) -> list[Any] | None:
    """The sequences, where the data are a list of them; None where they are one array."""
    if not isinstance(data, (list, tuple)) or not data:
        return None
    items = list(data)
    if any(_is_array(item) for item in items):
        return items
    if not all(isinstance(item, (list, tuple)) for item in items):
        return None
    deeper = any(isinstance(part, (list, tuple)) or _is_array(part) for item in items for part in item[:1])
    return items if deeper or len({len(item) for item in items}) > 1 else None


def _is_array(item: Any) -> bool:
    return getattr(item, "ndim", 0) > 0


def _of_list(items: list[Any]) -> _Layout:
    parts = [_sequence(item, i) for i, item in enumerate(items)]
    columns = parts[0].shape[1]
    for i, part in enumerate(parts):
        if len(part) == 0:
            raise invalid("data", "at least one frame in each sequence", f"none in sequence {i}", "leave it out")
        if part.shape[1] != columns:
            got = f"{part.shape[1]} in sequence {i}"
            raise invalid("data", f"{columns} columns in each sequence, as in the first", got, "give all the same")
    x = _join(parts, parts[0].device)
    return _one_after_the_other(x, [len(part) for part in parts], listed=True)


def _sequence(item: Any, number: int) -> Tensor:
    x = as_tensor(item, f"data[{number}]")
    if x.dim() not in (1, 2):
        raise invalid(f"data[{number}]", "a sequence [T, D] or [T]", f"shape {list(x.shape)}", "reshape it")
    return x.unsqueeze(-1) if x.dim() == 1 else x


def _parts(value: Any, argument: str, counts: list[int]) -> list[Tensor]:
    """A field beside a list of sequences: a list of as many, each as long as its sequence."""
    if not isinstance(value, (list, tuple)) or len(value) != len(counts):
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
        raise invalid(argument, f"a list of {len(counts)}, one for each sequence", got, "lay it out as the data")
    parts = [as_tensor(item, f"{argument}[{i}]") for i, item in enumerate(value)]
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if part.dim() == 0 or len(part) != count or part.shape[1:] != parts[0].shape[1:]:
            columns = ", ".join(map(str, (count, *parts[0].shape[1:])))
            got = f"shape {list(part.shape)}"
            raise invalid(f"{argument}[{i}]", f"shape [{columns}], as sequence {i} is long", got, "correct it")
    return parts


def _join(parts: list[Tensor], device: torch.device) -> Tensor:
    return parts[0].to(device) if len(parts) == 1 else torch.cat([part.to(device) for part in parts])
