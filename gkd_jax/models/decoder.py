"""The family of decoder-only models (Llama, Qwen, Gemma), as plain functions of (config, params).

The module implements the functions of `gkd_jax.models.lm`, which describes their arguments. All
models are one network with the switches of `DecoderConfig`. Parameters are a nested dict with T5X's
names. The layers are stacked on axis 0 and run by `lax.scan`; windows and kinds of rotary
embeddings are arrays over the layers, so that patterns of local and global layers need no
unrolling.

Prompts are padded on the right, and the first target of a row has position `input_lengths[row]`.
The `Context` of a prompt is its KV cache, which all continuations of the prompt share.

Axes: B prompts, N rows (N = B x samples a prompt), S prompt, T target, V vocabulary, D model, H
heads, G key heads, K head dim, L layers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gkd_jax.batch import Batch
from gkd_jax.models import (
    decoder_block,
    decoder_config,
    embedding,
    kv_cache,
    quantized,
    rope,
    stacks,
)
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.grouped_attention import NOWHERE, Sight, masked_scores
from gkd_jax.models.kv_cache import Cache
from gkd_jax.models.parameters import Params
from gkd_jax.sharding import ACTIVATIONS, constrain


from_fields = decoder_config.from_fields
_INIT_STD = 0.02
# Sampling has no default ids here, because every tokenizer has its own.
BANNED_IDS: tuple[int, ...] = ()
EOS_IDS: tuple[int, ...] = ()


class Context(NamedTuple):
    """The KV cache of a prompt without its last token, which decoding feeds first."""

    keys: Float[Array, "L B G S K"]
    values: Float[Array, "L B G S K"]
    lengths: Int[Array, " B"]  # tokens in the cache; also the position of `first`
    first: Int[Array, " B"]  # the last token of the prompt


class Prompts(NamedTuple):
    """What the rows of a `Cache` know of their prompts: the fields of `Context` but `first`.

    The keys and values are tuples with one array for each layer where the layers are a tuple too
    (see `stacks.unstack`).
    """

    keys: Float[Array, "L N G S K"] | tuple[Float[Array, "N G S K"], ...]
    values: Float[Array, "L N G S K"] | tuple[Float[Array, "N G S K"], ...]
    lengths: Int[Array, " N"]


# Parameters ---------------------------------------------------------------------------------------


@jax.jit(static_argnums=0)
def init(config: DecoderConfig, key: Key[Array, ""]) -> Params:
    """Returns random, normally distributed float32 parameters.

    The variance of kernels is 1 / fan-in, and the standard deviation of embeddings 0.02.
    """
    keys = iter(jax.random.split(key, 9))
    width, inner = config.d_model, config.num_heads * config.head_dim
    inner_kv = config.num_kv_heads * config.head_dim
    depth = config.num_layers

    def linear(rows: int, columns: int, bias: bool, shrink: float = 1.0) -> Params:
        shape = (depth, rows, columns)
        spread = shrink / math.sqrt(rows)
        found: Params = {"kernel": spread * jax.random.normal(next(keys), shape)}
        return {**found, "bias": jnp.zeros((depth, columns))} if bias else found

    def norm(*shape: int) -> Params:
        return {"scale": (jnp.zeros if config.unit_offset else jnp.ones)(shape)}

    # The two maps that add to the residual stream are scaled down, so that the variance of the
    # stream does not grow with the number of layers.
    shrink = 1 / math.sqrt(2 * depth)
    attention = {
        "query": linear(width, inner, config.qkv_bias),
        "key": linear(width, inner_kv, config.qkv_bias),
        "value": linear(width, inner_kv, config.qkv_bias),
        "out": linear(inner, width, config.out_bias, shrink),
    }
    if config.qk_norm:
        attention |= {name: norm(depth, config.head_dim) for name in ("query_norm", "key_norm")}
    stack: Params = {
        "pre_self_attention_layer_norm": norm(depth, width),
        "self_attention": attention,
        "pre_mlp_layer_norm": norm(depth, width),
        "mlp": {
            "wi_0": linear(width, config.d_ff, config.mlp_bias),
            "wi_1": linear(width, config.d_ff, config.mlp_bias),
            "wo": linear(config.d_ff, width, config.mlp_bias, shrink),
        },
    }
    if config.post_norms:
        for name in ("post_self_attention_layer_norm", "post_mlp_layer_norm"):
            stack[name] = norm(depth, width)
    embeddings = _INIT_STD * jax.random.normal(next(keys), (config.vocab_size, width))
    params: Params = {
        "token_embedder": {"embedding": embeddings},
        "decoder": {"layers": stack, "decoder_norm": norm(width)},
    }
    if not config.tie_embeddings:
        kernel = jax.random.normal(next(keys), (width, config.vocab_size)) / math.sqrt(width)
        params["decoder"]["logits_dense"] = {"kernel": kernel}
    return params


# The forward pass ---------------------------------------------------------------------------------


def encode(
    config: DecoderConfig,
    params: Params,
    inputs: Int[Array, "B S"],
    input_lengths: Int[Array, " B"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Context:
    """Reads prompts, padded with any id, in one pass and returns their KV cache as a `Context`.

    Raises:
        ValueError: without lengths, because id 0 is an ordinary token and does not mark padding.
    """
    lengths = _lengths(input_lengths)
    positions = jnp.arange(inputs.shape[1])[None]
    _, (keys, values) = _run(config, params, inputs, positions, None, dropout_key)
    held = jnp.maximum(lengths - 1, 0)
    first = jnp.take_along_axis(inputs, held[:, None], axis=1)[:, 0]
    return Context(keys, values, held, first)


def hidden(
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "N T D"]:
    """Returns the last hidden states that predict each target, for `apply_head`."""
    rows, length = batch.targets.shape
    # With one target for each prompt, a single pass reads both. Otherwise the prompts are read
    # first, and their targets continue from the context.
    if context is None and rows == batch.inputs.shape[0]:
        lengths = _lengths(batch.input_lengths)
        tokens = _joined(batch.inputs, lengths, batch.targets)
        positions = jnp.arange(tokens.shape[1])[None]
        states, _ = _run(config, params, tokens, positions, None, dropout_key)
        wanted = jnp.maximum(lengths - 1, 0)[:, None] + jnp.arange(length)[None]
        states = jnp.take_along_axis(states, wanted[..., None], axis=1)
    else:
        if context is None:
            context = encode(
                config, params, batch.inputs, batch.input_lengths, dropout_key=dropout_key
            )
        context = kv_cache.repeat_rows(context, rows // context.first.shape[0])
        tokens = jnp.concatenate([context.first[:, None], batch.targets[:, :-1]], axis=1)
        positions = context.lengths[:, None] + jnp.arange(length)[None]
        states, _ = _run(config, params, tokens, positions, context, dropout_key)
    states = decoder_block.norm(config, params["decoder"]["decoder_norm"], states)
    return constrain(states, ACTIVATIONS)


def apply_head(
    config: DecoderConfig, params: Params, states: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Returns the float32 logits of hidden states."""
    return embedding.apply_head(config, params, states, softcap=config.final_softcap)


