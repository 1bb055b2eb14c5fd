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


Function = Callable[..., Float[Array, "B H T K"]]


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
    *, scale: float = 1.0, key_lengths: Int[Array, " B"] | None = None, is_causal: bool = False
) -> Function:
    """Returns a function (queries, keys, values, bias) -> softmax(scale x q k^T + bias) values.

    Its arguments are arrays [B H T K], [B N S K], [B N S K], for which `serves` holds, and a bias
    [1 #H T S] or None. Query head h reads key head h // (H / N).

    Args:
        scale: a factor of the products of queries and keys.
        key_lengths: the number of keys of each row that are seen, its first ones; None is all.
        is_causal: query t sees the keys up to t alone.
    """
    if key_lengths is not None:  # a row of padding alone would give NaN
        key_lengths = jnp.maximum(key_lengths, 1)

    def run(queries, keys, values, bias):
        mixed = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (queries, keys, values)),
            bias=None if bias is None else bias.astype(values.dtype),
            scale=scale,
            is_causal=is_causal,
            key_value_seq_lengths=key_lengths,
            implementation="cudnn",
        )
        return mixed.swapaxes(1, 2)

    return run


def forward(function: Function, operands: tuple[Any, ...], otherwise: Callable[[], Any]) -> Any:
    """Returns the result of `attention` and zeros for a softmax's maximum and sum.

    Args:
        function: `attention`'s result.
        operands: its arguments.
        otherwise: computes the same three arrays on other devices, since a process that has a GPU
            may use its CPU too. There the maximum and the sum are for the backward pass.
    """

    def on_gpu():
        mixed, _, sums = jax.eval_shape(otherwise)
        empty = jnp.zeros(sums.shape, sums.dtype)
        return function(*operands).reshape(mixed.shape), empty, empty

    return lax.platform_dependent(cuda=on_gpu, default=otherwise)


def backward(
    function: Function,
    operands: tuple[Any, ...],
    gradient: Float[Array, "B H T K"],
    otherwise: Callable[[], Any],
    arrange: Callable[..., Any],
) -> Any:
    """Returns the gradients of `attention`'s arguments.

    Args:
        function: `attention`'s result.
        operands: its arguments.
        gradient: the gradient of its result.
        otherwise: computes the gradients on other devices.
        arrange: puts the operands' gradients in the form of `otherwise`'s result.
    """

    def on_gpu():
        return arrange(*jax.vjp(function, *operands)[1](gradient))

    return lax.platform_dependent(cuda=on_gpu, default=otherwise)
