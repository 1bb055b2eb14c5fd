"""Runs a model's layers, whose parameters are stacked on axis 0: over whole texts, or in decoding.

Over whole texts the layers are scanned, so that compile time does not grow with depth. Decoding
scans them too, or runs them one by one where a config says so (`unstack`).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gkd_jax.models import parameters
from gkd_jax.models.execution import ExecutionSettings
from gkd_jax.models.kv_cache import Cache, LayerCache
from gkd_jax.models.parameters import Params


def scan(
    config: ExecutionSettings,
    run_layer: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    stacked: Params,
    *per_layer: Any,
    dropout_key: Key[Array, ""] | None,
) -> tuple[jax.Array, Any]:
    """Runs whole texts through all layers.

    Args:
        run_layer: a function (x, layer, *per_layer, key) -> (x, outputs) of one layer.
        x: the input of the first layer.
        stacked: the parameters of the layers.
        per_layer: further arguments of each layer, stacked on axis 0; None stays None.
        dropout_key: the key that is split between the layers; None turns dropout off.

    Returns:
        The output of the last layer, and the stacked outputs of all layers.
    """
    num_layers = parameters.num_layers(stacked)
    keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)
    if config.remat:
        run_layer = jax.checkpoint(run_layer, prevent_cse=False)

    def body(x, layer_inputs):
        layer, *others = layer_inputs
        if config.layers_on_host:
            layer = jax.device_put(layer, jax.memory.Space.Device)
        return run_layer(x, layer, *others)

    unroll = min(config.scan_unroll, num_layers)
    return lax.scan(body, x, (stacked, *per_layer, keys), unroll=unroll)


def unstack(config: ExecutionSettings, stacked: Params) -> Params | tuple[Params, ...]:
    """Returns the layers as decoding runs them: a tuple where it is unrolled, else stacked.

    In an unrolled loop, slices of a stack would be copied for every token.
    """
    num_layers = parameters.num_layers(stacked)
    if not config.unroll_decoding and config.scan_unroll < num_layers:
        return stacked
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers))


def decode(
    config: ExecutionSettings,
    run_layer: Callable[..., tuple[jax.Array, LayerCache]],
    x: jax.Array,
    cache: Cache,
    layers: Params | tuple[Params, ...],
    *per_layer: Any,
) -> tuple[jax.Array, Cache]:
    """Runs one token of each row through all layers.

    Args:
        run_layer: a function (x, layer_cache, layer, *per_layer) -> (x, layer_cache) of one layer.
        x: the input of the first layer.
        cache: the cache before this token.
        layers: the result of `unstack`.
        per_layer: further arguments of each layer, stacked on axis 0; tuples where the layers are.

    Returns:
        The output of the last layer, and the cache after this token.
    """
    time = cache.time
    keys: Any = cache.keys
    values: Any = cache.values
    if isinstance(layers, tuple):
        keys, values = [*keys], [*values]
        for i, (layer, *own) in enumerate(zip(layers, *per_layer, strict=True)):
            x, after = run_layer(x, LayerCache(keys[i], values[i], time, i), layer, *own)
            keys[i], values[i] = after.keys, after.values
        keys, values = tuple(keys), tuple(values)
    else:

        def body(carry, layer_inputs):
            x, keys, values = carry
            index, layer, *own = layer_inputs
            x, after = run_layer(x, LayerCache(keys, values, time, index), layer, *own)
            return (x, after.keys, after.values), None

        num_layers = parameters.num_layers(layers)
        inputs = (jnp.arange(num_layers), layers, *per_layer)
        unroll = min(config.scan_unroll, num_layers)
        (x, keys, values), _ = lax.scan(body, (x, keys, values), inputs, unroll=unroll)
    return x, cache._replace(keys=keys, values=values, time=time + 1)


def split_key(key: Key[Array, ""] | None, num: int) -> list[Any]:
    """Splits a key of dropout; without a key, returns `num` times None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
