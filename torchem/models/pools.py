"""Many small components at once: all of their configurations listed, whatever nodes they are of.

Where entries are missing at random, most sets of nodes that a row leaves open are rare: inference in one after the
other would take as many steps as there are sets. In a `Pool` each case has its own few open nodes, and what it has in
common with the others is how many joint states these have. Configuration c of a case finds each of its tables at one
cell, a base plus an offset: log p(c) = Σ_t table_t[base_t + offset_t(c)], and counts are added up at the same cells.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchem.ops.cells import Cells, plus
from torchem.ops.dispatch import rows_per_piece
from torchem.ops.eliminate import Scope

#: Rows whose cases are found together: what that takes is a few numbers for each.
_ROOM = 1 << 21
#: See `Components.few`.
_FEW = {"cpu": 1 << 20, "cuda": 1 << 26}
#: Configurations of observed nodes up to which they are marked, rather than sorted.
TOGETHER = 4096


@dataclass(frozen=True, eq=False)
class Data:
    """What is to be inferred from.

    Attributes:
        codes: ``[N, V]`` states of the nodes, −1 where one is not observed, and one more than the last where it need
            not be known: tables are then zero.
        sizes: States of each node.
        scopes: Nodes of each table.
        rowwise: Tables that differ from row to row.
        weight: ``[N]`` weights of the rows.
        merge: Whether rows may share their posterior, which draws may not.
    """

    codes: Tensor
    sizes: Sequence[int]
    scopes: Mapping[str, Scope]
    rowwise: frozenset[str]
    weight: Tensor
    merge: bool

    def apart(self, names: Iterable[str]) -> bool:
        """Whether rows that agree around these tables differ all the same."""
        return not self.merge or not self.rowwise.isdisjoint(names)


@dataclass(frozen=True, eq=False)
class Cases:
    """Rows that share their posterior, as cases: what parts and pools are.

    Attributes:
        rows: ``[n]`` numbers of the rows, one for each of its components that is here; None for all, once.
        place: ``[n]`` which of the U cases each is; None where each is its own.
        size: U.
        weight: ``[U]`` weight of the rows of each case.
    """

    rows: Tensor | None
    place: Tensor | None
    size: int
    weight: Tensor

    def add(self, total: Tensor, value: Tensor, lead: int) -> Tensor:
        """``total [*r, N, …]`` with what belongs to each case, ``value [*r, U, …]``, added to its rows."""
        if self.place is not None:
            value = value.index_select(lead, self.place)
        return plus(total, value, self.rows, lead)

    def merged(self, weight: Tensor) -> Tensor:
        """Weights ``[*r, N]`` of rows as those of the cases, ``[*r, U]``."""
        return summed(weight, self.rows, self.place, self.size)


def summed(weight: Tensor, rows: Tensor | None, place: Tensor | None, size: int) -> Tensor:
    """Weights ``[*r, N]`` of rows as those of cases, ``[*r, size]``."""
    weight = weight if rows is None else weight.index_select(-1, rows)
    return weight if place is None else weight.new_zeros(*weight.shape[:-1], size).index_add(-1, place, weight)


@dataclass(frozen=True, eq=False)
class Pool(Cases):
    """Cases with as many configurations.

    Attributes:
        configurations: C.
        tables: Where the cases find each table, by its name: those of all rows in one, where it differs from row to
            row.
    """

    configurations: int
    tables: Mapping[str, Cells]

    def joint(self, tables: Mapping[str, Tensor], replicas: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """log-potentials ``[*r, U, C]`` of all configurations, from tables ``[*r, 1 or N, *scope]``."""
        shape = (*replicas, self.size, self.configurations)
        total = torch.zeros(shape, dtype=dtype, device=self.weight.device)
        for name, cells in self.tables.items():
            if name in tables:
                total = cells.added(total, tables[name].to(dtype).flatten(len(replicas)), len(replicas))
        return total

    def each(self, name: str, share: Tensor, size: int, lead: int) -> Tensor:
        """The posterior ``[*r, U, size]`` of a table's cells for each case, from that of configurations."""
        cells = self.tables[name]
        apart = replace(cells, base=cells.base + size * cells.own)
        return apart.counted(share, size * self.size, lead).unflatten(lead, (self.size, size))


