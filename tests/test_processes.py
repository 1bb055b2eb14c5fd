"""Two processes on one machine make the same run as one, and share its checkpoints."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from conftest import COMPILE_FAST
import numpy as np
import pytest

import gin
from gkd_jax import main


ROOT = pathlib.Path(__file__).resolve().parent.parent
ARGUMENTS = [
    "--gin_file=gin/gkd.gin",
    "--gin.MIXTURE_OR_TASK_NAME='arithmetic'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 24}",
    "--gin.STUDENT_SIZE='tiny'",
    "--gin.TEACHER_SIZE='tiny'",
    "--gin.BATCH_SIZE=8",
    "--gin.LEARNING_RATE=0.01",
    "--gin.ON_POLICY_FRACTION=0.5",
    "--gin.EVAL_NUM_EXAMPLES=8",
    "--gin.sharding.MeshConfig.fsdp=2",
    "--gin.t5.t5_1_1.num_layers=1",
]


def start(model_dir, *more):
    """Two processes of one job, four devices each."""
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
    """The same command in this process, on its eight devices."""
    gin.clear_config()
    main.main(["train", *ARGUMENTS, *more, f"--gin.MODEL_DIR='{model_dir}'"])
    gin.clear_config()


def statuses(processes):
    texts = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], texts


def lines(model_dir, key):
    text = (model_dir / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return {line["step"]: line[key] for line in found if key in line}


def test_two_processes_equal_one_and_resume_each_other_s_checkpoints(tmp_path, capfd):
    """Six steps in one process; four in two processes, then two more in one."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_here(alone, "--gin.TRAIN_STEPS=6")
    codes, texts = statuses(start(together, "--gin.TRAIN_STEPS=4"))
    assert codes == [0, 0], texts
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
        if (model_dir / "metrics.jsonl").exists() and step in lines(model_dir, "train/loss"):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} in {model_dir}")


def test_a_signal_to_one_process_saves_and_ends_both(tmp_path):
    processes = start(tmp_path, "--gin.TRAIN_STEPS=100000")
    wait_for_step(tmp_path, 2)
    processes[1].send_signal(signal.SIGTERM)
    codes, texts = statuses(processes)
    assert codes == [143, 143], texts
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert saved == [max(lines(tmp_path, "train/loss"))]


@pytest.mark.slow
def test_when_one_process_is_killed_the_other_ends_too(tmp_path):
    processes = start(tmp_path, "--gin.TRAIN_STEPS=100000", "--gin.SAVE_PERIOD=2")
    wait_for_step(tmp_path, 5)
    began = time.monotonic()
    processes[1].kill()
    codes, _ = statuses(processes)
    assert codes[0] != 0
    assert time.monotonic() - began < 60
