"""A uniform law over a box: what explains the observations that nothing else does."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Moments
from torchem.stats import Stats


class Uniform(Factor):
    """Uniform distributions over a box that all components share, as noise beside other components (`Stacked`).

    log p(x | k) = −Σ_d log(high_d − low_d) inside the box, −∞ outside; a missing entry (NaN) is left out.

    With ``beyond=True`` the constant stands outside of the box as well, as in mclust: what is far from everything is
    noise, also in rows that come after the fit. It is then no density, and ``log_prob`` of rows outside none of a law;
    what is drawn, and the distribution function, are of the box.

    Nothing is learnt: a box that shrank to the data would be the likeliest, and no noise. Sides that are left out are
    those of the data when a fit begins; a column that is constant counts as of width one.

    Args:
        n_components: K, the number of states.
        n_features: D, the number of columns.
        low: Lower sides, one number or ``[D]``.
        high: Upper sides.
        beyond: Whether the constant stands outside of the box as well.

    Raises:
        InvalidArgument: For sizes below one, or sides that are not below each other.

    Source: J. D. Banfield, A. E. Raftery (1993), section 5; C. Fraley, A. E. Raftery (1998).

    Example:
        >>> noise = Uniform(1, 2, low=0.0, high=[2.0, 5.0])
        >>> noise.log_prob(Batch(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))).exp()
        tensor([[0.1000],
                [0.0000]])
    """

    views: ClassVar = {}
    handles_missing: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    default_init: ClassVar[str] = "kmeans"

    sides: Tensor

    def __init__(self, n_components: int, n_features: int, low: Any = None, high: Any = None, beyond: bool = False):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        if not isinstance(beyond, bool):
            raise wrong_type("beyond", "True or False", beyond, "say whether the constant stands outside as well")
        self._k, self._d, self.beyond = n_components, n_features, beyond
        given = [None if side is None else as_tensor(side, name) for name, side in (("low", low), ("high", high))]
        for name, side in zip(("low", "high"), given, strict=True):
            if side is not None and (side.numel() not in (1, n_features) or not bool(side.isfinite().all())):
                raise invalid(name, f"finite numbers, one or {n_features}", side.tolist(), "give one for each column")
        if given[0] is not None and given[1] is not None and not bool((given[0] < given[1]).all()):
            raise invalid("high", "numbers above low", given[1].tolist(), "exchange the two")
        self.low, self.high = (None if side is None else side.tolist() for side in given)
        first, last = (
            torch.full((n_features,), float(i)) if side is None else side.expand(n_features).to(torch.float32)
            for i, side in enumerate(given)
        )
        #: Lower and upper sides, ``[2, D]``.
        self.new_buffer("sides", torch.stack([first, last]))

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    def prepare(self, moments: Moments) -> None:
        super().prepare(moments)
        if moments.mean.shape != (self._d,):
            return
        for place, (given, found) in enumerate(((self.low, moments.low), (self.high, moments.high))):
            if given is None:
                self.sides[..., place, :] = found.to(self.sides)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        lead, ones = self.replicas, [1] * (batch.x.dim() - 1)
        low, high = self.sides.reshape(*lead, *ones, 2, self._d).unbind(-2)
        x = batch.x if batch.observed is None else torch.where(batch.observed, batch.x, torch.nan)
        width = torch.where(high > low, high - low, 1.0)
        inside = (x >= low) & (x <= high)
        each = torch.where(inside | self.beyond, -width.log(), -torch.inf)
        value = torch.where(x.isnan(), 0.0, each).sum(-1, keepdim=True)
        return value.expand(*value.shape[:-1], self._k)

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        low, high = self.sides.reshape(*self.replicas, *[1] * (batch.x.dim() - 1), 1, 2, self._d).unbind(-2)
        shape = (*low.shape[:-2], self._k, self._d)
        return ((low + high) / 2).expand(shape), ((high - low).square() / 12).expand(shape)

    def cdf(self, batch: Batch) -> Tensor:
        low, high = self.sides.reshape(*self.replicas, *[1] * (batch.x.dim() - 1), 1, 2, self._d).unbind(-2)
        width = torch.where(high > low, high - low, 1.0)
        value = ((batch.x.unsqueeze(-2) - low) / width).clamp(0.0, 1.0)
        return value.expand(*value.shape[:-2], self._k, self._d)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        low, high = self.sides.unbind(-2)
        draws = torch.rand(len(z), self._d, dtype=self.dtype, device=self.device, generator=generator)
        return low + (high - low) * draws

    # ---- EM ---------------------------------------------------------------------------------------------------

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``count [*r, K]``, for the record: nothing is learnt from it."""
        lead = len(self.replicas)
        return Stats(count=expected.flatten(lead, -2).sum(-2, dtype=torch.float64))

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        return {}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """−Σ n log volume; what is missing of a row is left to the entropy."""
        low, high = self.sides.to(torch.float64).unbind(-2)
        volume = torch.where(high > low, high - low, 1.0).log().sum(-1, keepdim=True)
        return -(stats["count"] * volume).sum(-1)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        """None."""
        return 0

    def select(self, keep: Tensor) -> "Uniform":
        count = int(keep.sum()) if keep.dtype == torch.bool else len(keep)
        small = Uniform(count, self._d, self.low, self.high, self.beyond).to(self.device, self.dtype)
        small.sides = self.sides
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        generator = torch.Generator().manual_seed(0)
        return cls(2, 2, -1.0, [1.0, 3.0]).double(), Batch(torch.rand(30, 2, generator=generator).double())
