"""Tables from files, and what is said of those that are none."""

from pathlib import Path

import numpy as np
import pytest

import torchem
from torchem.errors import InvalidFile
from torchem.tables import read_columns, read_sequences, read_table

DATASETS = Path(torchem.__file__).parent / "datasets"


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_faithful_is_whole():
    table = read_table(DATASETS / "faithful.csv")
    assert table.columns == ["eruptions", "waiting"]
    assert table.values.shape == (272, 2)
    np.testing.assert_allclose(table.values.mean(0), [3.487783, 70.897059], rtol=1e-6)


def test_columns_come_in_the_order_asked_for(tmp_path):
    path = write(tmp_path, "a,b,name\n1,2,x\n3,4,y\n")
    table = read_table(path, ["b", "a"])
    assert table.columns == ["b", "a"]
    assert table.values.tolist() == [[2, 1], [4, 3]]
    assert read_columns(path) == ["a", "b", "name"]


@pytest.mark.parametrize("cell", ["", "NA", "NaN", "nan", " na "])
def test_missing_entries(tmp_path, cell):
    assert np.isnan(read_table(write(tmp_path, f"a,b\n1,{cell}\n")).values[0, 1])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_line_ends_quotes_mark_and_blank_lines(tmp_path, separator, end):
    text = end.join([f'"a"{separator}b', f"1{separator}2", "", f"3{separator}-4e-1", "", ""])
    table = read_table(write(tmp_path, "\ufeff" + text))
    assert table.columns == ["a", "b"]
    assert table.values.tolist() == [[1, 2], [3, -0.4]]


def test_one_column_with_a_blank_line(tmp_path):
    assert read_table(write(tmp_path, "a\n1\n\n2\n")).values.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,x\n", "expected numbers, got 'x' on line 3, column 'b'"),
        ("a,b\n1,2\n3,1_000\n", "'1_000' on line 3"),
        ("a,b\n1,2\n3\n", "expected 2 cells in each row, got 1 on line 3"),
        ("a,b\n1,2,3\n", "got 3 on line 2"),
        ("a,b\n", "expected at least one row"),
        ("", "an empty first line"),
        ("1,2\n3,4\n", "a header of column names, got numbers"),
        ("a,a\n1,2\n", "distinct column names, got 'a' twice"),
        ('a,b\n1,"2\n', "expected CSV"),
        (b"a,b\n1,\xff\xfe\n", "text in UTF-8"),
        (b"\x00\x01\x02\n1\n", "t.csv"),
    ],
)
def test_malformed_csv_is_described(tmp_path, text, message):
    with pytest.raises(InvalidFile) as error:
        read_table(write(tmp_path, text))
    assert message in str(error.value)
    assert "t.csv" in str(error.value)


def test_a_missing_column_names_the_nearest(tmp_path):
    path = write(tmp_path, "eruptions,waiting\n1,2\n")
    with pytest.raises(InvalidFile, match=r"'eruptions', 'waiting'; did you mean 'waiting'\?$"):
        read_table(path, ["wating"])
    with pytest.raises(InvalidFile, match="at least one name"):
        read_table(path, [])


@pytest.mark.parametrize("name", ["none.csv", "folder", "a.xlsx"])
def test_what_is_no_table(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(InvalidFile, match=name):
        read_table(tmp_path / name)
    with pytest.raises(InvalidFile, match=name):
        read_columns(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int32])
def test_numpy_arrays_are_mapped(tmp_path, dtype):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    table = read_table(tmp_path / "a.npy")
    assert table.columns == ["x0", "x1"]
    np.testing.assert_array_equal(table.values, values)
    assert read_table(tmp_path / "a.npy", ["x1"]).values.tolist() == [[1], [3], [5]]
    if dtype != np.int32:
        assert isinstance(table.values, np.memmap)
    assert table.values.dtype == (np.float64 if dtype == np.int32 else dtype)
    del table


@pytest.mark.parametrize(
    "values", [np.array([{}], dtype=object), np.zeros((2, 2, 2)), np.zeros((0, 2)), np.array(["a"])]
)
def test_numpy_files_that_are_no_table(tmp_path, values):
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(InvalidFile, match=r"a\.npy"):
        read_table(tmp_path / "a.npy")


