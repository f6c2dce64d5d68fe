"""The Bayesian Interchange Format: networks of discrete nodes as text, as other programs read and write them."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchem.errors import InvalidFile, describe, invalid

#: Comments, quoted names, single marks, and words.
_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"[^"\n]*"|[{}()\[\]|,;]|[^\s{}()\[\]|,;"]+', re.DOTALL)
#: Words that need no quotes.
_WORD = re.compile(r"[^\s{}()\[\]|,;\"/]+")
#: How far the sum of a row may be from one by the rounding of whoever wrote it.
_ROUNDED = 1e-2


@dataclass(frozen=True)
class Network:
    """What a file holds.

    Attributes:
        name: Of the network.
        states: Names of the states of each node, by the node's name.
        parents: Of each node, in the order of its table's axes.
        tables: ``[*parents, states]`` of each node, float64.
    """

    name: str
    states: Mapping[str, tuple[str, ...]]
    parents: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Tensor]


def read(path: Path) -> Network:
    """The network of a file.

    Raises:
        InvalidFile: If it is not there, or cannot be understood; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidFile(describe(str(path), "a file in BIF", reason, "check the path")) from error
    return _Reader(path, text).network()


def write(path: Path, network: Network) -> None:
    """Write a network; numbers come back to the last digit.

    Raises:
        InvalidArgument: For a name that holds a quote or a line's end.
        InvalidFile: If the file cannot be written.
    """
    lines = [f"network {_quoted(network.name)} {{", "}"]
    for node, states in network.states.items():
        names = ", ".join(map(_quoted, states))
        lines += [f"variable {_quoted(node)} {{", f"  type discrete [ {len(states)} ] {{ {names} }};", "}"]
    for node, parents in network.parents.items():
        table = network.tables[node]
        given = f" | {', '.join(map(_quoted, parents))}" if parents else ""
        lines.append(f"probability ( {_quoted(node)}{given} ) {{")
        if not parents:
            lines.append(f"  table {_numbers(table)};")
        for place in itertools.product(*(range(len(network.states[p])) for p in parents)) if parents else ():
            names = ", ".join(_quoted(network.states[p][i]) for p, i in zip(parents, place, strict=True))
            lines.append(f"  ({names}) {_numbers(table[place])};")
        lines.append("}")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidFile(describe(str(path), "a place to write to", error.strerror, "choose another")) from error


def _quoted(name: str) -> str:
    if _WORD.fullmatch(name):
        return name
    if not {'"', "\n", "\r"}.isdisjoint(name):
        raise invalid("to_bif", "names without quotes and line ends", repr(name), "rename it")
    return f'"{name}"'


def _numbers(row: Tensor) -> str:
    return ", ".join(map(repr, row.tolist()))


