"""Groups runs that differ only in the seed.

Runs whose starts and teachers were made by one recipe are repeats of each other, even if each seed
made its own. A checkpoint is therefore identified by the configuration of the run that made it.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math
import re
from typing import Any

from gkd_jax.report.record import Method, Run, as_object, finite, real_path, said


_CHECKPOINT = re.compile(r"(student|teacher.*)\.checkpoint")

_Makers = Mapping[str, Mapping[str, tuple[Run, str]]]
"""Slug -> field of a checkpoint -> the run that made it, and the step; "" is the last step."""


@dataclasses.dataclass(eq=False)
class Group:
    """Runs that differ in nothing but the seed."""

    # The configuration that all runs share. In the place of a checkpoint is the hash of its maker's
    # configuration, and in that of another file the hash of its content.
    identity: dict[str, Any]
    runs: list[Run] = dataclasses.field(default_factory=list)
    # Field of a checkpoint -> the group that made it, and its step there; "" is the last step.
    makers: dict[str, "Group"] = dataclasses.field(default_factory=dict)
    steps: dict[str, str] = dataclasses.field(default_factory=dict)
    made: set[str] = dataclasses.field(default_factory=set)  # fields of which it is the maker
    label: str = ""  # see `labels`

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def role(self) -> str:
        """What SFT is for, "start" or "teacher" of other runs; else the kind of the method."""
        made = self.made if self.method.kind == "sft" else ()
        if "student.checkpoint" in made:
            return "start"
        return "teacher" if any(one.startswith("teacher") for one in made) else self.method.kind

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

    def identity_without(self, *names: str) -> frozenset[tuple[str, Any]]:
        """A value that is equal for groups which differ only in fields that begin with `names`."""
        return frozenset(one for one in _set_fields(self.identity) if not one[0].startswith(names))


def grouped(runs: Sequence[Run]) -> tuple[list[Group], dict[str, str]]:
    """Groups the finished runs.

    Returns:
        The groups, and slug -> reason for each run that is in none of them, because it is
        unfinished or repeats the configuration and the seeds of another run.
    """
    makers = _makers(runs)
    groups: dict[Any, Group] = {}  # by configuration
    kept: dict[Any, Run] = {}  # by configuration and seeds
    group_of: dict[str, Group] = {}
    left_out: dict[str, str] = {}
    # Of runs with the same configuration and seed, the one that was decoded in most ways is kept.
    for run in sorted(runs, key=lambda run: -len(run.finals)):
        if not run.finished:
            left_out[run.slug] = f"unfinished: step {run.last_step:,} of {run.train_steps:,}"
            continue
        identity, seeds = _configuration(run, makers)
        key = _set_fields(identity)
        group_of[run.slug] = groups.setdefault(key, Group(identity))
        if kept.setdefault((key, seeds), run) is run:
            group_of[run.slug].runs.append(run)
        else:
            left_out[run.slug] = f"same configuration and seed as {kept[key, seeds].name}"
    for run in runs:
        for field, (maker, step) in makers[run.slug].items():
            group_of[maker.slug].made.add(field)
            if run.finished:
                group_of[run.slug].makers[field] = group_of[maker.slug]
                group_of[run.slug].steps[field] = step
    return list(groups.values()), left_out


def _checkpoints(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yields (field, path, content) of each model that a run started from or was taught by.

    The model that wrote the training data of SeqKD has the field "data.task". A content is a hash;
    one that was not recorded is equal to no other.
    """
    wrote = as_object(run.about.get("targets_made_by"))
    names = [name for name in run.fields if _CHECKPOINT.fullmatch(name)]
    found = {name: (run.fields[name], run.fields.get(f"contents.{name}")) for name in names}
    found["data.task"] = (wrote.get("checkpoint"), wrote.get("content"))
    for field, (path, content) in found.items():
        if isinstance(path, str):
            yield field, path, said(content or f"{field} of {run.slug}")


def _makers(runs: Sequence[Run]) -> _Makers:
    """Returns the finished runs that made the checkpoints, where they are known.

    A maker is known by the path of the checkpoint, or because another run has such a path to the
    same content.
    """
    finished = {run.folder: run for run in runs if run.finished}
    made: dict[str, tuple[Run, str]] = {}  # by content
    for run in runs:
        for _, path, content in _checkpoints(run):
            folder, _, step = path.partition("/checkpoints/")
            # The path may be that of a link to the folder.
            maker = finished.get(real_path(run.root / folder))
            if maker is not None and maker is not run:
                made.setdefault(content, (maker, step))
    return {
        run.slug: {field: made[one] for field, _, one in _checkpoints(run) if one in made}
        for run in runs
    }


def _configuration(
    run: Run, makers: _Makers, users: Sequence[str] = ()
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Returns what identifies a run's configuration, and the seeds of the run and its makers.

    A checkpoint is identified by the configuration of its maker, else by its content, or else by
    its path. `users` are the slugs of the runs that led here, because damaged records may say that
    two runs made each other's start.
    """
    identity, seeds = dict(run.identity), run.seed
    for field, (maker, step) in makers[run.slug].items():
        if maker.slug not in users:
            made_by, made_with = _configuration(maker, makers, (*users, run.slug))
            text = repr((sorted(_set_fields(made_by)), step))
            identity.pop(field, None)
            identity[field] = hashlib.sha256(text.encode()).hexdigest()
            seeds += made_with
    return identity, seeds


def _set_fields(identity: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """The fields that are not None: older runs lack a field that newer runs leave unset."""
    return frozenset((name, value) for name, value in identity.items() if value is not None)
