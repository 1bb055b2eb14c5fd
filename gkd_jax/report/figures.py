"""All figures that a study can show, in the paper's order.

A figure is drawn where the runs give it two points. What is missing inside stays empty.
"""

import pathlib
import re
from typing import Any, NamedTuple

from gkd_jax.report import canvas, comparisons, curves
from gkd_jax.report.results import Study, View


_OF_ONE_SETTING = (
    comparisons.bars,
    comparisons.heat_maps,
    curves.lambda_curves,
    curves.data_fraction,
    curves.rl,
    comparisons.self_distillation,
)


class Figure(NamedTuple):
    """A figure that was drawn: its file's name below figures/, a title and what it shows."""

    file: str
    title: str
    caption: str


def draw(study: Study, folder: pathlib.Path) -> dict[str, list[Figure]]:
    """Draws all that the study can show into `folder`; task -> its figures in the paper's order.

    Figures of several tasks (A.11) stand under the first of them.
    """
    drawn: dict[str, list[Figure]] = {}
    used: set[str] = set()

    def add(task: str, name: str, figure: Any, title: str, caption: str) -> None:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{task}_{name}").lower()
        unique, number = stem, 2
        while unique in used:
            unique, number = f"{stem}_{number}", number + 1
        used.add(unique)
        canvas.save(figure, folder / f"{unique}.png")
        drawn.setdefault(task, []).append(Figure(f"{unique}.png", title, caption))

    with canvas.style():
        for task in study.tasks():
            metrics = study.metrics(task)
            if not metrics:
                continue
            for setting in study.settings(task):
                about = f"{task}, {metrics[0]}, {setting}."
                view = View(study, task, setting, metrics[0])
                if setting.is_main:
                    for kind in _OF_ONE_SETTING:
                        for name, figure, title, caption in kind(view):
                            add(task, name, figure, title, f"{caption} {about}")
            for name, figure, title, caption in curves.quality_diversity(study, task, metrics[0]):
                add(task, name, figure, title, caption)
        for task, name, figure, title, caption in comparisons.instructions(study):
            add(task, name, figure, title, caption)
    return drawn
