"""Sequences at the edge: every form gives the same batch, padding never matters, bad input is named."""

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchem import sequences
from torchem.batch import Batch, evidence_from_labels
from torchem.errors import InvalidArgument, InvalidType, TorchemError
from torchem.sequences import as_buckets, as_sequences

NAN, INF = torch.nan, torch.inf


def same(a: Batch, b: Batch) -> bool:
    return all(
        (x is None and y is None)
        or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x.nan_to_num(7), y.nan_to_num(7)))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


class Ragged(NamedTuple):
    """Sequences with all that may stand beside them, as lists."""

    x: list[torch.Tensor]
    fields: dict[str, list[torch.Tensor]]
    weight: torch.Tensor | None
    k: int

    @property
    def lengths(self) -> list[int]:
        return [len(x) for x in self.x]

    def concatenated(self) -> dict[str, Any]:
        joined = {name: torch.cat(parts) for name, parts in self.fields.items()}
        return {"data": torch.cat(self.x), "lengths": self.lengths, "weight": self.weight, "n_states": self.k, **joined}

    def listed(self) -> dict[str, Any]:
        return {"data": self.x, "weight": self.weight, "n_states": self.k, **self.fields}

    def padded(self, garbage: float) -> dict[str, Any]:
        fields = {name: pad(parts, garbage) for name, parts in self.fields.items()}
        padded = pad(self.x, garbage)
        return {"data": padded, "lengths": self.lengths, "weight": self.weight, "n_states": self.k, **fields}


def pad(parts: list[torch.Tensor], garbage: float) -> torch.Tensor:
    garbage = garbage if parts[0].is_floating_point() else 99
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=garbage)


@st.composite
def ragged(draw: st.DrawFn) -> Ragged:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    d, m, k = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    kind = draw(st.sampled_from(["float32", "float64", "int64"]))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = [(4 * normal(t, d)).to(getattr(torch, kind)) for t in lengths]
    if kind != "int64" and draw(st.booleans()):
        for part in x:
            part[torch.rand(len(part), generator=generator) < 0.4] = NAN
    fields: dict[str, list[torch.Tensor]] = {}
    if draw(st.booleans()):
        fields["u"] = [normal(t, m) for t in lengths]
    if draw(st.booleans()):
        fields["evidence"] = [normal(t, k) for t in lengths]
    if draw(st.booleans()):
        fields["labels"] = [torch.randint(-1, k, (t,), generator=generator) for t in lengths]
    weight = torch.rand(len(lengths), generator=generator) + 0.1 if draw(st.booleans()) else None
    return Ragged(x, fields, weight, k)


# ---- one meaning, many forms --------------------------------------------------------------------------------------


@given(ragged(), st.sampled_from([0.0, 1e30, NAN, INF]))
def test_list_concatenated_and_padded_are_one(data: Ragged, garbage: float) -> None:
    expected = as_sequences(**data.listed())
    n, t = len(data.lengths), max(data.lengths)
    assert expected.x.shape[:2] == (n, t)
    assert (expected.lengths is None) == (min(data.lengths) == t)
    assert expected.lengths is None or expected.lengths.tolist() == data.lengths
    assert same(as_sequences(**data.concatenated()), expected)
    assert same(as_sequences(**data.padded(garbage)), expected)
    arrays = {"x": [x.numpy() for x in data.x], **{k: [v.numpy() for v in p] for k, p in data.fields.items()}}
    assert same(as_sequences(arrays.pop("x"), weight=data.weight, n_states=data.k, **arrays), expected)


@given(ragged())
def test_nested_lists_too(data: Ragged) -> None:
    with_lists = as_sequences([x.tolist() for x in data.x])
    assert same(with_lists, as_sequences([x.double() if x.is_floating_point() else x for x in data.x]))


@given(ragged())
def test_rows_give_back_what_came(data: Ragged) -> None:
    batch = as_sequences(**data.listed())
    rows = batch.rows()
    assert torch.equal(rows.x.nan_to_num(7), torch.cat(data.x).nan_to_num(7))
    if "u" in data.fields:
        assert torch.equal(rows.u, torch.cat(data.fields["u"]))
    if data.weight is not None:
        assert torch.equal(rows.weight, data.weight.double().repeat_interleave(torch.tensor(data.lengths)))
    total = float(rows.total_weight())
    assert float(batch.total_weight()) == pytest.approx(total, rel=1e-12)


