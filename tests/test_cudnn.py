"""The way to cuDNN and back, with JAX's own attention in the place of the kernel.

tests/test_accelerator.py runs the kernel itself, on a GPU.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import sharding
from gkd_jax.models import attention, cudnn, grouped_attention
from gkd_jax.models.grouped_attention import NO_WINDOW, Sight


ROWS, HEADS, QUERIES, KEYS, DIM = 3, 4, 6, 8, 16
LENGTHS = np.array([8, 5, 0], np.int32)  # the last row is padding alone


@pytest.fixture
def calls(monkeypatch):
    """Makes this process look like one with a GPU; returns the options of each kernel call."""
    own, found = jax.nn.dot_product_attention, []

    def kernel(*arrays, implementation, **options):
        assert implementation == "cudnn"
        found.append(options)
        return own(*arrays, implementation="xla", **options)

    def on_gpu(*args, default, cuda=None, **others):
        del others
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(lax, "platform_dependent", on_gpu)
    return found


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def assert_close(found, wanted):
    """Fails unless arrays differ by no more than the rounding of bfloat16."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def reference(queries, keys, values, scores_of):
    """Softmax attention by its formula, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (queries, keys, values))
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = scores_of(jnp.einsum("bhtk,bhsk->bhts", q, k))
    return jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(scores, axis=-1), v)


def gradients(function, *args):
    def total(*args):
        weights = jnp.sin(jnp.arange(ROWS * HEADS * QUERIES * DIM).reshape(-1, HEADS, QUERIES, DIM))
        rows = jnp.asarray(LENGTHS > 0)[:, None, None, None]  # what padding computes is not used
        return jnp.sum(function(*args).astype(jnp.float32) * weights * rows)

    return jax.grad(total, argnums=tuple(range(len(args))))(*args)


def test_t5s_attention_with_a_position_bias_and_padding(calls):
    queries, keys, values = arrays((ROWS, HEADS, QUERIES, DIM), *[(ROWS, HEADS, KEYS, DIM)] * 2)
    position = jnp.asarray(np.random.default_rng(1).normal(size=(1, HEADS, QUERIES, KEYS)))
    position = position.astype(jnp.float32)
    seen = jnp.arange(KEYS)[None] < LENGTHS[:, None]
    padding = jnp.where(seen, 0.0, -1e10)[:, None, None]

    def ours(queries, keys, values, position):
        hidden = attention.Padding(padding, jnp.asarray(LENGTHS))
        return attention.attend(queries, keys, values, (position, 2 * position), hidden, None)

    def wanted(queries, keys, values, position):
        return reference(queries, keys, values, lambda scores: scores + 3 * position + padding)

    given = (queries, keys, values, position)
    found = ours(*given)
    assert len(calls) == 1
    assert jnp.isfinite(found).all()
    assert_close(found[:2], wanted(*given)[:2])
    for x, y in zip(gradients(ours, *given), gradients(wanted, *given), strict=True):
        assert_close(x, y)
    assert len(calls) > 1


def test_causal_attention_with_grouped_heads(calls):
    queries, keys, values = arrays((ROWS, HEADS, QUERIES, DIM), *[(ROWS, 2, QUERIES, DIM)] * 2)
    places = jnp.arange(QUERIES)[None]
    sight = Sight(places, places, jnp.asarray(NO_WINDOW))

    def ours(queries, keys, values):
        return grouped_attention.attend(queries, keys, values, sight, scale=0.3, is_causal=True)

    def wanted(queries, keys, values):
        causal = jnp.tril(jnp.ones((QUERIES, QUERIES), bool))[None, None]
        return reference(
            queries, keys, values, lambda scores: jnp.where(causal, 0.3 * scores, -jnp.inf)
        )

    assert_close(ours(queries, keys, values), wanted(queries, keys, values))
    assert [options["is_causal"] for options in calls] == [True]
    given = (queries, keys, values)
    for x, y in zip(gradients(ours, *given), gradients(wanted, *given), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(
    "case", ["float32", "by rows", "no lengths", "dropout", "softcap", "window", "two devices"]
)
def test_what_the_kernel_cannot_compute_is_computed_without_it(calls, case):
    queries, keys, values = arrays(*[(ROWS, HEADS, QUERIES, DIM)] * 3)
    if case == "float32":
        queries, keys, values = (x.astype(jnp.float32) for x in (queries, keys, values))
    if case in ("float32", "by rows"):
        rows = ROWS if case == "by rows" else 1
        bias = jnp.zeros((rows, 1, QUERIES, QUERIES))
        attention.attend(queries, keys, values, (bias,), None, None)
    elif case == "no lengths":
        hidden = attention.Padding(jnp.zeros((ROWS, 1, 1, QUERIES)))
        attention.attend(queries, keys, values, (), hidden, None)
    elif case == "dropout":
        dropped = jnp.ones((ROWS, HEADS, 1, QUERIES))
        attention.attend(queries, keys, values, (), None, dropped)
    elif case == "two devices":
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2), jax.devices()[:2])
        with sharding.use(mesh):
            assert not cudnn.serves(queries, keys)
    else:
        places = jnp.arange(QUERIES)[None]
        sight = Sight(places, places, jnp.asarray(2 if case == "window" else NO_WINDOW))
        softcap = 5.0 if case == "softcap" else None
        causal = case == "softcap"
        grouped_attention.attend(
            queries, keys, values, sight, scale=0.3, softcap=softcap, is_causal=causal
        )
    assert not calls
