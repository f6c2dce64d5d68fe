"""Linear algebra: values, derivatives at equal eigenvalues, and no exception inside a fit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchem.ops import linalg


def symmetric(values: list[float], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix of given eigenvalues in random directions."""
    d = len(values)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    matrix = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.mT
    return ((matrix + matrix.mT) / 2).to(dtype)


def reference(matrix: Tensor, floor: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT


SPECTRA = [
    [1.0, 2.0, 3.0],
    [0.1, 2.0, 3.0],
    [-1.0, 0.2, 3.0],
    [0.0, 0.0, 1.0],
    [2.0, 2.0, 2.0],
    [2.0, 2.0, 0.1],
    [0.1, 0.1, 0.1],
    [-1.0, -1.0, 4.0],
    [0.3],
    [3.0],
]


@pytest.mark.parametrize("values", SPECTRA)
def test_clip_raises_eigenvalues_to_the_floor(values: list[float]) -> None:
    matrix = symmetric(values)
    clipped = linalg.clip_spectrum(matrix, 0.5)
    torch.testing.assert_close(clipped, reference(matrix, 0.5), rtol=1e-9, atol=1e-9)
    assert torch.equal(clipped, clipped.mT)
    assert float(torch.linalg.eigvalsh(clipped)[0]) >= 0.5 * (1 - 1e-12)
    # Clipping is a projection, to the bit.
    assert torch.equal(linalg.clip_spectrum(clipped, 0.5), clipped)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.integers(0, 1000), st.floats(1e-6, 2))
def test_clip_of_any_spectrum(values: list[float], seed: int, floor: float) -> None:
    matrix = symmetric(values, seed)
    torch.testing.assert_close(linalg.clip_spectrum(matrix, floor), reference(matrix, floor), rtol=1e-9, atol=1e-9)


def test_clip_leaves_healthy_matrices_bit_for_bit_also_beside_sick_ones() -> None:
    healthy, sick = symmetric([1.0, 2.0, 3.0]), symmetric([-1.0, 2.0, 3.0])
    batch = torch.stack([healthy, sick, 1e9 * healthy])
    clipped = linalg.clip_spectrum(batch, 0.5)
    assert torch.equal(clipped[0], healthy)
    assert torch.equal(clipped[2], 1e9 * healthy)
    torch.testing.assert_close(clipped[1], reference(sick, 0.5))
    assert torch.equal(linalg.clip_spectrum(healthy.expand(2, 2, 3, 3), 0.5), healthy.expand(2, 2, 3, 3))
    assert linalg.clip_spectrum(torch.zeros(0, 3, 3, dtype=torch.float64), 0.5).shape == (0, 3, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_clip_passes_what_is_not_finite_and_clips_the_rest(bad: float) -> None:
    sick = symmetric([-1.0, 2.0, 3.0])
    batch = torch.stack([torch.full((3, 3), bad, dtype=torch.float64), sick])
    clipped = linalg.clip_spectrum(batch, 0.5)
    assert not clipped[0].isfinite().any()
    torch.testing.assert_close(clipped[1], reference(sick, 0.5))


def test_backward_through_what_is_not_finite_does_not_raise() -> None:
    """One lost replica must not end the derivative of the others."""
    batch = torch.stack(
        [torch.full((3, 3), torch.nan, dtype=torch.float64), symmetric([-1.0, 2.0, 3.0])]
    ).requires_grad_()
    (grad,) = torch.autograd.grad(linalg.clip_spectrum(batch, 0.5).sum(), [batch])
    assert grad[1].isfinite().all()


def clipped(entries: Tensor) -> Tensor:
    """The clip as a function of a symmetric matrix, which is all that it promises to differentiate."""
    return linalg.clip_spectrum((entries + entries.mT) / 2, 0.5)


@pytest.mark.parametrize("values", SPECTRA)
def test_first_derivative(values: list[float]) -> None:
    assert torch.autograd.gradcheck(clipped, (symmetric(values).requires_grad_(),))


@pytest.mark.parametrize("values", SPECTRA)
def test_second_derivative(values: list[float]) -> None:
    assert torch.autograd.gradgradcheck(clipped, (symmetric(values).requires_grad_(),))


def test_derivatives_of_a_batch_of_healthy_and_sick() -> None:
    batch = torch.stack([symmetric(v, i) for i, v in enumerate(SPECTRA) if len(v) == 3]).requires_grad_()
    assert torch.autograd.gradcheck(clipped, (batch,))
    assert torch.autograd.gradgradcheck(clipped, (batch,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("values", SPECTRA[:6])
def test_every_order_of_modes(values: list[float]) -> None:
    """Forward, reverse and their compositions agree."""
    matrix = symmetric(values)
    first = torch.func.jacrev(clipped)(matrix)
    torch.testing.assert_close(torch.func.jacfwd(clipped)(matrix), first)
    second = torch.func.jacrev(torch.func.jacrev(clipped))(matrix)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacrev(clipped))(matrix), second)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(clipped))(matrix), second)