@given(ragged(), st.sampled_from([0.0, NAN, INF]))
def test_a_batch_is_read_as_its_fields_and_is_then_left_alone(data: Ragged, garbage: float) -> None:
    expected = as_sequences(**data.listed())
    for form in (data.concatenated(), data.padded(garbage)):
        labels, k = form.pop("labels", None), form.pop("n_states")
        lengths = torch.tensor(form.pop("lengths"))
        batch = Batch(form.pop("data"), lengths=lengths, **form)
        assert same(as_sequences(batch, labels=labels, n_states=k), expected)
    again = as_sequences(expected)
    for mine, theirs in zip(again.values(), expected.values(), strict=True):
        if theirs is not None and not theirs.isnan().any():
            assert mine.data_ptr() == theirs.data_ptr(), "nothing is copied that is right already"
    assert same(again, expected)


@given(ragged())
def test_padding_is_valid_data(data: Ragged) -> None:
    batch = as_sequences(**data.listed())
    mask = batch.frames_mask()
    if mask is None:
        return
    for n, (x, length) in enumerate(zip(data.x, data.lengths, strict=True)):
        whole = [t for t in range(length) if not x[t].isnan().any()] or [0]
        for t in range(length, batch.x.shape[1]):
            assert torch.equal(batch.x[n, t].nan_to_num(7), x[whole[0]].nan_to_num(7))
            if batch.u is not None:
                assert torch.equal(batch.u[n, t], batch.u[n, whole[0]])
    if batch.evidence is not None:
        assert not batch.evidence[~mask].any()


