"""Attention of several heads without 1/sqrt(K) (T5 folds it into the query's initialisation).

For the backward pass the softmax's maximum and sum are kept, two numbers a query and head, and
scores are computed again, as in FlashAttention (Dao et al., 2022): those of all layers would be
the largest arrays of a step. (In straight-line code, unrolled layers on a CPU, XLA may see that
the two are the same, and keep them after all.)

Axes: B batch, H heads, T queries, S keys, K head dim.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


Heads = Float[Array, "B H S K"]
Biases = tuple[Float[Array, "... #H #T S"], ...]


def attend(
    queries: Float[Array, "B H T K"],
    keys: Heads,
    values: Heads,
    biases: Biases,
    dropout_mask: Float[Array, "B H 1 S"] | None,
    *,
    by_row: bool = False,
) -> Float[Array, "B H T K"]:
    """softmax(queries keys^T + biases) values, of the values' dtype.

    Args:
        queries, keys, values: already of the compute dtype.
        biases: one for all rows of the batch, one a row, or one for each of equal groups of rows.
        dropout_mask: multiplies the probabilities.
        by_row: one row of the batch at a time, so that its scores stay in a CPU's cache, where
            those of all go through memory several times.
    """
    if not by_row:
        return _attend(queries, keys, values, biases, dropout_mask)
    biases = tuple(_spread(bias, len(queries)) for bias in biases)
    own = [bias if len(bias) > 1 else None for bias in biases]

    def one(row):  # arrays without the axis B
        heads, own, dropout_mask = row
        biases_of_it = [b[0] if x is None else x for b, x in zip(biases, own, strict=True)]
        return _turn(_attend(*map(_turn, heads), tuple(biases_of_it), dropout_mask))

    # Heads part inside a row: before, that would be one more pass through memory.
    return _turn(lax.map(one, ([_turn(x) for x in (queries, keys, values)], own, dropout_mask)))


def _turn(x: jax.Array) -> jax.Array:
    """[... H S K] to [... S H K], as the projections have it, or back."""
    return x.swapaxes(-3, -2)


@jax.custom_vjp
def _attend(queries, keys, values, biases, dropout_mask):
    """As `attend`; all arrays may lack the axis B."""
    return _forward(queries, keys, values, biases, dropout_mask)[0]


def _forward(queries, keys, values, biases, dropout_mask):
    dtype = values.dtype.name
    scores = _scores(queries, keys, biases)
    top = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    probabilities = exponentials / total
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask
    mixed = product(probabilities, values, dtype).astype(dtype)
    return mixed, (queries, keys, values, biases, dropout_mask, mixed, top, total)


def _backward(residuals, gradient):
    queries, keys, values, biases, dropout_mask, mixed, top, total = residuals
    dtype = values.dtype.name
    # Not exp(scores - logsumexp): where all keys are masked, the maximum swallows the logarithm.
    probabilities = jnp.exp(_scores(queries, keys, biases) - top) / total
    weights, d_weights = probabilities, product_with_transpose(gradient, values, dtype)
    if dropout_mask is not None:
        weights, d_weights = probabilities * dropout_mask, d_weights * dropout_mask
    # The sum over keys of weights x their gradients, from as many numbers as there are queries.
    delta = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    d_scores = probabilities * (d_weights - delta)
    return (
        product(d_scores, keys, dtype).astype(dtype),
        product_of_transpose(d_scores, queries, dtype).astype(dtype),
        product_of_transpose(weights, gradient, dtype).astype(dtype),
        tuple(_sum_to(d_scores, bias.shape) for bias in biases),
        None,
    )


_attend.defvjp(_forward, _backward)


def _scores(queries, keys, biases) -> Float[Array, "*B H T S"]:
    scores = product_with_transpose(queries, keys, keys.dtype.name)
    if scores.ndim == 4:
        return scores + sum(_spread(bias, len(scores)) for bias in biases)
    # For one row one after the other. JAX takes the sum, the same in all layers, out of them: on
    # TPUs that is less traffic, here an array of all scores' size in place of what fits in cache.
    for bias in biases:
        scores = scores + bias
    return scores


def _spread(bias: Float[Array, "G H T S"], rows: int) -> Float[Array, "B H T S"]:
    """A bias for all rows or for each as it is, one for each of equal groups spread over theirs."""
    groups = len(bias)
    if groups in (1, rows):
        return bias
    spread = jnp.broadcast_to(bias[:, None], (groups, rows // groups, *bias.shape[1:]))
    return spread.reshape(rows, *bias.shape[1:])


def _sum_to(x: Float[Array, "*B H T S"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Sums over the rows and axes over which a bias of this shape was added."""
    if shape[0] not in (1, x.shape[0]):
        x = jnp.sum(x.reshape(shape[0], -1, *x.shape[1:]), axis=1)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
