"""The contract of a factor: one conditional distribution of a latent-variable model.

A factor turns a batch into log-potentials indexed by latent configurations, and expectations of those configurations
into sufficient statistics. Its M-step, `Factor.maximize`, is pure: it returns new parameter values and assigns nothing.

Shapes: ``*n`` observation axes, ``K`` latent states, and an optional leading replica axis ``*r`` on parameters,
statistics and everything computed from them, through which many restarts run as one.
"""

import difflib
import functools
import inspect
import math
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from torchem.batch import Batch, as_tensor, refuse_entries
from torchem.errors import invalid, one_of
from torchem.ops.dispatch import rows_per_piece
from torchem.ops.reduce import plus
from torchem.stats import Stats


class Kernel(ABC):
    """One pass of a factor, at its current parameters, over the pieces of a batch.

    What depends on parameters alone is computed once, in the constructor; what a piece's potentials and statistics
    share (the features of x) is computed once per piece; and the sum over pieces stays in the kernel's own layout
    until `stats` unpacks it.
    """

    @abstractmethod
    def log_potential(self, batch: Batch) -> Tensor:
        """Log-potentials ``[*r, *n, K]`` of a piece; work that `collect` needs again is remembered."""

    def revisit(self, batch: Batch) -> None:
        """Make a piece that was given before others the present one again, for `collect`."""
        self.log_potential(batch)

    @abstractmethod
    def collect(self, batch: Batch, expected: Tensor) -> None:
        """Add the statistics of the present piece, the last one seen, under weighted expectations."""

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """A mixture's whole E-step over a batch, where there is a faster way than piece by piece: it is collected.

        Args:
            batch: Rows, of which no latent is known.
            log_weight: ``[*r, 1, K]``, of each component.

        Returns:
            Σ w log Z ``[*r]`` and Σ w γ ``[*r, 1, K]``, float64; None where pieces are to be taken.
        """
        return None

    @abstractmethod
    def stats(self) -> Stats:
        """The statistics collected so far."""

    @abstractmethod
    def inner(self) -> Tensor:
        """Q(θ; S) of the statistics collected, at the parameters of the pass, ``[*r]``."""


class StreamedPass(Kernel):
    """The kernel that every factor has: its own methods, piece by piece."""

    def __init__(self, factor: "Factor"):
        self.factor = factor
        self.total: Stats | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        return self.factor.log_potential(batch)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        stats = self.factor.stats(batch, expected)
        self.total = stats if self.total is None else self.total + stats

    def stats(self) -> Stats:
        if self.total is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        return self.total

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())


class _Scored(StreamedPass):
    """Densities, where they are not what inference is fed."""

    def log_potential(self, batch: Batch) -> Tensor:
        return self.factor.log_prob(batch)


@dataclass(frozen=True)
class Adjustment:
    """A change of numerics between M-steps.

    Attributes:
        move: Carries statistics gathered before into the new coordinates, if these changed.
        retake: The last statistics were too inaccurate for the parameters that came of them: take them again.
    """

    move: Callable[[Stats], Stats] | None = None
    retake: bool = False


@dataclass(frozen=True)
class Quadratic:
    """What inference over normal latents is fed of a normal child: a quadratic function of it and of its covariates.

        log N(x | W_k u, L_k L_kᵀ) + c_k − ½ uᵀ V_k u

    Attributes:
        factor: L, lower, ``[*r, K, D, D]``.
        weight: W, ``[*r, K, D, M]``; of a law without covariates its mean, ``[*r, K, D, 1]``, for a u of one.
        offset: c, ``[*r, K]``: what an expectation under a posterior of the parameters takes off.
        penalty: V, ``[*r, K, M, M]``: how unsure coefficients are; None where they are known.
    """

    factor: Tensor
    weight: Tensor
    offset: Tensor
    penalty: Tensor | None = None


@runtime_checkable
class Moments(Protocol):
    """What a data source tells a factor before the first E-step about each column."""

    @property
    def mean(self) -> Tensor:
        """Weighted mean of each column, ``[D]``."""
        ...

    @property
    def variance(self) -> Tensor:
        """Weighted variance of each column, ``[D]``."""
        ...

    @property
    def low(self) -> Tensor:
        """Least entry of each column, ``[D]``."""
        ...

    @property
    def high(self) -> Tensor:
        """Greatest entry of each column, ``[D]``."""
        ...


