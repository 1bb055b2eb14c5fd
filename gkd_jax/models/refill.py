"""Decodes more prompts than the KV cache has rows: a row that has ended takes the next prompt.

The rows of the cache are slots. Each slot holds one row of the batch at a time. Whenever enough
slots are free, one pass reads as many waiting prompts, which begin in these slots while the others
go on. When no prompt waits any more, `decode_loop.run` decodes what is left, in fewer and fewer
rows.

All slots share one time, so that a token is still written with one slice of the cache; a slot's
position is the time since its row began (see `kv_cache`). On a mesh each device has slots and
waiting prompts of its own: its rows of the batch. All devices refill together, when the one with
the fewest free slots can.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gkd_jax import sharding
from gkd_jax.models import decode_loop, kv_cache, lm


_SHARE = 8  # of the slots, one in so many is refilled at once: fewer free slots, or fewer passes


def run(
    config: lm.Config,
    params: lm.Params,
    prompts: tuple[Int[Array, "B S"], Int[Array, " B"] | None],
    state: Any,
    advance: decode_loop.Advance,
    *,
    length: int,
    num_slots: int,
) -> Any:
    """Decodes until all rows have ended, `num_slots` at a time, and returns the last state.

    Args:
        prompts: the prompt of each row, padded on the right, and the number of its tokens, which a
            T5 may do without.
        state: the first `decode_loop.State` of all rows, except for the tokens to feed. Each row
            must end after at most `length` tokens.
        advance: as in `decode_loop.Decoding`, without parents.
        length: the most tokens of a row.
        num_slots: the rows of the cache, fewer than those of the batch.
    """
    num_rows = state.ended.shape[0]
    shards = sharding.row_shards(num_rows)
    rows, slots = num_rows // shards, num_slots // shards  # of a shard
    size = max(1, slots // _SHARE)
    refills = -(-(rows - slots) // size)

    def pad(x, value=0):
        """Gives each shard rows for the last refill, which have ended before they begin."""
        x = x.reshape(shards, rows, *x.shape[1:])
        ends = [(0, 0), (0, slots + refills * size - rows), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, ends, constant_values=value).reshape(-1, *x.shape[2:])

    prompts, whole = jax.tree.map(pad, (prompts, state))
    whole = whole._replace(ended=pad(state.ended, True))
    config = dataclasses.replace(config, cache_segment=length)  # any place may be in use
    places = _same(shards, jnp.arange(slots))
    started = decode_loop.start(config, params, *decode_loop.take(prompts, places), length=length)
    decoding = decode_loop.Decoding(config, started.params, advance, length)

    def refill(index, carry):
        whole, current, cache, places = carry
        current, cache = decode_loop.decode_until(
            decoding,
            current,
            cache,
            slots - size,
            shards=shards,
            since=cache.time,
            share=(size, slots),
        )
        free = decode_loop.going_on(current.ended, shards, slots)[:, slots - size :]
        waiting = _same(shards, slots + index * size + jnp.arange(size))
        done = decode_loop.take(places, free).reshape(shards, size)
        whole = decode_loop.put(whole, decode_loop.take(current, free), done)
        context = lm.encode(config, params, *decode_loop.take(prompts, waiting))
        new = lm.init_cache(config, started.params, context, length)
        cache = kv_cache.put_prompts(cache, new, free)
        next_rows = decode_loop.take(whole, waiting)._replace(last=context.first.astype(jnp.int32))
        current = decode_loop.put(current, next_rows, free)
        return whole, current, cache, decode_loop.put(places, waiting.reshape(-1), free)

    current = decode_loop.take(whole, places)._replace(last=started.first)
    cache = started.cache._replace(starts=jnp.zeros((num_slots,), jnp.int32))
    carry = (whole, current, cache, places.reshape(-1))
    whole, current, cache, places = lax.fori_loop(0, refills, refill, carry)
    current = decode_loop.run(decoding, current, cache)
    whole = decode_loop.put(whole, current, places.reshape(shards, slots))
    return decode_loop.take(whole, _same(shards, jnp.arange(rows)))


def _same(shards: int, rows: Int[Array, " n"]) -> Int[Array, "{shards} n"]:
    """Returns the same rows of each shard."""
    return jnp.broadcast_to(rows[None], (shards, rows.size)).astype(jnp.int32)
