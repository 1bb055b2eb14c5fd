"""Lets all processes of a job raise if one of them fails.

A process that raised alone would leave the others waiting for it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def raise_together(error: Exception | None, elsewhere: Exception) -> None:
    """Raises in every process if one of them has an error; all processes must call this.

    A process that has none itself raises `elsewhere`.
    """
    if np.any(multihost_utils.process_allgather(np.asarray(error is not None))):
        raise error or elsewhere


def call_together(call: Callable[[], Any], elsewhere: Exception) -> Any:
    """Returns the result of a call; if the call fails in one process, all processes raise.

    A process in which the call does not fail raises `elsewhere`.
    """
    result = error = None
    try:
        result = call()
    except Exception as found:
        error = found
    raise_together(error, elsewhere)
    return result


def on_first_process(check: Callable[..., None], *arguments: Any) -> None:
    """Runs a check on the first process, which alone writes; if it fails, all processes raise."""

    def check_here() -> None:
        if jax.process_index() == 0:
            check(*arguments)

    elsewhere = ValueError("the first process refuses to go on: see its message")
    call_together(check_here, elsewhere)
