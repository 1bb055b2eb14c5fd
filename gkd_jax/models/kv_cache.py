"""The KV cache of decoded tokens, kept in segments so that attention reads only what is written.

A token at position 40 would read the whole cache if the keys of all positions were one array: XLA's
shapes are static. So the keys and the values of T positions are tuples of arrays, the segments:
positions 0 to 63, 64 to 127, 128 to 255, and so on, each as long as all before it. A matrix product
with a segment runs only once decoding has reached the segment (`lax.cond`). The length of the first
segment is the config's `cache_segment`, which depends on the platform (`FIRST_ON`).

The T positions are a ring: the token that is decoded at time t is written at place t mod T. Without
refill (`gkd_jax.models.refill`) the time ends at T, and place, time and position are the same. With
it, a row may begin at any time, and its position is the time since then. No row has more than T
tokens, so no row overwrites its own.

Axes: L layers, N rows, H heads (those of the keys), T positions of one segment, K head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax import sharding
from gkd_jax.models import parameters
from gkd_jax.models.execution import ExecutionSettings
from gkd_jax.models.parameters import Params
from gkd_jax.models.products import product, product_with_transpose


# The positions of the first segment. On a GPU the host decides each `lax.cond`, which takes longer
# than reading a short segment. On a TPU the layers are scanned, and XLA copies the segments of all
# layers for each `lax.cond`.
FIRST_ON = {"gpu": 1024, "tpu": 2**30}
Context = TypeVar("Context")  # a family's own: see `lm`
Segments = tuple[Float[Array, "*L N H _ K"], ...]  # each with its own number of positions


class Cache(NamedTuple):
    """The state of decoding of a model of any family; step t writes place t mod T.

    Attributes:
        keys: the keys of decoded tokens, in segments. Those of all layers are stacked on axis 0, or
            are a tuple with one entry for each layer where the layers are a tuple too (see
            `stacks.unstack`).
        values: like the keys.
        prompts: what the family keeps of the rows' prompts, a NamedTuple. Its keys and values are
            stacked or in tuples, too, and its other arrays have the rows on axis 0.
        bias: what the family adds to the scores of all rows; None for none.
        time: the number of tokens decoded before.
        starts: the time at which each row began; None where all rows began at 0.
    """

    keys: Segments | tuple[Segments, ...]
    values: Segments | tuple[Segments, ...]
    prompts: Any
    bias: Any
    time: Int[Array, ""]
    starts: Int[Array, " N"] | None = None


def segment_sizes(length: int, first: int) -> list[int]:
    """Returns the number of positions of each segment of a cache for `length` positions."""
    sizes = []
    while (start := sum(sizes)) < length:
        sizes.append(min(start or first, length - start))
    return sizes


def empty(
    config: ExecutionSettings,
    layers: Params | tuple[Params, ...],
    shape: tuple[int, int, int, int],
    prompts: Any,
    bias: Any = None,
) -> Cache:
    """Returns a cache before the first token, with the `prompts` and the `bias` of a family.

    The layers are stacked or a tuple. The shape is that of one layer's keys, [N H T K].
    """
    if isinstance(layers, tuple):
        segments = (_segments(shape, config.dtype, config.cache_segment),) * len(layers)
    else:
        stacked = (parameters.num_layers(layers), *shape)
        segments = _segments(stacked, config.dtype, config.cache_segment)
    return Cache(segments, segments, prompts, bias, jnp.zeros((), jnp.int32))


def _segments(shape: tuple[int, ...], dtype: str, first: int) -> Segments:
    """Returns the segments of an empty cache of this whole shape, [N H T K] or [L N H T K]."""
    *before, num_heads, length, head_dim = shape
    heads = "heads" if num_heads % sharding.num_shards("heads") == 0 else None
    axes = (*["layers"] * (len(shape) - 4), "batch", heads, "length", "kv")
    return tuple(
        sharding.constrain(jnp.zeros((*before, num_heads, size, head_dim), dtype), axes)
        for size in segment_sizes(length, first)
    )


class LayerCache(NamedTuple):
    """The KV cache of decoded tokens as one layer writes and reads it at one step."""

    keys: Segments  # of this layer, or those of all layers, stacked on axis 0
    values: Segments  # like the keys
    time: Int[Array, ""]  # the number of tokens decoded before
    layer: Int[Array, ""] | int  # the number of this layer in stacked segments


def write(
    cache: LayerCache, key: Float[Array, "N H 1 K"], value: Float[Array, "N H 1 K"]
) -> LayerCache:
    """Returns the cache with the key and the value of one more token of each row.

    Only this token is written, so that XLA can update the cache in place.
    """
    keys, values, time, layer = cache
    return cache._replace(
        keys=_write(keys, key, time, layer), values=_write(values, value, time, layer)
    )


def _write(
    segments: Segments,
    new: Float[Array, "N H 1 K"],
    time: Int[Array, ""],
    layer: Int[Array, ""] | int,
) -> Segments:
    stacked = _is_stacked(segments[0])
    if stacked:
        new = new[None]
    ring_place = time % sum(segment.shape[-2] for segment in segments)
    found, start = [], 0
    for segment in segments:
        size = segment.shape[-2]
        place = jnp.clip(ring_place - start, 0, size - 1)
        at = (layer, 0, 0, place, 0) if stacked else (0, 0, place, 0)
        at = tuple(jnp.asarray(index, jnp.int32) for index in at)  # of one type under x64, too
        start += size
        here = new
        if segment is not segments[-1]:
            # A segment that is full keeps its last token. One that is not reached yet may hold
            # anything in its first place, which is written again before it is read.
            here = jnp.where(ring_place < start, new, lax.dynamic_slice(segment, at, new.shape))
        found.append(lax.dynamic_update_slice(segment, here, at))
    return tuple(found)


def row_positions(cache: Cache) -> Int[Array, "#N"]:
    """Returns the position of each row's next token; one number where all rows began together."""
    positions = cache.time if cache.starts is None else cache.time - cache.starts
    return positions.reshape(-1)