@given(ragged())
def test_input_is_never_changed(data: Ragged) -> None:
    kept = copy.deepcopy(data)
    for form in (data.listed(), data.concatenated(), data.padded(NAN)):
        untouched = copy.deepcopy(form)
        batch = as_sequences(**form)
        batch.rows()
        batch.with_frames(2)
        batch.with_frames(9)
        torch.testing.assert_close(form, untouched, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(data.x, kept.x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("data", "lengths", "shape"),
    [
        ([1.0, 2.0, 3.0], None, (1, 3, 1)),
        (torch.zeros(4), None, (1, 4, 1)),
        (np.zeros((4, 2)), None, (1, 4, 2)),
        ([[1, 2], [3, 4], [5, 6]], None, (1, 3, 2)),
        ([[1.0], [2.0], [3.0]], [1, 2], (2, 2, 1)),
        (torch.zeros(5), torch.tensor([2, 3]), (2, 3, 1)),
        ([[1, 2, 3], [4, 5]], None, (2, 3, 1)),
        ([[[1], [2]], [[3], [4]]], None, (2, 2, 1)),
        (([[1, 1], [2, 2]], [[3, 3]]), None, (2, 2, 2)),
        ([torch.zeros(3), torch.zeros(3)], None, (2, 3, 1)),
        ([np.zeros((3, 2))], None, (1, 3, 2)),
        ([torch.zeros(2, 1), [[1.0]], np.zeros(3)], None, (3, 3, 1)),
        ([torch.tensor(1.0), torch.tensor(2.0)], None, (1, 2, 1)),
        ([np.float64(1.0), np.float64(2.0)], None, (1, 2, 1)),
        (torch.zeros(2, 5, 3), np.array([2.0, 4.0]), (2, 5, 3)),
        (torch.zeros(2, 5, 3), [5, 5], (2, 5, 3)),
    ],
)
def test_forms(data: Any, lengths: Any, shape: tuple[int, ...]) -> None:
    batch = as_sequences(data, lengths=lengths)
    assert batch.x.shape == shape
    if batch.lengths is not None:
        assert batch.lengths.dtype == torch.int64


def test_what_can_be_is_a_view_and_carries_derivatives() -> None:
    x = torch.randn(6, 2, requires_grad=True)
    for batch in (as_sequences(x), as_sequences(x, lengths=[3, 3]), as_sequences(x.reshape(2, 3, 2))):
        assert batch.x.data_ptr() == x.data_ptr()
        assert batch.x.requires_grad
    (gradient,) = torch.autograd.grad(as_sequences(x, lengths=[4, 2]).rows().x.sum(), x)
    assert torch.equal(gradient, torch.ones(6, 2))


def test_read_only_and_strided_arrays() -> None:
    array = np.arange(12.0).reshape(2, 3, 2)
    array.flags.writeable = False
    for data in (array, array[:, ::-1][:, ::-1], np.asfortranarray(array), list(array)):
        assert as_sequences(data, lengths=None if isinstance(data, list) else [3, 3]).x.tolist() == array.tolist()
    assert as_sequences(array, lengths=[3, 1]).x[1].tolist() == [[6, 7]] * 3


def test_integers_stay_integers() -> None:
    for data in ([[0, 1], [2]], [torch.tensor([0, 1]), torch.tensor([2])], np.array([0, 1, 2])):
        assert not as_sequences(data).x.is_floating_point()


def test_labels_and_evidence_add() -> None:
    evidence = [torch.full((2, 2), -1.0), torch.full((1, 2), -2.0)]
    batch = as_sequences([[1.0, 2.0], [3.0]], evidence=evidence, labels=[[0, -1], [1]], n_states=2)
    assert batch.evidence.tolist() == [[[-1, -INF], [-1, -1]], [[-INF, -2], [0, 0]]]


# ---- missing ------------------------------------------------------------------------------------------------------


def test_whole_frames_may_be_missing() -> None:
    for data in (torch.tensor([[1.0, 2.0], [NAN, NAN], [3.0, 4.0]]), torch.tensor([[1.0], [NAN]])):
        assert as_sequences(data).x.isnan().any()


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (torch.tensor([[[1.0, 2.0], [NAN, 2.0]]]), "sequence 0, frame 1, column 0"),
        ([torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, NAN]])], "sequence 1, frame 1, column 1"),
    ],
)
def test_single_entries_only_where_they_are_handled(data: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=f"missing in all columns, got NaN at {where}; set the whole frame"):
        as_sequences(data)
    assert as_sequences(data, allow_missing=True).x.isnan().any()


def test_padding_is_complete_where_a_sequence_begins_with_missing_frames() -> None:
    batch = as_sequences([[NAN, 5.0], [1.0, 2.0, 3.0], [NAN]])
    assert batch.x[0, 2] == 5.0
    assert batch.with_frames(4).x[0, 2:, 0].tolist() == [5.0, 5.0]
    assert bool(batch.x[2].isnan().all()), "nothing in the sequence is complete"


# ---- what is refused ----------------------------------------------------------------------------------------------

X3 = torch.zeros(2, 4, 1)
LIST = [torch.zeros(3, 1), torch.zeros(2, 1)]


