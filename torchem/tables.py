"""Tables from files: CSV, NumPy, Parquet and Feather, as columns of numbers with names, or as sequences of them."""

import csv
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from torchem.errors import InvalidFile, describe, require

#: Cells that stand for a missing entry.
_MISSING = frozenset({"", "na", "nan"})
_DELIMITERS = (",", "\t", ";")


@dataclass(frozen=True)
class Table:
    """Named columns of numbers.

    Attributes:
        columns: Name of each column.
        values: ``[N, D]``, NaN where an entry is missing; float64, or float32 where a NumPy file holds that.
    """

    columns: list[str]
    values: np.ndarray

    def select(self, columns: Sequence[str], source: str = "data") -> "Table":
        """Some of the columns, in the order asked for.

        Raises:
            InvalidFile: If one is not there.

        Example:
            >>> Table(["a", "b"], np.zeros((3, 2))).select(["b"]).values.shape
            (3, 1)
        """
        index = _indices(Path(source), self.columns, columns)
        if index == list(range(len(self.columns))):
            return self
        return Table([self.columns[i] for i in index], self.values[:, index])


@dataclass(frozen=True)
class SequenceTable:
    """The rows of a table as sequences, one after the other.

    Attributes:
        table: Columns of all frames: the first sequence's, then the second's, each in the order of the file.
        names: Name of each sequence, in the order in which they first appear.
        lengths: ``[N]`` frames of each sequence.
        rows: ``[F]`` row of the file, from 0, that each frame came from.
        index: ``[F]`` time of each frame: numbers, or text where some are none; None where no column was named.
    """

    table: Table
    names: list[str]
    lengths: np.ndarray
    rows: np.ndarray
    index: np.ndarray | None = None

    @property
    def sequences(self) -> list[np.ndarray]:
        """Each sequence ``[T_i, D]``, in the order of `names`."""
        return np.split(self.table.values, np.cumsum(self.lengths)[:-1])


def read_sequences(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    sequence: str | None = None,
    index: str | None = None,
) -> SequenceTable:
    r"""Read a table of numbers whose rows are frames of sequences.

    Args:
        path: The file, as for `read_table`.
        columns: Columns to read; when None, all but those that name the sequence and the time.
        sequence: Column that says which sequence a row belongs to, of text or numbers; the rows of one need not lie
            together. None makes all rows one sequence, named as the file.
        index: Column of the time of each frame, of text or numbers. It is kept for pictures: frames stay in the order
            of the file.

    Raises:
        InvalidFile: As `read_table`; or if a row does not say which sequence it belongs to.
        MissingExtra: If Parquet or Feather is asked for without pyarrow.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("id,x\nu,1\nv,2\nu,3\n")
        ...     [x.tolist() for x in read_sequences(folder + "/a.csv", sequence="id").sequences]
        [[[1.0], [3.0]], [[2.0]]]
    """
    file = Path(path)
    read = _reader(file)
    texts = [name for name in (sequence, index) if name is not None]
    if columns is None and texts:
        present = read_columns(file)
        _indices(file, present, texts)
        columns = [name for name in present if name not in texts]
    table, found = read(file, columns, texts)
    size = len(table.values)
    time = None if index is None else _times(found[-1])
    if sequence is None:
        return SequenceTable(table, [file.stem], np.array([size]), np.arange(size), time)
    names, number = _numbered(file, sequence, found[0])
    rows = np.argsort(number, kind="stable")
    if not np.array_equal(rows, np.arange(size)):
        table = Table(table.columns, table.values[rows])
        time = None if time is None else time[rows]
    return SequenceTable(table, names, np.bincount(number), rows, time)


