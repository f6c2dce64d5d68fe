"""Several columns of categories: the answers of latent class analysis."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, refuse_entries, values_known
from torchem.errors import invalid
from torchem.factor import Factor, Kernel, Prior, outside
from torchem.factors._tables import SMOOTH, Table, apart, domain
from torchem.ops.dispatch import compiled_mixture
from torchem.ops.missing import any_missing
from torchem.ops.reduce import watched
from torchem.priors import Dirichlet
from torchem.stats import Stats

#: The byte that stands for what is missing.
_NONE = 255


class Categoricals(Table):
    """Independent columns of categories given the state, each with a number of categories of its own.

    log p(x | k) = Σ_d log π_kd(x_d), over the entries observed (NaN is missing).

    ``Mixture(Categorical(K), Categoricals(K, [2, 3, 4]))`` is latent class analysis of three questions. Columns hold
    whole numbers from 0. Potentials and statistics are one matrix product each, over indicators of all categories. A
    category that nobody chose gets a finite, tiny probability, or what a Dirichlet prior gives it; a zero that a user
    assigns is structural.

    Args:
        n_components: K, the number of states.
        sizes: How many categories each column has, ``[D]``.

    Raises:
        InvalidArgument: If a size is less than one or none is given.

    Source: L. A. Goodman (1974); A. L. McCutcheon (1987).

    Example:
        >>> c = Categoricals(1, [2, 3])
        >>> c.tables = [[[0.5, 0.5]], [[0.2, 0.3, 0.5]]]
        >>> c.log_prob(Batch(torch.tensor([[1.0, 2.0], [torch.nan, 2.0]]))).exp()
        tensor([[0.2500],
                [0.5000]], grad_fn=<...>)
    """

    independent = True
    default_init: ClassVar[str] = "random"

    def __init__(self, n_components: int, sizes: Sequence[int]):
        self.sizes = [size if isinstance(size, int) else -1 for size in sizes]
        for name, values in (("n_components", [n_components]), ("sizes", self.sizes)):
            if not values or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in values):
                got = n_components if name == "n_components" else list(sizes)
                raise invalid(name, "whole numbers of at least 1", got, "count the categories of each column")
        widest = max(self.sizes)
        super().__init__(n_components, len(self.sizes), widest)
        # Columns with fewer categories have no support in what is left of their rows.
        self.support = self._real()[None].repeat(n_components, 1, 1)
        self._column = [d for d, size in enumerate(self.sizes) for _ in range(size)]
        self._code = [j for size in self.sizes for j in range(size)]
        self._cells = [d * widest + j for d, j in zip(self._column, self._code, strict=True)]
        #: Whether a user has excluded any category.
        self.forbids = False
        self.refresh()

    def _real(self) -> Tensor:
        """``[D, M]`` Boolean, True where a column has the category."""
        sizes = torch.tensor(self.sizes, device=self.device)
        return torch.arange(self.shape[-1], device=self.device) < sizes.unsqueeze(-1)

    def refresh(self) -> None:
        super().refresh()
        self.forbids = not bool((self.support | ~self._real()).all())

    # ---- views ------------------------------------------------------------------------------------------------

    def assign_probs(self, value: Any, argument: str) -> None:
        """``[*r, K, D, M]``, zero beyond the categories of a column."""
        table = as_tensor(value, argument)
        if table.shape == self.logits.shape and bool((table.to(self.device) * ~self._real() != 0).any()):
            raise invalid(
                argument, f"zeros beyond the categories of a column ({self.sizes})", "another number there",
                "assign to tables: a list of [K, M_d]",
            )  # fmt: skip
        super().assign_probs(table, argument)
        self.refresh()

    @property
    def tables(self) -> list[Tensor]:
        """Probabilities of each column, D of ``[*r, K, M_d]``; assignable."""
        return [self.probs[..., d, :size] for d, size in enumerate(self.sizes)]

    @tables.setter
    def tables(self, value: Any) -> None:
        parts = [as_tensor(own, "tables").to(self.device, torch.float64) for own in value]
        shapes = [(*self.logits.shape[:-2], size) for size in self.sizes]
        if [tuple(own.shape) for own in parts] != shapes:
            raise invalid("tables", f"shapes {shapes}", [tuple(own.shape) for own in parts], "give one for each column")
        padded = [torch.nn.functional.pad(own, (0, self.shape[-1] - own.shape[-1])) for own in parts]
        self.assign_probs(torch.stack(padded, -2), "tables")

    @property
    def n_components(self) -> int:
        return self.shape[0]

    @property
    def n_features(self) -> int:
        return self.shape[1]

    def cast(self, x: Tensor) -> Tensor:
        """Codes as they come: they are compared, whatever their type."""
        return x

    def check(self, batch: Batch) -> None:
        super().check(batch)
        x = batch.x.detach()
        sizes = torch.tensor(self.sizes, device=x.device)
        good = (x >= 0) & (x < sizes)
        if x.is_floating_point():
            good = good & (x == x.round()) | x.isnan()
        if not values_known() or bool(good.all()):
            return
        column = int((~good).nonzero()[0, -1])
        refuse_entries(batch, ~good, *domain(x[..., column], self.sizes[column]))

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``counts [*r, K, D, M]`` of observed categories."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _IndicatorKernel(self)

    def row_size(self) -> int:
        return len(self._cells) + 3 * self.n_components

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of each category's number, ``[*r, *n, K, D]``; see `Factor.conditional`."""
        number = torch.arange(self.shape[-1], dtype=self.dtype, device=self.device)
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), *self.shape[:-1])
        center = (self.probs @ number).reshape(shape)
        spread = ((self.probs @ number.square()).reshape(shape) - center.square()).clamp(min=0.0)
        missing = batch.x.isnan().unsqueeze(-2)
        return torch.where(missing, center, batch.x.to(center).unsqueeze(-2)), torch.where(missing, spread, 0.0)

    def outcomes(self) -> list[Tensor | None]:
        return [torch.arange(size, dtype=self.dtype, device=self.device) for size in self.sizes]

    @property
    def nominal(self) -> list[bool]:
        return [True] * len(self.sizes)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of the indicators of all categories in turn, ``[*r, 1s, K, ΣM_d]``."""
        probs = self.probs.flatten(-2)[..., self._cells]
        probs = probs.reshape(*self.replicas, *[1] * (batch.x.dim() - 1), *probs.shape[-2:])
        return probs, probs * (1 - probs)

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        counts = self.gather(batch, expected)["counts"]
        smooth = (counts + SMOOTH * counts.mean(-3, keepdim=True)).transpose(-3, -2)
        return Stats(counts=apart(smooth).transpose(-3, -2))

    # ---- conjugate prior: Dirichlet ---------------------------------------------------------------------------

    def weak_prior(self) -> Dirichlet:
        """A total concentration of one for each column."""
        return Dirichlet([[1.0 / size] for size in self.sizes])

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _IndicatorKernel(self, prior.expected_natural(self, posterior)["counts"])

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> "Categoricals":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = Categoricals(len(index), self.sizes).to(self.device, self.dtype)
        small.logits.data, small.support = self.logits.detach()[index].clone(), self.support[index]
        if (mask := self.frozen("logits")) is not None:
            small.register_buffer("frozen_logits", mask[index] if mask.dim() else mask)
        small.refresh()
        return small

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        rows = self.probs.detach()[z].flatten(0, 1)
        return torch.multinomial(rows, 1, generator=generator).view(len(z), -1)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Columns of two, four and three categories, some answers missing."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, [2, 4, 3]).double()
        draws = (2 * torch.randn(family.shape, generator=generator, dtype=torch.float64)).exp() * family.support
        family.probs = draws / draws.sum(-1, keepdim=True)
        x = torch.stack([torch.randint(0, m, (40,), generator=generator) for m in family.sizes], -1).double()
        holes = torch.rand(40, 3, generator=generator) < 0.2
        return family, Batch(x.masked_fill(holes, torch.nan))


class _IndicatorKernel(Kernel):
    """One product of indicators of all categories and their log-probabilities for all components and replicas."""

    def __init__(self, family: Categoricals, logs: Tensor | None = None):
        self.family, self.logs = family, logs
        table = family.log_probs() if logs is None else family._forbidding(logs).to(family.dtype)
        table = table.flatten(-2)[..., family._cells]
        # A product with −∞ would be NaN wherever its category was not chosen.
        self.excluded = (table == -torch.inf).to(table) if family.forbids else None
        self.table = table if self.excluded is None else torch.where(table == -torch.inf, 0.0, table)
        self.column = torch.tensor(family._column, device=family.device)
        kind = torch.uint8 if max(family.sizes) <= _NONE else family.dtype
        self.code = torch.tensor(family._code, device=family.device, dtype=kind).unsqueeze(-1)
        self.total: Tensor | float = 0.0

    def log_potential(self, batch: Batch) -> Tensor:
        self.axes = batch.x.shape[:-1]
        # Bytes are the same in each pass, and to transpose them takes longer than to make use of them.
        small = self.code.dtype == torch.uint8
        code = batch.remember("codes", lambda: self._codes(batch)) if small else self._codes(batch)
        code = code.index_select(0, self.column)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            self.hot = (code == self.code).to(self.table)
        else:
            self.hot = torch.eq(code, self.code, out=self.table.new_empty(code.shape))
        value = self.table @ self.hot
        if self.excluded is not None:
            value = torch.where(self.excluded @ self.hot > 0.5, -torch.inf, value)
        return value.mT.unflatten(-2, self.axes) if len(self.axes) != 1 else value.mT

    def _codes(self, batch: Batch) -> Tensor:
        """Categories ``[D, n]`` in bytes where these suffice, or as they are; what is missing is equal to none."""
        x = self._bytes(batch) if self.code.dtype == torch.uint8 else batch.x.reshape(-1, batch.x.shape[-1])
        # Observations run along the rows, as they do in all that is made of it: contiguous for copies and reductions.
        return x.mT.contiguous()

    @staticmethod
    def _bytes(batch: Batch) -> Tensor:
        """Categories ``[n, D]`` in bytes."""
        x = batch.x.reshape(-1, batch.x.shape[-1])
        missing = x.is_floating_point() and batch.remember("missing", lambda: any_missing(x))
        return (x.nan_to_num(nan=_NONE) if missing else x).to(torch.uint8)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        flat = expected.reshape(*expected.shape[: expected.dim() - 1 - len(self.axes)], -1, expected.shape[-1])
        self.total = self.total + outside(flat.to(self.hot), self.hot.mT).to(torch.float64)

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        x = batch.x
        compiled = compiled_mixture(x.device, x.numel() * log_weight.numel())
        if compiled is None or self.excluded is not None or self.code.dtype != torch.uint8 or batch.x.dim() != 2:
            return None
        given = (x, self.table, log_weight) if batch.weight is None else (x, self.table, log_weight, batch.weight)
        if any(map(watched, given)):
            return None
        codes = batch.remember("bytes", lambda: self._bytes(batch).contiguous())
        lead, (k, cells) = self.table.shape[:-2], self.table.shape[-2:]
        starts = torch.tensor([0, *self.family.sizes]).cumsum(0)[:-1]
        table = self.table.reshape(-1, k, cells)
        value, mass, total = compiled.of_categories(
            codes, starts, batch.weight, table, log_weight.expand(*lead, 1, k).reshape(-1, k)
        )
        self.total = self.total + total.reshape(*lead, k, cells)
        return value.reshape(lead), mass.reshape(*lead, 1, k)

    def stats(self) -> Stats:
        if not isinstance(self.total, Tensor):
            raise RuntimeError("a kernel has no statistics before its first piece")
        d, m = self.family.shape[1:]
        counts = self.total.new_zeros(*self.total.shape[:-1], d * m)
        place = torch.tensor(self.family._cells, device=counts.device)
        return Stats(counts=counts.index_copy(-1, place, self.total).unflatten(-1, (d, m)))

    def inner(self) -> Tensor:
        stats = self.stats()
        return self.family.expected_log_prob(stats) if self.logs is None else self.family._inner(stats, self.logs)