# ---- which components are pooled, and their cases -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Components:
    """Sets of nodes that some rows leave open and that are tied to each other.

    Attributes:
        nodes: ``[S, V]`` which nodes are in each.
        tables: ``[S, T]`` which tables stand there.
        around: ``[S, V]`` nodes of these that were observed.
        pattern: ``[Q]`` numbers of patterns, in order: one for each of its components.
        which: ``[Q]`` the number of that component.
        configurations: ``[S]`` joint states of the nodes, float64.
        rows: ``[S]`` number of rows.
    """

    nodes: Tensor
    tables: Tensor
    around: Tensor
    pattern: Tensor
    which: Tensor
    configurations: Tensor
    rows: Tensor

    @property
    def few(self) -> int:
        """Cells read and written in the time that the calls for a component of its own take."""
        return _FEW.get(self.nodes.device.type, _FEW["cuda"])

    def listed(self) -> Tensor:
        """``[S]`` cells that the list of a component's configurations reads for a row."""
        return self.configurations * self.tables.sum(-1)

    def small(self, limit: int) -> Tensor:
        """``[S]`` whether a component is cheaper in a pool than by itself."""
        return (self.configurations <= limit) & (self.rows * self.listed() <= self.few)

    def classes(self, chosen: Tensor, data: Data) -> list[tuple[Tensor, bool]]:
        """The chosen components ``[S]`` that rows may share, and those that they may not."""
        differ = torch.tensor([data.apart([name]) for name in data.scopes], device=chosen.device)
        apart = (self.tables & differ).any(-1)
        return [(chosen & ~apart, True), (chosen & apart, False)]

    def named(self, number: int, scopes: Mapping[str, Scope]) -> tuple[Scope, tuple[str, ...]]:
        """The nodes of a component and the names of its tables."""
        own = zip(scopes, self.tables[number].tolist(), strict=True)
        return tuple(self.nodes[number].nonzero()[:, 0].tolist()), tuple(name for name, mine in own if mine)

    def owners(self, wanted: Tensor, pattern: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Rows, and which of the wanted components ``[S]`` it is, one after the other for each of a row's."""
        mine = wanted[self.which].nonzero()[:, 0]
        if pattern is None:
            pattern = torch.zeros(n, dtype=torch.long, device=mine.device)
        counts = self.pattern[mine].bincount(minlength=int(pattern.max()) + 1)
        first, each = counts.cumsum(0) - counts, counts[pattern]
        row = torch.arange(n, device=mine.device).repeat_interleave(each)
        turn = torch.arange(len(row), device=mine.device) - (each.cumsum(0) - each).repeat_interleave(each)
        return row, self.which[mine[first[pattern[row]] + turn]]


def components(data: Data, patterns: Tensor, pattern: Tensor | None) -> Components:
    """The components of all rows, those of few configurations first.

    Args:
        data: What is observed, and how it is tied.
        patterns: ``[P, V]`` sets of nodes that are open.
        pattern: ``[N]`` the number of that of each row; None where there is one.
    """
    scopes, n = data.scopes, len(data.codes)
    device, width = patterns.device, patterns.shape[1]
    member = torch.zeros(len(scopes), width, device=device)
    for t, scope in enumerate(scopes.values()):
        member[t, list(scope)] = 1.0
    tied = {pair for scope in scopes.values() for pair in itertools.permutations(scope, 2)}
    links = torch.tensor(sorted(tied), dtype=torch.long, device=device).reshape(-1, 2).mT
    turn = torch.arange(width, device=device)
    sets, numbers, places, count = [], [], [], 0
    for start, some in _pieces(patterns, _ROOM // (1 + width + links.shape[1])):
        label = _labels(some, links)
        number, node = (label == turn).nonzero(as_tuple=True)
        own, place = distinct_rows(label[number] == node.unsqueeze(-1))
        sets.append(own)
        numbers.append(number + start)
        places.append(place + count)
        count += len(own)
    nodes, again = distinct_rows(torch.cat(sets))
    which, number = again[torch.cat(places)], torch.cat(numbers)
    configurations = torch.where(nodes, torch.tensor(data.sizes, dtype=torch.float64, device=device), 1.0).prod(-1)
    order = configurations.argsort(stable=True)
    nodes, configurations = nodes[order], configurations[order]
    which = order.argsort()[which]
    tables = nodes.to(member.dtype) @ member.mT > 0
    around = (tables.to(member.dtype) @ member > 0) & ~nodes
    each = torch.full((1,), n, device=device) if pattern is None else pattern.bincount(minlength=len(patterns))
    rows = torch.zeros(len(nodes), dtype=torch.long, device=device).index_add(0, which, each[number])
    return Components(nodes, tables, around, number, which, configurations, rows)


def _pieces(value: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, step)
    return ((start, value[start : start + step]) for start in range(0, len(value), step))


def _labels(open_nodes: Tensor, links: Tensor) -> Tensor:
    """For sets of nodes ``[P, V]`` the lowest node that each is tied to, V for those not in the set.

    Labels of neighbours pass on, and labels of labels are followed, until nothing changes: after a number of steps that
    goes with the logarithm of the longest path.

    Source: Y. Zhang, A. Azad, Z. Hu (2020), on components by minimal labels.
    """
    width = open_nodes.shape[1]
    label = torch.where(open_nodes, torch.arange(width, device=open_nodes.device), width)
    while True:
        near = label.index_select(1, links[0])
        low = label.scatter_reduce(1, links[1].expand_as(near), near, "amin")
        low = torch.where(open_nodes, low, width)
        low = torch.nn.functional.pad(low, (0, 1), value=width).gather(1, low)
        if torch.equal(low, label):
            return label
        label = low


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of ``[n, V]`` Booleans, and which of them each is."""
    place, count = distinct(rows.unbind(-1), [2] * rows.shape[1], rows[:, 0])
    first = torch.zeros(count, dtype=torch.long, device=rows.device)
    return rows[first.scatter_(0, place, torch.arange(len(rows), device=rows.device))], place


def pooled(data: Data, found: Components, chosen: Tensor, pattern: Tensor | None, budget: int | None) -> Iterator[Pool]:
    """Pools, each within the budget, of the chosen components ``[S]`` of all rows."""
    for own, shared in found.classes(chosen, data):
        bunch = torch.where(own, (torch.where(own, found.rows, 0).cumsum(0) - 1) // _ROOM, -1)
        for number in bunch[own].unique().tolist():
            yield from _pools(data, found, *cases(data, found, bunch == number, pattern, shared), shared, budget)


def cases(
    data: Data, found: Components, wanted: Tensor, pattern: Tensor | None, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of some components ``[S]``: those rows, whose components, which cases; and the first row of each case.

    Cases are in the order of their components, and rows in that of their cases. Those that agree around a component are
    one, if it is to be ``shared``.
    """
    row, which = found.owners(wanted, pattern, len(data.codes))
    if shared:
        around = found.around.mT
        columns = (torch.where(own[which], data.codes[:, v][row], 0) for v, own in enumerate(around))
        sizes = [len(found.nodes), *(size + 1 for size in data.sizes)]
        place, size = distinct(itertools.chain([which], columns), sizes, row)
    else:
        place, size = which, len(row)
    order = place.argsort(stable=True)
    row, which, place = row[order], which[order], place[order]
    if not shared:
        place = torch.arange(size, device=row.device)
    return row, which, place, torch.nn.functional.pad(place.diff().nonzero()[:, 0] + 1, (1, 0))


def _pools(
    data: Data,
    found: Components,
    row: Tensor,
    which: Tensor,
    place: Tensor,
    first: Tensor,
    shared: bool,
    budget: int | None,
) -> Iterator[Pool]:
    """The pools of some cases; one has those of as many configurations, which come in order."""
    size = len(first)
    lists, counts = found.configurations[which[first]].unique_consecutive(return_counts=True)
    start = 0
    for configurations, count in zip(lists.to(torch.long).tolist(), counts.tolist(), strict=True):
        step = rows_per_piece(32 * configurations, row.device, budget)
        for low in range(start, start + count, step):
            high = min(low + step, start + count)
            own = slice(int(first[low]), int(first[high]) if high < size else len(row))
            rows, places = row[own].to(torch.int32), (place[own] - low).to(torch.int32) if shared else None
            cells = _cells(data, found, row[first[low:high]], which[first[low:high]], configurations)
            weight = summed(data.weight, rows, places, high - low)
            yield Pool(rows, places, high - low, weight, configurations, dict(cells))
        start += count


def _cells(
    data: Data, found: Components, row: Tensor, which: Tensor, configurations: int
) -> Iterator[tuple[str, Cells]]:
    """Where cases find their tables: those of some rows, each with one of its components."""
    present, states, sizes = found.tables[which].mT, data.codes[row].mT.contiguous(), data.sizes
    some = present.any(-1).tolist()
    # Nodes as the digits of a configuration's number: ties of the best go to the lowest states of the first nodes.
    wide = torch.where(found.nodes, torch.tensor(sizes, device=row.device), 1)
    step = torch.where(found.nodes, wide.flip(-1).cumprod(-1).flip(-1) // wide, 0).mT
    turn = torch.arange(configurations, device=row.device)
    for t, (name, scope) in enumerate(data.scopes.items()):
        # A table with a node that need not be known is zero.
        mine = functools.reduce(operator.and_, (states[v] < sizes[v] for v in scope), present[t]) if some[t] else None
        own = row[:0] if mine is None else mine.nonzero()[:, 0]
        if not len(own):
            continue
        kind = which[own]
        digits = [step[v][kind] for v in scope]
        place, kinds = distinct(digits, [configurations + 1] * len(scope), own)
        first = torch.zeros(kinds, dtype=torch.long, device=own.device)
        first = first.scatter_(0, place, torch.arange(len(own), device=own.device))
        base, offset = row[own] if name in data.rowwise else torch.zeros_like(own), torch.zeros_like(turn)
        for v, digit in zip(scope, digits, strict=True):
            one = digit[first].unsqueeze(-1)
            moved = torch.where(one > 0, turn // one.clamp(min=1) % sizes[v], 0)
            base, offset = base * sizes[v] + states[v][own].clamp(min=0), offset * sizes[v] + moved
        yield name, Cells(own.to(torch.int32), len(own) == len(row), base, place.to(torch.int32), offset)


def distinct(columns: Iterable[Tensor], sizes: Sequence[int], like: Tensor) -> tuple[Tensor, int]:
    """Which distinct row each row of ``[n, F]`` is, by its columns, in their order; and how many of these there are.

    Args:
        columns: F of ``[n]``, whole numbers from 0.
        sizes: More than the numbers of each.
        like: ``[n]``, for the shape.
    """
    key, most = torch.zeros_like(like, dtype=torch.long), 1
    for column, size in zip(columns, sizes, strict=True):
        if most * size > 1 << 60:
            key, most = key.unique(return_inverse=True)[1], len(key)
        key, most = key * size + column, most * size
    if most > max(TOGETHER, 4 * len(key)):
        values, place = key.unique(return_inverse=True)
        return place, len(values)
    present = torch.zeros(most, dtype=torch.bool, device=key.device)
    present[key] = True
    return (present.cumsum(0) - 1)[key], int(present.sum())
