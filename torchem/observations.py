"""Observations from files: rows, frames of sequences or pixels, and what a model says of them, as tables again."""

import csv
import functools
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchem.batch import Batch
from torchem.errors import InvalidFile, describe, invalid
from torchem.images import CHANNELS, read_image, to_pixels
from torchem.model import LatentModel
from torchem.sequences import as_buckets, numbered
from torchem.tables import SequenceTable, read_columns, read_sequences


@dataclass(frozen=True)
class Observations:
    """Data of a run, with what is needed to read others like them.

    Attributes:
        source: File that they were read from.
        columns: Name of each column.
        values: ``[N, D]``; of sequences all frames, one sequence after the other.
        weights: ``[N]``, or one for each sequence; or None.
        image: ``[H, W, 3]`` bytes where the rows are the pixels of an image.
        colour: What a pixel's columns are.
        index: ``[N]`` what the file says of when or where each row was taken, if it does.
        inputs: ``[N, M]`` covariates, if there are some.
        offset: ``[N]`` known terms of linear predictors, if there are some.
        trials: ``[N]`` numbers of trials, if there are some.
        labels: ``[N]`` what is known of the classes, if it is.
        sequences: Which rows make which sequence; None where they are observations of their own.
    """

    source: Path
    columns: list[str]
    values: np.ndarray
    weights: np.ndarray | None = None
    image: np.ndarray | None = None
    colour: Any = "rgb"
    index: np.ndarray | None = None
    sequences: SequenceTable | None = None
    inputs: np.ndarray | None = None
    labels: np.ndarray | None = None
    offset: np.ndarray | None = None
    trials: np.ndarray | None = None

    @property
    def given(self) -> dict[str, np.ndarray]:
        """What regressions and gates read beside the values, by the names of arguments."""
        known = {"inputs": self.inputs, "offset": self.offset, "trials": self.trials}
        return {name: value for name, value in known.items() if value is not None}

    def draw(self, rows: int | None, seed: int | None) -> "Observations":
        """At most ``rows`` of them, at random.

        Raises:
            InvalidArgument: For frames of sequences, which do not stand alone.
        """
        if rows is None or rows >= len(self.values):
            return self
        if self.sequences is not None:
            raise invalid("data.max_rows", f"{len(self.values)} or more for sequences", rows, "leave it out")
        index = np.sort(np.random.default_rng(seed or 0).choice(len(self.values), rows, replace=False))
        weights, labels = (None if known is None else known[index] for known in (self.weights, self.labels))
        given: dict[str, Any] = {name: value[index] for name, value in self.given.items()}
        return Observations(self.source, self.columns, self.values[index], weights, labels=labels, **given)

    def fields(self, weights: str) -> dict[str, Any]:
        """What belongs to the values, by the names of arguments; ``weights`` is what that one is called."""
        known = {weights: self.weights, **self.given, "labels": self.labels}
        return known | ({} if self.sequences is None else {"lengths": self.sequences.lengths})

    def batch(self, model: Any) -> Batch:
        """As a model reads them."""
        lengths = None if self.sequences is None else self.sequences.lengths
        fields = self.given | ({} if lengths is None else {"lengths": lengths})
        return model.batch(torch.from_numpy(np.ascontiguousarray(self.values)), **fields)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in the order of `values` by sequence."""
        assert self.sequences is not None
        return np.split(rows, np.cumsum(self.sequences.lengths)[:-1])

    def places(self) -> list[np.ndarray] | None:
        """Where frames stand on a time axis, by sequence; None if the index rises in no unit that is known."""
        if self.index is None:
            return None
        try:
            at = self.index if self.index.dtype.kind == "f" else self.index.astype("datetime64[us]")
        except ValueError:
            return None
        parts = self.split(at)
        rising = all(np.isfinite(part).all() and (part[1:] > part[:-1]).all() for part in parts)
        return parts if rising else None


def read_pixels(path: str | os.PathLike[str], colour: Any) -> Observations:
    """The pixels of an image."""
    image = read_image(path)
    return Observations(Path(path), CHANNELS[colour], to_pixels(image, colour), None, image, colour)


def read_rows(
    path: str | os.PathLike[str],
    columns: list[str] | None,
    weights: str | None = None,
    index: str | None = None,
    sequence: str | None = None,
    sequential: bool = False,
    inputs: list[str] | None = None,
    intercept: bool = False,
    offset: str | None = None,
    trials: str | None = None,
    labels: str | None = None,
    blind: bool = False,
    whole: bool = False,
) -> Observations:
    """The rows of a table, with what names or weights them apart.

    Args:
        path: The table.
        columns: Columns that are observed; all others when None.
        weights: Column of weights.
        index: Column that names rows.
        sequence: Column that names sequences.
        sequential: Whether rows are frames of sequences.
        inputs: Columns of covariates.
        intercept: Whether a column of ones stands before them.
        offset: Column of known terms of linear predictors.
        trials: Column of numbers of trials.
        labels: Column that says what is known of classes.
        blind: Whether the observed columns may be absent, where covariates are there to predict them from; all of them
            are then missing.
        whole: Whether labels are of whole sequences.

    Raises:
        InvalidFile: If the table cannot be read.
        InvalidArgument: If sequences are asked for where rows stand alone, or a weight differs within one.
    """
    if sequence is not None and not sequential:
        raise invalid("data.sequence", "none, for a model of single rows", repr(sequence), "leave it out")
    if columns is None:
        taken = {weights, index, sequence, offset, trials, labels, *(inputs or ())}
        columns = [name for name in read_columns(path) if name not in taken]
    absent = blind and inputs is not None and not {*columns} <= {*read_columns(path)}
    own = [] if absent else columns
    single = [name for name in (weights, offset, trials, labels) if name is not None]
    wanted = list(dict.fromkeys([*own, *(inputs or ()), *single]))
    if blind:
        _refuse_absent(path, wanted)
    try:
        found = read_sequences(path, wanted, sequence=sequence, index=index)
    except InvalidFile as error:
        hint = "or read only numeric columns with columns=[…]"
        better = "or name the columns to model as data.columns, and one of times as data.index"
        raise InvalidFile(str(error).replace(hint, better)) from error

    def column(name: str | None) -> np.ndarray | None:
        return None if name is None else np.ascontiguousarray(found.table.select([name], str(path)).values[:, 0])

    if absent:
        values = np.full((len(found.table.values), len(columns)), np.nan)
    else:
        values = found.table.select(own, str(path)).values
    weight = column(weights)
    names = {"labels": labels, "offset": offset, "trials": trials}
    known: dict[str, Any] = {"index": found.index} | {key: column(name) for key, name in names.items()}
    if inputs is not None:
        u = found.table.select(inputs, str(path)).values
        known["inputs"] = np.column_stack([np.ones(len(u)), u]) if intercept else np.ascontiguousarray(u)
    if not sequential:
        return Observations(Path(path), columns, values, weight, **known)
    if weight is not None:
        weight = _one_each("weights", weight, found.lengths, found.names)
    if whole and known["labels"] is not None:
        known["labels"] = _one_each("labels", known["labels"], found.lengths, found.names)
    return Observations(Path(path), columns, values, weight, sequences=found, **known)


def _refuse_absent(path: str | os.PathLike[str], wanted: list[str]) -> None:
    """Say of columns that a model was fitted on, and other data lack, how those may be unknown."""
    present = read_columns(path)
    absent = [name for name in wanted if name not in present]
    if absent:
        expected = f"the column{'s' * (len(absent) > 1)} {', '.join(map(repr, absent))} that the model was fitted on"
        near = get_close_matches(absent[0], present, n=1, cutoff=0.5)
        remedy = "add it, with empty cells where it is not known"
        remedy = f"did you mean {near[0]!r}? (else {remedy})" if near else remedy
        raise InvalidFile(describe(str(path), expected, "the columns " + ", ".join(map(repr, present)), remedy))


def _one_each(what: str, values: np.ndarray, lengths: np.ndarray, names: list[str]) -> np.ndarray:
    """The weight, or the label, of each sequence."""
    first = values[np.cumsum(lengths) - lengths]
    for name, own, several in zip(names, first, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
        if not ((several == own) | (np.isnan(several) & np.isnan(own))).all():
            raise invalid(
                f"data.{what}", f"one {what[:-1]} for each sequence", f"several in {name!r}", "repeat it in each row"
            )
    return first


# ---- what a model says of them --------------------------------------------------------------------------------------


#: Shares of which predictions from covariates name the quantiles.
_SHARES = (0.05, 0.5, 0.95)


def label_rows(
    model: LatentModel, data: Observations, called: Mapping[str, Any] | None = None
) -> tuple[list[str], list[np.ndarray]]:
    """Names and columns of a prediction: label (or scores), responsibilities where the model has them, log-density.

    Of sequences that are clustered as wholes there is a row for each, behind its name. Where there are covariates, mean
    and quantiles of each column given these follow; they stand alone where no column is there.
    """
    given = data.inputs is not None
    ahead = {} if model.whole else _predicted(model, data)
    if given and np.isnan(data.values).all():
        return [*ahead], [*ahead.values()]
    batch = data.batch(model)
    if hasattr(model, "conditionals"):
        return _node_rows(model, batch)
    with torch.no_grad():
        label = model.most_likely(batch).cpu().numpy()
        posterior, log_prob = model.posterior(batch), model.log_prob(batch).cpu().numpy()
    names, columns = ["label"], [label]
    if label.ndim == 2:  # scores of continuous latents
        names, columns = [f"score_{j}" for j in range(label.shape[1])], list(label.T)
    if data.sequences is not None:
        names = [(called or {}).get("sequence") or "sequence", *names]
        columns = [np.array(data.sequences.names), *columns]
    if isinstance(posterior, torch.Tensor) and posterior.dim() == 2:
        names += [f"responsibility_{k}" for k in range(posterior.shape[1])]
        columns += list(posterior.cpu().numpy().T)
    return [*names, "log_prob", *ahead], [*columns, log_prob, *ahead.values()]


def _node_rows(model: Any, batch: Any) -> tuple[list[str], list[np.ndarray]]:
    """For each hidden node of a network its most likely state and the probability of each; then the log-density."""
    with torch.no_grad():
        found: dict[str, torch.Tensor] = {}
        for node in model.hidden:
            share = model.posterior(node, batch)
            found[node] = share.argmax(-1)
            found |= {f"{node}_{state}": share[:, state] for state in range(share.shape[1])}
        found["log_prob"] = model.log_score(batch)
    return [*found], [value.cpu().numpy() for value in found.values()]


def _predicted(model: Any, data: Observations) -> dict[str, np.ndarray]:
    """Mean and quantiles of each column given the covariates, where the model has them."""
    if data.inputs is None or not hasattr(model, "predict"):
        return {}
    try:
        with torch.no_grad():
            law = model.predict(**data.given)
            found = {"mean": law.mean, **{f"q{share:g}": law.quantile(share) for share in _SHARES}}
    except NotImplementedError:  # a family without moments
        return {}
    return {
        f"{kind}_{name}": values[:, d].cpu().numpy()
        for d, name in enumerate(data.columns)
        for kind, values in found.items()
    }


@dataclass(frozen=True)
class Decoded:
    """What a chain says of the frames of sequences, in the order of the observations.

    Attributes:
        path: ``[F]`` the most likely path.
        posterior: ``[F, K]`` probability of each state given the whole sequence.
    """

    path: np.ndarray
    posterior: np.ndarray


def decode(model: Any, data: Observations) -> Decoded:
    """Path and posterior of each frame."""
    return Decoded(by_frame(model, data, model.most_likely), by_frame(model, data, model.posterior))


@torch.no_grad()
def by_frame(model: Any, data: Observations, function: Callable[[Batch], torch.Tensor]) -> np.ndarray:
    """What a function of batches of sequences says of each frame, in the order of the observations."""
    assert data.sequences is not None
    lengths = data.sequences.lengths
    starts, out = np.cumsum(lengths) - lengths, None
    values = torch.from_numpy(data.values)
    given = {("u" if name == "inputs" else name): torch.from_numpy(value) for name, value in data.given.items()}
    for numbers, batch in as_buckets(values, lengths=lengths, allow_missing=model.handles_missing, **given):
        with numbered(numbers):
            batch = model.check(batch)
        found = function(batch).cpu().numpy()
        for row, i in zip(found, range(len(found)) if numbers is None else numbers.tolist(), strict=True):
            out = np.empty((len(values), *row.shape[1:]), row.dtype) if out is None else out
            out[starts[i] : starts[i] + lengths[i]] = row[: lengths[i]]
    assert out is not None
    return out


def state_rows(
    model: Any, data: Observations, names: Mapping[str, Any], decoded: Decoded, filtered: bool = False
) -> tuple[list[str], list[np.ndarray]]:
    """Names and columns of a prediction for sequences: sequence and index, state, probabilities, in the file's order.

    Args:
        model: The chain.
        data: The sequences.
        names: Names of the columns ``sequence`` and ``index``.
        decoded: Their paths and posteriors.
        filtered: Whether to add probabilities given the frames up to each alone.
    """
    assert data.sequences is not None
    table: dict[str, np.ndarray] = {}
    if names.get("sequence"):
        table[names["sequence"]] = np.repeat(np.array(data.sequences.names), data.sequences.lengths)
    if data.index is not None:
        table[names["index"]] = whole(data.index)
    table["state"] = decoded.path
    probs = {"posterior": decoded.posterior}
    if filtered:
        probs["filtered"] = by_frame(model, data, model.filter)
    table |= {f"{kind}_{k}": column for kind, columns in probs.items() for k, column in enumerate(columns.T)}
    back = np.argsort(data.sequences.rows)
    return list(table), [column[back] for column in table.values()]


def level_rows(
    model: Any, data: Observations, names: Mapping[str, Any], filtered: bool = False
) -> tuple[list[str], list[np.ndarray]]:
    """As `state_rows` for states that are no numbers of components: what observations are without their noise.

    Args:
        model: The model, whose ``smooth`` gives their means and standard deviations.
        data: The sequences.
        names: Names of the columns ``sequence`` and ``index``.
        filtered: Whether to add the means of states given the frames up to each alone.
    """
    assert data.sequences is not None
    table: dict[str, np.ndarray] = {}
    if names.get("sequence"):
        table[names["sequence"]] = np.repeat(np.array(data.sequences.names), data.sequences.lengths)
    if data.index is not None:
        table[names["index"]] = whole(data.index)
    mean, sd = (by_frame(model, data, functools.partial(_smoothed, model, kind)) for kind in ("mean", "stddev"))
    table |= {f"level_{name}": mean[:, d] for d, name in enumerate(data.columns)}
    table |= {f"sd_{name}": sd[:, d] for d, name in enumerate(data.columns)}
    if filtered:
        states = by_frame(model, data, lambda batch: model.filter(batch).mean)
        table |= {f"filtered_{k}": column for k, column in enumerate(states.T)}
    back = np.argsort(data.sequences.rows)
    return list(table), [column[back] for column in table.values()]


def _smoothed(model: Any, kind: str, batch: Batch) -> torch.Tensor:
    return getattr(model.smooth(batch), kind)


def imputed_rows(
    model: Any,
    data: Observations,
    names: Mapping[str, Any],
    how: Any,
    draws: int | None,
    variance: bool,
    generator: torch.Generator,
) -> tuple[list[str], list[np.ndarray]]:
    """Names and columns of a table completed by a model, in the order of the file; draws one table after the other.

    Args:
        model: The model.
        data: What it completes.
        names: Names of the columns ``sequence`` and ``index``.
        how: What to fill in, see `LatentModel.impute`.
        draws: How many tables to draw instead, if any.
        variance: Whether to add the conditional variance of each entry.
        generator: Source of the draws.
    """
    options: dict[str, Any] = {"how": how, "draws": draws, "generator": generator}
    if data.sequences is None:
        values = torch.from_numpy(np.ascontiguousarray(data.values))
        found = model.impute(values, variance=variance, **options, **data.given)
        parts = [part.cpu().numpy() for part in (found if variance else [found])]
        back = np.arange(len(data.values))
    else:

        def of(which: int, batch: Batch) -> torch.Tensor:
            found = model.impute(batch, variance=variance, **options)
            found = found[which] if variance else found
            return found if draws is None else found.movedim(0, 2)

        parts = [by_frame(model, data, functools.partial(of, which)) for which in range(1 + variance)]
        parts = [part if draws is None else np.moveaxis(part, 1, 0) for part in parts]
        back = np.argsort(data.sequences.rows)
    table: dict[str, np.ndarray] = {}
    if data.sequences is not None and names.get("sequence"):
        table[names["sequence"]] = np.repeat(np.array(data.sequences.names), data.sequences.lengths)
    if data.index is not None:
        table[names["index"]] = whole(data.index)
    table = {name: column[back] for name, column in table.items()}
    if draws is not None:
        table = {name: np.tile(column, draws) for name, column in table.items()}
        table = {"draw": np.repeat(np.arange(draws), len(back)), **table}
    suffixes = ("", "_variance")
    for suffix, part in zip(suffixes, parts, strict=False):
        rows = part[..., back, :].reshape(-1, part.shape[-1])
        table |= {f"{name}{suffix}": whole(column) for name, column in zip(data.columns, rows.T, strict=True)}
    return list(table), list(table.values())


def whole(column: np.ndarray) -> np.ndarray:
    """Whole numbers as integers, so that they are written without a point.

    Example:
        >>> whole(np.array([1900.0, 1901.0])).tolist()
        [1900, 1901]
    """
    integral = column.dtype.kind == "f" and np.isfinite(column).all() and (column == column.round()).all()
    return column.astype(np.int64) if integral and (np.abs(column) < 2**53).all() else column


def to_csv(names: list[str], columns: list[np.ndarray]) -> bytes:
    r"""A table as CSV; every number is written so that it reads back exactly.

    Example:
        >>> to_csv(["a", "b"], [np.array([1, 2]), np.array([0.5, 0.1])])
        b'a,b\n1,0.5\n2,0.1\n'
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return stream.getvalue().encode()
