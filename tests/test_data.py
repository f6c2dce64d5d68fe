"""Where data come from: tensors, loaders, data sets, files; and what one pass tells a fit before it starts."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchem
from tests.regressions.common import blobs, fit, gap, healthy, mixture, rand, randn, rng, started
from torchem.data import Moments, Source
from torchem.errors import InvalidArgument, InvalidFile, InvalidType

FIXED: dict[str, Any] = {"init": None, "tol": 0.0, "max_iter": 5}


def data() -> torch.Tensor:
    return blobs(60, 2, 2, gap=3.0)


def reference(**options: Any) -> torchem.Result:
    return fit(started(data(), 2), data(), **FIXED, **options)


class Rows(Dataset):
    """A data set of single rows; with weights it yields Batch-like pairs."""

    def __init__(self, weight: torch.Tensor | None = None) -> None:
        self.weight = weight

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        row = data()[index]
        return row if self.weight is None else (row, self.weight[index])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(data())


SOURCES = {
    "tensor": data,
    "array": lambda: data().numpy(),
    "lists": lambda: data().tolist(),
    "batch": lambda: torchem.Batch(data()),
    "tensor data set": lambda: TensorDataset(data()),
    "rows": Rows,
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(data()), batch_size=13),
    "loader of rows": lambda: DataLoader(Rows(), batch_size=60),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=7),
    "shuffling loader": lambda: DataLoader(TensorDataset(data()), batch_size=13, shuffle=True),
    "loader of arrays": lambda: DataLoader(Rows(), batch_size=20, collate_fn=lambda rows: torch.stack(rows).numpy()),
    "loader of batches": lambda: DataLoader(
        Rows(), batch_size=20, collate_fn=lambda rows: torchem.Batch(torch.stack(rows))
    ),
    "tuple of columns": lambda: tuple(map(tuple, data().tolist())),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_fit(name: str, device: torch.device) -> None:
    model = started(data(), 2, device=device)
    result = fit(model, SOURCES[name](), **FIXED)
    expected = reference()
    assert gap(model, expected.model) < 1e-10
    assert result.history == pytest.approx(expected.history, rel=1e-10)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_can_be_started_from(name: str, device: torch.device) -> None:
    model = mixture(2, 2, device=device)
    result = fit(model, SOURCES[name](), restarts=2)
    healthy(model)
    assert result.bound == pytest.approx(fit(mixture(2, 2), data(), restarts=2).bound, rel=1e-3)


@pytest.mark.parametrize("make", [Rows, lambda w: TensorDataset(data(), w)], ids=["rows", "tensor data set"])
@pytest.mark.parametrize("rows", [7, 60])
def test_weights_come_with_the_rows(make: Any, rows: int, device: torch.device) -> None:
    weight = 0.5 + rand(60)
    expected = reference(weights=weight)
    for source in (make(weight), DataLoader(make(weight), batch_size=rows)):
        result = fit(
            started(data(), 2, device=device), source, batch_size=rows if isinstance(source, Dataset) else None, **FIXED
        )
        assert gap(result.model, expected.model) < 1e-10
        assert result.history == pytest.approx(expected.history, rel=1e-10)


def test_a_list_of_batches_is_a_source(device: torch.device) -> None:
    # What the message about iterators advises.
    batches = [torchem.Batch(piece) for piece in data().split(25)]
    result = fit(started(data(), 2, device=device), batches, **FIXED)
    assert result.history == pytest.approx(reference().history, rel=1e-10)


def test_a_loader_of_one_rank_may_end_short(device: torch.device) -> None:
    loader = DataLoader(TensorDataset(data()), batch_size=50)
    assert [len(batch) for _, batch in Source(mixture(2, 2), loader)] == [50, 10]


# ---- files --------------------------------------------------------------------------------------------------------


def write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path(kind: Any, tmp_path: Path, device: torch.device) -> None:
    path = write(tmp_path / "table.csv", ["a", "b"], data().tolist())
    result = fit(started(data(), 2, device=device), kind(path), **FIXED)
    assert result.history == pytest.approx(reference().history, rel=1e-10)


def test_a_path_in_pieces_and_with_weights(tmp_path: Path, device: torch.device) -> None:
    path = write(tmp_path / "table.csv", ["a", "b"], data().tolist())
    weight = rand(60)
    result = fit(started(data(), 2, device=device), path, batch_size=17, weights=weight, **FIXED)
    assert result.history == pytest.approx(reference(weights=weight).history, rel=1e-10)


def test_a_numpy_file(tmp_path: Path, device: torch.device) -> None:
    np.save(tmp_path / "table.npy", data().numpy())
    result = fit(started(data(), 2, device=device), tmp_path / "table.npy", **FIXED)
    assert result.history == pytest.approx(reference().history, rel=1e-10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("", "header"),
        ("a,b\n", "row"),
        ("a,b\n1,2\n3\n", "cells"),
        ("a,b\n1,x\n", "'x'"),
        ("\x00\x01\x02", "expected"),
    ],
)
def test_a_file_that_cannot_be_read(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidFile, match=said) as error:
        fit(mixture(2, 2), path)
    assert str(path) in str(error.value)


def test_missing_cells_are_missing_entries(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", ["a", "b"], [[1, 2], [3, ""], [5, 6]])
    with pytest.raises(InvalidArgument, match="NaN at row 1, column 1"):
        fit(mixture(2, 2), path)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_iterators_run_dry() -> None:
    with pytest.raises(InvalidType, match="pass over repeatedly"):
        fit(mixture(2, 2), iter([data()]))


def test_weights_beside_a_loader() -> None:
    with pytest.raises(InvalidArgument, match="let the loader yield Batch objects"):
        fit(mixture(2, 2), DataLoader(TensorDataset(data())), weights=torch.ones(60))
    with pytest.raises(InvalidArgument, match="let the loader yield Batch objects"):
        fit(mixture(2, 2), DataLoader(TensorDataset(data())), inputs=torch.ones(60, 1))


def test_an_empty_loader() -> None:
    with pytest.raises(InvalidArgument, match="at least one batch"):
        fit(mixture(2, 2), DataLoader(TensorDataset(torch.empty(0, 2))))


def test_a_loader_of_three_parts() -> None:
    loader = DataLoader(TensorDataset(data(), torch.ones(60), torch.ones(60)), batch_size=10)
    with pytest.raises(InvalidArgument, match="3 parts"):
        fit(mixture(2, 2), loader)


def test_a_loader_of_mappings() -> None:
    loader = DataLoader([{"x": row} for row in data()], batch_size=10)  # pyright: ignore
    with pytest.raises(InvalidType):
        fit(mixture(2, 2), loader)


@pytest.mark.parametrize("rows", [0, -3, 61])
def test_batch_size_out_of_range(rows: int) -> None:
    with pytest.raises(InvalidArgument, match="batch_size: expected"):
        fit(mixture(2, 2), data(), batch_size=rows)


def test_a_batch_of_wrong_shape_is_found_wherever_it_comes() -> None:
    with pytest.raises(InvalidArgument, match="2 features"):
        fit(mixture(2, 2), [torchem.Batch(data()), torchem.Batch(randn(5, 3))])


# ---- the survey ---------------------------------------------------------------------------------------------------


def survey(source: Any, limit: int = 1000, **fields: Any) -> Any:
    return Source(mixture(2, 2), source, **fields).survey(limit, rng(3))


@pytest.mark.parametrize("name", SOURCES)
def test_moments_of_the_columns(name: str) -> None:
    found = survey(SOURCES[name]())
    assert found.rows == 60
    torch.testing.assert_close(found.moments.mean, data().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.moments.variance, data().var(0, correction=0), rtol=1e-12, atol=1e-12)
    assert float(found.moments.weight) == 60


def test_a_small_table_is_its_own_sample() -> None:
    assert torch.equal(survey(data()).sample.x, data())


@pytest.mark.parametrize("rows", [None, 100, 999])
def test_a_sample_is_drawn_evenly_and_without_repetition(rows: int | None) -> None:
    x = torch.arange(10_000.0, dtype=torch.float64).unsqueeze(-1).expand(10_000, 2)
    source = x if rows is None else DataLoader(TensorDataset(x), batch_size=rows)
    sample = survey(source, 1000).sample.x[:, 0]
    assert len(set(sample.tolist())) == 1000
    # Five standard errors about the middle, and each tenth of the rows has its share.
    assert float(sample.mean()) == pytest.approx(4999.5, abs=5 * 2887 / 1000**0.5)
    share = torch.histc(sample, 10, 0, 10_000)
    assert bool(((share - 100).abs() < 50).all())


def test_a_sample_keeps_rows_and_weights_together() -> None:
    x = torch.arange(5000.0, dtype=torch.float64).unsqueeze(-1).expand(5000, 2)
    for source in (x, None):
        found = (
            survey(x, 100, weight=x[:, 0] + 1) if source is not None
            else survey(DataLoader(TensorDataset(x, x[:, 0] + 1), batch_size=300), 100)
        )  # fmt: skip
        assert torch.equal(found.sample.weight, found.sample.x[:, 0] + 1)
        assert len(found.sample) == 100


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_moments_merge(seed: int, sizes: list[int], offset: float) -> None:
    x = randn(sum(sizes), 3, seed=seed) + offset
    weight = torch.rand(len(x), generator=rng(seed), dtype=torch.float64)
    parts = []
    for piece, w in zip(x.split(sizes), weight.split(sizes), strict=True):
        moments = Moments()
        moments.add(torchem.Batch(piece, weight=w))
        parts.append(moments)
    merged = Moments.merged(parts)
    if not len(x):
        assert float(merged.weight) == 0
        return
    mean = (weight.unsqueeze(-1) * x).sum(0) / weight.sum()
    variance = (weight.unsqueeze(-1) * (x - mean).square()).sum(0) / weight.sum()
    torch.testing.assert_close(merged.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged.variance, variance, rtol=1e-6, atol=1e-9)


def test_moments_far_from_the_origin() -> None:
    moments = Moments()
    x = randn(1000, 2) + 1e7
    for piece in x.split(100):
        moments.add(torchem.Batch(piece.float()))
    torch.testing.assert_close(moments.variance, x.float().double().var(0, correction=0), rtol=1e-9, atol=1e-9)


def test_weightless_rows_do_not_count() -> None:
    weight = torch.cat([torch.ones(60), torch.zeros(3)])
    found = survey(torch.cat([data(), torch.full((3, 2), 1e9).double()]), weight=weight)
    torch.testing.assert_close(found.moments.mean, data().mean(0))
    torch.testing.assert_close(found.moments.variance, data().var(0, correction=0))