class Prior(ABC):
    """A prior over the parameters of a factor, in data coordinates; see `torchem.priors`."""

    @abstractmethod
    def mode_stats(self, factor: "Factor") -> Stats:
        """What joins the statistics in an M-step, so that the maximiser is the posterior mode."""

    @abstractmethod
    def posterior_stats(self, factor: "Factor") -> Stats:
        """The prior as a vector of the family's natural coordinates, for a posterior = prior + statistics."""

    @abstractmethod
    def log_prob(self, factor: "Factor") -> Tensor:
        """Normalised log-density of the factor's parameters, ``[*r]``, float64."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments, as plain numbers and lists."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.config().items())})"

    @abstractmethod
    def check(self, factor: "Factor") -> None:
        """Refuse a factor that the prior cannot stand over, or a prior without a mode."""

    def completed(self, factor: "Factor", moments: Moments) -> "Prior":
        """The prior with hyper-parameters that were left open taken from the moments of the data."""
        return self

    def selected(self, factor: "Factor", keep: Tensor) -> "Prior":
        """The prior of some of the factor's components (of the categories of mixing weights), for pruning."""
        return self

    def check_given(self, kept: Sequence[str]) -> None:
        """Refuse views to be known while the rest has a posterior, where what is left of the prior has no form."""
        return

    def combined(self, factor: "Factor", start: Stats, stats: Stats, before: Callable[[], Stats]) -> Stats:
        """The posterior of an M-step: prior + statistics.

        Args:
            factor: What the prior stands over.
            start: The prior in natural coordinates, `posterior_stats`.
            stats: The statistics.
            before: Gives the posterior until now, which tells a prior with unknowns of its own of these.
        """
        return start + stats

    def log_normalizer(self, factor: "Factor", posterior: Stats) -> Tensor:
        """Log-normaliser of the posterior ``posterior_stats + S``, ``[*r]``; the family's own for its usual prior."""
        return conjugate(factor).log_normalizer(posterior)

    def expected_natural(self, factor: "Factor", posterior: Stats) -> Stats:
        """Gradient of `log_normalizer`: expected natural parameters under the posterior."""
        return conjugate(factor).expected_natural(posterior)

    def divergence(self, factor: "Factor", posterior: Stats, start: Stats, norm: Tensor) -> Tensor:
        """KL(q ‖ prior) ``[*r]`` of a posterior, in nats: ⟨E η, q − prior⟩ − A(q) + A(prior), E η the gradient of A.

        Args:
            factor: What the prior stands over, at the posterior's means.
            posterior: q in natural coordinates.
            start: The prior in them, `posterior_stats`.
            norm: A(prior), the `log_normalizer` of ``start``.
        """
        lead = len(factor.replicas)
        parts = self.expected_natural(factor, posterior).map(
            lambda eta, q, p: (eta * (q - p)).flatten(lead).sum(-1), posterior, start
        )
        return torch.stack(parts.leaves()).sum(0) - self.log_normalizer(factor, posterior) + norm

    def means(self, factor: "Factor", posterior: Stats) -> Tensor | None:
        """Posterior means of a table, where they are not in proportion to the posterior's counts."""
        return None


