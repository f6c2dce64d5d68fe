"""Priors over probability tables: rows a priori Dirichlet, or weights broken off a stick."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor, Prior
from torchem.stats import Stats

#: Tables are free of data.
_NOTHING = Batch(torch.empty(0, 1))


class _Concentrations(Prior, ABC):
    """Independent Dirichlet laws over the rows of a probability table, each over its row's support."""

    @abstractmethod
    def concentrations(self, table: Tensor) -> Tensor:
        """α, float64, in the shape of a table's logits."""

    def _alpha(self, factor: Factor) -> tuple[Tensor, Tensor]:
        support = getattr(factor, "support", None)
        if support is None or support.shape != getattr(factor, "logits", support).shape or not hasattr(factor, "shape"):
            raise invalid("prior", "a table of probabilities to stand over", type(factor).__name__, "use its own prior")
        # By attribute: inside a functional call no parameter stands there.
        return self.concentrations(cast(Tensor, factor.logits)), support

    def mode_stats(self, factor: Factor) -> Stats:
        alpha, support = self._alpha(factor)
        return Stats(counts=torch.where(support, alpha - 1, 0.0))

    def posterior_stats(self, factor: Factor) -> Stats:
        alpha, support = self._alpha(factor)
        return Stats(counts=torch.where(support, alpha, 0.0))

    def check(self, factor: Factor) -> None:
        alpha, support = self._alpha(factor)
        low = alpha[support]
        if bool((low < 1).any()):
            raise invalid(
                "prior", "concentrations of at least 1 (the mode of a lower one is at zero)", float(low.min()),
                "raise it, or use variational EM",
            )  # fmt: skip

    def log_prob(self, factor: Factor) -> Tensor:
        alpha, support = self._alpha(factor)
        log_probs = torch.where(support, cast(Any, factor).log_probs().to(torch.float64), 0.0)
        inside = torch.where(support, alpha, 1.0)
        total = torch.where(support, alpha, 0.0).sum(-1)
        rows = total.lgamma() - inside.lgamma().sum(-1) + ((inside - 1) * log_probs).sum(-1)
        lead = len(factor.replicas)
        return rows.flatten(lead).sum(-1) if rows.dim() > lead else rows


