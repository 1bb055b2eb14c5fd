"""The features `inputs` and `targets` that all tasks have, tables of texts, and registration."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.text import teacher_template, vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary
from gkd_jax.text.word_vocabulary import WordVocabulary


def count_tokens(dataset: tf.data.Dataset, output_features: Mapping[str, Any]) -> tf.data.Dataset:
    """Adds `<feature>_tokens`, the number of a feature's tokens before it is cut, including EOS."""

    def counted(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        counts = {
            f"{name}_tokens": tf.size(example[name]) + int(feature.add_eos)
            for name, feature in output_features.items()
        }
        return {**example, **counts}

    return dataset.map(counted, num_parallel_calls=tf.data.AUTOTUNE)


TOKENIZE = (
    seqio.preprocessors.tokenize,
    count_tokens,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
)
"""The preprocessors that end every task without few-shot prompts.

They turn texts into ids that end in EOS. The texts stay in the example as `*_pretokenized`, and the
numbers of tokens before the cut as `*_tokens`.
"""


# Vocabularies whose `encode` gives the ids of `encode_tf`, with which seqio tokenizes.
_ENCODERS = (seqio.SentencePieceVocabulary, TokenizerVocabulary, WordVocabulary)

Row = dict[str, Any]
"""The features of one example: NumPy arrays and numbers, and bytes for texts."""


def check_complete(row: Mapping[str, Any]) -> None:
    """Raises ValueError if a line of `gkd-jax infer` says that its target was cut off.

    The tasks that read files of texts end every target with EOS, so that a student would learn to
    stop in the middle of an answer.
    """
    if row.get("truncated"):
        raise ValueError(
            "the target was cut off ('truncated'), and this task would end it with EOS: leave the "
            "line out, or train on the file itself (MIXTURE_OR_TASK_NAME is its path)"
        )


class RowSource(seqio.FunctionDataSource):
    """A source that also yields its examples without TensorFlow, which is faster for small ones.

    Attributes:
        preprocessors: the preprocessors whose work `finish` does, if they are not `TOKENIZE`.
    """

    preprocessors: tuple[Callable, ...] = TOKENIZE

    def read_rows(self, split: str) -> Iterator[Row] | None:
        """Yields the examples of a split; None if only seqio can read them."""
        raise NotImplementedError

    def finish(
        self,
        rows: Sequence[Row],
        output_features: Mapping[str, seqio.Feature],
        lengths: Mapping[str, int],
    ) -> list[Row]:
        """Returns what `preprocessors` and seqio's cut make of rows; see `row_maker`."""
        raise NotImplementedError


class Table(RowSource):
    """A source whose splits are tables in memory, which their reader shuffles."""

    def __init__(
        self,
        read: Callable[[str], tf.data.Dataset | Mapping[str, Sequence[str]]],
        splits: Iterable[str],
        sizes: Mapping[str, int] | None = None,
    ):
        """Reads nothing yet.

        Args:
            read: returns a split: the columns of its table by the name of the feature, or a
                dataset.
            splits: the names of the splits.
            sizes: the number of examples of each split; None if it is known only after reading.
        """
        self._read = read
        super().__init__(self._dataset, splits=list(splits), num_input_examples=sizes)

    def read_rows(self, split: str) -> Iterator[Row] | None:
        table = self._read(split)
        if isinstance(table, tf.data.Dataset):
            return None
        rows = zip(*table.values(), strict=True)
        return ({name: x.encode() for name, x in zip(table, row, strict=True)} for row in rows)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        table = self._read(split)
        if isinstance(table, tf.data.Dataset):
            return table
        return tf.data.Dataset.from_tensor_slices({name: list(table[name]) for name in table})


def row_maker(task: seqio.Task) -> Callable[..., list[Row]] | None:
    """Returns the function that makes a task's examples of those of its source.

    The function has the arguments of `tokenize_rows`. The result is None if seqio must make the
    examples one by one.
    """
    preprocessors = tuple(task.preprocessors)
    if preprocessors == TOKENIZE:
        features = task.output_features.values()
        is_known = all(isinstance(feature.vocabulary, _ENCODERS) for feature in features)
        return tokenize_rows if is_known else None
    if isinstance(task.source, RowSource) and preprocessors == task.source.preprocessors:
        return task.source.finish
    return None


def tokenize_rows(
    rows: Sequence[Row], output_features: Mapping[str, seqio.Feature], lengths: Mapping[str, int]
) -> list[Row]:
    """Returns what `TOKENIZE` and seqio's cut make of examples with texts.

    Args:
        rows: the examples of a source.
        output_features: the features of the task.
        lengths: the largest number of tokens of each feature, including EOS. A feature without a
            length is not cut.
    """
    made = [dict(row) for row in rows]
    for name, feature in output_features.items():
        end = [feature.vocabulary.eos_id] if feature.add_eos else []
        most = lengths[name] - len(end) if name in lengths else None
        for row in made:
            ids = feature.vocabulary.encode(row[name].decode("utf-8", "replace"))
            row[f"{name}_pretokenized"] = row[name]
            row[f"{name}_tokens"] = np.int32(len(ids) + len(end))
            row[name] = np.array([*ids[:most], *end], np.int32)
    return made


def output_features(
    vocabulary: seqio.Vocabulary | None = None, *, with_teacher: bool = False
) -> dict[str, seqio.Feature]:
    """Returns the features `inputs` and `targets` with one vocabulary; None means T5's.

    `with_teacher` adds `teacher_inputs`, the prompts that the teacher reads instead of `inputs`.
    See `with_vocabulary` for which of the features end in EOS.
    """
    chosen = vocabularies.t5_default() if vocabulary is None else vocabulary
    feature = seqio.Feature(vocabulary=chosen, add_eos=True)
    names = ("inputs", "targets", *(["teacher_inputs"] if with_teacher else []))
    return with_vocabulary(dict.fromkeys(names, feature), chosen)


def with_vocabulary(
    features: Mapping[str, seqio.Feature], vocabulary: seqio.Vocabulary
) -> dict[str, seqio.Feature]:
    """Returns features with another vocabulary.

    Targets end in EOS. Inputs end in EOS only if the model expects this: a decoder-only model
    continues its inputs, so they must not end. The tokenizer of a Hugging Face folder decides which
    special tokens surround a prompt (see `TokenizerVocabulary.for_prompts`).
    """
    targets = prompts = {"vocabulary": vocabulary}
    if isinstance(vocabulary, TokenizerVocabulary):
        prompts = {"vocabulary": vocabulary.for_prompts(), "add_eos": vocabulary.ends_prompts}
    return {
        name: dataclasses.replace(feature, **(targets if name == "targets" else prompts))
        for name, feature in features.items()
    }


def with_teacher_inputs(task: seqio.Task | seqio.Mixture, template: str) -> seqio.Task:
    """Returns a copy of a task whose examples also have the feature `teacher_inputs`.

    The template makes it from the texts of `inputs` and `targets` before they are tokenized.

    Raises:
        ValueError: if the task is a mixture, or if its preprocessors do not include
            `seqio.preprocessors.tokenize`.
    """
    if isinstance(task, seqio.Mixture):
        raise ValueError(
            f"teacher_template makes prompts of one task, got the mixture {task.name!r}: register "
            "its tasks with the feature 'teacher_inputs'"
        )
    steps = list(task.preprocessors)
    if seqio.preprocessors.tokenize not in steps:
        raise ValueError(
            f"teacher_template reads texts before seqio.preprocessors.tokenize, which the task "
            f"{task.name!r} lacks: give it the feature 'teacher_inputs'"
        )
    pieces = teacher_template.parts(template)

    def add(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        texts = [example[x] if i % 2 else tf.constant(x) for i, x in enumerate(pieces)]
        return {**example, "teacher_inputs": tf.strings.join(texts)}

    def add_teacher_inputs(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)

    steps.insert(steps.index(seqio.preprocessors.tokenize), add_teacher_inputs)
    return task.replace(
        name=f"{task.name}__teacher",
        preprocessors=steps,
        output_features={**task.output_features, "teacher_inputs": task.output_features["inputs"]},
    )


def register(
    name: str,
    *,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable] = (),
    tokenize: Sequence[Callable] = TOKENIZE,
    metric_fns: Sequence[Callable],
    postprocess_fn: Callable | None = None,
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """Registers a task and returns it; if a task has this name already, that task is returned.

    A module can therefore be imported again, and a task that T5's own code has registered under the
    same name is kept.

    Args:
        name: the task's name.
        source: the source of the examples.
        preprocessors: preprocessors that run before those in `tokenize`.
        tokenize: the preprocessors that make ids, `TOKENIZE` or `few_shot.TOKENIZE`.
        metric_fns: seqio metric functions.
        postprocess_fn: seqio's postprocessor of targets and predictions.
        vocabulary: the vocabulary of both features; None means T5's.
    """
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*preprocessors, *tokenize],
        output_features=output_features(vocabulary),
        metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn,
    )
