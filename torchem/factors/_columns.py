"""What families of independent columns have in common, each column with one natural parameter and statistic x."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid
from torchem.factor import Conjugate, Factor, Kernel, Prior, outside
from torchem.ops.dispatch import compiled_mixture
from torchem.ops.missing import any_missing
from torchem.ops.reduce import plus, watched
from torchem.stats import Stats

#: Mass below which a cell keeps its parameter.
_EMPTY = 1e-30
#: Share of the average component that every component starts with, so that none begins at a bound of its family.
_SMOOTH = 0.01
#: Rows whose base measure is computed at a time.
_PART = 4096


class Columns(Factor, Conjugate):
    """Independent columns given the state, over the entries that were observed (NaN is missing at random).

    log p(x | k) = Σ_d [x_d η_kd − a(η_kd) + h(x_d)].

    The statistics are ``count`` and ``total``, ``[*r, K, D]``: how much of each column was seen under each state, and
    its sum. Potentials are one matrix product of x and η; where entries are missing, one more of where they are not.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.

    Raises:
        InvalidArgument: For sizes below one.
    """

    handles_missing: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    default_init: ClassVar[str] = "kmeans"
    #: Whether entries are whole numbers, whose mode is never above the next one from their mean.
    discrete: ClassVar[bool] = False
    #: Name of the one parameter, ``[K, D]``.
    parameter: ClassVar[str]
    #: For rates: which of the statistics they are multiplied by, and a gamma prior's rate is added to.
    exposure: ClassVar[str] = "count"

    support: Tensor

    def __init__(self, n_components: int, n_features: int):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        self._k, self._d = n_components, n_features
        self.new_parameter(self.parameter, torch.zeros(n_components, n_features))
        #: Whether the user has fixed any cell at a bound of the family; spares the masks of the common case.
        self.restricted = False

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    def refresh(self) -> None:
        self.restricted = not bool(self.support.all())

    # ---- the family -------------------------------------------------------------------------------------------

    @abstractmethod
    def natural(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """η and a ``[*r, K, D]`` at a value of the parameter; both zero in cells that are not `free`."""

    @abstractmethod
    def estimate(self, count: Tensor, total: Tensor) -> Tensor:
        """The parameter that maximises Σ total · η − count · a, for positive counts."""

    @abstractmethod
    def expectation(self, value: Tensor) -> Tensor:
        """Mean of a free column at a value of the parameter, the inverse of `estimate`."""

    @abstractmethod
    def mean_variance(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each column, ``[*r, K, D]``."""

    @abstractmethod
    def free(self) -> Tensor:
        """``[*r, K, D]`` Boolean, False where the user has fixed a cell at a bound of the family."""

    def _held(self) -> Tensor | None:
        """``[K, 1]`` Boolean, True for components that are frozen."""
        mask = self.frozen(self.parameter)
        return None if mask is None else mask.expand(self._k).unsqueeze(-1)

    @abstractmethod
    def forbidden(self) -> tuple[Tensor, Tensor]:
        """P and Q ``[*r, K, D]`` such that Σ_d [x_d P_kd − Q_kd] is positive where state k cannot emit x, else zero."""

    def entries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Entries ``[n, D]`` in the precision that potentials need, and h of each, or None for zero."""
        return x, None

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count`` and ``total [*r, K, D]``."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _ColumnsKernel(self)

    def row_size(self) -> int:
        # Of complete rows; where entries are missing there are two copies of x more.
        return self._d + 3 * self._k

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), self._k, self._d)
        mean, variance = self.mean_variance()
        return mean.reshape(shape), variance.reshape(shape)

    def cdf(self, batch: Batch) -> Tensor:
        mean = self.moments(batch)[0].to(torch.float64)
        return self.distribution(batch.x.to(torch.float64).unsqueeze(-2), mean).to(self.dtype)

    @staticmethod
    @abstractmethod
    def distribution(x: Tensor, mean: Tensor) -> Tensor:
        """P(X ≤ x) of entries under laws of these means; broadcasts."""

    def outcomes(self) -> list[Tensor | None]:
        return self._counted(self.mean_variance()[0]) if self.discrete else super().outcomes()

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        count, old = stats["count"], getattr(self, self.parameter)
        movable = count > _EMPTY
        if self.restricted:
            movable = movable & self.free()
        # Where nothing may move any sound number will do.
        count, total = torch.where(movable, count, 2.0), torch.where(movable, stats["total"], 1.0)
        value = torch.where(movable, self.estimate(count, total).to(self.dtype), old)
        return {self.parameter: self.keep_frozen(self.parameter, value)}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        eta, normalizer = self.natural(getattr(self, self.parameter).to(torch.float64))
        return (stats["total"] * eta - stats["count"] * normalizer).sum((-2, -1))

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters from responsibilities, drawn a little towards the mean of all data."""
        return self.maximize(self.first_stats(batch, expected))

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        stats = self.gather(batch, expected)
        # A probability or rate of zero, as hard clusters often give, could never grow again.
        return stats + stats.map(lambda leaf: _SMOOTH * leaf.mean(-2, keepdim=True).expand_as(leaf))

    # ---- conjugate prior --------------------------------------------------------------------------------------

    def settle(self, posterior: Stats) -> dict[str, Tensor]:
        count, total = self._movable(posterior)
        value = self.estimate(count, total).to(self.dtype)
        value = torch.where(self.free(), value, getattr(self, self.parameter))
        return {self.parameter: self.keep_frozen(self.parameter, value)}

    def log_normalizer_given(self, posterior: Stats) -> Tensor:
        held = self._held()
        if held is None:
            return self.log_normalizer(posterior)
        # What stands for components that are known adds a constant.
        return self.log_normalizer(posterior.like({
            "count": torch.where(held, 2.0, posterior["count"]), "total": torch.where(held, 1.0, posterior["total"])
        }))  # fmt: skip

    def _expected(self, posterior: Stats, prior: Prior) -> Stats:
        """Expected natural parameters, those that a component has where it is frozen."""
        natural, held = prior.expected_natural(self, posterior), self._held()
        if held is None:
            return natural
        eta, normalizer = self.natural(getattr(self, self.parameter).to(torch.float64))
        own = {"total": eta, "count": -normalizer}
        return natural.like({name: torch.where(held, own[name], value) for name, value in natural.items()})

    def strengths(self, posterior: Stats) -> dict[str, Tensor]:
        return {"log_count": self._movable(posterior)[0].log()}

    def _movable(self, posterior: Stats) -> tuple[Tensor, Tensor]:
        """Count and total, sound numbers where a cell is fixed."""
        free = self.free()
        return torch.where(free, posterior["count"], 2.0), torch.where(free, posterior["total"], 1.0)

    def posterior(self, strengths: dict[str, Tensor]) -> Stats:
        count = strengths["log_count"].to(torch.float64).exp()
        mean = self.expectation(getattr(self, self.parameter).to(torch.float64))
        return Stats(count=count, total=count * mean)

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        return _ColumnsKernel(self, self._expected(posterior, prior))

    def expected_inner(self, posterior: Stats, prior: Prior, stats: Stats) -> Tensor:
        return _inner(self._expected(posterior, prior), stats)

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        return self.log_prob(batch)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        free, mask = self.free(), self.frozen(self.parameter)
        return int((free if mask is None else free & ~mask.unsqueeze(-1)).sum())

    def select(self, keep: Tensor) -> "Columns":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = type(self)(len(index), self._d).to(self.device, self.dtype)
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            kept = (value[index] if value.dim() else value).detach().clone()
            if isinstance(value, torch.nn.Parameter):
                small.get_parameter(name).data = kept
            else:
                small.register_buffer(name, kept)
        small.refresh()
        return small


