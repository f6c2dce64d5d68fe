"""Columns of different kinds side by side: mixed data."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from torchem.batch import Batch, refuse_entries
from torchem.errors import InvalidArgument, InvalidEntry, invalid, wrong_type
from torchem.factor import Factor, Kernel, Moments
from torchem.factors._composite import Composite, reads_sequences
from torchem.ops import reduce
from torchem.ops.missing import any_missing
from torchem.stats import Stats

#: Stands for the entries of a factor that saw none at all: inside the support of most densities.
_ANYWHERE = 0.5


class Product(Composite):
    """Independent groups of columns given the state, each with a family of its own.

    log p(x | k) = Σ_f log p_f(x[columns_f] | k).

    x is one table of floating-point numbers; each factor casts its own columns. NaN is missing at random: where a
    factor does not handle missing entries itself, its columns may be missing together, and then say nothing.

    Args:
        factors: Observed children with the same number of states.
        columns: Which columns of x each factor reads; together all columns, each once. By default each takes as many
            of the next as it has features, and one where it does not say (a `Categorical` emission).

    Raises:
        InvalidArgument: If the factors disagree about their states, or columns are left out or read twice.

    Source: L. A. Hunt, M. A. Jorgensen (1999).

    Example:
        >>> from torchem.factors import Categorical, Poisson
        >>> p = Product([Poisson(2, 1), Categorical(2, 4)])
        >>> p.log_prob(Batch(torch.tensor([[0.0, 3.0], [torch.nan, 1.0]])))[:, 0]
        tensor([-2.3863, -1.3863], grad_fn=<...>)
    """

    def __init__(self, factors: Sequence[Factor], columns: Sequence[Sequence[int]] | None = None):
        super().__init__()
        if isinstance(factors, Factor):
            raise wrong_type("factors", "a list of torchem factors", factors, "write Product([f, g])")
        given = list(factors)
        for factor in given:
            if not isinstance(factor, Factor):
                raise wrong_type(
                    "factors", "torchem factors", factor, "pass for example [Poisson(K, 2), Gaussian(K, 1)]"
                )
        states = [factor.n_components for factor in given]
        if not states or states[0] is None or len(set(states)) > 1:
            raise invalid("factors", "observed children with equally many states", states, "build all with the same K")
        if len(set(given)) < len(given):
            raise invalid("factors", "each factor once", "one of them twice", "build one for each group of columns")
        readers = [i for i, factor in enumerate(given) if reads_sequences(factor)]
        if len(readers) > 1:
            raise invalid(
                "factors", "at most one that reads whole sequences", len(readers), "give it all of their columns"
            )
        self.factors = nn.ModuleList(given)
        self.columns = _columns(given, columns)
        self.memory = max(factor.memory for factor in given)
        self._k, self._reader = states[0], readers[0] if readers else None

    def parts(self) -> dict[str, Factor]:
        return {f"factors.{i}": factor for i, factor in enumerate(self._factors())}

    def _factors(self) -> list[Factor]:
        return list(self.factors)  # pyright: ignore[reportReturnType]

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return sum(map(len, self.columns))

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True: factors that cannot tell single entries may be missing as a whole."""
        return True

    # ---- what each factor reads -------------------------------------------------------------------------------

    def _read(self, batch: Batch) -> list["_Read"]:
        """What each factor reads of a batch, in its own types."""
        found = []
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            x, seen = _take(batch.x, columns), None
            if not factor.handles_missing and x.is_floating_point() and any_missing(x):
                x, seen = _filled(x)
            # What the model needs besides (a state more in memory) is spread over the factor's own.
            copies = self._k ** (self.memory - factor.memory)
            found.append(_Read(batch.with_x(factor.cast(x)), seen, copies))
        return found

    def check(self, batch: Batch) -> None:
        super().check(batch)
        for i, (factor, columns) in enumerate(zip(self._factors(), self.columns, strict=True)):
            x = _take(batch.x, columns)
            try:
                # Who reads whole sequences must know what is missing of them.
                if not factor.handles_missing and x.is_floating_point() and i != self._reader:
                    _check_whole(x)
                    x = _filled(x)[0]
                factor.check(batch.with_x(x))
            except InvalidEntry as error:
                own = {"column": columns[error.index["column"]]} if "column" in error.index else {}
                which = f"columns {columns}, " if len(columns) > 1 else ""
                raise error.moved(f" ({which}read by {type(factor).__name__})", **own) from error
            except InvalidArgument as error:
                where = f"columns {columns}" if len(columns) > 1 else f"column {columns[0]}"
                raise InvalidArgument(f"{error} ({where}, read by {type(factor).__name__})") from error

    def context(self, batch: Batch) -> Batch:
        if self._reader is None:
            return batch
        columns = self.columns[self._reader]
        own = self._factors()[self._reader].context(batch.with_x(_take(batch.x, columns)))
        place = torch.tensor(columns, device=batch.x.device)
        return replace(own, x=batch.x.to(own.x.dtype).index_copy(-1, place, own.x))

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        reads = self._read(batch)
        return _summed([f.log_prob(r.batch) for f, r in zip(self._factors(), reads, strict=True)], reads)

    def log_potential(self, batch: Batch) -> Tensor:
        reads = self._read(batch)
        return _summed([f.log_potential(r.batch) for f, r in zip(self._factors(), reads, strict=True)], reads)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Statistics of each factor under its path."""
        reads = self._read(batch)
        parts = zip(self.parts().items(), reads, strict=True)
        return Stats({path: factor.stats(r.batch, r.share(expected)) for (path, factor), r in parts})

    def kernel(self) -> Kernel:
        return _ProductKernel(self)

    def row_size(self) -> int:
        return sum(factor.row_size() for factor in self._factors()) + self.n_features

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column in the order of the data; of a category, those of its indicators."""
        parts = [f.moments(r.batch) for f, r in zip(self._factors(), self._read(batch), strict=True)]
        widths = [mean.shape[-1] for mean, _ in parts]
        place = [
            column
            for columns, width in zip(self.columns, widths, strict=True)
            for column in (columns if len(columns) == width else columns[:1] * width)
        ]
        order = sorted(range(len(place)), key=place.__getitem__)
        axes = torch.broadcast_shapes(*(mean.shape[:-1] for mean, _ in parts))
        wide = [torch.cat([value.expand(*axes, -1) for value in values], -1) for values in zip(*parts, strict=True)]
        return wide[0][..., order], wide[1][..., order]

    def cdf(self, batch: Batch) -> Tensor:
        return self._distributed([lambda x, f=f: f.cdf(batch.with_x(x)) for f in self._factors()], batch.x)

    def conditional_cdf(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        # Of names there is none: their columns are without number.
        parts = [
            (lambda x: x.unsqueeze(-2).expand(*x.shape[:-1], self._k, -1) * torch.nan)
            if all(factor.nominal)
            else factor.conditional_cdf(batch.with_x(_take(batch.x, columns)))
            for factor, columns in zip(self._factors(), self.columns, strict=True)
        ]
        return lambda x: self._distributed(parts, x)

    def _distributed(self, parts: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Distribution functions of the factors' own columns, in the order of the data."""
        found = []
        for part, factor, columns in zip(parts, self._factors(), self.columns, strict=True):
            copies = self._k ** (self.memory - factor.memory)
            value = part(_take(x, columns)).to(self.dtype)
            found.append(value if copies == 1 else value.repeat_interleave(copies, -2))
        return torch.cat(found, -1)[..., self._order()]

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = []
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            copies = self._k ** (self.memory - factor.memory)
            found = factor.conditional(batch.with_x(_take(batch.x, columns)))
            parts.append([v if copies == 1 else v.repeat_interleave(copies, -2) for v in found])
        mean, variance = (torch.cat(values, -1)[..., self._order()] for values in zip(*parts, strict=True))
        return mean, variance

    def conditional_covariance(self, batch: Batch) -> Tensor:
        parts = []
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            copies = self._k ** (self.memory - factor.memory)
            found = factor.conditional_covariance(batch.with_x(_take(batch.x, columns)))
            parts.append(found if copies == 1 else found.repeat_interleave(copies, -3))
        order, place, width = self._order(), 0, sum(part.shape[-1] for part in parts)
        whole = parts[0].new_zeros(*torch.broadcast_shapes(*(part.shape[:-2] for part in parts)), width, width)
        for part in parts:
            own = slice(place, place + part.shape[-1])
            whole[..., own, own], place = part, own.stop
        return whole[..., order, :][..., order]

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        parts = []
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            own = z.div(self._k ** (self.memory - factor.memory), rounding_mode="floor")
            parts.append(factor.complete(batch.with_x(_take(batch.x, columns)), own, generator))
        return torch.cat(parts, -1)[..., self._order()]

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        parts = []
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            parts.append(factor.placed(rows.with_x(_take(rows.x, columns)), _take(value, columns)))
        return torch.cat(parts, -1)[..., self._order()]

    def outcomes(self) -> list[Tensor | None]:
        found = [value for factor in self._factors() for value in factor.outcomes()]
        return [found[i] for i in self._order()]

    @property
    def nominal(self) -> list[bool]:
        found = [value for factor in self._factors() for value in factor.nominal]
        return [found[i] for i in self._order()]

    @property
    def circular(self) -> list[bool]:
        found = [value for factor in self._factors() for value in factor.circular]
        return [found[i] for i in self._order()]

    def _order(self) -> list[int]:
        """Where each column of the data stands among those of the factors in turn."""
        place = [column for columns in self.columns for column in columns]
        return sorted(range(len(place)), key=place.__getitem__)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        x = torch.empty(len(z), self.n_features, dtype=self.dtype, device=self.device)
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            own = z.div(self._k ** (self.memory - factor.memory), rounding_mode="floor")
            x[:, columns] = factor.sample(own, batch, generator).to(x)
        return x

    # ---- EM ---------------------------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        parts = zip(self.parts().items(), self._read(batch), strict=True)
        return self.joined({path: f.initialize(r.batch, r.share(expected)) for (path, f), r in parts})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        parts = zip(self.parts().items(), self._read(batch), strict=True)
        return self.joined({path: f.initialize_at(r.batch, index) for (path, f), r in parts})

    def prepare(self, moments: Moments) -> None:
        if moments.mean.shape != (self.n_features,):
            return
        for factor, columns in zip(self._factors(), self.columns, strict=True):
            factor.prepare(_Columns(moments, columns))

    def select(self, keep: Tensor) -> "Product":
        return Product([factor.pruned(keep) for factor in self._factors()], self.columns)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        x = torch.cat([3 * draw(30, 2) - 1, (4 * draw(30, 1)).floor(), (6 * draw(30, 1)).floor()], -1)
        holes = draw(30, 4) < 0.2
        holes[:, 1] = holes[:, 0]
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            counts, normal, kinds = factors.Poisson(3, 1), factors.Gaussian(3, 2), factors.Categorical(3, 4)
            counts.rates, normal.means, kinds.probs = 1 + 4 * draw(3, 1), draw(3, 2), draw(3, 4).softmax(-1)
            found.append((cls([counts, normal, kinds], [[3], [0, 1], [2]]).double(), Batch(data)))
        return found


class _ProductKernel(Kernel):
    """The passes of the factors, each over its own columns."""

    def __init__(self, product: Product):
        self.product = product
        self.kernels = {path: factor.kernel() for path, factor in product.parts().items()}
        self.reads: list[_Read] = []

    def log_potential(self, batch: Batch) -> Tensor:
        self.reads = self.product._read(batch)
        pairs = zip(self.kernels.values(), self.reads, strict=True)
        return _summed([kernel.log_potential(r.batch) for kernel, r in pairs], self.reads)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        for kernel, read in zip(self.kernels.values(), self.reads, strict=True):
            kernel.collect(read.batch, read.share(expected))

    def stats(self) -> Stats:
        return Stats({path: kernel.stats() for path, kernel in self.kernels.items()})

    def inner(self) -> Tensor:
        return torch.stack([kernel.inner() for kernel in self.kernels.values()]).sum(0)


@dataclass(frozen=True)
class _Read:
    """What one factor reads of a batch.

    Attributes:
        batch: Its columns in its types, valid data where it was not observed.
        seen: Where it was observed, ``[*n, 1]``; None where the factor tells that itself, or everywhere.
        copies: Latent configurations of the product for each of the factor's own, which remembers fewer states.
    """

    batch: Batch
    seen: Tensor | None
    copies: int

    def spread(self, value: Tensor) -> Tensor:
        """The factor's log-densities for every configuration of the product."""
        value = value if self.seen is None else torch.where(self.seen, value, 0.0)
        return value if self.copies == 1 else value.repeat_interleave(self.copies, -1)

    def share(self, expected: Tensor) -> Tensor:
        """Expectations of the product's configurations as those of the factor's own."""
        if self.copies > 1:
            expected = expected.unflatten(-1, (-1, self.copies)).sum(-1)
        return expected if self.seen is None else torch.where(self.seen, expected, 0.0)


class _Columns:
    """Moments of some columns."""

    def __init__(self, moments: Moments, columns: list[int]):
        self.mean, self.variance = moments.mean[columns], moments.variance[columns]
        self.low, self.high = moments.low[columns], moments.high[columns]


def _summed(values: list[Tensor], reads: list[_Read]) -> Tensor:
    return functools.reduce(operator.add, (read.spread(value) for value, read in zip(values, reads, strict=True)))


def _columns(factors: list[Factor], given: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """The columns of each factor, checked."""
    if given is None:
        ends = accumulate((factor.n_features or 1 for factor in factors), initial=0)
        return [list(range(a, b)) for a, b in pairwise(ends)]
    columns = [[int(column) for column in own] for own in given]
    widths = [factor.n_features or len(own) for factor, own in zip(factors, columns, strict=False)]
    if [len(own) for own in columns] != widths or len(columns) != len(factors) or not all(columns):
        wanted = [factor.n_features or 1 for factor in factors]
        raise invalid("columns", f"{wanted} for the factors", [len(own) for own in columns], "list those of each")
    read = sorted(column for own in columns for column in own)
    if read != list(range(len(read))):
        raise invalid("columns", f"each column from 0 to {len(read) - 1} once", read, "read every column by one factor")
    return columns


def _take(x: Tensor, columns: list[int]) -> Tensor:
    """Columns of x; a view where they follow one another."""
    first, size = columns[0], len(columns)
    if columns == list(range(first, first + size)):
        return x[..., first : first + size]
    return torch.stack([x[..., column] for column in columns], -1)


def _filled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that are missing replaced by the first that is not, and which are not, ``[*n, 1]``."""
    missing = x.isnan().all(-1, keepdim=True)
    first = reduce.first_max((~missing).to(x.dtype).reshape(-1), 0)
    stand_in = x.reshape(-1, x.shape[-1]).index_select(0, first.reshape(1)).nan_to_num(nan=_ANYWHERE)[0]
    return torch.where(missing, stand_in, x), ~missing


def _check_whole(x: Tensor) -> None:
    """Refuse rows of which only some entries are missing."""
    missing = x.isnan()
    refuse_entries(
        Batch(x), missing & ~missing.all(-1, keepdim=True), "these columns whole, or missing together",
        "set all of them to NaN there, or use a family that handles single missing entries",
    )  # fmt: skip
