"""Causal attention of decoder-only models: grouped query heads, sliding windows, long texts.

A query sees the keys at its own position and before, as far back as the layer's window. Each key
head serves G query heads.

Texts longer than a block are computed as in FlashAttention (Dao et al., 2022): block by block, with
a running maximum and sum, and the scores again in the backward pass. So memory grows with the
length rather than with its square. Pairs of blocks in which no query sees a key are skipped, so
that the work of a layer with a window grows with the window.

Axes: B batch, H query heads, N key heads, G = H / N, T queries, S keys, K head dim.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax.models import cudnn
from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


BLOCK = 512  # the queries, and the keys, of a block in texts longer than this
NOWHERE = 2**30  # the position of padding among the keys; it is after all queries
NO_WINDOW = 2**30  # a window that is longer than any text
_MASKED = -1e10  # as a score: exp(_MASKED - max) is exactly 0 in float32


class Sight(NamedTuple):
    """The positions and the window that decide which keys a query sees.

    A query at position q sees a key at position p if q - window < p <= q.
    """

    queries: Int[Array, "#B T"]
    keys: Int[Array, "#B S"]
    window: Int[Array, ""]


class _Scoring(NamedTuple):
    """The static settings of attention: how products become scores, and the block size."""

    scale: float
    softcap: float | None
    block: int
    is_causal: bool


def attend(
    queries: Float[Array, "B H T K"],
    keys: Float[Array, "B N S K"],
    values: Float[Array, "B N S K"],
    sight: Sight,
    *,
    scale: float,
    softcap: float | None = None,
    by_row: bool = False,
    block: int = BLOCK,
    is_causal: bool = False,
) -> Float[Array, "B H T K"]:
    """Returns softmax(softcap(scale x queries keys^T)) values, in the dtype of the values.

    Args:
        queries, keys, values: arrays of the compute dtype. Query head h reads key head
            h // (H / N).
        sight: the positions of queries and keys, and the layer's window.
        scale: a factor of the products of queries and keys.
        softcap: c in c tanh(x / c), which is applied to the scaled products; None is off.
        by_row: attend for one row of the batch at a time, whose scores stay in a CPU's cache.
        block: the number of queries, and of keys, in a block. Texts of at most this length are
            computed at once.
        is_causal: whether query t sees exactly the keys up to t, in every row. A GPU's kernel can
            compute this case, without a softcap.
    """
    scoring = _Scoring(scale, softcap, block, is_causal and softcap is None)
    grouped = queries.reshape(*keys.shape[:2], -1, *queries.shape[2:])
    if by_row:
        rows = len(queries)
        own = [jnp.broadcast_to(x, (rows, x.shape[1])) for x in (sight.queries, sight.keys)]

        def one(row):
            q, k, v, q_positions, k_positions = (x[None] for x in tuple(row))
            mixed = _attend(scoring, q, k, v, Sight(q_positions, k_positions, sight.window))
            return jnp.asarray(mixed)[0]

        mixed = lax.map(one, (grouped, keys, values, *own))
    else:
        mixed = _attend(scoring, grouped, keys, values, sight)
    return jnp.asarray(mixed).reshape(queries.shape)


def masked_scores(
    products: Float[Array, "B N G S"],
    seen: Bool[Array, "B S"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B N G S"]:
    """Returns the scores of one query per row and head from its float32 products with the keys.

    `seen` says which keys the query of each row sees; see `attend` for scale and softcap.
    """
    scores, _ = _capped(products * scale, softcap)
    return jnp.where(seen[:, None, None], scores, _MASKED)


def _capped(scores: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns softcapped scores and the derivative of the softcap at each, or None without one."""
    if softcap is None:
        return scores, None
    bent = jnp.tanh(scores / softcap)
    return softcap * bent, 1 - bent * bent


class _Running(NamedTuple):
    """The running softmax of each query over the keys visited so far."""

    top: Float[Array, "B N G T 1"]  # the largest score
    total: Float[Array, "B N G T 1"]  # the sum of exp(score - top)
    mixed: Float[Array, "B N G T K"]  # the sum of exp(score - top) x value, float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scoring: _Scoring, queries, keys, values, sight: Sight):
    """`attend` for queries [B N G T K]; the result has their shape."""
    return _forward(scoring, queries, keys, values, sight)[0]


