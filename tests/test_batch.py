"""Batches: what is accepted, what is refused and how it is said, and that nothing is aliased or changed."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import torchem
from torchem.batch import Batch, as_batch, as_tensor, concatenate
from torchem.errors import InvalidArgument, InvalidType, TorchemError


def full(n: int = 6) -> Batch:
    """Every field that stays (a mask becomes NaN in x), each row recognisable."""
    row = torch.arange(float(n), dtype=torch.float64)
    return Batch(
        x=torch.stack([row, row + 100], -1),
        u=row.unsqueeze(-1) * 2,
        weight=row + 1,
        lengths=torch.arange(n),
        evidence=torch.stack([row, -row], -1),
        offset=row * 3,
        trials=torch.arange(n) + 7,
    )


def same(a: Batch, b: Batch) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


# ---- slicing ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 50))
def test_split_covers_every_row_once(n: int, rows: int) -> None:
    pieces = list(full(n).split(rows))
    assert same(concatenate(pieces), full(n))
    assert all(len(p) <= rows for p in pieces)
    assert len(pieces) == max(1, -(-n // rows))


def test_index_takes_all_fields_together() -> None:
    batch = full()
    for index in (slice(1, 4), torch.tensor([4, 0, 0]), torch.arange(6) % 2 == 0):
        part = batch[index]
        for mine, theirs in zip(part.values(), batch.values(), strict=True):
            assert (mine is None) if theirs is None else torch.equal(mine, theirs[index])


def test_total_weight() -> None:
    assert full().total_weight() == 21.0
    assert Batch(torch.zeros(5, 1)).total_weight() == 5.0
    assert Batch(torch.zeros(5, 1)).total_weight().dtype == torch.float64
    # Ten thousand float32 weights of 0.1 are a thousand.
    assert abs(float(Batch(torch.zeros(10_000, 1), weight=torch.full((10_000,), 0.1)).total_weight()) - 1000) < 1e-4


# ---- sequences ----------------------------------------------------------------------------------------------------


def padded() -> Batch:
    """Three sequences of three, one and two frames; frame t of sequence n has x = 10 n + t."""
    frame = torch.tensor([[0, 1, 2], [10, 10, 10], [20, 21, 20]], dtype=torch.float64)
    evidence = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]])
    return Batch(
        x=frame.unsqueeze(-1),
        u=2 * frame.unsqueeze(-1),
        weight=torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64),
        lengths=torch.tensor([3, 1, 2]),
        evidence=evidence.unsqueeze(-1).expand(3, 3, 2),
        offset=3 * frame,
        trials=frame.long(),
    )


def test_frames_mask() -> None:
    assert padded().frames_mask().tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert Batch(torch.zeros(2, 3, 1)).frames_mask() is None
    assert Batch(torch.zeros(2, 3, 1)).frames().tolist() == [3, 3]


def test_sequences_weigh_by_their_frames() -> None:
    assert padded().total_weight() == 3 + 2 + 8
    assert Batch(torch.zeros(2, 3, 1)).total_weight() == 6
    assert Batch(torch.zeros(2, 3, 1), lengths=torch.tensor([3, 1])).total_weight() == 4
    assert Batch(torch.zeros(2, 3, 1), weight=torch.tensor([0.5, 1])).total_weight() == 4.5


def test_rows_are_the_valid_frames() -> None:
    rows = padded().rows()
    assert rows.x[:, 0].tolist() == [0, 1, 2, 10, 20, 21]
    assert rows.weight.tolist() == [1, 1, 1, 2, 4, 4]
    assert rows.lengths is None
    assert rows.evidence.tolist() == [[1, 1]] * 6
    assert (rows.offset / 3).tolist() == rows.trials.tolist() == rows.x[:, 0].tolist()
    whole = Batch(torch.randn(2, 3, 1), weight=torch.ones(2)).rows()
    assert (whole.x.shape, whole.weight.shape) == ((6, 1), (6,))
    table = full()
    assert table.rows() is table


def test_with_frames_cuts_and_pads() -> None:
    batch = padded()
    assert batch.with_frames(3) is batch
    two = batch.with_frames(2)
    assert two.x[..., 0].tolist() == [[0, 1], [10, 10], [20, 21]]
    assert two.lengths.tolist() == [2, 1, 2]
    assert batch.with_frames(1).lengths is None
    five = batch.with_frames(5)
    assert five.x[..., 0].tolist() == [[0, 1, 2, 0, 0], [10] * 5, [20, 21, 20, 20, 20]]
    assert same(five.with_frames(3), batch)
    assert five.evidence[..., 0].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert same(five.rows(), batch.rows())
    assert Batch(torch.zeros(2, 1, 1)).with_frames(2).lengths.tolist() == [1, 1]


@given(st.integers(1, 4), st.permutations(range(3)))
def test_sequences_split_and_join(size: int, order: list[int]) -> None:
    batch = padded()[torch.tensor(order)]
    pieces = [piece.with_frames(int(piece.lengths.max())) for piece in batch.split(size)]
    assert same(concatenate(pieces), batch if len(pieces) > 1 else pieces[0])


def test_batches_join_though_some_have_less_to_say() -> None:
    a = Batch(torch.zeros(2, 1), weight=torch.full((2,), 3.0, dtype=torch.float64))
    b = Batch(torch.zeros(1, 1), evidence=torch.ones(1, 2))
    joined = concatenate([a, b])
    assert joined.weight.tolist() == [3, 3, 1]
    assert joined.evidence.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert concatenate([Batch(torch.zeros(1, 2, 1)), Batch(torch.zeros(1, 2, 1))]).lengths is None
    with pytest.raises(InvalidArgument, match="all have u or none"):
        concatenate([a, Batch(torch.zeros(1, 1), u=torch.zeros(1, 1))])


# ---- a value ------------------------------------------------------------------------------------------------------


def test_is_frozen_and_a_pytree() -> None:
    batch = full()
    with pytest.raises(AttributeError):
        batch.x = torch.zeros(1, 1)  # pyright: ignore
    leaves, spec = pytree.tree_flatten(Batch(torch.zeros(3, 1), weight=torch.ones(3)))
    assert [leaf.shape for leaf in leaves] == [(3, 1), (3,)], "what is absent is no leaf: vmap takes tensors only"
    assert same(pytree.tree_unflatten(leaves, spec), Batch(torch.zeros(3, 1), weight=torch.ones(3)))
    assert same(pytree.tree_map(lambda t: t + 0, batch), batch)
    assert same(copy.deepcopy(batch), batch)
    assert same(batch.to("cpu"), batch)
    assert torch.equal(batch.with_x(batch.x + 1).weight, batch.weight)


def test_vmaps_over_its_rows() -> None:
    batch = Batch(torch.randn(4, 3, 2), weight=torch.rand(4, 3))
    found = torch.func.vmap(lambda b: (b.x.sum(-1) * b.weight).sum())(batch)
    torch.testing.assert_close(found, (batch.x.sum(-1) * batch.weight).sum(-1))
    torch.testing.assert_close(
        torch.func.vmap(lambda p, b: p * b.x.sum(), in_dims=(0, None))(torch.arange(3.0), batch),
        torch.arange(3.0) * batch.x.sum(),
    )


def test_comparing_batches_does_not_raise() -> None:
    batch = full()
    assert batch in [batch]
    assert (batch == Batch(torch.zeros(6, 2))) in (True, False)


# ---- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2], [3, 4]],
        [[1.0, 2.0], [3.0, 4.0]],
        ((1, 2), (3, 4)),
        np.array([[1, 2], [3, 4]], dtype=np.uint16),
        np.array([[1, 2], [3, 4]], dtype=np.float16),
        np.array([[1, 2], [3, 4]], dtype=">f8"),
        np.array([[1, 2], [3, 4]], dtype=np.longdouble),
        np.asfortranarray(np.array([[1.0, 2.0], [3.0, 4.0]])),
        np.array([[2.0, 1.0], [4.0, 3.0]])[:, ::-1],
        np.array([[3.0, 4.0], [1.0, 2.0]])[::-1],
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int8),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 3.0], [2.0, 4.0]]).mT,
    ],
)
def test_tables_of_numbers_are_read(data: object) -> None:
    assert as_batch(data).x.double().tolist() == [[1, 2], [3, 4]]


def test_read_only_and_expanded_memory_is_read_without_warning_and_never_written() -> None:
    array = np.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    assert as_batch(array).x.tolist() == array.tolist()
    expanded = torch.tensor([1.0, 2.0]).expand(4, 2)
    assert as_batch(expanded).x.shape == (4, 2)
    broadcast = np.broadcast_to(np.array([1.0, 2.0]), (4, 2))
    assert as_batch(broadcast).x.tolist() == broadcast.tolist()


def test_a_vector_is_a_column() -> None:
    assert as_batch([1.0, 2.0, 3.0]).x.shape == (3, 1)
    assert as_batch(torch.zeros(3), u=torch.ones(3)).u.shape == (3, 1)


def test_fields_are_kept_and_completed() -> None:
    batch = as_batch(Batch(torch.zeros(3, 1), weight=torch.ones(3)), evidence=torch.zeros(3, 2))
    assert batch.weight.dtype == torch.float64
    assert batch.evidence.shape == (3, 2)
    assert as_batch(Batch(torch.zeros(3, 1), weight=torch.ones(3)), weight=[0, 1, 2]).weight.tolist() == [0, 1, 2]
    x = torch.zeros(3, 1, requires_grad=True)
    assert as_batch(x).x is x, "derivatives with respect to data must pass"


def test_labels_become_evidence() -> None:
    batch = as_batch([[1.0], [2.0]], labels=[1, -1], n_states=2)
    assert batch.evidence.tolist() == [[-torch.inf, 0], [0, 0]]
    both = as_batch([[1.0], [2.0]], labels=[1, -1], n_states=2, evidence=torch.full((2, 2), -3.0))
    assert both.evidence.tolist() == [[-torch.inf, -3], [-3, -3]]
    assert as_batch([[1.0]], labels=[[True, False]]).evidence.tolist() == [[0, -torch.inf]]


def test_large_finite_values_are_finite() -> None:
    assert as_batch([[1e308], [1e308]]).x.shape == (2, 1)
    assert as_batch(torch.full((4, 1), 3e38)).x.shape == (4, 1)


def test_missing_entries_where_allowed() -> None:
    assert as_batch([[torch.nan, 1.0]], allow_missing=True).x.isnan().sum() == 1
    assert as_batch(torch.zeros(0, 2), allow_empty=True).x.shape == (0, 2)


# ---- what is refused ----------------------------------------------------------------------------------------------

X = [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize(
    ("data", "fields", "words"),
    [
        (torch.zeros(2, 2, 2), {}, r"data.*\[N, D\].*\[2, 2, 2\]"),
        (5.0, {}, r"data.*\[N, D\]"),
        (torch.zeros(0, 2), {}, "data.*at least one observation"),
        (torch.zeros(3, 0), {}, "data.*at least one feature"),
        ([], {}, "data.*at least one"),
        ([[1.0], [torch.inf]], {}, "data.*finite.*inf at row 1, column 0"),
        ([[1.0, 2.0], [3.0, -torch.inf]], {}, "data.*-inf at row 1, column 1"),
        ([[torch.inf], [-torch.inf]], {}, "data.*inf at row 0"),
        ([[1.0], [torch.nan]], {}, "data.*NaN at row 1, column 0"),
        ([[1.0], [2.0, 3.0]], {}, "data.*rectangular"),
        (X, {"weight": [1.0, 1.0]}, r"weights.*\[3\].*\[2\]"),
        (X, {"weight": [[1.0], [1.0], [1.0]]}, "weights"),
        (X, {"weight": [1.0, -1.0, 1.0]}, "weights.*-1.* row 1"),
        (X, {"weight": [1.0, 1.0, torch.nan]}, "weights.*nan.* row 2"),
        (X, {"weight": [1.0, torch.inf, 1.0]}, "weights.*inf.* row 1"),
        (X, {"weight": [0.0, 0.0, 0.0]}, "weights.*all zero"),
        (X, {"u": torch.zeros(2, 1)}, r"inputs.*\[3, M\]"),
        (X, {"u": torch.full((3, 1), torch.nan)}, "inputs.*finite"),
        (X, {"evidence": torch.zeros(3)}, r"evidence.*\[3, K\]"),
        (X, {"evidence": torch.zeros(2, 2)}, r"evidence.*\[3, K\]"),
        (X, {"evidence": torch.full((3, 2), torch.nan)}, "evidence"),
        (X, {"evidence": torch.full((3, 2), torch.inf)}, "evidence"),
        (X, {"labels": [0, 1, 2], "n_states": 2}, "labels.*0 to 1.*got 2 at row 2"),
        (X, {"labels": [0, 1], "n_states": 2}, r"labels.*\[3\]"),
        (X, {"labels": [0, 1, 1]}, "n_states"),
    ],
)
def test_values_that_cannot_be_used(data: object, fields: dict, words: str) -> None:
    with pytest.raises(InvalidArgument, match=f"(?s){words}") as caught:
        as_batch(data, **fields)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).count(";") >= 1, "a message says what to do"


@pytest.mark.parametrize(
    "data",
    [
        "file.csv",
        [["a"], ["b"]],
        None,
        {"x": 1},
        np.array([["a"]]),
        np.array([[1, None]], dtype=object),
        np.array([[1 + 2j]]),
        torch.zeros(2, 1, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ],
)
def test_kinds_that_cannot_be_used(data: object) -> None:
    with pytest.raises(InvalidType, match="data: expected") as caught:
        as_batch(data)
    assert isinstance(caught.value, TypeError)


def test_messages_name_the_kind_that_came() -> None:
    with pytest.raises(InvalidType, match="object"):
        as_tensor(np.array([[1, "a"]], dtype=object), "data")
    with pytest.raises(InvalidType, match="complex"):
        as_tensor(np.array([[1 + 2j]]), "data")


def test_missing_entries_must_not_hide_infinite_ones() -> None:
    with pytest.raises(InvalidArgument, match="inf"):
        as_batch([[torch.nan, torch.inf]], allow_missing=True)


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.float16]),
)
def test_any_shape_gives_a_table_or_a_documented_refusal(shape: list[int], dtype: torch.dtype) -> None:
    data = torch.zeros(shape, dtype=dtype)
    kept = data.clone()
    if len(shape) in (1, 2) and data.numel():
        assert as_batch(data).x.shape == (shape[0], shape[1] if len(shape) == 2 else 1)
    else:
        with pytest.raises(TorchemError, match="data: expected"):
            as_batch(data)
    assert torch.equal(data, kept)


def test_a_path_where_numbers_are_expected_is_called_a_path() -> None:
    for act in (torchem.GaussianMixture(2, 2).impute, torchem.GaussianMixture(2, 2).log_prob):
        with pytest.raises(TypeError, match=r"data: expected real numbers, got the text 'file.csv'.*read_table"):
            act("file.csv")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("torched", [True, False])
def test_labels_of_every_whole_type(dtype: type, torched: bool) -> None:
    labels = np.array([0, 1, 1, 0]).astype(dtype)
    given = torch.from_numpy(labels) if torched else labels
    batch = torchem.GaussianMixture(2, 1).batch(torch.zeros(4, 1), labels=given)
    assert batch.evidence is not None
    assert batch.evidence.tolist() == [[0.0, -math.inf], [-math.inf, 0.0], [-math.inf, 0.0], [0.0, -math.inf]]
    beyond = np.array([1, 2]).astype(dtype)
    with pytest.raises(InvalidArgument, match=r"labels: .*got 2 at row 1"):
        torchem.GaussianMixture(2, 1).batch(torch.zeros(2, 1), labels=torch.from_numpy(beyond) if torched else beyond)
