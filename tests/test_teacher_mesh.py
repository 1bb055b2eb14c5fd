"""A teacher with a mesh of its own: other axis sizes over the devices of the student's mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params
from small_runs import options, small

from gkd_jax import divergences, gkd, sharding
from gkd_jax.batch import Batch
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage import pretrained
from gkd_jax.training import plan, program, train_state


VOCAB = 40
KEY = jax.random.key(0)
SGD = optax.sgd(1.0)
STUDENT = dataclasses.replace(
    small("tiny", VOCAB), num_heads=3
)  # tensor=2 does not divide its heads
TEACHERS = {
    "t5": dataclasses.replace(small("tiny", VOCAB), num_heads=4),
    "decoder": DecoderConfig(
        vocab_size=48, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16, num_layers=2
    ),
}
OWN = MeshConfig(data=2, fsdp=2, tensor=2)


def batch_of(rows):
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(2, VOCAB, (rows, 5)).astype(np.int32),
        rng.integers(2, VOCAB, (rows, 6)).astype(np.int32),
        (np.arange(6) < rng.integers(1, 7, (rows, 1))).astype(np.float32),
        input_lengths=rng.integers(1, 6, rows).astype(np.int32),
    )


def learner_of(teacher, mesh):
    models = gkd.ModelPair(student=STUDENT, teacher=teacher, num_pieces=VOCAB, teacher_mesh=mesh)
    config = gkd.GKDConfig(divergence=divergences.jsd, loss_parts=2)
    return gkd.Learner(config=config, models=models, optimizer=SGD)


def gradient(learner, params, teacher_params, batch):
    state = train_state.create(params, SGD)
    new, numbers = gkd.update(learner, state, teacher_params, batch, KEY)
    return jax.tree.map(jnp.subtract, params, new.params), numbers["loss"]


@pytest.mark.parametrize(
    ("family", "param_dtype"), [("t5", "float32"), ("decoder", "float32"), ("decoder", "int8")]
)
def test_the_gradient_is_that_of_one_device(family, param_dtype):
    teacher, batch = TEACHERS[family], batch_of(8)
    model = pretrained.ModelConfig(size="tiny", mesh=OWN, param_dtype=param_dtype)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    placed = pretrained.frozen_shapes(model, teacher, mesh)
    theirs = pretrained.initial_params(model, teacher, placed, KEY, "model")
    kernel = max(jax.tree.leaves(theirs["decoder"]["layers"]["mlp"]), key=lambda leaf: leaf.size)
    assert "tensor" in jax.tree.leaves(tuple(kernel.sharding.spec))
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    ours = random_params(STUDENT, 0)

    def on_mesh(params, theirs, batch):
        with sharding.use(mesh):
            return gradient(learner_of(teacher, OWN), params, theirs, batch)

    found, loss = jax.jit(on_mesh)(
        jax.device_put(ours, sharding.replicated(mesh)),
        theirs,
        jax.device_put(batch, sharding.batch_sharding(mesh)),
    )
    expected, alone = jax.jit(gradient, static_argnums=0)(
        learner_of(teacher, None), ours, jax.device_get(theirs), batch
    )
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), jax.device_get(found), expected
    )
    assert max(abs(x).max() for x in jax.tree.leaves(jax.device_get(found))) > 1e-3


def recipe_with(**teacher):
    model = pretrained.ModelConfig(architecture=small, size="tiny", **teacher)
    made = options("", steps=1, divergence=divergences.jsd, teacher=model, mesh=MeshConfig(data=8))
    return made["recipe"]


def test_the_student_s_arrays_keep_the_mesh_of_the_run():
    built = program.build(recipe_with(mesh=MeshConfig(data=2, fsdp=4)), 149)
    (mesh,) = {x.sharding.mesh for x in jax.tree.leaves(built.teacher)}
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert {x.sharding.mesh for x in jax.tree.leaves(built.state)} == {built.mesh}
    expected = "mesh       data=8 x fsdp=1 x tensor=1; teacher: data=2 x fsdp=4 x tensor=1"
    assert expected in plan.plan(built)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"a mesh of data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ({"data": 1, "tensor": 8}, r"does not divide these arrays"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        program.build(recipe_with(mesh=MeshConfig(**sizes)), 149)


def test_a_microbatch_that_the_teacher_s_mesh_does_not_divide_is_refused():
    recipe = recipe_with(mesh=MeshConfig(data=8))
    recipe = dataclasses.replace(
        recipe,
        mesh=MeshConfig(data=2, fsdp=1, tensor=4),
        train=dataclasses.replace(recipe.train, num_microbatches=recipe.data.batch_size // 4),
    )
    with pytest.raises(ValueError, match=r"rows of teacher in a microbatch must be divisible by"):
        program.build(recipe, 149)


def test_a_student_has_the_mesh_of_the_run():
    recipe = recipe_with()
    student = dataclasses.replace(recipe.student, mesh=OWN)
    with pytest.raises(ValueError, match="a student has the mesh of the run"):
        program.build(dataclasses.replace(recipe, student=student), 149)
