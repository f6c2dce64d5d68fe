"""Rows of a normal law with missing entries, where means are latent: what was observed, and what it leaves open.

With R Σ Rᵀ = I whitened rows Rx have independent noise. Of a row that misses the entries m the whitened space shows all
but the span of R's columns m: with an orthonormal basis T of that span (rows), Π = I − TᵀT, and

    log p(x_o | μ) = −½ |Π R (x − μ)|² − ½ log |Σ| − ½ log |Λ_mm| − ½ (D − m) log 2π,   Λ = RᵀR = Σ⁻¹,

whatever stands in the missing entries of x. These are normal given the others, with covariance Λ_mm⁻¹ and mean
μ_m − Λ_mm⁻¹ Λ_mo (x_o − μ_o): linear in μ. Matrices are made once for each pattern of missing entries.

Source: T. W. Anderson (2003), theorem 2.5.1; R. J. A. Little, D. B. Rubin (2002), section 11.2.
"""

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torchem.ops import linalg, missing
from torchem.ops.gaussian import LOG_2PI


class Holes:
    """Which rows miss some of their entries, and which these are.

    Attributes:
        index: The rows, ``[G]`` of ``n``.
        patterns: True where an entry is missing, ``[P, D]``.
        which: The pattern of each of those rows, ``[G]``.
    """

    def __init__(self, index: Int[Tensor, " g"], patterns: Bool[Tensor, "p d"], which: Int[Tensor, " g"]):
        self.index, self.patterns, self.which = index, patterns, which

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], valid: Bool[Tensor, " n"] | None = None) -> "Holes | None":
        """The holes in rows that have an entry at all; None if there are none.

        Args:
            x: Rows, NaN where an entry is missing.
            valid: False for rows that are none.

        Example:
            >>> nan = torch.nan
            >>> holes = Holes.of(torch.tensor([[1.0, nan], [0.0, 1.0], [nan, nan], [2.0, nan]]))
            >>> holes.index, holes.patterns
            (tensor([0, 3]), tensor([[False,  True]]))
        """
        if not missing.any_missing(x):
            return None
        patterns = missing._patterns(x)
        if patterns is None:
            # vmap hides what is missing: every row has a pattern of its own.
            every = torch.arange(len(x), device=x.device)
            return cls(every, x.isnan(), every)
        with torch._C._DisableFuncTorch():
            some = patterns.any(-1) & ~patterns.all(-1)
            if valid is not None:
                some = some & missing._unwrapped(valid)
            index = some.nonzero()[:, 0]
            unique, which = patterns[index].unique(dim=0, return_inverse=True)
        return cls(index, unique, which) if len(index) else None

    @classmethod
    def everywhere(cls, x: Float[Tensor, "n d"]) -> "Holes":
        """A pattern for all of some rows, those without any entry as well."""
        patterns, which = x.isnan().unique(dim=0, return_inverse=True)
        return cls(torch.arange(len(x), device=x.device), patterns, which)

    def take(self, value: Tensor, dim: int) -> Tensor:
        """What belongs to all rows, for those that miss entries."""
        return value.index_select(dim, self.index)

    def put(self, value: Tensor, part: Tensor, dim: int) -> Tensor:
        """``value`` with another ``part`` at the rows that miss entries."""
        return value.index_copy(dim, self.index, part)

    def total(self, each: Tensor, events: int) -> Tensor:
        """Sums ``[*r, P, …]`` over the rows of each pattern, of ``[*r, G, …]`` with so many axes after that of rows."""
        dim = each.dim() - 1 - events
        shape = (*each.shape[:dim], len(self.patterns), *each.shape[dim + 1 :])
        return each.new_zeros(shape).index_add(dim, self.which, each)


