"""What a Bayesian network is made of: its graph, its conditionals by name, its leaves."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Moments
from torchem.factors import Categorical
from torchem.models.frames import FramesPass


@dataclass(frozen=True)
class Leaf:
    """A continuous leaf.

    Attributes:
        parents: Names of its discrete parents.
        columns: Its columns in the data.
    """

    parents: tuple[str, ...]
    columns: list[int]

    def frames(self, batch: Batch) -> Batch:
        """What its factor reads, each row as a sequence of one frame."""
        fields = ("u", "offset", "trials")
        known = {name: value.unsqueeze(1) for name in fields if (value := getattr(batch, name)) is not None}
        return Batch(batch.x[:, self.columns[0] : self.columns[-1] + 1].unsqueeze(1), **known)


class LeafPass(FramesPass):
    """A leaf's pass over the rows, those in which it is missing left out."""

    def __init__(self, factor: Factor, columns: list[int], score: bool = False):
        super().__init__(factor, score)
        self.leaf = Leaf((), columns)

    def log_potential(self, batch: Batch) -> Tensor:
        return super().log_potential(self.leaf.frames(batch)).squeeze(-2)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        super().collect(batch, expected.unsqueeze(-2))


class Columns:
    """Moments of some columns."""

    def __init__(self, moments: Moments, columns: list[int]):
        self.mean, self.variance = moments.mean[columns], moments.variance[columns]
        self.low, self.high = moments.low[columns], moments.high[columns]
        self.inputs = getattr(moments, "inputs", None)


