"""Makes training batches of token ids from the examples of seqio tasks (`named_tasks` opens them).

Row k of global batch n is the same example for any number of processes. For this, each process
makes the global batches and gives its devices their rows. If making global batches in every process
is too expensive, each process reads its own part of the examples (`DataConfig.shard_by_process`).
The position in the stream is part of every checkpoint, so that a resumed run continues with the
next batch. All examples of a source of up to `in_memory.LARGEST` examples are shuffled; a larger
source is shuffled within seqio's window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.batch import Batch
from gkd_jax.input import fit, in_memory
from gkd_jax.input.data import TEACHER_INPUTS, WHOLE, DataConfig, Shard
from gkd_jax.input.split import Split
from gkd_jax.input.untuned import untuned
from gkd_jax.text import files


_Rows = tf.RaggedTensor | tf.Tensor
_LENGTHS = {"inputs": "input_lengths", TEACHER_INPUTS: "teacher_input_lengths"}


class TrainIterator:
    """An endless stream of training batches, whose position can be saved and restored.

    Without sharding, the batches are global batches and are the same in every process. With a
    shard, the batches are this process's rows, and the position of each shard is saved.
    """

    def __init__(self, task: Any, config: DataConfig, shard: Shard = WHOLE):
        """Opens the stream at its beginning.

        Args:
            task: the task, or the tasks by name (`named_tasks.open_tasks`).
            config: the configuration of the data.
            shard: the part of the examples that this process reads.
        """
        dataset = _batches(task, config, shard)
        self._iterator = iter(untuned(dataset, num_threads=1).prefetch(2))
        self._checkpoint = tf.train.Checkpoint(iterator=self._iterator)
        self._file = "iterator"
        if shard != WHOLE:
            self._file += f"-{shard.index:05d}-of-{shard.num_shards:05d}"
        self._writes = shard.first_process == jax.process_index()
        self._peeked: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def peek(self) -> Batch:
        """Returns the batch that `next` will return, without advancing the stream."""
        if self._peeked is None:
            self._peeked = next(self)
        return self._peeked

    def __next__(self) -> Batch:
        if self._peeked is not None:
            peeked, self._peeked = self._peeked, None
            return peeked
        try:
            example = next(self._iterator)
        except StopIteration:
            raise RuntimeError("the dataset has no examples: the stream ended") from None
        return Batch(**{name: value.numpy() for name, value in example.items()})

    def save(self, directory: files.AnyPath) -> None:
        """Writes the position after the last batch taken; every process must call this.

        Only the first of the processes that read the same shard writes a file.
        """
        assert self._peeked is None
        if self._writes:
            self._checkpoint.write(str(directory / self._file))

    def restore(self, directory: files.AnyPath) -> None:
        """Sets the stream to the position that `save` wrote."""
        self._peeked = None
        self._checkpoint.read(str(directory / self._file)).assert_consumed()


def _batches(task: Any, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """Returns the endless padded batches of one task, or of the values of a mapping of tasks.

    Warns of examples that do not fit the lengths.
    """
    tasks = list(task.values()) if isinstance(task, Mapping) else [task]
    splits = [Split.of(one, config) for one in tasks]
    for split in splits:
        fit.warn_once(split)
    batch_size, shapes = config.batch_size // shard.num_shards, config.shapes()
    sources = [_in_memory(split, config.features()) for split in splits]
    if len(sources) == 1 and len(shapes) == 1 and sources[0] is not None:
        # The rows of a batch are neighbours in the source, so they are made all at once.
        return sources[0].batches(config.seed, batch_size, shard).map(_padding(config, shapes[0]))
    parts = [
        _large(split, shard)
        if source is None
        else source.batches(config.seed, in_memory.ROWS_AT_ONCE, shard).unbatch()
        for split, source in zip(splits, sources, strict=True)
    ]
    rows = parts[0] if len(parts) == 1 else _in_blocks(parts, config)
    if len(shapes) > 1:
        return _in_buckets(rows, config, batch_size)
    return _padded(rows, config, batch_size, shapes[0])


def _in_blocks(datasets: Sequence[tf.data.Dataset], config: DataConfig) -> tf.data.Dataset:
    """Returns the rows of several tasks in the order of `DataConfig.block`."""
    order = np.repeat(np.arange(len(datasets)), list(config.block.values()))
    choices = tf.data.Dataset.from_tensor_slices(order.astype(np.int64)).repeat()
    return tf.data.Dataset.choose_from_datasets(list(datasets), choices)


def _in_memory(split: Split, names: Sequence[str]) -> in_memory.Shuffled | None:
    """Returns the examples of a small source, all of which are shuffled in memory.

    The result is None if the source is large or of unknown size.

    Args:
        split: the examples.
        names: the features of an example that are read.
    """
    size = in_memory.number_of_examples(split)
    if size is None or size > in_memory.LARGEST:
        return None
    texts = split.texts()
    if texts is None:
        ids = split.dataset().map(lambda x: {name: tf.cast(x[name], tf.int32) for name in names})
        return in_memory.Shuffled(ids)

    def tokenize(some):
        rows = split.tokenize(some)
        return {name: rows[name] for name in names}

    return in_memory.Shuffled(texts, tokenize)


def _large(split: Split, shard: Shard) -> tf.data.Dataset:
    """Returns the endless shuffled rows of a large source: vectors of ids.

    The first `num_examples` of a source are shuffled in a buffer of 50,000, and a whole source is
    shuffled by seqio.
    """
    if split.num_examples is not None:
        return (
            split.dataset()
            .shard(shard.num_shards, shard.index)
            .shuffle(50_000, seed=split.seed, reshuffle_each_iteration=True)
            .repeat()
        )
    part = None if shard == WHOLE else seqio.ShardInfo(shard.index, shard.num_shards)
    return split.read(shuffle=True, num_epochs=None, shard_info=part)


def _padded(
    rows: tf.data.Dataset, config: DataConfig, batch_size: int, shape: Sequence[Any]
) -> tf.data.Dataset:
    """Returns the padded batches of a dataset of rows; see `_padding`."""
    chosen = rows.map(lambda row: {name: row[name] for name in config.features()})
    batches = chosen.ragged_batch(batch_size, drop_remainder=True)
    return batches.map(_padding(config, shape))


def _padding(
    config: DataConfig, shape: Sequence[Any]
) -> Callable[[Mapping[str, _Rows]], dict[str, tf.Tensor]]:
    """Returns the function that makes a `Batch`'s arrays from ragged rows.

    Weights and lengths are made before padding, because ids alone do not tell padding from tokens.

    Args:
        config: the configuration of the data.
        shape: the length of each feature, an integer or a scalar tensor.
    """

    @tf.autograph.experimental.do_not_convert
    def pad(rows: Mapping[str, _Rows]) -> dict[str, tf.Tensor]:
        found: dict[str, tf.Tensor] = {}
        for name, length in zip(config.features(), shape, strict=True):
            ids = in_memory.ragged(rows[name])
            sizes = ids.row_lengths()
            found[name] = tf.cast(ids.to_tensor(shape=tf.stack([-1, length])), tf.int32)
            if name in _LENGTHS:
                found[_LENGTHS[name]] = tf.cast(sizes, tf.int32)
            else:
                found["weights"] = tf.sequence_mask(sizes, length, tf.float32)
        return found

    return pad


def _in_buckets(dataset: tf.data.Dataset, config: DataConfig, batch_size: int) -> tf.data.Dataset:
    """Returns padded batches of rows, each with the shape of one length bucket."""
    shapes = tf.constant(config.shapes())

    def bucket(row):
        sizes = tf.stack([tf.size(row[name]) for name in config.features()])
        fits = tf.reduce_all(sizes <= shapes, axis=1)
        return tf.argmax(tf.cast(fits, tf.int32), output_type=tf.int64)

    def batch(index, rows):
        return _padded(rows, config, batch_size, tf.unstack(shapes[index]))

    return dataset.group_by_window(key_func=bucket, reduce_func=batch, window_size=batch_size)
