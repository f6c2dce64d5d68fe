"""Sequences with the frames before each frame as covariates: what autoregressions read."""

from dataclasses import replace

import torch
from torch import Tensor

from torchem.batch import Batch, entry_place, values_known
from torchem.errors import invalid, invalid_entry


def with_lags(batch: Batch, lags: int, dtype: torch.dtype) -> Batch:
    """Sequences ``x [N, T, D]`` with u = (x_{t−1}, …, x_{t−L}), ``[N, T, L·D]``, in place of their own covariates.

    The first L frames are given: they are marked as missing. Their lags are filled with the first frame, so that
    covariates are valid data throughout; so are those of missing frames.
    """
    x = batch.x if batch.x.is_floating_point() else batch.x.to(dtype)
    time = torch.arange(x.shape[1], device=x.device)
    known = torch.where(x.isnan(), x[:, :1], x).nan_to_num(nan=0.0)
    past = [known[:, (time - lag).clamp(min=0)] for lag in range(1, lags + 1)]
    given = (time < lags).unsqueeze(-1)
    return replace(batch, x=torch.where(given, torch.nan, x), u=torch.cat(past, -1))


def check_complete(batch: Batch, lags: int) -> None:
    """Refuse sequences with missing entries among the lags of frames that were observed.

    Entries that are missing where no observed frame follows are exact: no density that counts depends on them, and they
    are left out of their own. One before would have to be integrated out under each path of states by itself: what the
    frames up to t say of it is a mixture with a part for every path, K times as many with each frame. No recursion over
    states sums that, and a gap of more than L frames does not end it: the first frame after it has lags in the gap.

    Raises:
        InvalidEntry: If a frame with a missing entry has a frame after it, beyond the first L, that was observed, even
            in part.
    """
    x = batch.x
    if x.dim() < 3 or not x.is_floating_point() or not values_known():
        return
    missing = x.isnan()
    mask = batch.frames_mask()
    # The first frames are given: they have no density of their own.
    scored = ~missing.all(-1) & (torch.arange(x.shape[1], device=x.device) >= lags)
    some = missing.any(-1)
    if mask is not None:
        some, scored = some & mask, scored & mask
    # Whether anything counts after this frame; what that reads is among its lags, or among those of one before it.
    later = scored.flip(-1).cummax(-1).values.flip(-1)
    bad = some[:, :-1] & later[:, 1:]
    if bool(bad.any()):
        raise invalid_entry(
            "sequences without missing entries for an autoregression, but where no observed frame follows", "NaN",
            entry_place(bad.nonzero()[0].tolist(), 3), "cut the sequence there, or impute it",
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
