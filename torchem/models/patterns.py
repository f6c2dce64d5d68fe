"""Inference in a product of tables over discrete nodes, row by row, with the work that rows share done once.

What is observed of a row cuts the nodes that are not into components that know nothing of each other. The posterior of
one depends on the observed nodes around it alone: rows that agree there share it, whatever else they are, and whatever
else is missing of them. A `Part` is one such component with all of its rows.
"""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchem.batch import values_known
from torchem.errors import invalid
from torchem.model import EStep, Reduction, Uniforms
from torchem.ops import eliminate, reduce
from torchem.ops.dispatch import rows_per_piece
from torchem.ops.eliminate import Order, Scope

#: Entries of the largest table that exact inference may build for a row.
LIMIT = 1 << 20
#: Configurations of a component up to which they are listed, rather than eliminated one node after the other.
_LISTED = 64
#: Configurations of observed nodes up to which tables that need no inference are looked up together.
_TOGETHER = 4096
#: What a mean field takes for the logarithm of zero on its way: it may set out from where nothing is possible.
_BARRED = -1e4


@dataclass(frozen=True, eq=False)
class Member:
    """A table in a part: which of its axes were observed, and in which states.

    Attributes:
        name: Of the table.
        axes: Its axes, those observed first.
        known: How many of them were observed.
        hidden: The nodes of the others.
        code: ``[U]`` joint state of those observed; None where there are none.
        extra: Whether one of these need not be known: each has then a state more, where the table is zero.
    """

    name: str
    axes: tuple[int, ...]
    known: int
    hidden: Scope
    code: Tensor | None
    extra: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """Nodes that some rows leave open and that are tied to each other, with all tables that they stand in.

    Attributes:
        order: How to eliminate them.
        members: The tables.
        rows: ``[n]`` numbers of the rows; None for all.
        place: ``[n]`` which of the U cases each row is; None where each is its own.
        size: U.
        weight: ``[U]`` weight of the rows of each case.
        first: ``[U]`` a row of each case; None where each row is its own and all are there.
        fields: Where mean fields ended, by kind: of which replicas, and q of each node.
    """

    order: Order
    members: tuple[Member, ...]
    rows: Tensor | None
    place: Tensor | None
    size: int
    weight: Tensor
    first: Tensor | None
    fields: dict[Any, tuple[tuple[int, ...], list[Tensor]]] = field(default_factory=dict)

    def spread(self, value: Tensor, lead: int, n: int) -> Tensor:
        """What belongs to each case ``[*r, U, …]`` for each of ``n`` rows, zero for those of other parts."""
        if self.place is not None:
            value = value.index_select(lead, self.place)
        if self.rows is None:
            return value
        shape = (*value.shape[:lead], n, *value.shape[lead + 1 :])
        return value.new_zeros(shape).index_add(lead, self.rows, value)

    def merged(self, weight: Tensor) -> Tensor:
        """Weights ``[*r, N]`` of rows as those of the cases, ``[*r, U]``."""
        weight = weight if self.rows is None else weight.index_select(-1, self.rows)
        if self.place is None:
            return weight
        return weight.new_zeros(*weight.shape[:-1], self.size).index_add(-1, self.place, weight)

    def cut(self, start: int, stop: int) -> "Part":
        """Some of the cases, for the arithmetic alone."""
        if start == 0 and stop >= self.size:
            return self
        index = torch.arange(self.size, device=self.weight.device) if self.first is None else self.first
        members = tuple(replace(m, code=None if m.code is None else m.code[start:stop]) for m in self.members)
        return replace(self, members=members, size=min(stop, self.size) - start, first=index[start:stop])


