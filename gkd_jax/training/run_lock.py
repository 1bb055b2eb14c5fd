"""A lock on MODEL_DIR, so that the same command started twice does not write one run twice."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


FILE = "lock.json"
RENEW_SECONDS = 20.0
STALE_SECONDS = 60.0


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a folder, one for all processes of a job; the first process keeps it.

    A lock that is being renewed is waited for, for a minute. One that nobody has renewed for a
    minute, or whose process on this machine has ended, is taken over.

    Raises:
        ValueError: naming who holds the lock, if it is still being renewed after the wait.
    """
    existed, refusal = folder.exists(), ""
    if jax.process_index() == 0:
        refusal = _take(folder)
    if np.any(multihost_utils.process_allgather(np.asarray(bool(refusal)))):
        raise ValueError(refusal or f"MODEL_DIR {str(folder)!r} is in use by another job")
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(folder / FILE, ended), daemon=True)
    if jax.process_index() == 0:
        renewal.start()
    try:
        yield
    finally:
        ended.set()
        if jax.process_index() == 0:
            renewal.join()
            (folder / FILE).unlink(missing_ok=True)
            if not existed:  # a start that failed leaves nothing behind
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _take(folder: pathlib.Path) -> str:
    """Makes the lock's file; returns why it cannot, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    path, waited_since, said = folder / FILE, time.monotonic(), False
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            owner, age = _owner(path)
            if age is None:
                continue  # it was released in between
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            if age > STALE_SECONDS or _has_ended(owner):
                print(
                    f"taking over the lock of {folder} from {who}, which has ended", file=sys.stderr
                )
                path.unlink(missing_ok=True)
                continue
            if time.monotonic() - waited_since > STALE_SECONDS:
                return f"MODEL_DIR {str(folder)!r} is being trained by {who}: one run at a time"
            if not said:
                print(f"waiting for {who}, which is training in {folder}", file=sys.stderr)
                said = True
            time.sleep(min(1.0, STALE_SECONDS / 10))
            continue
        with os.fdopen(descriptor, "w") as file:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time()}
            json.dump(owner, file)
        return ""


def _owner(path: pathlib.Path) -> tuple[dict[str, Any], float | None]:
    """Who holds a lock, and the seconds since it was renewed; None where there is no lock."""
    try:
        age = time.time() - path.stat().st_mtime
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, None
    try:
        owner = json.loads(content)
    except ValueError:  # being written
        owner = {}
    return owner if isinstance(owner, dict) else {}, age


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    started = _start_time(owner["pid"])
    return started is None or started != owner.get("started")


def _start_time(pid: int | None = None) -> str | None:
    """When a process began, in the kernel's ticks; None if there is none of this number."""
    try:
        stat = pathlib.Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _renew(path: pathlib.Path, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
