"""Input of any make: a finite result or an exception that torchem documents, and the input never changed."""

import copy
import math
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import torchem
from tests.regressions.common import COVARIANCE_TYPES, as_users_run_it, blobs, fit, gap, healthy, mixture, started
from torchem.errors import InvalidArgument, TorchemError

#: The same 24 × 2 numbers, exact in every type below.
PLAIN = blobs(24, 2, 2, gap=8.0).round()


def read_only(x: np.ndarray) -> np.ndarray:
    x.setflags(write=False)
    return x


def strided(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((2 * len(x), 3 * x.shape[1]), 99.0, dtype=x.dtype)
    wide[::2, ::3] = x
    return wide[::2, ::3]


def with_grad(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


class Columns:
    """What a data frame offers to NumPy."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.x if dtype is None else self.x.astype(dtype)


MAKES: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: x,
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "int8": lambda x: x.to(torch.int8),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": strided,
    "requires grad": with_grad,
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "view of a larger": lambda x: torch.cat([x, x])[: len(x)],
    "numpy": lambda x: x.numpy().copy(),
    "numpy read-only": lambda x: read_only(x.numpy().copy()),
    "numpy float16": lambda x: x.numpy().astype(np.float16),
    "numpy long double": lambda x: x.numpy().astype(np.longdouble),
    "numpy big-endian": lambda x: x.numpy().astype(">f8"),
    "numpy big-endian int": lambda x: x.numpy().astype(">i4"),
    "numpy int16": lambda x: x.numpy().astype(np.int16),
    "numpy fortran": lambda x: np.asfortranarray(x.numpy()),
    "numpy reversed twice": lambda x: x.numpy()[::-1][::-1],
    "numpy negative strides": lambda x: np.ascontiguousarray(x.numpy()[::-1, ::-1])[::-1, ::-1],
    "numpy strided": lambda x: strided(x).numpy(),
    "numpy matrix-like": Columns,
    "lists": lambda x: x.tolist(),
    "tuples": lambda x: tuple(map(tuple, x.tolist())),
    "list of arrays": lambda x: list(x.numpy()),
    "list of tensors": list,
    "batch": torchem.Batch,
    "batch of float32": lambda x: torchem.Batch(x.float()),
}


def copied(value: Any) -> Any:
    if isinstance(value, torchem.Batch):
        return value.x.clone()
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def unchanged(value: Any, before: Any) -> bool:
    if isinstance(value, torchem.Batch):
        value = value.x
    if isinstance(value, torch.Tensor):
        return torch.equal(value, before)
    if isinstance(value, Columns):
        value, before = value.x, before.x
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, before)) and value.dtype == before.dtype
    return all(map(np.array_equal, value, before))


@pytest.mark.parametrize("name", MAKES)
def test_the_same_numbers_in_any_make(name: str, device: torch.device) -> None:
    """What holds the same numbers gives the same fit, and comes back as it was."""
    value = MAKES[name](PLAIN.clone())
    before = copied(value)
    expected = fit(started(PLAIN, 2, device=device), PLAIN, init=None, max_iter=4, tol=0.0)
    model = started(PLAIN, 2, device=device)
    result = fit(model, value, init=None, max_iter=4, tol=0.0)
    assert gap(model, expected.model) < 1e-12
    assert result.history == pytest.approx(expected.history, rel=1e-12)
    for use in (model.log_prob, model.posterior, model.most_likely):
        torch.testing.assert_close(use(value), use(PLAIN))
    assert torchem.criteria(model, value) == torchem.criteria(model, PLAIN)
    assert unchanged(value, before)


def test_expanded_rows(device: torch.device) -> None:
    row = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    model = mixture(2, 2, device=device)
    fit(model, row.expand(50, 2))
    healthy(model)
    assert torch.equal(row, torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def test_booleans_and_vectors(device: torch.device) -> None:
    bits = PLAIN[:, 0] > 4
    for value in (bits, bits.numpy(), bits.tolist(), bits.unsqueeze(-1)):
        model = mixture(2, 1, device=device)
        fit(model, value)
        healthy(model)


def test_unsigned_integers_beyond_the_signed(device: torch.device) -> None:
    top = np.array([[2**64 - 2048], [2**64 - 4096], [2**63], [5]], dtype=np.uint64)
    model = mixture(1, 1, device=device)
    fit(model, top, max_iter=1)
    assert float(model.means.detach()) == pytest.approx(top.astype(np.float64).mean(), rel=1e-9)


def test_masked_entries_are_not_data(device: torch.device) -> None:
    # NumPy's conversion shows what stands behind the mask.
    x = np.ma.masked_array(PLAIN.numpy().copy(), mask=np.zeros(PLAIN.shape))
    x[3, 1] = np.ma.masked
    with pytest.raises(TorchemError):
        fit(mixture(2, 2, device=device), x)


BAD: dict[str, Callable[[], Any]] = {
    "no rows": lambda: torch.empty(0, 2),
    "no columns": lambda: torch.empty(5, 0),
    "nothing": lambda: torch.empty(0),
    "empty list": list,
    "list of empties": lambda: [[], []],
    "scalar": lambda: torch.tensor(1.0),
    "number": lambda: 3.0,
    "three axes": lambda: torch.zeros(4, 2, 2),
    "too many columns": lambda: torch.zeros(4, 3),
    "too few columns": lambda: torch.zeros(4, 1),
    "vector": lambda: torch.zeros(4),
    "complex": lambda: torch.zeros(4, 2, dtype=torch.complex64),
    "complex array": lambda: np.zeros((4, 2), dtype=complex),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "text": lambda: np.array([["a", "b"], ["c", "d"]]),
    "objects": lambda: np.array([[1.0, None], [2.0, 3.0]], dtype=object),
    "object numbers that are text": lambda: np.array([[1.0, "x"]], dtype=object),
    "ragged": lambda: [[1.0, 2.0], [3.0]],
    "structured": lambda: np.zeros(3, dtype=[("a", float), ("b", float)]),
    "dates": lambda: np.zeros((3, 2), dtype="datetime64[s]"),
    "None": lambda: None,
    "object": lambda: object(),
    "function": lambda: len,
    "mapping": lambda: {"a": [1.0, 2.0], "b": [3.0, 4.0]},
    "empty mapping": dict,
    "set": lambda: {1.0, 2.0},
    "bytes": lambda: b"abc",
    "iterator": lambda: iter([torch.zeros(4, 2)]),
    "generator": lambda: (torch.zeros(4, 2) for _ in range(2)),
    "missing file": lambda: "no/such/file.csv",
    "list of gradients": lambda: [torch.zeros(2, requires_grad=True)] * 4,
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_what_cannot_be_read_is_refused(name: str, device: torch.device) -> None:
    model, before = (started(PLAIN, 2, device=device) for _ in range(2))
    with as_users_run_it(), pytest.raises(TorchemError) as error:
        fit(model, BAD[name]())
    message = str(error.value)
    assert ": " in message
    assert "; " in message
    assert gap(model, before) == 0


def attempt(model: torchem.LatentModel, data: Any, **options: Any) -> torchem.Result | TorchemError:
    """What a fit comes to, an exception that torchem documents included; any other is raised."""
    try:
        return fit(model, data, **options)
    except TorchemError as error:
        return error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-300, -150, -40, -20, 15, 30, 39, 150, 300])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_sizes_at_the_ends_of_the_range(
    covariance_type: str, exponent: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Numbers whose squares leave the range of the type: a sound model, or an exception that names the data."""
    x = PLAIN * 10.0**exponent
    model = mixture(2, 2, covariance_type, dtype, device)
    before = copy.deepcopy(model.state_dict())
    result = attempt(model, x)
    if isinstance(result, TorchemError):
        assert str(result).startswith("data: expected ")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        # No excuse where squares are far from the ends.
        assert abs(exponent) >= (15 if dtype == torch.float32 else 150)
        return
    assert result.status in ("converged", "max_iter")
    assert math.isfinite(result.bound)
    healthy(model)


def _arrays() -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)
    kinds = st.one_of(
        hnp.floating_dtypes(endianness="?"),
        hnp.integer_dtypes(endianness="?"),
        hnp.unsigned_integer_dtypes(endianness="?"),
        hnp.boolean_dtypes(),
    )
    return kinds.flatmap(lambda dtype: hnp.arrays(dtype, shapes))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(x=_arrays(), k=st.integers(1, 4), index=st.integers(0, 3), flip=st.booleans(), restarts=st.integers(1, 2))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_array(x: np.ndarray, k: int, index: int, flip: bool, restarts: int) -> None:
    d = x.shape[1] if x.ndim == 2 and x.shape[1] else 1
    value = x[::-1] if flip and x.ndim else x
    before = value.copy()
    model = mixture(k, d, COVARIANCE_TYPES[index])
    result = attempt(model, value, max_iter=5, restarts=restarts)
    if isinstance(result, TorchemError):
        assert "; " in str(result)
    else:
        assert math.isfinite(result.bound)
        healthy(model)
    assert np.array_equal(value, before, equal_nan=x.dtype.kind == "f")


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    x=hnp.arrays(np.float64, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.floats(-1e6, 1e6)),
    weight=st.integers(0, 2**32 - 1),
    k=st.integers(1, 5),
    index=st.integers(0, 3),
    dead=st.sampled_from(["floor", "respawn", "prune"]),
    init=st.sampled_from(["auto", "kmeans++", "random", "random_from_data", "hierarchical"]),
)
def test_any_finite_table_gives_a_finite_model(
    x: np.ndarray, weight: int, k: int, index: int, dead: str, init: str
) -> None:
    assume(len(x) >= k)
    weights = np.random.default_rng(weight).integers(0, 3, len(x))
    assume(weights.any())
    model = mixture(k, x.shape[1], COVARIANCE_TYPES[index])
    result = fit(model, x, weights=weights, max_iter=8, dead=dead, init=init, tol=0.0)
    healthy(model)
    assert math.isfinite(result.bound)
    assert result.status in ("max_iter", "converged")


