"""Missing entries filled in: by their conditional means, by what is most probable, or by draws."""

from abc import abstractmethod
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
from torchem.models.unseen import Unseen, most_probable
from torchem.ops.dispatch import rows_per_piece

#: Halvings of a bracket: more than float64 can tell apart.
_HALVINGS = 80
#: Rows that are drawn together.
_AT_ONCE = 1 << 15
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


def fill(model: LatentModel, law: Unseen, gaps: Gaps, how: How) -> tuple[Tensor, Tensor]:
    """What stands for missing entries, and how unsure that is, both ``[*r, G, D]``.

    Args:
        model: Knows how much memory a piece may take.
        law: Of the rows that miss an entry.
        gaps: The rows, for messages.
        how: What to fill in.
    """
    check_possible(law.possible(), gaps)
    try:
        parts = [_fill(piece, how) for piece in pieces(model, law)]
    except NotImplementedError as error:
        raise invalid("model", "families with a mean and a variance", error, "ask for draws=1 instead") from error
    value, spread = (torch.cat(part, -2) for part in zip(*parts, strict=True))
    return value, spread


def pieces(model: LatentModel, law: Unseen, numbers: int = 0) -> list[Unseen]:
    """The law in pieces that fit the model's budget, at ``numbers`` for a row where that is more than moments take."""
    size = max(numbers, law.numbers) * model.dtype.itemsize
    step, rows = rows_per_piece(size, model.device, model.memory_budget), len(law.rows)
    return [law] if rows <= step else [law[start : start + step] for start in range(0, rows, step)]


def check_possible(possible: Tensor, gaps: Gaps) -> None:
    """Refuse rows of probability zero, whose states have no posterior, where ``possible [*r, G]`` is False."""
    if not bool(possible.all()):
        row = int(gaps.index[int((~possible).reshape(-1, possible.shape[-1]).any(0).nonzero()[0])])
        raise invalid(
            "data", "observations of positive probability", f"probability zero at row {row}", "remove that outlier"
        )


def _fill(law: Unseen, how: How) -> tuple[Tensor, Tensor]:
    value, spread = law.moments()
    if how == "mode":
        value = law.mode()
    if how != "mean":
        value = law.placed(value)
    for column, (outcomes, named) in enumerate(zip(law.outcomes, law.nominal, strict=True)):
        if outcomes is None or (how == "mean" and not named):
            continue
        where = law.rows.x[:, column].isnan().nonzero()[:, 0]
        if len(where):
            found, chance = most_probable(law[where], column, outcomes)
            value[..., where, column] = found.to(value)
            if named:
                spread[..., where, column] = (1 - chance).to(spread)
    return value, spread


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


def kinds_of(factor: Factor) -> list[tuple[bool, bool]]:
    """For each column whether its values are single numbers, and whether they are names."""
    return [(values is not None, named) for values, named in zip(factor.outcomes(), factor.nominal, strict=True)]


