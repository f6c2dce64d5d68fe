"""Run folders: what a fit leaves behind, written whole or not at all, and read again by the other commands."""

import copy
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchem import files
from torchem.batch import Batch
from torchem.errors import InvalidFile, describe, invalid
from torchem.evaluate import Criteria
from torchem.factors import Categorical
from torchem.models.stationary import Stationary
from torchem.observations import Decoded, Observations, read_pixels, read_rows
from torchem.result import Result
from torchem.tables import read_columns

#: What marks a folder as a run, and the version of its layout.
FORMAT, FORMAT_VERSION = "torchem run", 1
MODEL, REPORT, CONFIG = "model.safetensors", "report.json", "config.yaml"

#: What a configuration says of columns that are not observed, and of covariates.
NAMED = ("weights", "index", "sequence", "inputs", "intercept", "offset", "trials", "labels")

#: What the other commands write into a run when no other place is named; it belongs to the model that it was made with.
PREDICTIONS, PREDICTED, SAMPLE, IMPUTED = "predictions.csv", "predicted.png", "sample.csv", "imputed.csv"
_DERIVED = re.compile(
    r"predictions\.csv|predicted\.png|sample\.csv|imputed\.csv"
    r"|(clusters|prediction|bound|segmented|states|level|posterior|transitions|chain|network|durations|loadings)(-\d+)?"
    r"\.(png|pdf|svg)"
)

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder that was read."""

    folder: Path
    model: Any
    report: dict[str, Any]
    states: int | None = None

    @property
    def columns(self) -> list[str]:
        """Columns that the model was fitted on."""
        return self.report["data"]["columns"]

    def observations(self, path: str | None = None) -> Observations:
        """Data for the model: a file, or what it was fitted on.

        Raises:
            InvalidFile: If the file is missing or lacks the model's columns.
        """
        data = self.report["data"]
        own = path is None
        names: dict[str, Any] = {key: data.get(key) for key in ("index", "sequence", "inputs", "offset", "trials")}
        names["intercept"] = bool(data.get("intercept"))
        source = self.folder / data["source"] if own else Path(path)
        if own and not source.exists():
            raise InvalidFile(
                describe(str(source), "the data of the run", "no such file", "name the data on the command line")
            )
        image = data["colour"] is not None and (own or source.suffix.lower() in _IMAGES)
        if image:
            return read_pixels(source, data["colour"])
        if not own:
            # Other data need not say when they were taken.
            names["index"] = names["index"] if names["index"] in read_columns(source) else None
        weights = data["weights"] if own else None
        kind = {"sequential": self.model.sequential, "whole": self.model.whole}
        return read_rows(source, self.columns, weights, **names, **kind, blind=not own)


def read_run(folder: str | os.PathLike[str], states: int | None = None) -> Run:
    """Read a run folder.

    Args:
        folder: What ``torchem fit`` wrote.
        states: The number of states to use, where several were fitted; that which was chosen when None.

    Raises:
        InvalidFile: If it is none, or damaged.
        InvalidArgument: If no model with so many states was fitted.
    """
    path = Path(folder)
    report = _report(path)
    if report is None:
        what = "no such folder" if not path.exists() else "something else"
        raise InvalidFile(describe(str(path), "a folder that torchem fit wrote", what, "run torchem fit first"))
    if report.get("format_version", 0) > FORMAT_VERSION:
        version = report["format_version"]
        raise InvalidFile(describe(str(path), f"layout {FORMAT_VERSION} or older", version, "update torchem"))
    data = report.get("data")
    keys = ("columns", "source", "colour", "weights")
    if not isinstance(data, dict) or any(key not in data for key in keys) or not isinstance(report.get("fit"), dict):
        got = "one that lacks its data or fit"
        raise InvalidFile(describe(str(path / REPORT), "a whole report", got, "run torchem fit again"))
    return Run(path, files.load(path / _model_file(report, states)), report, states)


def model_file(states: int | None = None) -> str:
    """Where a run keeps its model, or one that was not chosen, of so many states."""
    return MODEL if states is None else MODEL.replace(".", f"-{states}.")


def _model_file(report: dict[str, Any], states: int | None) -> str:
    fitted = [entry["n_states"] for entry in report.get("candidates", ())]
    if states is None or states == report.get("n_states"):
        return MODEL
    if states not in fitted:
        several = ", ".join(map(str, fitted)) or "the model of the run alone"
        raise invalid("states", f"one of those fitted ({several})", states, "leave it out")
    return model_file(states)


def _report(folder: Path) -> dict[str, Any] | None:
    """The report of a run folder; None where there is none."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and report.get("format") == FORMAT else None


