"""Linear Gaussian state spaces: a continuous state that moves linearly behind a sequence of observations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid, one_of
from torchem.factor import Factor, Moments, Quadratic
from torchem.factors import Gaussian, LinearGaussian
from torchem.model import EStep, LatentModel, weighted
from torchem.models.imputation import Gaps, How, at_once, checked_draws
from torchem.ops import kalman, linalg
from torchem.ops.dispatch import declared_precision
from torchem.ops.gaussian import LOG_2PI
from torchem.ops.missing import any_missing
from torchem.stats import Stats

CovarianceType = Literal["full", "diag", "spherical"]
#: Where covariates enter.
Enters = Literal["both", "dynamics", "observation"]

#: Bytes that the recursions of one piece of sequences may take.
_MESSAGES = {"cpu": 256 << 20, "cuda": 4 << 30}
#: Share of the variance of first scores that they are taken to be wrong by.
_DOUBT = 0.1


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


class LinearGaussianStateSpace(LatentModel):
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

    sequential: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    initial: Gaussian
    transition: LinearGaussian
    observation: LinearGaussian

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
        super().__init__()
        for name, size, least in (
            ("n_latents", n_latents, 1),
            ("n_features", n_features, 1),
            ("n_inputs", n_inputs, 0),
        ):
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise invalid(name, f"a whole number of at least {least}", repr(size), "correct it")
        one_of("covariance_type", covariance_type, ("full", "diag", "spherical"))
        one_of("dynamics_covariance_type", dynamics_covariance_type, ("full", "diag", "spherical"))
        one_of("inputs", inputs, ("both", "dynamics", "observation"))
        if square_root is not None and not isinstance(square_root, bool):
            raise invalid("square_root", "True, False or None", repr(square_root), "None is right as a rule")
        self.n_latents, self.n_features, self.n_inputs = n_latents, n_features, n_inputs
        self.covariance_type: CovarianceType = covariance_type
        self.dynamics_covariance_type: CovarianceType = dynamics_covariance_type
        self.inputs: Enters = inputs
        self.covariance_floor, self.square_root = float(covariance_floor), square_root
        moving = n_latents + (n_inputs if inputs != "observation" else 0)
        seeing = n_latents + (n_inputs if inputs != "dynamics" else 0)
        self.initial = Gaussian(1, n_latents, "full", covariance_floor)
        self.transition = LinearGaussian(1, moving, n_latents, dynamics_covariance_type, (), covariance_floor)
        self.observation = LinearGaussian(1, seeing, n_features, covariance_type, (), covariance_floor)
        # A state that walks, and is seen in as many columns as there are.
        self.dynamics = torch.eye(n_latents)
        self.loadings = torch.eye(n_features, n_latents)
        self._generators: Sequence[torch.Generator] = ()
        self._first = 0

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
    def handles_missing(self) -> bool:
        """True."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        return self.observation.dtype

    @property
    def device(self) -> torch.device:
        return self.observation.device

    # ---- views ------------------------------------------------------------------------------------------------

    def _alone(self, value: Tensor) -> Tensor:
        """What the only component has."""
        return value.squeeze(len(self.replicas))

    def _part(self, slot: str, start: int, stop: int | None) -> Tensor:
        return self._alone(getattr(self, slot).weight)[..., start:stop]

    def _set_part(self, slot: str, name: str, start: int, stop: int | None, value: Any) -> None:
        factor = getattr(self, slot)
        weight = factor.weight.detach().to(torch.float64).clone()
        place = weight[..., start:stop]
        given = as_tensor(value, name).to(self.device, torch.float64)
        shape = [*self.replicas, *place.shape[-2:]]
        if list(given.shape) != shape:
            raise invalid(name, f"shape {shape}", list(given.shape), "give a row for each column that it predicts")
        if not bool(given.isfinite().all()):
            raise invalid(name, "finite numbers", "NaN or infinity", "correct that entry")
        weight[..., start:stop] = given.unsqueeze(-3)
        factor.weight = weight

    def _covariance(self, slot: str) -> Tensor:
        return self._alone(getattr(self, slot).covariances)

    def _set_covariance(self, slot: str, name: str, value: Any) -> None:
        factor = getattr(self, slot)
        try:
            factor.covariances = as_tensor(value, name).unsqueeze(len(self.replicas))
        except ValueError as error:
            # In the user's own words: without the axis of components.
            raise type(error)(str(error).replace("covariances:", f"{name}:", 1).replace("[1, ", "[", 1)) from error

    @property
    def initial_mean(self) -> Float[Tensor, "*r l"]:
        """Mean μ of the first state, ``[*r, L]``; assignable."""
        return self._alone(self.initial.means)

    @initial_mean.setter
    def initial_mean(self, value: Any) -> None:
        given = as_tensor(value, "initial_mean")
        if list(given.shape) != [*self.replicas, self.n_latents]:
            raise invalid("initial_mean", f"shape {[*self.replicas, self.n_latents]}", list(given.shape), "correct it")
        self.initial.means = given.unsqueeze(-2)

    @property
    def initial_covariance(self) -> Float[Tensor, "*r l l"]:
        """Covariance Π of the first state, ``[*r, L, L]``; assignable, symmetric and positive definite."""
        return self._covariance("initial")

    @initial_covariance.setter
    def initial_covariance(self, value: Any) -> None:
        self._set_covariance("initial", "initial_covariance", value)

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

    @property
    def loadings(self) -> Float[Tensor, "*r d l"]:
        """C, how states are seen, ``[*r, D, L]``; assignable."""
        return self._part("observation", 0, self.n_latents)

    @loadings.setter
    def loadings(self, value: Any) -> None:
        self._set_part("observation", "loadings", 0, self.n_latents, value)

    @property
    def observation_inputs(self) -> Float[Tensor, "*r d m"]:
        """D, what covariates add to observations, ``[*r, D, M]``; assignable where they enter them."""
        return self._part("observation", self.n_latents, None)

    @observation_inputs.setter
    def observation_inputs(self, value: Any) -> None:
        self._set_part("observation", "observation_inputs", self.n_latents, None, value)

    @property
    def observation_covariance(self) -> Float[Tensor, "*shape"]:
        """Covariance R of the noise of observations, ``[*r, D, D]``; ``[*r, D]`` or ``[*r]``; assignable."""
        return self._covariance("observation")

    @observation_covariance.setter
    def observation_covariance(self, value: Any) -> None:
        self._set_covariance("observation", "observation_covariance", value)

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

    def n_parameters(self) -> int:
        """Number of free parameters, less those that a change of the state's basis makes up for."""
        k = self.n_latents
        idle = {"full": k * k, "diag": k, "spherical": k * (k - 1) // 2 + 1}[self.dynamics_covariance_type]
        kept = any(f.unwrapped.frozen(name) is not None for f in self.factors() for name in f.unwrapped.views.values())
        return super().n_parameters() - (0 if kept else idle)

    # ---- potentials -------------------------------------------------------------------------------------------

    def _plan(self, batch: Batch, certain: bool = False) -> "_Plan":
        laws = [_Law.of(f.quadratic(), self.n_latents) for f in (self.initial, self.transition, self.observation)]
        laws = [law.certain() for law in laws] if certain else laws
        return _Plan(batch, laws[0], laws[1], laws[2], self.dtype)

    def _roots(self) -> bool:
        return self.dtype == torch.float32 if self.square_root is None else self.square_root

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

    def _read(self, data: Any, fields: dict[str, Any]) -> Batch:
        return self.check(data) if isinstance(data, Batch) and not fields else self.batch(data, **fields)

    def _each(
        self, data: Any, fields: dict[str, Any], function: Callable[["_Plan"], Any], certain: bool = False
    ) -> Any:
        batch = self._read(data, fields)
        with declared_precision(self.device):
            parts = [function(self._plan(piece, certain)) for piece in self.stream(batch)]
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *p: torch.cat(p, len(self.replicas)), *parts)

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each sequence, states summed out; of posteriors of parameters, at their means.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``inputs``, ``lengths``, … as for `LatentModel.batch`.
        """

        def value(plan: "_Plan") -> Tensor:
            return plan.log_prob(kalman.filtered(plan.chain(), self._roots())).to(self.dtype)

        return self._each(data, fields, value, certain=True)

    def posterior(self, data: Any, **fields: Any) -> MultivariateNormal:
        """Laws of the states given all frames: ``.mean [N, T, L]`` and ``.covariance_matrix [N, T, L, L]``.

        Padding repeats the law of the last frame.
        """
        return self._law(data, fields, lambda plan: plan.laws(kalman.smoothed(plan.chain(), self._roots())))

    def filter(self, data: Any, **fields: Any) -> MultivariateNormal:
        """Laws of the states given the frames so far, as `posterior`: what could be known at the time."""
        return self._law(data, fields, lambda plan: plan.laws(kalman.filtered(plan.chain(), self._roots())))

    def _law(self, data: Any, fields: dict[str, Any], laws: Callable[["_Plan"], tuple[Tensor, Tensor]]) -> Any:
        return _normal(*self._each(data, fields, laws))

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

        def level(plan: "_Plan") -> tuple[Tensor, Tensor]:
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
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise invalid("steps", "a whole number of at least 1", repr(steps), "give how many frames to look ahead")
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")
        batch = self._read(data, fields)
        with torch.no_grad():
            mean, covariance = self._each(batch, {}, lambda p: p.laws(kalman.filtered(p.chain(), self._roots())))
            # Padding repeats the law of the last frame.
            mean, covariance = mean[:, -1], covariance[:, -1]
            u = self._ahead(inputs, len(batch), steps)
            move, see = (_Law.of(f.quadratic(), self.n_latents) for f in (self.transition, self.observation))
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
            seen = mean @ see.states.mT + (0.0 if shift is None else shift)
            return Forecast(
                _normal(mean, covariance), _normal(seen, see.states @ covariance @ see.states.mT + observed), draws
            )

    def _ahead(self, inputs: Any, size: int, steps: int) -> Tensor | None:
        """Covariates of frames that no data tell of, ``[N, H, M]``."""
        if not self.n_inputs:
            if inputs is not None:
                raise invalid("inputs", "none, for a model without", "some", "build it with n_inputs")
            return None
        u = as_tensor(() if inputs is None else inputs, "inputs").to(self.device, self.dtype)
        u = u.unsqueeze(-1) if u.dim() == 1 and self.n_inputs == 1 and len(u) == steps else u
        u = u.unsqueeze(0).expand(size, *u.shape) if u.dim() == 2 else u
        if list(u.shape) != [size, steps, self.n_inputs]:
            got = "none" if inputs is None else list(u.shape)
            raise invalid("inputs", f"shape {[size, steps, self.n_inputs]}", got, "give covariates for each frame")
        return u

    def _continued(
        self, n: int, mean: Tensor, covariance: Tensor, u: Tensor | None, steps: int, generator: torch.Generator | None
    ) -> Tensor:
        size = len(mean)
        root = linalg.cholesky(covariance)
        noise = torch.randn(n, size, self.n_latents, dtype=self.dtype, device=self.device, generator=generator)
        z = (mean + (root @ noise.unsqueeze(-1)).squeeze(-1)).flatten(0, 1)
        many = None if u is None else u.repeat(n, 1, 1)
        return self._rolled(z, many, steps, generator, first=False)[0].unflatten(0, (n, size))

    def _rolled(
        self, z: Tensor, u: Tensor | None, steps: int, generator: torch.Generator | None, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Observations and states of frames from the one where ``z [n, L]`` stands (``first``), or after it."""
        blank = torch.zeros(len(z), dtype=torch.long, device=self.device)
        states, seen = [], []
        for t in range(steps):
            own = None if u is None else u[:, t]
            if t or not first:
                z = self.transition.sample(blank, _with(z, own, self.inputs != "observation"), generator)
            states.append(z)
            seen.append(self.observation.sample(blank, _with(z, own, self.inputs != "dynamics"), generator))
        return torch.stack(seen, 1), torch.stack(states, 1)

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
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise invalid(name, f"a whole number of at least {least}", repr(value), "correct it")
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

    def rows(self, batch: Batch) -> Batch:
        """Frames beside those that follow them, ``[F, 2D]`` (covariates ``[F, 2M]``); a last one beside itself.

        A start looks at rows drawn at random, and dynamics are between neighbours.
        """
        frames, ends = batch.x.shape[1], batch.frames().unsqueeze(-1)
        after = (torch.arange(frames, device=batch.x.device) + 1).minimum(ends - 1).clamp(min=0)

        def paired(value: Tensor) -> Tensor:
            return torch.cat([value, value.gather(1, after.unsqueeze(-1).expand(value.shape))], -1)

        x = paired(batch.x)
        d = batch.x.shape[-1]
        rows = replace(batch, x=x, u=None if batch.u is None else paired(batch.u)).rows()
        gone = rows.x[:, :d].isnan().all(-1)
        return rows[~gone] if bool(gone.any()) else rows

    def prepare(self, moments: Moments) -> None:
        d = self.n_features
        if moments.mean.shape not in ((d,), (2 * d,)):
            return
        own = _Columns(*(getattr(moments, name)[:d] for name in ("mean", "variance", "low", "high")))
        self.observation.prepare(own)
        scale = torch.ones(self.n_latents, dtype=torch.float64)
        if self._keeps_loadings():
            inverse = torch.linalg.pinv(self.loadings.detach().to("cpu", torch.float64)).reshape(-1, self.n_latents, d)[
                0
            ]
            scale = inverse.square() @ own.variance.cpu()
            scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.zeros_like(scale)
        latent = _Columns(zero, scale, zero, zero)
        self.initial.prepare(latent)
        self.transition.prepare(latent)

    def _keeps_loadings(self) -> bool:
        mask = self.observation.unwrapped.frozen("coefficient")
        if mask is None:
            return False
        return bool(mask.all() if mask.dim() < 3 else mask[..., : self.n_latents].all())

    def begin(self, generators: Sequence[torch.Generator], first: int) -> None:
        self._generators, self._first = generators, first

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        """An M-step from first scores: principal components of the frames, or what frozen loadings make of them.

        Scores are taken to be wrong by a share of their variance. The first restart takes them as they are; in others
        they are turned and blurred, and that share is drawn.
        """
        x, u, mass = self._pairs(batch)
        if x.shape[-2] < self.n_latents:
            raise invalid(
                "data", f"at least as many frames as latents ({self.n_latents})", x.shape[-2], "lower n_latents"
            )
        z, doubt = zip(*(self._scores(x, mass, r) for r in range(max(1, *self.replicas, 1))), strict=True)
        now, after = (torch.stack(part) for part in zip(*z, strict=True))
        blur = torch.stack(doubt)
        now, after, blur = (value if self.replicas else value[0] for value in (now, after, blur))
        zeros = now.new_zeros(*now.shape[:-2], 1, 1)
        count = mass.sum().expand(*self.replicas, 1)
        loose = (count[..., None] * blur.unsqueeze(-2)).diag_embed()

        def moments(y: Tensor, v: Tensor, spread_y: Tensor | float, wide: bool) -> tuple[Tensor, ...]:
            heavy = mass.unsqueeze(-1)
            k = v.shape[-1] - self.n_latents
            vv = (heavy * v).mT @ v
            vv = vv + torch.nn.functional.pad(loose.squeeze(-3), (0, k, 0, k)) if wide else vv
            parts = ((heavy * y).mT @ y + spread_y, (heavy * v).mT @ y, vv)
            return count, *(part.unsqueeze(-3) for part in parts)

        def beside(value: Tensor, own: Tensor | None, reads: bool) -> Tensor:
            if own is None or not reads:
                return value
            return torch.cat([value, own.expand(*value.shape[:-1], own.shape[-1])], -1)

        loose_z = loose.squeeze(-3)
        seen, steps = self.inputs != "dynamics", self.inputs != "observation"
        before, then = (None, None) if u is None else u
        values = {
            "initial": self.initial.moment_stats(*moments(now, zeros.expand_as(now[..., :1]) + 1, loose_z, False)),
            "transition": self.transition.moment_stats(*moments(after, beside(now, then, steps), loose_z, True)),
            "observation": self.observation.moment_stats(*moments(x[0], beside(now, before, seen), 0.0, True)),
        }
        factors = dict(self.slots())
        self.assign({f"{slot}.{name}": value for slot, stats in values.items()
                     for name, value in factors[slot].maximize(factors[slot].penalized(stats)).items()})  # fmt: skip

    def _pairs(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]:
        """Frames and those after them, ``[2, F, D]``, covariates, and weights; means stand for missing entries."""
        d, m = self.n_features, self.n_inputs
        rows = batch.x.to(torch.float64)
        x = torch.stack([rows[:, :d], rows[:, d:] if rows.shape[-1] == 2 * d else rows])
        x[1] = torch.where(x[1].isnan().all(-1, keepdim=True), x[0], x[1])
        mean = x[0].nanmean(0).nan_to_num(nan=0.0)
        x = torch.where(x.isnan(), mean, x)
        mass = torch.ones_like(x[0, :, 0]) if batch.weight is None else batch.weight.to(x)
        u = None if batch.u is None else batch.u.to(torch.float64)
        return x, None if u is None else (u[:, :m], u[:, -m:]), mass

    def _scores(self, x: Tensor, mass: Tensor, replica: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """First scores of frames and of those after them, ``[F, L]`` each, and the variance that they are wrong by."""
        k, d = self.n_latents, self.n_features
        generator = self._generators[replica] if replica < len(self._generators) else torch.Generator().manual_seed(0)
        lucky = replica + self._first == 0

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(x.device)

        total = mass.sum()
        if self._keeps_loadings():
            weight = self.loadings.detach().to(torch.float64).reshape(-1, d, k)
            back = torch.linalg.pinv(weight[min(replica, len(weight) - 1)]).mT
        else:
            scale = ((mass @ x[0].square()) / total).sqrt()
            unit = x[0] / torch.where(scale > 0, scale, 1.0)
            values, vectors = torch.linalg.eigh((mass.unsqueeze(-1) * unit).mT @ unit / total)
            kept = values.flip(-1)[:k].clamp(min=1e-3 * float(values.amax()) + 1e-12)
            back = vectors.flip(-1)[:, :k] / kept.sqrt() / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
            # More states than columns: what the others stand for is not seen in single frames.
            back = torch.nn.functional.pad(back, (0, k - back.shape[-1]))
            if not lucky:
                back = back @ (torch.eye(k).to(back) + 0.5 * noise(k, k) / k**0.5)
        now, after = x[0] @ back, x[1] @ back
        center = (mass @ now) / total
        spread = (mass @ (now - center).square()) / total
        spread = torch.where(spread > 0, spread, 1.0)
        hidden = (back == 0).all(0)
        blank = noise(2, len(now), k)
        now, after = (torch.where(hidden, fill, value) for fill, value in zip(blank, (now, after), strict=True))
        share = _DOUBT if lucky else _DOUBT * 10 ** float(2 * torch.rand((), generator=generator) - 1)
        if not lucky:
            now, after = (value + 0.3 * spread.sqrt() * noise(*value.shape) for value in (now, after))
        return (now, after), share * spread

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        self.initialize(batch, index)

    # ---- data -------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        if batch.x.shape[-1] != self.n_features:
            raise invalid(
                "data", f"{self.n_features} features", batch.x.shape[-1], "select the columns the model was built for"
            )
        columns = 0 if batch.u is None else batch.u.shape[-1]
        if columns != self.n_inputs:
            remedy = "leave them out, or build it with n_inputs" if not self.n_inputs else "pass inputs=u"
            raise invalid("inputs", f"{self.n_inputs} columns of covariates", columns or "none", remedy)
        if batch.evidence is not None:
            raise invalid("labels", "none: the latents are not one discrete state", "some", "leave them out")
        return batch

    def stream(self, batch: Batch) -> Iterator[Batch]:
        """Sequences in pieces whose recursions fit the budget, on the model's device and in its type."""
        size = 12 * self.n_latents**2 + 4 * self.n_features * (self.n_latents + 2)
        size *= self.dtype.itemsize * max(1, *self.replicas, 1) * max(1, batch.x.shape[1])
        budget = self.memory_budget or _MESSAGES.get(self.device.type, _MESSAGES["cuda"])
        for piece in batch.split(max(1, budget // size)):
            yield piece if piece.x.device == self.device else piece.to(self.device)


@dataclass(frozen=True)
class _Columns:
    """Moments of some columns."""

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor


def _normal(mean: Tensor, covariance: Tensor) -> MultivariateNormal:
    """A batch of normal laws; factors are taken in float64, where the covariances of float32 are positive definite."""
    root = linalg.cholesky(covariance.to(torch.float64)).to(covariance)
    return MultivariateNormal(mean, scale_tril=root, validate_args=False)


def _with(z: Tensor, u: Tensor | None, reads: bool) -> Batch:
    """States as covariates, beside those that came with the data where a factor reads them."""
    return Batch(z, u=z if u is None or not reads else torch.cat([z, u], -1))


@dataclass(frozen=True)
class _Law:
    """A factor's `Quadratic` in its only component, its coefficients cut into those of states and of covariates.

    Attributes:
        factor: Lower factor of the noise, ``[*r, D, D]``.
        weight: ``[*r, D, L + M]``.
        states: ``[*r, D, L]``.
        inputs: ``[*r, D, M]``; None where covariates do not enter.
        offset: ``[*r]``.
        penalty: ``[*r, L + M, L + M]``, or None.
    """

    factor: Tensor
    weight: Tensor
    states: Tensor
    inputs: Tensor | None
    offset: Tensor
    penalty: Tensor | None

    @classmethod
    def of(cls, law: Quadratic, latents: int) -> "_Law":
        weight = law.weight.squeeze(-3)
        inputs = weight[..., latents:] if weight.shape[-1] > latents else None
        penalty = None if law.penalty is None else law.penalty.squeeze(-3)
        return cls(law.factor.squeeze(-3), weight, weight[..., :latents], inputs, law.offset.squeeze(-1), penalty)

    def certain(self) -> "_Law":
        """As if its parameters were known."""
        return replace(self, offset=torch.zeros_like(self.offset), penalty=None)

    def regressors(self, z: Tensor, u: Tensor | None) -> Tensor:
        """States ``[*r, …, L]`` beside the covariates that are read."""
        if self.inputs is None or u is None:
            return z
        return torch.cat([z, u.to(z).expand(*z.shape[:-1], u.shape[-1])], -1)


def _lookable() -> bool:
    """Whether Python may look at values: nothing is transformed or compiled."""
    return values_known() and not torch.compiler.is_compiling()


def _between(value: Tensor, steps: int = 2) -> Tensor:
    """Matrices ``[*r, A, B]`` against axes of sequences and frames, ``[*r, 1, 1, A, B]``."""
    return value.reshape(*value.shape[:-2], *[1] * steps, *value.shape[-2:])


class _Plan:
    """A piece of data as potentials of a Gauss–Markov chain, and what becomes of the chain's posterior.

    Sequences of one length that miss the same entries form a group, whose covariances are the same.
    """

    def __init__(self, batch: Batch, first: _Law, move: _Law, seen: _Law, dtype: torch.dtype):
        self.batch, self.first, self.move, self.seen = batch, first, move, seen
        self.x = batch.x.to(dtype)
        self.u = None if batch.u is None else batch.u.to(dtype)
        self.inside = batch.frames_mask()
        self.gappy = any_missing(self.x)
        self.latents = first.weight.shape[-2]
        self._group()
        self._observe()

    # ---- groups -----------------------------------------------------------------------------------------------

    def _group(self) -> None:
        n, t, d = self.x.shape
        self.which: Tensor | None = None
        self.valid: Tensor | None = None
        self.known: Tensor | None = None
        if self.inside is None and not self.gappy:
            return
        inside = torch.ones(n, t, dtype=torch.bool, device=self.x.device) if self.inside is None else self.inside
        known = inside.unsqueeze(-1) & ~self.x.isnan() if self.gappy else None
        if not _lookable():
            self.valid, self.known = None if self.inside is None else inside, known
            return
        key = inside if known is None else torch.cat([inside, known.flatten(1)], -1)
        unique, which = key.unique(dim=0, return_inverse=True)
        self.which = which if len(unique) > 1 else None
        self.valid = None if self.inside is None else unique[:, :t]
        self.known = None if known is None else unique[:, t:].unflatten(-1, (t, d))

    def _by_sequence(self, value: Tensor) -> Tensor:
        """What groups have along the first axis, for each sequence."""
        return value.expand(len(self.x), *value.shape[1:]) if self.which is None else value[self.which]

    def _by_group(self, weight: Tensor, groups: int) -> Tensor:
        """Weights ``[N, T]`` of sequences summed over those of each group, ``[G, T]``."""
        if self.which is not None:
            return weight.new_zeros(groups, weight.shape[1]).index_add(0, self.which, weight)
        return weight if groups == len(self.x) else weight.sum(0, keepdim=True)

    # ---- potentials -------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Roots of the precision of what was observed, by the patterns of frames."""
        d = self.x.shape[-1]
        factor = self.seen.factor
        self.shift = None if self.u is None or self.seen.inputs is None else self.u @ self.seen.inputs.mT.unsqueeze(-3)
        rest = self.x if self.shift is None else self.x - self.shift
        if self.known is None:
            self.root = linalg.inverse_factor(factor)
            self.log_scale = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None, None]
            self.rest, self.size = rest, float(d)
            self.some: Tensor | None = self.inside
            return
        groups, t = self.known.shape[:2]
        flat = self.known.flatten(0, 1)
        if _lookable():
            patterns, index = flat.unique(dim=0, return_inverse=True)
        else:
            patterns, index = flat, torch.arange(len(flat), device=flat.device)
        self.patterns, self.index = patterns, index.view(groups, t)
        both = patterns.unsqueeze(-1) & patterns.unsqueeze(-2)
        noise = factor @ factor.mT
        eye = torch.eye(d, dtype=noise.dtype, device=noise.device)
        own = torch.where(both, noise.unsqueeze(-3), eye)
        root = linalg.inverse_factor(linalg.cholesky(own))
        # What is missing has the unit's part alone: it is left out.
        self.root = torch.where(patterns.unsqueeze(-1), root, 0.0)
        scale = torch.where(patterns, root.diagonal(dim1=-2, dim2=-1).log(), 0.0).sum(-1)
        self.frame = self._by_sequence(self.index)
        self.log_scale = scale[..., self.frame]
        entries = self._by_sequence(self.known)
        self.entries, self.some = entries, entries.any(-1)
        self.rest, self.size = torch.where(entries, rest, 0.0), entries.sum(-1).to(self.x)

    def _each_frame(self, value: Tensor) -> Tensor:
        """Matrices of patterns ``[*r, P, A, B]`` for the frames of sequences, ``[*r, N, T, A, B]``."""
        return value[..., self.frame, :, :]

    def _where(self, mask: Tensor | None, value: Tensor, events: int) -> Tensor:
        return value if mask is None else torch.where(mask.reshape(*mask.shape, *[1] * events), value, 0.0)

    def chain(self) -> kalman.GaussMarkov:
        """The chain of states under the potentials of the data."""
        inner = self.root @ (self.seen.states if self.known is None else self.seen.states.unsqueeze(-3))
        if self.known is None:
            linear = self.rest @ (self.root.mT @ inner).unsqueeze(-3)
            linear = self._where(self.inside, linear, 1)
            half, some = _between(inner), self.valid
            if self.valid is not None:
                half = self._where(self.valid, half, 2)
        else:
            white = self._each_frame(self.root) @ self.rest.unsqueeze(-1)
            linear = (self._each_frame(inner).mT @ white).squeeze(-1)
            half, some = inner[..., self.index, :, :], self.known.any(-1)
        half, linear = self._unsure(half, linear, some)
        drift = None
        if self.u is not None and self.move.inputs is not None:
            drift = self.u @ self.move.inputs.mT.unsqueeze(-3)
            drift = drift.expand(linear.shape)
        dynamics = _between(self.move.states)
        noise = _between(self.move.factor @ self.move.factor.mT)
        covariance = self.first.factor @ self.first.factor.mT
        mean = self.first.states.squeeze(-1)
        return kalman.GaussMarkov(
            mean, covariance, dynamics, noise, half.mT @ half, linear, drift, self.which, self.valid, half
        )

    def _unsure(self, half: Tensor, linear: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor]:
        """Potentials with what unsure coefficients take off: −½ (z, u)ᵀ V (z, u) of each regression."""
        frames, k = self.x.shape[1], self.latents
        for law, group, own, ahead in (
            (self.seen, some, self.some, 0), (self.move, self._goes_on(self.valid), self._goes_on(self.inside), 1),
        ):  # fmt: skip
            if law.penalty is None:
                continue
            more = _between(kalman.half(law.penalty[..., :k, :k]))
            more = self._where(group, more.expand(*more.shape[:-3], frames, k, k), 2)
            shape = torch.broadcast_shapes(half.shape[:-2], more.shape[:-2])
            half = torch.cat([part.expand(*shape, *part.shape[-2:]) for part in (half, more)], -2)
            if law.inputs is not None and self.u is not None:
                u = self.u if not ahead else torch.cat([self.u[:, 1:], self.u[:, :1]], 1)
                linear = linear - self._where(own, u @ law.penalty[..., k:, :k].unsqueeze(-3), 1)
        return half, linear

    def _goes_on(self, inside: Tensor | None) -> Tensor:
        """``[… or 1, T]`` Boolean, True where another frame follows."""
        frames = self.x.shape[1]
        if inside is None:
            return (torch.arange(frames, device=self.x.device) < frames - 1).unsqueeze(0)
        return torch.cat([inside[:, 1:], torch.zeros_like(inside[:, :1])], 1)

    def log_prob(self, found: kalman.Filtered) -> Tensor:
        """log p(x) of each sequence, ``[*r, N]`` in float64; an expectation of it where parameters are unsure.

        Each factor p(x_t | x_1, …, x_{t−1}) is the height of the joint density at the filtered mean times the width
        of the filtered law: nothing cancels.
        """
        z = found.mean.transpose(-3, -2)
        value = self._height(z) + found.log_weight.transpose(-2, -1)
        if self.move.penalty is not None:
            steps = self._goes_on(self.inside)
            u = None if self.u is None else torch.cat([self.u[:, 1:], self.u[:, :1]], 1)
            value = value + self._where(steps, self._taken_off(self.move, z, u), 0)
        steps = self.batch.frames().to(torch.float64) - 1
        offsets = self.first.offset.unsqueeze(-1) + self.move.offset.unsqueeze(-1) * steps
        return value.sum(-1, dtype=torch.float64) + offsets

    def _height(self, z: Tensor) -> Tensor:
        """log-density of what was observed of each frame at states ``[*r, N, T, L]``."""
        gap = self.rest - z @ self.seen.states.mT.unsqueeze(-3)
        if self.known is None:
            white = gap @ self.root.mT.unsqueeze(-3)
        else:
            white = (self._each_frame(self.root) @ gap.unsqueeze(-1)).squeeze(-1)
        value = (
            self.log_scale + self.seen.offset[..., None, None] - 0.5 * (white.square().sum(-1) + self.size * LOG_2PI)
        )
        if self.seen.penalty is not None:
            value = value + self._taken_off(self.seen, z, self.u)
        return self._where(self.some, value, 0)

    @staticmethod
    def _taken_off(law: _Law, z: Tensor, u: Tensor | None) -> Tensor:
        assert law.penalty is not None
        v = law.regressors(z, u)
        return -0.5 * ((v @ law.penalty.unsqueeze(-3)) * v).sum(-1)

    # ---- moments ----------------------------------------------------------------------------------------------

    def laws(self, found: kalman.Filtered | kalman.Smoothed) -> tuple[Tensor, Tensor]:
        """Means ``[*r, N, T, L]`` and covariances of the states of each sequence."""
        covariance = found.covariance.transpose(-4, -3)
        covariance = covariance.index_select(-4, self.which) if self.which is not None else covariance
        mean = found.mean.transpose(-3, -2)
        return mean, covariance.expand(*mean.shape, mean.shape[-1])

    def moments(self, found: kalman.Smoothed) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Count and moments of each factor's child and covariates, as `Factor.moment_stats` takes them, float64."""
        mean, cov, cross = (v.to(torch.float64) for v in (found.mean, found.covariance, found.cross))
        n, t = self.x.shape[:2]
        weight = torch.ones(n, dtype=torch.float64, device=self.x.device)
        weight = (weight if self.batch.weight is None else self.batch.weight.to(weight)).unsqueeze(-1)
        inside = torch.ones(n, t, dtype=torch.float64, device=self.x.device)
        inside = inside if self.inside is None else self.inside.to(inside)
        u = None if self.u is None else self.u.to(torch.float64).transpose(0, 1)
        start = _Moments(self, weight, mean[..., :1, :, :], torch.ones_like(mean[..., :1, :, :1]), None)
        start.spread(cov[..., :1, :, :, :], None, None)
        move = _Moments(self, weight * inside[:, 1:], mean[..., 1:, :, :],
                        self.move.regressors(mean[..., :-1, :, :], None if u is None else u[1:]), None)  # fmt: skip
        move.spread(cov[..., 1:, :, :, :], cross.mT, cov[..., :-1, :, :, :])
        some = inside if self.some is None else self.some.to(inside)
        x = self.x.to(torch.float64).transpose(0, 1)
        if self.known is None:
            x = x if self.inside is None else torch.where(self.inside.mT.unsqueeze(-1), x, 0.0)
            see = _Moments(self, weight * some, x, self.seen.regressors(mean, u), mean)
            see.spread(None, None, cov)
        else:
            gain, left = self._gains()
            filled = self._filled(mean.transpose(-3, -2), gain).transpose(-3, -2)
            see = _Moments(self, weight * some, filled, self.seen.regressors(mean, u), mean)
            pull, rest = (v[..., self.index, :, :].transpose(-4, -3) for v in self._pulled(gain, left))
            follows = cov @ pull.mT
            see.spread(pull @ follows + rest, follows, cov)
        return [part.result() for part in (start, move, see)]

    def _gains(self) -> tuple[Tensor, Tensor]:
        """For each pattern what the observed entries say of the missing ones, and the covariance that these keep."""
        factor, root = self.seen.factor.to(torch.float64), self.root.to(torch.float64)
        noise = (factor @ factor.mT).unsqueeze(-3)
        absent = ~self.patterns
        gain = torch.where(absent.unsqueeze(-1), noise @ root.mT @ root, 0.0)
        both = absent.unsqueeze(-1) & absent.unsqueeze(-2)
        return gain, torch.where(both, noise - gain @ noise, 0.0)

    def _pulled(self, gain: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """How missing entries follow the states, ``[*r, P, D, L]``, and their covariance given these."""
        loadings = self.seen.states.to(torch.float64).unsqueeze(-3)
        return torch.where(self.patterns.unsqueeze(-1), 0.0, loadings - gain @ loadings), left

    def _filled(self, mean: Tensor, gain: Tensor) -> Tensor:
        """Observations completed by their expectations, ``[*r, N, T, D]``; zero where nothing was seen."""
        level = mean @ self.seen.states.to(mean).mT.unsqueeze(-3)
        level = level if self.shift is None else level + self.shift.to(mean)
        x = self.x.to(mean)
        gap = torch.where(self.entries, x - level, 0.0)
        more = (gain[..., self.frame, :, :] @ gap.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.entries, x, level + more)

    def completed(self, found: kalman.Smoothed) -> tuple[Tensor, Tensor]:
        """Observations completed by their expectations given all that was observed, and the variances of these."""
        mean, covariance = self.laws(found)
        if self.known is None:
            x = self.x.expand(*mean.shape[:-1], self.x.shape[-1])
            return x, torch.zeros_like(x)
        gain, left = self._gains()
        filled = self._filled(mean.to(torch.float64), gain)
        pull, rest = (v[..., self.frame, :, :] for v in self._pulled(gain, left))
        spread = ((pull @ covariance.to(torch.float64)) * pull).sum(-1) + rest.diagonal(dim1=-2, dim2=-1)
        return filled.to(mean), spread.to(mean)


class _Moments:
    """Σ w E[…] of a child y and its covariates v: the products of their means, and then their covariances."""

    def __init__(self, plan: _Plan, weight: Tensor, y: Tensor, v: Tensor, z: Tensor | None):
        self.plan, self.weight = plan, weight
        lead = torch.broadcast_shapes(y.shape[:-3], v.shape[:-3])
        heavy = weight.mT.unsqueeze(-1)
        # Rows of all frames and sequences one below the other.
        y, hy, v, hv = (
            value.expand(*lead, *value.shape[-3:]).flatten(-3, -2) for value in (y, heavy * y, v, heavy * v)
        )
        self.count = weight.sum().expand(lead)
        self.yy, self.vy, self.vv = hy.mT @ y, hv.mT @ y, hv.mT @ v

    def _total(self, value: Tensor) -> Tensor:
        """Σ w of matrices ``[*r, T, G, A, B]`` of groups."""
        each = self.plan._by_group(self.weight, value.shape[-3])
        return (each.mT[..., None, None] * value).sum((-4, -3))

    def spread(self, child: Tensor | None, cross: Tensor | None, states: Tensor | None) -> None:
        """Add covariances of the child, of states (the first of the covariates) with it, and of states."""
        if child is not None:
            self.yy = self.yy + self._total(child)
        more = self.vv.shape[-1]
        if cross is not None:
            rows = more - cross.shape[-2]
            self.vy = self.vy + torch.nn.functional.pad(self._total(cross), (0, 0, 0, rows))
        if states is not None:
            rows = more - states.shape[-1]
            self.vv = self.vv + torch.nn.functional.pad(self._total(states), (0, rows, 0, rows))

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count, yy, vy and vv with an axis for the only component."""
        return self.count.unsqueeze(-1), self.yy.unsqueeze(-3), self.vy.unsqueeze(-3), self.vv.unsqueeze(-3)
