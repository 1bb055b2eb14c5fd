"""Finds the runs that made the starts and the teachers of other runs.

Runs whose starts and teachers were made by one recipe are repeats of each other, even if each seed
made its own: `Makers.configuration` identifies a checkpoint by the configuration of its maker.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import hashlib
import math
from typing import Any, NamedTuple

from gkd_jax.report.record import Run, real_path


class Maker(NamedTuple):
    """The finished run that made a checkpoint, and the step as text; "" is the last step."""

    run: Run
    step: str


class Makers:
    """The makers of the checkpoints that runs started from or were taught by.

    A maker is known by the path of the checkpoint, or because another run has such a path to the
    same content. Otherwise it may be inferred: an archive shortens paths, and studies are moved.

    Attributes:
        of: slug of a run -> field of a checkpoint (`Run.checkpoints`) -> maker, where it is known.
        inferred: the slugs of the runs of which a maker is inferred (`_inferred`).
    """

    def __init__(self, runs: Sequence[Run]):
        finished = [run for run in runs if run.finished]
        folders = {run.folder: run for run in finished}
        known: dict[str, Maker] = {}  # by content
        for run in runs:
            for one in run.checkpoints.values():
                # The path may be that of a link to the folder.
                found = folders.get(real_path(run.root / one.folder))
                if found is not None and found is not run:
                    known.setdefault(one.content, Maker(found, one.step))
        inferred = _inferred(runs, finished, known)
        made = known | inferred
        contents = {
            run.slug: {field: one.content for field, one in run.checkpoints.items()} for run in runs
        }
        self.of = {
            slug: {field: made[content] for field, content in some.items() if content in made}
            for slug, some in contents.items()
        }
        self.inferred = {slug for slug, some in contents.items() if inferred.keys() & some.values()}

    def configuration(
        self, run: Run, users: Sequence[str] = ()
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """Returns what identifies a run's configuration, and the seeds of the run and its makers.

        A checkpoint is identified by the configuration of its maker, else by its content, or else
        by its path. `users` are the slugs of the runs that led here, because damaged records may
        say that two runs made each other's start.
        """
        identity, seeds = dict(run.identity), run.seed
        for field, (maker, step) in self.of[run.slug].items():
            if maker.slug not in users:
                made_by, made_with = self.configuration(maker, (*users, run.slug))
                text = repr((sorted(set_fields(made_by)), step))
                identity.pop(field, None)
                identity[field] = hashlib.sha256(text.encode()).hexdigest()
                seeds += made_with
        return identity, seeds


def set_fields(identity: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """The fields that are not None: older runs lack a field that newer runs leave unset."""
    return frozenset((name, value) for name, value in identity.items() if value is not None)


def _inferred(
    runs: Sequence[Run], finished: Sequence[Run], known: Mapping[str, Maker]
) -> dict[str, Maker]:
    """Content -> its maker, for each content that is not known and that a single run can have made.

    The candidates of all uses of the content have to be one run or copies of it, and may be
    candidates for no other content.
    """
    candidates: dict[str, dict[str, Maker]] = {}  # content -> slug -> maker
    for run in runs:
        for field, (_, step, content) in run.checkpoints.items():
            if content not in known:
                some = {one.slug: Maker(one, step) for one in _candidates(run, field, finished)}
                candidates.setdefault(content, {}).update(some)
    claims = Counter(maker.run.slug for maker in known.values())
    claims.update(slug for some in candidates.values() for slug in some)
    found = {}
    for content, some in candidates.items():
        different = {(set_fields(run.identity), run.seed, step) for run, step in some.values()}
        if len(different) == 1 and all(claims[slug] == 1 for slug in some):
            found[content] = next(iter(some.values()))
    return found


def _candidates(run: Run, field: str, finished: Sequence[Run]) -> list[Run]:
    """The runs that can have made the checkpoint in a field.

    They are of the same archive or RUN_DIR, and one of their name and the checkpoint's path is the
    end of the other. They have as many parameters as the checkpoint, and the last numbers of a
    start are the first numbers of the run. Of several, those with the seed of the run are left.
    """
    path = f"/{run.checkpoints[field].folder}"
    # Of several teachers ("teacher.models.TASK") only the sum of their parameters is recorded.
    size = run.parameters(field.removesuffix(".checkpoint"))
    found = [
        one
        for one in finished
        if one is not run
        and one.root == run.root
        and (path.endswith(f"/{one.name}") or f"/{one.name}".endswith(path))
        and size in (None, one.parameters("student"))
        and (field != "student.checkpoint" or _can_go_on_from(run, one))
    ]
    return [one for one in found if len(found) == 1 or one.seed == run.seed]


def _can_go_on_from(run: Run, maker: Run) -> bool:
    """Whether no number of a run before training differs from the last one of another run."""
    return all(
        name == "teacher_divergence"  # the other run may have had another teacher
        or math.isclose(value, maker.finals[task, setting].get(name, value), rel_tol=1e-4)
        for task, setting, step, values in run.evaluations
        if step == 0 and (task, setting) in maker.finals
        for name, value in values.items()
    )
