"""Causal attention by JAX's kernel for TPUs, "splash attention" (sparse flash attention).

The kernel never writes the scores to memory, which takes most of attention's time on a TPU. It
skips pairs of blocks in which no query sees a key. A compiler cannot split it over devices, so each
device runs it on its own rows and heads.

XLA sees the kernel as one opaque call. Its FLOPs and its traffic follow from the shapes and from
the share of the pairs of blocks that it visits, which the name of a scope notes for `planning.hlo`.

Axes: B batch, H query heads, N key heads, T tokens, K head dim.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from gkd_jax import sharding
from gkd_jax.models import kv_cache


_BLOCKS = (512, 384, 256, 128)  # the queries, and the keys, of a block; the first that divides T
_AXES = ("batch", "heads", None, None)


def serves(queries: Float[Array, "B H T K"], keys: Float[Array, "B N S K"]) -> bool:
    """Returns whether the kernel can compute causal attention: in bfloat16, on TPUs.

    It takes whole blocks of at least 128 tokens, head dims that fill half of a vector register or
    more, and rows and heads that divide over the devices.
    """
    rows, heads, length, size = queries.shape
    return (
        sharding.platform() == "tpu"
        and queries.dtype.name == "bfloat16"
        and length == keys.shape[2]
        and length % _BLOCKS[-1] == 0
        and size % 64 == 0
        and rows % sharding.num_shards("batch") == 0
        and all(num % sharding.num_shards("heads") == 0 for num in (heads, keys.shape[1]))
    )


def attend(
    queries: Float[Array, "B H T K"],
    keys: Float[Array, "B N T K"],
    values: Float[Array, "B N T K"],
    window: Int[Array, ""],
    windows: Sequence[int],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B H T K"]:
    """Returns softmax(softcap(scale x queries keys^T)) values, in the dtype of the queries.

    Query t sees the keys s with t - window < s <= t. Query head h reads key head h // (H / N). The
    queries are rounded after they are scaled. Off a TPU the kernel is interpreted, for tests.

    Args:
        queries, keys, values: arrays for which `serves` holds.
        window: the window of this layer, one of `windows`.
        windows: the window of each layer of the model. One kernel is compiled for each of them;
            those that are not shorter than the text are one.
        scale: a factor of the products of queries and keys.
        softcap: c in c tanh(x / c), which is applied to the scaled products; None is off.
    """
    length = queries.shape[2]
    layers = Counter(min(own, length) for own in windows)
    kinds = sorted(layers)

    def run_with(own: int) -> Callable[..., jax.Array]:
        def run(*arrays):
            with jax.named_scope(kv_cache.share_scope(layers[own], len(windows))):
                return sharding.on_each_device(_kernel(own, softcap), [_AXES] * 3, _AXES)(*arrays)

        return run

    scaled = (queries.astype(jnp.float32) * scale).astype(queries.dtype)
    runs = [run_with(own) for own in kinds]
    kind = jnp.searchsorted(jnp.asarray(kinds), jnp.minimum(window, length))
    return lax.switch(kind, runs, scaled, keys, values)


def _kernel(window: int, softcap: float | None) -> Callable[..., Any]:
    """Returns a function of the queries, the keys and the values of one device."""
    # An import of the kernel takes a while, and most processes have no TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    def run(queries, keys, values):
        heads, length = queries.shape[1:3]
        mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
        if window >= length:
            mask = splash_attention_mask.CausalMask((length, length))
        block = next(size for size in _BLOCKS if length % size == 0)
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            attn_logits_soft_cap=softcap,
            interpret=sharding.platform() != "tpu",
        )
        with jax.named_scope(visits(length, block, window)):
            return jax.vmap(kernel)(queries, keys, values)

    return run


def visits(length: int, block: int, window: int) -> str:
    """Returns the name of a scope: how many of all pairs of blocks have a query that sees a key."""
    first = np.arange(0, length, block)  # of each block
    query, key = first[:, None], first[None, :]
    meet = (key <= query) & (key + block - 1 > query - window)
    return f"visits_{meet.sum()}_of_{meet.size}"
