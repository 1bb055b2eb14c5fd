"""A run survives or reports injected faults, such as damaged checkpoints, NaN and a full disk."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_runs
from small_runs import LENGTHS, small

from gkd_jax import divergences, gkd
from gkd_jax.evaluation import evaluate
from gkd_jax.input import streams
from gkd_jax.input.data import DataConfig
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage import checkpoints, fingerprints, loading, saved_model
from gkd_jax.storage.loading import load_model
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import metrics, optimizers, samples, train
from gkd_jax.training.recipe import TrainConfig


pytestmark = pytest.mark.usefixtures("shared_steps")
TESTS = pathlib.Path(__file__).parent


def options(model_dir, **more):
    return small_runs.options(
        model_dir, steps=6, **{"train": TrainConfig(train_steps=6, save_period=2), **more}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps with checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.train(**options(folder))
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def equal_params(left, right):
    jax.tree.map(np.testing.assert_array_equal, load_model(str(left))[1], load_model(str(right))[1])


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 16
    path.write_bytes(bytes(content))


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# Checkpoints --------------------------------------------------------------------------------------

DAMAGE = {
    "a flipped bit of the parameters": lambda step: flip(largest_file(step / "params" / "d")),
    "a flipped bit of the optimizer's state": lambda step: flip(
        largest_file(step / "opt_state" / "d")
    ),
    "parameters cut short": lambda step: largest_file(step / "params" / "d").write_bytes(b"x"),
    "parameters cut in half": lambda step: [
        cut_in_half(file) for file in (step / "params").rglob("d/*") if file.stat().st_size > 8192
    ],
    "a missing file": lambda step: largest_file(step / "params" / "d").unlink(),
    "no structure": lambda step: (step / "opt_state" / "_METADATA").unlink(),
    "no stream": lambda step: shutil.rmtree(step / "stream"),
    "bad JSON": lambda step: (step / "model" / "metadata").write_text("{"),
    "no fingerprints": lambda step: (step / "model" / "metadata").write_text('{"family": "t5"}'),
}


# What orbax leaves behind of a read that failed is none of ours.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_taken(damage, run_dir, finished, capfd):
    DAMAGE[damage](run_dir / "checkpoints" / "6")
    more = {"train": TrainConfig(train_steps=7, save_period=2)}
    train.train(**options(run_dir, **more))
    error = capfd.readouterr().err
    assert "WARNING: checkpoint 6 is damaged" in error
    assert "resumed from step 4" in error
    assert (run_dir / "damaged" / "6").is_dir()  # nothing is lost
    whole = shutil.copytree(finished, run_dir.parent / "whole")
    train.train(**options(whole, **more))
    equal_params(run_dir, whole)
    steps = [line["step"] for line in metrics.read(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, 8))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_all_checkpoints_are_damaged_nothing_starts_from_scratch(run_dir):
    for step in ("4", "6"):
        flip(largest_file(run_dir / "checkpoints" / step / "params" / "d"))
    with pytest.raises(ValueError, match=r"none of the checkpoints \[6, 4\]"):
        train.train(**options(run_dir, train=TrainConfig(train_steps=7)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_is_not_loaded_from_damaged_bytes(run_dir):
    flip(largest_file(run_dir / "checkpoints" / "6" / "params" / "d"))
    with pytest.raises(ValueError, match=r"are not those that were written|DATA_LOSS"):
        load_model(str(run_dir))


def test_damage_that_orbax_wraps_in_an_error_of_its_own_is_damage(run_dir, monkeypatch, capfd):
    """Its words for a data file that was cut short; TensorStore's reason is the cause alone."""
    manager = checkpoints.ocp.CheckpointManager
    restore = manager.restore

    def cut(self, step, **arguments):
        if step == 6:
            cause = ValueError("OUT_OF_RANGE: Requested byte range [5, 9) is not valid")
            raise RuntimeError("Encountered error while reading array index") from cause
        return restore(self, step, **arguments)

    monkeypatch.setattr(manager, "restore", cut)
    train.train(**options(run_dir, train=TrainConfig(train_steps=7, save_period=2)))
    assert "resumed from step 4" in capfd.readouterr().err


