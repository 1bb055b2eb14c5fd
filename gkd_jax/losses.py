"""From numbers per token to one loss.

A reduction returns `(sum, count)`, not their quotient: sums and counts of microbatches and devices
add up to those of the batch, so that dividing once at the end gives the same loss and gradient for
any number of them.

Axes: B batch, T target, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


SumAndCount = tuple[Float[Array, ""], Float[Array, ""]]


def sequence_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> SumAndCount:
    """The paper's Eq. 2 and Algorithm 1: the mean over each sequence's tokens, then over sequences.

    Returns:
        The sum over sequences of their means, and the number of sequences that have any weight: one
        without (padding of a last batch) is not counted.
    """
    lengths = jnp.sum(weights, axis=1)
    sums = jnp.sum(_masked(values, weights), axis=1)
    return jnp.sum(sums / jnp.maximum(lengths, 1.0)), jnp.sum(jnp.where(lengths > 0, 1.0, 0.0))


def token_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> SumAndCount:
    """The mean over all tokens of the batch: longer sequences count more.

    Returns:
        The sum over tokens and the number of tokens.
    """
    return jnp.sum(_masked(values, weights)), jnp.sum(weights)


def _masked(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, "B T"]:
    # Not only a product: a NaN or inf under weight 0 must not reach the sum or its gradient.
    return jnp.where(weights > 0, values, 0.0) * weights


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], *, label_smoothing: float = 0.0
) -> Float[Array, "B T"]:
    """-log Q(target), nats; with smoothing, -(1 - s) log Q(target) - s mean over ids of log Q.

    Ids whose logit is -inf cannot occur and take no part in the smoothing.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    picked = jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
    if label_smoothing == 0:
        return -picked
    possible = logits > -jnp.inf
    mean = jnp.sum(jnp.where(possible, log_q, 0.0), axis=-1) / jnp.sum(possible, axis=-1)
    return -(1 - label_smoothing) * picked - label_smoothing * mean
