"""What normal families learn of the columns before a fit."""

import torch
from torch import Tensor

from torchem.errors import invalid
from torchem.factor import Moments


def column_variances(moments: Moments, dtype: torch.dtype) -> Tensor:
    """Variance of each column ``[D]``, never zero: what floors are relative to.

    Raises:
        InvalidArgument: For a column without an entry, or of numbers whose squares ``dtype`` cannot hold.
    """
    mean, variance = moments.mean, moments.variance
    # Sources tell the weight of what they saw in each column; a mean of nothing may be NaN as well.
    absent = mean.isnan() | (getattr(moments, "weight", torch.ones_like(mean)) == 0)
    if bool(absent.any()):
        column = int(absent.nonzero()[0])
        raise invalid("data", "an observed entry in each column", f"none in column {column}", "drop that column")
    limit = torch.finfo(dtype)
    size = mean.square() + variance
    if not bool((size < limit.max * 1e-6).all()):
        raise invalid(
            "data", f"numbers whose squares are well within the range of {dtype}",
            _size_of(size), "rescale it" + ("" if dtype == torch.float64 else ", or use model.double()"),
        )  # fmt: skip
    # A constant column, or one too small to be squared, has no scale of its own; it takes that of the others, or of
    # its value, or one.
    noise = (64 * limit.eps * mean.abs()).square() + limit.tiny * 1e6
    spread = variance[variance > noise]
    fallback = spread.mean() if spread.numel() else (mean.square().amax() * 1e-12).clamp(min=1e-12)
    return torch.where(variance > noise, variance, fallback)


def _size_of(size: Tensor) -> str:
    """How large the numbers of columns are; their mean squares ``[D]`` need not be a number any more."""
    beyond = ~size.isfinite()
    if bool(beyond.any()):
        return f"numbers in column {int(beyond.nonzero()[0])} whose squares overflow"
    return f"a column of size {float(size.sqrt().amax()):.3g}"
