"""Checks the types of settings that users write, and describes settings as JSON for records."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from typing import Any

import numpy as np


class SettingError(ValueError):
    """Raised for the value of a setting, such as one of another type than its field.

    Attributes:
        settings: the settings that the message is about, each as "Type.field". The command line
            finds with them the gin macros that set the values.
    """

    def __init__(self, message: str, *settings: str):
        super().__init__(message)
        self.settings = settings


def check_types(config: Any) -> None:
    """Raises SettingError if the value of a dataclass's field does not have the declared type.

    Finite numbers, strings, booleans, None, tuples, mappings and functions are told apart. The
    elements of tuples and mappings and any other types are not checked.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name, fits = _kind(field.type)
        if not fits(value):
            raise SettingError(
                f"{field.name} must be {name}, got {value!r}",
                f"{type(config).__name__}.{field.name}",
            )


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that JAX's 32 bits do not tell from another seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer of at least 0 and below 2**32, got {seed!r}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError if an integer field of a dataclass is not positive; None passes."""
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            or_none = " or None" if types.NoneType in typing.get_args(kinds[name]) else ""
            raise ValueError(f"{name} must be a positive integer{or_none}, got {value!r}")


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # 1e400 is infinite


# Of each type that is checked: what messages call it, and whether a value has it.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool)),
    float: ("a number", _is_number),
    str: ("a string", lambda x: isinstance(x, str)),
    bool: ("True or False", lambda x: isinstance(x, bool)),
    types.NoneType: ("None", lambda x: x is None),
    tuple: ("a tuple", lambda x: isinstance(x, tuple | list)),
    Mapping: ("a mapping", lambda x: isinstance(x, Mapping)),
    Callable: ("a function (@module.name)", callable),
}


def _kind(declared: Any) -> tuple[str, Callable[[Any], bool]]:
    """Returns the entry of `_KINDS` for a declared type; other types have every value."""
    origin = typing.get_origin(declared) or declared
    if origin in (typing.Union, types.UnionType):
        names, checks = zip(*map(_kind, typing.get_args(declared)), strict=True)
        return " or ".join(names), lambda value: any(fits(value) for fits in checks)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        origin = Mapping
    return _KINDS.get(origin, (getattr(declared, "__name__", str(declared)), lambda _: True))


def describe(value: Any) -> Any:
    """Returns a JSON value that describes a setting completely.

    Two settings with the same description do the same. A dataclass becomes {"type": its class,
    **its fields}. A function becomes its name, or {"function": its name, **values} if it has values
    of its own: those it closes over, and the defaults of its keyword-only parameters.

    Raises:
        ValueError: if a value is neither plain nor a function or a dataclass, or if gin holds
            settings of a function.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and np.ndim(value) == 0:  # a number of NumPy or JAX
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [describe(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, functools.partial):
        inner = describe(value.func)
        inner = inner if isinstance(inner, dict) else {"function": inner}
        arguments = {f"argument_{i}": argument for i, argument in enumerate(value.args)}
        return {**inner, **describe({**value.keywords, **arguments})}
    if inspect.isfunction(value):
        return _describe_function(value)
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return _name(value)
    raise ValueError(
        f"a recipe is made of plain values, functions and dataclasses, whose settings can be "
        f"recorded, got {value!r}"
    )


def in_words(description: Any) -> str:
    """Returns a description on one line, such as `JSD(beta=0.1, scale=paper)`."""
    if not isinstance(description, dict) or not description:
        return str(description)
    (_, name), *fields = description.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in fields)})"


def _describe_function(function: Any) -> Any:
    """Returns the description of a function; see `describe`.

    gin wraps a configurable function and keeps the values of its parameters to itself. A function
    that gin wrapped must therefore have no keyword-only parameters.
    """
    original = inspect.unwrap(function)
    parameters = inspect.signature(original).parameters.values()
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    is_of_gin = function.__globals__["__name__"].startswith("gin.")
    if is_of_gin and settings:
        raise ValueError(
            f"the settings {sorted(settings)} of {_name(original)} are given to it by gin, where "
            "they cannot be recorded: write it as a frozen dataclass with __call__, as "
            "gkd_jax.divergences.JSD is"
        )
    closed_over = dict(inspect.getclosurevars(original).nonlocals)
    settings = {k: v for k, v in settings.items() if v is not inspect.Parameter.empty}
    if not settings and not closed_over:
        return _name(original)
    return {"function": _name(original), **describe(settings), **describe(closed_over)}


def _name(function: Any) -> str:
    """Returns a function's or class's name, preceded by its module if that is not of gkd_jax."""
    name, module = function.__qualname__, function.__module__
    return name if module.startswith("gkd_jax.") else f"{module}.{name}"
