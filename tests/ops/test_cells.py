"""Sums over cells of tables: compiled loops against indexing, and indexing against a loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.cases import close
from torchem.ops import cells
from torchem.ops.cells import Cells


def made(every: bool, seed: int = 0) -> tuple[Cells, int, int]:
    """Cells of a table of 40 for seven cases of four configurations."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(7) if every else torch.tensor([0, 2, 3, 6])
    base = torch.randint(0, 20, (len(own),), generator=generator)
    kind = torch.randint(0, 3, (len(own),), generator=generator, dtype=torch.int32)
    offset = torch.randint(0, 20, (3, 4), generator=generator)
    return Cells(own.to(torch.int32), every, base, kind, offset), 7, 40


def one_by_one(found: Cells, total: Tensor, table: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    total, counts = total.clone(), torch.zeros_like(table)
    for i, u in enumerate(found.own.tolist()):
        for c, step in enumerate(found.offset[found.kind[i]].tolist()):
            cell = int(found.base[i]) + step
            total[..., u, c] += table[..., cell]
            counts[..., cell] += share[..., u, c]
    return total, counts


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("replicas", [(), (3,)])
@pytest.mark.parametrize("kernel", [True, False])
def test_cells_are_added_and_counted(every: bool, replicas: Any, kernel: bool, monkeypatch: Any) -> None:
    if kernel:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(cells, "compiled_cells", lambda device: None)
    found, cases, size = made(every)
    lead, generator = len(replicas), torch.Generator().manual_seed(1)
    total, share = torch.rand(2, *replicas, cases, 4, generator=generator, dtype=torch.float64)
    table = torch.rand(*replicas, size, generator=generator, dtype=torch.float64)
    want, counts = one_by_one(found, total, table, share)
    close(found.counted(share, size, lead), counts)
    # One table for all replicas.
    alike = table[:1] if lead else table
    close(found.added(total.clone(), alike, lead), one_by_one(found, total, alike.expand_as(table), share)[0])
    close(found.added(total, table, lead), want)


def test_cells_have_gradients_under_transforms() -> None:
    found, cases, size = made(False)
    blank = torch.zeros(cases, 4, dtype=torch.float64)
    table = torch.rand(2, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def energy(value: Tensor) -> Tensor:
        return found.added(blank, value, 0).exp().sum()

    slope = torch.func.vmap(torch.func.grad(energy))(table)
    for value, gradient in zip(table, slope, strict=True):
        close(gradient, found.counted(found.added(blank.clone(), value, 0).exp() * _owned(found, cases), size, 0))
    leaf = table[0].clone().requires_grad_()
    (twice,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    close(twice.detach(), slope[0])
    assert blank.abs().sum() == 0


def _owned(found: Cells, cases: int) -> Tensor:
    mine = torch.zeros(cases, 1, dtype=torch.float64)
    mine[found.own.long()] = 1.0
    return mine
