"""Two processes on one machine make the same run as one process, and share its checkpoints."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from conftest import COMPILE_FAST
import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest
from small_runs import LENGTHS, write_decoder
import small_tokenizers

import gin
from gkd_jax import main, sharding
from gkd_jax.batch import Batch
from gkd_jax.input import data, named_tasks, streams
from gkd_jax.storage import saved_model
from gkd_jax.training import metrics, rollouts, run_folder


pytestmark = pytest.mark.usefixtures("shared_steps")
ROOT = pathlib.Path(__file__).resolve().parent.parent
ARGUMENTS = [
    "--gin_file=gin/gkd.gin",
    "--gin.MIXTURE_OR_TASK_NAME='arithmetic'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 24}",
    "--gin.STUDENT_SIZE='32x2'",
    "--gin.TEACHER_SIZE='32x2'",
    "--gin.BATCH_SIZE=8",
    "--gin.LEARNING_RATE=0.01",
    "--gin.ON_POLICY_FRACTION=0.5",
    "--gin.EVAL_NUM_EXAMPLES=8",
    "--gin.sharding.MeshConfig.fsdp=2",
]

BATCH = Batch(np.ones((2, 3), np.int32), np.ones((2, 3), np.int32), np.ones((2, 3)))


def start(model_dir, *more):
    """Starts two processes of one job with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for index in range(2):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {COMPILE_FAST}",
            "GKD_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "GKD_JAX_NUM_PROCESSES": "2",
            "GKD_JAX_PROCESS_ID": str(index),
            "GKD_JAX_HEARTBEAT_TIMEOUT": "10",
        }
        command = [sys.executable, "-m", "gkd_jax", "train", *ARGUMENTS, *more]
        found.append(
            subprocess.Popen(
                [*command, f"--gin.MODEL_DIR='{model_dir}'"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return found


def run_here(model_dir, *more):
    """Runs the same command in this process, on its eight devices."""
    gin.clear_config()
    main.main(["train", *ARGUMENTS, *more, f"--gin.MODEL_DIR='{model_dir}'"])
    gin.clear_config()


def statuses(processes):
    texts = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], texts


def lines(model_dir, key):
    return metrics.values_by_step(model_dir / "metrics.jsonl", key)


def test_two_processes_equal_one_which_goes_on_from_their_checkpoint(tmp_path, capfd):
    """Six steps in one process equal four in two processes and two more in one."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_here(alone, "--gin.TRAIN_STEPS=6")
    codes, texts = statuses(start(together, "--gin.TRAIN_STEPS=4", "--gin.SAVE_PERIOD=0.01 s"))
    assert codes == [0, 0], texts
    assert len(saved_model.saved_steps(together)) == 2  # by the clock of process 0, and at the end
    capfd.readouterr()
    run_here(together, "--gin.TRAIN_STEPS=6")
    assert "resumed from step 4" in capfd.readouterr().err
    for key in ("train/loss", "train/grad_norm"):
        expected, got = lines(alone, key), lines(together, key)
        assert list(got) == list(expected) == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-4)
    # The same coins and the same samples.
    for key in ("train/on_policy", "train/sample_length"):
        assert lines(alone, key) == lines(together, key)
    assert set(lines(alone, "train/on_policy").values()) == {0.0, 1.0}
    read = [(path / "eval" / "arithmetic" / "6.jsonl").read_text() for path in (alone, together)]
    predictions = [[json.loads(line)["prediction"] for line in text.splitlines()] for text in read]
    assert predictions[0] == predictions[1]
    assert len(predictions[0]) == 8


def wait_for_step(model_dir, step):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if step in lines(model_dir, "train/loss"):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} in {model_dir}")


SHARDED = "--gin.data.DataConfig.shard_by_process=True"


class BothShards(streams.TrainIterator):
    """The streams of two processes in one: the rows of the first, then those of the second."""

    def __init__(self, task, config, _):
        shards = (data.Shard(index, 2, index) for index in range(2))
        self._streams = [BothShards.__base__(task, config, shard) for shard in shards]
        self._peeked = None

    def __next__(self):
        peeked, self._peeked = self._peeked, None
        if peeked is not None:
            return peeked
        parts = [next(stream) for stream in self._streams]
        arrays = (np.concatenate([part[i] for part in parts]) for i in range(3))
        lengths = np.concatenate([part.input_lengths for part in parts])
        return Batch(*arrays, input_lengths=lengths)

    def save(self, directory):
        directory.joinpath("none").touch()


def replay(model_dir, steps, monkeypatch, *more):
    """The losses of a run in this process that reads its rows as two processes do."""
    with monkeypatch.context() as patched:
        patched.setattr(streams, "TrainIterator", BothShards)
        run_here(model_dir, f"--gin.TRAIN_STEPS={steps}", *more)
    return lines(model_dir, "train/loss")


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_both(tmp_path, monkeypatch, capfd):
    """Each process reads its own part of the data, and saves its position there."""
    together = tmp_path / "together"
    processes = start(together, SHARDED, "--gin.TRAIN_STEPS=100000")
    wait_for_step(together, 2)
    processes[1].send_signal(signal.SIGTERM)
    codes, texts = statuses(processes)
    assert codes == [143, 143], texts
    saved = [int(path.name) for path in (together / "checkpoints").iterdir()]
    losses = lines(together, "train/loss")
    assert saved == [max(losses)]
    stored = {path.name for path in together.glob("checkpoints/*/stream/iterator*")}
    assert stored == {"iterator-00000-of-00002.0.json", "iterator-00001-of-00002.0.json"}
    expected = replay(tmp_path / "alone", saved[0], monkeypatch)
    assert losses == pytest.approx(expected, rel=1e-4)
    capfd.readouterr()
    with pytest.raises(SystemExit):  # one process cannot go on where two stopped
        run_here(together, SHARDED)
    said = capfd.readouterr().err
    assert "process_shards 2 -> 1" in said
    assert "start as many processes as before" in said
    assert (together / "checkpoints" / str(saved[0])).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gkd", "rl_gkd"])
def test_processes_that_read_their_own_parts_go_on_where_they_stopped(
    method, tmp_path, monkeypatch
):
    """With a reward, which needs the texts of all rows, and after damage to one process' file."""
    more = [f"--gin_file=gin/{method}.gin", "--gin.NUM_SAMPLES=2"]
    if method == "rl_gkd":
        more += ["--gin.REWARD=@rewards.brevity", "--gin.rewards.brevity.limit=2"]
    together = tmp_path / "together"
    for steps in (4, 7):
        flags = ["--gin.SAVE_PERIOD=2", f"--gin.TRAIN_STEPS={steps}", *more]
        codes, texts = statuses(start(together, SHARDED, *flags))
        assert codes == [0, 0], texts
        if steps == 4 and method == "gkd":
            stream = together / "checkpoints" / "4" / "stream"
            (stream / "iterator-00001-of-00002.0.json").write_bytes(b"x")
    if method == "gkd":
        assert all("resumed from step 2" in text for text in texts), texts
        assert (together / "damaged" / "4").is_dir()
    expected = replay(tmp_path / "alone", 7, monkeypatch, *more)
    assert lines(together, "train/loss") == pytest.approx(expected, rel=1e-4)
    if method == "rl_gkd":
        rewards = [lines(tmp_path / name, "train/reward") for name in ("together", "alone")]
        assert rewards[0] == rewards[1]
        assert len(set(rewards[0].values())) > 1


def read(shard, steps, **more):
    """The rows that a process reads in a number of steps of 8 rows, as bytes."""
    config = data.DataConfig(
        task="arithmetic", feature_lengths=LENGTHS, batch_size=8, shard_by_process=True, **more
    )
    task, _ = named_tasks.open_task(config)
    stream = streams.TrainIterator({task.name: task}, config, shard)
    batches = [next(stream) for _ in range(steps)]
    return [row.tobytes() for batch in batches for row in batch.inputs]


def test_shards_are_disjoint_and_together_the_whole():
    whole = set(read(data.WHOLE, 4, num_examples=32))
    parts = [set(read(data.Shard(index, 2, index), 4, num_examples=32)) for index in range(2)]
    assert [len(part) for part in parts] == [16, 16]
    assert parts[0] | parts[1] == whole
    parts = [set(read(data.Shard(index, 2, index), 40)) for index in range(2)]
    assert len(parts[0] | parts[1]) == 2 * 40 * 4  # none of 50,000 twice


@pytest.mark.parametrize(
    ("processes", "rows", "expected"),
    [
        ([0, 0, 1, 1], [0, 2, 4, 6], [(0, 2), (1, 2)]),
        ([1, 0, 1, 0], [0, 4, 2, 6], [(1, 2), (0, 2)]),
        ([0, 1, 2, 3], [0, 0, 4, 4], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor over two
        ([0, 1], [0, 0], [(0, 1), (0, 1)]),
        ([0, 0, 1, 1], [0, 4, 4, 0], [(0, 1), (0, 1)]),
        ([0, 0, 1, 1], [0, 4, 4, 6], None),
        ([0, 0, 1], [0, 2, 4], None),
        ([0, 0, 1, 2], [0, 2, 4, 6], None),
    ],
)
def test_processes_with_the_same_rows_read_the_same(processes, rows, expected, monkeypatch):
    class Where:
        def devices_indices_map(self, shape):
            assert shape == (8,)
            starts = [(slice(row, row + 2),) for row in rows]
            return dict(zip(map(Device, processes), starts, strict=True))

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    monkeypatch.setattr(sharding, "batch_sharding", lambda *_: Where())
    config = data.DataConfig(
        task="arithmetic", feature_lengths=LENGTHS, batch_size=8, shard_by_process=True
    )
    mesh = sharding.make_mesh(sharding.MeshConfig())

    def shard(index):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        return data.process_shard(config, mesh)

    if expected is None:
        with pytest.raises(ValueError, match="all the same or all different"):
            shard(0)
        return
    found = [shard(index) for index in sorted(set(processes))]
    assert [(part.index, part.num_shards) for part in found] == expected
    writers = {part.index: part.first_process for part in found}
    assert all(found[process].index == index for index, process in writers.items())
    assert min(writers.values()) == 0
    few = dataclasses.replace(config, num_examples=1)
    if found[0].num_shards > 1:
        with pytest.raises(ValueError, match="num_examples=1"):
            data.process_shard(few, mesh)
        uneven = dataclasses.replace(config, task={"arithmetic": 5, "arithmetic_backwards": 3})
        with pytest.raises(ValueError, match="shards has the same number of rows of every"):
            data.process_shard(uneven, mesh)


@pytest.mark.parametrize("own_fails", [True, False])
@pytest.mark.parametrize("another_fails", [True, False])
def test_a_row_that_is_in_no_cache_ends_every_process(own_fails, another_fails, monkeypatch):
    rows, scored = BATCH, BATCH._replace(weights=np.zeros((2, 3)))

    class Cache:
        def attach(self, _):
            if own_fails:
                raise ValueError("the cache lacks a row")
            return scored

    def gather(failed):
        assert bool(failed) == own_fails  # a process that fails still tells the others
        return np.stack([failed, np.asarray(another_fails)])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    drawing = rollouts.Rollouts.__new__(rollouts.Rollouts)
    drawing._cache, drawing._is_sharded = Cache(), True
    if own_fails or another_fails:
        said = "the cache lacks a row" if own_fails else "a row that another process reads"
        with pytest.raises(ValueError, match=said):
            drawing._with_scores(rows)
    else:
        assert drawing._with_scores(rows) is scored


@pytest.mark.parametrize("own_fails", [True, False])
@pytest.mark.parametrize("another_fails", [True, False])
def test_a_shard_without_examples_ends_every_process(own_fails, another_fails, monkeypatch):
    class Stream(streams.TrainIterator):
        def __init__(self):
            pass

        def peek(self):
            if own_fails:
                raise ValueError("no examples for shard 1 of 2")
            return BATCH

    def gather(failed):
        assert bool(failed) == own_fails  # a process that fails still tells the others
        return np.stack([failed, np.asarray(another_fails)])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    if own_fails or another_fails:
        said = "no examples for shard 1" if own_fails else "another process cannot read its first"
        with pytest.raises(ValueError, match=said):
            run_folder._first_batch(Stream())
    else:
        assert run_folder._first_batch(Stream()) is BATCH


@pytest.mark.slow
def test_one_process_without_examples_ends_both_at_once(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"inputs": "1 + 1", "targets": "2"}\n')
    flags = [f"--gin.MIXTURE_OR_TASK_NAME='{tmp_path / 'data.jsonl'}'", "--gin.VOCABULARY=bytes"]
    codes, texts = statuses(start(tmp_path / "run", SHARDED, *flags, "--gin.EVAL_NUM_EXAMPLES=0"))
    assert codes == [2, 2], texts
    assert "another process cannot read its first batch" in texts[0]
    assert "has no examples for shard 1 of 2" in texts[1]


@pytest.mark.slow
def test_a_row_that_one_process_finds_in_no_cache_ends_both_at_once(tmp_path):
    """Only the first process reads example 40 of 41, and the cache has the first 40."""
    cache = tmp_path / "cache"
    gin.clear_config()
    score = ["score", "--gin_file=gin/score.gin", f"--gin.OUTPUT='{cache}'"]
    score += [
        "--gin.CHECKPOINT=None",
        "--gin.SIZE='32x2'",
        "--gin.NUM_EXAMPLES=40",
        "--gin.K=4",
        *ARGUMENTS[1:3],
    ]
    main.main([*score, "--gin.BATCH_SIZE=8"])
    gin.clear_config()
    flags = ["--gin.NUM_EXAMPLES=41", "--gin.TRAIN_STEPS=100000", "--gin.ON_POLICY_FRACTION=0.0"]
    flags += ["--gin.EVAL_NUM_EXAMPLES=0", f"--gin.data.DataConfig.teacher_cache='{cache}'"]
    codes, texts = statuses(start(tmp_path / "run", SHARDED, *flags))
    assert codes == [2, 2], texts
    assert "lacks a row of the training data: inputs" in texts[0]
    assert "lacks a row that another process reads" in texts[1]


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_both(tmp_path):
    """Only the second process reads the row with a token that the teacher's tokenizer lacks."""
    tokenizer = small_tokenizers.train("qwen")
    for seed, name in enumerate(("student", "teacher")):
        write_decoder(tmp_path / name, tokenizer, tokenizer.get_vocab_size(), seed)
    stored = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(stored.read_text())
    content["added_tokens"] = [x for x in content["added_tokens"] if "think" not in x["content"]]
    stored.write_text(json.dumps(content))
    rows = [{"inputs": f"{number} + 1", "targets": "eggs"} for number in range(41)]
    rows[7]["targets"] = "<think>"
    lines = map(json.dumps, rows)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = [
        f"--gin.MIXTURE_OR_TASK_NAME='{tmp_path / 'data.jsonl'}'",
        f"--gin.STUDENT_CHECKPOINT='{tmp_path / 'student'}'",
        f"--gin.TEACHER_CHECKPOINT='{tmp_path / 'teacher'}'",
        "--gin.STUDENT_SIZE=None",
        "--gin.TEACHER_SIZE=None",
        "--gin.TRAIN_STEPS=100000",
        "--gin.EVAL_NUM_EXAMPLES=0",
    ]
    codes, texts = statuses(start(tmp_path / "run", SHARDED, *flags))
    assert codes[1] == 2, texts
    assert codes[0] != 0
    assert "leave texts with this token out" in texts[1]


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_too(tmp_path):
    processes = start(tmp_path, "--gin.TRAIN_STEPS=100000", "--gin.SAVE_PERIOD=2")
    wait_for_step(tmp_path, 5)
    began = time.monotonic()
    processes[1].kill()
    codes, _ = statuses(processes)
    assert codes[0] != 0
    assert time.monotonic() - began < 60