def _lengths(input_lengths: Int[Array, " B"] | None) -> Int[Array, " B"]:
    if input_lengths is None:
        raise ValueError(
            "a decoder-only model needs input_lengths, the tokens of each prompt: id 0 is an "
            "ordinary token, so that padding cannot be told from text"
        )
    return jnp.asarray(input_lengths)


def _joined(
    inputs: Int[Array, "B S"], lengths: Int[Array, " B"], targets: Int[Array, "B T"]
) -> Int[Array, "B S+T"]:
    """Returns each prompt with its targets right after the prompt's last token.

    The positions after the targets repeat the last target; no earlier position sees them.
    """
    place = jnp.arange(inputs.shape[1] + targets.shape[1])[None]
    after = jnp.clip(place - lengths[:, None], 0, targets.shape[1] - 1)
    padded = jnp.pad(inputs, ((0, 0), (0, targets.shape[1])))
    # Prompts of bytes may go with targets of larger ids: the result has the larger of both dtypes.
    return jnp.where(place < lengths[:, None], padded, jnp.take_along_axis(targets, after, axis=1))


# Decoding -----------------------------------------------------------------------------------------


def init_cache(config: DecoderConfig, params: Params, context: Context, length: int) -> Cache:
    """Returns a cache with the keys and values of a context and space for T = `length` tokens."""
    layers, keys, values = params["decoder"]["layers"], context.keys, context.values
    if isinstance(layers, tuple):
        keys, values = tuple(keys), tuple(values)
    shape = (context.first.shape[0], config.num_kv_heads, length, config.head_dim)
    return kv_cache.empty(config, layers, shape, Prompts(keys, values, context.lengths))


