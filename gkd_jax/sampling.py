"""Samples from a model in one jitted program, at a temperature or greedily, with a KV cache.

Every token is drawn from one uniform number, a function of (key, row of the global batch, position)
alone, so that a sample is the same on any mesh, any number of processes and after a resume. The
uniform is inverted through the softmax's cumulative distribution in two levels (block sums, then
inside one block): noise for every vocabulary entry is never generated.

Axes: B batch, S source, T target, V vocabulary.
"""

import dataclasses
import functools
import numbers
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from gkd_jax import sharding
from gkd_jax.models import decode_loop, lm, refill
from gkd_jax.text import settings


_BLOCK = 128  # ids in a block of the cumulative distribution, see `draw`


class SpecialIds(NamedTuple):
    """The ids that decoding treats apart: those never drawn, and those that end a sequence."""

    banned: tuple[int, ...]
    eos: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. The paper samples at temperature 1, without top-k and top-p.

    Attributes:
        temperature: the number that divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens are drawn; 0 is off.
        top_p: only the smallest set of likeliest tokens with this probability is drawn; 1 is off.
        banned_ids: the ids that are never drawn; None is the family's (T5: its pad, 0). In
            training, the family's ids and those without a piece are banned in any case.
        eos_ids: the ids that end a sequence; None is the family's (T5: 1). A decoder-only model has
            none that all tokenizers share, and goes on to the last position.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned_ids: tuple[int, ...] | None = None
    eos_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        settings.check_types(self)
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be an integer of at least 0 (off), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        for name in ("banned_ids", "eos_ids"):
            ids = getattr(self, name)
            if ids is None:
                continue
            if not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in ids):
                raise ValueError(f"{name} must be integers, got {ids!r}")
            # A list would be no static argument of a jitted function.
            object.__setattr__(self, name, tuple(map(int, ids)))
        _check_ids(self.banned_ids or (), self.eos_ids or ())

    def special_ids(self, config: lm.Config) -> SpecialIds:
        """Returns the ids that decoding with a model treats apart, by default the family's.

        Raises:
            ValueError: where no sequence could end.
        """
        if self.eos_ids and not any(0 <= token < config.vocab_size for token in self.eos_ids):
            raise ValueError(
                f"eos_ids must lie in [0, {config.vocab_size}), the model's vocabulary; got "
                f"{self.eos_ids}: no sequence could end"
            )
        banned = lm.banned_ids(config) if self.banned_ids is None else self.banned_ids
        ends = lm.eos_ids(config) if self.eos_ids is None else self.eos_ids
        _check_ids(banned, ends)
        return SpecialIds(banned, ends)


def _check_ids(banned_ids: tuple[int, ...], eos_ids: tuple[int, ...]) -> None:
    if eos_ids and set(eos_ids) <= set(banned_ids):
        raise ValueError(f"banned_ids contains all of eos_ids={eos_ids}: no sequence could end")


class Sample(NamedTuple):
    """What was decoded.

    Attributes:
        tokens: the ids up to and including EOS, then 0. (0 may be an ordinary id: weights tell.)
        weights: 1.0 up to and including EOS, or everywhere where none came, and 0.0 after it.
        log_probs: the log-probability of each token, in nats, under the distribution that it was
            drawn from, with temperature, bans and filters (under greedy decoding, with temperature
            1); 0.0 after EOS.
    """

    tokens: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    log_probs: Float[Array, "B T"]


def banned_tail(config: lm.Config, num_pieces: int) -> tuple[int, ...]:
    """Returns a T5's pad, and the ids of the embedding that no piece of the vocabulary has."""
    return (*lm.banned_ids(config), *range(num_pieces, config.vocab_size))


class _Rows(NamedTuple):
    """The state of decoding: an entry for each row."""

    tokens: Int[Array, "B T"]  # what was drawn so far, as in `Sample`
    log_probs: Float[Array, "B T"]
    uniforms: Float[Array, "B T"]  # in [0, 1); each decides a draw
    limits: Int[Array, " B"]  # the most tokens of each row
    last: Int[Array, " B"]  # the token that the model reads next
    ended: Bool[Array, " B"]  # the row has drawn an EOS or reached its limit


