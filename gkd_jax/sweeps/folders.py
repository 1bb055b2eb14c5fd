"""Reads from a study's folders which runs are done, and whose commands have changed since.

A run's folder holds `sweep_started` and, after exit status 0, `sweep_done`. Both are JSON: the
command that made the folder, and a digest of that command and of those whose results it needs.
"""

from collections.abc import Mapping, Sequence
import hashlib
import itertools
import json
import pathlib
import shlex
from typing import Any

from gkd_jax.sweeps.rows import Run
from gkd_jax.text import files


STARTED, DONE, LOG = "sweep_started", "sweep_done", "log.txt"


def records(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Returns what identifies each run: its command, and the commands whose results it needs.

    The word OUTPUT stands for the folder of the study, so that a study can be moved.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        command = run.command("OUTPUT")
        needs = {need: found[need]["digest"] for need in run.needs}
        digest = hashlib.sha256(json.dumps([command, needs]).encode()).hexdigest()[:16]
        found[run.name] = {"command": command, "needs": needs, "digest": digest}
    return found


def recorded(folder: pathlib.Path, marker: str) -> dict[str, Any] | None:
    """Returns the content of a marker file; None if there is none, and {} if it is damaged."""
    path = folder / marker
    if not path.exists():
        return None
    return files.read_record(path) or {}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Says in words what has changed since a marker was written; "" if nothing has."""
    if old.get("digest") == new["digest"]:
        return ""
    before, now = old.get("command", []), new["command"]
    removed = shlex.join(text for text in before if text not in now)
    added = shlex.join(text for text in now if text not in before)
    if removed or added:
        return f"its command had {removed or 'nothing'} where it now has {added or 'nothing'}"
    if before != now:
        return "its command had the same arguments in another order"
    needs = old.get("needs", {})
    changed = [name for name, value in new["needs"].items() if needs.get(name) != value]
    return f"what it starts from has changed: {', '.join(changed)}"


def survey(runs: Sequence[Run], root: pathlib.Path) -> tuple[set[str], dict[str, str]]:
    """Returns the runs that are done, and what has changed for each run with another command."""
    done, changed = set(), {}
    for name, record in records(runs).items():
        folder = root / name
        finished = recorded(folder, DONE)
        started = finished if finished is not None else recorded(folder, STARTED)
        # A command that failed before it wrote anything may be corrected.
        if started is None or {path.name for path in folder.iterdir()} <= {STARTED, LOG}:
            continue
        text = difference(started, record)
        if text:
            changed[name] = text
        elif finished is not None:
            done.add(name)
    return done, changed


def put_aside(folder: pathlib.Path) -> pathlib.Path:
    """Renames a folder to one that is free, and returns the new path."""
    places = (folder.with_name(f"{folder.name}.replaced_{n}") for n in itertools.count(1))
    return folder.rename(next(place for place in places if not place.exists()))