def decode_step(
    config: DecoderConfig, params: Params, tokens: Int[Array, " N"], cache: Cache
) -> tuple[Float[Array, "N V"], Cache]:
    """Feeds one token of each row; returns the logits of the next token, and the new cache."""
    in_text = cache.prompts.lengths + kv_cache.row_positions(cache)
    rotations = rope.rotations(config, in_text[:, None])
    windows, kinds = decoder_block.per_layer(config)

    def run_layer(x, before, layer, window, kind, prompt_keys, prompt_values):
        layer, window = quantized.restore(layer), jnp.asarray(window)
        query, key, value = decoder_block.heads(config, layer, x, rotations, kind)
        after = kv_cache.write(before, key, value)
        own = kv_cache.parts(after, window)
        seen = _seen(cache, prompt_keys.shape[2], sum(part.keys.shape[-2] for part in own), window)

        def score(products):
            scale, softcap = config.score_scale, config.attention_softcap
            return masked_scores(products, seen, scale=scale, softcap=softcap)

        mixed = kv_cache.attend(query, [kv_cache.Part(prompt_keys, prompt_values), *own], score)
        return decoder_block.rest(config, layer, x, mixed, None), after

    x, cache = stacks.decode(
        config,
        run_layer,
        decoder_block.embed(config, params, tokens[:, None]),
        cache,
        params["decoder"]["layers"],
        windows,
        kinds,
        cache.prompts.keys,
        cache.prompts.values,
    )
    x = decoder_block.norm(config, params["decoder"]["decoder_norm"], x)
    return apply_head(config, params, x[:, 0]), cache


def _seen(
    cache: Cache, prompt_size: int, own_size: int, window: Int[Array, ""]
) -> Bool[Array, "N S"]:
    """Returns a mask of the keys that the token of this step sees: the prompt's, then its own."""
    lengths, position = cache.prompts.lengths[:, None], kv_cache.row_positions(cache)[:, None]
    query, age = lengths + position, kv_cache.ages(cache, own_size)[None]
    prompt = jnp.arange(prompt_size)[None]
    # A key of padding, of a token to come or of another row is put where no query sees it.
    prompt = jnp.where(prompt < lengths, prompt, NOWHERE)
    own = jnp.where(age <= position, query - age, NOWHERE)
    keys = jnp.concatenate([prompt, own], axis=1)
    return (keys <= query) & (keys > query - window)


def _run(
    config: DecoderConfig,
    params: Params,
    tokens: Int[Array, "N T"],
    positions: Int[Array, "#N T"],
    context: Context | None,
    dropout_key: Key[Array, ""] | None,
) -> tuple[Float[Array, "N T D"], tuple[jax.Array, jax.Array]]:
    """Runs all layers over tokens that may continue a context.

    Returns:
        The hidden states before the last norm, and the keys and values of these tokens in each
        layer, stacked.
    """
    rotations = rope.rotations(config, positions)
    windows, kinds = decoder_block.per_layer(config)
    seen = positions
    past = None
    if context is not None:
        past = (context.keys, context.values)
        place = jnp.arange(context.keys.shape[3])[None]
        # Entries of the cache after the tokens of a prompt are padding, which no query may see.
        held = jnp.where(place < context.lengths[:, None], place, NOWHERE)
        seen = jnp.concatenate([held, positions], axis=1)
    keys = stacks.split_key(dropout_key, 2)

    def run_layer(x, layer, window, kind, past, key):
        layer = quantized.restore(layer)
        query, own_keys, own_values = decoder_block.heads(config, layer, x, rotations, kind)
        all_keys, all_values = own_keys, own_values
        if past is not None:
            all_keys = jnp.concatenate([past[0], own_keys], axis=2)
            all_values = jnp.concatenate([past[1], own_values], axis=2)
        mixed = decoder_block.attend(
            config, query, all_keys, all_values, Sight(positions, seen, window), past is None
        )
        return decoder_block.rest(config, layer, x, mixed, key), (own_keys, own_values)

    x = decoder_block.dropout(config, decoder_block.embed(config, params, tokens), keys[0])
    return stacks.scan(
        config, run_layer, x, params["decoder"]["layers"], windows, kinds, past, dropout_key=keys[1]
    )
