"""Every command line gives a recipe, or one line of error that names the wrong argument."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

from absl import logging as absl_logging
from hypothesis import given, settings, strategies
import pytest

import gin
from gkd_jax import main
from gkd_jax.command_line import commands, flags, gin_files, process, recipes
from gkd_jax.text import extras


NEEDED = [("MODEL_DIR", "/tmp/run"), ("MIXTURE_OR_TASK_NAME", "arithmetic")]
ROOT = pathlib.Path(__file__).resolve().parent.parent
# In a process of its own: here, signatures are checked before a configuration can speak.
FUZZ = r"""
import random, re, sys
import gin
from gkd_jax import main
from gkd_jax.command_line import flags, gin_files
from gkd_jax.training.recipe import Recipe

PIECES = ["", "1", "-3", "0", "2.5e3", "1e999", "nan", "None", "True", "'", '"', "'x'", "''", "(",
          ")", "(1,)", "[]", "{", "{'inputs': 3}", "@", "@divergences.jsd", "@losses.nothing",
          "%", "%BETA", "%NOTHING", "=", " ", "\n", "\\", "#", "$HOME", "$NO_SUCH", "~", "~x",
          "é", "\u2028", "a/b", ":", "@losses.token_mean", "lambda: 1", "__import__('os')",
          "1_000", "0x10", ","]
REQUIRED = [("MODEL_DIR", "/tmp/run"), ("MIXTURE_OR_TASK_NAME", "arithmetic"),
            ("STUDENT_SIZE", "tiny"), ("TEACHER_SIZE", "tiny")]
gin_files.parse(["gin/gkd.gin"], REQUIRED, ["."])
names = sorted(set(gin_files.macros()) - {"MODEL_DIR", "MIXTURE_OR_TASK_NAME"})
known = (flags.UsageError, ValueError, TypeError, FileNotFoundError)
draw = random.Random(0)
built = refused = 0
for _ in range(400):
    gin.clear_config()
    name = draw.choice(names)
    value = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 3)))
    try:
        _, bindings, _ = flags.parse("train", [f"--gin.{name}={value}"])
        gin_files.parse(["gin/gkd.gin"], [*REQUIRED, *bindings], ["."])
        gin.get_configurable(Recipe)()
        built += 1
    except known as error:
        message = main._message(error)
        fields = {field.rpartition(".")[2] for field in gin_files.fields_of(name)}
        aliases = {"beta", "size", "divergence", "reward", name.lower().removesuffix("s")}
        said = any(word in message.lower() for word in {name.lower(), *fields, *aliases})
        assert message and "\n" not in message and said, (name, value, message)
        refused += 1
gin.clear_config()
gin_files.parse(["gin/gkd.gin"], [*REQUIRED, ("OPTIMIZER", "adamw")], ["."])
try:
    gin.get_configurable(Recipe)()
except ValueError as error:
    assert main._message(error).endswith("'adamw'; a reference begins with @: @optimizers.adamw")
else:
    raise AssertionError
