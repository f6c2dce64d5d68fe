"""What the command line and YAML configurations accept, and what they say when they do not.

jsonargparse reads the signatures of the constructors that a configuration names, so every argument of a model and of
`torchem.fit` is a key, on the command line too. Its complaints are put into the one-line form of the house.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace  # pyright: ignore[reportPrivateImportUsage]
from jsonargparse.typing import Path_fr, path_type

import torchem
from torchem import factors, models
from torchem.errors import TorchemError, invalid
from torchem.images import CHANNELS, Colour
from torchem.model import LatentModel
from torchem.runs import relative
from torchem.tables import read_columns

if TYPE_CHECKING:
    File: TypeAlias = Any
    Folder: TypeAlias = Any
else:
    #: A file that can be read, a folder that exists or can be made; in a configuration, relative to its file.
    File, Folder = Path_fr, path_type("dcc")

#: Slots of models that the configuration may leave without sizes, "" the model itself; and the shapes of tables.
_SLOTS = ("", "mixing", "component", "initial", "transition", "emission", "end")
_TABLES: dict[str, Callable[[int], list[int]]] = {
    "mixing": lambda k: [k],
    "initial": lambda k: [k],
    "transition": lambda k: [k, k],
    "end": lambda k: [k, 2],
}
_TABLE = "torchem.factors.Categorical"

_FIT = """Fit a model that a YAML configuration describes, and write a run folder.

Every value can be given on the command line: torchem fit configs/faithful.yaml --model.n_components 3 --fit.seed 1.
Sizes follow: the number of columns from the data, the number of states of all factors from "states" where it is given.
Paths in a configuration are relative to its file, paths on the command line to the working directory."""


_PREDICT = """Write label, responsibilities and log-density of each row, or the segmented image.

