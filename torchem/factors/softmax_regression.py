"""Multinomial logistic regression of a latent child: gates and transitions that depend on covariates."""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.factors._coefficients import checked_columns, covariates
from torchem.ops.least_squares import NormalEquations
from torchem.stats import Stats

#: Steps of least squares: the first solves, the others take back the rounding of ill-conditioned inputs.
_REFINE = 3
#: Steps that a start takes.
_START = 100


class SoftmaxRegression(Factor):
    """A latent child whose log-odds are linear in covariates.

    log p(z = j | u, parent = p) = log softmax_j(w_pj · u), with w_p0 = 0.

    ``SoftmaxRegression(K, M)`` is the gate of a mixture of experts, ``SoftmaxRegression(K, M, n_parents=K)`` a
    transition that reads inputs. It starts uniform; there is no intercept unless u has a column of ones. Only
    differences between classes matter, so class 0 is pinned at zero; what is assigned to `weight` is brought to that.

    The M-step maximises a quadratic that lies below Q(θ) = Σ_n Σ_j r_nj log p(j | u_n) and touches it at the θ_old at
    which statistics were taken. The Hessian of log Σ_j exp η_j is at most E = ½ (I − 11ᵀ/K), hence with g the gradient
    at θ_old, U_p = Σ_n w_np u_n u_nᵀ under the mass w of parent p, and B = E ⊗ U,

        Q(θ) ≥ c + b·θ − ½ θᵀBθ,   b = g + Bθ_old,   c = Q(θ_old) − g·θ_old − ½ θ_oldᵀBθ_old.

    In these coordinates the minorisers of all batches add, wherever each was taken, and EM never falls.

    Args:
        n_components: K, the number of classes.
        n_inputs: M, the number of columns of u that it reads.
        n_parents: P, the number of states of the parent, or None for a gate.
        columns: Which columns of u are the inputs; all of them when None.

    Raises:
        InvalidArgument: For sizes below one, or a column that u has not.

    Source: D. Böhning (1992), theorem 1.

    Example:
        >>> gate = SoftmaxRegression(2, 1)
        >>> gate.weight = [[1.0], [3.0]]
        >>> gate.weight[:, 0].tolist()
        [0.0, 2.0]
        >>> gate.log_table(Batch(torch.zeros(3, 1), u=torch.zeros(3, 1))).exp()[0].tolist()
        [0.5, 0.5]
    """

    no_conjugate: ClassVar[str] = "the normaliser of one over coefficients has no closed form"
    views: ClassVar = {"weight": "coefficient"}
    reads: ClassVar = frozenset({"u"})

    coefficient: Tensor
    allowed: Tensor

    def __init__(
        self, n_components: int, n_inputs: int, n_parents: int | None = None, columns: Sequence[int] | None = None
    ):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_inputs", n_inputs), ("n_parents", n_parents)):
            whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            if not whole and not (name == "n_parents" and size is None):
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        self.n_classes, self.n_inputs, self.n_parents = n_components, n_inputs, n_parents
        self.columns = checked_columns(columns, n_inputs)
        #: Sizes of the parent's axis, if there is one, and of the child's.
        self.shape = (n_components,) if n_parents is None else (n_parents, n_components)
        self.new_parameter("coefficient", torch.zeros(*self.shape[:-1], n_components - 1, n_inputs))
        self.new_buffer("allowed", torch.ones(self.shape, dtype=torch.bool))
        #: Whether any class is outside the support; spares the masks of the common case.
        self.restricted = False

    def refresh(self) -> None:
        self.restricted = not bool(self.allowed.all())

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """Coefficients ``[*r, (P,) K, M]``, zero for class 0; assignable."""
        return torch.nn.functional.pad(self.coefficient, (0, 0, 1, 0))

    @weight.setter
    def weight(self, value: Any) -> None:
        weight = as_tensor(value, "weight").to(self.device, torch.float64)
        shape = [*self.replicas, *self.shape, self.n_inputs]
        if list(weight.shape) != shape:
            raise invalid("weight", f"shape {shape}", list(weight.shape), "give coefficients [M] for each class")
        if not bool(weight.isfinite().all()):
            raise invalid("weight", "finite numbers", "NaN or infinity", "use support for what cannot be")
        with torch.no_grad():
            self.coefficient.copy_(weight[..., 1:, :] - weight[..., :1, :])

    @property
    def support(self) -> Tensor:
        """``[*r, (P,) K]`` Boolean, True where a class is possible; assignable. What is not stays exactly zero."""
        return self.allowed

    @support.setter
    def support(self, value: Any) -> None:
        allowed = as_tensor(value, "support").to(self.device, torch.bool)
        if allowed.shape != self.allowed.shape:
            raise invalid("support", f"shape {list(self.allowed.shape)}", list(allowed.shape), "mark every class")
        if not bool(allowed.any(-1).all()):
            raise invalid("support", "a possible class in each row", "a row without", "allow one of them")
        self.allowed.copy_(allowed)
        self.refresh()

    # ---- as a latent child ------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        self._inputs(batch)

    def _inputs(self, batch: Batch) -> Tensor:
        return covariates(batch, self.n_inputs, self.columns)

    def log_table(self, batch: Batch) -> Tensor:
        """``[*r, *n, (P,) K]``: a table for each row of u."""
        u = self._inputs(batch)
        return self._log_probs(u.reshape(-1, self.n_inputs).to(self.dtype)).unflatten(len(self.replicas), u.shape[:-1])

    def _log_probs(self, u: Tensor) -> Tensor:
        """Log-probabilities ``[*r, n, (P,) K]`` for rows ``u [n, M]``, in the type of u."""
        lead = len(self.replicas)
        weight = self.weight.to(u.dtype)
        logits = (u @ weight.flatten(lead, -2).mT).unflatten(-1, self.shape)
        if self.restricted:
            logits = logits.masked_fill(~self.allowed.unsqueeze(-1 - len(self.shape)), -torch.inf)
        return logits.log_softmax(-1)

    def row_size(self) -> int:
        parents = self.n_parents or 1
        return 4 * parents * self.n_classes + 2 * parents * self.n_inputs

    # ---- EM ---------------------------------------------------------------------------------------------------

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        return self.table_stats(batch, expected)

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """The minoriser ``constant [*r, (P)]``, ``linear`` [*r, (P,) K − 1, M] and ``curvature`` U [*r, (P,) M, M].

        ``mass [*r, (P,) K]`` is expected of the classes.
        """
        lead, tail = len(self.replicas), -1 - len(self.shape)
        u = self._inputs(batch).reshape(-1, self.n_inputs).to(torch.float64)
        expected = expected.reshape(*self.replicas, -1, *self.shape).to(torch.float64)
        log_probs = self._log_probs(u)
        mass = expected.sum(-1)
        # Where a class is impossible nothing is expected, and −inf would spoil derivatives.
        known = log_probs.masked_fill(~self.allowed.unsqueeze(tail), 0.0) if self.restricted else log_probs
        value = (expected * known).sum((tail, -1)) if self.n_parents is None else (expected * known).sum(-1).sum(lead)
        residual = (expected - mass.unsqueeze(-1) * log_probs.exp())[..., 1:]
        gradient = (residual.flatten(lead + 1).mT @ u).unflatten(-2, residual.shape[lead + 1 :])
        weighted = mass.movedim(lead, -1).unsqueeze(-1) * u
        curvature = weighted.mT @ u
        theta = self.coefficient.to(torch.float64)
        bent = self._bent(theta) @ curvature
        constant = value - (theta * (gradient + bent / 2)).sum((-2, -1))
        return self._quadratic(constant, gradient + bent, curvature, expected.sum(lead))

    def _quadratic(self, constant: Tensor, linear: Tensor, curvature: Tensor, mass: Tensor) -> Stats:
        shared = ("constant", "linear", "curvature") if self.n_parents is None else ()
        return Stats(constant=constant, linear=linear, curvature=curvature, mass=mass, shared=shared)

    def _free(self) -> tuple[Tensor, Tensor, Tensor]:
        """Classes with free coefficients ``[*r, (P,) K − 1, 1]``, number of possible ones, whether class 0 is one."""
        allowed = self.allowed.to(torch.float64)
        return allowed[..., 1:, None], allowed.sum(-1)[..., None, None], allowed[..., :1, None]

    def _bent(self, theta: Tensor) -> Tensor:
        """Eθ = ½ (θ − 1 1ᵀθ/K), over the possible classes."""
        free, size, _ = self._free()
        theta = theta * free
        return (theta - free * theta.sum(-2, keepdim=True) / size) / 2

    def _straightened(self, right: Tensor) -> Tensor:
        """E⁺ times what `_bent` gave: 2 (r + 1 1ᵀr), or 2 (r − 1 1ᵀr/K) where class 0 is not there to be pinned."""
        free, size, pinned = self._free()
        right = right * free
        return 2 * (right + torch.where(pinned > 0, 1.0, -1 / size) * free * right.sum(-2, keepdim=True))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        normal = NormalEquations(stats["curvature"])
        theta = self.coefficient.to(torch.float64)
        for _ in range(_REFINE):
            rest = stats["linear"] - self._bent(theta) @ stats["curvature"]
            theta = theta + normal.solve(self._straightened(rest).mT).mT
        return {"coefficient": self.keep_frozen("coefficient", theta.to(self.dtype))}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """The minoriser of Q at the current parameters; equal to Q, with its gradient, where statistics were taken."""
        theta = self.coefficient.to(torch.float64)
        slope = stats["linear"] - self._bent(theta) @ stats["curvature"] / 2
        value = stats["constant"] + (theta * slope).sum((-2, -1))
        return value if self.n_parents is None else value.sum(-1)

    def initialize_table(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters from responsibilities: many steps, for experts that overlap hide what a weak gate says."""
        moving = copy.deepcopy(self)
        for _ in range(_START):
            for name, value in moving.maximize(moving.penalized(moving.table_stats(batch, expected))).items():
                moving.get_parameter(name).data = value
        return dict(moving.named_parameters())

    def normal_stats(self, precision: Tensor) -> Stats:
        """The log-density of `torchem.priors.Normal`, of some ``precision [M]``, as a quadratic."""
        known = precision > 0
        norm = torch.where(known, (torch.where(known, precision, 1.0) / (2 * torch.pi)).log(), 0.0).sum()
        # E over K classes, one of them pinned, has the determinant 2^(1 − K) / K.
        size = self.allowed.sum(-1).to(torch.float64)
        log_det = -(size - 1) * math.log(2) - size.log()
        constant = ((size - 1) * norm + known.sum() * log_det) / 2
        curvature = torch.diag_embed(precision).expand(*constant.shape, -1, -1)
        linear = torch.zeros_like(self.coefficient, dtype=torch.float64)
        return self._quadratic(constant, linear, curvature, torch.zeros_like(self.allowed, dtype=torch.float64))

    def forbid(self, states: Tensor) -> None:
        left = self.allowed & ~states
        self.allowed, self.restricted = torch.where(left.any(-1, keepdim=True), left, self.allowed), True

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def check_mask(self, name: str, mask: Tensor) -> None:
        if self.n_parents is None and mask.dim():
            raise invalid("mask", "no mask (classes of a gate move together)", list(mask.shape), "freeze it whole")
        if mask.dim() and mask.shape != (self.n_parents,):
            raise invalid("mask", f"shape [{self.n_parents}] (parents)", list(mask.shape), "freeze whole rows")

    def n_parameters(self) -> int:
        free = (self.allowed.sum(-1) - 1) * self.n_inputs
        mask = self.frozen("coefficient")
        return int(free.sum() if mask is None else (free * ~mask).sum())

    def select(self, keep: Tensor) -> "SoftmaxRegression":
        """Keep some classes; as a transition, the same states as parents."""
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        square = self.n_parents == self.n_classes
        small = SoftmaxRegression(len(index), self.n_inputs, len(index) if square else self.n_parents, self.columns)
        small = small.to(self.device, self.dtype)
        weight, allowed, mask = self.weight.detach(), self.allowed, self.frozen("coefficient")
        if square:
            weight, allowed = weight[index], allowed[index]
            mask = mask[index] if mask is not None and mask.dim() else mask
        weight, allowed = weight[..., index, :], allowed[..., index]
        small.weight = weight
        # A row that loses all its classes may go anywhere.
        small.support = allowed | ~allowed.any(-1, keepdim=True)
        if mask is not None:
            small.register_buffer("frozen_coefficient", mask)
        return small

    def config(self) -> dict[str, Any]:
        return {
            "n_components": self.n_classes, "n_inputs": self.n_inputs, "n_parents": self.n_parents,
            "columns": self.columns,
        }  # fmt: skip

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        gate = cls(3, 2).double()
        gate.weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        u = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        return gate, Batch(torch.zeros(20, 1, dtype=torch.float64), u=u)
