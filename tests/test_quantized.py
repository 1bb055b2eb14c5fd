"""A teacher in 8 bits: its numbers equal NumPy's, its logits are close, and it fits any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs

from gkd_jax import divergences, sharding
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.models import lm, quantized, t5
from gkd_jax.sampling import SamplingConfig, sample
from gkd_jax.storage import loading, pretrained
from gkd_jax.training import metrics, train


CONFIG = t5.t5_1_1("tiny", vocab_size=128)


@pytest.fixture(scope="module")
def params():
    return t5.init(CONFIG, jax.random.key(0))


def test_each_number_is_within_half_a_step_of_its_column():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 40, 7)) * 10 ** rng.uniform(-3, 3, size=(3, 1, 7))
    kernel[0, :, 2] = 0  # a column without any scale
    found = quantized.quantize({"kernel": jnp.asarray(kernel, jnp.float32)})
    steps = np.abs(kernel).max(axis=1, keepdims=True) / 127
    assert found["kernel"].values.dtype == jnp.int8
    restored = np.asarray(quantized.restore(found)["kernel"])
    assert np.all(np.abs(restored - kernel) <= 0.5001 * steps)
    # The largest of each column is kept.
    np.testing.assert_allclose(np.abs(restored).max(axis=1), np.abs(kernel).max(axis=1), rtol=1e-6)


def test_norms_embeddings_and_biases_stay_and_sizes_count_alike(params):
    small = quantized.quantize(params)
    assert small["token_embedder"]["embedding"] is params["token_embedder"]["embedding"]
    restored = quantized.restore(small)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert lm.num_params(small) == lm.num_params(params)
    abstract = lm.abstract_params(CONFIG, "int8")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), small
    )


def test_logits_and_samples_are_those_of_the_restored_kernels(params):
    rng = np.random.default_rng(1)
    inputs, targets = (jnp.asarray(rng.integers(2, 128, (4, 9)), jnp.int32) for _ in range(2))
    batch = Batch(inputs, targets, jnp.ones((4, 9)))
    small = quantized.quantize(params)
    restored = quantized.restore(small)
    found = t5.logits(CONFIG, small, batch)
    np.testing.assert_allclose(found, t5.logits(CONFIG, restored, batch), atol=1e-5)
    exact = t5.logits(CONFIG, params, batch)
    assert 0 < float(jnp.mean(divergences.forward_kl(found, exact))) < 1e-3

    greedy = SamplingConfig(temperature=0.0)
    tokens = [
        sample(CONFIG, x, inputs, max_length=9, sampling=greedy).tokens for x in (small, restored)
    ]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.slow
def test_a_run_with_a_teacher_in_8_bits_on_a_mesh(tmp_path):
    """Values are sharded by rows and scales replicated; the teacher is read from a checkpoint."""
    path = small_runs.write_teacher(tmp_path / "teacher")
    teacher = pretrained.ModelConfig(checkpoint=path, param_dtype="int8")
    given = {"steps": 2, "fraction": 1.0, "divergence": divergences.forward_kl, "teacher": teacher}
    evaluation = evaluate.EvalConfig(num_examples=8)
    train.train(**small_runs.options(tmp_path / "run", evaluation=evaluation, **given))
    info = (tmp_path / "run" / "model_info.txt").read_text()
    teacher_info = info.split("\n\nteacher\n")[1]
    assert "encoder/layers/mlp/wi_0/kernel/values" in teacher_info
    assert "encoder/layers/mlp/wi_0/kernel/scales" in teacher_info
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4, tensor=1))
    config = loading.load_config(path)
    split = pretrained.place_params(teacher, config, mesh)
    whole = quantized.quantize(loading.load_model(path)[1])
    jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_a_teacher_in_host_memory_gives_the_same_run(tmp_path, dtype):
    path = small_runs.write_teacher(tmp_path / "teacher")
    losses = []
    for memory in ("device", "host"):
        teacher = pretrained.ModelConfig(checkpoint=path, param_dtype=dtype, memory=memory)
        given = {"steps": 3, "fraction": 0.5, "divergence": divergences.forward_kl}
        folder = tmp_path / memory
        train.train(**small_runs.options(folder, teacher=teacher, **given))
        losses.append([line.get("train/loss") for line in metrics.read(folder / "metrics.jsonl")])
    assert losses[0] == losses[1]
    config = teacher.config(149)
    target = pretrained.frozen_shapes(teacher, config, sharding.make_mesh(sharding.MeshConfig()))
    kinds = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding.memory_kind
        for path, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    on_host = {name for name, kind in kinds.items() if kind == "pinned_host"}
    kernel = "kernel/values" if dtype == "int8" else "kernel"
    assert on_host == {name for name in kinds if "/layers/" in name and name.endswith(kernel)}


def test_a_student_in_8_bits_is_refused(tmp_path):
    student = pretrained.ModelConfig(architecture=small_runs.small, size="tiny", param_dtype="int8")
    with pytest.raises(ValueError, match="a student is trained in param_dtype='float32'"):
        train.train(**small_runs.options(tmp_path, steps=1, student=student))


def test_a_student_in_host_memory_is_refused(tmp_path):
    student = pretrained.ModelConfig(architecture=small_runs.small, size="tiny", memory="host")
    with pytest.raises(ValueError, match="a student is trained in memory='device'"):
        train.train(**small_runs.options(tmp_path, steps=1, student=student))


def test_other_numbers_are_refused():
    with pytest.raises(ValueError, match="must be 'float32', 'bfloat16' or 'int8', got 'int4'"):
        pretrained.ModelConfig(size="tiny", param_dtype="int4")
