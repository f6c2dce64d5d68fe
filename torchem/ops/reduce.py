"""Reductions over latent axes that stay defined, with their gradients, at minus infinity."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def logsumexp(x: Float[Tensor, "*n"], dim: int = -1) -> Float[Tensor, "..."]:
    """``log Σ exp x`` along ``dim``; −inf with zero gradient where every entry is −inf.

    ``torch.logsumexp`` has a NaN gradient there, which one impossible row would spread over a whole model. The
    subtracted maximum is a constant to differentiation: it cancels at every order.

    Example:
        >>> logsumexp(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
        tensor([0.6931,   -inf])
    """
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    total = (x - top).exp().sum(dim)
    possible = total != 0  # NaN is not: it must stay visible
    log = torch.where(possible, total, 1.0).log() + top.squeeze(dim)
    return torch.where(possible, log, -torch.inf)


def first_max(x: Float[Tensor, "*n"], dim: int = -1) -> Int[Tensor, "..."]:
    """Index of the maximum along ``dim``; ties go to the lowest index on every device.

    Example:
        >>> first_max(torch.tensor([[1.0, 3.0, 3.0]]))
        tensor([1])
    """
    size = x.shape[dim]
    shape = [1] * x.dim()
    shape[dim] = size
    index = torch.arange(size, device=x.device).view(shape)
    return torch.where(x == x.amax(dim, keepdim=True), index, size).amin(dim).clamp(max=size - 1)


def maximum(x: Float[Tensor, "*n"], dim: int = -1) -> Float[Tensor, "..."]:
    """The maximum along ``dim``, attained at one index only.

    The gradient of ``amax`` is shared among ties and would give impossible paths; this one picks the lowest index, so
    the gradient of a max-product partition function is one most likely configuration (Viterbi).
    """
    return x.gather(dim, first_max(x.detach(), dim).unsqueeze(dim)).squeeze(dim)


def draw(weight: Float[Tensor, "*n k"], uniform: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """An index for each row, with probability in proportion to its weights, from uniform numbers in [0, 1).

    One of weight zero is never drawn, unless all are.

    Example:
        >>> draw(torch.tensor([[1.0, 0.0, 3.0]]).expand(2, 3), torch.tensor([0.2, 0.3]))
        tensor([0, 2])
    """
    # The first whose cumulative weight exceeds the draw; by rounding none may.
    below = weight.cumsum(-1) <= uniform.unsqueeze(-1) * weight.sum(-1, keepdim=True)
    last = weight.shape[-1] - 1 - first_max((weight > 0).flip(-1).to(weight.dtype))
    return torch.minimum(below.sum(-1), last)


def sampled(uniforms: Callable[[torch.Size], Tensor]) -> Callable[..., Tensor]:
    """A reduction with the value of `logsumexp` whose gradient is one index, drawn in proportion to the exponentials.

    As every sum of a partition function chooses one of its terms, the gradient of the whole is a draw from the
    posterior: forward filtering, backward sampling for a chain.

    Args:
        uniforms: Gives uniform numbers of a shape.

    Source: A. M. Rush (2020), section 3, on sampling as a semiring.
    """

    def plus(x: Tensor, dim: int = -1) -> Tensor:
        rows = x.movedim(dim, -1)
        total, share = responsibilities(rows.detach())
        index = draw(share, uniforms(total.shape).to(share))
        chosen = rows.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return total + torch.where(chosen.detach() > -torch.inf, chosen - chosen.detach(), 0.0)

    return plus


def responsibilities(
    joint: Float[Tensor, "*n k"], consume: bool = False
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n k"]]:
    """Normalise log-joint values over the last axis, sharing one pass of exponentials.

    Args:
        joint: ``[…, K]`` log p(x, z), any entry possibly −inf.
        consume: Whether the posterior may take the memory of ``joint``, which nothing else then reads.

    Returns:
        ``log Σ exp joint`` of shape ``[…]`` and the posterior ``[…, K]``; a row that is −inf throughout has
        log-evidence −inf and a posterior of zeros.
    """
    # The clamps act on impossible rows alone: elsewhere the maximum is finite and the total at least one. NaN passes,
    # so that a non-finite fit is seen as such.
    top = joint.detach().amax(-1, keepdim=True)
    # exp is up to a hundred times slower where it underflows, and products with what is left are slow as well; such
    # weights count for nothing, so they are cut off above the smallest normal number.
    limits = torch.finfo(joint.dtype)
    shift, floor, least = top.clamp(min=limits.min), 0.9 * math.log(limits.tiny), limits.tiny**0.75
    if watched(joint):
        below = joint - shift
        weight = torch.nn.functional.threshold(below.clamp(min=floor).exp(), least, 0.0)
        total = weight.sum(-1, keepdim=True).clamp(min=0.5)
        return (top + total.log()).squeeze(-1), weight / total
    # The same in place: new memory for every step costs several times what the arithmetic does.
    below = joint.sub_(shift) if consume else joint - shift
    weight = torch.threshold_(below.clamp_(min=floor).exp_(), least, 0.0)
    total = weight.sum(-1, keepdim=True).clamp_(min=0.5)
    return (top + total.log()).squeeze(-1), weight.div_(total)


def plus(x: Tensor, more: Tensor) -> Tensor:
    """``x + more``, in the memory of x, that nothing else may read, where nothing follows either.

    Example:
        >>> plus(torch.ones(2), torch.ones(()))
        tensor([2., 2.])
    """
    return x + more if watched(x) or watched(more) else x.add_(more)


def watched(x: Tensor) -> bool:
    """Whether derivatives, transforms or a compiler follow what is computed from a tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return x.requires_grad and torch.is_grad_enabled()
