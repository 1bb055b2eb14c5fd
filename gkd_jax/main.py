"""The command line: absl flags, gin files, and errors of one line. Nothing else imports gin.

    gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR="'/tmp/run'" --gin.TRAIN_STEPS=100

Exit status: 0 done, 1 the run failed, 2 wrong usage or configuration, 143 saved after SIGTERM.
"""

from collections.abc import Sequence
import ctypes
import difflib
import os
import pathlib
import re
import sys
import traceback
from typing import Any

from absl import flags


# TensorFlow only reads data here: keep its log lines, and the accelerator, to JAX.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

COMMANDS = {
    "train": "SFT, supervised KD, SeqKD, GKD: whatever the gin file says; resumes by itself",
    "eval": "decodes and scores a task's split with a checkpoint",
    "convert": "a checkpoint to Hugging Face's, T5X's or our own format",
    "infer": "decodes a task's inputs, or a text file, to JSONL",
    "score": "a teacher's top-k probabilities of a split, to distil from without the teacher",
    "precompile": "memory, FLOPs and time of a run on TPUs or GPUs that are not there (or on cpu)",
    "bench": "times the phases of a step on this machine",
    "report": "tables and figures of run directories: report RUN_DIR... --output=DIR",
}
_USAGE = "usage: gkd-jax COMMAND [--gin_file=FILE ...] [--gin.MACRO=VALUE ...]\n\n" + "\n".join(
    f"  {name:<12}{text}" for name, text in COMMANDS.items()
)


class UsageError(Exception):
    """Something on the command line or in a gin file is wrong."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _main(arguments)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"gkd-jax: error: {_one_message(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _configuration_errors()) else 1)


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "--helpfull"):
        print(_USAGE)
        return
    command, *rest = arguments
    if command not in COMMANDS:
        raise UsageError(
            f"unknown command {command!r}{_suggestion(command, COMMANDS)}, expected one of "
            f"{', '.join(COMMANDS)}"
        )
    values, bindings, positional = _parse_flags(command, rest)
    if values.help:
        print(_USAGE + "\n\n" + values.main_module_help())
        return
    if command == "report":
        _report(values, positional)
        return
    if command == "convert":
        _set_up(values)
        _convert(values)
        return
    if not values.gin_file:
        raise UsageError(f"{command} needs --gin_file=FILE")
    _set_up(values)
    _parse_gin(values, bindings)
    commands = {
        "train": _train,
        "eval": _eval,
        "infer": _infer,
        "score": _score,
        "precompile": _precompile,
        "bench": _bench,
    }
    commands[command](values)


def _parse_flags(
    command: str, arguments: list[str]
) -> tuple[flags.FlagValues, list[str], list[str]]:
    """absl flags, with T5X's `--gin.NAME=VALUE` rewritten to bindings."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("gin_file", [], "a gin file; later ones win", flag_values=values)
    flags.DEFINE_multi_string("gin_bindings", [], "one gin binding", flag_values=values)
    flags.DEFINE_list("gin_search_paths", ["."], "where gin files lie", flag_values=values)
    flags.DEFINE_string("tfds_data_dir", None, "where TFDS data sets lie", flag_values=values)
    flags.DEFINE_bool("traceback", False, "show where an error came from", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "check everything, train nothing", flag_values=values)
    if command == "convert":
        flags.DEFINE_string("input", None, "a checkpoint of any format", flag_values=values)
        flags.DEFINE_string("output", None, "a folder that does not exist", flag_values=values)
        flags.DEFINE_enum("to", None, ["hf", "t5x", "gkd"], "the format", flag_values=values)
        flags.DEFINE_enum(
            "dtype",
            "stored",
            ["stored", "float32", "bfloat16"],
            "of the output; stored: the input's",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "step", None, "of a T5X checkpoint; default: the input's", flag_values=values
        )
    if command in ("precompile", "bench"):
        flags.DEFINE_string("phase", None, "which run of a study", flag_values=values)
    if command == "precompile":
        flags.DEFINE_string("topology", None, "cpu, v5e:8x8, v5p:4x4x4, ...", flag_values=values)
        flags.DEFINE_integer("num_slices", 1, "slices of this shape", flag_values=values)
        flags.DEFINE_bool("full", False, "with all of XLA's effort", flag_values=values)
        flags.DEFINE_bool("json", False, "one line of JSON", flag_values=values)
    if command == "bench":
        flags.DEFINE_integer("runs", 20, "of each phase", flag_values=values)
        flags.DEFINE_bool("json", False, "one line of JSON", flag_values=values)
    if command == "report":
        flags.DEFINE_string("output", None, "a folder for the report", flag_values=values)
        flags.DEFINE_string(
            "archive", None, "a .jsonl file for small copies of runs", flag_values=values
        )
    flags.DEFINE_bool("help", False, "this text", short_name="h", flag_values=values)
    bindings, others = [], []
    for argument in arguments:
        match = re.fullmatch(r"--gin\.([^=]+)=(.*)", argument, flags=re.DOTALL)
        if match:
            bindings.append(f"{match[1]} = {match[2]}")
        elif argument.startswith("--gin."):
            raise UsageError(f"{argument!r} has no value: write {argument}=VALUE")
        else:
            others.append(argument)
    try:
        extra = values(["gkd-jax", *others])[1:]
    except flags.Error as error:
        raise UsageError(f"{command}: {error}") from None
    if extra and command != "report":
        raise UsageError(f"{command} takes flags only, got {extra[0]!r}")
    return values, [*values.gin_bindings, *bindings], extra


