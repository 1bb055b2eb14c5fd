"""The answer of a study: the best method for each size, and whether its lead exceeds the noise."""

from collections.abc import Iterator
import math
from typing import Any, NamedTuple

from scipy import stats

from gkd_jax.report.study import Group, Study, Table, sizes


_SIGNIFICANT = 0.05


class Answer(NamedTuple):
    """The best method of one student size under one way of decoding.

    Attributes:
        size: the student's size.
        best: the row of the best method in `Study.table`.
        margins: (name of the rival, row of the rival, lead over it, `noise` of the lead). The
            rivals are the student before training, SFT of equal length, and the runner-up.
        missing: the rivals that have no number.
    """

    size: str
    best: Any
    margins: list[tuple[str, Any, float, str]]
    missing: list[str]

    def __str__(self) -> str:
        text = f"{self.best['text']} (n = {self.best['n']})"
        for name, rival, lead, verdict in self.margins:
            which = f", {rival['label']}" if name == "the runner-up" else ""
            text += f"; {lead:+.1f} over {name}{which} ({rival['text']}), {verdict}"
        missing = f" There is no number of {', nor of '.join(self.missing)}."
        return f"{text}.{missing if self.missing else ''}"


def answers(study: Study, rows: Table) -> Iterator[Answer]:
    """Yields an `Answer` for each size that has at least two methods, the smallest size first.

    If the best mean comes from a single seed, a second answer compares the methods that have
    several seeds.
    """
    for size in sizes(rows["group"]):
        methods = rows[(rows["size"] == size) & ~rows["role"].isin(["start", "teacher", "unknown"])]
        repeated = methods[methods["n"] > 1]
        if len(methods) > 1:
            first = _answer(study, size, methods, rows)
            yield first
            if first.best["n"] == 1 and len(repeated) > 1:
                yield _answer(study, size, repeated, rows)


def _answer(study: Study, size: str, methods: Table, rows: Table) -> Answer:
    best = methods.loc[methods["mean"].idxmax()]
    group, groups = best["group"], methods["group"]
    rivals = {
        "the student before": rows[rows["group"] == study.parent(group, "student")],
        "SFT trained for as long": methods[[_is_sft_as_long(one, group) for one in groups]],
        "the runner-up": methods[[one.method != group.method for one in groups]],
    }
    margins = []
    for name, some in rivals.items():
        if len(some):
            rival = some.loc[some["mean"].idxmax()]
            margins.append((name, rival, best["mean"] - rival["mean"], noise(best, rival)))
    missing = [name for name, some in rivals.items() if not len(some)]
    return Answer(size, best, [one for one in margins if one[1]["group"] is not group], missing)


def _is_sft_as_long(group: Group, best: Group) -> bool:
    start = "contents.student.checkpoint"
    names = ("train.train_steps", "data.num_examples", "data.batch_size", start)
    names = names if best.first.fields.get(start) else (*names, "student.checkpoint")
    same = all(group.first.fields.get(name) == best.first.fields.get(name) for name in names)
    return group.role == "sft" and same


def noise(left: Any, right: Any) -> str:
    """Says in words whether two means (`mean`, `error`, `n`) differ by Welch's t-test at 5 %."""
    if math.isnan(left["error"]) or math.isnan(right["error"]):
        return "one seed, so the noise is not known"
    numbers = [(one["mean"], one["error"] * math.sqrt(one["n"]), one["n"]) for one in (left, right)]
    test: Any = stats.ttest_ind_from_stats(*numbers[0], *numbers[1], equal_var=False)
    exact = left["error"] == right["error"] == 0 and left["mean"] != right["mean"]
    beyond = exact or test.pvalue < _SIGNIFICANT
    return ("more than" if beyond else "within") + " the seeds' noise"
