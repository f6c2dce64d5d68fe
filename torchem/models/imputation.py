"""Missing entries filled in: by their conditional means, by what is most probable, or by draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchem.batch import Batch, as_tensor
from torchem.errors import check_generator, invalid, one_of, whole_number
from torchem.factor import Factor
from torchem.model import LatentModel
from torchem.ops import directional, reduce
from torchem.ops.dispatch import rows_per_piece

#: Rows that are drawn together.
_AT_ONCE = 1 << 15
#: Halvings of a bracket: more than float64 can tell apart.
_HALVINGS = 80
#: Bytes that a piece of rows occupies.
_PIECE = 1 << 26
#: What a missing entry becomes.
How = Literal["auto", "mean", "mode"]


@dataclass(frozen=True)
class Gaps:
    """The rows of data that miss an entry, and where they belong.

    Attributes:
        data: What was given.
        rows: All rows ``[F, D]``, those of sequences one after the other.
        index: Which of them miss an entry, ``[G]``.
        lengths: Frames of each sequence, if there are sequences.
        batch: The data as the model reads them.
    """

    data: Any
    rows: Tensor
    index: Tensor
    lengths: list[int] | None
    batch: Batch

    @classmethod
    def of(cls, data: Any, batch: Batch, sequential: bool) -> "Gaps":
        """The gaps of data that were validated."""
        rows = batch.rows().x
        index = rows.isnan().any(-1).nonzero()[:, 0]
        return cls(data, rows, index, batch.frames().tolist() if sequential else None, batch)

    @property
    def missing(self) -> Tensor:
        """``[G, D]`` Boolean, True where an entry of those rows is missing."""
        return self.rows[self.index].isnan()

    def filled(self, found: Tensor, whole: bool) -> Any:
        """The data with ``found [*s, G, D]`` in the gaps, laid out as they came; whole numbers stay such if ``whole``.

        What was observed is as it was, bit for bit; arrays and lists become tensors.
        """
        rows = self.rows.expand(*found.shape[:-2], *self.rows.shape).clone()
        rows[..., self.index, :] = torch.where(self.missing, found.to(rows), rows[..., self.index, :])
        return self._laid_out(rows, whole)

    def beside(self, found: Tensor) -> Any:
        """``found [*s, G, D]`` in the gaps and zero elsewhere, laid out as the data."""
        found = found.to(self.rows.device)
        rows = found.new_zeros(*found.shape[:-2], *self.rows.shape)
        rows[..., self.index, :] = torch.where(self.missing, found, 0.0)
        return self._laid_out(rows, False)

    def _laid_out(self, rows: Tensor, whole: bool) -> Any:
        raw = self.data.x if isinstance(self.data, Batch) else self.data
        many = isinstance(raw, (list, tuple)) and self.lengths is not None and _several(raw, self.lengths)
        if many:
            parts = rows.split(self.lengths, -2)
            return [_like(part, as_tensor(own, "data"), whole) for part, own in zip(parts, raw, strict=True)]
        x = as_tensor(raw, "data")
        if x.dim() == 3:
            mask = self.batch.frames_mask()
            out = x.to(rows).expand(*rows.shape[:-2], *x.shape).clone()
            if mask is None:
                out = rows.unflatten(-2, x.shape[:2])
            else:
                out[..., mask, :] = rows
            rows = out
        return _like(rows, x, whole)


def _several(raw: Any, lengths: list[int]) -> bool:
    """Whether a list is one of sequences, not the numbers of one."""
    return len(raw) == len(lengths) and all(hasattr(item, "__len__") for item in raw) and [*map(len, raw)] == lengths


def _like(rows: Tensor, raw: Tensor, whole: bool) -> Tensor:
    """Rows in the type of what was given, and without the axis of columns where that had none."""
    rows = rows.squeeze(-1) if raw.dim() == 1 else rows
    floating = raw.is_floating_point()
    return rows.to(raw.dtype) if floating or (whole and raw.dtype != torch.bool) else rows


def impute(
    model: LatentModel,
    factor: Factor,
    gaps: Gaps,
    how: How,
    share: Tensor,
    rows: Batch,
) -> tuple[Tensor, Tensor]:
    """What stands for missing entries, and how unsure that is, both ``[*r, G, D]``.

    Args:
        model: Knows how much memory a piece may take.
        factor: What emitted the rows.
        gaps: The rows, for messages.
        how: What to fill in.
        share: Posterior of the states ``[*r, G, K]``.
        rows: The rows that miss an entry, with what the factor reads besides.
    """
    one_of("how", how, ("auto", "mean", "mode"))
    check_possible(share, gaps)
    size = factor.row_size() + 6 * share.shape[-1] * gaps.rows.shape[-1]
    step = rows_per_piece(
        size * factor.dtype.itemsize * max(1, *factor.replicas, 1), factor.device, model.memory_budget
    )
    starts = range(0, max(1, len(rows)), step)
    try:
        parts = [_fill(factor, how, share[..., i : i + step, :], rows[i : i + step]) for i in starts]
    except NotImplementedError as error:
        raise invalid("model", "families with a mean and a variance", error, "ask for draws=1 instead") from error
    value, spread = (torch.cat(part, -2) for part in zip(*parts, strict=True))
    return value, spread


def check_possible(share: Tensor, gaps: Gaps) -> None:
    """Refuse rows of probability zero, whose states have no posterior."""
    none = ~(share.sum(-1) > 0)
    if bool(none.any()):
        row = int(gaps.index[int(none.reshape(-1, none.shape[-1]).any(0).nonzero()[0])])
        raise invalid(
            "data", "observations of positive probability", f"probability zero at row {row}", "remove that outlier"
        )


def _fill(factor: Factor, how: How, share: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
    mean, variance = factor.conditional(rows)
    value, spread = total(share, mean, variance, factor.circular)
    if how == "mode":
        best = reduce.first_max(share)[..., None, None].expand(*share.shape[:-1], 1, mean.shape[-1])
        value = mean.expand(*share.shape, -1).gather(-2, best).squeeze(-2)
    for column, (outcomes, named) in enumerate(zip(factor.outcomes(), factor.nominal, strict=True)):
        if outcomes is None or (how == "mean" and not named):
            continue
        where = rows.x[:, column].isnan().nonzero()[:, 0]
        if len(where):
            found, chance = _most_probable(factor, outcomes, column, share[..., where, :], rows[where])
            value[..., where, column] = found.to(value)
            if named:
                spread[..., where, column] = (1 - chance).to(spread)
    return value, spread


def total(share: Tensor, mean: Tensor, variance: Tensor, circular: Sequence[bool] = (False,)) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[…, D]`` of a mixture by shares ``[…, K]`` of parts ``[…, K, D]``.

    The variance is that within the parts and that between them, Σ_k γ_k (σ²_k + (μ_k − μ)²). Of columns of angles both
    are those of directions.
    """
    if any(circular):
        angles = torch.tensor(circular, device=mean.device)
        found = zip(directional.mixed(share, mean, variance), total(share, mean, variance), strict=True)
        center, spread = (torch.where(angles, *pair) for pair in found)
        return center, spread
    share = share.unsqueeze(-1)
    # A state that cannot be may have no variance that is finite.
    center = torch.where(share > 0, share * mean, 0.0).sum(-2)
    spread = variance + (mean - center.unsqueeze(-2)).square()
    return center, torch.where(share > 0, share * spread, 0.0).sum(-2)