def test_truncated_numpy_file(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((50, 2)))
    content = (tmp_path / "a.npy").read_bytes()
    for size in (0, 5, len(content) - 8):
        with pytest.raises(InvalidFile, match=r"a\.npy"):
            read_table(write(tmp_path, content[:size], "a.npy"))


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_arrow_formats(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    path = tmp_path / f"a.{kind}"
    table = arrow.table({"a": [1, 2], "b": [0.5, None], "name": ["x", "y"]})
    parquet.write_table(table, path) if kind == "parquet" else feather.write_feather(table, str(path))
    found = read_table(path, ["b", "a"])
    assert found.columns == ["b", "a"]
    np.testing.assert_array_equal(found.values, [[0.5, 1], [np.nan, 2]])
    assert read_columns(path) == ["a", "b", "name"]
    with pytest.raises(InvalidFile, match="string in column 'name'"):
        read_table(path)
    with pytest.raises(InvalidFile, match="did you mean 'name'"):
        read_table(path, ["nme"])
    with pytest.raises(InvalidFile, match=f"expected a {kind} file"):
        read_table(write(tmp_path, b"junk", f"b.{kind}"))


# ---- sequences ----------------------------------------------------------------------------------------------------

LONG = "id,t,x,y\nb,0,1,2\na,0,3,4\nb,1,5,\na,1,7,8\nb,2,,\n"


def test_rows_become_sequences_in_order_of_appearance(tmp_path):
    found = read_sequences(write(tmp_path, LONG), sequence="id", index="t")
    assert found.names == ["b", "a"]
    assert found.lengths.tolist() == [3, 2]
    assert found.table.columns == ["x", "y"]
    assert found.rows.tolist() == [0, 2, 4, 1, 3]
    assert found.index.tolist() == [0, 1, 2, 0, 1]
    first, second = found.sequences
    np.testing.assert_array_equal(first, [[1, 2], [5, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(second, [[3, 4], [7, 8]])
    batch = torchem.sequences.as_sequences(found.table.values, lengths=found.lengths, allow_missing=True)
    assert batch.lengths.tolist() == [3, 2]


def test_some_columns_and_a_time_of_text(tmp_path):
    path = write(tmp_path, "when,id,x,note\n2020-01-01,1,5,q\n2020-01-02,1,6,r\n")
    found = read_sequences(path, ["x"], sequence="id", index="when")
    assert found.names == ["1"]
    assert found.index.tolist() == ["2020-01-01", "2020-01-02"]
    assert found.sequences[0].tolist() == [[5], [6]]
    with pytest.raises(InvalidFile, match="'q' on line 2"):
        read_sequences(path, sequence="id", index="when")


def test_without_a_name_all_rows_are_one_sequence(tmp_path):
    found = read_sequences(write(tmp_path, "t,x\n0,1\n1,2\n", "walk.csv"), index="t")
    assert (found.names, found.lengths.tolist(), found.table.columns) == (["walk"], [2], ["x"])
    assert found.sequences[0].tolist() == [[1], [2]]
    assert read_sequences(write(tmp_path, "t,x\n0,1\n1,2\n", "walk.csv")).index is None


def test_sequences_that_lie_together_are_not_copied(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[2.0, 1], [2, 2], [7.5, 3]]))
    found = read_sequences(tmp_path / "a.npy", ["x0", "x1"], sequence="x0")
    assert found.names == ["2", "7.5"]
    assert [x[:, 1].tolist() for x in found.sequences] == [[1, 2], [3]]
    assert isinstance(found.table.values, np.memmap)
    del found


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_sequences_from_arrow(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, parquet

    path = tmp_path / f"a.{kind}"
    table = arrow.table({"id": [7, 8, 7], "x": [1.0, None, 3.0], "t": ["p", "q", "r"]})
    parquet.write_table(table, path) if kind == "parquet" else feather.write_feather(table, str(path))
    found = read_sequences(path, sequence="id", index="t")
    assert (found.names, found.table.columns) == (["7", "8"], ["x"])
    np.testing.assert_array_equal(found.table.values, [[1], [3], [np.nan]])
    assert found.index.tolist() == ["p", "r", "q"]


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("id,x\na,1\n,2\n", {"sequence": "id"}, "an empty cell in row 1 of column 'id'"),
        ("id,x\na,1\n", {"sequence": "idd"}, "did you mean 'id'"),
        ("id,x\na,1\n", {"index": "time"}, "a column 'time'"),
        ("id,x\na,u\n", {"sequence": "id"}, "'u' on line 2"),
        ("id\na\n", {"sequence": "id"}, "at least one name"),
    ],
)
def test_sequences_that_are_none(tmp_path, text, named, message):
    with pytest.raises(InvalidFile) as error:
        read_sequences(write(tmp_path, text), **named)
    assert message in str(error.value)
    assert "t.csv" in str(error.value)