def plan(
    codes: Tensor,
    sizes: Sequence[int],
    scopes: Mapping[str, Scope],
    rowwise: frozenset[str],
    weight: Tensor | None,
    *,
    merge: bool,
    limit: int | None,
) -> list[Part]:
    """The parts of a batch.

    Args:
        codes: ``[N, V]`` states of the nodes, −1 where one is not observed, and one more than the last where it need
            not be known: tables are then zero.
        sizes: States of each node.
        scopes: Nodes of each table.
        rowwise: Tables that differ from row to row.
        weight: ``[N]`` weights of the rows.
        merge: Whether rows may share their posterior, which draws may not.
        limit: Most entries of a table on the way, if there is a limit.

    Raises:
        InvalidArgument: If a part takes more than that.
    """
    n = len(codes)
    if not n:
        return []
    mass = torch.ones(n, dtype=torch.float64, device=codes.device) if weight is None else weight
    patterns, pattern = _patterns(codes < 0)
    found: dict[tuple[Scope, tuple[str, ...]], list[int]] = {}
    for number, hidden in enumerate(patterns):
        for key in _components(hidden, scopes):
            found.setdefault(key, []).append(number)
    groups: dict[tuple[int, ...], list[str]] = {}
    parts = []
    for (hidden, names), numbers in found.items():
        if not hidden and not rowwise.intersection(names):
            groups.setdefault(tuple(numbers), []).extend(names)
            continue
        rows = _rows(numbers, len(patterns), pattern)
        parts.append(_part(hidden, names, rows, codes, sizes, scopes, rowwise, mass, merge, limit))
    for numbers, names in groups.items():
        rows = _rows(list(numbers), len(patterns), pattern)
        parts += [
            _part((), some, rows, codes, sizes, scopes, rowwise, mass, merge, limit)
            for some in _together(names, scopes, sizes)
        ]
    return parts


def blind(n: int, sizes: Sequence[int], scopes: Mapping[str, Scope], weight: Tensor, limit: int | None) -> list[Part]:
    """The parts where no state can be looked at: all nodes are open, and tables of what was observed close them."""
    found = []
    for hidden, names in _components(tuple(range(len(sizes))), scopes):
        members = tuple(_member(name, scopes[name], hidden, None, sizes) for name in names)
        found.append(Part(check_order(hidden, scopes, sizes, limit), members, None, None, n, weight, None))
    return found


def _patterns(missing: Tensor) -> tuple[list[Scope], Tensor | None]:
    """Which sets of nodes rows leave open, and the number of that of each row; None where there is one."""
    if bool((missing == missing[:1]).all()):
        return [tuple(missing[0].nonzero()[:, 0].tolist())], None
    if missing.shape[1] < 63:
        bits = 1 << torch.arange(missing.shape[1], device=missing.device)
        key, pattern = (missing * bits).sum(-1).unique(return_inverse=True)
        rows = (key.unsqueeze(-1) & bits) != 0
    else:
        rows, pattern = missing.unique(dim=0, return_inverse=True)
    return [tuple(v for v, out in enumerate(row) if out) for row in rows.tolist()], pattern


def _components(hidden: Scope, scopes: Mapping[str, Scope]) -> list[tuple[Scope, tuple[str, ...]]]:
    """Nodes that tables tie together, with these; and, with no node, each table that is observed as a whole."""
    open_nodes, owner = set(hidden), {v: v for v in hidden}

    def root(v: int) -> int:
        while owner[v] != v:
            owner[v] = owner[owner[v]]
            v = owner[v]
        return v

    left: list[tuple[Scope, tuple[str, ...]]] = []
    touching: list[tuple[str, int]] = []
    for name, scope in scopes.items():
        members = [v for v in scope if v in open_nodes]
        if not members:
            left.append(((), (name,)))
            continue
        touching.append((name, members[0]))
        for v in members[1:]:
            owner[root(v)] = root(members[0])
    nodes: dict[int, list[int]] = {}
    for v in hidden:
        nodes.setdefault(root(v), []).append(v)
    names: dict[int, list[str]] = {key: [] for key in nodes}
    for name, v in touching:
        names[root(v)].append(name)
    return [*((tuple(nodes[key]), tuple(names[key])) for key in nodes), *left]


def _together(names: Sequence[str], scopes: Mapping[str, Scope], sizes: Sequence[int]) -> list[tuple[str, ...]]:
    """Tables in groups whose nodes have few joint states."""
    groups: list[tuple[set[int], list[str]]] = []
    for name in names:
        scope = set(scopes[name])
        for nodes, group in groups:
            if math.prod(sizes[v] for v in nodes | scope) <= _TOGETHER:
                nodes |= scope
                group.append(name)
                break
        else:
            groups.append((scope, [name]))
    return [tuple(group) for _, group in groups]


