"""Linear regression with normal noise: mixtures of regressions, switching regressions, experts, dynamics."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, one_of
from torchem.factor import Conjugate, Factor, Kernel, Moments, Prior, Quadratic, normal_cdf
from torchem.factors._coefficients import Coefficients
from torchem.ops import gaussian as ops
from torchem.ops import linalg, missing
from torchem.ops.least_squares import NormalEquations
from torchem.priors import MatrixNormalInverseWishart
from torchem.stats import Stats

CovarianceType = Literal["full", "tied", "diag", "spherical"]

#: Mass below which a component keeps its parameters.
_EMPTY = 1e-30
#: Steps of least squares: the first solves, the others take back the rounding of ill-conditioned inputs.
_REFINE = 3
#: M-steps of a start from rows with missing entries: what they were first completed by is then forgotten.
_START = 4
#: Alternations of common coefficients with the covariances that weight them.
_ALTERNATE = 20


class LinearGaussian(Coefficients, Conjugate):
    """Normal components whose means are linear in covariates.

    log p(x | u, k) = log N(x | W_k u + offset, Σ_k). There is no intercept unless u has a column of ones; the offset, a
    known number of each row (`Batch.offset`), is added to every column of the mean.

    NaN entries of x are missing at random: the density is that of what was observed, and moments are completed by
    conditional expectations. Covariates cannot be missing.

    Args:
        n_components: K, the number of states.
        n_inputs: M, the number of columns of u that it reads.
        n_outputs: D, the number of columns of x.
        covariance_type: ``"full"`` [K, D, D], ``"tied"`` [D, D], ``"diag"`` [K, D] or ``"spherical"`` [K].
        shared: Inputs whose coefficients all states have in common, or ``"all"``.
        covariance_floor: Smallest variance that the M-step allows.
        floor_type: ``"relative"`` to the data's variance per column, or ``"absolute"`` (see `Gaussian`).
        columns: Which columns of u are the inputs; all of them when None.

    Raises:
        InvalidArgument: For sizes below one, an unknown option, a negative floor or a column that u has not.

    Source: R. D. DeVeaux (1989); for common coefficients, A. Zellner (1962).

    Example:
        >>> line = LinearGaussian(2, 2, 1)
        >>> line.weight = [[[0.0, 1.0]], [[1.0, -1.0]]]
        >>> u = torch.tensor([[1.0, 0.5], [1.0, 2.0]])
        >>> line.moments(Batch(torch.zeros(2, 1), u=u))[0][..., 0].tolist()
        [[0.5, 0.5], [2.0, -1.0]]
    """

    views: ClassVar = {"weight": "coefficient", "covariances": "scale"}
    handles_missing: ClassVar[bool] = True
    splits: ClassVar = frozenset({"weight", "covariances"})
    reads: ClassVar = frozenset({"u", "offset"})

    scale: Tensor
    unit: Tensor

    def __init__(
        self,
        n_components: int,
        n_inputs: int,
        n_outputs: int,
        covariance_type: CovarianceType = "full",
        shared: Sequence[int] | Literal["all"] = (),
        covariance_floor: float = 1e-6,
        floor_type: Literal["relative", "absolute"] = "relative",
        columns: Sequence[int] | None = None,
    ):
        super().__init__(n_components, n_inputs, n_outputs, shared, columns)
        one_of("covariance_type", covariance_type, ops.STRUCTURES)
        one_of("floor_type", floor_type, ("relative", "absolute"))
        if not (isinstance(covariance_floor, (int, float)) and 0 <= covariance_floor < math.inf):
            raise invalid("covariance_floor", "a finite number of at least 0", covariance_floor, "use the default 1e-6")
        self.covariance_type: CovarianceType = covariance_type
        self.covariance_floor = float(covariance_floor)
        self.floor_type = floor_type
        self.structure = ops.STRUCTURES[covariance_type]
        self.new_parameter("scale", torch.zeros(self.structure.shape(n_components, n_outputs)))
        self.register_buffer("unit", torch.ones(n_outputs))
        if self.structure.shared:
            self.shared_parameters = self.shared_parameters | {"scale"}

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def covariances(self) -> Tensor:
        """Covariances of the noise in scikit-learn's shapes; assignable, symmetric and positive definite."""
        return self.structure.covariances(self.scale)

    @covariances.setter
    def covariances(self, value: Any) -> None:
        covariances = as_tensor(value, "covariances").to(self.device, torch.float64)
        if covariances.shape != self.scale.shape:
            raise invalid(
                "covariances", f"shape {list(self.scale.shape)} ({self.covariance_type})", list(covariances.shape),
                "see covariance_type for the shape",
            )  # fmt: skip
        if self.covariance_type in ("full", "tied"):
            size = covariances.abs().amax() + torch.finfo(torch.float64).tiny
            if bool(((covariances - covariances.mT).abs() > 1e-5 * size).any()):
                raise invalid("covariances", "symmetric matrices", "an asymmetric one", "pass (C + C.mT) / 2")
            covariances = (covariances + covariances.mT) / 2
        raw = self.structure.raw(covariances)
        if not bool(raw.isfinite().all()):
            raise invalid("covariances", "positive definite matrices", "one that is not", "add a small multiple of I")
        with torch.no_grad():
            self.scale.copy_(raw)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        u = self._inputs(batch).to(self.dtype)
        mean = _with_offset(_predicted(u.reshape(-1, self.n_inputs), self.weight), batch)
        mean = mean.movedim(-3, -2).unflatten(-3, u.shape[:-1])
        variance = self.structure.variances(self.scale, self._k, self.n_outputs)
        return mean, variance.reshape(*self.replicas, *[1] * (u.dim() - 1), self._k, self.n_outputs)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = batch.x.reshape(-1, self.n_outputs).to(torch.float64)
        u = self._inputs(batch).to(torch.float64).reshape(-1, self.n_inputs)
        center = _with_offset(_predicted(u, self.weight.to(torch.float64)), batch)
        raw = self.scale.to(torch.float64)
        found = missing.residual_pass(self.structure, raw, self._k, self.n_outputs).conditional(x, center)
        mean, variance = (v.to(self.dtype).transpose(-3, -2).unflatten(-3, batch.x.shape[:-1]) for v in found)
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        root = self.structure.dense(self.scale.to(torch.float64), self._k, self.n_outputs)
        x = batch.x.reshape(-1, self.n_outputs)
        return missing.left_over(root @ root.mT, x).to(self.dtype).unflatten(-4, batch.x.shape[:-1])

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows with missing entries drawn: as for a `Gaussian`, a draw of all columns moved by what it lacks."""
        x = batch.x.to(torch.float64)
        drawn = self.sample(z, batch, generator).to(torch.float64)
        u = self._inputs(batch).to(torch.float64)
        for k in range(self._k):
            own = (z == k).nonzero()[:, 0]
            if not len(own):
                continue
            center = _with_offset(_predicted(u[own], self.weight[k : k + 1].detach().to(torch.float64)), batch[own])
            raw = self.scale.detach().to(torch.float64)
            sweep = missing.residual_pass(
                self.structure, raw if self.structure.shared else raw[k : k + 1], 1, self.n_outputs
            )
            moved = center[0] + x[own] - drawn[own]
            drawn[own] += sweep.conditional(moved, center)[0][0] - center[0]
        return torch.where(batch.x.isnan(), drawn.to(batch.x), batch.x)

    def cdf(self, batch: Batch) -> Tensor:
        return normal_cdf(*self.moments(batch))(batch.x)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return normal_cdf(*self.conditional(batch))

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count``, ``dof`` [*r, K], ``xx`` as the covariances, ``ux`` [*r, K, M, D] and ``uu`` [*r, K, M, M]."""
        kernel = self.kernel()
        kernel.collect(batch, expected)
        return kernel.stats()

    def latent_stats(self, x: Tensor, weight: Tensor, ux: Tensor, uu: Tensor, spread: Tensor | None = None) -> Stats:
        """Statistics where the covariates are latent too, and only their posterior moments are known.

        Args:
            x: ``[F, D]`` observations; ``[*r, F, D]`` where they were completed by expectations.
            weight: ``[*r, F]`` weight of each, of the only component.
            ux: ``[*r, M, D]`` Σ weight E[u xᵀ].
            uu: ``[*r, M, M]`` Σ weight E[u uᵀ].
            spread: ``[*r, D, D]`` Σ weight Cov(x), of what was missing.

        Source: Z. Ghahramani, M. I. Jordan (1997), appendix A.
        """
        x, mass = x.to(torch.float64), weight.to(torch.float64).unsqueeze(-2)
        x = x if x.dim() == 2 else x.unsqueeze(-3)
        second = self.structure.second(x, mass.unsqueeze(-1) * x)
        if spread is not None:
            spread = spread.to(torch.float64).unsqueeze(-3)
            second = second + self.structure.second(torch.eye(self.n_outputs).to(spread).expand_as(spread), spread)
        ux, uu = (value.to(torch.float64).unsqueeze(-3) for value in (ux, uu))
        return self._moments(mass.sum(-1), second, ux, uu)

    def _moments(self, count: Tensor, xx: Tensor, ux: Tensor, uu: Tensor) -> Stats:
        shared = ("xx",) if self.structure.shared else ()
        # Two counts, as in `Gaussian`: a conjugate prior differs in them.
        return Stats(count=count, dof=count, xx=xx, ux=ux, uu=uu, shared=shared)

    def moment_stats(self, count: Tensor, xx: Tensor, ux: Tensor, uu: Tensor) -> Stats:
        count, xx, ux, uu = (value.to(torch.float64) for value in (count, xx, ux, uu))
        second = self.structure.second(torch.eye(self.n_outputs).to(xx).expand_as(xx), xx)
        return self._moments(count, second, ux, uu)

    def quadratic(self) -> Quadratic:
        factor = self.structure.dense(self.scale, self._k, self.n_outputs)
        return Quadratic(factor, self.weight, torch.zeros_like(self.weight[..., 0, 0]))

    def expected_quadratic(self, posterior: Stats) -> Quadratic:
        root = linalg.inverse_factor(linalg.cholesky(posterior["uu"]))
        penalty = self.n_outputs * (root.mT @ root)
        held = self._held("coefficient", penalty)
        penalty = penalty if held is None else torch.where(held, 0.0, penalty)
        plain = self.quadratic()
        offset = plain.offset + self._blur(posterior).to(self.dtype)
        return Quadratic(plain.factor, plain.weight, offset, penalty.to(self.dtype))

    def kernel(self) -> Kernel:
        return _RegressionKernel(self)

    def row_size(self) -> int:
        return self._k * (3 * self.n_outputs + 2 * self.n_inputs + 4)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        order = [*self._own, *self.shared]
        if self.shared:
            stats = stats.like(
                {**stats, "ux": stats["ux"][..., order, :], "uu": stats["uu"][..., order, :][..., order]}
            )
        step = _Step(stats, len(self._own), self.covariance_type == "full")
        seen = (stats["dof"] > _EMPTY)[..., None, None]
        coefficient, common, raw = (
            None if value is None else value.to(torch.float64) for value in (self.coefficient, self.common, self.scale)
        )
        assert raw is not None

        def factors(raw: Tensor) -> Tensor:
            return self.structure.dense(raw, self._k, self.n_outputs)

        # A covariance of all states weights their common coefficients alike, so least squares need not know it.
        coupled = common is not None and not self.structure.shared and self._k > 1
        entries = self.frozen("coefficient")
        entries = None if entries is None or entries.dim() < 3 else entries
        # Where other coefficients of one column are kept than of another the covariance weights what is left, too.
        coupled = coupled or (entries is not None and not isinstance(self.structure, ops.Entrywise))
        for _ in range(_ALTERNATE if coupled else _REFINE):
            rest = step.rest(self._joined(coefficient, common))
            move = None
            if common is not None and self.frozen("common") is None:
                move = step.common(rest, factors(raw))
                common = common + move
            if coefficient is not None and entries is not None:
                moved = torch.where(seen, coefficient + step.some(rest, ~entries, factors(raw)), coefficient)
                coefficient = torch.where(entries, coefficient, moved)
            elif coefficient is not None:
                moved = torch.where(seen, coefficient + step.own(rest, move), coefficient)
                coefficient = self.keep_frozen("coefficient", moved)
            if coupled:
                raw = self._noise(stats, self._joined(coefficient, common), raw)
        raw = self._noise(stats, self._joined(coefficient, common), raw)
        values = {"coefficient": coefficient, "common": common, "scale": raw}
        return {name: value.to(self.dtype) for name, value in values.items() if value is not None}

    def _noise(self, stats: Stats, weight: Tensor, raw: Tensor) -> Tensor:
        """Coordinates of the covariances given the coefficients; ``raw`` where nothing was seen or all is frozen."""
        dof = stats["dof"]
        covariances = self.structure.estimate(self._scatter(stats, weight), dof.clamp(min=_EMPTY), self.n_outputs)
        # One covariance for all is estimated as long as any component has mass.
        seen = dof.sum(-1) > _EMPTY if self.structure.shared else dof > _EMPTY
        new = self.structure.raw(self._floored(covariances))
        new = torch.where(seen.reshape(*seen.shape, *[1] * (new.dim() - seen.dim())), new, raw)
        return self.keep_frozen("scale", new)

    def _scatter(self, stats: Stats, weight: Tensor) -> Tensor:
        """Second moments of x − W u: xx − W ux − (W ux)ᵀ + W uu Wᵀ, as the structure keeps them."""
        ux, transposed = stats["ux"], weight.mT
        cross = self.structure.second(transposed, stats["uu"] @ transposed - ux)
        return stats["xx"] + cross - self.structure.second(ux, transposed)

    def _unit(self) -> Tensor:
        unit = self.unit.to(torch.float64)
        return unit if self.floor_type == "relative" else torch.ones_like(unit)

    def _floored(self, covariances: Tensor) -> Tensor:
        # Even without a floor the M-step stays inside the floating-point cone of positive definite matrices.
        return self.structure.clip(covariances, self._unit(), max(self.covariance_floor, 1e-15))

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """An M-step; where entries are missing, EM under these responsibilities from the means of their columns."""
        return self._begun(batch, expected) or super().initialize(batch, expected)

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Lines through the chosen observations, as for other families; what these miss is first at the mean."""
        size, k = len(batch), index.shape[-1]
        expected = torch.full((*index.shape[:-1], size, k), 1.0 / size, dtype=self.dtype, device=batch.x.device)
        expected = expected.scatter_add(-2, index.unsqueeze(-2), torch.ones_like(expected[..., :1, :]))
        return self._begun(batch, expected) or super().initialize_at(batch, index)

    def _begun(self, batch: Batch, expected: Tensor) -> dict[str, Tensor] | None:
        if not missing.any_missing(batch.x):
            return None
        start, x = copy.deepcopy(self), batch.x
        filled = torch.where(x.isnan(), x.nanmean(0).nan_to_num(nan=0.0), x)
        values = self.maximize(self.gather(batch.with_x(filled), expected))
        for _ in range(_START):
            for name, value in values.items():
                start.get_parameter(name).data = value.detach()
            values = start.maximize(start.gather(batch, expected))
        return values

    def expected_log_prob(self, stats: Stats) -> Tensor:
        raw = self.scale.to(torch.float64)
        log_det = self.structure.log_det(raw, self._k, self.n_outputs)
        constant = (stats["dof"] * (log_det + self.n_outputs * ops.LOG_2PI)).sum(-1)
        return -0.5 * (constant + self.structure.trace(raw, self._scatter(stats, self.weight.to(torch.float64))))

    def prepare(self, moments: Moments) -> None:
        variance = moments.variance
        if variance.shape != (self.n_outputs,):
            return
        # A constant column has no scale of its own; it takes that of the others, or one.
        noise = (64 * torch.finfo(self.dtype).eps * moments.mean.abs()).square()
        spread = variance[variance > noise]
        fallback = spread.mean() if spread.numel() else torch.ones_like(variance[0])
        self.unit = torch.where(variance > noise, variance, fallback).to(self.unit)
        super().prepare(moments)

    def project(self) -> None:
        if self.frozen("scale") is not None:
            return
        with torch.no_grad():
            covariances = self.covariances.to(torch.float64)
            clipped = self._floored(covariances)
            unit, floor = self._unit(), max(self.covariance_floor, 1e-15)
            if bool(self.structure.below(covariances, self.scale, unit, floor, self._k).any()):
                self.scale.data = self.structure.raw(clipped).to(self.scale)

    def degenerate(self) -> Tensor | None:
        unit = self._unit()
        least = self.structure.smallest(self.covariances.detach().to(torch.float64), unit, self._k)
        # What the parameters' own rounding makes of an eigenvalue at the floor.
        largest = (self.structure.variances(self.scale.detach(), self._k, self.n_outputs) / unit).amax(-1)
        return least <= max(self.covariance_floor, 1e-15) * 1.001 + 10 * torch.finfo(self.dtype).eps * largest

    # ---- conjugate prior: matrix-normal–inverse-Wishart -------------------------------------------------------

    def log_normalizer(self, posterior: Stats) -> Tensor:
        """log ∫ Π_k |Λ_k|^{dof/2} exp(−½ tr Λ_k(xx − W ux − (W ux)ᵀ + W uu Wᵀ)) dW dΛ: `Gaussian`'s, with M means."""
        scatter = self._rest(posterior)[1]
        factors = linalg.cholesky(posterior["uu"])
        log_det = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        ones = self.structure.counts(torch.ones_like(log_det), self.n_outputs)
        marginal = self.structure.log_marginal(ones, self._mean_dof(posterior), scatter, self.n_outputs)
        return marginal + self.n_outputs / 2 * ((self.n_inputs - 1) * ops.LOG_2PI - log_det).sum(-1)

    def expected_natural(self, posterior: Stats) -> Stats:
        """Gradient of `log_normalizer`; nothing depends on the plain count."""
        leaves = dict(posterior)
        return posterior.like(torch.func.grad(lambda v: self.log_normalizer(posterior.like(v)).sum())(leaves))

    def weak_prior(self) -> MatrixNormalInverseWishart:
        """Coefficients of zero, worth little, and D degrees of freedom."""
        return MatrixNormalInverseWishart(precision=1e-2)

    def _rest(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """Posterior means of the coefficients ``[*r, K, D, M]`` and scatter about their predictions."""
        factors = linalg.cholesky(posterior["uu"])
        weight = torch.cholesky_solve(posterior["ux"], factors).mT
        return weight, self._scatter(posterior, weight)

    def _mean_dof(self, posterior: Stats) -> Tensor:
        """Degrees of freedom as of a `Gaussian`, whose only coefficient is a mean."""
        return self.structure.counts(posterior["dof"] - (self.n_inputs - 1), self.n_outputs)

    def _held(self, parameter: str, like: Tensor) -> Tensor | None:
        """Components whose coefficients or covariances are frozen, to broadcast to a tensor ``[*r, K, …]``."""
        mask = self.frozen(parameter)
        if mask is None:
            return None
        return mask.expand(self._k).reshape(self._k, *[1] * (like.dim() - len(self.replicas) - 1))

    def _given(self, posterior: Stats) -> tuple[Tensor, Tensor, Tensor]:
        """`_rest` and `_mean_dof` where coefficients may be frozen, which take away no degree of freedom."""
        weight, scatter = self._rest(posterior)
        dof = self._mean_dof(posterior)
        held = self._held("coefficient", weight)
        if held is None:
            return weight, scatter, dof
        weight = torch.where(held, self.weight.to(torch.float64), weight)
        known = self._held("coefficient", dof)
        assert known is not None
        return weight, self._scatter(posterior, weight), dof + self.n_inputs * known

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        """`log_normalizer` where coefficients or covariances of components are frozen: as for a `Gaussian`."""
        structure, d = self.structure, self.n_outputs
        _, scatter, dof = self._given(posterior)
        log_det = 2 * linalg.cholesky(posterior["uu"]).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        held = self._held("coefficient", log_det)
        own = -d / 2 * (log_det if held is None else torch.where(held, 0.0, log_det)).sum(-1)
        ones = torch.ones_like(dof)
        if self.frozen("scale") is None:
            return own + structure.log_marginal(ones, dof, scatter, d)
        raw = self.scale.to(torch.float64)
        if structure.shared:
            return own - 0.5 * structure.trace(raw, scatter)
        fixed = [self._held("scale", value) for value in (dof, scatter)]
        assert fixed[0] is not None and fixed[1] is not None
        own = own - 0.5 * structure.trace(raw, torch.where(fixed[1], scatter, 0.0))
        # What stands for the components that are known adds a constant.
        unit = structure.covariances(torch.zeros_like(raw))
        dof = torch.where(fixed[0], float(d), dof)
        return own + structure.log_marginal(ones, dof, torch.where(fixed[1], unit, scatter), d)

    def _freedom(self, posterior: Stats) -> Tensor:
        return self.structure.freedom(self._given(posterior)[2], self.n_outputs)

    def _sureness(self, posterior: Stats) -> Tensor:
        """ν, next to infinite where covariances are frozen."""
        freedom, held = self._freedom(posterior), self.frozen("scale")
        if held is None:
            return freedom
        fixed = held if self.structure.shared else self._held("scale", freedom)
        assert fixed is not None
        return torch.where(fixed, ops.CERTAIN, freedom)

    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        """Mean coefficients, and the inverses of expected precisions, Ψ/ν, as covariances."""
        weight, scatter, dof = self._given(posterior)
        raw = self.structure.raw(self.structure.divided(scatter, self.structure.freedom(dof, self.n_outputs)))
        values = {"coefficient": weight.to(self.dtype), "scale": raw.to(self.dtype)}
        return {name: self.keep_frozen(name, value) for name, value in values.items()}

    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        least = self.structure.least_freedom(self.n_outputs)
        return {
            "log_precision": linalg.log_cholesky(posterior["uu"]),
            "log_freedom": (self._freedom(posterior) - least).log(),
        }

    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        factors = linalg.from_log_cholesky(strengths["log_precision"].to(torch.float64))
        least = self.structure.least_freedom(self.n_outputs)
        freedom = strengths["log_freedom"].to(torch.float64).exp() + least
        weight, raw = self.weight.to(torch.float64), self.scale.to(torch.float64)
        dof = self.structure.dof(freedom, self._k, self.n_outputs) + (self.n_inputs - 1)
        dof = dof[..., 0] if isinstance(self.structure, ops.Entrywise) else dof
        held = self._held("coefficient", dof)
        dof = dof if held is None else dof - self.n_inputs * held.to(dof)
        uu, rows = factors @ factors.mT, (weight @ factors).mT
        xx = self.structure.multiplied(self.structure.covariances(raw), freedom) + self.structure.second(rows, rows)
        shared = ("xx",) if self.structure.shared else ()
        return Stats(count=torch.zeros_like(dof), dof=dof, xx=xx, ux=uu @ weight.mT, uu=uu, shared=shared)

    def _blur(self, posterior: Stats) -> Tensor:
        """E log N(x | W u, Λ⁻¹) − log N(x | E W u, (E Λ)⁻¹) of a row, ``[*r, K]``, but for −½ D uᵀ uu⁻¹ u."""
        dof = self._mean_dof(posterior)
        certain = torch.full_like(dof, torch.inf)
        blur = self.structure.blur(certain, self._sureness(posterior), self.n_outputs)
        return blur.sum(-1) if isinstance(self.structure, ops.Entrywise) else blur

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _ExpectedRegressionKernel(self, posterior)

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        return self._expected_inner(posterior, stats)

    def _expected_inner(self, posterior: Stats, stats: Stats) -> Tensor:
        factors = linalg.cholesky(posterior["uu"])
        unsure = torch.cholesky_solve(stats["uu"], factors).diagonal(dim1=-2, dim2=-1).sum(-1)
        held = self._held("coefficient", unsure)
        unsure = unsure if held is None else torch.where(held, 0.0, unsure)
        blur = self._blur(posterior) * stats["dof"] - self.n_outputs / 2 * unsure
        return self.expected_log_prob(stats) + blur.sum(-1)

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        batch = Batch(z) if batch is None else batch
        u = self._inputs(batch).to(torch.float64)
        freedom, d = self._sureness(posterior), self.n_outputs
        mean = _with_offset((self.weight.detach().to(torch.float64)[z] @ u.unsqueeze(-1)).squeeze(-1), batch)
        wider = 1 + self._unsure(posterior, u).mT[torch.arange(len(z)), z].unsqueeze(-1)
        if self.covariance_type == "diag":
            degrees = ratio = freedom
        else:
            less = 0 if isinstance(self.structure, ops.Entrywise) else d - 1
            lead = torch.zeros(self._k, 1, dtype=torch.float64, device=u.device)
            ratio = lead + self.structure.per_component(freedom).unsqueeze(-1)
            degrees = ratio - less
        half = torch._standard_gamma(degrees[z] / 2, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        noise = self.sample(z, batch, generator) - mean
        return (mean + noise * (wider * ratio[z] / (2 * half)).sqrt()).to(self.dtype)

    def _unsure(self, posterior: Stats, u: Tensor) -> Tensor:
        """uᵀ uu⁻¹ u ``[*r, K, n]``: how far the inputs are from those seen; zero where coefficients are known."""
        root = linalg.inverse_factor(linalg.cholesky(posterior["uu"])).to(u)
        value = (u @ root.mT).square().sum(-1)
        held = self._held("coefficient", value)
        return value if held is None else torch.where(held, 0.0, value)

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """Student's t: of rows, or where columns are independent of entries; normal where covariances are known."""
        u = self._inputs(batch).to(torch.float64).reshape(-1, self.n_inputs)
        weight, raw, d = self.weight.to(torch.float64), self.scale.to(torch.float64), self.n_outputs
        x = batch.x.to(torch.float64).reshape(-1, d)
        center, seen = _with_offset(_predicted(u, weight), batch), ~x.isnan()
        freedom, wider = self._sureness(posterior), 1 + self._unsure(posterior, u)
        if self.covariance_type == "diag":
            variance = wider.unsqueeze(-1) * self.structure.covariances(raw).unsqueeze(-2)
            distance = torch.where(seen, x - center, 0.0).square() / variance
            spread = torch.where(seen, variance.log(), 0.0)
            value = ops.student_or_normal(distance, spread, seen.to(x), freedom.unsqueeze(-2)).sum(-1)
        else:
            degrees, ratio = freedom, torch.ones_like(freedom)
            if not isinstance(self.structure, ops.Entrywise):
                degrees = freedom - d + 1
                ratio = freedom / degrees
            degrees, ratio = (self.structure.per_component(v).unsqueeze(-1) for v in (degrees, ratio))
            wider, size = wider * ratio, seen.sum(-1).to(x)
            if missing.any_missing(x):
                # Two normal densities of what was observed tell its distance and its determinant apart.
                wide = self.structure.raw(2 * self.structure.covariances(raw))
                one, two = (
                    missing.residual_pass(self.structure, scale, self._k, d).log_prob(x, center)
                    for scale in (raw, wide)
                )
                distance = 4 * (two - one) + 2 * math.log(2) * size
                log_det = -2 * one - distance - size * ops.LOG_2PI
            else:
                log_det = self.structure.log_det(raw, self._k, d).unsqueeze(-1)
                distance = self.structure.distance(x - center, self.structure.root(raw))
            value = ops.student_or_normal(distance / wider, log_det + size * wider.log(), size, degrees)
        return value.mT.to(self.dtype).unflatten(-2, batch.x.shape[:-1])

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def check_given(self) -> None:
        mask = self.frozen("coefficient")
        if mask is not None and mask.dim() > 1:
            raise invalid(
                "mask", "whole components of a posterior of coefficients", f"single coefficients {list(mask.shape)}",
                "freeze all coefficients, or leave that factor out of variational Bayes",
            )  # fmt: skip

    def check_mask(self, name: str, mask: Tensor) -> None:
        """Whole components, or single coefficients by a mask ``[K, D, M]``, where none are common to all states."""
        if name == "weight" and mask.dim() == 3 and not self.shared:
            shape = (self._k, self.n_outputs, self.n_inputs)
            if mask.shape != shape:
                raise invalid("mask", f"shape {list(shape)}", list(mask.shape), "give a truth value per coefficient")
            return
        if name == "covariances" and self.covariance_type == "tied" and mask.dim():
            raise invalid("mask", "no mask (one covariance serves all components)", list(mask.shape), "freeze it whole")
        super().check_mask(name, mask)

    def sizes(self) -> dict[str, int]:
        return {**super().sizes(), "scale": self.structure.n_parameters(self._k, self.n_outputs)}

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        batch = Batch(z) if batch is None else batch
        u = self._inputs(batch).to(self.dtype)
        factors = self.structure.dense(self.scale, self._k, self.n_outputs)
        noise = torch.randn(len(z), self.n_outputs, dtype=self.dtype, device=self.device, generator=generator)
        draws, weight = torch.empty_like(noise), self.weight
        for k in range(self._k):
            chosen = z == k
            draws[chosen] = u[chosen] @ weight[k].mT + noise[chosen] @ factors[k].mT
        return _with_offset(draws, batch)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """One for each covariance structure, of two of them with missing entries, of one of these with offsets."""
        found = [_example(kind) for kind in ("full", "tied", "diag", "spherical")]
        holes = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)) < 0.2
        for place in (1, 3):
            factor, batch = found[place]
            found[place] = factor, batch.with_x(batch.x.masked_fill(holes, torch.nan))
        found[3] = found[3][0], replace(found[3][1], offset=found[3][1].x.nansum(-1).cos())
        return list(found)