# ---- writing ------------------------------------------------------------------------------------------------------


def check_target(folder: Path) -> None:
    """Refuse, before any work is done, a folder that a run must not replace.

    Raises:
        InvalidArgument: If it holds something that is no run, or lies where nothing can be written.
    """
    if folder.is_dir():
        if any(folder.iterdir()) and _report(folder) is None:
            raise invalid(
                "output", "a new folder, an empty one or an earlier run", f"{str(folder)!r}, which holds other files",
                "choose another folder",
            )  # fmt: skip
    elif folder.exists():
        raise invalid("output", "a folder", f"the file {str(folder)!r}", "choose another path")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise invalid("output", "a place to write to", repr(str(folder)), f"choose another: {parent} is not writeable")


def write_run(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a run folder as a whole, replacing an earlier one; files in it that are not torchem's are kept.

    Raises:
        InvalidFile: If the folder cannot be written; an earlier run is then as it was.
    """
    target = folder.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            fresh.chmod(0o777 & ~files.umask())
            for name, content in contents.items():
                files.write_atomic(fresh / name, content)
            _exchange(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidFile(describe(str(folder), "a place to write to", reason, "choose another folder")) from error


def _exchange(fresh: Path, target: Path) -> None:
    """Put the new folder in the place of the old one."""
    if not target.exists():
        fresh.rename(target)
        files.sync_folder(target.parent)
        return
    written = (_report(target) or {}).get("files", ())
    for item in target.iterdir():
        if item.name not in written and not _DERIVED.fullmatch(item.name) and not (fresh / item.name).exists():
            _copy(item, fresh / item.name)
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    target.rename(old / "run")
    try:
        fresh.rename(target)
    except OSError:
        (old / "run").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
    files.sync_folder(target.parent)


def _copy(item: Path, where: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.copytree(item, where, symlinks=True)
    else:
        shutil.copy2(item, where, follow_symlinks=False)


# ---- the report ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model that was fitted, and what is told about it.

    Attributes:
        states: Number of its states, where several numbers were tried.
        result: What the fit returned.
        criteria: Of the rows that the model was fitted on.
        parts: Its components or states, as report.json lists them.
        decoded: What it says of the frames of sequences.
    """

    states: int | None
    result: Result
    criteria: Criteria
    parts: list[dict[str, Any]]
    decoded: Decoded | None = None

    def report(self) -> dict[str, Any]:
        """What report.json holds of the fit."""
        result = self.result
        names = (
            "status", "converged", "bound", "n_iter", "remaining", "restarts", "statuses", "agreement", "dead",
            "floored", "pruned", "seconds", "history", "seen", "histories",
        )  # fmt: skip
        kind = "states" if result.model.sequential and not result.model.whole else "components"
        return {
            "fit": {name: getattr(result, name) for name in names},
            "criteria": vars(self.criteria),
            kind: self.parts,
        }


def describe_run(
    chosen: Candidate,
    candidates: list[Candidate],
    data: Observations,
    rows: int,
    names: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """What report.json holds, but for the list of files.

    Args:
        chosen: The model of the run.
        candidates: All that were fitted.
        data: All rows.
        rows: Number of rows that the model was fitted on.
        names: What `NAMED` lists.
        folder: Where the report will lie.
    """
    from torchem import __version__

    model = chosen.result.model
    report = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "torchem": __version__,
        "torch": str(torch.__version__),
        "model": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": {
            "source": relative(data.source, folder),
            "columns": data.columns,
            "rows": len(data.values),
            "fitted_rows": rows,
            "sequences": None if data.sequences is None else len(data.sequences.names),
            "colour": None if data.image is None else data.colour,
            **names,
        },
        **chosen.report(),
    }
    if len(candidates) > 1:
        report["n_states"] = chosen.states
        report["candidates"] = [{"n_states": c.states, **c.report()} for c in candidates]
    return report


