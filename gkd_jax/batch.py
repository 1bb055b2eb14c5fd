"""The unit of work of every step: token ids of inputs and targets, and the loss weights of targets.

Axes: B batch, S source length, T target length.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int
import numpy as np


class Batch(NamedTuple):
    """One global batch.

    Inputs are padded with id 0, which the encoder masks. Targets are masked by `weights` alone: a
    student can emit any id, so `targets > 0` says nothing about where a sequence ends.

    Attributes:
        inputs: source token ids, ending in EOS, padded with 0.
        targets: target token ids, ending in EOS unless truncated.
        weights: 1.0 where a target token counts (EOS included), 0.0 elsewhere.
    """

    inputs: Int[Array | np.ndarray, "B S"]
    targets: Int[Array | np.ndarray, "B T"]
    weights: Float[Array | np.ndarray, "B T"]