@pytest.mark.parametrize(
    ("data", "fields", "words"),
    [
        ([], {}, "data: expected at least one sequence"),
        (torch.zeros(0, 2), {}, "data: expected at least one sequence"),
        (torch.zeros(0, 3, 2), {}, "data: expected at least one sequence"),
        (torch.zeros(2, 0, 1), {}, r"at least one frame, got shape \[2, 0, 1\]"),
        (torch.zeros(3, 0), {}, "at least one feature"),
        (torch.zeros(2, 2, 2, 2), {}, r"data: expected sequences .*\[2, 2, 2, 2\]"),
        (5.0, {}, "data: expected sequences"),
        ([torch.zeros(2, 1), torch.zeros(0, 1)], {}, "at least one frame in each sequence, got none in sequence 1"),
        ([[1.0], []], {}, "none in sequence 1"),
        ([torch.zeros(2, 1), torch.zeros(2, 3)], {}, "1 columns in each sequence.*got 3 in sequence 1"),
        ([torch.zeros(2, 1), torch.zeros(2, 1, 1)], {}, r"data\[1\]: expected a sequence"),
        ([torch.zeros(2, 2), [[1.0, 2.0], [1.0]]], {}, r"data\[1\]: expected a rectangular"),
        (torch.zeros(5, 1), {"lengths": [2, 2]}, "add up to 5.*got 4 in all"),
        (torch.zeros(5, 1), {"lengths": [5, 0]}, "lengths: expected whole numbers.*0 at sequence 1"),
        (torch.zeros(5, 1), {"lengths": [6, -1]}, "-1 at sequence 1"),
        (torch.zeros(5, 1), {"lengths": [2.5, 2.5]}, "2.5 at sequence 0"),
        (torch.zeros(5, 1), {"lengths": [NAN, 5]}, "nan at sequence 0"),
        (torch.zeros(1, 1), {"lengths": [True]}, "whole numbers.*True"),
        (torch.zeros(5, 1), {"lengths": 5}, "lengths: expected one number per sequence"),
        (torch.zeros(5, 1), {"lengths": [[5]]}, "lengths: expected one number per sequence"),
        (torch.zeros(5, 1), {"lengths": []}, "add up to 5"),
        (X3, {"lengths": [4]}, "one number for each of 2 sequences, got 1"),
        (X3, {"lengths": [4, 5]}, "1 to 4.*got 5 at sequence 1"),
        (X3, {"lengths": [0, 4]}, "got 0 at sequence 0"),
        (LIST, {"lengths": [3, 2]}, "lengths: expected none beside a list"),
        ([[1.0, 2.0], [INF]], {}, "inf at sequence 1, frame 0, column 0"),
        (torch.tensor([1.0, NAN, -INF]), {"lengths": [1, 2]}, "-inf at sequence 1, frame 1"),
        (X3, {"u": torch.zeros(2, 3, 1)}, r"inputs: expected shape \[2, 4, …\], laid out as the data, got \[2, 3, 1\]"),
        (X3, {"u": torch.zeros(8, 1)}, "inputs: expected shape"),
        (X3, {"u": torch.full((2, 4, 1), NAN)}, "inputs: expected finite.*sequence 0, frame 0, column 0"),
        (X3, {"u": torch.zeros(2, 4, 1, 1)}, "inputs"),
        (LIST, {"u": torch.zeros(5, 1)}, "inputs: expected a list of 2, one for each sequence, got Tensor"),
        (LIST, {"u": LIST[:1]}, "inputs: expected a list of 2.*got 1"),
        (LIST, {"u": [torch.zeros(3, 1), torch.zeros(3, 1)]}, r"inputs\[1\]: expected shape \[2, 1\].*\[3, 1\]"),
        (LIST, {"u": [torch.zeros(3, 1), torch.zeros(2, 2)]}, r"inputs\[1\]"),
        (LIST, {"u": [torch.zeros(3, 1), 1.0]}, r"inputs\[1\]"),
        (X3, {"weight": torch.ones(3)}, r"weights: expected shape \[2\].*one weight per sequence"),
        (X3, {"weight": torch.ones(2, 4)}, "one weight per sequence"),
        (X3, {"weight": [1.0, -1.0]}, "-1.0 at sequence 1"),
        (X3, {"weight": [0.0, 0.0]}, "all zero; weight the sequences"),
        (X3, {"evidence": torch.zeros(2, 4)}, "evidence"),
        (X3, {"evidence": torch.full((2, 4, 2), NAN)}, "evidence.*sequence 0, frame 0"),
        (X3, {"labels": torch.zeros(2, 3), "n_states": 2}, "labels: expected shape"),
        (X3, {"labels": torch.zeros(2, 4)}, "n_states"),
        (X3, {"labels": torch.full((2, 4), 2), "n_states": 2}, "0 to 1.*got 2 at sequence 0, frame 0"),
        (X3, {"labels": torch.zeros(2, 4, 3), "n_states": 2}, "2 columns"),
        (LIST, {"labels": [[0, 1, 0], [0, 7]], "n_states": 2}, "got 7 at sequence 1, frame 1"),
        (
            X3,
            {"labels": torch.zeros(2, 4).long(), "n_states": 2, "evidence": torch.zeros(2, 4, 3)},
            "labels, evidence: expected the same number of states",
        ),
    ],
)
def test_values_that_cannot_be_used(data: Any, fields: dict[str, Any], words: str) -> None:
    kept = copy.deepcopy((data, fields))
    with pytest.raises(InvalidArgument, match=f"(?s){words}") as caught:
        as_sequences(data, **fields)
    assert str(caught.value).count(";") >= 1, "a message says what to do"
    torch.testing.assert_close((data, fields), kept, equal_nan=True)