def components(model: Any, columns: list[str]) -> list[dict[str, Any]]:
    """Weight, mean and standard deviation of each component, where the model has them.

    Example:
        >>> import torchem
        >>> components(torchem.GaussianMixture(1, 1), ["x"])
        [{'component': 0, 'weight': 1.0, 'mean': {'x': 0.0}, 'sd': {'x': 1.0}}]
    """
    part: Any = getattr(model, "component", None)
    probs = getattr(getattr(model, "mixing", None), "probs", None)
    if getattr(model, "models", None) is not None:
        return _models(model, columns)
    if probs is None or not (hasattr(part, "means") and hasattr(part, "covariances")):
        return []
    weights, means = probs.tolist(), part.means.tolist()
    return [
        {
            "component": k,
            "weight": weight,
            "mean": dict(zip(columns, mean, strict=True)),
            "sd": dict(zip(columns, map(math.sqrt, _variances(part, k, len(columns))), strict=True)),
        }
        for k, (weight, mean) in enumerate(zip(weights, means, strict=True))
    ]


def _models(model: Any, columns: list[str]) -> list[dict[str, Any]]:
    """Weight of each component that is a model, and the states of those that are chains."""
    weights = model.mixing.probs.tolist() if hasattr(model.mixing, "probs") else [None] * model.n_components
    return [
        {"component": k, "weight": weight, **({"states": states(part, columns)} if hasattr(part, "transition") else {})}
        for k, (weight, part) in enumerate(zip(weights, model.component, strict=True))
    ]


def _variances(part: Any, k: int, d: int) -> list[float]:
    """Variance of each column under component k, whatever the covariance type."""
    covariances = part.covariances.detach()
    shared = getattr(getattr(part, "structure", None), "shared", None)
    own = covariances if shared else covariances[k]
    if own.dim() == 2:
        return own.diagonal().tolist()
    return own.expand(d).tolist()


def states(model: Any, columns: list[str], decoded: Decoded | None = None) -> list[dict[str, Any]]:
    """Shares, levels and steps of each state of a chain, as far as the model has them.

    ``stationary`` is the share of time in the long run, ``time`` that in the data, by posterior probability; a
    semi-Markov model adds the mean ``duration``.
    """
    shares: dict[str, list[Any]] = {} if decoded is None else {"time": decoded.posterior.mean(0).tolist()}
    if isinstance(model.transition, Categorical):
        law, lasting = Stationary(model.transition).probs, getattr(model, "mean_durations", None)
        if lasting is not None:
            law = law * lasting / (law * lasting).sum()
            shares["duration"] = lasting.tolist()
        shares = {"stationary": law.tolist(), **shares}
    shares |= {kind: [dict(zip(columns, row, strict=False)) for row in rows] for kind, rows in levels(model).items()}
    if isinstance(model.transition, Categorical):
        shares["to"] = model.transition_matrix.tolist()
    k = model.n_states
    return [{"state": i, **{name: values[i] for name, values in shares.items()}} for i in range(k)]


def levels(model: Any) -> dict[str, list[list[float]]]:
    """What tells states of a chain apart, ``[K, D]``: rates, probabilities, or means and standard deviations.

    Example:
        >>> import torchem
        >>> levels(torchem.GaussianHMM(1, 2))
        {'mean': [[0.0, 0.0]], 'sd': [[1.0, 1.0]]}
    """
    emission = model.emission
    for view, kind in (("rates", "rate"), ("probs", "probability")):
        # Beside other parameters a rate alone says little.
        if set(emission.views) == {view}:
            return {kind: getattr(emission, view).tolist()}
    if emission.memory or getattr(emission, "lags", 0):
        return {}  # what is expected depends on what was before
    try:
        mean, variance = emission.moments(Batch(torch.zeros(1, emission.n_features or 1, dtype=model.dtype)))
    except NotImplementedError:
        return {}
    return {"mean": mean[0].tolist(), "sd": variance[0].sqrt().tolist()}


def sort_states(result: Result) -> None:
    """Number the states of a fitted chain by the level of their first column, lowest first, in place."""
    model: Any = result.model
    first = next(iter(levels(model).values()), None)
    if first is None or not isinstance(model.transition, Categorical):
        return
    order = sorted(range(len(first)), key=lambda k: first[k])
    twin = copy.deepcopy(model)
    try:
        twin.prune(torch.tensor(order))
    except NotImplementedError:
        return
    model.load_from(twin)
    for group in (result.dead, result.floored):
        group[:] = sorted(order.index(k) for k in group if isinstance(k, int))


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, so that both can move together; absolute where there is no way."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.resolve())