def test_second_derivative_is_symmetric_in_both_directions() -> None:
    """Asked of the bare matrix, whose own symmetry would otherwise hide it."""
    matrix, a, b = symmetric([0.1, 0.6, 2.0]), symmetric([1.0, -1.0, 0.5], 1), symmetric([0.3, 2.0, -1.0], 2)

    def slope(m: Tensor, along: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (linalg.clip_spectrum(v, 0.5) * along).sum())(m)

    bend = torch.func.grad(lambda m: (slope(m, a) * b).sum())(matrix)
    assert float(bend.abs().max()) > 0.01
    torch.testing.assert_close(bend, bend.mT)
    torch.testing.assert_close(bend, torch.func.grad(lambda m: (slope(m, b) * a).sum())(matrix))


def test_derivatives_at_equal_eigenvalues_where_those_of_eigh_are_nan() -> None:
    matrix = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    direction = symmetric([1.0, -2.0, 0.5], 3)
    (grad,) = torch.autograd.grad((linalg.clip_spectrum(matrix, 0.5) * direction).sum(), [matrix])
    torch.testing.assert_close(grad, direction)


def test_under_vmap() -> None:
    batch = torch.stack([symmetric(v, i) for i, v in enumerate(SPECTRA) if len(v) == 3])
    torch.testing.assert_close(torch.func.vmap(clipped)(batch), clipped(batch))
    nested = batch.unflatten(0, (2, -1))
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(clipped))(nested).flatten(0, 1), clipped(batch))

    def slope(matrix: Tensor) -> Tensor:
        return torch.func.grad(lambda m: clipped(m).square().sum())(matrix)

    one_by_one = torch.stack([slope(m) for m in batch])
    torch.testing.assert_close(torch.func.vmap(slope)(batch), one_by_one)
    bend = torch.func.grad(lambda m: slope(m).sum())
    torch.testing.assert_close(torch.func.vmap(bend)(batch), torch.stack([bend(m) for m in batch]))
    moved = batch.movedim(0, -1)
    torch.testing.assert_close(torch.func.vmap(clipped, in_dims=-1)(moved), clipped(batch))


def test_clip_is_the_constrained_maximiser_of_the_gaussian_likelihood() -> None:
    scatter, floor = symmetric([0.05, 0.2, 2.0], 5), 0.3

    def likelihood(covariance: Tensor) -> float:
        return float(-covariance.logdet() - torch.linalg.solve(covariance, scatter).trace())

    best = linalg.clip_spectrum(scatter, floor)
    for seed in range(40):
        step = 10.0 ** -(seed % 4) * symmetric([1.0, -1.0, 0.5], seed)
        assert likelihood(reference(best + step, floor)) <= likelihood(best) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_of_columns_in_very_different_units(dtype: torch.dtype) -> None:
    scale = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    matrix = symmetric([0.5, 1.0, 2.0]) * scale.unsqueeze(-1) * scale
    factor = linalg.cholesky(matrix.to(dtype)).double()
    rebuilt = factor @ factor.mT / scale.unsqueeze(-1) / scale
    torch.testing.assert_close(rebuilt, symmetric([0.5, 1.0, 2.0]), rtol=1e-5, atol=1e-5)


def test_cholesky_is_nan_where_there_is_none_and_only_there() -> None:
    batch = torch.stack([symmetric([1.0, 2.0]), symmetric([-1.0, 2.0]), torch.zeros(2, 2, dtype=torch.float64)])
    factor = linalg.cholesky(batch)
    torch.testing.assert_close(factor[0], torch.linalg.cholesky(batch[0]))
    assert factor[1].isnan().any()
    assert factor[2].isnan().any()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_log_cholesky_is_a_bijection(d: int) -> None:
    raw = torch.randn(4, d, d, dtype=torch.float64).tril()
    factor = linalg.from_log_cholesky(raw)
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(linalg.log_cholesky(factor @ factor.mT), raw)
    # What lies above the diagonal is no parameter.
    torch.testing.assert_close(linalg.from_log_cholesky(raw + torch.ones(d, d).triu(1)), factor)
    eye = torch.eye(d, dtype=torch.float64).expand(4, d, d)
    torch.testing.assert_close(linalg.inverse_factor(factor) @ factor, eye)
