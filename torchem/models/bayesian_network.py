"""Bayesian networks: a directed graph of discrete nodes, any of them hidden, with continuous leaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import (
    InvalidArgument,
    InvalidEntry,
    InvalidFile,
    invalid,
    invalid_entry,
    one_of,
    whole_number,
)
from torchem.factor import Factor, Kernel, Moments
from torchem.factors import Categorical
from torchem.factors._tables import SMOOTH, apart
from torchem.model import DiscreteModel, EStep, Reduction, Uniforms, weighted
from torchem.models import bif
from torchem.models.elimination import Inference, MeanField
from torchem.models.imputation import Completing, Gaps, complete, floating, in_turn, kinds_of
from torchem.models.nodes import (
    Columns,
    Conditionals,
    Leaf,
    LeafPass,
    Tables,
    checked_edges,
    checked_hidden,
    checked_leaves,
    checked_sizes,
    checked_states,
    known_node,
    names_of,
    topological,
)
from torchem.models.patterns import LIMIT, Part, blind, plan
from torchem.models.pools import Data, Pool
from torchem.models.unseen import Among, Beside, Names, Unseen
from torchem.ops import reduce
from torchem.ops.eliminate import Scope
from torchem.stats import Stats

#: How the posterior of the hidden nodes is found.
Approximation = Literal["exact", "mean_field"]

#: Rows for each state of a node from which on those that show it beside others say how to start.
_TOLD = 5


class BayesianNetwork(Completing, DiscreteModel):
    """p(z, x) = Π_v p(z_v | z_pa(v)) Π_l p(x_l | z_pa(l)): discrete nodes in a directed graph, and continuous leaves.

    Any node may be hidden, in all rows or in some: NaN stands where it was not seen. E-step: what is open of a row
    falls into components, and the posterior of each table's nodes is the gradient of the component's log Z, by
    elimination of its nodes in an order of least fill. M-step: each table becomes its expected counts, normalised; a
    leaf is fitted under the posterior of its parents' joint states.

    So that the bound of a mean field never falls, its ascent in a fit sets out from where the last one on the same
    batch ended; a loader that makes new batches lets it set out anew.

    Columns of the data: the nodes that are not ``hidden``, in the order of ``cardinalities``, states counted from 0;
    then those of the leaves. Labels of hidden nodes are whole numbers ``[N, H]`` (``[N]`` of one), −1 where unknown, or
    tables ``[N, ΣK_h]`` of the states of all of them in turn.

    Args:
        cardinalities: Number of states of each node, by name.
        edges: Pairs ``(parent, child)``.
        hidden: Nodes that no column is given for.
        leaves: Observed children of discrete nodes, by name: their parents, and a factor with a component for each
            joint state of these, the last parent's running fastest; such as ``Gaussian(4, 1)``, or a regression on
            ``inputs``, ``LinearGaussian(4, M, 1)``.
        conditionals: Factors to stand for tables, by node: one factor for two nodes ties their tables; a gate such as
            ``SoftmaxRegression`` lets a node depend on ``inputs`` too. By default ``Categorical(*parents, states)``.
        states: Names of the states of nodes, for messages, pictures and files.
        inference: ``"exact"``, or ``"mean_field"``: q(z) = Π_v q(z_v) for what is open, by coordinate ascent; the
            objective is then the evidence lower bound. For networks whose cliques are too large.
        tolerance: Rise of the bound of a row, in nats, below which a mean field's ascent is over.
        max_sweeps: Most updates of all nodes in an ascent.

    Raises:
        InvalidArgument: For a graph with a cycle, unknown or repeated names, a factor that does not fit, or hidden
            nodes among which exact inference takes a table of more than 2^20 entries.

    Source: S. L. Lauritzen (1995), section 3; D. Koller, N. Friedman (2009), section 19.2.2.

    Example:
        >>> net = BayesianNetwork({"rain": 2, "wet": 2}, [("rain", "wet")], hidden=("rain",))
        >>> net.tables["rain"], net.tables["wet"] = [0.8, 0.2], [[0.9, 0.1], [0.2, 0.8]]
        >>> net.posterior("rain", {"wet": 1}).tolist()[0][1] > 0.6
        True
    """

    anneals: ClassVar[bool] = True

    def __init__(
        self,
        cardinalities: Mapping[str, int],
        edges: Sequence[Sequence[str]] = (),
        hidden: Sequence[str] = (),
        leaves: Mapping[str, tuple[Sequence[str], Factor]] | None = None,
        conditionals: Mapping[str, Factor] | None = None,
        states: Mapping[str, Sequence[str]] | None = None,
        inference: Approximation = "exact",
        tolerance: float = 1e-9,
        max_sweeps: int = 100,
    ):
        super().__init__()
        self.cardinalities = checked_sizes(cardinalities)
        self.edges = checked_edges(self.cardinalities, edges)
        self.hidden = checked_hidden(self.cardinalities, hidden)
        self.states = checked_states(self.cardinalities, states)
        one_of("inference", inference, ("exact", "mean_field"))
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise invalid("tolerance", "a finite number of at least 0", repr(tolerance), "the default is 1e-9 nats")
        whole_number("max_sweeps", max_sweeps, 1)
        self.inference: Approximation = inference
        self.tolerance, self.max_sweeps = float(tolerance), max_sweeps
        names = tuple(self.cardinalities)
        self._number = {name: v for v, name in enumerate(names)}
        self.parents = {name: tuple(a for a, b in self.edges if b == name) for name in names}
        self.topological = topological(self.parents)
        given, owned = dict(leaves or {}), dict(conditionals or {})
        for name in owned:
            known_node("conditionals", name, self.cardinalities)
        self._leaves = checked_leaves(self.cardinalities, given, len(names) - len(self.hidden))
        shapes = {name: tuple(self.cardinalities[p] for p in (*self.parents[name], name)) for name in names}
        self.conditionals = Conditionals([*names, *self._leaves], shapes)
        for name in names:
            if name not in owned and math.prod(shapes[name]) > LIMIT:
                raise invalid(
                    "edges", f"tables of at most {LIMIT} entries", f"one of {math.prod(shapes[name]):.3g} for {name}",
                    "give the node fewer parents, or put a hidden node between",
                )  # fmt: skip
            self.conditionals[name] = owned.get(name) or Categorical(*shapes[name])
        for name, leaf in self._leaves.items():
            self.conditionals[name] = given[name][1]
            self.parents[name] = leaf.parents
        if len(self.hidden) == len(names) and not self._leaves:
            raise invalid("hidden", "at least one node that is observed", "all of them", "leave one out")
        self._sizes = tuple(self.cardinalities.values())
        self._columns = tuple(v for v, name in enumerate(names) if name not in self.hidden)
        self._latent = tuple(self._number[name] for name in self.hidden)
        self._scopes: dict[str, Scope] = {
            self.conditionals.slot(name): tuple(self._number[p] for p in self.parents[name])
            + ((self._number[name],) if name in self._number else ())
            for name in (*names, *self._leaves)
        }
        # Which replicas of those that a fit began with these are.
        self._lineage: tuple[int, ...] = (0,)
        # What starts of nodes that are never seen are drawn from.
        self._seeds = [0]
        self._owner = {self.conditionals.slot(name): v for name, v in self._number.items()}
        self._children = [[self._number[b] for a, b in self.edges if a == name] for name in names]
        self._tied = frozenset(self._number[p] for leaf in self._leaves.values() for p in leaf.parents)
        if inference == "exact":
            self._check_width()

    # ---- structure --------------------------------------------------------------------------------------------

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return tuple((self.conditionals.slot(name), factor) for name, factor in self.conditionals.items())

    def table_slots(self) -> frozenset[str]:
        return frozenset(self.conditionals.slot(name) for name in self.cardinalities)

    @property
    def tables(self) -> "Tables":
        """Conditional probabilities by node, ``[*r, *parents in the order of edges, states]``; assignable.

        Example:
            >>> net = BayesianNetwork({"A": 2, "B": 2}, [("A", "B")])
            >>> net.tables["B"] = [[1.0, 0.0], [0.3, 0.7]]
            >>> net.tables["B"].tolist()[0]
            [1.0, 0.0]
        """
        return Tables(self.conditionals, tuple(self.cardinalities))

    @property
    def leaves(self) -> dict[str, tuple[tuple[str, ...], Factor]]:
        """Continuous leaves by name: their parents and factors."""
        return {name: (leaf.parents, self.conditionals[name]) for name, leaf in self._leaves.items()}

    @property
    def absentable(self) -> int:
        """Every node's column: what is never seen is hidden."""
        return len(self._columns)

    # Read often: not by way of all slots.

    @property
    def dtype(self) -> torch.dtype:
        return self.conditionals[next(iter(self.cardinalities))].dtype

    @property
    def device(self) -> torch.device:
        return self.conditionals[next(iter(self.cardinalities))].device

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.conditionals[next(iter(self.cardinalities))].replicas

    @property
    def columns(self) -> list[str]:
        """What each column of the data holds: names of nodes, then of leaves."""
        nodes = list(self.cardinalities)
        return [nodes[v] for v in self._columns] + [name for name, leaf in self._leaves.items() for _ in leaf.columns]

    @property
    def n_components(self) -> int:
        """ΣK_h, the states of all hidden nodes: what a start tells apart."""
        return max(1, sum(self._sizes[v] for v in self._latent))

    @property
    def labelled(self) -> int | tuple[int, ...] | None:
        sizes = self._latent_sizes
        return sizes if len(sizes) > 1 else sizes[0] if sizes else None

    @property
    def _latent_sizes(self) -> tuple[int, ...]:
        return tuple(self._sizes[v] for v in self._latent)

    @property
    def handles_missing(self) -> bool:
        """True: of discrete nodes any, of leaves what their factor handles, or all of their columns."""
        return True

    def _check_width(self) -> None:
        """Refuse hidden nodes that exact inference cannot sum over, before there are data."""
        blank = torch.zeros(1, len(self._sizes), dtype=torch.long)
        blank[:, list(self._latent)] = -1
        codes = self._eased(blank, self._tied)
        plan(Data(codes, self._sizes, self._scopes, frozenset(), torch.ones(1), True), LIMIT, pool=False)

    @property
    def exact(self) -> bool:
        return self.inference == "exact"

    # ---- inference --------------------------------------------------------------------------------------------

    def _kernels(self, score: bool = False) -> dict[str, Kernel]:
        kernels = super()._kernels(score)
        for name, leaf in self._leaves.items():
            kernels[self.conditionals.slot(name)] = LeafPass(self.conditionals[name], leaf.columns, score)
        return kernels

    def _codes(self, x: Tensor) -> Tensor:
        """States of all nodes ``[N, V]``, −1 where one is not observed."""
        seen = x[:, : len(self._columns)].detach()
        seen = (seen.nan_to_num(nan=-1.0) if x.is_floating_point() else seen).to(torch.long)
        codes = torch.nn.functional.pad(seen, (0, 1), value=-1)
        place = [self._columns.index(v) if v in self._columns else -1 for v in range(len(self._sizes))]
        return codes[:, place]

    def _given(self, potentials: Mapping[str, Tensor], batch: Batch) -> tuple[dict[str, Tensor], dict[str, Scope]]:
        """All tables of a batch with their scopes: those of leaves along their parents, and what labels say."""
        lead, tables, scopes = len(self.replicas), dict(potentials), dict(self._scopes)
        for name in self._leaves:
            slot = self.conditionals.slot(name)
            tables[slot] = tables[slot].reshape(*tables[slot].shape[:-1], *(self._sizes[v] for v in scopes[slot]))
        if batch.evidence is not None:
            known = batch.evidence.split(self._latent_sizes, -1)
            for v, own in zip(self._latent, known, strict=True):
                tables[f"labels.{v}"] = own.to(self.dtype)[(None,) * lead]
                scopes[f"labels.{v}"] = (v,)
        return tables, scopes

    def _parts(
        self, batch: Batch, tables: dict[str, Tensor], scopes: dict[str, Scope], kept: frozenset[int], merge: bool,
        exact: bool,
    ) -> list[Part | Pool]:  # fmt: skip
        """The parts of a batch, without nodes that are needless unless they are ``kept``."""
        rowwise = frozenset(name for name, value in tables.items() if value.shape[len(self.replicas)] != 1)
        limit = LIMIT if exact else None

        def find() -> list[Part | Pool]:
            codes = self._eased(self._codes(batch.x), kept)
            data = Data(codes, self._sizes, scopes, rowwise, _mass(batch), merge)
            return plan(data, limit, self.memory_budget, pool=exact)

        # What is asked about once need not be remembered.
        if any(name not in tables for name in scopes):
            return find()
        key = ("network", tuple(scopes.items()), rowwise, self._sizes, kept, merge, limit, self.memory_budget)
        return batch.remember(key, find)

    def _needless(self, codes: Tensor, kept: frozenset[int]) -> list[Tensor]:
        """For each node the rows ``[N]`` that leave it open with all of its descendants: these sum to one.

        Left out, they add nothing to expected counts: what EM would do with them only slows it.

        Source: R. D. Shachter (1986), on barren nodes.
        """
        spare: dict[int, Tensor] = {}
        for name in reversed(self.topological):
            v = self._number[name]
            if v in kept:
                spare[v] = torch.zeros_like(codes[:, v], dtype=torch.bool)
            else:
                spare[v] = torch.stack([codes[:, v] < 0, *(spare[c] for c in self._children[v])]).all(0)
        return [spare[v] for v in range(len(self._sizes))]

    def _eased(self, codes: Tensor, kept: frozenset[int]) -> Tensor:
        """States of all nodes, one more than the last where a node is needless."""
        beyond = torch.tensor(self._sizes, device=codes.device)
        return torch.where(torch.stack(self._needless(codes, kept), -1), beyond, codes)

    def _blind(
        self, batch: Batch, tables: dict[str, Tensor], scopes: dict[str, Scope], kept: frozenset[int], exact: bool
    ) -> tuple[list[Part | Pool], dict[str, Tensor]]:
        """The parts where states cannot be looked at, and for each table the rows ``[N]`` that need it.

        All nodes are open; tables of what was observed join the others, and those of needless nodes are made even.
        """
        codes, lead = self._codes(batch.x), len(self.replicas)
        spare = self._needless(codes, kept)
        for name, v in self._owner.items():
            out = spare[v].reshape(-1, *[1] * len(scopes[name]))
            tables[name] = torch.where(out, -math.log(self._sizes[v]), tables[name])
        for v, size in enumerate(self._sizes):
            state = codes[:, v, None]
            possible = (state == torch.arange(size, device=state.device)) | (state < 0)
            blank = torch.zeros(possible.shape, dtype=self.dtype, device=state.device)
            tables[f"state.{v}"] = torch.where(possible, blank, -torch.inf)[(None,) * lead]
            scopes[f"state.{v}"] = (v,)
        data = Data(codes, self._sizes, scopes, frozenset(), _mass(batch), True)
        return [blind(data, LIMIT if exact else None)], {name: ~spare[v] for name, v in self._owner.items()}

    def _kept(self, batch: Batch) -> frozenset[int]:
        """Nodes that something other than a node may depend on: a leaf, or a label."""
        return self._tied if batch.evidence is None else self._tied.union(self._latent)

    def _engine(self, scopes: dict[str, Scope], n: int) -> Inference:
        return Inference(scopes, self._sizes, self.replicas, n, self.dtype, self.memory_budget)

    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        tables, scopes = self._given(potentials, batch)
        kept = self._kept(batch)
        if _unseen(batch.x):
            parts = self._blind(batch, tables, scopes, kept, True)[0]
        else:
            # Draws are each row's own.
            merge = plus is reduce.logsumexp or plus is reduce.maximum
            parts = self._parts(batch, tables, scopes, kept, merge, True)
        return self._engine(scopes, len(batch)).log_partition(tables, parts, plus)

    def _run(
        self,
        potentials: Mapping[str, Tensor],
        batch: Batch,
        kind: EStep,
        uniforms: Uniforms | None = None,
        asked: Mapping[str, Scope] | None = None,
        strict: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log Z of each row (its bound, under a mean field), and the expectations of all tables and what is asked.

        Args:
            potentials: Of the slots.
            batch: A piece.
            kind: What stands for the posterior.
            uniforms: Of draws.
            asked: Nodes whose joint posterior in each row is wanted, by a name of its own.
            strict: Let rows that are impossible count for nothing.
        """
        tables, scopes = self._given(potentials, batch)
        scopes |= dict(asked or {})
        exact, kept = self.inference == "exact", self._kept(batch).union(*(asked or {}).values())
        needed: dict[str, Tensor] = {}
        if _unseen(batch.x):
            parts, needed = self._blind(batch, tables, scopes, kept, exact)
        else:
            parts = self._parts(batch, tables, scopes, kept, kind != "sample", exact)
        engine = self._engine(scopes, len(batch))
        field = None if exact else MeanField(self.tolerance, self.max_sweeps)
        plain = values_known() and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        keep = self._lineage if plain else None

        def run(weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            log_z, found = engine.run(tables, parts, kind, weight, uniforms, field, keep)
            for slot, rows in needed.items():
                value = torch.where(rows.reshape(-1, *[1] * len(scopes[slot])), found[slot], 0.0)
                common = potentials[slot].shape[engine.lead] == 1
                found[slot] = value.sum(engine.lead, keepdim=True, dtype=torch.float64) if common else value
            return log_z, found

        log_z, found = run(None)
        impossible = (log_z == -torch.inf).detach()
        if not strict or (values_known() and not torch.compiler.is_compiling() and not bool(impossible.any())):
            return log_z, found
        mass = torch.ones_like(log_z, dtype=torch.float64) if batch.weight is None else batch.weight.to(torch.float64)
        found = run(torch.where(impossible, 0.0, mass))[1]
        for name in asked or {}:
            shape = (*impossible.shape, *[1] * len(scopes[name]))
            found[name] = torch.where(impossible.reshape(shape), 0.0, found[name])
        return log_z, found

    def _expected(
        self, potentials: dict[str, Tensor], batch: Batch, kind: EStep, uniforms: Uniforms | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_z, found = self._run(potentials, batch, kind, uniforms)
        return log_z, {slot: found[slot].reshape(value.shape) for slot, value in potentials.items()}

    def infer(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._expected(potentials, batch, "soft")

    def infer_hard(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._expected(potentials, batch, "hard")

    def infer_sample(
        self, potentials: dict[str, Tensor], batch: Batch, uniforms: Uniforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._expected(potentials, batch, "sample", uniforms)

    def entropy(self, batch: Batch) -> Tensor:
        kernels, lead = self._kernels(), len(self.replicas)
        total: Tensor | float = 0.0
        for piece in self.stream(batch):
            potentials = {slot: kernel.log_potential(piece) for slot, kernel in kernels.items()}
            log_z, found = self._run(potentials, piece, "soft")
            total = total + weighted(log_z, piece)
            for name, value in self._given(potentials, piece)[0].items():
                each = torch.where(found[name] > 0, value * found[name], 0.0)
                total = total - each.sum(tuple(range(lead, each.dim())), dtype=torch.float64)
        assert isinstance(total, Tensor)
        return total

    # ---- use --------------------------------------------------------------------------------------------------

    def batch(self, data: Any, **fields: Any) -> Batch:
        """Validate data: rows, or a mapping of what is known of some nodes and leaves by name.

        A mapping holds one state, or one for each of N rows: numbers, or names if the network has any; None is unknown.
        """
        if isinstance(data, Mapping):
            data, known = self._from_names(data)
            if known is not None:
                fields.setdefault("evidence", known)
        return super().batch(data, **fields)

    def _from_names(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        columns: dict[str, Tensor] = {}
        for name, value in given.items():
            if name not in self._number and name not in self._leaves:
                known = [*self._number, *self._leaves]
                raise invalid("evidence", f"names of nodes, {known}", repr(name), "correct it")
            if value is None:
                continue
            width = 1 if name in self._number else len(self._leaves[name].columns)
            numbers = self._numbers(name, value).to(torch.float64)
            if numbers.numel() % width:
                shape = list(numbers.shape)
                raise invalid("evidence", f"{width} columns of {name}", f"shape {shape}", "NaN where one is unknown")
            columns[name] = numbers.reshape(-1, width)
        n = max((len(value) for value in columns.values()), default=1)
        for name, value in columns.items():
            if len(value) not in (1, n):
                raise invalid("evidence", f"one value or {n} for each node", f"{len(value)} of {name}", "correct it")
        nodes = list(self._number)
        blank = torch.full((n, 1), torch.nan, dtype=torch.float64)
        parts = [columns.get(nodes[v], blank).expand(n, 1) for v in self._columns]
        for name, leaf in self._leaves.items():
            width = len(leaf.columns)
            parts.append(columns.get(name, blank.expand(n, width)).expand(n, width))
        hidden = [columns[name].expand(n, 1) if name in columns else None for name in self.hidden]
        if all(value is None for value in hidden):
            return torch.cat(parts, -1), None
        logs = []
        for name, value in zip(self.hidden, hidden, strict=True):
            size = self.cardinalities[name]
            value = blank if value is None else value
            bad = ~(value.isnan() | ((value >= 0) & (value < size) & (value == value.round())))
            if bool(bad.any()):
                expected = f"states of {name} from 0 to {size - 1}"
                raise invalid("evidence", expected, f"{float(value[bad][0]):g}", "correct it")
            possible = value.isnan() | (value == torch.arange(size))
            logs.append(torch.where(possible, 0.0, -torch.inf).expand(n, size))
        return torch.cat(parts, -1), torch.cat(logs, -1)

    def _numbers(self, name: str, value: Any) -> Tensor:
        """States as numbers, where names of them are given."""
        single = isinstance(value, str)
        if not single and not (isinstance(value, (list, tuple)) and any(isinstance(item, str) for item in value)):
            return as_tensor(value, f"evidence[{name!r}]")
        known = self.states.get(name)
        items = [value] if single else list(value)
        for item in items:
            if known is None or item not in known:
                expected = "numbers of states" if known is None else f"one of {list(known)}"
                raise invalid(f"evidence[{name!r}]", expected, repr(item), "correct it")
        assert known is not None
        return torch.tensor([known.index(item) for item in items])

    def _read(self, data: Any, fields: dict[str, Any]) -> Batch:
        data = {} if data is None else data
        return self.check(data) if isinstance(data, Batch) and not fields else self.batch(data, **fields)

    def posterior(self, query: Any, evidence: Any = None, **fields: Any) -> Float[Tensor, "*shape"]:
        """The joint posterior of the nodes of a query given what was observed, ``[*r, N, |A|, |B|, …]``.

        Rows sum to one, or to zero where the evidence is impossible. A node that was observed has all of its mass
        there. Under ``inference="mean_field"`` the nodes are independent.

        Args:
            query: The name of a node, or several names. Data in its place: the joint posterior of all hidden nodes.
            evidence: Rows of data, NaN where nothing is known; or states by name, ``{"B": 1}``; None for no evidence.
            **fields: ``labels``, ``inputs``, … as for `torchem.fit`.

        Raises:
            InvalidArgument: For a node that is not there, or that the evidence names; a query of more than 2^20 joint
                states.

        Example:
            >>> net = BayesianNetwork({"A": 2, "B": 3}, [("A", "B")])
            >>> net.posterior(("A", "B")).shape
            torch.Size([1, 2, 3])
        """
        names = names_of(query)
        if names is None:
            if evidence is not None:
                raise invalid("query", "names of nodes", type(query).__name__, "give the query first, then evidence")
            names, evidence = self.hidden, query
            if not names:
                raise invalid("query", "names of nodes", "data, where no node is hidden", "name those to ask about")
        for name in names:
            if name in self._leaves:
                raise invalid("query", "discrete nodes", f"the leaf {name}", "use impute for continuous columns")
            known_node("query", name, self.cardinalities)
            if isinstance(evidence, Mapping) and name in evidence:
                raise invalid("query", "nodes that the evidence leaves open", repr(name), "leave it out of one of both")
        if len(set(names)) < len(names) or not names:
            raise invalid("query", "different nodes", names, "name each once")
        scope = tuple(self._number[name] for name in names)
        if (cells := math.prod(self._sizes[v] for v in scope)) > LIMIT:
            raise invalid("query", f"at most {LIMIT} joint states", cells, "ask for fewer nodes at once")
        batch = self._read(evidence, fields)
        return self._each(batch, lambda p, b: self._run(p, b, "soft", asked={"asked": scope})[1]["asked"])

    def _marginals(self, potentials: Mapping[str, Tensor], batch: Batch, nodes: Scope, kind: EStep = "soft",
                   uniforms: Uniforms | None = None) -> list[Tensor]:  # fmt: skip
        """Posteriors ``[*r, N, K_v]`` of single nodes; zero throughout where a row is impossible."""
        found = self._run(potentials, batch, kind, uniforms, {f"asked.{v}": (v,) for v in nodes})[1]
        return [found[f"asked.{v}"] for v in nodes]

    @torch.no_grad()
    def most_likely(self, data: Any = None, nodes: Sequence[str] | None = None, **fields: Any) -> Int[Tensor, "*shape"]:
        """States ``[N, H]`` of the hidden nodes (``[N]`` of one) in the most likely configuration of all that is open.

        Ties go to the lowest states; under ``inference="mean_field"`` it is one that no single node improves.

        Args:
            data: Rows, or states by name; see `posterior`.
            nodes: Whose states ``[N, len(nodes)]`` to return instead; where no node is hidden, those of all.
            **fields: ``labels``, ``inputs``, … as for `torchem.fit`.
        """
        names = self.hidden or tuple(self.cardinalities) if nodes is None else names_of(nodes) or tuple(nodes)
        for name in names:
            known_node("nodes", name, self.cardinalities)
        # All that is open has its part in the maximum.
        place = [self._number[name] for name in names]
        every = tuple(range(len(self._sizes)))

        def best(potentials: dict[str, Tensor], batch: Batch) -> Tensor:
            found = self._marginals(potentials, batch, every, "hard")
            return torch.stack([found[v].argmax(-1) for v in place], -1)

        found = self._each(self._read(data, fields), best)
        return found.squeeze(-1) if nodes is None and len(self.hidden) == 1 else found

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p of what was observed of each row, ``[N]``, exact; −inf where that is impossible.

        Args:
            data: Rows, or states by name; see `posterior`.
            **fields: ``labels``, ``inputs``, … as for `torchem.fit`.
        """
        return super().log_prob(self._read(data, fields))

    def elbo(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """The evidence lower bound of a mean field for each row, ``[N]``; `log_prob` under ``inference="exact"``."""
        batch = self._read(data, fields)
        return self._each(batch, lambda p, b: self._run(p, b, "soft", strict=False)[0], score=True)

    def log_score(self, batch: Batch) -> Tensor:
        """`log_prob`, or the bound of a mean field."""
        return self.log_prob(batch) if self.inference == "exact" else self.elbo(batch)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        latents: bool = False,
        evidence: Mapping[str, Any] | None = None,
        inputs: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw ``n`` rows, columns as in the data, and the states ``[n, H]`` of hidden nodes when ``latents`` is True.

        Args:
            n: Number of rows.
            latents: Whether to return the states of the hidden nodes as well.
            evidence: What is known of every row, ``{"A": 1}``: the rest is drawn given it.
            inputs: Covariates ``[n, M]``, where a leaf or a gate reads them.
            generator: Source of the draws.
        """
        whole_number("n", n, 0, "give the number of draws")
        u = None if inputs is None else as_tensor(inputs, "inputs").to(self.device, self.dtype)
        blank = Batch(torch.zeros(n, 1, device=self.device), u=u)
        if evidence is None:
            codes, leaves = self._ancestral(blank, generator), None
        else:
            batch = self._read(evidence, {} if u is None else {"inputs": u})
            if len(batch) not in (1, n):
                raise invalid("evidence", f"one state of each node, or {n}", len(batch), "give one")
            batch = batch if len(batch) == n else replace(batch, u=None)[torch.zeros(n, dtype=torch.long)]
            batch = replace(batch, u=u).to(self.device)
            codes, leaves = self._drawn(batch, generator), batch.x[:, len(self._columns) :]
        columns = [codes[:, v, None].to(self.dtype) for v in self._columns]
        for name, leaf in self._leaves.items():
            z = self._joint(codes, leaf)
            if leaves is None:
                columns.append(self.conditionals[name].sample(z, blank, generator).to(self.dtype))
                continue
            own = leaves[:, [c - len(self._columns) for c in leaf.columns]].to(self.dtype)
            columns.append(self.conditionals[name].complete(blank.with_x(own), z, generator))
        x = torch.cat(columns, -1)
        return (x, codes[:, list(self._latent)]) if latents else x

    def _ancestral(self, blank: Batch, generator: torch.Generator | None) -> Tensor:
        """States ``[n, V]`` of all nodes, each drawn given its parents."""
        n = len(blank)
        codes = torch.zeros(n, len(self._sizes), dtype=torch.long, device=self.device)
        for name in self.topological if n else ():
            table = self.conditionals[name].log_table(blank).exp()
            table = table.flatten(1, -2) if table.dim() > 2 else table.unsqueeze(1)
            code = torch.zeros(n, dtype=torch.long, device=self.device)
            for parent in self.parents[name]:
                code = code * self.cardinalities[parent] + codes[:, self._number[parent]]
            row = torch.zeros_like(code) if table.shape[0] == 1 else torch.arange(n, device=self.device)
            codes[:, self._number[name]] = torch.multinomial(table[row, code], 1, generator=generator)[:, 0]
        return codes

    def _drawn(self, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """States ``[N, V]`` of all nodes, those that are open drawn from their joint posterior."""

        def uniforms(shape: torch.Size) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator).to(self.device)

        every = tuple(range(len(self._sizes)))

        def states(potentials: dict[str, Tensor], piece: Batch) -> Tensor:
            found = self._marginals(potentials, piece, every, "sample", uniforms)
            _check_possible(found[0])
            return torch.stack([p.argmax(-1) for p in found], -1)

        return self._each(batch, states) if len(batch) else self._codes(batch.x)

    def _joint(self, codes: Tensor, leaf: "Leaf") -> Tensor:
        """Joint state ``[n]`` of the parents of a leaf."""
        z = torch.zeros_like(codes[:, 0])
        for parent in leaf.parents:
            z = z * self.cardinalities[parent] + codes[:, self._number[parent]]
        return z

    def column_kinds(self) -> list[tuple[bool, bool]]:
        leaves = [kind for name in self._leaves for kind in kinds_of(self.conditionals[name])]
        return [(True, True)] * len(self._columns) + leaves

    def unseen(self, batch: Batch, index: Tensor) -> Beside:
        """See `Completing.unseen`: posteriors of nodes, and of leaves those of their parents."""
        rows = floating(batch[index], self)
        asked: dict[str, Scope] = {f"asked.{v}": (v,) for v in self._columns}
        asked |= {f"leaf.{name}": tuple(self._number[p] for p in leaf.parents) for name, leaf in self._leaves.items()}

        def query(potentials: dict[str, Tensor], piece: Batch) -> dict[str, Tensor]:
            found = self._run(potentials, piece, "soft", asked=asked)[1]
            return {name: found[name].flatten(len(self.replicas) + 1) if len(asked[name]) > 1 else found[name]
                    for name in asked}  # fmt: skip

        share = self._each(rows, query)
        parts: list[tuple[list[int], Unseen]] = []
        for column, v in enumerate(self._columns):
            parts.append(([column], Names(rows.with_x(rows.x[:, [column]]), share[f"asked.{v}"])))
        for name, leaf in self._leaves.items():
            posterior = share[f"leaf.{name}"]
            posterior = posterior if leaf.parents else posterior.unsqueeze(-1)
            own = rows.with_x(rows.x[:, leaf.columns])
            parts.append((list(leaf.columns), Among(self.conditionals[name], own, posterior)))
        return Beside(rows, parts, lambda some: self.log_prob(self.check(some)))

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: states of all nodes that are open, together, and leaves given these."""
        rows = replace(gaps.batch[gaps.index].to(self.device), weight=None)
        found = []
        for times in in_turn(draws, len(rows)):
            many = rows[torch.arange(len(rows), device=self.device).repeat(times)]
            codes = self._drawn(many, generator) if len(many) else self._codes(many.x)
            parts = [codes[:, list(self._columns)].to(self.dtype)]
            for name, leaf in self._leaves.items():
                own = many.with_x(many.x[:, leaf.columns].to(self.dtype))
                parts.append(complete(self.conditionals[name], own, self._joint(codes, leaf)[None], generator)[0])
            found.append(torch.cat(parts, -1).unflatten(0, (times, len(rows))))
        return torch.cat(found)

    # ---- starts and health ------------------------------------------------------------------------------------

    @property
    def default_init(self) -> str:
        hidden = set(self.hidden)
        return "kmeans" if any(hidden.intersection(leaf.parents) for leaf in self._leaves.values()) else "random"

    def begin(self, generators: Sequence[torch.Generator], first: int) -> None:
        self._seeds = [generator.initial_seed() % (1 << 62) for generator in generators]

    def least_rows(self, n_states: int) -> int:
        # Random responsibilities share out any number of rows, and nodes are many.
        return 1

    def _untold(self, codes: Tensor) -> tuple[list[int], list[int]]:
        """Nodes with a column that are mostly missing, and those of them that (almost) no row shows beside others.

        The first start from random responsibilities, as hidden ones do: else all restarts would be the same. The tables
        of the others say nothing of their states, a saddle.
        """
        seen = codes >= 0
        rare = [v for v in self._columns if 2 * int(seen[:, v].sum()) < len(codes)]
        told = []
        for v in rare:
            near = {u for scope in self._scopes.values() if v in scope for u in scope if u in self._columns} - {v}
            beside = seen[:, sorted(near)].any(-1) if near else torch.zeros_like(seen[:, v])
            if any(v in self._scopes[self.conditionals.slot(name)] for name in self._leaves):
                beside = torch.ones_like(beside)  # a leaf's columns are seen as a rule
            told.append(int((seen[:, v] & beside).sum()) >= _TOLD * self._sizes[v])
        return rare, [v for v, enough in zip(rare, told, strict=True) if not enough]

    def _shares(self, v: int, n: int) -> Tensor:
        """Random responsibilities ``[*r, n, K]`` of a node that has a column with few entries."""
        draws = [torch.rand(n, self._sizes[v], generator=torch.Generator().manual_seed(seed + v), dtype=torch.float64)
                 for seed in self._seeds]  # fmt: skip
        shares = -torch.stack(draws).clamp(min=1e-300).log()
        shares = (shares / shares.sum(-1, keepdim=True)).to(self.device)
        return shares if self.replicas else shares[0]

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        """First parameters from responsibilities ``[*r, N, ΣK_h]`` of the states of all hidden nodes in turn.

        Hidden nodes are independent given the row, and what is missing follows the frequencies of its column. Tables of
        hidden nodes are then scaled apart: random responsibilities of many rows leave them all but equal, a saddle.
        """
        lead, codes = len(self.replicas), self._codes(batch.x)
        potentials: dict[str, Tensor] = {}
        scopes: dict[str, Scope] = {}
        shares = expected.to(torch.float64).split(self._latent_sizes or (expected.shape[-1],), -1)
        for v, share in zip(self._latent, shares, strict=False):
            total = share.sum(-1, keepdim=True)
            share = torch.where(total > 0, share / total.clamp(min=1e-300), 1 / share.shape[-1])
            potentials[f"start.{v}"] = share.clamp(min=torch.finfo(torch.float64).tiny).log()
        rare, untold = self._untold(codes)
        potentials |= {f"start.{v}": self._shares(v, len(codes)).log() for v in rare}
        for v in self._columns:
            if v in rare:
                continue
            counts = torch.nn.functional.one_hot(codes[:, v].clamp(min=0), self._sizes[v])[codes[:, v] >= 0].sum(0)
            frequency = (counts + SMOOTH).to(torch.float64)
            potentials[f"start.{v}"] = (frequency / frequency.sum()).log().expand(*self.replicas, 1, -1)
        scopes |= {name: (int(name.removeprefix("start.")),) for name in potentials}
        for slot, scope in self._scopes.items():
            scopes[slot] = scope
            factor = self.conditionals[self.conditionals.name(slot)]
            if isinstance(factor.unwrapped, Categorical) and slot in self.table_slots():
                potentials[slot] = potentials[f"start.{scope[0]}"].new_zeros(
                    *self.replicas, 1, *(self._sizes[v] for v in scope)
                )
        rowwise = frozenset(name for name, value in potentials.items() if value.shape[lead] != 1)
        parts = plan(Data(codes, self._sizes, scopes, rowwise, _mass(batch), True), None, self.memory_budget)
        engine = Inference(scopes, self._sizes, self.replicas, len(batch), torch.float64, self.memory_budget)
        found = engine.run(potentials, parts, "soft", field=MeanField(0.0, 1))[1]
        values: dict[str, Tensor] = {}
        for factor, slots in self.factors().items():
            if slots[0] in potentials:
                counts = torch.stack([found[slot].squeeze(lead) for slot in slots]).sum(0)
                new = factor.maximize(Stats(counts=self._parted(counts, self._scopes[slots[0]], untold)))
            else:
                new = self._started(factor, slots[0], found[slots[0]], batch)
            values |= {f"{slots[0]}.{name}": value for name, value in new.items()}
        self.assign(values)

    def _parted(self, counts: Tensor, scope: Scope, untold: Sequence[int] = ()) -> Tensor:
        """Counts of a table with a little of all in each cell, and what hidden nodes tell apart scaled up."""
        lead = len(self.replicas)
        counts = counts + SMOOTH * counts.mean(-1, keepdim=True).clamp(min=SMOOTH)
        unseen = {*self._latent, *untold}
        hidden = [i for i, v in enumerate(scope[:-1]) if v in unseen]
        if scope[-1] in unseen:
            hidden = list(range(len(scope) - 1))
        if not hidden:
            return counts
        axes = [i for i in range(len(scope) - 1) if i not in hidden] + hidden + [len(scope) - 1]
        moved = counts.permute(*range(lead), *(lead + i for i in axes))
        shape = moved.shape
        spread = apart(moved.reshape(*shape[: len(shape) - len(hidden) - 1], -1, shape[-1])).reshape(shape)
        back = sorted(range(len(axes)), key=axes.__getitem__)
        return spread.permute(*range(lead), *(lead + i for i in back))

    def _started(self, factor: Factor, slot: str, share: Tensor, batch: Batch) -> dict[str, Tensor]:
        """First parameters of a leaf, or of a gate, from the joint posterior ``[*r, N, *scope]`` of its nodes."""
        lead = len(self.replicas)
        if batch.weight is not None:
            share = share * batch.weight.reshape(-1, *[1] * (share.dim() - lead - 1)).to(share)
        share = share.to(self.dtype)
        if slot in self.table_slots():
            return factor.initialize_table(batch, share)
        leaf = self._leaves[self.conditionals.name(slot)]
        own = leaf.frames(batch).rows()
        share = share.reshape(*share.shape[: lead + 1], -1)
        if own.x.is_floating_point():
            # What was not seen at all says nothing of a start.
            seen = ~own.x.isnan().all(-1)
            own, share = own[seen], share[..., seen, :]
        return factor.initialize(replace(own.with_x(factor.cast(own.x)), evidence=None, weight=None), share)

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        blank = torch.full((*index.shape[:-1], len(batch), index.shape[-1]), 1.0 / len(batch), dtype=torch.float64)
        blank = blank.to(index.device)
        self.initialize(batch, blank.scatter_add(-2, index.unsqueeze(-2), torch.ones_like(blank[..., :1, :])))

    def occupancy(self, stats: Stats) -> Tensor | None:
        """Expected number of rows in each state of each hidden node in turn, ``[*r, ΣK_h]``."""
        lead, found = len(self.replicas), []
        for name in self.hidden:
            counts = stats[self.conditionals.slot(name)].get("counts")
            if not isinstance(counts, Tensor):
                return None
            found.append(counts.flatten(lead, -2).sum(lead) if counts.dim() > lead + 1 else counts)
        return torch.cat(found, -1) if found else None

    def twins(self, batch: Batch, tolerance: float = 0.0) -> list[tuple[int, int]]:
        if self.replicas:
            return []
        piece = self.cast(batch)
        tables, scopes = self._given({slot: k.log_potential(piece) for slot, k in self._kernels().items()}, piece)
        pairs, offset = [], 0
        codes = self._codes(batch.x)
        # After the states of hidden nodes those of the ones that no row shows.
        for v in (*self._latent, *(v for v in self._columns if bool((codes[:, v] < 0).all()))):
            size = self._sizes[v]
            own = self.conditionals.slot(list(self.cardinalities)[v])
            around = [(tables[slot].detach(), scope, slot == own) for slot, scope in scopes.items() if v in scope]
            pairs += [
                (offset + j, offset + i)
                for i in range(size)
                for j in range(i)
                if len(around) > 1
                and all(_alike(t, scope.index(v), len(scope), mine, (i, j), tolerance) for t, scope, mine in around)
            ]
            offset += size
        return pairs

    # ---- data and files ---------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        width = len(self._columns) + sum(len(leaf.columns) for leaf in self._leaves.values())
        if batch.x.dim() != 2 or batch.x.shape[-1] != width:
            raise invalid(
                "data", f"{width} columns, {self.columns}", f"shape {list(batch.x.shape)}",
                "give the observed nodes in the order of cardinalities, then the leaves",
            )  # fmt: skip
        if values_known() and batch.x.numel():
            self._check_states(batch.x.detach())
        if batch.evidence is not None and batch.evidence.shape[-1] != sum(self._latent_sizes):
            raise invalid(
                "evidence", f"{sum(self._latent_sizes)} columns, one per state of the hidden nodes in turn",
                batch.evidence.shape[-1], "give a log-potential for each",
            )  # fmt: skip
        for name, leaf in self._leaves.items():
            factor = self.conditionals[name]
            try:
                factor.check(leaf.frames(batch).rows())
            except InvalidEntry as error:
                own = {"column": leaf.columns[error.index["column"]]} if "column" in error.index else {}
                raise error.moved(f" (read by leaf {name})", **own) from error
            except InvalidArgument as error:
                raise InvalidArgument(f"{error} (leaf {name}, columns {leaf.columns})") from error
        return batch

    def _check_states(self, x: Tensor) -> None:
        nodes = list(self.cardinalities)
        for column, v in enumerate(self._columns):
            value, size = x[:, column], self._sizes[v]
            bad = (value < 0) | (value >= size)
            if x.is_floating_point():
                bad = (bad | (value != value.round())) & ~value.isnan()
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise invalid_entry(
                    f"states of {nodes[v]} from 0 to {size - 1}, NaN where not observed", f"{float(value[row]):g}",
                    {"row": row, "column": column}, "recode the column",
                )  # fmt: skip

    def replicate(self, replicas: int) -> "BayesianNetwork":
        twin = super().replicate(replicas)
        assert isinstance(twin, BayesianNetwork)
        twin._lineage = tuple(range(replicas))
        return twin

    def take_replicas(self, index: Tensor | int) -> "BayesianNetwork":
        twin = super().take_replicas(index)
        assert isinstance(twin, BayesianNetwork)
        left = torch.tensor(self._lineage)[index if isinstance(index, int) else index.cpu()]
        twin._lineage = tuple(left.reshape(-1).tolist())
        return twin

    def prepare(self, moments: Moments) -> None:
        owners = {module: leaf for name, leaf in self._leaves.items() for module in self.conditionals[name].modules()}
        for module in self.modules():
            if isinstance(module, Factor):
                leaf = owners.get(module)
                module.prepare(moments if leaf is None else Columns(moments, leaf.columns))

    def row_size(self) -> int:
        leaves = sum(self.conditionals[name].row_size() for name in self._leaves)
        return (1 + len(self._sizes) // 4 + leaves) * max(1, *self.replicas, 1)

    def config(self) -> dict[str, Any]:
        return {
            "cardinalities": dict(self.cardinalities),
            "edges": [list(edge) for edge in self.edges],
            "hidden": list(self.hidden),
            "leaves": {name: (list(parents), factor) for name, (parents, factor) in self.leaves.items()} or None,
            "conditionals": {name: self.conditionals[name] for name in self.cardinalities},
            "states": {name: list(own) for name, own in self.states.items()} or None,
            "inference": self.inference,
            "tolerance": self.tolerance,
            "max_sweeps": self.max_sweeps,
        }

    @classmethod
    def from_bif(cls, path: str | PathLike[str], hidden: Sequence[str] = (), **options: Any) -> "BayesianNetwork":
        """The network of a file in the Bayesian Interchange Format, in float64.

        Args:
            path: The file.
            hidden: Nodes that no column is given for.
            **options: As for the class; ``states=`` renames states.

        Raises:
            InvalidFile: If it is not there, cannot be understood, or has a cycle; names the line or the cycle.
        """
        found = bif.read(Path(path))
        sizes = {name: len(own) for name, own in found.states.items()}
        edges = [(parent, child) for child, parents in found.parents.items() for parent in parents]
        try:
            topological(found.parents)
        except InvalidArgument as error:
            raise InvalidFile(f"{path}: {error}") from error
        states = {**found.states, **(options.pop("states", None) or {})}
        net = cls(sizes, edges, hidden, states=states, **options).double()
        for name, table in found.tables.items():
            net.tables[name] = table
        return net

    def to_bif(self, path: str | PathLike[str], name: str = "network") -> None:
        """Write the discrete nodes in the Bayesian Interchange Format; numbers are read back bit for bit.

        Args:
            path: File to write or replace.
            name: Of the network, in the file.

        Raises:
            InvalidArgument: If there are continuous leaves, gates or replicas, which the format does not know.
            InvalidFile: If it cannot be written.
        """
        tables = {}
        for node in self.cardinalities:
            factor = self.conditionals[node]
            if self._leaves or self.replicas or not isinstance(factor.unwrapped, Categorical):
                raise invalid("to_bif", "discrete nodes with tables alone", "others", "use torchem.save")
            tables[node] = factor.probs.detach().to(torch.float64).cpu()  # pyright: ignore[reportAttributeAccessIssue]
        states = {
            node: self.states.get(node) or tuple(f"s{i}" for i in range(size))
            for node, size in self.cardinalities.items()
        }
        bif.write(Path(path), bif.Network(name, states, {n: self.parents[n] for n in self.cardinalities}, tables))

    @classmethod
    def examples(cls) -> list[tuple["BayesianNetwork", Batch]]:
        """A hidden cause behind five nodes, one of them sometimes missing; two hidden nodes with a continuous leaf."""
        from torchem.factors import Gaussian

        generator = torch.Generator().manual_seed(0)
        first = cls(
            {"A": 2, "H": 3, "B": 2, "C": 3, "D": 2},
            [("A", "H"), ("H", "B"), ("H", "C"), ("A", "C"), ("C", "D")],
            hidden=("H",),
        )
        leaf = Gaussian(4, 1)
        leaf.means = [[-2.0], [0.0], [1.0], [3.0]]
        second = cls(
            {"S": 2, "T": 2, "U": 2},
            [("S", "U"), ("T", "U")],
            hidden=("S", "T"),
            leaves={"X": (("S", "T"), leaf)},
        )
        found = []
        for net in (first, second):
            net.double()
            for name in net.cardinalities:
                shape = net.tables[name].shape
                net.tables[name] = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
            x = net.sample(30, generator=generator)
            x[::5, 0] = torch.nan
            x[1::7, -1] = torch.nan
            found.append((net, Batch(x)))
        return found


# ---- helpers -------------------------------------------------------------------------------------------------------


def _mass(batch: Batch) -> Tensor:
    """Weights of rows, ``[N]``."""
    return torch.ones_like(batch.x[:, 0], dtype=torch.float64) if batch.weight is None else batch.weight


def _unseen(x: Tensor) -> bool:
    """Whether the values of a tensor cannot be looked at: a transform or a compiler holds it."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]


def _check_possible(share: Tensor, index: Tensor | None = None) -> None:
    """Refuse rows of probability zero."""
    total = share.flatten(1).sum(-1) if index is None else share.sum(-1).reshape(-1, len(index)).amin(0).cpu()
    none = (total <= 0).nonzero()[:, 0] if total.numel() else total.long()
    if len(none):
        row = int(none[0] if index is None else index.cpu()[none[0]])
        raise invalid("data", "evidence of positive probability", f"probability zero at row {row}", "correct that row")


def _alike(table: Tensor, place: int, axes: int, own: bool, pair: tuple[int, int], tolerance: float) -> bool:
    """Whether a table tells two states of a node apart: in the node's ``own`` their ratio may be any constant."""
    a, b = (table.select(table.dim() - axes + place, i).to(torch.float64) for i in pair)
    gap = torch.where(a == b, 0.0, a - b)
    if own:
        gap = (gap - gap.reshape(-1)[0]).nan_to_num(nan=torch.inf)
    return not bool((gap.abs() > tolerance).any())