def test_a_description_that_was_cut_short_is_named(run_dir):
    cut_in_half(run_dir / "checkpoints" / "6" / "model" / "metadata")
    with pytest.raises(fingerprints.DamagedError, match=r"6/model/metadata is damaged"):
        load_model(str(run_dir))


def test_fingerprints_see_every_flipped_bit_and_every_swap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5)).astype(np.float32)
    before = fingerprints.of_tree({"x": x})
    for _ in range(50):
        other = x.copy()
        other.view(np.uint32)[tuple(rng.integers(0, x.shape))] ^= np.uint32(1 << rng.integers(32))
        assert fingerprints.of_tree({"x": other}) != before
    swapped = x.copy()
    swapped[0, 0], swapped[2, 4] = x[2, 4], x[0, 0]
    assert fingerprints.of_tree({"x": swapped}) != before


def test_a_checkpoint_that_cannot_be_written_is_no_mistake_of_the_user(run_dir, monkeypatch):
    """TensorStore raises ValueError at a limit of the size of files: the exit status must be 1."""

    def full(self):
        raise ValueError("OUT_OF_RANGE: Failed writing: File too large")

    manager = checkpoints.ocp.CheckpointManager
    monkeypatch.setattr(manager, "wait_until_finished", full)
    saved = checkpoints.Checkpoints(str(run_dir))
    with pytest.raises(OSError, match="a checkpoint cannot be written: OUT_OF_RANGE"):
        saved.wait()


def test_a_half_written_checkpoint_is_not_taken(run_dir, capfd):
    """A killed save leaves a folder under a temporary name."""
    shutil.copytree(
        run_dir / "checkpoints" / "6", run_dir / "checkpoints" / "8.orbax-checkpoint-tmp-1"
    )
    train.train(**options(run_dir, train=TrainConfig(train_steps=7)))
    assert "resumed from step 6" in capfd.readouterr().err


# Another configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainConfig(train_steps=8, seed=1)}, "train.seed 0 -> 1"),
        ({"optimizer": optimizers.AdamW()}, "optimizer {'type': 'Adafactor'"),
        (
            {"student": ModelConfig(architecture=small, size="tiny", dropout_rate=0.1)},
            "student.dropout_rate 0.0 -> 0.1",
        ),
        (
            {"data": DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=16)},
            "data.batch_size 8 -> 16",
        ),
    ],
)
def test_a_model_dir_of_another_configuration_is_refused(change, message, run_dir):
    config = (run_dir / "config.gin").read_text()
    with pytest.raises(ValueError, match="holds another configuration's run") as error:
        train.train(**options(run_dir, **change))
    assert message in str(error.value)
    assert (run_dir / "config.gin").read_text() == config


def test_lengths_periods_and_meshes_may_change(run_dir):
    trainer = TrainConfig(train_steps=8, save_period=1, log_period=3)
    evaluation = evaluate.EvalConfig(num_examples=4, split="test")
    train.train(**options(run_dir, train=trainer, mesh=MeshConfig(data=8), evaluation=evaluation))
    assert metrics.read(run_dir / "metrics.jsonl")[-1]["step"] == 8


# Numbers ------------------------------------------------------------------------------------------


WORD = 35  # occurs in some of the first batches, and not in others


def write_broken_teacher(finished, folder, words):
    """Writes a teacher whose logits are NaN if one of the words occurs in the targets."""
    config, params = load_model(str(finished))
    table = np.array(params["token_embedder"]["embedding"])
    table[words] = np.nan
    params["token_embedder"]["embedding"] = jax.numpy.asarray(table)
    saved_model.write_params(str(folder), config, params, "")
    return str(folder)


@pytest.fixture
def broken_teacher(finished, tmp_path, monkeypatch):
    """A teacher that loads, but whose logits are NaN if one word occurs in the targets."""
    monkeypatch.setattr(loading, "check_finite", lambda params, path: None)
    return write_broken_teacher(finished, tmp_path / "teacher", WORD)


