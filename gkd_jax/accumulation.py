"""Doing a batch's work in parts, so that less of it is in memory at once. The sums stay the same.

Two kinds of parts: of the target length (the logits of a part exist, those of the others do not),
and of the rows (microbatches, whose gradients are added up).

Axes: N target rows, T target length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gkd_jax import sharding


_LOGITS_BYTES = 2**28


def num_length_parts(
    num_rows: int, length: int, vocab_size: int, requested: int | None = None
) -> int:
    """In how many parts of the target length the logits are made.

    Args:
        num_rows: of the whole batch.
        length: T.
        vocab_size: V.
        requested: the number of parts; None takes the fewest with which one device's float32
            logits of a part fit 256 MiB.

    Raises:
        ValueError: if the requested number does not divide the length.
    """
    if requested is not None:
        if length % requested:
            raise ValueError(f"loss_parts={requested} does not divide the target length {length}")
        return requested
    rows_per_device = -(-num_rows // sharding.num_batch_shards())
    size = 4 * rows_per_device * length * vocab_size
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    return next((n for n in divisors if size <= n * _LOGITS_BYTES), length)


def map_length_parts(function: Callable[..., Any], inputs: tuple[Any, ...], parts: int) -> Any:
    """`function(*inputs)` for arrays [N, T, ...], made for one part of T at a time.

    What a part computes is not kept for the backward pass but computed again: of a part only its
    inputs are. The parts follow the length and not the rows, so that rows stay on their devices.
    """
    if parts == 1:
        return function(*inputs)

    def split(x: jax.Array) -> jax.Array:
        """[N, T, ...] to [parts, N, T / parts, ...]."""
        return x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    results = jax.lax.map(lambda part: jax.checkpoint(function)(*part), jax.tree.map(split, inputs))
    return jax.tree.map(join, results)


def sum_gradients(
    numerator: Callable[..., tuple[jax.Array, Any]],
    num_microbatches: int,
    params: Any,
    rows: Any,
    num_prompts: int,
    dropout_key: Key[Array, ""] | None,
) -> tuple[Any, Any]:
    """The gradient of a sum over rows, and the other sums that come with it.

    Args:
        numerator: (params, rows, dropout_key) -> (sum to differentiate, pytree of sums).
        num_microbatches: groups of rows that are done one after the other.
        params: what the gradient is taken of.
        rows: a pytree of arrays, all with the batch's rows first: one or several a prompt.
        num_prompts: of the batch.
        dropout_key: of the step; each microbatch folds its number in. None for no dropout.

    Returns:
        The gradient, and the sums, over all rows.
    """
    gradient = jax.grad(numerator, has_aux=True)
    if num_microbatches == 1:
        return gradient(params, rows, dropout_key)

    def accumulate(carry, inputs):
        microbatch, index = inputs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return jax.tree.map(jnp.add, carry, gradient(params, microbatch, key)), None

    microbatches = jax.tree.map(lambda x: _split_rows(x, num_prompts, num_microbatches), rows)
    indices = jnp.arange(num_microbatches)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(gradient, params, first, dropout_key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, (microbatches, indices))
    return total


def _split_rows(x: jax.Array, num_prompts: int, num: int) -> jax.Array:
    """[N, ...] to [num, N / num, ...].

    Prompt i goes to microbatch i % num, so that every device keeps rows of its own in each.
    """
    groups = x.reshape(num_prompts // num, num, x.shape[0] // num_prompts, *x.shape[1:])
    return groups.swapaxes(0, 1).reshape(num, x.shape[0] // num, *x.shape[1:])
