"""Whole runs through `train.train` learn, resume, and leave the documented files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from small_runs import LENGTHS, options, small

from gkd_jax import divergences, gkd, rl, sharding
from gkd_jax.evaluation import evaluate, rewards
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm
from gkd_jax.storage import fingerprints, loading, pretrained, saved_model
import gkd_jax.tasks.arithmetic  # noqa: F401
from gkd_jax.training import metrics, optimizers, train
from gkd_jax.training.recipe import TrainConfig


pytestmark = pytest.mark.usefixtures("shared_steps")


def lines(model_dir):
    return metrics.read(model_dir / "metrics.jsonl")


def final_params(model_dir):
    return loading.load_model(str(model_dir))[1]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    train.train(**options(folder, steps=12))
    return folder


def test_cross_entropy_falls_and_the_run_directory_is_complete(teacher_dir):
    losses = [line["train/loss"] for line in lines(teacher_dir)]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    for name in ("config.gin", "model_info.txt", "metrics.jsonl", "tensorboard", "checkpoints/12"):
        assert (teacher_dir / name).exists(), name
    assert "decoder/logits_dense/kernel" in (teacher_dir / "model_info.txt").read_text()


def on_policy(teacher_dir, **more):
    return {
        "fraction": 0.5,
        "divergence": divergences.forward_kl,
        "teacher": pretrained.ModelConfig(checkpoint=str(teacher_dir)),
        **more,
    }


def test_a_stopped_run_goes_on_exactly_as_one_never_stopped(teacher_dir, tmp_path):
    """Coins, samples, batches, losses and parameters are equal bit for bit, whenever it saves."""
    train.train(**options(tmp_path / "whole", steps=8, **on_policy(teacher_dir)))
    often = TrainConfig(train_steps=5, save_period="0.000000001 s", keep=None)
    train.train(**options(tmp_path / "parts", steps=5, train=often, **on_policy(teacher_dir)))
    assert saved_model.saved_steps(tmp_path / "parts") == [1, 2, 3, 4, 5]
    train.train(**options(tmp_path / "parts", steps=8, **on_policy(teacher_dir)))
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["step"] for line in parts] == list(range(1, 9))
    for a, b in zip(whole, parts, strict=True):
        for name in a:
            if not name.startswith("time/"):
                assert a[name] == b[name], name
    assert {line["train/on_policy"] for line in whole} == {0.0, 1.0}
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(tmp_path / "whole"),
        final_params(tmp_path / "parts"),
    )


def test_one_device_and_eight_give_the_same_losses(teacher_dir, tmp_path, monkeypatch):
    common = on_policy(teacher_dir)
    train.train(**options(tmp_path / "eight", steps=4, **common))
    one = jax.devices()[:1]
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config, _, make=sharding.make_mesh: make(config, one)
    )
    single = sharding.MeshConfig()
    train.train(**options(tmp_path / "one", steps=4, **common, mesh=single))
    for a, b in zip(lines(tmp_path / "eight"), lines(tmp_path / "one"), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-4)
        assert a.get("train/sample_length") == b.get("train/sample_length")


@pytest.mark.parametrize("mixing", ["step", pytest.param("example", marks=pytest.mark.slow)])
def test_samples_may_be_longer_than_the_bucket_of_their_prompts(mixing, tmp_path):
    """The bucket holds the data set's answers, which must not decide where a sample is cut off."""
    rows = [{"inputs": f"{n} + {n}", "targets": f"{2 * n}"} for n in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"task": str(tmp_path / "data.jsonl"), "vocabulary": "arithmetic", "batch_size": 8}
    lengths = {"inputs": 20, "targets": 20}

    def trained(name, buckets):
        config = DataConfig(**settings, feature_lengths=lengths, length_buckets=buckets)
        more = {
            "data": config,
            "method": gkd.GKDConfig(on_policy_fraction=0.5, mixing=mixing),
            "teacher": pretrained.ModelConfig(architecture=small, size="tiny"),
        }
        train.train(**options(tmp_path / name, steps=4, **more))
        return lines(tmp_path / name)

    found, expected = trained("buckets", (8,)), trained("whole", ())
    assert max(line.get("train/sample_length", 0) for line in found) > 8
    if mixing == "step":
        assert {line["train/on_policy"] for line in found} == {0.0, 1.0}
    for one, other in zip(found, expected, strict=True):
        assert one.get("train/sample_length") == other.get("train/sample_length")
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


@pytest.mark.parametrize("mixing", ["step", "example"])
def test_a_row_without_a_target_is_refused_unless_all_are_sampled(mixing, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"inputs": "1 + 1", "targets": "2"}\n{"inputs": "2 + 2"}\n')
    config = DataConfig(
        task=str(path), vocabulary="arithmetic", feature_lengths=LENGTHS, batch_size=8
    )
    methods = [gkd.GKDConfig(on_policy_fraction=share, mixing=mixing) for share in (0.0, 0.5)]
    if mixing == "step":  # the samples of such a row would never have a reward
        reward = rl.RLConfig(reward=rewards.exact_answer, alpha=0.5)
        methods.append(gkd.GKDConfig(rl=reward))
    for method in methods:
        teacher = pretrained.ModelConfig(architecture=small, size="tiny")
        with pytest.raises(ValueError, match=r"data\.jsonl, line 2: expected a target"):
            train.train(
                **options(tmp_path / "run", steps=1, data=config, method=method, teacher=teacher)
            )


