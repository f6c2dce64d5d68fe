"""What models of normal states that follow each other have in common: views, starts, data as a Gauss–Markov chain."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributions
from torch.distributions import MultivariateNormal
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid, one_of, whole_number
from torchem.factor import Adjustment, Moments, Quadratic
from torchem.factors import Gaussian, LinearGaussian
from torchem.models.imputation import Completing, floating, places
from torchem.models.unseen import Normal, total_covariance
from torchem.ops import kalman, linalg
from torchem.ops.dispatch import declared_precision
from torchem.ops.gaussian import LOG_2PI
from torchem.ops.missing import any_missing

CovarianceType = Literal["full", "diag", "spherical"]
#: Where covariates enter.
Enters = Literal["both", "dynamics", "observation"]

#: Bytes that the recursions of one piece of sequences may take.
_MESSAGES = {"cpu": 256 << 20, "cuda": 4 << 30}
#: Share of the variance of first scores that they are taken to be wrong by.
_DOUBT = 0.1


class GaussMarkovModel(Completing):
    """A law of the first state, laws of its steps, and linear observations of it with normal noise.

    Args:
        n_latents: L, columns of the state.
        n_features: D, columns of an observation.
        n_inputs: M, columns of the covariates u; 0 for none.
        n_steps: K, laws of a step to choose among.
        covariance_type: Of the observations' noise.
        dynamics_covariance_type: Of the steps' noise.
        inputs: Where covariates enter.
        covariance_floor: Smallest variance, relative to that of the data (of the state: of its first guess).
        square_root: Whether the filter takes roots by orthogonal triangularisation; None for float32 alone.

    Raises:
        InvalidArgument: For sizes out of range or an unknown option.
    """

    sequential: ClassVar[bool] = True

    initial: Gaussian
    transition: LinearGaussian
    observation: LinearGaussian

    def __init__(
        self,
        n_latents: int,
        n_features: int,
        n_inputs: int,
        n_steps: int,
        covariance_type: CovarianceType,
        dynamics_covariance_type: CovarianceType,
        inputs: Enters,
        covariance_floor: float,
        square_root: bool | None,
    ):
        super().__init__()
        sizes = ("n_latents", n_latents, 1), ("n_features", n_features, 1), ("n_inputs", n_inputs, 0)
        for name, size, least in sizes:
            whole_number(name, size, least)
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
        self.transition = LinearGaussian(n_steps, moving, n_latents, dynamics_covariance_type, (), covariance_floor)
        self.observation = LinearGaussian(1, seeing, n_features, covariance_type, (), covariance_floor)
        # A state that walks, and is seen in as many columns as there are.
        weight = torch.zeros(n_steps, n_latents, moving)
        weight[..., :n_latents] = torch.eye(n_latents)
        self.transition.weight = weight
        self.loadings = torch.eye(n_features, n_latents)
        self._generators: Sequence[torch.Generator] = ()
        self._first = 0

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

    def n_parameters(self) -> int:
        """Number of free parameters, less those that a change of the state's basis makes up for."""
        k = self.n_latents
        idle = {"full": k * k, "diag": k, "spherical": k * (k - 1) // 2 + 1}[self.dynamics_covariance_type]
        kept = any(f.unwrapped.frozen(name) is not None for f in self.factors() for name in f.unwrapped.views.values())
        return super().n_parameters() - (0 if kept else idle)

    # ---- potentials and data ------------------------------------------------------------------------------------

    def _roots(self) -> bool:
        return self.dtype == torch.float32 if self.square_root is None else self.square_root

    def column_kinds(self) -> list[tuple[bool, bool]]:
        return [(False, False)] * self.n_features

    @abstractmethod
    def _smoothed(self, piece: Batch) -> tuple["Plan", kalman.Smoothed]:
        """The (approximate) posterior of the states of a piece."""

    def _each(self, data: Any, fields: dict[str, Any], function: Callable[[Batch], Any]) -> Any:
        """A function of the pieces of data, joined along the sequences."""
        batch = self._read(data, fields)
        with declared_precision(self.device):
            parts = [function(piece) for piece in self.stream(batch)]
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *p: torch.cat(p, len(self.replicas)), *parts)

    def smooth(self, data: Any, **fields: Any) -> distributions.Normal:
        """Law of each column of C z_t + D u_t given all frames, ``[N, T, D]``: observations without their noise.

        Unlike the state itself this does not depend on the basis: the level of a series, for example.

        Example:
            >>> import torchem
            >>> m = torchem.LinearGaussianStateSpace(2, 1)
            >>> m.smooth(torch.tensor([1.0, 2.0, 4.0])).variance.shape
            torch.Size([1, 3, 1])
        """

        def level(piece: Batch) -> tuple[Tensor, Tensor]:
            plan, found = self._smoothed(piece)
            mean, covariance = plan.laws(found)
            loadings = plan.seen.states.unsqueeze(-3)
            mean = mean @ loadings.mT if plan.shift is None else mean @ loadings.mT + plan.shift
            loadings = loadings.unsqueeze(-3)
            return mean, ((loadings @ covariance) * loadings).sum(-1).sqrt()

        return distributions.Normal(*self._each(data, fields, level), validate_args=False)

    def unseen(self, batch: Batch, index: Tensor) -> Normal:
        """See `Completing.unseen`: the normal law of each frame."""
        place, start = places(batch, index, self.device), 0

        def completed(piece: Batch) -> tuple[Tensor, Tensor]:
            nonlocal start
            plan, found = self._smoothed(piece)
            size = piece.x.shape[:2].numel()
            own = place[(place >= start) & (place < start + size)] - start
            start += size
            return plan.completed_at(found, own)

        mean, spread = self._each(replace(batch, weight=None), {}, completed)
        return Normal.of(floating(batch.rows()[index], self), mean, spread)

    # ---- forecasts and draws ----------------------------------------------------------------------------------

    @abstractmethod
    def _latest(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``[N, L]`` and covariance of the last state of each sequence, and law ``[N, K]`` of its regime."""

    @abstractmethod
    def _switches(self) -> tuple[Tensor, Tensor]:
        """Probabilities of the first regime ``[K]`` and of its steps ``[K, K]``."""

    def forecast(
        self, data: Any, steps: int, *, inputs: Any = None, n: int = 0, generator: torch.Generator | None = None,
        **fields: Any,
    ) -> "Forecast":  # fmt: skip
        """What follows each sequence: laws of states and observations ``1 … steps`` frames ahead.

        With one law of steps they are normal. Where regimes switch there is a normal law for each path of them; the
        means and covariances of all together are exact given the posterior of the last frame, by a recursion over the
        moments in each regime.

        Args:
            data: Sequences, as for `torchem.fit`.
            steps: H, how far to look.
            inputs: Covariates ``[N, H, M]`` or ``[H, M]`` of the frames to come.
            n: Number of continuations to draw.
            generator: Source of the draws.
            **fields: ``lengths``, ``u``, … of the data.

        Source: O. L. V. Costa, M. D. Fragoso, R. P. Marques (2005), section 3.3, for moments of switching states.

        Example:
            >>> import torchem
            >>> m = torchem.LinearGaussianStateSpace(1, 1)
            >>> m.forecast(torch.zeros(5, 1), 3).mean.shape
            torch.Size([1, 3, 1])
        """
        whole_number("steps", steps, 1, "give how many frames to look ahead")
        if self.replicas:
            raise invalid("model", "one without replicas", f"{self.replicas[0]} of them", "use take_replicas(0)")
        if self.n_inputs and not isinstance(data, Batch) and fields.get("u") is None:
            expected = "the covariates of the frames of data, as inputs= are those of the frames to come"
            raise invalid("u", expected, "none", "pass u=")
        batch = self._read(data, fields)
        with torch.no_grad():
            u = self._ahead(inputs, len(batch), steps)
            mean, covariance, regimes = self._latest(batch)
            draws = self._continued(n, mean, covariance, regimes, u, steps, generator) if n else None
            laws = [
                torch.stack(found, 1) for found in zip(*self._onward(mean, covariance, regimes, u, steps), strict=True)
            ]
            self._refuse_overflow(*(law.transpose(0, 1) for law in laws[:2]))
            see = Law.of(self.observation.quadratic(), self.n_latents)
            shift = 0.0 if u is None or see.inputs is None else u @ see.inputs.mT
            seen = see.states @ laws[1] @ see.states.mT + see.factor @ see.factor.mT
            return Forecast(normal_law(*laws[:2]), normal_law(laws[0] @ see.states.mT + shift, seen), draws, laws[2])

    def _refuse_overflow(self, *values: Tensor) -> None:
        """Name the first frame, on the first axis after those of replicas, at which there are no numbers any more."""
        lead = len(self.replicas)
        bad = torch.stack([~value.detach().isfinite().transpose(0, lead).flatten(1).all(-1) for value in values]).any(0)
        if bool(bad.any()):
            dynamics: Any = self.dynamics  # of every model of this kind
            radius = float(torch.linalg.eigvals(dynamics.detach().to("cpu", torch.float64)).abs().amax())
            raise invalid(
                "dynamics", f"states of finite variance in {str(self.dtype).removeprefix('torch.')}",
                f"an overflow at frame {int(bad.nonzero()[0])}, at a spectral radius of {radius:.4g}",
                "shorten the sequences, use model.double(), or assign dynamics of a radius of at most 1",
            )  # fmt: skip

    def _onward(
        self, mean: Tensor, covariance: Tensor, regimes: Tensor, u: Tensor | None, steps: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Mean, covariance and regimes of the states of each frame to come."""
        law, switches, size = self.transition.quadratic(), self._switches()[1], self.n_latents
        a, b, noise = law.weight[..., :size], law.weight[..., size:], law.factor @ law.factor.mT
        # Moments of the state in each regime.
        means = mean.unsqueeze(-2).expand(-1, regimes.shape[-1], -1)
        covs = covariance.unsqueeze(-3).expand(-1, regimes.shape[-1], -1, -1)
        for h in range(steps):
            joint = regimes.unsqueeze(-1) * switches
            regimes = joint.sum(-2)
            # From which regime, given the next one: ``[N, K, K]``, rows to.
            share = (joint / torch.where(regimes > 0, regimes, 1.0).unsqueeze(-2)).mT
            covs = total_covariance(share, means.unsqueeze(-3), covs.unsqueeze(-4))
            means = share @ means
            means = (a @ means.unsqueeze(-1)).squeeze(-1)
            if u is not None and b.shape[-1]:
                means = means + (b @ u[:, h, None, :, None]).squeeze(-1)
            covs = a @ covs @ a.mT + noise
            whole = total_covariance(regimes, means, covs)
            yield (regimes.unsqueeze(-1) * means).sum(-2), whole, regimes

    def _continued(
        self, n: int, mean: Tensor, covariance: Tensor, regimes: Tensor, u: Tensor | None, steps: int,
        generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        """Draws ``[n, N, H, D]`` of the frames to come."""
        noise = torch.randn(n, *mean.shape, dtype=self.dtype, device=self.device, generator=generator)
        z = (mean + (linalg.cholesky(covariance) @ noise.unsqueeze(-1)).squeeze(-1)).flatten(0, 1)
        many = None if u is None else u.repeat(n, 1, 1)
        path = self._path(regimes.repeat(n, 1), steps + 1, generator)[:, 1:]
        return self._rolled(z, path, many, generator, first=False)[0].unflatten(0, (n, len(mean)))

    def _path(self, first: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
        """Drawn regimes ``[n, length]``, of which the first have laws ``[n, K]``."""
        step, path = self._switches()[1], []
        law = first
        for _ in range(length):
            alone = law.shape[-1] == 1 or not len(law)
            path.append(
                torch.zeros(len(law), dtype=torch.long, device=law.device)
                if alone else torch.multinomial(law, 1, generator=generator)[:, 0]
            )  # fmt: skip
            law = step[path[-1]]
        return torch.stack(path, 1)

    def _rolled(
        self, z: Tensor, path: Tensor, u: Tensor | None, generator: torch.Generator | None, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Observations and states in regimes ``path [n, T]``, from the frame of ``z [n, L]`` or that after it."""
        blank, states, seen = torch.zeros_like(path[:, 0]), [], []
        for t in range(path.shape[1]):
            own = None if u is None else u[:, t]
            if t or not first:
                z = self.transition.sample(path[:, t], with_inputs(z, own, self.inputs != "observation"), generator)
            states.append(z)
            seen.append(self.observation.sample(blank, with_inputs(z, own, self.inputs != "dynamics"), generator))
        found = torch.stack(seen, 1), torch.stack(states, 1)
        self._refuse_overflow(*(value.transpose(0, 1) for value in found))
        return found

    def _latents(self, z: Tensor, path: Tensor) -> Any:
        """What `sample` gives beside observations."""
        return z

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
            latents: Whether to return the states as well; where regimes switch, the pair of states and regimes
                ``[n, length]``.
            inputs: Covariates ``[n, length, M]`` or ``[length, M]``, where the model reads them.
            generator: Source of the draws.
        """
        for name, value, least in (("n", n, 0), ("length", length, 1)):
            whole_number(name, value, least)
        assert length is not None
        u = self._ahead(inputs, n, length)
        start = self.initial.sample(torch.zeros(n, dtype=torch.long, device=self.device), None, generator)
        path = self._path(self._switches()[0].expand(n, -1), length, generator)
        x, z = self._rolled(start, path, u, generator, first=True)
        return (x, self._latents(z, path)) if latents else x

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

    # ---- starts -----------------------------------------------------------------------------------------------

    def rows(self, batch: Batch) -> Batch:
        """Frames beside those that follow them, ``[F, 2D]`` (covariates ``[F, 2M]``); a last one beside itself.

        A start looks at rows drawn at random, and dynamics are between neighbours.
        """
        frames, ends = batch.x.shape[1], batch.frames().unsqueeze(-1)
        after = (torch.arange(frames, device=batch.x.device) + 1).minimum(ends - 1).clamp(min=0)

        def paired(value: Tensor) -> Tensor:
            return torch.cat([value, value.gather(1, after.unsqueeze(-1).expand(value.shape))], -1)

        x, known = paired(batch.x), batch.evidence
        d = batch.x.shape[-1]
        if known is not None:  # of the frame that a step leads to
            ahead = torch.cat([known[:, 1:], torch.zeros_like(known[:, :1])], 1)
            known = torch.where((torch.arange(frames, device=ends.device) < ends - 1).unsqueeze(-1), ahead, 0.0)
        rows = replace(batch, x=x, u=None if batch.u is None else paired(batch.u), evidence=known).rows()
        gone = rows.x[:, :d].isnan().all(-1)
        return rows[~gone] if bool(gone.any()) else rows

    def prepare(self, moments: Moments) -> None:
        d = self.n_features
        if moments.mean.shape not in ((d,), (2 * d,)):
            return
        own = Columns(*(getattr(moments, name)[:d] for name in ("mean", "variance", "low", "high")))
        self.observation.prepare(own)
        scale = torch.ones(self.n_latents, dtype=torch.float64)
        if self._keeps_loadings():
            inverse = torch.linalg.pinv(self.loadings.detach().to("cpu", torch.float64)).reshape(-1, self.n_latents, d)[
                0
            ]
            scale = inverse.square() @ own.variance.cpu()
            scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.zeros_like(scale)
        latent = Columns(zero, scale, zero, zero)
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
            "observation": self.observation.moment_stats(*moments(x[0], beside(now, before, seen), 0.0, True)),
        }
        moved = beside(now, then, steps)
        self._begin_steps(after, moved, mass, batch.evidence, lambda: moments(after, moved, loose_z, True))
        factors = dict(self.slots())
        self.assign({f"{slot}.{name}": value for slot, stats in values.items()
                     for name, value in factors[slot].maximize(factors[slot].penalized(stats)).items()})  # fmt: skip

    @abstractmethod
    def _begin_steps(
        self, after: Tensor, now: Tensor, mass: Tensor, known: Tensor | None,
        moments: Callable[[], tuple[Tensor, ...]],
    ) -> None:  # fmt: skip
        """First laws of steps, in place.

        Args:
            after: First scores of states ``[*r, F, L]``.
            now: Of those before them, beside covariates, ``[*r, F, L + M]``.
            mass: ``[F]`` weights.
            known: ``[F, K]`` what labels say of the steps, or None.
            moments: Gives count and moments of all steps together, unsure as the scores are.
        """

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
            # Without an intercept states carry the level, so directions are those of second moments about zero; what
            # they are measured in, as are floors, is how the data vary about it.
            scale = self._deviation(x[0], mass, None)
            unit = x[0] / scale
            _, vectors = torch.linalg.eigh((mass.unsqueeze(-1) * unit).mT @ unit / total)
            vectors = vectors.flip(-1)[:, :k]
            back = vectors / scale.unsqueeze(-1) / self._deviation(unit @ vectors, mass, 1e-3)
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

    @staticmethod
    def _deviation(x: Tensor, mass: Tensor, least: float | None) -> Tensor:
        """Standard deviations of columns ``[F, C]``, of which none is less than that of others, or a share of it."""
        mean = (mass @ x) / mass.sum()
        variance = (mass @ (x - mean).square()) / mass.sum()
        noise = (64 * torch.finfo(x.dtype).eps * mean).square()
        variance = torch.where(variance > noise, variance, 0.0)
        most = variance.amax()
        fallback = torch.where(most > 0, most, 1.0)
        if least is not None:
            return variance.clamp(min=least * float(fallback)).sqrt()
        return torch.where(variance > 0, variance, fallback).sqrt()

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        self.initialize(batch, index)

    def floored(self) -> list[int | str]:
        """Names of covariances at their floor, unless they are frozen."""
        steps = "dynamics_covariance" if hasattr(type(self), "dynamics_covariance") else "dynamics_covariances"
        places = ("initial", "initial_covariance"), ("transition", steps), ("observation", "observation_covariance")
        found: list[int | str] = []
        for slot, name in places:
            factor = getattr(self, slot).unwrapped
            marks = factor.degenerate()
            if marks is not None and bool(marks.any()) and factor.frozen("scale") is None:
                found.append(name)
        return found

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
            k = self.takes_labels()
            if batch.evidence.shape[-1] != k:
                raise invalid(
                    "evidence", f"{k} columns, one per regime", batch.evidence.shape[-1],
                    "give a log-potential for each regime",
                )  # fmt: skip
        return batch

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        # No frame passes through the law of the first state: checks as of a small fit serve.
        return super().tune(0, iteration)

    def stream(self, batch: Batch) -> Iterator[Batch]:
        """Sequences in pieces whose recursions fit the budget, on the model's device and in its type."""
        # Sequences of one length without gaps share all matrices: one recursion of these serves as many as fit.
        alike = self.transition.n_components == 1 and batch.lengths is None
        alike = alike and lookable() and not any_missing(batch.x)
        size = 16 * self.n_latents + 6 * self.n_features
        if not alike:
            size += 12 * self.n_latents**2 + 4 * self.n_features * self.n_latents
        size *= self.dtype.itemsize * max(1, *self.replicas, 1) * max(1, batch.x.shape[1])
        budget = self.memory_budget or _MESSAGES.get(self.device.type, _MESSAGES["cuda"])
        for piece in batch.split(max(1, budget // size)):
            yield piece if piece.x.device == self.device else piece.to(self.device)


@dataclass(frozen=True, eq=False)
class Forecast:
    """What follows a sequence.

    Attributes:
        states: Laws of the states to come, batch ``[N, H]``. Where regimes switch they are mixtures: these are normal
            laws of the same means and covariances.
        observations: Laws of the observations to come, batch ``[N, H]``, likewise.
        draws: Continuations ``[n, N, H, D]``, if any were asked for.
        regimes: Probability of each regime, ``[N, H, K]``; of a single one all is one.
    """

    states: MultivariateNormal
    observations: MultivariateNormal
    draws: Tensor | None
    regimes: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x_{T+h} | x], ``[N, H, D]``."""
        return self.observations.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each column, ``[N, H, D]``."""
        return self.observations.variance


@dataclass(frozen=True)
class Columns:
    """Moments of some columns."""

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor


def normal_law(mean: Tensor, covariance: Tensor) -> MultivariateNormal:
    """A batch of normal laws; factors are taken in float64, where the covariances of float32 are positive definite."""
    root = linalg.cholesky(covariance.to(torch.float64)).to(covariance)
    return MultivariateNormal(mean, scale_tril=root, validate_args=False)


def root_of(covariance: Tensor) -> Tensor:
    """A matrix R with R Rᵀ = C, for C that may be singular, or short of it by rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)


def with_inputs(z: Tensor, u: Tensor | None, reads: bool) -> Batch:
    """States as covariates, beside those that came with the data where a factor reads them."""
    return Batch(z, u=z if u is None or not reads else torch.cat([z, u], -1))


@dataclass(frozen=True)
class Law:
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
    def of(cls, law: Quadratic, latents: int) -> "Law":
        weight = law.weight.squeeze(-3)
        inputs = weight[..., latents:] if weight.shape[-1] > latents else None
        penalty = None if law.penalty is None else law.penalty.squeeze(-3)
        return cls(law.factor.squeeze(-3), weight, weight[..., :latents], inputs, law.offset.squeeze(-1), penalty)

    def certain(self) -> "Law":
        """As if its parameters were known."""
        return replace(self, offset=torch.zeros_like(self.offset), penalty=None)

    def regressors(self, z: Tensor, u: Tensor | None) -> Tensor:
        """States ``[*r, …, L]`` beside the covariates that are read."""
        if self.inputs is None or u is None:
            return z
        return torch.cat([z, u.to(z).expand(*z.shape[:-1], u.shape[-1])], -1)


def lookable() -> bool:
    """Whether Python may look at values: nothing is transformed or compiled."""
    return values_known() and not torch.compiler.is_compiling()


def between(value: Tensor, steps: int = 2) -> Tensor:
    """Matrices ``[*r, A, B]`` against axes of sequences and frames, ``[*r, 1, 1, A, B]``."""
    return value.reshape(*value.shape[:-2], *[1] * steps, *value.shape[-2:])


class Plan:
    """A piece of data as potentials of a Gauss–Markov chain, and what becomes of the chain's posterior.

    Sequences of one length that miss the same entries form a group, whose covariances are the same; unless each is
    ``alone``, for reasons of its own.
    """

    def __init__(self, batch: Batch, first: Law, move: Law, seen: Law, dtype: torch.dtype, alone: bool = False):
        self.batch, self.first, self.move, self.seen, self.alone = batch, first, move, seen, alone
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
        if self.alone or not lookable():
            self.valid, self.known = None if self.inside is None else inside, known
            return
        key = inside if known is None else torch.cat([inside, known.flatten(1)], -1)
        unique, which = key.unique(dim=0, return_inverse=True)
        self.which = which if len(unique) > 1 else None
        self.valid = None if self.inside is None else unique[:, :t]
        self.known = None if known is None else unique[:, t:].unflatten(-1, (t, d))

    @property
    def even(self) -> bool:
        """Whether every frame of every sequence was seen, and weighs one."""
        return self.batch.weight is None and self.inside is None and not self.gappy

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
        if lookable():
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
            half, some = between(inner), self.valid
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
        dynamics = between(self.move.states)
        noise = between(self.move.factor @ self.move.factor.mT)
        covariance = self.first.factor @ self.first.factor.mT
        mean = self.first.states.squeeze(-1)
        return kalman.GaussMarkov(
            mean, covariance, dynamics, noise, half.mT @ half, linear, drift, self.which, self.valid, half
        )

    def _unsure(self, half: Tensor, linear: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor]:
        """Potentials with what unsure coefficients take off: −½ (z, u)ᵀ V (z, u) of each regression."""
        frames, k = self.x.shape[1], self.latents
        for law, group, own, ahead in (
            (self.seen, some, self.some, 0), (self.move, self.goes_on(self.valid), self.goes_on(self.inside), 1),
        ):  # fmt: skip
            if law.penalty is None:
                continue
            more = between(kalman.half(law.penalty[..., :k, :k]))
            more = self._where(group, more.expand(*more.shape[:-3], frames, k, k), 2)
            shape = torch.broadcast_shapes(half.shape[:-2], more.shape[:-2])
            half = torch.cat([part.expand(*shape, *part.shape[-2:]) for part in (half, more)], -2)
            if law.inputs is not None and self.u is not None:
                u = self.u if not ahead else torch.cat([self.u[:, 1:], self.u[:, :1]], 1)
                linear = linear - self._where(own, u @ law.penalty[..., k:, :k].unsqueeze(-3), 1)
        return half, linear

    def goes_on(self, inside: Tensor | None) -> Tensor:
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
            steps = self.goes_on(self.inside)
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
    def _taken_off(law: Law, z: Tensor, u: Tensor | None) -> Tensor:
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
        start = _Moments(self, weight, mean[..., :1, :, :], torch.ones_like(mean[..., :1, :, :1]))
        start.spread(cov[..., :1, :, :, :], None, None)
        move = _Moments(self, weight * inside[:, 1:], mean[..., 1:, :, :],
                        self.move.regressors(mean[..., :-1, :, :], None if u is None else u[1:]))  # fmt: skip
        move.spread(cov[..., 1:, :, :, :], cross.mT, cov[..., :-1, :, :, :])
        some = inside if self.some is None else self.some.to(inside)
        x = self.x.to(torch.float64).transpose(0, 1)
        if self.known is None:
            x = x if self.inside is None else torch.where(self.inside.mT.unsqueeze(-1), x, 0.0)
            see = _Moments(self, weight * some, x, self.seen.regressors(mean, u))
            see.spread(None, None, cov)
        else:
            gain, left = self._gains()
            filled = self._filled(mean.transpose(-3, -2), gain).transpose(-3, -2)
            see = _Moments(self, weight * some, filled, self.seen.regressors(mean, u))
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

    def completed(self, found: kalman.Smoothed) -> Tensor:
        """Observations completed by their expectations given all that was observed, ``[*r, N, T, D]``."""
        mean = self.laws(found)[0]
        if self.known is None:
            return self.x.expand(*mean.shape[:-1], self.x.shape[-1])
        return self._filled(mean.to(torch.float64), self._gains()[0]).to(mean)

    def completed_at(self, found: kalman.Smoothed, where: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``[*r, g, D]`` and covariances of some frames, by their places among all, given all observations."""
        mean, covariance = self.laws(found)
        lead = mean.dim() - 3
        filled = self.completed(found).flatten(lead, lead + 1)[..., where, :]
        if self.known is None:
            return filled, torch.zeros_like(filled).diag_embed()
        frame, covariance = self.frame.flatten()[where], covariance.flatten(lead, lead + 1)[..., where, :, :]
        pull, rest = (value[..., frame, :, :] for value in self._pulled(*self._gains()))
        return filled, (pull @ covariance.to(torch.float64) @ pull.mT + rest).to(mean)

    def completed_along(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Observations completed by draws given states ``z [n, N, T, L]`` and what was observed, ``[n, N, T, D]``."""
        if self.known is None:
            return self.x.expand(*z.shape[:-1], -1)
        gain, left = self._gains()
        filled = self._filled(z.to(torch.float64), gain)
        noise = torch.randn(filled.shape, dtype=torch.float64, device=z.device, generator=generator)
        more = (root_of(left)[self.frame] @ noise.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.entries, filled, filled + more).to(self.x)


class _Moments:
    """Σ w E[…] of a child y and its covariates v: the products of their means, and then their covariances."""

    def __init__(self, plan: Plan, weight: Tensor, y: Tensor, v: Tensor):
        self.plan, self.weight = plan, weight
        lead = torch.broadcast_shapes(y.shape[:-3], v.shape[:-3])
        # Rows of all frames and sequences one below the other, and one product for all of their moments.
        both = torch.cat([value.expand(*lead, *value.shape[-3:]) for value in (v, y)], -1)
        heavy = both if plan.even else weight.mT.unsqueeze(-1) * both
        product = heavy.flatten(-3, -2).mT @ both.flatten(-3, -2)
        m = v.shape[-1]
        self.count = weight.sum().expand(lead)
        self.yy, self.vy, self.vv = product[..., m:, m:], product[..., :m, m:], product[..., :m, :m]

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
