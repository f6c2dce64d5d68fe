"""States of different families: some components of one kind, some of another."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Kernel
from torchem.factors._composite import Composite, reshaped
from torchem.stats import Stats


class Stacked(Composite):
    """Components of several families, one after the other: states 0 … K₁ − 1 emit by the first factor, and so on.

    log p(x | k) = log p_f(x | k − K₁ − … − K_{f−1}), each over all columns of x.

    ``Stacked([Gaussian(3, 2), Uniform(1, 2)])`` is three clusters and noise.

    Args:
        factors: Observed children of the same columns.

    Raises:
        InvalidArgument: If they disagree about columns, or one remembers earlier states.

    Source: C. Fraley, A. E. Raftery (1998), section 2.4, for clusters and noise.

    Example:
        >>> from torchem.factors import Gaussian, Uniform
        >>> s = Stacked([Gaussian(2, 1), Uniform(1, 1, -10.0, 10.0)])
        >>> s.log_prob(Batch(torch.zeros(1, 1)))
        tensor([[-0.9189, -0.9189, -2.9957]], grad_fn=<...>)
    """

    def __init__(self, factors: Sequence[Factor]):
        super().__init__()
        if isinstance(factors, Factor):
            raise wrong_type("factors", "a list of torchem factors", factors, "write Stacked([f, g])")
        given = list(factors)
        for factor in given:
            if not isinstance(factor, Factor):
                raise wrong_type("factors", "torchem factors", factor, "pass [Gaussian(3, 2), Uniform(1, 2)] or so")
        states = [factor.n_components for factor in given]
        if not given or None in states or any(factor.memory for factor in given):
            raise invalid("factors", "observed children without memory", states, "build each with its own states")
        columns = {factor.n_features for factor in given}
        if len(columns) > 1:
            raise invalid("factors", "families of the same columns", sorted(map(str, columns)), "build all with one D")
        if len(set(given)) < len(given):
            raise invalid("factors", "each factor once", "one of them twice", "build one with more components")
        self.factors = nn.ModuleList(given)
        ends = list(accumulate((factor.n_components or 0 for factor in given), initial=0))
        self._ranges, self._k = list(pairwise(ends)), ends[-1]

    def parts(self) -> dict[str, Factor]:
        return {f"factors.{i}": factor for i, factor in enumerate(self.factors)}  # pyright: ignore[reportReturnType]

    def _each(self) -> list[tuple[str, Factor, slice]]:
        """Each factor with its path and its states."""
        parts = zip(self.parts().items(), self._ranges, strict=True)
        return [(path, factor, slice(*ends)) for (path, factor), ends in parts]

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int | None:
        return next(iter(self.parts().values())).n_features

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all parts do."""
        return all(factor.handles_missing for factor in self.parts().values())

    def check(self, batch: Batch) -> None:
        for factor in self.parts().values():
            factor.check(batch)

    # ---- states and those of the parts ------------------------------------------------------------------------

    def opened(self, stats: Stats) -> dict[str, Stats]:
        lead = len(self.replicas)
        return {
            path: reshaped(stats[path], lambda leaf, own=own: leaf[(slice(None),) * lead + (own,)])
            for path, _, own in self._each()
        }

    def closed(self, parts: dict[str, Stats]) -> Stats:
        # Every leaf has all states, those of other parts zero: pruning and merging see one axis.
        lead = len(self.replicas)

        def spread(leaf: Tensor, own: slice) -> Tensor:
            before, after = (
                leaf.new_zeros(*leaf.shape[:lead], n, *leaf.shape[lead + 1 :]) for n in (own.start, self._k - own.stop)
            )
            return torch.cat([before, leaf, after], lead)

        return Stats({
            path: reshaped(parts[path], lambda leaf, own=own: spread(leaf, own)) for path, _, own in self._each()
        })  # fmt: skip

    def components_of(self, path: str, states: Tensor) -> Tensor:
        return states[..., next(own for name, _, own in self._each() if name == path)]

    def states_of(self, path: str, components: Tensor) -> Tensor:
        own = next(own for name, _, own in self._each() if name == path)
        marks = components.new_zeros(*components.shape[:-1], self._k)
        marks[..., own] = components
        return marks

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return self._joined([f.log_prob(batch.with_x(f.cast(batch.x))) for f in self.parts().values()])

    def log_potential(self, batch: Batch) -> Tensor:
        return self._joined([f.log_potential(batch.with_x(f.cast(batch.x))) for f in self.parts().values()])

    def _joined(self, values: list[Tensor]) -> Tensor:
        return torch.cat([value.to(self.dtype) for value in values], -1)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Statistics of each factor under its path."""
        return self.closed({
            path: factor.stats(batch.with_x(factor.cast(batch.x)), expected[..., own])
            for path, factor, own in self._each()
        })  # fmt: skip

    def kernel(self) -> Kernel:
        return _StackedKernel(self)

    def row_size(self) -> int:
        return sum(factor.row_size() for factor in self.parts().values())

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [factor.moments(batch.with_x(factor.cast(batch.x))) for factor in self.parts().values()]
        axes = torch.broadcast_shapes(*(mean.shape[:-2] for mean, _ in found))
        mean, variance = (
            torch.cat([value.expand(*axes, *value.shape[-2:]) for value in values], -2)
            for values in zip(*found, strict=True)
        )
        return mean, variance

    def cdf(self, batch: Batch) -> Tensor:
        return torch.cat([factor.cdf(batch).to(self.dtype) for factor in self.parts().values()], -2)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        parts = [factor.conditional_cdf(batch) for factor in self.parts().values()]
        return lambda x: torch.cat([part(x).to(self.dtype) for part in parts], -2)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [factor.conditional(batch) for factor in self.parts().values()]
        mean, variance = (torch.cat(values, -2) for values in zip(*found, strict=True))
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        return torch.cat([factor.conditional_covariance(batch) for factor in self.parts().values()], -3)

    def outcomes(self) -> list[Tensor | None]:
        found = []
        for column in zip(*(factor.outcomes() for factor in self.parts().values()), strict=True):
            known = [each for each in column if each is not None]
            found.append(torch.cat(known).unique() if len(known) == len(column) else None)
        return found

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        for factor in self.parts().values():
            value = factor.placed(rows, value)
        return value

    @property
    def nominal(self) -> list[bool]:
        return [any(column) for column in zip(*(f.nominal for f in self.parts().values()), strict=True)]

    @property
    def circular(self) -> list[bool]:
        return [all(column) for column in zip(*(f.circular for f in self.parts().values()), strict=True)]

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        def draw(factor: Factor, z: Tensor, rows: Tensor) -> Tensor:
            return factor.complete(batch[rows], z, generator)

        return self._by_state(z, draw)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        def draw(factor: Factor, z: Tensor, rows: Tensor) -> Tensor:
            return factor.sample(z, None if batch is None else batch[rows], generator)

        return self._by_state(z, draw)

    def _by_state(self, z: Tensor, draw: Callable[[Factor, Tensor, Tensor], Tensor]) -> Tensor:
        """What each factor draws of its own states ``z`` at the rows that are in them."""
        x: Tensor | None = None
        for _, factor, own in self._each():
            chosen = ((z >= own.start) & (z < own.stop)).nonzero()[:, 0]
            draws = draw(factor, z[chosen] - own.start, chosen)
            x = draws.new_empty(len(z), *draws.shape[1:]) if x is None else x
            x[chosen] = draws.to(x)
        assert x is not None
        return x

    # ---- starts, bookkeeping ----------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        return self.joined({
            path: factor.initialize(batch.with_x(factor.cast(batch.x)), expected[..., own])
            for path, factor, own in self._each()
        })  # fmt: skip

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        return self.joined({
            path: factor.initialize_at(batch.with_x(factor.cast(batch.x)), index[..., own])
            for path, factor, own in self._each()
        })  # fmt: skip

    def select(self, keep: Tensor) -> "Stacked":
        index = (keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep).tolist()
        kept = [(part, [k - own.start for k in index if own.start <= k < own.stop]) for _, part, own in self._each()]
        return Stacked([part.pruned(torch.tensor(places)) for part, places in kept if places])

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Clusters and noise, with missing entries."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
        holes = torch.rand(40, 2, generator=generator) < 0.1
        normal = factors.Gaussian(2, 2)
        normal.means = [[-1.0, 0.0], [1.0, 0.5]]
        family = cls([normal, factors.Uniform(1, 2, -8.0, 8.0)]).double()
        return family, Batch(x.masked_fill(holes, torch.nan))


class _StackedKernel(Kernel):
    """The passes of the factors, each over its own states."""

    def __init__(self, stacked: Stacked):
        self.stacked = stacked
        self.kernels = {path: factor.kernel() for path, factor, _ in stacked._each()}

    def log_potential(self, batch: Batch) -> Tensor:
        parts = self.stacked.parts()
        self.reads = {path: batch.with_x(factor.cast(batch.x)) for path, factor in parts.items()}
        return self.stacked._joined([self.kernels[path].log_potential(read) for path, read in self.reads.items()])

    def collect(self, batch: Batch, expected: Tensor) -> None:
        for path, _, own in self.stacked._each():
            self.kernels[path].collect(self.reads[path], expected[..., own])

    def stats(self) -> Stats:
        return self.stacked.closed({path: kernel.stats() for path, kernel in self.kernels.items()})

    def inner(self) -> Tensor:
        return torch.stack([kernel.inner() for kernel in self.kernels.values()]).sum(0)