def test_evaluation_scores_every_example_once(teacher_dir, tmp_path):
    evaluation = evaluate.EvalConfig(num_examples=11)  # not a multiple of the batch
    train.train(**options(tmp_path, steps=2, evaluation=evaluation))
    last = lines(tmp_path)[-1]
    assert last["step"] == 2
    assert 0 <= last["eval/arithmetic/accuracy"] <= 100
    rows = (tmp_path / "eval" / "arithmetic" / "2.jsonl").read_text().splitlines()
    assert len(rows) == 11
    assert set(json.loads(rows[0])) == {"inputs", "targets", "prediction"}


def test_the_table_of_a_study_has_a_column_for_each_score_of_any_run(tmp_path):
    (tmp_path / "a").mkdir()
    lines = ['{"step": 2, "eval/x/accuracy": 1.0}', '{"step": 4, "eval/x/accuracy": 25.0}']
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = metrics.study_table(tmp_path, ("a", "b"))
    assert table == "| run | x/accuracy |\n|---|---|\n| a | 25.0 |\n| b |  |"
    assert metrics.study_table(tmp_path, ("b",)) == "| run |\n|---|\n| b |"


def test_dry_run_writes_nothing(tmp_path):
    train.train(**options(tmp_path / "none", steps=2), dry_run=True)
    assert not (tmp_path / "none").exists()


def test_metrics_of_a_truncated_last_line_are_dropped(teacher_dir, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stop": 1}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    writer = metrics.Writer(str(tmp_path), resume_step=2)
    writer.write(3, {"train/loss": 1.0})
    writer.close()
    assert [line["step"] for line in metrics.read(path)] == [1, 2, 3]


def test_a_student_of_another_vocabulary_is_refused(teacher_dir, tmp_path):
    student = pretrained.ModelConfig(checkpoint=str(teacher_dir))
    with pytest.raises(ValueError, match="another vocabulary"):
        train.train(
            **options(
                tmp_path,
                steps=2,
                student=student,
                data=DataConfig(
                    task="arithmetic", feature_lengths=LENGTHS, batch_size=8, vocabulary="bytes"
                ),
            )
        )


def test_a_checkpoint_of_another_size_is_refused(teacher_dir, tmp_path):
    student = pretrained.ModelConfig(size="small", checkpoint=str(teacher_dir))
    with pytest.raises(ValueError, match="is not of size 'small': d_model 16 != 512"):
        train.train(**options(tmp_path, steps=2, student=student))


def test_a_teacher_without_weights_is_said_loudly(tmp_path, capfd):
    teacher = pretrained.ModelConfig(architecture=small, size="tiny")
    train.train(**options(tmp_path, steps=1, divergence=divergences.reverse_kl, teacher=teacher))
    assert "WARNING: the teacher has random weights" in capfd.readouterr().err


def test_a_bfloat16_model_is_rounded_from_bytes_that_were_checked(teacher_dir, tmp_path):
    config, wide = loading.load_model(teacher_dir)
    target = lm.abstract_params(config, "bfloat16")
    copy = shutil.copytree(saved_model.find_step(str(teacher_dir)), tmp_path / "copy")
    params = loading.load_params(copy, target, config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), wide)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    about = json.loads((copy / "model" / "metadata").read_text())
    name = sorted(about["fingerprints"]["params"])[1]
    about["fingerprints"]["params"][name] ^= 1
    (copy / "model" / "metadata").write_text(json.dumps(about))
    with pytest.raises(fingerprints.DamagedError, match=f"bytes of {name} are not those that"):
        loading.load_params(copy, target, config)


QUICK = """
import sys
import time
sys.path.insert(0, {tests!r})
from small_runs import options
from gkd_jax.training import train
train.train(**options({folder!r}, steps=2000))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)],
)
def test_a_signal_loses_nothing_that_was_saved(tmp_path, number, status):
    script = QUICK.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    path = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_text()) > 3000):
        time.sleep(0.1)
    # A killed run saves nothing more, so that it needs a checkpoint before.
    is_killed = number == signal.SIGKILL
    while is_killed and process.poll() is None and saved_model.find_step(str(tmp_path)) is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == status, err[-2000:]
    saved = saved_model.find_step(str(tmp_path))
    assert saved is not None
    step = int(saved.name)
    if number == signal.SIGTERM:
        assert f"SIGTERM: saved step {step}" in err
        assert lines(tmp_path)[-1]["step"] == step
    train.train(**options(tmp_path, steps=step + 2))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 3))


def test_samples_drawn_ahead_are_one_update_old_and_none_crosses_a_checkpoint(tmp_path):
    def trained(name, steps, *, ahead, rate):
        trainer = TrainConfig(train_steps=steps, save_period=4, sample_ahead=ahead)
        schedule = optimizers.Linear(learning_rate=rate)
        more = {"teacher": pretrained.ModelConfig(architecture=small, size="tiny"), "fraction": 0.7}
        more |= {"train": trainer, "schedule": schedule, "divergence": divergences.forward_kl}
        train.train(**options(tmp_path / name, steps=steps, **more))
        return {line["step"]: line for line in lines(tmp_path / name)}

    now = trained("now", 8, ahead=False, rate=0.02)
    ahead = trained("ahead", 8, ahead=True, rate=0.02)
    sampled = [step for step, line in now.items() if line["train/on_policy"]]
    assert not any("train/staleness" in line for line in now.values())
    for step, line in ahead.items():
        expected = None if step not in sampled else float(step not in (1, 5))
        assert line.get("train/staleness") == expected
    stale = min(step for step in sampled if step > 1)
    losses = [[line["train/loss"] for line in run.values()] for run in (now, ahead)]
    assert losses[0][: stale - 1] == losses[1][: stale - 1]
    assert losses[0][stale - 1] != losses[1][stale - 1]

    trained("resumed", 4, ahead=True, rate=0.02)
    resumed = trained("resumed", 8, ahead=True, rate=0.02)
    assert [line["train/loss"] for line in resumed.values()] == losses[1]
