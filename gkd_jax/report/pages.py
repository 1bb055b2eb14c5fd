"""Renders the pages of a report as HTML and Markdown. Every text of a run is escaped."""

import base64
from collections.abc import Iterator, Sequence
import functools
import hashlib
import html
import re
from typing import Any

import jinja2
from matplotlib.ticker import MaxNLocator
import numpy as np
import pandas as pd

from gkd_jax.report import answer, paper, plots, samples
from gkd_jax.report.record import Run, finite, said, short_count
from gkd_jax.report.study import Study, Table, by_size


# Title of a training chart -> {metric in metrics.jsonl: name of its curve}.
_CURVES = {
    "gradient norm": {"train/grad_norm": ""},
    "learning rate": {"train/learning_rate": ""},
    "sampled length, tokens": {"train/sample_length": ""},
    "truncated samples, fraction": {"train/truncated_fraction": ""},
    "entropy of the samples, nats": {"train/sample_entropy": ""},
    "reward": {"train/reward": ""},
    "seconds a step": {"time/sample_s": "sampling", "time/update_s": "update"},
}
_WIDTH, _HEIGHT, _POINTS = 320, 120, 200


@functools.cache
def environment() -> jinja2.Environment:
    """The templates; those that end in .html escape every value."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("gkd_jax.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (plots.TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    env.globals.update(script=script, script_hash=digest, style=plots.CSS)
    env.filters.update(md=markdown, said=said)
    return env


def report(study: Study, drawn: dict[str, list[dict[str, str]]]) -> tuple[str, str]:
    """The whole report as one HTML file, and as Markdown with links to figures/ and runs/."""
    tasks = [_task(study, task, drawn.get(task, [])) for task in study.tasks()]
    runs = [(run, _numbers(study, run)) for run in study.runs]
    whole, plain = (environment().get_template(f"report.{end}") for end in ("html", "md"))
    values = {"study": study, "tasks": tasks, "runs": runs}
    return whole.render(values), plain.render(values)


def run_page(run: Run) -> str:
    """The HTML page of one run, with its recipe, curves, evaluations and samples."""
    evaluations: Table = pd.DataFrame(
        {
            "step": "not recorded" if one.step is None else f"{one.step:,}",
            "task": one.task,
            "decoding": str(one.setting),
            **{name: f"{value:.4g}" for name, value in one.values.items()},
        }
        for one in run.evaluations
    )
    rows = evaluations.fillna("").drop_duplicates().to_dict("records")
    charts = [chart for chart in _charts(run) if chart]
    page = environment().get_template("run.html")
    return page.render(run=run, evaluations=rows, charts=charts, samples=list(samples.tables(run)))


def markdown(text: Any) -> str:
    """The text on one line, escaped so that Markdown shows it unchanged."""
    shown_text = html.escape(" ".join(str(text).split()), quote=False)
    shown_text = re.sub(r"([\\`*\[\]|~])", r"\\\1", shown_text)
    # An underscore inside a word is safe, and most names have them.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", shown_text)


def _numbers(study: Study, run: Run) -> list[str]:
    """The first metric of each task in the run's last evaluation of it.

    With them is the step of that evaluation if it is not the last step of the run.
    """
    found: dict[str, tuple[int, str]] = {}  # task -> (step, text)
    for task, _, step, values in run.evaluations:  # those of training come first, and count
        if step is not None and step > found.get(task, (-1, ""))[0]:
            name = next(name for name in study.metrics(task) if name in values)
            when = "" if run.finished and step == run.last_step else f" at step {step:,}"
            found[task] = (step, f"{values[name]:.4g} {name}{when}")
    return [text for _, text in found.values()] or ["not evaluated"]


def _task(study: Study, task: str, figures: Sequence[dict[str, str]]) -> dict[str, Any]:
    metrics, decodings = study.metrics(task), []
    for setting in study.settings(task):
        tables = {name: study.table(task, setting, name) for name in metrics}
        rows = tables[metrics[0]]
        if len(rows):
            # The best method of each size is printed in bold.
            methods = rows[~rows["role"].isin(["start", "teacher"])].groupby("size")["mean"]
            best = methods.transform("max").where(methods.transform("size") > 1)
            rows = rows.assign(best=rows["mean"] == best.reindex(rows.index))
            by_label = {
                label: some.set_index("size").to_dict("index")
                for label, some in rows.groupby("label", sort=False)
            }
            decodings.append(
                {
                    "setting": setting,
                    "answers": list(answer.answers(rows)) if setting.is_main else [],
                    "rows": by_label,
                    "sizes": [size for size, _ in by_size(rows)],
                    "metrics": {name: t.set_index("group") for name, t in tables.items() if len(t)},
                    "groups": list(rows["group"]),
                }
            )
    evaluated = {group for decoding in decodings for group in decoding["groups"]}
    return {
        "name": task,
        "metric": metrics[0] if metrics else "",
        "decodings": decodings,
        "waiting": [group for group in study.of_task(task) if group not in evaluated],
        "figures": figures,
        "recipe": list(_recipe(study, task)),
        "costs": list(_costs(study, task)),
    }


def _recipe(study: Study, task: str) -> Iterator[tuple[str, str, str]]:
    """Tables A.1 to A.4: yields (field, the values of the distillations, the paper's value)."""
    known, tables = paper.task_of(task), paper.content()["hyperparameters"]
    theirs = tables.get("flan" if known in ("mmlu", "bbh") else known, {})
    groups = [one for one in study.of_task(task) if one.role == "distillation"]
    for name in tables["xsum"]:
        values = [said(group.first.fields[name]) for group in groups if name in group.first.fields]
        if values:
            field = name.partition(".")[2].replace("_", " ").replace(".", ", ")
            yield field, "; ".join(dict.fromkeys(values)), theirs.get(name, "")


def _costs(study: Study, task: str) -> Iterator[tuple[str, ...]]:
    """Table A.16, the cost of sampling. Yields the cells of a row for each group.

    The times are medians over on-policy steps, so that slow first steps do not count.
    """
    theirs, names = paper.content()["cost_of_sampling"], ("time/sample_s", "time/update_s")
    known = theirs["slowdown_by_ratio"] if paper.task_of(task) == theirs["task"] else {}
    for group in study.of_task(task):
        lines = [
            line for run in group.runs for line in run.lines if line.get("train/on_policy") == 1
        ]
        times = [[finite(line.get(name)) or 0.0 for name in names] for line in lines]
        sample, update = np.median(times or [[0.0, 0.0]], axis=0)
        student, teacher = (group.first.parameters(role) for role in ("student", "teacher"))
        if sample > 0 and update > 0 and student and teacher:
            ratio = teacher / student
            close = [value for one, value in known.items() if 0.9 < float(one) / ratio < 1.1]
            models = f"{short_count(teacher)} : {short_count(student)} = {ratio:.2g}"
            numbers = (f"{sample:.3g}", f"{update:.3g}", f"{(sample + update) / update:.2f}")
            yield (group.label, models, *numbers, *map(str, close or [""]))


def _charts(run: Run) -> Iterator[dict[str, Any] | None]:
    for name in dict.fromkeys(name for line in run.lines for name in line):
        if name.startswith("eval/"):
            yield _chart(name.removeprefix("eval/"), [("", run.curve(name))])
    losses = ("train/divergence", "train/cross_entropy", "train/loss")
    metric = next((name for name in losses if run.curve(name)), losses[-1])
    own, points = dict(run.curve("train/on_policy")), run.curve(metric)
    curves = [("", points)]
    if len(set(own.values())) > 1:
        parts = (("own samples", 1.0), ("dataset", 0.0))
        curves = [(name, [p for p in points if own.get(p[0]) == want]) for name, want in parts]
    yield _chart(metric.removeprefix("train/").replace("_", " ") + ", nats a token", curves)
    for title, metrics in _CURVES.items():
        yield _chart(title, [(name, run.curve(metric)) for metric, name in metrics.items()])


def _chart(title: str, curves: Sequence[tuple[str, Any]]) -> dict[str, Any] | None:
    """A small chart as SVG paths of (_WIDTH, _HEIGHT) pixels; None if no curve has two points.

    Each curve is its name and its points (step, value).
    """
    found = [(name, np.array(points)) for name, points in curves if len(points) > 1]
    if not found:
        return None
    every = np.concatenate([points for _, points in found])
    spikes = 0.005 if len(every) > 100 else 0.0  # a few outliers must not flatten the rest
    low, high = np.quantile(every[:, 1], [spikes, 1 - spikes])
    ticks = MaxNLocator(4).tick_values(low, high if high > low else low + (abs(low) or 1.0))
    left, right = every[:, 0].min(), every[:, 0].max()
    paths = []
    for name, points in found:
        # More than _POINTS cannot be told apart: draw the mean of each stretch of the curve.
        parts = np.array_split(points, min(len(points), _POINTS))
        means = np.array([part.mean(axis=0) for part in parts])
        xs = (means[:, 0] - left) / (right - left) * _WIDTH
        ys = _HEIGHT * (1 - (means[:, 1].clip(low, high) - ticks[0]) / (ticks[-1] - ticks[0]))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        paths.append((name, path, f"{points[-1, 1]:.4g}"))
    places = [(f"{tick:.4g}", _HEIGHT * (1 - i / (len(ticks) - 1))) for i, tick in enumerate(ticks)]
    return {"title": title, "paths": paths, "ticks": places, "left": left, "right": right}