@pytest.mark.parametrize(
    "data", ["file.csv", None, {"x": 1}, [["a"], ["b"]], [None], [torch.zeros(2), "a"], [Batch(torch.zeros(2, 1))]]
)
def test_kinds_that_cannot_be_used(data: Any) -> None:
    with pytest.raises(InvalidType, match="data"):
        as_sequences(data)


@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.uint8, torch.float16]),
    st.none() | st.lists(st.integers(-1, 5), max_size=4),
)
def test_any_shape_gives_sequences_or_a_documented_refusal(
    shape: list[int], dtype: torch.dtype, lengths: list[int] | None
) -> None:
    data = torch.zeros(shape, dtype=dtype)
    try:
        batch = as_sequences(data, lengths=lengths)
    except TorchemError:
        return
    assert batch.x.dim() == 3
    assert batch.x.dtype == dtype
    frames = sum(lengths) if lengths else np.prod(shape[:-1] if len(shape) > 1 else shape)
    assert batch.rows().x.shape[0] == frames


def test_empty_where_allowed() -> None:
    assert as_sequences(torch.zeros(0, 2), allow_empty=True).x.shape == (0, 1, 2)
    assert as_sequences(torch.zeros(0, 5, 2), allow_empty=True).x.shape == (0, 5, 2)
    assert as_sequences(torch.zeros(0, 2), lengths=[], allow_empty=True).x.shape == (0, 1, 2)
    empty = as_sequences(torch.zeros(0, 2), allow_empty=True, weight=[], u=torch.zeros(0, 1))
    assert empty.u.shape == (0, 1, 1)
    assert float(empty.total_weight()) == 0


# ---- inside transforms --------------------------------------------------------------------------------------------


def score(x: torch.Tensor, lengths: torch.Tensor | None, weight: torch.Tensor | None = None) -> torch.Tensor:
    batch = as_sequences(x, lengths=lengths, weight=weight, u=x)
    mask = batch.frames_mask()
    total = batch.x.square().sum(-1) + batch.u.sum(-1)
    kept = total if mask is None else torch.where(mask, total, 0.0)
    return (kept.sum(-1) * (1.0 if batch.weight is None else batch.weight)).sum()


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2]), torch.tensor([4, 4])])
def test_transforms(lengths: torch.Tensor | None) -> None:
    x = torch.randn(3, 2, 4, 2, dtype=torch.float64)
    weight = torch.rand(3, 2, dtype=torch.float64)
    expected = torch.stack([score(one, lengths, w) for one, w in zip(x, weight, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda one, w: score(one, lengths, w))(x, weight), expected)
    gradient = torch.func.grad(lambda one: score(one, lengths))(x[0])
    torch.testing.assert_close(torch.func.jacfwd(lambda one: score(one, lengths))(x[0]), gradient)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda one: score(one, lengths)))(x)[0], gradient)


def test_vmap_over_lengths() -> None:
    x, lengths = torch.randn(2, 4, 2), torch.tensor([[4, 2], [1, 3]])
    found = torch.func.vmap(lambda length: score(x, length))(lengths)
    torch.testing.assert_close(found, torch.stack([score(x, length) for length in lengths]))


# ---- buckets ------------------------------------------------------------------------------------------------------


def test_very_different_lengths_are_not_padded_together() -> None:
    x = [torch.zeros(1_000_000, 1)] + [torch.full((10, 1), float(i)) for i in range(1000)]
    found = as_buckets(x, weight=torch.arange(1001.0) + 1)
    assert sum(batch.x.shape[0] * batch.x.shape[1] for _, batch in found) == 1_010_000
    for numbers, batch in found:
        assert numbers is not None
        assert torch.equal(batch.weight, numbers.double() + 1)
        assert torch.equal(batch.x[:, 0, 0], (numbers.float() - 1).clamp(min=0))