def _forward(scoring: _Scoring, queries, keys, values, sight: Sight):
    def run():
        if max(queries.shape[3], keys.shape[2]) <= scoring.block:
            running = _visit(scoring, queries, keys, values, sight, None)
            mixed = running.mixed / running.total
        else:
            mixed, running = _forward_in_blocks(scoring, queries, keys, values, sight)
        return mixed.astype(values.dtype), running.top, running.total

    library, given = _library(scoring, queries, keys), (queries, keys, values)
    mixed, top, total = run() if library is None else cudnn.forward(library, given, run)
    return mixed, (*given, sight, mixed, top, total)


def _library(scoring: _Scoring, queries, keys):
    """Returns cuDNN's function of (queries, keys, values), or None where it cannot compute this."""

    def flat(queries):
        return queries.reshape(queries.shape[0], -1, *queries.shape[3:])

    def run(queries, keys, values):
        scale = scoring.scale
        mixed = cudnn.attention(flat(queries), keys, values, scale=scale, is_causal=True)
        return mixed.reshape(queries.shape)

    return run if scoring.is_causal and cudnn.serves(flat(queries), keys) else None


def _visit(scoring: _Scoring, queries, keys, values, sight: Sight, running: _Running | None):
    """Returns the running softmax of some queries after they have visited some more keys.

    Without a `running` softmax, these are the first keys.
    """
    scores = _scores(scoring, queries, keys, sight)[0]
    top = jnp.max(scores, axis=-1, keepdims=True)
    if running is not None:
        top = jnp.maximum(top, running.top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = _unfold(product(_fold(weights), values, values.dtype.name), queries.shape)
    if running is not None:
        shrink = jnp.exp(running.top - top)
        total, mixed = total + running.total * shrink, mixed + running.mixed * shrink
    return _Running(top, total, mixed)


def _scores(scoring: _Scoring, queries, keys, sight: Sight):
    """Returns float32 scores [B N G T S], with unseen keys masked, and the slope of the softcap."""
    products = product_with_transpose(_fold(queries), keys, keys.dtype.name)
    products = _unfold(products, queries.shape)
    scores, slope = _capped(products * scoring.scale, scoring.softcap)
    seen = _seen(sight)[:, None, None]
    return jnp.where(seen, scores, _MASKED), slope


def _seen(sight: Sight) -> Bool[Array, "B T S"]:
    """Returns a mask of the keys that each query sees."""
    queries, keys = sight.queries[:, :, None], sight.keys[:, None, :]
    return (keys <= queries) & (keys > queries - sight.window)


def _fold(x: jax.Array) -> jax.Array:
    """Returns [B N G T X] as [B N G*T X], so that one matrix has all queries of a key head."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_fold`, for queries of the given shape."""
    return x.reshape(*shape[:-1], x.shape[-1])


def _backward(scoring: _Scoring, residuals, gradient):
    queries, keys, values, sight, mixed, top, total = residuals

    def run():
        # delta is the sum over keys of weights x the weights' gradients, as in FlashAttention.
        delta = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
        around = (gradient, delta, top, total)
        short = max(queries.shape[3], keys.shape[2]) <= scoring.block
        back = _visit_back if short else _backward_in_blocks
        gradients = back(scoring, queries, keys, values, sight, around)
        return tuple(x.astype(values.dtype) for x in gradients)

    library, given = _library(scoring, queries, keys), (queries, keys, values)
    found = run() if library is None else cudnn.backward(library, given, gradient, run)
    return *found, None


_attend.defvjp(_forward, _backward)


def _visit_back(scoring: _Scoring, queries, keys, values, sight: Sight, around):
    """Returns what some queries and some keys contribute to the gradients, in float32.

    These are the gradients of the queries, the keys and the values. `around` has the gradient of
    the output, delta (as in `_backward`), and the softmax's maximum and sum, all for these queries.
    """
    gradient, delta, top, total = around
    dtype = values.dtype.name
    scores, slope = _scores(scoring, queries, keys, sight)
    weights = jnp.exp(scores - top) / total
    d_weights = _unfold(product_with_transpose(_fold(gradient), values, dtype), queries.shape)
    d_products = weights * (d_weights - delta) * scoring.scale
    if slope is not None:
        d_products = d_products * slope
    folded = _fold(d_products)
    return (
        _unfold(product(folded, keys, dtype), queries.shape),
        product_of_transpose(folded, _fold(queries), dtype),
        product_of_transpose(_fold(weights), _fold(gradient), dtype),
    )


# In blocks ----------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Padded queries and keys with their blocks on axis 0: Q blocks of T queries, P of S keys.

    `meet` is true for the pairs of blocks in which a query may see a key.
    """

    queries: Float[Array, "Q B N G T K"]
    query_positions: Int[Array, "Q B T"]
    keys: Float[Array, "P B N S K"]
    values: Float[Array, "P B N S K"]
    key_positions: Int[Array, "P B S"]
    meet: Bool[Array, "Q P"]


def _split(x: jax.Array, axis: int, block: int, fill: int | float = 0) -> jax.Array:
    """Pads an axis to whole blocks and moves the blocks to axis 0."""
    length = x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % block)
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_split`, for an axis of the given length."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _blocks(scoring: _Scoring, queries, keys, values, sight: Sight) -> _Blocks:
    block = scoring.block
    # The position of padding is before all keys among the queries, after all queries among the
    # keys. The bounds of a block leave padding out.
    q_positions = _split(sight.queries, 1, block, -1)
    k_positions = _split(sight.keys, 1, block, NOWHERE)
    axes = (1, 2)
    first_query = jnp.min(jnp.where(q_positions < 0, NOWHERE, q_positions), axis=axes)
    last_query = jnp.max(q_positions, axis=axes)
    first_key = jnp.min(k_positions, axis=axes)
    last_key = jnp.max(jnp.where(k_positions == NOWHERE, -1, k_positions), axis=axes)
    meet = (first_key[None] <= last_query[:, None]) & (
        last_key[None] > first_query[:, None] - sight.window
    )
    return _Blocks(
        _split(queries, 3, block),
        q_positions,
        _split(keys, 2, block),
        _split(values, 2, block),
        k_positions,
        meet,
    )


def _forward_in_blocks(scoring: _Scoring, queries, keys, values, sight: Sight):
    """Returns the output, and the running softmax of all keys, for texts longer than a block."""
    blocks = _blocks(scoring, queries, keys, values, sight)

    def of_queries(block):
        q, positions, meet = block

        def of_keys(running, block):
            k, v, key_positions, meets = block
            own = Sight(positions, key_positions, sight.window)
            return lax.cond(
                meets, lambda r: _visit(scoring, q, k, v, own, r), lambda r: r, running
            ), None

        sums = jnp.zeros((*q.shape[:-1], 1))
        start = _Running(sums + _MASKED, sums, jnp.zeros(q.shape))
        running, _ = lax.scan(
            of_keys, start, (blocks.keys, blocks.values, blocks.key_positions, meet)
        )
        # No total is 0: every block has a query that sees its own key, so it visits some keys.
        return running.mixed / running.total, running.top, running.total

    found = lax.map(of_queries, (blocks.queries, blocks.query_positions, blocks.meet))
    mixed, top, total = (_join(x, 3, queries.shape[3]) for x in found)
    return mixed, _Running(top, total, mixed)


def _backward_in_blocks(scoring: _Scoring, queries, keys, values, sight: Sight, around):
    """Returns the gradients of queries, keys and values for texts longer than a block."""
    blocks = _blocks(scoring, queries, keys, values, sight)
    of_queries = tuple(_split(x, 3, scoring.block) for x in around)
    # `_split` has padded the totals with 0, by which `_visit_back` would divide.
    of_queries = (*of_queries[:3], jnp.where(of_queries[3] == 0, 1.0, of_queries[3]))
    zeros = jnp.zeros(blocks.keys.shape, jnp.float32)

    def visit_queries(carry, block):
        q, positions, meet, own = block

        def visit_keys(d_q, block):
            k, v, key_positions, meets, d_k, d_v = block
            places = Sight(positions, key_positions, sight.window)

            def visit(sums):
                found = _visit_back(scoring, q, k, v, places, own)
                return tuple(x + y for x, y in zip(sums, found, strict=True))

            d_q, d_k, d_v = lax.cond(meets, visit, lambda sums: sums, (d_q, d_k, d_v))
            return d_q, (d_k, d_v)

        d_q, carry = lax.scan(
            visit_keys,
            jnp.zeros(q.shape, jnp.float32),
            (blocks.keys, blocks.values, blocks.key_positions, meet, *carry),
        )
        return carry, d_q

    (d_keys, d_values), d_queries = lax.scan(
        visit_queries,
        (zeros, zeros),
        (blocks.queries, blocks.query_positions, blocks.meet, of_queries),
    )
    length = keys.shape[2]
    return (
        _join(d_queries, 3, queries.shape[3]),
        _join(d_keys, 2, length),
        _join(d_values, 2, length),
    )
