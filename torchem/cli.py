"""The command ``torchem``: fit a model that a configuration describes, then predict, sample and plot.

Errors of the user end with exit code 2 and one line on standard error; nothing half-written stays behind.
"""

import contextlib
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
from torchem.observations import (
    Decoded,
    Observations,
    decode,
    imputed_rows,
    label_rows,
    level_rows,
    read_pixels,
    read_rows,
    state_rows,
    to_csv,
    whole,
)
from torchem.result import Result

#: Columns shown in the table of components; report.json has them all.
_SHOWN = 6
#: States up to which it shows the transition matrix.
_MATRIX = 12


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
    commands: dict[str, Callable[[Any], int]] = {
        "predict": _predict, "sample": _sample, "impute": _impute, "plot": _plot,
    }  # fmt: skip
    if not given:
        given = ["--help"]
    if given[0] == "fit":
        given = _config_first(given)
    parser = options.parser()
    config = parser.parse_args(given)
    if config.subcommand == "fit":
        several = config.fit.states if isinstance(config.fit.states, list) else []
        return _fit(config.fit, [parser.parse_args([*given, "--states", str(k)]).fit for k in several] or [config.fit])
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


def _fit(config: Any, each: list[Any]) -> int:
    """Fit the model of each of some configurations, which differ in the number of states, and keep the best."""
    folder = _folder(config)
    runs.check_target(folder)
    started = [(one.states, options.instantiate(one)) for one in each]
    ready = started[0][1]
    _check_device(ready.fit.device)
    data = _read(ready.data, ready.model)
    rows = data.draw(ready.data.max_rows, ready.fit.seed)
    candidates = [_candidate(states, own, rows, getattr(torch, config.dtype)) for states, own in started]
    chosen = min(candidates, key=lambda c: getattr(c.criteria, config.criterion))
    names = {key: getattr(ready.data, key) for key in runs.NAMED}
    report = runs.describe_run(chosen, candidates, data, len(rows.values), names, folder)
    contents = _contents(chosen, candidates, data, report, options.dump(config, folder))
    runs.write_run(folder, contents)
    print(_summary(chosen, candidates, data, len(rows.values), config.criterion))
    print(f"\nwrote {_shown(folder)}: {', '.join(contents)}")
    return {"nonfinite": 1, "diverged": 1, "interrupted": 130}.get(chosen.result.status, 0)


def _is_chain(model: Any) -> bool:
    """Whether each frame of a sequence has a discrete state, and nothing else that is hidden."""
    return model.sequential and not model.whole and not _is_continuous(model)


def _is_continuous(model: Any) -> bool:
    """Whether what is hidden has no configurations to list."""
    return "hard" not in model.e_steps


def _candidate(states: int | None, ready: Any, data: Observations, dtype: torch.dtype) -> runs.Candidate:
    """Fit one model."""
    model = ready.model.to(dtype)
    result = torchem.fit(model, data.values, **data.fields("weights"), **vars(ready.fit))
    if _is_chain(model):
        runs.sort_states(result)
    criteria = torchem.criteria(model, data.values, **data.fields("weights"))
    if model.whole or not model.sequential:
        return runs.Candidate(states, result, criteria, runs.components(model, data.columns))
    if _is_continuous(model):
        return runs.Candidate(states, result, criteria, [])
    decoded = decode(model, data)
    return runs.Candidate(states, result, criteria, runs.states(model, data.columns, decoded), decoded)


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


def _read(data: options.Data, model: Any) -> Observations:
    if data.image is not None:
        if model.sequential:
            raise invalid("data.image", "none, for a model of sequences", "an image", "give data.path")
        return read_pixels(data.image.absolute, data.colour)
    assert data.path is not None
    names = {key: getattr(data, key) for key in runs.NAMED}
    return read_rows(data.path.absolute, data.columns, sequential=model.sequential, whole=model.whole, **names)


