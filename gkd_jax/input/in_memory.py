"""A small source, read once and shuffled whole.

seqio shuffles within a window of about a thousand examples, so that a run's first steps see the
first examples only. A source of up to `LARGEST` examples is read into memory here, and every pass
takes its examples in an order of its own, which follows from the seed and the pass. So all that a
checkpoint saves of it is one number, how many examples were taken.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf


LARGEST = 100_000
"""Examples of the largest source that is shuffled whole; seqio's window serves larger ones."""

_READ_AT_ONCE = 1024
_FEATURES = ("inputs", "targets")
# A pseudorandom permutation of 0 to its last argument. pyright sees no `experimental`.
_shuffled = tf.random.experimental.index_shuffle  # pyright: ignore[reportAttributeAccessIssue]


def number_of_examples(
    task: seqio.Task | seqio.Mixture, split: str, limit: int | None, *, use_cached: bool = False
) -> int | None:
    """How many examples a pass over a split has, at most; None where that is not known.

    Args:
        task: a mixture, whose parts are repeated at rates, has no passes: None.
        split: of the task.
        limit: only the first so many count; None is no limit.
        use_cached: whether seqio's cache is read.
    """
    if isinstance(task, seqio.Mixture):
        return limit
    if use_cached and task.supports_caching:
        size = int(task.get_cached_stats(split)["examples"])
    else:
        size = task.source.num_input_examples(split)
    if size is None:  # a table in memory knows its size
        found = int(task.source.get_dataset(split=split, shuffle=False).cardinality().numpy())
        size = found if found >= 0 else None
    return min((count for count in (size, limit) if count is not None), default=None)


class _Shuffled:
    """Examples by number, which come in an order of their own on every pass.

    Attributes:
        size: how many there are.
    """

    size: int

    def example(self, number: tf.Tensor) -> Mapping[str, tf.Tensor]:
        """The example of a number, as a scalar tensor."""
        raise NotImplementedError

    def endless(self, seed: int, *, num_shards: int = 1, index: int = 0) -> tf.data.Dataset:
        """All of a shard's examples, pass after pass, each pass in an order of its own.

        Args:
            seed: of the orders.
            num_shards: shard i has the examples i, i + num_shards, ...
            index: of the shard.
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
    """Texts of some examples as their source has them: one string a feature.

    Tokenizing all of a source takes seconds; of these, each example is tokenized when it is taken.
    """

    def __init__(self, dataset: tf.data.Dataset):
        """Reads a finite dataset of scalar features whole, in its order."""
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
    """Ids of some examples: `inputs` and `targets` of any lengths."""

    def __init__(self, dataset: tf.data.Dataset):
        """Reads a finite dataset whole, in its order."""
        ids: dict[str, list[np.ndarray]] = {name: [] for name in _FEATURES}
        lengths: dict[str, list[np.ndarray]] = {name: [] for name in _FEATURES}
        chosen = dataset.map(lambda x: {name: tf.cast(x[name], tf.int32) for name in _FEATURES})
        batches: Any = chosen.ragged_batch(_READ_AT_ONCE)
        for rows in batches:
            for name in _FEATURES:
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
            for name in _FEATURES
        }
