"""The command ``torchem``: fit a model that a configuration describes, then predict, sample and plot.

Errors of the user end with exit code 2 and one line on standard error; nothing half-written stays behind.
"""

import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchem
from torchem import files, images, options, runs
from torchem.errors import InvalidFile, MissingExtra, TorchemError, describe, invalid, one_of
from torchem.evaluate import Criteria
from torchem.trainer import Result

#: Columns shown in the table of components; report.json has them all.
_SHOWN = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows ``torchem`` on the command line; that of the process when None.

    Returns:
        The exit code: 0 done, 1 the fit went wrong numerically, 2 an error of the user, 130 interrupted.

    Example:
        >>> main(["--version"])
        torchem ...
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(given)
        except SystemExit as end:  # --help, --version, --print_config
            return end.code if isinstance(end.code, int) else 0
        except KeyboardInterrupt:
            return _complain("interrupted; nothing was written.", 130)
        except BrokenPipeError:  # the reader of a pipe had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (TorchemError, options.ArgumentError) as error:
            return _complain(options.explain(error, _keys(given)), 2)
        except UnicodeDecodeError as error:
            return _complain(
                describe("config", "text in UTF-8", f"other bytes ({error.reason})", "save it as UTF-8"), 2
            )
        except OSError as error:
            where, reason = error.filename or "file", error.strerror or str(error)
            return _complain(describe(str(where), "a file that can be used", reason, "check it"), 2)


def _run(given: list[str]) -> int:
    commands: dict[str, Callable[[Any], int]] = {"predict": _predict, "sample": _sample, "plot": _plot}
    if not given:
        given = ["--help"]
    if given[0] == "fit":
        given = _config_first(given)
    parser = options.parser()
    config = parser.parse_args(given)
    if config.subcommand == "fit":
        return _fit(config.fit)
    return commands[config.subcommand](config[config.subcommand])


def _config_first(given: list[str]) -> list[str]:
    """Let the configuration stand without ``--config``, as the first argument of ``fit``."""
    if len(given) == 1:
        raise invalid("config", "a YAML file", "none", "try torchem fit configs/faithful.yaml, or torchem fit --help")
    if len(given) > 1 and not given[1].startswith("-"):
        return ["fit", "--config", *given[1:]]
    return given


def _keys(given: list[str]) -> list[str]:
    return options.keys(options.fit_parser()) if given[:1] == ["fit"] else []


