"""What a mixture says of observations to come, given covariates: means, spreads, quantiles and densities."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor
from torchem.models.unseen import Components, total_covariance
from torchem.ops import reduce

#: Halvings of a bracket: more than float64 can tell apart.
_HALVINGS = 80


@dataclass(frozen=True)
class Prediction:
    """The law p(x | u) = Σ_k g_k(u) p(x | u, k) of each of some rows of covariates.

    Attributes:
        component: Whose densities are mixed.
        batch: The covariates, offsets and trials; its x stands for nothing.
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
        mean, variance = self.component.moments(self.batch)
        shape = (*self.weights.shape, mean.shape[-1])
        return mean.expand(shape), variance.expand(shape)

    @property
    def mean(self) -> Tensor:
        """E[x | u], ``[N, D]``."""
        return (self.weights.unsqueeze(-1) * self.component_means).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Variance of each column given u, ``[N, D]``: that within components and that between their means."""
        means, variances = self._moments()
        gap = means - self.mean.unsqueeze(-2)
        return (self.weights.unsqueeze(-1) * (variances + gap.square())).sum(-2)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariances of the columns given u, ``[N, D, D]``: those within components and those between their means.

        Raises:
            NotImplementedError: If the family has none.
        """
        blank = self.batch.with_x(torch.full_like(self.batch.x, torch.nan))
        within = self.component.conditional_covariance(blank)
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
        x = self.component.cast(point.expand(len(self.weights), -1))
        return self.component.log_prob(self.batch.with_x(x))

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
            InvalidArgument: If one is not between them.
        """
        shares = as_tensor(q, "q").to(torch.float64)
        if shares.dim() > 1 or not bool(((shares > 0) & (shares < 1)).all()):
            raise invalid("q", "numbers between 0 and 1", q, "give for example [0.05, 0.95]")
        found = [self._quantile(float(share)) for share in shares.reshape(-1)]
        return torch.stack(found) if shares.dim() else found[0]

    def _quantile(self, q: float) -> Tensor:
        means, variances = self._moments()
        spread = variances.sqrt()
        low = (means - spread * ((1 - q) / q) ** 0.5).amin(-2)
        high = (means + spread * (q / (1 - q)) ** 0.5).amax(-2)
        if self.component.discrete:
            low, high = torch.full_like(low, -1.0), high.ceil() + 1
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = self.cdf(middle) >= q
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high.round() if self.component.discrete else high