def sample(
    config: lm.Config,
    params: lm.Params,
    inputs: Int[Array, "B S"],
    key: Key[Array, ""] | None = None,
    *,
    max_length: int,
    input_lengths: Int[Array, " B"] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    context: Any | None = None,
    num_samples: int = 1,
    limits: Int[Array, " N"] | None = None,
    plain: bool = False,
    decode_rows: int | None = None,
) -> Sample:
    """Decodes `num_samples` sequences for each row of `inputs`, until all of them have ended.

    Args:
        inputs: prompts, padded on the right.
        key: the key of this step, into which each row folds its place in the global batch; greedy
            decoding needs none.
        max_length: the most tokens to decode, T.
        input_lengths: the number of tokens of each prompt; a T5 may do without.
        sampling: how tokens are drawn.
        context: `lm.encode`'s result, where the caller has it already.
        num_samples: the samples of each prompt, which are neighbours in the result. The prompt is
            read once, or with `decode_rows` once for each sample.
        limits: the most tokens of each sequence; None is `max_length` for all.
        plain: keep all rows in the batch until the last one has ended, and read the whole cache at
            each token. The samples are the same but for rounding. Tests and benchmarks compare the
            faster way with this one.
        decode_rows: the sequences that are decoded at a time, over all devices; None is all. A
            sequence that ends makes place for the next prompt (`gkd_jax.models.refill`), so that
            the KV cache has this many rows. The samples are the same but for rounding.

    Returns:
        B x num_samples rows. No gradient flows out of them: `lax.while_loop` has no reverse mode,
        and the paper's Eq. 4 stops it in any case.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be a positive integer, got {max_length}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples}")
    if key is None and sampling.temperature > 0:
        raise ValueError(f"temperature={sampling.temperature} needs a key; only greedy does not")
    banned_ids, eos_ids = sampling.special_ids(config)
    num_rows = inputs.shape[0] * num_samples
    end = jnp.full((num_rows,), max_length)
    end = end if limits is None else jnp.minimum(limits, end)
    rows = _first_rows(key, end, max_length)
    advance = functools.partial(
        _advance, sampling, allowed_ids(config.vocab_size, banned_ids), eos_ids
    )
    if decode_rows is not None:
        _check_decode_rows(decode_rows, plain, context)
    if decode_rows is not None and decode_rows < num_rows:
        prompts = (inputs, input_lengths)
        prompts = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prompts)
        rows = refill.run(
            config, params, prompts, rows, advance, length=max_length, num_slots=decode_rows
        )
    else:
        started = decode_loop.start(
            config,
            params,
            inputs,
            input_lengths,
            length=max_length,
            context=context,
            copies=num_samples,
            in_segments=not plain,
        )
        decoding = decode_loop.Decoding(config, started.params, advance, max_length)
        rows = rows._replace(last=started.first)
        halves = not plain and (bool(eos_ids) or limits is not None)
        rows = decode_loop.run(decoding, rows, started.cache, halves=halves)
    weights = weights_until_eos(rows.tokens, eos_ids) * (
        jnp.arange(max_length)[None] < end[:, None]
    )
    return Sample(rows.tokens, weights, rows.log_probs)


def _check_decode_rows(decode_rows: int, plain: bool, context: Any | None) -> None:
    shards = sharding.num_shards("batch")
    if decode_rows < 1 or decode_rows % shards:
        raise ValueError(
            "decode_rows must be a positive integer that data x fsdp divides "
            f"({shards} devices), or None, got {decode_rows!r}"
        )
    if plain or context is not None:
        raise ValueError(
            f"decode_rows={decode_rows} reads the prompts when their turn comes: it takes no "
            "context, and there is no plain loop for it"
        )


def _first_rows(key: Key[Array, ""] | None, limits: Int[Array, " B"], length: int) -> _Rows:
    """Returns the state before the first token.

    Its `last` is a placeholder: the caller sets the token that the model reads first.
    """
    empty = jnp.zeros((limits.size, length))
    uniforms = empty  # greedy needs none
    if key is not None:
        uniforms = row_uniforms(key, limits.size, length).T
    tokens = empty.astype(jnp.int32)
    return _Rows(tokens, empty, uniforms, limits, jnp.zeros_like(limits), limits <= 0)


def _advance(
    sampling: SamplingConfig,
    allowed: Bool[np.ndarray, " V"],
    eos_ids: tuple[int, ...],
    rows: _Rows,
    logits: Float[Array, "B V"],
    positions: Int[Array, "#B"],
) -> tuple[_Rows, None]:
    """Draws the next token of each row: the function `decode_loop.Decoding.advance` of sampling.

    Args:
        sampling: how tokens are drawn.
        allowed: a mask of the ids that may be drawn.
        eos_ids: the ids that end a sequence.
        rows: the state of decoding.
        logits: the model's logits of the next token.
        positions: the place of that token in `rows.tokens`, of each row or of all rows together.

    Returns:
        The next state, and None, because each row continues its own past.
    """
    here = jnp.arange(rows.tokens.shape[1])[None] == positions[:, None]
    uniforms = jnp.sum(jnp.where(here, rows.uniforms, 0.0), axis=1)
    tokens, log_probs = _choose(jnp.where(allowed[None], logits, -jnp.inf), uniforms, sampling)
    tokens = jnp.where(rows.ended, 0, tokens)
    log_probs = jnp.where(rows.ended, 0.0, log_probs)
    rows = rows._replace(
        tokens=jnp.where(here, tokens[:, None], rows.tokens),
        log_probs=jnp.where(here, log_probs[:, None], rows.log_probs),
        last=tokens,
        ended=rows.ended | is_eos(tokens, eos_ids) | (positions + 1 >= rows.limits),
    )
    return rows, None


# For calls outside of a jitted function. Inside one, `sample` itself is traced, because what it
# traces depends on the mesh of `sharding.use`, which a cache of traces does not see.
_jitted = jax.jit(
    sample,
    static_argnames=("config", "max_length", "sampling", "num_samples", "plain", "decode_rows"),
)


@functools.wraps(sample)
def jitted_sample(config, params, inputs, key=None, *, input_lengths=None, **settings):
    """Calls `sample`, compiled, after a look at the lengths, whose values no trace sees."""
    inputs = jnp.asarray(inputs)
    lengths = None if input_lengths is None else jnp.asarray(input_lengths)
    lm.check_prompts(inputs, lengths)
    return _jitted(config, params, inputs, key, input_lengths=lengths, **settings)


def _choose(
    logits: Float[Array, "B V"], uniforms: Float[Array, " B"], sampling: SamplingConfig
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns the next token of each row and its log-probability."""
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = filter_logits(logits / sampling.temperature, sampling)
        tokens = draw(logits, uniforms)
    log_probs = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, log_probs - jax.nn.logsumexp(logits, axis=-1)