def _complain(line: str, code: int) -> int:
    print(f"torchem: error: {line}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"torchem: warning: {message}", file=sys.stderr)


# ---- fit ----------------------------------------------------------------------------------------------------------


def _fit(config: Any) -> int:
    folder = _folder(config)
    runs.check_target(folder)
    ready = options.fit_parser().instantiate(config)
    _check_device(ready.fit.device)
    data = _read(ready.data)
    rows = data.draw(ready.data.max_rows, ready.fit.seed)
    model = ready.model.to(getattr(torch, config.dtype))
    result = torchem.fit(model, rows.values, weights=rows.weights, **vars(ready.fit))
    criteria = torchem.criteria(model, rows.values, weights=rows.weights)
    report = runs.describe_run(result, criteria, data, len(rows.values), ready.data.weights, folder)
    contents = _contents(result, data, report, options.dump(config, folder))
    runs.write_run(folder, contents)
    print(_summary(result, criteria, data, len(rows.values), report["components"]))
    print(f"\nwrote {_shown(folder)}: {', '.join(contents)}")
    return {"nonfinite": 1, "diverged": 1, "interrupted": 130}.get(result.status, 0)


def _folder(config: Any) -> Path:
    if config.output is not None:
        return Path(os.path.normpath(config.output.absolute))
    name = Path(str(config.config[-1])).stem if config.config else "run"
    return Path("runs", name).absolute()


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise invalid("fit.device", "a device of this machine", repr(str(device)), "leave it out") from error


def _read(data: options.Data) -> runs.Observations:
    if data.image is not None:
        return runs.read_pixels(data.image.absolute, data.colour)
    assert data.path is not None
    return runs.read_rows(data.path.absolute, data.columns, data.weights)


def _contents(result: Result, data: runs.Observations, report: dict[str, Any], config: str) -> dict[str, bytes]:
    """Every file of the run, by name."""
    contents = {runs.MODEL: files.to_bytes(result.model), runs.CONFIG: config.encode()}
    if data.image is None:
        contents["labels.csv"] = runs.to_csv(*runs.label_rows(result.model, data.values))
    try:
        contents |= _pictures(result.model, data, report, "png")
    except MissingExtra as error:
        warnings.warn(f"no pictures: {error}", UserWarning, stacklevel=2)
    report["files"] = [runs.REPORT, *contents]
    return {runs.REPORT: files.to_json(report), **contents}


def _pictures(model: Any, data: runs.Observations, report: dict[str, Any], kind: str) -> dict[str, bytes]:
    """The pictures of a run, by file name."""
    from torchem.errors import require

    require("matplotlib", "plot").use("Agg")  # pyright: ignore[reportAttributeAccessIssue]
    from torchem import plot

    drawn = {"bound": plot.bound(report["fit"]["histories"] or report["fit"]["history"])}
    if data.image is not None:
        drawn["segmented"] = plot.segmentation(data.image, _labels(model, data), _colours(model, data))
    elif hasattr(model, "component"):
        d = data.values.shape[1]
        draw = plot.pairs if 2 < d <= _SHOWN else plot.clusters
        drawn["clusters"] = draw(model, data.values, data.columns)
    return {f"{name}.{kind}": _rendered(axes, kind) for name, axes in drawn.items()}


def _rendered(axes: Any, kind: str) -> bytes:
    from matplotlib import pyplot as plt

    figure = np.ravel(axes)[0].figure
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=150)
    plt.close(figure)
    return stream.getvalue()


def _labels(model: Any, data: runs.Observations) -> np.ndarray:
    assert data.image is not None
    with torch.no_grad():
        labels = model.most_likely(torch.from_numpy(data.values))
    return labels.cpu().numpy().reshape(data.image.shape[:2])


def _colours(model: Any, data: runs.Observations) -> np.ndarray | None:
    """RGB of the components' means; None where a model has none."""
    means = getattr(getattr(model, "component", None), "means", None)
    return None if means is None else images.to_rgb(means.detach().cpu().double().numpy(), data.colour)


# ---- what fit prints ----------------------------------------------------------------------------------------------


def _summary(
    result: Result, criteria: Criteria, data: runs.Observations, rows: int, components: list[dict[str, Any]]
) -> str:
    what = "pixels" if data.image is not None else "observations"
    some = "" if rows == len(data.values) else f" (drawn from {len(data.values):,})"
    dtype = str(result.model.dtype).removeprefix("torch.")
    head = f"{type(result.model).__name__} · {rows:,} {what}{some} × {_many(len(data.columns), 'column')} · {dtype}"
    return "\n\n".join(
        part for part in (head, _component_table(components, data.columns), _facts(result, criteria)) if part
    )


def _component_table(components: list[dict[str, Any]], columns: list[str]) -> str:
    if not components:
        return ""
    shown = columns[:_SHOWN]
    left = len(columns) - len(shown)
    header = ["component", "weight", *shown]
    digits = {x: _decimals([c["sd"][x] for c in components]) for x in shown}
    body = [
        [
            str(c["component"]),
            f"{c['weight']:.4f}",
            *(f"{c['mean'][x]:.{digits[x]}f} ± {c['sd'][x]:.{digits[x]}f}" for x in shown),
        ]
        for c in components
    ]
    note = "mean ± standard deviation of each column"
    return aligned([header, *body]) + f"\n({note}{f'; {left} more columns in {runs.REPORT}' if left else ''})"