class Factor(nn.Module, ABC):
    """One conditional distribution, with unconstrained parameters and a pure M-step.

    An observed child writes `log_prob`; a latent child (mixing weights, a transition) writes `log_table`. Every
    parameter is made with `new_parameter`, so that replicas, freezing and files know it. Constructor arguments are
    kept as attributes of the same name: that is all that saving needs.
    """

    #: False where the expected log-density is no function of additive statistics (networks, GLMs).
    sufficient: ClassVar[bool] = True
    #: Whether NaN entries of x are handled as missing at random.
    handles_missing: ClassVar[bool] = False
    #: Whether the columns of an observation are independent given the state.
    independent: bool = False
    #: Whether no M-step lowers Q; a fit halves the steps of a factor that gives no such promise where it must.
    minorizes: ClassVar[bool] = True
    #: Whether parameters may carry a leading replica axis; where not, restarts run one after the other.
    replicates: ClassVar[bool] = True
    #: Whether x is counted: single values have a probability.
    discrete: bool = False
    #: How components are told apart at the start when ``init="auto"``.
    default_init: ClassVar[str] = "random"
    #: Public constrained views and the parameter behind each, for `freeze`.
    views: ClassVar[Mapping[str, str]] = {}
    #: Parameters that all components share.
    shared_parameters: frozenset[str] = frozenset()
    #: How many earlier latent states of a sequence the density depends on, besides the present one.
    memory: int = 0
    #: What of "u", "offset" and "trials" its own methods read of a batch; what a user's family reads is not known.
    reads: frozenset[str] = frozenset()
    #: Whether what inference is fed differs from `log_prob`: an expectation under a posterior of the parameters.
    averages: bool = False
    #: Why the family has no conjugate prior, if it has none.
    no_conjugate: ClassVar[str] = ""
    #: Whether parameters of its own stay points where its parts have posteriors.
    points: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._rank: dict[str, int] = {}
        self._prior: Prior | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_misspelt(self, name, value)
        super().__setattr__(name, for_view(self, name, value))

    # ---- parameters -------------------------------------------------------------------------------------------

    def new_parameter(self, name: str, value: Tensor) -> None:
        """Register an unconstrained parameter of one (unreplicated) model."""
        self._rank[name] = value.dim()
        self.register_parameter(name, nn.Parameter(value))

    def new_buffer(self, name: str, value: Tensor) -> None:
        """Register a constant that may differ between replicas."""
        self._rank[name] = value.dim()
        self.register_buffer(name, value)

    @property
    def replicas(self) -> tuple[int, ...]:
        """``()`` for one model, ``(R,)`` when a leading axis holds R replicas."""
        for name, rank in self._rank.items():
            tensor = getattr(self, name)
            return tuple(tensor.shape[: tensor.dim() - rank])
        return ()

    def _first(self) -> Tensor:
        # Not through parameters(): that walks the module tree, many times per iteration of a small fit.
        for parameter in self._parameters.values():
            if parameter is not None:
                return parameter
        first = next(self.parameters(), None)
        return next(self.buffers()) if first is None else first

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._first().device

    @property
    def unwrapped(self) -> "Factor":
        """The family itself, behind wrappers such as `torchem.Variational`."""
        return self

    def replicate(self, replicas: int) -> None:
        """Give parameters (and constants that may differ) a leading axis of ``replicas`` equal copies, in place."""
        for name in self._rank:
            tensor = getattr(self, name)
            self._set(name, tensor.detach().expand(replicas, *tensor.shape).clone())

    def take_replicas(self, index: Tensor | int) -> None:
        """Keep some replicas, or one and drop the axis, in place."""
        for name, rank in self._rank.items():
            tensor = getattr(self, name)
            if tensor.dim() > rank:
                self._set(name, tensor.detach()[index].clone())

    def take_constants(self, one: "Factor", place: int) -> None:
        """Take the constants of a factor of the same kind into one place of the replica axis, in place."""
        for name, rank in self._rank.items():
            mine, theirs = getattr(self, name), getattr(one, name)
            if name in self._buffers and mine.dim() > rank:
                mine[place] = theirs.to(mine)
        self.refresh()

    def _set(self, name: str, value: Tensor) -> None:
        if name in self._parameters:
            getattr(self, name).data = value
        else:
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Constants may come in another shape than the constructor's (an origin per component), masks at all.
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and (name in self._buffers or name.startswith("frozen_")):
                self.register_buffer(name, torch.empty_like(value, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    def refresh(self) -> None:
        """Bring what is derived from buffers up to date after they were loaded."""

    # ---- the distribution -------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int | None:
        """Number of latent states that index this factor as an observed child, if it is one."""
        return None

    @property
    def n_features(self) -> int | None:
        """Number of columns of x that the factor reads, if fixed."""
        return None

    def cast(self, x: Tensor) -> Tensor:
        """Observations in the type that the factor computes with."""
        return x.to(self.dtype)

    def check(self, batch: Batch) -> None:
        """Refuse a batch that the factor cannot read; called once, at the edge.

        Raises:
            InvalidArgument: If the number of columns differs from `n_features`.
        """
        if self.n_features is not None and batch.x.shape[-1] != self.n_features:
            raise invalid(
                "data", f"{self.n_features} features", batch.x.shape[-1], "select the columns the model was built for"
            )  # fmt: skip

    def log_prob(self, batch: Batch) -> Tensor:
        """Normalised log-density ``[*r, *n, K]`` of each observation under each state."""
        raise NotImplementedError(f"{type(self).__name__} cannot stand as an observed child: it has no log_prob")

    def log_table(self, batch: Batch) -> Tensor:
        """Log-probabilities ``[*r, *n or 1s, *parents, child]`` of a latent child."""
        raise NotImplementedError(f"{type(self).__name__} cannot stand as a latent child: it has no log_table")

    def log_potential(self, batch: Batch) -> Tensor:
        """What inference is fed: `log_prob`, unless a wrapper changes it."""
        return self.log_prob(batch)

    def table_potential(self, batch: Batch) -> Tensor:
        """What inference is fed of a latent child: `log_table`, unless a wrapper changes it."""
        return self.log_table(batch)

    def context(self, batch: Batch) -> Batch:
        """What the factor reads of whole sequences ``[N, T, D]``, before they are cut into rows of frames.

        An autoregression puts the frames before into ``u`` and marks the first ones, which it is given, as missing.
        """
        return batch

    def cdf(self, batch: Batch) -> Tensor:
        """Probability ``[*r, *n, K, D]`` that each column is at most what it is: what quantiles are made of."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution function; define cdf")

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Conditional mean and variance of each column, ``[*r, *n or 1s, K, D]``: what forecasts are made of."""
        raise NotImplementedError(f"{type(self).__name__} has no mean and variance; define moments")

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of every entry given the state and the entries of its row that were observed.

        By default `moments`, which is right where columns are `independent`, and for rows that are missing as a whole.

        Args:
            batch: Rows ``[*n, D]``, NaN where an entry is missing.

        Returns:
            Both ``[*r, *n, K, D]``; an observed entry is its own mean, without variance.

        Raises:
            InvalidArgument: If only some entries of a row are missing, and what the others say of them is not known.
        """
        self._check_whole(batch.x)
        missing = batch.x.isnan().unsqueeze(-2)
        center, spread = self.moments(batch)
        return torch.where(missing, center, batch.x.to(center).unsqueeze(-2)), torch.where(missing, spread, 0.0)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """The distribution function of every entry given the state and the entries of its row that were observed.

        By default `cdf`, where columns are independent.

        Args:
            batch: Rows ``[*n, D]``, NaN where an entry is missing.

        Returns:
            A function of x ``[*n, D]`` that gives P(entry ≤ x), ``[*r, *n, K, D]``, of missing entries.
        """
        if not self.independent and self.n_features != 1:
            name = type(self.unwrapped).__name__
            raise NotImplementedError(f"{name} has no conditional distribution functions; define conditional_cdf")
        return lambda x: self.cdf(batch.with_x(x))

    def conditional_covariance(self, batch: Batch) -> Tensor:
        """Covariances ``[*r, *n, K, D, D]`` of the entries of each row given the state and those that were observed.

        By default the variances of `conditional`, which are all where columns are `independent`.

        Args:
            batch: Rows ``[*n, D]``, NaN where an entry is missing; what was observed has no covariance.
        """
        variance = self.conditional(batch)[1]
        if not self.independent and variance.shape[-1] > 1:
            name = type(self.unwrapped).__name__
            raise NotImplementedError(f"{name} has no covariances of its columns; define conditional_covariance")
        return torch.diag_embed(variance)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows ``[n, D]`` with missing entries drawn given the state ``z [n]`` of each and what was observed of it.

        By default as `conditional`: from `sample`.
        """
        self._check_whole(batch.x)
        return torch.where(batch.x.isnan(), self.sample(z, batch, generator).to(batch.x), batch.x)

    def _check_whole(self, x: Tensor) -> None:
        missing = x.isnan()
        if not self.independent:
            refuse_entries(
                Batch(x), missing & ~missing.all(-1, keepdim=True), "rows that are whole, or missing in all columns",
                f"{type(self.unwrapped).__name__} does not tell what the other columns say of it: leave that row out",
            )  # fmt: skip

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        """Values ``[*r, n, D]`` filled in for missing entries of ``rows``, moved to where observations lie.

        A mean need not be an observation: that of directions is no unit vector. By default ``value`` itself.
        """
        return value

    def outcomes(self) -> list[Tensor | None]:
        """For each column the values among which the most probable one is; None for columns that are continuous.

        What is most probable may be so under any mixture of the states. By default all columns are continuous.
        """
        return [None] * (self.n_features or 1)

    def _counted(self, mean: Tensor) -> list[Tensor | None]:
        """Counts up to the largest mean ``[…, K, D]`` of each column, above which no mode of single counts lies."""
        most = mean.detach().reshape(-1, mean.shape[-1]).amax(0).ceil().tolist()
        return [torch.arange(int(top) + 1, dtype=self.dtype, device=self.device) for top in most]

    @property
    def nominal(self) -> list[bool]:
        """For each column whether its values are names, without a mean."""
        return [False] * (self.n_features or 1)

    @property
    def circular(self) -> list[bool]:
        """For each column whether its values are angles: `conditional` then gives mean directions and 1 − R."""
        return [False] * (self.n_features or 1)

    def kernel(self) -> Kernel:
        """One pass over the data at the current parameters, as an observed child."""
        return StreamedPass(self)

    def scorer(self) -> Kernel:
        """A pass for densities alone: of `log_prob`, where `log_potential` is something else."""
        return _Scored(self) if self.averages else self.kernel()

    def row_size(self) -> int:
        """Numbers held per observation while a piece is processed; decides how many rows a piece has."""
        return 4 * (self.n_components or 1)

    # ---- normal latents ---------------------------------------------------------------------------------------

    def quadratic(self) -> Quadratic:
        """What inference is fed where the child, or its covariates, are normal latents: an expected log-density."""
        raise NotImplementedError(f"{type(self).__name__} is no law of normal latents: it has no quadratic")

    def moment_stats(self, count: Tensor, xx: Tensor, ux: Tensor, uu: Tensor) -> Stats:
        """Statistics from posterior moments, where the child, or its covariates, are latent; all carry the weights.

        Args:
            count: ``[*r, K]`` Σ expected.
            xx: ``[*r, K, D, D]`` Σ expected E[x xᵀ].
            ux: ``[*r, K, M, D]`` Σ expected E[u xᵀ]; of a law without covariates Σ expected E[xᵀ], M = 1.
            uu: ``[*r, K, M, M]`` Σ expected E[u uᵀ].
        """
        raise NotImplementedError(f"{type(self).__name__} is no law of normal latents: it has no moment_stats")

    # ---- EM ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Statistics, additive in observations, under expectations ``[*r, *n, K]`` that carry the weights."""

    def table_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Statistics of a latent child under expectations in the shape of its `log_table`, weights included."""
        raise NotImplementedError(f"{type(self).__name__} cannot stand as a latent child: it has no table_stats")

    @abstractmethod
    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        """New values of the parameters: the maximiser of `expected_log_prob` given what is frozen. Pure."""

    @property
    def prior(self) -> Prior | None:
        """The prior over the parameters, None for maximum likelihood; assignable."""
        return self._prior

    @prior.setter
    def prior(self, value: Prior | None) -> None:
        if value is not None:
            value.check(self)
        self._prior = value

    def penalized(self, stats: Stats) -> Stats:
        """Statistics with the prior's share: what the M-step maximises."""
        return stats if self._prior is None else stats + self._prior.mode_stats(self)

    def log_prior(self) -> Tensor | None:
        """Log-density of the parameters under the prior, ``[*r]``, if there is one."""
        return None if self._prior is None else self._prior.log_prob(self)

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """Q(θ; S) at the current parameters, differentiable in them; terms free of θ may be left out."""
        raise NotImplementedError(f"{type(self).__name__} declares sufficient = False: it has no Q of statistics")

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameter values from responsibilities ``[*r, *n, K]``; by default an M-step."""
        return self.maximize(self.first_stats(batch, expected))

    def initialize_table(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameter values of a latent child from responsibilities; by default an M-step."""
        return self.maximize(self.table_stats(batch, expected))

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        """The statistics that a start maximises: those of responsibilities, which a family may keep off its bounds."""
        return self.gather(batch, expected)

    def gather(self, batch: Batch, expected: Tensor, take: Callable[[Batch, Tensor], Stats] | None = None) -> Stats:
        """`stats` (or what ``take`` gives) of a batch of rows, piece by piece, so that memory stays bounded."""
        take = self.stats if take is None else take
        width = self.dtype.itemsize * math.prod(self.replicas)
        rows = rows_per_piece(self.row_size() * width, self.device)
        starts = range(0, max(1, len(batch)), rows)
        parts = (take(batch[i : i + rows], expected[..., i : i + rows, :]) for i in starts)
        return functools.reduce(operator.add, parts)

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """First parameter values with component k at observation ``index[…, k]``.

        By default each component is fitted to that observation and, with the same weight, to all the others together.
        """
        return self.maximize(self.gather(batch, self.near(batch, index)))

    def near(self, batch: Batch, index: Tensor) -> Tensor:
        """Expectations ``[*r, n, K]``: one for observation ``index[…, k]`` of component k, and one for all together."""
        size, k = len(batch), index.shape[-1]
        expected = torch.full((*index.shape[:-1], size, k), 1.0 / size, dtype=self.dtype, device=batch.x.device)
        return expected.scatter_add(-2, index.unsqueeze(-2), torch.ones_like(expected[..., :1, :]))

    def guess(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """Where an optimiser begins to climb to the first parameters; what is left out stays as it is."""
        return {}

    def prepare(self, moments: Moments) -> None:
        """Learn the scale of the data before the first E-step of a fit, in place; complete the prior from it."""
        if self._prior is not None:
            self._prior = self._prior.completed(self, moments)

    def project(self) -> None:
        """Move the parameters into the feasible set (a covariance floor), in place; called once, at the start."""

    def tune(self, rows: int, iteration: int = 0) -> "Adjustment | None":
        """Adapt numerics to the current parameters between M-steps, in place.

        Args:
            rows: Number of observations in a pass.
            iteration: Number of the M-step that gave the parameters; a cheap fit need not check after each.
        """
        return None

    def occupancy(self, stats: Stats) -> Tensor | None:
        """Expected number of observations of each class of a latent child ``[*r, K]``, if it is told.

        Args:
            stats: Its statistics: ``counts``, or ``mass`` where these are others, by parents and classes.
        """
        found = stats.get("counts", stats.get("mass"))
        lead = len(self.replicas)
        return None if found is None else found.flatten(lead, -2).sum(lead) if found.dim() > lead + 1 else found

    def forbid(self, states: Tensor) -> None:
        """Take states ``[*r, K]`` out of a latent child's support, in place; never the last one."""
        raise NotImplementedError(f"{type(self).__name__} cannot lose a state; define forbid")

    def replace_components(self, which: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """``values`` for the components ``which [*r, K]``, the current parameters for the others.

        Parameters without a component axis (named in `shared_parameters`) stay as they are.
        """
        merged = {}
        for name, new in values.items():
            old = getattr(self, name)
            mask = which.reshape(*which.shape, *[1] * (old.dim() - which.dim()))
            merged[name] = old if name in self.shared_parameters else torch.where(mask, new, old)
        return merged

    def degenerate(self) -> Tensor | None:
        """``[*r, K]`` Boolean, True where a component sits at the bounds of its family (a floored covariance)."""
        return None

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Factor":
        """Keep parameters, or the entries of one where ``mask`` is True, through every M-step.

        Args:
            names: Public views (``"means"``); all of them when empty.
            mask: Boolean, component-first, for exactly one name.

        Raises:
            InvalidArgument: For a name that is not a view, or a mask that does not fit it.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(2, 3)
            >>> _ = m.component.freeze("means")
        """
        for name in names:
            one_of("freeze", name, self.views)
        if mask is not None and len(names) != 1:
            raise invalid("mask", "exactly one name to apply to", f"{len(names)} names", "freeze them one by one")
        for name in names or tuple(self.views):
            parameter = self.views[name]
            rule = torch.ones((), dtype=torch.bool) if mask is None else as_tensor(mask, "mask").to(torch.bool)
            self.check_mask(name, rule)
            self.register_buffer(f"frozen_{parameter}", rule.to(self.device))
        return self

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Refuse a freezing mask that the family's M-step cannot honour; by default whole components.

        Raises:
            InvalidArgument: If the mask's shape does not fit.
        """
        if mask.dim() and (mask.shape != (self.n_components,)):
            raise invalid(
                "mask", f"shape [{self.n_components}] (components)", list(mask.shape), "freeze whole components"
            )

    def unfreeze(self, *names: str) -> "Factor":
        """Let the M-step move these views (all of them when empty) again."""
        for name in names:
            one_of("unfreeze", name, self.views)
        for name in names or tuple(self.views):
            self._buffers.pop(f"frozen_{self.views[name]}", None)
        return self

    def frozen(self, parameter: str) -> Tensor | None:
        """The mask of what is kept of a parameter, if anything is."""
        return self._buffers.get(f"frozen_{parameter}")

    def keep_frozen(self, parameter: str, value: Tensor) -> Tensor:
        """``value`` with the frozen entries of the parameter put back."""
        mask = self.frozen(parameter)
        if mask is None:
            return value
        event = self._rank[parameter] - mask.dim()
        return torch.where(mask.reshape(*mask.shape, *[1] * event), getattr(self, parameter), value)

    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of parameters with what is frozen as it is, differentiable in ``values``: where optimisers may go."""
        return {name: self.keep_frozen(name, value) for name, value in values.items()}

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """Number of free parameters of one model, for AIC and BIC."""
        raise NotImplementedError(f"{type(self).__name__} does not count its parameters; define n_parameters")

    def select(self, keep: Tensor) -> "Factor":
        """A factor with only the components ``keep``, for pruning."""
        raise NotImplementedError(f"{type(self).__name__} cannot be pruned; define select")

    def pruned(self, keep: Tensor) -> "Factor":
        """`select` with what belongs to the factor: its prior, and what wraps it."""
        return self.rewrap(self.select(keep), keep)

    def rewrap(self, pruned: "Factor", keep: Tensor) -> "Factor":
        """What stands for this factor once it is ``pruned`` to the components ``keep``: with its prior, and wrapped."""
        pruned.prior = None if self._prior is None else self._prior.selected(self, keep)
        return pruned

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw one observation ``[n, D]`` for each latent state in ``z [n]``."""
        raise NotImplementedError(f"{type(self).__name__} cannot sample; define sample")

    def config(self) -> dict[str, Any]:
        """Constructor arguments, by the convention that each is kept as an attribute of its name."""
        return constructor_arguments(self)

    @classmethod
    @abstractmethod
    def example(cls) -> tuple["Factor", Batch]:
        """A small factor and a batch that it can read: what the laws run on."""


def normal_cdf(mean: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
    """The distribution function of normal entries, of means and variances ``[*r, *n, K, D]``, at x ``[*n, D]``.

    Example:
        >>> normal_cdf(torch.zeros(1, 2, 1), torch.ones(1, 2, 1))(torch.zeros(1, 1)).tolist()
        [[[0.5], [0.5]]]
    """
    return lambda x: torch.special.ndtr((x.unsqueeze(-2) - mean) / variance.sqrt())


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """Read the arguments that rebuild a module from its attributes of the same names."""
    names = list(inspect.signature(type(module).__init__).parameters)[1:]
    return {name: getattr(module, name) for name in names}


#: How alike a name must be to a known one to be taken for it: "variances" and "covariances" are to 0.9.
_ALIKE = 0.72


def refuse_misspelt(module: nn.Module, name: str, value: Any) -> None:
    """Refuse to set what a module has not and its user cannot mean, which Python would keep in silence.

    That is a public name, new to the module and its class, close to one of its assignable views, slots or its prior,
    and a value such as these take, assigned from without: methods of the module set what they like. The families of
    torchem take numbers under no other public name either.

    Raises:
        InvalidArgument: With the name that was meant.
    """
    if name.startswith("_") or not isinstance(value, (Tensor, np.ndarray, list, tuple, int, float, nn.Module, Prior)):
        return
    own = vars(module)
    groups = [own.get(group) or {} for group in ("_parameters", "_buffers", "_modules")]
    if isinstance(value, bool) or name in own or hasattr(type(module), name) or any(name in group for group in groups):
        return
    if _within(module):
        return
    assignable = {key for kind in type(module).__mro__ for key, got in vars(kind).items() if getattr(got, "fset", None)}
    known = assignable | {*groups[-1]} | {*getattr(module, "views", ())}
    close = difflib.get_close_matches(name, sorted(known), 1, _ALIKE)
    inside = [slot for slot, child in groups[-1].items() if isinstance(child, Factor) and name in child.views]
    if inside:
        raise invalid(
            name, f"an attribute of {type(module).__name__}", f"one of its {inside[0]}", f"assign {inside[0]}.{name}"
        )
    if close:
        raise invalid(
            name, f"an attribute of {type(module).__name__}", "a name that it has not",
            f"did you mean {close[0]}? (start the name of one of your own with an underscore)",
        )  # fmt: skip
    ours = isinstance(module, Factor) and type(module).__module__.startswith("torchem.")
    if ours and not isinstance(value, (nn.Module, Prior)):
        views = [*getattr(module, "views", ())] or sorted(assignable - {"prior"})
        raise invalid(
            name, f"a view of {type(module).__name__}" + (f" ({', '.join(views)})" if views else ", which has none"),
            "a name that it has not", "correct it, or start the name of one of your own with an underscore",
        )  # fmt: skip


def for_view(module: nn.Module, name: str, value: Any) -> Any:
    """What to assign: the values of a parameter for a view, which torch would register as one of that name."""
    is_view = isinstance(getattr(type(module), name, None), property)
    return value.detach() if is_view and isinstance(value, nn.Parameter) else value


def _within(module: nn.Module) -> bool:
    """Whether a method of the module itself is under way."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        method = code.co_argcount > 0 and code.co_varnames[0] == "self" and code.co_name != "__setattr__"
        if method and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def outside(weights: Tensor, x: Tensor) -> Tensor:
    """``Σ_n weights[…, n, k] x[n, f]`` as ``[…, K, F]``: one matrix product for all replicas."""
    return weights.mT @ x


class ExponentialFamily(Factor):
    """A whole family in three methods: log p(x | k) = ⟨t(x), η_k⟩ − a_k + h(x).

    Write `features` (t), `natural` (η and a) and `maximize`; potentials, statistics, Q, replicas and streaming follow.
    The statistics are ``count [*r, K]`` and ``features [*r, K, F]``.

    Source: M. J. Wainwright, M. I. Jordan (2008), section 3.
    """

    @abstractmethod
    def features(self, batch: Batch) -> Tensor:
        """Sufficient statistics t(x), ``[*n, F]``."""

    @abstractmethod
    def natural(self) -> tuple[Tensor, Tensor]:
        """Natural parameters η ``[*r, K, F]`` and log-normalisers a ``[*r, K]``."""

    def base_measure(self, batch: Batch) -> Tensor | None:
        """h(x), ``[*n]``, or None for zero."""
        return None

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return FamilyPass(self)

    def expected_log_prob(self, stats: Stats) -> Tensor:
        eta, normalizer = self.natural()
        inner = (stats["features"] * eta.to(torch.float64)).sum((-2, -1))
        return inner - (stats["count"] * normalizer.to(torch.float64)).sum(-1)


class FamilyPass(Kernel):
    """One product of features and natural parameters for all components and replicas."""

    def __init__(self, family: ExponentialFamily):
        self.family = family
        self.eta, self.normalizer = family.natural()
        self.count: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def log_potential(self, batch: Batch) -> Tensor:
        features = self.family.features(batch)
        self.axes = features.shape[:-1]
        self.t = features.reshape(-1, features.shape[-1])
        # State-major in memory, so that reductions over states run along contiguous observations.
        value = plus(self.eta @ self.t.mT, -self.normalizer.unsqueeze(-1)).mT
        base = self.family.base_measure(batch)
        if base is not None:
            value = plus(value, base.reshape(-1, 1))
        # Features may be of a greater precision, where their products cancel.
        value = value.to(self.family.dtype)
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        k = expected.shape[-1]
        flat = expected.reshape(*expected.shape[: expected.dim() - 1 - len(self.axes)], -1, k)
        self.total = self.total + outside(flat.to(self.t.dtype), self.t).to(torch.float64)
        self.count = self.count + flat.sum(-2, dtype=torch.float64)

    def stats(self) -> Stats:
        return Stats(count=self.count, features=self.total)

    def inner(self) -> Tensor:
        return self.family.expected_log_prob(self.stats())


class Conjugate(ABC):
    """What a family adds to buy variational Bayes: its conjugate prior, in the coordinates of the statistics.

    A posterior is ``prior.posterior_stats() + S``. The expected natural parameters are the gradient of the
    log-normaliser with respect to it, which is the law that tests hold them to. `Variational` keeps a posterior as the
    family's own parameters, at posterior means, and its strengths: what `posterior` makes it of again.

    Source: P. Diaconis, D. Ylvisaker (1979).
    """

    @abstractmethod
    def log_normalizer(self, posterior: Stats) -> Tensor:
        """log ∫ exp⟨posterior, (η, −a)⟩ dη, ``[*r]``."""

    @abstractmethod
    def expected_natural(self, posterior: Stats) -> Stats:
        """Expected coefficients of each statistic under the posterior: what potentials are built from."""

    #: Views of which a part may be frozen while the rest has a posterior: the prior of the rest, given what is kept,
    #: is then of a form whose expectations are known.
    splits: ClassVar[frozenset[str]] = frozenset()
    #: Whether the family has latents of its own, so that its statistics depend on the posterior of its parameters.
    latent: ClassVar[bool] = False

    def stats_under(self, posterior: Stats, batch: Batch, expected: Tensor) -> Stats:
        """`Factor.stats` in the coordinates of a posterior, under it; those of the family where nothing is `latent`."""
        family: Any = self
        return family.stats(batch, expected)

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        """`log_normalizer` over what is not frozen, given what is; terms linear in the posterior may be left out."""
        return self.log_normalizer(posterior)

    @abstractmethod
    def weak_prior(self) -> Prior:
        """The prior that `Variational` takes by default."""

    @abstractmethod
    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        """Values of the parameters at the posterior's means."""

    @abstractmethod
    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        """How much the posterior has seen, as unconstrained numbers by name, float64."""

    @abstractmethod
    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        """The posterior of these strengths whose means are the current parameters, in natural coordinates, float64."""

    def sureness(self, strengths: dict[str, Tensor]) -> Stats:
        """What of `posterior` expectations and the divergence read beside the current parameters; by default all."""
        return self.posterior(strengths)

    def expected_table(self, posterior: Stats, prior: Prior) -> Tensor:
        """What inference is fed of a latent child, in the shape of its `Factor.log_table`."""
        raise NotImplementedError(f"{type(self).__name__} cannot stand as a latent child: it has no expected_table")

    @abstractmethod
    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        """A pass whose potentials are expected log-densities, base measure included."""

    def expected_quadratic(self, posterior: Stats) -> Quadratic:
        """As `Factor.quadratic`, expected under the posterior."""
        raise NotImplementedError(f"{type(self).__name__} is no law of normal latents: it has no expected_quadratic")

    def check_given(self) -> None:
        """Refuse to keep frozen what leaves a posterior of the rest that is of another form."""
        return

    @abstractmethod
    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        """Q of statistics under expected log-densities, ``[*r]``; terms free of the posterior as in the family's Q."""

    @abstractmethod
    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """log ∫ p(x | θ, k) q(θ) dθ, ``[*r, *n, K]``: the density of one observation more."""

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor | None:
        """One observation ``[n, D]`` from each state's predictive; None where a draw at posterior means is that."""
        return None


def conjugate(factor: Any) -> Conjugate:
    """The factor as a family with a conjugate prior.

    Raises:
        InvalidArgument: If it has none.
    """
    if isinstance(factor, Conjugate):
        return factor
    why = f" ({factor.no_conjugate})" if getattr(factor, "no_conjugate", "") else ""
    raise invalid(
        "factor", "a family with a conjugate prior", f"{type(factor).__name__}, which has none{why}",
        "leave it out and wrap the other slots one by one with torchem.Variational",
    )  # fmt: skip
