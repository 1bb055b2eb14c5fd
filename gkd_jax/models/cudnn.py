"""Attention by NVIDIA's cuDNN, through JAX.

The kernel never writes the scores to memory, which takes most of attention's time on a GPU. cuDNN
adds a bias in the compute dtype: a position bias is rounded to bfloat16, as the queries and the
keys are.

Axes: B batch, H query heads, N key heads, T queries, S keys, K head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gkd_jax import sharding


Otherwise = Callable[[], tuple[Any, ...]]


def serves(queries: Float[Array, "*B H T K"], keys: Float[Array, "*B N S K"]) -> bool:
    """Returns whether cuDNN can compute an attention: in bfloat16, on one GPU.

    A single query or key needs no kernel. (T5's layers are initialised with one, under a `vmap`
    that JAX's rule for cuDNN does not support.) Gradients of a bias need even lengths.
    """
    queries_and_keys = (queries.shape[-2], keys.shape[-2])
    return (
        jax.default_backend() == "gpu"
        and sharding.num_devices() == 1
        and queries.ndim == 4
        and min(queries_and_keys) > 1
        and all(length % 2 == 0 for length in queries_and_keys)
        and queries.dtype.name == "bfloat16"
        and queries.shape[-1] % 8 == 0
        and queries.shape[-1] <= 128
    )


def attention(
    queries: Float[Array, "B H T K"],
    keys: Float[Array, "B N S K"],
    values: Float[Array, "B N S K"],
    bias: Float[Array, "1 #H T S"] | None = None,
    *,
    scale: float = 1.0,
    key_lengths: Int[Array, " B"] | None = None,
    is_causal: bool = False,
) -> Float[Array, "B H T K"]:
    """Returns softmax(scale x queries keys^T + bias) values.

    Args:
        queries, keys, values: arrays for which `serves` holds. Query head h reads key head
            h // (H / N).
        bias: a number that is added to each score; None is none.
        scale: a factor of the products of queries and keys.
        key_lengths: the number of keys of each row that are seen, its first ones; None is all.
        is_causal: query t sees the keys up to t alone.
    """
    if key_lengths is not None:  # a row of padding alone would give NaN
        key_lengths = jnp.maximum(key_lengths, 1)
    mixed = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (queries, keys, values)),
        bias=None if bias is None else bias.astype(values.dtype),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2)


def forward(function: Callable[..., Any], operands: tuple[Any, ...], otherwise: Otherwise) -> Any:
    """Returns `function(*operands)`, an attention, and zeros for a softmax's maximum and sum.

    `otherwise` computes the same three arrays on other devices, since a process that has a GPU may
    use its CPU too. There the maximum and the sum are for the backward pass.
    """

    def on_gpu():
        sums = jax.eval_shape(otherwise)[2]
        empty = jnp.zeros(sums.shape, sums.dtype)
        return function(*operands), empty, empty

    return lax.platform_dependent(cuda=on_gpu, default=otherwise)


def backward(
    function: Callable[..., Any], operands: tuple[Any, ...], gradient: Any, otherwise: Otherwise
) -> Any:
    """Returns the gradients of the operands of an attention, given that of its result.

    `otherwise` computes them on other devices.
    """

    def on_gpu():
        return jax.vjp(function, *operands)[1](gradient)

    return lax.platform_dependent(cuda=on_gpu, default=otherwise)
