"""Where data come from: tensors, loaders, data sets, files; and what one pass tells a fit before it starts."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import torchem
from tests.regressions import ranks
from tests.regressions.common import blobs, fit, gap, healthy, mixture, rand, randn, rng, started
from torchem import sequences
from torchem.batch import Batch
from torchem.data import Moments, Source
from torchem.errors import InvalidArgument, InvalidFile, InvalidType
from torchem.sequences import as_sequences

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


def test_missing_cells_are_missing_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "table.csv", ["a", "b"], [[1, 2], [3, ""], [5, 6]])
    monkeypatch.setattr(torchem.factors.Gaussian, "handles_missing", True)
    ((_, batch),) = Source(mixture(2, 2), path)
    assert batch.x.isnan().nonzero().tolist() == [[1, 1]]
    monkeypatch.setattr(torchem.factors.Gaussian, "handles_missing", False)
    with pytest.raises(InvalidArgument, match="NaN at row 1, column 1"):
        Source(mixture(2, 2), path)


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
    assert found.moments.weight.tolist() == [60, 60]
    assert found.glance is found.sample


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
        assert not merged.weight.any()
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


def test_missing_entries_do_not_count() -> None:
    x = data().clone()
    x[::3, 0] = torch.nan
    moments = Moments()
    # One piece lacks a column altogether.
    x[30:40, 1] = torch.nan
    for piece in x.split(10):
        moments.add(torchem.Batch(piece))
    for d in range(2):
        seen = x[:, d][~x[:, d].isnan()]
        assert float(moments.weight[d]) == len(seen)
        torch.testing.assert_close(moments.mean[d], seen.mean())
        torch.testing.assert_close(moments.variance[d], seen.var(correction=0))


def test_a_column_that_is_never_seen() -> None:
    moments = Moments()
    moments.add(torchem.Batch(torch.tensor([[1.0, torch.nan], [3.0, torch.nan]])))
    assert moments.mean.tolist() == [2, 0]
    assert moments.variance.tolist() == [1, 0]


# ---- sequences ----------------------------------------------------------------------------------------------------


class Independent(torchem.GaussianMixture):
    """A model of sequences whose frames know nothing of each other: a mixture of all frames says what is right."""

    sequential = True

    def rows(self, batch: Batch) -> Batch:
        rows = batch.rows()
        return rows[~rows.x.isnan().all(-1)]

    def e_step(self, batch: Batch) -> torchem.Stats:
        return super().e_step(self.rows(batch))


LENGTHS = [7, 20, 1, 12, 20]


def parts(x: torch.Tensor | None = None) -> list[torch.Tensor]:
    return list((data() if x is None else x).split(LENGTHS))


def padded(x: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts(x), batch_first=True, padding_value=torch.nan)


def independent(device: Any = "cpu") -> Independent:
    model = Independent(2, 2).to(device, torch.float64)
    model.load_from(started(data(), 2))
    return model


class Sequences(Dataset):
    """A data set of sequences, bare or padded beside their lengths."""

    def __init__(self, padded: bool = False) -> None:
        self.padded = padded

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return (padded()[index], LENGTHS[index]) if self.padded else parts()[index]


class Looped:
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


SEQUENCES: dict[str, Any] = {
    "list": lambda: (parts(), {}),
    "arrays": lambda: ([x.numpy() for x in parts()], {}),
    "nested lists": lambda: ([x.tolist() for x in parts()], {}),
    "concatenated": lambda: (data(), {"lengths": LENGTHS}),
    "padded": lambda: (padded(), {"lengths": LENGTHS}),
    "batch": lambda: (Batch(padded(), lengths=torch.tensor(LENGTHS)), {}),
    "one": lambda: (data(), {}),
    "batches": lambda: ([Batch(data()[:27]), Batch(data()[27:].unsqueeze(0))], {}),
    "data set": lambda: (Sequences(), {}),
    "data set of pairs": lambda: (Sequences(padded=True), {}),
    "tensor data set": lambda: (TensorDataset(data().reshape(4, 15, 2)), {}),
    "tensor data set of pairs": lambda: (TensorDataset(padded(), torch.tensor(LENGTHS)), {}),
    "loader": lambda: (DataLoader(TensorDataset(padded(), torch.tensor(LENGTHS)), batch_size=2), {}),
    "iterable of tensors": lambda: (Looped(*data().reshape(4, 15, 2).split(3)), {}),
    "loader of lists": lambda: (DataLoader(Sequences(), batch_size=2, collate_fn=list), {}),
    "any iterable": lambda: (Looped(parts()[:2], Batch(parts()[2]), (padded()[3:], torch.tensor(LENGTHS[3:]))), {}),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_source_of_sequences_gives_the_same_statistics(name: str) -> None:
    model = independent()
    source, fields = SEQUENCES[name]()
    batches = [batch for _, batch in Source(model, source, **fields)]
    assert all(batch.x.dim() == 3 for batch in batches)
    found = sum((model.e_step(batch) for batch in batches[1:]), model.e_step(batches[0]))
    expected = started(data(), 2)
    torch.testing.assert_close(found["log_likelihood"], expected.e_step(expected.batch(data()))["log_likelihood"])
    survey = Source(model, source, **fields).survey(1000, rng(3))
    assert survey.rows == 60
    torch.testing.assert_close(survey.moments.mean, data().mean(0))
    torch.testing.assert_close(survey.moments.variance, data().var(0, correction=0))
    assert torch.equal(survey.sample.x, data())
    assert torch.equal(survey.glance.rows().x, data())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_count_sequences_and_fit_them(size: int) -> None:
    pieces = [batch for _, batch in Source(independent(), parts(), size)]
    assert [len(batch) for batch in pieces] == [min(size, 5 - i) for i in range(0, 5, size)]
    starts = range(0, 5, size)
    assert [batch.x.shape[1] for batch in pieces] == [max(LENGTHS[i : i + size]) for i in starts]
    assert torch.equal(torch.cat([batch.rows().x for batch in pieces]), data())


def test_weights_inputs_and_labels_lie_as_the_data() -> None:
    labels = torch.arange(60) % 2
    weight = 1 + torch.arange(5.0)
    for source, lengths, u, states in (
        (parts(), None, parts(), list(labels.split(LENGTHS))),
        (data(), LENGTHS, data(), labels),
    ):
        ((_, batch),) = Source(independent(), source, None, weight, u, lengths, states)
        assert batch.weight.tolist() == [1, 2, 3, 4, 5]
        assert torch.equal(batch.rows().u, data())
        assert torch.equal(batch.rows().evidence.argmax(-1), labels)
    ((_, batch),) = Source(mixture(2, 2), data(), labels=torch.nn.functional.one_hot(labels))
    assert torch.equal(batch.evidence.argmax(-1), labels)


def test_missing_frames_are_no_rows() -> None:
    x = data().clone()
    x[[0, 30, 59]] = torch.nan
    survey = Source(independent(), parts(x)).survey(1000, rng(0))
    assert survey.rows == 57
    assert torch.equal(survey.sample.x, x[~x.isnan().any(-1)])
    torch.testing.assert_close(survey.moments.mean, x.nanmean(0))


def test_very_different_lengths_come_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "_PADDING", 0)
    source = Source(independent(), parts(), weight=1 + torch.arange(5.0))
    batches = [batch for _, batch in source]
    assert sum(batch.x.shape[0] * batch.x.shape[1] for batch in batches) < 2 * 60
    order = [int(w) - 1 for batch in batches for w in batch.weight]
    assert sorted(order) == list(range(5))
    assert [source.original(i) for i in range(5)] == order
    assert Source(independent(), data()).original(0) == 0
    split = Source(independent(), parts(), 1)
    assert [len(batch) for _, batch in split] == [1] * 5
    assert [LENGTHS[split.original(i)] for i in range(5)] == [batch.x.shape[1] for _, batch in split]


def test_a_long_sequence_among_short_ones_takes_no_more_than_it_holds() -> None:
    x = [torch.zeros(1_000_000, 2)] + [torch.ones(10, 2)] * 1000
    source = Source(independent(), x)
    assert sum(batch.x.numel() for _, batch in source) == 2 * 1_010_000
    survey = source.survey(500, rng(0))
    assert (survey.rows, len(survey.sample)) == (1_010_000, 500)
    assert survey.glance.x.shape == (1, 8192, 2)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 10))
def test_a_glance_is_small_and_begins_at_the_beginning(lengths: list[int], size: int) -> None:
    x = [torch.full((n, 2), float(i)) for i, n in enumerate(lengths)]
    source = Source(independent(), [as_sequences(x[i : i + size]) for i in range(0, len(x), size)])
    glance = source.survey(10, rng(0)).glance
    assert 1 <= glance.x.shape[0] * glance.x.shape[1] <= 8192
    assert glance.frames().tolist() == lengths[: len(glance)]
    assert glance.x[:, 0, 0].tolist() == list(range(len(glance)))
    more = len(glance) + 1
    assert more > len(lengths) or more * max(lengths[:more]) > 8192


def test_a_sample_of_frames_is_even() -> None:
    x = torch.arange(10_000.0, dtype=torch.float64).unsqueeze(-1).expand(10_000, 2)
    sample = Source(independent(), list(x.split([4000, 5, 5995]))).survey(1000, rng(3)).sample.x[:, 0]
    assert len(set(sample.tolist())) == 1000
    assert bool(((torch.histc(sample, 10, 0, 10_000) - 100).abs() < 50).all())


@pytest.mark.parametrize(
    ("source", "fields", "words"),
    [
        (TensorDataset(torch.zeros(60, 2)), {}, r"data set of sequences \[N, T, D\], got shape \[60, 2\]"),
        (DataLoader(TensorDataset(torch.zeros(60, 2)), batch_size=9), {}, "data set of sequences"),
        (DataLoader(Rows(), batch_size=9), {}, r"\[B, T, D\] from a loader, got shape \[9, 2\]"),
        (Looped({"x": 1}), {}, "from a loader, got dict"),
        (Looped((torch.zeros(1, 2, 2), torch.ones(1), torch.ones(1))), {}, "3 parts"),
        ([Batch(torch.zeros(3, 2))], {"lengths": [3]}, "nothing beside a loader, got lengths"),
        ([Batch(torch.zeros(3, 2))], {"labels": [0, 0, 0]}, "nothing beside a loader, got labels"),
        ([torch.zeros(3, 2)], {"lengths": [3]}, "none beside a list"),
        ([torch.zeros(3, 2)], {"batch_size": 2}, "at most 1"),
        ([], {}, "at least one sequence"),
    ],
)
def test_sequences_that_cannot_be_read(source: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        list(Source(independent(), source, **fields))


def test_lengths_for_a_model_of_rows() -> None:
    with pytest.raises(InvalidArgument, match="lengths: expected none"):
        Source(mixture(2, 2), data(), lengths=[30, 30])


def _shards(rank: int, world: int) -> Any:
    """The second rank has no sequences, in one of three ways."""
    found = []
    for nothing in (torch.zeros(0, 2), [], Looped()):
        source = Source(independent(), parts() if rank == 0 else nothing, weight=None)
        survey = source.survey(1000, rng(0))
        assert source.nothing is not None
        batches = [list(batch.x.shape) for _, batch in source]
        found.append((survey.rows, survey.moments.mean.tolist(), len(survey.sample), len(survey.glance), batches))
        assert source.nothing.x.shape == (0, 1, 2)
    return found


def test_ranks_without_sequences() -> None:
    (outcomes,) = ranks.run(2, [_shards])
    assert [outcome.message for outcome in outcomes] == ["", ""]
    for mine, theirs in zip(outcomes[0].value, outcomes[1].value, strict=True):
        assert mine[:4] == theirs[:4]
        assert mine[0] == 60
        assert mine[2:4] == (60, 5)
        assert mine[4] == [[5, 20, 2]]
        assert theirs[4] == [[0, 1, 2]]


def test_nothing_is_made_in_the_size_of_a_mapped_file(tmp_path: Path) -> None:
    """A file may be larger than memory: neither checks nor the survey copy it, convert it or number its rows."""
    rows = 40_000
    np.save(tmp_path / "table.npy", randn(rows, 2).float().numpy())

    class Largest(TorchDispatchMode):
        """Numbers of the largest new tensor, and of the largest that an operation converts on its way."""

        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            given = [value for value in args if isinstance(value, torch.Tensor)]
            if isinstance(out, torch.Tensor):
                shared = {value.untyped_storage().data_ptr() for value in given}
                self.numbers = max(self.numbers, 0 if out.untyped_storage().data_ptr() in shared else out.numel())
            converted = [value.numel() for value in given if kwargs.get("dtype", value.dtype) != value.dtype]
            self.numbers = max(self.numbers, *converted, 0)
            return out

    model = mixture(2, 2).float()
    with Largest() as largest:
        Source(model, tmp_path / "table.npy").survey(100, rng())
    assert 0 < largest.numbers < rows