class Dirichlet(_Concentrations):
    """Rows of a table a priori Dirichlet: p(π) ∝ Π_j π_j^{α_j − 1} over the cells that are allowed.

    Args:
        concentration: α, one number or a tensor that broadcasts to the table; at least 1 for a mode inside.

    Source: A. Gelman et al. (2013), section 3.4.

    Example:
        >>> import torchem
        >>> weights = torchem.factors.Categorical(2)
        >>> weights.prior = Dirichlet(2.0)
        >>> weights.prior.mode_stats(weights)["counts"]
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, concentration: Any = 1.0):
        value = as_tensor(concentration, "concentration").to(torch.float64)
        if not bool(((value > 0) & value.isfinite()).all()):
            raise invalid("concentration", "positive finite numbers", concentration, "1 is the uniform law")
        self.concentration = value

    def concentrations(self, table: Tensor) -> Tensor:
        try:
            return self.concentration.to(table.device).expand(table.shape)
        except RuntimeError as error:
            raise invalid(
                "concentration", f"one number, or a shape that broadcasts to {list(table.shape)}",
                list(self.concentration.shape), "give one per cell",
            ) from error  # fmt: skip

    def selected(self, factor: Factor, keep: Tensor) -> Prior:
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        value, shape = self.concentration, tuple(getattr(factor, "shape", ()))
        # As tables are pruned: weights of their categories, a transition matrix of both, an emission of its states.
        for axis in range(-value.dim(), 0):
            states = axis == -len(shape) or (axis == -1 and len(shape) < 3 and shape[-2:-1] in ((), shape[-1:]))
            if states and value.shape[axis] == shape[axis]:
                value = value.index_select(axis, index)
        return Dirichlet(value)

    def config(self) -> dict[str, Any]:
        return {"concentration": self.concentration.tolist()}


class StickyDirichlet(_Concentrations):
    """Rows of a transition matrix a priori Dirichlet with more weight on staying: α_ij = α + κ [i = j].

    Args:
        stickiness: κ, prior transitions from each state to itself, at least 0.
        concentration: α of every allowed cell, at least 1 for a mode inside.

    Source: E. B. Fox, E. B. Sudderth, M. I. Jordan, A. S. Willsky (2011).

    Example:
        >>> import torchem
        >>> table = torchem.factors.Categorical(2, 2)
        >>> table.prior = StickyDirichlet(10.0)
        >>> table.prior.mode_stats(table)["counts"]
        tensor([[10.,  0.],
                [ 0., 10.]], dtype=torch.float64)
    """

    def __init__(self, stickiness: float, concentration: float = 1.0):
        for name, value, least in (("stickiness", stickiness, 0.0), ("concentration", concentration, 0.0)):
            if not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise invalid(name, f"a finite number of at least {least:g}", repr(value), "correct it")
        self.stickiness, self.concentration = float(stickiness), float(concentration)

    def concentrations(self, table: Tensor) -> Tensor:
        if table.dim() < 2 or table.shape[-1] != table.shape[-2]:
            raise invalid("prior", "a square table for a sticky prior", list(table.shape), "use Dirichlet")
        eye = torch.eye(table.shape[-1], dtype=torch.float64, device=table.device)
        return (self.concentration + self.stickiness * eye).expand(table.shape)

    def config(self) -> dict[str, Any]:
        return {"stickiness": self.stickiness, "concentration": self.concentration}


class StickBreaking(Prior):
    """Mixing weights of a Dirichlet process: π_k = v_k Π_{j<k} (1 − v_j) with v_k ~ Beta(1, γ).

    For `torchem.Variational` over ``Categorical(K)``: the posterior of the first K of infinitely many sticks is
    v_k ~ Beta(1 + N_k, γ + Σ_{j>k} N_j), that of all others the prior, so that what they hold is left unused.
    Components that are not needed lose their mass, later ones first.

    As the prior of a point estimate, ``mixing.prior = StickBreaking(γ)``, with γ ≥ 1: K sticks are all there are
    (v_K = 1), and the mode is that of the sticks' density Π_{k<K} γ (1 − v_k)^{γ − 1} = γ^{K − 1} π_K^{γ − 1}. Given
    counts it is at v_k = N_k / (N_k + γ − 1 + Σ_{j>k} N_j), or in weights at

        π ∝ (N_1, …, N_{K−1}, N_K + γ − 1),

    for all that sticks leave to those after them ends at the last. Modes depend on coordinates: the density of the
    weights themselves has a factor 1 / Π_{1<k<K} (1 − Σ_{j<k} π_j) more, and for γ < K − 1 no upper bound. With γ < 1
    that of the sticks has none either, where the last component loses its mass.

    Args:
        concentration: γ, positive; about γ log N components are expected for N observations.

    Raises:
        InvalidArgument: If γ is not positive and finite.

    Source: J. Sethuraman (1994); D. M. Blei, M. I. Jordan (2006); K. Kurihara, M. Welling, N. Vlassis (2007).

    Example:
        >>> import torchem
        >>> m = torchem.variational(torchem.GaussianMixture(3, 2), mixing=StickBreaking(1.0))
        >>> m.weights.shape
        torch.Size([3])
    """

    def __init__(self, concentration: float = 1.0):
        if not isinstance(concentration, (int, float)) or not 0 < concentration < math.inf:
            raise invalid("concentration", "a positive finite number", repr(concentration), "1 is usual")
        self.concentration = float(concentration)

    def sticks(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """Both parameters ``[*r, K]`` of the beta posteriors."""
        counts = posterior["counts"]
        after = counts.flip(-1).cumsum(-1).flip(-1) - counts
        return 1 + counts, self.concentration + after

    @staticmethod
    def _weights(factor: Factor) -> Tensor:
        """The logits of mixing weights, ``[*r, K]``."""
        logits = getattr(factor, "logits", None)
        if logits is None or not hasattr(factor, "support") or len(getattr(factor, "shape", ())) != 1:
            raise invalid(
                "prior", "mixing weights, Categorical(K), to stand over", type(factor).__name__, "use another"
            )
        return logits

    def posterior_stats(self, factor: Factor) -> Stats:
        logits = self._weights(factor)
        # The prior itself is where the statistics begin: its γ enters through `sticks`.
        return Stats(counts=torch.zeros_like(logits, dtype=torch.float64))

    def log_normalizer(self, factor: Factor, posterior: Stats) -> Tensor:
        """Σ log B(1 + N_k, γ + Σ_{j>k} N_j)."""
        a, b = self.sticks(posterior)
        return (a.lgamma() + b.lgamma() - (a + b).lgamma()).sum(-1)

    def expected_natural(self, factor: Factor, posterior: Stats) -> Stats:
        """E log π_k = E log v_k + Σ_{j<k} E log(1 − v_j)."""
        a, b = self.sticks(posterior)
        both, rest = (a + b).digamma(), b.digamma()
        left = (rest - both).cumsum(-1) - (rest - both)
        return Stats(counts=a.digamma() - both + left)

    def means(self, factor: Factor, posterior: Stats) -> Tensor:
        """E π_k of the first K sticks, made to sum to one."""
        a, b = self.sticks(posterior)
        rest = (b / (a + b)).log()
        value = (a / (a + b)).log() + rest.cumsum(-1) - rest
        # A component that was taken out leaves its share of the stick unused as well.
        return value.masked_fill(~cast(Tensor, factor.support), -torch.inf).softmax(-1)

    def _last(self, factor: Factor) -> Tensor:
        """``[*r, K]`` Boolean, True at the last component that may have mass: the rest of the stick is its own."""
        support = cast(Tensor, factor.support)
        after = support.flip(-1).to(torch.int64).cumsum(-1).flip(-1)
        return support & (after == 1)

    def mode_stats(self, factor: Factor) -> Stats:
        self._weights(factor)
        last = self._last(factor)
        return Stats(counts=torch.where(last, self.concentration - 1, torch.zeros_like(last, dtype=torch.float64)))

    def log_prob(self, factor: Factor) -> Tensor:
        """log Π_{k<K} p(v_k), over the components that may have mass."""
        log_probs = factor.log_table(_NOTHING).to(torch.float64).reshape(self._weights(factor).shape)
        last = torch.where(self._last(factor), log_probs, 0.0).sum(-1)
        sticks = cast(Tensor, factor.support).sum(-1, dtype=torch.float64) - 1
        return sticks * math.log(self.concentration) + (self.concentration - 1) * last

    def check(self, factor: Factor) -> None:
        self._weights(factor)
        if self.concentration < 1:
            raise invalid(
                "prior", "a StickBreaking concentration of at least 1 (the density of a lower one grows without bound "
                "as the last component loses its mass: it has no mode)", self.concentration,
                "raise it, or use it with torchem.Variational",
            )  # fmt: skip

    def check_given(self, kept: Sequence[str]) -> None:
        raise invalid(
            "freeze", f"all of a table under {type(self).__name__}, or nothing (what is left of its sticks when "
            "some weights are known is not broken off like them)", list(kept), "use priors.Dirichlet",
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        return {"concentration": self.concentration}
