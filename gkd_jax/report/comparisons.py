"""Bars by method and heat maps of divergence x lambda, from a study."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gkd_jax.report import canvas, paper, plots, results
from gkd_jax.report.plots import Bar, BarPanel, Map
from gkd_jax.report.record import divergence_name
from gkd_jax.report.results import Cell, Group, Study, View


# Beyond so many bars, only methods that the paper names stay.
_MOST_BARS = 14
_NAMED = {
    ("sft", 0.0),
    ("seqkd", 0.0),
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    ("forward_kl", 0.5),
    ("total_variation", 0.5),
}

# A name for the file, the figure, its title and caption.
Drawn = tuple[str, Any, str, str]


def bars(view: View) -> Iterator[Drawn]:
    """Figs. 1, 2, 9 and A.15."""
    groups = results.on_most_data(
        group for group in view.groups if not group.self_distilled and group.kind != "rl"
    )
    if len(groups) > _MOST_BARS:
        groups = [
            group
            for group in groups
            if group.fraction == 1 or (group.divergence, group.fraction) in _NAMED
        ]
    # A size that only SFT was run at has nothing to compare: a teacher (the line), or the start of
    # a self-distillation.
    students = {group.size for group in groups if group.kind not in ("sft", "unknown")}
    if students:
        groups = [group for group in groups if group.size in students]
    panels = _bar_panels(view, groups)
    if sum(1 for panel in panels for bar in panel.bars if bar.cell) >= 2:
        figure = plots.bars(panels, metric=view.metric)
        yield (
            "methods",
            figure,
            "Methods",
            "Mean over seeds, the improvement over the SFT student in grey, whiskers of one "
            "standard error; as in Figs. 1, 2, 9 and A.15 of the paper.",
        )


def _bar_panels(view: View, groups: Sequence[Group]) -> list[BarPanel]:
    labels = list(dict.fromkeys(results.plain_label(group) for group in groups))
    panels = []
    for size in results.sizes(groups):
        members = {results.plain_label(group): group for group in groups if group.size == size}
        rows = []
        for label in labels:
            group = members.get(label)
            if group is None:
                rows.append(Bar(label, None, canvas.GREY))
                continue
            gain, number = view.gain(group), view.paper(group)
            rows.append(
                Bar(
                    label,
                    view.cell(group),
                    shade(group),
                    note=f"{gain.mean:+.1f}" if gain else "",
                    paper=number.value if number else None,
                )
            )
        panels.append(BarPanel(size, rows, view.teacher(list(members.values()))))
    return panels


def shade(group: Group) -> str:
    """The darker, the more of the student's own samples."""
    if group.kind == "rl":
        return canvas.WARM
    if group.kind in ("sft", "unknown"):
        return canvas.LIGHT_GREY
    if group.kind == "seqkd":
        return canvas.GREY
    if group.fraction >= 1:
        return canvas.ACCENT
    return canvas.MIDDLE if group.fraction > 0 else canvas.PALE


def heat_maps(view: View) -> Iterator[Drawn]:
    """Figs. 6, 7 and A.12 to A.15: divergence x lambda, one figure a teacher temperature."""
    groups = results.grid(view.groups)
    temperatures = sorted({group.teacher_temperature for group in groups})
    for temperature in temperatures:
        here = [group for group in groups if group.teacher_temperature == temperature]
        shape = ({group.divergence for group in here}, {group.fraction for group in here})
        # Less than that is said by the bars.
        if len(here) < 3 or min(map(len, shape)) < 2:
            continue
        signed = all(view.gain(group) for group in here)
        ours = _maps(here, view.gain if signed else view.cell)
        rows = [ours]
        printed = _paper_maps(view, [one.title for one in ours], temperature, signed)
        if printed:
            rows.append(printed)
        what = "Improvement over the SFT student" if signed else "Value"
        title = f"{what} by divergence and λ"
        if len(temperatures) > 1:
            title += f", teacher temperature {temperature:g}"
        caption = (
            "Rows: the fraction λ of steps on the student's own samples; the best cell is bold; "
            "every panel has its own shades; as in Figs. 6, 7 and A.12 to A.14 of the paper."
        )
        yield "divergence_lambda", plots.heat_maps(rows, signed=signed), title, caption


