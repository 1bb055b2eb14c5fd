"""Speed in the metrics: FLOPs against those of the compiled programs, and what a backend tells."""

import dataclasses
import types

import jax
import pytest
from small_runs import options

from gkd_jax import divergences
from gkd_jax.input.data import DataConfig
from gkd_jax.models import decoder_sizes, flops, t5
from gkd_jax.planning import hlo, hlo_text
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import metrics, program, throughput, train


ROWS, SOURCE, TARGET = 8, 24, 16


@pytest.mark.parametrize(("architecture", "size"), [(t5.t5_1_1, "128x2"), (t5.t5_1_0, "128x2")])
def test_flops_of_full_batches_are_those_of_the_compiled_update(architecture, size):
    check(architecture, size)


def test_flops_of_a_decoder_are_those_of_the_compiled_update():
    def architecture(size, vocab_size):
        config = dataclasses.replace(decoder_sizes.qwen3("0.6b"), vocab_size=vocab_size)
        return dataclasses.replace(
            config, d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=512, num_layers=2
        )

    check(architecture, "small")


def test_flops_of_a_tied_t5_are_those_of_the_formula():
    """The position biases multiply nothing, although their arrays are embeddings, too."""
    config = dataclasses.replace(t5.t5_1_0("128x2", vocab_size=149), per_layer_relpos=True)
    assert config.tie_embeddings
    inner, wide, mlp = config.num_heads * config.head_dim, config.d_model, config.d_ff
    s, t = SOURCE, TARGET
    encoder = 2 * (s * (4 * wide * inner + 2 * wide * mlp) + 2 * s * s * inner)
    decoder = 2 * (t * (6 * wide * inner + 2 * wide * mlp) + t * t * inner)
    decoder += 2 * (s * 2 * wide * inner + 2 * t * s * inner)
    full = {"prompt_tokens": 1.0 * ROWS * s, "target_tokens": 1.0 * ROWS * t}
    expected = 2 * ROWS * (encoder + decoder + t * wide * config.vocab_size)
    found = flops.forward_flops(config, **full, prompts=ROWS, targets=ROWS)
    assert found == expected


def check(architecture, size):
    model = ModelConfig(architecture=architecture, size=size)
    lengths = {"inputs": SOURCE, "targets": TARGET}
    recipe = options(
        "unused",
        steps=1,
        fraction=1.0,
        divergence=divergences.forward_kl,
        mesh=MeshConfig(),
        student=model,
        teacher=model,
        data=DataConfig(task="arithmetic", feature_lengths=lengths, batch_size=ROWS),
    )["recipe"]
    built = program.build(recipe, 149, devices=jax.devices()[:1])
    arguments = program.step_arguments(built, ROWS, (SOURCE, TARGET))
    compiled = built.update.lower(*arguments.update_samples).compile()
    counted = hlo.summary(hlo_text.parse(compiled.as_text()))["flops"]
    full = {"prompt_tokens": 1.0 * ROWS * SOURCE, "target_tokens": 1.0 * ROWS * TARGET}
    full |= {"batch_size": ROWS}
    expected = throughput.step_flops(
        built.models.student, built.learner.teachers, built.method, **full, sampled_tokens=0.0
    )
    # The compiled attention computes both halves of its scores, of which half counts.
    assert counted == pytest.approx(expected, rel=0.06)
    assert counted > expected
    with_samples = throughput.step_flops(
        built.models.student,
        built.learner.teachers,
        built.method,
        **full,
        sampled_tokens=1.0 * ROWS * TARGET,
    )
    assert with_samples / expected == pytest.approx(5 / 4)  # 3 + 1 passes, and one to sample


def test_speed_is_logged_with_the_share_of_a_known_peak(tmp_path, monkeypatch):
    stats = {"peak_bytes_in_use": 3 * 2**29, "bytes_limit": 2**31}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda *a, **k: [device, device])
    assert throughput.device_memory() == {
        "memory/device_peak_gib": 1.5,
        "memory/device_gib": 2.0,
    }
    monkeypatch.undo()
    monkeypatch.setitem(throughput.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    train.train(**options(tmp_path, steps=3))
    for line in metrics.read(tmp_path / "metrics.jsonl"):
        tokens = line["train/prompt_tokens"] + line["train/target_tokens"]
        assert line["time/tokens_per_s"] * line["time/step_s"] == pytest.approx(tokens)
        assert line["time/step_s"] >= line["time/sample_s"] + line["time/update_s"] > 0
        assert 0 < line["time/model_flops_share"] < 1
        assert not any(name.startswith("memory/") for name in line)  # the CPU does not tell
