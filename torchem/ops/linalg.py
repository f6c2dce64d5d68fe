"""Linear algebra that a fit can rely on: no exception inside, gradients at equal eigenvalues."""

from typing import Any

import torch
from torch import Tensor


def _clip(matrix: Tensor, floor: float) -> Tensor:
    """Raise the eigenvalues of symmetric matrices to at least ``floor``; healthy ones pass unchanged."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    healthy = torch.linalg.cholesky_ex(matrix - floor * eye).info == 0
    if bool(healthy.all()):
        return matrix.clone()
    # A matrix of NaN would make the eigensolver raise; it passes through and is reported as non-finite.
    finite = matrix.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], matrix, eye))
    # A hair above the floor: the rebuilt matrix then passes the same test, so clipping twice changes nothing.
    clipped = (vectors * values.clamp(min=floor * (1 + 1e-10)).unsqueeze(-2)) @ vectors.mT
    return torch.where((healthy | ~finite)[..., None, None], matrix, (clipped + clipped.mT) / 2)


class _ClipSpectrum(torch.autograd.Function):
    """Spectral clip with the backward of divided differences (Daleckii–Krein)."""

    @staticmethod
    def forward(matrix: Tensor, floor: float) -> Tensor:
        return _clip(matrix, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.floor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return _ClipBackward.apply(matrix, grads[0], ctx.floor), None  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, floor: float) -> tuple[Tensor, int]:
        return clip_spectrum(matrix.movedim(in_dims[0], 0), floor), 0


def _slopes(values: Tensor, floor: float) -> Tensor:
    """First divided differences ``[…, D, D]`` of ``max(·, floor)`` at ascending eigenvalues."""
    clipped = values.clamp(min=floor)
    gap = values.unsqueeze(-1) - values.unsqueeze(-2)
    level = (values >= floor).to(values.dtype)
    near = gap.abs() <= 1e-12 * values.abs().amax(-1)[..., None, None]
    slope = (clipped.unsqueeze(-1) - clipped.unsqueeze(-2)) / torch.where(near, 1.0, gap)
    return torch.where(near, (level.unsqueeze(-1) + level.unsqueeze(-2)) / 2, slope)


def _curvatures(values: Tensor, floor: float) -> Tensor:
    """Second divided differences ``[…, D, D, D]`` of ``max(·, floor)`` at ascending eigenvalues."""
    index = torch.arange(values.shape[-1], device=values.device)
    i, k, j = torch.meshgrid(index, index, index, indexing="ij")
    low, high = torch.minimum(torch.minimum(i, k), j), torch.maximum(torch.maximum(i, k), j)
    middle = i + k + j - low - high
    slope = _slopes(values, floor)
    gap = values[..., high] - values[..., low]
    near = gap <= 1e-12 * values.abs().amax(-1)[..., None, None, None]
    return torch.where(near, 0.0, (slope[..., middle, high] - slope[..., low, middle]) / torch.where(near, 1.0, gap))


class _ClipBackward(torch.autograd.Function):
    """The derivative of the clip applied to a direction: linear in it, differentiable once more in the matrix."""

    @staticmethod
    def forward(matrix: Tensor, grad: Tensor, floor: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ (_slopes(values, floor) * (vectors.mT @ ((grad + grad.mT) / 2) @ vectors)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.floor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, direction = ctx.saved_tensors
        values, vectors = torch.linalg.eigh(matrix)
        g = vectors.mT @ ((direction + direction.mT) / 2) @ vectors
        v = vectors.mT @ ((grads[0] + grads[0].mT) / 2) @ vectors
        second = _curvatures(values, ctx.floor)
        inner = torch.einsum("...ikj,...ik,...kj->...ij", second, g, v)
        bend = vectors @ (inner + inner.mT) @ vectors.mT
        return bend, _ClipBackward.apply(matrix, grads[0], ctx.floor), None  # pyright: ignore[reportReturnType]

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, grad: Tensor, floor: float) -> tuple[Tensor, int]:
        size = info.batch_size
        matrix = matrix.movedim(in_dims[0], 0) if in_dims[0] is not None else matrix.expand(size, *matrix.shape)
        grad = grad.movedim(in_dims[1], 0) if in_dims[1] is not None else grad.expand(size, *grad.shape)
        return _ClipBackward.apply(matrix, grad, floor), 0  # pyright: ignore[reportReturnType]


def clip_spectrum(matrix: Tensor, floor: float) -> Tensor:
    """The symmetric matrices ``[…, D, D]`` with eigenvalues below ``floor`` raised to it.

    This is the exact maximiser of a Gaussian log-likelihood under the constraint ``Σ ⪰ floor·I``. A Cholesky test
    recognises matrices that need nothing, which is almost always; these come back bit for bit.

    Source: J. L. Daleckii, S. G. Krein (1965) for the derivative of spectral functions.

    Example:
        >>> clip_spectrum(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), 0.25).diagonal()
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    return _ClipSpectrum.apply(matrix, floor)  # pyright: ignore[reportReturnType]


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor that is NaN, instead of an exception, where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def log_cholesky(covariance: Tensor) -> Tensor:
    """Unconstrained coordinates of positive definite matrices: Cholesky factor with the diagonal's logarithm."""
    factor = cholesky(covariance)
    return factor.tril(-1) + factor.diagonal(dim1=-2, dim2=-1).log().diag_embed()


def from_log_cholesky(raw: Tensor) -> Tensor:
    """The Cholesky factor whose unconstrained coordinates are ``raw``."""
    return raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def inverse_factor(factor: Tensor) -> Tensor:
    """Inverse of lower triangular matrices."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)
