"""Rows of counts of categories."""

from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid
from torchem.factor import Factor, Kernel, Moments, Prior, outside
from torchem.factors._counts import check_counts, with_factorials
from torchem.factors._tables import SMOOTH, Table, apart
from torchem.ops.missing import any_missing
from torchem.stats import Stats

#: Size of rows from which float32 would leave errors of a thousandth of a nat.
_LARGE = 256


class Multinomial(Table):
    """Rows of counts of C categories, their number given: words of documents, votes, reads of genes.

    log p(x | n, k) = log n! − Σ_c log x_c! + Σ_c x_c log π_kc, with n = Σ_c x_c of the row.

    It starts uniform. Zeros that a user assigns to `probs` are structural: no M-step revives them. Those that EM
    reaches are finite and tiny.

    *Missing.* Where a count is NaN the size of the whole row is not known. The row then has the density of what was
    seen given the sum m of that: a multinomial over the categories seen, their probabilities divided by their sum P.
    EM takes the others as unseen draws, m π_c / P of each category c on average, which keeps its M-step exact. They are
    imputed by the law of which that is the mean, a negative multinomial of m (a row's size has the prior 1 / n); rows
    of which nothing was seen have the size that `sample` draws.

    Args:
        n_components: K, the number of states.
        n_features: C, the number of categories, one column each.
        trials: Size of the rows that `sample` draws and `moments` tells of; None for the average of the data that a
            fit saw (one before).

    Raises:
        InvalidArgument: For sizes below one.

    Source: K. Nigam, A. McCallum, S. Thrun, T. Mitchell (2000), section 3; A. P. Dempster, N. M. Laird, D. B. Rubin
        (1977), section 4.2, for draws that are not seen.

    Example:
        >>> votes = Multinomial(2, 3)
        >>> votes.probs = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
        >>> votes.log_prob(Batch(torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]]))).exp()
        tensor([[0.5000, 0.1200],
                [0.0000, 0.2250]], grad_fn=<...>)
    """

    default_init: ClassVar[str] = "kmeans"
    #: Under a posterior all of a table is kept or none: the law of what was seen is known for these alone.
    splits: ClassVar = frozenset()

    size: Tensor

    def __init__(self, n_components: int, n_features: int, trials: int | None = None):
        for name, value in (("n_components", n_components), ("n_features", n_features), ("trials", trials)):
            given = name != "trials" or value is not None
            if given and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise invalid(name, "a positive whole number", repr(value), "give at least 1")
        super().__init__(n_components, n_features)
        self.trials = trials
        #: Of the rows that are drawn.
        self.new_buffer("size", torch.tensor(float(trials or 1)))

    @property
    def n_components(self) -> int:
        return self.shape[0]

    @property
    def n_features(self) -> int:
        return self.shape[1]

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Multinomial":
        """Keep probabilities through every M-step; of some states or cells with a mask; see `Factor.freeze`."""
        if mask is not None and (whole := as_tensor(mask, "mask")).shape == self.shape[:1]:
            mask = whole.unsqueeze(-1).expand(self.shape).clone()
        super().freeze(*names, mask=mask)
        return self

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_counts(batch)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_table(self, batch: Batch) -> Tensor:
        """Log-probabilities of the categories, ``[*r, 1, K, C]``."""
        return self.log_probs().unsqueeze(-3)

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``counts [*r, K, C]``, those that were not seen included as expected."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def kernel(self) -> Kernel:
        return _MultinomialKernel(self, self.log_probs())

    def row_size(self) -> int:
        return 5 * self.n_features + 4 * self.n_components

    def prepare(self, moments: Moments) -> None:
        super().prepare(moments)
        if self.trials is None and moments.mean.shape == (self.n_features,):
            self.size.copy_(moments.mean.sum().round().clamp(min=1).expand_as(self.size))

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and variance of each count in a row of the size that `sample` draws."""
        lead = len(self.replicas)
        probs, size = self.probs, self.size.reshape(*self.replicas, 1, 1)
        mean, variance = (size * value for value in (probs, probs * (1 - probs)))
        shape = (*self.replicas, *[1] * (batch.x.dim() - 1), *probs.shape[lead:])
        return mean.reshape(shape), variance.reshape(shape)

    def _unseen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums m of what was seen of rows, ``[*n, 1, 1]``, and π_c / P of each category, ``[*r, *n, K, C]``."""
        x = batch.x.to(torch.float64).unsqueeze(-2)
        probs = self.probs.to(torch.float64).reshape(*self.replicas, *[1] * (batch.x.dim() - 1), *self.shape)
        seen = torch.where(x.isnan(), 0.0, probs).sum(-1, keepdim=True)
        return x.nansum(-1, keepdim=True), probs / seen.clamp(min=1e-300)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of an unseen count m π_c / P and m (π_c / P)(1 + π_c / P); see `Factor.conditional`."""
        (total, ratio), whole = self._unseen(batch), self.moments(batch)
        missing = batch.x.isnan().unsqueeze(-2)
        found = torch.where(total > 0, total * ratio, 0.0), torch.where(total > 0, total * ratio * (1 + ratio), 0.0)
        none = missing.all(-1, keepdim=True)
        mean, variance = (torch.where(none, v, own.to(v)) for v, own in zip(whole, found, strict=True))
        return torch.where(missing, mean, batch.x.to(mean).unsqueeze(-2)), torch.where(missing, variance, 0.0)

    def conditional_covariance(self, batch: Batch) -> Tensor:
        """m (diag r + r rᵀ) with r = π / P; of rows of which nothing was seen n (diag π − π πᵀ)."""
        (total, ratio), (size, _) = self._unseen(batch), self.moments(batch)
        probs = self.probs.to(torch.float64)
        none = batch.x.isnan().all(-1)[..., None, None, None]
        some = torch.where(total > 0, ratio, 0.0)
        own = total.unsqueeze(-1) * (some.diag_embed() + some.unsqueeze(-1) * some.unsqueeze(-2))
        all_of = size.sum(-1)[..., None, None] * (probs.diag_embed() - probs.unsqueeze(-1) * probs.unsqueeze(-2))
        holes = batch.x.isnan()
        both = (holes.unsqueeze(-1) & holes.unsqueeze(-2)).unsqueeze(-3)
        return torch.where(both, torch.where(none, all_of, own), 0.0).to(self.dtype)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows with unseen counts drawn: Poisson given a rate that is Gamma(m)."""
        total, ratio = self._unseen(batch)
        total = total[..., 0]
        rate = torch._standard_gamma(total.clamp(min=1e-3), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        own = ratio.detach().gather(-2, z[:, None, None].expand(-1, 1, self.n_features)).squeeze(-2)
        drawn = torch.poisson(torch.where(total > 0, rate * own, 0.0), generator=generator)
        missing = batch.x.isnan()
        drawn = torch.where(missing.all(-1, keepdim=True), self.sample(z, batch, generator).to(drawn), drawn)
        return torch.where(missing, drawn.to(batch.x), batch.x)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self._drawn(self.probs.detach().to(torch.float64)[z], generator)

    def _drawn(self, probs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Rows of counts, one category after the other: binomial given what is left."""
        left, rest = self.size.to(probs).expand(len(probs)).clone(), torch.ones_like(probs[:, 0])
        columns = []
        for own in probs.unbind(-1):
            share = torch.where(rest > 0, own / rest.clamp(min=1e-300), 1.0).clamp(max=1.0)
            columns.append(torch.binomial(left, share, generator=generator))
            left, rest = left - columns[-1], (rest - own).clamp(min=0.0)
        # By rounding of the probabilities something may be left.
        columns[-1] = columns[-1] + left
        return torch.stack(columns, -1).to(self.dtype)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def first_stats(self, batch: Batch, expected: Tensor) -> Stats:
        counts = self.gather(batch, expected)["counts"]
        # A probability of zero, as hard clusters often give, could never grow again.
        return Stats(counts=apart(counts + SMOOTH * counts.mean(-2, keepdim=True)))

    # ---- conjugate prior: Dirichlet ---------------------------------------------------------------------------

    def expected_kernel(self, posterior: Stats, prior: Prior) -> Kernel:
        logs = prior.expected_natural(self, posterior)["counts"]
        return _MultinomialKernel(self, self._forbidding(logs))

    def predictive(self, posterior: Stats, batch: Batch) -> Tensor:
        """Dirichlet–multinomial of what was seen (J. E. Mosimann 1962): shares of some categories are Dirichlet too."""
        x = batch.x.to(torch.float64).reshape(-1, self.n_features)
        seen = ~x.isnan()
        x = torch.where(seen, x, 0.0)
        base = (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)
        return torch.stack([
            base + self._polya(x, seen, alpha, support)
            for alpha, support in zip(posterior["counts"].unbind(-2), self.support.unbind(-2), strict=True)
        ], -1).to(self.dtype).unflatten(-2, batch.x.shape[:-1])  # fmt: skip

    @staticmethod
    def _polya(x: Tensor, seen: Tensor, alpha: Tensor, support: Tensor) -> Tensor:
        """log of ∫ Π π_c^x_c under the Dirichlet law of the shares of what was seen, ``[*r, n]``."""
        alpha, support = alpha.unsqueeze(-2), support.unsqueeze(-2)
        inside = support & seen
        alpha = torch.where(inside, alpha, 1.0)
        total = torch.where(inside, alpha, 0.0).sum(-1)
        total = torch.where(inside.any(-1), total, 1.0)
        value = torch.where(inside, (alpha + x).lgamma() - alpha.lgamma(), 0.0).sum(-1)
        value = value + total.lgamma() - (total + x.sum(-1)).lgamma()
        return torch.where((~support & (x > 0)).any(-1), -torch.inf, value)

    def draw_predictive(
        self, posterior: Stats, z: Tensor, batch: Batch | None, generator: torch.Generator | None
    ) -> Tensor:
        alpha = torch.where(self.support, posterior["counts"], 0.0)[z]
        draws = torch._standard_gamma(alpha.clamp(min=1e-3), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
        draws = torch.where(alpha > 0, draws.clamp(min=1e-300), 0.0)
        return self._drawn(draws / draws.sum(-1, keepdim=True), generator)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> "Multinomial":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = Multinomial(len(index), self.n_features, self.trials).to(self.device, self.dtype)
        small.logits.data = self.logits.detach()[index].clone()
        small.support, small.size = self.support[index].clone(), self.size.clone()
        mask = self.frozen("logits")
        if mask is not None:
            small.register_buffer("frozen_logits", mask[index] if mask.dim() else mask)
        small.refresh()
        return small

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Complete rows, and rows with missing entries."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 6, (30, 3), generator=generator).double()
        holes = torch.rand(30, 3, generator=generator) < 0.2
        found: list[tuple[Factor, Batch]] = []
        for data in (x, x.masked_fill(holes, torch.nan)):
            family = cls(3, 3, trials=8).double()
            family.probs = torch.rand(3, 3, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
            found.append((family, Batch(data)))
        return found


class _MultinomialKernel(Kernel):
    """One product of counts and log-probabilities; where counts are missing, one more of probabilities seen."""

    def __init__(self, family: Multinomial, logs: Tensor):
        self.family = family
        self.logs = torch.where(family.support, logs, 0.0) if family.restricted else logs
        self.probs = logs.exp()
        # Expected logarithms are those of probabilities that sum to less than one.
        self.slack = (1 - self.probs.sum(-1, keepdim=True)).clamp(min=0.0) if logs.dtype == torch.float64 else None
        self.total: Tensor | float = 0.0

    def log_potential(self, batch: Batch) -> Tensor:
        family, x = self.family, batch.x.to(self.family.dtype)
        self.axes = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        self.hidden: Tensor | None = None
        if any_missing(x):
            hidden = x.isnan()
            x, self.hidden = torch.where(hidden, 0.0, x), hidden
        # The terms of large rows are large and cancel.
        if not values_known() or (len(x) and float(x.sum(-1).max()) > _LARGE):
            x = x.to(torch.float64)
        self.x, factorials = with_factorials(x)
        self.size = self.x.sum(-1)
        base = (self.size + 1).lgamma() - factorials.sum(-1)
        value = self.logs.to(self.x) @ self.x.mT + base
        if self.hidden is not None:
            probs = self.probs.to(self.x)
            seen = probs @ (~self.hidden).to(self.x).mT
            if self.slack is not None:
                seen = seen + self.slack.to(self.x)
            self.seen = seen.clamp(min=torch.finfo(seen.dtype).tiny)
            value = value - self.size * self.seen.log()
        if family.restricted:
            broken = (~family.support).to(self.x) @ self.x.mT
            value = torch.where(broken > 0.5, -torch.inf, value)
        # State-major in memory, so that reductions over states run along contiguous observations.
        value = value.to(family.dtype).mT
        return value.unflatten(-2, self.axes) if len(self.axes) != 1 else value

    def collect(self, batch: Batch, expected: Tensor) -> None:
        k = expected.shape[-1]
        flat = expected.reshape(*expected.shape[: expected.dim() - 1 - len(self.axes)], -1, k).to(self.x.dtype)
        counts = outside(flat, self.x).to(torch.float64)
        if self.hidden is not None:
            # Draws that were not seen, for each that was.
            ratio = flat * (self.size / self.seen).mT
            counts = counts + outside(ratio, self.hidden.to(ratio)).to(torch.float64) * self.probs
        self.total = self.total + counts

    def stats(self) -> Stats:
        if not isinstance(self.total, Tensor):
            raise RuntimeError("a kernel has no statistics before its first piece")
        return Stats(counts=self.total)

    def inner(self) -> Tensor:
        return self.family._inner(self.stats(), self.logs.to(torch.float64))
