"""T5's multi-head attention, with a backward pass that recomputes the scores.

The scores are not divided by sqrt(K): T5 folds this factor into the query's initialisation.

The scores of all layers would be the largest arrays of a training step. As in FlashAttention (Dao
et al., 2022), the forward pass keeps only the softmax's maximum and sum, two numbers for each query
and head, and the backward pass computes the scores again. (Where the layers are unrolled on a CPU,
XLA may recognise the second computation as a copy of the first, and keep the scores after all.)

Axes: B batch, H heads, T queries, S keys, K head dim.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gkd_jax import sharding
from gkd_jax.models import cudnn
from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


_SCORES_IN_CACHE = 2**23  # the most attention scores (float32) that stay in a CPU's cache
Heads = Float[Array, "B H S K"]
PositionBiases = tuple[Float[Array, "#G #H T S"], ...]


class Padding(NamedTuple):
    """The keys of each row that no query may see.

    Attributes:
        bias: a bias that is added to the scores: 0 for a key that is seen, a large negative number
            for padding. It has no gradient.
        lengths: the number of keys of each row that are seen, where these are the row's first ones.
            A GPU's kernel takes these numbers in place of `bias`; None if they are not known.
    """

    bias: Float[Array, "B 1 1 S"]
    lengths: Int[Array, " B"] | None = None


def attend(
    queries: Float[Array, "B H T K"],
    keys: Heads,
    values: Heads,
    position_biases: PositionBiases,
    padding: Padding | None,
    dropout_mask: Float[Array, "B H 1 S"] | None,
    *,
    by_row: bool = False,
) -> Float[Array, "B H T K"]:
    """Returns softmax(queries keys^T + biases) values, in the dtype of the values.

    Args:
        queries, keys, values: arrays of the compute dtype.
        position_biases: biases of the pairs of a query's and a key's position, which are added to
            the scores. G is 1 (a bias for all rows of the batch), B (a bias for each row), or the
            number of groups of B / G neighbouring rows that have a bias each.
        padding: the keys that no query may see; None if there are none.
        dropout_mask: an array that multiplies the probabilities; None drops nothing.
        by_row: attend for one row of the batch at a time. The scores of one row stay in a CPU's
            cache, whereas those of the whole batch go through memory several times.
    """
    if not by_row:
        return _attend(queries, keys, values, position_biases, padding, dropout_mask)
    biases = tuple(_repeat(bias, len(queries)) for bias in position_biases)
    of_rows = tuple(bias if len(bias) > 1 else None for bias in biases)

    def one(row):  # a row's arrays have no axis B
        heads, of_row, padding_bias, dropout_mask = row
        own = tuple(b[0] if x is None else x for b, x in zip(biases, of_row, strict=True))
        padding = None if padding_bias is None else Padding(padding_bias)
        return _swap(_attend(*map(_swap, heads), own, padding, dropout_mask))

    # `lax.map` slices arrays [B S H K], which is the projections' own layout, and `one` moves the
    # heads to the front. Slices of [B H S K] would take one more pass through memory.
    heads = [_swap(x) for x in (queries, keys, values)]
    padding_bias = None if padding is None else padding.bias
    return _swap(lax.map(one, (heads, of_rows, padding_bias, dropout_mask)))


def _swap(x: jax.Array) -> jax.Array:
    """Returns [... H S K] as [... S H K], the layout of the projections, or the other way round."""
    return x.swapaxes(-3, -2)


@jax.custom_vjp
def _attend(queries, keys, values, position_biases, padding, dropout_mask):
    """`attend` for whole arrays; the axis B may be absent from all of them."""
    return _forward(queries, keys, values, position_biases, padding, dropout_mask)[0]


def _forward(queries, keys, values, position_biases, padding, dropout_mask):
    def run():
        dtype = values.dtype.name
        scores = _scores(queries, keys, position_biases, padding)
        top = jnp.max(scores, axis=-1, keepdims=True)
        exponentials = jnp.exp(scores - top)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        probabilities = exponentials / total
        if dropout_mask is not None:
            probabilities = probabilities * dropout_mask
        return product(probabilities, values, dtype).astype(dtype), top, total

    given = (queries, keys, values, position_biases, padding, dropout_mask)
    library = _library(queries, keys, position_biases, padding, dropout_mask)
    mixed, top, total = run() if library is None else cudnn.forward(library, given[:4], run)
    return mixed, (*given, mixed, top, total)


def _library(queries, keys, position_biases, padding, dropout_mask):
    """Returns cuDNN's function of (queries, keys, values, position biases), or None without one."""
    same_for_rows = all(len(bias) == 1 for bias in position_biases)
    # Without lengths, the bias of padding would have to be an array of all scores.
    known_lengths = padding is None or padding.lengths is not None
    if dropout_mask is not None or not same_for_rows or not known_lengths:
        return None
    if not cudnn.serves(queries, keys):
        return None
    lengths = None if padding is None else padding.lengths

    def run(queries, keys, values, position_biases):
        bias = functools.reduce(jnp.add, position_biases) if position_biases else None
        return cudnn.attention(queries, keys, values, bias, key_lengths=lengths)

    return run


