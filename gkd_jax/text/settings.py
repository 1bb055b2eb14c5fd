"""Checks of settings that people write: each has the type that its field declares."""

from collections.abc import Mapping
import dataclasses
import numbers
import types
import typing
from typing import Any


class SettingError(ValueError):
    """A setting has another type than its field.

    Attributes:
        setting: "Type.field", by which the macro that sets it is found.
    """

    def __init__(self, message: str, setting: str):
        super().__init__(message)
        self.setting = setting


def check_types(config: Any) -> None:
    """Raises SettingError unless every field of a dataclass has the type that it declares.

    Numbers, texts, truth values, tuples and mappings of them, and None are checked; what a
    function or another configuration must be is for the dataclass to say.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            raise SettingError(
                f"{field.name} must be {_name(field.type)}, got {value!r}",
                f"{type(config).__name__}.{field.name}",
            )


_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    types.NoneType: "None",
}


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind in (str, bool, types.NoneType):
        return isinstance(value, kind)
    if origin is tuple:
        return isinstance(value, tuple | list)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    return True


def _name(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a tuple"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
