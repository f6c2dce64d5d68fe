"""Which transitions a chain of states may make: masks for `torchem.HMM.restrict`."""

import torch
from torch import Tensor


def left_right(n_states: int, jump: int | None = None) -> Tensor:
    """``[K, K]`` mask of a chain that never goes back, nor further than ``jump`` states ahead.

    Example:
        >>> left_right(3, jump=1).int()
        tensor([[1, 1, 0],
                [0, 1, 1],
                [0, 0, 1]], dtype=torch.int32)
    """
    ahead = torch.arange(n_states) - torch.arange(n_states).unsqueeze(-1)
    return (ahead >= 0) & (ahead <= (n_states if jump is None else jump))


def cyclic(n_states: int) -> Tensor:
    """``[K, K]`` mask of a chain that stays or steps to the next state, from the last to the first."""
    ahead = (torch.arange(n_states) - torch.arange(n_states).unsqueeze(-1)) % n_states
    return ahead <= 1


def banded(n_states: int, width: int) -> Tensor:
    """``[K, K]`` mask of a chain that moves by at most ``width`` states either way."""
    return (torch.arange(n_states) - torch.arange(n_states).unsqueeze(-1)).abs() <= width
