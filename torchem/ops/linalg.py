"""Linear algebra that a fit can rely on: no exception inside, gradients at equal eigenvalues."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _clip(matrix: Tensor, floor: float) -> Tensor:
    """Raise the eigenvalues of symmetric matrices to at least ``floor``; healthy ones pass unchanged."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    healthy = torch.linalg.cholesky_ex(matrix - floor * eye).info == 0
    if bool(healthy.all()):
        return matrix.clone()  # a Function must not return its input
    values, vectors = _eigh(matrix)
    # A hair above the floor: the rebuilt matrix then passes the same test, so clipping twice changes nothing.
    clipped = (vectors * values.clamp(min=floor * (1 + 1e-10)).unsqueeze(-2)) @ vectors.mT
    return torch.where(healthy[..., None, None], matrix, (clipped + clipped.mT) / 2)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN, where the solver would raise, for what is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, eye))
    return values, torch.where(finite, vectors, torch.nan)


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


def _first_order(matrix: Tensor, direction: Tensor, floor: float) -> Tensor:
    """Derivative of the clip along a symmetric direction; self-adjoint, so it is the backward as well."""
    values, vectors = _eigh(matrix)
    inner = vectors.mT @ ((direction + direction.mT) / 2) @ vectors
    return vectors @ (_slopes(values, floor) * inner) @ vectors.mT


def _second_order(matrix: Tensor, a: Tensor, b: Tensor, floor: float) -> Tensor:
    """Second derivative of the clip along two symmetric directions; symmetric in them and self-adjoint in each."""
    values, vectors = _eigh(matrix)
    a, b = (vectors.mT @ ((v + v.mT) / 2) @ vectors for v in (a, b))
    inner = torch.einsum("...ikj,...ik,...kj->...ij", _curvatures(values, floor), a, b)
    return vectors @ (inner + inner.mT) @ vectors.mT


class _Derivative(torch.autograd.Function):
    """`_first_order` with its own derivatives, in the matrix and in the direction."""

    @staticmethod
    def forward(matrix: Tensor, direction: Tensor, floor: float) -> Tensor:
        return _first_order(matrix, direction, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.save_for_forward(inputs[0], inputs[1])
        ctx.floor = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        matrix, direction = ctx.saved_tensors
        return _second_order(matrix, direction, grads[0], ctx.floor), _derive(matrix, grads[0], ctx.floor), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        matrix, direction = ctx.saved_tensors
        along = torch.zeros_like(matrix)
        if tangents[0] is not None:
            along = along + _second_order(matrix, direction, tangents[0], ctx.floor)
        if tangents[1] is not None:
            along = along + _derive(matrix, tangents[1], ctx.floor)
        return along

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, direction: Tensor, floor: float) -> tuple[Tensor, int]:
        size = info.batch_size
        first, second = (
            value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip((matrix, direction), in_dims, strict=False)
        )
        return _derive(first, second, floor), 0


def _derive(matrix: Tensor, direction: Tensor, floor: float) -> Tensor:
    return _Derivative.apply(matrix, direction, floor)  # pyright: ignore[reportReturnType]


class _ClipSpectrum(torch.autograd.Function):
    """Spectral clip with the derivatives of spectral functions: divided differences, defined at equal eigenvalues."""

    @staticmethod
    def forward(matrix: Tensor, floor: float) -> Tensor:
        return _clip(matrix, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.floor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _derive(ctx.saved_tensors[0], grads[0], ctx.floor), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _derive(ctx.saved_tensors[0], tangents[0], ctx.floor)

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, floor: float) -> tuple[Tensor, int]:
        return clip_spectrum(matrix.movedim(in_dims[0], 0), floor), 0


def clip_spectrum(matrix: Float[Tensor, "*n d d"], floor: float) -> Float[Tensor, "*n d d"]:
    """The symmetric matrices ``[…, D, D]`` with eigenvalues below ``floor`` raised to it.

    This is the exact maximiser of a Gaussian log-likelihood under the constraint ``Σ ⪰ floor·I``. A Cholesky test
    recognises matrices that need nothing, which is almost always; these come back bit for bit.

    Source: J. L. Daleckii, S. G. Krein (1965) for the derivative of spectral functions.

    Example:
        >>> clip_spectrum(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), 0.25).diagonal()
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if matrix.requires_grad or forward_mode or torch._C._are_functorch_transforms_active():
        return _ClipSpectrum.apply(matrix, floor)  # pyright: ignore[reportReturnType]
    # A custom Function costs as much as the rest of a small M-step, and there is nothing to record here.
    return _clip(matrix, floor)


def _gaps(values: Tensor) -> Tensor:
    """1 / (λ_j − λ_i) off the diagonal, zero where two eigenvalues are equal."""
    gap = values.unsqueeze(-2) - values.unsqueeze(-1)
    near = gap.abs() <= 1e-12 * values.abs().amax(-1)[..., None, None]
    return torch.where(near, 0.0, 1 / torch.where(near, 1.0, gap))


class _Eigh(torch.autograd.Function):
    """Eigenvectors whose derivative leaves out how equal eigenvalues turn into each other: torch's own is NaN there."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _eigh(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        inner = _gaps(values) * (vectors.mT @ grads[1]) + torch.diag_embed(grads[0])
        slope = vectors @ inner @ vectors.mT
        return (slope + slope.mT) / 2

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        values, vectors = ctx.saved_tensors
        inner = vectors.mT @ ((tangents[0] + tangents[0].mT) / 2) @ vectors
        return inner.diagonal(dim1=-2, dim2=-1), vectors @ (_gaps(values) * inner)

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return eigh(matrix.movedim(in_dims[0], 0)), (0, 0)


def eigh(matrix: Float[Tensor, "*n d d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d d"]]:
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices, with gradients where eigenvalues are equal.

    Of eigenvectors only what does not depend on their signs (or, at equal eigenvalues, on their basis) may be used:
    Σ_j f_j v_j v_jᵀ.

    Source: K. B. Petersen, M. S. Pedersen (2012), equations 67 and 68.

    Example:
        >>> eigh(torch.diag(torch.tensor([3.0, 1.0])))[0]
        tensor([1., 3.])
    """
    return _Eigh.apply(matrix)  # pyright: ignore[reportReturnType]


def cholesky(matrix: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """Lower Cholesky factor that is NaN, instead of an exception, where there is none."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def log_cholesky(covariance: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """Unconstrained coordinates of positive definite matrices: Cholesky factor with the diagonal's logarithm."""
    factor = cholesky(covariance)
    return factor.tril(-1) + factor.diagonal(dim1=-2, dim2=-1).log().diag_embed()


def from_log_cholesky(raw: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """The Cholesky factor whose unconstrained coordinates are ``raw``."""
    return raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def inverse_factor(factor: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """Inverse of lower triangular matrices."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)
