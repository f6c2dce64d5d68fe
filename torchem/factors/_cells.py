"""What families of independent columns have in common whose parameters are one for each component and column."""

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor, Kernel
from torchem.stats import Stats

#: Mass below which a cell keeps its parameters.
EMPTY = 1e-30
#: Share of the average component that every component starts with, so that none begins at a bound of its family.
SMOOTH = 0.01


class Grid(Factor):
    """Independent columns given the state, over the entries that were observed (NaN is missing at random).

    Every parameter is ``[*r, K, D]``: one for each component and column.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.

    Raises:
        InvalidArgument: For sizes below one.
    """

    handles_missing: ClassVar[bool] = True
    independent = True
    default_init: ClassVar[str] = "kmeans"

    def __init__(self, n_components: int, n_features: int):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        self._k, self._d = n_components, n_features

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    def set_positive(self, view: str, value: Any) -> None:
        """Assign a view that is the exponential of its parameter."""
        parameter = self.get_parameter(self.views[view])
        given = as_tensor(value, view).to(self.device, torch.float64)
        if given.shape != parameter.shape:
            raise invalid(view, f"shape {list(parameter.shape)}", list(given.shape), "give one row per component")
        if not bool(((given > 0) & given.isfinite()).all()):
            raise invalid(view, "finite positive numbers", "another entry", "correct it")
        with torch.no_grad():
            parameter.copy_(given.log())

    def held(self, parameter: str) -> Tensor | None:
        """``[K, 1]`` Boolean, True for components of which a parameter is frozen."""
        mask = self.frozen(parameter)
        return None if mask is None else mask.expand(self._k).unsqueeze(-1)

    def wide(self, parameter: str) -> Tensor:
        """A parameter in float64."""
        return getattr(self, parameter).to(torch.float64)

    def entries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Entries ``[n, D]`` in float64, ones where missing, and whether each was observed."""
        x = batch.x.to(torch.float64).reshape(-1, self._d)
        seen = ~x.isnan()
        if batch.observed is not None:
            seen = seen & batch.observed.reshape(-1, self._d)
        return torch.where(seen, x, 1.0), seen

    @abstractmethod
    def mean_variance(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column, ``[*r, K, D]``."""

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self._k, self._d)
        mean, variance = self.mean_variance()
        return mean.reshape(shape), variance.reshape(shape)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        free = 0
        for name in self._parameters:
            mask = self.frozen(name)
            free += self._k - (0 if mask is None else int(mask.expand(self._k).sum()))
        return free * self._d

    def select(self, keep: Tensor) -> Self:
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = type(self)(**self.config() | {"n_components": len(index)}).to(self.device, self.dtype)
        for name, value in self.named_parameters():
            small.get_parameter(name).data = value[index].detach().clone()
        for name, value in self.named_buffers():
            small.register_buffer(name, value[index].clone() if value.dim() else value)
        return small


class Cells(Grid):
    """A grid whose density is no product of features of x: it is computed for every entry and component.

    The statistics are ``count [*r, K, D]``, how much of each column was seen, and those that a family names, each the
    sum of an expectation for every entry under the current parameters.
    """

    @abstractmethod
    def cells(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-density of entries ``[n, 1, D]`` under each state, ``[*r, n, K, D]``, and expected statistics of each."""

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count`` and the family's own, ``[*r, K, D]``."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _CellsKernel(self)

    def row_size(self) -> int:
        return 16 * self._d * self._k


class _CellsKernel(Kernel):
    """All entries of a piece under all components at once; pieces are small enough for that."""

    def __init__(self, family: Cells):
        self.family = family
        self.total: Stats | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        self.axes = batch.x.shape[:-1]
        x, self.seen = self.family.entries(batch)
        value, self.found = self.family.cells(x.unsqueeze(-2))
        value = torch.where(self.seen.unsqueeze(-2), value, 0.0).sum(-1).to(self.family.dtype)
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        k = expected.shape[-1]
        flat = expected.reshape(*expected.shape[: expected.dim() - 1 - len(self.axes)], -1, k).to(torch.float64)
        each = flat.unsqueeze(-1) * self.seen.unsqueeze(-2)
        sums = {"count": each.sum(-3)} | {name: (each * value).sum(-3) for name, value in self.found.items()}
        stats = Stats(sums)
        self.total = stats if self.total is None else self.total + stats

    def stats(self) -> Stats:
        if self.total is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        return self.total

    def inner(self) -> Tensor:
        return self.family.expected_log_prob(self.stats())
