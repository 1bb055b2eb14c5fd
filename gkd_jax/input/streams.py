"""Makes training batches of token ids from the examples of seqio tasks (`named_tasks` opens them).

Row k of global batch n is the same example for any number of processes. For this, each process
makes the global batches and gives its devices their rows. If making global batches in every process
is too expensive, each process reads its own part of the examples (`DataConfig.shard_by_process`).
The position in the stream is part of every checkpoint, so that a resumed run continues with the
next batch. All examples of a source of up to `in_memory.LARGEST` examples are shuffled; a larger
source is shuffled within seqio's window.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.batch import Batch
from gkd_jax.input import fit, in_memory
from gkd_jax.input.data import TEACHER_INPUTS, WHOLE, DataConfig, Shard
from gkd_jax.tasks import features  # pyright: ignore[reportMissingImports]


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
        parts = list(task.values()) if isinstance(task, Mapping) else [task]
        datasets = [_rows(part, config, shard) for part in parts]
        dataset = datasets[0] if len(parts) == 1 else _in_blocks(datasets, config)
        dataset = _batched(dataset, config, config.batch_size // shard.num_shards)
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = 1
        self._iterator = iter(dataset.with_options(options).prefetch(2))
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

    def save(self, directory: pathlib.Path) -> None:
        """Writes the position after the last batch taken; every process must call this.

        Only the first of the processes that read the same shard writes a file.
        """
        assert self._peeked is None
        if self._writes:
            self._checkpoint.write(str(directory / self._file))

    def restore(self, directory: pathlib.Path) -> None:
        """Sets the stream to the position that `save` wrote."""
        self._peeked = None
        self._checkpoint.read(str(directory / self._file)).assert_consumed()


def _rows(task: Any, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """Returns the endless rows of one task; warns of those that do not fit the lengths."""
    fit.warn_once(
        task,
        config.split,
        config.feature_lengths,
        num_examples=config.num_examples,
        use_cached=config.use_cached,
        seed=config.seed,
    )
    counted = functools.partial(_with_weights, names=config.features())
    return _examples(task, config, shard).map(counted, num_parallel_calls=1)


def _in_blocks(datasets: Sequence[tf.data.Dataset], config: DataConfig) -> tf.data.Dataset:
    """Returns the rows of several tasks in the order of `DataConfig.block`."""
    order = np.repeat(np.arange(len(datasets)), list(config.block.values()))
    choices = tf.data.Dataset.from_tensor_slices(order.astype(np.int64)).repeat()
    return tf.data.Dataset.choose_from_datasets(list(datasets), choices)


def _examples(task: Any, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """Returns an endless shuffled dataset of a shard's tokenized examples.

    All examples of a small source are shuffled in memory. The first `num_examples` of a large
    source are shuffled in a buffer of 50,000, and a whole large source is shuffled by seqio.
    """

    def read(**settings) -> tf.data.Dataset:
        return task.get_dataset(
            dict(config.feature_lengths),
            split=config.split,
            use_cached=config.use_cached,
            seed=config.seed,
            try_in_mem_cache=False,
            **settings,
        )

    size = in_memory.number_of_examples(
        task, config.split, config.num_examples, use_cached=config.use_cached
    )
    if size is not None and size <= in_memory.LARGEST:
        if features.only_tokenizes(task) and not config.use_cached:
            return _texts_in_memory(task, config, shard)
        whole = read(shuffle=False, num_epochs=1).take(config.num_examples or -1)
        examples = in_memory.Examples(whole, config.features())
        return examples.endless(config.seed, num_shards=shard.num_shards, index=shard.index)
    if config.num_examples is not None:
        part = read(shuffle=False, num_epochs=1).take(config.num_examples)
        return (
            part.shard(shard.num_shards, shard.index)
            .shuffle(50_000, seed=config.seed, reshuffle_each_iteration=True)
            .repeat()
        )
    parts = None if shard == WHOLE else seqio.ShardInfo(shard.index, shard.num_shards)
    return read(shuffle=True, num_epochs=None, shard_info=parts)


def _texts_in_memory(task: seqio.Task, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """Returns the examples of a task that only tokenizes; texts are shuffled, then tokenized."""
    source = task.source.get_dataset(split=config.split, shuffle=False)
    texts = in_memory.Texts(source.take(config.num_examples or -1))

    def shuffled(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return texts.endless(config.seed, num_shards=shard.num_shards, index=shard.index)

    endless = seqio.FunctionDataSource(shuffled, splits=[config.split])
    return task.replace(name=f"{task.name}__shuffled", source=endless).get_dataset(
        dict(config.feature_lengths),
        split=config.split,
        shuffle=False,
        num_epochs=1,
        try_in_mem_cache=False,
    )


def _with_weights(example: Mapping[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
    """Returns an example's features with the weights of the targets and the prompts' lengths.

    This happens before padding, because ids alone do not tell padding from tokens (see `Batch`).
    """
    found = {name: tf.cast(example[name], tf.int32) for name in names}
    found["weights"] = tf.ones_like(example["targets"], tf.float32)
    for name in names:
        if name in _LENGTHS:
            found[_LENGTHS[name]] = tf.size(example[name])
    return found


def _batched(dataset: tf.data.Dataset, config: DataConfig, batch_size: int) -> tf.data.Dataset:
    """Returns padded batches; with length buckets, each batch has the shape of one bucket."""
    shapes = config.shapes()

    names = config.features()

    def padded(shape):
        rows = {name: [length] for name, length in zip(names, shape, strict=True)}
        lengths = {_LENGTHS[name]: [] for name in names if name in _LENGTHS}
        return {**rows, "weights": rows["targets"], **lengths}

    if len(shapes) == 1:
        return dataset.padded_batch(batch_size, padded(shapes[0]), drop_remainder=True)

    def bucket(example):
        sizes = tf.stack([tf.size(example[name]) for name in names])
        fits = [tf.reduce_all(sizes <= tf.constant(shape)) for shape in shapes]
        return tf.argmax(tf.cast(tf.stack(fits), tf.int32), output_type=tf.int64)

    def reduce(key, window):
        def branch(shape):
            batch = window.padded_batch(batch_size, padded(shape), drop_remainder=True)
            # All buckets must have one element type, so the static shapes leave the sizes open.
            return batch.map(_any_shape)

        # A graph cannot choose a shape by the tensor `key`. The branches of all shapes are joined
        # instead, and the filter empties every branch except that of `key`.
        def chosen(index):
            is_it = tf.data.Dataset.from_tensors(0).filter(lambda _: key == index)
            return is_it.flat_map(lambda _: branch(shapes[index]))

        return functools.reduce(lambda a, b: a.concatenate(b), map(chosen, range(len(shapes))))

    return dataset.group_by_window(key_func=bucket, reduce_func=reduce, window_size=batch_size)


def _any_shape(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Removes the sizes from the static shapes of an example's tensors."""
    return {
        name: tf.ensure_shape(value, [None] * value.shape.rank) for name, value in example.items()
    }