For a model of sequences: the most likely state of each frame, and the probability of each state."""


@dataclass
class Data:
    """Where the observations come from: a table or an image.

    Args:
        path: Table of numbers: CSV with a header, .npy, .parquet or .feather.
        columns: Columns to model, in this order; all but those named below when left out.
        weights: Column that holds the weight of each row.
        index: Column that says where or when each row was taken, numbers or text: names rows, is not modelled.
        sequence: Column that says which sequence a row belongs to; all rows are one sequence when left out.
        inputs: Columns of covariates, which regressions and gates read and which are not modelled.
        intercept: Whether a column of ones stands before the covariates.
        offset: Column of the known terms of linear predictors, such as the logarithm of an exposure.
        trials: Column of the numbers of trials of binomial counts.
        labels: Column that says which class or state each row belongs to, from 0; empty or −1 where that is unknown.
        image: Photograph whose pixels are the observations.
        colour: What a pixel is: rgb in [0, 1], or lab, where distances are as the eye sees them.
        max_rows: Fit on at most this many rows or pixels, drawn at random; all when left out.
    """

    path: File | None = None
    columns: list[str] | None = None
    weights: str | None = None
    index: str | None = None
    sequence: str | None = None
    inputs: list[str] | None = None
    intercept: bool = False
    offset: str | None = None
    trials: str | None = None
    labels: str | None = None
    image: File | None = None
    colour: Colour = "rgb"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.image is None):
            got = "neither" if self.path is None else "both"
            raise invalid("data", "a path or an image", got, "give data.path or data.image")
        if self.image is not None and (self.index or self.sequence):
            raise invalid("data", "no index or sequence of an image", self.index or self.sequence, "leave them out")
        if self.intercept and not self.inputs:
            raise invalid("data.intercept", "false without data.inputs", True, "name the covariates")
        if self.max_rows is not None and self.max_rows < 1:
            raise invalid("data.max_rows", "a number of at least 1", self.max_rows, "leave it out to fit on all rows")


def parser() -> ArgumentParser:
    """The whole command line."""
    root = _parser(
        prog="torchem",
        description="Expectation–Maximization on PyTorch.",
        version=torchem.__version__,
    )
    commands = root.add_subcommands(required=True, metavar="COMMAND", title="commands")
    commands.add_subcommand("fit", fit_parser(), help="fit a model that a configuration describes; writes a run folder")
    commands.add_subcommand("predict", _predict_parser(), help="label data with the model of a run")
    commands.add_subcommand("sample", _sample_parser(), help="draw observations from the model of a run")
    commands.add_subcommand("impute", _impute_parser(), help="fill in missing entries with the model of a run")
    commands.add_subcommand("plot", _plot_parser(), help="draw the pictures of a run again")
    return root


class _Parser(ArgumentParser):
    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **options: Any) -> Any:
        # What jsonargparse tells classes of links it tells functions too, which do not take it.
        return super().add_function_arguments(*args, **options)

    def dump(self, cfg: Any, **options: Any) -> str:
        # Sizes that follow from states are left to follow; others were given, though they may follow too.
        return super().dump(cfg, **options, skip_link_targets=cfg.get("states") is not None)


def _parser(**options: Any) -> ArgumentParser:
    # Abbreviations would let a misspelt key pass as another.
    return _Parser(exit_on_error=False, allow_abbrev=False, **options)


def fit_parser() -> ArgumentParser:
    """Options of ``torchem fit``; its configuration is given as ``--config``."""
    own = _parser(description=_FIT, usage="torchem fit CONFIG [--KEY VALUE ...]")
    own.add_argument("--config", action=ActionConfigFile, help="the YAML configuration; --config may be left out")
    own.add_argument("--model", type=LatentModel, required=True, help="the model: class_path and init_args")
    own.add_class_arguments(Data, "data")
    skip: set[str | int] = {
        "model", "data", "weights", "inputs", "lengths", "labels", "observed", "offset", "trials",
        "validation", "callbacks",
    }  # fmt: skip
    own.add_function_arguments(torchem.fit, "fit", skip=skip)
    states = "number of latent states of every factor, or several to fit and compare: [2, 3]"
    own.add_argument("--states", type=int | list[int] | None, help=states)
    criterion = "what decides among several numbers of states"
    own.add_argument("--criterion", type=Literal["bic", "aic", "icl"], default="bic", help=criterion)
    own.add_argument("--output", type=Folder | None, help="the run folder to write (default: runs/NAME-OF-CONFIG)")
    own.add_argument("--dtype", type=Literal["float64", "float32"], default="float64", help="precision of the model")
    for slot, size in [
        ("", "n_states"),
        *((slot, size) for slot in _SLOTS for size in ("n_components", "n_features", "shape", "n_inputs", "n_outputs")),
    ]:
        key = ".init_args.".join(filter(None, ("model", slot, size)))
        own.link_arguments(("states", "data", "model"), key, compute_fn=functools.partial(_size, slot, size, key))
    # Not for users: what follows from what.
    own._action_groups = [group for group in own._action_groups if group.title != "Linked arguments"]
    return own


def _predict_parser() -> ArgumentParser:
    own = _parser(description=_PREDICT)
    _add_run(own)
    own.add_argument("data", nargs="?", type=str | None, help="table or image (default: what the model was fitted on)")
    own.add_argument("--output", type=str | None, help="file to write, - for standard output (default: in the run)")
    own.add_argument("--filtered", type=bool, default=False, help="for sequences: add what was known at each time")
    return own


def _sample_parser() -> ArgumentParser:
    own = _parser(description="Draw observations from the model of a run, as CSV.")
    _add_run(own)
    own.add_argument("--n", type=int | None, help="number of observations, or frames of each sequence (default: 100)")
    own.add_argument("--sequences", type=int, default=1, help="number of sequences, where the model is of those")
    own.add_argument("--latents", type=bool, default=False, help="add the labels or states that were drawn")
    own.add_argument("--seed", type=int | None, help="makes the draws repeatable")
    own.add_argument("--output", type=str | None, help="file to write, - for standard output (default: in the run)")
    return own


def _impute_parser() -> ArgumentParser:
    own = _parser(
        description="Write a table with its missing entries filled in, given those that were observed, as CSV."
    )
    _add_run(own)
    own.add_argument("data", nargs="?", type=str | None, help="table (default: what the model was fitted on)")
    how = "mean, mode, or auto: the most probable value of counts and categories, the mean of other columns"
    own.add_argument("--how", type=Literal["auto", "mean", "mode"], default="auto", help=how)
    own.add_argument("--variance", type=bool, default=False, help="add the conditional variance of each entry")
    own.add_argument("--draws", type=int | None, help="draw so many completed tables instead (multiple imputation)")
    own.add_argument("--seed", type=int | None, help="makes the draws repeatable")
    own.add_argument("--output", type=str | None, help="file to write, - for standard output (default: in the run)")
    return own


def _plot_parser() -> ArgumentParser:
    own = _parser(description="Draw the pictures of a run again.")
    _add_run(own)
    own.add_argument("data", nargs="?", type=str | None, help="table or image (default: what the model was fitted on)")
    own.add_argument("--format", type=Literal["png", "pdf", "svg"], default="png", help="of the pictures")
    return own


def _add_run(own: ArgumentParser) -> None:
    own.add_argument("run", metavar="RUN", type=str, help="folder that torchem fit wrote")
    own.add_argument("--states", type=int | None, help="use the model with so many states, where several were fitted")


def _size(slot: str, size: str, key: str, states: Any, data: Any, model: Any) -> Any:
    """A size that follows: from the data's columns or the number of states. One in the configuration must agree."""
    arguments = _arguments(model, slot)
    if size not in arguments:
        return None
    counted = size in ("n_features", "n_inputs", "n_outputs")
    given, source = arguments[size], "the data's columns" if counted else "as states says"
    if size in ("n_features", "n_outputs"):
        found: Any = _n_features(data)
    elif size == "n_inputs":
        columns = arguments.get("columns")
        found = len(columns) if columns else given if data.inputs is None else len(data.inputs) + data.intercept
        if found is None:
            raise invalid("data.inputs", "columns of covariates", "none", f"name those that {key} counts")
    elif size == "shape":
        k = _n_states(states, model)
        found = _TABLES[slot](k) if k is not None and slot in _TABLES else given
    else:
        found = given if states is None else numbers_of_states(states)[0]
    if found is None:
        raise invalid(key, "the number of states", "none", "give it, or give states")
    if given is not None and given != found:
        raise invalid(key, f"{found}, {source}", given, "leave it out: it follows")
    return found


