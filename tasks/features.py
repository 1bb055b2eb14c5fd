"""What the tasks share: their two features and how they are registered."""

from collections.abc import Callable, Sequence

import seqio

from gkd_jax.text import vocabularies


TOKENIZE = (
    seqio.preprocessors.tokenize,
    seqio.CacheDatasetPlaceholder(),
    seqio.preprocessors.append_eos_after_trim,
)
"""Ends every task: texts stay as `*_pretokenized`, both features end in EOS."""


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
