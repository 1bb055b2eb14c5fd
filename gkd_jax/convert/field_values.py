"""Reads single values of a `config.json`, and names the key of a value that is not of its kind."""

import math
from typing import Any


# The reader makes one entry for each layer, so a wrong number would take all memory.
MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1  # of a dimension of an array


def size(fields: dict[str, Any], key: str, largest: int | None = None) -> int:
    """Returns a positive integer.

    Args:
        fields: the object in the `config.json`.
        key: the key of the value.
        largest: the largest value that is allowed; None stands for the largest dimension of an
            array.

    Raises:
        ValueError: if the value is no integer from 1 to `largest`.
    """
    value, largest = fields[key], largest or _LARGEST_SIZE
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    if value > largest:
        raise ValueError(f"{key} must be at most {largest}, got {value!r}")
    return value


def positive(fields: dict[str, Any], key: str) -> float:
    """Returns a positive number.

    Raises:
        ValueError: if the value is no number, or not positive, or not finite.
    """
    value = fields[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def positive_or_null(fields: dict[str, Any], key: str) -> float | None:
    """Returns a positive number, or None for null and for a key that is absent.

    Raises:
        ValueError: if the value is neither.
    """
    return None if fields.get(key) is None else positive(fields, key)


def switch(fields: dict[str, Any], key: str) -> bool:
    """Returns a truth value; null is false, as it is in transformers.

    Raises:
        ValueError: if the value is neither true nor false nor null.
    """
    value = fields[key]
    if value not in (None, False, True) or type(value) in (int, float):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)