def _backward(residuals, gradient):
    given, (mixed, top, total) = residuals[:6], residuals[6:]
    queries, keys, values, position_biases, padding, dropout_mask = given

    def run():
        dtype = values.dtype.name
        # The maximum and the sum are not merged into one logsumexp: where all keys are masked, the
        # maximum is about -1e10, and rounding would lose the logarithm of the sum beside it.
        scores = _scores(queries, keys, position_biases, padding)
        probabilities = jnp.exp(scores - top) / total
        weights, d_weights = probabilities, product_with_transpose(gradient, values, dtype)
        if dropout_mask is not None:
            weights, d_weights = probabilities * dropout_mask, d_weights * dropout_mask
        # delta is the sum over keys of weights x d_weights. The output gives the same sum with K
        # terms for each query in place of S.
        delta = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
        d_scores = probabilities * (d_weights - delta)
        return (
            product(d_scores, keys, dtype).astype(dtype),
            product_of_transpose(d_scores, queries, dtype).astype(dtype),
            product_of_transpose(weights, gradient, dtype).astype(dtype),
            tuple(_sum_to(d_scores, bias.shape) for bias in position_biases),
        )

    library = _library(queries, keys, position_biases, padding, dropout_mask)
    found = run() if library is None else cudnn.backward(library, given[:4], gradient, run)
    return *found, None, None


_attend.defvjp(_forward, _backward)


def _scores(queries, keys, position_biases, padding) -> Float[Array, "*B H T S"]:
    scores = product_with_transpose(queries, keys, keys.dtype.name)
    biases = position_biases if padding is None else (*position_biases, padding.bias)
    if scores.ndim == 4:
        return scores + sum(_repeat(bias, len(scores)) for bias in biases)
    # For a single row, the biases are added one after the other. Their sum is the same in every
    # layer, so JAX would compute it once, outside the loop over layers. On TPUs this saves traffic.
    # Here it would be an array as large as the scores of all rows, which do not fit in the cache.
    for bias in biases:
        scores = scores + bias
    return scores


def _repeat(bias: Float[Array, "G H T S"], rows: int) -> Float[Array, "B H T S"]:
    """Repeats a bias of each group for every row of the group.

    A bias for all rows or for each row is returned as it is.
    """
    groups = len(bias)
    if groups in (1, rows):
        return bias
    repeated = jnp.broadcast_to(bias[:, None], (groups, rows // groups, *bias.shape[1:]))
    return repeated.reshape(rows, *bias.shape[1:])


def _sum_to(x: Float[Array, "*B H T S"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the gradient of a bias of this shape: x summed over all broadcast rows and axes."""
    if shape[0] not in (1, x.shape[0]):
        x = jnp.sum(x.reshape(shape[0], -1, *x.shape[1:]), axis=1)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)


def gains_by_row(queries: Float[Array, "B H T K"], keys: Float[Array, "B G S K"]) -> bool:
    """Returns whether a CPU attends faster for one row of the batch at a time.

    It does if the scores of all rows exceed its cache, and if the batch is not sharded.
    """
    large = math.prod(queries.shape[:3]) * keys.shape[2] > _SCORES_IN_CACHE
    return large and sharding.num_shards("batch") == 1
