"""Computes a batch in parts, one after the other, so that less of it is in memory at once.

There are two kinds of parts. `map_length_parts` splits the target length, so that the logits of
only one part exist at a time. `sum_gradients` splits the rows into microbatches and adds up their
gradients. The results are those of the whole batch. `split_blocks` finds the rows of each task.

Axes: N target rows, T target length.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from gkd_jax import sharding


_LOGITS_BYTES = 2**28


def num_length_parts(
    num_rows: int, length: int, vocab_size: int, requested: int | None = None
) -> int:
    """Returns the number of parts into which the target length is split for the logits.

    Args:
        num_rows: the target rows of the whole batch.
        requested: the number of parts. None takes the fewest parts with which the float32 logits of
            one part fit into 256 MiB on each device.

    Raises:
        ValueError: if the requested number does not divide the length.
    """
    if requested is not None:
        if length % requested:
            raise ValueError(f"loss_parts={requested} does not divide the target length {length}")
        return requested
    rows_per_device = -(-num_rows // sharding.num_shards("batch"))
    size = 4 * rows_per_device * length * vocab_size
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    return next((n for n in divisors if size <= n * _LOGITS_BYTES), length)


def map_length_parts(
    function: Callable[..., Any], params: Any, inputs: tuple[Any, ...], parts: int
) -> Any:
    """Returns `function(params, *inputs)`, computed for one part of the length at a time.

    The backward pass keeps only the inputs of a part and computes the rest again. The length is
    split rather than the rows, so that rows stay on their devices.

    Each shard of the batch gets a copy of the parameters, before the first part. Otherwise they
    would be gathered, and their gradient summed over the devices, once for each part. With copies,
    each device adds up the gradient of its own over the parts, and one sum over devices follows.

    Args:
        function: a function of parameters and of arrays [N, T, ...], which treats every row alike.
        inputs: pytrees of arrays [N, T, ...].
        parts: the number of parts, which divides T.
    """
    if parts == 1:
        return function(params, *inputs)
    num_rows = jax.tree.leaves(inputs)[0].shape[0]
    shards = sharding.row_shards(num_rows)
    grouped = (shards,) if shards > 1 else ()
    if grouped:
        params, function = sharding.copy_to_shards(params), sharding.map_shards(function)

    def split(x: jax.Array) -> jax.Array:
        """Returns [N, T, ...] as [parts, N, T / parts, ...], or with N as [shards, N / shards]."""
        x = x.reshape(*grouped, -1, parts, x.shape[1] // parts, *x.shape[2:])
        return jnp.moveaxis(x, len(grouped) + 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, len(grouped) + 1)
        return x.reshape(num_rows, -1, *x.shape[len(grouped) + 3 :])

    results = jax.lax.map(
        lambda part: jax.checkpoint(function)(params, *part), jax.tree.map(split, inputs)
    )
    return jax.tree.map(join, results)


def sum_gradients(
    numerator: Callable[..., tuple[jax.Array, Any]],
    num_microbatches: int,
    params: Any,
    rows: Any,
    num_prompts: int,
    dropout_key: Key[Array, ""] | None,
) -> tuple[Any, Any]:
    """Returns the gradient of a sum over rows, and further sums over the same rows.

    Args:
        numerator: (params, rows, dropout_key) -> (sum to differentiate, pytree of further sums).
        num_microbatches: the number of microbatches, which are computed one after the other.
        params: the parameters with respect to which the sum is differentiated.
        rows: a pytree of arrays whose first axis is the rows of the batch. Arrays of prompts have
            one row for each prompt, and arrays of targets may have several neighbouring ones.
        num_prompts: the number of prompts in the batch, or of the groups of neighbouring prompts
            that must stay together.
        dropout_key: the key of the step, into which the number of each microbatch is folded. None
            turns dropout off.

    Returns:
        The gradient and the further sums, both over all rows.
    """
    gradient = jax.grad(numerator, has_aux=True)
    if num_microbatches == 1:
        return gradient(params, rows, dropout_key)

    def accumulate(carry, inputs):
        microbatch, index = inputs
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return jax.tree.map(jnp.add, carry, gradient(params, microbatch, key)), None

    if num_microbatches < 1 or num_prompts % num_microbatches:
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide the {num_prompts} prompts (or "
            "blocks of prompts, with several teachers) of a batch"
        )
    microbatches = jax.tree.map(lambda x: _split_rows(x, num_prompts, num_microbatches), rows)
    indices = jnp.arange(num_microbatches)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(gradient, params, first, dropout_key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, (microbatches, indices))
    return total


def split_blocks(rows: Any, sizes: Sequence[int], num_prompts: int) -> list[Any]:
    """Returns the rows of each part of the blocks of which a batch is made.

    A block has `sizes[0]` prompts of the first part, then `sizes[1]` of the second, and so on. A
    device that holds whole blocks keeps all of its rows.

    Args:
        rows: a pytree of arrays as for `sum_gradients`.
        sizes: the number of prompts that each part has in a block.
        num_prompts: the number of prompts in `rows`, a multiple of the sum of `sizes`.
    """
    if num_prompts % sum(sizes):
        raise ValueError(
            f"a batch must have whole blocks of {sum(sizes)} prompts, {list(sizes)} for the "
            f"teachers, got {num_prompts} prompts"
        )
    num_blocks = num_prompts // sum(sizes)
    ends = list(itertools.accumulate(sizes))

    def part(x: jax.Array, first: int, last: int) -> jax.Array:
        prompts = x.reshape(num_blocks, sum(sizes), -1, *x.shape[1:])[:, first:last]
        return prompts.reshape(-1, *x.shape[1:])

    return [
        jax.tree.map(functools.partial(part, first=first, last=last), rows)
        for first, last in itertools.pairwise([0, *ends])
    ]


def _split_rows(x: jax.Array, num_prompts: int, num: int) -> jax.Array:
    """Returns [N, ...] as [num, N / num, ...].

    Prompt i goes to microbatch i % num, so that each microbatch has rows of every device, and no
    row moves to another device.
    """
    groups = x.reshape(num_prompts // num, num, x.shape[0] // num_prompts, *x.shape[1:])
    return groups.swapaxes(0, 1).reshape(num, x.shape[0] // num, *x.shape[1:])
