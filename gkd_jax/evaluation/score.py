"""`gkd-jax score`: stores a teacher's top-k probabilities at every target position of a split.

A run can then distil on the data set's targets without the teacher (`input.teacher_cache`).
"""

from collections.abc import Callable, Iterator
import json
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from gkd_jax import divergences, gkd, sharding
from gkd_jax.batch import Batch, TopK
from gkd_jax.evaluation import made_by
from gkd_jax.evaluation.opened import open_model_and_task
from gkd_jax.input import named_tasks, padded_batches, teacher_cache
from gkd_jax.input.data import DataConfig, check_ids, place
from gkd_jax.input.split import Split
from gkd_jax.models import lm
from gkd_jax.storage import processes
from gkd_jax.storage.pretrained import ModelConfig, place_params, warn_of_long_texts
from gkd_jax.text import files


def run(
    *,
    model: ModelConfig,
    data: DataConfig,
    output: str,
    k: int = 64,
    temperature: float = 1.0,
    mesh: sharding.MeshConfig = sharding.MeshConfig(),
    dry_run: bool = False,
) -> None:
    """Writes the teacher cache of a task's split; the same call continues a run that was stopped.

    Args:
        data: the task, split, lengths, `num_examples` and seed of the training run.
        output: the folder of the cache, on a local disk.
        k: the number of most probable ids to keep at each position, at most the vocabulary's.
        temperature: divides the teacher's logits; the training run's `teacher_temperature` must be
            the same.
        dry_run: check everything, but score nothing.

    Raises:
        ValueError: if k or the temperature is not positive, if the task is a mixture, if the folder
            is remote, or if it holds the scores of another teacher or of other data.
    """
    _check(k, temperature, output)
    opened = open_model_and_task(model, data, dry_run=dry_run)
    model, data, task = opened.model, opened.data, opened.task
    opened.check_split(data.split)
    named_tasks.check_teacher_inputs(str(data.task), task, data)
    config, num_pieces = opened.config_and_num_pieces()
    prompt, target, *own = data.shapes()[-1]
    warn_of_long_texts(config, "teacher", own[0] if own else prompt, target)
    device_mesh = sharding.make_mesh(model.mesh or mesh)
    sharding.check_batch_size(data.batch_size, device_mesh)
    k = min(k, num_pieces)
    about, unread = opened.describe(data.split)
    about |= {"num_examples": data.num_examples, "seed": data.seed}
    about |= {"num_pieces": num_pieces, "temperature": temperature, "k": k}
    if "content" in unread or "vocabulary_content" in unread:  # which decide these numbers
        unread += ["num_pieces", "k"]
    processes.on_first_process(made_by.check_scores, output, about, unread)
    if dry_run:
        return

    def score(params, batch):
        with sharding.use(device_mesh):
            logits = gkd.of_pieces(lm.logits(config, params, batch.as_teacher_reads()), num_pieces)
            return divergences.top_k(logits / temperature, k)

    jitted = jax.jit(score, out_shardings=sharding.replicated(device_mesh))
    params = place_params(model, config, device_mesh)
    batches = padded_batches.in_order(Split.of(task, data), data.batch_size)

    def scored(batch: Batch) -> TopK:
        check_ids(batch, num_pieces)
        return jitted(params, place(batch, device_mesh))

    _write(output, about, batches, scored)


def _check(k: int, temperature: float, output: str) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    files.check_can_be_folder(output, "OUTPUT")


def _write(
    output: str,
    about: dict[str, Any],
    batches: Iterator[padded_batches.PaddedBatch],
    score: Callable[[Batch], TopK],
) -> None:
    """Scores the batches that the cache does not hold yet; only the first process writes."""
    writer = teacher_cache.Writer(output, about) if jax.process_index() == 0 else None
    skipped = writer.num_rows if writer else 0
    skipped = int(multihost_utils.broadcast_one_to_all(np.asarray(skipped)))
    for index, (batch, examples) in enumerate(batches):
        if index * about["batch_size"] >= skipped:
            found = jax.device_get(score(batch))
            if writer:
                writer.append(batch, found, len(examples))
    if writer:
        mass = writer.finish()
        print(f"wrote {output}", file=sys.stderr)
        print(json.dumps({"num_rows": writer.num_rows, "k": about["k"], "mean_tail_mass": mass}))
