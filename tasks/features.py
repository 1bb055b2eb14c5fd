"""The features `inputs` and `targets` that all tasks have, and the registration of tasks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

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


_ENCODE_ROWS = (seqio.SentencePieceVocabulary, TokenizerVocabulary, WordVocabulary)


def source_texts(task: Any, split: str, *, use_cached: bool = False) -> tf.data.Dataset | None:
    """Returns the examples of a task's source if `tokenize_rows` makes the task's examples of them.

    It does if the task has no preprocessors apart from those in `TOKENIZE`, if its vocabularies
    encode vectors of texts, if all features of the source are scalars, and if the task is not read
    from seqio's cache. Otherwise the result is None, and seqio must make the examples one by one.
    """
    if use_cached or not isinstance(task, seqio.Task) or tuple(task.preprocessors) != TOKENIZE:
        return None
    vocabularies_of_task = [feature.vocabulary for feature in task.output_features.values()]
    if not all(isinstance(vocabulary, _ENCODE_ROWS) for vocabulary in vocabularies_of_task):
        return None
    texts = task.source.get_dataset(split=split, shuffle=False)
    spec: Any = texts.element_spec
    return texts if all(one.shape.rank == 0 for one in spec.values()) else None


def tokenize_rows(
    texts: Mapping[str, tf.Tensor],
    *,
    output_features: Mapping[str, seqio.Feature],
    lengths: Mapping[str, int],
) -> dict[str, tf.Tensor | tf.RaggedTensor]:
    """Returns what `TOKENIZE` and seqio's cut make of texts, for many examples at once.

    Args:
        texts: the features of the examples of a source, whose first axis is the example.
        output_features: the features of the task.
        lengths: the largest number of tokens of each feature, including EOS.

    Returns:
        The features that each example of the task has, with ragged rows of ids.
    """
    ids = {
        name: feature.vocabulary.encode_tf(texts[name]) for name, feature in output_features.items()
    }
    made: dict[str, Any] = dict(texts)
    for name, feature in output_features.items():
        made[f"{name}_pretokenized"] = texts[name]
        made[f"{name}_tokens"] = tf.cast(ids[name].row_lengths(), tf.int32) + int(feature.add_eos)
    ended = seqio.preprocessors.append_eos_after_trim_impl(ids, output_features, lengths)
    return made | {name: ended[name][:, : lengths[name]] for name in ended}


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


def table_source(
    read: Callable[[str], tf.data.Dataset | Mapping[str, Sequence[str] | tf.Tensor]],
    splits: Iterable[str],
    sizes: Mapping[str, int] | None = None,
) -> seqio.FunctionDataSource:
    """Returns a source whose splits are tables in memory, which their reader shuffles.

    Args:
        read: returns a split: the columns of its table by the name of the feature, or a dataset.
        splits: the names of the splits.
        sizes: the number of examples of each split; None if it is known only after reading.
    """
    dataset = functools.partial(_table, read=read)
    return seqio.FunctionDataSource(dataset, splits=list(splits), num_input_examples=sizes)


def _table(
    split: str, shuffle_files: bool, seed: int | None = None, *, read: Callable[[str], Any]
) -> tf.data.Dataset:
    del shuffle_files, seed
    table = read(split)
    if isinstance(table, tf.data.Dataset):
        return table
    return tf.data.Dataset.from_tensor_slices(dict(table))


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