def _contents(
    chosen: runs.Candidate, candidates: list[runs.Candidate], data: Observations, report: dict[str, Any], config: str
) -> dict[str, bytes]:
    """Every file of the run, by name."""
    model = chosen.result.model
    contents = {runs.MODEL: files.to_bytes(model)}
    contents |= {runs.model_file(c.states): files.to_bytes(c.result.model) for c in candidates if c is not chosen}
    contents[runs.CONFIG] = config.encode()
    if chosen.decoded is not None:
        contents["states.csv"] = to_csv(*state_rows(model, data, report["data"], chosen.decoded))
    elif data.sequences is not None and not model.whole:
        contents["levels.csv"] = to_csv(*level_rows(model, data, report["data"]))
    elif data.image is None:
        contents["labels.csv"] = to_csv(*label_rows(model, data, report["data"]))
    try:
        contents |= _pictures(model, data, report, "png", chosen.decoded)
    except MissingExtra as error:
        warnings.warn(f"no pictures: {error}", UserWarning, stacklevel=2)
    report["files"] = [runs.REPORT, *contents]
    return {runs.REPORT: files.to_json(report), **contents}


def _pictures(
    model: Any,
    data: Observations,
    report: dict[str, Any],
    kind: str,
    decoded: Decoded | None,
    states: int | None = None,
) -> dict[str, bytes]:
    """The pictures of a run, or of a model in it that was not chosen, by file name."""
    from torchem.errors import require

    require("matplotlib", "plot").use("Agg")  # pyright: ignore[reportAttributeAccessIssue]
    from torchem import plot

    fit = report["fit"]
    if states is not None:
        fit = next(entry["fit"] for entry in report["candidates"] if entry["n_states"] == states)
    drawn = {"bound": plot.bound(fit["histories"] or fit["history"])}
    if data.image is not None:
        drawn["segmented"] = plot.segmentation(data.image, _labels(model, data), _colours(model, data))
    elif decoded is not None:
        drawn |= _chain_pictures(model, data, report["data"], decoded)
    elif hasattr(model, "conditionals"):
        drawn["network"] = plot.network(model)
    elif data.sequences is not None and model.whole:
        series = [torch.from_numpy(part) for part in data.split(data.values)]
        with torch.no_grad():
            label = model.most_likely(data.batch(model))
        drawn["clusters"] = plot.sequences(series, label, columns=data.columns)
    elif data.sequences is not None:
        drawn |= _level_pictures(model, data, report["data"])
    elif data.inputs is not None:
        drawn |= _regression(model, data, report["data"])
    elif hasattr(model, "loadings"):
        drawn["loadings"] = plot.loadings(model.loadings, data.columns)
    elif hasattr(model, "component"):
        d = data.values.shape[1]
        draw = plot.pairs if 2 < d <= _SHOWN else plot.clusters
        drawn["clusters"] = draw(model, data.values, data.columns)
    mark = "" if states is None else f"-{states}"
    return {f"{name}{mark}.{kind}": _rendered(axes, kind) for name, axes in drawn.items()}


def _regression(model: Any, data: Observations, told: dict[str, Any]) -> dict[str, Any]:
    """The law of the first column along the only covariate; nothing where there are several."""
    from torchem import plot

    assert data.inputs is not None
    moving = np.ptp(data.inputs, axis=0) > 0
    if moving.sum() != 1 or not hasattr(model, "predict") or np.isnan(data.values).any():
        return {}
    names = [*["1"] * bool(told["intercept"]), *told["inputs"]]
    drawn = plot.prediction(model, data.values, data.inputs, data.columns, names)
    return {"prediction": drawn}


def _chain_pictures(model: Any, data: Observations, names: dict[str, Any], decoded: Decoded) -> dict[str, Any]:
    """Sequences with their states, probabilities of states, and the transition matrix where there is one."""
    from torchem import plot

    places = data.places()
    assert data.sequences is not None
    index = places[0] if places is not None and len(places) == 1 else places
    shared: dict[str, Any] = {"index": index, "names": data.sequences.names}
    levels = runs.levels(model)
    means = levels.get("rate", levels.get("mean"))
    series = [torch.from_numpy(part) for part in data.split(data.values)]
    posterior = [torch.from_numpy(part) for part in data.split(decoded.posterior)]
    drawn = {
        "states": plot.states(series, data.split(decoded.path), means, columns=data.columns, **shared),
        "posterior": plot.posterior(posterior, **shared),
    }
    time = "frame" if places is None else names["index"]
    for axes in drawn.values():
        np.ravel(axes)[-1].set_xlabel(time)
    if hasattr(model, "duration_probs"):
        drawn["durations"] = plot.durations(model.duration_probs)
    with contextlib.suppress(TorchemError):  # a gate has no matrix
        drawn["transitions"] = plot.transitions(model.transition_matrix)
        if len(series) == 1:
            parts = (series[0], decoded.path, decoded.posterior, model.transition_matrix)
            drawn["chain"] = plot.chain(*parts, means, index=index, columns=data.columns)
            drawn["chain"][-2].set_xlabel(time)
    return drawn