def _numbered(path: Path, column: str, cells: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct names in a column, in order, and the number of each row's."""
    numbers: dict[str, int] = {}
    number = np.fromiter((numbers.setdefault(cell, len(numbers)) for cell in cells), np.int64, len(cells))
    if "" in numbers:
        row = int(np.argmax(number == numbers[""]))
        got = f"an empty cell in row {row} of column {column!r}"
        raise _bad(path, "the name of a sequence in each row", got, "fill it in, or drop the row")
    return list(numbers), number


def _times(cells: Sequence[str]) -> np.ndarray:
    """Numbers where all cells are, text else."""
    numbers = [_number(cell) for cell in cells]
    return np.array(cells, dtype=np.str_) if None in numbers else np.array(numbers, dtype=np.float64)


def read_table(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Table:
    r"""Read a table of numbers.

    CSV (``.csv``, ``.tsv``, ``.txt``) needs a header; commas, tabs or semicolons separate; empty cells, ``NA`` and
    ``NaN`` are missing entries. ``.npy`` files are memory-mapped, their columns called x0, x1, …. ``.parquet`` and
    ``.feather`` need the extra ``data``.

    Args:
        path: The file.
        columns: Columns to read, in this order; all of them when None. Others need not be numbers.

    Raises:
        InvalidFile: If the file is missing, malformed, empty, lacks a column or holds a cell that is no number.
        MissingExtra: If Parquet or Feather is asked for without pyarrow.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.csv").write_text("a,b\n1,2\n3,NA\n")
        ...     read_table(folder + "/a.csv", ["b"]).values.tolist()
        [[2.0], [nan]]
    """
    file = Path(path)
    return _reader(file)(file, columns, ())[0]


def read_columns(path: str | os.PathLike[str]) -> list[str]:
    """Names of a table's columns, without reading its rows where the format allows.

    Raises:
        InvalidFile: As `read_table`.
    """
    file = Path(path)
    read = _reader(file)
    if read is _read_arrow:
        return list(_arrow_table(file).column_names)
    if read is _read_npy:
        return read(file, None, ())[0].columns
    with _opened(file) as rows:
        return next(rows)


#: Reads columns as numbers, and others as text.
_Reader = Callable[[Path, Sequence[str] | None, Sequence[str]], tuple[Table, list[list[str]]]]


def _reader(path: Path) -> _Reader:
    readers = {".npy": _read_npy, ".parquet": _read_arrow, ".feather": _read_arrow}
    readers |= dict.fromkeys((".csv", ".tsv", ".txt", ""), _read_csv)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise _bad(path, "a table", what, "check the path")
    suffix = path.suffix.lower()
    if suffix not in readers:
        known = ", ".join(sorted(filter(None, readers)))
        raise _bad(path, f"one of {known}", repr(path.suffix), "convert the table to CSV")
    return readers[suffix]


def _bad(path: Path | str, expected: str, got: object, remedy: str) -> InvalidFile:
    return InvalidFile(describe(str(path), expected, got, remedy).replace("?.", "?"))


def _indices(path: Path, present: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    if wanted is None:
        return list(range(len(present)))
    if isinstance(wanted, str) or not wanted:
        raise _bad(path, "columns as a list of at least one name", repr(wanted), "give for example ['x', 'y']")
    for name in wanted:
        if name not in present:
            near = get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "choose among those"
            raise _bad(path, f"a column {name!r}", "the columns " + ", ".join(map(repr, present)), hint)
    return [list(present).index(name) for name in wanted]


def _some(path: Path, present: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """As `_indices`, of columns that may be none."""
    return _indices(path, present, wanted) if wanted else []


# ---- CSV ----------------------------------------------------------------------------------------------------------


class _opened:
    """A CSV file as rows, the header first; what cannot be read as text becomes an `InvalidFile`."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Iterator[list[str]]:
        try:
            self.file = self.path.open(encoding="utf-8-sig", newline="")
        except OSError as error:
            raise _bad(self.path, "a readable file", error.strerror, "check its permissions") from error
        return self._rows()

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def _rows(self) -> Iterator[list[str]]:
        try:
            first = self.file.readline()
            if "\0" in first:
                raise _bad(self.path, "text", "a binary file", "export the table as CSV")
            self.file.seek(0)
            # The delimiter that splits the header into most cells; a comma if none does.
            self.reader = csv.reader(self.file, delimiter=max(_DELIMITERS, key=first.count), strict=True)
            header = [name.strip() for name in next(self.reader, [])]
            _check_header(self.path, header)
            yield header
            yield from self.reader
        except UnicodeDecodeError as error:
            raise _bad(self.path, "text in UTF-8", "other bytes", "export the table as CSV in UTF-8") from error
        except csv.Error as error:
            raise _bad(self.path, "CSV", f"{error} on line {self.line}", "correct that line") from error

    @property
    def line(self) -> int:
        """Line of the file that was read last."""
        return self.reader.line_num


def _check_header(path: Path, header: list[str]) -> None:
    if not any(header):
        raise _bad(path, "a header of column names", "an empty first line", "write the names into the first line")
    if all(_number(name) is not None for name in header):
        raise _bad(path, "a header of column names", "numbers", "write the names into the first line")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise _bad(path, "distinct column names", f"{twice[0]!r} twice", "rename one of them")


def _number(cell: str) -> float | None:
    """A cell's number, NaN where it is missing, None where it is neither."""
    try:
        # Python reads 1_000 as a number; a table does not mean that.
        return float(cell) if "_" not in cell else None
    except ValueError:
        return float("nan") if cell.strip().lower() in _MISSING else None


def _read_csv(path: Path, columns: Sequence[str] | None, texts: Sequence[str]) -> tuple[Table, list[list[str]]]:
    values = array("d")
    found: list[list[str]] = [[] for _ in texts]
    source = _opened(path)
    with source as rows:
        header = next(rows)
        index = _indices(path, header, columns)
        kept = list(zip(found, _some(path, header, texts), strict=True))
        for row in rows:
            if not row:
                continue  # a blank line
            if len(row) != len(header):
                cells = f"{len(row)} on line {source.line}"
                raise _bad(path, f"{len(header)} cells in each row", cells, "correct that line")
            for i in index:
                number = _number(row[i])
                if number is None:
                    cell = f"{row[i]!r} on line {source.line}, column {header[i]!r}"
                    raise _bad(path, "numbers", cell, "correct the cell, or read only numeric columns with columns=[…]")
                values.append(number)
            for cells, i in kept:
                cells.append(row[i].strip())
    if not values:
        raise _bad(path, "at least one row under the header", "none", "check the export")
    table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(index))
    return Table([header[i] for i in index], table), found


# ---- binary formats -----------------------------------------------------------------------------------------------


def _read_npy(path: Path, columns: Sequence[str] | None, texts: Sequence[str]) -> tuple[Table, list[list[str]]]:
    try:
        # Mapped copy-on-write: writeable, so that a tensor can share it, and never written back.
        values = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise _bad(path, "a NumPy array of numbers", str(error).splitlines()[0].rstrip("."), "save it again") from error
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.dtype.kind not in "fiub" or 0 in values.shape:
        got = f"shape {list(values.shape)} of {values.dtype}"
        raise _bad(path, "a table [N, D] of numbers", got, "save a two-dimensional array")
    if values.dtype not in (np.float64, np.float32):
        values = values.astype(np.float64)
    names = [f"x{i}" for i in range(values.shape[1])]
    table = Table(names, values)
    found = [_named(table.select([name], str(path)).values[:, 0].tolist()) for name in texts]
    return table if columns is None else table.select(columns, str(path)), found


def _arrow_table(path: Path) -> Any:
    arrow: Any = require("pyarrow", "data")
    module: Any = require("pyarrow.parquet" if path.suffix.lower() == ".parquet" else "pyarrow.feather", "data")
    try:
        return module.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise _bad(path, f"a {path.suffix[1:]} file", reason, "write it again") from error


def _read_arrow(path: Path, columns: Sequence[str] | None, texts: Sequence[str]) -> tuple[Table, list[list[str]]]:
    table = _arrow_table(path)
    index = _indices(path, table.column_names, columns)
    if table.num_rows == 0 or not index:
        raise _bad(path, "at least one row", f"{table.num_rows} rows, {len(index)} columns", "check the export")
    parts = [_arrow_column(path, table.column_names[i], table.column(i)) for i in index]
    found = [_named(table.column(i).to_pylist()) for i in _some(path, table.column_names, texts)]
    return Table([table.column_names[i] for i in index], np.column_stack(parts)), found


def _arrow_column(path: Path, name: str, column: Any) -> np.ndarray:
    arrow: Any = require("pyarrow", "data")
    kind = column.type
    if not (arrow.types.is_integer(kind) or arrow.types.is_floating(kind)):
        remedy = "convert it, or read only numeric columns with columns=[…]"
        raise _bad(path, "numbers", f"{kind} in column {name!r}", remedy)
    return column.cast(arrow.float64()).to_numpy(zero_copy_only=False)


def _named(values: Sequence[Any]) -> list[str]:
    """Values as the text that a CSV file would hold: whole numbers without a point, nothing where one is missing."""
    return [
        "" if v is None or v != v else str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values
    ]
