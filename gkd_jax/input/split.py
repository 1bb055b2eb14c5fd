"""`Split`: the examples of one split of a task, which are read in their own order."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from gkd_jax.input.data import DataConfig
from gkd_jax.tasks import features  # pyright: ignore[reportMissingImports]
from gkd_jax.tasks.features import Row  # pyright: ignore[reportMissingImports]


_ROWS_AT_ONCE = 256


class Split(NamedTuple):
    """The examples of one split of a task, or the first of them, cut to feature lengths."""

    task: Any  # a seqio task or mixture
    name: str
    lengths: Mapping[str, int]  # the largest number of tokens of each feature
    num_examples: int | None = None  # how many of the first examples are read; None is all
    use_cached: bool = False  # the task is read from seqio's cache
    seed: int | None = None  # of tasks whose examples depend on one

    @classmethod
    def of(cls, task: Any, config: DataConfig) -> "Split":
        """Returns the split of a task that a run is trained on."""
        return cls(
            task,
            config.split,
            config.feature_lengths,
            config.num_examples,
            config.use_cached,
            config.seed,
        )

    def in_order(self) -> Iterator[Row]:
        """Yields the examples once, in their own order."""
        some = self.source_rows()
        if some is None:
            examples: Any = untuned(self.dataset())
            yield from examples.as_numpy_iterator()
            return
        # seqio traces a graph for each preprocessor, and calls it for each example.
        for rows in some:
            yield from self.finish(rows)

    def dataset(self) -> tf.data.Dataset:
        """Returns seqio's dataset of the tokenized examples."""
        return self.read(shuffle=False, num_epochs=1).take(self._limit)

    def read(self, **settings: Any) -> tf.data.Dataset:
        """Returns seqio's dataset of the whole split, with more arguments of `get_dataset`."""
        return self.task.get_dataset(
            dict(self.lengths),
            split=self.name,
            use_cached=self.use_cached,
            seed=self.seed,
            try_in_mem_cache=False,
            **settings,
        )

    def source_rows(self) -> Iterator[list[Row]] | None:
        """Yields the examples of the source in lists; None if `finish` cannot make rows of them."""
        if self.use_cached or not isinstance(self.task, seqio.Task):
            return None
        if features.row_maker(self.task) is None:
            return None
        source: Any = self.task.source
        rows = source.read_rows(self.name) if isinstance(source, features.RowSource) else None
        if rows is not None:
            return _lists(itertools.islice(rows, self.num_examples))
        dataset = source.get_dataset(split=self.name, shuffle=False)
        spec: Any = dataset.element_spec
        if any(one.shape.rank != 0 for one in spec.values()):
            return None
        batches: Any = untuned(dataset.take(self._limit).batch(_ROWS_AT_ONCE))
        return map(as_rows, batches)

    def finish(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the tokenized examples of some of `source_rows`."""
        make: Any = features.row_maker(self.task)
        return make(rows, self.task.output_features, self.lengths)

    @property
    def _limit(self) -> int:
        return -1 if self.num_examples is None else self.num_examples


def untuned(dataset: tf.data.Dataset, *, num_threads: int | None = None) -> tf.data.Dataset:
    """Returns a dataset with a deterministic order, which tf.data does not tune while it is read.

    tf.data tunes its parallelism in a thread that sleeps longer and longer between its rounds, up
    to a minute, and nothing wakes it: an iterator that is closed waits until the thread has slept.
    A run of a minute ended up to a minute late. The datasets here have few stages, whose
    parallelism is set.

    Args:
        num_threads: the threads of this dataset alone; None takes those that all datasets share.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    if num_threads is not None:
        options.threading.private_threadpool_size = num_threads
    return dataset.with_options(options)


def _lists(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while some := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        yield some


def as_rows(batch: Mapping[str, tf.Tensor | tf.RaggedTensor]) -> list[Row]:
    """Returns the rows of a batch of examples, whose features are scalars or vectors."""
    columns = [_values(column) for column in batch.values()]
    return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    if not isinstance(column, tf.RaggedTensor):
        return list(column.numpy())
    values = column.values.numpy()
    return [values[a:b] for a, b in itertools.pairwise(column.row_splits.numpy().tolist())]
