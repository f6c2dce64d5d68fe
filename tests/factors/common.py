"""What the tests of families share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchem.batch import Batch
from torchem.factor import Factor


class Operations(TorchDispatchMode):
    """Notes the names of the operations that run and the size of the largest tensor that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out

    @property
    def products(self) -> int:
        return sum(name.split(".")[0] in ("mm", "bmm", "addmm", "matmul", "mv") for name in self.names)


def operations(run: Callable[[], Any]) -> Operations:
    with torch.no_grad(), Operations() as seen:
        run()
    return seen


def replicated(factor: Factor, count: int) -> Factor:
    """A replica axis for the factor and all that it is made of, in place."""
    for part in factor.modules():
        if isinstance(part, Factor):
            part.replicate(count)
    return factor


def with_holes(x: Tensor, share: float, seed: int = 0) -> Tensor:
    """x with entries missing completely at random."""
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return x.masked_fill(holes, torch.nan)


def even(batch: Batch, k: int) -> Tensor:
    return torch.full((len(batch), k), 1.0 / k, dtype=torch.float64)
