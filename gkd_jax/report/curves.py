"""Curves and trade-offs: lambda, amount of data, temperature, alpha."""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any

from gkd_jax.report import canvas, paper, plots, results
from gkd_jax.report.comparisons import Drawn, shade
from gkd_jax.report.plots import Line, LinePanel
from gkd_jax.report.record import divergence_name
from gkd_jax.report.results import Cell, Group, Study, View


_REWARD_METRICS = ("entailment", "reward")


def lambda_curves(view: View) -> Iterator[Drawn]:
    """Fig. 8."""
    groups = results.grid(view.groups)
    for temperature in sorted({group.teacher_temperature for group in groups}):
        panels = []
        for size in results.sizes(groups):
            here = [g for g in groups if g.size == size and g.teacher_temperature == temperature]
            lines = []
            for divergence in sorted({g.divergence for g in here}, key=results.divergence_order):
                points = {g.fraction: view.cell(g) for g in here if g.divergence == divergence}
                xs = sorted(points)
                name = divergence_name(divergence)
                colour = canvas.DIVERGENCE_COLOURS.get(divergence, canvas.GREY)
                if len(xs) >= 2:
                    ys = [cell for x in xs if (cell := points[x])]
                    lines.append(Line(name, [100 * x for x in xs], ys, colour))
                    lines += _paper_curve(view, size, divergence, name, colour)
            if lines:
                ticks = [(x, f"{x}%") for x in (0, 25, 50, 75, 100)]
                panels.append(LinePanel(size, lines, ticks, view.start(size)))
        if panels:
            figure = plots.curves(
                panels, x_label="λ: steps on the student's own samples", y_label=view.metric
            )
            caption = "Whiskers of one standard error; as in Fig. 8 of the paper."
            yield "lambda", figure, "From fixed data to the student's own samples", caption


def _paper_curve(view: View, size: str, divergence: str, name: str, colour: str) -> Iterator[Line]:
    points = {
        number.on_policy_fraction: number.value
        for number in paper.NUMBERS
        if (number.figure, number.task) == ("Fig. 8", paper.task_of(view.task))
        and (number.size, number.method) == (size.split(" ")[0], divergence)
        and view.setting.decoding in (None, number.decoding)
    }
    if points:
        xs = sorted(points)
        ys = [Cell(points[x], None, 1) for x in xs]
        yield Line(f"{name}, the paper", [100 * x for x in xs], ys, colour, dashed=True)


def data_fraction(view: View) -> Iterator[Drawn]:
    """Fig. 3."""
    alike: dict[Any, list[Group]] = {}
    for group in view.groups:
        if group.kind in ("distillation", "seqkd", "sft"):
            alike.setdefault(results.without_amount(group), []).append(group)
    series = [groups for groups in alike.values() if len(groups) >= 2]
    amounts = sorted({group.amount for groups in series for group in groups})
    place = {amount: float(index) for index, amount in enumerate(amounts)}
    ticks = [(place[a], "all" if a == math.inf else f"{a:,.0f}") for a in amounts]
    panels = []
    for size in results.sizes(group for groups in series for group in groups):
        lines = []
        for groups in series:
            if groups[0].size != size:
                continue
            ordered = sorted(groups, key=lambda group: group.amount)
            ys = [cell for group in ordered if (cell := view.cell(group))]
            xs = [place[group.amount] for group in ordered]
            lines.append(Line(results.plain_label(ordered[0]), xs, ys, _shade_of_line(ordered[0])))
        lines += _paper_data(view, size, place)
        panels.append(LinePanel(size, lines, ticks, view.start(size)))
    if panels:
        figure = plots.curves(panels, x_label="training examples", y_label=view.metric)
        caption = (
            "On-policy methods use only the inputs of these examples; as in Fig. 3 of the paper."
        )
        yield "data", figure, "Less data", caption


def _paper_data(view: View, size: str, place: Mapping[float, float]) -> Iterator[Line]:
    """The paper's Fig. 3, at the amounts that we have: XSum, small, sampled."""
    same = paper.task_of(view.task) == "xsum" and size.split(" ")[0] == "small"
    if not same or view.setting.decoding not in (None, "sample"):
        return
    for name, points in paper.DATA_SCALING.items():
        found = [
            (place[amount], Cell(value, None, 1))
            for examples, value in points.items()
            if (amount := math.inf if examples is None else float(examples)) in place
        ]
        if len(found) >= 2:
            xs, ys = zip(*found, strict=True)
            yield Line(f"{name}, the paper", xs, ys, canvas.MUTED, dashed=True)


