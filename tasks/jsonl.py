"""Tasks made from a JSONL file with `inputs` and `targets`: SeqKD's teacher outputs, instructions.

    task = jsonl_task("/data/teacher.jsonl")

registers and returns a task of one split, `train`. The file is read when a dataset is asked for,
so that a task can be named before another run has written its file.
"""

from collections.abc import Callable, Sequence
import hashlib
import os
import re

import seqio
import tensorflow as tf

from gkd_jax.tasks import features
from gkd_jax.text import files, text_metrics


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
    rows = files.parse_objects(files.read_lines(absolute), absolute, ("inputs", "targets"))
    return [
        {key: files.string(row, key, absolute, number) for key in ("inputs", "targets")}
        for number, row in enumerate(rows, start=1)
    ]


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
