"""Tasks made from a JSONL file with `inputs` and `targets`: SeqKD's teacher outputs, instructions.

    task = jsonl_task("/data/teacher.jsonl")

registers and returns a task of one split, `train`. The file is read when a dataset is asked for,
so that a task can be named before another run has written its file.
"""

from collections.abc import Callable, Sequence
import hashlib
import json
import os
import re
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, folder
from gkd_jax.text import text_metrics


def jsonl_task(
    path: str | os.PathLike,
    *,
    metric_fns: Sequence[Callable] = (text_metrics.exact_match,),
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """The task of a JSONL file, registered under a name made from its path.

    Args:
        path: a file with one JSON object a line, plain or gzipped (`.gz`); local or `gs://`.
        metric_fns: seqio metric functions of `targets` and `predictions`.
        vocabulary: T5's if None.

    Returns:
        The task; the same one for the same path (its first metrics and vocabulary stay).
    """
    return features.register(
        task_name(path),
        source=seqio.FunctionDataSource(_Reader(_absolute(path)), splits=["train"]),
        preprocessors=[],
        metric_fns=metric_fns,
        vocabulary=vocabulary,
    )


def task_name(path: str | os.PathLike) -> str:
    """The name of a file's task: `jsonl_<stem>_<hash of the absolute path>`."""
    absolute = _absolute(path)
    stem = re.sub(r"\W+", "_", os.path.basename(absolute).split(".")[0])
    return f"jsonl_{stem}_{hashlib.sha256(absolute.encode()).hexdigest()[:8]}"


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """`inputs` and `targets` of every line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line (from 1), and what is wrong with it.
    """
    absolute = _absolute(path)
    folder_name, name = os.path.split(absolute)
    lines = folder.read_lines(folder_name, name)
    rows = parse(lines, absolute, ("inputs", "targets"))
    for number, row in enumerate(rows, start=1):
        for key in ("inputs", "targets"):
            if not isinstance(row[key], str):
                raise ValueError(
                    f"{absolute}, line {number}: {key!r} must be a string, got {row[key]!r}"
                )
    return [{key: row[key] for key in ("inputs", "targets")} for row in rows]


def parse(lines: Sequence[str], path: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """JSON objects of lines, each with all of the keys.

    Raises:
        ValueError: naming the path, the line (from 1), and what is wrong with it.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {line[:60]!r}")
        for key in keys:
            if key not in row:
                raise ValueError(f"{path}, line {number}: key {key!r} is missing")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected a JSON object a line, got an empty file")
    return rows


class _Reader:
    """seqio's dataset function of one file; a class so that a task can be pickled."""

    def __init__(self, path: str):
        self.path = path
        self.__name__ = f"read {path}"

    def __call__(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one table in memory: seqio shuffles it
        rows = read_rows(self.path)
        return tf.data.Dataset.from_tensor_slices(
            {key: [row[key] for row in rows] for key in ("inputs", "targets")}
        )


def _absolute(path: str | os.PathLike) -> str:
    name = os.fspath(path)
    return name if "://" in name else os.path.abspath(name)
