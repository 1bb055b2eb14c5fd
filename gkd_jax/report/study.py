"""`Study`: the groups of all runs, and tables of their means."""

from collections.abc import Sequence
import math
from typing import Any

import pandas as pd

from gkd_jax.report import labels, paper
from gkd_jax.report.groups import Group, grouped
from gkd_jax.report.record import Run, Setting
from gkd_jax.report.seed_values import SeedValues


# The primary metric of a task is the paper's, or else the first of these that the task has.
_PRIMARY = ("rouge2", "bleu", "accuracy", "exact_match", "accuracy_with_calculator")
# Metrics that describe a student, but do not say how good it is.
_NOT_QUALITY = ("teacher_divergence", "self_bleu", "entailment", "entailed", "brevity")
_DIVERGENCES = ("forward_kl", "jsd(0.1)", "jsd(0.5)", "jsd(0.9)", "reverse_kl", "total_variation")
_ROLES = ("teacher", "start", "sft", "seqkd", "distillation", "rl", "unknown")
# Columns of `Study.table` that are attributes of the group, and of its values.
_OF_GROUP = ("label", "size", "role", "fraction", "amount")
_OF_VALUES = ("mean", "error", "n", "text")

Table = Any  # a pandas.DataFrame, whose columns no type checker knows


class Study:
    """All runs of a report, grouped.

    Attributes:
        runs: all runs.
        groups: the groups that tables and figures show, in the order of their rows.
        left_out: slug -> reason, for each run that is in no group.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = tuple(runs)
        groups, self.left_out = grouped(runs)
        labels.label(groups)
        self.groups = sorted(groups, key=_order)

    def tasks(self) -> list[str]:
        """Every task that is evaluated, or that a recipe evaluates."""
        return sorted({task for run in self.runs for task in run.tasks})

    def settings(self, task: str) -> list[Setting]:
        """The ways in which final checkpoints were decoded, the most used first."""
        shown = [run for group in self.groups for run in group.runs]
        found = [setting for run in shown for of, setting in run.finals if of == task]
        return sorted(set(found), key=lambda one: (not one.is_main, -found.count(one), str(one)))

    def metrics(self, task: str) -> list[str]:
        """The metrics of a task, its primary metric first."""
        evaluations = [one for run in self.runs for one in run.evaluations if one.task == task]
        names = dict.fromkeys(name for one in evaluations for name in one.values)
        quality = [name for name in names if name not in _NOT_QUALITY]
        first = [name for name in (paper.metric_of(task), *_PRIMARY) if name in quality] or quality
        return list(dict.fromkeys([*first[:1], *names]))

    def of_task(self, task: str) -> list[Group]:
        """The groups that were evaluated on a task, or whose recipe evaluates it."""
        return [one for one in self.groups if any(task in run.tasks for run in one.runs)]

    def table(self, task: str, setting: Setting, metric: str) -> Table:
        """A table with one row for each group that has a final value, in the order of the groups.

        Returns:
            The columns `group`, with its `label`, `size`, `role`, `divergence`, `fraction` and
            `amount`; `values` (`SeedValues`), with `mean`, `error`, `n` (seeds) and `text` ("1.20 ±
            0.10"); `start`, the group from which the students started, with its mean `before`, and
            the mean of the `teacher`; `gain` over `before`, with `gain_error`; `paper` (a
            `paper.Number` or None), with `paper_value`. A number that is not known is NaN.
        """

        def values(group: Group | None) -> SeedValues:
            runs = group.runs if group else ()
            finals = [(run.seed, run.finals.get((task, setting), {})) for run in runs]
            return SeedValues([(seed, final[metric]) for seed, final in finals if metric in final])

        found = {group: some for group in self.of_task(task) if (some := values(group)).n}
        starts = [group.makers.get("student.checkpoint") for group in found]
        before = [values(start) for start in starts]
        gains = [one.over(other) for one, other in zip(found.values(), before, strict=True)]
        numbers = [
            paper.beside(group.first, task, setting, metric, started=start is not None)
            for group, start in zip(found, starts, strict=True)
        ]
        columns = {
            "group": list(found),
            "divergence": [group.method.divergence for group in found],
            **{name: [getattr(group, name) for group in found] for name in _OF_GROUP},
            "values": list(found.values()),
            **{name: [getattr(one, name) for one in found.values()] for name in _OF_VALUES},
            "start": starts,
            "before": [one.mean for one in before],
            "teacher": [values(one.makers.get("teacher.checkpoint")).mean for one in found],
            "gain": [one.mean for one in gains],
            "gain_error": [one.error for one in gains],
            "paper": numbers,
            "paper_value": [one.value if one else math.nan for one in numbers],
        }
        return pd.DataFrame(columns)


def by_size(rows: Table) -> list[tuple[str, Table]]:
    """The student sizes and their rows, the smallest size first and unrecorded ones last."""
    counts = {one.size: one.first.parameters("student") or math.inf for one in rows["group"]}
    sizes = sorted(counts, key=lambda size: (counts[size], size))
    return [(size, rows[rows["size"] == size]) for size in sizes]


def divergence_order(divergence: str) -> tuple[int, str]:
    """A sort key in the paper's order of divergences, from mean-seeking to mode-seeking."""
    return ([*_DIVERGENCES, divergence].index(divergence), divergence)


def _order(group: Group) -> tuple[Any, ...]:
    parameters = group.first.parameters("student") or math.inf
    which = (_ROLES.index(group.role), group.fraction, divergence_order(group.method.divergence))
    return (*which, group.method.alpha or 0.0, group.amount, group.label, parameters)