def _rows(numbers: list[int], patterns: int, pattern: Tensor | None) -> Tensor | None:
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


def _part(
    hidden: Scope,
    names: tuple[str, ...],
    rows: Tensor | None,
    codes: Tensor,
    sizes: Sequence[int],
    scopes: Mapping[str, Scope],
    rowwise: frozenset[str],
    mass: Tensor,
    merge: bool,
    limit: int | None,
) -> Part:
    around = sorted({v for name in names for v in scopes[name]} - set(hidden))
    own = codes if rows is None else codes[rows]
    place: Tensor | None = None
    first, size = rows, len(own)
    if merge and not rowwise.intersection(names):
        place, size = _cases(own[:, around], [sizes[v] + 1 for v in around])
        turn = torch.arange(len(own), device=codes.device)
        first = torch.zeros(size, dtype=torch.long, device=codes.device).scatter_(0, place, turn)
        own = own[first]
        first = first if rows is None else rows[first]
        # Half the memory: one of these is kept for each row as long as the data are.
        place = place.to(torch.int32)
    members = tuple(_member(name, scopes[name], hidden, own, sizes) for name in names)
    order = check_order(hidden, {name: scopes[name] for name in names}, sizes, limit)
    part = Part(order, members, rows, place, size, mass, first)
    return replace(part, weight=part.merged(mass))


def _cases(codes: Tensor, sizes: Sequence[int]) -> tuple[Tensor, int]:
    """Which distinct row each row ``[n, F]`` is, and how many of these there are."""
    key, most = torch.zeros(len(codes), dtype=torch.long, device=codes.device), 1
    for column, size in zip(codes.unbind(-1), sizes, strict=True):
        if most * size > 1 << 60:
            key, most = key.unique(return_inverse=True)[1], len(codes)
        key, most = key * size + column, most * size
    if most > max(_TOGETHER, 4 * len(codes)):
        values, place = key.unique(return_inverse=True)
        return place, len(values)
    present = torch.zeros(most, dtype=torch.bool, device=codes.device)
    present[key] = True
    return (present.cumsum(0) - 1)[key], int(present.sum())


def _member(name: str, scope: Scope, hidden: Scope, codes: Tensor | None, sizes: Sequence[int]) -> Member:
    known = [i for i, v in enumerate(scope) if v not in hidden]
    rest = [i for i, v in enumerate(scope) if v in hidden]
    code: Tensor | None = None
    extra = False
    if known and codes is not None:
        extra = any(bool((codes[:, scope[i]] == sizes[scope[i]]).any()) for i in known)
        code = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        for i in known:
            code = code * (sizes[scope[i]] + extra) + codes[:, scope[i]]
    return Member(name, (*known, *rest), len(known), tuple(scope[i] for i in rest), code, extra)


# ---- tables of a part -----------------------------------------------------------------------------------------------


def _gathered(value: Tensor, member: Member, part: Part, lead: int) -> Tensor:
    """A table ``[*r, 1 or N, *scope]`` at what was observed, ``[*r, U or 1, *hidden]``."""
    shared = value.shape[lead] == 1
    if not shared and part.first is not None:
        value = value.index_select(lead, part.first)
    value = value.permute(*range(lead + 1), *(lead + 1 + axis for axis in member.axes))
    rest = value.shape[lead + 1 + member.known :]
    if member.extra:
        value = torch.nn.functional.pad(value, (0, 0) * len(rest) + (0, 1) * member.known)
    value = value.reshape(*value.shape[: lead + 1], -1, *rest)
    if member.code is None:
        return value.squeeze(lead + 1)
    if shared:
        return value.squeeze(lead).index_select(lead, member.code)
    index = member.code.reshape(-1, *[1] * (1 + len(rest))).expand(*value.shape[: lead + 1], 1, *rest)
    return value.gather(lead + 1, index).squeeze(lead + 1)


