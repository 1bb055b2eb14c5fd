"""`bench` prints the documented numbers and refuses wrong arguments."""

import json

import pytest
from small_runs import options, small

from gkd_jax import divergences, gkd
from gkd_jax.planning import bench
from gkd_jax.storage import pretrained


def given(**more):
    teacher = pretrained.ModelConfig(architecture=small, size="tiny")
    fields = {"fraction": 1.0, "divergence": divergences.jsd, "teacher": teacher, **more}
    return options("", steps=1, **fields)["recipe"]


def test_every_phase_is_timed_and_a_step_is_not_less_than_its_parts(capsys):
    bench.bench(given(), runs=3, as_json=True)
    found = json.loads(capsys.readouterr().out)
    for name in ("sample_ms", "score_ms", "update_ms", "step_ms", "compile_s", "peak_memory_mb"):
        assert found[name] > 0, name
    assert found["runs"] == 3
    # 32 tokens in full: nothing ended early, and no phase was left out of the step.
    assert found["update_gflop"] > found["score_gflop"] > 0
    assert found["student_params"] > 1000
    assert found["sample_tokens_per_s"] > 0
    assert found["sample_plain_tokens_per_s"] > 0


def test_answers_of_different_lengths_are_the_same_in_both_loops(capsys):
    bench.bench(given(), runs=2, mean_length=3.0)
    found = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(found["sample_differing_rows"]) == 0
    assert float(found["sample_tokens_per_s"]) > 0
    assert float(found["sample_plain_tokens_per_s"]) > 0
    assert "update_ms" not in found  # sampling alone


def test_a_mean_length_needs_samples():
    method = gkd.GKDConfig(on_policy_fraction=0.0, divergence=None)
    with pytest.raises(
        ValueError, match=r"a method that samples, got 3.0 and on_policy_fraction=0"
    ):
        bench.bench(given(method=method), runs=1, mean_length=3.0)


def test_a_method_that_never_samples_has_an_update_alone(capsys, monkeypatch):
    monkeypatch.setattr(bench, "gemm_gflops", lambda dtype: 1.0)
    monkeypatch.setattr(bench, "copy_gb_per_s", lambda: 1.0)
    method = gkd.GKDConfig(on_policy_fraction=0.0, divergence=None)
    bench.bench(given(method=method), runs=1, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {name for name in found if name.endswith("_ms")} == {"update_ms"}
    assert found["update_gflop"] > 0


def test_batches_of_two_kinds_are_refused():
    method = gkd.GKDConfig(on_policy_fraction=0.5, divergence=divergences.jsd, mixing="example")
    with pytest.raises(ValueError, match="MIXING='step', got no RL and 'example'"):
        bench.bench(given(method=method), runs=1)