def _inner(natural: Stats, stats: Stats) -> Tensor:
    return (stats["total"] * natural["total"] + stats["count"] * natural["count"]).sum((-2, -1))


class _ColumnsKernel(Kernel):
    """One product of entries and natural parameters for all components and replicas."""

    def __init__(self, family: Columns, natural: Stats | None = None):
        self.family, self.natural = family, natural
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        #: Slopes and constants of the potentials by the type that pieces are computed in.
        self.forms: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def _form(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self.forms:
            if self.natural is None:
                self.forms[dtype] = self.family.natural(getattr(self.family, self.family.parameter).to(dtype))
            else:
                self.forms[dtype] = self.natural["total"].to(dtype), -self.natural["count"].to(dtype)
        return self.forms[dtype]

    def log_potential(self, batch: Batch) -> Tensor:
        family, x = self.family, batch.x.to(self.family.dtype)
        self.axes = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        self.seen: Tensor | None = None
        if batch.remember("missing", lambda: any_missing(x)):
            missing = x.isnan()
            x = torch.where(missing, 0.0, x)
            self.seen = (~missing).to(x)
        # The base measure is the same in each pass.
        dtype, base = batch.remember((type(family), family.dtype), lambda: self._base(x))
        self.t = x.to(dtype)
        value = self._linear(*self._form(dtype))
        if base is not None:
            value = plus(value, base)
        if family.restricted:
            broken = self._linear(*(form.to(self.t.dtype) for form in family.forbidden()))
            value = torch.where(broken > 0.5, -torch.inf, value)
        # State-major in memory, so that reductions over states run along contiguous observations.
        value = value.to(family.dtype).mT
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def _base(self, x: Tensor) -> tuple[torch.dtype, Tensor | None]:
        """The type that potentials need, and h of each row ``[n]`` over the entries observed, or None for zero."""
        t, base = self.family.entries(x)
        return t.dtype, None if base is None else (base if self.seen is None else base * self.seen).sum(-1)

    def _linear(self, slope: Tensor, constant: Tensor) -> Tensor:
        """Σ_d [x_d slope_kd − constant_kd] over the entries observed, ``[*r, K, n]``."""
        product = slope @ self.t.mT
        if self.seen is None:
            return plus(product, -constant.sum(-1, keepdim=True))
        return plus(product, -(constant @ self.seen.mT.to(constant)))

    def collect(self, batch: Batch, expected: Tensor) -> None:
        k = expected.shape[-1]
        flat = expected.reshape(*expected.shape[: expected.dim() - 1 - len(self.axes)], -1, k).to(self.t.dtype)
        self.total = self.total + outside(flat, self.t).to(torch.float64)
        if self.seen is None:
            count = flat.sum(-2, dtype=torch.float64).unsqueeze(-1)
        else:
            count = outside(flat, self.seen.to(flat)).to(torch.float64)
        self.count = self.count + count

    def mixed(self, batch: Batch, log_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        family, x = self.family, batch.x
        compiled = compiled_mixture(x.device, x.numel() * log_weight.numel())
        # Products in float32 are as fast as what is compiled, which computes in float64.
        if compiled is None or family.dtype != torch.float64 or x.dtype not in compiled.TYPES:
            return None
        if family.restricted or x.dim() != 2:
            return None
        slope, constant = self._form(torch.float64)
        given = (x, slope, log_weight) if batch.weight is None else (x, slope, log_weight, batch.weight)
        if any(map(watched, given)) or batch.remember("missing", lambda: any_missing(x)):
            return None
        lead, (k, d) = slope.shape[:-2], slope.shape[-2:]
        constant = (log_weight.squeeze(-2) - constant.sum(-1)).reshape(-1, k)
        value, mass, total = compiled.of_numbers(x, batch.weight, slope.reshape(-1, k, d), constant)
        base = batch.remember(("base", type(family)), lambda: self._bases(x))
        if base is not None:
            value = value + (base.sum() if batch.weight is None else (base * batch.weight).sum())
        mass = mass.reshape(*lead, k)
        self.total, self.count = self.total + total.reshape(*lead, k, d), self.count + mass.unsqueeze(-1)
        return value.reshape(lead), mass.unsqueeze(-2)

    def _bases(self, x: Tensor) -> Tensor | None:
        """h of each row ``[n]``, in float64, or None for zero."""
        found = [self.family.entries(part.to(torch.float64))[1] for part in x.split(_PART)]
        return None if found[0] is None else torch.cat([part.sum(-1) for part in found if part is not None])

    def stats(self) -> Stats:
        if not isinstance(self.total, Tensor) or not isinstance(self.count, Tensor):
            raise RuntimeError("a kernel has no statistics before its first piece")
        return Stats(count=self.count.expand_as(self.total).contiguous(), total=self.total)

    def inner(self) -> Tensor:
        if self.natural is not None:
            return _inner(self.natural, self.stats())
        return self.family.expected_log_prob(self.stats())