print(built, refused)
"""


def test_a_home_folder_is_meant_by_its_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--input=~/run", "--output=~/out/hf", "--to=hf"]
    values, _, _ = flags.parse("convert", given)
    assert (values.input, values.output) == ("/home/ada/run", "/home/ada/out/hf")
    values, _, _ = flags.parse("train", ["--gin_file=~/a.gin", "--gin_file=gin/gkd.gin"])
    assert values.gin_file == ["/home/ada/a.gin", "gin/gkd.gin"]
    assert values.tfds_data_dir is None


@pytest.mark.parametrize(
    "path",
    [
        "/a/it's.jsonl",
        '/a"b',
        "./lr=0.1,beta=1/run",
        "~/a (1)#2",
        "/a[1]*%BETA{@}\\",
        "gs://b/a=b",
        ".",
    ],
)
def test_a_path_needs_no_quotes_whatever_its_signs(path, fresh_gin):
    gin_files.parse(["gin/gkd.gin"], [*NEEDED, ("DATA_DIR", path)], ["."])
    assert gin_files.macro("DATA_DIR", None) == os.path.expanduser(path)


@pytest.mark.parametrize("value", ["a=b.jsonl", "a(b", "{'a'", "'a", "[1", "1 2"])
def test_a_text_that_gin_cannot_read_is_answered_with_how_to_write_it(value, fresh_gin):
    with pytest.raises(flags.UsageError, match=r"^--gin\.BETA=.*no value of gin;.*BETA=\"'...'\"$"):
        gin_files.parse(["gin/gkd.gin"], [*NEEDED, ("BETA", value)], ["."])


@pytest.mark.parametrize("command", ["eval", "infer", "score"])
def test_a_model_that_is_only_read_is_held_in_the_dtype_of_computation(command, fresh_gin):
    from gkd_jax.storage.pretrained import ModelConfig

    needed = {"CHECKPOINT": "/tmp/run", "MIXTURE_OR_TASK_NAME": "arithmetic", "DTYPE": "bfloat16"}
    needed["OUTPUT_DIR" if command == "eval" else "OUTPUT"] = "/tmp/output"
    gin_files.parse([f"gin/{command}.gin"], [*needed.items()], ["."])
    model = gin.get_configurable(ModelConfig)()
    assert (model.dtype, model.param_dtype) == ("bfloat16", "bfloat16")


def test_a_flag_that_a_scope_of_the_gin_files_overrules_is_warned_of(fresh_gin, capsys):
    """The samples of training have the temperature of the scope, whatever the flag says."""
    from gkd_jax.sampling import SamplingConfig

    scoped = "train/sampling.SamplingConfig.temperature"
    flag = ("sampling.SamplingConfig.temperature", "0.5")
    gin_files.parse(["gin/gkd.gin"], [*NEEDED, flag], ["."])
    make = gin.get_configurable(SamplingConfig)
    with gin.config_scope("train"):
        assert make().temperature == 1.0
    assert make().temperature == 0.5
    said = capsys.readouterr().err
    assert said.startswith("WARNING: --gin.sampling.SamplingConfig.temperature does not hold where")
    assert said.endswith(f"scope: {scoped} = %SAMPLING_TEMPERATURE\n")

    gin.clear_config()
    flags = [*NEEDED, ("SAMPLING_TEMPERATURE", "0.7"), ("sampling.SamplingConfig.top_p", "0.9")]
    gin_files.parse(["gin/gkd.gin"], [*flags, flag, (scoped, "0.6")], ["."])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"BETA": "0.1", "TEACHER_SIZE": "tiny"}, {"BETA": "jsd.beta"}),
        ({"BETA": "0.1", "DIVERGENCE": "@divergences.jsd", "TEACHER_SIZE": "tiny"}, {}),
        ({"TEACHER": "ema", "TEACHER_SIZE": "tiny"}, {"TEACHER_SIZE": "teacher/ModelConfig.size"}),
        ({"TEACHER": "ema", "EMA_DECAY": "0.9", "RANDOM_SEED": "3"}, {}),
    ],
)
def test_a_macro_that_sets_nothing_in_a_run_is_warned_of(given, unused, fresh_gin, capsys):
    from gkd_jax.training.recipe import Recipe

    flags = [*NEEDED, ("STUDENT_SIZE", "tiny"), *given.items()]
    gin_files.parse(["gin/gkd.gin"], flags, ["."])
    gin.get_configurable(Recipe)()
    gin_files.warn_of_unused([name for name, _ in flags])
    assert capsys.readouterr().err == "".join(
        f"WARNING: --gin.{name} has no effect: it sets {field}, which this run does not have\n"
        for name, field in unused.items()
    )


def test_400_random_values_make_a_recipe_or_one_line_that_names_them():
    done = subprocess.run([sys.executable, "-c", FUZZ], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built, refused = map(int, done.stdout.split())
    assert built > 4
    assert refused > 100


@settings(max_examples=200, deadline=None)
@given(strategies.lists(strategies.text(min_size=1, max_size=12), max_size=3))
def test_random_words_are_parsed_or_refused_in_one_way(words):
    try:
        values, bindings, extra = flags.parse("train", words)
    except flags.UsageError:
        return  # any other exception is a failure
    assert not extra
    assert all(name and value for name, value in bindings)
    assert values.gin_file == [] or any(word.startswith("--gin_file") for word in words)


@pytest.mark.parametrize("command", flags.COMMANDS)
def test_help_names_every_flag_and_an_example_that_parses(command):
    text = flags.describe(command)
    example = flags.COMMANDS[command].example.split()
    assert all(f"--{name}" in text for name in flags.define(command))
    values, bindings, extra = flags.parse(command, example[2:])
    assert not values.dry_run
    assert bool(extra) == (command in ("report", "sweep"))
    assert bool(bindings) == any(word.startswith("--gin.") for word in example)
    assert ("gin/decode.gin" in text) == (command in ("eval", "infer", "score"))
    if command in ("bench", "precompile"):  # of the required macros these need the sizes alone
        assert not any(f"  {name}:" in text for name in commands.STAND_INS)
        assert "STUDENT_SIZE or STUDENT_CHECKPOINT" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--gin_files=x", "no flag --gin_files (did you mean 'gin_file'?)"),
        ("--BATCH_SIZE=8", "no flag --BATCH_SIZE; a setting is written as --gin.BATCH_SIZE=VALUE"),
    ],
)
def test_an_unknown_flag_is_answered_with_one_way_to_write_it(given, words):
    with pytest.raises(flags.UsageError) as error:
        flags.parse("train", [given])
    assert str(error.value) == f"train has {words}"


def test_a_folder_that_python_takes_for_the_package_is_named(tmp_path):
    (tmp_path / "gkd_jax").mkdir()  # a clone: Python finds it before what `pip install -e` added
    command = [sys.executable, "-c", "from gkd_jax.main import main; main(['recipes'])"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"takes the folder '{tmp_path}/gkd_jax' for the package" in done.stderr


def test_recipes_lists_every_gin_file_that_runs_with_one_line(capsys, tmp_path, monkeypatch):
    main.main(["recipes"])
    listed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    files = {path.relative_to(ROOT / "gin").with_suffix("") for path in ROOT.glob("gin/**/*.gin")}
    parts = {path for path in files if path.parts[0] in ("decode", "settings", "sweeps")}
    assert listed.keys() == {path.as_posix() for path in files - parts}
    assert all(len(text) > 20 for text in listed.values())
    monkeypatch.chdir(tmp_path)
    assert all(pathlib.Path(recipes.find(name, ".gin")).is_file() for name in listed)
    assert recipes.find("gin/gkd.gin", ".gin") == str(ROOT / "gin" / "gkd.gin")
    assert recipes.find("no_such_file", ".gin") == "no_such_file"
    (tmp_path / "gkd.gin").touch()
    assert recipes.find("gkd.gin", ".gin") == "gkd.gin"
    assert listed["rl_gkd"].startswith("RL + GKD (the paper's Eq. 5) maximises")


def test_a_copy_of_the_package_without_its_gin_files_is_told_of(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.gkd_jax, "__file__", str(tmp_path / "gkd_jax" / "__init__.py"))
    with pytest.raises(SystemExit) as stopped:
        main.main(["recipes"])
    assert stopped.value.code == 2
    assert f"lacks its gin files: expected {tmp_path}/gin or" in capsys.readouterr().err


def test_a_pipe_may_take_the_first_recipes_alone():
    command = f"{sys.executable} -m gkd_jax recipes | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_missing_packages_are_installed_by_their_own_names(monkeypatch):
    found = ["jax>=0.10", "pandas>=2.2; extra == 'report'", 'jax[tpu]; extra == "tpu"']
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda name: found)
    assert extras.install_command("report") == "pip install 'pandas>=2.2'"
    assert extras.install_command("tpu") == "pip install 'jax[tpu]'"


def test_packages_are_hidden_for_a_while_unless_they_are_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with process._as_if_missing("colorsys", "json"):
        with pytest.raises(ImportError):
            importlib.import_module("colorsys")
        assert importlib.import_module("json") is json
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 1) == (2 / 3, 1, 1)


def test_ctrl_c_after_the_work_is_done_is_silent():
    script = (
        "import atexit, os, signal, gkd_jax.__main__ as process; command = process.main\n"
        "def main():\n"
        "    atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); command()\n"
        "process.main = main; process.program()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(".") == 2


def test_an_exception_that_a_library_logs_and_raises_is_not_printed_twice(caplog):
    process.set_up(reads_data=True)
    logger = absl_logging.get_absl_logger()
    with caplog.at_level("ERROR", logger=logger.name):
        try:
            raise OSError("the disk is full")
        except OSError:
            absl_logging.exception("a thread raised an exception")
        absl_logging.error("what is wrong")
    assert [record.getMessage() for record in caplog.records] == ["what is wrong"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GKD_JAX_HEARTBEAT_TIMEOUT", "abc"),
        ("GKD_JAX_HEARTBEAT_TIMEOUT", "0"),
        ("GKD_JAX_DISTRIBUTED", "true"),
    ],
)
def test_a_variable_for_several_processes_that_cannot_be_read_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(flags.UsageError, match=rf"{name} must be .*, got '{value}'"):
        process.set_up(reads_data=False)


@pytest.mark.parametrize("coordinator", ["localhost", "12345", ""])
def test_a_coordinator_needs_a_host_and_a_port(coordinator, monkeypatch):
    monkeypatch.setenv("GKD_JAX_COORDINATOR", coordinator)
    monkeypatch.setenv("GKD_JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("GKD_JAX_PROCESS_ID", "0")
    with pytest.raises(flags.UsageError, match=r"several processes need .*: host:port and two"):
        process.set_up(reads_data=False)