def _level_pictures(model: Any, data: Observations, names: dict[str, Any]) -> dict[str, Any]:
    """Sequences with what they are without their noise."""
    from torchem import plot

    places = data.places()
    assert data.sequences is not None
    index = places[0] if places is not None and len(places) == 1 else places
    series = [torch.from_numpy(part) for part in data.split(data.values)]
    inputs = None if data.inputs is None else [torch.from_numpy(part) for part in data.split(data.inputs)]
    with torch.no_grad():
        law = model.smooth(series, inputs=inputs)
    drawn = plot.level(law, series, index=index, columns=data.columns, names=data.sequences.names)
    np.ravel(drawn)[-1].set_xlabel("frame" if places is None else names["index"])
    return {"level": drawn}


def _rendered(axes: Any, kind: str) -> bytes:
    from matplotlib import pyplot as plt

    figure = np.ravel(axes)[0].figure
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=150)
    plt.close(figure)
    return stream.getvalue()


def _labels(model: Any, data: Observations) -> np.ndarray:
    assert data.image is not None
    with torch.no_grad():
        labels = model.most_likely(torch.from_numpy(data.values))
    return labels.cpu().numpy().reshape(data.image.shape[:2])


def _colours(model: Any, data: Observations) -> np.ndarray | None:
    """RGB of the components' means; None where a model has none."""
    means = getattr(getattr(model, "component", None), "means", None)
    return None if means is None else images.to_rgb(means.detach().cpu().double().numpy(), data.colour)


# ---- what fit prints ----------------------------------------------------------------------------------------------


def _summary(
    chosen: runs.Candidate, candidates: list[runs.Candidate], data: Observations, rows: int, criterion: str
) -> str:
    model = chosen.result.model
    what = "pixels" if data.image is not None else "observations"
    some = "" if rows == len(data.values) else f" (drawn from {len(data.values):,})"
    dtype = str(model.dtype).removeprefix("torch.")
    if data.sequences is not None:
        what, some = "frames", f" in {_many(len(data.sequences.names), 'sequence')}"
    parts = [f"{type(model).__name__} · {rows:,} {what}{some} × {_many(len(data.columns), 'column')} · {dtype}"]
    for candidate in candidates:
        if len(candidates) > 1:
            parts.append(f"── {_many(candidate.states or 0, 'state')} ──")
        table = _model_table if model.whole else _component_table if data.sequences is None else _state_table
        parts.append(table(candidate.parts, data.columns) if candidate.parts else "")
        parts.append(_facts(candidate, "observation" if data.sequences is None else "frame", len(candidates) == 1))
    chains = chosen.decoded is not None
    parts += [_legend(chosen.parts) if chains else "", _comparison(chosen, candidates, criterion)]
    return "\n\n".join(filter(None, parts))


def _comparison(chosen: runs.Candidate, candidates: list[runs.Candidate], criterion: str) -> str:
    """The criteria of all candidates, and which one is best."""
    if len(candidates) == 1:
        return ""
    rows = [["states", "log-likelihood", "parameters", "AIC", "BIC", "ICL"]]
    for c in candidates:
        own = c.criteria
        rows.append(
            [
                str(c.states),
                f"{own.loglik:.2f}",
                str(own.n_parameters),
                *(f"{v:.2f}" for v in (own.aic, own.bic, own.icl)),
            ]
        )
    lines = aligned(rows).splitlines()
    lines[1 + candidates.index(chosen)] += f"  ← preferred by {criterion.upper()}"
    return "\n".join(lines)


def _state_table(states: list[dict[str, Any]], columns: list[str]) -> str:
    """Levels and shares of the states of a chain, and its transition matrix."""
    first = states[0]
    kind = next((name for name in ("rate", "probability", "mean") if name in first), None)
    level = columns[:_SHOWN] if kind != "probability" else list(first["probability"])[:_SHOWN]
    shares = [name for name in ("stationary", "time") if name in first]
    steps = len(first["to"]) if len(first.get("to", ())) <= _MATRIX else 0
    lasting = [name for name in ("duration",) if name in first]
    header = ["state", *([] if kind is None else [kind] if len(level) == 1 else level), *shares, *lasting]
    rows = [[*header, *(f"→ {k}" for k in range(steps))]]
    for s in states:
        cells = [] if kind is None else [_level(states, s, kind, name) for name in level]
        cells += [f"{s[name]:.3f}" for name in shares] + [f"{s[name]:.2f}" for name in lasting]
        rows.append([str(s["state"]), *cells, *(f"{p:.3f}" for p in s.get("to", ())[:steps])])
    left = 0 if kind == "probability" else len(columns) - len(level)
    return aligned(rows) + (f"\n({left} more columns in {runs.REPORT})" if left else "")


