"""Attention of several heads without 1/sqrt(K) (T5 folds it into the query's initialisation).

Axes: B batch, H heads, T queries, S keys, K head dim. Biases are one for all rows, one a row, or
one for each of equal groups of rows; `kept` multiplies the probabilities (dropout).
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


Heads = Float[Array, "B H S K"]
Biases = tuple[Float[Array, "... #H #T S"], ...]
Kept = Float[Array, "B H 1 S"] | None


def attend(
    queries: Float[Array, "B H T K"], keys: Heads, values: Heads, biases: Biases, kept: Kept
) -> Float[Array, "B H T K"]:
    """softmax(queries keys^T + biases) values."""
    dtype = values.dtype.name
    scores = product_with_transpose(queries, keys, dtype)
    scores = scores + sum(_of_rows(bias, queries.shape[0]) for bias in biases)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if kept is not None:
        probabilities = probabilities * kept
    return product(probabilities, values, dtype).astype(dtype)


def _of_rows(bias: Float[Array, "G H T S"], rows: int) -> Float[Array, "B H T S"]:
    """A bias for all rows or for each as it is, one for each of equal groups spread over theirs."""
    groups = bias.shape[0]
    if groups in (1, rows):
        return bias
    spread = jnp.broadcast_to(bias[:, None], (groups, rows // groups, *bias.shape[1:]))
    return spread.reshape(rows, *bias.shape[1:])


@jax.custom_vjp
def attend_by_row(
    queries: Float[Array, "B H T K"], keys: Heads, values: Heads, biases: Biases, kept: Kept
) -> Float[Array, "B H T K"]:
    """`attend` of biases without groups, one row of the batch at a time, and again backwards.

    The scores of one row stay in the CPU's cache, where those of all go through memory several
    times. What is kept of them is one number a query, as in FlashAttention (Dao et al., 2022).
    """
    return _by_row_forward(queries, keys, values, biases, kept)[0]


def _by_row_forward(queries, keys, values, biases, kept):
    dtype = values.dtype.name
    common, own = _split(biases)

    def one(row):
        *heads, row_biases, row_kept = row
        query, key, value = (x.swapaxes(0, 1) for x in heads)
        scores = _scores(query, key, common, row_biases, dtype)
        top = jnp.max(scores, axis=-1, keepdims=True)
        exponentials = jnp.exp(scores - top)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        probabilities = exponentials / total
        if row_kept is not None:
            probabilities = probabilities * row_kept
        mixed = product(probabilities, value, dtype).astype(dtype)
        return mixed.swapaxes(0, 1), top + jnp.log(total)

    tokens = [x.swapaxes(1, 2) for x in (queries, keys, values)]
    mixed, logsumexp = lax.map(one, (*tokens, own, kept))
    mixed = mixed.swapaxes(1, 2)
    return mixed, (queries, keys, values, biases, kept, mixed, logsumexp)


def _by_row_backward(residuals, gradient):
    queries, keys, values, biases, kept, mixed, logsumexp = residuals
    dtype = values.dtype.name
    common, own = _split(biases)

    def one(sums, row):
        *heads, row_biases, row_kept, row_logsumexp = row
        query, key, value, row_mixed, g = (x.swapaxes(0, 1) for x in heads)
        scores = _scores(query, key, common, row_biases, dtype)
        probabilities = jnp.exp(scores - row_logsumexp)
        d_probabilities = product_with_transpose(g, value, dtype)
        weights = probabilities
        if row_kept is not None:
            weights, d_probabilities = probabilities * row_kept, d_probabilities * row_kept
        # The sum over keys of probabilities x their gradients.
        inner = jnp.sum(g * row_mixed, axis=-1, keepdims=True, dtype=jnp.float32)
        d_scores = probabilities * (d_probabilities - inner)
        sums = [None if x is None else x + _sum_to(d_scores, x.shape) for x in sums]
        gradients = (
            product(d_scores, key, dtype),
            product_of_transpose(d_scores, query, dtype),
            product_of_transpose(weights, g, dtype),
        )
        d_own = [None if x is None else _sum_to(d_scores, x.shape) for x in row_biases]
        return sums, ([x.astype(dtype).swapaxes(0, 1) for x in gradients], d_own)

    zeros = [None if x is None else jnp.zeros_like(x) for x in common]
    tokens = [x.swapaxes(1, 2) for x in (queries, keys, values, mixed, gradient)]
    sums, (gradients, d_own) = lax.scan(one, zeros, (*tokens, own, kept, logsumexp))
    d_biases = tuple(
        d if total is None else total[None] for total, d in zip(sums, d_own, strict=True)
    )
    return *(x.swapaxes(1, 2) for x in gradients), d_biases, None


attend_by_row.defvjp(_by_row_forward, _by_row_backward)


def _split(biases: Biases) -> tuple[list[jax.Array | None], list[jax.Array | None]]:
    """Those that all rows have, without their first axis, and those of each row."""
    common = [bias[0] if bias.shape[0] == 1 else None for bias in biases]
    own = [None if bias.shape[0] == 1 else bias for bias in biases]
    return common, own


def _scores(query, key, common, own, dtype: str) -> Float[Array, "H T S"]:
    scores = product_with_transpose(query, key, dtype)
    for shared, of_row in zip(common, own, strict=True):
        # Not their sum: JAX would take it out of the layers and keep it, B H T S numbers.
        scores = scores + (of_row if shared is None else shared)
    return scores


def _sum_to(x: Float[Array, "H T S"], shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