def distil(folder, teacher, **more):
    return options(
        folder,
        teacher=ModelConfig(checkpoint=teacher),
        method=gkd.GKDConfig(on_policy_fraction=0.0, divergence=divergences.forward_kl),
        **more,
    )


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_batch(broken_teacher, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+ \(dataset batch\): loss nan") as error:
        train.train(**distil(tmp_path / "run", broken_teacher))
    step = int(str(error.value).split()[1])
    with np.load(tmp_path / "run" / f"nonfinite_{step}.npz") as arrays:
        batch = dict(arrays)
    assert set(batch) == {"inputs", "targets", "weights", "input_lengths"}
    assert batch["inputs"].shape == (8, 48)
    assert (batch["inputs"] == WORD).any() or (batch["targets"] == WORD).any()


def test_steps_that_are_not_finite_can_be_skipped_and_are_counted(broken_teacher, tmp_path):
    trainer = TrainConfig(train_steps=6, skip_nonfinite=True)
    schedule = optimizers.Linear(learning_rate=0.06, warmup_steps=6)
    train.train(**distil(tmp_path / "run", broken_teacher, train=trainer, schedule=schedule))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 6
    skipped = [line["train/skipped"] for line in lines]
    assert set(skipped) == {0.0, 1.0}
    # The schedule counts the updates that were done.
    rates = [0.01 * (step - sum(skipped[:step])) for step in range(6)]
    np.testing.assert_allclose([line["train/learning_rate"] for line in lines], rates, rtol=1e-5)
    for leaf in jax.tree.leaves(load_model(str(tmp_path / "run"))[1]):
        assert np.isfinite(leaf).all()


def test_a_run_whose_steps_were_all_skipped_fails_whenever_it_is_started(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "check_finite", lambda params, path: None)
    teacher = write_broken_teacher(finished, tmp_path / "teacher", slice(None))
    folder = tmp_path / "run"
    trainer = TrainConfig(train_steps=2, skip_nonfinite=True)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"all 2 steps were skipped.*metrics\.jsonl"):
            train.train(**distil(folder, teacher, train=trainer))
        assert saved_model.saved_steps(folder) == [2]


# Data ---------------------------------------------------------------------------------------------


def test_a_source_that_raises_ends_the_run_and_the_next_goes_on(run_dir, monkeypatch, tmp_path):
    real = streams.TrainIterator.__next__

    def failing(self, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 4:
            raise OSError("the disk is gone")
        return real(self)

    monkeypatch.setattr(streams.TrainIterator, "__next__", failing)
    more = {"train": TrainConfig(train_steps=12, save_period=2)}
    with pytest.raises(OSError, match="the disk is gone"):
        train.train(**options(run_dir, **more))
    monkeypatch.undo()
    train.train(**options(run_dir, **more))
    train.train(**options(tmp_path / "whole", **more))
    equal_params(run_dir, tmp_path / "whole")


def test_an_empty_dataset_is_an_error_not_a_wait(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config = DataConfig(
        task=str(tmp_path / "empty.jsonl"),
        vocabulary="arithmetic",
        feature_lengths=LENGTHS,
        batch_size=8,
    )
    with pytest.raises(ValueError, match="expected a JSON object a line, got an empty file"):
        train.train(**options(tmp_path / "run", data=config))


def test_a_model_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"MODEL_DIR must be a folder, and '.*file' is a file"):
        train.train(**options(tmp_path / "file" / "run"))


# What stays ---------------------------------------------------------------------------------------


def kept_steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())


def test_the_newest_every_fourth_and_the_best_checkpoint_stay(tmp_path, monkeypatch, capfd):
    """A resumed run still knows the best checkpoint from before."""
    scores = iter([0.05, 0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])  # the first is of step 0

    def scored(*_):
        return {"accuracy": next(scores)}

    monkeypatch.setattr(evaluate, "compute_metrics", scored)

    def run(steps):
        trainer = TrainConfig(
            train_steps=steps,
            eval_period=1,
            save_period=1,
            keep=1,
            keep_period=4,
            best_metric="accuracy",
        )
        evaluation = evaluate.EvalConfig(num_examples=8)
        train.train(**options(tmp_path / "run", train=trainer, evaluation=evaluation))

    run(6)
    assert kept_steps(tmp_path / "run") == [2, 4, 6]
    run(8)
    assert kept_steps(tmp_path / "run") == [2, 4, 8]
    assert "best checkpoint: step 2, accuracy 0.9" in capfd.readouterr().out