@pytest.mark.parametrize("kind", COVARIANCE_TYPES)
def test_components_are_not_put_where_no_weight_is(kind: str) -> None:
    """A row of weight zero is the most surprising one, and nothing that a component should explain."""
    x, weights = np.full((25, 1), 471087.0), np.ones(25)
    x[0], weights[0] = 0.0, 0.0
    model = mixture(4, 1, kind)
    result = fit(model, x, weights=weights, max_iter=8, dead="respawn", tol=0.0)
    assert result.status == "max_iter"
    assert float((model.means.detach() - 471087.0).abs().max()) < 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["data", "weights", "model", "both"])
def test_mixed_devices(where: str) -> None:
    x, weights = PLAIN, torch.ones(len(PLAIN))
    reference = fit(started(PLAIN, 2), x, init=None, weights=weights, max_iter=4, tol=0.0)
    model = started(PLAIN, 2, device="cuda" if where in ("model", "both") else "cpu")
    result = fit(
        model, x.cuda() if where in ("data", "both") else x, init=None, max_iter=4, tol=0.0,
        weights=weights.cuda() if where in ("weights", "both") else weights,
    )  # fmt: skip
    assert gap(model, reference.model) < 1e-9
    assert result.bound == pytest.approx(reference.bound, rel=1e-9)


def test_one_row_one_component(device: torch.device) -> None:
    model = mixture(1, 3, device=device)
    result = fit(model, torch.tensor([[1.0, 2.0, 3.0]]))
    healthy(model)
    assert result.floored == [0]
    torch.testing.assert_close(model.means.detach().cpu(), torch.tensor([[1.0, 2.0, 3.0]]).double())


def test_many_columns_and_few_rows(device: torch.device) -> None:
    model = mixture(2, 300, "full", device=device)
    fit(model, blobs(10, 300, 2), max_iter=3)
    healthy(model)


def test_fewer_rows_than_components(device: torch.device) -> None:
    with pytest.raises(InvalidArgument, match="at least as many observations as components"):
        fit(mixture(5, 2, device=device), PLAIN[:4])
