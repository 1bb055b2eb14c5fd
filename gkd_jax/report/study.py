"""`Study`: groups runs that differ only in the seed, and makes tables of their means."""

from collections.abc import Iterable, Sequence
import dataclasses
import math
from typing import Any

import pandas as pd

from gkd_jax.report import paper
from gkd_jax.report.makers import Maker, Makers, set_fields
from gkd_jax.report.record import Method, Run, Setting, finite, said
from gkd_jax.report.seed_values import SeedValues


# The primary metric of a task is the paper's, or else the first of these that the task has.
_PRIMARY = ("rouge2", "bleu", "accuracy", "exact_match", "accuracy_with_calculator")
# Metrics that describe a student, but do not say how good it is.
_NOT_QUALITY = ("teacher_divergence", "self_bleu", "entailment", "entailed", "brevity")
_DIVERGENCES = ("forward_kl", "jsd(0.1)", "jsd(0.5)", "jsd(0.9)", "reverse_kl")
_DIVERGENCES += ("total_variation", "")
_ROLES = ("teacher", "start", "sft", "seqkd", "distillation", "rl", "unknown")
_TITLES = {"start": "Student before", "teacher": "Teacher"}
_IN_TITLE = tuple(f"method.divergence{field}" for field in ("", ".type", ".beta"))
# Sections of a recipe that labels omit, because their fields are clear without them.
_PLAIN = ("method", "schedule", "train", "data", "optimizer", "rl", "contents")
# What labels say after the value of a field, or instead of its name.
_UNITS = {"data.num_examples": "examples", "train.train_steps": "steps"}
_SHORT = {"student.checkpoint": "start", "teacher.checkpoint": "teacher"}
# Columns of `Study.table`; the first ones are properties of the group.
_OF_GROUP = ("label", "size", "role", "fraction", "amount")
_COLUMNS = ("group", *_OF_GROUP, "divergence", "values", "mean", "error", "n", "text")
_COLUMNS += ("gain", "gain_error", "paper", "paper_value")

Table = Any  # a pandas.DataFrame, whose columns no type checker knows


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        runs: the runs, at least one, with different seeds.
        identity: the configuration that all runs share (`Makers.configuration`).
        makers: field -> maker of the first run's checkpoint; the maker is the first of its group.
        role: "start" or "teacher" for SFT from which other runs start or by which they are taught,
            else the kind of the method.
        label: the name of the method, and the fields that tell it from others of that name.
    """

    runs: tuple[Run, ...]
    identity: dict[str, Any]
    makers: dict[str, Maker]
    role: str
    label: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def method(self) -> Method:
        return self.first.method

    @property
    def size(self) -> str:
        return self.first.size("student") or "size not recorded"

    @property
    def fraction(self) -> float:
        """The paper's lambda; 0.5 if it follows a schedule."""
        return 0.5 if isinstance(self.method.fraction, str) else self.method.fraction

    @property
    def amount(self) -> float:
        """The number of training examples; infinite without a limit."""
        return finite(self.first.fields.get("data.num_examples")) or math.inf

    def place(self, field: str) -> str | None:
        """The run or the path behind a field whose value is a hash or a path; else None."""
        if field in self.makers:
            run, step = self.makers[field]
            return run.name.partition("-RANDOM_SEED=")[0] + (f" at step {step}" if step else "")
        if field.startswith("contents."):
            return field.removeprefix("contents.")
        if field.endswith(".checkpoint") or f"contents.{field}" in self.first.fields:
            return str(self.first.fields.get(field) or "").replace("/checkpoints/", " at step ")
        return None

    def identity_without(self, *names: str) -> frozenset[tuple[str, Any]]:
        """A value that is equal for groups which differ only in fields that begin with `names`."""
        return frozenset(one for one in set_fields(self.identity) if not one[0].startswith(names))


