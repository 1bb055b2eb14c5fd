"""What a GPU or a TPU computes equals what the CPU computes: `pytest -m accelerator` runs it there.

float32 products are computed in full precision here, because the accelerators' default rounds their
operands to fewer bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax import divergences, gkd, sharding
from gkd_jax.batch import Batch
from gkd_jax.models import lm, quantized
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sampling import SamplingConfig, sample
from gkd_jax.training import optimizers, train_state


pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs a GPU or a TPU"),
]

VOCAB, ROWS, SOURCE, TARGET = 512, 12, 40, 90  # more targets than the first segment of a cache
SIZES = {"vocab_size": VOCAB, "d_model": 128, "num_heads": 4, "head_dim": 64, "d_ff": 192}
FAMILIES = {
    "t5": T5Config(**SIZES, num_encoder_layers=3, num_decoder_layers=3),
    "decoder": DecoderConfig(**SIZES, num_kv_heads=2, num_layers=3, qk_norm=True),
}


@pytest.fixture(params=sorted(FAMILIES))
def config(request):
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def on(platform, function, *args):
    """Calls a jitted function with its arguments on the first device of a platform, or on both."""
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        return jax.device_get(jax.jit(function)(*jax.device_put(args, device)))


def on_both(function, *args):
    """Returns what the CPU and what the accelerator compute."""
    return on("cpu", function, *args), on(jax.default_backend(), function, *args)


@functools.cache
def params_of(config, seed=0):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(lm.init, static_argnums=0)(config, jax.random.key(seed)))


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, VOCAB, (ROWS, SOURCE)).astype(np.int32)
    lengths = rng.integers(1, SOURCE + 1, ROWS).astype(np.int32)
    inputs = np.where(np.arange(SOURCE) < lengths[:, None], inputs, 0)
    weights = (np.arange(TARGET) < rng.integers(1, TARGET + 1, (ROWS, 1))).astype(np.float32)
    targets = rng.integers(3, VOCAB, (ROWS, TARGET)).astype(np.int32)
    return Batch(inputs, targets, weights, input_lengths=lengths)


def logits_of(config):
    """Returns a function of the parameters and a batch: the logits of targets that count, or 0."""

    def run(params, batch):
        return lm.logits(config, params, batch) * batch.weights[..., None]

    return run


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def assert_trees_close(found, wanted, limit):
    """Fails unless each array of a tree is as close to the other's as `limit` of its norm."""
    found, wanted = jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)
    for (path, x), y in zip(found, wanted, strict=True):
        assert relative_error(x, y) < limit, (jax.tree_util.keystr(path), relative_error(x, y))


def test_logits_in_float32(config):
    wanted, found = on_both(logits_of(config), params_of(config), batch())
    assert relative_error(found, wanted) < 1e-5
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_logits_in_bfloat16_are_as_noisy_as_the_cpus(config):
    low = dataclasses.replace(config, dtype="bfloat16")
    exact = on("cpu", logits_of(config), params_of(config), batch())
    wanted, found = on_both(logits_of(low), params_of(config), batch())
    assert 0 < relative_error(found, exact) < 1.5 * relative_error(wanted, exact)


def test_samples_are_the_same_token_for_token(config):
    sampling = SamplingConfig(eos_ids=(1, *range(3, 9)))  # so that rows end one after the other

    def draw(params, batch, seed):
        return sample(
            config,
            params,
            batch.inputs,
            jax.random.key(seed),
            max_length=TARGET,
            input_lengths=batch.input_lengths,
            sampling=sampling,
        )

    wanted, found = on_both(draw, params_of(config), batch(), 3)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.weights, wanted.weights)
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    lengths = wanted.weights.sum(axis=1)
    assert lengths.min() < TARGET / 2
    assert lengths.max() == TARGET


def updated(config, optimizer):
    """Returns a function of (student, teacher, batch): the parameters and the numbers of a step."""
    models = gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB - 5)
    method = gkd.GKDConfig(divergence=functools.partial(divergences.jsd, beta=0.1))
    learner = gkd.Learner(config=method, models=models, optimizer=optimizer)

    def run(student, teacher, batch):
        state = train_state.create(student, optimizer)
        state, numbers = gkd.update(learner, state, teacher, batch, jax.random.key(0))
        return state.params, numbers

    return run


