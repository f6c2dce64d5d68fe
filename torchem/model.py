"""The contract of a latent-variable model: factors in slots, and inference over their potentials.

A model with discrete latents is one method, `DiscreteModel.log_partition`: expectations of latent configurations are
the gradient of log Z with respect to the potentials, and with its reduction swapped for a maximum the same method
gives the most likely configuration.
"""

import copy
import functools
import inspect
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_batch
from torchem.errors import invalid
from torchem.factor import Adjustment, Factor, Kernel, Moments, constructor_arguments, for_view, refuse_misspelt
from torchem.ops import reduce
from torchem.ops.dispatch import declared_precision, rows_per_piece
from torchem.sequences import as_sequences
from torchem.stats import Stats

Reduction = Callable[[Tensor, int], Tensor]
#: Arguments of `torchem.fit` and the fields of a batch that they become.
_FIELDS = {"inputs": "u", "weights": "weight"}
_PUBLIC = {inner: outer for outer, inner in _FIELDS.items()}
#: What stands for the posterior of the latents in an E-step.
EStep = Literal["soft", "hard", "sample"]
#: Gives uniform numbers of a shape, each replica's from a generator of its own.
Uniforms = Callable[[torch.Size], Tensor]


class LatentModel(nn.Module, ABC):
    """A joint distribution of data and latents, built from factors.

    `e_step` is additive in the data; `m_step` maximises every factor; together they are one EM iteration. All else
    (`bound`, replicas, files, the pure EM map) is inherited.
    """

    #: Whether an observation is a sequence of frames.
    sequential: ClassVar[bool] = False
    #: What may stand for the posterior in `e_step`; and whether it takes a temperature.
    e_steps: ClassVar[tuple[EStep, ...]] = ("soft",)
    anneals: ClassVar[bool] = False
    #: Whether an M-step is a pure map of the parameters, which can be extrapolated.
    accelerates: ClassVar[bool] = True
    #: Whether E-steps take the posterior itself, so that their ``log_likelihood`` is log p(x) and no bound on it.
    exact: bool = False
    #: Bytes that one piece of data may occupy while it is processed; None for the default of the device.
    memory_budget: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_misspelt(self, name, value)
        super().__setattr__(name, for_view(self, name, value))

    @abstractmethod
    def slots(self) -> tuple[tuple[str, Factor], ...]:
        """Module paths and factors; one factor may stand in two slots and is then one parameter."""

    @abstractmethod
    def e_step(self, batch: Batch, kind: EStep = "soft") -> Stats:
        """Expected statistics of a batch: ``{slot: Stats, …, entropy, log_likelihood, count}``, all additive.

        With ``kind="hard"`` the most likely configuration stands for the posterior, and ``log_likelihood`` is its joint
        log-density: the objective of classification EM (Viterbi training). With ``kind="sample"`` one that is drawn
        from the posterior stands for it (stochastic EM), and ``log_likelihood`` is exact.
        """

    @abstractmethod
    def sample(self, n: int, *, latents: bool = False, generator: torch.Generator | None = None) -> Any:
        """Draw ``n`` observations, with their latent states on request."""

    def table_slots(self) -> frozenset[str]:
        """Slots that hold a latent child and are asked for `Factor.log_table`."""
        return frozenset()

    def factors(self) -> dict[Factor, list[str]]:
        """Each distinct factor with the slots that it stands in."""
        found: dict[Factor, list[str]] = {}
        for slot, factor in self.slots():
            found.setdefault(factor, []).append(slot)
        return found

    # ---- data -------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        """Refuse a batch that the model cannot read; returns it."""
        return batch

    def batch(self, data: Any, **fields: Any) -> Batch:
        """Validate data for this model; further fields by the names that `torchem.fit` has for them, or a batch's."""
        build = as_sequences if self.sequential else as_batch
        fields = {_FIELDS.get(name, name): value for name, value in fields.items()}
        known = inspect.signature(build).parameters if fields else {}
        if unknown := [name for name in fields if name not in known]:
            names = {_PUBLIC.get(name, name) for name in known} - {"data", "n_states", "whole"}
            names = ", ".join(sorted(name for name in names if not name.startswith("allow_")))
            remedy = "pass generator=torch.Generator().manual_seed(0)" if unknown[0] == "seed" else "correct it"
            raise invalid(unknown[0], f"one of the fields {names}", "another name", remedy)
        if fields.get("labels") is not None:
            fields.setdefault("n_states", self.takes_labels())
        if self.whole:
            fields["whole"] = True
        batch = build(data, allow_missing=self.handles_missing, **fields)
        self.refuse_unread(batch)
        return self.check(batch)

    @property
    def reads(self) -> frozenset[str] | None:
        """What of "u", "offset" and "trials" its factors read; None where a user's own are among them, or models."""
        factors = [*_all_factors(self), *self.factors()]
        models = [module for module in self.modules() if isinstance(module, LatentModel)]
        if not all(type(part).__module__.startswith("torchem.") for part in (*factors, *models)):
            return None
        return frozenset[str]().union(*(factor.reads for factor in factors))

    def refuse_unread(self, batch: Batch) -> None:
        """Refuse covariates, offsets and trials that no factor of the model reads: they would be without effect.

        Raises:
            InvalidArgument: For the first of them, unless the model is a user's own or holds a factor that is.
        """
        given = [name for name in ("u", "offset", "trials") if getattr(batch, name) is not None]
        if not given:
            return
        read = self.reads
        for name in given:
            if read is not None and name not in read:
                argument = {"u": "inputs"}.get(name, name)
                raise invalid(
                    argument, f"none: no factor of this {type(self).__name__} reads them", "some", _READERS[name]
                )

    def _read(self, data: Any, fields: dict[str, Any]) -> Batch:
        return self.check(data) if isinstance(data, Batch) and not fields else self.batch(data, **fields)

    @property
    def labelled(self) -> int | tuple[int, ...] | None:
        """How many states labels count: K, or those of each chain where a label names a state of each."""
        return getattr(self, "n_components", None)

    def takes_labels(self) -> int | tuple[int, ...]:
        """`labelled`, where labels are given.

        Raises:
            InvalidArgument: If there is nothing that they could name.
        """
        if self.labelled is None:
            raise invalid("labels", "none: the latents are not one discrete state", "some", "leave them out")
        return self.labelled

    @property
    def handles_missing(self) -> bool:
        """Whether single entries of an observation may be missing."""
        tables = self.table_slots()
        return all(factor.handles_missing for slot, factor in self.slots() if slot not in tables)

    @property
    def absentable(self) -> int:
        """How many of the first columns may have no entry at all."""
        return 0

    def rows(self, batch: Batch) -> Batch:
        """The observations that starts and moments look at: rows, or the frames of sequences."""
        return batch

    @property
    def whole(self) -> bool:
        """Whether latents are of whole sequences, and starts and labels too, rather than of their frames."""
        return False

    def count(self, batch: Batch) -> Tensor:
        """Weight of all observations (frames, for sequences), float64."""
        return batch.total_weight()

    def surprise(self, rows: Batch) -> Tensor:
        """How badly each of `rows` is explained, ``[*r, n]``: where components are reseeded."""
        return -self.log_prob(rows)

    def cast(self, batch: Batch) -> Batch:
        """A piece in the types that the factors compute with."""
        return batch

    def row_size(self) -> int:
        """Numbers held per observation while a piece is processed."""
        return sum(factor.row_size() for _, factor in self.slots()) * math.prod(self.replicas)

    def stream(self, batch: Batch) -> Iterator[Batch]:
        """The batch in pieces that fit the cache (CPU) or the budget (CUDA), on the model's device and in its types.

        The size of a piece is a function of shapes, dtype and device type alone, never of free memory, so results
        repeat. Data that live on the host are copied to an accelerator through pinned memory, piece by piece.
        """
        device = self.device
        rows = rows_per_piece(self.row_size() * self.dtype.itemsize, device, self.memory_budget)
        if batch.x.device == device:
            yield from map(self.cast, batch.split(rows))
            return
        for piece in batch.split(rows):
            if device.type == "cuda":
                piece = piece.map(Tensor.pin_memory)
            yield self.cast(piece.to(device))

    # ---- EM ---------------------------------------------------------------------------------------------------

    @property
    def sufficient(self) -> bool:
        """Whether an M-step is a function of statistics; where not, a fit passes over the data again for it."""
        return all(factor.sufficient for factor in self.factors())

    @property
    def minorizes(self) -> bool:
        """Whether no M-step lowers the objective; where not, a fit halves the steps that do."""
        return all(factor.minorizes for factor in _all_factors(self))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        """New values of all parameters that statistics determine, by their names in the model. Pure.

        Networks under `torchem.Gradient` are not among them.
        """
        values: dict[str, Tensor] = {}
        for factor, slots in self.factors().items():
            total = factor.penalized(functools.reduce(operator.add, (stats[slot] for slot in slots)))
            values |= {f"{slots[0]}.{name}": value for name, value in factor.maximize(total).items()}
        return values

    def assign(self, values: dict[str, Tensor]) -> None:
        """Set parameters by name: the one place where a fit writes. The old tensors are left untouched."""
        factors = dict(self.slots())
        for path, value in values.items():
            # What follows the slot may be a path too: into a factor that is made of factors.
            slot = next(slot for slot in factors if path.startswith(f"{slot}."))
            factors[slot].get_parameter(path.removeprefix(f"{slot}.")).data = value.detach()

    def snapshot(self) -> dict[str, Tensor]:
        """The current parameters by name, to `assign` again."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def m_step(self, stats: Stats) -> None:
        """Maximise every factor and assign the result.

        Raises:
            InvalidArgument: If a factor's Q is no function of statistics.
        """
        self.check_sufficient("m_step")
        self.assign(self.maximize(stats))

    def check_sufficient(self, argument: str) -> None:
        """Refuse a model with a factor whose M-step is no function of statistics.

        Raises:
            InvalidArgument: Then.
        """
        for factor, slots in self.factors().items():
            if not factor.sufficient:
                raise invalid(
                    argument, "factors whose M-step is a function of statistics",
                    f"{type(factor.unwrapped).__name__} in slot {slots[0]!r}",
                    "use torchem.fit, which passes over the data again for it",
                )  # fmt: skip

    def improve(self, stats: Stats, batches: Callable[[], Iterable[Batch]]) -> None:
        """One M-step of a fit, of what statistics determine; a model of its own kind may pass over the data again.

        Args:
            stats: Of all the data, at the current parameters.
            batches: Gives the batches of a pass.
        """
        if self.sufficient:
            self.m_step(stats)
        else:
            self.assign(self.maximize(stats))

    def learn(self, stats: Stats, batch: Batch | None) -> None:
        """One M-step within a pass, after a batch: that of online and incremental EM.

        Args:
            stats: What a rule has gathered.
            batch: The one that came last; None where other processes have more of them.
        """
        self.m_step(stats)

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """Σ_f Q_f(θ; S): the part of the bound that parameters move."""
        return functools.reduce(operator.add, (f.expected_log_prob(stats[slot]) for slot, f in self.slots()))

    def bound(self, stats: Stats) -> Float[Tensor, "*r"]:
        """The evidence lower bound Σ_f Q_f(θ; S) + entropy + log prior, at the current θ and the posteriors behind S.

        Source: R. M. Neal, G. E. Hinton (1998), equation 7.
        """
        return self.expected_log_prob(stats) + stats["entropy"] + self.log_prior()

    def log_prior(self) -> Tensor | float:
        """Log-density of all parameters under their priors, ``[*r]``; 0 where there is none."""
        total: Tensor | float = 0.0
        for factor in self.factors():
            value = factor.log_prior()
            total = total if value is None else total + value
        return total

    # ---- starts -----------------------------------------------------------------------------------------------

    def visit(self, key: Hashable) -> None:
        """Told in a fit which batch the next E-step is on, for models that set out from where the last one ended.

        Args:
            key: Its place in a fixed partition of the data; None where there is none.
        """
        return

    def begin(self, generators: Sequence[torch.Generator], first: int) -> None:
        """Called before a fit starts, for models that draw: the fit's own generators, one per replica.

        Args:
            generators: One per replica; nothing else is drawn from.
            first: Number of the first replica among all restarts.
        """
        return

    @property
    def default_init(self) -> str:
        """The start that ``init="auto"`` stands for."""
        return "random"

    def least_rows(self, n_states: int) -> int:
        """How many rows a start from random responsibilities of so many states needs."""
        return n_states

    def landmarks(self, batch: Batch) -> Tensor:
        """Columns ``[n, F]`` of a sample by which starts cluster it: the observations."""
        return batch.x

    @abstractmethod
    def initialize(self, batch: Batch, expected: Tensor) -> None:
        """First parameters from responsibilities ``[*r, N, K]`` of a sample, in place."""

    @abstractmethod
    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        """First parameters with state k at observation ``index [*r, K]`` of a sample, in place."""

    # ---- health -----------------------------------------------------------------------------------------------

    def occupancy(self, stats: Stats) -> Tensor | None:
        """Expected number of observations of each latent state, ``[*r, K]``, if there is one set of states."""
        return None

    def degenerate(self) -> Tensor | None:
        """``[*r, K]`` Boolean, True where a component sits at the bounds of its family."""
        return None

    def floored(self) -> list[int | str]:
        """What a result says stands at the floor: components by index; covariances by name where there are none."""
        marks = self.degenerate()
        return [] if marks is None else marks.nonzero()[:, 0].tolist()

    def twins(self, batch: Batch, tolerance: float = 0.0) -> list[tuple[int, int]]:
        """Pairs of states whose potentials agree on a sample to within ``tolerance`` nats, up to a constant weight.

        At a tolerance of zero EM would keep them equal for ever.
        """
        return []

    # ---- use --------------------------------------------------------------------------------------------------

    @abstractmethod
    def log_prob(self, data: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each row or sequence, ``[N]``, latents summed out, differentiable in parameters and data."""

    def log_score(self, batch: Batch) -> Tensor:
        """What held-out rows or sequences are judged by, ``[*r, N]``: `log_prob`, or a bound where that is too dear."""
        return self.log_prob(batch)

    def scored_by_bound(self, batch: Batch) -> bool:
        """Whether `log_score` of these data is a lower bound, not log p(x)."""
        return type(self).log_score is not LatentModel.log_score and not self.exact

    def log_bound(self, batch: Batch) -> Tensor:
        """What the objective has of each row or sequence, ``[*r, N]``, and a mixture weighs models by.

        It is `log_prob`; under posteriors of parameters an expectation.
        """
        return self.log_prob(batch)

    def entropy(self, batch: Batch) -> Tensor:
        """Weighted entropy of the posteriors of all latents, ``[*r]`` in nats."""
        raise invalid("model", "one that knows the entropy of its posteriors", type(self).__name__, "compare bounds")

    @abstractmethod
    def posterior(self, data: Any) -> Any:
        """The posterior of the latents."""

    @abstractmethod
    def most_likely(self, data: Any) -> Tensor:
        """The most probable configuration of the latents."""

    def impute(
        self,
        data: Any,
        how: Literal["auto", "mean", "mode"] = "auto",
        *,
        draws: int | None = None,
        variance: bool = False,
        generator: torch.Generator | None = None,
        **fields: Any,
    ) -> Any:
        """The data with their missing entries filled in, given those that were observed; these stay bit for bit.

        Args:
            data: As for `torchem.fit`, NaN (or ``observed=…``) where an entry is missing.
            how: ``"mean"``: the conditional mean, that of each state weighted by its posterior probability (names of
                categories have none: of them the most probable one). ``"mode"``: of discrete columns the most probable
                value of each entry by itself, of continuous ones the conditional mean under the most probable state
                (the mode of a mixture has no closed form). ``"auto"``: the mode of discrete columns, so that counts
                stay counts, and the mean of the others.
            draws: Draw so many completed tables instead, for multiple imputation: states from their posterior (of
                sequences whole paths), then the entries given states and what was observed. They stand on a new first
                axis.
            variance: Return the conditional variance of each entry as well, within states and between them; of
                categories the probability that it is another one; zero where observed.
            generator: Source of the draws.
            **fields: ``observed``, ``inputs``, ``lengths``, ``labels``, … as for `torchem.fit`.

        Returns:
            What was given, in its layout and type, as a tensor (a list of them for a list of sequences); with
            ``variance`` a pair of these.

        Raises:
            InvalidArgument: For a model that cannot tell, or a row of probability zero.
        """
        raise invalid("model", "one that completes observations", type(self).__name__, "use a mixture or an HMM")

    def forward(self, data: Any) -> Tensor:
        return self.log_prob(data)

    # ---- replicas, numerics -----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self.slots()[0][1].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.slots()[0][1].device

    @property
    def replicas(self) -> tuple[int, ...]:
        """``()`` for one model, ``(R,)`` for R replicas run as one."""
        return self.slots()[0][1].replicas

    @property
    def replicates(self) -> bool:
        """Whether parameters may carry a replica axis; where not, restarts run one after the other."""
        return all(factor.replicates for factor in self.factors())

    def replicate(self, replicas: int) -> "LatentModel":
        """A copy whose parameters carry a leading axis of equal replicas."""
        twin = copy.deepcopy(self)
        for factor in _all_factors(twin):
            factor.replicate(replicas)
        return twin

    def take_replicas(self, index: Tensor | int) -> "LatentModel":
        """A copy with some of the replicas, or with one and no replica axis."""
        twin = copy.deepcopy(self)
        for factor in _all_factors(twin):
            factor.take_replicas(index)
        return twin

    def load_from(self, other: "LatentModel") -> None:
        """Take over parameters and numerical state of a model of the same structure, in place."""
        # Networks of factors are modules too.
        for mine, theirs in zip(self.modules(), other.modules(), strict=True):
            for name, value in theirs.named_parameters(recurse=False):
                getattr(mine, name).data = value.detach().clone()
            for name in set(mine._buffers) - set(theirs._buffers):
                del mine._buffers[name]
            for name, value in theirs.named_buffers(recurse=False):
                mine.register_buffer(name, value.detach().clone())
            for name, value in vars(theirs).items() if isinstance(theirs, Factor) else ():
                # A prior may have been completed from the data.
                if isinstance(value, (bool, int)) or name == "_prior":
                    setattr(mine, name, value)

    def prepare(self, moments: Moments) -> None:
        """Tell every factor the scale of the data."""
        for factor in _own_factors(self):
            factor.prepare(moments)

    def project(self) -> None:
        """Move every factor into its feasible set."""
        for factor in _all_factors(self):
            factor.project()

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        """Let every factor adapt its numerics after an M-step, in place."""
        found = {slot: adjustment for slot, f in self.slots() if (adjustment := f.tune(rows, iteration)) is not None}
        if not found:
            return None
        moves = {slot: adjustment.move for slot, adjustment in found.items() if adjustment.move is not None}

        def move(stats: Stats) -> Stats:
            return stats.like({k: moves[k](v) if k in moves else v for k, v in stats.items()})

        return Adjustment(move if moves else None, any(adjustment.retake for adjustment in found.values()))

    def n_parameters(self) -> int:
        """Number of free parameters."""
        return sum(factor.n_parameters() for factor in self.factors())

    def config(self) -> dict[str, Any]:
        """Constructor arguments, by the convention that each is kept as an attribute of its name."""
        return constructor_arguments(self)


