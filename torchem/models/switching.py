"""Switching linear dynamics: a continuous state whose law of motion is chosen by a hidden Markov chain."""

import functools
import math
import operator
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, whole_number
from torchem.factor import Factor
from torchem.factors import Categorical, LinearGaussian
from torchem.model import EStep, LatentModel, weighted
from torchem.models.gauss_markov import (
    CovarianceType,
    Enters,
    GaussMarkovModel,
    Law,
    Plan,
    lookable,
    normal_law,
    root_of,
)
from torchem.models.imputation import Gaps, in_turn, places
from torchem.ops import chain, kalman, linalg, reduce
from torchem.ops.dispatch import declared_precision
from torchem.ops.gaussian import LOG_2PI
from torchem.stats import Stats

#: Paths of regimes up to which a likelihood is summed over all of them.
_PATHS = 4096
#: Sequences that are filtered at a time for it.
_AT_ONCE = 1 << 12
#: Starts of the regressions that begin the laws of steps, and EM iterations of each.
_TRIES, _BEGIN = 5, 20
#: Probability that a regime goes on, in a first guess.
_STAY = 0.9


@dataclass(frozen=True, eq=False)
class SwitchingPosterior:
    """q(z) q(s) of the states and the regimes of each sequence.

    Attributes:
        states: Laws of the states, batch ``[N, T]``; padding repeats the last frame's.
        regimes: Probability of each regime in each frame, ``[N, T, K]``; zeros in the padding.
    """

    states: MultivariateNormal
    regimes: Tensor

    @property
    def mean(self) -> Tensor:
        """Means of the states, ``[N, T, L]``."""
        return self.states.mean

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariances of the states, ``[N, T, L, L]``."""
        return self.states.covariance_matrix


class SwitchingLinearDynamics(GaussMarkovModel):
    """A state that moves by one of K linear laws, as a Markov chain of regimes says, seen through noise.

        s_1 ~ π,  s_t ~ P(s_{t−1}, ·),  z_1 ~ N(μ, Π),  z_t ~ N(A_s z_{t−1} + B_s u_t, Q_s) with s = s_t,
        x_t ~ N(C z_t + D u_t, R)

    The posterior is a mixture of K^T normal laws. Instead q(z) q(s) is fitted, each chain kept exact: a Kalman smoother
    under expected laws of steps, and forward–backward under the expected fit of each law, in turn until the bound is
    still. That is coordinate ascent of the evidence lower bound E_q log p(x, z, s) + H(q), the objective of EM. M-step:
    tables under expected counts, and regressions under the moments of the states in each regime.

    So that the bound never falls, an E-step in a fit sets out from where the last one on the same data ended: on the
    same `Batch`, as long as it lives, or on the batch that a loader gives in the same place of each pass.

    NaN entries and whole frames of x are missing at random. The regime of the first frame has no step to explain.
    Labels are of regimes: known ones, sets of candidates or soft labels are potentials of their chain; where all are
    known nothing is approximated. Hard and sampled E-steps and annealing are refused: the states are continuous.

    Args:
        n_states: K, the number of regimes.
        n_latents: L, columns of the state.
        n_features: D, columns of an observation.
        n_inputs: M, columns of the covariates u; 0 for none.
        covariance_type: Of the observations' noise R: ``"full"``, ``"diag"`` or ``"spherical"``.
        dynamics_covariance_type: Of the steps' noises Q_k, likewise.
        inputs: Where covariates enter: ``"both"``, ``"dynamics"`` or ``"observation"``.
        covariance_floor: Smallest variance, relative to that of the data (of the state: of its first guess).
        tolerance: Rise of the bound per frame, in nats, below which the ascent on a sequence is over.
        max_sweeps: Most updates of both chains in an E-step.

    Raises:
        InvalidArgument: For sizes or options out of range.

    Source: Z. Ghahramani, G. E. Hinton (2000), section 4, for the structured posterior; K. P. Murphy (1998) for
        switching dynamics.

    Example:
        >>> m = SwitchingLinearDynamics(2, 1, 1)
        >>> q = m.posterior(torch.zeros(5, 1))
        >>> q.mean.shape, q.regimes.shape
        (torch.Size([1, 5, 1]), torch.Size([1, 5, 2]))
    """

    regime: Categorical
    switching: Categorical

    def __init__(
        self,
        n_states: int,
        n_latents: int,
        n_features: int,
        n_inputs: int = 0,
        *,
        covariance_type: CovarianceType = "full",
        dynamics_covariance_type: CovarianceType = "full",
        inputs: Enters = "both",
        covariance_floor: float = 1e-6,
        tolerance: float = 1e-7,
        max_sweeps: int = 50,
    ):
        whole_number("n_states", n_states, 1)
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise invalid("tolerance", "a finite number of at least 0", repr(tolerance), "the default is 1e-7 nats")
        whole_number("max_sweeps", max_sweeps, 1)
        super().__init__(
            n_latents, n_features, n_inputs, n_states, covariance_type, dynamics_covariance_type, inputs,
            covariance_floor, None,
        )  # fmt: skip
        self.n_states, self.tolerance, self.max_sweeps = n_states, float(tolerance), max_sweeps
        self.regime, self.switching = Categorical(n_states), Categorical(n_states, n_states)
        # Where ascents ended, on batches that live on and on those of places in a fit's passes.
        self._met = weakref.WeakKeyDictionary[Batch, Tensor]()
        self._places: dict[Hashable, tuple[Tensor, tuple[float, ...]]] = {}
        self._place: Hashable = None

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return (
            ("regime", self.regime), ("switching", self.switching), ("initial", self.initial),
            ("transition", self.transition), ("observation", self.observation),
        )  # fmt: skip

    def table_slots(self) -> frozenset[str]:
        return frozenset({"regime", "switching"})

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.observation.replicas

    @property
    def labelled(self) -> int:
        """K: labels are of regimes."""
        return self.n_states

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def initial_probs(self) -> Float[Tensor, "*r k"]:
        """Probabilities of the first regime ``[*r, K]``; assignable."""
        return self.regime.probs

    @initial_probs.setter
    def initial_probs(self, value: Any) -> None:
        self.regime.assign_probs(value, "initial_probs")

    @property
    def transition_matrix(self) -> Float[Tensor, "*r k k"]:
        """Probabilities ``[*r, K, K]`` of each step of the regime, rows from; assignable, zeros stay zero."""
        return self.switching.probs

    @transition_matrix.setter
    def transition_matrix(self, value: Any) -> None:
        self.switching.assign_probs(value, "transition_matrix")

    @property
    def dynamics(self) -> Float[Tensor, "*r k l l"]:
        """A_k, how a state follows from that before in each regime, ``[*r, K, L, L]``; assignable."""
        return self.transition.weight[..., : self.n_latents]

    @dynamics.setter
    def dynamics(self, value: Any) -> None:
        self._set_steps("dynamics", slice(0, self.n_latents), value)

    @property
    def dynamics_inputs(self) -> Float[Tensor, "*r k l m"]:
        """B_k, what covariates add to a step, ``[*r, K, L, M]``; assignable where they enter the dynamics."""
        return self.transition.weight[..., self.n_latents :]

    @dynamics_inputs.setter
    def dynamics_inputs(self, value: Any) -> None:
        self._set_steps("dynamics_inputs", slice(self.n_latents, None), value)

    def _set_steps(self, name: str, columns: slice, value: Any) -> None:
        weight = self.transition.weight.detach().to(torch.float64).clone()
        given = as_tensor(value, name).to(self.device, torch.float64)
        shape = list(weight[..., columns].shape)
        if list(given.shape) != shape:
            raise invalid(name, f"shape {shape}", list(given.shape), "give a matrix for each regime")
        if not bool(given.isfinite().all()):
            raise invalid(name, "finite numbers", "NaN or infinity", "correct that entry")
        weight[..., columns] = given
        self.transition.weight = weight

    @property
    def dynamics_covariances(self) -> Float[Tensor, "*shape"]:
        """Covariances Q_k of a step's noise, ``[*r, K, L, L]``; ``[*r, K, L]`` or ``[*r, K]``; assignable."""
        return self.transition.covariances

    @dynamics_covariances.setter
    def dynamics_covariances(self, value: Any) -> None:
        try:
            self.transition.covariances = value
        except ValueError as error:
            raise type(error)(str(error).replace("covariances:", "dynamics_covariances:", 1)) from error

    # ---- inference --------------------------------------------------------------------------------------------

    def _problem(self, batch: Batch, certain: bool = False) -> "_Problem":
        first, seen = (Law.of(f.quadratic(), self.n_latents) for f in (self.initial, self.observation))
        steps = _Steps.of(self.transition, self.n_latents)
        tables = self.regime.table_potential(batch), self.switching.table_potential(batch)
        if certain:
            first, seen, steps = first.certain(), seen.certain(), steps.certain()
            tables = self.regime.log_table(batch), self.switching.log_table(batch)
        plan = Plan(batch, first, steps.first(), seen, self.dtype, alone=True)
        return _Problem(plan, steps, tables, self._roots())

    def _infer(self, batch: Batch, start: Tensor | None = None, weight: Tensor | None = None) -> "_Found":
        """q of a piece, and weighted counts of regimes."""
        problem = self._problem(batch)
        regimes = problem.even(self.replicas) if start is None else start
        best: Tensor | None = None
        going: Tensor | None = None
        frames = batch.frames().to(self.dtype)
        # The last sweep, which all sequences take part in, is that of the statistics.
        for _ in range(self.max_sweeps - 1):
            found = problem.sweep(regimes)
            if best is None or going is None:
                regimes, best, going = found.regimes, found.value, torch.ones_like(found.value, dtype=torch.bool)
                continue
            going = going & (found.value - best > self.tolerance * frames)
            # A step that fell short of the tolerance is the last; it is made again in the sweep of the statistics.
            regimes = torch.where(going[..., None, None], found.regimes, regimes)
            best = torch.where(going, found.value, best)
            if lookable() and not bool(going.any()):
                break
        return problem.sweep(regimes, weight)

    def e_step(self, batch: Batch, kind: EStep = "soft") -> Stats:
        """Expected statistics under q; ``log_likelihood`` is the evidence lower bound.

        Raises:
            InvalidArgument: For a hard or sampled E-step: the states are continuous.
        """
        if kind != "soft":
            raise invalid("e_step", "'soft', for the latents are continuous", repr(kind), "use a discrete model")
        with declared_precision(self.device):
            parts = [self._stats(piece, found) for piece, found in self._ascents(batch)]
            total = functools.reduce(operator.add, parts)
            total["entropy"] = total["log_likelihood"] - self.expected_log_prob(total)
            total["count"] = self.count(batch).to(total["entropy"]).expand_as(total["entropy"])
        return total

    def _ascents(self, batch: Batch) -> Iterator[tuple[Batch, "_Found"]]:
        """Pieces of a batch with q of each, from where the last ascent on these data ended."""
        start, row, ends = self._start(batch), 0, []
        for piece in self.stream(batch):
            warm = None if start is None else start.narrow(-3, row, len(piece))
            row += len(piece)
            found = self._infer(piece, warm, piece.weight)
            ends.append(found.regimes)
            yield piece, found
        self._remember(batch, ends)

    def _stats(self, batch: Batch, found: "_Found") -> Stats:
        stats = Stats()
        stats["regime"] = self.regime.table_stats(batch, found.first)
        stats["switching"] = self.switching.table_stats(batch, found.steps)
        moments = found.problem.plan.moments(found.smoothed)
        stats["initial"] = self.initial.moment_stats(*moments[0])
        stats["transition"] = self.transition.moment_stats(*found.problem.in_regimes(found))
        stats["observation"] = self.observation.moment_stats(*moments[2])
        stats["log_likelihood"] = weighted(found.value, batch)
        return stats

    def visit(self, key: Hashable) -> None:
        self._place = key

    def _start(self, batch: Batch) -> Tensor | None:
        """Where the last ascent on these data ended, in a fit: derivatives and transforms see none of it."""
        if not self._remembers():
            return None
        known = self._met.get(batch)
        if known is None and self._place in self._places:
            known, mark = self._places[self._place]
            # A loader may give other data in the same place than before.
            known = known if mark == _mark(batch) else None
        if known is None or known.shape[:-1] != (*self.replicas, *batch.x.shape[:2]):
            return None
        return known.to(self.device, self.dtype)

    def _remember(self, batch: Batch, ends: list[Tensor]) -> None:
        if not self._remembers():
            return
        whole = ends[0] if len(ends) == 1 else torch.cat(ends, -3)
        if self._place is None:
            self._met[batch] = whole
        else:
            self._places[self._place] = whole, _mark(batch)

    def _remembers(self) -> bool:
        return not torch.is_grad_enabled() and lookable()

    # ---- use --------------------------------------------------------------------------------------------------

    def elbo(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """The evidence lower bound of each sequence, ``[N]``, below `log_prob` by the divergence of q.

        The ascent sets out anew; in a fit it goes on from where it was, and may end elsewhere.
        """
        return self._each(data, fields, lambda batch: self._infer(batch).value)

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each sequence, exact, by a Kalman filter for each path of regimes; see `elbo` for longer ones.

        Raises:
            InvalidArgument: If a sequence has more than 4096 paths.
        """
        batch = self._read(data, fields)
        paths = self.n_states ** (batch.x.shape[1] - 1)
        if paths > _PATHS:
            raise invalid(
                "log_prob", f"at most {_PATHS} paths of regimes, for exact inference",
                f"{self.n_states}^{batch.x.shape[1] - 1}", "use elbo, a lower bound",
            )  # fmt: skip
        return self._each(batch, {}, self._exact)

    def _exact(self, piece: Batch) -> Tensor:
        n, t = piece.x.shape[:2]
        each = [torch.arange(self.n_states, device=piece.x.device)] * (t - 1)
        paths = torch.cartesian_prod(*each).reshape(-1, t - 1) if each else piece.x.new_zeros(1, 0, dtype=torch.long)
        values = []
        for some in paths.split(max(1, _AT_ONCE // max(1, n))):
            many = piece[torch.arange(n, device=piece.x.device).repeat(len(some))]
            problem = self._problem(many, certain=True)
            value = problem.along(some.repeat_interleave(n, 0))
            values.append(value.unflatten(-1, (len(some), n)))
        return reduce.logsumexp(torch.cat(values, -2), -2).to(self.dtype)

    def log_score(self, batch: Batch) -> Tensor:
        """`log_prob` where sequences have few enough paths for it, else `elbo`."""
        return self.elbo(batch) if self.scored_by_bound(batch) else self.log_prob(batch)

    def scored_by_bound(self, batch: Batch) -> bool:
        return self.n_states ** (batch.x.shape[1] - 1) > _PATHS

    def entropy(self, batch: Batch) -> Tensor:
        """Weighted entropy of q: differential, of states and of what is missing, and that of regimes; ``[*r]``."""
        total = self.e_step(batch)["entropy"]
        if batch.evidence is None:
            return total
        with declared_precision(self.device):
            known = [weighted(found.problem.told(found.regimes), piece) for piece, found in self._ascents(batch)]
        return total - torch.stack(known).sum(0)

    def posterior(self, data: Any, **fields: Any) -> SwitchingPosterior:
        """q of the states and the regimes: ``.mean [N, T, L]``, ``.covariance_matrix`` and ``.regimes [N, T, K]``.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``inputs``, ``lengths``, … as for `LatentModel.batch`.
        """

        def laws(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            found = self._infer(batch)
            return *found.problem.plan.laws(found.smoothed), found.regimes

        mean, covariance, regimes = self._each(data, fields, laws)
        return SwitchingPosterior(normal_law(mean, covariance), regimes)

    def most_likely(self, data: Any, **fields: Any) -> Int[Tensor, "*r n t"]:
        """The most likely path of regimes under the expected fit of each law, ``[N, T]``; −1 in the padding.

        Source: A. J. Viterbi (1967).
        """

        def path(batch: Batch) -> Tensor:
            found = self._infer(batch)
            return chain.viterbi(*found.problem.of_regimes(found.second), batch.lengths)[1]

        with torch.no_grad():
            return self._each(data, fields, path)

    def _smoothed(self, piece: Batch) -> tuple[Plan, kalman.Smoothed]:
        found = self._infer(piece)
        return found.problem.plan, found.smoothed

    def _latest(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        def laws(piece: Batch) -> tuple[Tensor, Tensor, Tensor]:
            found = self._infer(piece)
            mean, covariance = found.problem.plan.laws(found.smoothed)
            place = (piece.frames() - 1).view(-1, 1, 1).expand(-1, 1, self.n_states)
            return mean[:, -1], covariance[:, -1], found.regimes.gather(1, place).squeeze(1)

        return self._each(batch, {}, laws)

    def _switches(self) -> tuple[Tensor, Tensor]:
        return self.initial_probs, self.transition_matrix

    def _latents(self, z: Tensor, path: Tensor) -> tuple[Tensor, Tensor]:
        return z, path

    @torch.no_grad()
    def sample_posterior(
        self, data: Any, n: int = 1, *, generator: torch.Generator | None = None, **fields: Any
    ) -> tuple[Float[Tensor, "n_draws n t l"], Int[Tensor, "n_draws n t"]]:
        """``n`` draws of the paths of states ``[n, N, T, L]`` and of regimes ``[n, N, T]`` from q.

        In q they are independent of each other.
        """
        whole_number("n", n, 1, "give the number of draws")
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")

        def paths(piece: Batch) -> tuple[Tensor, Tensor]:
            found = self._infer(piece)
            first, step, fit = found.problem.of_regimes(found.second)
            many = [chain.sample(first, step, fit, piece.lengths, generator) for _ in range(n)]
            return found.drawn(n, generator).transpose(0, 1), torch.stack(many, 1)

        states, regimes = self._each(data, fields, paths)
        return states.transpose(0, 1), regimes.transpose(0, 1)

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: whole paths of states from q, and the frames given these."""
        place = places(gaps.batch, gaps.index, self.device)

        def completed(piece: Batch) -> Tensor:
            found, times = self._infer(piece), in_turn(draws, piece.x.shape[:2].numel())
            parts = [found.problem.plan.completed_along(found.drawn(m, generator), generator) for m in times]
            return torch.cat(parts).transpose(0, 1)

        whole = self._each(replace(gaps.batch, weight=None), {}, completed).transpose(0, 1)
        return whole.flatten(1, 2)[:, place]

    # ---- starts and state -------------------------------------------------------------------------------------

    def _begin_steps(
        self, after: Tensor, now: Tensor, mass: Tensor, known: Tensor | None,
        moments: Callable[[], tuple[Tensor, ...]],
    ) -> None:  # fmt: skip
        """A mixture of regressions of first scores on those before them, the best of a few; regimes that last."""
        many = after.dim() > 2
        pairs = zip(after, now, strict=True) if many else [(after, now)]
        found = [self._regressions(y, v, mass, known, r) for r, (y, v) in enumerate(pairs)]
        parts = {name: torch.stack([own[name] for own in found]) if many else found[0][name] for name in found[0]}
        factor = self.transition.unwrapped
        kept = {name: factor.keep_frozen(name, value.to(self.dtype)) for name, value in parts.items()}
        prefix = next(iter(self.transition.views.values())).rpartition(".")[0]
        self.assign({f"transition.{prefix + '.' if prefix else ''}{name}": value for name, value in kept.items()})
        k = self.n_states
        stay = torch.full((k, k), (1 - _STAY) / max(1, k - 1), dtype=torch.float64, device=self.device)
        stay.fill_diagonal_(_STAY if k > 1 else 1.0)
        for slot, share in (("regime", torch.full((k,), 1 / k).to(stay)), ("switching", stay)):
            table = getattr(self, slot)
            # As much as there is data: a posterior of the table is then as sure as it will be.
            counts = Stats(counts=(mass.sum() * share / k).expand(*self.replicas, *share.shape))
            values = table.maximize(table.penalized(counts))
            self.assign({f"{slot}.{name}": value for name, value in values.items()})

    def _regressions(
        self, after: Tensor, now: Tensor, mass: Tensor, known: Tensor | None, replica: int
    ) -> dict[str, Tensor]:
        """Parameters of K regressions of ``after [F, L]`` on ``now [F, L + M]``; labels say which are whose."""
        own = self.transition
        generator = self._generators[replica] if replica < len(self._generators) else torch.Generator().manual_seed(0)
        batch, k = Batch(after, u=now), self.n_states
        best: tuple[float, dict[str, Tensor]] | None = None
        told = torch.zeros(len(after), k).to(after) if known is None else known.to(after)
        for _ in range(_TRIES if k > 1 else 1):
            line = LinearGaussian(k, own.n_inputs, own.n_outputs, self.dynamics_covariance_type, (), 1e-3).double()
            line = line.to(after.device)
            index = torch.randint(len(after), (k,), generator=generator).to(after.device)
            share, value = line.near(batch, index).to(torch.float64), -math.inf
            share = (share.clamp(min=1e-300).log() + told).softmax(-1)
            log_weight = torch.full((k,), -math.log(k)).to(share)
            for _ in range(_BEGIN):
                heavy = share * mass.unsqueeze(-1)
                for name, new in line.maximize(line.stats(batch, heavy)).items():
                    line.get_parameter(name).data = new
                log_weight = (heavy.sum(0) / heavy.sum()).clamp(min=1e-12).log()
                joint = line.log_prob(batch) + log_weight + told
                value, share = float((joint.logsumexp(-1) * mass).sum()), joint.softmax(-1)
            if best is None or value > best[0]:
                best = value, {name: p.detach().clone() for name, p in line.named_parameters()}
        assert best is not None
        return best[1]

    def take_replicas(self, index: Tensor | int) -> "LatentModel":
        twin = super().take_replicas(index)
        assert isinstance(twin, SwitchingLinearDynamics)
        if self.replicas:
            for batch, ended in self._met.items():
                if ended.dim() == 4:
                    twin._met[batch] = ended[index]
            twin._places = {key: (e[index], mark) for key, (e, mark) in self._places.items() if e.dim() == 4}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Where ascents ended belongs to batches of this process.
        return {**self.__dict__, "_met": None, "_places": {}, "_place": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_met": weakref.WeakKeyDictionary()})


def _mark(batch: Batch) -> tuple[float, ...]:
    """Numbers that differ for other data of the same shape, or in another order."""
    x = batch.x.to(torch.float64).nan_to_num(nan=0.5).flatten(1)
    place = torch.arange(len(x), device=x.device, dtype=torch.float64)
    rows = x @ torch.linspace(1, 2, x.shape[1], device=x.device, dtype=torch.float64)
    known = torch.zeros_like(rows) if batch.evidence is None else batch.evidence.to(rows).exp().flatten(1).sum(1)
    told = float(place @ known)
    return len(x), x.shape[1], float(rows.sum()), float((place + 1).log() @ rows), float(batch.frames().sum()), told


@dataclass(frozen=True)
class _Steps:
    """The K laws of a step as quadratics.

    Attributes:
        precision: P_k, ``[*r, K, L, L]``.
        states: A_k, ``[*r, K, L, L]``.
        inputs: B_k, ``[*r, K, L, M]``; None where covariates do not enter.
        height: log-density at its mean with what an expectation takes off, ``[*r, K]``.
        factor: Lower factors of the noises, ``[*r, K, L, L]``.
        penalty: ``[*r, K, L + M, L + M]``, or None.
    """

    precision: Tensor
    states: Tensor
    inputs: Tensor | None
    height: Tensor
    factor: Tensor
    penalty: Tensor | None

    @classmethod
    def of(cls, factor: Factor, latents: int) -> "_Steps":
        law = factor.quadratic()
        root = linalg.inverse_factor(law.factor)
        scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * latents * LOG_2PI
        inputs = law.weight[..., latents:] if law.weight.shape[-1] > latents else None
        return cls(root.mT @ root, law.weight[..., :latents], inputs, scale + law.offset, law.factor, law.penalty)

    def certain(self) -> "_Steps":
        """As if its parameters were known."""
        k = self.states.shape[-1]
        root = linalg.inverse_factor(self.factor)
        height = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * k * LOG_2PI
        return replace(self, height=height, penalty=None)

    def first(self) -> Law:
        """The first of them, certain and without covariates: what stands in for a step until regimes are known."""
        one = self.states[..., 0, :, :]
        return Law(self.factor[..., 0, :, :], one, one, None, torch.zeros_like(one[..., 0, 0]), None)

    def weight(self) -> Tensor:
        """``[*r, K, L, L + M]``."""
        return self.states if self.inputs is None else torch.cat([self.states, self.inputs], -1)


@dataclass(frozen=True)
class _Found:
    """q of a piece after a sweep.

    Attributes:
        problem: What it is of.
        value: Evidence lower bound of each sequence, ``[*r, N]``, float64.
        smoothed: q(z).
        second: E[(y, v)(y, v)ᵀ] of each state y and what its step reads, v, ``[*r, N, T − 1, …]``, float64.
        regimes: q(s_t), ``[*r, N, T, K]``.
        first: Weighted expectations of first regimes, ``[*r, 1, K]``.
        steps: Weighted expectations of their steps, ``[*r, 1, K, K]``.
    """

    problem: "_Problem"
    value: Tensor
    smoothed: kalman.Smoothed
    second: Tensor
    regimes: Tensor
    first: Tensor
    steps: Tensor

    def drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Paths of states from q(z), ``[n, N, T, L]``: each state given the one before it."""
        mean, covariance = (value.to(torch.float64) for value in self.problem.plan.laws(self.smoothed))
        cross = self.smoothed.cross.to(torch.float64).transpose(-4, -3)
        shape = (n, *mean.shape)
        noise = torch.randn(shape, dtype=torch.float64, device=mean.device, generator=generator).unsqueeze(-1)
        gap = root_of(covariance[:, 0]) @ noise[:, :, 0]
        path = [gap]
        for t in range(1, shape[2]):
            gain = torch.linalg.solve(covariance[:, t - 1], cross[:, t - 1].mT).mT
            left = covariance[:, t] - gain @ cross[:, t - 1].mT
            gap = gain @ gap + root_of(left) @ noise[:, :, t]
            path.append(gap)
        return mean + torch.stack(path, 2).squeeze(-1)


@dataclass(frozen=True)
class _Problem:
    """A piece of data under laws of steps, and tables of regimes."""

    plan: Plan
    laws: _Steps
    tables: tuple[Tensor, Tensor]
    square_root: bool

    def even(self, replicas: tuple[int, ...]) -> Tensor:
        """Regimes of which no more is known than labels say."""
        n, t = self.plan.x.shape[:2]
        k = self.laws.states.shape[-3]
        inside, known = self.plan.inside, self.plan.batch.evidence
        even = torch.full((*replicas, n, t, k), 1 / k).to(self.plan.x)
        if known is not None:
            even = known.to(even).softmax(-1).nan_to_num(1 / k).expand(even.shape)
        return even if inside is None else torch.where(inside.unsqueeze(-1), even, 0.0)

    def _mixed(self, regimes: Tensor) -> tuple[kalman.GaussMarkov, Tensor, Tensor, Tensor]:
        """The chain of states under expected laws of steps, and what these add to potentials of the states before.

        Σ_k γ_k |z′ − A_k z − b_k|²_k = |z′ − Ā z − b̄|² + Σ_k γ_k |(A_k − Ā) z + (b_k − b̄)|²_k, with means weighted by
        γ_k P_k: the first is a step, the second a potential W, h, c of the state before it.
        """
        laws, base = self.laws, self.plan.chain()
        # Beyond the end of a sequence, and where labels leave no path of regimes, there is no posterior of them.
        share = torch.where(regimes.sum(-1, keepdim=True) > 0, regimes, 1 / regimes.shape[-1])

        def mix(value: Tensor) -> Tensor:
            """Σ_k γ_tk value_k ``[*r, N, T, …]`` of ``[*r, K, …]``."""
            lead = len(share.shape) - 3
            return (
                (share.flatten(-3, -2) @ value.flatten(lead + 1))
                .unflatten(-1, value.shape[lead + 1 :])
                .unflatten(lead, share.shape[-3:-1])
            )

        precision = mix(laws.precision)
        root = linalg.inverse_factor(linalg.cholesky(precision))
        noise = root.mT @ root
        dynamics = noise @ mix(laws.precision @ laws.states)
        gap = laws.states.unsqueeze(-4).unsqueeze(-4) - dynamics.unsqueeze(-3)  # [*r, N, T, K, L, L]
        each = laws.precision.unsqueeze(-4).unsqueeze(-4) * share[..., None, None]
        more = (gap.mT @ each @ gap).sum(-3)
        linear = torch.zeros_like(dynamics[..., 0])
        scale = linalg.inverse_factor(linalg.cholesky(noise)).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = (share * laws.height.unsqueeze(-2).unsqueeze(-2)).sum(-1) - scale
        constant = constant + 0.5 * dynamics.shape[-1] * LOG_2PI
        drift = None
        if laws.inputs is not None and self.plan.u is not None:
            u = self.plan.u
            own = (laws.inputs.unsqueeze(-4).unsqueeze(-4) @ u[..., None, :, None]).squeeze(-1)  # [*r, N, T, K, L]
            drift = (noise @ (each @ own.unsqueeze(-1)).sum(-3)).squeeze(-1)
            rest = (own - drift.unsqueeze(-2)).unsqueeze(-1)
            linear = linear - (gap.mT @ each @ rest).sum(-3).squeeze(-1)
            constant = constant - 0.5 * (rest.mT @ each @ rest).sum(-3)[..., 0, 0]
        if laws.penalty is not None:
            k, unsure = dynamics.shape[-1], mix(laws.penalty)
            more = more + unsure[..., :k, :k]
            if drift is not None and self.plan.u is not None:
                u = self.plan.u.unsqueeze(-1)
                linear = linear - (unsure[..., :k, k:] @ u).squeeze(-1)
                constant = constant - 0.5 * (u.mT @ unsure[..., k:, k:] @ u)[..., 0, 0]
        # What a step says of the state before it stands in that frame.
        goes_on = self.plan.goes_on(self.plan.inside)

        def before(value: Tensor, events: int) -> Tensor:
            axis = value.dim() - events - 1
            mask = goes_on.reshape(*goes_on.shape, *[1] * events)
            return torch.where(mask, value.roll(-1, axis), 0.0)

        more, linear, constant = before(more, 2), before(linear, 1), before(constant, 0)
        n, t, k = *self.plan.x.shape[:2], dynamics.shape[-1]
        whole = torch.broadcast_shapes(base.information.shape[:-4], more.shape[:-4])
        information = base.information.expand(*whole, n, t, k, k) + more
        made = replace(
            base, dynamics=dynamics, noise=noise, information=information, linear=base.linear + linear, drift=drift,
            half=None,
        )  # fmt: skip
        return made, more, linear, constant

    def sweep(self, regimes: Tensor, weight: Tensor | None = None) -> _Found:
        """Update the states given regimes, and then these given the states."""
        made, more, linear, constant = self._mixed(regimes)
        smoothed = kalman.smoothed(made, self.square_root)
        states = self._of_states(smoothed.filtered, more, linear, constant)
        second = self._second(smoothed)
        fit = self.fit(second)
        parts = *self.of_regimes(second), self.plan.batch.lengths
        log_z, first, steps, found = chain.expectations(*parts)
        if weight is not None:
            first, steps = chain.expectations(*parts, weight.to(found).expand(log_z.shape))[1:3]
        value = states + log_z - (regimes * fit).sum((-2, -1))
        return _Found(self, value, smoothed, second, found, first, steps)

    def of_regimes(self, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials of the chain of regimes: tables, and the fit of each law with what labels say."""
        fit, known = self.fit(second).to(self.plan.x), self.plan.batch.evidence
        return *self.tables, fit if known is None else fit + known.to(fit)

    def told(self, regimes: Tensor) -> Tensor:
        """What labels add to the bound of each sequence, ``[*r, N]``."""
        known = self.plan.batch.evidence
        assert known is not None
        each = torch.where(regimes > 0, regimes * known.to(regimes), 0.0)
        return each.sum((-2, -1), dtype=torch.float64)

    def _second(self, smoothed: kalman.Smoothed) -> Tensor:
        """E[(y, v)(y, v)ᵀ] of states y and what their steps read, v: the states before and covariates; float64."""
        mean, cov, cross = (v.to(torch.float64) for v in (smoothed.mean, smoothed.covariance, smoothed.cross))
        mean, cov, cross = mean.transpose(-3, -2), cov.transpose(-4, -3), cross.transpose(-4, -3)
        row = [mean[..., 1:, :], mean[..., :-1, :]]
        m = 0
        if self.laws.inputs is not None and self.plan.u is not None:
            u = self.plan.u[:, 1:].to(mean)
            m = u.shape[-1]
            row.append(u.expand(*mean.shape[:-2], *u.shape[-2:]))
        both = torch.cat(row, -1)
        rows = [cov[..., 1:, :, :], cross], [cross.mT, cov[..., :-1, :, :]]
        own = torch.cat([torch.cat(row, -1) for row in rows], -2)
        return both.unsqueeze(-1) * both.unsqueeze(-2) + nn.functional.pad(own, (0, m, 0, m))

    def fit(self, second: Tensor) -> Tensor:
        """E log p(z_t | z_{t−1}, s_t = k), ``[*r, N, T, K]``; zero for the first frame and in the padding; float64."""
        laws, k = self.laws, self.laws.states.shape[-1]
        eye = torch.eye(k).to(laws.states).expand(laws.states.shape)
        gap = torch.cat([eye, -laws.weight()], -1).to(torch.float64)
        form = gap.mT @ laws.precision.to(torch.float64) @ gap
        if laws.penalty is not None:
            form = form + nn.functional.pad(laws.penalty.to(form), (k, 0, k, 0))
        flat = second.flatten(-2) @ form.flatten(-2).mT.unsqueeze(-3)
        value = laws.height.to(torch.float64).unsqueeze(-2).unsqueeze(-2) - 0.5 * flat
        value = nn.functional.pad(value, (0, 0, 1, 0))
        inside = self.plan.inside
        return value if inside is None else torch.where(inside.unsqueeze(-1), value, 0.0)

    def in_regimes(self, found: _Found) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count and moments of steps in each regime, as `Factor.moment_stats` takes them."""
        share = found.regimes[..., 1:, :].to(torch.float64)
        if self.plan.batch.weight is not None:
            share = share * self.plan.batch.weight.to(share)[:, None, None]
        k = self.laws.states.shape[-1]
        flat = share.flatten(-3, -2).mT @ found.second.flatten(-2).flatten(-3, -2)
        total = flat.unflatten(-1, found.second.shape[-2:])
        return share.sum((-3, -2)), total[..., :k, :k], total[..., k:, :k], total[..., k:, k:]

    def along(self, paths: Tensor) -> Tensor:
        """log p(x, s) of each sequence along a path of its own, ``[*r, N]``; the first regime is summed out.

        Args:
            paths: ``[N, T − 1]`` regimes of the steps.
        """
        t, k = self.plan.x.shape[1], self.laws.states.shape[-3]
        hot = nn.functional.pad(nn.functional.one_hot(paths, k).to(self.plan.x), (0, 0, 1, 0))
        lead = self.laws.height.shape[:-1]
        made, more, linear, constant = self._mixed(hot.expand(*lead, *hot.shape))
        value = self._of_states(kalman.filtered(made, self.square_root), more, linear, constant)
        first, step = self.tables
        known, lengths = self.plan.batch.evidence, self.plan.batch.frames()
        if known is not None:
            known = known.to(first)
            first = first + known[:, 0]
        start = reduce.logsumexp(first, -1)
        if t == 1:
            return value + start
        rows, after = torch.arange(len(paths), device=paths.device), reduce.logsumexp(first.unsqueeze(-1) + step, -2)
        for i in range(1, t):
            now = paths[:, i - 1]
            if i == 1:
                own = after.expand(*after.shape[:-2], len(paths), k)[..., rows, now]
            else:
                own = step.squeeze(-3)[..., paths[:, i - 2], now]
            own = own if known is None else own + known[rows, i, now]
            # Paths that differ beyond the end of a sequence are one: each has an even share of it.
            beyond = (start if i == 1 else 0.0) - math.log(k)
            value = value + torch.where(i < lengths, own.to(value), beyond)
        return value

    def _of_states(self, found: kalman.Filtered, more: Tensor, linear: Tensor, constant: Tensor) -> Tensor:
        """log ∫ p(x | z) exp E log p(z | s) dz of each sequence, ``[*r, N]``."""
        z = found.mean.transpose(-3, -2)
        extra = (linear * z).sum(-1) - 0.5 * ((more @ z.unsqueeze(-1)).squeeze(-1) * z).sum(-1) + constant
        return self.plan.log_prob(found) + extra.sum(-1, dtype=torch.float64)