def _set_up(values: flags.FlagValues) -> None:
    """Process-wide settings, before a device is touched."""
    import jax
    import tensorflow as tf

    _keep_freed_memory()
    cache = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if cache is None:
        cache = str(pathlib.Path.home() / ".cache" / "gkd_jax" / "compiled")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    tf.config.set_visible_devices([], "GPU")
    _join_processes()
    if values.tfds_data_dir:
        if not values.tfds_data_dir.startswith("gs://") and not os.path.isdir(values.tfds_data_dir):
            raise UsageError(f"--tfds_data_dir: no folder {values.tfds_data_dir!r}")
        import seqio

        seqio.set_tfds_data_dir_override(values.tfds_data_dir)


def _keep_freed_memory() -> None:
    """Has glibc keep what programs free, where they run on the CPU; before JAX starts its threads.

    XLA's CPU programs allocate their temporaries at every call. glibc maps large blocks and hands
    them back, and the kernel clears each page anew: a tenth to a fifth of a step. A thread whose
    arena is not the main one maps them whatever M_MMAP_MAX says, hence one arena, which an
    accelerator's host with its many threads is spared. The process stays as large as it was at its
    largest. Who sets MALLOC_* or glibc.malloc's GLIBC_TUNABLES has the last word.
    """
    devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
    platforms = os.environ.get("JAX_PLATFORMS")
    found = any(any(pathlib.Path("/dev").glob(device)) for device in devices)
    on_cpu = platforms == "cpu" if platforms else not found
    if not on_cpu:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            mallopt(parameter, value)


