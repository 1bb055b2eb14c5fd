"""`run`: starts the function of a command with its flags and gin files."""

import contextlib
import os
import sys
from typing import Any

from etils import epath

import gin
from gkd_jax.command_line import flags, gin_files, process, recipes
from gkd_jax.command_line.flags import UsageError


# The values of required macros for `bench` and `precompile`, which read neither data nor weights.
STAND_INS = {
    "MODEL_DIR": "None",
    "MIXTURE_OR_TASK_NAME": "'absent.jsonl'",
    "STUDENT_CHECKPOINT": "None",
    "TEACHER_CHECKPOINT": "None",
}


def run(command: str, values: Any, bindings: list[tuple[str, str]], positional: list[str]) -> None:
    """Sets the process up, reads the gin files and runs a command.

    Raises:
        UsageError: if a flag or macro that the command needs is missing.
    """
    if flags.COMMANDS[command].reads_gin:
        _read_gin_files(command, values, bindings)
    match command:
        case "train":
            _train(values, bindings)
        case "eval" | "infer" | "score":
            _decode(command, values)
        case "precompile":
            _precompile(values)
        case "bench":
            _bench(values)
        case "convert":
            _convert(values)
        case "report":
            _report(values, positional)
        case "sweep":
            _sweep(values, dict(bindings), positional)
        case "recipes":
            with contextlib.suppress(BrokenPipeError):  # `| head` takes what it needs
                print(recipes.listing())
    if values.dry_run and flags.COMMANDS[command].reads_gin:
        _say_all_is_well()


def _read_gin_files(command: str, values: Any, bindings: list[tuple[str, str]]) -> None:
    if not values.gin_file:
        raise UsageError(f"{command} needs --gin_file=FILE: `gkd-jax recipes` lists the files")
    reads_data = command not in ("precompile", "bench")
    stand_ins = {} if reads_data else STAND_INS
    with process.importing():
        process.set_up(reads_data=reads_data, tfds_data_dir=values.tfds_data_dir)
        gin_files.parse(values.gin_file, bindings, values.gin_search_paths, stand_ins=stand_ins)


def _say_all_is_well() -> None:
    """Ends a dry run that found nothing wrong; of several processes, only the first prints."""
    import jax

    if jax.process_index() == 0:
        print("dry run: all is well", file=sys.stderr)


def _train(values: Any, bindings: list[tuple[str, str]]) -> None:
    from gkd_jax.training import metrics, train
    from gkd_jax.training.recipe import Recipe

    allowed = gin_files.macro("ALLOW_CHANGES", ())
    if isinstance(allowed, str):
        raise UsageError(f"ALLOW_CHANGES must be a tuple of names, got {allowed!r}")
    model_dir = gin_files.macro("MODEL_DIR", None)
    if not isinstance(model_dir, str):
        raise UsageError(f"MODEL_DIR must be a string, the folder of the run, got {model_dir!r}")
    settings = {
        "dry_run": values.dry_run,
        "config_text": gin.operative_config_str,
        "macros": gin_files.macros(),
        "allow_changes": [field for name in allowed for field in gin_files.fields_of(name)],
    }
    make_recipe = gin.get_configurable(Recipe)
    phases = gin_files.macro("PHASES", ())
    if not phases:
        recipe = make_recipe()
        gin_files.warn_of_unused([name for name, _ in bindings])
        train.train(recipe=recipe, model_dir=model_dir, **settings)
        return
    root = epath.Path(model_dir)
    pending = frozenset(os.fspath(root / phase) for phase in phases if values.dry_run)
    for phase in phases:
        print(f"\n=== {phase} ===", file=sys.stderr)
        with gin.config_scope(phase):
            recipe = make_recipe()
        train.train(
            recipe=recipe,
            model_dir=os.fspath(root / phase),
            name=phase,
            pending=pending,
            **settings,
        )
    if not values.dry_run:
        print(metrics.study_table(root, phases))


def _decode(command: str, values: Any) -> None:
    from gkd_jax.evaluation import infer, score

    functions = {"eval": infer.evaluate_checkpoint, "infer": infer.run, "score": score.run}
    gin.get_configurable(functions[command])(dry_run=values.dry_run)


def _precompile(values: Any) -> None:
    from gkd_jax.planning import precompile

    if values.topology is None:
        raise UsageError("precompile needs --topology=cpu or, say, --topology=v5e:8x8")
    precompile.precompile(
        _recipe(values.phase),
        values.topology,
        num_slices=values.num_slices,
        full=values.full,
        as_json=values.json,
        dry_run=values.dry_run,
    )


def _bench(values: Any) -> None:
    from gkd_jax.planning import bench

    if values.runs < 1:
        raise UsageError(f"--runs must be positive, got {values.runs}")
    bench.bench(
        _recipe(values.phase),
        runs=values.runs,
        mean_length=gin_files.macro("MEAN_LENGTH", None),
        as_json=values.json,
        dry_run=values.dry_run,
    )


def _recipe(phase: str | None) -> Any:
    """Returns the recipe of `train`, or of one phase of a study, without its evaluation."""
    from gkd_jax.training.recipe import Recipe

    phases = gin_files.macro("PHASES", ())
    if phase not in (phases or (None,)):
        raise UsageError(f"--phase must be one of {list(phases)} here, got {phase!r}")
    with gin.config_scope(phase):
        return gin.get_configurable(Recipe)(evaluation=None)


def _convert(values: Any) -> None:
    for name in ("input", "output", "to"):
        if not getattr(values, name):
            raise UsageError(f"convert needs --{name}")
    if values.step is not None and values.to != "t5x":
        raise UsageError(f"--step is the step of a T5X checkpoint, got --to={values.to}")
    process.set_up(reads_data=True)  # tokenizers are read through TensorFlow
    from gkd_jax.storage import conversion

    conversion.convert_checkpoint(
        values.input,
        values.output,
        to=values.to,
        dtype=values.dtype,
        step=values.step,
        dry_run=values.dry_run,
    )


def _report(values: Any, run_dirs: list[str]) -> None:
    if not run_dirs or values.output is None:
        raise UsageError(
            "report needs run directories and --output: report RUN_DIR... --output=DIR"
        )
    from gkd_jax import report
    from gkd_jax.report import archive

    if values.archive is not None:
        archive.check_output(values.archive)
    report.write(run_dirs, values.output, dry_run=values.dry_run)
    if values.dry_run:
        _say_all_is_well()
        return
    if values.archive is not None:
        archive.write(run_dirs, values.archive)
    print(f"wrote {os.path.join(values.output, 'report.html')}", file=sys.stderr)


def _sweep(values: Any, macros: dict[str, str], extra: list[str]) -> None:
    from gkd_jax.sweeps import sweep

    if values.output is None:
        raise UsageError("sweep needs --output: the folder of all runs")
    options = sweep.Options(
        output=values.output,
        gin_files=tuple(values.gin_file),
        sweep_file=values.sweep_file and recipes.find(values.sweep_file, ".toml"),
        grids=tuple(values.grid),
        macros=macros,
        chosen=tuple(values.rows),
        extra=tuple(extra),
        program=values.command,
        num_parallel=values.num_parallel,
        only_print=values.print,
        redo_changed=values.redo_changed,
        dry_run=values.dry_run,
        check_macros=gin_files.check_macros,
    )
    sys.exit(sweep.sweep(options))
