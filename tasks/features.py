"""What the tasks share: their two features and how they are registered."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.text import vocabularies


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


def output_features(vocabulary: seqio.Vocabulary | None = None) -> dict[str, seqio.Feature]:
    """`inputs` and `targets` with one vocabulary (default T5's), EOS added to both."""
    chosen = vocabularies.t5_default() if vocabulary is None else vocabulary
    return {name: seqio.Feature(vocabulary=chosen, add_eos=True) for name in ("inputs", "targets")}


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
