"""The names of tasks, in the settings and the metrics of a run.

    arithmetic                  a registered task
    ./data.jsonl, ./folder      a JSONL file, or a folder of such files
    ./data.jsonl:mathematics    the rows of a file whose field `teacher` is "mathematics"
    ./folder/:mathematics       the same of a folder

This module needs neither TensorFlow nor seqio, so that whatever reads a run's record has the same
names as the run.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
import re
from typing import Any


ENDINGS = (".jsonl", ".jsonl.gz")
# A colon anywhere else belongs to a path, as in gs://bucket or 12:30.jsonl.
_OF_TEACHER = re.compile(r"(?P<path>.*(?:\.jsonl|\.jsonl\.gz|/)):(?P<teacher>[^/]+)")


def split(name: str) -> tuple[str, str | None]:
    """Returns the name without a selection of rows, and the value of `teacher` that selects them.

    The value is None if the name selects no rows.
    """
    found = _OF_TEACHER.fullmatch(name)
    return (name, None) if found is None else (found["path"], found["teacher"])


def is_path(name: str) -> bool:
    """Returns whether a task's name is the path of a JSONL file or of a folder."""
    path, _ = split(name)
    return path.endswith(ENDINGS) or "/" in path


def display_name(name: str) -> str:
    """Returns the name of a task in metrics and reports: the last part of a path, or the name."""
    path, teacher = split(name)
    shown = os.path.basename(path.rstrip("/")) if is_path(path) else path
    return shown if teacher is None else f"{shown}:{teacher}"


def teachers_of(path: str, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the values of `teacher` by which any of the names selects rows of a path."""
    parts = (split(name) for name in names)
    return tuple(teacher for file, teacher in parts if file == path and teacher is not None)


def evaluation_in(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of the evaluation in a line of metrics.jsonl, by TASK/METRIC."""
    return {
        name.removeprefix("eval/"): float(value)
        for name, value in line.items()
        if name.startswith("eval/") and type(value) in (int, float)
    }


def last_evaluation(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the numbers of the last evaluation in metrics.jsonl; {} if there is none."""
    return next(filter(None, map(evaluation_in, reversed(lines))), {})
