"""Gates that are networks: any module that gives scores of the classes."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchem.batch import Batch
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.factors._climbed import valued
from torchem.factors._coefficients import checked_columns
from torchem.factors._network import Network, checked_size
from torchem.stats import Stats


class NeuralGate(Network):
    """A latent child whose log-odds are a network's output.

    log p(z = j | u, parent = p) = log softmax_j(module(u)_pj).

    The gate of a mixture of experts, or a transition that reads inputs. The network is kept in evaluation mode. Q is no
    function of statistics: it is fitted under `torchem.Gradient`, as `Neural` is.

    Args:
        module: Network from u ``[n, M]`` to scores ``[n, n_components]``, or ``[n, n_parents · n_components]``.
        n_components: K, the number of classes.
        n_parents: P, the number of states of the parent, or None for a gate.
        columns: Which columns of u the network is given; all of them when None.
        states: Which of its classes there are, in their order; all by default. Pruning leaves some. Where there are as
            many parents they are the same states.

    Raises:
        InvalidType: If it is no torch module.
        InvalidArgument: If it has no parameters, or for sizes below one.

    Source: R. A. Jacobs, M. I. Jordan, S. J. Nowlan, G. E. Hinton (1991).

    Example:
        >>> gate = NeuralGate(torch.nn.Linear(1, 2), 2)
        >>> gate.log_table(Batch(torch.zeros(3, 1), u=torch.ones(3, 1))).exp().sum(-1).tolist()
        [1.0, 1.0, 1.0]
    """

    no_conjugate: ClassVar[str] = "parameters of a network have no sufficient statistics"
    reads: ClassVar = frozenset({"u"})

    allowed: Tensor

    def __init__(
        self,
        module: nn.Module,
        n_components: int,
        n_parents: int | None = None,
        columns: Sequence[int] | None = None,
        states: Sequence[int] | None = None,
    ):
        super().__init__(module, "use Categorical for weights free of inputs")
        checked_size("n_components", n_components)
        checked_size("n_parents", 1 if n_parents is None else n_parents)
        chosen = None if states is None else [int(state) for state in states]
        if chosen is not None and not (chosen and set(chosen) <= set(range(n_components))):
            raise invalid("states", f"classes from 0 to {n_components - 1}", chosen, "leave it out for all of them")
        self._outputs, self.n_parents, self.states = n_components, n_parents, chosen
        self.columns = None if columns is None else checked_columns(columns, len(columns))
        self.n_classes = n_components if chosen is None else len(chosen)
        parents = self.n_classes if n_parents == n_components else n_parents
        self.shape = (self.n_classes,) if parents is None else (parents, self.n_classes)
        self.register_buffer("allowed", torch.ones(self.shape, dtype=torch.bool), persistent=False)

    def row_size(self) -> int:
        return 4 * self._outputs * (self.n_parents or 1) + super().row_size()

    # ---- as a latent child ------------------------------------------------------------------------------------

    def log_table(self, batch: Batch) -> Tensor:
        """``[*n, (P,) K]``: a table for each row of u."""
        u = batch.u
        if u is None:
            raise invalid("inputs", "covariates [N, M]", "none", "pass inputs=u to fit, or Batch(x, u=u)")
        rows = (u if self.columns is None else u[..., list(self.columns)]).flatten(0, -2).to(self.dtype)
        value = self.module(rows)
        size = (len(rows), self._outputs * (self.n_parents or 1))
        if not isinstance(value, Tensor) or tuple(value.shape) != size:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise invalid("module", f"scores of shape {list(size)}", got, "give one number for each class")
        parents = () if self.n_parents is None else (self.n_parents,)
        value = value.to(self.dtype).reshape(*u.shape[:-1], *parents, self._outputs)
        if self.states is not None:
            value = value[..., self.states]
            value = value[..., self.states, :] if self.n_parents == self._outputs else value
        return value.masked_fill(~self.allowed, -torch.inf).log_softmax(-1)

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``value []``: Q at the current parameters, which is no function of statistics; ``mass [(P,) K]`` expected."""
        mass = expected.to(torch.float64).reshape(-1, *self.shape).sum(0)
        return Stats(value=valued(self.log_table(batch), expected)["value"], mass=mass, shared=("value",))

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        return self.table_stats(batch, expected)

    def forbid(self, states: Tensor) -> None:
        left = self.allowed & ~states
        self.allowed = torch.where(left.any(-1, keepdim=True), left, self.allowed)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> "NeuralGate":
        """Keep some classes; as a transition, the same states as parents."""
        index = (keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep).tolist()
        chosen = [(self.states or range(self._outputs))[i] for i in index]
        small = NeuralGate(self.module, self._outputs, self.n_parents, self.columns, chosen)
        small.fixed = self.fixed
        return small.to(self.device)

    def config(self) -> dict[str, Any]:
        return {
            "module": self.module, "n_components": self._outputs, "n_parents": self.n_parents, "columns": self.columns,
            "states": self.states,
        }  # fmt: skip

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        gate = cls(nn.Linear(2, 3), 3).double()
        for parameter in gate.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        u = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        return gate, Batch(torch.zeros(20, 1, dtype=torch.float64), u=u)
