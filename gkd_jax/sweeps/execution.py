"""Many runs from one gin file and a grid, or from a file of rows; what is done is skipped.

    python launch/sweep.py --gin_file=gin/gkd.gin --output=/runs/study \\
      --grid divergence=forward_kl,jsd_0.1,jsd_0.9 --grid RANDOM_SEED=0,1,2 \\
      --gin.MIXTURE_OR_TASK_NAME="'arithmetic'" --gin.STUDENT_SIZE="'tiny'" \\
      --gin.TEACHER_SIZE="'tiny'"
    python launch/sweep.py --sweep_file=gin/sweeps/arithmetic.toml --output=/runs/arithmetic

A sweep file is TOML:

    gin_file = "gin/gkd.gin"              # of rows that name none; of a list, later ones win
    [axes]                                # of every row
    RANDOM_SEED = [0, 1, 2]
    [rows.teacher]                        # a row is one run for each combination of its axes
    command = "train"                     # or "infer", "eval"; the default is "train"
    gin_file = "gin/sft.gin"
    macros = { TRAIN_STEPS = 900, STUDENT_SIZE = "'small'" }
    axes = { RANDOM_SEED = [] }           # added to those above; an empty one is dropped
    [rows.gkd]
    macros = { TEACHER_CHECKPOINT = "'{teacher}'" }
    axes.divergence = ["forward_kl", "jsd_0.1"]

Strings are gin expressions, as on the command line: a string of gin's has quotes within.
`{teacher}` is the folder of that row's run, which then runs first; where both rows have an axis,
the run with the same value is meant. An axis is a macro with its values, or any name with tables of
macros (`[{ name = "short", TRAIN_STEPS = 400 }]`), or `divergence`, whose values `forward_kl`,
`reverse_kl`, `total_variation` and `jsd_0.1` set DIVERGENCE and BETA together. `--grid` replaces
the axes of that name; `--gin.MACRO` is for the rows of `train` and those that set the macro; an
axis wins over it.

Every run has the folder OUTPUT/<row>-<axis>=<value>-..., which is its MODEL_DIR (of `infer`, OUTPUT
is `outputs.jsonl` in it; of `eval`, OUTPUT_DIR is the folder). It also holds `log.txt`,
`sweep_started` and, after exit status 0, `sweep_done`: both record the command. What gin files hold
is not compared.

Exit status: 0 all done, 1 some run failed (the others still ran), 2 wrong usage, 130 Ctrl-C, 143
preempted: a run, or the sweep itself, got SIGTERM. Running runs are then told to save. The same
command goes on.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NoReturn

from gkd_jax.sweeps import rows as sweep_rows
from gkd_jax.sweeps.rows import Row, Run, UsageError


STARTED, DONE, LOG = "sweep_started", "sweep_done", "log.txt"
PREEMPTED = (128 + signal.SIGTERM, -signal.SIGTERM)
_POLL_S = 0.05


#### What the folders say ##########################################################################


def records(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What identifies each run: its command without OUTPUT, and that of the runs it starts from."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        command = run.command("OUTPUT")
        needs = {need: found[need]["digest"] for need in run.needs}
        digest = hashlib.sha256(json.dumps([command, needs]).encode()).hexdigest()[:16]
        found[run.name] = {"command": command, "needs": needs, "digest": digest}
    return found


def recorded(folder: pathlib.Path, marker: str) -> dict[str, Any] | None:
    """What a marker holds; None without one. A damaged one records nothing."""
    try:
        record = json.loads((folder / marker).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        return {}
    return record if isinstance(record, dict) else {}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In words, what has changed since a marker was written; "" for nothing."""
    if old.get("digest") == new["digest"]:
        return ""
    before, now = old.get("command", []), new["command"]
    gone = shlex.join(text for text in before if text not in now)
    come = shlex.join(text for text in now if text not in before)
    if gone or come:
        return f"its command had {gone or 'nothing'} where it now has {come or 'nothing'}"
    if before != now:
        return "its command had the same arguments in another order"
    needs = old.get("needs", {})
    changed = [name for name, value in new["needs"].items() if needs.get(name) != value]
    return f"what it starts from has changed: {', '.join(changed)}"


