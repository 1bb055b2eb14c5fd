"""The model family T5 1.0 and 1.1, as plain functions of (config, parameters, arrays).

The module implements the functions of `gkd_jax.models.lm`, which describes their arguments.
Parameters are a nested dict with T5X's names. The layers of each stack are stacked on axis 0 and
run by `lax.scan`, so that compile time does not grow with depth. The state of decoding is an
explicit `kv_cache.Cache`, which `decode_step` takes and returns.

T5 is from Raffel et al. (2020), "Exploring the Limits of Transfer Learning", and the MLP of T5 1.1
from Shazeer (2020), "GLU Variants Improve Transformer".

Axes: B batch, S source, T target, V vocabulary, D model, H heads, K head dim, F mlp, L layers.
"""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gkd_jax.batch import Batch
from gkd_jax.models import embedding, kv_cache, quantized, stacks, t5_config, t5_layers
from gkd_jax.models.attention import Padding
from gkd_jax.models.kv_cache import Cache
from gkd_jax.models.parameters import Params
from gkd_jax.models.t5_config import T5Config


from_fields = t5_config.from_fields
t5_1_0, t5_1_1 = t5_config.t5_1_0, t5_config.t5_1_1  # as gin files name them

PAD_ID = 0
START_ID = 0  # the decoder's first input
# The defaults of sampling.
BANNED_IDS = (PAD_ID,)
EOS_IDS = (1,)


class Context(NamedTuple):
    """The encoder's states and padding mask, and the decoder's first input."""

    states: Float[Array, "B S D"]
    mask: Bool[Array, "B S"]
    first: Int[Array, " B"]


class Prompts(NamedTuple):
    """What the rows of a `Cache` know of their prompts: what cross-attention reads.

    The keys and values of all layers are stacked on axis 0, or tuples with one array for each layer
    where the layers are a tuple too (see `stacks.unstack`).
    """

    keys: Float[Array, "L B H S K"] | tuple[Float[Array, "B H S K"], ...]
    values: Float[Array, "L B H S K"] | tuple[Float[Array, "B H S K"], ...]
    mask: Bool[Array, "B S"]


# Initialisation -----------------------------------------------------------------------------------


# Flax traces the forward pass to find a layer's parameters, so shapes and values share one trace.
@jax.jit(static_argnums=0)
def init(config: T5Config, key: Key[Array, ""]) -> Params:
    """Returns random float32 parameters with the distributions of T5X's initialisation."""
    keys = iter(jax.random.split(key, 6))
    embeddings = jax.random.normal(next(keys), (config.vocab_size, config.d_model))
    params: Params = {
        "token_embedder": {"embedding": embeddings},
        "encoder": _init_stack(config, next(keys), t5_layers.EncoderLayer(config), "encoder"),
        "decoder": _init_stack(config, next(keys), t5_layers.DecoderLayer(config), "decoder"),
    }
    if not config.tie_embeddings:
        kernel = t5_layers.fan_in_truncated(next(keys), (config.d_model, config.vocab_size))
        params["decoder"]["logits_dense"] = {"kernel": kernel}
    return params


def _init_stack(config: T5Config, key: Key[Array, ""], layer: nn.Module, name: str) -> Params:
    num_layers = config.num_encoder_layers if name == "encoder" else config.num_decoder_layers
    x, padding = jnp.zeros((1, 1, config.d_model)), Padding(jnp.zeros((1, 1, 1, 1)))
    # A bias that the layers share is an input of each layer. Its values affect no parameter.
    bias = None if config.per_layer_relpos else jnp.zeros((1, config.num_heads, 1, 1))
    args = (x, bias, padding) if name == "encoder" else (x, x, bias, padding)

    def init_layer(layer_key):
        return layer.init(layer_key, *args)["params"]

    layer_key, bias_key = jax.random.split(key)
    stack: Params = {"layers": jax.vmap(init_layer)(jax.random.split(layer_key, num_layers))}
    if not config.per_layer_relpos:
        stack["relpos_bias"] = _relpos(config, name).init(bias_key, 1, 1)["params"]
    stack[f"{name}_norm"] = {"scale": jnp.ones((config.d_model,))}
    return stack


# The forward pass ---------------------------------------------------------------------------------


