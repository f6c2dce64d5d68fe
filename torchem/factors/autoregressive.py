"""Regressions on the frames before: emissions of autoregressive hidden Markov models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Kernel, Prior
from torchem.factors._composite import Composite
from torchem.factors._lags import check_complete, with_lags
from torchem.stats import Stats

_PART = "regression"


class Autoregressive(Composite):
    """A regression on the last L frames of the same sequence.

    log p(x_t | x_{t−1}, …, x_{t−L}, u_t, k) = log p(x_t | [1, x_{t−1}, …, x_{t−L}, u_t], k) of the regression.

    `context` puts a column of ones, the lags and the sequence's own covariates together, in this order; as rows,
    ``batch.u`` is that. The first L frames of each sequence are given: they are marked as missing, and the likelihood
    is conditional on them. A sequence of no more than L frames says nothing. Entries may be missing where no observed
    frame follows. The regression's views (``weight``,
    ``covariances``) are the factor's own.

    Args:
        regression: A factor that reads covariates, with L·D inputs, one for the intercept, and the rest for u.
        lags: L.
        intercept: Whether a column of ones comes first.

    Raises:
        InvalidArgument: If there are no lags, or the regression has too few inputs.
        InvalidType: If the regression does not read covariates.

    Source: J. D. Hamilton (1994), section 22.4.

    Example:
        >>> a = Autoregressive.gaussian(2, 1, lags=2)
        >>> a.weight = [[[0.0, 0.5, 0.2]], [[1.0, -0.3, 0.0]]]
        >>> a.context(Batch(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]))).u[0, 2:].tolist()
        [[1.0, 2.0, 1.0], [1.0, 3.0, 2.0]]
    """

    regression: Factor

    def __init__(self, regression: Factor, lags: int, intercept: bool = True):
        super().__init__()
        inputs, features = getattr(regression, "n_inputs", None), getattr(regression, "n_features", None)
        if not isinstance(regression, Factor) or inputs is None or features is None:
            raise wrong_type(_PART, "a factor that reads covariates", regression, "pass for example a LinearGaussian")
        if not isinstance(lags, int) or isinstance(lags, bool) or lags < 1:
            raise invalid("lags", "a positive whole number", repr(lags), "give at least 1")
        self.intercept, self._lags = bool(intercept), lags
        #: Columns of covariates that sequences must bring themselves.
        self.n_inputs = inputs - lags * features - self.intercept
        if self.n_inputs < 0:
            raise invalid(
                _PART, f"at least {inputs - self.n_inputs} inputs ({lags} lags × {features}, intercept {intercept})",
                inputs, "build it with more",
            )  # fmt: skip
        self.regression = regression

    @classmethod
    def gaussian(
        cls,
        n_components: int,
        n_features: int,
        lags: int,
        covariance_type: Any = "full",
        intercept: bool = True,
        n_inputs: int = 0,
        **options: Any,
    ) -> "Autoregressive":
        """Linear regressions with normal noise on the last ``lags`` frames.

        Args:
            n_components: K.
            n_features: D.
            lags: L.
            covariance_type: As for `LinearGaussian`.
            intercept: Whether a column of ones comes first.
            n_inputs: Columns of covariates that sequences bring themselves.
            **options: Further arguments of `LinearGaussian`.
        """
        from torchem.factors.linear_gaussian import LinearGaussian

        inputs = intercept + lags * n_features + n_inputs
        return cls(LinearGaussian(n_components, inputs, n_features, covariance_type, **options), lags, intercept)

    # ---- the part ---------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Factor]:
        return {_PART: self.regression}

    def opened(self, stats: Stats) -> dict[str, Stats]:
        return {_PART: stats}

    def closed(self, parts: dict[str, Stats]) -> Stats:
        return parts[_PART]

    @property
    def views(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The regression's views, with their parameters' names here."""
        return {view: f"{_PART}.{name}" for view, name in self.regression.views.items()}

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_modules", {}).get(_PART)
        return getattr(part, name) if part is not None and name in part.views else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        part = self.__dict__.get("_modules", {}).get(_PART)
        if part is not None and name in part.views:
            setattr(part, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def prior(self) -> Prior | None:
        """The prior of the regression; assignable."""
        return self.regression.prior

    @prior.setter
    def prior(self, value: Prior | None) -> None:
        self.regression.prior = value

    @property
    def n_components(self) -> int | None:
        return self.regression.n_components

    @property
    def n_features(self) -> int | None:
        return self.regression.n_features

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the regression does: entries may be missing where no observed frame follows."""
        return self.regression.handles_missing

    @property
    def lags(self) -> int:
        """L, how many frames before the present one the density depends on."""
        return self._lags

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Autoregressive":
        self.regression.freeze(*(name.removeprefix(f"{_PART}.") for name in names), mask=mask)
        return self

    def unfreeze(self, *names: str) -> "Autoregressive":
        self.regression.unfreeze(*(name.removeprefix(f"{_PART}.") for name in names))
        return self

    # ---- sequences --------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        if batch.x.dim() < 3:
            self.regression.check(batch)
            return
        # What of u the regression does not read may be meant for a transition.
        width = 0 if batch.u is None else batch.u.shape[-1]
        if self.n_inputs and width != self.n_inputs:
            got = f"{width} columns" if width else "none"
            raise invalid("inputs", f"covariates [N, T, {self.n_inputs}] beside the lags", got, "pass inputs=u to fit")
        Factor.check(self, batch)
        check_complete(batch, self.lags)

    def context(self, batch: Batch) -> Batch:
        lagged = with_lags(batch, self.lags, self.dtype)
        assert lagged.u is not None
        columns = [torch.ones_like(lagged.u[..., :1]), lagged.u] if self.intercept else [lagged.u]
        if self.n_inputs and batch.u is not None:
            columns.append(batch.u)
        return replace(lagged, u=torch.cat(columns, -1))

    # ---- the distribution -------------------------------------------------------------------------------------

    def cast(self, x: Tensor) -> Tensor:
        return self.regression.cast(x)

    def log_prob(self, batch: Batch) -> Tensor:
        return self.regression.log_prob(batch)

    def log_potential(self, batch: Batch) -> Tensor:
        return self.regression.log_potential(batch)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.regression.moments(batch)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.regression.conditional(batch)

    def conditional_covariance(self, batch: Batch) -> Tensor:
        return self.regression.conditional_covariance(batch)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.regression.complete(batch, z, generator)

    def kernel(self) -> Kernel:
        return self.regression.kernel()

    def row_size(self) -> int:
        return self.regression.row_size()

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        return self.regression.stats(batch, expected)

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        return self.joined({_PART: self.regression.initialize(batch, expected)})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return self.joined({_PART: self.regression.initialize_at(batch, index)})

    def select(self, keep: Tensor) -> "Autoregressive":
        return Autoregressive(self.regression.pruned(keep), self.lags, self.intercept)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``[n, D]`` given states ``z [n]`` and what `context` made of the frames before, in ``batch.u``."""
        return self.regression.sample(z, batch, generator)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        factor = cls.gaussian(2, 3, lags=1).double()
        factor.weight = 0.4 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        x = torch.randn(1, 40, 3, generator=generator, dtype=torch.float64)
        rows = factor.context(Batch(x)).rows()
        return factor, rows[1:]
