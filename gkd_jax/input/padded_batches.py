"""Makes batches of one shape: cuts and pads examples, and reads a whole split in its own order."""

from collections.abc import Iterator, Mapping
import itertools
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.input import fit
from gkd_jax.input.data import TEACHER_INPUTS
from gkd_jax.input.split import Split


class PaddedBatch(NamedTuple):
    """A batch of one shape, with the examples that it was made of."""

    batch: Batch  # with empty rows where there are fewer examples than rows
    examples: list[dict[str, Any]]  # of the other rows, with the texts in `*_pretokenized`


def in_order(split: Split, batch_size: int) -> Iterator[PaddedBatch]:
    """Yields the examples of a split once, in their own order, in batches of `batch_size` rows.

    Sequences that are longer than the split's lengths are cut, shorter ones padded.
    """
    fit.warn_once(split)
    examples = split.in_order()
    while rows := list(itertools.islice(examples, batch_size)):
        yield fill_batch(rows, split.lengths, batch_size)


def fill_batch(
    rows: list[dict[str, Any]], feature_lengths: Mapping[str, int], batch_size: int
) -> PaddedBatch:
    """Returns a batch of cut and padded examples, filled up with empty rows to `batch_size`.

    The lengths are {"inputs": S, "targets": T}, and perhaps "teacher_inputs": R.
    """
    inputs, input_lengths = _padded(rows, "inputs", feature_lengths, batch_size)
    targets, target_lengths = _padded(rows, "targets", feature_lengths, batch_size)
    weights = np.arange(targets.shape[1]) < target_lengths[:, None]
    # An empty row has one token, because a decoder-only model generates from the last token.
    input_lengths[len(rows) :] = 1
    batch = Batch(inputs, targets, weights.astype(np.float32), input_lengths=input_lengths)
    if TEACHER_INPUTS in feature_lengths:
        prompts, lengths = _padded(rows, TEACHER_INPUTS, feature_lengths, batch_size)
        lengths[len(rows) :] = 1
        batch = batch._replace(teacher_inputs=prompts, teacher_input_lengths=lengths)
    return PaddedBatch(batch, rows)


def _padded(
    rows: list[dict[str, Any]], name: str, feature_lengths: Mapping[str, int], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cut and padded ids of a feature, and the number of ids in each row."""
    ids = np.zeros((batch_size, feature_lengths[name]), np.int32)
    lengths = np.zeros(batch_size, np.int32)
    for index, row in enumerate(rows):
        kept = row[name][: ids.shape[1]]
        ids[index, : len(kept)] = kept
        lengths[index] = len(kept)
    return ids, lengths