def _model_table(components: list[dict[str, Any]], columns: list[str]) -> str:
    """Weight of each component that is a model, and its states where it is a chain."""
    parts = []
    for c in components:
        parts.append(f"component {c['component']}: weight {c['weight']:.4f}")
        if c.get("states"):
            parts.append(_state_table(c["states"], columns))
    return "\n".join(parts)


def _legend(states: list[dict[str, Any]]) -> str:
    """What the columns of the tables of states mean."""
    notes = {
        "mean": "mean ± standard deviation",
        "stationary": "stationary, time: shares of the long run and of these frames",
        "duration": "duration: frames on average",
        "to": "→ k: probability of a step to k",
    }
    return f"({'; '.join(note for name, note in notes.items() if name in states[0])})"


def _level(states: list[dict[str, Any]], state: dict[str, Any], kind: str, column: str) -> str:
    if kind != "mean":
        return f"{state[kind][column]:.3f}"
    digits = _decimals([other["sd"][column] for other in states])
    return f"{state['mean'][column]:.{digits}f} ± {state['sd'][column]:.{digits}f}"


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


def _facts(candidate: runs.Candidate, unit: str, alone: bool) -> str:
    """How a fit ended; the criteria too, unless they stand beside others'."""
    result, criteria = candidate.result, candidate.criteria
    facts = [
        ["log-likelihood", f"{criteria.loglik:.2f}", f"{criteria.loglik / criteria.n:.4f} per {unit}"],
        ["AIC", f"{criteria.aic:.2f}", f"{criteria.n_parameters} parameters"],
        ["BIC", f"{criteria.bic:.2f}", ""],
        ["ICL", f"{criteria.icl:.2f}", ""],
    ]
    width = max(len(fact[1]) for fact in facts)
    lines = [f"{name:<15} {value:>{width}}  {note}".rstrip() for name, value, note in facts if alone]
    rest = "" if result.remaining is None else f", an estimated {result.remaining:.2g} nats short of the maximum"
    lines.append(
        f"{'status':<15} {result.status} after {_many(result.n_iter, 'iteration')}{rest}, {result.seconds:.2f} s"
    )
    # What is labelled, and dies, may be whole sequences and their models.
    unit = "sequence" if result.model.whole else unit
    if len(result.restarts) > 1:
        lines.append(f"{'restarts':<15} {_restarts(result, unit)}")
    for name in ("dead", "floored"):
        which = getattr(result, name)
        if which:
            kind = "state" if unit == "frame" else "component"
            meaning = {"dead": "no mass left in", "floored": "at the floor: covariance of"}[name]
            of = f"{meaning} {kind}{'s' * (len(which) > 1)}" if isinstance(which[0], int) else "at the floor:"
            lines.append(f"{name:<15} {of} {', '.join(map(str, which))}")
    return "\n".join(lines)


def _restarts(result: Result, unit: str) -> str:
    dropped = result.statuses.count("dropped")
    if dropped:
        return f"{len(result.restarts)}, of which {dropped} were dropped in the race"
    low, high = f"{min(result.restarts):.2f}", f"{max(result.restarts):.2f}"
    n = len(result.restarts)
    text = f"{n}, all ending at {high}" if low == high else f"{n}, ending between {low} and {high}"
    if result.agreement is not None:
        same = sum(share >= 0.99 for share in result.agreement)
        text += f"; {same} of {n} label at least 99 % of {unit}s alike"
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
    run = runs.read_run(config.run, config.states)
    data = run.observations(config.data)
    output = config.output or str(run.folder / (runs.PREDICTED if data.image is not None else runs.PREDICTIONS))
    if data.image is not None and Path(output).suffix.lower() == ".png":
        labels, colours = _labels(run.model, data), _colours(run.model, data)
        content = images.to_png(images.painted(data.image, labels, colours))
    elif data.sequences is not None and _is_continuous(run.model):
        content = to_csv(*level_rows(run.model, data, run.report["data"], config.filtered))
    elif data.sequences is not None:
        names = run.report["data"]
        if run.model.whole:
            content = to_csv(*label_rows(run.model, data, names))
            return _deliver(output, content, _many(len(data.sequences.names), "sequence"))
        content = to_csv(*state_rows(run.model, data, names, decode(run.model, data), config.filtered))
    else:
        content = to_csv(*label_rows(run.model, data))
    return _deliver(output, content, f"{len(data.values):,} rows")


