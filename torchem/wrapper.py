"""What factors that wrap another have in common: names, views and everything but the M-step are the wrapped one's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.factor import Adjustment, Factor, Moments, Quadratic


class Wrapper(Factor):
    """A factor around another, ``factor``: read and assigned by the other's own names."""

    factor: Factor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("factor")
            if inner is None or name.startswith("_") or name in inner._parameters:
                raise
            return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get("factor")
        if inner is not None and name in inner.views:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    def _first(self) -> Tensor:
        return self.factor._first()

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.factor.replicas

    @property
    def unwrapped(self) -> Factor:
        return self.factor.unwrapped

    @property
    def views(self) -> Any:
        """Views of the wrapped factor, with their parameters' names here."""
        return {view: f"factor.{name}" for view, name in self.factor.views.items()}

    @property
    def shared_parameters(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Parameters that all components share."""
        own = {name for name, rank in self._rank.items() if rank == 0}
        return frozenset(own | {f"factor.{name}" for name in self.factor.shared_parameters})

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether NaN entries are missing at random."""
        return self.factor.handles_missing

    @property
    def replicates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether parameters may carry a replica axis."""
        return self.factor.replicates

    @property
    def default_init(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped factor's start."""
        return self.factor.default_init

    @property
    def minorizes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether no M-step lowers Q."""
        return self.factor.minorizes

    @property
    def discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether observations are counts."""
        return self.factor.discrete

    @property
    def n_components(self) -> int | None:
        return self.factor.n_components

    @property
    def n_features(self) -> int | None:
        return self.factor.n_features

    def cast(self, x: Tensor) -> Tensor:
        return self.factor.cast(x)

    def check(self, batch: Batch) -> None:
        self.factor.check(batch)

    def row_size(self) -> int:
        return self.factor.row_size()

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column at the wrapped factor's parameters."""
        return self.factor.moments(batch)

    @property
    def independent(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether columns are independent given the state."""
        return self.factor.independent

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `Factor.conditional`, at the wrapped factor's parameters."""
        return self.factor.conditional(batch)

    def conditional_covariance(self, batch: Batch) -> Tensor:
        """As `Factor.conditional_covariance`, at the wrapped factor's parameters."""
        return self.factor.conditional_covariance(batch)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """As `Factor.complete`, at the wrapped factor's parameters."""
        return self.factor.complete(batch, z, generator)

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        """As `Factor.placed`, of the wrapped factor."""
        return self.factor.placed(rows, value)

    def outcomes(self) -> list[Tensor | None]:
        return self.factor.outcomes()

    @property
    def nominal(self) -> list[bool]:
        return self.factor.nominal

    @property
    def circular(self) -> list[bool]:
        return self.factor.circular

    def cdf(self, batch: Batch) -> Tensor:
        """Distribution function of each column at the wrapped factor's parameters."""
        return self.factor.cdf(batch)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """As `Factor.conditional_cdf`, at the wrapped factor's parameters."""
        return self.factor.conditional_cdf(batch)

    def prepare(self, moments: Moments) -> None:
        self.factor.prepare(moments)

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        return self.factor.tune(rows, iteration)

    def refresh(self) -> None:
        self.factor.refresh()

    def forbid(self, states: Tensor) -> None:
        self.factor.forbid(states)

    def replace_components(self, which: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = {n.removeprefix("factor."): v for n, v in values.items() if n.startswith("factor.")}
        merged = outer(self.factor.replace_components(which, inner))
        return merged | super().replace_components(which, {n: v for n, v in values.items() if n in self._rank})

    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = {n.removeprefix("factor."): v for n, v in values.items() if n.startswith("factor.")}
        return outer(self.factor.kept(inner)) | {n: v for n, v in values.items() if n in self._rank}

    def stats(self, batch: Batch, expected: Tensor) -> Any:
        return self.factor.stats(batch, expected)

    def table_stats(self, batch: Batch, expected: Tensor) -> Any:
        return self.factor.table_stats(batch, expected)

    def quadratic(self) -> Quadratic:
        return self.factor.quadratic()

    def moment_stats(self, count: Tensor, xx: Tensor, ux: Tensor, uu: Tensor) -> Any:
        return self.factor.moment_stats(count, xx, ux, uu)

    def n_parameters(self) -> int:
        return self.factor.n_parameters()

    def select(self, keep: Tensor) -> Any:
        return self.rewrap(self.factor.select(keep), keep)

    def pruned(self, keep: Tensor) -> Any:
        return self.select(keep)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        raise NotImplementedError(f"{cls.__name__} wraps a family's own example")


def outer(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the wrapped factor's parameters by their names in the wrapper."""
    return {f"factor.{name}": value for name, value in values.items()}