def _decimals(deviations: list[float]) -> int:
    """Decimals that show three digits of the smallest standard deviation of a column."""
    least = min((sd for sd in deviations if sd > 0), default=1.0)
    return min(12, max(0, 2 - math.floor(math.log10(least))))


def _facts(result: Result, criteria: Criteria) -> str:
    each = criteria.loglik / criteria.n
    facts = [
        ["log-likelihood", f"{criteria.loglik:.2f}", f"{each:.4f} per observation"],
        ["AIC", f"{criteria.aic:.2f}", f"{criteria.n_parameters} parameters"],
        ["BIC", f"{criteria.bic:.2f}", ""],
        ["ICL", f"{criteria.icl:.2f}", ""],
    ]
    width = max(len(fact[1]) for fact in facts)
    lines = [f"{name:<15} {value:>{width}}  {note}".rstrip() for name, value, note in facts]
    rest = "" if result.remaining is None else f", an estimated {result.remaining:.2g} nats short of the maximum"
    lines.append(
        f"{'status':<15} {result.status} after {_many(result.n_iter, 'iteration')}{rest}, {result.seconds:.2f} s"
    )
    if len(result.restarts) > 1:
        lines.append(f"{'restarts':<15} {_restarts(result)}")
    for name in ("dead", "floored"):
        which = getattr(result, name)
        if which:
            meaning = {"dead": "no mass left in", "floored": "covariance at the floor in"}[name]
            lines.append(f"{name:<15} {meaning} component{'s' * (len(which) > 1)} {', '.join(map(str, which))}")
    return "\n".join(lines)


def _restarts(result: Result) -> str:
    low, high = f"{min(result.restarts):.2f}", f"{max(result.restarts):.2f}"
    n = len(result.restarts)
    text = f"{n}, all ending at {high}" if low == high else f"{n}, ending between {low} and {high}"
    if result.agreement is not None:
        same = sum(share >= 0.99 for share in result.agreement)
        text += f"; {same} of {n} label at least 99 % of observations alike"
    return text


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table whose columns end flush right.

    Example:
        >>> print(aligned([["k", "mean"], ["0", "1.25"]]))
        k  mean
        0  1.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# ---- the other commands -------------------------------------------------------------------------------------------


def _predict(config: Any) -> int:
    run = runs.read_run(config.run)
    data = run.observations(config.data)
    output = config.output or str(run.folder / (runs.PREDICTED if data.image is not None else runs.PREDICTIONS))
    if data.image is not None and Path(output).suffix.lower() == ".png":
        labels, colours = _labels(run.model, data), _colours(run.model, data)
        content = images.to_png(images.painted(data.image, labels, colours))
    else:
        content = runs.to_csv(*runs.label_rows(run.model, data.values))
    return _deliver(output, content, f"{len(data.values):,} rows")


def _sample(config: Any) -> int:
    run = runs.read_run(config.run)
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    x = run.model.sample(config.n, generator=generator).cpu().numpy()
    output = config.output or str(run.folder / runs.SAMPLE)
    return _deliver(output, runs.to_csv(run.columns, list(x.T)), f"{len(x):,} rows")


def _plot(config: Any) -> int:
    one_of("format", config.format, ("png", "pdf", "svg"))
    run = runs.read_run(config.run)
    pictures = _pictures(run.model, run.observations(config.data), run.report, config.format)
    for name, content in pictures.items():
        files.write_atomic(run.folder / name, content)
    print(f"wrote {_shown(run.folder)}: {', '.join(pictures)}")
    return 0


def _deliver(output: str, content: bytes, what: str) -> int:
    """Write to a file, or to standard output for ``-``."""
    if output == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return 0
    path = Path(output)
    if path.is_dir():
        raise InvalidFile(describe("output", "a file", f"the folder {output!r}", "name a file in it"))
    files.write_atomic(path, content)
    print(f"wrote {_shown(path)}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
