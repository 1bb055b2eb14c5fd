"""The unit of work of every step: token ids of inputs and targets, and the loss weights of targets.

Axes: B batch, S source length, T target length.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int


class Batch(NamedTuple):
    """One global batch, of JAX or NumPy arrays.

    Inputs are padded with id 0, which the encoder masks. Targets are masked by `weights` alone: a
    student can emit any id, so `targets > 0` says nothing about where a sequence ends.

    Attributes:
        inputs: source token ids, ending in EOS, padded with 0.
        targets: target token ids, ending in EOS unless truncated.
        weights: 1.0 where a target token counts (EOS included), 0.0 elsewhere.
    """

    inputs: Int[Any, "B S"]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