def test_the_best_may_be_the_least(tmp_path, monkeypatch):
    scores = iter([0.7, 0.5, 0.1, 0.2, 0.3])  # the first is of step 0
    monkeypatch.setattr(
        evaluate, "compute_metrics", lambda *_: {"teacher_divergence": next(scores)}
    )
    trainer = TrainConfig(
        train_steps=4,
        eval_period=1,
        save_period=1,
        keep=1,
        best_metric="teacher_divergence",
        best_mode="min",
    )
    evaluation = evaluate.EvalConfig(num_examples=8)
    train.train(**options(tmp_path / "run", train=trainer, evaluation=evaluation))
    assert kept_steps(tmp_path / "run") == [2, 4]


def test_a_metric_that_the_evaluation_lacks_is_said_and_nothing_is_lost(tmp_path, capfd):
    trainer = TrainConfig(train_steps=2, eval_period=1, save_period=1, best_metric="bleu")
    evaluation = evaluate.EvalConfig(num_examples=8)
    train.train(**options(tmp_path / "run", train=trainer, evaluation=evaluation))
    assert "has no eval/arithmetic/bleu, but eval/arithmetic/accuracy" in capfd.readouterr().err
    assert kept_steps(tmp_path / "run") == [1, 2]


# A full disk --------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_saving_ends_the_run_and_the_next_goes_on(
    finished, run_dir, tmp_path, monkeypatch, capfd
):
    """A limit on the size of files stands for the full disk, so that the write itself fails."""
    script = FULL_DISK.format(tests=str(TESTS), folder=str(run_dir))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode not in (0, -signal.SIGKILL), done.stderr[-2000:]
    assert kept_steps(run_dir) == [4, 6]  # what was there is there, and nothing half-written
    train.train(**options(run_dir, train=TrainConfig(train_steps=8, save_period=2)))
    train.train(**options(tmp_path / "whole", train=TrainConfig(train_steps=8, save_period=2)))
    equal_params(run_dir, tmp_path / "whole")


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from gkd_jax.storage.checkpoints import Checkpoints
from gkd_jax.training import train
from gkd_jax.training.recipe import TrainConfig
from small_runs import options

save = Checkpoints.save
def save_on_a_full_disk(*arguments, **more):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
    save(*arguments, **more)
Checkpoints.save = save_on_a_full_disk
config = TrainConfig(train_steps=8, save_period=2)
train.train(**options({folder!r}, steps=8, train=config))
"""


# The student's samples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad", "said"),
    [
        ("sample_length", 10.0, 20.0, "samples grow: "),
        ("truncated_fraction", 0.1, 0.9, "reach the target length before they end: "),
        ("distinct_2", 0.9, 0.3, "samples repeat themselves: "),
        ("sample_entropy", 1.0, 0.01, "entropy collapses: 0.010 nats a token in the last 5"),
    ],
)
def test_samples_that_go_wrong_are_warned_of_once(name, good, bad, said):
    usual = {"sample_length": 10.0, "truncated_fraction": 0.1, "sample_entropy": 1.0}
    usual = {f"train/{key}": value for key, value in {**usual, "distinct_2": 0.9}.items()}
    watch = samples.SampleWatch(window=5)

    def warnings(value):
        return [w for _ in range(10) for w in watch.see({**usual, f"train/{name}": value})]

    assert warnings(good) == []
    assert watch.see({"train/loss": 1.0}) == []  # a step that did not sample
    found = warnings(bad)
    assert [said in text for text in found] == [True]
    assert warnings(bad) == []


def test_the_record_of_a_run_tells_its_first_batch(finished, tmp_path):
    def record(folder):
        return json.loads((folder / "run.json").read_text())["first_batch"]

    train.train(**options(tmp_path / "same"))
    assert record(tmp_path / "same") == record(finished)
    train.train(**options(tmp_path / "same", train=TrainConfig(train_steps=7)))
    assert record(tmp_path / "same") == record(finished)  # a resume keeps it
    other = DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=8, seed=1)
    train.train(**options(tmp_path / "other", data=other))
    assert record(tmp_path / "other") != record(finished)
