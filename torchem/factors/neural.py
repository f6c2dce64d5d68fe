"""Emissions that are networks: any module that scores observations under each state."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchem.batch import Batch, refuse_entries
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.factors._network import Network, checked_size
from torchem.ops import reduce
from torchem.ops.missing import any_missing


class Neural(Network):
    """An observed child whose log-density is a network's output.

    log p(x | k) = module(x)_k, or module(x, u)_k where it reads covariates.

    The network must give **normalised** log-densities: ∫ exp module(x)_k dx = 1 for every state, whatever its
    parameters (a flow, a mixture-density network, a regression with a learned variance, …). EM cannot tell: what is not
    normalised grows without bound. It is kept in evaluation mode, in training too, for a density must not depend on
    chance or on the other rows of a batch.

    Q is no function of statistics: an M-step passes over the data again, under `torchem.Gradient`, without which no
    model can be fitted. What stands for statistics, ``value``, is Q itself, and true at the parameters of its E-step
    alone. Starts climb from the network's own parameters, under the responsibilities of the start. Parameters that do
    not require a gradient stay as they are.

    What densities alone do not tell is the module's to say, if it has methods of these names: ``sample(z)`` draws a row
    for each state, ``moments()`` gives means and variances ``[1, K, D]``, ``cdf(x)`` the probability ``[n, K, D]`` of
    no more than x. Where it reads covariates each is called with u as well, last, and means are ``[n, K, D]``.

    Rows that are missing as a whole say nothing, and the network is not asked about them. Single missing entries (NaN)
    must be integrated out: that is its method ``marginal(x)``, log-densities of the entries that are there. Without it
    rows with some are refused. To fill entries in from `moments` and `sample` it must say that columns do not depend on
    each other given the state, by attributes ``independent = True`` and ``n_features``, the number of columns.

    Args:
        module: Network from x ``[n, D]`` (and u ``[n, M]``) to log-densities ``[n, n_components]``.
        n_components: Number of log-densities that it gives.
        inputs: Whether it is called with covariates as well, ``module(x, u)``.
        states: Which of its outputs are the states, in their order; all by default. Pruning leaves some.

    Raises:
        InvalidType: If it is no torch module.
        InvalidArgument: If it has no parameters, or for sizes below one.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 2, for what an M-step that only climbs does.

    Example:
        >>> class Unit(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
        ...     def forward(self, x):
        ...         return -0.5 * (x - self.mean) ** 2 - 0.5 * torch.tensor(2 * torch.pi).log()
        >>> Neural(Unit(), 2).log_prob(Batch(torch.tensor([[1.0]])))
        tensor([[-2.9189, -0.9189]], grad_fn=<...>)
    """

    no_conjugate: ClassVar[str] = "parameters of a network have no sufficient statistics"
    handles_missing: ClassVar[bool] = True

    def __init__(self, module: nn.Module, n_components: int, inputs: bool = False, states: Sequence[int] | None = None):
        super().__init__(module, "write a Factor of your own for a fixed law")
        checked_size("n_components", n_components)
        chosen = None if states is None else [int(state) for state in states]
        if chosen is not None and not (chosen and set(chosen) <= set(range(n_components))):
            raise invalid("states", f"outputs from 0 to {n_components - 1}", chosen, "leave it out for all of them")
        self._outputs, self.inputs, self.states = n_components, bool(inputs), chosen

    @property
    def reads(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Covariates, where the network is called with them."""
        return frozenset({"u"} if self.inputs else ())

    @property
    def n_components(self) -> int:
        return self._outputs if self.states is None else len(self.states)

    @property
    def n_features(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of columns, if the network says it by an attribute of that name."""
        return getattr(self.module, "n_features", None)

    @property
    def independent(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the network says that columns are independent given the state."""
        return bool(getattr(self.module, "independent", False))

    @property
    def shared_parameters(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All of them: a network has no part that is one state's alone."""
        return frozenset(name for name, _ in self.named_parameters())

    def row_size(self) -> int:
        return 4 * self.n_components + super().row_size()

    # ---- the distribution -------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        """Refuse data that the network cannot read, and a network that does not give a number for each state."""
        if self.inputs and batch.u is None:
            raise invalid("inputs", "covariates [N, M]", "none", "pass inputs=u to fit, or Batch(x, u=u)")
        if batch.x.is_floating_point() and not self._integrates:
            missing = batch.x.isnan()
            refuse_entries(
                batch, missing & ~missing.all(-1, keepdim=True), "rows that are whole, or missing in all columns",
                "give the network a method marginal(x) that integrates missing entries out, or leave that row out",
            )  # fmt: skip
        # A row or frame of which nothing is missing, if there is one.
        flat = Batch(batch.x.flatten(0, -2), u=None if batch.u is None else batch.u.flatten(0, -2))
        complete = (~flat.x.isnan()).all(-1) if flat.x.is_floating_point() else torch.ones(len(flat), dtype=torch.bool)
        if not bool(complete.any()):
            return
        index = int(complete.to(torch.uint8).argmax())
        row = flat[index : index + 1].to(self.device)
        try:
            with torch.no_grad():
                self.log_prob(row.with_x(self.cast(row.x)))
        except RuntimeError as error:
            raise invalid("data", "rows that the network reads", error, "fit its sizes to the columns") from error

    @property
    def _integrates(self) -> bool:
        """Whether the network knows what to do with missing entries."""
        return hasattr(self.module, "marginal")

    def log_prob(self, batch: Batch) -> Tensor:
        x = batch.x.reshape(-1, batch.x.shape[-1]).to(self.dtype)
        if not any_missing(x):
            return self._scored(self.module, x, batch)
        missing = x.isnan()
        gone = missing.all(-1, keepdim=True)
        # Networks need not bear NaN, nor need zero be a value that they know: a row that is there stands in.
        stand_in = x[reduce.first_max((~missing).to(x.dtype).sum(-1), 0)].nan_to_num(nan=0.0)
        score: Any = self.module.marginal if self._integrates else self.module
        value = self._scored(score, torch.where(gone, stand_in, x), batch)
        return torch.where(gone.unflatten(0, batch.x.shape[:-1]), 0.0, value)

    def _scored(self, score: Any, x: Tensor, batch: Batch) -> Tensor:
        """What the network says of rows ``x [n, D]``, checked and in the batch's own axes."""
        if not self.inputs:
            value = score(x)
        else:
            u = batch.u
            if u is None:
                raise invalid("inputs", "covariates [N, M]", "none", "pass inputs=u to fit, or Batch(x, u=u)")
            value = score(x, u.reshape(-1, u.shape[-1]).to(self.dtype))
        shape = (len(x), self._outputs)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise invalid("module", f"log-densities of shape {list(shape)}", got, "give one number for each state")
        value = value if self.states is None else value[:, self.states]
        return value.to(self.dtype).unflatten(0, batch.x.shape[:-1])

    def _ability(self, name: str, called: str) -> Any:
        """A method that the module may have, for what its densities alone do not tell."""
        found = getattr(self.module, name, None)
        if found is None:
            raise NotImplementedError(f"a Neural factor has {name} where its module has a method {name}{called}")
        return found

    def _given(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the module is called with beside x."""
        return (batch.u.reshape(-1, batch.u.shape[-1]).to(self.dtype),) if self.inputs and batch.u is not None else ()

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Means and variances ``[n or 1, K, D]`` by the module's own ``moments()``, or ``moments(u)``."""
        found = self._ability("moments", "(u)" if self.inputs else "()")(*self._given(batch))
        mean, variance = (value if self.states is None else value[:, self.states] for value in found)
        axes = batch.x.shape[:-1] if self.inputs else [1] * (batch.x.dim() - 1)
        return mean.unflatten(0, axes), variance.unflatten(0, axes)

    def cdf(self, batch: Batch) -> Tensor:
        """P(each column ≤ x) ``[n, K, D]`` by the module's own ``cdf(x)``, or ``cdf(x, u)``."""
        x = batch.x.reshape(-1, batch.x.shape[-1]).to(self.dtype)
        value = self._ability("cdf", "(x, u)" if self.inputs else "(x)")(x, *self._given(batch))
        return (value if self.states is None else value[:, self.states]).unflatten(0, batch.x.shape[:-1])

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draws ``[n, D]`` by the module's own ``sample(z)``, or ``sample(z, u)``, if it has one."""
        draw = self._ability("sample", "(z)")
        z = z if self.states is None else torch.tensor(self.states, device=z.device)[z]
        return draw(z, batch.u) if self.inputs and batch is not None else draw(z)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> "Neural":
        index = (keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep).tolist()
        small = Neural(
            self.module, self._outputs, self.inputs, [(self.states or range(self._outputs))[i] for i in index]
        )
        small.fixed = self.fixed
        return small

    def config(self) -> dict[str, Any]:
        return {
            "module": self.module, "n_components": self._outputs, "inputs": self.inputs, "states": self.states,
        }  # fmt: skip

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        family = cls(_Normal(3, 2), 3).double()
        for parameter in family.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return family, Batch(torch.randn(20, 2, generator=generator, dtype=torch.float64))


class _Normal(nn.Module):
    """Independent normal columns, for the example."""

    independent = True

    def __init__(self, k: int, d: int):
        super().__init__()
        self.n_features = d
        self.mean, self.log_scale = nn.Parameter(torch.zeros(k, d)), nn.Parameter(torch.zeros(k, d))

    def forward(self, x: Tensor) -> Tensor:
        law = torch.distributions.Normal(self.mean, self.log_scale.exp(), validate_args=False)
        return law.log_prob(x.unsqueeze(-2)).sum(-1)

    def marginal(self, x: Tensor) -> Tensor:
        law = torch.distributions.Normal(self.mean, self.log_scale.exp(), validate_args=False)
        seen = ~x.isnan()
        value = law.log_prob(torch.where(seen, x, 0.0).unsqueeze(-2))
        return torch.where(seen.unsqueeze(-2), value, 0.0).sum(-1)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mean.unsqueeze(0), (2 * self.log_scale).exp().unsqueeze(0)

    def sample(self, z: Tensor) -> Tensor:
        noise = torch.randn(len(z), self.mean.shape[-1], dtype=self.mean.dtype, device=self.mean.device)
        return (self.mean[z] + self.log_scale[z].exp() * noise).detach()
