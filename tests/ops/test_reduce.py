"""Reductions at minus infinity, at NaN and among ties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchem.ops import reduce

INF = torch.inf
ROWS = torch.tensor(
    [[0.0, 1.0, 2.0], [-INF, 0.5, -1.0], [-INF, -INF, 3.0], [700.0, 710.0, 705.0], [-1e6, -1e6, -1e6]],
    dtype=torch.float64,
)
IMPOSSIBLE = torch.full((1, 3), -INF, dtype=torch.float64)
entries = st.one_of(st.just(-INF), st.floats(-1e4, 1e4))


@given(st.lists(entries, min_size=1, max_size=6), st.floats(-1e3, 1e3))
def test_logsumexp_is_that_of_torch_and_shifts_with_its_argument(values: list[float], shift: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(reduce.logsumexp(x, 0), torch.logsumexp(x, 0), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(reduce.logsumexp(x + shift, 0), reduce.logsumexp(x, 0) + shift, rtol=1e-12, atol=1e-9)


def test_logsumexp_along_any_axis() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for dim in (0, 1, 2, -1, -2, -3):
        torch.testing.assert_close(reduce.logsumexp(x, dim), torch.logsumexp(x, dim))


def test_logsumexp_keeps_what_is_not_finite_visible() -> None:
    x = torch.tensor([[0.0, torch.nan], [0.0, INF], [-INF, -INF], [torch.nan, -INF]], dtype=torch.float64)
    found = reduce.logsumexp(x)
    assert found[0].isnan(), "a NaN must not pass for an impossible row"
    assert found[1] == INF
    assert found[2] == -INF
    assert found[3].isnan()


def test_responsibilities_keep_what_is_not_finite_visible() -> None:
    log_z, posterior = reduce.responsibilities(torch.tensor([[0.0, torch.nan]], dtype=torch.float64))
    assert log_z.isnan().all()
    assert posterior.isnan().all()


def test_memory_is_taken_over_only_where_that_is_allowed_and_nothing_follows() -> None:
    rows = torch.cat([ROWS, IMPOSSIBLE])
    expected, given = reduce.responsibilities(rows), rows.clone()
    found = reduce.responsibilities(given, consume=True)
    assert all(map(torch.equal, found, expected))
    assert found[1].data_ptr() == given.data_ptr()
    followed = rows.clone().requires_grad_()
    reduce.responsibilities(followed, consume=True)
    reduce.plus(followed, torch.ones(()))
    assert torch.equal(followed, rows)


def through(function, hole: torch.Tensor):
    """A function of the finite entries alone: finite differences cannot move an infinity."""

    def value(free: torch.Tensor) -> torch.Tensor:
        return function(torch.full(hole.shape, -INF, dtype=torch.float64).masked_scatter(~hole, free))

    return value


@pytest.mark.parametrize(
    "function",
    [reduce.logsumexp, lambda x: reduce.responsibilities(x)[0], lambda x: reduce.responsibilities(x)[1]],
    ids=["logsumexp", "log_z", "posterior"],
)
def test_gradients_twice_with_impossible_entries(function) -> None:
    x = torch.cat([ROWS[:3], torch.randn(2, 3, dtype=torch.float64)])
    hole = x == -INF
    value = through(function, hole)
    free = x[~hole].requires_grad_()
    assert torch.autograd.gradcheck(value, (free,))
    assert torch.autograd.gradgradcheck(value, (free,))


@pytest.mark.parametrize("function", [reduce.logsumexp, lambda x: reduce.responsibilities(x)[0]], ids=["lse", "log_z"])
def test_gradients_vanish_on_impossible_entries_and_rows(function) -> None:
    x = torch.cat([ROWS, IMPOSSIBLE]).requires_grad_()
    value = function(x)
    assert value[-1] == -INF
    (first,) = torch.autograd.grad(value.sum(), [x], create_graph=True)
    torch.testing.assert_close(first[:-1], x[:-1].softmax(-1).detach())
    assert (first[x == -INF] == 0).all()
    (second,) = torch.autograd.grad(first.square().sum(), [x])
    assert second.isfinite().all()
    assert (second[x == -INF] == 0).all()


def test_second_derivative_is_the_covariance_of_the_posterior() -> None:
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    p = x.softmax(0)
    truth = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(lambda v: reduce.logsumexp(v, 0)))(x), truth)
    torch.testing.assert_close(torch.func.hessian(lambda v: reduce.logsumexp(v, 0))(x), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_responsibilities_are_a_softmax(dtype: torch.dtype) -> None:
    joint = torch.cat([ROWS, IMPOSSIBLE]).to(dtype)
    log_z, posterior = reduce.responsibilities(joint)
    assert log_z.dtype == posterior.dtype == dtype
    torch.testing.assert_close(log_z, torch.logsumexp(joint, -1))
    torch.testing.assert_close(posterior[:-1], joint[:-1].softmax(-1))
    assert (posterior[-1] == 0).all()
    torch.testing.assert_close(reduce.logsumexp(joint), log_z)


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=7))
def test_first_max_takes_the_lowest_of_ties(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    index = int(reduce.first_max(x, 0))
    assert index == values.index(max(values))
    assert reduce.maximum(x, 0) == max(values)


def test_first_max_along_any_axis_and_where_nothing_is_possible() -> None:
    x = torch.randint(0, 3, (3, 4, 5)).double()
    for dim in (0, 1, 2, -1):
        index = reduce.first_max(x, dim)
        torch.testing.assert_close(x.gather(dim, index.unsqueeze(dim)).squeeze(dim), x.amax(dim))
    assert reduce.first_max(IMPOSSIBLE)[0] == 0
    assert 0 <= int(reduce.first_max(torch.tensor([[torch.nan, 0.0]]))[0]) <= 1


def test_gradient_of_the_maximum_is_one_configuration() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(reduce.maximum(x).sum(), [x])
    assert grad.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_under_vmap() -> None:
    x = torch.cat([ROWS, IMPOSSIBLE])
    torch.testing.assert_close(torch.func.vmap(lambda row: reduce.logsumexp(row, 0))(x), reduce.logsumexp(x))
    log_z, posterior = torch.func.vmap(reduce.responsibilities)(x)
    torch.testing.assert_close(log_z, reduce.responsibilities(x)[0])
    torch.testing.assert_close(posterior, reduce.responsibilities(x)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_responsibilities_are_never_denormal(dtype):
    """Products with denormal numbers are several times slower, and such weights count for nothing."""
    joint = torch.linspace(0, 1.2 * math.log(torch.finfo(dtype).tiny), 500, dtype=dtype).unsqueeze(0)
    _, posterior = reduce.responsibilities(joint)
    assert ((posterior == 0) | (posterior >= torch.finfo(dtype).tiny)).all()
    assert posterior[0, -1] == 0
    assert posterior[0, 100] > 0
