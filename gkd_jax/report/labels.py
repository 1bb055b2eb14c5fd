"""Labels groups: with the method, and with each field that tells it from others of that method.

On-policy GKD, JSD(0.1) · 1,000 examples · learning rate 0.01 · start sft
"""

from collections.abc import Iterable, Mapping, Sequence
import re
from typing import Any

import pandas as pd

from gkd_jax.report.groups import Group
from gkd_jax.report.record import said


_TITLES = {"start": "Student before", "teacher": "Teacher"}
_IN_TITLE = tuple(f"method.divergence{field}" for field in ("", ".type", ".beta"))
_PHRASES = {
    "data.num_examples": "{} examples",
    "train.train_steps": "{} steps",
    "student.checkpoint": "start {}",
}
# Parts of the names of fields that labels omit: sections whose fields are clear without them, and
# endings that say nothing.
_OMITTED = re.compile(
    r"\b(method|schedule|train|data|optimizer|rl|contents)\.(?!type$)|\.(type|checkpoint)$"
)


def label(groups: Iterable[Group]) -> None:
    """Sets the label of each group, which no other group of its size has in a table of a task."""
    alike: list[tuple[set[Any], list[Group]]] = []  # the titles in tables, and who has them
    for group in groups:
        group.label = _TITLES.get(group.role, group.method.title)
        if group.first.several_tasks:  # it stands in a table of each task
            group.label += f" · {group.first.several_tasks}"
        titles = {(group.label, task) for run in group.runs for task in run.tasks or [None]}
        members = [group]
        for part in [one for one in alike if one[0] & titles]:
            alike.remove(part)
            titles, members = part[0] | titles, part[1] + members
        alike.append((titles, members))
    for _, members in alike:
        for field in _differing(members):
            having = [group for group in members if field in group.identity]
            for group, text in zip(having, _texts(field, having), strict=True):
                group.label += f" · {text}"
        rows = [(group.label, group.size) for group in members]
        for group, row in zip(members, rows, strict=True):
            group.label += f" · run {group.first.name}" if rows.count(row) > 1 else ""


def _differing(groups: Sequence[Group]) -> list[str]:
    """The fields, except the divergence, that differ among groups of a size which have them."""
    fields: Any = pd.DataFrame(
        [{name: repr(value) for name, value in group.identity.items()} for group in groups]
    )
    values = fields.groupby([group.size for group in groups]).nunique().max()
    return [name for name in fields if values[name] > 1 and name not in _IN_TITLE]


def _texts(field: str, groups: Sequence[Group]) -> list[str]:
    """What each label says of a field, such as "learning rate 0.001"."""
    names = _shortest({said(group.identity[field]): _place(group, field) for group in groups})
    words = re.sub("[._]", " ", _OMITTED.sub("", field))
    phrase = _PHRASES.get(field, f"{words} {{}}")
    if field == "data.task" and any(field in group.makers for group in groups):
        phrase = "targets of {}"
    texts = [phrase.replace("{}", names[said(group.identity[field])]) for group in groups]
    return [text.replace("none examples", "all examples") for text in texts]


def _place(group: Group, field: str) -> str:
    """The value of a field in words; for a checkpoint the run that made it, or else its path."""
    if field in group.makers:
        step = f" at step {group.steps[field]}" if group.steps[field] else ""
        return group.makers[field].first.name.partition("-RANDOM_SEED=")[0] + step
    if field.startswith("contents."):
        return field.removeprefix("contents.")
    return said(group.first.fields.get(field)).replace("/checkpoints/", " at step ")


def _shortest(places: Mapping[str, str]) -> Mapping[str, str]:
    """What tells values apart: the last parts of their places, else the places, else the values.

    A value that is no path stands in the place of itself. Other values are hashes.
    """
    last = {one: one if one == place else place.rpartition("/")[2] for one, place in places.items()}
    hashes = {value: value[:8] for value in places}
    return next((some for some in (last, places) if len({*some.values()}) == len(some)), hashes)
