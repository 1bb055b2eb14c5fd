"""Reads a small data source into memory and shuffles all of its examples in every pass.

seqio shuffles within a window of about a thousand examples, so the first steps of a run would see
only the first examples. A source of up to `LARGEST` examples is therefore read into memory. The
order of the examples in a pass is a function of the seed and the number of the pass, so that a
checkpoint only needs to save one number: how many examples have been taken.
"""

from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.input.data import WHOLE, Shard
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

    def __init__(
        self,
        dataset: tf.data.Dataset,
        tokenize: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        """Reads all examples of a finite dataset.

        Args:
            dataset: the examples, whose features are scalars or vectors of any lengths.
            tokenize: makes rows of ids from the features of some of the examples. Tokenizing a
                whole source at the start of a run would take seconds, so the examples of a batch
                are tokenized, all at once, when they are taken.
        """
        batches: Any = untuned(dataset.ragged_batch(_READ_AT_ONCE))
        spec: Any = batches.element_spec
        parts = list(batches) or [{name: _no_rows(one) for name, one in spec.items()}]
        columns: dict[str, Any] = {
            name: tf.concat([part[name] for part in parts], 0) for name in spec
        }
        self._columns, self._tokenize = columns, tokenize
        self.size = next(iter(columns.values())).shape[0]

    def batches(self, seed: int, batch_size: int, shard: Shard = WHOLE) -> tf.data.Dataset:
        """Returns an endless dataset of passes over a shard, each pass in another order.

        The elements are batches of ragged rows. The order of the rows does not depend on the size
        of the batches, and a batch may end a pass and begin the next one.

        Args:
            seed: the seed of the orders.
            batch_size: the number of rows of a batch.
            shard: the part of the examples. Shard i of n has the examples i, i + n, ...
        """
        size = (self.size - shard.index + shard.num_shards - 1) // shard.num_shards

        @tf.autograph.experimental.do_not_convert  # converting takes seconds, and changes nothing
        def chosen(first: Any) -> Mapping[str, Any]:
            steps = first + tf.range(batch_size, dtype=tf.int64)
            numbers = shard.index + shard.num_shards * _order(steps, seed, size)
            columns = self._columns.items()
            return self._tokenize({name: tf.gather(column, numbers) for name, column in columns})

        # `Dataset.batch` of single steps would cost more than all that follows.
        firsts = tf.data.Dataset.counter(0, batch_size)
        return firsts.take(-1 if size > 0 else 0).map(chosen, num_parallel_calls=1)


def _no_rows(spec: Any) -> tf.Tensor:
    """Returns a batch of 0 rows of a feature."""
    return tf.zeros([0] * spec.shape.rank, spec.dtype)


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
