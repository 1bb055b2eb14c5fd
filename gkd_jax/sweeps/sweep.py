"""`gkd-jax sweep`: many runs from one gin file and a grid, or from a file of rows.

    gkd-jax sweep --gin_file=gin/gkd.gin --output=/runs/study \\
      --grid divergence=forward_kl,jsd_0.1,jsd_0.9 --grid RANDOM_SEED=0,1,2 \\
      --gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.STUDENT_SIZE=tiny --gin.TEACHER_SIZE=tiny
    gkd-jax sweep --sweep_file=gin/sweeps/arithmetic.toml --output=/runs/arithmetic

A sweep file is TOML:

    gin_file = "gin/gkd.gin"              # for rows that name none; a list of files is possible
    [axes]                                # the axes of every row
    RANDOM_SEED = [0, 1, 2]
    [rows.teacher]                        # a row is one run for each combination of its axes
    command = "train"                     # or "infer", "eval"; the default is "train"
    gin_file = "gin/sft.gin"
    macros = { TRAIN_STEPS = 900, STUDENT_SIZE = "small" }
    axes = { RANDOM_SEED = [] }           # added to the axes above; an empty axis is dropped
    [rows.gkd]
    macros = { TEACHER_CHECKPOINT = "{teacher}" }
    axes.divergence = ["forward_kl", "jsd_0.1"]

Strings are gin expressions, as on the command line, where a word or a path needs no quotes of its
own. `{teacher}` stands for the folder of the row `teacher`, which then runs first. If both rows
have an axis, the run with the same value is taken. An axis is a macro with its values, or any name
with tables of macros (`[{ name = "short", TRAIN_STEPS = 400 }]`), or `divergence`, whose values
`forward_kl`, `reverse_kl`, `total_variation` and `jsd_0.1` set DIVERGENCE and BETA together.
`--grid` replaces the axis of the same name. `--gin.MACRO` applies to the rows of `train` and to
rows that set the macro; an axis overrides it.

Every run has the folder `OUTPUT/<row>-<axis>=<value>-...`, which is its MODEL_DIR. For `infer`, the
macro OUTPUT is `outputs.jsonl` in that folder; for `eval`, OUTPUT_DIR is the folder. The folder
also has `log.txt` and the records of `folders.py`, which do not cover the contents of gin files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fcntl
import itertools
import os
import pathlib
import re
import shlex
import shutil
import sys

from gkd_jax.sweeps import folders, rows
from gkd_jax.sweeps.execution import Execution
from gkd_jax.sweeps.rows import Row
from gkd_jax.text import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a sweep.

    A folder is put aside as `<name>.replaced_<n>`, which a report of the study leaves out.
    """

    output: str  # the folder of all runs
    gin_files: tuple[str, ...] = ()  # a later file overrides; () with a sweep file
    sweep_file: str | None = None  # a TOML file of rows; None with gin files
    grids: tuple[str, ...] = ()  # axes, each as `MACRO=A,B`
    macros: Mapping[str, str] = dataclasses.field(default_factory=dict)  # for the rows of `train`
    chosen: tuple[str, ...] = ()  # rows of the sweep file, with those they need; () is all
    extra: tuple[str, ...] = ()  # flags that are added to every command
    program: str = "gkd-jax"  # the command line of the program
    num_parallel: int = 1  # the largest number of runs at once
    only_print: bool = False  # print the commands that are left, and run none
    redo_changed: bool = False  # put folders of other commands aside instead of refusing them
    dry_run: bool = False  # check, with `--dry_run`, each command that needs no other run
    # Raises an error for a macro that gin files do not define.
    check_macros: Callable[[Iterable[str], Iterable[str]], None]


def sweep(options: Options) -> int:
    """Runs everything that is not done yet.

    Returns:
        The exit status: 0 if all runs are done, 1 if a run failed (the others still ran), 130 after
        Ctrl-C, 143 if a run or the sweep itself got SIGTERM. After a signal, the runs save and end;
        the same command continues them.

    Raises:
        ValueError: for wrong options or a wrong sweep file, if another sweep works on the study, or
            if another command made a folder.
    """
    program = shlex.split(options.program)
    files.check_can_be_folder(options.output, "--output")
    root = pathlib.Path(os.path.abspath(options.output))
    _check(options, program, root)
    chosen = _rows(options)
    for row in chosen:
        points = itertools.chain.from_iterable(row.axes.values())
        options.check_macros(row.gin_files, [*row.macros, *sorted(rows.macros_of(points))])
    runs = rows.expand(chosen, options.extra)
    writes = not options.only_print and not options.dry_run
    lock = _lock(root) if writes else None
    done, changed = folders.survey(runs, root)
    if changed and not options.redo_changed:
        name, text = next(iter(changed.items()))
        raise ValueError(
            f"{root / name} was made otherwise: {text} ({len(changed)} such); take another "
            "--output, or --redo_changed to put them aside and run them again"
        )
    if writes:
        for name in changed:
            aside = folders.put_aside(root / name)
            print(f"{name}: {changed[name]}; put aside as {aside}", file=sys.stderr)
    if options.only_print:
        for run in runs:
            if run.name not in done:
                print(shlex.join([*program, *run.command(str(root))]))
        return 0
    if done:
        print(f"skipped, done before: {', '.join(sorted(done))}", file=sys.stderr)
    return Execution(
        runs,
        done,
        root=root,
        program=program,
        num_parallel=options.num_parallel,
        dry_run=options.dry_run,
        lock=lock,
    ).run()


def _check(options: Options, program: Sequence[str], root: pathlib.Path) -> None:
    if options.num_parallel < 1:
        raise ValueError(f"--num_parallel must be at least 1, got {options.num_parallel}")
    if not program or not (options.only_print or shutil.which(program[0])):
        raise ValueError(f"--command: no program {options.program!r}")
    if re.search(r"['\"\\{}\n]", str(root)):
        raise ValueError(f"--output must not hold quotes, backslashes or braces, got {str(root)!r}")


def _rows(options: Options) -> list[Row]:
    grids = [rows.parse_grid(text) for text in options.grids]
    axes = dict(grids)
    if len(axes) < len(grids):
        raise ValueError(f"--grid: an axis is given twice: {', '.join(axis for axis, _ in grids)}")
    if bool(options.sweep_file) == bool(options.gin_files):
        raise ValueError("give either --gin_file (with --grid) or --sweep_file")
    if options.sweep_file:
        known = rows.override(rows.read_sweep_file(options.sweep_file), options.macros, axes)
        return rows.in_order(known, options.chosen or known)
    if options.chosen:
        raise ValueError("--rows chooses from a --sweep_file, and there is none")
    for macro in options.macros:
        if any(macro in rows.macros_of(points) for points in axes.values()):
            raise ValueError(f"{macro} is given by --grid and by --gin.{macro}")
    name = re.sub(r"[^\w.]+", "_", pathlib.PurePath(options.gin_files[-1]).stem)
    row = Row(name, "train", options.gin_files, options.macros, axes)
    return rows.in_order({name: row}, [name])


def _lock(root: pathlib.Path) -> int:
    """Returns a locked file descriptor, so that only one sweep works on a folder at a time."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / ".sweep_lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another sweep, or a run of one that was killed, works on {root}"
        ) from None
    return descriptor