def _arguments(model: Any, slot: str) -> Any:
    """Arguments of the model, or of the factor in one of its slots, as the configuration has them."""
    own = getattr(model, "init_args", {})
    return getattr(own.get(slot), "init_args", {}) if slot else own


def _n_states(states: Any, model: Any) -> int | None:
    """The number of states that tables take: what ``states`` says, or an emission."""
    if states is not None:
        return numbers_of_states(states)[0]
    return next(filter(None, (_arguments(model, slot).get("n_components") for slot in _SLOTS)), None)


def _n_features(data: Any) -> int:
    """Number of columns that the data give the model."""
    if data.image is not None:
        return len(CHANNELS[data.colour])
    if data.columns is not None:
        return len(data.columns)
    if data.path is None:
        raise invalid("data", "a path or an image", "neither", "give data.path or data.image")
    others = {data.weights, data.index, data.sequence, data.labels, *(data.inputs or ())}
    return len([name for name in read_columns(data.path.absolute) if name not in others])


def numbers_of_states(states: int | list[int]) -> list[int]:
    """The numbers of states to fit, in the order given.

    Raises:
        InvalidArgument: If one is less than 1 or given twice, or there are none.

    Example:
        >>> numbers_of_states([2, 3])
        [2, 3]
    """
    numbers = [states] if isinstance(states, int) else list(states)
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        expected = "a whole number of at least 1, or distinct ones to compare"
        raise invalid("states", expected, states, "give for example 2, or [2, 3]")
    return numbers


