"""Causal attention with fewer key heads than query heads, over texts of any length.

A query sees the keys at its own position and before, back to its layer's window. Longer texts go
block by block with a running maximum and sum, as FlashAttention (Dao et al., 2022), and again in
the backward pass: memory grows with the length, not with its square. Pairs of blocks in which no
query sees a key are skipped, so that a window costs what it reaches.

Axes: B batch, H query heads, N key heads, G = H / N, T queries, S keys, K head dim.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


BLOCK = 512  # queries or keys that are visited at once in texts longer than this
NOWHERE = 2**30  # the position of what is no key: no query sees it
NO_WINDOW = 2**30
_MASKED = -1e10  # as a score: exp(_MASKED - max) is exactly 0 in float32


class Sight(NamedTuple):
    """Who sees whom: a key at position p is seen from q where q - window < p <= q."""

    queries: Int[Array, "#B T"]
    keys: Int[Array, "#B S"]
    window: Int[Array, ""]


class Past(NamedTuple):
    """A stretch of the past, and which of its keys one query a row sees."""

    keys: Float[Array, "B N S K"]
    values: Float[Array, "B N S K"]
    seen: Bool[Array, "#B S"]


class _Scoring(NamedTuple):
    """What makes scores of products; static."""

    scale: float
    softcap: float | None
    block: int


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
) -> Float[Array, "B H T K"]:
    """softmax(softcap(scale x queries keys^T)) values, of the values' dtype.

    Args:
        queries, keys, values: of the compute dtype; query head h reads key head h // (H / N).
        sight: positions of queries and keys, and the layer's window.
        scale: multiplies the products.
        softcap: c of c tanh(x / c); None is off.
        by_row: one row of the batch at a time, so that its scores stay in a CPU's cache.
        block: queries and keys that are visited at once where there are more.
    """
    scoring = _Scoring(scale, softcap, block)
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


def attend_to_cache(
    queries: Float[Array, "B H 1 K"],
    pasts: list[Past],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B H 1 K"]:
    """One query a row over several stretches of the past."""
    keys = pasts[0].keys
    dtype = keys.dtype.name
    grouped = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])
    scoring = _Scoring(scale, softcap, 1)
    scores = [
        jnp.where(
            seen[:, None, None], _cap(scoring, product_with_transpose(grouped, k, dtype)), _MASKED
        )
        for k, _, seen in pasts
    ]
    tops = jnp.concatenate([jnp.max(x, axis=-1, keepdims=True) for x in scores], axis=-1)
    top = jnp.max(tops, axis=-1, keepdims=True)
    weights = [jnp.exp(x - top) for x in scores]
    totals = [jnp.sum(x, axis=-1, keepdims=True) for x in weights]
    total = jnp.sum(jnp.concatenate(totals, axis=-1), axis=-1, keepdims=True)
    mixed = jnp.zeros((), jnp.float32)
    for x, past in zip(weights, pasts, strict=True):
        mixed = mixed + product(x / total, past.values, dtype)
    return mixed.astype(dtype).reshape(queries.shape)


def _cap(scoring: _Scoring, products: jax.Array) -> jax.Array:
    scores = products * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * jnp.tanh(scores / scoring.softcap)
    return scores


class _Running(NamedTuple):
    """Of each query over the keys visited so far: the top score, sums of exponentials."""

    top: Float[Array, "B N G T 1"]
    total: Float[Array, "B N G T 1"]
    mixed: Float[Array, "B N G T K"]  # float32, not yet divided by the total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scoring: _Scoring, queries, keys, values, sight: Sight):
    """Queries [B N G T K]; the result has their shape."""
    return _forward(scoring, queries, keys, values, sight)[0]


def _forward(scoring: _Scoring, queries, keys, values, sight: Sight):
    length = queries.shape[3]
    if max(length, keys.shape[2]) <= scoring.block:
        running = _visit(scoring, queries, keys, values, sight, None)
        mixed = running.mixed / running.total
    else:
        mixed, running = _forward_in_blocks(scoring, queries, keys, values, sight)
    mixed = mixed.astype(values.dtype)
    return mixed, (queries, keys, values, sight, mixed, running.top, running.total)


def _visit(scoring: _Scoring, queries, keys, values, sight: Sight, running: _Running | None):
    """Some queries see some more keys."""
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
    """Float32 scores [B N G T S] with unseen keys masked, and d score / d product."""
    products = product_with_transpose(_fold(queries), keys, keys.dtype.name)
    products = _unfold(products, queries.shape)
    scores = products * scoring.scale
    slope = None
    if scoring.softcap is not None:
        bent = jnp.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * bent, 1 - bent * bent
    seen = _seen(sight)[:, None, None]
    return jnp.where(seen, scores, _MASKED), slope


def _seen(sight: Sight) -> Bool[Array, "B T S"]:
    queries, keys = sight.queries[:, :, None], sight.keys[:, None, :]
    return (keys <= queries) & (keys > queries - sight.window)


def _fold(x: jax.Array) -> jax.Array:
    """[B N G T X] to [B N G*T X]: all queries of a key head in one matrix."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unfold(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x.reshape(*shape[:-1], x.shape[-1])


def _backward(scoring: _Scoring, residuals, gradient):
    queries, keys, values, sight, mixed, top, total = residuals
    delta = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
    around = (gradient, delta, top, total)
    length = queries.shape[3]
    if max(length, keys.shape[2]) <= scoring.block:
        gradients = _visit_back(scoring, queries, keys, values, sight, around)
    else:
        gradients = _backward_in_blocks(scoring, queries, keys, values, sight, around)
    d_queries, d_keys, d_values = (x.astype(values.dtype) for x in gradients)
    return d_queries, d_keys, d_values, None


_attend.defvjp(_forward, _backward)


def _visit_back(scoring: _Scoring, queries, keys, values, sight: Sight, around):
    """What some queries and some keys give to each other's gradients, float32."""
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
    """Blocks on axis 0 of queries and of keys, padded, and which pairs of them meet."""

    queries: Float[Array, "Q B N G T K"]
    query_positions: Int[Array, "Q B T"]
    keys: Float[Array, "P B N S K"]
    values: Float[Array, "P B N S K"]
    key_positions: Int[Array, "P B S"]
    meet: Bool[Array, "Q P"]


def _split(x: jax.Array, axis: int, block: int, fill: int | float = 0) -> jax.Array:
    """Pads an axis to whole blocks and puts the blocks on axis 0."""
    length = x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -length % block)
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _blocks(scoring: _Scoring, queries, keys, values, sight: Sight) -> _Blocks:
    block = scoring.block
    # A padded query sits before all keys, a padded key after all queries.
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
        # A query that saw nothing, of padding, has a total of 0.
        total = jnp.where(running.total == 0, 1.0, running.total)
        return running.mixed / total, running.top, total

    found = lax.map(of_queries, (blocks.queries, blocks.query_positions, blocks.meet))
    mixed, top, total = (_join(x, 3, queries.shape[3]) for x in found)
    return mixed, _Running(top, total, mixed)


def _backward_in_blocks(scoring: _Scoring, queries, keys, values, sight: Sight, around):
    blocks = _blocks(scoring, queries, keys, values, sight)
    of_queries = tuple(_split(x, 3, scoring.block) for x in around)
    # The total of padding must not be 0.
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