def _scattered(value: Tensor, member: Member, sizes: Sequence[int], lead: int, total: bool) -> Tensor:
    """Expectations ``[*r, U, *hidden]`` as those of the table, ``[*r, U, *scope]``, or their ``total``, U = 1."""
    known, rest = [size + member.extra for size in sizes[: member.known]], value.shape[lead + 1 :]
    wide = math.prod(known)
    if total and member.code is not None:
        value = value.new_zeros(*value.shape[:lead], wide, *rest).index_add(lead, member.code, value).unsqueeze(lead)
    elif total:
        value = value.sum(lead, keepdim=True).unsqueeze(lead + 1)
    elif member.code is not None:
        index = member.code.reshape(-1, *[1] * (1 + len(rest))).expand(*value.shape[: lead + 1], 1, *rest)
        blank = value.new_zeros(*value.shape[: lead + 1], wide, *rest)
        value = blank.scatter(lead + 1, index, value.unsqueeze(lead + 1))
    else:
        value = value.unsqueeze(lead + 1)
    value = value.reshape(*value.shape[: lead + 1], *known, *rest)
    if member.extra:
        value = value[(..., *(slice(size - 1) for size in known), *(slice(None) for _ in rest))]
    back = sorted(range(len(member.axes)), key=member.axes.__getitem__)
    return value.permute(*range(lead + 1), *(lead + 1 + i for i in back))


# ---- inference ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanField:
    """Posteriors in which all nodes are independent, by coordinate ascent.

    Attributes:
        tolerance: Rise of the bound of a case, in nats, below which its ascent is over.
        max_sweeps: Most updates of all nodes.
    """

    tolerance: float
    max_sweeps: int


