"""Reads single values of a `config.json`; a value not of its kind is a ValueError with its key."""

from collections.abc import Collection
import math
from typing import Any


# The reader makes one entry for each layer, so a wrong number would take all memory.
MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1  # of a dimension of an array


def choice(fields: dict[str, Any], key: str, allowed: Collection[str]) -> str:
    """Returns a string that is one of the allowed ones; the key must be there."""
    value = fields.get(key)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def size(fields: dict[str, Any], key: str, largest: int = _LARGEST_SIZE) -> int:
    """Returns an integer from 1 to `largest`."""
    value = fields[key]
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    if value > largest:
        raise ValueError(f"{key} must be at most {largest}, got {value!r}")
    return value


def positive(fields: dict[str, Any], key: str, below: float = math.inf) -> float:
    """Returns a positive number, which is below `below`."""
    value = fields[key]
    if type(value) not in (int, float) or not 0 < value < below:
        bound = "" if below == math.inf else f" below {below:g}"
        raise ValueError(f"{key} must be a positive number{bound}, got {value!r}")
    return float(value)


def positive_or_null(fields: dict[str, Any], key: str) -> float | None:
    """Returns a positive number, or None for null and for a key that is absent."""
    return None if fields.get(key) is None else positive(fields, key)


def switch(fields: dict[str, Any], key: str) -> bool:
    """Returns a truth value; null is false, as it is in transformers."""
    value = fields[key]
    if value not in (None, False, True) or type(value) in (int, float):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)
