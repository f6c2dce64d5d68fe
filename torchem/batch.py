"""A batch of observations: what every model and factor reads, validated once, where it is built."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchem.errors import InvalidType, describe, invalid, wrong_type


@dataclass(frozen=True, eq=False)
class Batch:
    """Observations and what is known of them. Leading axes ``*n`` are observation axes; all fields share the first.

    Args:
        x: ``[*n, D]`` observations, real or integer.
        u: ``[*n, M]`` covariates.
        observed: ``[*n, D]`` Boolean, False where an entry is missing.
        weight: ``[N]`` non-negative weight of each row or sequence; weight 2 counts as two copies, weight 0 as none.
        lengths: ``[N]`` number of valid frames of each padded sequence.
        evidence: ``[*n, K]`` log-potentials on the latent classes (labels, sets of labels, soft labels).
        offset: ``[*n]`` known additive term of a linear predictor.
        trials: ``[*n]`` number of trials of binomial counts.

    Example:
        >>> len(Batch(torch.zeros(5, 2)))
        5
    """

    x: Tensor
    u: Tensor | None = None
    observed: Tensor | None = None
    weight: Tensor | None = None
    lengths: Tensor | None = None
    evidence: Tensor | None = None
    offset: Tensor | None = None
    trials: Tensor | None = None

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
        for start in range(0, size, rows):
            yield self[start : start + rows]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory the copy overlaps with computation."""
        return self.map(lambda value: value.to(device, non_blocking=value.is_pinned()))

    def with_x(self, x: Tensor) -> "Batch":
        """The same batch with other observations."""
        return replace(self, x=x)

    def total_weight(self) -> Tensor:
        """Number of observations, or the sum of their weights, as float64."""
        if self.weight is None:
            return torch.tensor(float(len(self)), dtype=torch.float64, device=self.x.device)
        return self.weight.sum(dtype=torch.float64)


_FIELDS = tuple(field.name for field in fields(Batch))


def concatenate(batches: Iterable[Batch]) -> Batch:
    """Batches one after the other; all must have the same fields."""
    parts = list(batches)
    if len(parts) == 1:
        return parts[0]
    present = [name for name in _FIELDS if getattr(parts[0], name) is not None]
    return Batch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in present})


def as_tensor(value: Any, argument: str) -> Tensor:
    """Turn arrays, lists and tensors into a tensor without ever aliasing memory that might be read-only.

    Raises:
        InvalidType: If the value holds something other than real numbers.
    """
    if isinstance(value, Tensor):
        tensor = value
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
    allow_missing: bool = False,
    allow_empty: bool = False,
) -> Batch:
    """Build a validated `Batch` from a tensor, an array, nested lists or a `Batch`.

    A vector is read as a column: N observations of one feature.

    Raises:
        InvalidArgument: For a wrong shape, empty data, ±inf, NaN where no factor handles missing entries, or weights
            that are negative, not finite or all zero.
        InvalidType: For data that are not real numbers.

    Example:
        >>> as_batch([[1.0, 2.0], [3.0, 4.0]]).x.shape
        torch.Size([2, 2])
    """
    if isinstance(data, Batch):
        batch = data
        x = batch.x
    else:
        x = as_tensor(data, "data")
        batch = Batch(x)
    if x.dim() == 1:
        x = x.unsqueeze(-1)
    if x.dim() != 2:
        raise invalid("data", "a table [N, D]", f"shape {list(x.shape)}", "reshape it to observations × features")
    if x.shape[1] == 0:
        raise invalid("data", "at least one feature", f"shape {list(x.shape)}", "pass a table with columns")
    size = x.shape[0]
    if size == 0 and not allow_empty:
        raise invalid("data", "at least one observation", f"shape {list(x.shape)}", "check the filter that made it")
    if x.is_floating_point():
        _check_finite(x, batch.observed, allow_missing)
    extra = {
        "weight": batch.weight if weight is None else as_tensor(weight, "weights"),
        "u": batch.u if u is None else as_tensor(u, "inputs"),
        "evidence": batch.evidence if evidence is None else as_tensor(evidence, "evidence"),
    }
    batch = replace(batch, x=x, **{k: None if v is None else v.to(x.device) for k, v in extra.items()})
    if batch.weight is not None:
        _check_weight(batch.weight, size)
        batch = replace(batch, weight=batch.weight.to(torch.float64))
    if batch.u is not None:
        covariates = batch.u.unsqueeze(-1) if batch.u.dim() == 1 else batch.u
        if covariates.shape[0] != size or covariates.dim() != 2:
            raise invalid("inputs", f"[{size}, M]", f"shape {list(covariates.shape)}", "give one row per observation")
        if not bool(covariates.isfinite().all()):
            raise invalid("inputs", "finite covariates", "NaN or infinity", "impute or drop those rows")
        batch = replace(batch, u=covariates)
    if batch.evidence is not None and (batch.evidence.dim() != 2 or batch.evidence.shape[0] != size):
        raise invalid("evidence", f"[{size}, K]", f"shape {list(batch.evidence.shape)}", "give one row per observation")
    if batch.evidence is not None and bool((batch.evidence.isnan() | (batch.evidence == torch.inf)).any()):
        raise invalid("evidence", "log-potentials, −inf for what is excluded", "NaN or +inf", "give logarithms")
    return batch


def _check_finite(x: Tensor, observed: Tensor | None, allow_missing: bool) -> None:
    # Inside vmap and grad nothing can be asked of values; whoever called them has the data outside.
    if torch._C._are_functorch_transforms_active():
        return
    # One cheap pass: a sum is finite unless some entry is not (or the sum overflows, which the slow path decides).
    if x.numel() == 0 or bool(x.detach().sum(dtype=torch.float64).isfinite()):
        return
    values = x.detach()
    infinite = values.isinf()
    if bool(infinite.any()):
        row, column = (int(i) for i in infinite.nonzero()[0])
        raise invalid(
            "data", "finite values", f"{float(values[row, column])} at row {row}, column {column}",
            "remove it, or set it to NaN if it stands for a missing entry",
        )  # fmt: skip
    missing = values.isnan()
    if bool(missing.any()) and not allow_missing:
        row, column = (int(i) for i in missing.nonzero()[0])
        raise invalid(
            "data", "no missing entries", f"NaN at row {row}, column {column}",
            "drop or impute those rows; missing data needs a factor that supports it, and this model has none",
        )  # fmt: skip


def _check_weight(weight: Tensor, size: int) -> None:
    if weight.shape != (size,):
        raise invalid("weights", f"shape [{size}]", f"{list(weight.shape)}", "give one weight per observation")
    bad = ~(weight.isfinite() & (weight >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise invalid(
            "weights", "finite non-negative numbers", f"{float(weight[row])} at row {row}", "drop or correct that row"
        )
    if size and not bool((weight > 0).any()):
        raise invalid("weights", "at least one positive weight", "all zero", "weight the rows that count")


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
