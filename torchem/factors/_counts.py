"""What families of counts have in common."""

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries, values_known

#: log x! of small counts, for which float32 is exact enough.
_LOG_FACTORIALS = (torch.arange(256, dtype=torch.float64) + 1).lgamma()


def check_counts(batch: Batch) -> None:
    """Refuse entries that are no counts; NaN is missing.

    Raises:
        InvalidEntry: For one that is negative or not whole.
    """
    x = batch.x.detach()
    bad = (x < 0) | ((x != x.round()) & ~x.isnan()) if x.is_floating_point() else x < 0
    refuse_entries(
        batch, bad, "counts: whole numbers of at least zero", "correct that entry, or set it to NaN if it is missing"
    )


def with_factorials(x: Tensor) -> tuple[Tensor, Tensor]:
    """Counts in the precision that products with them need, and log x! of each.

    Example:
        >>> with_factorials(torch.tensor([0.0, 3.0]))[1].exp()
        tensor([1., 6.])
    """
    # Looking up is several times faster than lgamma, but has no derivative in x.
    if values_known() and not x.requires_grad and x.numel() and float(x.amax()) < len(_LOG_FACTORIALS):
        return x, _LOG_FACTORIALS.to(x).index_select(0, x.to(torch.int32).flatten()).view_as(x)
    # The terms of large counts are large and cancel: float32 would leave errors of a nat at a million.
    x = x.to(torch.float64)
    return x, (x + 1).lgamma()
