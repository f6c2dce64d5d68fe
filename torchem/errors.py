"""Exceptions, warnings and the one form in which torchem complains about input.

Every message names the argument, says what was expected, what came instead, and one thing to do.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch


class TorchemError(Exception):
    """Base of every exception that torchem raises on purpose."""


class InvalidArgument(TorchemError, ValueError):
    """An argument has a value that cannot be used."""


class InvalidEntry(InvalidArgument):
    """An entry of the data has a value that the model gives no probability to, or cannot do without.

    Attributes:
        said: What was expected, what came, what to do, and what is said beside its place.
        index: Names and numbers of its place, as ``{"row": 3, "column": 1}``.
    """

    said: tuple[str, str, str, str]
    index: dict[str, int]

    def moved(self, note: str = "", **index: int) -> "InvalidEntry":
        """The same of another place, as whoever gave the data counts, with a note beside it."""
        expected, got, remedy, before = self.said
        return invalid_entry(expected, got, {**self.index, **index}, remedy, note + before)


class InvalidType(TorchemError, TypeError):
    """An argument is of a kind that cannot be used."""


class InvalidFile(TorchemError, ValueError):
    """A file is missing, malformed or foreign."""


class MissingExtra(TorchemError, ImportError):
    """A feature needs a package of one of torchem's extras."""


class DegenerateComponent(TorchemError, RuntimeError):
    """A component died or collapsed and the policy was to raise."""


class ConvergenceWarning(UserWarning):
    """A fit stopped while its objective was still climbing, or for a reason that is not convergence."""


class CollinearWarning(UserWarning):
    """Covariates are linear combinations of others, whose coefficients then tell all that can be told."""


class SymmetryWarning(UserWarning):
    """Components that start identical stay identical: EM cannot tell them apart."""


def describe(argument: str, expected: str, got: object, remedy: str) -> str:
    """Compose the message of the house, ``argument: expected …, got …; remedy``, as a sentence."""
    return f"{argument}: expected {expected}, got {got}; {remedy}."


def invalid(argument: str, expected: str, got: object, remedy: str) -> InvalidArgument:
    """An `InvalidArgument` in the form of the house, to be raised by the caller."""
    return InvalidArgument(describe(argument, expected, got, remedy))


def invalid_entry(expected: str, got: object, index: Mapping[str, int], remedy: str, note: str = "") -> InvalidEntry:
    """An `InvalidEntry` that names its place, to be raised by the caller.

    Example:
        >>> print(invalid_entry("counts", -1, {"row": 12, "column": 3}, "correct it"))
        data: expected counts, got -1 at row 12, column 3; correct it.
    """
    place = ", ".join(f"{name} {number}" for name, number in index.items())
    error = InvalidEntry(describe("data", expected, f"{got} at {place}{note}", remedy))
    error.said, error.index = (expected, str(got), remedy, note), dict(index)
    return error


def wrong_type(argument: str, expected: str, got: object, remedy: str) -> InvalidType:
    """An `InvalidType` in the form of the house, to be raised by the caller."""
    return InvalidType(describe(argument, expected, f"{type(got).__name__}", remedy))


def one_of(argument: str, value: object, options: Iterable[str]) -> None:
    """Check that an option is one of those offered, naming the nearest where it is misspelt.

    Raises:
        InvalidArgument: If ``value`` is none of ``options``.
    """
    names = list(options)
    if value in names:
        return
    near = get_close_matches(str(value), names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "choose one of them"
    raise InvalidArgument(
        describe(argument, "one of " + ", ".join(map(repr, names)), repr(value), remedy).replace("?.", "?")
    )


def whole_number(argument: str, value: object, least: int, remedy: str = "correct it") -> None:
    """Refuse what is not a whole number, or too small.

    Raises:
        InvalidArgument: Then.

    Example:
        >>> whole_number("n", 3, 1)
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise invalid(argument, f"a whole number of at least {least}", repr(value), remedy)


def check_generator(generator: object) -> None:
    """Refuse what is no source of draws.

    Raises:
        InvalidType: Then.

    Example:
        >>> check_generator(None)
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise wrong_type("generator", "a torch.Generator or None", generator, "pass torch.Generator().manual_seed(0)")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside torchem that led here, however deep the call."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "torchem":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def require(module: str, extra: str) -> object:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtra: If the package is not installed.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module}: this feature needs a package that is not installed; run pip install 'torchem[{extra}]'."
        ) from error
