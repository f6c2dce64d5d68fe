"""Inference in the parts of a batch: by lists of configurations, by elimination, or by a mean field."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.batch import values_known
from torchem.model import EStep, Reduction, Uniforms
from torchem.models.patterns import Member, Part
from torchem.models.pools import Cases, Pool
from torchem.ops import eliminate, reduce
from torchem.ops.dispatch import rows_per_piece
from torchem.ops.eliminate import Order, Scope

#: Configurations of a component up to which they are listed, rather than eliminated one node after the other.
_LISTED = 64
#: What a mean field takes for the logarithm of zero on its way: it may set out from where nothing is possible.
_BARRED = -1e4


# ---- tables of a part -----------------------------------------------------------------------------------------------


def _gathered(value: Tensor, member: Member, part: Part, lead: int) -> Tensor:
    """A table ``[*r, 1 or N, *scope]`` at what was observed, ``[*r, U or 1, *hidden]``."""
    shared = value.shape[lead] == 1
    if not shared and part.first is not None:
        value = value.index_select(lead, part.first)
    value = value.permute(*range(lead + 1), *(lead + 1 + axis for axis in member.axes))
    rest = value.shape[lead + 1 + member.known :]
    value = value.reshape(*value.shape[: lead + 1], -1, *rest)
    if member.extra:
        value = torch.nn.functional.pad(value, (0, 0) * len(rest) + (0, 1))
    if member.code is None:
        return value.squeeze(lead + 1)
    if shared:
        return value.squeeze(lead).index_select(lead, member.code)
    index = member.code.reshape(-1, *[1] * (1 + len(rest))).expand(*value.shape[: lead + 1], 1, *rest)
    return value.gather(lead + 1, index).squeeze(lead + 1)


def _scattered(value: Tensor, member: Member, sizes: Sequence[int], lead: int, total: bool) -> Tensor:
    """Expectations ``[*r, U, *hidden]`` as those of the table, ``[*r, U, *scope]``, or their ``total``, U = 1."""
    known, rest = sizes[: member.known], value.shape[lead + 1 :]
    wide = math.prod(known) + member.extra
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
    value = value.narrow(lead + 1, 0, wide - member.extra).reshape(*value.shape[: lead + 1], *known, *rest)
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

    def log_partition(self, potentials: Mapping[str, Tensor], parts: Sequence[Part | Pool], plus: Reduction) -> Tensor:
        """log Σ exp Σ potentials of each row, ``[*r, N]``, by elimination: what all else is the gradient of."""
        total = self._blank(potentials)
        for part in parts:
            if isinstance(part, Pool):
                value = plus(part.joint(potentials, self.replicas, self._precision(part)), -1)
                total = part.add(total, value.to(self.dtype), self.lead)
                continue
            found = []
            for piece in self._pieces(part):
                tables = self._given(piece, self._tables(potentials, piece))
                found.append(self._wide(eliminate.log_sum(tables, part.order.variables, plus), piece))
            whole = found[0] if len(found) == 1 else torch.cat(found, self.lead)
            total = part.add(total, whole.to(self.dtype), self.lead)
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
        """The tables of a part at what was observed; None for those that are only asked about."""
        found: list[tuple[Member, Tensor | None]] = []
        for member in part.members:
            value = potentials.get(member.name)
            if value is not None:
                value = _gathered(value.to(self._precision(part)), member, part, self.lead)
            found.append((member, value))
        return found

    def _given(self, part: Part, tables: list[tuple[Member, Tensor | None]]) -> list[tuple[Scope, Tensor]]:
        """The tables of a part that are not only asked about, and what cases know of nodes that others leave open."""
        found = [(member.hidden, table) for member, table in tables if table is not None]
        for v, code in part.closed.items():
            size = self.sizes[v]
            state = torch.arange(size, device=code.device)
            possible = (code.unsqueeze(-1) == state) | (code == size).unsqueeze(-1)
            blank = torch.zeros(possible.shape, dtype=self._precision(part), device=code.device)
            found.append(((v,), torch.where(possible, blank, -torch.inf)[(None,) * self.lead]))
        return found

    def _precision(self, part: Cases) -> torch.dtype:
        """Cases that rows share bear large weights: their sums are taken in float64, which costs little."""
        return self.dtype if part.place is None else torch.float64

    def run(
        self,
        potentials: Mapping[str, Tensor],
        parts: Sequence[Part | Pool],
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
            if isinstance(part, Pool):
                log_z = part.add(log_z, self._list(part, potentials, kind, mass, uniforms, found), self.lead)
                continue
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
            log_z = part.add(log_z, whole.to(self.dtype), self.lead)
            for name, pieces in per_row.items():
                value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.lead)
                found[name] = part.add(found.get(name, self._rows_of(value)), value, self.lead)
        for name in self.scopes:
            if name not in found:
                found[name] = self._nothing(name, potentials.get(name), log_z)
        return log_z, found

    def _rows_of(self, value: Tensor) -> Tensor:
        """Zeros for all rows, for what a part knows of its cases, ``[*r, U, …]``."""
        return value.new_zeros(*value.shape[: self.lead], self.n, *value.shape[self.lead + 1 :])

    def _list(
        self,
        pool: Pool,
        potentials: Mapping[str, Tensor],
        kind: EStep,
        mass: Tensor,
        uniforms: Uniforms | None,
        found: dict[str, Tensor],
    ) -> Tensor:
        """log Z of each case of a pool; its expectations are added to those found."""
        lead = self.lead
        value, share = _chosen(pool.joint(potentials, self.replicas, self._precision(pool)), kind, uniforms)
        heavy = share * mass.unsqueeze(-1)
        for name, cells in pool.tables.items():
            given, shape = potentials.get(name), [self.sizes[v] for v in self.scopes[name]]
            if given is None:
                each = pool.each(name, share.to(self.dtype), math.prod(shape), lead).unflatten(-1, shape)
                found[name] = pool.add(found.get(name, self._rows_of(each)), each, lead)
                continue
            rows = given.shape[lead]
            counts = cells.counted(heavy, rows * math.prod(shape), lead).unflatten(lead, (rows, *shape))
            counts = counts if rows == 1 else counts.to(self.dtype)
            found[name] = counts if name not in found else found[name] + counts
        return value.to(self.dtype)

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
        given = self._given(part, tables)
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
        value, share = _chosen(flat, kind, uniforms)
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

        closed = self._given(part, [])

        def total(*values: Tensor) -> Tensor:
            pairs = [(member.hidden, value) for (member, _), value in zip(tables, values, strict=True)]
            return eliminate.log_sum([*pairs, *closed], part.order.variables, plus)

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
        given = self._given(part, tables)
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


def _chosen(joint: Tensor, kind: EStep, uniforms: Uniforms | None) -> tuple[Tensor, Tensor]:
    """log Z and the posterior of all configurations ``[…, C]``: the whole of it, its mode, or a draw."""
    if kind == "hard":
        best = reduce.first_max(joint.detach())
        value = joint.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        return value, torch.nn.functional.one_hot(best, joint.shape[-1]).to(joint.dtype)
    value, share = reduce.responsibilities(joint)
    if kind == "sample":
        assert uniforms is not None
        drawn = reduce.draw(share, uniforms(value.shape).to(share))
        share = torch.nn.functional.one_hot(drawn, joint.shape[-1]).to(joint.dtype)
    return value, share


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
