"""Makes training batches of token ids from the examples of seqio tasks (`named_tasks` opens them).

Row k of global batch n is the same example for any number of processes. For this, each process
makes the global batches and gives its devices their rows. If making global batches in every process
is too expensive, each process reads its own part of the examples (`DataConfig.shard_by_process`).
The position in the stream is part of every checkpoint, so that a resumed run continues with the
next batch. `shuffling` says in which order the examples come.
"""

import collections
from collections.abc import Iterator, Mapping
import json
from typing import Any

import jax
import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.input import fit, shuffling
from gkd_jax.input.data import WHOLE, DataConfig, Shard
from gkd_jax.input.padded_batches import fill_batch
from gkd_jax.input.split import Split
from gkd_jax.tasks.features import Row  # pyright: ignore[reportMissingImports]
from gkd_jax.text import files


class TrainIterator:
    """An endless stream of training batches, whose position can be saved and restored.

    Without sharding, the batches are global batches and are the same in every process. With a
    shard, the batches are this process's rows, and the position of each shard is saved.
    """

    def __init__(self, tasks: Mapping[str, Any], config: DataConfig, shard: Shard = WHOLE):
        """Opens the stream at its beginning, and warns of examples that do not fit the lengths.

        The tasks by name are those of `named_tasks.open_tasks`.
        """
        splits = [Split.of(task, config) for task in tasks.values()]
        self._config, self._shard = config, shard
        for split in splits:
            fit.warn_once(split)
        self._names, self._shapes = config.features(), config.shapes()
        self._num_rows = config.batch_size // shard.num_shards
        block = np.repeat(np.arange(len(splits)), list(config.block.values()))
        self._order = np.resize(block, self._num_rows).tolist()  # the task of each row of a batch
        self._sources = [
            shuffling.shuffled(split, self._names, config.seed, self._order.count(index), shard)
            for index, split in enumerate(splits)
        ]
        # Rows that are in no batch yet, because a batch has rows of one length bucket alone.
        self._unsorted: collections.deque[Row] = collections.deque()
        self._buckets: list[list[Row]] = [[] for _ in self._shapes]
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
        """Returns the next batch, or raises ValueError if a task has no examples."""
        if self._peeked is not None:
            peeked, self._peeked = self._peeked, None
            return peeked
        index, rows = self._next_bucket() if len(self._shapes) > 1 else (0, self._next_rows())
        lengths = dict(zip(self._names, self._shapes[index], strict=True))
        return fill_batch(rows, lengths, self._num_rows).batch

    def save(self, directory: files.AnyPath) -> None:
        """Writes the position after the last batch taken; every process must call this.

        Only the first of the processes that read the same shard writes files.
        """
        assert self._peeked is None
        if not self._writes:
            return
        for index, source in enumerate(self._sources):
            source.save(directory, f"{self._file}.{index}")
        if len(self._shapes) > 1:
            # No bucket is full, so sorting the rows of the buckets again fills none.
            waiting = [row for bucket in [*self._buckets, self._unsorted] for row in bucket]
            ids = [{name: row[name].tolist() for name in self._names} for row in waiting]
            self._waiting_file(directory).write_text(json.dumps(ids))

    def restore(self, directory: files.AnyPath) -> None:
        """Sets the stream to the position that `save` wrote."""
        self._peeked = None
        for index, source in enumerate(self._sources):
            source.restore(directory, f"{self._file}.{index}")
        if len(self._shapes) > 1:
            waiting = json.loads(self._waiting_file(directory).read_text())
            self._unsorted = collections.deque(
                {name: np.array(ids, np.int32) for name, ids in row.items()} for row in waiting
            )
            self._buckets = [[] for _ in self._shapes]

    def _waiting_file(self, directory: files.AnyPath) -> files.AnyPath:
        return directory / f"{self._file}.waiting.json"

    def _next_rows(self) -> list[Row]:
        """Takes the rows of one batch, which are ordered as `DataConfig.block` says."""
        taken = [iter(self._take(index)) for index in range(len(self._sources))]
        return [next(taken[index]) for index in self._order]

    def _take(self, index: int) -> list[Row]:
        """Takes the rows that the task of this index has in one batch."""
        rows = next(self._sources[index], None)
        if rows is None:
            shard = self._shard
            part = "" if shard == WHOLE else f" for shard {shard.index} of {shard.num_shards}"
            raise ValueError(
                f"the training task {list(self._config.task_rows)[index]!r}, split "
                f"{self._config.split!r}, has no examples{part}"
            )
        return rows

    def _next_bucket(self) -> tuple[int, list[Row]]:
        """Takes rows until those of one length bucket fill a batch; returns its index and rows."""
        while True:
            if not self._unsorted:
                self._unsorted.extend(self._next_rows())
            row = self._unsorted.popleft()
            sizes = [len(row[name]) for name in self._names]
            index = int(np.argmax(np.all(sizes <= np.array(self._shapes), axis=1)))
            self._buckets[index].append(row)
            if len(self._buckets[index]) == self._num_rows:
                full, self._buckets[index] = self._buckets[index], []
                return index, full
