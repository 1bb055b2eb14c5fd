"""Batches in parts on a mesh: one device's results, and no sum over devices inside the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import accumulation, divergences, gkd, sharding
from gkd_jax.batch import Batch
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.planning import hlo, hlo_text


ROWS, LENGTH, PARTS, VOCAB = 8, 8, 4, 192
STUDENT = DecoderConfig(
    vocab_size=VOCAB,
    d_model=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    d_ff=32,
    num_layers=2,
    tie_embeddings=True,
)
TEACHER = DecoderConfig(**{**vars(STUDENT), "d_model": 48, "tie_embeddings": False})
METHOD = gkd.GKDConfig(divergence=divergences.JSD(beta=0.3), loss_parts=PARTS)
MESHES = {"data, fsdp and tensor": (2, 2, 2), "more shards than rows": (1, 8, 1)}


def gradient(student, teacher, batch):
    """Returns the losses of all tokens and the gradient of their sum."""

    def loss(student):
        models = gkd.ModelPair(student=STUDENT, teacher=TEACHER, num_pieces=VOCAB)
        values = gkd.per_token_loss(METHOD, models, student, teacher, batch)
        return jnp.sum(values * batch.weights), values

    return jax.grad(loss, has_aux=True)(student)


@functools.cache
def arguments(rows):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (2, rows, LENGTH)).astype(np.int32)
    weights = (rng.random((rows, LENGTH)) < 0.8).astype(np.float32)
    batch = Batch(ids[0], ids[1], weights, input_lengths=np.arange(1, rows + 1) % LENGTH + 1)
    return lm.init(STUDENT, jax.random.key(0)), lm.init(TEACHER, jax.random.key(1)), batch


@pytest.mark.parametrize("mesh", MESHES)
def test_parts_on_a_mesh_are_those_of_one_device(mesh):
    data, fsdp, tensor = MESHES[mesh]
    rows = 4 if "more" in mesh else ROWS
    given = arguments(rows)
    expected = jax.jit(gradient)(*given)
    devices = sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    *params, batch = given
    placed = [
        jax.device_put(x, sharding.tree_shardings(x, lm.logical_axes(x), devices)) for x in params
    ]
    where = sharding.batch_sharding(devices)
    if rows % (data * fsdp):
        where = sharding.replicated(devices)
    placed.append(jax.device_put(batch, where))
    with sharding.use(devices):
        compiled = jax.jit(gradient).lower(*placed).compile()
    found = compiled(*placed)
    counted = hlo.summary(hlo_text.parse(compiled.as_text()))["collectives"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), found, expected)
    if rows % (data * fsdp) == 0:
        # Neither a head nor its gradient crosses the interconnect in the loop over parts.
        inside = [item for item in counted if item["loop"] == str(PARTS)]
        largest = max([0, *(item["bytes"] / item["count"] for item in inside)])
        assert largest < 4 * VOCAB * STUDENT.d_model / tensor


def test_each_microbatch_has_a_dropout_key_of_its_own():
    def numerator(params, rows, key):
        draw = jax.random.uniform(key)
        return params * draw * jnp.sum(rows), (draw, jnp.square(draw))

    gradient, (draws, squares) = accumulation.sum_gradients(
        numerator, 4, jnp.ones(()), jnp.ones(4), 4, jax.random.key(0)
    )
    np.testing.assert_allclose(gradient, draws, rtol=1e-6)
    assert squares / 4 - (draws / 4) ** 2 > 1e-3  # the variance, which is 0 for equal draws
