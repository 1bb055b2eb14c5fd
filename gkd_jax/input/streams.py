"""From a seqio task to batches of token ids.

The training stream belongs to the job: row k of global batch n is the same example for any number
of processes. Each process makes the whole (cheap) stream and hands its devices their rows; where
that is not cheap, `DataConfig.shard_by_process` lets each read its own part of the examples. The
stream's position is part of every checkpoint, so that a resumed run sees the next batch. A source
of up to `in_memory.LARGEST` examples is shuffled whole, a larger one within seqio's window.
"""

from collections.abc import Iterator, Mapping
import difflib
import functools
import os
import pathlib
from typing import Any

import jax
import seqio
import tensorflow as tf

from gkd_jax import tasks  # pyright: ignore[reportAttributeAccessIssue]
from gkd_jax.batch import Batch
from gkd_jax.input import fit, in_memory
from gkd_jax.input.data import WHOLE, DataConfig, Shard
from gkd_jax.tasks import features, folder, jsonl  # pyright: ignore[reportMissingImports]
from gkd_jax.text import vocabularies


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
    source: Any = task.source
    if isinstance(source, jsonl.JsonlSource):
        return jsonl.make_task(source.path, vocabulary=vocabulary)
    # A copy of the task, not of its registration: preprocessors read the features they are given.
    return task.replace(
        name=f"{name}__{vocabularies.content_hash(vocabulary)[:12]}",
        output_features=features.with_vocabulary(task.output_features, vocabulary),
    )


def open_task(
    config: DataConfig, *, checkpoint: str | None = None, check_remote: bool = True
) -> tuple[Any, seqio.Vocabulary]:
    """The task with its vocabulary, both features sharing one.

    Args:
        config: names the task, and perhaps the vocabulary.
        checkpoint: of the model that reads the task: where no vocabulary is named and this is a
            Hugging Face folder with a tokenizer, it is that one.
        check_remote: False leaves remote files untouched, for a dry run.
    """
    folder.set_data_dir(config.data_dir)
    vocabulary = None
    if config.vocabulary is None and checkpoint is not None and os.path.isdir(checkpoint):
        if vocabularies.has_tokenizer(checkpoint):
            vocabulary = vocabularies.of_folder(checkpoint)
    elif config.vocabulary is not None:
        vocabulary = vocabularies.load(
            config.vocabulary, extra_ids=config.extra_ids, check_remote=check_remote
        )
    if config.eval_fraction is not None and not jsonl.is_path(config.task):
        raise ValueError(
            f"eval_fraction={config.eval_fraction} holds rows of a JSONL file out, "
            f"got the task {config.task!r}"
        )
    if jsonl.is_path(config.task):
        task = jsonl.make_task(
            config.task,
            vocabulary=vocabulary or vocabularies.t5_default(),
            options=_jsonl_options(config),
        )
    else:
        task = find_task(config.task, vocabulary)
    vocabularies.check_readable(
        task.output_features["targets"].vocabulary, check_remote=check_remote
    )
    return task, task.output_features["targets"].vocabulary


def _jsonl_options(config: DataConfig) -> jsonl.Options:
    """How a JSONL file is read."""
    return jsonl.Options(
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        long_prompts=config.long_prompts,
        limit=config.feature_lengths["inputs"],
        template_variables=config.template_variables,
    )


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Raises ValueError, naming the splits there are, unless the task has this one.

    A TFDS data set that is not prepared names no splits: reading it will say what is missing.
    """
    try:
        known = list(task.splits or ())
    except ValueError:  # seqio's word for none
        return
    if known and split.split("[")[0] not in known:
        source: Any = getattr(task, "source", None)
        hint = (
            f": {source.path!r} needs a validation.jsonl beside it, or EVAL_FRACTION=0.05 to hold "
            "a share of its rows out"
            if isinstance(source, jsonl.JsonlSource)
            else ""
        )
        raise ValueError(
            f"task {task.name!r} has no split {split!r}, expected one of {known}{hint}"
        )


def check_targets(task: seqio.Task | seqio.Mixture, split: str, why: str) -> None:
    """Raises ValueError, naming file and line, if a row of the split is only a prompt.

    Args:
        task: any; only JSONL files can have rows without targets.
        split: of the task.
        why: what targets are needed for, for the message.
    """
    parts: Any = task.tasks if isinstance(task, seqio.Mixture) else [task]
    for source in (part.source for part in parts):
        if isinstance(source, jsonl.JsonlSource):
            line = source.first_without_target(split)
            if line is not None:
                raise ValueError(
                    f"{source.files[split]}, line {line}: expected a target, got only a prompt: "
                    f"{why}"
                )


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
        return Batch(
            *(example[name].numpy() for name in ("inputs", "targets", "weights")),
            input_lengths=example["input_lengths"].numpy(),
        )

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
        if features.only_tokenizes(task) and not config.use_cached:
            return _texts_in_memory(task, config, shard)
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


def _texts_in_memory(task: seqio.Task, config: DataConfig, shard: Shard) -> tf.data.Dataset:
    """The examples of a task without preprocessors, shuffled as texts and then tokenized."""
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


def _with_weights(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Weights and lengths mark real tokens before any padding: ids cannot tell (see `Batch`)."""
    return {
        "input_lengths": tf.size(example["inputs"]),
        "inputs": tf.cast(example["inputs"], tf.int32),
        "targets": tf.cast(example["targets"], tf.int32),
        "weights": tf.ones_like(example["targets"], tf.float32),
    }


def _batched(dataset: tf.data.Dataset, config: DataConfig, batch_size: int) -> tf.data.Dataset:
    shapes = config.shapes()

    def padded(shape):
        rows = {"inputs": [shape[0]], "targets": [shape[1]], "weights": [shape[1]]}
        return {**rows, "input_lengths": []}

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
    return {
        name: tf.ensure_shape(value, [None] * value.shape.rank) for name, value in example.items()
    }
