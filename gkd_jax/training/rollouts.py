"""What each step trains on: the dataset's targets, or what the student has just written."""

from collections.abc import Callable
import concurrent.futures
import functools
import time
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from gkd_jax import gkd, rl
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.input import data, streams
from gkd_jax.input.teacher_cache import TeacherCache
from gkd_jax.models import lm
from gkd_jax.sampling import Sample
from gkd_jax.training.metrics import DeviceClock
from gkd_jax.training.program import Program, Steps
from gkd_jax.training.source import Source


class Rollout(NamedTuple):
    """What one step trains on.

    Attributes:
        rows: the batch as the dataset has it, on the host.
        batch: on the devices; its targets are the dataset's or the student's.
        keys: the randomness of the step.
        update: the compiled update for a batch of this kind and shape.
        sample: what the student drew; None where the targets are the dataset's.
        sample_seconds: how long drawing keeps the device, once it has ended.
        is_early: drawn before the update of the step before it.
    """

    rows: Batch
    batch: Batch
    keys: gkd.StepKeys
    update: Callable[..., tuple[gkd.TrainState, dict[str, jax.Array]]]
    sample: Sample | None = None
    sample_seconds: concurrent.futures.Future[float] | None = None
    is_early: bool = False


class Rewards(NamedTuple):
    """What the reward said of the samples of a step, by prompt, then sample.

    Attributes:
        rewards: one number a sample.
        advantages: the same minus a baseline (`rl.advantages`).
    """

    rewards: np.ndarray
    advantages: np.ndarray


class Rollouts:
    """Owns the training stream, the coin, the teacher's cached scores and samples drawn ahead."""

    def __init__(
        self,
        program: Program,
        source: Source,
        steps: Steps,
        stream: streams.TrainIterator,
        clock: DeviceClock,
    ):
        """Takes over a stream that stands at the first step to come."""
        self._program, self._source, self._steps = program, source, steps
        self._stream, self._clock = stream, clock
        config = program.recipe.data
        self._cache = TeacherCache(config.teacher_cache) if config.teacher_cache else None
        self._is_sharded = data.process_shard(config, program.mesh) != data.WHOLE
        self._place = functools.partial(data.place, mesh=program.mesh, num_rows=config.batch_size)
        self._ahead: Rollout | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the next step's batch is drawn, and so taken from the stream, already."""
        return self._ahead is not None

    def draw(self, step: int, student_params: lm.Params, *, draw_next: bool = False) -> Rollout:
        """What a step trains on; `draw_next` also draws for the step after it, with old weights."""
        now = self._ahead or self._draw(step, student_params)
        self._ahead = None
        if draw_next:
            self._ahead = self._draw(step + 1, student_params)._replace(is_early=True)
        return now

    def _draw(self, step: int, student_params: lm.Params) -> Rollout:
        """Algorithm 1: a batch of (x, y), whose y the student writes where the coin says so."""
        program, seed = self._program, self._program.recipe.train.seed
        rows = next(self._stream)
        keys = gkd.step_keys(seed, step)
        shape = rows.inputs.shape[1], rows.targets.shape[1]
        if not gkd.is_on_policy(seed, step, program.method):
            scored = self._with_scores(rows)
            return Rollout(rows, self._place(scored), keys, self._steps.update_dataset[shape])
        batch = self._place(rows)
        if program.method.rl is not None and self._is_sharded:  # the reward reads all rows
            rows = multihost_utils.process_allgather(batch, tiled=True)
        began = time.monotonic()
        batch, drawn = self._steps.sample[shape](student_params, batch, keys.sampling)
        seconds = self._clock.seconds(began, drawn.weights)
        return Rollout(rows, batch, keys, self._steps.update_samples[shape], drawn, seconds)

    def _with_scores(self, rows: Batch) -> Batch:
        """The rows with the teacher's cached scores, where there is a cache.

        Where processes read parts of their own, one may lack a row that the others do not need:
        all end with an error then, and none waits for the one that has.
        """
        if self._cache is None:
            return rows
        error = None
        try:
            rows = self._cache.attach(rows)
        except ValueError as found:
            error = found
        failed = error is not None
        if self._is_sharded:
            failed = bool(np.any(multihost_utils.process_allgather(np.asarray(failed))))
        if failed:
            raise error or ValueError("the teacher cache lacks a row that another process reads")
        return rows

    def reward(self, rollout: Rollout) -> Rewards | None:
        """The reward of each sample, from texts, on the host; all processes compute the same.

        Prompt and reference are the texts of the batch's ids: what the student saw, cut as it was.
        None where the step has no samples or the method no reward.
        """
        method = self._program.method
        if method.rl is None or rollout.sample is None:
            return None
        rows, sample = rollout.rows, rollout.sample
        prompts, outputs, references = (
            [
                evaluate.to_text(self._source.vocabulary, row[: int(length)])
                for row, length in zip(np.asarray(ids), np.asarray(lengths), strict=True)
            ]
            for ids, lengths in (
                (rows.inputs, rows.input_lengths),
                (sample.tokens, np.asarray(sample.weights).sum(axis=1)),
                (rows.targets, np.asarray(rows.weights).sum(axis=1)),
            )
        )
        prompts = [text for text in prompts for _ in range(method.num_samples)]
        references = [text for text in references for _ in range(method.num_samples)]
        rewards = np.asarray(method.rl.reward(prompts, outputs, references))
        return Rewards(rewards, rl.advantages(rewards, method.num_samples))
