"""A batch of observations: what every model and factor reads, validated once, where it is built."""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchem.errors import InvalidType, describe, invalid, invalid_entry, wrong_type

#: Says where an observation lies, from its number.
Place = Callable[[int], str]


@dataclass(frozen=True, eq=False)
class Batch:
    """Observations and what is known of them. Leading axes ``*n`` are observation axes; all fields share the first.

    A table of N rows has ``*n = [N]``. N sequences have ``*n = [N, T]``: shorter ones are padded with copies of a frame
    of their own, so that padding is valid data for any family; it is never counted.

    Args:
        x: ``[*n, D]`` observations, real or integer.
        u: ``[*n, M]`` covariates.
        observed: ``[*n, D]`` Boolean, False where an entry is missing: another way to say NaN, also for integers. It is
            written into x, as NaN (integers become float64 where anything is missing), and is None from then on.
        weight: ``[N]`` non-negative weight of each row or sequence; weight 2 counts as two copies, weight 0 as none.
        lengths: ``[N]`` number of valid frames of each padded sequence; None where every sequence fills T.
        evidence: ``[*n, K]`` log-potentials on the latent classes (labels, sets of labels, soft labels).
        offset: ``[*n]`` known additive term of a linear predictor.
        trials: ``[*n]`` number of trials of binomial counts.

    Example:
        >>> Batch(torch.tensor([[1, 2], [3, 4]]), observed=torch.tensor([[True, False], [True, True]])).x
        tensor([[1., nan],
                [3., 4.]], dtype=torch.float64)
    """

    x: Tensor
    u: Tensor | None = None
    observed: Tensor | None = None
    weight: Tensor | None = None
    lengths: Tensor | None = None
    evidence: Tensor | None = None
    offset: Tensor | None = None
    trials: Tensor | None = None

    def __post_init__(self) -> None:
        # One form of what is missing, for every family; trees are put together again without coming here.
        if self.observed is not None:
            object.__setattr__(self, "x", masked(self.x, self.observed))
            object.__setattr__(self, "observed", None)

    def __len__(self) -> int:
        return self.x.shape[0]

    def map(self, fn: Any) -> "Batch":
        """Apply a function to every tensor present."""
        present = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        return Batch(**{name: fn(value) for name, value in present.items()})

    def values(self) -> tuple[Tensor | None, ...]:
        """The fields in order."""
        return tuple(getattr(self, name) for name in _FIELDS)

    def __getitem__(self, index: Any) -> "Batch":
        """Some of the observations: a slice, an index tensor or a mask along the first axis."""
        return self.map(lambda value: value[index])

    def split(self, rows: int) -> Iterator["Batch"]:
        """Consecutive pieces of at most ``rows`` observations; an empty batch is one empty piece."""
        size = len(self)
        if size <= rows:
            yield self
            return
        # The same pieces each time: what they remember serves the next pass as well.
        yield from self.remember(("pieces", rows), lambda: [self[i : i + rows] for i in range(0, size, rows)])

    def remember(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What is computed from the observations alone, once: passes over the same batch find it again.

        It is forgotten when torch changes x in place, and not kept where derivatives or transforms are followed. What
        NumPy writes into an array that x shares is not noticed: make a new batch of it.

        Example:
            >>> batch = Batch(torch.ones(2, 1))
            >>> [batch.remember("total", lambda: float(batch.x.sum())) for _ in range(2)]
            [2.0, 2.0]
        """
        if _followed(self):
            return compute()
        kept, version = self.__dict__.setdefault("_kept", {}), self.x._version
        if key not in kept or kept[key][0] != version:
            kept[key] = (version, compute())
        return kept[key][1]

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold what the batch was made of.
        return dict(zip(_FIELDS, self.values(), strict=True))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory the copy overlaps with computation."""
        return self.map(lambda value: value.to(device, non_blocking=value.is_pinned()))

    def with_x(self, x: Tensor) -> "Batch":
        """The same batch with other observations."""
        return replace(self, x=x)

    def total_weight(self) -> Tensor:
        """Number of observations (rows, or frames of sequences), each with its weight, as float64."""
        each = self.weight
        if self.x.dim() > 2:
            frames = self.frames().to(torch.float64)
            each = frames if each is None else each * frames
        if each is None:
            return torch.tensor(float(len(self)), dtype=torch.float64, device=self.x.device)
        return each.sum(dtype=torch.float64)

    # ---- sequences --------------------------------------------------------------------------------------------

    def frames(self) -> Tensor:
        """Number of valid frames of each sequence, ``[N]``."""
        full = self.x.shape[:2]
        return torch.full(full[:1], full[1], device=self.x.device) if self.lengths is None else self.lengths

    def frames_mask(self) -> Tensor | None:
        """``[N, T]`` Boolean, True where a frame is valid; None where all are."""
        if self.lengths is None:
            return None
        return torch.arange(self.x.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(-1)

    def rows(self) -> "Batch":
        """The valid frames of sequences as rows ``[F, D]``, each with the weight of its sequence.

        Example:
            >>> Batch(torch.zeros(2, 3, 1), lengths=torch.tensor([3, 1])).rows().x.shape
            torch.Size([4, 1])
        """
        if self.x.dim() < 3:
            return self
        mask = self.frames_mask()
        spread = None if self.weight is None else self.weight.unsqueeze(-1).expand(self.x.shape[:2])
        flat = replace(self, weight=spread, lengths=None)
        return flat.map(lambda value: value.flatten(0, 1) if mask is None else value[mask])

    def with_frames(self, frames: int) -> "Batch":
        """The same sequences cut, or padded, to a number of frames."""
        have = self.x.shape[1]
        if frames <= have:
            lengths = None if self.lengths is None else full_lengths(self.lengths.clamp(max=frames), frames)
            if frames == have and (lengths is None) == (self.lengths is None):
                return self
            return replace(self, lengths=lengths, **self._framed(lambda value: value[:, :frames]))
        lengths = self.frames()
        take = padding_index(complete_frames(self.x), lengths, frames)
        rows = torch.arange(len(self), device=self.x.device).unsqueeze(-1)
        longer = replace(self, lengths=lengths, **self._framed(lambda value: value[rows, take]))
        mask = longer.frames_mask()
        if longer.evidence is None or mask is None:
            return longer
        return replace(longer, evidence=silenced(longer.evidence, mask))

    def _framed(self, fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: fn(value) for name in FRAMED if (value := getattr(self, name)) is not None}


def _followed(batch: Batch) -> bool:
    """Whether derivatives, transforms or a compiler follow what is computed from a batch."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return any(value.requires_grad or value.is_inference() for value in batch.values() if value is not None)


_FIELDS = tuple(field.name for field in fields(Batch))
#: Fields that run along the frames of sequences.
FRAMED = tuple(name for name in _FIELDS if name not in ("weight", "lengths"))


def full_lengths(lengths: Tensor, frames: int) -> Tensor | None:
    """None where every sequence fills ``frames``: the form that spares masks."""
    return None if values_known() and bool((lengths == frames).all()) else lengths


def complete_frames(x: Tensor) -> Tensor | None:
    """Where ``[*n, D]`` has no missing entry, ``[*n]``; None for integers, which have none."""
    return ~x.isnan().any(-1) if x.is_floating_point() else None


def padding_index(complete: Tensor | None, lengths: Tensor, frames: int) -> Tensor:
    """Which frame of its sequence stands at each of ``frames`` places, ``[N, frames]``.

    Padding repeats the first frame that is ``complete [N, T]``, or the first of all where none is.
    """
    place = torch.arange(frames, device=lengths.device)
    valid = place < lengths.unsqueeze(-1)
    filler = torch.zeros_like(lengths)
    if complete is not None:
        # The index of a maximum is that of the first one.
        filler = (complete & valid[:, : complete.shape[1]]).to(torch.uint8).argmax(1)
    return torch.where(valid, place, filler.unsqueeze(-1))


def silenced(evidence: Tensor, mask: Tensor) -> Tensor:
    """Evidence ``[N, T, K]`` that says nothing about padding, where ``mask [N, T]`` is False."""
    if values_known() and not bool(evidence[~mask].any()):
        return evidence
    return torch.where(mask.unsqueeze(-1), evidence, 0.0)


def concatenate(batches: Iterable[Batch]) -> Batch:
    """Batches one after the other, sequences padded to the longest.

    Weights that only some of them have are one elsewhere, evidence is zero; all else must be in each or in none.
    """
    parts = list(batches)
    if len(parts) == 1:
        return parts[0]
    if parts[0].x.dim() > 2:
        frames = max(part.x.shape[1] for part in parts)
        parts = [part.with_frames(frames) for part in parts]
    present = [name for name in _FIELDS if any(getattr(part, name) is not None for part in parts)]
    return Batch(**{name: torch.cat(_alike(parts, name)) for name in present})


def _alike(parts: list[Batch], name: str) -> list[Tensor]:
    """A field of each batch, its neutral value where it is absent."""
    values = [getattr(part, name) for part in parts]
    known = next(value for value in values if value is not None)
    neutral: dict[str, Callable[[Batch], Tensor]] = {
        "weight": lambda part: known.new_ones(len(part)),
        "lengths": lambda part: part.frames(),
        "evidence": lambda part: known.new_zeros(*part.x.shape[:-1], known.shape[-1]),
    }
    if name not in neutral and any(value is None for value in values):
        raise invalid("data", f"batches that all have {name} or none", "some with it", "give it to each batch")
    return [neutral[name](part) if value is None else value for part, value in zip(parts, values, strict=True)]


def values_known() -> bool:
    """Whether Python may look at values: inside vmap and grad it may not, and whoever called them has the data."""
    return not torch._C._are_functorch_transforms_active()


def masked(x: Tensor, observed: Any) -> Tensor:
    """Observations with NaN where ``observed`` is False; x itself where it never is.

    What stands in the place of a missing entry does not matter, but infinities stay, to be refused where rows are
    checked.

    Raises:
        InvalidArgument: If the mask is not one truth value for each entry.
    """
    mask = as_tensor(observed, "observed").to(x.device)
    binary = mask.dtype == torch.bool or (values_known() and bool(((mask == 0) | (mask == 1)).all()))
    if mask.shape != x.shape or not binary:
        kind = "" if binary else " of other numbers"
        raise invalid(
            "observed", f"true or false for each entry, shape {list(x.shape)}", f"shape {list(mask.shape)}{kind}",
            "give True where an entry was observed",
        )  # fmt: skip
    mask = mask.to(torch.bool)
    if values_known() and bool(mask.all()):
        return x
    x = x if x.is_floating_point() else x.to(torch.float64)
    return torch.where(mask | x.isinf(), x, torch.nan)


def as_tensor(value: Any, argument: str) -> Tensor:
    """Turn arrays, lists and tensors into a tensor without ever aliasing memory that might be read-only.

    Raises:
        InvalidType: If the value holds something other than real numbers.
    """
    if isinstance(value, Tensor):
        tensor = value
    elif isinstance(value, (str, os.PathLike)):
        got, remedy = repr(os.fspath(value)), "pass numbers"
        if argument == "data":
            remedy = "fit and partial_fit take paths; read it with torchem.tables.read_table(path).values"
        raise InvalidType(describe(argument, "real numbers", f"the text {got}", remedy))
    else:
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise invalid(argument, "a rectangular array of numbers", reason, "pass rows of equal length") from error
        if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
            raise invalid(argument, "an array without masked entries", "a masked array", "fill them with NaN")
        if array.dtype == object or array.dtype.kind not in "fiub":
            raise InvalidType(
                describe(argument, "real numbers", f"an array of {array.dtype}", "convert the columns to numbers first")
            )
        if array.dtype == np.float16 or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
            array = array.astype(np.float64)
        if array.dtype.byteorder not in "=|" or any(stride < 0 for stride in array.strides):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        if not array.flags.writeable:
            array = array.copy()
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            beyond = array.dtype.itemsize == 8 and array.size and int(array.max()) > np.iinfo(np.int64).max
            array = array.astype(np.float64 if beyond else np.int64)
        tensor = torch.from_numpy(array)
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise wrong_type(
            argument, "a dense tensor of real numbers", tensor, f"convert it (its dtype is {tensor.dtype})"
        )
    return tensor


def as_batch(
    data: Any,
    *,
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
) -> Batch:
    """Build a validated `Batch` from a tensor, an array, nested lists or a `Batch`.

    A vector is read as a column: N observations of one feature.

    Args:
        data: ``[N, D]`` or ``[N]``.
        weight: ``[N]`` non-negative.
        u: ``[N, M]`` or ``[N]`` covariates.
        evidence: ``[N, K]`` log-potentials on the latent classes.
        labels: What is known of the classes, see `evidence_from_labels`; adds to ``evidence``.
        observed: In the shape of the data, False where an entry is missing.
        n_states: K, for labels that are numbers.
        offset: ``[N]`` known terms of linear predictors.
        trials: ``[N]`` numbers of trials.
        allow_missing: Whether NaN entries may stand for missing ones.
        allow_empty: Whether there may be no rows.

    Raises:
        InvalidArgument: For a wrong shape, empty data, ±inf, NaN where no factor handles missing entries, weights
            that are negative, not finite or all zero, or labels out of range.
        InvalidType: For data that are not real numbers.

    Example:
        >>> as_batch([[1.0, 2.0], [3.0, 4.0]]).x.shape
        torch.Size([2, 2])
    """
    batch = data if isinstance(data, Batch) else Batch(as_tensor(data, "data"))
    if observed is not None:
        batch = batch.with_x(masked(batch.x, observed))
    x = batch.x.unsqueeze(-1) if batch.x.dim() == 1 else batch.x
    if x.dim() != 2:
        raise invalid("data", "a table [N, D]", f"shape {list(x.shape)}", "reshape it to observations × features")
    if x.shape[0] == 0 and not allow_empty:
        raise invalid("data", "at least one observation", f"shape {list(x.shape)}", "check the filter that made it")
    batch = replace(
        batch,
        x=x,
        weight=given_or(weight, batch.weight, "weights", x.device),
        u=given_or(u, batch.u, "inputs", x.device),
        evidence=given_or(evidence, batch.evidence, "evidence", x.device),
        offset=given_or(offset, batch.offset, "offset", x.device),
        trials=given_or(trials, batch.trials, "trials", x.device),
    )
    batch = check_rows(batch, labels=labels, n_states=n_states, allow_missing=allow_missing)
    return replace(batch, weight=check_weight(batch.weight, len(batch), "row"))


def given_or(value: Any, default: Tensor | None, argument: str, device: torch.device) -> Tensor | None:
    """The argument as a tensor beside the data, or what a batch already has."""
    tensor = default if value is None else as_tensor(value, argument)
    return None if tensor is None else tensor.to(device)


def row_place(index: int) -> str:
    """Where a row of a table lies."""
    return f"row {index}"


def check_rows(
    batch: Batch,
    *,
    labels: Any = None,
    n_states: int | tuple[int, ...] | None = None,
    allow_missing: bool = False,
    allow_missing_rows: bool = False,
    place: Place = row_place,
) -> Batch:
    """Validate everything that rows ``[N, D]`` carry, but for weights.

    Args:
        batch: Tensors of any kind and shape, x two-dimensional.
        labels: What is known of the classes.
        n_states: K, for labels that are numbers.
        allow_missing: Whether any entry may be NaN.
        allow_missing_rows: Whether rows may be NaN in all columns.
        place: Says where a row lies.
    """
    x = batch.x
    size = len(x)
    if x.shape[1] == 0:
        raise invalid("data", "at least one feature", f"shape {list(x.shape)}", "pass a table with columns")
    if x.is_floating_point():
        _check_finite(x, allow_missing, allow_missing_rows, place)
    if batch.u is not None:
        batch = replace(batch, u=_checked_inputs(batch.u, size, place))
    for name in ("offset", "trials"):
        if (value := getattr(batch, name)) is not None:
            batch = replace(batch, **{name: _checked_numbers(name, value, size, place)})
    evidence = batch.evidence
    if evidence is not None:
        if evidence.dim() != 2 or len(evidence) != size:
            raise invalid("evidence", f"[{size}, K]", f"shape {list(evidence.shape)}", "give one row per observation")
        bad = evidence.isnan() | (evidence == torch.inf)
        if values_known() and bool(bad.any()):
            got = f"NaN or +inf at {_first(bad, place)}"
            raise invalid("evidence", "log-potentials, −inf for what is excluded", got, "give logarithms")
    if labels is not None:
        known = evidence_from_labels(labels, n_states, (size,), place=place).to(x.device)
        if evidence is not None and evidence.shape != known.shape:
            shapes = f"{list(known.shape)} and {list(evidence.shape)}"
            raise invalid("labels, evidence", "the same number of states", shapes, "give K columns to both")
        batch = replace(batch, evidence=known if evidence is None else evidence + known)
    return batch


def _checked_inputs(u: Tensor, size: int, place: Place) -> Tensor:
    u = u.unsqueeze(-1) if u.dim() == 1 else u
    if len(u) != size or u.dim() != 2:
        raise invalid("inputs", f"[{size}, M]", f"shape {list(u.shape)}", "give one row per observation")
    bad = ~u.isfinite()
    if values_known() and bool(bad.any()):
        raise invalid(
            "inputs", "finite covariates", f"NaN or infinity at {_first(bad, place)}", "impute or drop those rows"
        )
    return u


def _checked_numbers(name: str, value: Tensor, size: int, place: Place) -> Tensor:
    """Offsets or trials ``[N]``."""
    value = value.squeeze(-1) if value.dim() == 2 and value.shape[-1] == 1 else value
    if value.shape != (size,):
        raise invalid(name, f"[{size}]", f"shape {list(value.shape)}", "give one number per observation")
    if not values_known():
        return value
    bad, kind = ~value.isfinite(), "finite numbers"
    if name == "trials":
        bad, kind = bad | (value < 0) | (value != value.round()), "whole numbers of at least zero"
    if bool(bad.any()):
        raise invalid(name, kind, f"{float(value[bad][0]):g} at {_first(bad, place)}", "correct it, or drop the row")
    return value


def _first(bad: Tensor, place: Place) -> str:
    """Where the first bad row, or entry of a table, lies."""
    index = bad.nonzero()[0].tolist()
    return ", column ".join([place(index[0]), *map(str, index[1:])])


def _check_finite(x: Tensor, allow_missing: bool, allow_missing_rows: bool, place: Place) -> None:
    # One cheap pass: a sum is finite unless some entry is not (or the sum overflows, which the slow path decides).
    # In the type of the data: a sum in another one copies them first, and they may be a file larger than memory.
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    if not values_known() or x.numel() == 0 or bool(x.detach().sum(dtype=wide).isfinite()):
        return
    values = x.detach()
    infinite = values.isinf()
    if bool(infinite.any()):
        raise invalid(
            "data", "finite values", f"{float(values[infinite][0])} at {_first(infinite, place)}",
            "remove it, or set it to NaN if it stands for a missing entry",
        )  # fmt: skip
    missing = values.isnan()
    if allow_missing or not bool(missing.any()):
        return
    if not allow_missing_rows:
        raise invalid(
            "data", "no missing entries", f"NaN at {_first(missing, place)}",
            "drop or impute those rows; missing data needs a factor that supports it, and this model has none",
        )  # fmt: skip
    partly = missing & ~missing.all(-1, keepdim=True)
    if bool(partly.any()):
        raise invalid(
            "data", "frames that are whole, or missing in all columns", f"NaN at {_first(partly, place)}",
            "set the whole frame to NaN, or impute the entry; "
            "single missing entries need a factor that supports them, and this model has none",
        )  # fmt: skip


def check_weight(weight: Tensor | None, size: int, unit: str) -> Tensor | None:
    """Weights of ``size`` rows or sequences (the ``unit``) as float64.

    Raises:
        InvalidArgument: For a wrong shape, weights that are negative, not finite or all zero.
    """
    if weight is None:
        return None
    if weight.shape != (size,):
        one_each = "observation" if unit == "row" else unit
        raise invalid("weights", f"shape [{size}]", f"{list(weight.shape)}", f"give one weight per {one_each}")
    if values_known():
        bad = ~(weight.isfinite() & (weight >= 0))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            got = f"{float(weight[row])} at {unit} {row}"
            raise invalid("weights", "finite non-negative numbers", got, f"drop or correct that {unit}")
        if size and not bool((weight > 0).any()):
            raise invalid("weights", "at least one positive weight", "all zero", f"weight the {unit}s that count")
    return weight.to(torch.float64)


def refuse_entries(batch: Batch, bad: Tensor, expected: str, remedy: str) -> None:
    """Refuse data with entries that a family gives no probability to, and name the first of them.

    Args:
        batch: Rows ``[N, D]`` or sequences ``[N, T, D]``.
        bad: ``[*n, D]`` Boolean, True where an entry is not of the family's domain; missing ones are of any.
        expected: What entries may be.
        remedy: What to do.

    Raises:
        InvalidEntry: If any is.

    Example:
        >>> batch = Batch(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        >>> try:
        ...     refuse_entries(batch, batch.x < 0, "numbers of at least zero", "correct it")
        ... except ValueError as error:
        ...     print(error)
        data: expected numbers of at least zero, got -1 at row 1, column 1; correct it.
    """
    if values_known() and bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        value = float(batch.x[tuple(index)].detach())
        raise invalid_entry(expected, "NaN" if math.isnan(value) else f"{value:g}", entry_place(index), remedy)


def entry_place(index: Sequence[int], axes: int | None = None) -> dict[str, int]:
    """Names for the place of an entry, row or frame of data with 2 or 3 axes; as many as the index has numbers."""
    names = ("row", "column") if (axes or len(index)) < 3 else ("sequence", "frame", "column")
    return dict(zip(names, index, strict=False))


# ---- labels -------------------------------------------------------------------------------------------------------


def evidence_from_labels(
    labels: Any, n_states: int | tuple[int, ...] | None, shape: Sequence[int], *, place: Place | None = None
) -> Tensor:
    """Log-potentials ``[*n, K]`` on the latent states, from what is known of them.

    e_nk = 0 where observation n may be in state k and −inf where it may not; of soft labels, log(w_nk / max_j w_nj):
    equal weights say nothing, and one-hot weights are a label.

    Args:
        labels: One of three kinds. Whole numbers ``[*n]``: the state, −1 (or NaN) where it is unknown. Booleans
            ``[*n, K]``: the states that are possible. Non-negative numbers ``[*n, K]``: how well each state agrees with
            what was seen, up to a factor.
        n_states: K; may be None for tables, which have K columns. A tuple where an observation has a state of each of
            several chains: labels are then ``[*n, M]``, one of each, or tables ``[*n, ΣK_m]`` of all chains in turn.
        shape: ``*n``: ``[N]`` for rows, ``[N, T]`` for sequences.
        place: Says where an observation lies, from its number, for messages.

    Raises:
        InvalidArgument: For a shape that does not fit, a state out of range, a row that excludes every state.

    Example:
        >>> evidence_from_labels([1, -1], 2, (2,))
        tensor([[-inf, 0.],
                [0., 0.]])
    """
    value = as_tensor(labels, "labels")
    axes = tuple(shape)
    place = _placed(axes) if place is None else place
    if isinstance(n_states, tuple):
        return _of_chains(value, n_states, axes, place)
    if value.shape == axes and value.dtype != torch.bool:
        evidence = _from_states(value.reshape(-1), n_states, place)
    elif value.dim() == len(axes) + 1 and value.shape[:-1] == axes:
        evidence = _from_table(value.reshape(-1, value.shape[-1]), n_states, place)
    else:
        kind = "Booleans of shape" if value.dtype == torch.bool else "shape"
        sizes = ", ".join(map(str, axes))
        raise invalid(
            "labels", f"whole numbers [{sizes}], or a table [{sizes}, K]", f"{kind} {list(value.shape)}",
            "give one label, −1 where it is unknown, or one row per observation",
        )  # fmt: skip
    return evidence.reshape(*axes, evidence.shape[-1])


def _of_chains(value: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...], place: Place) -> Tensor:
    """Evidence on the states of several chains, ``[*n, ΣK_m]``."""
    states = value.shape == (*axes, len(sizes)) and value.dtype != torch.bool
    if not states and value.shape != (*axes, sum(sizes)):
        dims = ", ".join(map(str, axes))
        raise invalid(
            "labels", f"whole numbers [{dims}, {len(sizes)}], or a table [{dims}, {sum(sizes)}]",
            f"shape {list(value.shape)}", "give the state of each chain, −1 where unknown, or a column per state",
        )  # fmt: skip
    parts = value.unbind(-1) if states else value.split(sizes, -1)

    def of(m: int) -> Place:
        return lambda index: f"{place(index)}, chain {m}"

    chains = enumerate(zip(parts, sizes, strict=True))
    return torch.cat([evidence_from_labels(part, k, axes, place=of(m)) for m, (part, k) in chains], -1)


def _placed(axes: tuple[int, ...]) -> Place:
    if len(axes) == 1:
        return row_place
    return lambda index: f"sequence {index // axes[1]}, frame {index % axes[1]}"


def _from_states(value: Tensor, n_states: int | None, place: Place) -> Tensor:
    if n_states is None:
        raise invalid("n_states", "the number of states that labels count", None, "say how many states there are")
    if value.is_floating_point():
        value = value.nan_to_num(nan=-1.0)
    elif torch.iinfo(value.dtype).bits < 64 or value.dtype == torch.uint64:
        value = value.to(torch.int64)  # among unsigned numbers −1 is the largest
    bad = ~((value >= -1) & (value < n_states) & (value == value.round() if value.is_floating_point() else True))
    if values_known() and bool(bad.any()):
        expected, got = f"states from 0 to {n_states - 1}, or −1 for unknown", f"{value[bad][0].item()}"
        remedy = "correct it, or build the model with more states"
        raise invalid("labels", expected, f"{got} at {_first(bad, place)}", remedy)
    state = value.to(torch.int64).unsqueeze(-1)
    possible = (state == torch.arange(n_states, device=value.device)) | (state < 0)
    return torch.zeros(possible.shape, device=value.device).masked_fill(~possible, -torch.inf)


def _from_table(value: Tensor, n_states: int | None, place: Place) -> Tensor:
    if value.shape[-1] != (n_states or value.shape[-1]):
        raise invalid("labels", f"{n_states} columns, one per state", value.shape[-1], "give a column for each state")
    if value.dtype == torch.bool:
        none = ~value.any(-1)
        if values_known() and bool(none.any()):
            got = f"none at {_first(none, place)}"
            raise invalid("labels", "at least one state that is possible", got, "mark all where nothing is known")
        return torch.zeros(value.shape, device=value.device).masked_fill(~value, -torch.inf)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    bad = ~(value.isfinite() & (value >= 0))
    if values_known() and bool(bad.any()):
        got = f"{value[bad][0].item()} at {_first(bad, place)}"
        raise invalid("labels", "finite non-negative numbers", got, "give equal numbers where nothing is known")
    most = value.amax(-1, keepdim=True)
    zero = most[..., 0] == 0
    if values_known() and bool(zero.any()):
        got = f"zeros alone at {_first(zero, place)}"
        raise invalid(
            "labels", "at least one state of positive weight", got, "give equal numbers where nothing is known"
        )
    return (value / most).log()


# Tree transforms put other things than tensors into the leaves (vmap its axes): neither way asks for tensors.


def _flatten(batch: Batch) -> tuple[list[Any], tuple[str, ...]]:
    present = tuple(name for name in _FIELDS if getattr(batch, name) is not None)
    return [getattr(batch, name) for name in present], present


def _unflatten(values: Iterable[Any], context: tuple[str, ...]) -> Batch:
    batch = object.__new__(Batch)
    present = dict(zip(context, values, strict=True))
    for name in _FIELDS:
        object.__setattr__(batch, name, present.get(name))
    return batch


pytree.register_pytree_node(Batch, _flatten, _unflatten, serialized_type_name="torchem.Batch")
