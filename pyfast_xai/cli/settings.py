"""`--set METHOD.NAME=VALUE`: settings of explainers, read as the annotations of their constructors say."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pyfast_xai.cli.messages import refuse

# What can be written on a command line, the narrowest first: what it is called, and how it is read.
_READERS: dict[type, tuple[str, Callable[[str], Any]]] = {
    NoneType: ("none", {"none": None}.__getitem__),
    bool: ("true or false", {"true": True, "false": False}.__getitem__),
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("a text", str),
}
# Other arguments of the command line set these.
_NOT_SET = ("model", "labels", "progress")


def read(entries: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of each of `methods`."""
    settings: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for entry in entries:
        name, equals, value = entry.partition("=")
        method, dot, setting = name.partition(".")
        if not (dot and equals):
            refuse(f"set must look like METHOD.NAME=VALUE, got {entry!r}")
        if method not in settings:
            refuse(f"set must begin with a chosen method, {' or '.join(methods)}, got {entry!r}")
        choices = settable(method)
        if setting not in choices:
            refuse(f"set must name a setting of {method} ({', '.join(choices)}), got {entry!r}")
        settings[method][setting] = _value(name, value, choices[setting])
    return settings


def settable(method: str) -> dict[str, list[Any]]:
    """Returns the values of each setting of a method: literal strings, and types a command line can hold."""
    from pyfast_xai.explainers import METHODS

    settable = {}
    for name, parameter in inspect.signature(METHODS[method]).parameters.items():
        kinds = [kind for kind in _alternatives(parameter.annotation) if isinstance(kind, str) or kind in _READERS]
        if name not in _NOT_SET and kinds not in ([], [NoneType]):
            settable[name] = kinds
    return settable


def _alternatives(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


def _value(name: str, text: str, kinds: list[Any]) -> Any:
    if text in kinds:
        return text
    for kind, (_, parse) in _READERS.items():
        if kind in kinds:
            with contextlib.suppress(KeyError, ValueError):
                return parse(text)
    refuse(f"{name} must be {value_text(kinds)}, got {text!r}")


def value_text(kinds: list[Any]) -> str:
    """Returns the values that a setting takes, in words."""
    names = [repr(kind) for kind in kinds if isinstance(kind, str)]
    names += [kind_name for kind, (kind_name, _) in _READERS.items() if kind in kinds]
    return f"{', '.join(names[:-1])}{' or ' if names[1:] else ''}{names[-1]}"
