"""The loop of every way to decode: one more token of each row, until all rows have ended.

If all rows stayed in the batch, the batch would cost its longest row: with answers of geometric
lengths, four tokens for each that counts. So the loop halves the batch when half of its rows have
ended: the rows that go on are gathered into arrays of half the size, and a loop of that shape takes
over. On a mesh each device gathers from its own rows, and all devices halve together, when the
device with the most rows left can.

Sampling and beam search give `run` what is theirs: a state, and a function that reads the logits of
one position and returns the next state. A group is what ends together: one row of a sample, or all
beams of a prompt.

Axes: N rows, G groups, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax import sharding
from gkd_jax.models import kv_cache, lm


_MAX_HALVINGS = 3  # each is one more loop to compile
_TOKENS_OF_A_LOOP = 32  # of fewer tokens, a loop takes longer to compile than a run gains
_FEWEST_ROWS = 8  # of a batch; below, a token costs the reading of the weights, not the rows


class State(Protocol):
    """What `run` reads of a state: a NamedTuple of arrays whose first axis has the groups."""

    last: Int[Array, "G ..."]  # the tokens to feed next; further axes: rows of a group
    ended: Bool[Array, " G"]


class Start(NamedTuple):
    """What decoding begins with."""

    params: lm.Params
    first: Int[Array, " N"]
    cache: lm.Cache


def start(
    config: lm.Config,
    params: lm.Params,
    inputs: Int[Array, "B S"],
    input_lengths: Int[Array, " B"] | None,
    *,
    length: int,
    context: lm.Context | None = None,
    copies: int = 1,
    in_segments: bool = True,
) -> Start:
    """Reads the prompts.

    Args:
        config: the model's config.
        params: the model's parameters.
        inputs: prompts, padded on the right.
        input_lengths: the number of tokens of each prompt; a T5 may do without.
        length: the most tokens that will be decoded.
        context: `lm.encode`'s result, where the caller has it already.
        copies: rows of each prompt, which become neighbours.
        in_segments: read the cache as far as it is written; otherwise all of it, at each token.
    """
    if context is None:
        context = lm.encode(config, params, inputs, input_lengths)
    context = lm.repeat(config, context, copies)
    params = lm.decode_params(config, params)
    if not in_segments:
        config = dataclasses.replace(config, cache_segment=length)
    cache = lm.init_cache(config, params, context, length)
    return Start(params, context.first.astype(jnp.int32), cache)


def run(
    config: lm.Config,
    started: Start,
    state: Any,
    advance: Callable[[Any, Float[Array, "N V"], Int[Array, ""]], tuple[Any, Any]],
    *,
    length: int,
    halves: bool = True,
) -> Any:
    """Decodes until all groups have ended, at most `length` tokens, and returns the last state.

    Args:
        config: the model's config.
        started: `start`'s result.
        state: the first `State`.
        advance: a function (state, logits, position) -> (state, parents). Parents are rows, as in
            `lm.take_rows`, whose past each row continues; None leaves the rows where they are. A
            group that has ended must keep its results.
        length: the most tokens of a row.
        halves: whether the batch may shrink.
    """
    cache, num_groups = started.cache, state.ended.shape[0]
    shards = num_shards(num_groups)

    def step(carry):
        state, cache = carry
        logits, new = lm.decode_step(config, started.params, state.last.reshape(-1), cache)
        state, parents = advance(state, logits, cache.position)
        return state, new if parents is None else lm.take_rows(config, new, parents)

    def loop(carry, fewest: int):
        def goes_on(carry):
            state, cache = carry
            return (cache.position < length) & (num_left(state.ended, shards) > fewest)

        # Where no row ends early, the first loop runs to the last token, and the others never.
        is_first = carry[0].ended.shape[0] == num_groups
        with jax.named_scope(kv_cache.times(int(is_first), 1)):
            return lax.while_loop(goes_on, step, carry)

    smaller = halvings(num_groups, shards, length) if halves else ()
    behind = []
    for size in smaller:
        state, cache = loop((state, cache), size)
        groups = going_on(state.ended, shards, size)
        behind.append((state, groups))
        state = jax.tree.map(lambda x, g=groups: sharding.take_rows(x, g), state)
        rows = rows_of(groups, state.last[0].size)
        cache = lm.take_rows(config, cache, rows, same_prompts=False)
    state, _ = loop((state, cache), 0)
    for larger, groups in reversed(behind):
        state = jax.tree.map(lambda x, y, g=groups: sharding.put_rows(x, y, g), larger, state)
    return state


def num_shards(num_groups: int) -> int:
    """Returns the number of devices that a batch is spread over, 1 where they do not divide it."""
    shards = sharding.num_batch_shards()
    return shards if num_groups % shards == 0 else 1


def halvings(num_groups: int, shards: int, length: int) -> list[int]:
    """Returns the groups a shard of each smaller batch, largest first.

    Args:
        num_groups: the groups of the whole batch.
        shards: the devices that the batch is spread over.
        length: the most tokens of a row.
    """
    sizes, size = [], num_groups // shards
    most = min(_MAX_HALVINGS, length // _TOKENS_OF_A_LOOP)
    while len(sizes) < most and size > 1 and shards * (size // 2) >= _FEWEST_ROWS:
        size = -(-size // 2)
        sizes.append(size)
    return sizes


def num_left(ended: Bool[Array, " G"], shards: int) -> Int[Array, ""]:
    """Returns the most groups of one shard that go on."""
    return jnp.max(jnp.sum(~ended.reshape(shards, -1), axis=1))


def going_on(ended: Bool[Array, " G"], shards: int, size: int) -> Int[Array, "{shards} {size}"]:
    """Returns for each shard `size` of its groups: those that go on, then some that have ended."""
    order = jnp.argsort(ended.reshape(shards, -1), axis=1, stable=True)
    return order[:, :size].astype(jnp.int32)


def rows_of(groups: Int[Array, "shards n"], width: int) -> Int[Array, "shards n*{width}"]:
    """Returns the rows of groups of `width` rows each."""
    rows = groups[:, :, None] * width + jnp.arange(width)[None, None]
    return rows.reshape(groups.shape[0], -1)


def beams(parents: Int[Array, "G W"]) -> Int[Array, "shards n"]:
    """Returns the rows of `lm.take_rows` for beams that continue parents within their groups."""
    num_groups, width = parents.shape
    shards = num_shards(num_groups)
    firsts = jnp.arange(num_groups // shards)[None, :, None] * width
    rows = firsts + parents.reshape(shards, -1, width)
    return rows.reshape(shards, -1)
