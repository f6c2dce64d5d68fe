"""Sequences with the frames before each frame as covariates: what autoregressions read."""

from dataclasses import replace

import torch
from torch import Tensor

from torchem.batch import Batch, values_known
from torchem.errors import invalid


def with_lags(batch: Batch, lags: int, dtype: torch.dtype) -> Batch:
    """Sequences ``x [N, T, D]`` with u = (x_{t−1}, …, x_{t−L}), ``[N, T, L·D]``, in place of their own covariates.

    The first L frames are given: they are marked as missing. Their lags are filled with the first frame, so that
    covariates are valid data throughout.
    """
    x = batch.x if batch.x.is_floating_point() else batch.x.to(dtype)
    time = torch.arange(x.shape[1], device=x.device)
    past = [x[:, (time - lag).clamp(min=0)] for lag in range(1, lags + 1)]
    given = (time < lags).unsqueeze(-1)
    return replace(batch, x=torch.where(given, torch.nan, x), u=torch.cat(past, -1))


def check_complete(batch: Batch) -> None:
    """Refuse sequences with missing entries: later frames would miss them among their lags.

    Raises:
        InvalidArgument: If a valid frame has a missing entry.
    """
    x = batch.x
    if x.dim() < 3 or not x.is_floating_point() or not values_known():
        return
    missing = x.isnan().any(-1)
    mask = batch.frames_mask()
    if mask is not None:
        missing = missing & mask
    if bool(missing.any()):
        sequence, frame = (int(i) for i in missing.nonzero()[0])
        raise invalid(
            "data", "sequences without missing entries for an autoregression",
            f"NaN in sequence {sequence}, frame {frame}", "cut the sequence there, or impute it",
        )  # fmt: skip


def lag_columns(batch: Batch, columns: int) -> Tensor:
    """The covariates of rows that `with_lags` made.

    Raises:
        InvalidArgument: If there are none, or as many as another number of lags gives.
    """
    u = batch.u
    if u is None or u.shape[-1] != columns:
        got = "none" if u is None else f"{u.shape[-1]} columns"
        raise invalid("inputs", f"{columns} columns of lags", got, "pass sequences through context() first")
    return u
