"""`StepLog`: writes the metrics of each step, one step late.

The host logs a step while the device already works on the next one, so the device never idles.
"""

from collections.abc import Mapping
import concurrent.futures
import time
from typing import NamedTuple

import jax
import numpy as np

from gkd_jax import sharding
from gkd_jax.training import metrics, samples, throughput
from gkd_jax.training.program import Program
from gkd_jax.training.progress import Progress
from gkd_jax.training.rollouts import Rollout


class Step(NamedTuple):
    """A step that was dispatched to the device, and whose results nobody has waited for."""

    number: int  # counted from 0
    rollout: Rollout
    values: Mapping[str, jax.Array]  # the metrics that the update returns
    update_seconds: concurrent.futures.Future[float]  # for which the device is busy with it


class StepLog:
    """Holds the latest step back: `add` writes the previous step, and `flush` the one held."""

    def __init__(self, writer: metrics.Writer, progress: Progress, program: Program):
        self._writer, self._progress, self._program = writer, progress, program
        self._learning_rate = jax.jit(program.recipe.learning_rate())
        self._eos_ids = program.method.sampling.special_ids(program.models.student).eos
        self._peak = throughput.peak_flops()
        self._held: Step | None = None
        self._ended_at = 0.0

    def add(self, step: Step) -> None:
        """Writes the previous step and holds this one, which was just dispatched.

        Raises:
            FloatingPointError: if the loss or the gradient of the previous step is not finite; the
                batch is dumped first.
        """
        self._write_held()
        self._held = step

    def flush(self) -> None:
        """Writes the held step too, as a checkpoint of it needs, and clears the bar of progress.

        Raises:
            FloatingPointError: as `add` does.
        """
        self._write_held()
        self._progress.clear()
        self._writer.copy()

    def _write_held(self) -> None:
        """Waits for the results of the held step, if there is one, and writes its line."""
        step, self._held = self._held, None
        if step is None:
            return
        values = {name: float(value) for name, value in jax.device_get(step.values).items()}
        sampled = step.rollout.sample_seconds
        with jax.default_device(sharding.host_device()):
            learning_rate = float(self._learning_rate(step.number))
        line = {
            "train/learning_rate": learning_rate,
            **{f"train/{name}": value for name, value in values.items()},
            "train/on_policy": float(step.rollout.sample is not None),
            **self._sample_numbers(step.rollout),
            "time/sample_s": sampled.result() if sampled else 0.0,
            "time/update_s": step.update_seconds.result(),
        }
        busy = line["time/sample_s"] + line["time/update_s"]
        rows = 0 if step.rollout.sample is None else len(step.rollout.sample.tokens)
        sampled_tokens = line.get("train/sample_length", 0.0) * rows
        line |= self._speed(step, values, busy, sampled_tokens) | throughput.device_memory()
        self._writer.write(step.number + 1, line, before_warning=self._progress.clear)
        self._progress.step(step.number + 1, line)
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        if not finite and "skipped" not in values:
            self._stop_at_nonfinite(step, values)

    def _sample_numbers(self, rollout: Rollout) -> dict[str, float]:
        """Returns the metrics of a step's samples and of their rewards; {} without samples."""
        sample = rollout.sample
        if sample is None:
            return {}
        tokens, weights, log_probs = jax.device_get(
            (sample.tokens, sample.weights, sample.log_probs)
        )
        found = samples.sample_statistics(tokens, weights, self._eos_ids)
        numbers = {
            "train/sample_length": found["length"],
            "train/truncated_fraction": found["truncated_fraction"],
            "train/sample_entropy": float(-(log_probs * weights).sum() / weights.sum()),
            "train/distinct_2": found["distinct_2"],
        }
        if self._program.recipe.train.sample_ahead:
            numbers["train/staleness"] = float(rollout.is_early)
        if rollout.rewards is not None:
            numbers["train/reward"] = float(rollout.rewards.mean())
            numbers["train/reward_std"] = float(rollout.rewards.std())
        return numbers

    def _speed(
        self, step: Step, values: Mapping[str, float], busy: float, sampled_tokens: float
    ) -> dict[str, float]:
        """Returns the time of the step, its tokens a second, and its share of the peak.

        A pause between the previous step and this one, such as an evaluation, does not count. The
        time is at least that for which the device was busy, since a step that a checkpoint follows
        is logged as soon as the previous one.
        """
        now = time.monotonic()
        seconds = max(now - max(self._ended_at, step.rollout.began), busy, 1e-9)
        self._ended_at = now
        tokens = values["prompt_tokens"] + values["target_tokens"]
        found = {"time/step_s": seconds, "time/tokens_per_s": tokens / seconds}
        if self._peak is None:
            return found
        program = self._program
        flops = throughput.step_flops(
            program.models.student,
            program.learner.teachers if step.rollout.batch.teacher_scores is None else (),
            program.method,
            prompt_tokens=values["prompt_tokens"],
            target_tokens=values["target_tokens"],
            batch_size=program.recipe.data.batch_size,
            sampled_tokens=sampled_tokens,
        )
        return {**found, "time/model_flops_share": flops / seconds / self._peak}

    def _stop_at_nonfinite(self, step: Step, values: dict[str, float]) -> None:
        kind = "dataset" if step.rollout.sample is None else "on-policy"
        batch = step.rollout.batch
        arrays = batch._asdict() | (batch.teacher_scores._asdict() if batch.teacher_scores else {})
        arrays = {k: v for k, v in arrays.items() if k != "teacher_scores" and v is not None}
        dumped = self._writer.dump(step.number, arrays)
        raise FloatingPointError(
            f"step {step.number} ({kind} batch): loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}; the batch is in {dumped}, and the last checkpoint is from "
            "before it. recipe.TrainConfig.skip_nonfinite = True goes on"
        )
