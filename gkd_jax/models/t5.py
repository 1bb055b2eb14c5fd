"""T5 1.0 and 1.1 as plain functions of (config, parameters, arrays).

Parameters are a nested dict with T5X's names, the layers of each stack stacked on axis 0 and run by
`lax.scan`, so that compile time does not grow with depth. Decoding keeps its state in an explicit
`Cache` that goes in and comes out.

Raffel et al. (2020), "Exploring the Limits of Transfer Learning"; T5 1.1: Shazeer (2020), "GLU
Variants Improve Transformer".

Axes: B batch, S source, T target, V vocabulary, D model, H heads, K head dim, F mlp, L layers.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gkd_jax.batch import Batch
from gkd_jax.models import layers
from gkd_jax.models.t5_config import T5Config, t5_1_0, t5_1_1
from gkd_jax.sharding import constrain


__all__ = ["Cache", "Encoded", "Params", "T5Config", "t5_1_0", "t5_1_1"]

Params = dict[str, Any]
PAD_ID = 0  # also the decoder's start token


class Encoded(NamedTuple):
    """What the decoder attends to."""

    states: Float[Array, "B S D"]
    mask: Bool[Array, "B S"]


class Cache(NamedTuple):
    """The state of decoding. Position t of the self-attention arrays is written at step t."""

    self_keys: Float[Array, "L B H T K"]
    self_values: Float[Array, "L B H T K"]
    cross_keys: Float[Array, "L B H S K"]
    cross_values: Float[Array, "L B H S K"]
    bias: Float[Array, "P H T T"]  # causal mask + position bias; P = L if per layer, else 1
    position: Int[Array, ""]


# Initialisation -----------------------------------------------------------------------------------


def init(config: T5Config, key: Key[Array, ""]) -> Params:
    """Random float32 parameters, distributed as T5X initialises them."""
    keys = iter(jax.random.split(key, 6))
    embedding = jax.random.normal(next(keys), (config.vocab_size, config.d_model))
    params: Params = {
        "token_embedder": {"embedding": embedding},
        "encoder": _init_stack(config, next(keys), _encoder_layer(config), "encoder"),
        "decoder": _init_stack(config, next(keys), _decoder_layer(config), "decoder"),
    }
    if not config.tie_embeddings:
        kernel = layers.fan_in_truncated(next(keys), (config.d_model, config.vocab_size))
        params["decoder"]["logits_dense"] = {"kernel": kernel}
    return params


def _init_stack(config: T5Config, key: Key[Array, ""], layer: nn.Module, name: str) -> Params:
    num_layers = config.num_encoder_layers if name == "encoder" else config.num_decoder_layers
    x = jnp.zeros((1, 1, config.d_model))
    # The stack's shared bias is an input of the layer here; only its shape matters.
    bias = None if config.per_layer_relpos else jnp.zeros((1, config.num_heads, 1, 1))
    mask = jnp.zeros((1, 1, 1, 1))
    args = (x, bias, mask) if name == "encoder" else (x, x, bias, mask)

    def init_layer(layer_key):
        return layer.init(layer_key, *args, deterministic=True)["params"]

    layer_key, bias_key = jax.random.split(key)
    stack: Params = {"layers": jax.vmap(init_layer)(jax.random.split(layer_key, num_layers))}
    if not config.per_layer_relpos:
        variables = _relpos(config, name).init(bias_key, 1, 1)
        stack["relpos_bias"] = variables["params"]
    stack[f"{name}_norm"] = {"scale": jnp.ones((config.d_model,))}
    return stack


def abstract_params(config: T5Config, dtype: str = "float32") -> Params:
    """The shapes of `init`, as `jax.ShapeDtypeStruct`s of `dtype`; allocates nothing."""
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


_LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "query": ("embed", "joined_kv"),
    "key": ("embed", "joined_kv"),
    "value": ("embed", "joined_kv"),
    "out": ("joined_kv", "embed"),
    "wi": ("embed", "mlp"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "scale": ("embed",),
    "rel_embedding": ("heads", "relpos_buckets"),
    "logits_dense": ("embed", "vocab"),
}


def logical_axes(params: Params) -> Params:
    """The tree of `params` with T5X's logical axis names at each leaf."""

    def axes(path, _):
        names = [entry.key for entry in path]
        name = names[-2] if names[-1] == "kernel" else names[-1]
        return (("layers",) if "layers" in names else ()) + _LOGICAL_AXES[name]

    return jax.tree_util.tree_map_with_path(axes, params)


def num_params(params: Params) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# The forward pass ---------------------------------------------------------------------------------


