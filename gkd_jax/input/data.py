"""From a seqio task to batches of token ids.

The training stream belongs to the job: row k of global batch n is the same example for any number
of processes. Each process makes the whole (cheap) stream and hands its devices their rows; where
that is not cheap, `DataConfig.shard_by_process` lets each read its own part of the examples. The
stream's position is part of every checkpoint, so that a resumed run sees the next batch. A source
of up to `in_memory.LARGEST` examples is shuffled whole, a larger one within seqio's window.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import functools
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np
import seqio
import tensorflow as tf

from gkd_jax import (
    sharding,
    tasks,  # pyright: ignore[reportAttributeAccessIssue]
)
from gkd_jax.batch import Batch
from gkd_jax.input import fit, in_memory
from gkd_jax.tasks import folder, jsonl  # pyright: ignore[reportMissingImports]
from gkd_jax.text import vocabularies


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on.

    Attributes:
        task: name of a seqio task or mixture, or the path of a JSONL file (`gkd_jax.tasks.jsonl`).
        feature_lengths: {"inputs": S, "targets": T}: longer sequences are cut, shorter ones padded.
        batch_size: rows of the global batch.
        seed: of the order of examples.
        data_dir: where tasks made from a folder of files find it.
        vocabulary: "bytes", "arithmetic", or a SentencePiece file; None keeps the task's own.
        extra_ids: sentinel ids added to a SentencePiece file's pieces (T5: 100).
        split: of the task.
        num_examples: train on the first so many only (data fractions); None is all.
        use_cached: read the task from seqio's cache.
        length_buckets: batches are made of examples of similar length and padded to the smallest of
            these lengths that holds them, then to `feature_lengths`; () pads all alike.
        teacher_cache: folder of the teacher's scores of the targets, made by `gkd-jax score`; steps
            on them need no teacher then.
        shard_by_process: each process reads its own part of the examples (a share of the source's
            files where there are enough, else of its examples) and makes its own rows of every
            batch. Batches then depend on the number of processes, which a resumed run must keep.
    """

    task: str
    feature_lengths: Mapping[str, int]
    batch_size: int
    seed: int = 0
    data_dir: str | None = None
    vocabulary: str | None = None
    extra_ids: int = 0
    split: str = "train"
    num_examples: int | None = None
    use_cached: bool = False
    length_buckets: tuple[int, ...] = ()
    teacher_cache: str | None = None
    shard_by_process: bool = False

    def __post_init__(self):
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"task must be the name of a seqio task, got {self.task!r}")
        if not isinstance(self.feature_lengths, Mapping) or set(self.feature_lengths) != {
            "inputs",
            "targets",
        }:
            raise ValueError(
                "feature_lengths must be {'inputs': ..., 'targets': ...}, "
                f"got {self.feature_lengths!r}"
            )
        for name, length in self.feature_lengths.items():
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"feature_lengths[{name!r}] must be positive, got {length!r}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"num_examples must be positive or None, got {self.num_examples}")
        if tuple(sorted(set(self.length_buckets))) != tuple(self.length_buckets):
            raise ValueError(f"length_buckets must increase, got {self.length_buckets}")
        if self.shard_by_process and self.length_buckets:
            raise ValueError(
                "shard_by_process needs batches of one shape, lest processes take different ones: "
                f"length_buckets must be (), got {self.length_buckets}"
            )

    def shapes(self) -> list[tuple[int, int]]:
        """The (S, T) that batches can have, largest last."""
        limits = self.feature_lengths["inputs"], self.feature_lengths["targets"]
        buckets = [
            (min(length, limits[0]), min(length, limits[1])) for length in self.length_buckets
        ]
        return list(dict.fromkeys([*buckets, limits]))