def _impute(config: Any) -> int:
    run = runs.read_run(config.run, config.states)
    data = run.observations(config.data)
    if data.image is not None:
        raise invalid("data", "a table", "an image, which misses nothing", "name a table")
    output = config.output or str(run.folder / runs.IMPUTED)
    names = run.report["data"]
    parts = imputed_rows(run.model, data, names, config.how, config.draws, config.variance, _generator(config.seed))
    gaps = int(np.isnan(data.values).sum())
    return _deliver(output, to_csv(*parts), f"{len(parts[1][0]):,} rows; gaps filled in: {gaps:,}")


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _sample(config: Any) -> int:
    run = runs.read_run(config.run, config.states)
    generator = _generator(config.seed)
    draw = _draw_sequences if run.model.sequential else _draw_rows
    table = draw(run, config, generator)
    output = config.output or str(run.folder / runs.SAMPLE)
    rows = len(next(iter(table.values())))
    return _deliver(output, to_csv(list(table), [whole(column) for column in table.values()]), f"{rows:,} rows")


def _draw_rows(run: runs.Run, config: Any, generator: torch.Generator) -> dict[str, np.ndarray]:
    told = run.report["data"]
    known = run.observations().given if any(told.get(name) for name in ("inputs", "offset", "trials")) else {}
    own = len(next(iter(known.values()))) if known else 100
    n = own if config.n is None else config.n
    # Covariates have no law: those of the run are taken in turn.
    given = {name: value[np.arange(n) % own] for name, value in known.items()}
    x, z = run.model.sample(n, latents=True, generator=generator, **given)
    hidden = _named_latents(run.model, z) if config.latents else {}
    return hidden | dict(zip(run.columns, x.cpu().numpy().T, strict=True))


def _named_latents(model: Any, z: torch.Tensor) -> dict[str, np.ndarray]:
    """Labels, the states of hidden nodes, or the scores of continuous latents."""
    if z.dim() == 1:
        return {"label": z.cpu().numpy()}
    names = getattr(model, "hidden", None) or [f"score_{j}" for j in range(z.shape[1])]
    return dict(zip(names, z.cpu().numpy().T, strict=True))


def _draw_sequences(run: runs.Run, config: Any, generator: torch.Generator) -> dict[str, np.ndarray]:
    model = run.model
    for name, value in (("n", config.n), ("sequences", config.sequences)):
        if value is not None and value < 1:
            raise invalid(name, "a whole number of at least 1", value, "correct it")
    # Where a model says when sequences end, they are as long as it says.
    length = 100 if config.n is None and getattr(model, "end", None) is None else config.n
    given: dict[str, Any] = {}
    if _is_continuous(model) and run.report["data"].get("inputs"):
        # Covariates have no law: those of the run are taken in turn.
        own = run.observations().inputs
        assert own is not None
        given["inputs"] = torch.from_numpy(own[np.arange(length or 100) % len(own)])
    xs, zs = model.sample(config.sequences, length, latents=True, generator=generator, **given)
    table: dict[str, np.ndarray] = {}
    if config.sequences != 1:
        name = run.report["data"].get("sequence") or "sequence"
        table[name] = np.repeat(np.arange(len(xs)), [len(x) for x in xs])
    if config.latents and model.whole:
        table["label"] = np.repeat(zs.cpu().numpy(), [len(x) for x in xs])
    elif config.latents:
        states = torch.cat(list(zs)).cpu().numpy()
        table |= {"state": states} if states.ndim == 1 else {f"state_{k}": part for k, part in enumerate(states.T)}
    return table | dict(zip(run.columns, torch.cat(list(xs)).cpu().numpy().T, strict=True))


def _plot(config: Any) -> int:
    one_of("format", config.format, ("png", "pdf", "svg"))
    run = runs.read_run(config.run, config.states)
    data = run.observations(config.data)
    decoded = decode(run.model, data) if _is_chain(run.model) else None
    pictures = _pictures(run.model, data, run.report, config.format, decoded, run.states)
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
