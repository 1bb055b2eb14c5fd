"""Writes and reads the numbers of a run.

`Writer` writes metrics.jsonl and TensorBoard files in MODEL_DIR, and `SampleWatch` warns of samples
that go wrong. `read`, `values_by_step` and `study_table` read metrics.jsonl, and `DeviceClock`
measures device time.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import concurrent.futures
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from gkd_jax.text import files


Tracker = Callable[[int, Mapping[str, float]], None]
"""A tracker takes the number of a step and its numbers by name, and passes them on elsewhere."""


class Writer:
    """Appends the numbers of each step to MODEL_DIR/metrics.jsonl and MODEL_DIR/tensorboard.

    When a run resumes, lines of metrics.jsonl after the restored step are dropped, because their
    steps are run again. When it begins, all lines are, which are those of a start that failed
    before its first checkpoint, perhaps of another configuration. In a job of several processes,
    only the first one writes; the others are `silent`.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        resume_step: int | None,
        silent: bool = False,
        also: Sequence[Tracker] = (),
    ):
        """Opens the files.

        Args:
            model_dir: the folder of the run.
            resume_step: the step from which the run goes on; None if it begins.
            silent: True writes nothing.
            also: functions that are given the numbers of each step as well.
        """
        self._folder = pathlib.Path(model_dir)
        self._also = () if silent else tuple(also)
        self._file = None
        self._samples = SampleWatch()
        self._tensorboard = tf.summary.create_noop_writer()
        if silent:
            return
        path = self._folder / "metrics.jsonl"
        if path.exists():
            last = -1 if resume_step is None else resume_step
            kept = [line for line in read(path) if line["step"] <= last]
            for line in kept:
                self._samples.see(line)
            files.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = tf.summary.create_file_writer(str(self._folder / "tensorboard"))

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        before_warning: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes one line `{"step": step, **values}`, and warns of samples that go wrong.

        Args:
            step: the number of steps done.
            values: the numbers of the step, by name.
            before_warning: called before a warning is printed.
        """
        if self._file is None:
            return
        for warning in self._samples.see(values):
            before_warning()
            print(f"WARNING: step {step}: {warning}", file=sys.stderr)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        with self._tensorboard.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        for tracker in self._also:
            tracker(step, values)

    def dump(self, step: int, arrays: Mapping[str, Any]) -> pathlib.Path:
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
        np.savez(path, **held)  # pyright: ignore[reportArgumentType]
        return path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._tensorboard.close()


def sample_statistics(
    tokens: np.ndarray, weights: np.ndarray, eos_ids: Sequence[int]
) -> dict[str, float]:
    """Returns statistics that show whether samples go wrong.

    Args:
        tokens: sampled ids [N, T].
        weights: an array [N, T] that is 1 where a token counts, 0 elsewhere.
        eos_ids: the ids that end a sample; without any, every sample is truncated.

    Returns:
        `length`, the mean number of tokens of a sample; `truncated_fraction`, the share of samples
        of which no token that counts is one of `eos_ids`; and `distinct_2`, the share of distinct
        bigrams.
    """
    # An id that pads rows may be one that ends texts, so the weights must say which tokens count.
    ends = np.isin(tokens, eos_ids) & (weights > 0)
    return {
        "length": float(weights.sum(1).mean()),
        "truncated_fraction": float((~ends.any(1)).mean()),
        "distinct_2": _distinct_bigrams(tokens, weights),
    }


def _distinct_bigrams(tokens: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of distinct bigrams within a sample, averaged over samples.

    The share falls when samples repeat themselves. It is 1 if no sample has a bigram.
    """
    shares = []
    for row, length in zip(tokens, weights.sum(1).astype(int), strict=True):
        pairs = list(zip(row[: length - 1].tolist(), row[1:length].tolist(), strict=True))
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    return float(np.mean(shares)) if shares else 1.0