def ages(cache: Cache, length: int) -> Int[Array, " {length}"]:
    """Returns how many tokens before the next one each place of a ring was written.

    A place whose age exceeds the position of a row holds no token of this row.
    """
    return (cache.time - jnp.arange(length)) % length


class Part(NamedTuple):
    """Keys and values that a query attends to."""

    keys: Float[Array, "*L N H T K"]  # of one layer, or of all layers, stacked on axis 0
    values: Float[Array, "*L N H T K"]  # like the keys
    is_read: Bool[Array, ""] | None = None  # whether any key counts; None where some always do
    scope: str = ""  # `share_scope` of the tokens for which `is_read` holds
    layer: Int[Array, ""] | int = 0  # its number in stacked keys and values


def parts(cache: LayerCache, window: Int[Array, ""] | None = None) -> list[Part]:
    """Returns the segments as parts, of which the token of this step reads those in its window."""
    keys, values, time, layer = cache
    found, start, length = [], 0, sum(segment.shape[-2] for segment in keys)
    for k, v in zip(keys, values, strict=True):
        stop = start + k.shape[-2]
        is_read = None
        if len(keys) > 1:
            is_read = time >= start
            if window is not None:
                is_read = is_read & (stop > time + 1 - window)
        found.append(Part(k, v, is_read, share_scope(length - start, length), layer))
        start = stop
    return found


def share_scope(count: int, of: int) -> str:
    """Returns the name of a scope around a `lax.cond` or a loop that runs in `count` of `of` cases.

    XLA keeps the names of scopes, so that `planning.hlo` can count what a compiled program will do.
    """
    return f"times_{count}_of_{of}"


