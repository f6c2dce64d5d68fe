"""Linear Gaussian state spaces: a continuous state that moves linearly behind a sequence of observations."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Factor
from torchem.model import EStep, weighted
from torchem.models.gauss_markov import CovarianceType, Enters, GaussMarkovModel, Law, Plan, lookable, normal_law
from torchem.models.imputation import Gaps, in_turn, places
from torchem.ops import kalman
from torchem.ops.dispatch import declared_precision
from torchem.stats import Stats


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

    def _planned(
        self, data: Any, fields: dict[str, Any], function: Callable[[Plan], Any], certain: bool = False,
        check: bool = True,
    ) -> Any:  # fmt: skip
        """A function of the pieces of data as chains, joined along the sequences; it may not overflow."""

        def checked(piece: Batch) -> Any:
            plan = self._plan(piece, certain)
            found = function(plan)
            return self._sound(plan, found) if check else found

        return self._each(data, fields, checked)

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each sequence, states summed out; of posteriors of parameters, at their means.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``inputs``, ``lengths``, … as for `LatentModel.batch`.

        Raises:
            InvalidArgument: If the variance of a state that nothing observes overflows.
        """
        return self._planned(_to_the_last_seen(self._read(data, fields)), {}, self._value, certain=True)

    def log_bound(self, batch: Batch) -> Tensor:
        # A fit sees for itself where numbers end, and steps back.
        return self._planned(batch, {}, self._value, check=False)

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
        return normal_law(*self._planned(data, fields, laws))

    def most_likely(self, data: Any, **fields: Any) -> Float[Tensor, "*r n t l"]:
        """The most likely path of states, ``[N, T, L]``: the smoothed means."""
        return self._planned(data, fields, lambda plan: plan.laws(kalman.smoothed(plan.chain(), self._roots()))[0])

    def _latest(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        mean, covariance = self._planned(batch, {}, lambda p: p.laws(kalman.filtered(p.chain(), self._roots())))
        # Padding repeats the law of the last frame.
        return mean[:, -1], covariance[:, -1], torch.ones_like(mean[:, -1, :1])

    def _switches(self) -> tuple[Tensor, Tensor]:
        one = torch.ones(1, 1, dtype=self.dtype, device=self.device)
        return one[0], one

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
        for times in in_turn(n, batch.x.shape[:2].numel()):
            many = replace(batch, weight=None)[torch.arange(len(batch), device=batch.x.device).repeat(times)]
            u = None if many.u is None else many.u.to(self.device, self.dtype)
            x, z = self.sample(len(many), many.x.shape[1], latents=True, inputs=u, generator=generator)
            yield many.with_x(torch.where(many.x.to(self.device).isnan(), torch.nan, x)), x, z

    def _smoothed(self, piece: Batch) -> tuple[Plan, kalman.Smoothed]:
        plan = self._plan(piece)
        found = kalman.smoothed(plan.chain(), self._roots())
        self._sound(plan, (found.mean, found.covariance))
        return plan, found

    def _sound(self, plan: Plan, found: Any) -> Any:
        """Tensors that were found of a chain, unless the variances of its states overflow."""
        if lookable() and any(bool(leaf.detach().isnan().any()) for leaf in pytree.tree_leaves(found)):
            laws = kalman.filtered(plan.chain(), self._roots())
            self._refuse_overflow(laws.predicted_root, laws.covariance)
        return found

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: as `sample_posterior` draws states."""
        batch, place = gaps.batch, places(gaps.batch, gaps.index, self.device)

        def completed(piece: Batch) -> Tensor:
            plan, found = self._smoothed(replace(piece, weight=None))
            return plan.completed(found)

        mean, parts = self._each(batch, {}, completed), []
        for twin, x, _ in self._twins(batch, draws, generator):
            moved = mean + (x - self._each(twin, {}, completed)).unflatten(0, (-1, len(batch)))
            parts.append(moved.flatten(1, 2)[:, place])
        return torch.cat(parts)

    # ---- starts -----------------------------------------------------------------------------------------------

    def _begin_steps(
        self, after: Tensor, now: Tensor, mass: Tensor, known: Tensor | None,
        moments: Callable[[], tuple[Tensor, ...]],
    ) -> None:  # fmt: skip
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
