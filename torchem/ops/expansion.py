"""Chains whose observations depend on the last states too, as chains of longer states."""

import torch
from torch import Tensor


class Expansion:
    """States that remember the L before them: s = (z_t, …, z_{t−L}), the present one most significant.

    Args:
        k: K, number of states.
        memory: L; with 0 nothing changes.
        device: Where potentials are.

    Source: J. D. Hamilton (1989), section 3.

    Example:
        >>> wide = Expansion(2, 1, torch.device("cpu"))
        >>> wide.transition(torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()).exp()
        tensor([[0.9000, 0.0000, 0.1000, 0.0000],
                [0.9000, 0.0000, 0.1000, 0.0000],
                [0.0000, 0.2000, 0.0000, 0.8000],
                [0.0000, 0.2000, 0.0000, 0.8000]])
    """

    def __init__(self, k: int, memory: int, device: torch.device):
        self.k, self.memory, self.size = k, memory, k ** (memory + 1)
        if not memory:
            return
        code = torch.arange(self.size, device=device)
        kept = k**memory
        # From (z_t, z_{t−1}, …) to (z_{t+1}, z_t, …): what is kept of the one must be what the other remembers.
        self.allowed = (code.unsqueeze(-1) // k) == (code % kept)
        present = code // kept
        self.cell = present.unsqueeze(-1) * k + present
        # Before the first frame nothing has been: that past is written as the first state over and over.
        self.start = torch.arange(k, device=device) * sum(k**power for power in range(memory + 1))

    def initial(self, value: Tensor) -> Tensor:
        """Potentials ``[…, K]`` of the first state."""
        if not self.memory:
            return value
        wide = value.new_full((*value.shape[:-1], self.size), -torch.inf)
        return wide.index_copy(-1, self.start, value)

    def transition(self, value: Tensor) -> Tensor:
        """Potentials ``[…, K, K]`` of a step; −inf where the pasts disagree."""
        if not self.memory:
            return value
        return torch.where(self.allowed, value.flatten(-2)[..., self.cell], -torch.inf)

    def folded_initial(self, value: Tensor) -> Tensor:
        """Expectations of the first state, ``[…, K]``."""
        if not self.memory:
            return value
        return value[..., self.start]

    def folded_transition(self, value: Tensor) -> Tensor:
        """Expectations of steps summed over pasts, ``[…, K, K]``."""
        if not self.memory:
            return value
        cells = self.cell[self.allowed]
        flat = value.flatten(-2)[..., self.allowed.flatten()]
        total = flat.new_zeros(*flat.shape[:-1], self.k**2).index_add(-1, cells, flat)
        return total.unflatten(-1, (self.k, self.k))