@dataclass(frozen=True)
class Inference:
    """Sums over what is open, part by part.

    Attributes:
        scopes: Nodes of each table.
        sizes: States of each node.
        replicas: The replica axes.
        n: Number of rows.
        dtype: Of what belongs to rows.
        budget: Bytes that a piece of a part may take.
    """

    scopes: Mapping[str, Scope]
    sizes: Sequence[int]
    replicas: tuple[int, ...]
    n: int
    dtype: torch.dtype
    budget: int | None = None

    @property
    def lead(self) -> int:
        """Number of replica axes."""
        return len(self.replicas)

    def log_partition(self, potentials: Mapping[str, Tensor], parts: Sequence[Part], plus: Reduction) -> Tensor:
        """log Σ exp Σ potentials of each row, ``[*r, N]``, by elimination: what all else is the gradient of."""
        total = self._blank(potentials)
        for part in parts:
            found = []
            for piece in self._pieces(part):
                tables = [(m.hidden, table) for m, table in self._tables(potentials, piece) if table is not None]
                found.append(self._wide(eliminate.log_sum(tables, part.order.variables, plus), piece))
            whole = found[0] if len(found) == 1 else torch.cat(found, self.lead)
            total = total + part.spread(whole.to(self.dtype), self.lead, self.n)
        return total

    def _blank(self, potentials: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(potentials.values()))
        return torch.zeros(*self.replicas, self.n, dtype=self.dtype, device=first.device)

    def _wide(self, value: Tensor, part: Part) -> Tensor:
        return value.expand(*value.shape[: self.lead], part.size, *value.shape[self.lead + 1 :])

    def _pieces(self, part: Part) -> list[Part]:
        """A part in pieces that keep within the budget."""
        cells = max(part.order.cells, min(self._cells(part.order), _LISTED))
        room = 32 * cells * (2 + len(part.order.variables)) + 8 * len(part.members)
        step = rows_per_piece(room, part.weight.device, self.budget)
        if step >= part.size:
            return [part]
        return [part.cut(start, start + step) for start in range(0, part.size, step)]

    def _cells(self, order: Order) -> int:
        return math.prod(self.sizes[v] for v in order.variables)

    def _tables(self, potentials: Mapping[str, Tensor], part: Part) -> list[tuple[Member, Tensor | None]]:
        """The tables of a part at what was observed; None for those that are only asked about.

        Cases that rows share bear large weights: their sums are taken in float64, which costs little.
        """
        shared = part.place is not None
        found: list[tuple[Member, Tensor | None]] = []
        for member in part.members:
            value = potentials.get(member.name)
            if value is not None:
                value = _gathered(value.to(torch.float64) if shared else value, member, part, self.lead)
            found.append((member, value))
        return found

    def run(
        self,
        potentials: Mapping[str, Tensor],
        parts: Sequence[Part],
        kind: EStep,
        weight: Tensor | None = None,
        uniforms: Uniforms | None = None,
        field: MeanField | None = None,
        keep: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log Z of each row and expectations: of tables weighted, and summed over rows unless they differ by rows.

        Args:
            potentials: ``[*r, 1 or N, *scope]`` of each table; a scope without one is asked about: its posterior is
                returned for each row, unweighted.
            parts: Of the batch.
            kind: ``"soft"``, or one configuration for each row: the best, or one that is drawn.
            weight: ``[*r, N]`` weights of rows in place of the batch's own.
            uniforms: Of the draws.
            field: Approximate the posterior by a mean field; log Z is then the bound.
            keep: Let mean fields set out from where they ended, and note where they end: for the replicas of these
                numbers.
        """
        log_z = self._blank(potentials)
        found: dict[str, Tensor] = {}
        for part in parts:
            mass = part.weight if weight is None else part.merged(weight)
            values: list[Tensor] = []
            per_row: dict[str, list[Tensor]] = {}
            for start, piece in self._numbered(part):
                tables = self._tables(potentials, piece)
                if field is None:
                    value, marginals = self._solve(piece, tables, kind, uniforms)
                else:
                    key = ("hard" if kind == "hard" else "soft", start)
                    warm = None if keep is None else self._resumed(part.fields.get(key), keep)
                    value, marginals, q = self._relax(piece, tables, kind, uniforms, field, warm)
                    if keep is not None:
                        part.fields[key] = (keep, [own if self.lead else own.unsqueeze(0) for own in q])
                values.append(self._wide(value, piece))
                own = mass[..., start : start + piece.size]
                for (member, table), marginal in zip(tables, marginals, strict=True):
                    self._take(member, table is not None, marginal, own, potentials, found, per_row)
            whole = values[0] if len(values) == 1 else torch.cat(values, self.lead)
            log_z = log_z + part.spread(whole.to(self.dtype), self.lead, self.n)
            for name, pieces in per_row.items():
                value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.lead)
                value = part.spread(value, self.lead, self.n)
                found[name] = value if name not in found else found[name] + value
        for name in self.scopes:
            if name not in found:
                found[name] = self._nothing(name, potentials.get(name), log_z)
        return log_z, found

    def _resumed(
        self, ended: tuple[tuple[int, ...], list[Tensor]] | None, keep: tuple[int, ...]
    ) -> list[Tensor] | None:
        """Where the mean fields of some replicas ended, if they all did."""
        if ended is None or not set(keep) <= set(ended[0]):
            return None
        place = [ended[0].index(number) for number in keep]
        return [own[place] if self.lead else own[place[0]] for own in ended[1]]

    def _nothing(self, name: str, value: Tensor | None, like: Tensor) -> Tensor:
        if value is not None:
            return torch.zeros_like(value)
        return like.new_zeros(*like.shape, *(self.sizes[v] for v in self.scopes[name]))

    def _numbered(self, part: Part) -> list[tuple[int, Part]]:
        pieces, start, found = self._pieces(part), 0, []
        for piece in pieces:
            found.append((start, piece))
            start += piece.size
        return found

    def _take(
        self,
        member: Member,
        given: bool,
        marginal: Tensor,
        mass: Tensor,
        potentials: Mapping[str, Tensor],
        found: dict[str, Tensor],
        per_row: dict[str, list[Tensor]],
    ) -> None:
        """Add the expectations of a member to those found."""
        lead, scope = self.lead, self.scopes[member.name]
        sizes = [self.sizes[scope[axis]] for axis in member.axes]
        if given:
            marginal = marginal * mass.reshape(*mass.shape, *[1] * len(member.hidden)).to(
                torch.float64 if potentials[member.name].shape[lead] == 1 else marginal.dtype
            )
        if given and potentials[member.name].shape[lead] == 1:
            value = _scattered(marginal, member, sizes, lead, True)
            found[member.name] = value if member.name not in found else found[member.name] + value
        else:
            value = _scattered(marginal.to(self.dtype), member, sizes, lead, False)
            per_row.setdefault(member.name, []).append(value)

    def _solve(
        self, part: Part, tables: list[tuple[Member, Tensor | None]], kind: EStep, uniforms: Uniforms | None
    ) -> tuple[Tensor, list[Tensor]]:
        """log Z of each case, and the posterior of each table's open nodes, one where nothing is open."""
        lead, variables = self.lead, part.order.variables
        given = [(member.hidden, table) for member, table in tables if table is not None]
        if not variables:
            nothing = torch.zeros(*self.replicas, part.size, dtype=self.dtype, device=part.weight.device)
            value = eliminate.added([nothing, *(table for _, table in given)])
            return value, [torch.ones_like(value)] * len(tables)
        if self._cells(part.order) > max(_LISTED, 4 * part.order.cells):
            return self._eliminated(part, tables, kind, uniforms)
        # In the order that elimination goes back in: ties of the best then end alike.
        target = variables[::-1]
        joint = eliminate.added([eliminate.aligned(table, scope, target) for scope, table in given])
        shape = [self.sizes[v] for v in target]
        joint = self._wide(joint.expand(*joint.shape[: lead + 1], *shape), part)
        flat = joint.reshape(*joint.shape[: lead + 1], -1)
        if kind == "hard":
            best = reduce.first_max(flat.detach())
            value = flat.gather(-1, best.unsqueeze(-1)).squeeze(-1)
            share = torch.nn.functional.one_hot(best, flat.shape[-1]).to(flat.dtype)
        else:
            value, share = reduce.responsibilities(flat)
            if kind == "sample":
                assert uniforms is not None
                drawn = reduce.draw(share, uniforms(value.shape).to(share))
                share = torch.nn.functional.one_hot(drawn, flat.shape[-1]).to(flat.dtype)
        share = share.reshape(*share.shape[:-1], *shape)
        return value, [_marginal(share, target, member.hidden, lead + 1) for member, _ in tables]

    def _eliminated(
        self, part: Part, tables: list[tuple[Member, Tensor | None]], kind: EStep, uniforms: Uniforms | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The same as the gradient of the sum."""
        sample = reduce.sampled(uniforms) if uniforms is not None else reduce.logsumexp
        plus = {"soft": reduce.logsumexp, "hard": reduce.maximum, "sample": sample}[kind]
        first = next(table for _, table in tables if table is not None)
        leading = (*first.shape[: self.lead], part.size)
        full = []
        for member, table in tables:
            shape = (*leading, *(self.sizes[v] for v in member.hidden))
            full.append(first.new_zeros(shape) if table is None else table.expand(shape))

        def total(*values: Tensor) -> Tensor:
            pairs = [(member.hidden, value) for (member, _), value in zip(tables, values, strict=True)]
            return eliminate.log_sum(pairs, part.order.variables, plus)

        value, pull, *_ = torch.func.vjp(total, *full)
        return value, list(pull(torch.where(value == -torch.inf, 0.0, 1.0).to(value)))

    # ---- mean field -------------------------------------------------------------------------------------------------

    def _relax(
        self,
        part: Part,
        tables: list[tuple[Member, Tensor | None]],
        kind: EStep,
        uniforms: Uniforms | None,
        field: MeanField,
        warm: list[Tensor] | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The bound E_q[Σ potentials] + H(q), the marginals of tables under q = Π q_v, and q itself.

        Each q_v in turn becomes ∝ exp E[Σ potentials] under the others, its best given them; a hard one its mode.

        Source: C. M. Bishop (2006), equation 10.9.
        """
        lead, variables = self.lead, part.order.variables
        given = [(member.hidden, table) for member, table in tables if table is not None]
        if not variables:
            value, ones = self._solve(part, tables, kind, uniforms)
            return value, ones, []
        like = given[0][1]
        leading = (*torch.broadcast_shapes(*(table.shape[:lead] for _, table in given)), part.size)
        bounded = [(scope, table.clamp(min=_BARRED)) for scope, table in given]
        # Not quite even: nodes that zeros tie to each other would have no way to decide for one state.
        q = {v: (-0.01 * torch.arange(self.sizes[v]).to(like)).softmax(-1).expand(*leading, -1) for v in variables}
        if warm is not None:
            q = {v: value.to(like) for v, value in zip(variables, warm, strict=True)}
        best: Tensor | None = None
        going = torch.ones(leading, dtype=torch.bool, device=like.device)
        for _ in range(field.max_sweeps):
            new = dict(q)
            for v in variables:
                terms = [_averaged(table, scope, new, (v,), lead) for scope, table in bounded if v in scope]
                logits = self._wide(eliminate.added(terms), part)
                if kind == "hard":
                    chosen = reduce.first_max(logits.detach())
                    new[v] = torch.nn.functional.one_hot(chosen, logits.shape[-1]).to(logits)
                else:
                    new[v] = reduce.responsibilities(logits)[1]
            q = {v: torch.where(going.unsqueeze(-1), new[v], q[v]) for v in variables}
            value = self._bound(bounded, q, part)
            if best is not None:
                going = going & (value.detach() - best > field.tolerance)
                if values_known() and not bool(going.any()):
                    break
            best = value.detach()
        value = self._bound(bounded, q, part)
        for scope, table in given:
            # What is impossible may have no mass in the end.
            mass = _averaged((table == -torch.inf).to(table.dtype), scope, q, (), lead)
            value = torch.where(self._wide(mass, part) > 0, -torch.inf, value)
        states = q
        if kind == "sample":
            assert uniforms is not None
            states = {v: reduce.draw(p, uniforms(p.shape[:-1]).to(p)) for v, p in q.items()}
            states = {v: torch.nn.functional.one_hot(z, self.sizes[v]).to(q[v]) for v, z in states.items()}
        marginals = [_independent(states, member.hidden, leading, like) for member, _ in tables]
        return value, marginals, [q[v].detach() for v in variables]

    def _bound(self, tables: list[tuple[Scope, Tensor]], q: dict[int, Tensor], part: Part) -> Tensor:
        total = eliminate.added([_averaged(table, scope, q, (), self.lead) for scope, table in tables])
        entropy = [torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), 0.0).sum(-1) for p in q.values()]
        return self._wide(total, part) - functools.reduce(operator.add, entropy)


