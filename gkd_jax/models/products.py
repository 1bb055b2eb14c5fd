"""Matrix products: operands of the compute dtype, sums and results in float32, gradients alike.

JAX's own gradient of such a product multiplies a float32 cotangent by an operand of the compute
dtype, which no backend has: all is cast up. Here cotangents are cast to the compute dtype, and the
gradient of a float32 kernel is left as it was summed, in float32.

On one CPU, operands are laid out row by row first. XLA's fast kernels take no other layout, and
where it may choose, it reads a transpose in place: bfloat16 then runs as float32, and float32 in a
loop nest of half the speed.
"""

import functools

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float

from gkd_jax import sharding


def product(
    x: Float[Array, "*B M K"], y: Float[Array, "*B K N"], dtype: str
) -> Float[Array, "*B M N"]:
    """x @ y with both cast to `dtype` ("float32" or "bfloat16")."""
    return jnp.asarray(_product(x, y, dtype, -2))


def product_with_transpose(
    x: Float[Array, "*B M K"], y: Float[Array, "*B N K"], dtype: str
) -> Float[Array, "*B M N"]:
    """x @ y^T with both cast to `dtype`."""
    return jnp.asarray(_product(x, y, dtype, -1))


def product_of_transpose(
    x: Float[Array, "*B K M"], y: Float[Array, "*B K N"], dtype: str
) -> Float[Array, "*B M N"]:
    """x^T @ y with both cast to `dtype`; JAX's own gradient."""
    return _contract(-2, -2, x.astype(dtype), y.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, y: jax.Array, dtype: str, y_axis: int):
    return _contract(-1, y_axis, x.astype(dtype), y.astype(dtype))


def _forward(x, y, dtype, y_axis):
    operands = x.astype(dtype), y.astype(dtype)
    out = _contract(-1, y_axis, *operands)
    return out, (operands, jnp.zeros((0,), x.dtype), jnp.zeros((0,), y.dtype))


def _backward(dtype, y_axis, residuals, g):
    (x, y), like_x, like_y = residuals
    if y_axis == -2:
        dx, dy = product_with_transpose(g, y, dtype), product_of_transpose(x, g, dtype)
    else:
        dx, dy = product(g, y, dtype), product_of_transpose(g, x, dtype)
    return dx.astype(like_x.dtype), dy.astype(like_y.dtype)


_product.defvjp(_forward, _backward)


def _contract(x_axis: int, y_axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
    """dot_general over one of the last two axes of each; the axes before are batch axes."""
    plain = functools.partial(_plain, x_axis, y_axis)
    if sharding.num_devices() > 1:
        return plain(x, y)
    on_cpu = functools.partial(_on_cpu, x_axis, y_axis)
    return lax.platform_dependent(x, y, cpu=on_cpu, default=plain)


def _plain(x_axis: int, y_axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
    batch = tuple(range(x.ndim - 2))
    summed = (x.ndim + x_axis,), (y.ndim + y_axis,)
    return lax.dot_general(x, y, (summed, (batch, batch)), preferred_element_type=jnp.float32)


def _on_cpu(x_axis: int, y_axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
    if x_axis == -1:
        return _plain(x_axis, y_axis, _by_rows(x), _by_rows(y))
    # The smaller one is transposed, and with y the result: by rows, or XLA turns x after all.
    if x.size <= y.size:
        return _plain(-1, y_axis, _by_rows(x.swapaxes(-1, -2)), _by_rows(y))
    turned = _plain(-1, x_axis, _by_rows(y.swapaxes(-1, -2)), _by_rows(x))
    return _by_rows(turned).swapaxes(-1, -2)


def _by_rows(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless models can compute in it."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
