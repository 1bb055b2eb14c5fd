"""Right command lines run; wrong ones end with exit status 2 and one clear line."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import gin
from gkd_jax import main
from gkd_jax.storage import loading


pytestmark = pytest.mark.usefixtures("fresh_gin")
ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = [
    "--gin.MIXTURE_OR_TASK_NAME='arithmetic'",
    "--gin.STUDENT_SIZE='tiny'",
    "--gin.TEACHER_SIZE='tiny'",
]
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 24}"


def run(*arguments):
    """The exit status of a command; 0 if it returns."""
    try:
        main.main(list(arguments))
    except SystemExit as error:
        return error.code or 0
    return 0


def train(tmp_path, *more):
    return run("train", "--gin_file=gin/gkd.gin", f"--gin.MODEL_DIR='{tmp_path}/run'", *TINY, *more)


def test_gkd_trains_evaluates_and_converts(tmp_path, capfd):
    steps = ["--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=8", LENGTHS]
    assert train(tmp_path, *steps, "--gin.evaluate.EvalConfig.num_examples=3") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2]
    assert "recipe.Recipe" in (tmp_path / "run" / "config.gin").read_text()
    gin.clear_config()
    common = [
        f"--gin.CHECKPOINT='{tmp_path}/run'",
        "--gin.MIXTURE_OR_TASK_NAME='arithmetic'",
        "--gin.TEMPLATE_VARIABLES={'enable_thinking': False}",
        "--gin.NUM_EXAMPLES=5",
        "--gin.BATCH_SIZE=8",
        LENGTHS,
    ]
    assert (
        run("eval", "--gin_file=gin/eval.gin", f"--gin.OUTPUT_DIR='{tmp_path}/eval'", *common) == 0
    )
    scores = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert set(scores["arithmetic"]) == {"accuracy", "accuracy_with_calculator"}
    gin.clear_config()
    output = tmp_path / "out.jsonl"
    assert run("infer", "--gin_file=gin/infer.gin", f"--gin.OUTPUT='{output}'", *common) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 5
    assert set(rows[0]) == {"inputs", "targets", "reference", "truncated"}  # it learnt no end yet
    assert rows[0]["truncated"] is True
    about = json.loads((tmp_path / "out.jsonl.made_by.json").read_text())
    assert about["template_variables"] == {"enable_thinking": False}
    gin.clear_config()
    beams = [f"--gin.OUTPUT='{tmp_path}/beams.jsonl'", "--gin.DECODING='beam'", *common]
    assert run("infer", "--gin_file=gin/infer.gin", *beams) == 0
    assert len((tmp_path / "beams.jsonl").read_text().splitlines()) == 5
    for form in ("hf", "t5x", "gkd"):
        target = tmp_path / form
        assert run("convert", f"--input={tmp_path}/run", f"--output={target}", f"--to={form}") == 0
    config, _ = loading.load_model(str(tmp_path / "gkd"))
    assert loading.load_config(str(tmp_path / "hf")).d_model == config.d_model
    assert loading.load_config(str(tmp_path / "t5x" / "checkpoint_2")).d_model == config.d_model


def test_an_override_may_name_a_function(tmp_path, capfd):
    assert train(tmp_path, "--gin.DIVERGENCE=@divergences.reverse_kl", LENGTHS, "--dry_run") == 0
    assert "reverse_kl" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_schedule_may_be_named_on_the_command_line(tmp_path, capfd):
    settings = {"init_value": 0.0, "end_value": 1.0, "transition_steps": 3}
    given = [f"--gin.optax.linear_schedule.{name}={value}" for name, value in settings.items()]
    fraction = "--gin.ON_POLICY_FRACTION=@optax.linear_schedule()"
    assert train(tmp_path, fraction, *given, LENGTHS, "--dry_run") == 0
    assert "on-policy fraction" in capfd.readouterr().err


RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*(ROOT / "gin").glob("*.gin"), ROOT / "gin" / "sweeps" / "word_problems.gin"]
    # The recipes of the paper are built by test_recipes.py, and gkd_chat by test_chat.py.
    if path.stem not in ("eval", "infer", "score", "decode", "multi30k", "gkd_chat")
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_train_recipe_builds(recipe, tmp_path):
    arguments = ["train", f"--gin_file={recipe}", f"--gin.MODEL_DIR='{tmp_path}/run'", "--dry_run"]
    complete = ("quickstart", "quickstart_decoder", "word_problems", "word_problems_base")
    complete += ("self_distillation_hints", "two_teachers")
    if pathlib.Path(recipe).stem not in complete:
        arguments += TINY
    assert run(*arguments) == 0
    assert not (tmp_path / "run").exists()


def test_self_distillation_and_seqkd_of_a_chat_model_need_no_teacher_s_checkpoint(tmp_path, capfd):
    given = {"MODEL_DIR": tmp_path / "run", "MIXTURE_OR_TASK_NAME": tmp_path / "chats.jsonl"}
    given["STUDENT_CHECKPOINT"] = tmp_path / "student"
    flags = [f"--gin.{name}={value}" for name, value in given.items()]
    seqkd = re.findall(r"--gin\.(?:ON|DIV|RED|recipe)\S+", (ROOT / "gin/seqkd.gin").read_text())
    assert len(seqkd) == 4
    for more, message in (
        ([], "None for both (set by TEACHER_CHECKPOINT, TEACHER_SIZE)"),
        (["--gin.TEACHER=student"], f"no checkpoint at '{tmp_path}/student'"),
        (seqkd, f"no checkpoint at '{tmp_path}/student'"),
    ):
        gin.clear_config()
        assert run("train", "--gin_file=gin/gkd_chat.gin", *flags, *more) == 2
        assert message in capfd.readouterr().err


WRONG = {
    "unknown command": (["trian"], "did you mean 'train'"),
    "no gin file": (["train"], "train needs --gin_file=FILE: `gkd-jax recipes` lists"),
    "unknown flag": (["train", "--gin_fil=x"], "gin_fil"),
    "a setting as a flag": (["train", "--learning_rate=1"], "as --gin.LEARNING_RATE=VALUE"),
    "missing gin file": (["train", "--gin_file=gin/none.gin"], "`gkd-jax recipes` lists"),
    "a macro in small letters": (
        ["train", "--gin_file=gin/gkd.gin", "--gin.learning_rate=1"],
        "did you mean 'LEARNING_RATE'",
    ),
    "keys without quotes": (
        ["train", "--gin_file=gin/gkd.gin", "--gin.TASK_FEATURE_LENGTHS={inputs: 8}"],
        "--gin.TASK_FEATURE_LENGTHS=\"{'KEY': ...}\"",
    ),
    "flag without a value": (["train", "--gin_file=gin/gkd.gin", "--gin.BETA"], "has no value"),
    "positional": (["train", "x"], "takes flags only, got 'x'"),
    "missing macros": (
        ["train", "--gin_file=gin/gkd.gin"],
        "MIXTURE_OR_TASK_NAME is required: --gin.MIXTURE_OR_TASK_NAME=VALUE; MODEL_DIR is",
    ),
    "no recipe of that name": (["train", "--gin_file=quickstar"], "quickstar"),
    "report of nothing": (
        ["report", "/no/such/run", "--output=/tmp/x", "--dry_run"],
        "RUN_DIR '/no/such/run' is",
    ),
    "an archive of another name": (
        ["report", ".", "--output=/tmp/x", "--archive=/tmp/x.txt", "--dry_run"],
        "must be a file that ends in .jsonl",
    ),
    "a step where none is written": (
        ["convert", "--input=/no/such", "--output=/tmp/x", "--to=hf", "--step=5"],
        "--step is the step of a T5X checkpoint, got --to=hf",
    ),
    "an empty flag": (["convert", "--input=", "--output=/tmp/x", "--to=hf"], "needs --input"),
    "gin where none is read": (["convert", "--gin.X=1"], "convert reads no gin files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case, capfd):
    arguments, message = WRONG[case]
    assert run(*arguments) == 2
    assert message in capfd.readouterr().err


BAD = {
    "--gin.DROPOUT_RAT=0.2": "did you mean 'DROPOUT_RATE'",
    "--gin.gkd.GKDConfig.lamda=1": "GKDConfig has no parameter 'lamda'; its parameters are on_pol",
    "--gin.gkd.GKDConfig.tempertaure=2": "(did you mean 'teacher_temperature'?); its parameters",
    "--gin.gkd.GKDConfg.mixing=1": "gkd has no function or class 'GKDConfg' (did you mean 'GKDCo",
    "--gin.DIVERGENCE=@divergences.jsdd": "'jsdd' (did you mean 'jsd'?)",
    "--gin.divergencs.JSD.beta=0.1": "import no module 'divergencs' (did you mean 'divergences'?)",
    "--gin.optax.adamw.weight_decey=2": "'weight_decey' (did you mean 'weight_decay'?)",
    "--gin.ON_POLICY_FRACTION=1.5": "on_policy_fraction must lie in [0, 1], got 1.5",
    "--gin.TEACHER_TEMPERATURE=0.0": "teacher_temperature must be positive, got 0",
    "--gin.SAMPLING_TEMPERATURE=-1.0": "temperature must be at least 0",
    "--gin.MIXTURE_OR_TASK_NAME='arithmetics'": "unknown task or mixture 'arithmetics'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 8}": "must be positive, got 0",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8}": "feature_lengths must be",
    "--gin.STUDENT_SIZE='huge'": "size must be one of 32x2",
    "--gin.STUDENT_SIZE=None": "None for both (set by STUDENT_CHECKPOINT, STUDENT_SIZE)",
    "--gin.TEACHER_SIZE=None": "None for both (set by TEACHER_CHECKPOINT, TEACHER_SIZE)",
    "--gin.STUDENT_CHECKPOINT='/no/such/folder'": "no checkpoint at '/no/such/folder'",
    "--gin.TEACHER_CHECKPOINT='/no/such/folder'": "no checkpoint at '/no/such/folder'",
    "--gin.VOCABULARY='/no/such.model'": "/no/such.model",
    "--gin.BATCH_SIZE=12": "the batch size must be divisible by data x fsdp = 8, got 12",
    "--gin.BATCH_SIZE=-4": "batch_size must be a positive integer, got -4",
    "--gin.TRAIN_STEPS=0": "train_steps must be a positive integer, got 0",
    "--gin.TRAIN_STEPS=-5": "-5",
    "--gin.LEARNING_RATE=0.0": "learning_rate must be positive, got 0",
    "--gin.WARMUP_STEPS=2000": "warmup_steps",
    "--gin.DTYPE='float16'": "dtype must be 'float32' or 'bfloat16', got 'float16'",
    "--gin.DROPOUT_RATE=1.0": "dropout_rate must lie in [0, 1), got 1.0",
    "--gin.NUM_MICROBATCHES=3": "num_microbatches=3 does not divide the batch size 32",
    "--gin.LABEL_SMOOTHING=1.5": "label_smoothing must lie in [0, 1), got 1.5",
    "--gin.RANDOM_SEED=-1": "seed must be an integer of at least 0 and below 2**32, got -1",
    "--gin.RANDOM_SEED=4294967296": "of at least 0 and below 2**32, got 4294967296",
    "--gin.evaluate.EvalConfig.seed=-1": "seed must be an integer of at least 0 and below 2**32",
    "--gin.data.DataConfig.length_buckets=(0, 8)": "must be positive integers, got (0, 8)",
    "--gin.optimizers.adafactor.decay_rate=-1.0": "decay_rate must be positive, got -1.0",
    "--gin.OPTIMIZER=@optimizers.adamw --gin.optimizers.adamw.b1=1.0": "b1 must lie in [0, 1)",
    "--gin.STUDENT_CHECKPOINT=./README.md": "no checkpoint at './README.md': it is a file",
    "--gin.MODEL_DIR=./README.md/run": "README.md' is a file",
    "--gin.MODEL_DIR=s3://bucket/run": "MODEL_DIR must be local or at gs://, got 's3://bucket/run'",
    "--gin.MODEL_DIR=./tests --gin.STUDENT_CHECKPOINT=./tests": "is the folder of the student's",
    "--gin.DIVERGENCE=@divergences.kl": "divergences.kl",
    "--gin.sharding.MeshConfig.tensor=3": "does not fit 8 devices",
    "--gin.evaluate.EvalConfig.decoding='best'": "'beam' or 'likeliest', got 'best'",
    "--gin.evaluate.EvalConfig.num_beams=0": "num_beams must be a positive integer, got 0",
    "--gin.NUM_SAMPLES=0": "num_samples must be a positive integer, got 0",
    "--gin.DECODE_ROWS=0": "decode_rows must be a positive integer or None, got 0",
    "--gin.DECODE_ROWS=12": "decode_rows must be divisible by data x fsdp = 8, got 12",
    "--gin.evaluate.EvalConfig.decode_rows=12": "decode_rows must be divisible by data x fsdp = 8",
    "--gin.evaluate.EvalConfig.decode_rows=8 --gin.EVAL_DECODING='beam'": "needs decoding='greedy'",
    "--gin.MIXING='token'": "mixing must be 'step' or 'example', got 'token'",
    "--gin.EVAL_DECODING='best'": "'beam' or 'likeliest', got 'best'",
    "--gin.EVAL_SPLIT='dev'": "has no split 'dev', expected one of ['train', 'validation', 'test']",
    "--gin.DATA_DIR='/no/such/dir'": "there is no folder '/no/such/dir'",
    "--gin.NUM_EXAMPLES=0": "num_examples must be a positive integer or None, got 0",
    "--gin.EVAL_NUM_EXAMPLES=-1": "num_examples must be at least 0 (no evaluation) or None, got -1",
    "--gin.DATA_DIR=$NO_SUCH_NAME/x": "DATA_DIR='$NO_SUCH_NAME/x' holds a variable",
    "--gin.VOCABULARY=~nobody_here/x": "VOCABULARY='~nobody_here/x' holds a variable or a user",
    "--gin.ALLOW_CHANGES='LEARNING_RATE'": "ALLOW_CHANGES must be a tuple of names",
    "--gin.EVAL_TASK='nothing'": "unknown task or mixture 'nothing'",
    "--gin.SAVE_PERIOD=0": "save_period must be a positive integer or a time such as '10 minutes'",
    "--gin.SAVE_PERIOD=10 minuets": "save_period must be a number of steps or a time such as",
    "--gin.recipe.TrainConfig.sample_ahead=True": "give SAVE_PERIOD as a number of steps",
    "--gin.EVAL_PERIOD=0": "eval_period must be a positive integer or None, got 0",
    "--gin.COOLDOWN_STEPS=-1": "cooldown_steps must be an integer of at least 0, got -1",
    "--gin.recipe.TrainConfig.keep=0": "keep must be a positive integer or None, got 0",
    "--gin.recipe.TrainConfig.best_metric='bleu'": "best_metric='bleu' needs EVAL_PERIOD, got None",
    "--gin.recipe.TrainConfig.best_mode='up'": "best_mode must be 'max' or 'min', got 'up'",
    "--gin.teacher/pretrained.ModelConfig.param_dtype='int4'": "'bfloat16' or 'int8', got 'int4'",
    "--gin.student/pretrained.ModelConfig.param_dtype='int8'": "a student is trained in",
    "--gin.sharding.MeshConfig.data=0": "mesh axes must be positive",
    "--gin.sampling.SamplingConfig.top_p=0.0": "top_p must lie in (0, 1], got 0.0",
    "--gin.DIVERGENCE=@divergences.jsd --gin.BETA=1.0": "beta must lie strictly between 0 and 1",
    "--gin.EVAL_CALCULATOR=True --gin.EVAL_DECODING='sample'": "needs decoding='greedy'",
    "--gin.VOCABULARY='arithmetic' --gin.EXTRA_IDS=5": "has no extra_ids, got 5",
    "--gin.MIXING='example' --gin.NUM_SAMPLES=2": "compiles a fixed number of rows",
    "--gin.STUDENT_SIZE=None --gin.STUDENT_CHECKPOINT='gs://b/c'": "it needs the model's size",
}


@pytest.mark.parametrize("override", BAD)
def test_wrong_configurations_end_with_status_2_and_one_line(override, tmp_path, capfd):
    overrides = re.split(r" (?=--gin\.)", override)
    assert train(tmp_path, *overrides, "--dry_run") == 2
    error = [line for line in capfd.readouterr().err.splitlines() if "gkd-jax: error" in line]
    assert len(error) == 1
    assert BAD[override] in error[0]
    assert not (tmp_path / "run").exists()


def test_a_module_that_is_not_found_is_named_with_where_python_looks(tmp_path, capfd):
    recipe = tmp_path / "own.gin"
    recipe.write_text("from __gin__ import dynamic_registration\nimport no_such_module\n")
    assert run("train", f"--gin_file={recipe}", "--dry_run") == 2
    error = capfd.readouterr().err
    assert "own.gin: No module named 'no_such_module'; Python finds a module of your own" in error
    assert "PYTHONPATH" in error


def test_a_missing_package_is_a_wrong_configuration(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path, "--gin.METRICS_TO=(@trackers.WandB(),)", LENGTHS, "--dry_run") == 2
    assert "METRICS_TO needs wandb, which is not installed" in capfd.readouterr().err


# In a process of its own: here, signatures are checked before a configuration can speak.
_TYPES = """
import sys
from gkd_jax.main import main