def _write_marker(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def survey(runs: Sequence[Run], root: pathlib.Path) -> tuple[set[str], dict[str, str]]:
    """(names of runs that are done, run -> what has changed since its folder was written)."""
    done, changed = set(), {}
    for name, record in records(runs).items():
        folder = root / name
        finished = recorded(folder, DONE)
        started = finished if finished is not None else recorded(folder, STARTED)
        # A command that failed before it wrote anything may be mended.
        if started is None or {path.name for path in folder.iterdir()} <= {STARTED, LOG}:
            continue
        text = difference(started, record)
        if text:
            changed[name] = text
        elif finished is not None:
            done.add(name)
    return done, changed


def _put_aside(folder: pathlib.Path) -> pathlib.Path:
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.replaced_{number}")
        if not target.exists():
            folder.rename(target)
            return target
    raise AssertionError


#### Running #######################################################################################


class Execution:
    """Runs commands, several at once, each after what it needs.

    Args:
        runs: in an order in which each comes after what it needs.
        done: names of those that need not run.
        root: the folder of all runs.
        program: the words before the subcommand.
        num_parallel: most commands at once.
        dry_run: only check, with `--dry_run`; nothing is written below the root.
        lock: a file descriptor that commands keep open: a lock on it lasts as long as they do.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        done: Iterable[str],
        *,
        root: pathlib.Path,
        program: Sequence[str],
        num_parallel: int,
        dry_run: bool = False,
        lock: int | None = None,
    ):
        self._runs, self._root, self._program = runs, root, list(program)
        self._num_parallel, self._dry_run, self._lock = num_parallel, dry_run, lock
        self._records = records(runs)
        self._before, self._done = set(done), set(done)
        self._waiting = [run for run in runs if run.name not in self._done]
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}
        self._failed: dict[str, int] = {}
        self._left_out: dict[str, str] = {}
        self._stopped: list[str] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="sweep_") if dry_run else None
        self._stop: list[int] = []  # signals
        self._told = 0

    def run(self) -> int:
        """Exit status: see the top of the file."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            while self._running or (self._waiting and not self._stop):
                if self._stop:
                    self._tell_to_stop()
                else:
                    self._start_ready()
                self._reap()
                if self._running:
                    time.sleep(_POLL_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._send(signal.SIGTERM)  # none is left, unless something went wrong here
            self._report()
            if self._scratch is not None:
                self._scratch.cleanup()
        return 128 + self._stop[0] if self._stop else int(bool(self._failed))

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._stop.append(number)

    def _tell_to_stop(self) -> None:
        """Once, every run is asked to save; after a second signal, nobody waits for it."""
        if self._told < min(len(self._stop), 2):
            self._told = min(len(self._stop), 2)
            self._send(signal.SIGTERM if self._told == 1 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process, _ in self._running.values():
            if process.poll() is None:
                os.killpg(process.pid, number)

    def _start_ready(self) -> None:
        for run in list(self._waiting):
            missing = [need for need in run.needs if need not in self._done]
            lost = [need for need in missing if need in self._failed or need in self._left_out]
            # A dry run makes no checkpoints: what needs one cannot be checked.
            if lost or (self._dry_run and missing):
                self._waiting.remove(run)
                self._left_out[run.name] = (lost or missing)[0]
            elif not missing and len(self._running) < self._num_parallel:
                self._waiting.remove(run)
                self._start(run)

    def _log(self, name: str) -> pathlib.Path:
        folder = pathlib.Path(self._scratch.name) if self._scratch else self._root
        return folder / name / LOG

    def _start(self, run: Run) -> None:
        command = [*self._program, *run.command(str(self._root))]
        command += ["--dry_run"] if self._dry_run else []
        log = self._log(run.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if not self._dry_run:
            _write_marker(log.parent / STARTED, self._records[run.name])
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            # A session of its own: Ctrl-C reaches the sweep, which lets the run save.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self._lock is None else (self._lock,),
            )
        self._running[run.name] = (process, time.monotonic())
        self._say(run.name, "checking" if self._dry_run else f"started, see {log}")

    def _reap(self) -> None:
        for name, (process, began) in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[name]
            seconds = f"{time.monotonic() - began:.0f} s"
            if status == 0:
                if self._dry_run:
                    self._before.add(name)
                else:
                    _write_marker(self._root / name / DONE, self._records[name])
                    self._done.add(name)
                self._say(name, f"{'fine' if self._dry_run else 'done'}, {seconds}")
            elif self._stop or status in PREEMPTED:
                self._say(name, f"stopped with status {status} after {seconds}")
                self._stopped.append(name)
                self._stop = self._stop or [signal.SIGTERM]
            else:
                self._failed[name] = status
                self._say(name, f"FAILED with status {status} after {seconds}")

    def _say(self, name: str, text: str) -> None:
        finished = len(self._done | self._before | set(self._failed))
        print(f"[{finished}/{len(self._runs)}] {name}: {text}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        for name, need in self._left_out.items():
            verb = "checked" if self._dry_run else "run"
            print(f"{name}: not {verb}, it needs {need}", file=sys.stderr)
        for name, status in self._failed.items():
            where = "" if self._dry_run else f" (log: {self._log(name)})"
            print(
                f"FAILED {name}: status {status}{where}: {self._last_line(name)}", file=sys.stderr
            )
        counts = {
            "fine or done before" if self._dry_run else "done": len(self._done | self._before),
            "failed": len(self._failed),
            "not checked" if self._dry_run else "not run": len(self._left_out),
            "to go": len(self._waiting) + len(self._stopped),
        }
        print(", ".join(f"{n} {what}" for what, n in counts.items() if n), file=sys.stderr)

    def _last_line(self, name: str) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]


#### The command line ##############################################################################


class _Parser(argparse.ArgumentParser):
    """Errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parse_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python launch/sweep.py (--gin_file=FILE ... --grid MACRO=A,B ... | "
        "--sweep_file=FILE) --output=DIR [--gin.MACRO=VALUE ...] [flags] [-- FLAGS_OF_COMMANDS]",
    )
    add = parser.add_argument
    add("--gin_file", action="append", default=[], help="of every run; later ones win")
    add("--sweep_file", help="a TOML file of rows")
    add("--output", required=True, help="the folder of all runs")
    add("--grid", action="append", default=[], metavar="MACRO=A,B", help="an axis")
    add("--rows", help="of the sweep file: only these, and what they need; commas between")
    add("--print", action="store_true", help="print the commands that are not done, run none")
    add("--dry_run", action="store_true", help="check, with --dry_run, what needs no other run")
    add("--num_parallel", type=int, default=1, help="most runs at once (default 1)")
    add("--redo_changed", action="store_true", help="put folders of other commands aside")
    add("--command", default="gkd-jax", help="in place of gkd-jax")
    add("extra", nargs="*", metavar="-- FLAGS", help="added to every command")
    arguments, macros = list(arguments), {}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for argument in [text for text in arguments[:end] if text.startswith("--gin.")]:
        name, separator, value = argument.removeprefix("--gin.").partition("=")
        if not name or not separator:
            raise UsageError(f"{argument!r} has no value: write {argument}=VALUE")
        macros[name] = value
    kept = [text for text in arguments[:end] if not text.startswith("--gin.")]
    values = parser.parse_args(kept)
    if values.extra:
        raise UsageError(
            f"flags only, got {values.extra[0]!r}; write flags of every command after --"
        )
    values.extra = arguments[end + 1 :]
    return values, macros


def _rows(values: argparse.Namespace, macros: Mapping[str, str]) -> list[Row]:
    grids = [sweep_rows.parse_grid(text) for text in values.grid]
    axes = dict(grids)
    if len(axes) < len(grids):
        raise UsageError(f"--grid: an axis is given twice: {', '.join(axis for axis, _ in grids)}")
    if bool(values.sweep_file) == bool(values.gin_file):
        raise UsageError("give either --gin_file (with --grid) or --sweep_file")
    if values.sweep_file:
        rows = sweep_rows.override(sweep_rows.read_sweep_file(values.sweep_file), macros, axes)
        return sweep_rows.in_order(rows, values.rows.split(",") if values.rows else rows)
    if values.rows:
        raise UsageError("--rows chooses from a --sweep_file, and there is none")
    for macro in macros:
        if macro in axes:
            raise UsageError(f"{macro} is given by --grid and by --gin.{macro}")
    name = re.sub(r"[^\w.]+", "_", pathlib.PurePath(values.gin_file[-1]).stem)
    return sweep_rows.in_order(
        {name: Row(name, "train", tuple(values.gin_file), macros, axes)}, [name]
    )


def _lock(root: pathlib.Path) -> int:
    """A descriptor whose lock no other sweep of the folder can have."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / ".sweep_lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(
            f"another sweep, or a run of one that was killed, works on {root}"
        ) from None
    return descriptor


def _main(arguments: Sequence[str]) -> int:
    values, macros = _parse_flags(arguments)
    if values.num_parallel < 1:
        raise UsageError(f"--num_parallel must be at least 1, got {values.num_parallel}")
    program = shlex.split(values.command)
    root = pathlib.Path(os.path.abspath(values.output))
    if not program or not (values.print or shutil.which(program[0])):
        raise UsageError(f"--command: no program {values.command!r}")
    if re.search(r"['\"\\{}\n]", str(root)):
        raise UsageError(f"--output must not hold quotes, backslashes or braces, got {str(root)!r}")
    runs = sweep_rows.expand(_rows(values, macros), values.extra)
    writes = not values.print and not values.dry_run
    lock = _lock(root) if writes else None
    done, changed = survey(runs, root)
    if changed and not values.redo_changed:
        name, text = next(iter(changed.items()))
        raise UsageError(
            f"{root / name} was made otherwise: {text} ({len(changed)} such); take another "
            "--output, or --redo_changed to put them aside and run them again"
        )
    if writes:
        for name in changed:
            print(
                f"{name}: {changed[name]}; put aside as {_put_aside(root / name)}", file=sys.stderr
            )
    if values.print:
        for run in runs:
            if run.name not in done:
                print(shlex.join([*program, *run.command(str(root))]))
        return 0
    if done:
        print(f"skipped, done before: {', '.join(sorted(done))}", file=sys.stderr)
    execution = Execution(
        runs,
        done,
        root=root,
        program=program,
        num_parallel=values.num_parallel,
        dry_run=values.dry_run,
        lock=lock,
    )
    return execution.run()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a sweep and exits with its status."""
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