def _example(covariance_type: CovarianceType, shared: Sequence[int] = ()) -> tuple[LinearGaussian, Batch]:
    generator = torch.Generator().manual_seed(0)
    g = LinearGaussian(3, 2, 3, covariance_type, shared).double()
    weight = torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    weight[..., list(shared)] = weight[:1, :, list(shared)]
    g.weight = weight
    with torch.no_grad():
        raw = 0.3 * torch.randn(g.scale.shape, generator=generator, dtype=torch.float64)
        g.scale.copy_(raw.tril() if covariance_type in ("full", "tied") else raw)
    u = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    u[:, 0] = 1.0
    return g, Batch(torch.randn(30, 3, generator=generator, dtype=torch.float64), u=u)


def _predicted(u: Tensor, weight: Tensor) -> Tensor:
    """W_k u ``[*r, K, n, D]`` of rows ``u [n, M]``."""
    return u @ weight.mT


def _with_offset(mean: Tensor, batch: Batch) -> Tensor:
    """Means ``[…, n, D]`` of rows of a batch with its offsets, where it has any."""
    return mean if batch.offset is None else mean + batch.offset.reshape(-1, 1).to(mean)


class _Step:
    """Steps of least squares from given coefficients: those of each state, and those that all have in common.

    Common coefficients under precisions P_k solve Σ_k P_k δC A_k = Σ_k P_k G_k, with A_k and G_k what is left of the
    moments of u and of the residuals once each state's own inputs are projected out.
    """

    def __init__(self, stats: Stats, own: int, full: bool):
        uu = stats["uu"]
        self.uu, self.xu, self.split, self.full = uu, stats["ux"].mT, own, full
        self.normal = NormalEquations(uu[..., :own, :own])
        if own < uu.shape[-1]:
            mixed = uu[..., :own, own:]
            self.absorbed = self.normal.solve(mixed)
            self.size = uu.diagonal(dim1=-2, dim2=-1)[..., own:]
            self.left = uu[..., own:, own:] - mixed.mT @ self.absorbed

    def rest(self, weight: Tensor) -> Tensor:
        """Σ expected (x − W u) uᵀ, ``[*r, K, D, M]``."""
        return self.xu - weight @ self.uu

    def common(self, rest: Tensor, factors: Tensor) -> Tensor:
        """Step ``[*r, D, S]`` of the common coefficients under noise with lower factors ``[*r, K, D, D]``."""
        gradient = rest[..., self.split :] - rest[..., : self.split] @ self.absorbed
        if not self.full:
            weight = factors.diagonal(dim1=-2, dim2=-1).pow(-2)
            gram = torch.einsum("...kd,...kst->...dst", weight, self.left)
            size = torch.einsum("...kd,...ks->...ds", weight, self.size)
            right = torch.einsum("...kd,...kds->...ds", weight, gradient)
            return NormalEquations(gram, size).solve(right.unsqueeze(-1)).squeeze(-1)
        root = linalg.inverse_factor(factors)
        precision = root.mT @ root
        gram = torch.einsum("...kde,...kst->...dset", precision, self.left)
        size = torch.einsum("...kdd,...ks->...ds", precision, self.size)
        right = torch.einsum("...kde,...kes->...ds", precision, gradient)
        gram = gram.flatten(-4, -3).flatten(-2, -1)
        move = NormalEquations(gram, size.flatten(-2)).solve(right.flatten(-2).unsqueeze(-1))
        return move.squeeze(-1).unflatten(-1, right.shape[-2:])

    def some(self, rest: Tensor, free: Tensor, factors: Tensor) -> Tensor:
        """Step ``[*r, K, D, M]`` of the ``free [K, D, M]`` coefficients alone, under noise of lower factors.

        The gradient P·rest vanishes along them: (P ⊗ uu) restricted to what is free.
        """
        root = linalg.inverse_factor(factors)
        precision = root.mT @ root
        both = (free.unsqueeze(-1).unsqueeze(-1) & free.unsqueeze(-3).unsqueeze(-3)).to(precision)
        gram = precision[..., :, None, :, None] * self.uu[..., None, :, None, :] * both
        size = precision.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * self.uu.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        # What is kept solves x = 0.
        one = torch.where(free, 0.0, 1.0).to(size)
        size = torch.where(free, size, 1.0)
        gram = gram.flatten(-4, -3).flatten(-2, -1) + one.flatten(-2).diag_embed()
        right = torch.where(free, precision @ rest, 0.0).flatten(-2).unsqueeze(-1)
        return NormalEquations(gram, size.flatten(-2)).solve(right).squeeze(-1).unflatten(-1, rest.shape[-2:])

    def own(self, rest: Tensor, move: Tensor | None) -> Tensor:
        """Step ``[*r, K, D, F]`` of each state's own coefficients after the common ones moved by ``move``."""
        right = rest[..., : self.split]
        step = self.normal.solve(right.mT).mT
        return step if move is None else step - move.unsqueeze(-3) @ self.absorbed.mT