def encode(
    config: T5Config,
    params: Params,
    inputs: Int[Array, "B S"],
    input_lengths: Int[Array, " B"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Context:
    """Runs the encoder and returns the decoder's context; without lengths, id 0 is padding."""
    stack, layer = params["encoder"], t5_layers.EncoderLayer(config)
    if input_lengths is None:
        mask = inputs != PAD_ID
    else:
        mask = jnp.arange(inputs.shape[1])[None] < input_lengths[:, None]
    padding = t5_layers.hide_padding(mask, input_lengths)
    position_bias = _position_bias(config, stack, "encoder", *inputs.shape)

    def run_layer(x, layer_params, key):
        return _apply(layer, layer_params, x, position_bias, padding, key=key), None

    keys = stacks.split_key(dropout_key, 3)
    x = _dropout(config, embedding.embed(config, params, inputs), keys[0])
    x, _ = stacks.scan(config, run_layer, x, stack["layers"], dropout_key=keys[1])
    x = _norm(config, stack["encoder_norm"], x)
    first = jnp.full((inputs.shape[0],), START_ID, jnp.int32)
    return Context(_dropout(config, x, keys[2]), mask, first)


def hidden(
    config: T5Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """Returns the decoder's last hidden states; position t sees id 0 and the targets before t."""
    keys = stacks.split_key(dropout_key, 4)
    if context is None:
        context = encode(config, params, batch.inputs, batch.input_lengths, dropout_key=keys[3])
    context = kv_cache.repeat_rows(context, batch.targets.shape[0] // context.states.shape[0])
    encoded = context.states
    stack, layer = params["decoder"], t5_layers.DecoderLayer(config)
    padding = t5_layers.hide_padding(context.mask)
    position_bias = _position_bias(config, stack, "decoder", *batch.targets.shape)

    def run_layer(x, layer_params, key):
        return _apply(layer, layer_params, x, encoded, position_bias, padding, key=key), None

    x = embedding.embed(config, params, shift_right(batch.targets))
    x = _dropout(config, x, keys[0])
    x, _ = stacks.scan(config, run_layer, x, stack["layers"], dropout_key=keys[1])
    x = _norm(config, stack["decoder_norm"], x)
    return _dropout(config, x, keys[2])


def logits(
    config: T5Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "B T V"]:
    """Returns teacher-forced float32 logits; those at position t predict `batch.targets[:, t]`."""
    states = hidden(config, params, batch, context=context, dropout_key=dropout_key)
    return apply_head(config, params, states)


def apply_head(
    config: T5Config, params: Params, states: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Returns the float32 logits of hidden states."""
    if config.scale_logits:
        states = states * config.d_model**-0.5
    return embedding.apply_head(config, params, states)


def shift_right(targets: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the decoder's inputs: the start token, then all targets but the last."""
    return jnp.pad(targets, ((0, 0), (1, 0)), constant_values=START_ID)[:, :-1]


# Decoding -----------------------------------------------------------------------------------------


def init_cache(config: T5Config, params: Params, context: Context, length: int) -> Cache:
    """Returns a cache before the first token, for at most T = `length` tokens of each row.

    Its `bias` [P, H, 2 T] is the position bias of keys by their age, from T - 1 down to 0, twice.
    P is L if each layer has a bias of its own, and else 1.
    """
    stack, layer = params["decoder"], t5_layers.DecoderLayer(config)

    def project(layer_params):
        return _apply(layer, layer_params, context.states, method="cross_keys_values")

    def layer_bias(layer_params):
        return _apply(layer, layer_params, length, method="bias_by_age")[0]

    layers = stack["layers"]
    one_by_one = isinstance(layers, tuple)
    if one_by_one:
        keys, values = zip(*map(project, layers), strict=True)
    else:
        keys, values = lax.map(project, layers)
    shape = (context.states.shape[0], config.num_heads, length, config.head_dim)
    if not config.per_layer_relpos:
        bias = _apply(_relpos(config, "decoder"), stack["relpos_bias"], length, 1)[..., 0]
    elif one_by_one:
        bias = jnp.stack([*map(layer_bias, layers)])
    else:
        bias = jax.vmap(layer_bias)(layers)
    bias = jnp.tile(bias[..., ::-1], (1, 1, 2))
    return kv_cache.empty(config, layers, shape, Prompts(keys, values, context.mask), bias)


def decode_step(
    config: T5Config, params: Params, tokens: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Feeds one token of each row; returns the logits of the next token, and the new cache."""
    layer = t5_layers.DecoderLayer(config)
    padding = t5_layers.hide_padding(cache.prompts.mask)
    length = cache.bias.shape[-1] // 2
    of_place_0 = length - 1 - cache.time % length
    bias = lax.dynamic_slice_in_dim(cache.bias, of_place_0, length, axis=2)[:, :, None]
    own = kv_cache.ages(cache, length)[None] <= kv_cache.row_positions(cache)[:, None]
    own_bias = t5_layers.hide_padding(own).bias
    stack = params["decoder"]

    def run_layer(x, own_cache, layer_params, cross_keys, cross_values):
        layer_index = 0 if bias.shape[0] == 1 else own_cache.layer
        self_bias = lax.dynamic_index_in_dim(bias, layer_index) + own_bias
        encoded = t5_layers.Encoded(cross_keys, cross_values, padding)
        return _apply(layer, layer_params, x, own_cache, self_bias, encoded, method="decode")

    x = embedding.embed(config, params, tokens[:, None])
    cross = (cache.prompts.keys, cache.prompts.values)
    x, cache = stacks.decode(config, run_layer, x, cache, stack["layers"], *cross)
    x = _norm(config, stack["decoder_norm"], x)
    return apply_head(config, params, x[:, 0]), cache


# Parts --------------------------------------------------------------------------------------------


def _position_bias(
    config: T5Config, stack: Params, name: str, num_rows: int, length: int
) -> Float[Array, "G H T T"] | None:
    """Returns the position bias that all layers of a stack share; None if each has its own."""
    if config.per_layer_relpos:
        return None
    return _apply(_relpos(config, name), stack["relpos_bias"], length, length, num_rows)


def _relpos(config: T5Config, name: str) -> t5_layers.RelativePositionBias:
    return t5_layers.RelativePositionBias(config, bidirectional=name == "encoder")


def _apply(
    module: nn.Module,
    params: Params,
    *args: Any,
    key: Key[Array, ""] | None = None,
    method: str | None = None,
) -> Any:
    """Calls `module.apply` on restored parameters; without a key, no dropout drops anything.

    The result has the type Any, because Flax's own type allows for mutated variables in it.
    """
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": quantized.restore(params)}, *args, rngs=rngs, method=method)


def _norm(config: T5Config, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return _apply(t5_layers.RMSNorm(config), params, x)


def _dropout(
    config: T5Config, x: Float[Array, "B T D"], key: Key[Array, ""] | None
) -> Float[Array, "B T D"]:
    return _apply(t5_layers.Dropout(config.dropout_rate), {}, x, key=key)
