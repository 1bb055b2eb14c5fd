"""The loop of every way to decode: one more token of each row, until all rows have ended.

If all rows stayed in the batch, each row would cost as many tokens as the longest one: with answers
of geometrically distributed length, about four tokens for each that counts. So the loop halves the
batch when half of its rows have ended: the rows that go on are gathered into arrays of half the
size, and a loop of that shape takes over. On a mesh each device gathers from its own rows, and all
devices halve together, when the device with the most rows left can. `gkd_jax.models.refill` runs
the same loop on more prompts than rows.

Sampling and beam search give `run` what is theirs: a state, and a function that reads the logits of
one token of each row and returns the next state. A group is what ends together: one row of a
sample, or all beams of a prompt.

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
# For fewer tokens than these, one more loop takes longer to compile than it saves.
_TOKENS_OF_A_LOOP = 32
# With fewer rows than these, a token takes the time of reading the weights, and halving saves none.
_FEWEST_ROWS = 8
Advance = Callable[[Any, Float[Array, "N V"], Int[Array, "#N"]], tuple[Any, Any]]


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
        inputs: prompts, padded on the right.
        input_lengths: the number of tokens of each prompt; a T5 may do without.
        length: the most tokens that will be decoded.
        context: `lm.encode`'s result, where the caller has it already.
        copies: rows of each prompt, which become neighbours.
        in_segments: read the cache as far as it is written; otherwise all of it, at each token.
    """
    if context is None:
        context = lm.encode(config, params, inputs, input_lengths)
    context = kv_cache.repeat_rows(context, copies)
    params = lm.decode_params(config, params)
    if not in_segments:
        config = dataclasses.replace(config, cache_segment=length)
    cache = lm.init_cache(config, params, context, length)
    return Start(params, context.first.astype(jnp.int32), cache)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How rows are decoded.

    `advance` is a function (state, logits, positions) -> (state, parents). `positions` has the
    position of each row's token, or one number for all rows where they began together. Parents are
    rows, as in `kv_cache.take_rows`, whose past each row continues; None leaves the rows where they
    are. A group that has ended must keep its results.
    """

    config: lm.Config
    params: lm.Params  # those that `lm.decode_step` is given
    advance: Advance
    length: int  # the most tokens of a row


def run(decoding: Decoding, state: Any, cache: lm.Cache, *, halves: bool = True) -> Any:
    """Decodes until all groups have ended, and returns the last state.

    The arguments are the first `State`, the cache of its rows, and whether the batch may shrink.
    """
    num_groups, now = state.ended.shape[0], cache.time
    shards = sharding.row_shards(num_groups)
    # If no row ends early, the first loop decodes all tokens (a share of 1 of 1), and the later
    # loops none (0 of 1). `behind` has each larger state with the groups that left it to go on.
    share, behind = (1, 1), []
    for size in halvings(num_groups, shards, decoding.length) if halves else ():
        state, cache = decode_until(
            decoding, state, cache, size, shards=shards, since=now, share=share
        )
        groups, share = going_on(state.ended, shards, size), (0, 1)
        behind.append((state, groups))
        state = take(state, groups)
        rows = rows_of(groups, state.last[0].size)
        cache = kv_cache.take_rows(cache, rows, same_prompts=False)
    state, _ = decode_until(decoding, state, cache, 0, shards=shards, since=now, share=share)
    for larger, groups in reversed(behind):
        state = put(larger, state, groups)
    return state


def decode_until(
    decoding: Decoding,
    state: Any,
    cache: lm.Cache,
    fewest: int,
    *,
    shards: int,
    since: Int[Array, ""],
    share: tuple[int, int],
) -> tuple[Any, lm.Cache]:
    """Decodes until no shard has more than `fewest` groups that go on.

    Args:
        state: the first `State`.
        cache: the cache of its rows.
        fewest: the loop stops as soon as each shard has at most this many groups that go on.
        shards: the devices that the groups are spread over.
        since: the cache's time when these rows began. `length` tokens later the loop stops in any
            case.
        share: how often this loop runs if no row ends early, as in `kv_cache.share_scope`.
    """

    def step(carry):
        state, cache = carry
        positions = kv_cache.row_positions(cache)
        logits, new = lm.decode_step(
            decoding.config, decoding.params, state.last.reshape(-1), cache
        )
        state, parents = decoding.advance(state, logits, positions)
        return state, new if parents is None else kv_cache.take_rows(new, parents)

    def goes_on(carry):
        state, cache = carry
        in_time = cache.time - since < decoding.length
        return in_time & (num_left(state.ended, shards) > fewest)

    with jax.named_scope(kv_cache.share_scope(*share)):
        return lax.while_loop(goes_on, step, (state, cache))


def take(tree: Any, rows: Int[Array, "shards n"]) -> Any:
    """Returns some rows of all arrays of a tree; see `sharding.take_rows`."""
    return jax.tree.map(lambda x: sharding.take_rows(x, rows), tree)


def put(tree: Any, taken: Any, rows: Int[Array, "shards n"]) -> Any:
    """Returns a tree with rows that `take` took written back; see `sharding.put_rows`."""
    return jax.tree.map(lambda x, y: sharding.put_rows(x, y, rows), tree, taken)


def halvings(num_groups: int, shards: int, length: int) -> list[int]:
    """Returns how many groups each shard keeps in each smaller batch, the largest batch first.

    The whole batch has `num_groups` over all shards, whose rows have at most `length` tokens.
    """
    sizes, size = [], num_groups // shards
    most = min(_MAX_HALVINGS, length // _TOKENS_OF_A_LOOP)
    while len(sizes) < most and shards * (size // 2) >= _FEWEST_ROWS:
        size = -(-size // 2)
        sizes.append(size)
    return sizes


def num_left(ended: Bool[Array, " G"], shards: int) -> Int[Array, ""]:
    """Returns the number of groups that have not ended, on the shard that has the most of them."""
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
    """Returns the rows to take (`kv_cache.take_rows`) for beams that continue their parents."""
    num_groups, width = parents.shape
    shards = sharding.row_shards(num_groups)
    firsts = jnp.arange(num_groups // shards)[None, :, None] * width
    rows = firsts + parents.reshape(shards, -1, width)
    return rows.reshape(shards, -1)
