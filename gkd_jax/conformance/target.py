"""The implementation that the suite checks, as its checks see it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gkd_jax.conformance.references import divergence, mean


class NotGivenError(Exception):
    """Raised when a check needs a function that the implementation does not have."""


class Target:
    """The implementation under test; using a function that it lacks raises `NotGivenError`."""

    def __init__(self, implementation: Any):
        self.implementation = implementation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.implementation, name, None)
        if function is not None:
            return function
        if name == "loss" and hasattr(self.implementation, "loss_and_gradients"):
            return lambda *args: self.implementation.loss_and_gradients(*args, 1)[0]
        raise NotGivenError(name)

    def or_reference(self) -> Callable[..., Any]:
        """Returns the implementation's divergence, or the reference if there is none.

        Expected losses are computed from the implementation's divergence, so that an error in the
        divergence is reported only for the traps of the divergence.
        """
        return getattr(self.implementation, "divergence", None) or divergence

    def reduce(self, values: np.ndarray, weights: np.ndarray) -> float:
        """Returns the mean of per-token values by the implementation's declared reduction."""
        reduction = getattr(self.implementation, "reduction", "sequence_mean")
        return mean(values, weights, reduction)
