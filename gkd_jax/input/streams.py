"""Opens a seqio task and makes batches of token ids from its examples.

Row k of global batch n is the same example for any number of processes. For this, each process
makes the global batches and gives its devices their rows. If making global batches in every process
is too expensive, each process reads its own part of the examples (`DataConfig.shard_by_process`).
The position in the stream is part of every checkpoint, so that a resumed run continues with the
next batch. All examples of a source of up to `in_memory.LARGEST` examples are shuffled; a larger
source is shuffled within seqio's window.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import seqio
import tensorflow as tf

from gkd_jax import tasks  # pyright: ignore[reportAttributeAccessIssue]
from gkd_jax.batch import Batch
from gkd_jax.input import fit, in_memory
from gkd_jax.input.data import TEACHER_INPUTS, WHOLE, DataConfig, Shard
from gkd_jax.tasks import features, folder, jsonl  # pyright: ignore[reportMissingImports]
from gkd_jax.text import task_names, vocabularies


_LENGTHS = {"inputs": "input_lengths", TEACHER_INPUTS: "teacher_input_lengths"}


def find_task(name: str, vocabulary: seqio.Vocabulary | None) -> seqio.Task | seqio.Mixture:
    """Returns a registered task or mixture.

    Args:
        name: the registered name.
        vocabulary: a vocabulary that replaces the task's own; None keeps the task's own.

    Raises:
        ValueError: if no task has this name, if the task lacks a feature, or if a vocabulary is
            given for a mixture.
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
    # The copy needs no registration: preprocessors receive the output features of the task that
    # calls them.
    return task.replace(
        name=f"{name}__{vocabularies.content_hash(vocabulary)[:12]}",
        output_features=features.with_vocabulary(task.output_features, vocabulary),
    )


def open_task(
    config: DataConfig,
    *,
    tokenizer: str | None = None,
    check_remote: bool = True,
    beside: Sequence[str] = (),
) -> tuple[Any, seqio.Vocabulary]:
    """Returns the only task of a configuration, and the vocabulary of its inputs and targets.

    Args:
        config: the configuration of the data.
        tokenizer: the Hugging Face folder of the model that reads the task, or None. If `config`
            names no vocabulary and the folder has a tokenizer, that tokenizer is used.
        check_remote: whether remote files may be read; False in a dry run.
        beside: the names of all tasks of the run. Where some of them select rows of a JSONL file by
            the field `teacher`, each row of the file must belong to one of them.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or not as expected, if settings
            contradict each other, or if the configuration has several tasks.
    """
    if not isinstance(config.task, str):
        raise ValueError(
            f"only training reads several tasks at once, expected the name of one task, got "
            f"{dict(config.task)}"
        )
    folder.set_data_dir(config.data_dir)
    vocabulary = None
    if config.vocabulary is None and tokenizer is not None:
        if vocabularies.has_tokenizer(tokenizer):
            vocabulary = vocabularies.of_folder(tokenizer)
    elif config.vocabulary is not None:
        vocabulary = vocabularies.load(
            config.vocabulary, extra_ids=config.extra_ids, check_remote=check_remote
        )
    if config.eval_fraction is not None and not task_names.is_path(config.task):
        raise ValueError(
            f"eval_fraction={config.eval_fraction} holds rows of a JSONL file out, "
            f"got the task {config.task!r}"
        )
    if task_names.is_path(config.task):
        task = jsonl.make_task(
            config.task,
            vocabulary=vocabulary or vocabularies.t5_default(),
            options=_jsonl_options(config, beside),
        )
    else:
        task = _with_teacher_inputs(find_task(config.task, vocabulary), config)
    vocabularies.check_readable(
        task.output_features["targets"].vocabulary, check_remote=check_remote
    )
    return task, task.output_features["targets"].vocabulary