def total_covariance(share: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Covariance ``[…, D, D]`` of a mixture by shares ``[…, K]`` of parts with means and covariances ``[…, K, D, D]``.

    Σ_k γ_k (C_k + (μ_k − μ)(μ_k − μ)ᵀ).
    """
    each = share.unsqueeze(-1)
    gap = mean - torch.where(each > 0, each * mean, 0.0).sum(-2, keepdim=True)
    spread, each = covariance + gap.unsqueeze(-1) * gap.unsqueeze(-2), each.unsqueeze(-1)
    return torch.where(each > 0, each * spread, 0.0).sum(-3)


def _most_probable(factor: Factor, outcomes: Tensor, column: int, share: Tensor, rows: Batch) -> tuple[Tensor, Tensor]:
    """The most probable value of a missing entry, ``[*r, n]``, and its probability among all outcomes."""
    before = factor.log_prob(rows.with_x(factor.cast(rows.x)))
    weight = torch.where(share > 0, share.log() - before, -torch.inf)
    best: Tensor | None = None
    found: Tensor | None = None
    mass: Tensor | None = None
    for outcome in outcomes:
        x = rows.x.clone()
        x[:, column] = outcome
        value = reduce.logsumexp(weight + factor.log_prob(rows.with_x(factor.cast(x))), -1)
        if best is None or found is None or mass is None:
            best, found, mass = value, outcome.expand(value.shape), value
            continue
        found = torch.where(value > best, outcome, found)
        best, mass = torch.maximum(best, value), torch.logaddexp(mass, value)
    assert best is not None and found is not None and mass is not None
    return found, (best - mass).exp()


def complete(factor: Factor, rows: Batch, states: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of the missing entries of rows, one for each line of states ``[m, G]``: rows ``[m, G, D]``."""
    found = []
    try:
        for some in states.split(at_once(len(rows))):
            many = rows[torch.arange(len(rows), device=some.device).repeat(len(some))]
            found.append(factor.complete(many, some.flatten(), generator).unflatten(0, some.shape))
        return torch.cat(found)
    except NotImplementedError as error:
        raise invalid("model", "families that sample", error, "leave draws out") from error


def at_once(rows: int) -> int:
    """How many draws of so many rows to make together."""
    return max(1, _AT_ONCE // max(1, rows))


def checked_draws(draws: int | None, model: LatentModel, variance: bool) -> None:
    """Refuse a number of draws that is none, draws of replicas, or variances beside draws."""
    if draws is None:
        return
    if variance:
        raise invalid("variance", "False beside draws", True, "take it of the draws, or leave these out")
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise invalid("draws", "a whole number of at least 1, or None", repr(draws), "give how many tables to draw")
    if model.replicas:
        raise invalid("draws", "a model without replicas", f"{model.replicas[0]} of them", "use take_replicas(0)")


def finished(gaps: Gaps, factor: Factor, how: How, found: tuple[Tensor, Tensor] | Tensor, variance: bool) -> Any:
    """Imputed values laid out as the data; with their variances where these are asked for."""
    kinds = zip(factor.outcomes(), factor.nominal, strict=True)
    whole = all(outcomes is not None and (how != "mean" or named) for outcomes, named in kinds)
    if isinstance(found, Tensor):
        return gaps.filled(found, all(outcomes is not None for outcomes in factor.outcomes()))
    values = gaps.filled(found[0], whole)
    return (values, gaps.beside(found[1])) if variance else values


def bisected(component: Factor, cdf: Callable[[Tensor], Tensor], means: Tensor, variances: Tensor, q: float) -> Tensor:
    """Where the law of each column of a mixture has a share q below, ``[n, D]``; for counts the least such number.

    Args:
        component: What is mixed.
        cdf: Distribution function of the mixture at ``[n, D]``.
        means: ``[n, K, D]`` of its parts.
        variances: Likewise: a quantile of a part is no farther from its mean than Cantelli's inequality says, and one
            of the mixture lies between those of its parts.
        q: Strictly between 0 and 1.
    """
    spread = variances.sqrt()
    low = (means - spread * ((1 - q) / q) ** 0.5).amin(-2)
    high = (means + spread * (q / (1 - q)) ** 0.5).amax(-2)
    counted = torch.tensor([values is not None for values in component.outcomes()], device=low.device)
    counted = counted | component.discrete
    low, high = torch.where(counted, -1.0, low), torch.where(counted, high.ceil() + 1, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = cdf(middle) >= q
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(counted, high.round(), high)


def in_pieces(model: LatentModel, function: Callable[[Batch], tuple[Tensor, ...]], rows: Batch) -> tuple[Tensor, ...]:
    """A function of rows, piece by piece, its results ``[…, n, …]`` joined along their last axis but one.

    Where derivatives are followed a piece is computed again when they are asked for: what it went through is not kept.
    """
    component: Factor = model.slots()[-1][1]
    size = 12 * (component.n_components or 1) * rows.x.shape[-1] * max(1, *model.replicas, 1)
    budget = _PIECE if model.memory_budget is None else model.memory_budget
    pieces = list(rows.split(rows_per_piece(8 * size, component.device, budget)))
    if len(pieces) == 1:
        return function(pieces[0])
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        found = [checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        found = [function(piece) for piece in pieces]
    return tuple(torch.cat(parts, -2) for parts in zip(*found, strict=True))


@dataclass(frozen=True, eq=False)
class Conditional:
    """The law of the columns of each row that are not known, given those that are; see `Mixture.condition`.

    Attributes:
        model: The mixture.
        known: The rows, NaN where nothing is known.
        columns: Which columns this is about.
        weights: Probabilities of the components given what is known, ``[N, K]``.
        mean: ``[N, U]`` means of those columns; what is known is its own mean. Names have none: NaN, see `probs`.
        variance: ``[N, U]`` variances, within components and between them; zero where known, NaN of names.
    """

    model: Any
    known: Batch
    columns: list[int]
    weights: Tensor
    mean: Tensor
    variance: Tensor

    def probs(self, column: int) -> Tensor:
        """Probability of each category of a column of names, ``[N, C]``: one where it is known.

        p(x_c = j | x_o) = Σ_k γ_k p(x_c = j | x_o, k).

        Args:
            column: Its number in the data.

        Raises:
            InvalidArgument: If it is none of `columns`, or a column of numbers.

        Example:
            >>> import torchem
            >>> from torchem.factors import Categorical, Categoricals
            >>> m = torchem.Mixture(Categorical(2), Categoricals(2, [2, 2]))
            >>> m.component.probs = [[[0.9, 0.1], [0.8, 0.2]], [[0.1, 0.9], [0.2, 0.8]]]
            >>> m.condition([[0]], columns=[0]).probs(1).tolist()
            [[0.74..., 0.26...]]
        """
        component: Factor = self.model.component
        names = [place for place in self.columns if component.nominal[place]]
        if column not in names:
            raise invalid("column", f"one of the columns of names {names}", column, "see mean and variance of others")
        outcomes = component.outcomes()[column]
        assert outcomes is not None

        def each(piece: Batch) -> tuple[Tensor, ...]:
            share = self.model.posterior(piece)
            # With the density of what is known divided out, for families whose columns depend on each other.
            before = component.log_prob(piece.with_x(component.cast(piece.x)))
            weight = torch.where(share > 0, share.log() - before, -torch.inf)
            found = []
            for outcome in outcomes:
                x = piece.x.clone()
                x[:, column] = outcome
                found.append(reduce.logsumexp(weight + component.log_prob(piece.with_x(component.cast(x))), -1))
            own = piece.x[:, column].unsqueeze(-1)
            return (torch.where(own.isnan(), torch.stack(found, -1).exp(), (own == outcomes).to(share)),)

        return in_pieces(self.model, each, self.known)[0]

    @property
    def covariance_matrix(self) -> Tensor:
        """``[N, U, U]`` covariances of those columns, within components and between them; zero beside what is known.

        Raises:
            NotImplementedError: If the family has none.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 3).double()
            >>> m.condition([[0.0]], columns=[1]).covariance_matrix.tolist()
            [[[1.0, 0.0], [0.0, 1.0]]]
        """
        component: Factor = self.model.component
        if any(component.circular):
            raise NotImplementedError("angles have no covariances; see variance")
        width = self.known.x.shape[-1]
        numbers = 4 * self.weights.shape[-1] * width * (width + 1)
        rows = rows_per_piece(numbers * component.dtype.itemsize, component.device, self.model.memory_budget)
        parts = []
        for start in range(0, max(1, len(self.known)), rows):
            piece, share = self.known[start : start + rows], self.weights[start : start + rows]
            mean, holes = component.conditional(piece)[0], piece.x.isnan()
            found = total_covariance(share, mean, component.conditional_covariance(piece))
            named = torch.tensor(component.nominal, device=found.device)
            found = torch.where(named.unsqueeze(-1) | named, torch.nan, found)
            parts.append(torch.where(holes.unsqueeze(-1) & holes.unsqueeze(-2), found, 0.0))
        return torch.cat(parts)[:, self.columns][..., self.columns]

    def log_prob(self, x: Any) -> Tensor:
        """log p(unknown | known) of each row, ``[*s, N]``: the joint density less that of what is known.

        Args:
            x: ``[*s, N, U]`` values of the columns, NaN for those to be left out. What was known already is not read.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 2).double()
            >>> float(m.condition([[0.0]], columns=[0]).log_prob([[0.0]]).detach())
            -0.918938...
        """
        own = as_tensor(x, "x").to(self.mean)
        n = len(self.known)
        if own.dim() < 2 or own.shape[-2:] != (n, len(self.columns)):
            raise invalid("x", f"shape [{n}, {len(self.columns)}]", list(own.shape), "give the unknown columns")
        base = self.known.x.to(own)
        full = base.expand(*own.shape[:-2], *base.shape).clone()
        place = full[..., self.columns]
        full[..., self.columns] = torch.where(place.isnan(), own, place)
        many = full.shape[:-2].numel()
        rows = self.known.map(lambda value: value.repeat(many, *[1] * (value.dim() - 1))).with_x(full.flatten(0, -2))
        joint = self.model.log_prob(self.model.check(rows)).unflatten(0, full.shape[:-1])
        return joint - self.model.log_prob(self.known)

    @torch.no_grad()
    def sample(self, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws of the columns, ``[n, N, U]``."""
        whole_number("n", n, 1, "give the number of draws")
        check_generator(generator)
        z = torch.multinomial(self.weights, n, replacement=True, generator=generator).mT
        return complete(self.model.component, self.known, z, generator)[..., self.columns]

    def quantile(self, q: Any, draws: int = 1000, *, generator: torch.Generator | None = None) -> Tensor:
        """Quantiles of each column, ``[*q, N, U]``: what is known is its own, names have none (NaN).

        Exact, by halving a bracket of Σ_k γ_k P(x_u ≤ x | x_o, k), where the family knows these: normal columns, and
        those that are independent given the component and have a distribution function. Of other families they are
        those of ``draws``, and a ``generator`` is asked for. Nothing is drawn from torch's own generator.

        Args:
            q: Probabilities, a number or several; 0 and 1 of draws alone.
            draws: How many draws to take them from, where that has to be.
            generator: Source of the draws.

        Raises:
            InvalidArgument: For other numbers, or where draws have to be taken and there is no generator.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 2).double()
            >>> m.condition([[0.0]], columns=[0]).quantile([0.025, 0.5, 0.975]).flatten().tolist()
            [-1.9599..., 0.0..., 1.9599...]
        """
        levels = as_tensor(q, "q").to(self.mean)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise invalid("q", "probabilities from 0 to 1", "another number", "give for example [0.05, 0.95]")
        try:
            found = torch.stack([self._quantile(float(level)) for level in levels.reshape(-1)])
        except NotImplementedError as error:
            if generator is None:
                raise invalid(
                    "generator", "a torch.Generator to draw with, where quantiles have no closed form",
                    str(error).partition(";")[0], "pass generator=torch.Generator().manual_seed(0)",
                ) from error  # fmt: skip
            found = self.sample(draws, generator=generator).quantile(levels.reshape(-1), dim=0)
            named = torch.tensor(self.model.component.nominal, device=found.device)[self.columns]
            found = torch.where(named & self.known.x[:, self.columns].isnan(), torch.nan, found)
        return found.reshape(*levels.shape, *found.shape[1:])

    @torch.no_grad()
    def _quantile(self, q: float) -> Tensor:
        component: Factor = self.model.component
        if not 0 < q < 1:
            raise NotImplementedError(f"the quantile at {q:g} is that of no finite number")

        def each(piece: Batch) -> tuple[Tensor, ...]:
            share, cdf = self.model.posterior(piece).unsqueeze(-1), component.conditional_cdf(piece)
            value = bisected(
                component, lambda x: torch.where(share > 0, share * cdf(x), 0.0).sum(-2),
                *component.conditional(piece), q,
            )  # fmt: skip
            named = torch.tensor(component.nominal, device=value.device)
            return (torch.where(piece.x.isnan(), torch.where(named, torch.nan, value), piece.x),)

        return in_pieces(self.model, each, self.known)[0][:, self.columns]


def spread_out(known: Tensor, columns: Any, width: int) -> tuple[Tensor, list[int]]:
    """Known columns among all, the others NaN, and which the others are.

    Args:
        known: ``[N, C]``.
        columns: Which columns these are.
        width: D.
    """
    given = [int(column) for column in columns]
    if len(set(given)) < len(given) or not set(given) <= set(range(width)) or len(given) == width:
        raise invalid(
            "columns", f"different columns from 0 to {width - 1}, not all", given, "name those that are known"
        )
    if known.shape[-1] != len(given):
        raise invalid("data", f"{len(given)} columns, those that are known", known.shape[-1], "give one for each name")
    x = known if known.is_floating_point() else known.to(torch.float64)
    full = x.new_full((len(x), width), torch.nan)
    full[:, given] = x
    return full, [column for column in range(width) if column not in given]


def floating(batch: Batch, model: LatentModel) -> Batch:
    """Rows on the model's device and in its type, where NaN is what is missing."""
    batch = batch.to(model.device)
    return replace(batch, x=batch.x.to(model.dtype), weight=None)