def instantiate(config: Any) -> Any:
    """What a configuration of ``fit`` stands for: the model, the data, the options."""
    own = config.clone()
    k, slots = _n_states(own.states, own.model), _arguments(own.model, "")
    for slot in _SLOTS:
        if slots.get(slot) != Namespace(class_path=_TABLE):
            continue
        # A table without a shape takes that of its slot; a signature of *shape cannot say so.
        if k is None or slot not in _TABLES:
            raise invalid(f"model.init_args.{slot}", "a shape", "none", f"give one to {_TABLE}.rebuild")
        slots[slot] = Namespace(class_path=f"{_TABLE}.rebuild", init_args=Namespace(shape=_TABLES[slot](k)))
    return fit_parser().instantiate(own)


def dump(config: Any, folder: Path) -> str:
    """The configuration as YAML, its paths relative to the run folder that it will lie in: it can be run again."""
    own = config.clone()
    for group, key in ((own.data, "path"), (own.data, "image")):
        if group[key] is not None:
            group[key] = relative(Path(group[key].absolute), folder)
    own.output, own.config = ".", None
    return fit_parser().dump(own, skip_validation=True)


# ---- complaints ---------------------------------------------------------------------------------------------------


def explain(error: BaseException, known: Iterable[str] = ()) -> str:
    """One line that names the key, what was expected, what came and what to do.

    Args:
        error: What parsing or running raised.
        known: Keys that exist, among which the nearest to a misspelt one is sought.
    """
    own = _torchem_error(error)
    text = str(error) if own is None else str(own)
    readers = (lambda t: _unknown_key(t, list(known)), _bad_config, _bad_class, _bad_value)
    lines = (reader(text) for reader in readers) if own is None else ()
    return " ".join((next(filter(None, lines), text)).split())


def keys(own: ArgumentParser) -> list[str]:
    """All keys of a parser, groups included."""
    found = [action.dest for action in own._actions if action.dest not in ("help", "print_config")]
    groups = {key.rpartition(".")[0] for key in found} - {""}
    return sorted({*found, *groups})


