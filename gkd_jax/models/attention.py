"""Attention of several heads without 1/sqrt(K) (T5 folds it into the query's initialisation).

For the backward pass one number a query is kept, and scores are computed again, as in
FlashAttention (Dao et al., 2022): those of all layers would be the largest arrays of a step.

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
    kept: Float[Array, "B H 1 S"] | None,
    *,
    by_row: bool = False,
) -> Float[Array, "B H T K"]:
    """softmax(queries keys^T + biases) values, of the values' dtype.

    Args:
        queries, keys, values: already of the compute dtype.
        biases: one for all rows of the batch, one a row, or one for each of equal groups of rows.
        kept: multiplies the probabilities (dropout).
        by_row: one row of the batch at a time, so that its scores stay in a CPU's cache, where
            those of all go through memory several times.
    """
    if not by_row:
        return _attend(queries, keys, values, biases, kept)
    biases = tuple(_spread(bias, queries.shape[0]) for bias in biases)
    own = [bias if bias.shape[0] > 1 else None for bias in biases]

    def one(row):
        heads, own, kept = row
        biases_of_it = [b[0] if x is None else x for b, x in zip(biases, own, strict=True)]
        return _turn(_attend(*map(_turn, heads), tuple(biases_of_it), kept))

    # Heads part inside a row: before, that would be one more pass through memory.
    return _turn(lax.map(one, ([_turn(x) for x in (queries, keys, values)], own, kept)))


def _turn(x: jax.Array) -> jax.Array:
    """[... H S K] to [... S H K], as the projections have it, or back."""
    return x.swapaxes(-3, -2)


@jax.custom_vjp
def _attend(queries, keys, values, biases, kept):
    return _forward(queries, keys, values, biases, kept)[0]


def _forward(queries, keys, values, biases, kept):
    dtype = values.dtype.name
    scores = _scores(queries, keys, biases)
    top = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    probabilities = exponentials / total
    if kept is not None:
        probabilities = probabilities * kept
    mixed = product(probabilities, values, dtype).astype(dtype)
    return mixed, (queries, keys, values, biases, kept, mixed, top + jnp.log(total))


def _backward(residuals, gradient):
    queries, keys, values, biases, kept, mixed, logsumexp = residuals
    dtype = values.dtype.name
    probabilities = jnp.exp(_scores(queries, keys, biases) - logsumexp)
    weights, d_weights = probabilities, product_with_transpose(gradient, values, dtype)
    if kept is not None:
        weights, d_weights = probabilities * kept, d_weights * kept
    # The sum over keys of weights x their gradients, from as many numbers as there are queries.
    inner = jnp.sum(gradient * mixed, axis=-1, keepdims=True, dtype=jnp.float32)
    d_scores = probabilities * (d_weights - inner)
    return (
        product(d_scores, keys, dtype).astype(dtype),
        product_of_transpose(d_scores, queries, dtype).astype(dtype),
        product_of_transpose(weights, gradient, dtype).astype(dtype),
        tuple(_sum_to(d_scores, bias.shape) for bias in biases),
        None,
    )


_attend.defvjp(_forward, _backward)


def _scores(queries, keys, biases) -> Float[Array, "... H T S"]:
    scores = product_with_transpose(queries, keys, keys.dtype.name)
    return scores + sum(_spread(bias, scores.shape[0]) for bias in biases)


def _spread(bias: Float[Array, "G ..."], rows: int) -> Float[Array, "B ..."]:
    """A bias for all rows or for each as it is, one for each of equal groups spread over theirs."""
    groups = bias.shape[0]
    if groups in (1, rows):
        return bias
    spread = jnp.broadcast_to(bias[:, None], (groups, rows // groups, *bias.shape[1:]))
    return spread.reshape(rows, *bias.shape[1:])


def _sum_to(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Sums over what a bias of this shape was spread and broadcast over."""
    if shape[0] not in (1, x.shape[0]):
        x = jnp.sum(x.reshape(shape[0], -1, *x.shape[1:]), axis=1)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
