"""Reads a small data source into memory and shuffles all of its examples in every pass.

seqio shuffles within a window of about a thousand examples, so the first steps of a run would see
only the first examples. A source of up to `LARGEST` examples is therefore read into memory. The
order of the examples in a pass is a function of the seed and the number of the pass, so that a
checkpoint only needs to save one number: how many examples have been taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf


LARGEST = 100_000
"""Examples of the largest source that is shuffled whole; seqio's window serves larger ones."""

_READ_AT_ONCE = 1024
# `_shuffled(index, seed, max_index)` is the place of `index` in a pseudorandom permutation of 0 to
# `max_index`. pyright does not see `tf.random.experimental`.
_shuffled = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]


def number_of_examples(
    task: seqio.Task | seqio.Mixture, split: str, limit: int | None, *, use_cached: bool = False
) -> int | None:
    """Returns the largest number of examples that a pass over a split has; None if unknown.

    Args:
        task: a task or a mixture. A mixture repeats its tasks at rates and has no passes; the
            result for a mixture is `limit`.
        split: the split of the task.
        limit: how many of the first examples are used; None means all.
        use_cached: whether the task is read from seqio's cache.
    """
    if isinstance(task, seqio.Mixture):
        return limit
    if use_cached and task.supports_caching:
        size = int(task.get_cached_stats(split)["examples"])
    else:
        size = task.source.num_input_examples(split)
    if size is None:  # The dataset of a table in memory knows its size.
        found = int(task.source.get_dataset(split=split, shuffle=False).cardinality().numpy())
        size = found if found >= 0 else None
    return min((count for count in (size, limit) if count is not None), default=None)


class _Shuffled:
    """Examples in memory, which every pass takes in another order.

    Attributes:
        size: the number of examples.
    """

    size: int

    def example(self, number: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """Returns the example at an index, which is a scalar tensor."""
        raise NotImplementedError

    def endless(self, seed: int, *, num_shards: int = 1, index: int = 0) -> tf.data.Dataset:
        """Returns an endless dataset of passes over a shard, each pass in another order.

        Args:
            seed: the seed of the orders.
            num_shards: the number of shards. Shard i has the examples i, i + num_shards, ...
            index: the index of the shard.
        """
        size = (self.size - index + num_shards - 1) // num_shards
        if size < 1:
            return tf.data.Dataset.range(0).map(self.example)

        def chosen(step: Any) -> Mapping[str, tf.Tensor]:
            key = tf.stack([seed, step // size])
            number = _shuffled(step % size, key, size - 1)
            return self.example(index + num_shards * number)

        return tf.data.Dataset.counter().map(chosen, num_parallel_calls=1)


class Texts(_Shuffled):
    """Examples of a source before tokenization, with one scalar (a string) per feature.

    Tokenizing a whole source at the start of a run takes seconds. These examples are tokenized one
    by one when they are taken.
    """

    def __init__(self, dataset: tf.data.Dataset):
        """Reads all examples of a finite dataset, whose features are scalars."""
        batches: Any = dataset.batch(_READ_AT_ONCE)
        rows = list(batches)
        spec: Any = dataset.element_spec
        names: list[str] = list(spec)
        self._columns: dict[str, tf.Tensor] = {
            name: tf.concat([row[name] for row in rows], 0) for name in names
        }
        self.size = int(tf.size(self._columns[names[0]])) if rows else 0

    def example(self, number: tf.Tensor) -> Mapping[str, tf.Tensor]:
        return {name: column[number] for name, column in self._columns.items()}


class Examples(_Shuffled):
    """Tokenized examples, whose features have any lengths."""

    def __init__(self, dataset: tf.data.Dataset, features: Sequence[str] = ("inputs", "targets")):
        """Reads all examples of a finite dataset; of each, the named features."""
        ids: dict[str, list[np.ndarray]] = {name: [] for name in features}
        lengths: dict[str, list[np.ndarray]] = {name: [] for name in features}
        chosen = dataset.map(lambda x: {name: tf.cast(x[name], tf.int32) for name in features})
        batches: Any = chosen.ragged_batch(_READ_AT_ONCE)
        for rows in batches:
            for name in features:
                ids[name].append(rows[name].flat_values.numpy())
                lengths[name].append(rows[name].row_lengths().numpy())
        self.size = sum(map(len, lengths["inputs"]))
        self._ids = {
            name: tf.constant(np.concatenate(x or [[]]), tf.int32) for name, x in ids.items()
        }
        self._ends = {
            name: tf.constant(np.cumsum(np.concatenate([[0], *x])), tf.int64)
            for name, x in lengths.items()
        }

    def example(self, number: tf.Tensor) -> Mapping[str, tf.Tensor]:
        return {
            name: self._ids[name][self._ends[name][number] : self._ends[name][number + 1]]
            for name in self._ids
        }
