"""Checks the fields that the configs of all model families have."""

import dataclasses
from typing import Any


def check_common_fields(config: Any) -> None:
    """Checks the integers, the dropout rate and the compute dtype of a model's config.

    Raises:
        ValueError: unless every integer is positive, `dropout_rate` lies in [0, 1) and models can
            compute in `dtype`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
    if not 0 <= config.dropout_rate < 1:
        raise ValueError(f"dropout_rate must lie in [0, 1), got {config.dropout_rate}")
    check_dtype(config.dtype)


def check_dtype(dtype: str) -> None:
    """Checks a compute dtype.

    Raises:
        ValueError: unless models can compute in this dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
