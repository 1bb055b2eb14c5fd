"""Greedy decoding with a calculator (Cobbe et al., 2021) that writes the result after `48 / 2 =`.

The model decodes with the same KV cache as in `sampling`. When the text of a row ends in an
arithmetic expression and an equals sign, the tokens of the correct result replace the model's next
tokens, and the model continues from them. The host reads the text after every token and waits for
the device each time, so this way of decoding is for evaluation only.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Int
import numpy as np

from gkd_jax import sharding
from gkd_jax.models import decode_loop, kv_cache, lm
from gkd_jax.sampling import SamplingConfig, allowed_ids
from gkd_jax.text import calculator


Decode = Callable[..., Int[np.ndarray, "B T"]]


def make_decode(
    config: lm.Config,
    vocabulary: Any,
    *,
    mesh: Mesh,
    max_length: int,
    banned_ids: tuple[int, ...] | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> Decode:
    """Returns a function (params, inputs, input_lengths=None) -> tokens [B T].

    The tokens of a row end with EOS, and 0 follows.

    Args:
        vocabulary: the vocabulary that turns tokens into text, and results into tokens.
        max_length: the largest number of tokens to decode, T.
        banned_ids: ids that are never decoded; None takes those of the model family.
        eos_ids: the ids that end a sequence; None takes those of the model family.
    """
    banned, ends = SamplingConfig(banned_ids=banned_ids, eos_ids=eos_ids).special_ids(config)
    allowed = allowed_ids(config.vocab_size, banned)

    def start(params, inputs, input_lengths):
        with sharding.use(mesh):
            return decode_loop.start(config, params, inputs, input_lengths, length=max_length)

    def step(params, last, cache):
        with sharding.use(mesh):
            logits, cache = lm.decode_step(config, params, last, cache)
        best = jnp.argmax(jnp.where(allowed[None], logits, -jnp.inf), axis=-1).astype(jnp.int32)
        # The tokens are replicated: every process reads all rows and writes the same results.
        return jax.lax.with_sharding_constraint(best, sharding.replicated(mesh)), cache

    def take_rows(cache, rows):
        with sharding.use(mesh):
            return kv_cache.take_rows(cache, rows, same_prompts=False)

    start_fn, step_fn = jax.jit(start), jax.jit(step, donate_argnums=2)
    take_rows_fn = jax.jit(take_rows)

    def decode(params, inputs, input_lengths=None):
        params, last, cache = start_fn(params, inputs, input_lengths)
        rows = [_Row(vocabulary, ends) for _ in range(inputs.shape[0])]
        with sharding.use(mesh):
            shards = sharding.row_shards(len(rows))
        smaller, going_on = decode_loop.halvings(len(rows), shards, max_length), rows
        for _ in range(max_length):
            best, cache = step_fn(params, last, cache)
            tokens = zip(going_on, np.asarray(best), strict=True)
            last = np.array([row.take(int(token)) for row, token in tokens], np.int32)
            ended = np.array([row.ended for row in going_on])
            if ended.all():
                break
            num_left = np.max(np.sum(~ended.reshape(shards, -1), axis=1))
            while smaller and num_left <= smaller[0]:
                kept = decode_loop.going_on(jnp.asarray(ended), shards, smaller.pop(0))
                kept = np.asarray(kept)  # numbers of rows within each shard
                cache = take_rows_fn(cache, kept)
                kept = (kept + np.arange(shards)[:, None] * (len(going_on) // shards)).ravel()
                going_on, last, ended = [going_on[i] for i in kept], last[kept], ended[kept]
        tokens = np.zeros((len(rows), max_length), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = row.tokens
        return tokens

    return decode


class _Row:
    """One sequence that is being decoded, with the calculator's tokens that are to follow."""

    def __init__(self, vocabulary: Any, eos_ids: tuple[int, ...]):
        self.tokens: list[int] = []
        self.ended = False
        self._forced: deque[int] = deque()
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids

    def take(self, token: int) -> int:
        """Appends the calculator's next token, or else the model's, and returns that token."""
        if self.ended:
            return 0
        if self._forced:
            token = self._forced.popleft()
        self.tokens.append(token)
        self.ended = token in self._eos_ids
        if "=" in self._vocabulary.decode([token]):
            self._forced.extend(self._result())
        return token

    def _result(self) -> list[int]:
        """Returns the tokens of the result that the text asks for.

        There are none if the text asks for no result, or if the vocabulary cannot write it.
        """
        result = calculator.pending_result(self._vocabulary.decode(self.tokens))
        if result is None:
            return []
        pieces = self._vocabulary.encode(f" {result}")
        return list(pieces) if self._vocabulary.decode(pieces).strip() == result else []
