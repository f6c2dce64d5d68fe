"""Hidden Markov models: a chain of discrete states behind a sequence of observations."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import InvalidArgument, invalid, whole_number, wrong_type
from torchem.factor import Factor, Kernel
from torchem.factors import Categorical, Gaussian
from torchem.factors.gaussian import CovarianceType, FloorType
from torchem.model import DiscreteModel, Reduction, Tempered, Uniforms, weighted
from torchem.models.draws import Draw, follow, reach
from torchem.models.frames import FramesPass, is_light, window
from torchem.models.imputation import (
    Completing,
    Gaps,
    check_possible,
    complete,
    floating,
    in_turn,
    kinds_of,
    places,
)
from torchem.models.stationary import Stationary
from torchem.models.unseen import Among
from torchem.ops import chain, reduce
from torchem.ops.dispatch import compiled_chain, threads_for_kernels
from torchem.ops.expansion import Expansion
from torchem.stats import Stats

#: Bytes that the messages of one piece of sequences may take. On CPU each table is then of a size that the C library
#: keeps from one piece to the next (`dispatch.keep_freed_memory`).
_MESSAGES = {"cpu": 64 << 20, "cuda": 2 << 30}
#: Numbers held per frame and state while messages run both ways.
_PER_STATE = 6
#: Numbers of a table of posteriors up to which a compiled kernel is done before torch's threads have gone to sleep.
_BRIEF = 1 << 21
#: Frames over which states are counted to see which are visited.
_GLANCE = 50
#: Bytes that the tables of a transition that reads covariates may take.
_TABLES = 64 << 20


@dataclass(frozen=True)
class Forecast:
    """What follows a sequence.

    Attributes:
        states: p(z_{T+h} | x), ``[N, H, K]``.
        mean: E[x_{T+h} | x], ``[N, H, D]``; None where the emission has no mean.
        variance: Variance of each column, ``[N, H, D]``, likewise.
        draws: Continuations ``[n, N, H, D]``, if any were asked for.
    """

    states: Tensor
    mean: Tensor | None
    variance: Tensor | None
    draws: Tensor | None


class HMM(Completing, DiscreteModel):
    """p(x, z) = p(z_1) Π_t p(z_{t+1} | z_t, u_{t+1}) Π_t p(x_t | z_t, u_t): Markov states, any factor as emission.

    E-step: the posterior of each state and the expected number of each step, by forward–backward. M-step: each factor
    under them (Baum–Welch). A transition that reads covariates takes those of the frame it leads to.

    Args:
        initial: Law of the first state: ``Categorical(K)`` (freeze it to keep it), or ``"stationary"`` for that of the
            transition matrix.
        transition: ``Categorical(K, K)`` (zeros assigned to it stay zero), or a gate with K parents.
        emission: An observed child with K components.
        end: ``Categorical(K, 2)``: probabilities that a sequence goes on, and that it ends, after each frame. None
            where sequences end for reasons of their own.

    Raises:
        InvalidArgument: If they disagree about K.

    Source: L. R. Rabiner (1989); W. Zucchini, I. L. MacDonald (2009).

    Example:
        >>> m = HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3))
        >>> m.posterior([[0], [2], [1]]).shape
        torch.Size([1, 3, 2])
    """

    sequential: ClassVar[bool] = True

    initial: Factor
    transition: Factor
    emission: Factor
    end: Factor | None

    def __init__(
        self,
        initial: Factor | Literal["stationary"],
        transition: Factor,
        emission: Factor,
        end: Factor | None = None,
    ):
        super().__init__()
        if initial == "stationary":
            initial = Stationary(transition)
        slots = {"initial": initial, "transition": transition, "emission": emission, "end": end}
        for name, factor in slots.items():
            if not isinstance(factor, Factor) and not (name == "end" and factor is None):
                raise wrong_type(name, "a torchem factor", factor, "pass for example factors.Categorical(K, K)")
        k = emission.n_components
        if k is None:
            raise invalid("emission", "a factor with states", type(emission).__name__, "build it with K components")
        shapes = {"initial": (k,), "transition": (k, k), "end": (k, 2)}
        for name, shape in shapes.items():
            own = getattr(slots[name], "shape", shape)
            if tuple(own) != shape:
                raise invalid(
                    name, f"a table of shape {list(shape)}, for the {k} states of the emission", list(own),
                    "build them with the same K",
                )  # fmt: skip
        self.initial, self.transition, self.emission, self.end = initial, transition, emission, end

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        slots = ("initial", self.initial), ("transition", self.transition), ("emission", self.emission)
        return slots if self.end is None else (*slots, ("end", self.end))

    def table_slots(self) -> frozenset[str]:
        return frozenset({"initial", "transition", "end"})

    @property
    def n_components(self) -> int:
        """K, the number of states."""
        k = self.emission.n_components
        assert k is not None
        return k

    @property
    def n_states(self) -> int:
        """K, the number of states."""
        return self.n_components

    @property
    def dtype(self) -> torch.dtype:
        return self.emission.dtype

    @property
    def device(self) -> torch.device:
        return self.emission.device

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.emission.replicas

    @property
    def initial_probs(self) -> Float[Tensor, "*r k"]:
        """Probabilities of the first state ``[*r, K]``; assignable, must sum to one."""
        if isinstance(self.initial, Stationary):
            return self.initial.probs
        return self._table("initial").probs

    @initial_probs.setter
    def initial_probs(self, value: Any) -> None:
        self._table("initial").assign_probs(value, "initial_probs")

    @property
    def transition_matrix(self) -> Float[Tensor, "*r k k"]:
        """Probabilities ``[*r, K, K]`` of each step, rows from; assignable, rows sum to one, zeros stay zero."""
        return self._table("transition").probs

    @transition_matrix.setter
    def transition_matrix(self, value: Any) -> None:
        self._table("transition").assign_probs(value, "transition_matrix")

    @property
    def end_probs(self) -> Float[Tensor, "*r k"]:
        """Probability ``[*r, K]`` that a sequence ends after a frame in each state; assignable."""
        return self._table("end").probs[..., 1]

    @end_probs.setter
    def end_probs(self, value: Any) -> None:
        stop = as_tensor(value, "end_probs").to(torch.float64)
        self._table("end").assign_probs(torch.stack([1 - stop, stop], -1), "end_probs")

    def _table(self, slot: str) -> Any:
        factor = getattr(self, slot)
        if not isinstance(factor.unwrapped, Categorical):
            raise invalid(slot, "a table of probabilities", type(factor).__name__, f"read model.{slot} instead")
        return factor

    def restrict(self, mask: Any) -> None:
        """Allow only some transitions, for good: the others become structural zeros, rows are renormalised.

        Args:
            mask: ``[K, K]`` Boolean, True where a step from row to column is allowed; see `torchem.masks`.

        Raises:
            InvalidArgument: If a state has no successor left (an absorbing state has itself).

        Example:
            >>> import torchem
            >>> m = GaussianHMM(3, 1)
            >>> m.restrict(torchem.masks.left_right(3))
            >>> m.transition_matrix[2]
            tensor([0., 0., 1.], grad_fn=<SelectBackward0>)
        """
        allowed = as_tensor(mask, "mask").to(self.device, torch.bool)
        table, k = self._table("transition"), self.n_components
        if allowed.shape != (k, k):
            raise invalid("mask", f"shape [{k}, {k}]", list(allowed.shape), "give a row for each state")
        stuck = (~allowed.any(-1)).nonzero()[:, 0].tolist()
        if stuck:
            raise invalid(
                "mask", "a successor for each state", f"none for state {stuck[0]}", "an absorbing state keeps itself"
            )
        probs = torch.where(allowed, table.probs.detach().to(torch.float64), 0.0)
        total = probs.sum(-1, keepdim=True)
        even = allowed / allowed.sum(-1, keepdim=True)
        self.transition_matrix = torch.where(total > 0, probs / total.clamp(min=1e-300), even)

    # ---- potentials -------------------------------------------------------------------------------------------

    def _kernels(self, score: bool = False) -> dict[str, Kernel]:
        return {**super()._kernels(score), "emission": FramesPass(self.emission, score)}

    @property
    def _states(self) -> int:
        """Number of states of the chain that inference runs on."""
        return self.n_components ** (self.emission.memory + 1)

    def _informed(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        """Potentials of the emissions with what is known of the states and of the ends of sequences."""
        emission, extra = potentials["emission"], None
        if batch.evidence is not None:
            extra = batch.evidence.to(emission)
        if self.end is not None:
            going, ending = potentials["end"].unbind(-1)
            last = self._last(batch).unsqueeze(-1)
            stops = torch.where(last, ending.unsqueeze(-2), going.unsqueeze(-2))
            extra = stops if extra is None else extra + stops
        if extra is None:
            return emission
        return emission + extra.repeat_interleave(self.n_components**self.emission.memory, -1)

    def _chain(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials of the chain of `Factor.memory` + 1 states that inference runs on."""
        initial, transition = potentials["initial"], potentials["transition"]
        if self.varying(transition):
            transition = transition[..., 1:, :, :]
        if self._gated(initial):
            initial = initial[..., 0, :]
        wide = Expansion(self.n_components, self.emission.memory, initial.device)
        initial, transition = wide.initial(initial), wide.transition(transition)
        return initial, transition, self._informed(potentials, batch)

    def _gated(self, initial: Tensor) -> bool:
        """Whether the initial law reads covariates: it then has a row for each frame, of which the first counts."""
        return initial.dim() > len(self.replicas) + 2

    def varying(self, transition: Tensor) -> bool:
        """Whether potentials of the transition differ from frame to frame."""
        return transition.dim() > len(self.replicas) + 3

    def _last(self, batch: Batch) -> Tensor:
        """``[N or 1, T]`` Boolean, True at the last frame of each sequence."""
        frames = batch.x.shape[1]
        ends = torch.tensor([frames], device=batch.x.device) if batch.lengths is None else batch.lengths
        return torch.arange(frames, device=batch.x.device) == ends.unsqueeze(-1) - 1

    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        return chain.reference(*self._chain(potentials, batch), batch.lengths, plus)

    def log_normalizer(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        return chain.log_normalizer(*self._chain(potentials, batch), batch.lengths)

    def infer(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        initial, transition, emission = self._chain(potentials, batch)
        weight = None if batch.weight is None else batch.weight.expand(*self.replicas, -1)
        log_z, first, pairs, gamma = chain.expectations(initial, transition, emission, batch.lengths, weight)
        return log_z, self._folded(first, pairs, gamma, batch, potentials)

    def infer_hard(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        initial, transition, emission = self._chain(potentials, batch)
        score, path = chain.viterbi(initial, transition, emission, batch.lengths)
        return score, self._along(path, score, initial, batch, potentials)

    def infer_sample(
        self, potentials: dict[str, Tensor], batch: Batch, uniforms: Uniforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self._chain(potentials, batch)
        log_z = chain.log_normalizer(*parts, batch.lengths)
        given = uniforms(torch.Size((*log_z.shape, batch.x.shape[1])))
        path = chain.sample(*parts, batch.lengths, uniforms=given)
        return log_z, self._along(path, log_z, parts[0], batch, potentials)

    def _along(
        self, path: Tensor, score: Tensor, initial: Tensor, batch: Batch, potentials: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Expectations that are one path of the chain that inference runs on, ``[*r, N, T]``, for each sequence."""
        gamma, before, ahead = self._indicators(path, score, initial, batch)
        first = gamma[..., 0, :].to(torch.float64).sum_to_size(initial.shape)
        if self.varying(potentials["transition"]):
            pairs = before.unsqueeze(-1) * ahead.unsqueeze(-2)
        else:
            pairs = (before.flatten(-3, -2).mT @ ahead.flatten(-3, -2)).to(torch.float64).unsqueeze(-3)
        return self._folded(first, pairs, gamma, batch, potentials)

    @staticmethod
    def _indicators(path: Tensor, score: Tensor, initial: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """States of paths ``[*r, N, T]`` as numbers, weighted, and those before and, weighted, after each step."""
        mass = torch.ones_like(score) if batch.weight is None else batch.weight.to(score).expand_as(score)
        # A path is −1 in the padding and where there is none: those frames count for nothing.
        gamma = torch.nn.functional.one_hot(path.clamp(min=0), initial.shape[-1]).to(initial)
        gamma = gamma * torch.where(path >= 0, mass.unsqueeze(-1), 0.0).unsqueeze(-1)
        ahead = torch.where(path[..., 1:, None] >= 0, gamma[..., 1:, :], 0.0)
        return gamma, (gamma[..., :-1, :] > 0).to(gamma), ahead

    def _folded(
        self, first: Tensor, pairs: Tensor | None, gamma: Tensor, batch: Batch, potentials: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Expectations of the chain that inference ran on in the shapes of the slots' potentials."""
        wide = Expansion(self.n_components, self.emission.memory, gamma.device)
        expected = {"initial": wide.folded_initial(first), "emission": gamma}
        if self._gated(potentials["initial"]):
            after = torch.zeros_like(potentials["initial"][..., 1:, :])
            expected["initial"] = torch.cat([expected["initial"].to(after).unsqueeze(-2), after], -2)
        if pairs is not None:
            pairs = wide.folded_transition(pairs)
            varying = self.varying(potentials["transition"])
            # No step leads into the first frame.
            expected["transition"] = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 1, 0)) if varying else pairs
        if self.end is not None:
            states, last = self._present(gamma), self._last(batch).unsqueeze(-1)
            sums = [torch.where(mask, states, 0.0).sum((-3, -2), dtype=torch.float64) for mask in (~last, last)]
            expected["end"] = torch.stack(sums, -1).unsqueeze(-3)
        return expected

    def _present(self, value: Tensor) -> Tensor:
        """Expectations ``[…, K^(L+1)]`` summed over the states before the present one."""
        return value.unflatten(-1, (self.n_components, -1)).sum(-1) if self.emission.memory else value

    def _known(self, expected: dict[str, Tensor], batch: Batch) -> Tensor:
        posterior = self._present(expected["emission"])
        assert batch.evidence is not None
        known = torch.where(posterior > 0, posterior * batch.evidence.to(posterior), 0.0)
        return known.sum((-3, -2, -1), dtype=torch.float64)

    # ---- transitions that read covariates ---------------------------------------------------------------------

    def _block(self, batch: Batch) -> int:
        """Frames whose K × K tables are held at once; 0 where all steps are alike or all tables fit."""
        if isinstance(self.transition.unwrapped, Categorical):
            return 0
        width = len(batch) * math.prod(self.replicas) * self._states**2 * self.dtype.itemsize * _PER_STATE
        block = max(16, (self.memory_budget or _TABLES) // max(1, width))
        return block if block < batch.x.shape[1] else 0

    def _e_step(self, batch: Batch, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        small = batch.x.shape[0] * batch.x.shape[1] * self._states <= _BRIEF and is_light(self.emission)
        with threads_for_kernels(small and compiled_chain(self.device) is not None):
            return self._expected(batch, infer)

    def _expected(self, batch: Batch, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        plain, beta = (infer.infer, infer.beta) if isinstance(infer, Tempered) else (infer, 1.0)
        draws = plain.keywords["uniforms"] if isinstance(plain, functools.partial) else None
        known = plain == self.infer or (isinstance(plain, functools.partial) and plain.func == self.infer_sample)
        streamed = known and self._block(batch) and not torch.is_grad_enabled()
        if not streamed or torch._C._are_functorch_transforms_active():
            return super()._e_step(batch, infer)
        kernels = self._kernels()
        gate = kernels["transition"]
        total: Tensor | float = 0.0
        for piece in self.stream(batch):
            tables = {slot: kernel for slot, kernel in kernels.items() if slot != "transition"}
            potentials = {slot: kernel.log_potential(piece) for slot, kernel in tables.items()}
            log_z, expected = self._streamed(potentials, piece, gate, beta, draws)
            for slot, kernel in tables.items():
                kernel.collect(piece, expected[slot])
            total = total + weighted(log_z, piece)
        assert isinstance(total, Tensor)
        return self._assembled(kernels, total, batch)

    def _streamed(
        self, potentials: dict[str, Tensor], batch: Batch, gate: Kernel, beta: float, uniforms: Uniforms | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`infer` with the transition's tables made, and their expectations taken, block by block of time.

        At an inverse temperature other than one as `Tempered` does it; with ``uniforms`` as `infer_sample`.
        """
        wide = Expansion(self.n_components, self.emission.memory, batch.x.device)
        first = potentials["initial"]
        initial = wide.initial(first[..., 0, :] if self._gated(first) else first)
        emission = self._informed(potentials, batch)

        def table(start: int, stop: int) -> Tensor:
            steps = wide.transition(gate.log_potential(window(batch, start, stop)))
            return steps if beta == 1 else steps * beta

        def collect(start: int, stop: int, pairs: Tensor) -> None:
            gate.collect(window(batch, start, stop), wide.folded_transition(pairs))

        weight = None if batch.weight is None else batch.weight.expand(*self.replicas, -1)
        block = self._block(batch) or batch.x.shape[1]
        parts = initial * beta, table, emission * beta
        if uniforms is not None:
            log_z, path = chain.stream_sample(*parts, batch.lengths, uniforms(emission.shape[:-1]), block)
            gamma, before, ahead = self._indicators(path, log_z, initial, batch)
            for start in range(0, batch.x.shape[1], block):
                stop, origin = min(start + block, batch.x.shape[1]), max(start, 1)
                pairs = before[..., origin - 1 : stop - 1, :].unsqueeze(-1) * ahead[..., origin - 1 : stop - 1, None, :]
                collect(start, stop, pairs if start else torch.nn.functional.pad(pairs, (0, 0, 0, 0, 1, 0)))
            first = gamma[..., 0, :].to(torch.float64).sum_to_size(initial.shape)
            return log_z / beta, self._folded(first, None, gamma, batch, potentials)
        log_z, first, gamma = chain.stream_expectations(*parts, batch.lengths, weight, block, collect)
        return log_z / beta, self._folded(first, None, gamma, batch, potentials)

    # ---- use --------------------------------------------------------------------------------------------------

    def posterior(self, data: Any, **fields: Any) -> Float[Tensor, "*r n t k"]:
        """p(z_t | x) of each frame, ``[N, T, K]``; zeros in the padding and where a sequence is impossible.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``lengths``, ``u``, ``labels``, … as for `LatentModel.batch`.
        """
        return self._each(self._read(data, fields), self._posterior)

    def _posterior(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        bare = Batch(batch.x, lengths=batch.lengths, evidence=batch.evidence)
        return self._present(self.infer(potentials, bare)[1]["emission"])

    def filter(self, data: Any, **fields: Any) -> Float[Tensor, "*r n t k"]:
        """p(z_t | x_1, …, x_t) of each frame, ``[N, T, K]``: what could be known at the time."""
        return self._each(self._read(data, fields), self._filtered)

    def _filtered(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        return self._present(chain.filter(*self._chain(potentials, batch), batch.lengths)[1])

    def most_likely(self, data: Any, **fields: Any) -> Int[Tensor, "*r n t"]:
        """The most likely path of states, ``[N, T]`` (Viterbi); −1 in the padding and where there is none."""
        return self._each(self._read(data, fields), lambda p, b: self._viterbi(p, b)[1])

    def _viterbi(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        score, path = chain.viterbi(*self._chain(potentials, batch), batch.lengths)
        return score, self._digits(path)

    def _digits(self, path: Tensor) -> Tensor:
        """Paths of expanded states as paths of the present one."""
        earlier = self.n_components**self.emission.memory
        return path if earlier == 1 else path.div(earlier, rounding_mode="floor")

    def best_paths(self, data: Any, count: int, **fields: Any) -> tuple[Tensor, Tensor]:
        """The ``count`` most likely paths: joint log-probabilities ``[N, count]`` and states ``[N, count, T]``."""
        whole_number("count", count, 1, "give how many paths to list")

        def paths(potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
            return self._best(potentials, batch, count)

        return self._each(self._read(data, fields), paths)

    def _best(self, potentials: dict[str, Tensor], batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        scores, found = chain.best_paths(*self._chain(potentials, batch), count, batch.lengths)
        return scores, self._digits(found)

    def sample_posterior(
        self, data: Any, n: int = 1, *, generator: torch.Generator | None = None, **fields: Any
    ) -> Int[Tensor, "n_draws n t"]:
        """``n`` draws of the path of states given the data, ``[n, N, T]``."""
        whole_number("n", n, 1, "give the number of draws")
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")

        def paths(potentials: dict[str, Tensor], batch: Batch) -> Tensor:
            return self._paths(potentials, batch, n, generator).transpose(0, 1)

        return self._digits(self._each(self._read(data, fields), paths)).transpose(0, 1)

    def column_kinds(self) -> list[tuple[bool, bool]]:
        return kinds_of(self.emission)

    def unseen(self, batch: Batch, index: Tensor) -> Among:
        """See `Completing.unseen`: the emission under the smoothed states of each frame."""
        self._refuse_gaps(batch, True)
        bare, lead = replace(batch, weight=None), len(self.replicas)
        found = self._each(bare, lambda p, b: self.infer(p, b)[1]["emission"])
        share = found.flatten(lead, lead + 1).index_select(lead, places(batch, index, self.device))
        return Among(self.emission, self._frames(batch, index), share)

    def _frames(self, batch: Batch, index: Tensor) -> Batch:
        """Some frames of sequences as rows, with what the emission reads of those before them."""
        return floating(replace(self.emission.context(batch), x=batch.x).rows()[index], self)

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: whole paths of states, and the frames given these."""
        batch = gaps.batch
        self._refuse_gaps(batch, True)
        rows, place = self._frames(batch, gaps.index), places(batch, gaps.index, self.device)

        def paths(potentials: dict[str, Tensor], piece: Batch) -> Tensor:
            return self._paths(potentials, piece, draws, generator).transpose(0, 1)

        states = self._each(replace(batch, weight=None), paths).transpose(0, 1).flatten(1, 2)[:, place]
        check_possible((states >= 0).all(0), gaps)
        return complete(self.emission, rows, states, generator)

    def _paths(self, potentials: dict[str, Tensor], piece: Batch, n: int, generator: torch.Generator | None) -> Tensor:
        """Draws of the states that index the emission, ``[n, N, T]``; −1 in the padding and where there is no path."""
        (*tables, emission), found = self._chain(potentials, piece), []
        for times in in_turn(n, emission.shape[:2].numel()):
            first, move = (v if v.shape[0] == 1 else repeated(v, times) for v in tables)
            lengths = None if piece.lengths is None else piece.lengths.repeat(times)
            path = chain.sample(first, move, repeated(emission, times), lengths, generator)
            found.append(path.unflatten(0, (times, len(piece))))
        return torch.cat(found)

    def forecast(
        self, data: Any, steps: int, *, inputs: Any = None, n: int = 0, generator: torch.Generator | None = None,
        **fields: Any,
    ) -> "Forecast":  # fmt: skip
        """What follows each sequence: laws of states and observations ``1 … steps`` frames ahead, if it goes on.

        Args:
            data: Sequences, as for `torchem.fit`.
            steps: H, how far to look.
            inputs: Covariates ``[N, H, M]`` of the frames to come, where a factor reads them.
            n: Number of continuations to draw. Where the emission reads earlier frames or states the law of an
                observation is what they make of it: its mean and variance are then those of the draws.
            generator: Source of the draws.
            **fields: ``lengths``, ``u``, … of the data.

        Source: W. Zucchini, I. L. MacDonald (2009), section 5.2.

        Example:
            >>> m = GaussianHMM(2, 1)
            >>> m.forecast(torch.zeros(5, 1), 3).mean.shape
            torch.Size([1, 3, 1])
        """
        whole_number("steps", steps, 1, "give how many frames to look ahead")
        batch, lags = self._read(data, fields), reach(self)
        if lags and int(batch.frames().min()) < lags:
            raise invalid(
                "data", f"sequences of at least {lags} frames, as many as the emission reads",
                int(batch.frames().min()), "leave shorter ones out",
            )  # fmt: skip
        self._refuse_gaps(batch)
        if n and self.replicas:
            raise invalid("n", "no draws, of a model with replicas", n, "use take_replicas(0)")
        with torch.no_grad():
            code, last = self._latest(batch), batch.frames().to(self.device)
            u = None if inputs is None else as_tensor(inputs, "inputs").to(code)
            u = u.unsqueeze(0).expand(len(batch), *u.shape) if u is not None and u.dim() == 2 else u
            ahead = Batch(torch.zeros(len(batch), steps, batch.x.shape[-1], device=self.device), u=u)
            laws = self._onward(code, ahead)
            before = (last.unsqueeze(-1) - lags + torch.arange(lags, device=last.device)).unsqueeze(-1)
            recent = batch.x.to(self.device, self.dtype).gather(1, before.expand(-1, -1, batch.x.shape[-1]))
            drawn = self._continued(n, code, recent, ahead, generator) if n else None
            if not lags:
                mean, variance = self._outlook(laws, ahead)
            else:
                mean = None if drawn is None else drawn.mean(0)
                variance = drawn.var(0) if drawn is not None and n > 1 else None
        return Forecast(laws, mean, variance, drawn)

    def _latest(self, batch: Batch) -> Tensor:
        """Law of the chain that inference runs on at the last frame of each sequence, if it goes on: ``[*r, N, C]``."""
        filtered = self._each(batch, lambda p, b: chain.filter(*self._chain(_going_on(p), b), b.lengths)[1])
        place = (batch.frames().to(filtered.device) - 1).view(-1, 1, 1)
        return filtered.gather(-2, place.expand(*filtered.shape[:-2], 1, filtered.shape[-1])).squeeze(-2)

    def _onward(self, code: Tensor, ahead: Batch) -> Tensor:
        """Laws of the states of frames to come after a last one of law ``code``, ``[*r, N, H, K]``."""
        state, table, found = self._present(code), self.transition.log_table(ahead).exp(), []
        for step in range(ahead.x.shape[1]):
            matrix = table[..., step, :, :] if self.varying(table) else table
            state = (state.unsqueeze(-2) @ matrix).squeeze(-2)
            found.append(state)
        return torch.stack(found, -2)

    def _refuse_gaps(self, batch: Batch, fills: bool = False) -> None:
        """Refuse sequences that end with missing frames, where what follows, or ``fills`` them, would read these."""
        lags = reach(self)
        if not lags or not batch.x.is_floating_point() or not bool(batch.x.isnan().any()):
            return
        # They are refused anywhere but at the end: there they are no more once frames that were seen come after them.
        longer, ends = batch.with_frames(batch.x.shape[1] + lags), batch.frames().unsqueeze(-1)
        time = torch.arange(longer.x.shape[1], device=ends.device)
        done = (time >= ends) & (time < ends + lags)
        if fills:
            # What a last frame misses is filled in from the rest of it, and from lags that are whole.
            done = done | (time == ends - 1) & (time >= lags) & ~longer.x.isnan().all(-1)
        x = torch.where(done.unsqueeze(-1), longer.x.nan_to_num(nan=0.0), longer.x)
        try:
            self.emission.check(replace(longer, x=x, lengths=ends[:, 0] + lags))
        except InvalidArgument as error:
            raise invalid(
                "data", "sequences that end with frames that were seen, for an emission that reads them",
                "missing ones", "cut them off and use forecast",
            ) from error  # fmt: skip

    def _outlook(self, laws: Tensor, ahead: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance of a mixture over states, by the law of total variance; None for families without."""
        try:
            center, spread = self.emission.moments(ahead)
        except NotImplementedError:
            return None, None
        share = laws.unsqueeze(-1)
        mean = (share * center).sum(-2)
        return mean, (share * (spread + (center - mean.unsqueeze(-2)).square())).sum(-2)

    def _continued(
        self, n: int, code: Tensor, recent: Tensor, ahead: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """``[n, N, H, D]`` draws of the frames to come, after a last one of law ``code``."""
        sequences, steps = ahead.x.shape[:2]
        code, recent = (repeated(value, n) for value in (code, recent))
        ahead = ahead.map(lambda value: repeated(value, n))
        past, z = self._future(torch.multinomial(code, 1, generator=generator)[:, 0], ahead, generator)
        if recent.shape[1]:
            return follow(self, recent, past, z, ahead.u, generator).unflatten(0, (n, sequences))
        flat = ahead.map(lambda value: value.flatten(0, 1))
        return self.emission.sample(z.flatten(), flat, generator).unflatten(0, (n, sequences, steps))

    def _future(self, code: Tensor, ahead: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """States that the emission remembers ``[N, memory]``, and drawn ones ``[N, H]``, after those of a code."""
        k, memory, rows = self.n_components, self.emission.memory, torch.arange(len(code), device=code.device)
        table = self.transition.log_table(ahead).exp()
        # Digits of an expanded state from the lowest: the oldest first, the present one last.
        path = [code // k**back % k for back in range(memory + 1)]
        for step in range(ahead.x.shape[1]):
            matrix = table[:, step] if self.varying(table) else table
            law = matrix.expand(len(code), k, k)[rows, path[-1]]
            path.append(torch.multinomial(law, 1, generator=generator)[:, 0])
        both = torch.stack(path, 1)
        return both[:, 1 : memory + 1], both[:, memory + 1 :]

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        length: int | None = None,
        *,
        latents: bool = False,
        inputs: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw ``n`` sequences ``[n, length, D]``, and their states ``[n, length]`` when ``latents`` is True.

        Args:
            n: Number of sequences.
            length: Frames of each; may be left out where the model has `end_probs`, and then a list of sequences of
                random lengths is drawn.
            latents: Whether to return the states as well.
            inputs: Covariates ``[n, length, M]`` or ``[length, M]``, where a factor reads them.
            generator: Source of the draws.
        """
        for name, value, least in (("n", n, 0), ("length", length, 1)):
            free = name == "length" and value is None and self.end is not None
            if not free and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise invalid(name, f"a whole number of at least {least}", repr(value), "correct it")
        x, z = self._draw(n, length, inputs, generator).run()
        return (x, z) if latents else x

    def _draw(self, n: int, length: int | None, inputs: Any, generator: torch.Generator | None) -> Draw:
        """What `sample` draws sequences with."""
        return Draw(self, n, length, inputs, generator)

    # ---- starts and health ------------------------------------------------------------------------------------

    def rows(self, batch: Batch) -> Batch:
        rows = self.emission.context(batch).rows()
        if not rows.x.is_floating_point():
            return rows
        missing = rows.x.isnan().all(-1)
        return rows[~missing] if bool(missing.any()) else rows

    @property
    def default_init(self) -> str:
        return self.emission.default_init

    def _wide(self, expected: Tensor) -> Tensor:
        """Responsibilities of K states shared evenly among the expanded ones."""
        copies = self.n_components**self.emission.memory
        return expected.repeat_interleave(copies, -1) / copies

    def _cast(self, rows: Batch) -> Batch:
        """Frames in the type that the emission computes with."""
        return rows.with_x(self.emission.cast(rows.x))

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        if batch.weight is not None:
            expected = expected * batch.weight.unsqueeze(-1).to(expected)
        values = self.emission.initialize(self._cast(batch), self._wide(expected))
        self.assign({f"emission.{name}": value for name, value in values.items()})

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        values = self.emission.initialize_at(self._cast(batch), index)
        self.assign({f"emission.{name}": value for name, value in values.items()})

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        values = super().maximize(stats)
        if isinstance(self.initial, Stationary):
            steps = self.transition.penalized(stats["transition"])
            joint = self.initial.maximize_jointly(stats["initial"], steps)
            values |= {f"transition.{name}": value for name, value in joint.items()}
        return values

    def occupancy(self, stats: Stats) -> Tensor | None:
        first = self.initial.unwrapped.occupancy(stats["initial"])
        steps = self.transition.unwrapped.occupancy(stats["transition"])
        return None if first is None or steps is None else first + steps

    def degenerate(self) -> Tensor | None:
        return self.emission.degenerate()

    def surprise(self, rows: Batch) -> Tensor:
        return -self.emission.log_potential(self._cast(rows)).logsumexp(-1)

    def twins(self, batch: Batch, tolerance: float = 0.0) -> list[tuple[int, int]]:
        k = self.n_components
        if self.replicas or k > 128 or self.emission.memory or not isinstance(self.transition.unwrapped, Categorical):
            return []
        rows = self.rows(batch) if batch.x.dim() == 3 else batch
        value = self.emission.log_potential(self._cast(rows)).detach().to(torch.float64)
        gap = (value.unsqueeze(-1) - value.unsqueeze(-2)).abs()
        matters = torch.ones_like(gap, dtype=torch.bool)
        if tolerance > 0 or self.emission.averages:
            # Only where one of the two is responsible does it matter whether they differ.
            share = (value + self._visited().log()).softmax(-1)
            matters = (share.unsqueeze(-1) + share.unsqueeze(-2)) > 0.01
        # States that no frame needs agree about nothing: a prior makes them equal for good.
        alike = ~(matters & (gap > tolerance)).any(0) & matters.any(0) & value.isfinite().all(0)
        pairs = [(j, i) for i, j in alike.tril(-1).nonzero().tolist()]
        return [pair for pair in pairs if self._interchangeable(*pair, max(tolerance, 1e-12))]

    def _visited(self) -> Tensor:
        """Share of the frames of a sequence that each state has before any is seen, ``[K]``."""
        law, table = self.initial_probs.detach().to(torch.float64), self.transition_matrix.detach().to(torch.float64)
        total = law
        for _ in range(_GLANCE):
            law = law @ table
            total = total + law
        return total / total.sum()

    def _interchangeable(self, a: int, b: int, tolerance: float) -> bool:
        """Whether the chain stays the same when two of its states change names."""
        order = list(range(self.n_components))
        order[a], order[b] = b, a
        table, first = self.transition_matrix.detach(), self.initial_probs.detach()
        moved = (table[order][:, order] - table).abs().max(), (first[order] - first).abs().max()
        return all(float(gap) <= tolerance for gap in moved)

    def respawn(self, batch: Batch, which: Tensor, index: Tensor) -> None:
        """Put the emissions of the states ``which [*r, K]`` at observations ``index [*r, K]``.

        Each is then entered, and left, as often as the others: a state that no other leads to would stay without mass.
        """
        found = self.emission.replace_components(which, self.emission.initialize_at(self._cast(batch), index))
        values = {f"emission.{name}": value for name, value in found.items()}
        even, shared = 1.0 / self.n_components, self.factors()
        for slot in ("initial", "transition"):
            factor = getattr(self, slot)
            # A gate learns of them in the next M-step; a table that is the emission too has its own way.
            if not isinstance(factor.unwrapped, Categorical) or len(shared[factor]) > 1:
                continue
            share = torch.where(
                which if slot == "initial" else which.unsqueeze(-2), even, factor.probs.to(torch.float64)
            )
            if slot == "transition":
                share = torch.where(which.unsqueeze(-1), even, share)
            values |= {f"{slot}.{name}": value for name, value in factor.maximize(Stats(counts=share)).items()}
        self.assign(values)

    def forbid(self, which: Tensor) -> None:
        """Take states ``which [*r, K]`` out of the chain, in place; never the last successor of another."""
        if not isinstance(self.initial, Stationary):
            self.initial.forbid(which)
        self.transition.forbid(which.unsqueeze(-2))

    def prune(self, keep: Tensor) -> None:
        """Keep only some states, in place; tables are renormalised."""
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        if not isinstance(self.initial, Stationary):
            self.initial = self.initial.pruned(index)
        self.emission = self.emission.pruned(index)
        if isinstance(self.transition.unwrapped, Categorical):
            small = self.transition.unwrapped.among(index)
            self.transition = self.transition.rewrap(small, index)
            if isinstance(self.initial, Stationary):
                self.initial = Stationary(small)
        else:  # classes of a gate are its parents, too
            self.transition = self.transition.pruned(index)
        if self.end is not None:
            self.end = self.end.pruned(index)

    # ---- data -------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        self.emission.check(batch)
        if isinstance(self.initial, Stationary):
            if self.transition.averages:
                raise invalid(
                    "initial", "a free initial law beside a posterior of the transition", "a stationary one",
                    "it has no conjugate prior: use Categorical(K)",
                )  # fmt: skip
            if self.transition is not self.initial.transition:
                raise invalid(
                    "initial", "a free initial law, or that of the model's own table",
                    f"the stationary law of a table that {type(self.transition).__name__} has replaced",
                    "use Categorical(K), or leave the transition as it is: their M-step is a joint one",
                )  # fmt: skip
            self.initial.check(batch)
        if batch.evidence is not None and batch.evidence.shape[-1] != self.n_components:
            raise invalid(
                "evidence", f"{self.n_components} columns, one per state", batch.evidence.shape[-1],
                "give a log-potential for each state",
            )  # fmt: skip
        return batch

    def stream(self, batch: Batch) -> Iterator[Batch]:
        """Sequences in pieces whose messages fit the budget, on the model's device.

        Emissions are computed in smaller pieces still, which fit the cache.
        """
        frames = max(1, batch.x.shape[1])
        states = self._states
        size = _PER_STATE * states * self.dtype.itemsize * math.prod(self.replicas)
        budget = self.memory_budget or _MESSAGES.get(self.device.type, _MESSAGES["cuda"])
        pieces = -(-len(batch) // max(1, budget // (size * frames)))
        for piece in batch.split(max(1, -(-len(batch) // max(1, pieces)))):
            if piece.x.device != self.device:
                piece = piece.map(Tensor.pin_memory) if self.device.type == "cuda" else piece
                piece = piece.to(self.device)
            yield piece


def repeated(value: Tensor, times: int) -> Tensor:
    """Several copies of a tensor, one after the other."""
    return value.repeat(times, *[1] * (value.dim() - 1))


def _going_on(potentials: dict[str, Tensor]) -> dict[str, Tensor]:
    """Potentials of sequences whose last frame need not be their end."""
    if "end" not in potentials:
        return potentials
    going = potentials["end"][..., :1]
    return {**potentials, "end": torch.cat([going, torch.zeros_like(going)], -1)}


class GaussianHMM(HMM):
    """A hidden Markov model with Gaussian emissions.

    Args:
        n_states: K.
        n_features: D.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"``, ``"spherical"``, or one of mclust's; see `Gaussian`.
        covariance_floor: Smallest variance, relative to the data's (see `Gaussian`).
        floor_type: ``"relative"``, ``"absolute"`` or ``"additive"``.

    Raises:
        InvalidArgument: For sizes below one or an unknown option.

    Source: L. R. Rabiner (1989), section IV.

    Example:
        >>> m = GaussianHMM(2, 1)
        >>> m.means, m.transition_matrix = [[-1.0], [1.0]], [[0.9, 0.1], [0.1, 0.9]]
        >>> m.most_likely(torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]))
        tensor([[0, 0, 1, 1]])
    """

    initial: Categorical
    transition: Categorical
    emission: Gaussian

    def __init__(
        self,
        n_states: int,
        n_features: int,
        covariance_type: CovarianceType = "diag",
        *,
        covariance_floor: float = 1e-6,
        floor_type: FloorType = "relative",
    ):
        emission = Gaussian(n_states, n_features, covariance_type, covariance_floor, floor_type)
        super().__init__(Categorical(n_states), Categorical(n_states, n_states), emission)
        self.n_features = n_features
        self.covariance_type = covariance_type
        self.covariance_floor = covariance_floor
        self.floor_type = floor_type

    @property
    def means(self) -> Float[Tensor, "*r k d"]:
        """Means ``[*r, K, D]``; assignable."""
        return self.emission.means

    @means.setter
    def means(self, value: Any) -> None:
        self.emission.means = value

    @property
    def covariances(self) -> Float[Tensor, "*shape"]:
        """Covariances in scikit-learn's shapes; assignable."""
        return self.emission.covariances

    @covariances.setter
    def covariances(self, value: Any) -> None:
        self.emission.covariances = value
