"""Inference in a product of tables over discrete nodes, row by row, with the work that rows share done once.

What is observed of a row cuts the nodes that are not into components that know nothing of each other. The posterior of
one depends on the observed nodes around it alone: rows that agree there share it, whatever else they are, and whatever
else is missing of them. A `Part` is one such component with all of its rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchem.errors import invalid
from torchem.models.pools import (
    TOGETHER,
    Cases,
    Components,
    Data,
    Pool,
    cases,
    components,
    distinct,
    distinct_rows,
    pooled,
    summed,
)
from torchem.ops import eliminate
from torchem.ops.eliminate import Order, Scope

#: Entries of the largest table that exact inference may build for a row.
LIMIT = 1 << 20
#: Cells of a list read in the time that elimination, there and back, takes for an entry of its tables.
_ELIMINATED = 32
#: Cells of the list of a component's configurations up to which no other way is looked for.
_LEAST = 1 << 12


@dataclass(frozen=True, eq=False)
class Member:
    """A table in a part: which of its axes were observed, and in which states.

    Attributes:
        name: Of the table.
        axes: Its axes, those observed first.
        known: How many of them were observed.
        hidden: The nodes of the others.
        code: ``[U]`` joint state of those observed; None where there are none.
        extra: Whether there are cases without the table: their state is one more than the last, where it is zero.
    """

    name: str
    axes: tuple[int, ...]
    known: int
    hidden: Scope
    code: Tensor | None
    extra: bool = False


@dataclass(frozen=True, eq=False)
class Part(Cases):
    """Nodes that some rows leave open and that are tied to each other, with all tables that they stand in.

    Attributes:
        order: How to eliminate them.
        members: The tables.
        first: ``[U]`` a row of each case; None where each row is its own and all are there.
        closed: Nodes that some cases know all the same: ``[U]`` their states, one more than the last where they do not.
        fields: Where mean fields ended, by kind: of which replicas, and q of each node.
    """

    order: Order
    members: tuple[Member, ...]
    first: Tensor | None
    closed: Mapping[int, Tensor] = field(default_factory=dict)
    fields: dict[Any, tuple[tuple[int, ...], list[Tensor]]] = field(default_factory=dict)

    def cut(self, start: int, stop: int) -> "Part":
        """Some of the cases, for the arithmetic alone."""
        if start == 0 and stop >= self.size:
            return self
        index = torch.arange(self.size, device=self.weight.device) if self.first is None else self.first
        members = tuple(replace(m, code=None if m.code is None else m.code[start:stop]) for m in self.members)
        closed = {v: code[start:stop] for v, code in self.closed.items()}
        size = min(stop, self.size) - start
        return replace(self, members=members, size=size, first=index[start:stop], closed=closed)


def plan(data: Data, limit: int | None, budget: int | None = None, *, pool: bool = True) -> list[Part | Pool]:
    """The parts of a batch: components that many rows have by themselves, those of few rows in pools.

    Args:
        data: What is observed, and how it is tied.
        limit: Most entries of a table on the way, if there is a limit.
        budget: Bytes that a pool may take.
        pool: Whether there may be pools, which know no mean field.

    Raises:
        InvalidArgument: If a part takes more than that.
    """
    n = len(data.codes)
    if not n:
        return []
    patterns, pattern = _patterns(data.codes < 0)
    found = components(data, patterns, pattern)
    small = found.small(LIMIT) & pool
    parts: list[Part | Pool] = []
    together = _rare(data, found) if pool else small
    for own, shared in found.classes(together, data):
        if bool(own.any()):
            parts.append(_whole(data, found, own, pattern, shared, limit))
    small = small & ~together
    for number in (~(small | together)).nonzero()[:, 0].tolist():
        rows = _rows(found.pattern[found.which == number], len(patterns), pattern)
        parts.append(_part(data, *found.named(number, data.scopes), rows, limit))
    return [*parts, *pooled(data, found, small, pattern, budget), *_observed(data, patterns, pattern)]


def _rare(data: Data, found: Components) -> Tensor:
    """``[S]`` the components that are cheapest in one elimination of all their nodes, row by row.

    That costs as much as `_ELIMINATED` cells for each entry of its tables and each row, whatever the row leaves open;
    the calls for a component of its own as much as ``found.few``; and a list all tables for each configuration.
    """
    nothing, listed = torch.zeros_like(found.rows, dtype=torch.bool), found.listed()
    chosen = listed > _LEAST
    if not bool(chosen.any()):
        return nothing
    order = _union(data, found, chosen)[0]
    if order.cells > LIMIT:
        return nothing
    each = _ELIMINATED * order.work
    chosen = chosen & (listed > each) & (found.rows * each <= found.few)
    saved = torch.where(chosen, (found.rows * listed).clamp(max=found.few) - found.rows * each, 0.0).sum()
    return chosen if float(saved) > found.few else nothing


def _union(data: Data, found: Components, chosen: Tensor) -> tuple[Order, Scope, list[str]]:
    """How to eliminate the nodes of some components ``[S]`` together; these, and their tables."""
    hidden = tuple(found.nodes[chosen].any(0).nonzero()[:, 0].tolist())
    names = [name for name, mine in zip(data.scopes, found.tables[chosen].any(0).tolist(), strict=True) if mine]
    return eliminate.order([data.scopes[name] for name in names], data.sizes, hidden), hidden, names


def _whole(
    data: Data, found: Components, chosen: Tensor, pattern: Tensor | None, shared: bool, limit: int | None
) -> Part:
    """One part of all cases of some components ``[S]``: each closes the nodes that are not in its own."""
    row, which, place, first = cases(data, found, chosen, pattern, shared)
    _, hidden, names = _union(data, found, chosen)
    row_of, own = row[first], which[first]
    codes, around = data.codes[row_of], found.around[own]
    present = dict(zip(data.scopes, found.tables[own].unbind(-1), strict=True))
    members = tuple(_member(name, data.scopes[name], hidden, codes, data.sizes, present[name]) for name in names)
    closed = {}
    for v in hidden:
        # In any one state, where no table of the case's asks for it.
        state = torch.where(around[:, v] & (codes[:, v] < data.sizes[v]), codes[:, v], 0)
        closed[v] = torch.where(found.nodes[own, v], data.sizes[v], state)
    order = check_order(hidden, {name: data.scopes[name] for name in names}, data.sizes, limit)
    rows, places = row.to(torch.int32), place.to(torch.int32) if shared else None
    weight = summed(data.weight, rows, places, len(first))
    return Part(rows, places, len(first), weight, order, members, row_of, closed)


def _observed(data: Data, patterns: Tensor, pattern: Tensor | None) -> Iterator[Part]:
    """The parts with no open node: tables whose nodes were all observed, those of the same rows together."""
    seen = torch.stack([~patterns[:, list(scope)].any(-1) for scope in data.scopes.values()])
    masks, which = seen.unique(dim=0, return_inverse=True)
    groups: list[list[str]] = [[] for _ in masks]
    for name, number in zip(data.scopes, which.tolist(), strict=True):
        groups[number].append(name)
    for mask, names in zip(masks, groups, strict=True):
        numbers = mask.nonzero()[:, 0]
        if not len(numbers):
            continue
        rows = _rows(numbers, len(patterns), pattern)
        alone = [name for name in names if name in data.rowwise]
        common = [name for name in names if name not in data.rowwise]
        for some in (*_together(common, data.scopes, data.sizes), *((name,) for name in alone)):
            yield _part(data, (), some, rows, None)


def blind(data: Data, limit: int | None) -> Part:
    """All rows where no state can be looked at: all nodes are open, and tables of what was observed close them."""
    hidden = tuple(range(len(data.sizes)))
    members = tuple(_member(name, scope, hidden, None, data.sizes) for name, scope in data.scopes.items())
    order = check_order(hidden, data.scopes, data.sizes, limit)
    return Part(None, None, len(data.codes), data.weight, order, members, None)


def _patterns(missing: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sets ``[P, V]`` of nodes that rows leave open, and the number of that of each row; None where there is one."""
    if bool((missing == missing[:1]).all()):
        return missing[:1], None
    return distinct_rows(missing)


