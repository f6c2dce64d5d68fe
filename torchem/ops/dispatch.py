"""Which kernel, and how large a piece: pure functions of shapes, dtype and device type."""

import torch

#: Bytes of one piece. On CPU what the caches of a few cores hold, so that a piece's features are still there when its
#: moments are taken; on an accelerator enough to fill it.
PIECE = {"cpu": 8 << 20, "cuda": 256 << 20}


def rows_per_piece(row_bytes: int, device: torch.device, budget: int | None = None) -> int:
    """Number of rows of a piece: the largest power of two within the budget, between 128 and 2^20.

    Example:
        >>> rows_per_piece(1024, torch.device("cpu"))
        8192
    """
    budget = PIECE.get(device.type, PIECE["cuda"]) if budget is None else budget
    rows = max(1, budget // max(1, row_bytes))
    return min(max(1 << (rows.bit_length() - 1), 128), 1 << 20)
