"""An emission over sequences: frames as rows, in pieces that fit the cache, missing frames left out."""

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Factor, Kernel
from torchem.ops import reduce
from torchem.ops.dispatch import rows_per_piece
from torchem.stats import Stats


class FramesPass(Kernel):
    """An emission's pass over sequences: frames as rows, in pieces that fit the cache, missing frames left out."""

    def __init__(self, factor: Factor, score: bool = False):
        self.factor = factor
        self.kernel = factor.scorer() if score else factor.kernel()
        self.pieces: list[Batch] = []
        self.missing: Tensor | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        factor = self.factor
        batch = factor.context(batch)
        axes = batch.x.shape[:2]
        known = {name: getattr(batch, name) for name in ("x", "u", "offset", "trials")}
        rows = Batch(**{name: value.flatten(0, 1) for name, value in known.items() if value is not None})
        rows, self.missing = _without_missing(rows)
        width = factor.row_size() * factor.dtype.itemsize * max(1, *factor.replicas, 1)
        # Features that are small are kept, and made once.
        self.pieces = [rows] if is_light(factor) else list(rows.split(rows_per_piece(width, factor.device)))
        parts = [self._of(piece) for piece in self.pieces]
        value = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        if self.missing is not None:
            value = torch.where(self.missing, 0.0, value)
        return value.unflatten(-2, axes)

    def _of(self, piece: Batch) -> Tensor:
        return self.kernel.log_potential(piece.with_x(self.factor.cast(piece.x)))

    def collect(self, batch: Batch, expected: Tensor) -> None:
        flat = expected.flatten(-3, -2)
        if self.missing is not None:
            flat = torch.where(self.missing, 0.0, flat)
        start = 0
        for piece in self.pieces:
            rows = piece.with_x(self.factor.cast(piece.x))
            if len(self.pieces) > 1:
                self.kernel.revisit(rows)
            self.kernel.collect(rows, flat[..., start : start + len(piece), :])
            start += len(piece)

    def stats(self) -> Stats:
        return self.kernel.stats()

    def inner(self) -> Tensor:
        return self.kernel.inner()


def is_light(factor: Factor) -> bool:
    """Whether an emission takes less memory and time than the chain: a few numbers for each state of a frame."""
    return factor.row_size() <= 8 * (factor.n_components or 1)


def window(batch: Batch, start: int, stop: int) -> Batch:
    """What a gate reads of some of the frames."""
    return Batch(batch.x[:, start:stop], u=None if batch.u is None else batch.u[:, start:stop])


def _without_missing(rows: Batch) -> tuple[Batch, Tensor | None]:
    """Rows with those wholly missing replaced by another, and which they are, ``[F, 1]``; None if there are none."""
    x = rows.x
    if not x.is_floating_point() or not len(rows):
        return rows, None
    plain = not torch._C._are_functorch_transforms_active()
    if plain and not bool(x.detach().sum(dtype=torch.float64).isnan()):
        return rows, None
    missing = x.isnan().all(-1, keepdim=True)
    if plain and not bool(missing.any()):
        return rows, None
    stand_in = x[reduce.first_max((~missing).to(x.dtype), 0)]
    return rows.with_x(torch.where(missing, stand_in.nan_to_num(nan=0.0), x)), missing
