"""Reads a small data source into memory and shuffles all of its examples in every pass.

seqio shuffles within a window of about a thousand examples, so the first steps of a run would see
only the first examples. A source of up to `LARGEST` examples is therefore read into memory. The
order of the examples in a pass is a function of the seed and the number of the pass, so that a
checkpoint only needs to save one number: how many examples have been taken.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.input.split import Split
from gkd_jax.input.untuned import untuned


LARGEST = 100_000
"""Examples of the largest source that is shuffled whole; seqio's window serves larger ones."""

ROWS_AT_ONCE = 64
"""Rows that are tokenized at once where batches are not made of neighbouring rows."""

_READ_AT_ONCE = 1024
_Ragged: Any = tf.RaggedTensor  # pyright does not see its class methods
_KEY = 498247692  # the first part of the keys that `tf.random.experimental.index_shuffle` makes


def number_of_examples(split: Split) -> int | None:
    """Returns the largest number of examples that a pass over a split has; None if unknown.

    A mixture repeats its tasks at rates and has no passes; the result for a mixture is the split's
    own limit.
    """
    task, limit = split.task, split.num_examples
    if isinstance(task, seqio.Mixture):
        return limit
    if split.use_cached and task.supports_caching:
        size = int(task.get_cached_stats(split.name)["examples"])
    else:
        size = task.source.num_input_examples(split.name)
    if size is None:  # The dataset of a table in memory knows its size.
        dataset = task.source.get_dataset(split=split.name, shuffle=False)
        found = int(dataset.cardinality().numpy())
        size = found if found >= 0 else None
    return min((count for count in (size, limit) if count is not None), default=None)


def ragged(rows: tf.Tensor | tf.RaggedTensor) -> tf.RaggedTensor:
    """Returns a batch of `ragged_batch`, which is dense if all rows have one known length."""
    return rows if isinstance(rows, tf.RaggedTensor) else _Ragged.from_tensor(rows)


class Shuffled:
    """Examples in memory, which every pass takes in another order.

    Attributes:
        size: the number of examples.
    """

    size: int

    def rows(self, numbers: tf.Tensor) -> Mapping[str, tf.RaggedTensor]:
        """Returns the tokenized examples at a vector of indices."""
        raise NotImplementedError

    def batches(
        self, seed: int, batch_size: int, *, num_shards: int = 1, index: int = 0
    ) -> tf.data.Dataset:
        """Returns an endless dataset of passes over a shard, each pass in another order.

        The elements are batches of ragged rows. The order of the rows does not depend on the size
        of the batches, and a batch may end a pass and begin the next one.

        Args:
            seed: the seed of the orders.
            batch_size: the number of rows of a batch.
            num_shards: the number of shards. Shard i has the examples i, i + num_shards, ...
            index: the index of the shard.
        """
        size = (self.size - index + num_shards - 1) // num_shards

        @tf.autograph.experimental.do_not_convert  # converting takes seconds, and changes nothing
        def chosen(first: Any) -> Mapping[str, tf.RaggedTensor]:
            steps = first + tf.range(batch_size, dtype=tf.int64)
            return self.rows(index + num_shards * _order(steps, seed, size))

        # `Dataset.batch` of single steps would cost more than all that follows.
        firsts = tf.data.Dataset.counter(0, batch_size)
        return firsts.take(-1 if size > 0 else 0).map(chosen, num_parallel_calls=1)


def _order(steps: Any, seed: int, size: int) -> tf.Tensor:
    """Returns the index of the example that each step takes; every `size` steps are a pass."""
    passes = steps // size
    # `tf.random.experimental.index_shuffle` rejects the matrix of keys that its documentation
    # describes (in TensorFlow 2.21), so the operation behind it is called.
    keys = tf.stack([tf.fill(tf.shape(steps), tf.constant(x, steps.dtype)) for x in (_KEY, seed)])
    return tf.raw_ops.RandomIndexShuffle(
        index=steps % size,
        seed=tf.transpose(tf.concat([keys, passes[None]], 0)),
        max_index=tf.constant(max(size - 1, 0), steps.dtype),
        rounds=4,
    )


class Texts(Shuffled):
    """Examples of a source before tokenization, with one scalar (a string) per feature.

    Tokenizing a whole source at the start of a run takes seconds. The examples of a batch are
    tokenized, all at once, when they are taken.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        tokenize: Callable[[Mapping[str, tf.Tensor]], Mapping[str, tf.RaggedTensor]],
    ):
        """Reads all examples of a finite dataset, whose features are scalars.

        Args:
            dataset: the examples.
            tokenize: makes rows of ids from features that are vectors of texts.
        """
        batches: Any = untuned(dataset.batch(_READ_AT_ONCE))
        rows = list(batches)
        spec: Any = dataset.element_spec
        names: list[str] = list(spec)
        self._columns: dict[str, tf.Tensor] = {
            name: tf.concat([row[name] for row in rows], 0) for name in names
        }
        self._tokenize = tokenize
        self.size = int(tf.size(self._columns[names[0]])) if rows else 0

    def rows(self, numbers: tf.Tensor) -> Mapping[str, tf.RaggedTensor]:
        texts = {name: tf.gather(column, numbers) for name, column in self._columns.items()}
        return self._tokenize(texts)


class Examples(Shuffled):
    """Tokenized examples, whose features have any lengths."""

    def __init__(self, dataset: tf.data.Dataset, features: Sequence[str] = ("inputs", "targets")):
        """Reads all examples of a finite dataset; of each, the named features."""
        ids: dict[str, list[np.ndarray]] = {name: [] for name in features}
        lengths: dict[str, list[np.ndarray]] = {name: [] for name in features}
        chosen = dataset.map(lambda x: {name: tf.cast(x[name], tf.int32) for name in features})
        batches: Any = untuned(chosen.ragged_batch(_READ_AT_ONCE))
        for rows in batches:
            for name in features:
                ids[name].append(ragged(rows[name]).flat_values.numpy())
                lengths[name].append(ragged(rows[name]).row_lengths().numpy())
        self.size = sum(map(len, lengths["inputs"]))
        self._rows = {
            name: _Ragged.from_row_lengths(
                tf.constant(np.concatenate(ids[name] or [[]]), tf.int32),
                tf.constant(np.concatenate(lengths[name] or [[]]), tf.int64),
            )
            for name in features
        }

    def rows(self, numbers: tf.Tensor) -> Mapping[str, tf.RaggedTensor]:
        return {name: tf.gather(rows, numbers) for name, rows in self._rows.items()}
