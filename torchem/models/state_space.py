"""Linear Gaussian state spaces: a continuous state that moves linearly behind a sequence of observations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of, whole_number
from torchem.factor import Factor
from torchem.model import EStep, weighted
from torchem.models.gauss_markov import (
    CovarianceType,
    Enters,
    GaussMarkovModel,
    Law,
    Plan,
    lookable,
    normal_law,
    with_inputs,
)
from torchem.models.imputation import Gaps, How, at_once, checked_draws
from torchem.ops import kalman, linalg
from torchem.ops.dispatch import declared_precision
from torchem.stats import Stats


@dataclass(frozen=True, eq=False)
class Forecast:
    """What follows a sequence.

    Attributes:
        states: Laws of the states to come, batch ``[N, H]``.
        observations: Laws of the observations to come, batch ``[N, H]``.
        draws: Continuations ``[n, N, H, D]``, if any were asked for.
    """

    states: MultivariateNormal
    observations: MultivariateNormal
    draws: Tensor | None

    @property
    def mean(self) -> Tensor:
        """E[x_{T+h} | x], ``[N, H, D]``."""
        return self.observations.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each column, ``[N, H, D]``."""
        return self.observations.variance


class LinearGaussianStateSpace(GaussMarkovModel):
    """A continuous state that moves linearly, seen through linear observations; both with normal noise.

        z_1 ~ N(μ, Π),  z_t ~ N(A z_{t−1} + B u_t, Q),  x_t ~ N(C z_t + D u_t, R)

    E-step: the moments of the states by the Kalman filter and the Rauch–Tung–Striebel smoother. M-step: regressions of
    states on those before them and of observations on states, under these moments; each of the three factors may be
    frozen in part, have a prior, a posterior of its own (`torchem.Variational`) or an optimiser, as anywhere.

    NaN entries and whole frames of x are missing at random; covariances may be of any kind. Covariates u act on the
    step into their frame and on its observation.

    The state is defined up to a linear map: with z′ = T z the model is the same. What is of interest is fixed by
    freezing (``model.freeze("loadings")``), or read from what does not depend on the basis: eigenvalues of A,
    forecasts, smoothed observations.

    Args:
        n_latents: L, columns of the state.
        n_features: D, columns of an observation.
        n_inputs: M, columns of the covariates u; 0 for none.
        covariance_type: Of the observations' noise R: ``"full"``, ``"diag"`` or ``"spherical"``.
        dynamics_covariance_type: Of the steps' noise Q, likewise.
        inputs: Where covariates enter: ``"both"``, ``"dynamics"`` (D = 0) or ``"observation"`` (B = 0).
        covariance_floor: Smallest variance, relative to that of the data (of the state: of its first guess).
        square_root: Whether the filter takes roots by orthogonal triangularisation, at three times the cost; None for
            float32 alone.

    Raises:
        InvalidArgument: For sizes out of range or an unknown option.

    Source: R. H. Shumway, D. S. Stoffer (1982); Z. Ghahramani, G. E. Hinton (1996); M. J. Beal (2003), chapter 5, for
        posteriors of parameters.

    Example:
        >>> m = LinearGaussianStateSpace(1, 1)
        >>> m.dynamics, m.loadings = [[1.0]], [[1.0]]
        >>> m.posterior(torch.tensor([1.0, 2.0, torch.nan, 4.0])).mean.shape
        torch.Size([1, 4, 1])
    """

    exact = True

    def __init__(
        self,
        n_latents: int,
        n_features: int,
        n_inputs: int = 0,
        *,
        covariance_type: CovarianceType = "full",
        dynamics_covariance_type: CovarianceType = "full",
        inputs: Enters = "both",
        covariance_floor: float = 1e-6,
        square_root: bool | None = None,
    ):
        super().__init__(
            n_latents, n_features, n_inputs, 1, covariance_type, dynamics_covariance_type, inputs, covariance_floor,
            square_root,
        )  # fmt: skip

    @classmethod
    def local_level(cls, n_inputs: int = 0, variance: float = 1e7) -> "LinearGaussianStateSpace":
        """A level that walks, seen through noise: z_t = z_{t−1} + w_t, x_t = z_t + D u_t + v_t.

        EM estimates the two variances, and what covariates add to observations: a step of them is a break of the level.

        Args:
            n_inputs: M, columns of the covariates.
            variance: Of the first level, about zero: large, for nothing is known of it.

        Source: J. Durbin, S. J. Koopman (2012), chapter 2.

        Example:
            >>> LinearGaussianStateSpace.local_level().n_parameters()
            2
        """
        model = cls(1, 1, n_inputs, inputs="observation")
        model.initial_covariance = [[variance]]
        return model.freeze("initial_mean", "initial_covariance", "dynamics", "loadings")

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return ("initial", self.initial), ("transition", self.transition), ("observation", self.observation)

    @property
    def dynamics(self) -> Float[Tensor, "*r l l"]:
        """A, how a state follows from that before, ``[*r, L, L]``; assignable."""
        return self._part("transition", 0, self.n_latents)

    @dynamics.setter
    def dynamics(self, value: Any) -> None:
        self._set_part("transition", "dynamics", 0, self.n_latents, value)

    @property
    def dynamics_inputs(self) -> Float[Tensor, "*r l m"]:
        """B, what covariates add to a step, ``[*r, L, M]``; assignable where they enter the dynamics."""
        return self._part("transition", self.n_latents, None)

    @dynamics_inputs.setter
    def dynamics_inputs(self, value: Any) -> None:
        self._set_part("transition", "dynamics_inputs", self.n_latents, None, value)

    @property
    def dynamics_covariance(self) -> Float[Tensor, "*shape"]:
        """Covariance Q of a step's noise, ``[*r, L, L]``; ``[*r, L]`` diagonal, ``[*r]`` spherical; assignable."""
        return self._covariance("transition")

    @dynamics_covariance.setter
    def dynamics_covariance(self, value: Any) -> None:
        self._set_covariance("transition", "dynamics_covariance", value)

    def freeze(self, *names: str, mask: Any = None) -> "LinearGaussianStateSpace":
        """Keep views, or the entries of one where ``mask`` is True, through every M-step.

        Args:
            names: Of ``initial_mean``, ``initial_covariance``, ``dynamics``, ``dynamics_inputs``,
                ``dynamics_covariance``, ``loadings``, ``observation_inputs``, ``observation_covariance``.
            mask: Boolean in the shape of a matrix of coefficients, for exactly one name: a local linear trend, for
                example, has dynamics [[1, 1], [0, 1]] that are known.

        Raises:
            InvalidArgument: For another name, or a mask that does not fit.

        Example:
            >>> m = LinearGaussianStateSpace(1, 1).freeze("dynamics", "loadings")
            >>> m.n_parameters()  # mean and variance of the first state, and two variances of noise
            4
        """
        whole = {
            "initial_mean": ("initial", "means"), "initial_covariance": ("initial", "covariances"),
            "dynamics_covariance": ("transition", "covariances"),
            "observation_covariance": ("observation", "covariances"),
        }  # fmt: skip
        parts = {"dynamics": ("transition", 0), "dynamics_inputs": ("transition", 1),
                 "loadings": ("observation", 0), "observation_inputs": ("observation", 1)}  # fmt: skip
        for name in names:
            one_of("freeze", name, (*whole, *parts))
        if not names:
            raise invalid("freeze", "a name", "none", "name what is to be kept, for example 'loadings'")
        if mask is not None and (len(names) != 1 or names[0] in whole):
            raise invalid("mask", "exactly one matrix of coefficients to apply to", list(names), "freeze it by itself")
        for name in names:
            if name in whole:
                slot, view = whole[name]
                getattr(self, slot).freeze(view)
                continue
            slot, second = parts[name]
            self._freeze_part(slot, slice(self.n_latents, None) if second else slice(0, self.n_latents), mask)
        return self

    def _freeze_part(self, slot: str, columns: slice, mask: Any) -> None:
        factor = getattr(self, slot)
        weight = self._alone(factor.weight)
        kept = torch.zeros(weight.shape[-2:], dtype=torch.bool)
        place = kept[:, columns]
        rule = torch.ones_like(place) if mask is None else as_tensor(mask, "mask").to("cpu", torch.bool)
        if rule.shape != place.shape:
            raise invalid("mask", f"shape {list(place.shape)}", list(rule.shape), "give a truth value per coefficient")
        kept[:, columns] = rule
        before = factor.unwrapped.frozen("coefficient")
        if before is not None:
            kept = kept | before.cpu()
        if bool(kept.all()):
            factor.freeze("weight")
        else:
            factor.freeze("weight", mask=kept.unsqueeze(0))

    # ---- potentials -------------------------------------------------------------------------------------------

    def _plan(self, batch: Batch, certain: bool = False) -> "Plan":
        laws = [Law.of(f.quadratic(), self.n_latents) for f in (self.initial, self.transition, self.observation)]
        laws = [law.certain() for law in laws] if certain else laws
        return Plan(batch, laws[0], laws[1], laws[2], self.dtype)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def e_step(self, batch: Batch, kind: EStep = "soft") -> Stats:
        """Expected statistics under the posterior of the states.

        Raises:
            InvalidArgument: For a hard or sampled E-step: the latents are continuous.
        """
        if kind != "soft":
            raise invalid("e_step", "'soft', for the latents are continuous", repr(kind), "use a discrete model")
        with declared_precision(self.device):
            total: Stats | None = None
            for piece in self.stream(batch):
                plan = self._plan(piece)
                found = kalman.smoothed(plan.chain(), self._roots())
                stats = Stats({slot: f.moment_stats(*m) for (slot, f), m in zip(self.slots(), plan.moments(found),
                                                                               strict=True)})  # fmt: skip
                stats["log_likelihood"] = weighted(plan.log_prob(found.filtered), piece)
                total = stats if total is None else total + stats
            assert total is not None
            total["entropy"] = total["log_likelihood"] - self.expected_log_prob(total)
            total["count"] = self.count(batch).to(total["entropy"]).expand_as(total["entropy"])
        return total

    def entropy(self, batch: Batch) -> Tensor:
        """Weighted differential entropy of the posterior of all that was not seen, ``[*r]`` in nats."""
        return self.e_step(batch)["entropy"]

    # ---- use --------------------------------------------------------------------------------------------------

    def _each(
        self, data: Any, fields: dict[str, Any], function: Callable[["Plan"], Any], certain: bool = False,
        check: bool = True,
    ) -> Any:  # fmt: skip
        batch = self._read(data, fields)
        parts = []
        with declared_precision(self.device):
            for piece in self.stream(batch):
                plan = self._plan(piece, certain)
                parts.append(function(plan))
                if (
                    check
                    and lookable()
                    and any(bool(leaf.detach().isnan().any()) for leaf in pytree.tree_leaves(parts[-1]))
                ):
                    found = kalman.filtered(plan.chain(), self._roots())
                    self._refuse_overflow(found.predicted_root, found.covariance)
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *p: torch.cat(p, len(self.replicas)), *parts)

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each sequence, states summed out; of posteriors of parameters, at their means.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``inputs``, ``lengths``, … as for `LatentModel.batch`.

        Raises:
            InvalidArgument: If the variance of a state that nothing observes overflows.
        """
        return self._each(_to_the_last_seen(self._read(data, fields)), {}, self._value, certain=True)

    def log_bound(self, batch: Batch) -> Tensor:
        # A fit sees for itself where numbers end, and steps back.
        return self._each(batch, {}, self._value, check=False)

    def _value(self, plan: "Plan") -> Tensor:
        return plan.log_prob(kalman.filtered(plan.chain(), self._roots())).to(self.dtype)

    def posterior(self, data: Any, **fields: Any) -> MultivariateNormal:
        """Laws of the states given all frames: ``.mean [N, T, L]`` and ``.covariance_matrix [N, T, L, L]``.

        Padding repeats the law of the last frame.
        """
        return self._law(data, fields, lambda plan: plan.laws(kalman.smoothed(plan.chain(), self._roots())))

    def filter(self, data: Any, **fields: Any) -> MultivariateNormal:
        """Laws of the states given the frames so far, as `posterior`: what could be known at the time."""
        return self._law(data, fields, lambda plan: plan.laws(kalman.filtered(plan.chain(), self._roots())))

    def _law(self, data: Any, fields: dict[str, Any], laws: Callable[["Plan"], tuple[Tensor, Tensor]]) -> Any:
        return normal_law(*self._each(data, fields, laws))

    def most_likely(self, data: Any, **fields: Any) -> Float[Tensor, "*r n t l"]:
        """The most likely path of states, ``[N, T, L]``: the smoothed means."""
        return self._each(data, fields, lambda plan: plan.laws(kalman.smoothed(plan.chain(), self._roots()))[0])

    def smooth(self, data: Any, **fields: Any) -> Normal:
        """Law of each column of C z_t + D u_t given all frames, ``[N, T, D]``: observations without their noise.

        Unlike the state itself this does not depend on the basis: the level of a series, for example.

        Example:
            >>> m = LinearGaussianStateSpace(2, 1)
            >>> m.smooth(torch.tensor([1.0, 2.0, 4.0])).variance.shape
            torch.Size([1, 3, 1])
        """

        def level(plan: "Plan") -> tuple[Tensor, Tensor]:
            mean, covariance = plan.laws(kalman.smoothed(plan.chain(), self._roots()))
            loadings = plan.seen.states.unsqueeze(-3)
            mean = mean @ loadings.mT if plan.shift is None else mean @ loadings.mT + plan.shift
            loadings = loadings.unsqueeze(-3)
            return mean, ((loadings @ covariance) * loadings).sum(-1).sqrt()

        return Normal(*self._each(data, fields, level), validate_args=False)

    def forecast(
        self, data: Any, steps: int, *, inputs: Any = None, n: int = 0, generator: torch.Generator | None = None,
        **fields: Any,
    ) -> Forecast:  # fmt: skip
        """What follows each sequence: laws of states and observations ``1 … steps`` frames ahead.

        Args:
            data: Sequences, as for `torchem.fit`.
            steps: H, how far to look.
            inputs: Covariates ``[N, H, M]`` or ``[H, M]`` of the frames to come.
            n: Number of continuations to draw.
            generator: Source of the draws.
            **fields: ``lengths``, ``u``, … of the data.

        Example:
            >>> m = LinearGaussianStateSpace(1, 1)
            >>> m.forecast(torch.zeros(5, 1), 3).mean.shape
            torch.Size([1, 3, 1])
        """
        whole_number("steps", steps, 1, "give how many frames to look ahead")
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")
        if self.n_inputs and not isinstance(data, Batch) and fields.get("u") is None:
            raise invalid(
                "u",
                "the covariates of the frames of data, as inputs= are those of the frames to come",
                "none",
                "pass u=",
            )
        batch = self._read(data, fields)
        with torch.no_grad():
            mean, covariance = self._each(batch, {}, lambda p: p.laws(kalman.filtered(p.chain(), self._roots())))
            # Padding repeats the law of the last frame.
            mean, covariance = mean[:, -1], covariance[:, -1]
            u = self._ahead(inputs, len(batch), steps)
            move, see = (Law.of(f.quadratic(), self.n_latents) for f in (self.transition, self.observation))
            drift = None if u is None or move.inputs is None else u @ move.inputs.mT
            shift = None if u is None or see.inputs is None else u @ see.inputs.mT
            noise, observed = move.factor @ move.factor.mT, see.factor @ see.factor.mT
            draws = self._continued(n, mean, covariance, u, steps, generator) if n else None
            means, covariances = [], []
            for h in range(steps):
                mean = mean @ move.states.mT + (0.0 if drift is None else drift[:, h])
                covariance = move.states @ covariance @ move.states.mT + noise
                means.append(mean)
                covariances.append(covariance)
            mean, covariance = torch.stack(means, 1), torch.stack(covariances, 1)
            self._refuse_overflow(mean.transpose(0, 1), covariance.transpose(0, 1))
            seen = mean @ see.states.mT + (0.0 if shift is None else shift)
            return Forecast(
                normal_law(mean, covariance),
                normal_law(seen, see.states @ covariance @ see.states.mT + observed),
                draws,
            )

    def _continued(
        self, n: int, mean: Tensor, covariance: Tensor, u: Tensor | None, steps: int, generator: torch.Generator | None
    ) -> Tensor:
        size = len(mean)
        root = linalg.cholesky(covariance)
        noise = torch.randn(n, size, self.n_latents, dtype=self.dtype, device=self.device, generator=generator)
        z = (mean + (root @ noise.unsqueeze(-1)).squeeze(-1)).flatten(0, 1)
        many = None if u is None else u.repeat(n, 1, 1)
        return self._rolled(z, many, steps, generator, first=False)[0].unflatten(0, (n, size))

    def _refuse_overflow(self, *values: Tensor) -> None:
        """Name the first frame, on the first axis after those of replicas, at which there are no numbers any more."""
        lead = len(self.replicas)
        bad = torch.stack([~value.detach().isfinite().transpose(0, lead).flatten(1).all(-1) for value in values]).any(0)
        if bool(bad.any()):
            radius = float(torch.linalg.eigvals(self.dynamics.detach().to("cpu", torch.float64)).abs().amax())
            raise invalid(
                "dynamics", f"states of finite variance in {str(self.dtype).removeprefix('torch.')}",
                f"an overflow at frame {int(bad.nonzero()[0])}, at a spectral radius of {radius:.4g}",
                "shorten the sequences, use model.double(), or assign dynamics of a radius of at most 1",
            )  # fmt: skip

    def _rolled(
        self, z: Tensor, u: Tensor | None, steps: int, generator: torch.Generator | None, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Observations and states of frames from the one where ``z [n, L]`` stands (``first``), or after it."""
        blank = torch.zeros(len(z), dtype=torch.long, device=self.device)
        states, seen = [], []
        for t in range(steps):
            own = None if u is None else u[:, t]
            if t or not first:
                z = self.transition.sample(blank, with_inputs(z, own, self.inputs != "observation"), generator)
            states.append(z)
            seen.append(self.observation.sample(blank, with_inputs(z, own, self.inputs != "dynamics"), generator))
        found = torch.stack(seen, 1), torch.stack(states, 1)
        self._refuse_overflow(*(value.transpose(0, 1) for value in found))
        return found

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
        """Draw ``n`` sequences ``[n, length, D]``, and their states ``[n, length, L]`` when ``latents`` is True.

        Args:
            n: Number of sequences.
            length: Frames of each.
            latents: Whether to return the states as well.
            inputs: Covariates ``[n, length, M]`` or ``[length, M]``, where the model reads them.
            generator: Source of the draws.
        """
        for name, value, least in (("n", n, 0), ("length", length, 1)):
            whole_number(name, value, least)
        assert length is not None
        u = self._ahead(inputs, n, length)
        blank = torch.zeros(n, dtype=torch.long, device=self.device)
        start = self.initial.sample(blank, None, generator)
        x, z = self._rolled(start, u, length, generator, first=True)
        return (x, z) if latents else x

    @torch.no_grad()
    def sample_posterior(
        self, data: Any, n: int = 1, *, generator: torch.Generator | None = None, **fields: Any
    ) -> Float[Tensor, "n_draws n t l"]:
        """``n`` draws of the path of states given the data, ``[n, N, T, L]``.

        Paths and observations are drawn together and moved by what these observations lack of the data: the smoother
        is affine, and its error does not depend on what was observed.

        Source: J. Durbin, S. J. Koopman (2002).
        """
        batch = self._read(data, fields)
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")
        mean = self.most_likely(batch)
        parts = [z - self.most_likely(twin) for twin, _, z in self._twins(batch, n, generator)]
        return mean + torch.cat(parts).unflatten(0, (n, len(batch)))

    def _twins(self, batch: Batch, n: int, generator: torch.Generator | None) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Copies of a batch, ``n`` in all, drawn anew, that miss what it misses; with all entries, and the states."""
        step = at_once(batch.x.shape[0] * batch.x.shape[1])
        for times in [step] * (n // step) + [n % step] * (n % step > 0):
            many = replace(batch, weight=None)[torch.arange(len(batch), device=batch.x.device).repeat(times)]
            u = None if many.u is None else many.u.to(self.device, self.dtype)
            x, z = self.sample(len(many), many.x.shape[1], latents=True, inputs=u, generator=generator)
            yield many.with_x(torch.where(many.x.to(self.device).isnan(), torch.nan, x)), x, z

    @torch.no_grad()
    def impute(
        self,
        data: Any,
        how: How = "auto",
        *,
        draws: int | None = None,
        variance: bool = False,
        generator: torch.Generator | None = None,
        **fields: Any,
    ) -> Any:
        """Sequences with missing entries and frames filled in given all that was observed; see `LatentModel.impute`.

        Example:
            >>> m = LinearGaussianStateSpace(1, 1)
            >>> m.observation_covariance = [[1e-4]]
            >>> m.impute(torch.tensor([1.0, torch.nan, 3.0]))
            tensor([1.0000, 2.0000, 3.0000])
        """
        one_of("how", how, ("auto", "mean", "mode"))
        checked_draws(draws, self, variance)
        batch, lead = self._read(data, fields), len(self.replicas)
        gaps = Gaps.of(data, batch, True)
        mask = batch.frames_mask()
        inside = torch.ones_like(batch.x[..., 0], dtype=torch.bool) if mask is None else mask
        place = inside.flatten().nonzero()[:, 0][gaps.index].to(self.device)

        def missing(value: Tensor) -> Tensor:
            return value.flatten(lead, lead + 1).index_select(lead, place)

        def completed(batch: Batch) -> tuple[Tensor, Tensor]:
            bare = replace(batch, weight=None)
            return self._each(bare, {}, lambda p: p.completed(kalman.smoothed(p.chain(), self._roots())))

        mean, spread = completed(batch)
        if draws is not None:
            found = []
            for twin, x, _ in self._twins(batch, draws, generator):
                moved = mean + (x - completed(twin)[0]).unflatten(0, (-1, len(batch)))
                found.append(moved.flatten(1, 2)[:, place])
            return gaps.filled(torch.cat(found), False)
        value = gaps.filled(missing(mean), False)
        return (value, gaps.beside(missing(spread))) if variance else value

    # ---- starts -----------------------------------------------------------------------------------------------

    def _begin_steps(self, after: Tensor, now: Tensor, mass: Tensor, moments: Callable[[], tuple[Tensor, ...]]) -> None:
        factor = self.transition
        values = factor.maximize(factor.penalized(factor.moment_stats(*moments())))
        self.assign({f"transition.{name}": value for name, value in values.items()})


def _to_the_last_seen(batch: Batch) -> Batch:
    """Sequences without frames at their ends of which nothing was seen: these change no density."""
    if not lookable() or not bool(batch.x.isnan().any()):
        return batch
    seen = ~batch.x.isnan().all(-1)
    mask = batch.frames_mask()
    seen = seen if mask is None else seen & mask
    frame = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    last = torch.where(seen, frame, 1).amax(1)
    if bool((last == batch.frames().to(last)).all()):
        return batch
    most = int(last.amax()) if len(last) else 1
    u = None if batch.u is None else batch.u[:, :most]
    return replace(batch, x=batch.x[:, :most], u=u, lengths=last)
