"""Products and attention equal NumPy in float64, and their variants each other, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import sharding
from gkd_jax.models.attention import Padding, attend, gains_by_row
from gkd_jax.models.products import product, product_of_transpose, product_with_transpose


# Of the largest number: float32 sums of 5 to 40 products; bfloat16 has 8 bits.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, expected, dtype="float32"):
    expected = np.asarray(expected, np.float64)
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    assert error <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize(("m", "k", "n"), [(8, 40, 5), (5, 8, 40), (1, 16, 3)])
def test_products_and_their_gradients_are_those_of_float64(dtype, shape, m, k, n):
    x, y, g = normal(0, *shape, m, k), normal(1, *shape, k, n), normal(2, *shape, m, n)
    exact_x, exact_y, exact_g = (np.asarray(a, np.float64) for a in (x, y, g))

    def swap(a):
        return a.swapaxes(-1, -2)

    @jax.jit
    def gradients(x, y, g):
        out, pull = jax.vjp(lambda x, y: product(x, y, dtype), x, y)
        turned, pull_turned = jax.vjp(
            lambda x, y: product_with_transpose(x, y, dtype), x, y.swapaxes(-1, -2)
        )
        return out, pull(g), turned, pull_turned(g), product_of_transpose(x, g, dtype)

    out, (dx, dy), turned, (turned_dx, turned_dy), of_transpose = gradients(x, y, g)
    assert {a.dtype for a in (out, dx, dy, turned, of_transpose)} == {jnp.dtype("float32")}
    for got in (out, turned):
        assert_close(got, exact_x @ exact_y, dtype)
    for got in (dx, turned_dx):
        assert_close(got, exact_g @ swap(exact_y), dtype)
    for got in (dy, swap(turned_dy), of_transpose):
        assert_close(got, swap(exact_x) @ exact_g, dtype)


def test_a_float32_kernel_s_gradient_is_not_rounded_to_the_compute_dtype():
    x, kernel = normal(0, 64, 8).astype(jnp.bfloat16), normal(1, 8, 4)
    gradient = jax.jit(jax.grad(lambda kernel: product(x, kernel, "bfloat16").sum()))(kernel)
    assert gradient.dtype == jnp.float32
    assert (gradient != gradient.astype(jnp.bfloat16)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("by_row", [False, True])
def test_attention_and_its_gradients_are_those_of_plain_jax(dtype, dropped, rows, groups, by_row):
    heads, num_queries, num_keys, head_dim = 2, 5, 7, 4
    arrays = {
        "queries": normal(0, rows, heads, num_queries, head_dim).astype(dtype),
        "keys": normal(1, rows, heads, num_keys, head_dim).astype(dtype),
        "values": normal(2, rows, heads, num_keys, head_dim).astype(dtype),
        "position": normal(3, groups, heads, num_queries, num_keys),
    }
    # Some keys masked, of row 0 all: its weights are equal, those of a softmax of -1e10 everywhere.
    masked = (normal(7, rows, 1, 1, num_keys) > 1).at[0].set(True)
    padding = jnp.where(masked, -1e10, normal(4, rows, 1, 1, num_keys))
    dropout_mask = None
    if dropped:
        dropout_mask = 2.0 * (normal(5, rows, heads, 1, num_keys) > 0)
    g = normal(6, rows, heads, num_queries, head_dim).astype(dtype)

    @jax.jit
    def out_and_gradients(arrays, g):
        def mixed(arrays):
            heads = (arrays["queries"], arrays["keys"], arrays["values"])
            positions = (arrays["position"],)
            return attend(*heads, positions, Padding(padding), dropout_mask, by_row=by_row)

        out, pull = jax.vjp(mixed, arrays)
        return out, pull(g)[0]

    def exact(arrays):
        scores = jnp.einsum("BHTK,BHSK->BHTS", arrays["queries"], arrays["keys"])
        position = jnp.repeat(arrays["position"], rows // groups, axis=0)
        weights = jax.nn.softmax(scores + position + padding, axis=-1)
        weights = weights if dropout_mask is None else weights * dropout_mask
        return jnp.einsum("BHTS,BHSK->BHTK", weights, arrays["values"])

    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    expected, pull = jax.vjp(exact, wide)
    expected_gradients = pull(g.astype(jnp.float32))[0]
    out, gradients = out_and_gradients(arrays, g)
    assert out.dtype == jnp.dtype(dtype)
    assert_close(out, expected, dtype)
    for name in arrays:
        assert gradients[name].dtype == arrays[name].dtype
        assert_close(gradients[name], expected_gradients[name], dtype)


def test_rows_are_attended_one_by_one_where_all_their_scores_exceed_the_cache():
    short, long = jnp.zeros((2, 4, 1024, 1)), jnp.zeros((2, 4, 1025, 1))
    assert not gains_by_row(short, short)  # 2**23 scores
    assert gains_by_row(long, short)
    assert gains_by_row(short, long)
    with sharding.use(sharding.make_mesh(sharding.MeshConfig(data=2), jax.devices()[:2])):
        assert not gains_by_row(long, short)