def _shade_of_line(group: Group) -> str:
    if group.kind == "distillation" and group.fraction >= 1:
        return canvas.ACCENT
    if group.kind == "distillation" and group.divergence == "forward_kl" and not group.fraction:
        return canvas.WARM
    return canvas.MIDDLE if group.kind == "distillation" else canvas.GREY


def quality_diversity(study: Study, task: str, metric: str) -> Iterator[Drawn]:
    """Fig. 4: every group that was sampled at two temperatures with Self-BLEU."""
    sampled = [s for s in study.settings(task) if s.decoding == "sample" and s.temperature]
    sampled.sort(key=lambda setting: setting.temperature or 0.0)
    groups = results.on_most_data(study.of_task(task))
    panels = []
    for size in results.sizes(groups):
        lines = []
        for group in (g for g in groups if g.size == size):
            points = [
                (across.mean, up, f"T {setting.temperature:g}")
                for setting in sampled
                if (across := group.cell(task, setting, "self_bleu"))
                and (up := group.cell(task, setting, metric))
            ]
            if len(points) >= 2:
                colour = canvas.DIVERGENCE_COLOURS.get(group.divergence, shade(group))
                xs, ys, notes = zip(*points, strict=True)
                lines.append(Line(results.plain_label(group), xs, ys, colour, notes=notes))
        if lines and paper.task_of(task) == "xsum" and size.split(" ")[0] == "small":
            lines += [
                Line(
                    f"{divergence_name(name)}, the paper",
                    [across for across, _ in points.values()],
                    [Cell(up, None, 1) for _, up in points.values()],
                    canvas.DIVERGENCE_COLOURS[name],
                    dashed=True,
                )
                for name, points in paper.QUALITY_DIVERSITY.items()
            ]
        if lines:
            panels.append(LinePanel(size, lines))
    if panels:
        label = "Self-BLEU (lower is more diverse)"
        figure = plots.trade_off(panels, x_label=label, y_label=metric)
        caption = (
            f"{task}. T is the temperature of the evaluation's samples; 100 is no diversity at "
            "all; as in Fig. 4 of the paper."
        )
        yield "quality_diversity", figure, "Quality and diversity", caption


def rl(view: View) -> Iterator[Drawn]:
    """Fig. 5: alpha of RL + GKD; alpha = 1 is the distillation it ends in."""
    metrics = view.study.metrics(view.task)
    others = [name for name in (*_REWARD_METRICS, "teacher_divergence") if name in metrics]
    groups = [group for group in view.groups if group.kind == "rl"]
    if not others or len(groups) < 2:
        return
    panels = []
    for size in results.sizes(groups):
        here = sorted((g for g in [*groups, *_pure(view, groups)] if g.size == size), key=_alpha)
        points = [
            (across.mean, up, f"alpha {_alpha(group):g}")
            for group in here
            if (across := view.cell(group))
            and (up := group.cell(view.task, view.setting, others[0]))
        ]
        if len(points) >= 2:
            xs, ys, notes = zip(*points, strict=True)
            panels.append(LinePanel(size, [Line("RL + GKD", xs, ys, canvas.ACCENT, notes=notes)]))
    if panels:
        y_label = others[0].replace("_", " ")
        figure = plots.trade_off(panels, x_label=view.metric, y_label=y_label)
        caption = (
            "alpha weighs distillation, 1 - alpha the reward; as in Fig. 5 of the paper, which has "
            "entailment upwards."
        )
        if paper.task_of(view.task) == "xsum":
            points = "; ".join(
                f"{name} {quality:+.2f} and {entailment:+.1f}"
                for name, (quality, entailment) in paper.RL_TRADE_OFF.items()
            )
            caption += f" Its gains over the SFT student, T5-base: {points}."
        yield "rl_alpha", figure, "Reward and teacher", caption


def _pure(view: View, groups: Sequence[Group]) -> list[Group]:
    """The on-policy GKD that RL + GKD is at alpha = 1."""
    divergences = {group.divergence for group in groups}
    return [
        group
        for group in results.grid(view.groups)
        if group.fraction == 1 and group.divergence in divergences
    ]


def _alpha(group: Group) -> float:
    alpha = group.first.method.rl_alpha if group.first.method else None
    return 1.0 if alpha is None else alpha
