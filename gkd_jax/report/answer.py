"""The answer of a study: the best method for each size, and whether its lead exceeds the noise."""

from collections.abc import Iterator
import math
from typing import Any, NamedTuple

from gkd_jax.report.seed_values import Lead
from gkd_jax.report.study import Group, Study, Table, sizes


_NOISE = {
    None: "one seed, so the noise is not known",
    True: "more than the seeds' noise",
    False: "within the seeds' noise",
}


class Answer(NamedTuple):
    """The best method of one student size under one way of decoding.

    Attributes:
        size: the student's size.
        best: the row of the best method in `Study.table`.
        margins: (name of the rival, row of the rival, lead over it). The rivals are the student
            before training, SFT of equal length, and the runner-up.
        missing: the rivals that have no number.
    """

    size: str
    best: Any
    margins: list[tuple[str, Any, Lead]]
    missing: list[str]

    def __str__(self) -> str:
        text = f"{self.best['text']} (n = {self.best['n']})"
        for name, rival, lead in self.margins:
            which = f", {rival['label']}" if name == "the runner-up" else ""
            error = "" if math.isnan(lead.error) else f" ± {lead.error:.1f}"
            text += f"; {lead.mean:+.1f}{error} over {name}{which} ({rival['text']}), "
            text += _NOISE[lead.exceeds_noise]
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
            margins.append((name, rival, best["values"].over(rival["values"])))
    missing = [name for name, some in rivals.items() if not len(some)]
    return Answer(size, best, [one for one in margins if one[1]["group"] is not group], missing)


def _is_sft_as_long(group: Group, best: Group) -> bool:
    """Whether a group is SFT of the best group's length, data and start."""
    same = ("train.train_steps", "data.num_examples", "data.batch_size", "student.checkpoint")
    return group.role == "sft" and all(
        group.identity.get(name) == best.identity.get(name) for name in same
    )