def test_the_loss_and_the_gradient_of_a_step(config):
    models = params_of(config), params_of(config, 1)
    (wanted, numbers), (found, found_numbers) = on_both(
        updated(config, optax.sgd(1.0)), *models, batch()
    )
    for name, value in numbers.items():
        np.testing.assert_allclose(found_numbers[name], value, rtol=2e-5, err_msg=name)
    gradients = [jax.tree.map(np.subtract, models[0], after) for after in (found, wanted)]
    assert_trees_close(*gradients, limit=1e-3)


def test_the_gradient_in_bfloat16_is_as_noisy_as_the_cpus(config):
    models = params_of(config), params_of(config, 1)
    low = dataclasses.replace(config, dtype="bfloat16")
    exact, _ = on("cpu", updated(config, optax.sgd(1.0)), *models, batch())
    (wanted, _), (found, _) = on_both(updated(low, optax.sgd(1.0)), *models, batch())
    exact, wanted, found = (
        jax.tree.map(np.subtract, models[0], after) for after in (exact, wanted, found)
    )
    compared = zip(*map(jax.tree_util.tree_leaves_with_path, (found, wanted, exact)), strict=True)
    for (path, x), (_, y), (_, z) in compared:
        name = jax.tree_util.keystr(path)
        assert 0 < relative_error(x, z) < 1.5 * relative_error(y, z), name


def test_a_step_of_adafactor(config):
    models = params_of(config), params_of(config, 1)
    optimizer = optimizers.Adafactor()(lambda step: 1e-3)
    (wanted, _), (found, _) = on_both(updated(config, optimizer), *models, batch())
    changes = [jax.tree.map(np.subtract, after, models[0]) for after in (found, wanted)]
    assert_trees_close(*changes, limit=2e-3)


def test_a_teacher_in_8_bits(config):
    with jax.default_device(jax.devices("cpu")[0]):
        small = jax.device_get(quantized.quantize(params_of(config)))
    wanted, found = on_both(logits_of(config), small, batch())
    assert relative_error(found, wanted) < 1e-5


def test_a_teacher_on_the_host(config):
    device = jax.devices()[0]
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    here = jax.sharding.SingleDeviceSharding(device)

    def place(path, x):
        name = jax.tree_util.keystr(path)
        return jax.device_put(x, there if "layers" in name and "kernel" in name else here)

    params = jax.tree_util.tree_map_with_path(place, params_of(config))
    on_host = dataclasses.replace(config, layers_on_host=True)
    given = jax.device_put(batch(), here)
    found = jax.jit(logits_of(on_host))(params, given)
    wanted = on(jax.default_backend(), logits_of(config), params_of(config), batch())
    assert relative_error(np.asarray(found), wanted) < 1e-6
    assert jnp.isfinite(found).all()


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU: it is a TPU's kernel")
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_attention_of_a_tpu(softcap):
    """Logits and gradients in bfloat16 through `splash` are as near to float32 as the CPU's."""
    config = dataclasses.replace(
        FAMILIES["decoder"], windows=(0, 100, 0), attention_softcap=softcap
    )
    low = dataclasses.replace(config, dtype="bfloat16")
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(3, VOCAB, (2, 4, 128)).astype(np.int32)
    lengths = np.array([128, 100, 17, 1], np.int32)
    texts = Batch(inputs, targets, np.ones((4, 128), np.float32), input_lengths=lengths)

    def run(config, platform):
        def gradient(params, texts):
            with sharding.use(mesh):
                found = lm.logits(config, params, texts)
                return jnp.mean(found**2), found

        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices(platform)[:1])
        return on(platform, jax.grad(gradient, has_aux=True), params_of(config), texts)

    exact, wanted, found = run(config, "cpu"), run(low, "cpu"), run(low, "tpu")
    for one, other, right in zip(*map(jax.tree.leaves, (found, wanted, exact)), strict=True):
        assert relative_error(one, right) < 1.5 * relative_error(other, right) + 1e-3
