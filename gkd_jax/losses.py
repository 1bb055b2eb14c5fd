"""Cross-entropy per token, and the reductions of numbers per token to one loss.

A reduction returns `(sum, count)` rather than the quotient. Sums and counts of microbatches add up
to those of the batch, so that one division at the end gives the same loss and gradient for any
number of microbatches.

Axes: B batch, T target, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


SumAndCount = tuple[Float[Array, ""], Float[Array, ""]]


def sequence_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> SumAndCount:
    """Reduces values to the mean over sequences of their means over tokens.

    This is the reduction of the paper's Eq. 2 and Algorithm 1.

    Returns:
        The sum over sequences of their means, and the number of sequences with a weight above 0. A
        sequence without weight (a row that pads the last batch) is not counted.
    """
    lengths = jnp.sum(weights, axis=1)
    has_weight = lengths > 0
    means = jnp.sum(_masked(values, weights), axis=1) / jnp.where(has_weight, lengths, 1.0)
    return jnp.sum(means), jnp.sum(jnp.where(has_weight, 1.0, 0.0))


def token_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> SumAndCount:
    """Reduces values to the mean over all tokens of the batch; longer sequences count more.

    Returns:
        The weighted sum over tokens, and the sum of the weights.
    """
    return jnp.sum(_masked(values, weights)), jnp.sum(weights)


def _masked(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, "B T"]:
    # The select keeps a NaN or inf with weight 0 out of the sum and its gradient, which a product
    # alone would not.
    return jnp.where(weights > 0, values, 0.0) * weights


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], *, label_smoothing: float = 0.0
) -> Float[Array, "B T"]:
    """Returns the cross-entropy of each target, in nats: -log Q(target).

    With label smoothing s, it is -(1 - s) log Q(target) - s mean over ids of log Q. Ids whose logit
    is -inf cannot occur, and the mean leaves them out.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    picked = jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    if label_smoothing == 0:
        return -picked
    possible = logits > -jnp.inf
    mean = jnp.sum(jnp.where(possible, log_q, 0.0), axis=-1) / jnp.sum(possible, axis=-1)
    return -(1 - label_smoothing) * picked - label_smoothing * mean
