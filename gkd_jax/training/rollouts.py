"""`Rollouts`: draws the batch that each step trains on.

Its targets are those of the data set or sequences that the student has just sampled, as the coin of
Algorithm 1 decides.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import functools
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float
import numpy as np

from gkd_jax import gkd, rl
from gkd_jax.batch import Batch
from gkd_jax.input import data, streams
from gkd_jax.input.data import Shape
from gkd_jax.input.teacher_cache import TeacherCache
from gkd_jax.models import lm
from gkd_jax.sampling import Sample
from gkd_jax.storage import processes
from gkd_jax.text import vocabularies
from gkd_jax.training.program import Program, StepParts
from gkd_jax.training.source import Source
from gkd_jax.training.throughput import DeviceClock


class Rollout(NamedTuple):
    """The batch of one step, with everything that its update needs."""

    rows: Batch  # of the data set, on the host
    batch: Batch  # on the devices, with the data set's targets or the student's
    keys: gkd.StepKeys
    update: Callable[..., tuple[gkd.TrainState, dict[str, jax.Array]]]  # compiled for such a batch
    began: float  # when the step began to read its batch, by `time.monotonic`
    sample: Sample | None = None  # None if the targets are the data set's
    sample_seconds: concurrent.futures.Future[float] | None = None  # of the device
    is_early: bool = False  # drawn before the update of the previous step
    rewards: Float[np.ndarray, " N"] | None = None  # on the host; None without samples or a reward
    advantages: Float[Array, " N"] | None = None  # `rl.advantages`, on the devices


class Rollouts:
    """Draws the batches of a run, one after the other.

    It holds the training stream, the teacher's stored scores, and samples that were drawn ahead.
    """

    def __init__(
        self,
        program: Program,
        source: Source,
        steps: Mapping[Shape, StepParts],
        stream: streams.TrainIterator,
        clock: DeviceClock,
    ):
        """Prepares to draw batches; reads none yet. The stream stands at the first step to come."""
        self._program, self._source, self._steps = program, source, steps
        self._stream, self._clock = stream, clock
        config = program.recipe.data
        self._cache = TeacherCache(config.teacher_cache) if config.teacher_cache else None
        self._is_sharded = data.process_shard(config, program.mesh) != data.WHOLE
        self._place = functools.partial(data.place, mesh=program.mesh, num_rows=config.batch_size)
        self._ahead: Rollout | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the batch of the next step has already been taken from the stream."""
        return self._ahead is not None

    def draw(self, step: int, student_params: lm.Params, *, draw_next: bool) -> Rollout:
        """Returns the batch that a step trains on, with the rewards of its samples.

        Args:
            draw_next: also draw the batch of the next step now, with these parameters.
        """
        now = self._ahead or self._draw(step, student_params)
        self._ahead = None
        if draw_next:
            self._ahead = self._draw(step + 1, student_params)._replace(is_early=True)
        # The reward waits for the samples of this step, so those of the next are dispatched first.
        return self._with_rewards(now)

    def _draw(self, step: int, student_params: lm.Params) -> Rollout:
        """Draws a batch (x, y) of Algorithm 1; on an on-policy step the student samples y.

        Raises:
            ValueError: if a model does not know a token of the batch (`data.check_ids`).
        """
        program, seed = self._program, self._program.recipe.train.seed
        began = time.monotonic()
        rows = next(self._stream)
        data.check_ids(rows, program.models.num_pieces)
        keys = gkd.step_keys(seed, step)
        steps = self._steps[data.shape_of(rows)]
        if not gkd.is_on_policy(seed, step, program.method):
            scored = self._place(self._with_scores(rows))
            return Rollout(rows, scored, keys, steps.update_dataset, began)
        rows = data.with_target_length(rows, program.recipe.data.feature_lengths["targets"])
        batch = self._place(rows)
        if program.method.rl is not None and self._is_sharded:
            # Each process read only its own rows, and the reward needs the rows of all processes.
            rows = multihost_utils.process_allgather(batch, tiled=True)
        dispatched = time.monotonic()
        batch, drawn = steps.sample(student_params, batch, keys.sampling)
        seconds = self._clock.seconds(dispatched, drawn.weights)
        return Rollout(rows, batch, keys, steps.update_samples, began, drawn, seconds)

    def _with_scores(self, rows: Batch) -> Batch:
        """Returns the rows with the teacher's stored scores, or unchanged without a cache.

        Raises:
            ValueError: if the cache lacks one of the rows. If the processes read different rows,
                every process raises, so that none waits for a process that has ended.
        """
        if self._cache is None:
            return rows
        if not self._is_sharded:
            return self._cache.attach(rows)
        elsewhere = ValueError("the teacher cache lacks a row that another process reads")
        return processes.call_together(functools.partial(self._cache.attach, rows), elsewhere)

    def _with_rewards(self, rollout: Rollout) -> Rollout:
        """Returns a rollout with the rewards of its samples, if it has any and the run a reward.

        The reward function gets texts and runs on the host; every process computes the same
        rewards. Prompts and references are decoded from the ids of the batch, so that a text that
        was cut for the student is cut for the reward, too.
        """
        method = self._program.method
        if method.rl is None or rollout.sample is None:
            return rollout

        def texts(decode: Callable[..., str], ids: Any, lengths: Any) -> list[str]:
            pairs = zip(np.asarray(ids), np.asarray(lengths), strict=True)
            return [decode(self._source.vocabulary, row[: int(n)].tolist()) for row, n in pairs]

        rows, sample = rollout.rows, rollout.sample
        prompts = texts(vocabularies.decode_prompt, rows.inputs, rows.input_lengths)
        outputs = texts(vocabularies.decode, sample.tokens, np.asarray(sample.weights).sum(axis=1))
        references = texts(vocabularies.decode, rows.targets, np.asarray(rows.weights).sum(axis=1))
        prompts = [text for text in prompts for _ in range(method.num_samples)]
        references = [text for text in references for _ in range(method.num_samples)]
        rewards = rl.rewards_of(method.rl.reward, prompts, outputs, references)
        advantages = rl.advantages(rewards, method.num_samples)
        placed = data.place(advantages, self._program.mesh)
        return rollout._replace(rewards=rewards, advantages=placed)
