"""Autoregression about a mean that switches with the state (J. D. Hamilton 1989)."""

import math
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor, Moments
from torchem.factors._lags import check_complete, lag_columns, with_lags
from torchem.ops.least_squares import NormalEquations
from torchem.stats import Stats

#: Mass below which a state keeps its variance.
_EMPTY = 1e-30
#: Rounds of the M-step: means, coefficients, both together where that climbs, variances.
_ROUNDS = 10


@lru_cache(maxsize=16)
def _states(k: int, order: int, device: str) -> Tensor:
    """``[K^(L+1), L + 1]``: the present and earlier states that each expanded state stands for."""
    code = torch.arange(k ** (order + 1), device=device).unsqueeze(-1)
    return code // k ** torch.arange(order, -1, -1, device=device) % k


class MeanAdjustedAutoregression(Factor):
    """A univariate autoregression of deviations from a mean that depends on the state.

    x_t − μ_{s_t} = Σ_l φ_l (x_{t−l} − μ_{s_{t−l}}) + ε_t,  ε_t ~ N(0, σ²) or N(0, σ²_{s_t}).

    The density depends on the last L + 1 states: states are expanded to (s_t, …, s_{t−L}), the present one most
    significant, and `log_prob`, `stats` and `sample` speak of these K^(L+1). `context` gives each frame its L lags; the
    first L frames of a sequence are given, so the likelihood is conditional on them.

    Args:
        n_components: K, the number of states.
        order: L, the number of lags.
        switching_variance: Whether each state has a variance of its own.
        variance_floor: Smallest variance that the M-step allows, relative to the data's.

    Raises:
        InvalidArgument: For sizes below one or a negative floor.

    Source: J. D. Hamilton (1989), equation 4.3; for EM, J. D. Hamilton (1990).

    Example:
        >>> growth = MeanAdjustedAutoregression(2, 1)
        >>> growth.means, growth.coefficients = [-1.0, 1.0], [0.5]
        >>> growth.moments(Batch(torch.zeros(1, 1), u=torch.tensor([[2.0]])))[0].flatten().tolist()
        [0.5, -0.5, 2.5, 1.5]
    """

    no_conjugate: ClassVar[str] = "its coefficients multiply its means"
    views: ClassVar = {"means": "mean", "coefficients": "coefficient", "variances": "scale"}
    default_init: ClassVar[str] = "kmeans"

    mean: Tensor
    coefficient: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, n_components: int, order: int, switching_variance: bool = False, variance_floor: float = 1e-6):
        super().__init__()
        for name, size in (("n_components", n_components), ("order", order)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        if not (isinstance(variance_floor, (int, float)) and 0 <= variance_floor < math.inf):
            raise invalid("variance_floor", "a finite number of at least 0", variance_floor, "use the default 1e-6")
        self._k, self.order = n_components, order
        self.memory = self.lags = order
        self.switching_variance = switching_variance
        self.variance_floor = float(variance_floor)
        self.shared_parameters = frozenset({"coefficient", *(() if switching_variance else ("scale",))})
        self.new_parameter("mean", torch.zeros(n_components))
        self.new_parameter("coefficient", torch.zeros(order))
        self.new_parameter("scale", torch.zeros(n_components if switching_variance else 1))
        self.register_buffer("unit", torch.ones(()))

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return 1

    @property
    def means(self) -> Tensor:
        """Means μ ``[*r, K]``; assignable."""
        return self.mean

    @means.setter
    def means(self, value: Any) -> None:
        self._assign("means", value)

    @property
    def coefficients(self) -> Tensor:
        """Autoregressive coefficients φ ``[*r, L]``, of the last frame first; assignable."""
        return self.coefficient

    @coefficients.setter
    def coefficients(self, value: Any) -> None:
        self._assign("coefficients", value)

    @property
    def variances(self) -> Tensor:
        """Variances σ² of the noise, ``[*r, 1 or K]``; assignable."""
        return (2 * self.scale).exp()

    @variances.setter
    def variances(self, value: Any) -> None:
        variances = as_tensor(value, "variances")
        if not bool((variances > 0).all()):
            raise invalid("variances", "positive numbers", "zero, a negative one or NaN", "correct it")
        self._assign("variances", variances.to(torch.float64).log() / 2)

    def _assign(self, view: str, value: Any) -> None:
        parameter = self.get_parameter(self.views[view])
        tensor = as_tensor(value, view).to(self.device, torch.float64)
        if tensor.shape != parameter.shape:
            raise invalid(view, f"shape {list(parameter.shape)}", list(tensor.shape), "give one number per entry")
        if not bool(tensor.isfinite().all()):
            raise invalid(view, "finite numbers", "NaN or infinity", "correct that entry")
        with torch.no_grad():
            parameter.copy_(tensor)

    # ---- sequences --------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        super().check(batch)
        if batch.x.dim() < 3:
            lag_columns(batch, self.order)
        elif batch.u is not None:
            raise invalid("inputs", "none (the regressors are lags)", f"{batch.u.shape[-1]} columns", "leave them out")
        check_complete(batch, self.order)

    def context(self, batch: Batch) -> Batch:
        return with_lags(batch, self.order, self.dtype)

    # ---- the distribution -------------------------------------------------------------------------------------

    def _past(self) -> Tensor:
        return _states(self._k, self.order, str(self.device))

    def _window(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Rows (x_t, x_{t−1}, …, x_{t−L}), ``[n, L + 1]``."""
        u = lag_columns(batch, self.order)
        return torch.cat([batch.x.reshape(-1, 1).to(dtype), u.reshape(-1, self.order).to(dtype)], -1)

    def _present(self, value: Tensor) -> Tensor:
        """A value ``[*r, 1 or K]`` of the present state, for each expanded state ``[*r, 1 or K^(L+1)]``."""
        return value.repeat_interleave(self._k**self.order, -1) if self.switching_variance else value

    def log_prob(self, batch: Batch) -> Tensor:
        filter_ = _filter(self.coefficient)
        level = (self.mean[..., self._past()] @ filter_.unsqueeze(-1)).squeeze(-1)
        filtered = filter_ @ self._window(batch, self.dtype).mT
        scale = self._present(self.scale).unsqueeze(-2)
        residual = (filtered.unsqueeze(-1) - level.unsqueeze(-2)) * (-scale).exp()
        value = -0.5 * residual.square() - scale - 0.5 * math.log(2 * math.pi)
        return value.unflatten(-2, batch.x.shape[:-1])

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance for each expanded state, ``[*r, *n, K^(L+1), 1]``."""
        past = self.mean[..., self._past()]
        level = past[..., 0] - (past[..., 1:] @ self.coefficient.unsqueeze(-1)).squeeze(-1)
        carried = self.coefficient @ lag_columns(batch, self.order).reshape(-1, self.order).to(self.dtype).mT
        mean = (carried.unsqueeze(-1) + level.unsqueeze(-2)).unflatten(-2, batch.x.shape[:-1]).unsqueeze(-1)
        variance = self._present(self.variances)
        ones = [1] * (batch.x.dim() - 1)
        return mean, variance.reshape(*self.replicas, *ones, -1, 1).expand_as(mean)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count``, ``first`` and ``second`` moments of (x_t, …, x_{t−L}) for each expanded state."""
        window = self._window(batch, torch.float64)
        weight = expected.reshape(*self.replicas, len(window), self._k ** (self.order + 1)).mT.to(torch.float64)
        pairs = (window.unsqueeze(-1) * window.unsqueeze(-2)).flatten(-2)
        second = (weight @ pairs).unflatten(-1, (self.order + 1, self.order + 1))
        # By expanded state: no axis is one of components.
        return Stats(count=weight.sum(-1), first=weight @ window, second=second, shared=("count", "first", "second"))

    def row_size(self) -> int:
        return 4 * self._k ** (self.order + 1) + 2 * (self.order + 1) ** 2

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        scale = self.scale.to(torch.float64)
        both = torch.cat([self.mean, self.coefficient], -1).to(torch.float64)
        means, coefficients = self._movable()
        for _ in range(_ROUNDS):
            precision = self._present((-2 * scale).exp())
            # Of one block the step is least squares; the two in turn always climb, if slowly. Newton's step converges.
            both = both + self._step(stats, both, precision, means)
            both = both + self._step(stats, both, precision, coefficients)
            trial = both + self._step(stats, both, precision, means + coefficients)
            # At the optimum rounding decides which loss is smaller; there Newton's step is the smooth one.
            worse = self._loss(stats, trial, precision) > self._loss(stats, both, precision) * (1 + 1e-13)
            both = torch.where(worse.unsqueeze(-1), both, trial)
            scale = self._new_scale(stats, both, scale)
        mean, coefficient = self._split(both)
        values = {"mean": mean, "coefficient": coefficient, "scale": scale}
        return {name: value.to(self.dtype) for name, value in values.items()}

    def _split(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Means and coefficients from ``[*r, K + L]``."""
        return both[..., : self._k], both[..., self._k :]

    def _movable(self) -> tuple[Tensor, Tensor]:
        """Which of ``[K + L]`` means and coefficients are means, and which coefficients, that may move: 0 and 1."""
        free = []
        for name, size in (("mean", self._k), ("coefficient", self.order)):
            held = self.frozen(name)
            kept = torch.zeros((), device=self.device) if held is None else held
            free.append(1 - kept.to(torch.float64).expand(size))
        pad = torch.nn.functional.pad
        return pad(free[0], (0, self.order)), pad(free[1], (self._k, 0))

    def _loss(self, stats: Stats, both: Tensor, precision: Tensor) -> Tensor:
        """Σ precision · residual², ``[*r]``."""
        mean, coefficient = self._split(both)
        return (precision * _quadratic(self._about(stats, mean), _filter(coefficient))).sum(-1)

    def _about(self, stats: Stats, mean: Tensor) -> Tensor:
        """Second moments of the windows about the means of their states, ``[*r, K^(L+1), L + 1, L + 1]``."""
        level = mean[..., self._past()]
        cross = stats["first"].unsqueeze(-1) * level.unsqueeze(-2)
        square = stats["count"][..., None, None] * level.unsqueeze(-1) * level.unsqueeze(-2)
        return stats["second"] - cross - cross.mT + square

    def _step(self, stats: Stats, both: Tensor, precision: Tensor, movable: Tensor) -> Tensor:
        """Newton's step ``[*r, K + L]`` of what is movable; zero where the loss is not convex.

        With the residual e = aᵀ(y − m), a = (1, −φ), under a path of states s: ∂e/∂μ_k = −Σ_l a_l [s_l = k],
        ∂e/∂φ_l = −(y_l − m_l) and ∂²e/∂μ_k∂φ_l = [s_l = k].
        """
        mean, coefficient = self._split(both)
        filter_ = _filter(coefficient).unsqueeze(-1)
        indicator = torch.nn.functional.one_hot(self._past(), self._k).to(torch.float64)
        about = (precision[..., None, None] * self._about(stats, mean)).sum(-3)
        count = (precision * stats["count"]).unsqueeze(-1)
        first = precision.unsqueeze(-1) * stats["first"] - count * mean[..., self._past()]
        design = (indicator.mT @ filter_.unsqueeze(-3)).squeeze(-1)
        residual = first @ filter_
        mixed = design.mT @ first[..., 1:] + torch.einsum("...j,jlk->...kl", residual.squeeze(-1), indicator[:, 1:])
        upper = torch.cat([design.mT @ (count * design), mixed], -1)
        gram = torch.cat([upper, torch.cat([mixed.mT, about[..., 1:, 1:]], -1)], -2)
        right = torch.cat([design.mT @ residual, (about @ filter_)[..., 1:, :]], -2)
        free = movable.unsqueeze(-1)
        return NormalEquations(gram * free * free.mT).solve(right * free).squeeze(-1)

    def _new_scale(self, stats: Stats, both: Tensor, scale: Tensor) -> Tensor:
        mean, coefficient = self._split(both)
        spread = _quadratic(self._about(stats, mean), _filter(coefficient))
        scatter = spread.unflatten(-1, (scale.shape[-1], -1)).sum(-1)
        count = stats["count"].unflatten(-1, (scale.shape[-1], -1)).sum(-1)
        # Even without a floor the M-step stays clear of zero.
        least = max(self.variance_floor, 1e-15) * self.unit.to(torch.float64)
        new = torch.maximum(scatter / count.clamp(min=_EMPTY), least).log() / 2
        return self.keep_frozen("scale", torch.where(count > _EMPTY, new, scale))

    def expected_log_prob(self, stats: Stats) -> Tensor:
        mean, coefficient, scale = (v.to(torch.float64) for v in (self.mean, self.coefficient, self.scale))
        spread = _quadratic(self._about(stats, mean), _filter(coefficient))
        scale = self._present(scale)
        constant = stats["count"] * (2 * scale + math.log(2 * math.pi))
        return -0.5 * (constant + (-2 * scale).exp() * spread).sum(-1)

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Means at the chosen observations, no autoregression, the variance of the data."""
        x = batch.x[..., 0].to(torch.float64)
        weight = torch.ones_like(x) if batch.weight is None else batch.weight.to(x)
        center = (weight * x).sum() / weight.sum()
        variance = ((weight * (x - center).square()).sum() / weight.sum()).clamp(min=1e-300)
        values = {
            "mean": x[index], "coefficient": torch.zeros_like(self.coefficient),
            "scale": (variance.log() / 2).expand_as(self.scale),
        }  # fmt: skip
        return {name: self.keep_frozen(name, value.to(self.dtype)) for name, value in values.items()}

    def prepare(self, moments: Moments) -> None:
        if moments.variance.shape == (1,) and bool(moments.variance > 0):
            self.unit = moments.variance[0].to(self.unit)

    def project(self) -> None:
        if self.frozen("scale") is None:
            least = (max(self.variance_floor, 1e-15) * self.unit).log() / 2
            self.scale.data = torch.maximum(self.scale.data, least)

    def degenerate(self) -> Tensor | None:
        floored = self.variances.detach() <= max(self.variance_floor, 1e-15) * self.unit * 1.001
        return floored.expand(*self.replicas, self._k)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def check_mask(self, name: str, mask: Tensor) -> None:
        if mask.dim() and self.views[name] in self.shared_parameters:
            raise invalid("mask", f"no mask ({name} serve all components)", list(mask.shape), "freeze them whole")
        super().check_mask(name, mask)

    def n_parameters(self) -> int:
        total = 0
        for name, parameter in self.named_parameters():
            mask = self.frozen(name)
            kept = 0.0 if mask is None else float(mask.double().mean())
            total += round(parameter[(0,) * len(self.replicas)].numel() * (1 - kept))
        return total

    def select(self, keep: Tensor) -> "MeanAdjustedAutoregression":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = type(self)(len(index), self.order, self.switching_variance, self.variance_floor)
        small = small.to(self.device, self.dtype)
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            whole = value.dim() == 0 or name.removeprefix("frozen_") in self.shared_parameters
            kept = (value if whole else value[index]).detach().clone()
            if isinstance(value, torch.nn.Parameter):
                small.get_parameter(name).data = kept
            else:
                small.register_buffer(name, kept)
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[n, 1]`` given expanded states ``z [n]`` and the lags in ``batch.u``."""
        mean, variance = self.moments(Batch(z.unsqueeze(-1)) if batch is None else batch)
        pick = z.reshape(-1, 1, 1)
        noise = torch.randn(len(z), 1, dtype=self.dtype, device=self.device, generator=generator)
        center, spread = (value.gather(-2, pick).squeeze(-2) for value in (mean, variance))
        return center + noise * spread.sqrt()

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return _example(cls(2, 2))


def _example(factor: MeanAdjustedAutoregression) -> tuple[MeanAdjustedAutoregression, Batch]:
    generator = torch.Generator().manual_seed(0)
    factor = factor.double()
    factor.means = torch.randn(factor.n_components, generator=generator, dtype=torch.float64)
    factor.coefficients = 0.4 * torch.randn(factor.order, generator=generator, dtype=torch.float64)
    rows = torch.randn(60, factor.order + 1, generator=generator, dtype=torch.float64)
    return factor, Batch(rows[:, :1], u=rows[:, 1:])


def _filter(coefficient: Tensor) -> Tensor:
    """(1, −φ_1, …, −φ_L): what makes noise of a window of deviations."""
    return torch.cat([torch.ones_like(coefficient[..., :1]), -coefficient], -1)


def _quadratic(matrix: Tensor, vector: Tensor) -> Tensor:
    """vᵀ A_j v of matrices ``[*r, J, L + 1, L + 1]`` and a vector ``[*r, L + 1]``."""
    return torch.einsum("...i,...jik,...k->...j", vector, matrix, vector)
