"""Hidden semi-Markov models: states that last for durations with a law of their own."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of, whole_number, wrong_type
from torchem.factor import Factor
from torchem.factors import Categorical, Gaussian, NegativeBinomialDuration, PoissonDuration
from torchem.factors.gaussian import CovarianceType, FloorType
from torchem.model import DiscreteModel, Reduction, Uniforms
from torchem.models.draws import Draw
from torchem.models.hmm import HMM, repeated
from torchem.models.imputation import in_turn
from torchem.ops import reduce, semi_markov
from torchem.stats import Stats

Duration = Literal["categorical", "poisson", "negative_binomial"]


class HSMM(HMM):
    """p(x, k, d) = p(k_1) p(d_1 | k_1) Π_i p(k_{i+1} | k_i) p(d_{i+1} | k_{i+1}) Π_t p(x_t | k at t): segments.

    A state is entered, lasts d = 1 … D frames, and is left for another one: no state follows itself. The first segment
    begins with the sequence. The last one may go on after its end (``censored``): it counts with the probability that
    its duration is no less than what was seen of it.

    E-step: expected states of frames, steps between segments and durations, by a forward–backward algorithm over where
    segments begin and end, in time O(T (K² + K D)). The duration of a segment that was cut off is expected in full. A
    hard or drawn E-step chooses the states of the frames; what is left of the last duration remains expected.
    M-step: each factor under them.

    Args:
        initial: ``Categorical(K)``: law of the first state.
        transition: ``Categorical(K, K)``: law of the next state. Its diagonal is taken out of its support.
        duration: ``Categorical(K, D)``, `PoissonDuration` or `NegativeBinomialDuration` of K states: law of how many
            frames a state lasts, its first entry one frame.
        emission: An observed child with K components.
        censored: Whether the last segment of a sequence may go on after it. False where sequences end with a segment.

    Raises:
        InvalidArgument: If they disagree about K, there is but one state, or a factor reads what it cannot.

    Source: J. D. Ferguson (1980); Y. Guédon (2003) for censored ends; S.-Z. Yu (2010).

    Example:
        >>> m = HSMM(Categorical(2), Categorical(2, 2), PoissonDuration(2, 10), Categorical(2, 3))
        >>> m.posterior([[0], [2], [1]]).shape
        torch.Size([1, 3, 2])
    """

    duration: Factor

    def __init__(self, initial: Factor, transition: Factor, duration: Factor, emission: Factor, censored: bool = True):
        for name, factor in (("initial", initial), ("transition", transition)):
            if not isinstance(factor, Factor) or not isinstance(factor.unwrapped, Categorical):
                raise invalid(
                    name, "a table of probabilities, for laws of segments read no covariates", type(factor).__name__,
                    "pass for example factors.Categorical(K)",
                )  # fmt: skip
        if not isinstance(duration, Factor):
            raise wrong_type("duration", "a torchem factor", duration, "pass for example factors.Categorical(K, D)")
        super().__init__(initial, transition, emission)
        k, shape = self.n_components, tuple(getattr(duration, "shape", ()))
        if len(shape) != 2 or shape[0] != k:
            raise invalid(
                "duration", f"a table of shape [{k}, D], for the {k} states of the emission", list(shape),
                "build them with the same K",
            )  # fmt: skip
        if k < 2:
            raise invalid("emission", "at least two states, for none follows itself", "one", "use a mixture or an HMM")
        if emission.memory:
            raise invalid(
                "emission", "one that depends on the present state alone", type(emission).__name__, "use an HMM"
            )
        if not isinstance(censored, bool):
            raise invalid("censored", "True or False", repr(censored), "True where sequences were cut off")
        self.duration, self.censored = duration, censored
        if transition is transition.unwrapped and self._repeats():
            self.restrict(torch.ones(k, k, dtype=torch.bool, device=self.device))

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        initial, transition, emission = super().slots()
        return initial, transition, ("duration", self.duration), emission

    def table_slots(self) -> frozenset[str]:
        return frozenset({"initial", "transition", "duration"})

    @property
    def max_duration(self) -> int:
        """D, the longest duration."""
        return int(self.duration.shape[1])  # pyright: ignore[reportArgumentType, reportIndexIssue, reportCallIssue]

    @property
    def duration_probs(self) -> Float[Tensor, "*r k d"]:
        """Probabilities ``[*r, K, D]`` of durations 1 … D; assignable where they are a table, rows sum to one."""
        return self.duration.probs  # pyright: ignore[reportReturnType]

    @duration_probs.setter
    def duration_probs(self, value: Any) -> None:
        if not isinstance(self.duration.unwrapped, Categorical):
            raise invalid(
                "duration_probs", "a table of durations to assign to", type(self.duration).__name__,
                f"assign model.duration.{next(iter(self.duration.views), '…')}",
            )  # fmt: skip
        self.duration.assign_probs(value, "duration_probs")  # pyright: ignore[reportCallIssue]

    @property
    def mean_durations(self) -> Float[Tensor, "*r k"]:
        """Expected duration ``[*r, K]`` of each state, in frames."""
        probs = self.duration_probs
        return probs @ torch.arange(1, self.max_duration + 1, dtype=probs.dtype, device=probs.device)

    @property
    def transition_matrix(self) -> Float[Tensor, "*r k k"]:
        """Probabilities ``[*r, K, K]`` of the next state, rows from; assignable, zero on the diagonal."""
        return self._table("transition").probs

    @transition_matrix.setter
    def transition_matrix(self, value: Any) -> None:
        table = as_tensor(value, "transition_matrix")
        if table.dim() > 1 and bool((table.diagonal(dim1=-2, dim2=-1) != 0).any()):
            raise invalid(
                "transition_matrix", "zeros on the diagonal: how long a state lasts is told by its duration",
                "another entry", "set it to zero and divide each row by its sum",
            )  # fmt: skip
        self._table("transition").assign_probs(value, "transition_matrix")

    def restrict(self, mask: Any) -> None:
        """Allow only some transitions, for good; see `HMM.restrict`. None leads from a state to itself."""
        allowed = as_tensor(mask, "mask").to(self.device, torch.bool)
        if allowed.dim() == 2 and allowed.shape[0] == allowed.shape[1]:
            allowed = allowed & ~torch.eye(len(allowed), dtype=torch.bool, device=allowed.device)
        super().restrict(allowed)

    # ---- inference --------------------------------------------------------------------------------------------

    def _parts(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        initial, transition, duration = (potentials[name] for name in ("initial", "transition", "duration"))
        return initial, transition, duration, self._informed(potentials, batch)

    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        return semi_markov.reference(*self._parts(potentials, batch), batch.lengths, plus, censored=self.censored)

    def log_normalizer(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        return semi_markov.log_normalizer(*self._parts(potentials, batch), batch.lengths, censored=self.censored)

    def infer(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        weight = None if batch.weight is None else batch.weight.expand(*self.replicas, -1)
        log_z, *found = semi_markov.expectations(
            *self._parts(potentials, batch), batch.lengths, weight, censored=self.censored
        )
        return log_z, dict(zip(("initial", "transition", "duration", "emission"), found, strict=True))

    def infer_hard(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = semi_markov.paths(self._parts(potentials, batch), batch.lengths, self.censored)
        return self._chosen(found, potentials, batch) if found else DiscreteModel.infer_hard(self, potentials, batch)

    def infer_sample(
        self, potentials: dict[str, Tensor], batch: Batch, uniforms: Uniforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = semi_markov.paths(self._parts(potentials, batch), batch.lengths, self.censored, uniforms)
        if found is None:
            return DiscreteModel.infer_sample(self, potentials, batch, uniforms)
        return self._chosen(found, potentials, batch)

    def _chosen(
        self, found: tuple[Tensor, Tensor, Tensor], potentials: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectations that are one path, ``[*r, N, T]`` of states and of frames lasted, for each sequence."""
        score, path, lasted = found
        gamma, _, _ = self._indicators(path, score, potentials["initial"], batch)
        begins = gamma * (lasted == 1).unsqueeze(-1)
        before, ahead = (gamma[..., :-1, :] > 0).to(gamma), begins[..., 1:, :]
        pairs = (before.flatten(-3, -2).mT @ ahead.flatten(-3, -2)).to(torch.float64).unsqueeze(-3)
        # A segment ends where the next one begins, and at the last frame.
        ends = torch.cat([ahead.sum(-1), torch.zeros_like(gamma[..., :1, 0])], -1)
        duration = potentials["duration"]
        k, d = duration.shape[-2:]
        place = (path.clamp(min=0) * d + (lasted - 1).clamp(min=0)).flatten(-2)
        counts = torch.zeros(*place.shape[:-1], k * d, dtype=torch.float64, device=place.device)
        whole = counts.scatter_add(-1, place, ends.flatten(-2).to(torch.float64)).unflatten(-1, (k, d))
        last = torch.where(self._last(batch), gamma.sum(-1), 0.0)
        final = counts.scatter_add(-1, place, last.flatten(-2).to(torch.float64)).unflatten(-1, (k, d))
        if self.censored:
            final = semi_markov.remaining(final, duration.squeeze(-3).to(torch.float64))
        first = gamma[..., 0, :].to(torch.float64).sum(-2, keepdim=True)
        expected = {
            "initial": first.sum_to_size(potentials["initial"].shape), "transition": pairs,
            "duration": (whole + final).unsqueeze(-3), "emission": gamma,
        }  # fmt: skip
        return score, {name: value.to(potentials[name]) for name, value in expected.items()}

    def occupancy(self, stats: Stats) -> Tensor | None:
        """Expected frames of each state, ``[*r, K]``, with those that segments are cut off by."""
        counts = stats["duration"].get("counts")
        if counts is None:
            return None
        return counts @ torch.arange(1, self.max_duration + 1, dtype=counts.dtype, device=counts.device)

    # ---- use --------------------------------------------------------------------------------------------------

    def _present(self, value: Tensor) -> Tensor:
        """What is known of states and how long they have lasted, of states alone."""
        return value if value.shape[-1] == self.n_components else value.unflatten(-1, (self.n_components, -1)).sum(-1)

    def _filtered(self, potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        return semi_markov.filter(*self._parts(potentials, batch), batch.lengths, censored=self.censored)

    def _best(self, potentials: dict[str, Tensor], batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        return semi_markov.best_paths(self._parts(potentials, batch), count, batch.lengths, self.censored)

    def _paths(self, potentials: dict[str, Tensor], piece: Batch, n: int, generator: torch.Generator | None) -> Tensor:
        def uniforms(shape: torch.Size) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator).to(self.device)

        found = []
        for times in in_turn(n, piece.x.shape[:2].numel()):
            many = Batch(piece.x, lengths=piece.lengths, evidence=piece.evidence).map(lambda v, m=times: repeated(v, m))
            own = {**potentials, "emission": repeated(potentials["emission"], times)}
            share = self.infer_sample(own, many, uniforms)[1]["emission"]
            path = torch.where(share.sum(-1) > 0, reduce.first_max(share), -1)
            found.append(path.unflatten(0, (times, len(piece))))
        return torch.cat(found)

    def most_likely(self, data: Any, **fields: Any) -> Int[Tensor, "*r n t"]:
        """The most likely states of the frames, ``[N, T]`` (Viterbi); −1 in the padding and where there are none."""

        def best(potentials: dict[str, Tensor], batch: Batch) -> Tensor:
            bare = Batch(batch.x, lengths=batch.lengths, evidence=batch.evidence)
            share = self.infer_hard(potentials, bare)[1]["emission"]
            return torch.where(share.sum(-1) > 0, reduce.first_max(share), -1)

        return self._each(self._read(data, fields), best)

    def _latest(self, batch: Batch) -> Tensor:
        # How long the present segment has lasted counts.
        return self._each(batch, lambda p, b: semi_markov.lasting(*self._parts(p, b), b.lengths).flatten(-2))

    def _onward(self, code: Tensor, ahead: Batch) -> Tensor:
        law, found = code.unflatten(-1, (self.n_components, -1)), []
        tables = self.transition.log_table(ahead), self.duration.log_table(ahead)
        for _ in range(ahead.x.shape[1]):
            law = semi_markov.onward(law, *tables)
            found.append(law.sum(-1))
        return torch.stack(found, -2)

    def _future(self, code: Tensor, ahead: Batch, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        state, lasted = code // self.max_duration, code % self.max_duration
        # A duration that is no less than what was seen of it.
        longer = torch.arange(self.max_duration, device=code.device) >= lasted.unsqueeze(-1)
        draw = self._draw(0, 1, None, generator)
        left = draw.pick(torch.where(longer, self.duration_probs[state], 0.0)) - lasted
        path = draw.segments(state, left, ahead.x.shape[1] + 1)
        return path[:, :0], path[:, 1:]

    def _draw(self, n: int, length: int | None, inputs: Any, generator: torch.Generator | None) -> "_SegmentDraw":
        return _SegmentDraw(self, n, length, inputs, generator)

    # ---- health -----------------------------------------------------------------------------------------------

    def _interchangeable(self, a: int, b: int, tolerance: float) -> bool:
        law = self.duration_probs.detach()
        return float((law[a] - law[b]).abs().max()) <= tolerance and super()._interchangeable(a, b, tolerance)

    def prune(self, keep: Tensor) -> None:
        """Keep only some states, in place; tables are renormalised."""
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        if len(index) < 2:
            raise invalid("dead", "two states that are left, for none follows itself", len(index), "use an HMM")
        super().prune(index)
        self.duration = self.duration.pruned(index)
        if self._repeats():  # a state that has lost its successors has all others
            self.restrict(torch.ones(len(index), len(index), dtype=torch.bool, device=self.device))

    def _repeats(self) -> bool:
        """Whether the table of transitions allows steps from a state to itself."""
        support: Tensor = self.transition.unwrapped.support  # pyright: ignore[reportAssignmentType]
        return bool(support.diagonal(dim1=-2, dim2=-1).any())

    def check(self, batch: Batch) -> Batch:
        super().check(batch)
        if self._repeats():
            raise invalid(
                "transition", "a table without steps from a state to itself", "one with such steps",
                "assign model.transition_matrix with zeros on its diagonal",
            )  # fmt: skip
        return batch


class _SegmentDraw(Draw):
    """Sequences drawn segment by segment, and cut off at the length."""

    model: HSMM

    def _states(self, n: int, length: int, u: Tensor | None) -> Tensor:
        z = self.pick(self.model.initial_probs.expand(n, -1))
        return self.segments(z, self.pick(self.model.duration_probs[z]), length)

    def segments(self, z: Tensor, left: Tensor, length: int) -> Tensor:
        """States ``[n, length]`` from a first one ``z [n]`` that goes on for so many frames more."""
        lasts, step, path = self.model.duration_probs, self.model.transition_matrix, []
        for _ in range(length):
            path.append(z)
            over, left = left == 0, left - 1
            z = torch.where(over, self.pick(step[z]), z)
            left = torch.where(over, self.pick(lasts[z]), left)
        return torch.stack(path, 1)


class GaussianHSMM(HSMM):
    """A hidden semi-Markov model with Gaussian emissions.

    Args:
        n_states: K.
        n_features: D, the number of columns.
        max_duration: The longest that a state may last, in frames.
        duration: ``"categorical"`` (a probability for each duration), ``"poisson"`` or ``"negative_binomial"``.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"``, ``"spherical"``, or one of mclust's; see `Gaussian`.
        covariance_floor: Smallest variance, relative to the data's (see `Gaussian`).
        floor_type: ``"relative"``, ``"absolute"`` or ``"additive"``.
        censored: Whether the last segment of a sequence may go on after it.

    Raises:
        InvalidArgument: For sizes out of range or an unknown option.

    Example:
        >>> m = GaussianHSMM(2, 1, max_duration=3)
        >>> m.means, m.duration_probs = [[-1.0], [1.0]], [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
        >>> m.most_likely(torch.tensor([[-1.0], [0.1], [1.0], [-0.1]]))
        tensor([[0, 0, 1, 1]])
    """

    initial: Categorical
    transition: Categorical
    emission: Gaussian

    kinds: ClassVar = {
        "categorical": Categorical, "poisson": PoissonDuration, "negative_binomial": NegativeBinomialDuration
    }  # fmt: skip

    def __init__(
        self,
        n_states: int,
        n_features: int,
        max_duration: int,
        duration: Duration = "categorical",
        covariance_type: CovarianceType = "diag",
        *,
        covariance_floor: float = 1e-6,
        floor_type: FloorType = "relative",
        censored: bool = True,
    ):
        one_of("duration", duration, tuple(self.kinds))
        whole_number("max_duration", max_duration, 1, "count frames")
        emission = Gaussian(n_states, n_features, covariance_type, covariance_floor, floor_type)
        law = self.kinds[duration](n_states, max_duration)
        super().__init__(Categorical(n_states), Categorical(n_states, n_states), law, emission, censored)
        self.n_features = n_features
        self.duration_type: Duration = duration
        self.covariance_type = covariance_type
        self.covariance_floor = covariance_floor
        self.floor_type = floor_type

    def config(self) -> dict[str, Any]:
        names = ("n_states", "n_features", "max_duration", "covariance_type", "covariance_floor", "floor_type")
        return {name: getattr(self, name) for name in names} | {
            "duration": self.duration_type, "censored": self.censored
        }  # fmt: skip

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