def open_tasks(
    config: DataConfig, *, tokenizer: str | None = None, check_remote: bool = True
) -> tuple[dict[str, Any], seqio.Vocabulary]:
    """Returns the tasks of a configuration by their names, and the vocabulary that they share.

    Arguments and errors are those of `open_task`, which opens each of the tasks.

    Raises:
        ValueError: also if two tasks have different vocabularies, or the same name in metrics.
    """
    found: dict[str, Any] = {}
    shared, has_files = None, any(map(task_names.is_path, config.task_rows))
    several = () if isinstance(config.task, str) else tuple(config.task)
    for name in config.task_rows:
        holds_out = task_names.is_path(name) or not has_files
        one = dataclasses.replace(
            config,
            task=name,
            eval_fraction=config.eval_fraction if holds_out else None,
        )
        found[name], vocabulary = open_task(
            one, tokenizer=tokenizer, check_remote=check_remote, beside=several
        )
        if shared is not None and not vocabularies.same(shared, vocabulary):
            raise ValueError(
                f"task {name!r} has another vocabulary than {next(iter(found))!r}: VOCABULARY must "
                "name one for both"
            )
        shared = vocabulary
    if len({task_names.display_name(name) for name in found}) < len(found):
        raise ValueError(
            f"the tasks {list(found)} need different names, because metrics have the last part of "
            "a path as the name of the task"
        )
    assert shared is not None
    return found, shared


def _with_teacher_inputs(task: Any, config: DataConfig) -> Any:
    """Returns a task whose examples have the teacher's prompts that a template makes.

    Raises:
        ValueError: if the task has prompts of the teacher's own, or a template cannot make any.
    """
    template = config.teacher_template
    if template is None:
        return task
    if TEACHER_INPUTS in task.output_features:
        raise ValueError(
            f"task {config.task!r} has {TEACHER_INPUTS!r} of its own: teacher_template must be "
            f"None, got {template!r}"
        )
    if config.use_cached:
        raise ValueError(
            f"seqio's cache of {config.task!r} has no {TEACHER_INPUTS!r}: with teacher_template, "
            "use_cached must be False"
        )
    return features.with_teacher_inputs(task, template)


def _jsonl_options(config: DataConfig, beside: Sequence[str]) -> jsonl.Options:
    """Returns the settings with which a JSONL file is read."""
    assert isinstance(config.task, str)
    path, _ = task_names.split(config.task)
    return jsonl.Options(
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        long_prompts=config.long_prompts,
        limit=config.feature_lengths["inputs"],
        template_variables=config.template_variables,
        teacher_limit=config.feature_lengths.get(TEACHER_INPUTS),
        teacher_template=config.teacher_template,
        teachers=task_names.teachers_of(path, beside),
    )


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Raises ValueError if a task has no such split.

    The splits of a TFDS data set that has not been prepared are unknown. They are not checked here:
    the error when the data set is read says what is missing.
    """
    try:
        known = list(task.splits or ())
    except ValueError:  # seqio raises this if the splits are unknown.
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


def check_teacher_inputs(name: str, task: seqio.Task | seqio.Mixture, config: DataConfig) -> None:
    """Raises ValueError if a length is given for the teacher's prompts and the task has none."""
    if TEACHER_INPUTS in config.feature_lengths and TEACHER_INPUTS not in task.output_features:
        raise ValueError(
            f"task {name!r} has no feature {TEACHER_INPUTS!r}: register it with one, set "
            f"TEACHER_TEMPLATE, or leave it out of TASK_FEATURE_LENGTHS, got "
            f"{dict(config.feature_lengths)}"
        )


def check_targets(task: seqio.Task | seqio.Mixture, split: str, why: str) -> None:
    """Raises ValueError, naming the file and the line, if a row of a split has no target.

    Args:
        task: a task or mixture. Only JSONL files can have rows without targets.
        split: the split of the task.
        why: the reason why targets are needed, for the error message.
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
    """An endless stream of training batches, whose position can be saved and restored.

    Without sharding, the batches are global batches and are the same in every process. With a
    shard, the batches are this process's rows, and the position of each shard is saved.
    """

    def __init__(self, task: Any, config: DataConfig, shard: Shard = WHOLE):
        """Opens the stream at its beginning.

        Args:
            task: the task, or the tasks by name (`open_tasks`).
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