class _Reader:
    """Reads token by token, and knows the line."""

    def __init__(self, path: Path, text: str):
        self.path = path
        self.tokens = list(self._split(text))
        self.at = 0

    def _split(self, text: str) -> Iterator[tuple[str, int]]:
        line, end = 1, 0
        for match in _TOKEN.finditer(text):
            line += text.count("\n", end, match.start())
            self._between(text[end : match.start()], line)
            token = match.group()
            if token.startswith("/*") and not token.endswith("*/"):
                raise self.wrong("'*/'", "a comment without an end", line)
            if not token.startswith(("//", "/*")):
                yield token, line
            line += token.count("\n")
            end = match.end()
        self._between(text[end:], line)
        yield "", line + text.count("\n", end)

    def _between(self, gap: str, line: int) -> None:
        if gap.strip():
            raise self.wrong("text in BIF", repr(gap.strip()[:20]), line)

    def wrong(self, expected: str, got: str, line: int | None = None) -> InvalidFile:
        """An error at a line, that of the token read last by default."""
        line = self.tokens[max(0, self.at - 1)][1] if line is None else line
        return InvalidFile(describe(f"{self.path}, line {line}", expected, got, "correct the file"))

    # ---- tokens -----------------------------------------------------------------------------------------------

    def peek(self) -> str:
        """The next token; empty at the end."""
        return self.tokens[self.at][0]

    def next(self) -> str:
        """The next token, read."""
        token = self.peek()
        self.at += self.at < len(self.tokens) - 1
        return token

    def take(self, *wanted: str) -> str:
        """The next token, which must be one of those wanted."""
        token, line = self.tokens[self.at]
        if token not in wanted:
            raise self.wrong(" or ".join(map(repr, wanted)), repr(token) if token else "the end of the file", line)
        return self.next()

    def name(self) -> str:
        """A name, without its quotes."""
        token, line = self.tokens[self.at]
        if not token or token in "{}()[]|,;":
            raise self.wrong("a name", repr(token) if token else "the end of the file", line)
        return self.next().strip('"')

    def number(self) -> float:
        """A number."""
        token, line = self.tokens[self.at]
        try:
            value = float(token)
        except ValueError:
            raise self.wrong("a number", repr(token) if token else "the end of the file", line) from None
        if not (math.isfinite(value) and value >= 0):
            raise self.wrong("probabilities of at least zero", token, line)
        self.next()
        return value

    def listed(self, stop: str) -> list[str]:
        """Names up to a mark, commas between them."""
        found = []
        while self.peek() != stop:
            found.append(self.name())
            if self.peek() == ",":
                self.next()
        self.take(stop)
        return found

    def values(self) -> list[float]:
        """Numbers up to a semicolon; commas between them are optional."""
        found = []
        while self.peek() != ";":
            found.append(self.number())
            if self.peek() == ",":
                self.next()
        self.take(";")
        return found

    def skip(self) -> None:
        """Whatever comes up to a semicolon."""
        while self.next() != ";":
            if not self.peek():
                raise self.wrong("';'", "the end of the file")

    # ---- blocks -----------------------------------------------------------------------------------------------

    def network(self) -> Network:
        """All of it."""
        title = "network"
        states: dict[str, tuple[str, ...]] = {}
        blocks: list[tuple[str, tuple[str, ...], int, int]] = []
        while self.peek():
            kind = self.take("network", "variable", "probability")
            if kind == "network":
                title = self.name() if self.peek() != "{" else title
                self._properties()
            elif kind == "variable":
                self._variable(states)
            else:
                blocks.append(self._skip_probability())
        tables: dict[str, Tensor] = {}
        parents: dict[str, tuple[str, ...]] = {}
        for node, given, start, line in blocks:
            for name in (node, *given):
                if name not in states:
                    raise self.wrong("names of variables", repr(name), line)
            if len({node, *given}) <= len(given):
                raise self.wrong(f"{node!r} given different variables", str(list(given)), line)
            if node in tables:
                raise self.wrong("one block for each variable", f"a second one of {node!r}", line)
            self.at = start
            parents[node], tables[node] = given, self._table(node, given, states)
        if not states:
            raise self.wrong("variables", "none", self.tokens[-1][1])
        for node in states:
            if node not in tables:
                raise self.wrong("a probability block for each variable", f"none of {node!r}", self.tokens[-1][1])
        return Network(title, states, {n: parents[n] for n in states}, {n: tables[n] for n in states})

    def _properties(self) -> None:
        self.take("{")
        while self.take("property", "}") == "property":
            self.skip()

    def _variable(self, states: dict[str, tuple[str, ...]]) -> None:
        name = self.name()
        if name in states:
            raise self.wrong("different variables", f"a second {name!r}")
        self.take("{")
        while (kind := self.take("type", "property", "}")) != "}":
            if kind == "property":
                self.skip()
                continue
            self.take("discrete")
            self.take("[")
            size = self.number()
            if size < 1:
                raise self.wrong("at least one state", f"{size:g}")
            self.take("]")
            self.take("{")
            found = self.listed("}")
            if len(found) != size or len(set(found)) != len(found):
                raise self.wrong(f"{size:g} different states", str(found))
            self.take(";")
            states[name] = tuple(found)
        if name not in states:
            raise self.wrong("a type", f"none of {name!r}")

    def _skip_probability(self) -> tuple[str, tuple[str, ...], int, int]:
        """A block's head; its body waits until all variables are known."""
        line = self.tokens[self.at - 1][1]
        self.take("(")
        node, given = self.name(), []
        if self.take("|", ")") == "|":
            given = self.listed(")")
        start = self.at
        self.take("{")
        while self.next() != "}":
            if not self.peek():
                raise self.wrong("'}'", "the end of the file")
        return node, tuple(given), start, line

    def _table(self, node: str, given: tuple[str, ...], states: Mapping[str, tuple[str, ...]]) -> Tensor:
        sizes = [len(states[name]) for name in given]
        table = torch.full((*sizes, len(states[node])), torch.nan, dtype=torch.float64)
        default: Tensor | None = None
        self.take("{")
        while (kind := self.take("table", "default", "property", "(", "}")) != "}":
            if kind == "property":
                self.skip()
            elif kind == "table":
                # The node's own states run slowest, the last parent's fastest.
                own = self._row(self.values(), table.numel()).reshape(table.shape[-1], *sizes)
                table = own.movedim(0, -1)
            elif kind == "default":
                default = self._row(self.values(), table.shape[-1])
            else:
                place = self._place(self.listed(")"), given, states)
                table[place] = self._row(self.values(), table.shape[-1])
        if default is not None:
            table = torch.where(table.isnan(), default, table)
        if bool(table.isnan().any()):
            row = table.isnan().any(-1).nonzero()[0].tolist()
            names = [states[p][i] for p, i in zip(given, row, strict=True)]
            raise self.wrong(f"probabilities of {node!r} for all states of its parents", f"none for {names}")
        total = table.sum(-1, keepdim=True)
        if bool(((total - 1).abs() > _ROUNDED).any()):
            raise self.wrong(
                f"rows of {node!r} that sum to one", f"a sum of {float(total.min()):g} to {float(total.max()):g}"
            )
        return torch.where((total - 1).abs() > 1e-12, table / total, table)

    def _row(self, values: list[float], size: int) -> Tensor:
        if len(values) != size:
            raise self.wrong(f"{size} numbers", str(len(values)))
        return torch.tensor(values, dtype=torch.float64)

    def _place(
        self, names: list[str], given: tuple[str, ...], states: Mapping[str, tuple[str, ...]]
    ) -> tuple[int, ...]:
        if len(names) != len(given):
            raise self.wrong(f"a state of each of {list(given)}", str(names))
        for name, parent in zip(names, given, strict=True):
            if name not in states[parent]:
                raise self.wrong(f"one of {list(states[parent])}, the states of {parent!r}", repr(name))
        return tuple(states[parent].index(name) for name, parent in zip(names, given, strict=True))
