"""Runs the commands of a study, several at once, each after those whose results it needs."""

from collections.abc import Iterable, Sequence
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from gkd_jax.sweeps import folders
from gkd_jax.sweeps.rows import Run
from gkd_jax.text import files


PREEMPTED = (128 + signal.SIGTERM, -signal.SIGTERM)
_POLL_S = 0.05


class Execution:
    """Runs commands, several at once, each after the runs that it needs.

    Args:
        runs: the runs, each after those that it needs.
        program: the words before the subcommand, such as ["gkd-jax"].
        dry_run: start the commands with `--dry_run`, and write nothing below `root`.
        lock: a locked file descriptor that commands inherit, so that the lock is held as long as a
            command runs; None without a lock.
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
        self._records = folders.records(runs)
        self._done = set(done)
        self._checked: set[str] = set()  # by a dry run
        self._waiting = [run for run in runs if run.name not in self._done]
        self._running: dict[str, tuple[subprocess.Popen, float]] = {}
        self._failed: dict[str, int] = {}
        self._left_out: dict[str, str] = {}
        self._stopped: list[str] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="sweep_") if dry_run else None
        self._stop: list[int] = []  # the signals that were received
        self._told = 0  # how many signals were passed on to the commands

    def run(self) -> int:
        """Runs everything and returns the exit status; see `sweep.sweep`."""
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
            self._send(signal.SIGTERM)  # commands are left only after an error in this class
            self._report()
            if self._scratch is not None:
                self._scratch.cleanup()
        return 128 + self._stop[0] if self._stop else int(bool(self._failed))

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._stop.append(number)

    def _tell_to_stop(self) -> None:
        """Passes signals on: SIGTERM asks every run to save, and a second signal kills the runs."""
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
            # A dry run makes no checkpoints, so runs that need one cannot be checked.
            if lost or (self._dry_run and missing):
                self._waiting.remove(run)
                self._left_out[run.name] = (lost or missing)[0]
            elif not missing and len(self._running) < self._num_parallel:
                self._waiting.remove(run)
                self._start(run)

    def _log(self, name: str) -> pathlib.Path:
        folder = pathlib.Path(self._scratch.name) if self._scratch else self._root
        return folder / name / folders.LOG

    def _start(self, run: Run) -> None:
        command = [*self._program, *run.command(str(self._root))]
        command += ["--dry_run"] if self._dry_run else []
        log = self._log(run.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if not self._dry_run:
            files.write_record(log.parent / folders.STARTED, self._records[run.name])
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            # In a session of its own, a run does not get Ctrl-C: the sweep passes it on as SIGTERM.
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
                    self._checked.add(name)
                else:
                    files.write_record(self._root / name / folders.DONE, self._records[name])
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
        finished = len(self._done | self._checked | set(self._failed))
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
            "fine or done before" if self._dry_run else "done": len(self._done | self._checked),
            "failed": len(self._failed),
            "not checked" if self._dry_run else "not run": len(self._left_out),
            "to go": len(self._waiting) + len(self._stopped),
        }
        print(", ".join(f"{n} {what}" for what, n in counts.items() if n), file=sys.stderr)

    def _last_line(self, name: str) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]
