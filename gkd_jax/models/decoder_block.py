"""The parts of a decoder-only model's layer, as plain functions of (config, parameters, arrays).

`gkd_jax.models.decoder` composes them into passes over whole texts, over targets after a prompt,
and over one token of each row. Norms and biases round at the same points as in Hugging Face's
transformers.

Axes: N rows, T tokens, D model, H query heads, G key heads, K head dim, L layers.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np

from gkd_jax.models import embedding, grouped_attention, rope, splash, stacks
from gkd_jax.models.attention import gains_by_row
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.grouped_attention import NO_WINDOW, Sight
from gkd_jax.models.parameters import Params
from gkd_jax.models.products import project
from gkd_jax.sharding import ACTIVATIONS, constrain, num_shards


def attend(
    config: DecoderConfig,
    query: Float[Array, "N H T K"],
    keys: Float[Array, "N G S K"],
    values: Float[Array, "N G S K"],
    sight: Sight,
    is_causal: bool,
) -> Float[Array, "N H T K"]:
    """Returns the output of the attention heads; on TPUs, `splash` computes it where it can.

    Where the key heads do not divide over the devices of the mesh axis `tensor`, they are repeated
    for each query head, so that each device holds the keys of its own query heads.

    Args:
        query, keys, values: arrays of the compute dtype.
        sight: the positions of queries and keys, and the layer's window.
        is_causal: query t sees the keys up to t, but for the windows of `config`.
    """
    scoring = {"scale": config.score_scale, "softcap": config.attention_softcap}
    if config.num_kv_heads % num_shards("heads"):
        group = config.num_heads // config.num_kv_heads
        keys, values = (
            constrain(jnp.repeat(x, group, axis=1), ("batch", "heads", "length", "kv"))
            for x in (keys, values)
        )
    if is_causal and splash.serves(query, keys):
        windows = per_layer(config)[0].tolist()
        return splash.attend(query, keys, values, sight.window, windows, **scoring)
    return grouped_attention.attend(
        query,
        keys,
        values,
        sight,
        **scoring,
        by_row=config.attention_by_row and gains_by_row(query, keys),
        is_causal=is_causal and not any(config.windows),
    )


def heads(
    config: DecoderConfig,
    layer: Params,
    x: Float[Array, "N T D"],
    rotations: rope.Rotation,
    kind: Int[Array, ""] | np.integer,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the queries [N H T K], and the keys and values [N G T K], of a layer's input.

    Queries and keys are normalised (where `config.qk_norm` is set) and rotated by their positions.
    Of the rotations, those of index `kind` are the layer's.
    """
    attention, x = layer["self_attention"], norm(config, layer["pre_self_attention_layer_norm"], x)
    rotation = rope.select(rotations, kind)

    def split(name: str, num: int) -> jax.Array:
        y = _linear(config, attention[name], x)
        y = y.reshape(*y.shape[:2], num, config.head_dim).swapaxes(1, 2)
        # Key heads that do not divide over the devices are not sharded.
        is_sharded = name == "query" or num % num_shards("heads") == 0
        return constrain(y, ("batch", "heads" if is_sharded else None, "length", "kv"))

    query = split("query", config.num_heads)
    key, value = (split(name, config.num_kv_heads) for name in ("key", "value"))
    if config.qk_norm:
        query = norm(config, attention["query_norm"], query)
        key = norm(config, attention["key_norm"], key)
    return rope.rotate(query, rotation), rope.rotate(key, rotation), value


def rest(
    config: DecoderConfig,
    layer: Params,
    x: Float[Array, "N T D"],
    mixed: Float[Array, "N H T K"],
    key: Key[Array, ""] | None,
) -> Float[Array, "N T D"]:
    """Runs the rest of a layer, from the output of the attention heads to the layer's output.

    Args:
        x: the input of the layer, to which the outputs of attention and MLP are added.
        mixed: the output of the attention heads.
        key: the key of dropout; None turns dropout off.
    """
    keys = stacks.split_key(key, 2)
    mixed = mixed.swapaxes(1, 2).reshape(*x.shape[:2], config.num_heads * config.head_dim)
    y = _linear(config, layer["self_attention"]["out"], mixed)
    if config.post_norms:
        y = norm(config, layer["post_self_attention_layer_norm"], y)
    x = constrain(x + dropout(config, y, keys[0]), ACTIVATIONS)
    y = _mlp(config, layer["mlp"], norm(config, layer["pre_mlp_layer_norm"], x))
    if config.post_norms:
        y = norm(config, layer["post_mlp_layer_norm"], y)
    return constrain(x + dropout(config, y, keys[1]), ACTIVATIONS)


def _mlp(config: DecoderConfig, mlp: Params, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
    gate = _linear(config, mlp["wi_0"], x).astype(jnp.float32)
    if config.activation == "silu":
        gate = jax.nn.silu(gate)
    else:
        gate = jax.nn.gelu(gate, approximate=config.activation == "gelu_tanh")
    wide = gate.astype(config.dtype) * _linear(config, mlp["wi_1"], x)
    return _linear(config, mlp["wo"], constrain(wide, ("batch", "length", "mlp")))


def _linear(config: DecoderConfig, linear: Params, x: Float[Array, "*B D"]) -> jax.Array:
    """Returns x @ kernel + bias, rounded to the compute dtype once, after the bias."""
    out = project(x, linear["kernel"], config.dtype)
    if "bias" in linear:
        out = out + linear["bias"].astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
    return out.astype(config.dtype)


def norm(config: DecoderConfig, own: Params, x: Float[Array, "..."]) -> jax.Array:
    """Returns the RMS norm over the last axis.

    Gemma's kind (`unit_offset`) rounds to the compute dtype after the scale, and the other kind
    before it.
    """
    scale = own["scale"].reshape((1,) * (x.ndim - 1) + (-1,))
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(
        jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.layer_norm_epsilon
    )
    if config.unit_offset:
        return (wide * (1 + scale.astype(jnp.float32))).astype(config.dtype)
    return wide.astype(config.dtype) * scale.astype(config.dtype)


def embed(
    config: DecoderConfig, params: Params, tokens: Int[Array, "N T"]
) -> Float[Array, "N T D"]:
    """Returns the embeddings of tokens in the compute dtype."""
    scale = math.sqrt(config.d_model) if config.scale_embedding else None
    return embedding.embed(config, params, tokens, scale=scale)


def dropout(config: DecoderConfig, x: jax.Array, key: Key[Array, ""] | None) -> jax.Array:
    """Drops features of x; like T5, all positions of a row share one draw."""
    if key is None or config.dropout_rate == 0:
        return x
    keep = 1 - config.dropout_rate
    kept = jax.random.bernoulli(key, keep, (x.shape[0], 1, x.shape[2]))
    return jnp.where(kept, x / keep, jnp.zeros_like(x))


def per_layer(config: DecoderConfig) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]:
    """Returns the window of each layer and the index of its kind of rotary embeddings."""
    windows = config.windows or (0,) * config.num_layers
    kinds = config.rope_of_layer or (0,) * config.num_layers
    return (
        np.asarray([window or NO_WINDOW for window in windows], np.int32),
        np.asarray(kinds, np.int32),
    )
