"""Quantization of frozen weights to 8 bits: an integer for each weight, a scale for each column.

The method is that of Dettmers et al. (2022), "LLM.int8()", without its outliers. The scale of a
column is its largest magnitude / 127, and the column is divided by the scale and rounded. A kernel
is restored to float32 before every product.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Int8 as Int8Array


_LARGEST = 127


class Int8(NamedTuple):
    """A quantized kernel, in the place of the kernel's array in a parameter tree."""

    values: Int8Array[Array, "*L D F"]
    scales: Float[Array, "*L 1 F"]


def quantize(params: Any) -> Any:
    """Returns the parameters with every kernel as an `Int8`; all other leaves stay as they are."""

    def leaf(path, x):
        if path[-1].key != "kernel":
            return x
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), axis=-2, keepdims=True) / _LARGEST
        # A column of zeros has the scale 0, by which its zeros must not be divided.
        values = jnp.round(x / jnp.where(scales > 0, scales, 1.0))
        return Int8(values.astype(jnp.int8), scales)

    return jax.tree_util.tree_map_with_path(leaf, params)


def restore(params: Any) -> Any:
    """Returns the parameters with every `Int8` as a float32 kernel; other leaves do not change."""

    def leaf(x):
        return x.values.astype(jnp.float32) * x.scales if isinstance(x, Int8) else x

    return jax.tree.map(leaf, params, is_leaf=is_int8)


def is_int8(x: Any) -> bool:
    """Whether a node of a parameter tree is a quantized kernel."""
    return isinstance(x, Int8)
