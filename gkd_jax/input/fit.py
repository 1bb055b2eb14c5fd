"""What of a split does not fit its feature lengths: counted, and said once."""

from collections.abc import Iterable, Mapping
import sys
from typing import Any, NamedTuple

import jax


LOOKED_AT = 500
"""Examples of a split that a warning is about, at most."""

_warned: set[tuple] = set()


class Fit(NamedTuple):
    """How many of some examples lost something to the feature lengths.

    Attributes:
        examples: all that were counted.
        cut: of each feature, those whose end was cut off.
        fewer_shots: those with fewer worked examples in the prompt than there are.
        no_shots: of these, those without any.
    """

    examples: int
    cut: dict[str, int]
    fewer_shots: int
    no_shots: int

    def sentence(self, lengths: Mapping[str, int]) -> str:
        """What does not fit, with shares; empty if all does."""

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
    """Counts what does not fit.

    Args:
        examples: of a seqio task, cut to the lengths. Our tasks say what was there before
            (`inputs_tokens`, `targets_tokens`, `kept_shots`, `all_shots`). Of others a feature
            that fills its length counts as cut.
        lengths: most tokens of each feature, EOS included.
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


def warn_once(
    task: Any,
    split: str,
    lengths: Mapping[str, int],
    *,
    num_examples: int | None = None,
    use_cached: bool = False,
    seed: int | None = None,
) -> None:
    """Says on standard error what of a split does not fit: once a process, looking at its first.

    Args:
        task: seqio's.
        split: of the task.
        lengths: most tokens of each feature.
        num_examples: of the split that are used, the first ones; None is all.
        use_cached: whether seqio's cache is read.
        seed: of tasks whose examples depend on it.
    """
    about = (task.name, split, tuple(sorted(lengths.items())))
    if about in _warned or jax.process_index() != 0:
        return
    _warned.add(about)
    dataset = task.get_dataset(
        dict(lengths),
        split=split,
        use_cached=use_cached,
        shuffle=False,
        seed=seed,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    looked_at = min(LOOKED_AT, num_examples or LOOKED_AT)
    found = count(dataset.take(looked_at).as_numpy_iterator(), lengths)
    said = found.sentence(lengths)
    if said:
        first = f" (of the first {found.examples})" if found.examples == LOOKED_AT else ""
        print(
            f"WARNING: task {task.name!r}, split {split!r}{first}: {said}. "
            "TASK_FEATURE_LENGTHS sets the lengths.",
            file=sys.stderr,
        )