class Observed:
    """What rows with holes show under a normal law.

    Args:
        root: R ``[*r, D, D]``, lower triangular.
        holes: What is missing.
    """

    def __init__(self, root: Float[Tensor, "*r d d"], holes: Holes):
        self.root, self.holes = root, holes
        # In units in which precisions have a unit diagonal, columns may differ by many orders of magnitude.
        self.unit = root.square().sum(-2).sqrt()
        gaps = holes.patterns
        span = torch.where(gaps.unsqueeze(-2), (root / self.unit.unsqueeze(-2)).unsqueeze(-3), 0.0)
        gram = span.mT @ span + torch.diag_embed((~gaps).to(span))
        factor = linalg.cholesky(gram)
        self._inverse = linalg.inverse_factor(factor)
        #: T of each pattern, ``[*r, P, D, D]``; rows of zeros beside those of missing entries.
        self.basis = self._inverse @ span.mT
        units = torch.where(gaps, 2 * self.unit.log().unsqueeze(-2) - LOG_2PI, 0.0).sum(-1)
        #: What log-densities have beside those of complete rows, ``[*r, P]``: −½ log |Λ_mm| + ½ m log 2π.
        self.constant = -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * units

    def project(self, y: Float[Tensor, "*r n d"]) -> Float[Tensor, "*r n d"]:
        """Π of each whitened row."""
        rows = self.holes.take(y, -2).unsqueeze(-1)
        basis = self.basis[..., self.holes.which, :, :]
        rows = (rows - basis.mT @ (basis @ rows)).squeeze(-1)
        return self.holes.put(y.expand(*rows.shape[:-2], *y.shape[-2:]), rows, -2)

    def half(self, mean: Float[Tensor, "*r k d"], n: int) -> Float[Tensor, "*r n k"]:
        """½ |Π v|² of whitened means v, for each of n rows."""
        whole = 0.5 * mean.square().sum(-1)
        hidden = 0.5 * (self.basis @ mean.mT.unsqueeze(-3)).square().sum(-2)
        part = whole.unsqueeze(-2) - hidden
        every = whole.unsqueeze(-2).expand(*part.shape[:-2], n, part.shape[-1])
        return self.holes.put(every, part[..., self.holes.which, :], -2)

    def constants(self, n: int) -> Float[Tensor, "*r n"]:
        """`constant` of each of n rows; zero where none is missing."""
        part = self.constant[..., self.holes.which]
        return self.holes.put(part.new_zeros(*part.shape[:-1], n), part, -1)

    # ---- what is missing --------------------------------------------------------------------------------------

    @cached_property
    def covariance(self) -> Float[Tensor, "*r p d d"]:
        """Λ_mm⁻¹ of each pattern, zero beside it: the covariance of what is missing, given the mean."""
        gaps = self.holes.patterns
        inverse = self._inverse.mT @ self._inverse
        both = gaps.unsqueeze(-1) & gaps.unsqueeze(-2)
        unit = self.unit.unsqueeze(-2)
        return torch.where(both, inverse, 0.0) / (unit.unsqueeze(-1) * unit.unsqueeze(-2))

    @cached_property
    def follows(self) -> Float[Tensor, "*r p d d"]:
        """How what is missing moves with the mean, given what was observed: E_m + Λ_mm⁻¹ Λ_mo."""
        gaps = self.holes.patterns
        precision = (self.root.mT @ self.root).unsqueeze(-3)
        move = self.covariance @ torch.where(gaps.unsqueeze(-2), 0.0, precision)
        return move + torch.diag_embed(gaps.to(move))

    def completed(self, x: Float[Tensor, "g d"], mean: Float[Tensor, "*r g d"]) -> Float[Tensor, "*r g d"]:
        """Rows with holes, filled by their expectations under given means of their own."""
        gaps = x.isnan()
        gap = torch.where(gaps, 0.0, x - mean)
        pull = gap @ (self.root.mT @ self.root)
        move = (self.covariance[..., self.holes.which, :, :] @ pull.unsqueeze(-1)).squeeze(-1)
        return torch.where(gaps, mean - move, x.to(mean))
