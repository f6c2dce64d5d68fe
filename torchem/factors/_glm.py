"""Generalised linear models as observed children, by quadratics that add."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Moments
from torchem.factors._coefficients import Coefficients
from torchem.factors._counts import check_counts
from torchem.ops.least_squares import NormalEquations
from torchem.stats import Stats

#: Steps of least squares: the first solves, the others take back the rounding of ill-conditioned inputs.
_REFINE = 3
#: Steps of iteratively reweighted least squares that a start takes.
_START = 8
#: Times that a step may be halved, and log rates beyond which float64 would overflow.
_HALVINGS, _FAR = 40, 500.0
#: Change of the linear predictor per standard deviation of an input beyond which coefficients have run away.
_STEEP = 12.0


@dataclass(frozen=True)
class Expansion:
    """The log-density of an entry about a linear predictor, each ``[*r, K, D, n]``.

    Attributes:
        value: log p(y | η), without what depends on y alone.
        slope: Its derivative in η.
        bend: A curvature c for which value + slope δ − ½ c δ² lies below log p(y | η + δ).
        rate: For −exp η, below which no quadratic lies everywhere: exp η, the curvature at δ = 0. Else None.
    """

    value: Tensor
    slope: Tensor
    bend: Tensor
    rate: Tensor | None = None


class GeneralizedLinear(Coefficients):
    """Independent columns of an exponential family whose natural parameters are linear in covariates.

    log p(x | u, k) = Σ_d log f(x_d | η_kd),   η_kd = offset + w_kd · u, over the entries observed (NaN is missing).

    Q(w) = Σ_n r_nk log f(x_nd | η_nkd) is no function of statistics. The M-step maximises a quadratic that touches it
    at the coefficients v at which statistics were taken, a step of iteratively reweighted least squares: with g the
    gradient there, and curvatures c_n for which each log-density lies above its own quadratic,

        q(w) = a + b·w − ½ wᵀBw,   B = Σ_n r_n c_n u_n u_nᵀ,   b = g + B v,   a = Q(v) − g·v − ½ vᵀBv.

    In these coordinates the quadratics of all batches add, wherever each was taken, so that every way to run EM holds.
    A family says what c is; steps that a separation of the data would let run for ever are then short.

    Source: J. A. Nelder, R. W. M. Wedderburn (1972); K. Lange (1995), for one step instead of a whole inner ascent.
    """

    no_conjugate: ClassVar[str] = "the normaliser of one over coefficients has no closed form"
    handles_missing: ClassVar[bool] = True
    reads: ClassVar = frozenset({"u", "offset"})
    discrete: ClassVar[bool] = True
    independent = True

    #: Whether densities fall as −exp η, so that quadratics lie below them for steps of some length alone.
    exponential: ClassVar[bool] = False

    unit: Tensor
    center: Tensor
    extent: Tensor

    def __init__(
        self,
        n_components: int,
        n_inputs: int,
        n_outputs: int = 1,
        shared: Sequence[int] | Literal["all"] = (),
        columns: Sequence[int] | None = None,
    ):
        super().__init__(n_components, n_inputs, n_outputs, shared, columns)
        #: Standard deviation and mean of each input, and how far it goes from there, where a fit has told them.
        self.register_buffer("unit", torch.zeros(n_inputs))
        self.register_buffer("center", torch.zeros(n_inputs))
        self.register_buffer("extent", torch.zeros(n_inputs))

    # ---- the family -------------------------------------------------------------------------------------------

    @abstractmethod
    def expand(self, eta: Tensor, y: Tensor, trials: Tensor) -> Expansion:
        """The log-density of entries ``y [D, n]`` about linear predictors ``[*r, K, D, n]``."""

    @abstractmethod
    def base_measure(self, y: Tensor, trials: Tensor) -> Tensor:
        """What of the log-density depends on y alone, ``[D, n]``."""

    @abstractmethod
    def mean_variance(self, eta: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of an entry, in the shape of ``eta``."""

    @abstractmethod
    def draw(self, eta: Tensor, trials: Tensor, generator: torch.Generator | None) -> Tensor:
        """One draw ``[D, n]`` at linear predictors ``[D, n]``."""

    @abstractmethod
    def distribution(self, y: Tensor, eta: Tensor, trials: Tensor) -> Tensor:
        """P(Y ≤ y) of entries ``y [D, n]``, in the shape of ``eta``."""

    # ---- data -------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_counts(batch)

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariates ``[n, M]``, entries ``[D, n]``, offsets and trials ``[n]``, all in float64."""
        u = self._inputs(batch).reshape(-1, self.n_inputs).to(torch.float64)
        y = batch.x.reshape(len(u), batch.x.shape[-1]).to(torch.float64).mT
        offset, trials = (
            u.new_full((len(u),), default) if value is None else value.reshape(-1).to(torch.float64)
            for value, default in ((batch.offset, 0.0), (batch.trials, 1.0))
        )
        return u, y, offset, trials

    def _predictor(self, u: Tensor, offset: Tensor) -> Tensor:
        """η ``[*r, K, D, n]`` of rows."""
        return self.weight.to(u) @ u.mT + offset

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        # In float64: the terms of large counts are large and cancel.
        u, y, offset, trials = self._rows(batch)
        seen, y = _complete(y)
        value = self.expand(self._predictor(u, offset), y, trials).value + self.base_measure(y, trials)
        total = torch.where(seen, value, 0.0).sum(-2).to(self.dtype)
        return total.mT.unflatten(-2, batch.x.shape[:-1])

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u, _, offset, trials = self._rows(batch)
        mean, variance = self.mean_variance(self._predictor(u, offset), trials)
        return self._each(batch, mean), self._each(batch, variance)

    def cdf(self, batch: Batch) -> Tensor:
        u, y, offset, trials = self._rows(batch)
        return self._each(batch, self.distribution(y, self._predictor(u, offset), trials))

    def _each(self, batch: Batch, value: Tensor) -> Tensor:
        """``[*r, *n, K, D]`` of ``[*r, K, D, n]``."""
        return value.movedim(-1, -3).to(self.dtype).unflatten(-3, self._inputs(batch).shape[:-1])

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        u, _, offset, trials = self._rows(Batch(z.unsqueeze(-1)) if batch is None else batch)
        eta = (self.weight.detach().to(u)[z] @ u.unsqueeze(-1)).squeeze(-1).mT + offset
        return self.draw(eta, trials, generator).mT.to(self.dtype)

    def row_size(self) -> int:
        return self._k * self.n_outputs * (self.n_inputs + 8)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``constant [*r, K, D]``, ``linear`` [*r, K, D, M] and ``curvature`` [*r, K, D, M, M] of the quadratics.

        Where these lie below for steps of some length alone, ``hessian`` [*r, K, D, M, M] too, and how much was taken
        where: ``mass [*r, K, D]`` and, times the coefficients, ``place`` [*r, K, D, M].
        """
        u, y, offset, trials = self._rows(batch)
        seen, y = _complete(y)
        weight = expected.reshape(*self.replicas, -1, self._k).mT.to(torch.float64).unsqueeze(-2)
        weight = torch.where(seen, weight, 0.0)
        found = self.expand(self._predictor(u, offset), y, trials)
        # What is impossible may be −inf where nothing is expected.
        value = torch.where(weight > 0, weight * found.value, 0.0).sum(-1)
        gradient = (weight * found.slope) @ u
        curvature = ((weight * found.bend).unsqueeze(-1) * u).mT @ u
        theta = self.weight.to(torch.float64)
        bent = _times(curvature, theta)
        constant = value - (theta * (gradient + bent / 2)).sum(-1)
        stats = Stats(constant=constant, linear=gradient + bent, curvature=curvature)
        if found.rate is not None:
            stats["hessian"] = ((weight * found.rate).unsqueeze(-1) * u).mT @ u
            stats["mass"] = weight.sum(-1)
            stats["place"] = stats["mass"].unsqueeze(-1) * theta
        return stats

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """The quadratic that touches Q where statistics were taken, at the current parameters."""
        theta = self.weight.to(torch.float64)
        slope = stats["linear"] - _times(stats["curvature"], theta) / 2
        return (stats["constant"] + (theta * slope).sum(-1)).sum((-2, -1))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        own, order = len(self._own), [*self._own, *self.shared]
        linear, curvature = stats["linear"], stats["curvature"]
        if self.shared:
            linear, curvature = linear[..., order], curvature[..., order, :][..., order]
        step = _Step(curvature, own)
        coefficient, common = (
            None if value is None else value.to(torch.float64) for value in (self.coefficient, self.common)
        )
        for _ in range(_REFINE):
            rest, move = linear - _times(curvature, self._joined(coefficient, common)), None
            if common is not None and self.frozen("common") is None:
                move = step.common(rest)
                common = common + move
            if coefficient is not None:
                coefficient = self.keep_frozen("coefficient", coefficient + step.own(rest, move))
        values = {"coefficient": coefficient, "common": common}
        if self.exponential:
            values = self._shortened(values, stats)
        return {name: value.to(self.dtype) for name, value in values.items() if value is not None}

    def _shortened(self, values: dict[str, Tensor | None], stats: Stats) -> dict[str, Tensor | None]:
        """The part sΔ of a step that raises Q for certain, for each component and column.

        No linear predictor of the data moves further than R = |Δ·ū| + Σ_m |Δ_m| max |u_m − ū_m|, ū the mean of u, and
        exp δ − 1 − δ ≤ φ(R) δ² for δ ≤ R, where φ(R) = (exp R − 1 − R) / R². So with H = Σ r exp(η) u uᵀ, and B of the
        quadratic to whose top Δ leads,

            Q(v + sΔ) − Q(v) ≥ s ΔᵀBΔ − s² φ(sR) ΔᵀHΔ,

        of which at least half of the first term is left where 2 s φ(sR) ΔᵀHΔ ≤ ΔᵀBΔ. Within R = 1 that holds for s = 1.

        All that is for statistics taken at v. Those of several batches were taken at coefficients whose mean may lie a
        distance d from there, as that of predictors; the more it is, the nearer sR ≤ 1 / min(1, d) comes to 1.
        """
        old = {name: None if value is None else getattr(self, name).to(value) for name, value in values.items()}
        order = [*self._own, *self.shared]
        move = self._joined(**values) - self._joined(**old)
        reach = self._reach(move, order)
        rise, fall = (
            (move * _times(stats[name][..., order, :][..., order], move)).sum(-1) for name in ("curvature", "hessian")
        )
        known = stats["mass"] > 0
        mean = stats["place"] / torch.where(known, stats["mass"], 1.0).unsqueeze(-1)
        drift = self._reach(self.weight.to(move) - mean, [*range(self.n_inputs)]).clamp(max=1.0)
        share = (1.0 / (reach * torch.where(known, drift, 0.0)).clamp(min=1.0)).expand_as(reach)
        for _ in range(_HALVINGS):
            share = torch.where(2 * share * _excess(share * reach) * fall > rise, share / 2, share)
        share = share.unsqueeze(-1)
        # What all states have in common goes one way.
        shares = {"coefficient": share.amin(-3, keepdim=True) if self.shared else share, "common": share.amin(-3)}
        return {
            name: None if before is None or value is None else torch.lerp(before, value, shares[name])
            for (name, before), value in zip(old.items(), values.values(), strict=True)
        }

    def _reach(self, move: Tensor, order: list[int]) -> Tensor:
        """How far linear predictors of the data can move with their coefficients, ``[*r, K, D]``."""
        center, extent = self.center[order].to(move), self.extent[order].to(move)
        return (move @ center).abs() + move.abs() @ extent

    def normal_stats(self, precision: Tensor) -> Stats:
        """The log-density of independent normal coefficients of some ``precision [M]``, as a quadratic."""
        theta = self.weight.to(torch.float64)
        known = precision > 0
        norm = torch.where(known, (torch.where(known, precision, 1.0) / (2 * torch.pi)).log() / 2, 0.0)
        # What all states have in common counts once.
        share = torch.ones_like(precision)
        share[list(self.shared)] = 1.0 / self._k
        curvature = torch.diag_embed(precision * share).expand(*theta.shape, -1)
        stats = Stats(
            constant=(norm * share).sum().expand(theta.shape[:-1]), linear=torch.zeros_like(theta), curvature=curvature
        )
        if self.exponential:
            stats |= {"hessian": torch.zeros_like(curvature), "mass": 0 * stats["constant"], "place": stats["linear"]}
        return stats

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters from responsibilities: some steps of iteratively reweighted least squares."""
        moving = copy.deepcopy(self)
        # A start has nothing to lose: whole steps.
        moving.center, moving.extent = torch.zeros_like(self.center), torch.zeros_like(self.extent)
        for _ in range(_START):
            for name, value in moving.maximize(moving.penalized(moving.gather(batch, expected))).items():
                moving.get_parameter(name).data = value
        return dict(moving.named_parameters())

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return self.initialize(batch, self.near(batch, index))

    def prepare(self, moments: Moments) -> None:
        inputs = getattr(moments, "inputs", None)
        if inputs is not None:
            spread = inputs.variance.sqrt()
            size = torch.maximum(inputs.mean - inputs.low, inputs.high - inputs.mean)
            chosen = slice(None) if self.columns is None else list(self.columns)
            for name, value in (("unit", spread), ("center", inputs.mean), ("extent", size)):
                setattr(self, name, value[chosen].to(self.unit))
        super().prepare(moments)

    def degenerate(self) -> Tensor | None:
        """Components whose coefficients have run away, as those of classes that a plane separates do."""
        return ((self.weight.detach().abs() * self.unit) > _STEEP).any(-1).any(-1)


def _complete(y: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries are not missing, and all of them with zero for those that are."""
    seen = ~y.isnan()
    return seen, torch.where(seen, y, 0.0)


