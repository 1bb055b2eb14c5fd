"""Reads a split in its own order, and warns once about examples that do not fit the lengths."""

from collections.abc import Iterable, Iterator, Mapping
import sys
from typing import Any, NamedTuple

import jax

from gkd_jax.input.dataset_options import untuned
from gkd_jax.tasks import features  # pyright: ignore[reportMissingImports]


LOOKED_AT = 500
"""Examples of a split that a warning is about, at most."""

_ROWS_AT_ONCE = 256
_warned: set[tuple] = set()


class Fit(NamedTuple):
    """Counts of examples that do not fit the feature lengths.

    Attributes:
        examples: the number of examined examples.
        cut: for each feature, the number of examples in which the end of the feature was cut off.
        fewer_shots: the number of examples whose prompt lacks some of its worked examples.
        no_shots: the number of examples whose prompt lacks all of its worked examples.
    """

    examples: int
    cut: dict[str, int]
    fewer_shots: int
    no_shots: int

    def sentence(self, lengths: Mapping[str, int]) -> str:
        """Returns a sentence about what does not fit, with percentages; "" if everything fits."""

        def share(count: int) -> str:
            return f"{count} of {self.examples} examples ({100 * count / self.examples:.1f} %)"

        parts = []
        if self.fewer_shots:
            parts.append(
                f"{share(self.fewer_shots)} keep only some of the prompt's worked examples, "
                f"{self.no_shots} of them none, to fit inputs of {lengths['inputs']} tokens"
            )
        parts.extend(
            f"{share(count)} have longer {name} than {lengths[name]} tokens, and these are cut"
            for name, count in self.cut.items()
            if count
        )
        return "; ".join(parts)


def count(examples: Iterable[Mapping[str, Any]], lengths: Mapping[str, int]) -> Fit:
    """Counts the examples that do not fit the feature lengths.

    The tasks of gkd_jax record in their examples what was there before cutting (`inputs_tokens`,
    `targets_tokens`, `kept_shots`, `all_shots`). For other tasks, a feature that has the largest
    length allowed counts as cut.

    Args:
        examples: examples of a seqio task, cut to the lengths.
        lengths: the largest number of tokens of each feature, including EOS.
    """
    total, fewer, none = 0, 0, 0
    cut = dict.fromkeys(lengths, 0)
    for example in examples:
        total += 1
        for name, limit in lengths.items():
            tokens = example.get(f"{name}_tokens")
            cut[name] += len(example[name]) >= limit if tokens is None else bool(tokens > limit)
        kept, all_shots = example.get("kept_shots", 0), example.get("all_shots", 0)
        fewer += bool(kept < all_shots)
        none += bool(kept < all_shots and kept == 0)
    return Fit(total, cut, fewer, none)


def in_order(
    task: Any,
    split: str,
    lengths: Mapping[str, int],
    *,
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split once, in their own order, as NumPy arrays.

    Args:
        task: a seqio task or mixture.
        split: the split of the task.
        lengths: the largest number of tokens of each feature.
        num_examples: how many of the first examples are read; None means all.
        use_cached: whether the task is read from seqio's cache.
        seed: the seed of tasks whose examples depend on a seed.
    """
    limit = -1 if num_examples is None else num_examples
    texts = features.source_texts(task, split, use_cached=use_cached)
    if texts is not None:
        # seqio traces a graph for each preprocessor, and calls it for each example.
        for some in untuned(texts.take(limit).batch(_ROWS_AT_ONCE)):
            made = features.tokenize_rows(
                some, output_features=task.output_features, lengths=lengths
            )
            columns = {name: list(values.numpy()) for name, values in made.items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))
        return
    dataset = task.get_dataset(
        dict(lengths),
        split=split,
        use_cached=use_cached,
        shuffle=False,
        seed=seed,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    examples: Any = untuned(dataset.take(limit))
    yield from examples.as_numpy_iterator()


def warn_once(
    task: Any,
    split: str,
    lengths: Mapping[str, int],
    *,
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int | None = None,
) -> None:
    """Prints a warning to standard error if examples of a split do not fit the feature lengths.

    Only the first examples of the split are examined (at most `LOOKED_AT`), by process 0 only, and
    only once for a task, split and lengths.

    Args:
        task, split, lengths, num_examples, use_cached, seed: see `in_order`.
    """
    about = (task.name, split, tuple(sorted(lengths.items())))
    if about in _warned or jax.process_index() != 0:
        return
    _warned.add(about)
    looked_at = min(LOOKED_AT, num_examples or LOOKED_AT)
    found = count(
        in_order(task, split, lengths, num_examples=looked_at, use_cached=use_cached, seed=seed),
        lengths,
    )
    said = found.sentence(lengths)
    if said:
        first = f" (of the first {found.examples})" if found.examples == LOOKED_AT else ""
        print(
            f"WARNING: task {task.name!r}, split {split!r}{first}: {said}. "
            "TASK_FEATURE_LENGTHS sets the lengths.",
            file=sys.stderr,
        )