def _join_processes() -> None:
    """Several processes make one job where the environment says so.

    GKD_JAX_DISTRIBUTED=1: TPU pods, SLURM and others that JAX detects by itself. Otherwise
    GKD_JAX_COORDINATOR=host:port with GKD_JAX_NUM_PROCESSES and GKD_JAX_PROCESS_ID.
    """
    import jax

    names = ("GKD_JAX_COORDINATOR", "GKD_JAX_NUM_PROCESSES", "GKD_JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    timeout = int(os.environ.get("GKD_JAX_HEARTBEAT_TIMEOUT", "100"))
    if os.environ.get("GKD_JAX_DISTRIBUTED") == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
    elif given:
        missing = [name for name in names if name not in given]
        if missing or not all(given[name].isdecimal() for name in names[1:]):
            raise UsageError(
                f"several processes need {', '.join(names)}: host:port and two numbers; got {given}"
            )
        jax.distributed.initialize(
            given[names[0]],
            int(given[names[1]]),
            int(given[names[2]]),
            heartbeat_timeout_seconds=timeout,
        )


def _parse_gin(values: flags.FlagValues, bindings: list[str]) -> None:
    """Files first, then the command line under the files' imports, so that it can name what they
    name (`--gin.DIVERGENCE=@divergences.reverse_kl`)."""
    import gin
    import gkd_jax

    package = pathlib.Path(gkd_jax.__file__).parent
    for path in [*values.gin_search_paths, str(package.parent), str(package)]:
        gin.add_config_file_search_path(path)
    for name in values.gin_file:
        try:
            gin.parse_config_file(name)
        except OSError as error:
            raise UsageError(f"--gin_file: cannot read {name!r}: {error}") from None
        except Exception as error:
            raise UsageError(f"{name}: {_one_message(error)}") from error
    imports = [
        line for line in gin.config_str().splitlines() if line.startswith(("import ", "from "))
    ]
    header = "\n".join(["from __gin__ import dynamic_registration", *dict.fromkeys(imports)])
    header = re.sub(r"(from __gin__ import dynamic_registration\n)+", r"\1", header + "\n", count=1)
    for binding in bindings:
        name = binding.split(" = ")[0]
        if "." not in name:
            _check_macro(name)
        try:
            gin.parse_config(header + binding)
        except Exception as error:
            raise UsageError(
                f"--gin.{binding.replace(' = ', '=', 1)}: {_one_message(error)}"
            ) from (error)


def _check_macro(name: str) -> None:
    """gin accepts any macro; one that no file defines is a slip of the pen."""
    known = _macros()
    if name not in known:
        raise UsageError(
            f"--gin.{name}: no such macro in the gin files{_suggestion(name, known)}; "
            f"they define {', '.join(sorted(known))}"
        )


def _macros() -> dict[str, str]:
    """Every macro that the gin files and the command line define, with its value as written."""
    import gin

    joined = re.sub(r"\\\n\s*", "", gin.config_str(max_line_length=10_000))
    pairs = (re.match(r"([A-Za-z_]\w*) = (.*)", line) for line in joined.splitlines())
    return {pair[1]: pair[2] for pair in pairs if pair}


def _train(values: flags.FlagValues) -> None:
    import gin
    from gkd_jax.training import metrics, train

    run = gin.get_configurable(train.train)
    phases = _macro("PHASES", ())
    if not phases:
        run(dry_run=values.dry_run, config_text=gin.operative_config_str, macros=_macros())
        return
    root = pathlib.Path(str(_macro("MODEL_DIR", "")))
    pending = frozenset(str(root / phase) for phase in phases if values.dry_run)
    for phase in phases:
        print(f"\n=== {phase} ===", file=sys.stderr)
        with gin.config_scope(phase):
            run(
                model_dir=str(root / phase),
                name=phase,
                dry_run=values.dry_run,
                pending=pending,
                config_text=gin.operative_config_str,
                macros=_macros(),
            )
    if not values.dry_run:
        print(metrics.study_table(root, phases))


def _eval(values: flags.FlagValues) -> None:
    import gin
    from gkd_jax.evaluation import infer

    gin.get_configurable(infer.evaluate_checkpoint)(dry_run=values.dry_run)


def _infer(values: flags.FlagValues) -> None:
    import gin
    from gkd_jax.evaluation import infer

    gin.get_configurable(infer.run)(dry_run=values.dry_run)


def _score(values: flags.FlagValues) -> None:
    import gin
    from gkd_jax.evaluation import score

    gin.get_configurable(score.run)(dry_run=values.dry_run)


def _precompile(values: flags.FlagValues) -> None:
    from gkd_jax.planning import precompile

    if values.topology is None:
        raise UsageError("precompile needs --topology=cpu or, say, --topology=v5e:8x8")
    precompile.precompile(
        _recipe(values.phase),
        values.topology,
        num_slices=values.num_slices,
        full=values.full,
        as_json=values.json,
    )


def _bench(values: flags.FlagValues) -> None:
    from gkd_jax.planning import bench

    if values.runs < 1:
        raise UsageError(f"--runs must be positive, got {values.runs}")
    bench.bench(_recipe(values.phase), runs=values.runs, as_json=values.json)


def _recipe(phase: str | None) -> Any:
    """The recipe that `train` would be given."""
    import gin
    from gkd_jax.training.recipe import Recipe

    phases = _macro("PHASES", ())
    if phase not in (phases or (None,)):
        raise UsageError(f"--phase must be one of {list(phases)} here, got {phase!r}")
    with gin.config_scope(phase):
        return gin.get_configurable(Recipe)(evaluation=None)


def _convert(values: flags.FlagValues) -> None:
    from gkd_jax.storage import conversion

    for name in ("input", "output", "to"):
        if getattr(values, name) is None:
            raise UsageError(f"convert needs --{name}")
    conversion.convert_checkpoint(
        values.input,
        values.output,
        to=values.to,
        dtype=values.dtype,
        step=values.step,
        dry_run=values.dry_run,
    )


def _report(values: flags.FlagValues, run_dirs: list[str]) -> None:
    from gkd_jax import report
    from gkd_jax.report import archive

    if not run_dirs or values.output is None:
        raise UsageError(
            "report needs run directories and --output: report RUN_DIR... --output=DIR"
        )
    report.write(run_dirs, values.output)
    if values.archive is not None:
        archive.write(run_dirs, values.archive)
    print(f"wrote {os.path.join(values.output, 'report.html')}", file=sys.stderr)


def _macro(name: str, default: Any) -> Any:
    import gin

    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return default


def _suggestion(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _configuration_errors() -> tuple[type[Exception], ...]:
    return (UsageError, ValueError, TypeError, FileNotFoundError, NotADirectoryError)


def _one_message(error: BaseException) -> str:
    """The message without gin's account of the call it happened in."""
    lines = [
        line
        for line in str(error).splitlines()
        if line.strip() and not line.lstrip().startswith(("In call to configurable", "In file "))
    ]
    return " ".join(line.strip() for line in lines) or type(error).__name__
