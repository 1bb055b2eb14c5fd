"""Matrix products whose operands have the compute dtype and whose sums and results are float32.

The gradients are computed in the same way. JAX's own gradient of such a product multiplies a
float32 cotangent by an operand of the compute dtype. No backend has that product, so both operands
would be cast to float32. Here the cotangent is cast to the compute dtype instead, and the gradient
of a float32 kernel stays in float32, as it was summed.

On a single CPU device, the operands are first laid out in row-major order, because XLA's fast
kernels take no other layout. Where XLA may choose the layout, it reads a transposed operand in
place: a bfloat16 product then runs in float32, and a float32 product in a loop nest at half the
speed.
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
    """Returns x @ y in float32, with both operands cast to `dtype` ("float32" or "bfloat16")."""
    return jnp.asarray(_product(x, y, dtype, -2))


def product_with_transpose(
    x: Float[Array, "*B M K"], y: Float[Array, "*B N K"], dtype: str
) -> Float[Array, "*B M N"]:
    """Returns x @ y^T in float32, with both operands cast to `dtype`."""
    return jnp.asarray(_product(x, y, dtype, -1))


def product_of_transpose(
    x: Float[Array, "*B K M"], y: Float[Array, "*B K N"], dtype: str
) -> Float[Array, "*B M N"]:
    """Returns x^T @ y in float32, with both operands cast to `dtype`.

    Unlike the two functions above, this one is differentiated by JAX's own rule.
    """
    return _contract(-2, -2, x.astype(dtype), y.astype(dtype))


def project(
    x: Float[Array, "*B D"], kernel: Float[Array, "..."], dtype: str, *, transposed: bool = False
) -> Float[Array, "*B F"]:
    """Returns x @ kernel in float32; operands are cast to `dtype`.

    The kernel is [D, F], or [F, D] if `transposed`.
    """
    # The leading axes of x are merged into one. If they were kept apart, the kernel's gradient
    # would contract over two axes, which takes twice the time on CPU.
    multiply = product_with_transpose if transposed else product
    out = multiply(x.reshape(-1, x.shape[-1]), kernel, dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


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
    """Sums over one of the last two axes of each operand; all axes before these are batch axes."""
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
    # Transpose the smaller operand, which is cheaper. When that operand is y, the product comes out
    # transposed too; its layout is pinned as well, because XLA would otherwise move the transpose
    # onto x.
    if x.size <= y.size:
        return _plain(-1, y_axis, _by_rows(x.swapaxes(-1, -2)), _by_rows(y))
    turned = _plain(-1, x_axis, _by_rows(y.swapaxes(-1, -2)), _by_rows(x))
    return _by_rows(turned).swapaxes(-1, -2)


def _by_rows(x: jax.Array) -> jax.Array:
    """Pins the row-major layout of an array."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