def _maps(groups: Sequence[Group], value: Callable[[Group], Cell | None]) -> list[Map]:
    divergences = sorted({group.divergence for group in groups}, key=results.divergence_order)
    fractions = sorted({group.fraction for group in groups}, reverse=True)
    maps = []
    for size in results.sizes(groups):
        cells = {(g.fraction, g.divergence): value(g) for g in groups if g.size == size}
        maps.append(
            Map(
                size,
                [f"λ {fraction:.0%}" for fraction in fractions],
                [divergence_name(divergence) for divergence in divergences],
                [[cells.get((f, d)) for d in divergences] for f in fractions],
            )
        )
    return maps


def _paper_maps(
    view: View, panel_sizes: Sequence[str], temperature: float, signed: bool
) -> list[Map]:
    """The paper's maps of the same task, decoding and sizes."""
    figures = ("Fig. 6", "Fig. 7", "Fig. A.12", "Fig. A.13", "Fig. A.14")
    known = paper.task_of(view.task)
    decoding = view.setting.decoding
    if known == "xsum" and decoding is None:
        decoding = "sample" if temperature < 1 else "greedy"
    maps = []
    for size in panel_sizes:
        numbers = [
            number
            for number in paper.NUMBERS
            if (number.figure in figures and number.task == known)
            and number.size == size.split(" ")[0]
            and decoding in (None, number.decoding)
        ]
        # Of sampled students the paper does not say where they started: their values.
        gained = signed and all(number.decoding != "sample" for number in numbers)
        cells = {
            (number.on_policy_fraction, number.method): Cell(
                _gain(number) if gained else number.value, None, 1
            )
            for number in numbers
        }
        if cells and gained == signed:
            fractions = (1.0, 0.5, 0.0)
            maps.append(
                Map(
                    f"{numbers[0].size}, the paper ({numbers[0].figure})",
                    [f"λ {fraction:.0%}" for fraction in fractions],
                    [divergence_name(divergence) for divergence in paper.DIVERGENCES],
                    [[cells.get((f, d)) for d in paper.DIVERGENCES] for f in fractions],
                )
            )
    return maps


def _gain(number: paper.Number) -> float:
    if number.gain is not None:
        return number.gain
    return number.value - paper.START[number.task, number.size]


def self_distillation(view: View) -> Iterator[Drawn]:
    """Fig. A.10."""
    groups = [group for group in view.groups if group.self_distilled and group.kind != "rl"]
    if len(groups) < 2:
        return
    panels = _bar_panels(view, groups)
    caption = "The teacher is as large as the student; as in Fig. A.10 of the paper."
    figure = plots.bars(panels, metric=view.metric)
    yield "self_distillation", figure, "Self-distillation", caption


def instructions(study: Study) -> Iterator[tuple[str, str, Any, str, str]]:
    """Fig. A.11: improvements on MMLU and BBH side by side."""
    tasks = [task for task in study.tasks() if paper.task_of(task) in ("mmlu", "bbh")]
    panels, first = [], None
    for task in tasks:
        metrics, settings = study.metrics(task), study.settings(task)
        if not metrics or not settings:
            continue
        view = View(study, task, settings[0], metrics[0])
        gains = [(group, view.gain(group)) for group in view.groups]
        rows = []
        for group, gain in gains:
            if gain is not None:
                number = view.paper(group)
                printed = number.gain if number else None
                rows.append(Bar(group.label, gain, shade(group), paper=printed))
        if len(rows) >= 2:
            first = first or task
            panels.append(BarPanel(task, rows))
    if first is not None:
        labels = list(dict.fromkeys(bar.label for panel in panels for bar in panel.bars))
        panels = [
            BarPanel(
                panel.title,
                [
                    next((b for b in panel.bars if b.label == label), Bar(label, None, canvas.GREY))
                    for label in labels
                ],
            )
            for panel in panels
        ]
        figure = plots.bars(panels, metric="improvement, points", signed=True)
        caption = "Over the student before distillation; as in Fig. A.11 of the paper."
        yield first, "instructions", figure, "Instruction tuning, held-out tasks", caption
