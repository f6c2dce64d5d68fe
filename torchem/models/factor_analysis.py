"""Factor analysis and probabilistic principal components: columns that a few continuous scores explain."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid, whole_number
from torchem.factor import Factor, Kernel
from torchem.factors import LowRankGaussian
from torchem.factors.low_rank import ScorePass
from torchem.model import DiscreteModel, EStep, Reduction
from torchem.models.imputation import Completing, Gaps, complete, floating, kinds_of
from torchem.models.unseen import Among
from torchem.ops import linalg, reduce
from torchem.ops.gaussian import LOG_2PI
from torchem.stats import Stats

Noise = Literal["diag", "spherical"]


class FactorAnalysis(Completing, DiscreteModel):
    """x = μ + W z + e with scores z ~ N(0, I_q) and noise e ~ N(0, Ψ): p(x) = N(x; μ, W Wᵀ + Ψ).

    With a noise variance for each column (``"diag"``) factor analysis, with one for all (``"spherical"``) probabilistic
    principal components. E-step: the posterior of the scores, of precision M = I + Wᵀ Ψ⁻¹ W and mean
    M⁻¹ Wᵀ Ψ⁻¹ (x − μ). M-step: regression on the scores with expanded parameters; see `LowRankGaussian`, which this is
    with one component. Of complete data the weight, mean and scatter matrix are all that any iteration needs: they are
    made once, and an iteration costs O(D² q) however many rows there are. Missing entries (NaN) are exact.

    Loadings are determined up to a rotation of the scores. A noise variance at its floor is a Heywood case, for which
    `Result.floored` names component 0.

    Args:
        n_features: D, the number of columns.
        n_factors: q, the number of scores, below D.
        noise: ``"diag"`` or ``"spherical"``.
        covariance_floor: Least noise variance, relative to the data's of the column.
        floor_type: ``"relative"``, ``"absolute"`` or ``"additive"``.

    Raises:
        InvalidArgument: For sizes out of range or options that do not exist.

    Source: D. B. Rubin, D. T. Thayer (1982); M. E. Tipping, C. M. Bishop (1999); C. Liu, D. B. Rubin, Y. N. Wu (1998).

    Example:
        >>> m = FactorAnalysis(3, 1)
        >>> m.loadings, m.noise_variance = [[2.0], [1.0], [0.0]], [1.0, 1.0, 1.0]
        >>> m.posterior([[2.0, 2.0, 5.0]]).mean
        tensor([[1.]], grad_fn=<...>)
    """

    e_steps: ClassVar[tuple[EStep, ...]] = ("soft",)
    anneals: ClassVar[bool] = False

    component: Any  # LowRankGaussian, or that in a wrapper

    def __init__(
        self,
        n_features: int,
        n_factors: int,
        noise: Noise = "diag",
        *,
        covariance_floor: float = 1e-6,
        floor_type: Literal["relative", "absolute", "additive"] = "relative",
    ):
        super().__init__()
        whole = isinstance(n_features, int) and not isinstance(n_features, bool)
        if whole and not (isinstance(n_factors, int) and 1 <= n_factors < n_features):
            raise invalid(
                "n_factors", f"a whole number from 1 to n_features − 1 = {n_features - 1}", repr(n_factors),
                "take fewer factors than columns",
            )  # fmt: skip
        self.component = LowRankGaussian(1, n_features, n_factors, noise, covariance_floor, floor_type)
        self.n_features, self.n_factors = n_features, n_factors
        self.noise: Noise = noise
        self.covariance_floor, self.floor_type = self.component.covariance_floor, floor_type
        self._starts: tuple[Sequence[torch.Generator], int] = ((), 0)

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return (("component", self.component),)

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Float[Tensor, "*r d"]:
        """μ ``[*r, D]``; assignable."""
        return self.component.means.squeeze(-2)

    @mean.setter
    def mean(self, value: Any) -> None:
        self._assign("means", "mean", value, -2)

    @property
    def loadings(self) -> Float[Tensor, "*r d q"]:
        """W ``[*r, D, q]``; assignable."""
        return self.component.loadings.squeeze(-3)

    @loadings.setter
    def loadings(self, value: Any) -> None:
        self._assign("loadings", "loadings", value, -3)

    @property
    def noise_variance(self) -> Float[Tensor, "*shape"]:
        """Ψ: ``[*r, D]``, spherical ``[*r]``; assignable, positive."""
        return self.component.noise_variances.squeeze(-2 if self.noise == "diag" else -1)

    @noise_variance.setter
    def noise_variance(self, value: Any) -> None:
        self._assign("noise_variances", "noise_variance", value, -2 if self.noise == "diag" else -1)

    def _assign(self, view: str, name: str, value: Any, axis: int) -> None:
        given, own = as_tensor(value, name), getattr(self, name)
        if given.shape != own.shape:
            raise invalid(name, f"shape {list(own.shape)}", list(given.shape), "give an entry for each column")
        sound = given.isfinite() & ((given > 0) | (name != "noise_variance"))
        if not bool(sound.all()):
            kind = "positive finite numbers" if name == "noise_variance" else "finite numbers"
            raise invalid(name, kind, f"{float(given[~sound][0]):g}", "correct that entry")
        setattr(self.component, view, given.unsqueeze(axis))

    @property
    def covariance(self) -> Float[Tensor, "*r d d"]:
        """W Wᵀ + Ψ, ``[*r, D, D]``; assign loadings and noise variances instead."""
        return self.component.covariances.squeeze(-3)

    # ---- inference --------------------------------------------------------------------------------------------

    @property
    def labelled(self) -> None:
        """None: the latents are continuous."""
        return

    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        # The scores are summed out by the factor: one configuration is left.
        return potentials["component"].squeeze(-1)

    def check(self, batch: Batch) -> Batch:
        self.component.check(batch)
        if batch.evidence is not None:
            raise invalid("labels", "none: the latents are not one discrete state", "some", "leave them out")
        return batch

    def cast(self, batch: Batch) -> Batch:
        x = self.component.cast(batch.x)
        return batch if x is batch.x else batch.with_x(x)

    def _e_step(self, batch: Batch, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        rows = self.component.kernel()
        plain = isinstance(self.component, LowRankGaussian) or self.component.averages
        if not plain or not isinstance(rows, ScorePass) or self._incomplete(batch):
            return super()._e_step(batch, infer)
        moments = batch.remember(("moments", self.dtype, self.device), lambda: self._moments(batch))
        kernel = _Scatter(rows.factor, *moments, posterior=rows.posterior)
        return self._assembled({"component": kernel}, kernel.log_likelihood, batch)

    def _incomplete(self, batch: Batch) -> bool:
        """Whether an entry is missing; where values are not known it may be."""
        if not values_known() or batch.observed is not None:
            return True
        return batch.remember("missing", lambda: bool(batch.x.isnan().any()))

    def _moments(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, mean ``[D]`` and scatter matrix ``[D, D]`` about it, float64, of all rows.

        Source: T. F. Chan, G. H. Golub, R. J. LeVeque (1979), equation 2.1, for those of parts together.
        """
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        mean = count.expand(self.n_features)
        scatter = count.expand(self.n_features, self.n_features)
        for piece in self.stream(batch):
            x = piece.x.to(torch.float64)
            if piece.weight is None:
                own, center = count.new_full((), len(x)), x.mean(0) if len(x) else mean
                gap = x - center
                inner = gap.mT @ gap
            else:
                weight = piece.weight.to(x)
                x = torch.where((weight > 0).unsqueeze(-1), x, mean)  # weight zero silences what is not finite
                own = weight.sum()
                center = (weight @ x) / torch.where(own > 0, own, 1.0)
                gap = x - center
                inner = (weight.unsqueeze(-1) * gap).mT @ gap
            total, shift = count + own, center - mean
            safe = torch.where(total > 0, total, 1.0)
            scatter = scatter + inner + torch.outer(shift, shift) * (count * own / safe)
            mean = mean + shift * (own / safe)
            count = total
        return count, mean, scatter

    # ---- use --------------------------------------------------------------------------------------------------

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        return self._each(self._read(data, fields), self.log_partition, score=True)

    def posterior(self, data: Any, **fields: Any) -> MultivariateNormal:
        """p(z | x) of each row: normal, ``.mean [N, q]`` and ``.covariance_matrix [N, q, q]``."""
        mean, factor = self._each(self._read(data, fields), lambda p, b: self._scores(b))
        return MultivariateNormal(mean, scale_tril=factor, validate_args=False)

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # Under a posterior of the parameters they are less sure.
        mean, covariance = self.component.unwrapped.score_law(self.cast(batch), self.component.kernel())
        mean, covariance = mean.squeeze(-2), covariance.squeeze(-3)
        return mean, linalg.cholesky(covariance).expand(*mean.shape, self.n_factors)

    def transform(self, data: Any, **fields: Any) -> Float[Tensor, "*r n q"]:
        """Expected scores of each row, ``[N, q]``."""
        return self.posterior(data, **fields).mean

    def most_likely(self, data: Any, **fields: Any) -> Float[Tensor, "*r n q"]:
        """The most probable scores of each row, ``[N, q]``: those expected."""
        return self.transform(data, **fields)

    def column_kinds(self) -> list[tuple[bool, bool]]:
        return kinds_of(self.component)

    def unseen(self, batch: Batch, index: Tensor) -> Among:
        """See `Completing.unseen`: the normal law of a row given the entries that were seen."""
        rows = floating(batch[index], self)
        share = torch.ones(*self.replicas, len(rows), 1, dtype=self.dtype, device=self.device)
        return Among(self.component, rows, share)

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`."""
        rows = floating(gaps.batch[gaps.index], self)
        states = torch.zeros(draws, len(rows), dtype=torch.long, device=self.device)
        return complete(self.component, rows, states, generator)

    @torch.no_grad()
    def sample(self, n: int, *, latents: bool = False, generator: torch.Generator | None = None) -> Any:
        """Draw ``n`` observations ``[n, D]``, and their scores ``[n, q]`` when ``latents`` is True.

        Under a posterior of the parameters observations are draws of the predictive, or with scores those at its means.
        """
        whole_number("n", n, 0, "give the number of draws")
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "generator": generator}
        z, noise = torch.randn(n, self.n_factors, **options), torch.randn(n, self.n_features, **options)
        if self.component.averages and not latents:
            return self.component.sample(torch.zeros(n, dtype=torch.long, device=self.device), None, generator)
        deviation = self.noise_variance.sqrt()
        x = self.mean + z @ self.loadings.mT + noise * deviation
        return (x, z) if latents else x

    # ---- starts and health ------------------------------------------------------------------------------------

    def begin(self, generators: Sequence[torch.Generator], first: int) -> None:
        self._starts = (generators, first)

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        """Principal axes; of restarts after the first random loadings."""
        if len(batch) <= self.n_factors:
            raise invalid(
                "data", f"more rows than the {self.n_factors} factors", len(batch), "take fewer factors"
            )  # fmt: skip
        if isinstance(self.component, LowRankGaussian) and not self._incomplete(batch):
            moments = self._moments(batch)
            values = self.component.climbed(lambda start: _Scatter(start, *moments).stats())
        else:
            weight = expected if batch.weight is None else expected * batch.weight.unsqueeze(-1).to(expected)
            values = self.component.initialize(self.cast(batch), weight)
        self.assign({f"component.{name}": value for name, value in (values | self._scattered(values)).items()})

    def _scattered(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        generators, first = self._starts
        if first + len(generators) <= 1 or self.component.frozen("loading") is not None:
            return {}
        name = next(name for name in values if name.endswith("loading"))  # a wrapper's parameters stand below it
        loading = values[name]
        shape, scale = loading.shape[-2:], (self.component.unit / (1 + self.n_factors)).sqrt().unsqueeze(-1)
        drawn = torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in generators])
        drawn = (drawn.to(scale) * scale).to(loading).unsqueeze(-3)
        drawn = drawn if self.replicas else drawn[0]
        later = first + torch.arange(len(generators), device=loading.device) > 0
        return {name: torch.where(later.view(-1, 1, 1, 1) if self.replicas else later[0], drawn, loading)}

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        values = self.component.initialize_at(self.cast(batch), index)
        self.assign({f"component.{name}": value for name, value in values.items()})

    def degenerate(self) -> Tensor | None:
        return self.component.degenerate()

    @classmethod
    def examples(cls) -> list[tuple["FactorAnalysis", Batch]]:
        """Factor analysis of weighted rows, and principal components of rows with missing entries."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        found = []
        for noise, q in (("diag", 2), ("spherical", 1)):
            model = cls(4, q, noise).double()  # pyright: ignore[reportArgumentType]
            model.mean, model.loadings = randn(4), randn(4, q)
            model.noise_variance = 0.3 + randn(*model.noise_variance.shape).square()
            x = randn(30, 4) @ randn(4, 4) + 0.5
            weight = randn(30).square()
            weight[::5] = 0
            if q == 1:
                x[3:9, 1] = x[20:, 0] = x[12] = torch.nan
            found.append((model, Batch(x, weight=weight if q == 2 else None)))
        return found


class _Scatter(Kernel):
    """The statistics and the likelihood of complete rows from their weight, mean and scatter matrix."""

    def __init__(
        self, factor: LowRankGaussian, count: Tensor, mean: Tensor, scatter: Tensor, posterior: Stats | None = None
    ):
        self.factor, self.posterior = factor, posterior
        center, loading = factor.mean.to(torch.float64).squeeze(-2), factor.loading.to(torch.float64).squeeze(-3)
        variance = factor.variances().to(torch.float64).squeeze(-2)
        weighted = loading / variance.unsqueeze(-1)
        eye = torch.eye(loading.shape[-1], dtype=torch.float64, device=loading.device)
        precision = eye + loading.mT @ weighted
        if posterior is not None:  # as in the pass over rows
            unsure = factor.unsure(posterior).squeeze(-4).sum(-3)
            precision = precision + unsure[..., 1:, 1:]
        inverse = linalg.inverse_factor(linalg.cholesky(precision))
        left = inverse.mT @ inverse
        gap = mean - center
        moment = scatter + count * gap.unsqueeze(-1) * gap.unsqueeze(-2)
        pull = left @ weighted.mT  # ẑ = pull (x − μ)
        cross = moment @ pull.mT
        spread = pull @ cross
        first, score = count * gap, count * (pull @ gap.unsqueeze(-1)).squeeze(-1)
        if posterior is not None:  # less `off`
            off = (left @ unsure[..., 1:, :1]).squeeze(-1)
            aside = score.unsqueeze(-1) * off.unsqueeze(-2)
            cross = cross - first.unsqueeze(-1) * off.unsqueeze(-2)
            spread = spread - aside - aside.mT + count * off.unsqueeze(-1) * off.unsqueeze(-2)
            score = score - count * off
        square = moment.diagonal(dim1=-2, dim2=-1)
        # ‖x − μ − W ẑ‖²_Ψ + ‖ẑ‖², summed, in which nothing cancels but what the fit explains.
        rest = square - 2 * (cross * loading).sum(-1) + ((loading @ spread) * loading).sum(-1)
        distance = (rest / variance).sum(-1) + spread.diagonal(dim1=-2, dim2=-1).sum(-1)
        log_det = variance.log().sum(-1) - 2 * inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if posterior is not None:
            distance = distance + count * unsure[..., 0, 0] + 2 * (unsure[..., 0, 1:] * score).sum(-1)
            distance = distance + (unsure[..., 1:, 1:] * spread).sum((-2, -1))
            log_det = log_det - 2 * factor.blur(posterior).squeeze(-2).sum(-1)
        self.log_likelihood = -0.5 * (distance + count * (log_det + gap.shape[-1] * LOG_2PI))
        shift = center - factor.origin.to(torch.float64)
        whole = count.expand(first.shape[:-1])
        own = {
            "count": whole, "dof": whole, "first": first + count * shift,
            "square": square + 2 * shift * first + count * shift.square(),
            "cross": cross + shift.unsqueeze(-1) * score.unsqueeze(-2),
            "score": score, "outer": spread + count * left,
        }  # fmt: skip
        ranks = {"count": 0, "dof": 0, "first": 1, "square": 1, "cross": 2, "score": 1, "outer": 2}
        own = {name: value.unsqueeze(-1 - ranks[name]) for name, value in own.items()}  # one component
        total = Stats(own, version=factor.version)
        self.total = total if posterior is None else factor.columns(total)

    def log_potential(self, batch: Batch) -> Tensor:
        raise NotImplementedError("rows are not seen one by one")

    def collect(self, batch: Batch, expected: Tensor) -> None:
        raise NotImplementedError("rows are not seen one by one")

    def stats(self) -> Stats:
        return self.total

    def inner(self) -> Tensor:
        if self.posterior is not None:
            return self.factor.expected_sum(self.posterior, self.total)
        return self.factor.expected_log_prob(self.total)
