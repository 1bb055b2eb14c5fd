"""Fingerprints of arrays, which tell whether the stored bytes are those that were written.

Orbax's storage format does not detect a flipped bit, so every checkpoint of gkd_jax records the
fingerprint of each array. It is computed on the device before the array is written.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.models.parameters import flatten


class DamagedError(ValueError):
    """Raised when stored bytes differ from the bytes that were written."""


def of_tree(tree: Any) -> dict[str, int]:
    """Returns a fingerprint of each array in a tree, by its name in `flatten`.

    The fingerprint is the sum over all elements of bits x (2 index + 1), modulo 2^32. This sum has
    the same value in any order of addition, and so on any mesh. Because the factor is odd, a change
    of one element always changes the sum.
    """
    named = flatten(tree)
    return dict(zip(named, map(int, _fingerprint([*named.values()])), strict=True))


@jax.jit
def _fingerprint(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        # Computing the flat index from one iota per axis avoids a reshape, which would move shards.
        for axis, size in enumerate(x.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def check(tree: Any, stored: dict[str, int]) -> None:
    """Raises DamagedError if the fingerprints of restored arrays differ from the stored ones."""
    found = of_tree(tree)
    wrong = [name for name, value in found.items() if stored.get(name) != value]
    if wrong:
        raise DamagedError(
            f"the stored bytes of {', '.join(wrong)} are not those that were written"
        )
