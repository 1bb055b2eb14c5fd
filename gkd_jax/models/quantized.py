"""Frozen weights in 8 bits: an integer of each number and one scale a column.

Dettmers et al. (2022), "LLM.int8()", without its outliers: each column of a kernel is divided by
its largest magnitude / 127 and rounded. Products are those of the restored kernel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Int8 as Int8Array


_LARGEST = 127


class Int8(NamedTuple):
    """A kernel, as a node of a tree of parameters."""

    values: Int8Array[Array, "*L D F"]
    scales: Float[Array, "*L 1 F"]


def quantize(params: Any) -> Any:
    """The tree of parameters with every kernel an `Int8`; norms and embeddings stay."""

    def leaf(path, x):
        if path[-1].key != "kernel":
            return x
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), axis=-2, keepdims=True) / _LARGEST
        values = jnp.round(x / jnp.where(scales > 0, scales, 1.0))
        return Int8(values.astype(jnp.int8), scales)

    return jax.tree_util.tree_map_with_path(leaf, params)


def restore(params: Any) -> Any:
    """The tree with every `Int8` a float32 kernel again; the identity where there is none."""

    def leaf(x):
        return x.values.astype(jnp.float32) * x.scales if isinstance(x, Int8) else x

    return jax.tree.map(leaf, params, is_leaf=is_int8)


def is_int8(x: Any) -> bool:
    return isinstance(x, Int8)
