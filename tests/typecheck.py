"""The checker of annotations that the import hook applies to every function of torchem."""

import functools
import threading
from collections.abc import Callable
from dataclasses import is_dataclass
from types import FunctionType, UnionType
from typing import Any, ForwardRef, Literal, Self, Union, get_args, get_origin

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

#: An int is a float here, as it is for type checkers (PEP 484).
_CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeError)


def _opaque(hint: Any) -> bool:
    """Whether no function can check the hint by itself: ``Self``, a name, a protocol not checkable at run time."""
    if isinstance(hint, (str, ForwardRef)):
        return True
    bare_protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    parts = () if get_origin(hint) is Literal else get_args(hint)
    return hint is Self or bare_protocol or any(map(_opaque, parts))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with arguments and result held to their annotations at each call."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: Any if _opaque(hint) else hint for name, hint in hints.items()}
    strict = beartype(conf=_CONF)(function)
    # What reads them elsewhere finds them as they were.
    function.__annotations__ = hints
    return strict


def _shaped(hint: Any) -> bool:
    """Whether a hint names sizes that must agree from argument to argument."""
    return getattr(hint, "__module__", "").startswith("jaxtyping") or any(map(_shaped, get_args(hint)))


def _plain(hint: Any) -> bool:
    """Whether the types of values, their sizes and those that are words or numbers decide if they fit the hint.

    So they do for classes, tensors, tuples of so many of these, literals and unions; of a list one item is looked at.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) or (origin is tuple and Ellipsis not in parts):
        return all(map(_plain, parts))
    if origin is None:
        return hint in (Any, None) or (isinstance(hint, type) and not getattr(hint, "_is_protocol", False))
    return origin in (Literal, Callable)


def _form(value: Any) -> Any:
    """All that a hint which is plain can ask of a value."""
    kind = type(value)
    if issubclass(kind, torch.Tensor):
        return kind, value.dtype, value.shape
    if issubclass(kind, tuple):
        return kind, *map(_form, value)
    return (kind, value) if kind in (str, int, bool) else kind


def _remembered(plain: Callable[..., Any], follow: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked by ``follow``, each combination of their forms once."""
    given = threading.local()

    def result(*args: Any, **kwargs: Any) -> Any:
        return given.results.pop() if given.results else plain(*args, **kwargs)

    # Names in annotations are those of the function's own module.
    stand_in = FunctionType(result.__code__, plain.__globals__, plain.__name__, None, result.__closure__)
    check, known = follow(functools.update_wrapper(stand_in, plain)), {}

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return plain(*args, **kwargs)
        form = (*map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
        results = known.get(form)
        if results is None:
            given.results = []
            value = check(*args, **kwargs)
            known.setdefault(form, set()).add(_form(value))
            return value
        value = plain(*args, **kwargs)
        found = _form(value)
        if found not in results:
            given.results = [value]
            check(*args, **kwargs)
            results.add(found)
        return value

    return call


def _switched(plain: Callable[..., Any], strict: Callable[..., Any]) -> Callable[..., Any]:
    """The checked function, unless checks are switched off."""

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (plain if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return call


def install() -> None:
    """From here on check every annotation in torchem at each call: types, and sizes by name.

    Following sizes costs tens of microseconds a call, and checking a function anew each time that it is defined inside
    another costs milliseconds. So sizes are followed where annotations name some, once for each combination of them
    where nothing else decides, and inner functions are left alone.
    """
    follow = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
        def decorate(thing: Any) -> Any:
            hints = getattr(thing, "__annotations__", {}).values()
            if any(map(_shaped, hints)) or not isinstance(thing, (type, FunctionType)):
                strict = follow(typechecker=typechecker)
                simple = isinstance(thing, FunctionType) and all(_opaque(hint) or _plain(hint) for hint in hints)
                return _remembered(thing, strict) if simple else strict(thing)
            if "<locals>" in thing.__qualname__:
                return thing
            if isinstance(thing, FunctionType):
                return _switched(thing, typechecker(thing))
            if is_dataclass(thing) and "__init__" in vars(thing):
                thing.__init__ = _switched(thing.__init__, typechecker(thing.__init__))
            return thing

        return decorate

    # What the hook writes above each function looks this name up.
    jaxtyping.jaxtyped = jaxtyped  # pyright: ignore[reportAttributeAccessIssue]
    jaxtyping.install_import_hook("torchem", "tests.typecheck.checked")
