"""The answer of a study: the best method for each size, and whether its lead exceeds the noise."""

from collections.abc import Iterator
import math
from typing import Any

from gkd_jax.report.groups import Group
from gkd_jax.report.study import Table, by_size


_NOISE = {
    None: "one seed, so the noise is not known",
    True: "more than the seeds' noise",
    False: "within the seeds' noise",
}


def answers(rows: Table) -> Iterator[tuple[Any, str]]:
    """Yields an answer for each size that has at least two methods, the smallest size first.

    An answer is the row of the best method, and a text with its value and its leads over the
    student before training, SFT of equal length and the runner-up. If the best mean comes from a
    single seed, a second answer compares the methods that have several seeds.
    """
    for _, found in by_size(rows):
        methods = found[~found["role"].isin(["start", "teacher", "unknown"])]
        repeated = methods[methods["n"] > 1]
        if len(methods) > 1:
            best, text = _answer(methods, rows)
            yield best, text
            if best["n"] == 1 and len(repeated) > 1:
                yield _answer(repeated, rows)


def _answer(methods: Table, rows: Table) -> tuple[Any, str]:
    best = methods.loc[methods["mean"].idxmax()]
    group, groups = best["group"], methods["group"]
    rivals = {
        "the student before": rows[rows["group"] == best["start"]],
        "SFT trained for as long": methods[[_is_sft_as_long(one, group) for one in groups]],
        "the runner-up": methods[[one.method != group.method for one in groups]],
    }
    text = f"{best['text']} (n = {best['n']})"
    for name, some in rivals.items():
        rival = some.loc[some["mean"].idxmax()] if len(some) else best
        if rival["group"] is not group:
            lead = best["values"].over(rival["values"])
            which = f", {rival['label']}" if name == "the runner-up" else ""
            error = "" if math.isnan(lead.error) else f" ± {lead.error:.1f}"
            text += f"; {lead.mean:+.1f}{error} over {name}{which} ({rival['text']}), "
            text += _NOISE[lead.exceeds_noise]
    missing = ", nor of ".join(name for name, some in rivals.items() if not len(some))
    text += f". There is no number of {missing}." if missing else "."
    return best, text


def _is_sft_as_long(group: Group, best: Group) -> bool:
    """Whether a group is SFT of the best group's length, data and start."""
    same = ("train.train_steps", "data.num_examples", "data.batch_size", "student.checkpoint")
    alike = (group.identity.get(name) == best.identity.get(name) for name in same)
    return group.role == "sft" and all(alike)
