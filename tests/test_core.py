"""The core runs without TensorFlow and seqio, which a GPU image or a notebook may lack."""

import json
import pathlib
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKED = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets"):
            return None  # as where they are not installed
        return super().find_spec(name, path, target)

sys.meta_path = [
    Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""
USE = """
import jax, numpy as np
from gkd_jax import Batch, gkd_config, load_model, sample
from gkd_jax import divergences, gkd
from gkd_jax.models import lm, t5
from gkd_jax.sampling import SamplingConfig
from gkd_jax.storage import saved_model
from gkd_jax.training import optimizers, train_state

config = t5.t5_1_1("32x2", 128)
params = lm.init(config, jax.random.key(0))
saved_model.write_params(sys.argv[1], config, params, "")
config, params = load_model(sys.argv[1])
inputs = np.arange(3, 15, dtype=np.int32).reshape(2, 6)
greedy = SamplingConfig(temperature=0.0)
drawn = sample(config, params, inputs, max_length=4, sampling=greedy)
batch = Batch(inputs, np.asarray(drawn.tokens), np.asarray(drawn.weights))
assert t5.logits(config, params, batch).shape == lm.logits(config, params, batch).shape
models = gkd_config.ModelPair(student=config, teacher=config, num_pieces=128)
method = gkd.GKDConfig(divergence=divergences.JSD())
optimizer = optimizers.Adafactor()(lambda step: 0.01)
learner = gkd.Learner(config=method, models=models, optimizer=optimizer)
state = train_state.create(params, optimizer)
state, values = gkd.update(learner, state, params, batch, jax.random.key(1))
assert float(values["loss"]) == 0.0, values  # the student is its own teacher
"""
RUN = """
from gkd_jax.main import main
main(sys.argv[1:])
"""
BENCH_AND_PRECOMPILE = """
import gin
from gkd_jax.main import main
from gkd_jax.planning import bench
# These take as long as all of the rest; tests/test_bench.py runs them.
bench.gemm_gflops, bench.copy_gb_per_s = lambda dtype: 1.0, lambda: 1.0
for command in (["bench", "--runs=1"], ["precompile", "--topology=cpu"]):
    gin.clear_config()
    main([*command, "--json", "--gin_file=gin/bench/config1.gin", *sys.argv[2:]])
    print("END")
"""
SMALL = [
    "--gin.BATCH_SIZE=8",
    "--gin.STUDENT_SIZE=32x2",
    "--gin.TEACHER_SIZE=32x2",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
]


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_commands_that_read_no_data_models_samples_and_updates(tmp_path):
    """All in one process: its imports take longer than what it does."""
    done = python(BENCH_AND_PRECOMPILE + USE, str(tmp_path / "model"), *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    times, memory, rest = done.stdout.split("END\n")
    assert json.loads(times)["step_ms"] > 0
    assert json.loads(memory)["phases"]["update"]["peak_bytes"] > 0
    assert rest == ""


def test_what_needs_them_says_so():
    done = python(RUN, "train", "--gin_file=quickstart", "--dry_run")
    assert done.returncode != 0
    assert "No module named 'tensorflow'" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_slow(arguments):
    code = "from gkd_jax.main import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1]
    assert not any(f"'{name}'" in modules for name in ("jax", "numpy", "gin", "flax"))