def is_eos(tokens: Int[Array, "*B"], eos_ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Returns which tokens end a sequence."""
    found = jnp.zeros(tokens.shape, bool)
    for eos_id in eos_ids:
        found = found | (tokens == eos_id)
    return found


def weights_until_eos(tokens: Int[Array, "B T"], eos_ids: tuple[int, ...]) -> Float[Array, "B T"]:
    """Returns 1.0 up to and including the first EOS, 0.0 after it; all 1.0 where none came."""
    eos = is_eos(tokens, eos_ids).astype(jnp.int32)
    return (jnp.cumsum(eos, axis=1) - eos == 0).astype(jnp.float32)


def row_uniforms(
    key: Key[Array, ""], batch_size: int, length: int
) -> Float[Array, "{length} {batch_size}"]:
    """Returns a number in [0, 1) for each position and row: a function of (key, row, position)."""

    def one(row, position):
        of_token = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.uniform(of_token, dtype=jnp.float32)  # under x64, too

    rows, positions = jnp.arange(batch_size), jnp.arange(length)
    return jax.vmap(lambda position: jax.vmap(lambda row: one(row, position))(rows))(positions)


def draw(logits: Float[Array, "B V"], uniforms: Float[Array, " B"]) -> Int[Array, " B"]:
    """Returns the token whose interval of the cumulative softmax each uniform falls into.

    A token of probability 0 is never drawn. Uniforms have 23 bits: tokens rarer than about 1e-7
    are drawn with that resolution.
    """
    batch_size, vocab_size = logits.shape
    blocks = -(-vocab_size // _BLOCK)
    padding = ((0, 0), (0, blocks * _BLOCK - vocab_size))
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, padding).reshape(batch_size, blocks, _BLOCK)
    block_sums = jnp.sum(mass, axis=-1)
    cumulative = jnp.cumsum(block_sums, axis=-1)
    threshold = uniforms * cumulative[:, -1]
    block = _first_above(cumulative, block_sums, threshold)
    # Each row takes from its own entries. Told so, the compiler leaves rows on their devices.
    before = jnp.take_along_axis(cumulative - block_sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    index = _first_above(jnp.cumsum(inside, axis=-1), inside, threshold - before)
    return (block * _BLOCK + index).astype(jnp.int32)


def _first_above(
    cumulative: Float[Array, "B N"], mass: Float[Array, "B N"], threshold: Float[Array, " B"]
) -> Int[Array, " B"]:
    """Returns the first entry with mass > 0 whose cumulative sum exceeds the threshold.

    Where rounding puts the threshold at or above the total, it is the last entry that has mass.
    """
    has_mass = mass > 0
    hit = has_mass & (cumulative > threshold[:, None])
    last = mass.shape[1] - 1 - jnp.argmax(has_mass[:, ::-1], axis=1)
    return jnp.where(jnp.any(hit, axis=1), jnp.argmax(hit, axis=1), last)


def filter_logits(logits: Float[Array, "B V"], sampling: SamplingConfig) -> Float[Array, "B V"]:
    """Returns the logits with -inf for what top-k, then top-p, leaves out.

    Of equally likely tokens at the border the lower ids stay, so that top-k keeps exactly k and
    top-p the smallest set.
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        largest = lax.top_k(logits, sampling.top_k)[0]
        count = jnp.full(logits.shape[:1], sampling.top_k)
        logits = jnp.where(_likeliest(logits, largest, count), logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token is kept if all likelier ones together have less than top_p. The first always is.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        count = jnp.sum(kept, axis=-1)
        logits = jnp.where(_likeliest(logits, ordered, count), logits, -jnp.inf)
    return logits


def _likeliest(
    logits: Float[Array, "B V"], ordered: Float[Array, "B N"], count: Int[Array, " B"]
) -> Bool[Array, "B V"]:
    """Returns a mask of each row's `count` largest logits.

    `ordered` has at least these logits, the largest first.
    """
    least = jnp.take_along_axis(ordered, jnp.maximum(count - 1, 0)[:, None], axis=1)
    above, tied = logits > least, logits == least
    room = count - jnp.sum(above, axis=-1)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room[:, None]))


def allowed_ids(vocab_size: int, banned_ids: tuple[int, ...]) -> Bool[np.ndarray, " V"]:
    """Returns a mask of the ids that may be decoded.

    Raises:
        ValueError: naming the ids that the vocabulary does not have.
    """
    allowed = np.ones(vocab_size, bool)
    out_of_range = [i for i in banned_ids if not 0 <= i < vocab_size]
    if out_of_range:
        raise ValueError(
            f"banned_ids must lie in [0, {vocab_size}), the model's vocabulary; got {out_of_range}"
        )
    allowed[list(banned_ids)] = False
    return allowed