class _RegressionKernel(Kernel):
    """A pass at fixed coefficients: potentials by residuals, moments as products in float64.

    In float64 and of raw values, so that statistics have no origin that would have to move: what is far from zero
    costs as many digits as it is far, of sixteen.
    """

    def __init__(self, factor: LinearGaussian):
        self.factor, self.structure = factor, factor.structure
        self.weight = factor.weight
        self.root = self.structure.root(factor.scale)
        log_det = self.structure.log_det(factor.scale, factor.n_components, factor.n_outputs)
        self.constant = (log_det + factor.n_outputs * ops.LOG_2PI).unsqueeze(-1)
        self.total: tuple[Tensor, ...] | None = None
        #: What completes rows with missing entries, and the piece that it saw last.
        self.gaps: missing.CompletedPass | missing.EntryResiduals | None = None
        self.last: Tensor | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        factor, x = self.factor, batch.x
        if missing.any_missing(x):
            return self._of_observed(batch).mT.to(self.weight).unflatten(-2, x.shape[:-1])
        u = factor._inputs(batch).to(self.weight).reshape(-1, factor.n_inputs)
        difference = x.reshape(-1, factor.n_outputs) - _with_offset(_predicted(u, self.weight), batch)
        value = (self.structure.distance(difference, self.root) + self.constant) * -0.5
        return value.mT.unflatten(-2, x.shape[:-1])

    def _of_observed(self, batch: Batch) -> Tensor:
        """Log-densities ``[*r, K, n]`` of what was observed of rows with missing entries; makes them the last seen."""
        factor = self.factor
        u = factor._inputs(batch).to(torch.float64).reshape(-1, factor.n_inputs)
        self.center = _with_offset(_predicted(u, self.weight.to(torch.float64)), batch)
        if self.gaps is None:
            raw = factor.scale.to(torch.float64)
            self.gaps = missing.residual_pass(self.structure, raw, factor.n_components, factor.n_outputs)
        self.last = batch.x
        return self.gaps.log_prob(batch.x.reshape(-1, factor.n_outputs), self.center)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        factor = self.factor
        x = batch.x.reshape(-1, factor.n_outputs).to(torch.float64)
        u = factor._inputs(batch).reshape(-1, factor.n_inputs).to(torch.float64)
        weight = expected.reshape(*factor.replicas, -1, factor.n_components).mT.to(torch.float64)
        spread: Tensor | float = 0.0
        if missing.any_missing(x):
            if self.last is not batch.x:
                self._of_observed(batch)
            assert self.gaps is not None
            # Nothing seen is nothing said.
            weight = torch.where(x.isnan().all(-1), 0.0, weight)
            x, spread = self.center + self.gaps.residuals(), self.gaps.spread(weight)
        if batch.offset is not None:
            x = x - batch.offset.reshape(-1, 1).to(x)
        weight = weight.unsqueeze(-1)
        weighted = (weight * u).mT
        parts = (
            weight.sum((-2, -1)), self.structure.second(x, weight * x) + spread, weighted @ x, weighted @ u,
        )  # fmt: skip
        self.total = parts if self.total is None else tuple(map(torch.add, self.total, parts))

    def stats(self) -> Stats:
        if self.total is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        return self.factor._moments(*self.total)

    def inner(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats())


class _ExpectedRegressionKernel(_RegressionKernel):
    """A pass of log-densities expected under a posterior of coefficients and covariances."""

    def __init__(self, factor: LinearGaussian, posterior: Stats):
        super().__init__(factor)
        self.posterior, self.blur = posterior, factor._blur(posterior)

    def log_potential(self, batch: Batch) -> Tensor:
        factor = self.factor
        value = super().log_potential(batch)
        u = factor._inputs(batch).to(value).reshape(-1, factor.n_inputs)
        unsure = self.blur.unsqueeze(-1) - factor.n_outputs / 2 * factor._unsure(self.posterior, u)
        if missing.any_missing(batch.x):  # a row without an entry says nothing
            unsure = torch.where(batch.x.reshape(-1, factor.n_outputs).isnan().all(-1), 0.0, unsure)
        return value + unsure.mT.to(value).unflatten(-2, batch.x.shape[:-1])

    def inner(self) -> Tensor:
        return self.factor._expected_inner(self.posterior, self.stats())
