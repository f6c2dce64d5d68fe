"""What a mixture says of observations to come, given covariates: means, spreads, quantiles and densities."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import InvalidArgument, invalid
from torchem.factor import Factor
from torchem.models.imputation import bisected
from torchem.models.unseen import Components, total, total_covariance
from torchem.ops import reduce


@dataclass(frozen=True)
class Prediction:
    """The law p(x | u) = Σ_k g_k(u) p(x | u, k) of each of some rows of covariates.

    Attributes:
        component: Whose densities are mixed.
        batch: The covariates, offsets and trials; its x is NaN.
        weights: ``[N, K]`` probability of each component: what the gate says.

    Source: for the moments of mixtures S. Frühwirth-Schnatter (2006), section 1.2.4.

    Example:
        >>> import torchem
        >>> from torchem.factors import Categorical, LinearGaussian
        >>> m = torchem.Mixture(Categorical(2), LinearGaussian(2, 1, 1))
        >>> m.component.weight = [[[-3.0]], [[3.0]]]
        >>> p = m.predict([[1.0]])
        >>> p.mean.tolist(), p.variance.tolist()
        ([[0.0]], [[10.0]])
    """

    component: Factor | Components
    batch: Batch
    weights: Tensor

    @property
    def component_means(self) -> Tensor:
        """E[x | u, k], ``[N, K, D]``."""
        return self._moments()[0]

    @property
    def component_variances(self) -> Tensor:
        """Variance of each column given u and k, ``[N, K, D]``."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        # Angles have directions for means: what is said of them is said where they are missing.
        component = self.component
        mean, variance = component.conditional(self.batch) if any(component.circular) else component.moments(self.batch)
        shape = (*self.weights.shape, mean.shape[-1])
        return mean.expand(shape), variance.expand(shape)

    @property
    def mean(self) -> Tensor:
        """E[x | u], ``[N, D]``; of angles the mean direction."""
        return self._total()[0]

    @property
    def variance(self) -> Tensor:
        """Variance of each column given u, ``[N, D]``: that within components and that between their means.

        Of angles 1 − R, with R the length of the mean of their directions.
        """
        return self._total()[1]

    def _total(self) -> tuple[Tensor, Tensor]:
        return total(self.weights, *self._moments(), self.component.circular)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariances of the columns given u, ``[N, D, D]``: those within components and those between their means.

        Raises:
            NotImplementedError: If the family has none.
        """
        within = self.component.conditional_covariance(self.batch)
        return total_covariance(self.weights, self.component_means, within)

    def log_density(self, x: Any) -> Tensor:
        """log p(x | u) of each row at each of some points, ``[N, G]``.

        Args:
            x: ``[G, D]`` points, or ``[G]`` where there is one column.
        """
        points = as_tensor(x, "x").to(self.weights)
        points = points.unsqueeze(-1) if points.dim() < 2 else points
        size = self.batch.x.shape[-1]
        if points.dim() != 2 or points.shape[-1] != size:
            raise invalid("x", f"points [G, {size}]", f"shape {list(points.shape)}", "give a grid of points")
        mixing = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny).log()
        return torch.stack([reduce.logsumexp(mixing + self._log_prob(point)) for point in points], -1)

    def density(self, x: Any) -> Tensor:
        """p(x | u) of each row at each of some points, ``[N, G]``; probabilities where x are counts.

        Args:
            x: ``[G, D]`` points, or ``[G]`` where there is one column.
        """
        return self.log_density(x).exp()

    def _log_prob(self, point: Tensor) -> Tensor:
        many = self.batch.with_x(self.component.cast(point.expand(len(self.weights), -1)))
        possible = self._possible(many)
        value = self.component.log_prob(many if possible.all() else self.batch.with_x(self._anywhere(many, possible)))
        return torch.where(possible.unsqueeze(-1), value, -torch.inf)

    def _possible(self, many: Batch) -> Tensor:
        """Which rows the family can read at a point, ``[N]``: others have no density there (half a count)."""
        whole = self._readable(many)
        rows = range(len(many)) if not whole and many.trials is not None else ()
        each = [self._readable(many[i : i + 1]) for i in rows] or [whole] * len(many)
        return torch.tensor(each, dtype=torch.bool, device=many.x.device)

    def _readable(self, many: Batch) -> bool:
        try:
            self.component.check(many)
        except InvalidArgument:
            return False
        return True

    @staticmethod
    def _anywhere(many: Batch, possible: Tensor) -> Tensor:
        """What stands for points that cannot be read: nothing observed."""
        x = many.x if many.x.is_floating_point() else many.x.to(torch.float64)
        return torch.where(possible.unsqueeze(-1), x, torch.nan)

    def cdf(self, x: Tensor) -> Tensor:
        """P(each column of a row is at most x), ``[N, D]``, for one point ``x [N, D]`` of each row."""
        found = self.component.cdf(self.batch.with_x(x))
        return (self.weights.unsqueeze(-1) * found).sum(-2)

    @torch.no_grad()
    def quantile(self, q: Any) -> Tensor:
        """Where the law of each column has a share ``q`` below, ``[N, D]``; ``[Q, N, D]`` for Q shares.

        By halving a bracket (Cantelli's inequality gives one) of the mixture's distribution function; for counts the
        least number whose probability of not being exceeded is at least q.

        Args:
            q: A number between 0 and 1, or several.

        Raises:
            InvalidArgument: If one is not between them, or a family has no distribution function in closed form
                (angles, names, Student's t).
        """
        shares = as_tensor(q, "q").to(torch.float64)
        if shares.dim() > 1 or not bool(((shares > 0) & (shares < 1)).all()):
            raise invalid("q", "numbers between 0 and 1", q, "give for example [0.05, 0.95]")
        try:
            found = [self._quantile(float(share)) for share in shares.reshape(-1)]
        except NotImplementedError as error:
            raise invalid(
                "quantile", "families with a distribution function", str(error).partition(";")[0],
                "read .density, or take quantiles of model.sample(n, inputs=…)",
            ) from error  # fmt: skip
        return torch.stack(found) if shares.dim() else found[0]

    def _quantile(self, q: float) -> Tensor:
        counted = [values is not None or self.component.discrete for values in self.component.outcomes()]
        return bisected(counted, self.cdf, *self._moments(), q)