def attend(
    queries: Float[Array, "N Q 1 K"],
    parts: list[Part],
    score: Callable[[Float[Array, "N H G S"]], Float[Array, "N H G S"]],
) -> Float[Array, "N Q 1 K"]:
    """Returns the attention of one query per row and query head over all parts.

    Args:
        queries: the queries, in the compute dtype. Query head q reads key head q // G.
        parts: the parts; S is the sum of their positions.
        score: gives the scores, with masks and biases, of the float32 products of queries and keys.
            It must mask what no row has written, and what a part that is not read holds.
    """
    rows, key_heads, _, head_dim = parts[0].keys.shape[-4:]
    dtype = parts[0].keys.dtype.name
    grouped = queries.reshape(rows, key_heads, -1, head_dim)
    products = [
        _product_if_read(product_with_transpose, grouped, part.keys, part, part.keys.shape[-2])
        for part in parts
    ]
    weights = jax.nn.softmax(score(jnp.concatenate(products, axis=-1)), axis=-1)
    mixed, start = jnp.zeros(()), 0
    for part in parts:
        stop = start + part.keys.shape[-2]
        own = weights[..., start:stop]
        mixed = mixed + _product_if_read(product, own, part.values, part, head_dim)
        start = stop
    return mixed.astype(dtype).reshape(queries.shape)


def _product_if_read(
    multiply: Callable[..., jax.Array], x: jax.Array, y: jax.Array, part: Part, width: int
) -> Float[Array, "N H G {width}"]:
    """Returns a float32 product with the keys or the values of a part, or zeros."""

    def run(x, y):
        if _is_stacked(y):
            y = lax.dynamic_index_in_dim(y, part.layer, keepdims=False)
        return multiply(x, y, y.dtype.name)

    if part.is_read is None:
        return run(x, y)
    zeros = jnp.zeros((*x.shape[:-1], width))
    with jax.named_scope(part.scope):
        return lax.cond(part.is_read, run, lambda x, y: zeros, x, y)


def take_rows(cache: Cache, rows: Int[Array, "shards n"], *, same_prompts: bool = True) -> Cache:
    """Returns a cache whose rows continue the tokens of `rows` of this one.

    Args:
        cache: a cache of N rows, each shard of the batch with N / shards of them.
        rows: for each shard, the rows to continue, numbered within the shard.
        same_prompts: each row has the prompt of the row that was in its place (as beams of one
            prompt have), so that what belongs to the prompt is not moved. Otherwise the prompts
            move with their rows, and there may be fewer rows than before.
    """

    def take(tree):
        return jax.tree.map(lambda x: sharding.take_rows(x, rows, _row_axis(x)), tree)

    cache = cache._replace(keys=take(cache.keys), values=take(cache.values))
    if same_prompts:
        return cache
    return cache._replace(prompts=take(cache.prompts), starts=take(cache.starts))


def put_prompts(cache: Cache, new: Cache, rows: Int[Array, "shards n"]) -> Cache:
    """Returns a cache in which some rows begin anew, with the prompts of another cache.

    Args:
        cache: a cache with `starts`, the time at which each row began.
        new: an empty cache of the new prompts.
        rows: for each shard of the batch, the rows that begin, numbered within the shard.
    """

    def put(x, y):
        return sharding.put_rows(x, y, rows, _row_axis(x))

    starts = put(cache.starts, jnp.full((rows.size,), cache.time))
    return cache._replace(prompts=jax.tree.map(put, cache.prompts, new.prompts), starts=starts)


def repeat_rows(context: Context, num: int) -> Context:
    """Returns a `Context` with each row repeated `num` times; the copies are neighbours."""
    if num == 1:
        return context
    return jax.tree.map(lambda x: jnp.repeat(x, num, axis=_row_axis(x)), context)


def _is_stacked(x: jax.Array) -> bool:
    """Returns whether keys or values are those of all layers, [L N H T K]."""
    return x.ndim == 5


def _row_axis(x: jax.Array) -> int:
    return 1 if _is_stacked(x) else 0