def _excess(reach: Tensor) -> Tensor:
    """(exp R − 1 − R) / R²: by its series where that cancels."""
    small = reach < 1e-2
    wide = torch.where(small, 1.0, reach).clamp(max=_FAR)
    return torch.where(small, 0.5 + reach / 6 + reach.square() / 24, (wide.expm1() - wide) / wide.square())


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


class _Step:
    """Newton steps on quadratics ``[*r, K, D]``: coefficients of each state, and those that all have in common.

    Common coefficients solve the sum over states of what is left once each state's own are eliminated.
    """

    def __init__(self, curvature: Tensor, own: int):
        self.split = own
        self.normal = NormalEquations(curvature[..., :own, :own])
        if own < curvature.shape[-1]:
            mixed = curvature[..., :own, own:]
            self.absorbed = self.normal.solve(mixed)
            left = curvature[..., own:, own:] - mixed.mT @ self.absorbed
            size = curvature.diagonal(dim1=-2, dim2=-1)[..., own:]
            self.outer = NormalEquations(left.sum(-4), size.sum(-3))

    def common(self, rest: Tensor) -> Tensor:
        """Step ``[*r, D, S]`` of the common coefficients."""
        left = rest[..., self.split :] - _times(self.absorbed.mT, rest[..., : self.split])
        return self.outer.solve(left.sum(-3).unsqueeze(-1)).squeeze(-1)

    def own(self, rest: Tensor, move: Tensor | None) -> Tensor:
        """Step ``[*r, K, D, F]`` of each state's own coefficients after the common ones moved."""
        step = self.normal.solve(rest[..., : self.split].unsqueeze(-1)).squeeze(-1)
        return step if move is None else step - _times(self.absorbed, move.unsqueeze(-3))
