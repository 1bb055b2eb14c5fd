"""Writes and reads the numbers of a run.

`Writer` writes metrics.jsonl and TensorBoard files in MODEL_DIR, and `read`, `values_by_step` and
`study_table` read metrics.jsonl.
"""

from collections.abc import Callable, Mapping, Sequence
import io
import json
import os
import pathlib
import socket
import sys
import tempfile
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import tensorflow as tf

from gkd_jax.text import files, task_names
from gkd_jax.training import samples


Tracker = Callable[[int, Mapping[str, float]], None]
"""A tracker takes the number of a step and its numbers by name, and passes them on elsewhere."""

FILE = "metrics.jsonl"  # of a MODEL_DIR
COPY_SECONDS = 60.0  # between two copies of the files to a bucket


class Writer:
    """Appends the numbers of each step to MODEL_DIR/metrics.jsonl and MODEL_DIR/tensorboard.

    When a run resumes, lines of metrics.jsonl after the restored step are dropped, because their
    steps are run again. When it begins, all lines are, which are those of a start that failed
    before its first checkpoint, perhaps of another configuration. In a job of several processes,
    only the first one writes.

    Nothing can be appended to a file in a bucket. If MODEL_DIR is in one, the files grow in a
    temporary folder of this machine, from which `copy` writes them to the bucket.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        also: Sequence[Tracker] = (),
    ):
        """Opens the files of a run; with a `resume_step`, they hold the run up to this step.

        The functions `also` are given the numbers of each step as well.
        """
        self._folder = epath.Path(model_dir)
        self._also = tuple(also)
        self._file = None
        self._samples = samples.SampleWatch()
        self._tensorboard = None
        self._temporary: tempfile.TemporaryDirectory | None = None
        if jax.process_index() > 0:
            return
        if files.in_bucket(model_dir):
            self._temporary = tempfile.TemporaryDirectory(prefix="gkd_jax_metrics_")
            self._copied_at = time.monotonic()
        local = pathlib.Path(self._temporary.name if self._temporary else model_dir)
        last = -1 if resume_step is None else resume_step
        kept = [line for line in read(self._folder / FILE) if line["step"] <= last]
        for line in kept:
            self._samples.see(line)
        files.write_whole(local / FILE, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = (local / FILE).open("a")
        self._tensorboard = EventFile(local / "tensorboard")

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        before_warning: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes one line `{"step": step, **values}`, and warns of samples that go wrong.

        `before_warning` is called before a warning is printed.
        """
        if self._file is None or self._tensorboard is None:
            return
        for warning in self._samples.see(values):
            before_warning()
            print(f"WARNING: step {step}: {warning}", file=sys.stderr)
        with files.naming(self._file.name):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        self._tensorboard.write(step, values)
        for tracker in self._also:
            tracker(step, values)
        if self._temporary is not None and time.monotonic() - self._copied_at > COPY_SECONDS:
            self.copy()

    def copy(self) -> None:
        """Copies the files to MODEL_DIR if it is in a bucket.

        `write` does so every COPY_SECONDS. A caller that saves a checkpoint does so before, because
        a run that resumes needs the lines of all steps up to the checkpoint.
        """
        if self._temporary is None:
            return
        root = pathlib.Path(self._temporary.name)
        for file in root.rglob("*"):
            if file.is_file():
                files.write_whole(self._folder / file.relative_to(root), file.read_bytes())
        self._copied_at = time.monotonic()

    def dump(self, step: int, arrays: Mapping[str, Any]) -> epath.Path:
        """Writes the arrays that this process holds whole to `MODEL_DIR/nonfinite_<step>.npz`.

        Returns:
            The path of the file.
        """
        path = self._folder / f"nonfinite_{step}.npz"
        held = {
            name: np.asarray(value)
            for name, value in arrays.items()
            if getattr(value, "is_fully_addressable", True)
        }
        content = io.BytesIO()
        np.savez(content, **held)  # pyright: ignore[reportArgumentType]
        files.write_whole(path, content.getvalue())
        return path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._temporary is not None:
            self.copy()
            self._temporary.cleanup()


class EventFile:
    """A file of numbers by step that TensorBoard shows.

    It is a file of records, each of which is a serialized Event (tensorflow/core/util/event.proto).
    TensorBoard's own writer is slow to import, and `tf.summary.scalar` is slow for many numbers.
    """

    def __init__(self, folder: pathlib.Path):
        """Creates a new file in the folder, which is made if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = tf.io.TFRecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")  # TensorBoard wants it in the first record

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one event with the numbers of a step, by name."""
        of = tf.compat.v1.Summary.Value
        numbers = [of(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=tf.compat.v1.Summary(value=numbers))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())
        self._file.flush()


def read(path: files.AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without those that a crash has cut short or changed.

    There are none if the file does not exist.
    """
    return [line for line in files.read_records(path)[0] if isinstance(line.get("step"), int)]


def values_by_step(path: files.AnyPath, name: str) -> dict[int, float]:
    """Returns one number of a metrics.jsonl by step; empty if the file does not exist."""
    return {line["step"]: line[name] for line in read(path) if name in line}


def study_table(root: str | os.PathLike[str], phases: Sequence[str]) -> str:
    """Returns a Markdown table with the last evaluation of each run of a study, one run a row.

    The runs are the folders `phases` of `root`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for phase in phases:
        rows[phase] = task_names.last_evaluation(read(epath.Path(root) / phase / FILE))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = [["run", *names]]
    for phase, row in rows.items():
        table.append([phase, *(_cell(name, row[name]) if name in row else "" for name in names)])
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def _cell(name: str, value: float) -> str:
    """Formats a value: three digits for divergences in nats, one for scores of up to 100."""
    return f"{value:.3f}" if name.endswith("divergence") else f"{value:.1f}"
