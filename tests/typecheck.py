"""The checker of annotations that the import hook applies to every function of torchem."""

from collections.abc import Callable
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

from beartype import BeartypeConf, beartype

#: An int is a float here, as it is for type checkers (PEP 484).
_CONF = BeartypeConf(is_pep484_tower=True)


def _opaque(hint: Any) -> bool:
    """Whether no function can check the hint by itself: ``Self``, or a protocol that is not checkable at run time."""
    if get_origin(hint) in (Union, UnionType):
        return any(map(_opaque, get_args(hint)))
    bare_protocol = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    return hint is Self or bare_protocol


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with arguments and result held to their annotations at each call."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: Any if _opaque(hint) else hint for name, hint in hints.items()}
    return beartype(conf=_CONF)(function)
