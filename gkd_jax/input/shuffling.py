"""Endless streams of the shuffled rows of one split.

seqio shuffles within a window of about a thousand examples, so the first steps of a run would see
only the first examples. A source of up to `LARGEST` examples is therefore read into memory and
shuffled whole. The order of the examples in a pass is a function of the seed, the shard and the
number of the pass, so that the position in the stream is one number: how many rows have been taken.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import functools
import json
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.input.data import WHOLE, Shard
from gkd_jax.input.split import Split, as_rows, untuned
from gkd_jax.tasks.features import Row  # pyright: ignore[reportMissingImports]
from gkd_jax.text import files


LARGEST = 100_000
"""Examples of the largest source that is shuffled whole; seqio's window serves larger ones."""

_READ_AT_ONCE = 1024


def shuffled(
    split: Split, names: Sequence[str], seed: int, rows_at_once: int, shard: Shard = WHOLE
) -> "InMemory | Window":
    """Returns an endless iterator over lists of `rows_at_once` shuffled rows.

    Args:
        seed: the seed of the orders in memory; a window has the seed of its split.
        shard: the part of the examples. Shard i of n has the examples i, i + n, ...
    """
    size = number_of_examples(split)
    if size is None or size > LARGEST:
        return Window(_window(split, names, shard), rows_at_once)
    some = split.source_rows()
    if some is not None:
        examples = [row for rows in some for row in rows]
        return InMemory(examples, seed, rows_at_once, shard, split.finish)
    batches: Any = untuned(split.dataset().map(_only(names)).ragged_batch(_READ_AT_ONCE))
    examples = [row for batch in batches for row in as_rows(batch)]
    return InMemory(examples, seed, rows_at_once, shard)


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


class InMemory:
    """Passes over examples in memory, each of which takes all of them in another order.

    The order of the rows does not depend on how many are taken at once, and a list of rows may end
    a pass and begin the next one. A thread makes the next list while the last one is used.
    """

    def __init__(
        self,
        examples: Sequence[Row],
        seed: int,
        rows_at_once: int,
        shard: Shard = WHOLE,
        make_rows: Callable[[list[Row]], list[Row]] = list,
    ):
        """Begins with the first pass over the part `shard` of the examples.

        Args:
            make_rows: makes rows of ids from some of the examples. Tokenizing a whole source at the
                start of a run would take seconds, so examples are tokenized when they are taken.
        """
        self._examples = examples[shard.index :: shard.num_shards]
        self._rows_at_once, self._make_rows = rows_at_once, make_rows
        order = functools.partial(_order, len(self._examples), seed, shard.index)
        self._order = functools.lru_cache(maxsize=2)(order)
        self._taken = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._ahead: concurrent.futures.Future[list[Row]] | None = None

    def __next__(self) -> list[Row]:
        if not self._examples:
            raise StopIteration
        rows = self._rows_after(self._taken) if self._ahead is None else self._ahead.result()
        self._taken += self._rows_at_once
        self._ahead = self._thread.submit(self._rows_after, self._taken)
        return rows

    def _rows_after(self, taken: int) -> list[Row]:
        chosen: list[int] = []
        while len(chosen) < self._rows_at_once:
            number, start = divmod(taken + len(chosen), len(self._examples))
            missing = self._rows_at_once - len(chosen)
            chosen.extend(self._order(number)[start : start + missing].tolist())
        return self._make_rows([self._examples[i] for i in chosen])

    def save(self, directory: files.AnyPath, name: str) -> None:
        """Writes the position to the file `<name>.json`."""
        (directory / f"{name}.json").write_text(json.dumps({"rows_taken": self._taken}))

    def restore(self, directory: files.AnyPath, name: str) -> None:
        """Sets the position to that of `save`.

        Raises:
            ValueError: if the file holds no such position.
        """
        path = directory / f"{name}.json"
        taken = files.read_json_object(path).get("rows_taken")
        if type(taken) is not int or taken < 0:
            raise ValueError(
                f"damaged position of the data: {path} has the rows_taken {taken!r}, expected an "
                "integer of at least 0"
            )
        self._taken, self._ahead = taken, None


class Window:
    """The rows of a large source, which tf.data reads, shuffles and tokenizes in threads."""

    def __init__(self, dataset: tf.data.Dataset, rows_at_once: int):
        """Opens an endless dataset of rows at its beginning."""
        batches = dataset.ragged_batch(rows_at_once, drop_remainder=True)
        self._iterator = iter(untuned(batches, num_threads=1).prefetch(2))
        self._checkpoint = tf.train.Checkpoint(iterator=self._iterator)

    def __next__(self) -> list[Row]:
        return as_rows(next(self._iterator))

    def save(self, directory: files.AnyPath, name: str) -> None:
        """Writes the position, with the rows in the window, to TensorFlow's files `<name>.*`."""
        self._checkpoint.write(str(directory / name))

    def restore(self, directory: files.AnyPath, name: str) -> None:
        """Sets the position to that of `save`."""
        self._checkpoint.read(str(directory / name)).assert_consumed()


def _order(size: int, seed: int, shard: int, number: int) -> np.ndarray:
    """Returns the indices of a shard's `size` examples in the order of one pass.

    The examples are sorted by random numbers. These are the raw numbers of a bit generator, which
    NumPy promises to keep the same in new versions, unlike those of its `permutation`.
    """
    numbers = np.random.Philox(key=[seed, number], counter=[0, 0, 0, shard])
    return np.argsort(numbers.random_raw(size), kind="stable")


def _window(split: Split, names: Sequence[str], shard: Shard) -> tf.data.Dataset:
    """Returns the endless shuffled rows of a large source.

    The first `num_examples` of a source are shuffled in a buffer of 50,000, and a whole source is
    shuffled by seqio.
    """
    if split.num_examples is not None:
        part = split.dataset().shard(shard.num_shards, shard.index)
        rows = part.shuffle(50_000, seed=split.seed, reshuffle_each_iteration=True).repeat()
    else:
        info = None if shard == WHOLE else seqio.ShardInfo(shard.index, shard.num_shards)
        rows = split.read(shuffle=True, num_epochs=None, shard_info=info)
    return rows.map(_only(names))


def _only(names: Sequence[str]) -> Callable[[Row], Row]:
    """Returns the function that leaves the features `names` of an example."""

    @tf.autograph.experimental.do_not_convert  # converting takes time, and changes nothing
    def chosen(example: Row) -> Row:
        return {name: example[name] for name in names}

    return chosen