def in_turn(draws: int, rows: int) -> list[int]:
    """How many draws of so many rows to make together, one lot after the other."""
    step = at_once(rows)
    return [step] * (draws // step) + [draws % step] * (draws % step > 0)


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


class Completing(LatentModel):
    """A model that knows the law of what was not seen of its observations, given what was.

    It says so by `unseen` and `drawn`; filling in gaps and predicting some columns from others follow.
    """

    @abstractmethod
    def unseen(self, batch: Batch, index: Tensor) -> Unseen:
        """The law of the missing entries of some rows, of sequences of their frames.

        Args:
            batch: All observations.
            index: Numbers of the rows among all, rising; those of sequences one after the other.
        """

    @abstractmethod
    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """Draws of the rows that miss an entry, ``[m, G, D]``; the frames of a sequence are drawn together."""

    @abstractmethod
    def column_kinds(self) -> list[tuple[bool, bool]]:
        """For each column whether its values are single numbers, and whether they are names."""

    @torch.no_grad()
    def impute(
        self,
        data: Any,
        how: How = "auto",
        *,
        draws: int | None = None,
        variance: bool = False,
        generator: torch.Generator | None = None,
        **fields: Any,
    ) -> Any:
        """The data with their missing entries filled in, given all that was seen; see `LatentModel.impute`.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 2)
            >>> m.covariances = [[[1.0, 0.5], [0.5, 1.0]]]
            >>> m.impute(torch.tensor([[2.0, torch.nan]]))
            tensor([[2., 1.]])
            >>> m = torchem.LinearGaussianStateSpace(1, 1)
            >>> m.observation_covariance = [[1e-4]]
            >>> m.impute(torch.tensor([1.0, torch.nan, 3.0]))
            tensor([1.0000, 2.0000, 3.0000])
        """
        checked_draws(draws, self, variance)
        check_generator(generator)
        one_of("how", how, ("auto", "mean", "mode"))
        gaps = Gaps.of(data, self._read(data, fields), self.sequential)
        kinds = self.column_kinds()
        if draws is not None:
            return gaps.filled(self.drawn(gaps, draws, generator), all(discrete for discrete, _ in kinds))
        value, spread = fill(self, self.unseen(gaps.batch, gaps.index), gaps, how)
        values = gaps.filled(value, all(discrete and (how != "mean" or named) for discrete, named in kinds))
        return (values, gaps.beside(spread)) if variance else values

    def condition(self, data: Any, columns: Sequence[int] | None = None, **fields: Any) -> "Conditional":
        """The law of the columns that are not known given those that are: prediction of some columns from others.

        p(x_u | x_o) = Σ_k γ_k p(x_u | x_o, k), with the probabilities γ of the states given all that is known: of a
        frame given its whole sequence.

        Args:
            data: Rows ``[N, D]`` or sequences with NaN where nothing is known, each its own; or the known ``columns``
                alone.
            columns: Numbers of the columns that ``data`` holds.
            **fields: ``observed``, ``inputs``, ``lengths``, … as for `torchem.fit`.

        Returns:
            The law of each row or frame: ``.mean``, ``.variance``, ``.covariance_matrix``, ``.weights``,
            ``.log_prob(x)``, ``.sample(n)``, ``.quantile(q)``; of the other columns in their order where ``columns``
            are given, else of all of them.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 2)
            >>> m.covariances = [[[1.0, 0.5], [0.5, 1.0]]]
            >>> law = m.condition([[2.0], [0.0]], columns=[0])
            >>> law.mean.tolist(), law.variance.tolist()
            ([[1.0], [0.0]], [[0.75], [0.75]])
            >>> m = torchem.GaussianHMM(2, 2)
            >>> m.means, m.transition_matrix = [[-2.0, 5.0], [2.0, 7.0]], [[1.0, 0.0], [0.0, 1.0]]
            >>> m.condition([-2.0, -2.0, 1.0], columns=[0]).mean[0, :, 0]
            tensor([5.0..., 5.0..., 5.0...], grad_fn=<SelectBackward0>)
        """
        left = None
        if columns is not None:
            data, left = spread_out(data, columns, len(self.column_kinds()), self.sequential)
        batch = floating(self._read(data, fields), self)
        return Conditional.of(self, batch, left)


def conditioned(model: Completing, batch: Batch) -> tuple[Unseen, Tensor, Tensor]:
    """The law of every row or frame, and its mean and variance ``[*r, F, D]``."""
    law = model.unseen(batch, torch.arange(int(batch.frames().sum()) if batch.x.dim() > 2 else len(batch)))
    several = pieces(model, law)
    parts = [_recomputed(piece.moments) for piece in several] if len(several) > 1 else [law.moments()]
    mean, variance = (torch.cat(part, -2) for part in zip(*parts, strict=True))
    return law, mean, variance


def _recomputed(function: Callable[[], Any]) -> Any:
    """What a function gives; where derivatives are followed it is computed again for them, and nothing is kept."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function()
    return checkpoint(function, use_reentrant=False, preserve_rng_state=False)


def places(batch: Batch, index: Tensor, device: torch.device) -> Tensor:
    """Where rows of sequences, numbered one after the other, stand among all frames and padding."""
    mask = batch.frames_mask()
    if mask is None:
        return index.to(device)
    return mask.flatten().nonzero()[:, 0].to(device)[index.to(device)]


def bisected(
    counted: Sequence[bool], cdf: Callable[[Tensor], Tensor], means: Tensor, variances: Tensor, q: float
) -> Tensor:
    """Where the law of each column of a mixture has a share q below, ``[n, D]``; for counts the least such number.

    Args:
        counted: For each column whether its values are whole numbers.
        cdf: Distribution function of the mixture at ``[n, D]``.
        means: ``[n, K, D]`` of its parts.
        variances: Likewise: a quantile of a part is no farther from its mean than Cantelli's inequality says, and one
            of the mixture lies between those of its parts.
        q: Strictly between 0 and 1.
    """
    spread = variances.sqrt()
    low = (means - spread * ((1 - q) / q) ** 0.5).amin(-2)
    high = (means + spread * (q / (1 - q)) ** 0.5).amax(-2)
    whole = torch.tensor(counted, device=low.device)
    low, high = torch.where(whole, -1.0, low), torch.where(whole, high.ceil() + 1, high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = cdf(middle) >= q
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(whole, high.round(), high)


@dataclass(frozen=True, eq=False)
class Conditional:
    """The law of the columns that are not known of each row or frame, given what is; see `Completing.condition`.

    Attributes:
        model: Whose law it is.
        known: The rows ``[N, D]``, or sequences ``[N, T, D]``, NaN where nothing is known.
        columns: Which columns this is about.
        weights: Probabilities of the states given what is known, ``[N, K]``; of frames ``[N, T, K]``.
        mean: ``[N, U]`` means of those columns, of frames ``[N, T, U]``; what is known is its own mean. Names have
            none: NaN, see `probs`.
        variance: Their variances, within states and between them; zero where known, NaN of names. In the padding all is
            zero.
        law: Of the rows, or of the frames one after the other.
    """

    model: Completing
    known: Batch
    columns: list[int]
    weights: Tensor
    mean: Tensor
    variance: Tensor
    law: Unseen

    @classmethod
    def of(cls, model: Completing, batch: Batch, columns: list[int] | None) -> "Conditional":
        """The law of some columns, or of all."""
        law, mean, variance = conditioned(model, batch)
        unnamed = ~torch.tensor(law.nominal, device=mean.device) | ~law.rows.x.isnan()
        mean, variance = (torch.where(unnamed, value, torch.nan) for value in (mean, variance))
        columns = list(range(mean.shape[-1])) if columns is None else columns
        found = (law.share, mean[..., columns], variance[..., columns])
        weights, mean, variance = (_laid(batch, value, 1) for value in found)
        return cls(model, batch, columns, weights, mean, variance, law)

    def probs(self, column: int) -> Tensor:
        """Probability of each category of a column of names, ``[N, C]`` or ``[N, T, C]``: one where it is known.

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
        names = [place for place in self.columns if self.law.nominal[place]]
        if column not in names:
            raise invalid("column", f"one of the columns of names {names}", column, "see mean and variance of others")
        outcomes = self.law.outcomes[column]
        assert outcomes is not None

        def each(piece: Unseen) -> Tensor:
            own = piece.rows.x[:, column].unsqueeze(-1)
            found = torch.stack([piece.log_chance(column, outcome) for outcome in outcomes], -1).exp()
            return torch.where(own.isnan(), found, (own == outcomes).to(found))

        return _laid(self.known, torch.cat([each(piece) for piece in pieces(self.model, self.law)], -2), 1)

    @property
    def covariance_matrix(self) -> Tensor:
        """``[N, U, U]`` covariances of those columns, within states and between them; zero beside what is known.

        Raises:
            NotImplementedError: If the family has none.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 3).double()
            >>> m.condition([[0.0]], columns=[1]).covariance_matrix.tolist()
            [[[1.0, 0.0], [0.0, 1.0]]]
        """
        if any(self.law.circular):
            raise NotImplementedError("angles have no covariances; see variance")
        width = self.known.x.shape[-1]
        numbers = 4 * self.law.share.shape[-1] * width * (width + 1)
        parts = [piece.covariance() for piece in pieces(self.model, self.law, numbers)]
        found, holes = torch.cat(parts, -3), self.law.rows.x.isnan()
        named = torch.tensor(self.law.nominal, device=found.device)
        unknown = holes.unsqueeze(-1) & holes.unsqueeze(-2) & (named.unsqueeze(-1) | named)
        found = torch.where(unknown, torch.nan, found)
        return _laid(self.known, found[..., self.columns, :][..., self.columns], 2)

    def log_prob(self, x: Any) -> Tensor:
        """log p(unknown | known) of each row, ``[*s, N]``, or of each frame by itself, ``[*s, N, T]``.

        That of a whole sequence together is ``model.log_prob(full) - model.log_prob(known)``.

        Args:
            x: ``[*s, N, U]`` or ``[*s, N, T, U]`` values of the columns, NaN for those to be left out. What was known
                already is not read.

        Example:
            >>> import torchem
            >>> m = torchem.GaussianMixture(1, 2).double()
            >>> float(m.condition([[0.0]], columns=[0]).log_prob([[0.0]]).detach())
            -0.918938...
        """
        own, shape = as_tensor(x, "x").to(self.mean), [*self.known.x.shape[:-1], len(self.columns)]
        if list(own.shape[own.dim() - len(shape) :]) != shape:
            raise invalid("x", f"shape {shape}", list(own.shape), "give the unknown columns")
        lead, mask = own.shape[: own.dim() - len(shape)], self.known.frames_mask()
        own = own.flatten(len(lead), -2) if mask is None else own[..., mask, :]
        base = self.law.rows.x.to(own)
        full = base.expand(*lead, *base.shape).clone()
        place = full[..., self.columns]
        full[..., self.columns] = torch.where(place.isnan(), own, place)
        many = self.law[torch.arange(len(base), device=base.device).repeat(lead.numel())] if lead else self.law
        value = many.log_prob(full.flatten(0, -2))
        return _laid(self.known, value.unflatten(-1, (*lead, len(base))), 0)

    @torch.no_grad()
    def sample(self, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws of the columns, ``[n, N, U]`` or ``[n, N, T, U]``; a sequence is drawn as a whole."""
        whole_number("n", n, 1, "give the number of draws")
        check_generator(generator)
        return self.model.impute(self.known, draws=n, generator=generator)[..., self.columns]

    def quantile(self, q: Any, draws: int = 1000, *, generator: torch.Generator | None = None) -> Tensor:
        """Quantiles of each column, ``[*q, N, U]`` or ``[*q, N, T, U]``: what is known is its own, of names NaN.

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
            found = torch.where(self.mean.isnan(), torch.nan, found)
        return found.reshape(*levels.shape, *found.shape[1:])

    @torch.no_grad()
    def _quantile(self, q: float) -> Tensor:
        if not 0 < q < 1:
            raise NotImplementedError(f"the quantile at {q:g} is that of no finite number")
        counted, named = [values is not None for values in self.law.outcomes], torch.tensor(self.law.nominal)
        found = []
        for piece in pieces(self.model, self.law):
            mean, variance = (value.unsqueeze(-2) for value in piece.moments())
            value = bisected(counted, piece.conditional_cdf(), mean, variance, q)
            x = piece.rows.x
            found.append(torch.where(x.isnan(), torch.where(named.to(x.device), torch.nan, value), x.to(value)))
        return _laid(self.known, torch.cat(found, -2)[..., self.columns], 1)


def _laid(batch: Batch, value: Tensor, events: int) -> Tensor:
    """What rows have, ``[*r, F, …]`` with ``events`` axes more, as the batch is laid out; zero in padding."""
    if batch.x.dim() < 3:
        return value
    axis, shape, mask = value.dim() - events - 1, batch.x.shape[:2], batch.frames_mask()
    if mask is None:
        return value.unflatten(axis, shape)
    place = mask.flatten().nonzero()[:, 0].to(value.device)
    size = (*value.shape[:axis], shape.numel(), *value.shape[axis + 1 :])
    return value.new_zeros(size).index_copy(axis, place, value).unflatten(axis, shape)


def spread_out(data: Any, columns: Any, width: int, sequential: bool) -> tuple[Any, list[int]]:
    """Known columns among all, the others NaN, and which the others are.

    Args:
        data: ``[…, C]``, one column also without that axis; or a list of tensors or arrays, one for each sequence.
        columns: Which columns these are.
        width: D.
        sequential: Whether a list of arrays holds sequences.
    """
    given = [int(column) for column in columns]
    if len(set(given)) < len(given) or not set(given) <= set(range(width)) or len(given) == width:
        raise invalid(
            "columns", f"different columns from 0 to {width - 1}, not all", given, "name those that are known"
        )

    def spread(own: Any) -> Tensor:
        known = as_tensor(own, "data")
        known = known.unsqueeze(-1) if known.dim() == 1 and len(given) == 1 else known
        if known.shape[-1:] != (len(given),):
            raise invalid(
                "data", f"{len(given)} columns, those that are known", known.shape[-1], "give one for each name"
            )
        x = known if known.is_floating_point() else known.to(torch.float64)
        full = x.new_full((*x.shape[:-1], width), torch.nan)
        full[..., given] = x
        return full

    many = sequential and isinstance(data, (list, tuple)) and all(getattr(item, "ndim", 0) > 0 for item in data)
    return [spread(item) for item in data] if many else spread(data), [c for c in range(width) if c not in given]


def floating(batch: Batch, model: LatentModel) -> Batch:
    """Rows on the model's device and in its type, where NaN is what is missing."""
    batch = batch.to(model.device)
    return replace(batch, x=batch.x.to(model.dtype), weight=None)