def _together(names: Sequence[str], scopes: Mapping[str, Scope], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Tables in groups whose nodes have few joint states."""
    groups: list[tuple[set[int], list[str]]] = []
    for name in names:
        scope = set(scopes[name])
        for nodes, group in groups:
            if math.prod(sizes[v] for v in nodes | scope) <= TOGETHER:
                nodes |= scope
                group.append(name)
                break
        else:
            groups.append((scope, [name]))
    return [tuple(group) for _, group in groups]


def _rows(numbers: Tensor, patterns: int, pattern: Tensor | None) -> Tensor | None:
    """The rows of some patterns; None for all."""
    if pattern is None or len(numbers) == patterns:
        return None
    chosen = torch.zeros(patterns, dtype=torch.bool, device=pattern.device)
    chosen[numbers] = True
    return chosen[pattern].nonzero()[:, 0]


def check_order(hidden: Sequence[int], scopes: Mapping[str, Scope], sizes: Sequence[int], limit: int | None) -> Order:
    """How to eliminate nodes.

    Raises:
        InvalidArgument: If a table on the way has more entries than the limit.
    """
    found = eliminate.order(scopes.values(), sizes, hidden)
    if limit is not None and found.cells > limit:
        raise invalid(
            "inference", f"cliques of at most {limit} joint states, for exact inference",
            f"one of {found.cells}, of {found.width + 1} nodes (tree-width {found.width}), among the {len(hidden)} "
            "that are not observed", "use inference='mean_field' (and elbo for log_prob), or observe more of its nodes",
        )  # fmt: skip
    return found


def _part(data: Data, hidden: Scope, names: tuple[str, ...], rows: Tensor | None, limit: int | None) -> Part:
    around = sorted({v for name in names for v in data.scopes[name]} - set(hidden))
    own = data.codes if rows is None else data.codes[rows]
    place: Tensor | None = None
    first, size = rows, len(own)
    if not data.apart(names):
        place, size = distinct(own[:, around].unbind(-1), [data.sizes[v] + 1 for v in around], own[:, 0])
        turn = torch.arange(len(own), device=own.device)
        first = torch.zeros(size, dtype=torch.long, device=own.device).scatter_(0, place, turn)
        own = own[first]
        first = first if rows is None else rows[first]
        # Half the memory: one of these is kept for each row as long as the data are.
        place = place.to(torch.int32)
    members = tuple(_member(name, data.scopes[name], hidden, own, data.sizes) for name in names)
    order = check_order(hidden, {name: data.scopes[name] for name in names}, data.sizes, limit)
    return Part(rows, place, size, summed(data.weight, rows, place, size), order, members, first)


def _member(
    name: str,
    scope: Scope,
    hidden: Scope,
    codes: Tensor | None,
    sizes: Sequence[int],
    present: Tensor | None = None,
) -> Member:
    known = [i for i, v in enumerate(scope) if v not in hidden]
    rest = [i for i, v in enumerate(scope) if v in hidden]
    code: Tensor | None = None
    extra = False
    if codes is not None and (known or present is not None):
        axes = range(len(scope)) if present is not None else known
        absent = torch.stack([codes[:, scope[i]] == sizes[scope[i]] for i in axes]).any(0)
        absent = absent if present is None else absent | ~present
        extra = bool(absent.any())
        code = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        for i in known:
            code = code * sizes[scope[i]] + codes[:, scope[i]]
        code = torch.where(absent, math.prod(sizes[scope[i]] for i in known), code)
    return Member(name, (*known, *rest), len(known), tuple(scope[i] for i in rest), code, extra)