def _torchem_error(error: BaseException | None) -> TorchemError | None:
    """The error of ours that a library wrapped, if there is one."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, TorchemError):
            return error
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def _nearest(key: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    near = get_close_matches(key, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else "see --help for those that exist."


def _unknown_key(text: str, known: list[str]) -> str | None:
    found = re.search(r"does not accept (?:option|nested key) '([^']+)'", text) or re.search(
        r"unrecognized arguments: --([^\s=]+)", text
    )
    if found:
        return f"{found[1]}: expected a key that exists, got an unknown one; {_nearest(found[1], known)}"
    found = re.search(r"unrecognized arguments: (.+)", text)
    if found:
        return f"arguments: expected no more, got {found[1]!r}; options begin with --."
    found = re.search(r"invalid choice: '([^']*)' \(choose from ([^)]*)\)", text)
    if found:
        choices = re.findall(r"\w+", found[2])
        return f"command: expected one of {', '.join(choices)}, got {found[1]!r}; {_nearest(found[1], choices)}"
    return None


def _bad_config(text: str) -> str | None:
    """A configuration that is no set of keys, or lacks one."""
    found = re.search(r"Problems parsing config: (.*)", text, re.S) or re.search(
        r"Unexpected config: ?(.*)", text, re.S
    )
    if found:
        got = found[1].replace(' in "<unicode string>",', " in").strip() or "nothing"
        return f"config: expected YAML with keys such as model, data and fit, got {got[:200]}; correct the file."
    found = re.search(r"arguments are required: (?:\w+\.)?(\w+)", text)
    if found and "class_path" not in text:
        return f"{found[1]}: expected a value, got none; see --help."
    if 'Parser key "model"' in text and "Got value: None" in text:
        return (
            "model: expected class_path and init_args, got none; name for example class_path: torchem.GaussianMixture."
        )
    return None


def _bad_class(text: str) -> str | None:
    """What is wrong with a class that a configuration names, or with a key of its arguments."""
    missing = re.search(r'Parser key "([^"]+)":\s*Expected a dot import path string: (\S+)', text)
    if missing:
        return _unknown_class(missing[1], missing[2])
    other = re.search(r'Parser key "([^"]+)":\s*Import path (\S+) does not correspond to a subclass', text)
    if other:
        return _unknown_class(other[1], other[2])
    nested = re.findall(r'Parser key "([^"]+)":\s*Problem with given class_path \'([^\']+)\':\s*', text)
    if not nested:
        return None
    # Arguments that are classes themselves complain inside each other: the innermost knows best.
    key, path = ".init_args.".join(name for name, _ in nested), nested[-1][1]
    reason = text.rpartition(f"class_path {path!r}:")[2]
    if "has no attribute" in reason or "No module named" in reason:
        return _unknown_class(key, path)
    unknown = re.search(r"Option '([^']+)' is not accepted", reason)
    if unknown:
        near = _nearest(unknown[1], _arguments_of(path))
        if unknown[1] in _arguments_of(f"{path}.rebuild"):
            near = f"name the class as {path}.rebuild."
        return f"{key}.init_args.{unknown[1]}: expected an argument of {path}, got an unknown one; {near}"
    required = re.search(r"(?:arguments are required|Key.* required).*?: *(.+)", reason)
    if required:
        return f"{key}.init_args: expected {required[1]}, got none; {path} needs it."
    inner = _bad_value(reason)
    return None if inner is None else f"{key}.init_args.{inner}"


def _unknown_class(key: str, path: str) -> str:
    # What stands among the arguments of a model is a factor.
    kind, package, names = ("factor", "torchem.factors", factors.__all__)
    if ".init_args." not in key:
        kind, package, names = ("model", "torchem", models.__all__)
    near = get_close_matches(path.rpartition(".")[2], names, n=1, cutoff=0.5)
    hint = f"did you mean '{package}.{near[0]}'?" if near else "name it as package.Class."
    return f"{key}.class_path: expected a {kind} that can be imported, got {path!r}; {hint}"


def _arguments_of(path: str) -> list[str]:
    try:
        return list(inspect.signature(resolve_name(path)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _bad_value(text: str) -> str | None:
    """A value of the wrong type."""
    key = re.search(r'Parser key "([^"]+)":', text)
    if not key:
        return None
    missing = re.search(r"\b((?:File|Directory|Path) [^:\n]*): '([^'\n]*)'", text)
    if missing:
        reason = missing[1][0].lower() + missing[1][1:]
        return f"{key[1]}: expected a path that can be used, got {missing[2]!r} ({reason}); check the path."
    union = re.search(r"Subtypes: \[(.*?)\]\n.*Given value: ([^\n]*)", text, re.S)
    single = re.search(r"Expected an? (.+?)\. Got value: ([^\n]*)", text)
    found = union or single
    if not found:
        return None
    kinds = re.split(r", (?![^\[]*\])", found[1])
    names = " or ".join(sorted(dict.fromkeys(map(_kind, kinds)), key=lambda name: name == "null"))
    return f"{key[1]}: expected {names}, got {found[2]!r}; correct it."


def _kind(name: str) -> str:
    """A type as users call it."""
    name = name.replace("<class 'NoneType'>", "null").replace("typing.", "")
    name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name)
    literal = re.fullmatch(r"Literal\[(.*)\]", name)
    plain = {
        "int": "a whole number",
        "integer": "a whole number",
        "float": "a number",
        "list[str]": "a list such as [x, y]",
        "list[int]": "a list such as [2, 3]",
        "bool": "true or false",
    }
    return f"one of {literal[1]}" if literal else plain.get(name, name)


__all__ = ["ArgumentError", "Data", "explain", "fit_parser", "keys", "parser"]
