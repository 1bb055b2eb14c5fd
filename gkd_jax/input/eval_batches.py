"""A split in its own order, once, in batches of one shape."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.input import fit


class EvalBatch(NamedTuple):
    """Some examples of a split; the last batch is filled up with rows that do not count."""

    batch: Batch
    examples: list[dict[str, Any]]  # one a real row, with the task's `*_pretokenized` texts


def eval_batches(
    task: Any,
    *,
    feature_lengths: Mapping[str, int],
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int | None = None,
) -> Iterator[EvalBatch]:
    """A split in its own order, once, in batches of one shape.

    The seed is for tasks whose examples depend on it: training gives them `DataConfig.seed`.
    """
    fit.warn_once(
        task, split, feature_lengths, num_examples=num_examples, use_cached=use_cached, seed=seed
    )
    dataset = task.get_dataset(
        dict(feature_lengths),
        split=split,
        use_cached=use_cached,
        shuffle=False,
        seed=seed,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    if num_examples is not None:
        dataset = dataset.take(num_examples)
    rows: list[dict[str, Any]] = []
    for example in dataset.as_numpy_iterator():
        rows.append(example)
        if len(rows) == batch_size:
            yield fill_batch(rows, feature_lengths, batch_size)
            rows = []
    if rows:
        yield fill_batch(rows, feature_lengths, batch_size)


def fill_batch(
    rows: list[dict[str, Any]], feature_lengths: Mapping[str, int], batch_size: int
) -> EvalBatch:
    """Cut and padded rows; the batch is filled up with empty ones."""
    source, target = feature_lengths["inputs"], feature_lengths["targets"]
    batch = Batch(
        np.zeros((batch_size, source), np.int32),
        np.zeros((batch_size, target), np.int32),
        np.zeros((batch_size, target), np.float32),
        # A row that fills the batch up has one token: a decoder-only model goes on from the last.
        input_lengths=np.ones(batch_size, np.int32),
    )
    assert batch.input_lengths is not None
    for index, row in enumerate(rows):
        inputs, targets = row["inputs"][:source], row["targets"][:target]
        batch.inputs[index, : len(inputs)] = inputs
        batch.input_lengths[index] = len(inputs)
        batch.targets[index, : len(targets)] = targets
        batch.weights[index, : len(targets)] = 1.0
    return EvalBatch(batch, rows)
