"""What the tasks share: their two features and how they are registered."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.text import vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


def count_tokens(dataset: tf.data.Dataset, output_features: Mapping[str, Any]) -> tf.data.Dataset:
    """Adds `<feature>_tokens`: how many there are before they are cut, EOS included."""

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
"""Ends every task: texts stay as `*_pretokenized`, both features end in EOS, and how many tokens
there were before the cut stays too."""


def only_tokenizes(task: Any) -> bool:
    """Whether a task makes one example of each of its source's, from texts alone."""
    return isinstance(task, seqio.Task) and tuple(task.preprocessors) == TOKENIZE


def output_features(vocabulary: seqio.Vocabulary | None = None) -> dict[str, seqio.Feature]:
    """`inputs` and `targets` with one vocabulary (default T5's), as `with_vocabulary` has them."""
    chosen = vocabularies.t5_default() if vocabulary is None else vocabulary
    feature = seqio.Feature(vocabulary=chosen, add_eos=True)
    return with_vocabulary({"inputs": feature, "targets": feature}, chosen)


def with_vocabulary(
    features: Mapping[str, seqio.Feature], vocabulary: seqio.Vocabulary
) -> dict[str, seqio.Feature]:
    """Features with another vocabulary: EOS ends targets, and inputs where its model expects that.

    A decoder-only model goes on from its inputs, so they must not end; a folder's tokenizer says
    what it puts around a text (`TokenizerVocabulary.for_prompts`).
    """
    changed = {
        name: dataclasses.replace(feature, vocabulary=vocabulary)
        for name, feature in features.items()
    }
    if isinstance(vocabulary, TokenizerVocabulary):
        changed["inputs"] = dataclasses.replace(
            changed["inputs"],
            vocabulary=vocabulary.for_prompts(),
            add_eos=vocabulary.ends_prompts,
        )
    return changed


def register(
    name: str,
    *,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable],
    metric_fns: Sequence[Callable],
    postprocess_fn: Callable | None = None,
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """Registers a task that `TOKENIZE` ends, or returns the one of that name.

    So a module can be imported again, and T5's own registrations of the same task are kept.
    """
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*preprocessors, *TOKENIZE],
        output_features=output_features(vocabulary),
        metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn,
    )