class SampleWatch:
    """Warns when the student's samples grow, are truncated, repeat themselves or lose entropy.

    These are the ways in which on-policy training goes wrong. The means over the latest `window`
    sampled steps are compared with those over the first. Each kind of warning is given once.
    """

    def __init__(self, window: int = 50):
        self._window = window
        self._first: dict[str, float] | None = None
        self._latest: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=window)
        self._said: set[str] = set()

    def see(self, values: Mapping[str, Any]) -> list[str]:
        """Takes the numbers of one more step and returns the new warnings."""
        if "train/sample_length" not in values:
            return []
        self._latest.append(values)
        if len(self._latest) < self._window:
            return []
        now = {
            name: sum(line[f"train/{name}"] for line in self._latest) / self._window
            for name in ("sample_length", "truncated_fraction", "sample_entropy", "distinct_2")
        }
        first = self._first = self._first or now
        found = {
            "samples grow": (
                now["sample_length"] > 1.5 * first["sample_length"],
                "{sample_length:.1f} tokens",
            ),
            "most samples reach the target length before they end": (
                now["truncated_fraction"] > 0.5,
                "{truncated_fraction:.0%}",
            ),
            "samples repeat themselves": (
                now["distinct_2"] < 0.6 * first["distinct_2"],
                "{distinct_2:.2f} of their bigrams are distinct",
            ),
            "the student's entropy collapses": (
                now["sample_entropy"] < 0.1 * first["sample_entropy"],
                "{sample_entropy:.3f} nats a token",
            ),
        }
        warnings = []
        for fault, (is_wrong, number) in found.items():
            if is_wrong and fault not in self._said:
                self._said.add(fault)
                warnings.append(
                    f"{fault}: {number.format(**now)} in the last {self._window} sampled steps; "
                    f"{number.format(**first)} in the first"
                )
        return warnings


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl, without those that a crash has cut short or changed.

    There are none if the file does not exist.
    """
    return [line for line in files.read_records(path)[0] if isinstance(line.get("step"), int)]


def values_by_step(path: pathlib.Path, name: str) -> dict[int, float]:
    """Returns one number of a metrics.jsonl by step; empty if the file does not exist."""
    return {line["step"]: line[name] for line in read(path) if name in line}


class DeviceClock:
    """Measures how long the device works on each result, without making the caller wait.

    The time of a result begins when the result before it is ready or, if that is later, when the
    result is dispatched. It ends when the result is ready.
    """

    def __init__(self):
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._free_at = 0.0

    def close(self) -> None:
        self._waiter.shutdown()

    def seconds(self, began: float, result: jax.Array) -> concurrent.futures.Future[float]:
        """Returns the seconds of a result as a future. Call this in the order of dispatch.

        Args:
            began: the `time.monotonic()` of the dispatch.
            result: an array of the dispatched computation.
        """

        def wait() -> float:
            jax.block_until_ready(result)
            before, self._free_at = self._free_at, time.monotonic()
            return self._free_at - max(began, before)

        return self._waiter.submit(wait)


def study_table(root: pathlib.Path, phases: Sequence[str]) -> str:
    """Returns a Markdown table with the last evaluation of each run of a study, one run a row.

    Args:
        root: the folder of the study.
        phases: the names of the runs, which are folders in `root`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for phase in phases:
        evaluations = [
            line
            for line in read(root / phase / "metrics.jsonl")
            if any(name.startswith("eval/") for name in line)
        ]
        rows[phase] = {
            name.removeprefix("eval/"): value
            for name, value in (evaluations[-1] if evaluations else {}).items()
            if name.startswith("eval/")
        }
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| run | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for phase, row in rows.items():
        cells = [_cell(name, row[name]) if name in row else "" for name in names]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    """Formats a value: three digits for divergences in nats, one for scores of up to 100."""
    return f"{value:.3f}" if name.endswith("divergence") else f"{value:.1f}"
