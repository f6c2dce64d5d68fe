"""Hyper-parameters: numbers or tensors, some of them left open until the data are known."""

import math
from typing import Any

import torch
from torch import Tensor

from torchem.batch import as_tensor
from torchem.errors import invalid


def number(name: str, value: Any, above: float = 0.0) -> float:
    """A finite number above a bound.

    Raises:
        InvalidArgument: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < math.inf:
        raise invalid(name, f"a finite number above {above:g}", repr(value), "correct it")
    return float(value)


def hyper(name: str, value: Any, *, positive: bool = False) -> Tensor | None:
    """A finite float64 tensor; None where it is left open.

    Raises:
        InvalidArgument: If an entry is not finite, or not positive where it must be.
    """
    if value is None:
        return None
    tensor = as_tensor(value, name).to(torch.float64)
    if not bool((tensor.isfinite() & ((tensor > 0) | (not positive))).all()):
        raise invalid(name, f"{'positive ' * positive}finite numbers", value, "correct it")
    return tensor


def expand(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A hyper-parameter in the shape that it stands over.

    Raises:
        InvalidArgument: If it does not broadcast.
    """
    try:
        return value.to(like.device).expand(shape)
    except RuntimeError as error:
        raise invalid(
            name, f"one number, or a shape that broadcasts to {list(shape)}", list(value.shape), "correct its shape"
        ) from error


def chosen(value: Tensor | None, keep: Tensor, rank: int) -> Tensor | None:
    """A hyper-parameter of the components ``keep`` alone, where each has its own: then it has so many axes.

    Example:
        >>> keep = torch.tensor([0, 2])
        >>> chosen(torch.ones(3, 2), keep, 2).shape, chosen(torch.ones(2), keep, 2).shape
        (torch.Size([2, 2]), torch.Size([2]))
    """
    if value is None or value.dim() < rank or len(value) == 1:
        return value
    return value[keep.to(value.device)]


def plain(value: Tensor | None) -> Any:
    """A hyper-parameter as numbers and lists."""
    return None if value is None else value.tolist()
