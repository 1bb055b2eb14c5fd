"""Counts the examples that do not fit the feature lengths, and warns about them once."""

from collections.abc import Iterable, Mapping
import functools
import sys
from typing import Any, NamedTuple

import jax

from gkd_jax.input.split import Split


LOOKED_AT = 500
"""Examples of a split that a warning is about, at most."""

_warned: set[tuple] = set()


class Fit(NamedTuple):
    """Counts of examples that do not fit the feature lengths."""

    examples: int  # that were looked at
    cut: dict[str, int]  # of each feature, the examples in which its end was cut off
    fewer_shots: int  # examples whose prompt lacks some of its worked examples
    no_shots: int  # examples whose prompt lacks all of them

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
    length allowed counts as cut. The examples are cut to the lengths, which include EOS.
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


def warn_once(split: Split) -> None:
    """Prints a warning to standard error if examples of a split do not fit the feature lengths.

    Only the first examples of the split are examined (at most `LOOKED_AT`), by process 0 only, and
    only once for a task, split and lengths.
    """
    about = (split.task.name, split.name, tuple(sorted(split.lengths.items())))
    if about in _warned or jax.process_index() != 0:
        return
    _warned.add(about)
    first = split._replace(num_examples=min(LOOKED_AT, split.num_examples or LOOKED_AT))
    found = count(first.in_order(), split.lengths)
    said = found.sentence(split.lengths)
    if said:
        which = f" (of the first {found.examples})" if found.examples == LOOKED_AT else ""
        warn(
            f"task {split.task.name!r}, split {split.name!r}{which}: {said}. "
            "TASK_FEATURE_LENGTHS sets the lengths."
        )


@functools.cache
def warn(message: str) -> None:
    """Prints a warning to standard error; the same warning only once in a process."""
    print(f"WARNING: {message}", file=sys.stderr)