def encode(
    config: T5Config,
    params: Params,
    inputs: Int[Array, "B S"],
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Encoded:
    """Runs the encoder; input id 0 is padding. Dropout only where a key is given."""
    stack, layer = params["encoder"], _encoder_layer(config)
    mask = inputs != PAD_ID
    mask_bias = layers.padding_bias(mask)
    position_bias = None
    if not config.per_layer_relpos:
        position_bias = _apply(
            _relpos(config, "encoder"), stack["relpos_bias"], inputs.shape[1], inputs.shape[1]
        )

    def run_layer(x, layer_params, key):
        return _apply(
            layer,
            layer_params,
            x,
            position_bias,
            mask_bias,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )

    keys = _split(dropout_key, 3)
    x = _dropout(config, _embed(config, params, inputs), keys[0])
    x = _run_stack(config, run_layer, x, stack["layers"], keys[1])
    x = _norm(config, stack["encoder_norm"], x)
    return Encoded(_dropout(config, x, keys[2]), mask)


def repeat(encoded: Encoded, num: int) -> Encoded:
    """Each row `num` times, as neighbours; the encoder's work is shared between them."""
    return encoded if num == 1 else Encoded(*(jnp.repeat(x, num, axis=0) for x in encoded))


def hidden(
    config: T5Config,
    params: Params,
    batch: Batch,
    *,
    encoded: Encoded | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """The decoder's last hidden states for teacher-forced targets, ready for the head.

    Args:
        config: the model's sizes.
        params: its parameters.
        batch: position t sees targets < t; the first sees the start token, id 0. There may be n
            rows of targets for each of inputs, as neighbours: the encoder runs once.
        encoded: `encode`'s result where the caller has it already.
        dropout_key: turns dropout on.
    """
    keys = _split(dropout_key, 4)
    if encoded is None:
        encoded = encode(config, params, batch.inputs, dropout_key=keys[3])
    encoded = repeat(encoded, batch.targets.shape[0] // encoded.states.shape[0])
    stack, layer = params["decoder"], _decoder_layer(config)
    cross_bias = layers.padding_bias(encoded.mask)
    position_bias = None
    if not config.per_layer_relpos:
        length = batch.targets.shape[1]
        position_bias = _apply(_relpos(config, "decoder"), stack["relpos_bias"], length, length)

    def run_layer(x, layer_params, key):
        return _apply(
            layer,
            layer_params,
            x,
            encoded.states,
            position_bias,
            cross_bias,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )

    x = _embed(config, params, shift_right(batch.targets))
    x = _dropout(config, x, keys[0])
    x = _run_stack(config, run_layer, x, stack["layers"], keys[1])
    x = _norm(config, stack["decoder_norm"], x)
    return _dropout(config, x, keys[2])


def logits(
    config: T5Config,
    params: Params,
    batch: Batch,
    *,
    encoded: Encoded | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T V"]:
    """Teacher-forced logits, float32: those at t predict `batch.targets[:, t]`."""
    states = hidden(config, params, batch, encoded=encoded, dropout_key=dropout_key)
    return apply_head(config, params, states)


def apply_head(
    config: T5Config, params: Params, states: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Hidden states to float32 logits."""
    if config.scale_logits:
        states = states * config.d_model**-0.5
    out = layers.project(states, head_kernel(config, params), config.dtype)
    if out.ndim == 3:
        out = constrain(out, ("batch", "length", "vocab"))
    return out


def head_kernel(config: T5Config, params: Params) -> Float[Array, "D V"]:
    """The output projection: the transposed embedding where the two are tied."""
    if config.tie_embeddings:
        return params["token_embedder"]["embedding"].T
    return params["decoder"]["logits_dense"]["kernel"]


def shift_right(targets: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Decoder inputs: the start token, then all targets but the last."""
    return jnp.pad(targets, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1]


# Decoding -----------------------------------------------------------------------------------------


def init_cache(config: T5Config, params: Params, encoded: Encoded, length: int) -> Cache:
    """Everything that does not depend on the tokens to come, computed once a sequence.

    Args:
        config: the model's sizes.
        params: its parameters.
        encoded: what to attend to; its keys and values are projected here for all layers.
        length: the most tokens that will be decoded, T.
    """
    stack, layer = params["decoder"], _decoder_layer(config)

    def project(layer_params):
        return _apply(layer, layer_params, encoded.states, method="cross_keys_values")

    cross_keys, cross_values = jax.lax.map(project, stack["layers"])
    if config.per_layer_relpos:

        def layer_bias(layer_params):
            return _apply(layer, layer_params, length, method="position_bias")[0]

        bias = jax.vmap(layer_bias)(stack["layers"])
    else:
        bias = _apply(_relpos(config, "decoder"), stack["relpos_bias"], length, length)
    shape = (config.num_decoder_layers, encoded.states.shape[0], config.num_heads, length)
    empty = jnp.zeros((*shape, config.head_dim), config.dtype)
    empty = constrain(empty, ("layers", "batch", "heads", "length", "kv"))
    bias = bias + layers.causal_bias(length)
    return Cache(empty, empty, cross_keys, cross_values, bias, jnp.zeros((), jnp.int32))


def decode_step(
    config: T5Config, params: Params, encoded: Encoded, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after one more token of each row (first the start token, id 0), and the new cache."""
    layer = _decoder_layer(config)
    cross_bias = layers.padding_bias(encoded.mask)
    position = cache.position
    bias = lax.dynamic_slice_in_dim(cache.bias, position, 1, axis=2)

    def run_layer(carry, layer_inputs):
        # The self-attention cache is carried whole and updated in place, one token a layer.
        x, self_keys, self_values = carry
        layer_params, cross_keys, cross_values, index = layer_inputs
        x, keys, values = _apply(
            layer,
            layer_params,
            x,
            lax.dynamic_index_in_dim(self_keys, index, keepdims=False),
            lax.dynamic_index_in_dim(self_values, index, keepdims=False),
            position,
            lax.dynamic_index_in_dim(bias, jnp.minimum(index, bias.shape[0] - 1)),
            cross_keys,
            cross_values,
            cross_bias,
            method="decode",
        )
        return (
            x,
            lax.dynamic_update_index_in_dim(self_keys, keys, index, 0),
            lax.dynamic_update_index_in_dim(self_values, values, index, 0),
        ), None

    stack = params["decoder"]
    x = _embed(config, params, tokens[:, None])
    (x, self_keys, self_values), _ = lax.scan(
        run_layer,
        (x, cache.self_keys, cache.self_values),
        (
            stack["layers"],
            cache.cross_keys,
            cache.cross_values,
            jnp.arange(config.num_decoder_layers),
        ),
        unroll=min(config.scan_unroll, config.num_decoder_layers),
    )
    x = _norm(config, stack["decoder_norm"], x)
    step_logits = apply_head(config, params, x[:, 0])
    return step_logits, cache._replace(
        self_keys=self_keys, self_values=self_values, position=position + 1
    )


# Parts --------------------------------------------------------------------------------------------


def _embed(config: T5Config, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    embedding = params["token_embedder"]["embedding"]
    x = jnp.take(embedding, tokens, axis=0).astype(config.dtype)
    return constrain(x, layers.ACTIVATIONS)


def _run_stack(
    config: T5Config,
    run_layer: Callable[..., Float[Array, "B T D"]],
    x: Float[Array, "B T D"],
    stacked: Params,
    key: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    if config.remat:
        run_layer = jax.checkpoint(run_layer, prevent_cse=False)

    def body(carry, layer_inputs):
        layer_params, layer_key = layer_inputs
        return run_layer(carry, layer_params, layer_key), None

    keys = None if key is None else jax.random.split(key, num_layers)
    x, _ = lax.scan(body, x, (stacked, keys), unroll=min(config.scan_unroll, num_layers))
    return x


def _apply(module: nn.Module, params: Params, *args: Any, **options: Any) -> Any:
    """`module.apply`, whose result Flax types as anything with or without mutated variables."""
    return module.apply({"params": params}, *args, **options)


def _norm(config: T5Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    norm = layers.RMSNorm(config.layer_norm_epsilon, config.dtype)
    return _apply(norm, params, x)


def _dropout(
    config: T5Config, x: Float[Array, "B T D"], key: Key[Array, ""] | None
) -> Float[Array, "B T D"]:
    if key is None or config.dropout_rate == 0:
        return x
    dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
    return _apply(dropout, {}, x, deterministic=False, rngs={"dropout": key})


def _split(key: Key[Array, ""] | None, num: int) -> list[Any]:
    return [None] * num if key is None else list(jax.random.split(key, num))


def _relpos(config: T5Config, stack: str) -> layers.RelativePositionBias:
    return layers.RelativePositionBias(
        num_heads=config.num_heads,
        buckets=config.relpos_buckets,
        max_distance=config.relpos_max_distance,
        bidirectional=stack == "encoder",
    )


def _attention(config: T5Config) -> layers.Attention:
    return layers.Attention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        d_model=config.d_model,
        dropout_rate=config.dropout_rate,
        dtype=config.dtype,
    )


def _block(config: T5Config, stack: str) -> dict[str, Any]:
    mlp = layers.MLP(
        d_ff=config.d_ff,
        d_model=config.d_model,
        activations=config.mlp_activations,
        dropout_rate=config.dropout_rate,
        dtype=config.dtype,
    )
    return {
        "mlp": mlp,
        "pre_mlp_layer_norm": layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        "dropout": nn.Dropout(config.dropout_rate, broadcast_dims=(-2,)),
        "relpos_bias": _relpos(config, stack) if config.per_layer_relpos else None,
    }


def _encoder_layer(config: T5Config) -> layers.EncoderLayer:
    return layers.EncoderLayer(
        attention=_attention(config),
        pre_attention_layer_norm=layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        **_block(config, "encoder"),
    )


def _decoder_layer(config: T5Config) -> layers.DecoderLayer:
    return layers.DecoderLayer(
        self_attention=_attention(config),
        encoder_decoder_attention=_attention(config),
        pre_self_attention_layer_norm=layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        pre_cross_attention_layer_norm=layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        **_block(config, "decoder"),
    )