def find_task(name: str, vocabulary: seqio.Vocabulary | None) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture, with another vocabulary where one is given.

    Raises:
        ValueError: naming the tasks there are, or what the task lacks.
    """
    tasks.register()
    known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=12, cutoff=0.0)
        raise ValueError(
            f"unknown task or mixture {name!r}, expected one of the {len(known)} registered, "
            f"closest first: {', '.join(close)}"
        )
    task = seqio.get_mixture_or_task(name)
    missing = {"inputs", "targets"} - set(task.output_features)
    if missing:
        raise ValueError(f"task {name!r} has no feature {sorted(missing)}: it needs both")
    if vocabulary is None:
        return task
    if isinstance(task, seqio.Mixture):
        raise ValueError(
            f"{name!r} is a mixture, whose vocabulary is that of its tasks: leave VOCABULARY None"
        )
    features = {
        key: dataclasses.replace(feature, vocabulary=vocabulary)
        for key, feature in task.output_features.items()
    }
    # A copy of the task, not of its registration: preprocessors read the features they are given.
    return task.replace(
        name=f"{name}__{vocabularies.content_hash(vocabulary)[:12]}", output_features=features
    )


def open_task(config: DataConfig, *, check_remote: bool = True) -> tuple[Any, seqio.Vocabulary]:
    """The task with its vocabulary, both features sharing one; a dry run checks no remote file."""
    folder.set_data_dir(config.data_dir)
    vocabulary = None
    if config.vocabulary is not None:
        vocabulary = vocabularies.load(
            config.vocabulary, extra_ids=config.extra_ids, check_remote=check_remote
        )
    name = (
        jsonl.jsonl_task(config.task).name
        if config.task.endswith((".jsonl", ".jsonl.gz"))
        else config.task
    )
    task = find_task(name, vocabulary)
    vocabularies.check_readable(
        task.output_features["targets"].vocabulary, check_remote=check_remote
    )
    return task, task.output_features["targets"].vocabulary


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Raises ValueError, naming the splits there are, unless the task has this one.

    A TFDS data set that is not prepared names no splits: reading it will say what is missing.
    """
    try:
        known = list(task.splits or ())
    except ValueError:  # seqio's word for none
        return
    if known and split.split("[")[0] not in known:
        raise ValueError(f"task {task.name!r} has no split {split!r}, expected one of {known}")


class Shard(NamedTuple):
    """The part of a stream's examples that a process reads."""

    index: int = 0
    num_shards: int = 1
    first_process: int = 0  # of those that read it


WHOLE = Shard()


def process_shard(config: DataConfig, mesh: Mesh, rules: sharding.Rules = sharding.RULES) -> Shard:
    """The part of the examples that this process reads; processes with the same rows read the same.

    Raises:
        ValueError: if two processes share some of their rows and not all, or have not as many; if
            there are more shards than examples.
    """
    if not config.shard_by_process:
        return WHOLE
    starts: dict[int, set[int]] = {}
    where = sharding.batch_sharding(mesh, rules).devices_indices_map((config.batch_size,))
    for device, (rows,) in where.items():
        starts.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(mine)) for mine in starts.values()})
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) != sum(map(len, parts)):
        raise ValueError(
            "shard_by_process needs processes with as many rows of a batch each, all the same or "
            f"all different, got a mesh of {dict(mesh.shape)} whose processes start at {parts}"
        )
    if config.num_examples is not None and config.num_examples < len(parts):
        raise ValueError(
            f"shard_by_process needs an example for each of {len(parts)} shards, "
            f"got num_examples={config.num_examples}"
        )
    mine = tuple(sorted(starts[jax.process_index()]))
    readers = [process for process, rows in starts.items() if tuple(sorted(rows)) == mine]
    return Shard(parts.index(mine), len(parts), min(readers))


class TrainIterator:
    """An endless stream of batches, whose position can be saved and restored.

    Of the whole stream batches are global ones, the same on every process; of a shard they are this
    process' rows, and each shard's position is saved.
    """

    def __init__(self, task: Any, config: DataConfig, shard: Shard = WHOLE):
        fit.warn_once(
            task,
            config.split,
            config.feature_lengths,
            num_examples=config.num_examples,
            use_cached=config.use_cached,
            seed=config.seed,
        )
        dataset = _examples(task, config, shard)
        dataset = dataset.map(_with_weights, num_parallel_calls=1)
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
        """The batch that `next` will return; the stream stays before it."""
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
        return Batch(*(example[name].numpy() for name in ("inputs", "targets", "weights")))

    def save(self, directory: pathlib.Path) -> None:
        """Writes the position after the last batch taken: every process calls it."""
        assert self._peeked is None
        if self._writes:
            self._checkpoint.write(str(directory / self._file))

    def restore(self, directory: pathlib.Path) -> None:
        """Goes on where `save` was called."""
        self._peeked = None
        self._checkpoint.read(str(directory / self._file)).assert_consumed()


