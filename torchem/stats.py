"""Sufficient statistics as a vector space.

Statistics are summed over chunks and ranks, decayed by stochastic EM and swapped by incremental EM. All of this
commutes because the only operations are those of a vector space: addition, subtraction and scaling.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchem.errors import InvalidArgument


class Stats(dict[str, Any]):
    """Named tensors (or nested `Stats`) that add, subtract and scale.

    A leaf is component-first, ``[*replicas, K, …]``, or declared ``shared`` by name (a tied covariance), so that
    pruning and merging know which leaves to leave alone. Leaves are float64 whatever the dtype of the parameters.

    Args:
        leaves: Names and their tensors or nested statistics.
        shared: Names of leaves without a component axis.
        version: Identity of the coordinates that the leaves are expressed in (a Gaussian's origin). Statistics of
            different versions do not add.
        mixed: Whether some were taken at other parameters than the rest (incremental EM), so that a step which moves
            the coordinates of latents, as a parameter expansion does, would leave them behind. A sum with such is too.

    Example:
        >>> s = Stats(count=torch.ones(2), total=torch.zeros(2, 3))
        >>> (s + s)["count"]
        tensor([2., 2.])
    """

    shared: frozenset[str]
    version: int
    mixed: bool

    def __init__(self, *args: Any, shared: Iterable[str] = (), version: int = 0, mixed: bool = False, **leaves: Any):
        super().__init__(*args, **leaves)
        self.shared = frozenset(shared)
        self.version = version
        self.mixed = mixed

    def like(self, leaves: dict[str, Any]) -> "Stats":
        """New leaves with this object's declarations."""
        return Stats(leaves, shared=self.shared, version=self.version, mixed=self.mixed)

    def mix(self) -> "Stats":
        """These statistics, declared `mixed` with all that is nested in them."""
        leaves = {name: leaf.mix() if isinstance(leaf, Stats) else leaf for name, leaf in self.items()}
        return Stats(leaves, shared=self.shared, version=self.version, mixed=True)

    def map(self, fn: Callable[..., Any], *others: "Stats") -> "Stats":
        """Apply ``fn`` leaf by leaf to this and other statistics of the same structure.

        Raises:
            InvalidArgument: If names or versions differ.
        """
        for other in others:
            if self.keys() != other.keys():
                raise InvalidArgument(
                    f"stats: expected the leaves {sorted(self)}, got {sorted(other)}; combine statistics of one model."
                )
            if self.version != other.version:
                raise InvalidArgument(
                    f"stats: expected statistics about origin version {self.version}, got {other.version}; "
                    "translate the older ones with the model's recenter()."
                )
        out = self.like(
            {
                name: leaf.map(fn, *(other[name] for other in others))
                if isinstance(leaf, Stats)
                else fn(leaf, *(other[name] for other in others))
                for name, leaf in self.items()
            }
        )
        out.mixed = self.mixed or any(other.mixed for other in others)
        return out

    def __add__(self, other: "Stats") -> "Stats":
        return self.map(torch.add, other)

    def __sub__(self, other: "Stats") -> "Stats":
        return self.map(torch.sub, other)

    def __mul__(self, factor: float | Tensor) -> "Stats":
        return self.map(lambda leaf: leaf * _leading(factor, leaf))

    __rmul__ = __mul__

    def lerp(self, other: "Stats", rate: float | Tensor) -> "Stats":
        """``(1 − rate)·self + rate·other``: the decay of stochastic EM."""
        return self.map(lambda a, b: a * (1 - _leading(rate, a)) + b * _leading(rate, a), other)

    def leaves(self) -> list[Tensor]:
        """All tensors, depth first, in the order of their names' insertion."""
        out: list[Tensor] = []
        for leaf in self.values():
            out += leaf.leaves() if isinstance(leaf, Stats) else [leaf]
        return out

    def flatten(self) -> Tensor:
        """All leaves as one float64 vector, so that one all-reduce carries everything."""
        return torch.cat([leaf.to(torch.float64).reshape(-1) for leaf in self.leaves()])

    def unflatten(self, flat: Tensor) -> "Stats":
        """Statistics of this structure whose leaves are read from ``flat``, the inverse of `flatten`."""
        pieces = iter(flat.split([leaf.numel() for leaf in self.leaves()]))
        return self.map(lambda leaf: next(pieces).reshape(leaf.shape))

    def select(self, index: Tensor | list[int]) -> "Stats":
        """Keep some components; leaves without a component axis stay as they are (no replicas)."""
        return self.like(
            {
                name: leaf.select(index) if isinstance(leaf, Stats) else (leaf if name in self.shared else leaf[index])
                for name, leaf in self.items()
            }
        )


def _leading(factor: float | Tensor, leaf: Tensor) -> float | Tensor:
    """A factor per replica, ``[R]``, against the leading axis of a leaf."""
    if not isinstance(factor, Tensor) or factor.dim() == 0:
        return factor
    return factor.reshape(*factor.shape, *[1] * (leaf.dim() - factor.dim()))


def _flatten(stats: Stats) -> tuple[list[Any], Any]:
    return list(stats.values()), (tuple(stats), stats.shared, stats.version, stats.mixed)


def _unflatten(values: Iterable[Any], context: Any) -> Stats:
    names, shared, version, mixed = context
    return Stats(zip(names, values, strict=True), shared=shared, version=version, mixed=mixed)


pytree.register_pytree_node(Stats, _flatten, _unflatten, serialized_type_name="torchem.Stats")
