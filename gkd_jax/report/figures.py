"""Chooses which runs make which figure of the paper. A figure needs at least two points."""

from collections.abc import Iterator, Sequence
import math
import pathlib
import re
from typing import Any, NamedTuple

import pandas as pd

from gkd_jax.report import paper, plots
from gkd_jax.report.groups import Group
from gkd_jax.report.plots import COLOURS, Panel
from gkd_jax.report.record import Setting, divergence_name, said
from gkd_jax.report.study import Study, Table, by_size
from gkd_jax.text import files


_REWARDS = ("entailed", "entailment", "exact_answer", "brevity", "reward")
_LEAST_CELLS = 6  # cells of a map; the bars show fewer of them better
_SERIES = ("accent", "warm", "jsd_0_5", "total_variation", "jsd_0_1", "grey")
_POINTS = 25  # of a curve over steps, at most
_MAPS = ("Fig. 6", "Fig. 7", "Fig. A.12", "Fig. A.13", "Fig. A.14")


class _Sketch(NamedTuple):
    """A figure that is not drawn yet."""

    name: str  # of its file, after the task's name
    title: str
    caption: str
    draw: plots.Draw
    panels: Sequence[Panel]
    x: str = ""  # the names of the axes
    y: str = ""


def draw(study: Study, folder: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """Draws every figure that the study can show.

    Returns:
        Task -> its figures, in the paper's order, each with `file` (the name of a PNG in `folder`),
        `title`, `caption` and the SVGs `wide` and `narrow`.
    """
    drawn: dict[str, list[dict[str, str]]] = {}
    used: list[str] = []
    for task, sketch in _sketches(study):
        if not sketch.panels:
            continue
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{task}_{sketch.name}").lower()
        used.append(stem)
        name = f"{stem}_{used.count(stem)}" if used.count(stem) > 1 else stem
        png, wide, narrow = plots.render(sketch.draw, sketch.panels, sketch.x, sketch.y)
        files.write_whole(folder / f"{name}.png", png)
        figure = {"file": f"{name}.png", "title": sketch.title, "caption": sketch.caption}
        drawn.setdefault(task, []).append({**figure, "wide": wide, "narrow": narrow})
    return drawn


def _sketches(study: Study) -> Iterator[tuple[str, _Sketch]]:
    """Yields (task, sketch) of every figure; one that the study cannot show has no panels."""
    for task in study.tasks():
        metric = next(iter(study.metrics(task)), "")
        for setting in (one for one in study.settings(task) if one.is_main):
            rows = study.table(task, setting, metric)
            sketches = [*_bars(rows, metric), *_maps(rows, task, setting, metric)]
            sketches += [_lambda(rows, metric), _data(rows, metric)]
            for sketch in (*sketches, _rl(study, task, setting, metric)):
                about = f"{sketch.caption} {task}, {metric}, {setting}."
                yield task, sketch._replace(caption=about)
        yield task, _diversity(study, task, metric)
        yield task, _rewards(study, task)


def _panel(rows: Table, ticks: Sequence[tuple[int, str]] = ()) -> Panel:
    """A panel titled with the size, the common parts of all labels and the student's start."""
    parts = [label.split(" · ")[1:] for label in rows["label"]]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    before = _common(rows["before"])
    shared += [] if math.isnan(before) else [f"student before {before:.1f}"]
    return Panel(", ".join([rows["size"].iloc[0], *shared]), rows, ticks=ticks)


def _common(column: Any) -> float:
    """The number that is in all rows of a column where one is known; NaN if they differ."""
    values = column.dropna().unique()
    return values[0] if len(values) == 1 else math.nan


def _lines(rows: Table, line: Any, x: Any, colour: Any) -> Table:
    """Rows for `plots.curves`, with the paper's points if it has at least two of a line."""
    ours = rows.assign(line=line, x=x, y=rows["mean"], colour=colour, dashed=False, note="")
    known = ours.dropna(subset="paper_value")
    known = known[known["line"].duplicated(keep=False)]
    return pd.concat([ours, known.assign(y=known["paper_value"], error=math.nan, dashed=True)])


def _across(study: Study, task: str, setting: Setting, x: str, y: str) -> Table:
    """The rows of the metric `y` in `Study.table`, with `x` and `before` of the metric `x`."""
    rows, across = study.table(task, setting, y), study.table(task, setting, x).set_index("group")
    x_of, before_of = (rows["group"].map(across[name]) for name in ("mean", "before"))
    return rows.assign(x=x_of, before=before_of).dropna(subset="x")


def _bars(rows: Table, metric: str) -> Iterator[_Sketch]:
    """Figs. 1, 2, 9, A.10, A.11 and A.15: bars of every method."""
    caption = (
        "Every method: mean over seeds, in brackets the improvement over the student before, "
        "whiskers of one standard error; as in Figs. 1, 2, 9, A.10, A.11 and A.15 of the paper."
    )
    for size, methods in by_size(rows[~rows["role"].isin(["start", "teacher"])]):
        bars = methods.assign(colour=methods["group"].map(_shade))
        panel = Panel("", bars, _common(methods["teacher"]))
        if len(methods) > 1:
            yield _Sketch("methods", f"Methods, {size}", caption, plots.bars, [panel], metric)


def _shade(group: Group) -> str:
    """The colour of a bar: the darker, the more a method trains on the student's own samples."""
    mix = ("pale", "middle", "accent")[(group.fraction > 0) + (group.fraction >= 1)]
    return COLOURS[{"distillation": mix, "seqkd": "grey", "rl": "warm"}.get(group.role, "light")]


def _grids(rows: Table) -> Iterator[Table]:
    """Yields grids of divergence and lambda, which rises: rows that differ in nothing else."""
    scheduled = rows["group"].map(lambda group: isinstance(group.method.fraction, str))
    rows = rows[(rows["role"] == "distillation") & ~scheduled]
    free = ("method.divergence", "method.on_policy_fraction")
    alike = rows["group"].map(lambda group: group.identity_without(*free))
    yield from (grid for _, grid in rows.groupby(alike, sort=False))


def _maps(rows: Table, task: str, setting: Setting, metric: str) -> Iterator[_Sketch]:
    """Figs. 6, 7 and A.12 to A.14: maps over divergence and lambda, beside those of the paper."""
    caption = (
        "Rows: the share λ of steps on the student's own samples; the best is bold; a row "
        "or column that would be half empty is in the figure of methods only; as in Figs. 6, 7, "
        "and A.12 to A.14 of the paper."
    )
    for grid in _grids(rows):
        for one, other in (("fraction", "divergence"), ("divergence", "fraction")):
            filled = grid.groupby(one)[one].transform("size")
            grid = grid[filled * 2 >= grid[other].nunique()]
        if len(grid) < _LEAST_CELLS or grid[["divergence", "fraction"]].nunique().min() < 2:
            continue
        signed = bool(grid["gain"].notna().all())
        if signed:
            grid = grid.assign(mean=grid["gain"], error=grid["gain_error"])
        where = paper.cell(grid["group"].iloc[0].first, task, metric)
        panels = [_panel(grid.assign(signed=signed))]
        panels += _paper_map(where, setting, signed) if where else []
        what = "Improvement over the student before" if signed else "Value"
        title = f"{what} by divergence and λ"
        yield _Sketch("divergence_lambda", title, caption, plots.heat_map, panels)


def _paper_map(where: paper.Cell, setting: Setting, signed: bool) -> Iterator[Panel]:
    numbers = paper.matching(where, setting, any_of=("method", "sampling_temperature"))
    numbers = [one for one in numbers if one.figure in _MAPS and not (signed and one.gain is None)]
    if numbers:
        values = [one.gain if signed else one.value for one in numbers]
        methods = pd.DataFrame(one.cell.method for one in numbers)
        cells = methods.assign(mean=values, error=math.nan, signed=signed)
        yield Panel(f"{where.size}, the paper ({numbers[0].figure})", cells)


def _lambda(rows: Table, metric: str) -> _Sketch:
    """Fig. 8: curves over lambda."""
    panels, ticks = [], [(x, f"{x}%") for x in (0, 25, 50, 75, 100)]
    for grid in _grids(rows):
        points: Table = grid.groupby("divergence")["divergence"].transform("size")
        grid = grid[points > 1]
        if points.max() > 2:  # a line of two points shows no more than the bars
            names, colours = (grid["divergence"].map(of) for of in (divergence_name, plots.colour))
            panels.append(_panel(_lines(grid, names, 100 * grid["fraction"], colours), ticks))
    caption = "Whiskers of one standard error; as in Fig. 8 of the paper."
    title, x = "From fixed data to own samples", "λ: steps on the student's own samples"
    return _Sketch("lambda", title, caption, plots.curves, panels, x, metric)


def _data(rows: Table, metric: str) -> _Sketch:
    """Fig. 3: curves over the number of training examples."""
    rows = rows[rows["role"].isin(["distillation", "seqkd", "sft"])]
    alike = rows["group"].map(lambda group: group.identity_without("data.num_examples"))
    rows = rows[alike.duplicated(keep=False)].sort_values("amount", kind="stable")
    amounts = sorted(rows["amount"].unique())
    ticks = [(i, "all" if a == math.inf else f"{a:,.0f}") for i, a in enumerate(amounts)]
    panels = []
    for _, here in by_size(rows):
        lines = here["label"].str.replace(r" · [\w,]+ examples", "", regex=True)
        drawn = _lines(here, lines, here["amount"].map(amounts.index), _series(lines))
        panels.append(_panel(drawn, ticks))
    caption = "On-policy methods use their inputs only; as in Fig. 3 of the paper."
    x = "training examples"
    return _Sketch("data", "Less data", caption, plots.curves, panels, x, metric)


def _series(lines: Any) -> list[str]:
    """A colour for each of some names, the same one for equal names."""
    return [COLOURS[_SERIES[index % len(_SERIES)]] for index in pd.factorize(lines)[0]]


def _rl(study: Study, task: str, setting: Setting, metric: str) -> _Sketch:
    """Fig. 5: RL + GKD, the reward over the task's metric for each alpha."""
    reward = next((name for name in _REWARDS if name in study.metrics(task)), "")
    rows = _across(study, task, setting, metric, reward)
    rows = rows[rows["role"] == "rl"]
    notes = [f"alpha {said(group.method.alpha)}" for group in rows["group"]]
    rows = _lines(rows, "RL + GKD", rows["x"], COLOURS["accent"]).assign(note=notes)
    panels = [_panel(one) for _, one in by_size(rows) if len(one) > 1]
    caption = "alpha weighs distillation, 1 - alpha the reward; as in Fig. 5 of the paper."
    title, y = "Reward and teacher", reward.replace("_", " ")
    return _Sketch("rl_alpha", title, caption, plots.curves, panels, metric, y)


def _diversity(study: Study, task: str, metric: str) -> _Sketch:
    """Fig. 4: quality over Self-BLEU for every group sampled at two temperatures or more."""
    found = [
        _across(study, task, one, "self_bleu", metric).assign(temperature=one.temperature)
        for one in study.settings(task)
        if one.decoding == "sample"
    ]
    rows: Table = pd.concat(found) if found else pd.DataFrame({"group": []})
    rows = rows[rows["group"].duplicated(keep=False)].reset_index(drop=True)
    panels = []
    for size, here in by_size(rows):
        here = here.sort_values(["label", "temperature"], kind="stable")
        lines = _lines(here, here["label"], here["x"], here["divergence"].map(plots.colour))
        theirs = [one.self_bleu if one else math.nan for one in lines["paper"]]
        x = lines["x"].where(~lines["dashed"], pd.Series(theirs, lines.index))
        notes = [f"T {temperature:g}" for temperature in lines["temperature"]]
        panels.append(Panel(size, lines.assign(x=x, note=notes)))
    caption = f"{task}. T: of the samples; 100 is no diversity; as in Fig. 4 of the paper."
    title, x = "Quality and diversity", "Self-BLEU (lower is more diverse)"
    return _Sketch("quality_diversity", title, caption, plots.curves, panels, x, metric)


def _rewards(study: Study, task: str) -> _Sketch:
    """RL and RL + GKD: curves of the samples' reward over the steps of training."""
    points = [
        (group, group.size, group.label, step, reward)
        for group in study.of_task(task)
        if group.role == "rl"
        for run in group.runs
        for step, reward in run.curve("train/reward")
    ]
    rows: Table = pd.DataFrame(points, columns=pd.Index(["group", "size", "line", "x", "reward"]))
    panels = []
    for size, found in by_size(rows):
        by_step = found.groupby(["line", "x"], sort=False)["reward"]
        lines = by_step.agg(y="mean", error="sem").reset_index()
        steps = sorted(lines["x"].unique())
        if len(steps) > 1:
            drawn = lines[lines["x"].isin(steps[:: math.ceil(len(steps) / _POINTS)])]
            colours = _series(drawn["line"])
            panels.append(Panel(size, drawn.assign(colour=colours, dashed=False, note="")))
    caption = f"{task}. The mean over the samples of a step; whiskers of one standard error."
    title, y = "Reward of the samples", "reward"
    return _Sketch("reward_steps", title, caption, plots.curves, panels, "step", y)
