"""A lock on MODEL_DIR, so that two starts of one command never write to the same run.

The lock is a file that its owner touches every RENEW_SECONDS. If the owner was killed, the file
grows older than STALE_SECONDS, and the next start takes the lock over. In a bucket, two jobs that
start in the same instant can both take the lock, as on a network disk without `flock` if the lock
is stale.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from etils import epath
import jax

from gkd_jax.storage import processes
from gkd_jax.text import files


FILE = "lock.json"
RENEW_SECONDS = 20.0
STALE_SECONDS = 60.0


@contextlib.contextmanager
def hold(model_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a MODEL_DIR while the context lasts, on behalf of all processes of a job.

    The first process of the job owns the file. If another job renews the lock, this waits for a
    minute. It takes the lock over if nobody renewed it for a minute, or if its owner was a process
    of this machine that has ended.

    Raises:
        ValueError: if the lock is still renewed after the wait; the message names its owner.
    """
    folder = epath.Path(model_dir)
    existed = folder.exists()
    processes.on_first_process(_take, folder)
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
            # Another start may have taken over a lock that was not renewed in time.
            if _owner(folder / FILE)[0] == _this_process():
                (folder / FILE).unlink(missing_ok=True)
            if not existed and not files.in_bucket(folder):  # a failed start leaves nothing behind
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _take(folder: epath.Path) -> None:
    """Creates the lock file, or raises ValueError if another job keeps the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    path, waited_since, said = folder / FILE, time.monotonic(), False
    while True:
        try:
            _create(path)
            return
        except FileExistsError:
            owner, age = _owner(path)
            if age is None:
                continue  # the owner has just released it
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            if _is_stale(owner, age):
                _remove_stale(path)
                print(
                    f"taking over the lock of {folder} from {who}, which has ended", file=sys.stderr
                )
                continue
            if time.monotonic() - waited_since > STALE_SECONDS:
                raise ValueError(
                    f"MODEL_DIR {str(folder)!r} is being trained by {who}: one run at a time"
                ) from None
            if not said:
                print(f"waiting for {who}, which is training in {folder}", file=sys.stderr)
                said = True
            time.sleep(min(1.0, STALE_SECONDS / 10))


def _create(path: epath.Path) -> None:
    """Creates the lock file, with this process as its owner.

    Raises:
        FileExistsError: if there is a lock file.
        OSError: if the folder cannot be written to.
    """
    owner = _this_process()
    if not files.in_bucket(path):
        with files.naming(path), open(path, "x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(owner))
                file.flush()
            except OSError:  # An empty lock, as a full disk leaves it, would name no owner.
                path.unlink()
                raise
    elif path.exists():
        raise FileExistsError(os.fspath(path))
    else:
        path.write_text(json.dumps(owner))


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time()}


def _owner(path: epath.Path) -> tuple[dict[str, Any], float | None]:
    """Returns (owner, seconds since the lock was renewed); ({}, None) if there is no lock."""
    try:
        age = time.time() - (path.stat().mtime if files.in_bucket(path) else os.stat(path).st_mtime)
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, None
    try:
        owner = json.loads(content)
    except ValueError:  # the owner is still writing it
        owner = {}
    return owner if isinstance(owner, dict) else {}, age


def _remove_stale(path: epath.Path) -> None:
    """Removes a stale lock, unless another start has removed it and made its own since."""
    if files.in_bucket(path):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        with contextlib.suppress(OSError):  # Some network disks have no such lock.
            fcntl.flock(file, fcntl.LOCK_EX)  # No other start can remove this file now.
        is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        if is_there and _is_stale(*_owner(path)):
            os.unlink(path)


def _is_stale(owner: dict[str, Any], age: float | None) -> bool:
    return age is not None and (age > STALE_SECONDS or _has_ended(owner))


def _has_ended(owner: dict[str, Any]) -> bool:
    """Returns whether the owner was a process of this machine that has ended."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    started = _start_time(owner["pid"])
    return started is None or started != owner.get("started")


def _start_time(pid: int | None = None) -> str | None:
    """Returns the start time of a process in kernel ticks; None if there is no such process.

    Together with the process id, it tells a process from a later one with the same id.
    """
    try:
        stat = pathlib.Path(f"/proc/{pid or os.getpid()}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _renew(path: epath.Path, ended: threading.Event) -> None:
    """Gives the lock file a new time of modification from time to time."""
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):
            if files.in_bucket(path):
                path.write_bytes(path.read_bytes())
            else:  # A full disk allows this, and a lock that another start took keeps its content.
                os.utime(path)