class Study:
    """All runs of a report, grouped.

    Attributes:
        runs: all runs.
        groups: the groups that tables and figures show, in the order of their rows.
        left_out: slug -> reason, for each run that is in no group.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = tuple(runs)
        makers = Makers(runs)
        self.left_out: dict[str, str] = {}
        repeats: dict[Any, dict[Any, Run]] = {}  # configuration -> seeds -> run
        firsts: dict[str, Run] = {}  # slug -> the first run of the same configuration
        # Of runs with the same configuration and seed, keep the one decoded in the most ways.
        for run in sorted(runs, key=lambda run: -len(run.finals)):
            if not run.finished:
                reason = f"unfinished: step {run.last_step:,} of {run.train_steps:,}"
                self.left_out[run.slug] = reason
                continue
            identity, seeds = makers.configuration(run)
            alike = repeats.setdefault(set_fields(identity), {})
            held = alike.setdefault(seeds, run)
            firsts[run.slug] = next(iter(alike.values()))
            if held is not run:
                self.left_out[run.slug] = f"same configuration and seed as {held.name}"
        made = [  # (slug of a run, field in which another run has its checkpoint)
            (firsts[maker.run.slug].slug, field)
            for of_run in makers.of.values()
            for field, maker in of_run.items()
        ]
        roles = {slug: "teacher" for slug, field in made if field.startswith("teacher")}
        roles |= {slug: "start" for slug, field in made if field == "student.checkpoint"}
        groups = []
        for first, *others in (alike.values() for alike in repeats.values()):
            kind, of_first = first.method.kind, makers.of[first.slug].items()
            group = Group(
                runs=(first, *others),
                identity=makers.configuration(first)[0],
                makers={of: Maker(firsts[run.slug], step) for of, (run, step) in of_first},
                role=roles.get(first.slug, kind) if kind == "sft" else kind,
            )
            groups.append(group)
        self.groups = _labelled(groups)
        self._of_first = {group.first.slug: group for group in self.groups}

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

    def parent(self, group: Group, role: str) -> Group | None:
        """The group whose checkpoint is the start ("student") or the teacher of this one."""
        maker = group.makers.get(f"{role}.checkpoint")
        return None if maker is None else self._of_first[maker.run.slug]

    def table(self, task: str, setting: Setting, metric: str) -> Table:
        """A table with one row for each group that has a final value, in the order of the groups.

        Returns:
            The columns `group`, with its `label`, `size`, `role`, `divergence`, `fraction` and
            `amount`; `values` (`SeedValues`), with `mean`, `error`, `n` (seeds) and `text` ("1.20 ±
            0.10"); `gain` over the student before, with `gain_error`; `paper` (a `paper.Number` or
            None), with `paper_value`. A number that is not known is NaN.
        """
        rows = []
        for group in self.of_task(task):
            start = self.parent(group, "student")
            found, before = (_values(one, task, setting, metric) for one in (group, start))
            gain = found.over(before)
            known = paper.beside(group.first, task, setting, metric, started=start is not None)
            row: dict[str, Any] = {
                "group": group,
                **{name: getattr(group, name) for name in _OF_GROUP},
                "divergence": group.method.divergence,
                "values": found,
                "mean": found.mean,
                "error": found.error,
                "n": len(found),
                "text": str(found),
                "gain": gain.mean,
                "gain_error": gain.error,
                "paper": known,
                "paper_value": known.value if known else math.nan,
            }
            rows += [row] if len(found) else []
        return pd.DataFrame(rows, columns=pd.Index(_COLUMNS))


def _values(group: Group | None, task: str, setting: Setting, metric: str) -> SeedValues:
    runs = group.runs if group else ()
    finals = [(run.seed, run.finals.get((task, setting), {})) for run in runs]
    return SeedValues([(seed, final[metric]) for seed, final in finals if metric in final])


def sizes(groups: Iterable[Group]) -> list[str]:
    """The student sizes of the groups, the smallest first and the unrecorded ones last."""
    counts = {group.size: group.first.parameters("student") or math.inf for group in groups}
    return sorted(counts, key=lambda size: (counts[size], size))


def divergence_order(divergence: str) -> tuple[int, str]:
    """A sort key in the paper's order of divergences, from mean-seeking to mode-seeking."""
    return ([*_DIVERGENCES, divergence].index(divergence), divergence)


def _labelled(groups: list[Group]) -> list[Group]:
    """Sorts the groups and labels each with its title and the fields that tell it from others.

    The fields are those that differ among groups of the same title, task and size.
    """
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        title = _TITLES.get(group.role, group.method.title)
        if group.first.several_tasks:  # it stands in a table of each task
            title = f"{title} · {group.first.several_tasks}"
        alike.setdefault((title, group.first.task), []).append(group)
    labelled = []
    for (title, _), members in alike.items():
        rows: list[tuple[str, str]] = []
        for everything in (False, True):  # name every difference only if two labels are equal
            columns = [_said(name, members) for name in _differing(members, everything)]
            parts = zip([title] * len(members), *columns, strict=True)
            labels = [" · ".join(dict.fromkeys(some)) for some in parts]
            rows = [(label, group.size) for label, group in zip(labels, members, strict=True)]
            if len(set(rows)) == len(rows):
                break
        for index, group in enumerate(members):
            again = rows[:index].count(rows[index])
            label = rows[index][0] + (f" ({again + 1})" if again else "")
            labelled.append(dataclasses.replace(group, label=label))
    return sorted(labelled, key=_order)


def _differing(groups: Sequence[Group], everything: bool) -> list[str]:
    """The names of the fields that differ among groups of the same size.

    Without `everything` only groups that have a field are compared in it, and the divergence is
    left out, because the title names it.
    """
    fields: Table = pd.DataFrame(
        [{name: repr(value) for name, value in group.identity.items()} for group in groups]
    )
    fields = fields.fillna(repr(None)) if everything else fields
    values = fields.groupby([group.size for group in groups]).nunique().max()
    return [name for name in fields if values[name] > 1 and (everything or name not in _IN_TITLE)]


def _said(name: str, groups: Sequence[Group]) -> list[str]:
    """One field of the label of each group, such as "learning rate 0.001"."""
    values = [said(group.identity.get(name)) for group in groups]
    if name in _UNITS:
        return [f"{value.replace('none', 'all')} {_UNITS[name]}" for value in values]
    places = [group.place(name) for group in groups]
    if places == [None] * len(groups):
        values = [value.replace("_", " ") for value in values]
    else:
        pairs = zip(places, values, strict=True)
        values = _shortest([place or value[:8] for place, value in pairs], values)
    section, _, field = _SHORT.get(name, name).rpartition(".")
    if name == "data.task" and any(name in group.makers for group in groups):
        field = "targets of"
    kept = [word for word in section.split(".") if word not in _PLAIN or field == "type"]
    words = " ".join([*kept, *([] if field == "type" else [field])]).replace("_", " ")
    return [f"{words} {value}".strip() for value in values]


def _shortest(places: Sequence[str], contents: Sequence[str]) -> list[str]:
    """The last parts of places, or else all of them, or else the hashes of their contents.

    The first of these is taken that has one text for each content, and another for another.
    """
    for texts in ([place.rpartition("/")[2] for place in places], list(places)):
        if len(set(texts)) == len(set(contents)) == len({*zip(texts, contents, strict=True)}):
            return texts
    return [content[:8] for content in contents]


def _order(group: Group) -> tuple[Any, ...]:
    parameters = group.first.parameters("student") or math.inf
    which = (_ROLES.index(group.role), group.fraction, divergence_order(group.method.divergence))
    return (*which, group.method.alpha or 0.0, group.amount, group.label, parameters)
