"""Labels groups: with the method, and with each field that tells it from others of that method.

On-policy GKD, JSD(0.1) · 1,000 examples · learning rate 0.01 · start sft
"""

from collections.abc import Mapping, Sequence
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
    "teacher.checkpoint": "teacher {}",
}
# The sections of a recipe that labels omit, because their fields are clear without them.
_PLAIN = re.compile(r"\b(method|schedule|train|data|optimizer|rl|contents)\.(?!type$)")


def labels(groups: Sequence[Group]) -> dict[Group, str]:
    """Returns the label of each group, which no other group of its task and size has."""
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        title = _TITLES.get(group.role, group.method.title)
        if group.first.several_tasks:  # it stands in a table of each task
            title = f"{title} · {group.first.several_tasks}"
        alike.setdefault((title, group.first.task), []).append(group)
    found = {}
    for (title, _), members in alike.items():
        rows = _rows(title, members)
        if len(set(rows)) < len(rows):
            rows = _rows(title, members, everything=True)
        for index, group in enumerate(members):
            again = rows[:index].count(rows[index])
            found[group] = rows[index][0] + (f" ({again + 1})" if again else "")
    return found


def _rows(title: str, groups: Sequence[Group], everything: bool = False) -> list[tuple[str, str]]:
    """The label and the size of each group. Fields that differ among groups of a size are named.

    Without `everything` only groups that have a field are compared in it, and the divergence is
    left out, because the title names it.
    """
    values = [{name: repr(one) for name, one in group.identity.items()} for group in groups]
    fields: Any = pd.DataFrame(values)
    fields = (
        fields.fillna("None") if everything else fields.drop(columns=[*_IN_TITLE], errors="ignore")
    )
    differs = fields.groupby([group.size for group in groups]).nunique().max() > 1
    columns = [_texts(name, groups) for name in fields.columns[differs]]
    return [
        (" · ".join([title, *filter(None, texts)]), group.size)
        for group, *texts in zip(groups, *columns, strict=True)
    ]


def _texts(field: str, groups: Sequence[Group]) -> list[str]:
    """What each label says of a field, such as "learning rate 0.001"; "" without the field."""
    values = [said(group.identity.get(field)) for group in groups]
    places = [_place(group, field) for group in groups]
    names = _shortest(dict(zip(values, places, strict=True)))
    words = re.sub("[._]", " ", _PLAIN.sub("", field).removesuffix(".type"))
    phrase = _PHRASES.get(field, f"{words} {{}}")
    if field == "data.task" and any(field in group.makers for group in groups):
        phrase = "targets of {}"
    texts = [phrase.replace("{}", names[value]) for value in values]
    texts = [text.replace("none examples", "all examples") for text in texts]
    return [text if field in one.identity else "" for text, one in zip(texts, groups, strict=True)]


def _place(group: Group, field: str) -> str:
    """The value of a field in words; for a checkpoint the run that made it, or else its path."""
    if field in group.makers:
        run, step = group.makers[field]
        return run.name.partition("-RANDOM_SEED=")[0] + (f" at step {step}" if step else "")
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
