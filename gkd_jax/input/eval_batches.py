"""Reads a split once, in its own order, in batches of one shape."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.input import fit
from gkd_jax.input.data import TEACHER_INPUTS
from gkd_jax.input.split import Split


class EvalBatch(NamedTuple):
    """Consecutive examples of a split.

    Attributes:
        batch: the token ids. The last batch of a split is filled up with empty rows.
        examples: the task's example for each row that is not empty, including the texts in
            `*_pretokenized`.
    """

    batch: Batch
    examples: list[dict[str, Any]]


def eval_batches(split: Split, batch_size: int) -> Iterator[EvalBatch]:
    """Yields the examples of a split once, in their own order, in batches of one shape.

    Args:
        split: the examples. Longer sequences than its lengths are cut, shorter ones padded.
        batch_size: the number of rows of every batch.
    """
    fit.warn_once(split)
    rows: list[dict[str, Any]] = []
    for example in split.in_order():
        rows.append(example)
        if len(rows) == batch_size:
            yield fill_batch(rows, split.lengths, batch_size)
            rows = []
    if rows:
        yield fill_batch(rows, split.lengths, batch_size)


def fill_batch(
    rows: list[dict[str, Any]], feature_lengths: Mapping[str, int], batch_size: int
) -> EvalBatch:
    """Returns a batch of cut and padded examples, filled up with empty rows to `batch_size`.

    Args:
        rows: examples with the token ids `inputs` and `targets`, and `teacher_inputs` where it
            has a length.
        feature_lengths: {"inputs": S, "targets": T}, and perhaps "teacher_inputs": R.
        batch_size: the number of rows of the batch.
    """
    source, target = feature_lengths["inputs"], feature_lengths["targets"]
    inputs, input_lengths = _padded([row["inputs"] for row in rows], source, batch_size)
    batch = Batch(
        inputs,
        np.zeros((batch_size, target), np.int32),
        np.zeros((batch_size, target), np.float32),
        input_lengths=input_lengths,
    )
    if TEACHER_INPUTS in feature_lengths:
        prompts, lengths = _padded(
            [row[TEACHER_INPUTS] for row in rows], feature_lengths[TEACHER_INPUTS], batch_size
        )
        batch = batch._replace(teacher_inputs=prompts, teacher_input_lengths=lengths)
    for index, row in enumerate(rows):
        targets = row["targets"][:target]
        batch.targets[index, : len(targets)] = targets
        batch.weights[index, : len(targets)] = 1.0
    return EvalBatch(batch, rows)


def _padded(prompts: Sequence[Any], limit: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts that are cut and padded to one length, and the length of each."""
    ids = np.zeros((batch_size, limit), np.int32)
    # An empty row has one token, because a decoder-only model generates from the last token.
    lengths = np.ones(batch_size, np.int32)
    for index, prompt in enumerate(prompts):
        kept = prompt[:limit]
        ids[index, : len(kept)] = kept
        lengths[index] = len(kept)
    return ids, lengths
