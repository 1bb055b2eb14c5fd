"""Beam search with the scores of T5X's: log-probability over a length penalty.

A finished sequence of n tokens (EOS included) scores log Q(y | x) / ((5 + n) / 6)^alpha (Wu et al.,
2016). The search ends early when no live beam can still beat the worst finished one. The paper's
WMT evaluation uses 4 beams and alpha 0.6, as Raffel et al. (2020).

Axes: B batch, S source, T target, V vocabulary, W beams.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax.models import decode_loop, lm
from gkd_jax.sampling import SamplingConfig, allowed_ids, is_eos


EMPTY = -1e7  # the score of a beam that holds nothing


class Beams(NamedTuple):
    """The best sequences of each row, best first.

    Attributes:
        tokens: up to and including EOS, then 0.
        scores: log-probability over the length penalty; nats. Where no beam has ended, those of the
            live ones, without a penalty. A slot that holds nothing scores `EMPTY`.
    """

    tokens: Int[Array, "B W T"]
    scores: Float[Array, "B W"]


class _Search(NamedTuple):
    live: Int[Array, "B W T"]
    live_log_probs: Float[Array, "B W"]
    finished: Int[Array, "B W T"]
    finished_scores: Float[Array, "B W"]
    last: Int[Array, "B W"]
    ended: Bool[Array, " B"]  # no live beam can still beat the worst finished one


def beam_search(
    config: lm.Config,
    params: lm.Params,
    inputs: Int[Array, "B S"],
    *,
    max_length: int,
    input_lengths: Int[Array, " B"] | None = None,
    num_beams: int = 4,
    alpha: float = 0.6,
    banned_ids: tuple[int, ...] | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> Beams:
    """Returns the likeliest sequences that were found for each row of `inputs`.

    Args:
        inputs: the ids of the prompts, padded on the right.
        max_length: the most tokens to decode, T.
        input_lengths: the number of tokens of each row of `inputs`; a T5 may do without.
        num_beams: the number of sequences that are followed at once, W.
        alpha: the exponent of the length penalty; 0 is no penalty.
        banned_ids: the ids that are never chosen; None takes the family's.
        eos_ids: the ids that end a sequence; None takes the family's.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be positive, got {num_beams}")
    banned, ends = SamplingConfig(banned_ids=banned_ids, eos_ids=eos_ids).special_ids(config)
    allowed = allowed_ids(config.vocab_size, banned)
    started = decode_loop.start(
        config, params, inputs, input_lengths, length=max_length, copies=num_beams
    )
    # As many more than the beams as can end here: W of the candidates live on.
    num_candidates = min((1 + len(ends)) * num_beams, num_beams * config.vocab_size)
    best_penalty = length_penalty(max_length + 1, alpha)

    def advance(search: _Search, logits: Float[Array, "N V"], positions: Int[Array, " 1"]):
        rows, position = len(search.live), positions[0]  # all beams began together
        log_probs = jax.nn.log_softmax(jnp.where(allowed[None], logits, -jnp.inf))
        total = log_probs.reshape(rows, num_beams, -1) + search.live_log_probs[..., None]
        candidates, flat = lax.top_k(total.reshape(rows, -1), num_candidates)
        parents, tokens = flat // config.vocab_size, flat % config.vocab_size
        sequences = jnp.take_along_axis(search.live, parents[..., None], axis=1)
        sequences = lax.dynamic_update_index_in_dim(sequences, tokens, position, 2)
        penalty = length_penalty(position + 1, alpha)
        new, parents = _keep_best(
            search, candidates, sequences, tokens, parents, is_eos(tokens, ends), penalty
        )
        worst, best_live = jnp.min(new.finished_scores, axis=1), new.live_log_probs[:, 0]
        # Each beam goes on with its parent's past; a prompt's beams share what they attend to.
        return new._replace(ended=worst > best_live / best_penalty), decode_loop.beams(parents)

    first = started.first.reshape(-1, num_beams)
    decoding = decode_loop.Decoding(config, started.params, advance, max_length)
    search = decode_loop.run(decoding, _start(first, max_length), started.cache)
    any_finished = jnp.any(search.finished_scores > EMPTY, axis=1)[:, None]
    return Beams(
        tokens=jnp.where(any_finished[..., None], search.finished, search.live),
        scores=jnp.where(any_finished, search.finished_scores, search.live_log_probs),
    )


def _start(first: Int[Array, "B W"], max_length: int) -> _Search:
    empty = jnp.zeros((*first.shape, max_length), jnp.int32)
    return _Search(
        live=empty,
        # One beam to start from: equal ones would be W copies of one search.
        live_log_probs=jnp.full(first.shape, EMPTY).at[:, 0].set(0.0),
        finished=empty,
        finished_scores=jnp.full(first.shape, EMPTY),
        last=first,
        ended=jnp.zeros(first.shape[:1], bool),
    )


def length_penalty(length: Any, alpha: float) -> Any:
    """Returns ((5 + length) / 6)^alpha, which divides the log-probability of a sequence."""
    return ((5.0 + length) / 6.0) ** alpha


def _keep_best(
    search: _Search,
    candidates: Float[Array, "B C"],
    sequences: Int[Array, "B C T"],
    tokens: Int[Array, "B C"],
    parents: Int[Array, "B C"],
    ended: Bool[Array, "B C"],
    penalty: Float[Array, ""],
) -> tuple[_Search, Int[Array, "B W"]]:
    """Returns the search with its W best candidates and W best ended sequences, and the parents.

    The field `ended` keeps its value.
    """
    num_beams = search.live.shape[1]
    live_log_probs, chosen = lax.top_k(jnp.where(ended, EMPTY, candidates), num_beams)
    scores = candidates / penalty
    pool = jnp.concatenate([search.finished_scores, jnp.where(ended, scores, EMPTY)], axis=1)
    finished_scores, best = lax.top_k(pool, num_beams)
    pool_sequences = jnp.concatenate([search.finished, sequences], axis=1)
    kept = _Search(
        live=jnp.take_along_axis(sequences, chosen[..., None], axis=1),
        live_log_probs=live_log_probs,
        finished=jnp.take_along_axis(pool_sequences, best[..., None], axis=1),
        finished_scores=finished_scores,
        last=jnp.take_along_axis(tokens, chosen, axis=1),
        ended=search.ended,
    )
    return kept, jnp.take_along_axis(parents, chosen, axis=1)
