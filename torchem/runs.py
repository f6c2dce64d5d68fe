"""Run folders: what a fit leaves behind, written whole or not at all, and read again by the other commands."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchem import files
from torchem.errors import InvalidFile, describe, invalid
from torchem.evaluate import Criteria
from torchem.images import CHANNELS, read_image, to_pixels
from torchem.model import LatentModel
from torchem.tables import read_table
from torchem.trainer import Result

#: What marks a folder as a run, and the version of its layout.
FORMAT, FORMAT_VERSION = "torchem run", 1
MODEL, REPORT, CONFIG = "model.safetensors", "report.json", "config.yaml"

#: What the other commands write into a run when no other place is named; it belongs to the model that it was made with.
PREDICTIONS, PREDICTED, SAMPLE = "predictions.csv", "predicted.png", "sample.csv"
PICTURES = ("clusters", "bound", "segmented")
_DERIVED = {PREDICTIONS, PREDICTED, SAMPLE, *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "pdf", "svg"))}

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


# ---- observations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observations:
    """Data of a run, with what is needed to read others like them.

    Attributes:
        source: File that they were read from.
        columns: Name of each column.
        values: ``[N, D]``.
        weights: ``[N]`` or None.
        image: ``[H, W, 3]`` bytes where the rows are the pixels of an image.
        colour: What a pixel's columns are.
    """

    source: Path
    columns: list[str]
    values: np.ndarray
    weights: np.ndarray | None = None
    image: np.ndarray | None = None
    colour: Any = "rgb"

    def draw(self, rows: int | None, seed: int | None) -> "Observations":
        """At most ``rows`` of them, at random."""
        if rows is None or rows >= len(self.values):
            return self
        index = np.sort(np.random.default_rng(seed or 0).choice(len(self.values), rows, replace=False))
        weights = None if self.weights is None else self.weights[index]
        return Observations(self.source, self.columns, self.values[index], weights)


def read_pixels(path: str | os.PathLike[str], colour: Any) -> Observations:
    """The pixels of an image."""
    image = read_image(path)
    return Observations(Path(path), CHANNELS[colour], to_pixels(image, colour), None, image, colour)


def read_rows(path: str | os.PathLike[str], columns: list[str] | None, weights: str | None) -> Observations:
    """The rows of a table, with the column of weights apart."""
    if weights is None:
        table = read_table(path, columns)
        return Observations(Path(path), table.columns, table.values)
    table = read_table(path, None if columns is None else [*columns, weights])
    columns = [name for name in table.columns if name != weights] if columns is None else columns
    source = str(path)
    weight = table.select([weights], source).values[:, 0]
    return Observations(Path(path), list(columns), table.select(columns, source).values, np.ascontiguousarray(weight))


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder that was read."""

    folder: Path
    model: Any
    report: dict[str, Any]

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
        source = self.folder / data["source"] if own else Path(path)
        if own and not source.exists():
            raise InvalidFile(
                describe(str(source), "the data of the run", "no such file", "name the data on the command line")
            )
        image = data["colour"] is not None and (own or source.suffix.lower() in _IMAGES)
        if image:
            return read_pixels(source, data["colour"])
        return read_rows(source, self.columns, data["weights"] if own else None)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        InvalidFile: If it is none, or damaged.
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
    return Run(path, files.load(path / MODEL), report)


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
    written = {*(_report(target) or {}).get("files", ()), *_DERIVED}
    for item in target.iterdir():
        if item.name not in written and not (fresh / item.name).exists():
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


def describe_run(
    result: Result, criteria: Criteria, data: Observations, rows: int, weights: str | None, folder: Path
) -> dict[str, Any]:
    """What report.json holds, but for the list of files.

    Args:
        result: What the fit returned.
        criteria: Of the rows that the model was fitted on.
        data: All rows.
        rows: Number of rows that the model was fitted on.
        weights: Name of the column of weights.
        folder: Where the report will lie.
    """
    from torchem import __version__

    image = data.image is not None
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "torchem": __version__,
        "torch": str(torch.__version__),
        "model": type(result.model).__name__,
        "dtype": str(result.model.dtype).removeprefix("torch."),
        "data": {
            "source": relative(data.source, folder),
            "columns": data.columns,
            "rows": len(data.values),
            "fitted_rows": rows,
            "weights": weights,
            "colour": data.colour if image else None,
        },
        "fit": {
            "status": result.status,
            "converged": result.converged,
            "bound": result.bound,
            "n_iter": result.n_iter,
            "remaining": result.remaining,
            "restarts": result.restarts,
            "agreement": result.agreement,
            "dead": result.dead,
            "floored": result.floored,
            "pruned": result.pruned,
            "seconds": result.seconds,
            "history": result.history,
            "histories": result.histories,
        },
        "criteria": vars(criteria),
        "components": components(result.model, data.columns),
    }


def components(model: Any, columns: list[str]) -> list[dict[str, Any]]:
    """Weight, mean and standard deviation of each component, where the model has them.

    Example:
        >>> import torchem
        >>> components(torchem.GaussianMixture(1, 1), ["x"])
        [{'component': 0, 'weight': 1.0, 'mean': {'x': 0.0}, 'sd': {'x': 1.0}}]
    """
    part: Any = getattr(model, "component", None)
    probs = getattr(getattr(model, "mixing", None), "probs", None)
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


def _variances(part: Any, k: int, d: int) -> list[float]:
    """Variance of each column under component k, whatever the covariance type."""
    covariances = part.covariances.detach()
    own = covariances if getattr(part, "covariance_type", "full") == "tied" else covariances[k]
    if own.dim() == 2:
        return own.diagonal().tolist()
    return own.expand(d).tolist()


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, so that both can move together; absolute where there is no way."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(path.resolve())


def label_rows(model: LatentModel, values: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Names and columns of a prediction: label, responsibilities where the model has them, log-density."""
    batch = model.batch(torch.from_numpy(np.ascontiguousarray(values)))
    with torch.no_grad():
        label = model.most_likely(batch).cpu().numpy()
        posterior, log_prob = model.posterior(batch), model.log_prob(batch).cpu().numpy()
    names, columns = ["label"], [label]
    if isinstance(posterior, torch.Tensor) and posterior.dim() == 2:
        names += [f"responsibility_{k}" for k in range(posterior.shape[1])]
        columns += list(posterior.cpu().numpy().T)
    return [*names, "log_prob"], [*columns, log_prob]


def to_csv(names: list[str], columns: list[np.ndarray]) -> bytes:
    r"""A table as CSV; every number is written so that it reads back exactly.

    Example:
        >>> to_csv(["a", "b"], [np.array([1, 2]), np.array([0.5, 0.1])])
        b'a,b\n1,0.5\n2,0.1\n'
    """
    import csv
    import io

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return stream.getvalue().encode()
