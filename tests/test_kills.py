"""A run that is killed at a random moment and started again ends as one that was never killed.

Moments inside a save are included. Run: pytest -m slow tests/test_kills.py       # 30 kills
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from conftest import COMPILE_FAST
import jax
import numpy as np
import pytest

import gin
from gkd_jax import main, sharding
from gkd_jax.storage.loading import load_model
from gkd_jax.training import metrics


ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 30


def arguments(model_dir):
    """Of on-policy GKD with two saves before the last one."""
    options = {
        "MODEL_DIR": repr(str(model_dir)),
        "MIXTURE_OR_TASK_NAME": "'arithmetic'",
        "TASK_FEATURE_LENGTHS": "{'inputs': 40, 'targets': 16}",
        "STUDENT_SIZE": "'tiny'",
        "TEACHER_SIZE": "'tiny'",
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": STEPS,
        "SAVE_PERIOD": 10,
        "ON_POLICY_FRACTION": 0.7,
        "EVAL_NUM_EXAMPLES": 8,
    }
    flags = [f"--gin.{name}={value}" for name, value in options.items()]
    return ["train", f"--gin_file={ROOT}/gin/gkd.gin", *flags]


def start(model_dir):
    command = [sys.executable, "-m", "gkd_jax", *arguments(model_dir)]
    environment = {**os.environ, "XLA_FLAGS": COMPILE_FAST}  # one device
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="module", autouse=True)
def one_device(shared_steps):
    """Runs in this process have one device, as those that are killed have."""
    devices, make = jax.devices()[:1], sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config, _: make(config, devices))
        yield


def finish(model_dir):
    """Runs the command to its end, in this process."""
    gin.clear_config()
    main.main(arguments(model_dir))
    gin.clear_config()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(folder)
    return folder


def kill(model_dir, generator):
    """Kills a new run during a save, or some time after a random step; returns where."""
    saving = generator.random() < 0.5
    step = generator.choice([10, 20, 30]) if saving else generator.randrange(1, STEPS)
    process = start(model_dir)
    deadline = time.monotonic() + 240
    path = model_dir / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if saving and (model_dir / "checkpoints").is_dir():
            # The folder has another name until it is complete.
            if any(p.name.startswith(f"{step}.") for p in (model_dir / "checkpoints").iterdir()):
                break
        elif not saving and path.exists() and len(path.read_bytes().splitlines()) >= step:
            break
        time.sleep(0.0005)
    time.sleep(generator.random() * 0.03)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return f"{'saving ' if saving else ''}step {step}"


def losses(model_dir):
    return metrics.values_by_step(model_dir / "metrics.jsonl", "train/loss")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_killed_run_ends_as_one_never_killed(seed, uninterrupted, tmp_path, capfd):
    where = kill(tmp_path / "run", random.Random(seed))
    capfd.readouterr()
    finish(tmp_path / "run")
    output = capfd.readouterr().err
    found, expected = (load_model(str(folder))[1] for folder in (tmp_path / "run", uninterrupted))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert losses(tmp_path / "run") == losses(uninterrupted), where
    resumed = [line for line in output.splitlines() if line.startswith("resumed")]
    print(f"killed at {where}; {resumed or 'from the start'}")