class Conditionals(nn.Module):
    """The factors of a network by the names of their nodes; assignable.

    Args:
        names: Of nodes and leaves, in order.
        shapes: States of the parents and of the node, for nodes.
    """

    def __init__(self, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self._keys: dict[str, str] = {}
        self._shapes = dict(shapes)
        for name in names:
            # A module's name has no dot, and must not hide an attribute.
            key = name.replace(".", "_") or "_"
            while hasattr(self, key) or key in self._keys.values():
                key += "_"
            self._keys[name] = key
        self._names = {f"conditionals.{key}": name for name, key in self._keys.items()}

    def slot(self, name: str) -> str:
        """The slot of a node."""
        return f"conditionals.{self._keys[name]}"

    def name(self, slot: str) -> str:
        """The node of a slot."""
        return self._names[slot]

    def __getitem__(self, name: str) -> Any:
        known_node("conditionals", name, self._keys)
        return getattr(self, self._keys[name])

    def __setitem__(self, name: str, factor: Factor) -> None:
        known_node("conditionals", name, self._keys)
        if not isinstance(factor, Factor):
            raise wrong_type(f"conditionals[{name!r}]", "a torchem factor", factor, "pass for example Categorical(2)")
        shape = self._shapes.get(name)
        own = getattr(factor, "shape", None)
        if shape is not None and own is not None and tuple(own) != shape:
            raise invalid(f"conditionals[{name!r}]", f"shape {list(shape)}", list(own), "parents first, then the node")
        setattr(self, self._keys[name], factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and factors in order."""
        return ((name, self[name]) for name in self._keys)


class Tables:
    """The tables of a network by node, readable and assignable."""

    def __init__(self, conditionals: Conditionals, names: Sequence[str]):
        self._conditionals, self._names = conditionals, names

    def __getitem__(self, name: str) -> Tensor:
        return self._factor(name).probs

    def __setitem__(self, name: str, value: Any) -> None:
        self._factor(name).assign_probs(value, f"tables[{name!r}]")

    def _factor(self, name: str) -> Any:
        known_node("tables", name, self._names)
        factor = self._conditionals[name]
        if not isinstance(factor.unwrapped, Categorical):
            got = type(factor.unwrapped).__name__
            raise invalid(f"tables[{name!r}]", "a table", f"a {got}", "read conditionals instead")
        return factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {list(self[name].shape)}" for name in self)


# ---- checks ---------------------------------------------------------------------------------------------------------


def known_node(argument: str, name: Any, known: Any) -> None:
    """Refuse a name that is not among those known."""
    if name not in known:
        raise invalid(argument, f"one of {list(known)}", repr(name), "correct the name")


def names_of(query: Any) -> tuple[str, ...] | None:
    """The nodes that a query names; None if it is not one."""
    if isinstance(query, str):
        return (query,)
    if isinstance(query, (tuple, list)) and len(query) and all(isinstance(name, str) for name in query):
        return tuple(query)
    return None


def checked_sizes(cardinalities: Any) -> dict[str, int]:
    """States of each node, by name."""
    if not isinstance(cardinalities, Mapping) or not cardinalities:
        raise wrong_type("cardinalities", "states of each node by name", cardinalities, 'give for example {"A": 2}')
    for name, size in cardinalities.items():
        if not isinstance(name, str) or not name:
            raise invalid("cardinalities", "names of nodes", repr(name), "use text")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise invalid(f"cardinalities[{name!r}]", "a positive whole number", repr(size), "give at least 1")
    return dict(cardinalities)


def checked_edges(sizes: Mapping[str, int], edges: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of known nodes, each once."""
    found: list[tuple[str, str]] = []
    if not isinstance(edges, Iterable) or isinstance(edges, str):
        raise wrong_type("edges", "pairs (parent, child)", edges, 'give for example [("A", "B")]')
    for edge in edges:
        if not isinstance(edge, Sequence) or isinstance(edge, str) or len(edge) != 2:
            raise invalid("edges", "pairs (parent, child)", repr(edge), 'give for example [("A", "B")]')
        for name in edge:
            known_node("edges", name, sizes)
        pair = (edge[0], edge[1])
        if pair in found:
            raise invalid("edges", "each edge once", f"{pair[0]} → {pair[1]} twice", "leave one out")
        found.append(pair)
    return tuple(found)


def checked_hidden(sizes: Mapping[str, int], hidden: Any) -> tuple[str, ...]:
    """Known nodes, each once, in the order of the nodes."""
    given = (hidden,) if isinstance(hidden, str) else hidden
    if not isinstance(given, Iterable):
        raise wrong_type("hidden", "names of nodes", hidden, 'give for example ("A",)')
    given = tuple(given)
    for name in given:
        known_node("hidden", name, sizes)
    if len(set(given)) < len(given):
        raise invalid("hidden", "each node once", given, "leave one out")
    # In the order of the nodes, which labels and states of hidden nodes have too.
    return tuple(name for name in sizes if name in given)


def checked_states(sizes: Mapping[str, int], states: Any) -> dict[str, tuple[str, ...]]:
    """Names of states: as many as a node has, and different."""
    found = {}
    for name, own in (states or {}).items():
        known_node("states", name, sizes)
        if not isinstance(own, Sequence):
            raise wrong_type(f"states[{name!r}]", "names of states", own, "give one for each")
        if len(own) != sizes[name] or len(set(own)) != len(own):
            raise invalid(f"states[{name!r}]", f"{sizes[name]} different names", list(own), "name each state once")
        found[name] = tuple(map(str, own))
    return found


def checked_leaves(sizes: Mapping[str, int], leaves: Mapping[str, Any], first: int) -> dict[str, Leaf]:
    """Leaves, whose columns are those from the ``first`` on."""
    found = {}
    for name, given in leaves.items():
        if name in sizes or not isinstance(name, str) or not name:
            raise invalid("leaves", "names of their own", repr(name), "rename the leaf")
        if isinstance(given, Factor) or len(given) != 2 or not isinstance(given[1], Factor):
            raise invalid(f"leaves[{name!r}]", "(parents, factor)", repr(given), "give its parents and a factor")
        parents = (given[0],) if isinstance(given[0], str) else tuple(given[0])
        for parent in parents:
            known_node(f"leaves[{name!r}]", parent, sizes)
        if len(set(parents)) < len(parents):
            raise invalid(f"leaves[{name!r}]", "each parent once", parents, "leave one out")
        cells, own = math.prod(sizes[parent] for parent in parents), given[1].n_components
        if own != cells:
            raise invalid(
                f"leaves[{name!r}]", f"a factor of {cells} components, one per joint state of {list(parents)}", own,
                "build it with as many",
            )  # fmt: skip
        width = given[1].n_features or 1
        found[name] = Leaf(parents, list(range(first, first + width)))
        first += width
    return found


def topological(parents: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Nodes, each after its parents.

    Raises:
        InvalidArgument: If there is a cycle; it is named.
    """
    waiting = {name: len(own) for name, own in parents.items()}
    children: dict[str, list[str]] = {name: [] for name in parents}
    for name, own in parents.items():
        for parent in own:
            children[parent].append(name)
    done = [name for name, count in waiting.items() if not count]
    for name in done:
        for child in children[name]:
            waiting[child] -= 1
            if not waiting[child]:
                done.append(child)
    left = [name for name in parents if waiting[name]]
    if not left:
        return tuple(done)
    # From any of those left one goes up for ever among them, and comes round.
    path = [left[0]]
    while path[-1] not in path[:-1]:
        path.append(next(parent for parent in parents[path[-1]] if waiting[parent]))
    cycle = path[path.index(path[-1]) :][::-1]
    raise invalid("edges", "a graph without cycles", " → ".join(cycle), "take one of these edges out")