@given(ragged(), st.sampled_from(["listed", "concatenated", "padded"]))
def test_buckets_hold_every_sequence_once(data: Ragged, form: str) -> None:
    given = data.padded(INF) if form == "padded" else getattr(data, form)()
    whole = as_sequences(**data.listed())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_PADDING", 0)
        found = as_buckets(**given)
    frames = sum(batch.x.shape[0] * batch.x.shape[1] for _, batch in found)
    assert frames <= 2 * sum(data.lengths)
    if len(found) == 1:
        assert same(found[0][1], whole)
        return
    numbers = torch.cat([n for n, _ in found if n is not None])
    assert sorted(numbers.tolist()) == list(range(len(data.lengths)))
    for chosen, batch in found:
        expected = whole[chosen]
        assert same(batch, expected.with_frames(max(data.lengths[n] for n in chosen.tolist())))


def test_a_fault_in_a_bucket_is_named_by_its_place_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "_PADDING", 0)
    x = [torch.zeros(1, 1), torch.zeros(9, 1), torch.zeros(2, 1), torch.tensor([[0.0], [INF]])]
    with pytest.raises(InvalidArgument, match="inf at sequence 3, frame 1"):
        as_buckets(x)


# ---- labels -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=1, max_size=2), st.integers(0, 99))
def test_a_label_a_set_of_one_and_a_sure_soft_label_are_one(k: int, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(0, k, shape, generator=generator)
    hot = torch.nn.functional.one_hot(state, k)
    expected = evidence_from_labels(state, k, shape)
    assert expected.shape == (*shape, k)
    assert torch.equal(expected.exp(), hot.float())
    for same_thing in (state.double(), hot.bool(), hot * 3.5, hot.numpy()):
        assert torch.equal(evidence_from_labels(same_thing, k, shape).float(), expected)
    unknown = torch.zeros(*shape, k)
    for nothing in (torch.full(shape, -1), torch.full(shape, NAN), hot >= 0, torch.full_like(unknown, 0.3)):
        assert torch.equal(evidence_from_labels(nothing, k, shape), unknown)


def test_soft_labels_keep_their_ratios_and_precision() -> None:
    soft = torch.tensor([[0.2, 0.8, 0.0]], dtype=torch.float64)
    evidence = evidence_from_labels(soft, None, (1,))
    assert evidence.dtype == torch.float64
    torch.testing.assert_close(evidence.exp(), soft / 0.8)


@pytest.mark.parametrize(
    ("labels", "k", "shape", "words"),
    [
        ([0, 3], 3, (2,), "states from 0 to 2, or −1 for unknown, got 3 at row 1"),
        ([0, -2], 3, (2,), "got -2 at row 1"),
        ([0.0, 0.5], 3, (2,), "got 0.5 at row 1"),
        ([0.0, INF], 3, (2,), "at row 1"),
        ([[0, 1], [5, 0]], 3, (2, 2), "got 5 at sequence 1, frame 0"),
        ([0, 1], None, (2,), "n_states"),
        ([0, 1, 1], 2, (2,), r"labels: expected whole numbers \[2\], or a table \[2, K\], got shape \[3\]"),
        ([True, False], 2, (2,), r"Booleans of shape \[2\]"),
        ([[True, True], [False, False]], 2, (2,), "got none at row 1"),
        ([[0.5, 0.5], [0.0, 0.0]], 2, (2,), "zeros alone at row 1"),
        ([[0.5, -0.5]], 2, (1,), "-0.5 at row 0, column 1"),
        ([[0.5, NAN]], 2, (1,), "nan at row 0, column 1"),
        ([[INF, 1.0]], 2, (1,), "inf at row 0, column 0"),
        ([[0.5, 0.5]], 3, (1,), "3 columns"),
    ],
)
def test_labels_that_cannot_be_used(labels: Any, k: int | None, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        evidence_from_labels(labels, k, shape)
