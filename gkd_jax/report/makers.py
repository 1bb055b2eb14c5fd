"""Finds the runs that made the starts and the teachers of other runs.

Runs whose starts and teachers were made by one recipe are repeats of each other, even if each seed
made its own: `Makers.configuration` identifies a checkpoint by the configuration of its maker.
"""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any, NamedTuple

from gkd_jax.report.record import Run, real_path


class Maker(NamedTuple):
    """The finished run that made a checkpoint, and the step as text; "" is the last step."""

    run: Run
    step: str


class Makers:
    """The makers of the checkpoints that runs started from or were taught by.

    A maker is known by the path of the checkpoint, or because another run has such a path to the
    same content.

    Attributes:
        of: slug of a run -> field of a checkpoint (`Run.checkpoints`) -> maker, where it is known.
    """

    def __init__(self, runs: Sequence[Run]):
        finished = {run.folder: run for run in runs if run.finished}
        by_content: dict[str, Maker] = {}
        for run in runs:
            for one in run.checkpoints.values():
                # The path may be that of a link to the folder.
                found = finished.get(real_path(run.root / one.folder))
                if found is not None and found is not run:
                    by_content.setdefault(one.content, Maker(found, one.step))
        self.of = {
            run.slug: {
                field: by_content[one.content]
                for field, one in run.checkpoints.items()
                if one.content in by_content
            }
            for run in runs
        }

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