def _marginal(share: Tensor, nodes: Scope, wanted: Scope, lead: int) -> Tensor:
    """Sums ``[…, *wanted]`` of a joint posterior ``[…, *nodes]``."""
    left = tuple(v for v in nodes if v in wanted)
    out = tuple(lead + i for i, v in enumerate(nodes) if v not in wanted)
    share = share.sum(out) if out else share
    return share.permute(*range(lead), *(lead + left.index(v) for v in wanted))


def _averaged(table: Tensor, scope: Scope, q: Mapping[int, Tensor], wanted: Scope, lead: int) -> Tensor:
    """E_q of a table ``[*r, U, *scope]`` over all nodes but those wanted."""
    for axis in reversed(range(len(scope))):
        if scope[axis] not in wanted:
            value = q[scope[axis]]
            shape = [1] * len(scope)
            shape[axis] = value.shape[-1]
            kept = [size for i, size in enumerate(shape) if i <= axis or scope[i] in wanted]
            table = (table * value.reshape(*value.shape[: lead + 1], *kept)).sum(lead + 1 + axis)
    return table


def _independent(q: Mapping[int, Tensor], scope: Scope, leading: tuple[int, ...], like: Tensor) -> Tensor:
    joint = like.new_ones(leading)
    for v in scope:
        value = q[v]
        joint = joint.unsqueeze(-1) * value.reshape(*leading, *[1] * (joint.dim() - len(leading)), value.shape[-1])
    return joint