for override in sys.argv[1:]:
    try:
        main(["train", "--gin_file=gin/gkd.gin", "--gin.MODEL_DIR=/tmp/none",
              "--gin.MIXTURE_OR_TASK_NAME=arithmetic", "--gin.STUDENT_SIZE=tiny",
              "--gin.TEACHER_SIZE=tiny", override, "--dry_run"])
    except SystemExit as end:
        print(f"status {end.code}", file=sys.stderr)
    import gin
    gin.clear_config()
"""
WRONG_TYPES = {
    "--gin.LEARNING_RATE='3e-4'": "must be a number, got '3e-4' (set by LEARNING_RATE)",
    "--gin.NUM_EXAMPLES=2.5e3": "must be an integer or None, got 2500.0 (set by NUM_EXAMPLES)",
    "--gin.BATCH_SIZE='8'": "batch_size must be an integer, got '8' (set by BATCH_SIZE)",
    "--gin.DROPOUT_RATE=None": "dropout_rate must be a number, got None (set by DROPOUT_RATE)",
    "--gin.LEARNING_RATE=1e400": "must be a number, got inf (set by LEARNING_RATE)",
    "--gin.TASK_FEATURE_LENGTHS=[8, 8]": "feature_lengths must be a mapping, got [8, 8] (set by",
    "--gin.data.DataConfig.length_buckets=('8',)": "must be positive integers, got ('8',)",
    "--gin.STUDENT_SIZE=5": "size must be a string or None, got 5 (set by STUDENT_SIZE)",
    "--gin.DIVERGENCE=jsd": "divergence must be a function (@module.name) or None, got 'jsd' (set",
    "--gin.evaluate.EvalConfig.rewards=('brevity',)": "rewards must be functions such as (@rewards."
    "exact_answer,), got ('brevity',)",
    "--gin.TRAIN_STEPS=True": "train_steps must be an integer, got True (set by TRAIN_STEPS)",
}


def test_settings_of_the_wrong_type_are_named_with_their_macro():
    done = subprocess.run(
        [sys.executable, "-c", _TYPES, *WRONG_TYPES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stderr.splitlines() if "gkd-jax: error" in line]
    assert len(errors) == len(WRONG_TYPES)
    for error, said in zip(errors, WRONG_TYPES.values(), strict=True):
        assert said in error
    assert done.stderr.count("status 2") == len(WRONG_TYPES)


_FAULTS = """
import resource
import jax
import jax.numpy as jnp
from gkd_jax.command_line import process

process._keep_freed_memory()
step = jax.jit(lambda x: x + 1)
x = jnp.ones((1024, 4096))  # 16 MiB: 4,096 pages
for run in range(60):
    if run == 50:  # until then the heap may grow
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of glibc's malloc")
@pytest.mark.parametrize("chosen", [False, True])
def test_freed_memory_is_kept_unless_the_user_chose_otherwise(chosen):
    names = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: v for name, v in os.environ.items() if not name.startswith(names)}
    if chosen:
        environment["MALLOC_MMAP_MAX_"] = "65536"  # glibc's own
    output = subprocess.run(
        [sys.executable, "-c", _FAULTS], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert (int(output) > 10 * 4096 / 2) == chosen


@pytest.mark.parametrize(
    ("last", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("1 / 0", 1)]
)
def test_the_process_ends_with_its_status_after_what_atexit_does(last, status):
    code = f"""
import atexit, sys, gkd_jax.__main__

def main():
    atexit.register(print, "late")
    print("done")
    {last}

gkd_jax.__main__.main = main
gkd_jax.__main__.program()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (status, "done\nlate\n")
    assert ("ZeroDivisionError" in ended.stderr) == (last == "1 / 0")
