"""A gate of gates: the tree of a hierarchical mixture of experts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor
from torchem.factors._composite import Composite
from torchem.stats import Stats


class TreeGate(Composite):
    """A latent child whose classes are the leaves of a tree, with a gate at each fork.

    p(leaf | u) = Π p(branch | u) over the forks on the way to the leaf.

    ``Mixture(TreeGate(gate, [gate, gate]), expert)`` is the hierarchical mixture of experts, with an expert for each
    leaf, those of the first branch first. The log-probability of a leaf is a sum over its forks, so each gate learns
    from what reaches it as if it stood alone, and the bound never falls where it does not for the gates.

    Args:
        gate: Which branch is taken: any gate or table without parents, such as ``SoftmaxRegression(2, M)`` or
            ``Categorical(2)``.
        branches: What follows on each branch: a gate, another `TreeGate`, or None for a leaf.

    Raises:
        InvalidArgument: If there are not as many branches as the gate has classes, or a gate stands twice.

    Source: M. I. Jordan, R. A. Jacobs (1994).

    Example:
        >>> from torchem.factors import Categorical
        >>> tree = TreeGate(Categorical(2), [None, Categorical(3)])
        >>> tree.log_table(Batch(torch.zeros(1, 1))).exp()
        tensor([[0.5000, 0.1667, 0.1667, 0.1667]], grad_fn=<ExpBackward0>)
    """

    gate: Factor

    def __init__(self, gate: Factor, branches: Sequence[Factor | None]):
        super().__init__()
        given = list(branches)
        for name, factor in (("gate", gate), *(("branches", one) for one in given if one is not None)):
            if not isinstance(factor, Factor):
                raise wrong_type(name, "a torchem factor", factor, "pass for example SoftmaxRegression(2, M)")
            shape = getattr(factor, "shape", None)
            if shape is None or len(shape) != 1:
                raise invalid(name, "a gate without parents", type(factor).__name__, "use SoftmaxRegression(2, M)")
        size = _classes(gate)
        if len(given) != size:
            raise invalid("branches", f"{size}, one for each class of the gate", len(given), "give None for a leaf")
        below = [one for one in given if one is not None]
        if len({gate, *below}) < len(below) + 1:
            raise invalid("branches", "each gate once", "one of them twice", "build one for each fork")
        self.gate = gate
        self.below = nn.ModuleList(below)
        # Place in `below` of what follows on each branch.
        self._place = [None if one is None else below.index(one) for one in given]
        self._sizes = [1 if one is None else _classes(one) for one in given]
        self._leaves = sum(self._sizes)
        self.shape = (self._leaves,)

    def parts(self) -> dict[str, Factor]:
        return {"gate": self.gate, **{f"below.{i}": one for i, one in enumerate(self.below)}}  # pyright: ignore[reportReturnType]

    @property
    def branches(self) -> list[Factor | None]:
        """What follows on each branch."""
        return [None if place is None else self.below[place] for place in self._place]  # pyright: ignore[reportReturnType]

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.gate.replicas

    def check(self, batch: Batch) -> None:
        for part in self.parts().values():
            part.check(batch)

    def row_size(self) -> int:
        return sum(part.row_size() for part in self.parts().values()) + 2 * self._leaves

    # ---- as a latent child ------------------------------------------------------------------------------------

    def log_table(self, batch: Batch) -> Tensor:
        """``[*r, *n or 1s, leaves]``."""
        return self._table(batch, Factor.log_table.__name__)

    def table_potential(self, batch: Batch) -> Tensor:
        return self._table(batch, Factor.table_potential.__name__)

    def _table(self, batch: Batch, name: str) -> Tensor:
        fork = getattr(self.gate, name)(batch)
        leaves = []
        for i, branch in enumerate(self.branches):
            own = fork[..., i : i + 1]
            leaves.append(own if branch is None else own + getattr(branch, name)(batch))
        # Tables are the same for all rows, those of gates are not.
        axes = torch.broadcast_shapes(*(leaf.shape[:-1] for leaf in leaves))
        return torch.cat([leaf.expand(*axes, leaf.shape[-1]) for leaf in leaves], -1)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        return self.table_stats(batch, expected)

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """The statistics of each gate under the expectations of its own branches."""
        parts, shares = self.parts(), self._shares(expected)
        return Stats({path: parts[path].table_stats(batch, share) for path, share in shares.items()})

    def initialize_table(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        parts, shares = self.parts(), self._shares(expected)
        return self.joined({path: parts[path].initialize_table(batch, share) for path, share in shares.items()})

    def _shares(self, expected: Tensor) -> dict[str, Tensor]:
        """Expectations of the branches of each gate."""
        parts = expected.split(self._sizes, -1)
        shares = {"gate": torch.stack([part.sum(-1) for part in parts], -1)}
        below = zip(self._place, parts, strict=True)
        return shares | {f"below.{place}": part for place, part in below if place is not None}

    def occupancy(self, stats: Stats) -> Tensor | None:
        found = {path: part.occupancy(stats[path]) for path, part in self.parts().items() if path in stats}
        fork, leaves = found.get("gate"), []
        for i, place in enumerate(self._place):
            own = found.get(f"below.{place}") if place is not None else None if fork is None else fork[..., i : i + 1]
            if own is None:
                return None
            leaves.append(own)
        return torch.cat(leaves, -1)

    def forbid(self, states: Tensor) -> None:
        for i, (branch, part) in enumerate(zip(self.branches, states.split(self._sizes, -1), strict=True)):
            if branch is not None:
                branch.forbid(part)
            gone = torch.zeros(*states.shape[:-1], len(self._sizes), dtype=torch.bool, device=states.device)
            gone[..., i] = part.all(-1)
            if bool(gone.any()):
                self.gate.forbid(gone)

    def select(self, keep: Tensor) -> "TreeGate":
        """The tree of some of the leaves; a fork that is left with one way stays, for it costs nothing."""
        mask = keep
        if keep.dtype != torch.bool:
            mask = torch.zeros(self._leaves, dtype=torch.bool, device=keep.device)
            mask[keep] = True
        parts = mask.split(self._sizes)
        ways = torch.stack([part.any() for part in parts])
        pairs = [(one, part) for one, part in zip(self.branches, parts, strict=True) if bool(part.any())]
        return TreeGate(self.gate.pruned(ways), [None if one is None else one.pruned(part) for one, part in pairs])

    def config(self) -> dict[str, Any]:
        return {"gate": self.gate, "branches": self.branches}

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        from torchem import factors

        generator = torch.Generator().manual_seed(0)
        first, second = factors.SoftmaxRegression(2, 2), factors.SoftmaxRegression(2, 2)
        for gate in (first, second):
            gate.weight = torch.randn(2, 2, generator=generator)
        u = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        return cls(first, [second, None]).double(), Batch(torch.zeros(20, 1, dtype=torch.float64), u=u)


def _classes(gate: Any) -> int:
    return gate.shape[0]