#: What to do about covariates, offsets and trials that nothing reads.
_READERS = {
    "u": "leave them out, or use a gate such as SoftmaxRegression or a component such as LinearGaussian",
    "offset": "leave them out, or use a component such as PoissonRegression or LinearGaussian",
    "trials": "leave them out, or use BinomialRegression (counts of one number of trials: Multinomial)",
}


def _all_factors(model: nn.Module) -> list[Factor]:
    return [module for module in model.modules() if isinstance(module, Factor)]


def _own_factors(module: nn.Module) -> list[Factor]:
    """All factors but those of models inside a factor, which alone know what scale theirs have."""
    found = [module] if isinstance(module, Factor) else []
    for child in module.children():
        if not isinstance(child, LatentModel):
            found += _own_factors(child)
    return list(dict.fromkeys(found))


class DiscreteModel(LatentModel):
    """A model whose latents are discrete: write `log_partition`, inherit inference.

    Example:
        >>> import torchem
        >>> model = torchem.GaussianMixture(2, 1)
        >>> stats = model.e_step(model.batch([[0.0], [1.0]]))
        >>> float(stats["count"])
        2.0
    """

    e_steps: ClassVar[tuple[EStep, ...]] = ("soft", "hard", "sample")
    anneals: ClassVar[bool] = True
    exact = True

    @abstractmethod
    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        """log Σ_z exp Σ potentials, ``[*r, N]``; with ``plus=reduce.maximum`` the value of the best configuration."""

    def log_normalizer(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        """log Z ``[*r, N]``: `log_partition`, or something faster that equals it."""
        return self.log_partition(potentials, batch)

    def infer(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """log Z per row, and weighted expectations in the shape of each potential.

        Weights are those of the rows, ``[N]``, or of the rows under each replica, ``[*r, N]``: in a mixture of models
        they are the responsibilities. This default differentiates `log_partition`: the reference that every faster
        override must equal.

        Source: M. J. Wainwright, M. I. Jordan (2008), proposition 3.1.
        """
        return self._gradient(potentials, batch, reduce.logsumexp)

    def infer_hard(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Joint log-potential of each row's most likely configuration, and that configuration, weighted, as 0 and 1.

        This default differentiates `log_partition` with a maximum that attains one index, ties at the lowest.
        """
        return self._gradient(potentials, batch, reduce.maximum)

    def _gradient(
        self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_z, pull, *_ = torch.func.vjp(lambda p: self.log_partition(p, batch, plus), potentials)
        weight = torch.ones_like(log_z) if batch.weight is None else batch.weight.to(log_z).expand_as(log_z)
        # A maximum names a configuration even where none is possible.
        return log_z, pull(torch.where(log_z == -torch.inf, 0.0, weight))[0]

    def entropy(self, batch: Batch) -> Tensor:
        """Weighted entropy of the posteriors of all latents, ``[*r]`` in nats: Σ w (log Z − E[potentials])."""
        kernels = self._kernels()
        total: Tensor | float = 0.0
        for piece in self.stream(batch):
            potentials = {slot: kernel.log_potential(piece) for slot, kernel in kernels.items()}
            log_z, expected = self.infer(potentials, piece)
            total = total + weighted(log_z, piece)
            lead = len(self.replicas)
            for slot, value in potentials.items():
                each = torch.where(expected[slot] > 0, value * expected[slot], 0.0)
                total = total - each.sum(tuple(range(lead, each.dim())), dtype=torch.float64)
            if piece.evidence is not None:
                total = total - self._known(expected, piece)
        assert isinstance(total, Tensor)
        return total

    def _known(self, expected: dict[str, Tensor], batch: Batch) -> Tensor:
        """What the evidence contributes to the expected potentials."""
        raise NotImplementedError(f"{type(self).__name__} takes no evidence")

    def infer_sample(
        self, potentials: dict[str, Tensor], batch: Batch, uniforms: Uniforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log Z per row, and a configuration drawn from the posterior, weighted, as 0 and 1.

        This default differentiates `log_partition` with sums that choose one of their terms.
        """
        return self._gradient(potentials, batch, reduce.sampled(uniforms))

    def e_step(self, batch: Batch, kind: EStep = "soft", beta: float = 1.0, uniforms: Uniforms | None = None) -> Stats:
        """Expected statistics of a batch; see `LatentModel.e_step`.

        Args:
            batch: Observations.
            kind: What stands for the posterior: itself, the most likely configuration, or one that is drawn.
            beta: Inverse temperature; ``log_likelihood`` is then the free energy Σ w log Z_β / β.
            uniforms: Gives the uniform numbers of the draws; those of torch's global generator when left out.
        """
        with declared_precision(self.device):
            return self._e_step(batch, self._inference(kind, beta, uniforms))

    def _inference(self, kind: EStep, beta: float, uniforms: Uniforms | None) -> Callable[..., Any]:
        if kind == "sample":
            source = global_uniforms if uniforms is None else uniforms
            infer = functools.partial(self.infer_sample, uniforms=source)
        else:
            infer = self.infer if kind == "soft" else self.infer_hard
        return infer if beta == 1 else Tempered(infer, beta)

    def expectations(
        self, batch: Batch, kind: EStep = "soft", beta: float = 1.0, uniforms: Uniforms | None = None
    ) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Pieces of a batch, each with the weighted expectations that an E-step collects from it, by slot."""
        infer = self._inference(kind, beta, uniforms)
        kernels = self._passes(infer)
        for piece in self.stream(batch):
            yield piece, infer({slot: kernel.log_potential(piece) for slot, kernel in kernels.items()}, piece)[1]

    def potential(self, slot: str, piece: Batch) -> Tensor:
        """What inference is fed of one slot at the current parameters, differentiable in them."""
        return self._kernels()[slot].log_potential(piece)

    def _kernels(self, score: bool = False) -> dict[str, Kernel]:
        """A pass of every factor; with ``score`` of densities, which for posteriors of parameters are predictive."""
        tables = self.table_slots()
        return {
            slot: _TablePass(f, score) if slot in tables else f.scorer() if score else f.kernel()
            for slot, f in self.slots()
        }

    def _passes(self, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Kernel]:
        """A pass of every factor for one E-step; factors with discrete latents of their own infer these likewise."""
        return self._kernels()

    def _e_step(self, batch: Batch, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        kernels = self._passes(infer)
        log_likelihood: Tensor | None = None
        for piece in self.stream(batch):
            potentials = {slot: kernel.log_potential(piece) for slot, kernel in kernels.items()}
            log_z, expected = infer(potentials, piece)
            for slot, kernel in kernels.items():
                kernel.collect(piece, expected[slot])
            subtotal = weighted(log_z, piece)
            log_likelihood = subtotal if log_likelihood is None else log_likelihood + subtotal
        assert log_likelihood is not None
        return self._assembled(kernels, log_likelihood, batch)

    def _assembled(self, kernels: dict[str, Kernel], log_likelihood: Tensor, batch: Batch) -> Stats:
        """The statistics that kernels collected in a pass."""
        stats = Stats({slot: kernel.stats() for slot, kernel in kernels.items()})
        # ≡ Σ w log Z − Q at this θ: the entropy of the posteriors plus all that Q leaves out (base measures).
        stats["entropy"] = log_likelihood - sum(kernel.inner() for kernel in kernels.values())
        stats["log_likelihood"] = log_likelihood
        stats["count"] = self.count(batch).to(log_likelihood).expand_as(log_likelihood)
        return stats

    def _each(self, data: Any, function: Callable[[dict[str, Tensor], Batch], Any], score: bool = False) -> Any:
        """Apply a function of potentials to the data piece by piece and join the results, tensors, along the rows."""
        batch = self._read(data, {})
        with declared_precision(self.device):
            kernels = self._kernels(score)
            parts = [function({s: k.log_potential(p) for s, k in kernels.items()}, p) for p in self.stream(batch)]
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *p: torch.cat(p, len(self.replicas)), *parts)

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each row or sequence, ``[N]``; with ``labels`` that of them beside the data.

        Args:
            data: As for `torchem.fit`.
            **fields: ``lengths``, ``inputs``, ``labels``, … as for `LatentModel.batch`.
        """
        return self._each(self._read(data, fields), self.log_normalizer, score=True)


def global_uniforms(shape: torch.Size) -> Tensor:
    """Uniform numbers from torch's own generator."""
    return torch.rand(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Tempered:
    """Inference with the joint density to the power β: expectations under it, and log Z_β / β."""

    infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    beta: float

    def __call__(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if batch.evidence is not None:
            batch = replace(batch, evidence=batch.evidence * self.beta)
        log_z, expected = self.infer({slot: value * self.beta for slot, value in potentials.items()}, batch)
        return log_z / self.beta, expected


def weighted(log_z: Tensor, batch: Batch) -> Tensor:
    """Σ w log Z over the rows, float64; weight 0 silences −inf."""
    if batch.weight is not None:
        log_z = torch.where(batch.weight > 0, log_z, 0.0) * batch.weight
    return log_z.sum(-1, dtype=torch.float64)


class _TablePass(Kernel):
    """A latent child's pass over the pieces: its table once, its counts summed."""

    def __init__(self, factor: Factor, score: bool = False):
        self.factor, self.table = factor, factor.log_table if score else factor.table_potential
        self.total: Stats | None = None
        self.kept: Tensor | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        if self.kept is not None:
            return self.kept
        value = self.table(batch)
        # One table for many rows reads nothing of them.
        if len(batch) > 1 and value.shape[len(self.factor.replicas)] == 1:
            self.kept = value
        return value

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())

    def collect(self, batch: Batch, expected: Tensor) -> None:
        stats = self.factor.table_stats(batch, expected)
        self.total = stats if self.total is None else self.total + stats

    def stats(self) -> Stats:
        assert self.total is not None
        return self.total


class _Map(nn.Module):
    """An EM iteration as a forward pass, so that `functional_call` can put other parameters in."""

    def __init__(self, model: LatentModel):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        new = dict(self.model.named_parameters())
        return new | self.model.maximize(self.model.e_step(batch))


def placed(wrapped: Any, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of the parameters of ``wrapped.model`` under each place that they have, once for each module.

    torch's own tying puts the value into a module that stands in two slots twice, and then cannot restore it.
    """
    names = {id(value): name for name, value in wrapped.model.named_parameters()}
    return {
        f"{path}.{name}": params[names[id(value)]]
        for path, module in wrapped.named_modules()
        for name, value in module.named_parameters(recurse=False)
        if names[id(value)] in params
    }


def em_map(model: LatentModel) -> Callable[[dict[str, Tensor], Batch], dict[str, Tensor]]:
    """The EM iteration θ → θ′ as a pure function of unconstrained parameters and a batch.

    It assigns nothing and detaches nothing: differentiate it, batch it with ``torch.func.vmap``, extrapolate it.

    Returns:
        A function of ``dict(model.named_parameters())`` and a `Batch` that returns new parameters of the same names.

    Raises:
        InvalidArgument: If a factor's M-step is no function of statistics.

    Example:
        >>> import torchem
        >>> model = torchem.GaussianMixture(2, 1)
        >>> model.means = [[-1.0], [1.0]]
        >>> step = em_map(model)
        >>> new = step(dict(model.named_parameters()), model.batch([[-1.0], [2.0], [3.0]]))
        >>> sorted(new)
        ['component.mean', 'component.scale', 'mixing.logits']
    """
    model.check_sufficient("em_map")
    wrapped = _Map(model)

    def step(params: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return torch.func.functional_call(wrapped, placed(wrapped, params), (batch,), tie_weights=False)

    return step
