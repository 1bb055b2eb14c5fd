"""The commands, their flags and their help texts.

This module imports nothing slow, so that `--help` answers at once.
"""

from collections.abc import Iterable
import dataclasses
import difflib
import os
import re
from typing import Any

from absl import flags


class UsageError(Exception):
    """A mistake on the command line or in a gin file; the message is for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """The help text of a command."""

    does: str  # on one line
    example: str  # a whole command line
    required: tuple[str, ...] = ()  # the macros that have no default, each with its meaning
    reads_gin: bool = True


_TRAIN = (
    "MODEL_DIR: the folder of the run",
    "MIXTURE_OR_TASK_NAME: a task, or the path of a JSONL file",
    "STUDENT_SIZE or STUDENT_CHECKPOINT, TEACHER_SIZE or TEACHER_CHECKPOINT",
)
_DECODE = (
    "CHECKPOINT: a MODEL_DIR, a Hugging Face folder or a T5X checkpoint",
    "MIXTURE_OR_TASK_NAME: a task, or the path of a JSONL file",
)
COMMANDS = {
    "train": Command(
        does="SFT, supervised KD, SeqKD, GKD: whatever the gin file says; resumes by itself",
        example="gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR=/tmp/run "
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.STUDENT_SIZE=tiny "
        "--gin.TEACHER_CHECKPOINT=/tmp/teacher",
        required=_TRAIN,
    ),
    "eval": Command(
        does="decodes and scores a task's split with a checkpoint",
        example="gkd-jax eval --gin_file=gin/eval.gin --gin.CHECKPOINT=/tmp/run "
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.OUTPUT_DIR=/tmp/run/test",
        required=(*_DECODE, "OUTPUT_DIR: the folder of metrics.json and predictions.jsonl"),
    ),
    "convert": Command(
        does="a checkpoint to Hugging Face's, T5X's or our own format",
        example="gkd-jax convert --input=/tmp/run --output=/tmp/hf --to=hf",
        reads_gin=False,
    ),
    "infer": Command(
        does="decodes a task's inputs, or the lines of TEXT_FILE, to JSONL",
        example="gkd-jax infer --gin_file=gin/infer.gin --gin.CHECKPOINT=/tmp/teacher "
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.OUTPUT=/tmp/outputs.jsonl",
        required=(*_DECODE, "OUTPUT: the JSONL file"),
    ),
    "score": Command(
        does="a teacher's top-k probabilities of a split, to distil from without the teacher",
        example="gkd-jax score --gin_file=gin/score.gin --gin.CHECKPOINT=/tmp/teacher "
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.OUTPUT=/tmp/scores",
        required=(*_DECODE, "OUTPUT: the folder of the scores"),
    ),
    "precompile": Command(
        does="memory, FLOPs and time of a run on TPUs or GPUs that are not there (or on cpu)",
        example="gkd-jax precompile --topology=v5e:4x4 --gin_file=gin/models/qwen3_8b_to_0.6b.gin",
        required=_TRAIN[2:],
    ),
    "bench": Command(
        does="times the phases of a step on this machine",
        example="gkd-jax bench --gin_file=gin/bench/config1.gin --json",
        required=_TRAIN[2:],
    ),
    "sweep": Command(
        does="many runs from a grid of macros, or from a file of rows; what is done is skipped",
        example="gkd-jax sweep --gin_file=gin/gkd.gin --output=/tmp/study "
        "--grid RANDOM_SEED=0,1,2 --grid divergence=forward_kl,jsd_0.1 "
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic -- --tfds_data_dir=/data/tfds",
        reads_gin=False,
    ),
    "report": Command(
        does="tables and figures of run directories: report RUN_DIR... --output=DIR",
        example="gkd-jax report /tmp/runs/* --output=/tmp/report",
        reads_gin=False,
    ),
    "recipes": Command(
        does="lists the gin files that come with the package, as --gin_file takes them",
        example="gkd-jax recipes",
        reads_gin=False,
    ),
}
USAGE = (
    "usage: gkd-jax COMMAND [--gin_file=FILE ...] [--gin.MACRO=VALUE ...]\n\n"
    + "\n".join(f"  {name:<12}{command.does}" for name, command in COMMANDS.items())
    + "\n\n  gkd-jax COMMAND --help   its flags, its required macros and an example"
    + "\n  gkd-jax --version        the version"
)


_PATHS = {"gin_file", "tfds_data_dir", "input", "output", "sweep_file", "archive"}


def define(command: str) -> flags.FlagValues:
    """Returns the flags of a command with their defaults."""
    values = flags.FlagValues()

    def add(kind: Any, name: str, default: Any, *rest: Any) -> None:
        kind(name, default, *rest, flag_values=values)

    add(flags.DEFINE_bool, "dry_run", False, "check everything; write and load nothing")
    add(flags.DEFINE_bool, "traceback", False, "show where an error came from")
    if COMMANDS[command].reads_gin:
        add(flags.DEFINE_multi_string, "gin_file", [], "a gin file; a later file overrides")
        add(flags.DEFINE_multi_string, "gin_bindings", [], "one gin binding")
        add(flags.DEFINE_list, "gin_search_paths", ["."], "folders of gin files")
        add(flags.DEFINE_string, "tfds_data_dir", None, "the folder of TFDS's data sets")
    if command == "convert":
        add(flags.DEFINE_string, "input", None, "a checkpoint of any format")
        add(flags.DEFINE_string, "output", None, "a folder that does not exist")
        add(flags.DEFINE_enum, "to", None, ["hf", "t5x", "gkd"], "the format")
        dtypes = ["stored", "float32", "bfloat16"]
        add(flags.DEFINE_enum, "dtype", "stored", dtypes, "dtype of the output")
        add(flags.DEFINE_integer, "step", None, "step of a T5X checkpoint; else the input's")
    if command in ("precompile", "bench"):
        add(flags.DEFINE_string, "phase", None, "one run of a study")
        add(flags.DEFINE_bool, "json", False, "one line of JSON")
    if command == "precompile":
        add(flags.DEFINE_string, "topology", None, "cpu, v5e:8x8, v5p:4x4x4, h100:1x1x8, ...")
        add(flags.DEFINE_integer, "num_slices", 1, "number of slices of this shape")
        add(flags.DEFINE_bool, "full", False, "compile with all of XLA's effort")
    if command == "bench":
        add(flags.DEFINE_integer, "runs", 20, "timed runs of each phase")
    if command == "sweep":
        add(flags.DEFINE_multi_string, "gin_file", [], "a gin file of every run")
        add(flags.DEFINE_string, "sweep_file", None, "a TOML file of rows")
        add(flags.DEFINE_string, "output", None, "the folder of all runs")
        add(flags.DEFINE_multi_string, "grid", [], "an axis: MACRO=A,B")
        add(flags.DEFINE_list, "rows", [], "run only these rows and what they need")
        add(flags.DEFINE_bool, "print", False, "print the commands that are left, run none")
        add(flags.DEFINE_integer, "num_parallel", 1, "largest number of runs at once")
        add(flags.DEFINE_bool, "redo_changed", False, "put folders of other commands aside")
        add(flags.DEFINE_string, "command", "gkd-jax", "the program that every run starts")
    if command == "report":
        add(flags.DEFINE_string, "output", None, "a folder for the report")
        add(flags.DEFINE_string, "archive", None, "a .jsonl file for small copies of the runs")
    add(flags.DEFINE_bool, "help", False, "print this text")
    return values


def describe(command: str) -> str:
    """Returns the text that `gkd-jax COMMAND --help` prints."""
    about, values = COMMANDS[command], define(command)
    lines = [f"gkd-jax {command}: {about.does}", "", "example:", f"  {about.example}"]
    if about.required:
        lines += ["", "macros without a default (--gin.MACRO=VALUE):"]
        lines += [f"  {text}" for text in about.required]
        decodes = about.required[0] == _DECODE[0]
        where = (
            "gin/decode.gin and the gin file list" if decodes else "docs/configuration.md explains"
        )
        lines += [f"  {where} all others"]
    lines += ["", "flags:"]
    for name in sorted(values):
        flag = values[name]
        default = "" if flag.default in (None, [], False) else f" (default {flag.default})"
        lines.append(f"  --{name:<20}{flag.help}{default}")
    return "\n".join(lines)


def parse(command: str, arguments: Iterable[str]) -> tuple[Any, list[tuple[str, str]], list[str]]:
    """Splits the arguments of a command.

    Returns:
        The flags; the gin bindings as (name, value) in their order; and the other arguments, which
        are the folders of `report`, and for `sweep` the arguments after `--`.

    Raises:
        UsageError: for an unknown flag, a binding without a value, or an argument that the command
            does not take.
    """
    values = define(command)
    bindings: list[tuple[str, str]] = []
    others: list[str] = []
    arguments = list(arguments)
    end = arguments.index("--") if command == "sweep" and "--" in arguments else len(arguments)
    for argument in arguments[:end]:
        if argument == "-h":
            argument = "--help"
        if argument.startswith("--gin."):
            bindings.append(_binding(argument.removeprefix("--gin."), argument))
        else:
            others.append(argument)
    try:
        extra = values(["gkd-jax", *others])[1:]
    except flags.UnrecognizedFlagError as error:
        advice = suggestion(error.flagname, values)
        if not advice and COMMANDS[command].reads_gin:
            advice = f"; a setting is written as --gin.{error.flagname.upper()}=VALUE"
        raise UsageError(f"{command} has no flag --{error.flagname}{advice}") from None
    except flags.Error as error:
        raise UsageError(f"{command}: {error}") from None
    for name in _PATHS & {*values}:  # a shell expands no `~` behind the `=` of a flag
        path = values[name].value
        if path:
            expand = os.path.expanduser
            values[name].value = [*map(expand, path)] if type(path) is list else expand(path)
    if extra and command != "report":
        raise UsageError(f"{command} takes flags only, got {extra[0]!r}: write --NAME=VALUE")
    if bindings and not COMMANDS[command].reads_gin and command != "sweep":
        raise UsageError(f"{command} reads no gin files, got --gin.{bindings[0][0]}")
    given = [_binding(text, text) for text in getattr(values, "gin_bindings", [])]
    return values, [*given, *bindings], [*extra, *arguments[end + 1 :]]


def _binding(text: str, argument: str) -> tuple[str, str]:
    name, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not value:
        raise UsageError(f"{argument!r} has no value: write --gin.{name}=VALUE")
    if not re.fullmatch(r"[\w./]+", name):
        raise UsageError(f"{argument!r}: {name!r} is no name of a macro or a parameter")
    return name, value


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" with the closest known name; "" if none is close."""
    by_letters = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_letters, n=1)
    return f" (did you mean {by_letters[close[0]]!r}?)" if close else ""
