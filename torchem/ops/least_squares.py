"""Normal equations that may be singular: collinear regressors, states that nothing was seen of."""

import torch
from jaxtyping import Float
from torch import Tensor

from torchem.ops import linalg

#: Pivots below this many times the rounding of the factorisation are noise: their regressor depends on others.
_NOISE = 100.0


class NormalEquations:
    """Solves G δ = r for symmetric positive semidefinite G, with zeros where G determines nothing.

    G is scaled to a unit diagonal, so units do not matter. A regressor that depends on those before it (its pivot is
    lost in rounding), or that was never seen (its diagonal is zero), is left out: its δ is zero. Solving for *steps*
    from the current coefficients therefore keeps what the data say nothing about, and repeating the step on what is
    left of r refines it. Where G is not positive semidefinite after all, δ is zero.

    Args:
        gram: ``[*n, M, M]`` weighted products of regressors.
        size: ``[*n, M]`` the diagonal that pivots are measured against; G's own unless G is what elimination left.

    Source: G. H. Golub, C. F. Van Loan (2013), sections 4.2.8 and 3.5.3.

    Example:
        >>> gram = torch.tensor([[4.0, 4.0], [4.0, 4.0]], dtype=torch.float64)
        >>> NormalEquations(gram).solve(torch.tensor([[8.0], [8.0]], dtype=torch.float64)).mT
        tensor([[2., 0.]], dtype=torch.float64)
    """

    def __init__(self, gram: Float[Tensor, "*n m m"], size: Float[Tensor, "*n m"] | None = None):
        size = gram.diagonal(dim1=-2, dim2=-1) if size is None else size
        seen = size > 0
        scale = torch.where(seen, torch.where(seen, size, 1.0).rsqrt(), 0.0)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ridge = 4 * gram.shape[-1] * torch.finfo(gram.dtype).eps
        unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(-2) + ridge * eye
        factor, info = torch.linalg.cholesky_ex(unit)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        kept = ((pivots > _NOISE * ridge) & (info == 0).unsqueeze(-1)).to(gram.dtype)
        self.scale = scale * kept
        unit = unit * (kept.unsqueeze(-1) * kept.unsqueeze(-2)) + torch.diag_embed(1 - kept)
        self.factor = linalg.cholesky(unit)

    def solve(self, right: Float[Tensor, "*n m p"]) -> Float[Tensor, "*n m p"]:
        """δ for the right-hand sides r."""
        return self.scale.unsqueeze(-1) * torch.cholesky_solve(self.scale.unsqueeze(-1) * right, self.factor)
