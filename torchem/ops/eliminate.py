"""Sums over the states of many variables, one variable at a time: what a product of small tables adds up to."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchem.ops import reduce

#: Variables that a table runs over, in the order of its last axes.
Scope = tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """In which order to eliminate variables, and what that takes.

    Attributes:
        variables: The variables in turn.
        width: Variables of the largest clique less one: the tree-width, if the order is a best one.
        cells: Entries of the largest table on the way.
        work: Entries of all of them.
    """

    variables: Scope
    width: int
    cells: int
    work: int


def order(scopes: Iterable[Collection[int]], sizes: Sequence[int], variables: Iterable[int]) -> Order:
    """The greedy order of least fill: the variable next whose neighbours miss the fewest edges among themselves.

    Ties go to the smaller clique, then to the lower number. What is not among ``variables`` is taken as known.

    Source: D. Koller, N. Friedman (2009), section 9.4.3.2.

    Example:
        >>> order([(0, 1), (1, 2), (2, 3)], [2, 2, 2, 2], range(4))
        Order(variables=(0, 1, 2, 3), width=1, cells=4, work=14)
    """
    left = set(variables)
    near: dict[int, set[int]] = {v: set() for v in left}
    for scope in scopes:
        members = left.intersection(scope)
        for v in members:
            near[v] |= members - {v}
    found: list[int] = []
    width, cells, work = 0, 1, 0

    def cost(v: int) -> tuple[int, int, int]:
        fill = sum(b not in near[a] for a, b in itertools.combinations(near[v], 2))
        return fill, math.prod(sizes[a] for a in near[v]), v

    costs = {v: cost(v) for v in left}
    while costs:
        best = min(costs.values())[-1]
        around = near.pop(best)
        del costs[best]
        clique = sizes[best] * math.prod(sizes[a] for a in around)
        width, cells, work = max(width, len(around)), max(cells, clique), work + clique
        for a in around:
            near[a] |= around
            near[a] -= {a, best}
        # Costs change for neighbours, and for those that have two of them.
        changed = set(around)
        for a in around if len(around) > 1 else ():
            changed |= near[a]
        costs |= {v: cost(v) for v in changed}
        found.append(best)
    return Order(tuple(found), width, cells, work)


def aligned(table: Tensor, scope: Scope, target: Scope) -> Tensor:
    """A table ``[…, *scope]`` as ``[…, *target]``, of size one along the variables that it does not run over.

    Example:
        >>> import torch
        >>> aligned(torch.zeros(5, 2, 3), (1, 0), (0, 1, 2)).shape
        torch.Size([5, 3, 2, 1])
    """
    lead = table.dim() - len(scope)
    present = [v for v in target if v in scope]
    table = table.permute(*range(lead), *(lead + scope.index(v) for v in present))
    sizes = iter(table.shape[lead:])
    return table.reshape(*table.shape[:lead], *(next(sizes) if v in scope else 1 for v in target))


def log_sum(
    tables: Iterable[tuple[Scope, Tensor]],
    variables: Sequence[int],
    plus: Callable[[Tensor, int], Tensor] = reduce.logsumexp,
) -> Tensor:
    """log Σ exp Σ tables over the states of all variables, ``[…]``: bucket elimination.

    With the sum swapped for a maximum it is the value of the best configuration, with one that chooses a term a draw;
    the gradient names the expectations, the configuration or the draw.

    Args:
        tables: Scopes, all of them among the variables, and log-potentials ``[…, *scope]`` with the same leading axes
            or ones.
        variables: All variables, in the order in which they are eliminated.
        plus: The reduction along an axis.

    Source: R. Dechter (1999), section 3; Koller and Friedman (2009), algorithm 9.1.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([0.2, 0.8]), torch.tensor([[0.5, 0.5], [0.1, 0.9]])
        >>> log_sum([((0,), p.log()), ((0, 1), q.log())], [0, 1]).exp()
        tensor(1.)
    """
    left = list(tables)
    for v in variables:
        bucket = [(scope, table) for scope, table in left if v in scope]
        left = [(scope, table) for scope, table in left if v not in scope]
        around = tuple(sorted({u for scope, _ in bucket for u in scope} - {v}))
        joint = added([aligned(table, scope, (*around, v)) for scope, table in bucket])
        left.append((around, plus(joint, -1)))
    return added([table for _, table in left])


def added(tables: Sequence[Tensor]) -> Tensor:
    """The sum of tables that broadcast."""
    total = tables[0]
    for table in tables[1:]:
        total = total + table
    return total
