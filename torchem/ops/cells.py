"""Sums over cells of tables that cases find for each of their configurations by a base and an offset."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from torchem.ops import reduce
from torchem.ops.dispatch import compiled_cells


@dataclass(frozen=True, eq=False)
class Cells:
    """Cell ``base_i + offset[kind_i, c]`` of a table belongs to configuration c of case ``own_i``.

    Attributes:
        own: ``[u]`` the cases that have the table, in order.
        every: Whether these are all.
        base: ``[u]`` whole numbers.
        kind: ``[u]`` row of the offsets of each.
        offset: ``[kinds, C]``.

    Example:
        >>> here = torch.arange(2)
        >>> cells = Cells(here, True, torch.tensor([0, 2]), here * 0, torch.tensor([[0, 1]]))
        >>> cells.added(torch.zeros(2, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]), 0)
        tensor([[1., 2.],
                [3., 4.]])
    """

    own: Tensor
    every: bool
    base: Tensor
    kind: Tensor
    offset: Tensor

    def index(self) -> Tensor:
        """``[u, C]`` the cell of each configuration."""
        return self.base.unsqueeze(-1) + self.offset.index_select(0, self.kind)

    def added(self, total: Tensor, table: Tensor, lead: int) -> Tensor:
        """``total [*r, U, C]``, whose memory may be taken, with the cells of a table ``[*r, X]`` added."""
        loops = _loops(total, table)
        if loops is not None:
            wide = table.expand(*total.shape[:lead], -1).reshape(-1, table.shape[-1])
            loops.add(total.view(-1, *total.shape[lead:]).numpy(), wide.numpy(), *self._arrays())
            return total
        value = table.index_select(lead, self.index().flatten()).unflatten(
            lead, self.base.shape + self.offset.shape[1:]
        )
        return plus(total, value, None if self.every else self.own, lead)

    def counted(self, share: Tensor, size: int, lead: int) -> Tensor:
        """Sums ``[*r, X]`` over the cells of what configurations ``[*r, U, C]`` count; ``size`` is X."""
        blank = share.new_zeros(*share.shape[:lead], size)
        loops = _loops(share, blank)
        if loops is not None:
            loops.count(blank.view(-1, size).numpy(), share.reshape(-1, *share.shape[lead:]).numpy(), *self._arrays())
            return blank
        value = (share if self.every else share.index_select(lead, self.own)).flatten(lead)
        return blank.scatter_add(-1, self.index().flatten().expand(value.shape), value)

    def _arrays(self) -> tuple:
        return self.own.numpy(), self.base.numpy(), self.kind.numpy(), self.offset.numpy()


def plus(total: Tensor, value: Tensor, index: Tensor | None, lead: int) -> Tensor:
    """``total`` with values added along an axis, to all or at an index; in its memory where nothing follows."""
    if index is None:
        return reduce.plus(total, value)
    value = value.expand(*total.shape[:lead], *value.shape[lead:])
    if reduce.watched(total) or reduce.watched(value):
        return total.index_add(lead, index, value)
    return total.index_add_(lead, index, value)


def _loops(a: Tensor, b: Tensor) -> ModuleType | None:
    """The compiled loops, where they may run: for float64 that no derivatives, transforms or compilers follow."""
    if a.dtype != torch.float64 or b.dtype != torch.float64 or reduce.watched(a) or reduce.watched(b):
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    return compiled_cells(a.device)