def _examples(task: Any, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """A shard's examples without end: small sources shuffled whole, others as seqio does."""

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
        whole = read(shuffle=False, num_epochs=1).take(config.num_examples or -1)
        examples = in_memory.Examples(whole)
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


def _with_weights(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Weights mark real target tokens before any padding: ids cannot tell (see `Batch`)."""
    return {
        "inputs": tf.cast(example["inputs"], tf.int32),
        "targets": tf.cast(example["targets"], tf.int32),
        "weights": tf.ones_like(example["targets"], tf.float32),
    }


def _batched(dataset: tf.data.Dataset, config: DataConfig, batch_size: int) -> tf.data.Dataset:
    shapes = config.shapes()

    def padded(shape):
        return {"inputs": [shape[0]], "targets": [shape[1]], "weights": [shape[1]]}

    if len(shapes) == 1:
        return dataset.padded_batch(batch_size, padded(shapes[0]), drop_remainder=True)

    def bucket(example):
        fits = [
            (tf.size(example["inputs"]) <= source) & (tf.size(example["targets"]) <= target)
            for source, target in shapes
        ]
        return tf.argmax(tf.cast(tf.stack(fits), tf.int32), output_type=tf.int64)

    def reduce(key, window):
        def branch(shape):
            batch = window.padded_batch(batch_size, padded(shape), drop_remainder=True)
            # One element type for all buckets: the sizes differ, so they are left open here.
            return batch.map(_any_shape)

        def chosen(index):
            is_it = tf.data.Dataset.from_tensors(0).filter(lambda _: key == index)
            return is_it.flat_map(lambda _: branch(shapes[index]))

        return functools.reduce(lambda a, b: a.concatenate(b), map(chosen, range(len(shapes))))

    return dataset.group_by_window(key_func=bucket, reduce_func=reduce, window_size=batch_size)


def _any_shape(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: tf.ensure_shape(value, [None, None]) for name, value in example.items()}


class EvalBatch(NamedTuple):
    """Some examples of a split; the last batch is filled up with rows that do not count."""

    batch: Batch
    examples: list[dict[str, Any]]  # one a real row, with the task's `*_pretokenized` texts


def eval_batches(
    task: Any,
    *,
    feature_lengths: Mapping[str, int],
    split: str,
    batch_size: int,
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int | None = None,
) -> Iterator[EvalBatch]:
    """A split in its own order, once, in batches of one shape.

    The seed is for tasks whose examples depend on it: training gives them `DataConfig.seed`.
    """
    fit.warn_once(
        task, split, feature_lengths, num_examples=num_examples, use_cached=use_cached, seed=seed
    )
    dataset = task.get_dataset(
        dict(feature_lengths),
        split=split,
        use_cached=use_cached,
        shuffle=False,
        seed=seed,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    if num_examples is not None:
        dataset = dataset.take(num_examples)
    rows: list[dict[str, Any]] = []
    for example in dataset.as_numpy_iterator():
        rows.append(example)
        if len(rows) == batch_size:
            yield fill_batch(rows, feature_lengths, batch_size)
            rows = []
    if rows:
        yield fill_batch(rows, feature_lengths, batch_size)


def fill_batch(
    rows: list[dict[str, Any]], feature_lengths: Mapping[str, int], batch_size: int
) -> EvalBatch:
    """Cut and padded rows; the batch is filled up with empty ones."""
    source, target = feature_lengths["inputs"], feature_lengths["targets"]
    batch = Batch(
        np.zeros((batch_size, source), np.int32),
        np.zeros((batch_size, target), np.int32),
        np.zeros((batch_size, target), np.float32),
    )
    for index, row in enumerate(rows):
        inputs, targets = row["inputs"][:source], row["targets"][:target]
        batch.inputs[index, : len(inputs)] = inputs
        batch.targets[index, : len(targets)] = targets
        batch.weights[index, : len(targets)] = 1.0
    return EvalBatch(batch, rows)


def place(
    batch: Batch, mesh: Mesh, rules: sharding.Rules = sharding.RULES, *, num_rows: int | None = None
) -> Batch:
    """Hands every local device its rows of a global batch.

    Args:
        batch: the whole of it, or this process' rows (of a `TrainIterator` of a shard).
        mesh: the mesh.
        rules: logical to mesh axes.
        num_rows: of the global batch; None if `batch` is the whole of it.
    """
    return jax.tree.map(lambda x: place_array(x, mesh, rules, num_rows=num_rows), batch)


def place_array(
    values: np.ndarray,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
    *,
    num_rows: int | None = None,
) -> jax.Array:
    """`place` for one array, whose first axis is the rows."""
    where = sharding.batch_sharding(mesh, rules)
    shape = (num_rows or len(values), *values.shape[1:])
    return jax.make_array_from_process_local_data(where, values, shape)
