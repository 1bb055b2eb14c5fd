"""The report's tables, and how a table is written as HTML and as Markdown."""

from collections.abc import Sequence
import html
import re
from typing import NamedTuple

from gkd_jax.report import results
from gkd_jax.report.record import Model, Setting
from gkd_jax.report.results import Cell, Group, Study


class Entry(NamedTuple):
    """A table's cell; an empty one says that a run is missing.

    Attributes:
        text: what stands there.
        note: smaller, below it.
        best: of its column.
        link: an address relative to the report.
    """

    text: str = ""
    note: str = ""
    best: bool = False
    link: str = ""


class Table(NamedTuple):
    """Rows of entries below headings; an entry without text is empty."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Entry]]


def main_table(study: Study, task: str) -> Table:
    """Rows are methods and how they were decoded, columns are student sizes."""
    metrics, groups = study.metrics(task), study.of_task(task)
    columns = results.sizes(groups)
    rows: list[list[Entry]] = []
    means: list[list[float | None]] = []
    # Samples at other temperatures than 1 are points of a figure.
    settings = [one for one in study.settings(task) if one.is_main] or [Setting()]
    metric = metrics[0] if metrics else ""
    for label in dict.fromkeys(group.label for group in groups):
        members = {group.size: group for group in groups if group.label == label}
        for index, setting in enumerate(settings):
            cells = {size: group.cell(task, setting, metric) for size, group in members.items()}
            # One row for a method that has no number yet, at the usual decoding.
            nothing = not any(_evaluated(group, task) for group in members.values())
            if not any(cells.values()) and not (nothing and index == 0):
                continue
            rows.append(
                [
                    Entry(label),
                    Entry(str(setting)),
                    *(
                        _cell_entry(members.get(size), cells.get(size), task, setting, metric)
                        for size in columns
                    ),
                ]
            )
            means.append([cell.mean if (cell := cells.get(size)) else None for size in columns])
    for column in range(len(columns)):
        known = [mean for row in means if (mean := row[column]) is not None]
        for row, mean in zip(rows, means, strict=True):
            if len(known) > 1 and mean[column] == max(known):
                row[column + 2] = row[column + 2]._replace(best=True)
    return Table(["method", "decoding", *columns], rows)


def metrics_table(study: Study, task: str) -> Table:
    """Every metric of a task, one row a method, size and decoding."""
    metrics = study.metrics(task)
    rows = []
    for group in study.of_task(task):
        for setting in study.settings(task):
            cells = [group.cell(task, setting, metric) for metric in metrics]
            if any(cells):
                about = [Entry(group.label), Entry(group.size), Entry(str(setting))]
                rows.append([*about, *(Entry(_mean(cell)) for cell in cells)])
    return Table(["method", "size", "decoding", *metrics], rows)


def runs_table(study: Study) -> Table:
    """All runs, in the order of their folders."""
    reasons = {run.folder: reason for run, reason in study.left_out}
    rows = []
    for run in study.runs:
        steps = f"{run.last_step:,}"
        if not run.finished:
            steps += f" / {run.train_steps:,}"
        finals = []
        for task, setting in dict.fromkeys((e.task, e.setting) for e in run.evaluations):
            values = run.final(task, setting)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            finals.append(
                f"{task}, {setting}: {shown}" if setting != run.setting else f"{task}: {shown}"
            )
        notes = [*([reasons[run.folder]] if run.folder in reasons else []), *run.problems]
        rows.append(
            [
                Entry(run.name, "; ".join(notes), link=f"runs/{run.slug}.html"),
                Entry(run.method.title if run.method else ""),
                Entry("" if run.student == Model() else str(run.student)),
                Entry("" if run.seed is None else str(run.seed)),
                Entry(steps),
                Entry("; ".join(finals)),
                Entry((run.commit or "")[:12]),
            ]
        )
    return Table(["run", "method", "student", "seed", "steps", "final metrics", "commit"], rows)


def to_html(table: Table) -> str:
    """Scrolls sideways where it is wider than the page."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_entry_html(entry)}</td>" for entry in row) + "</tr>"
        for row in table.rows
    )
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody>"
    return f"<div class='wide'><table>{inside}</table></div>"


def to_markdown(table: Table) -> str:
    """GitHub's tables."""
    lines = [
        "| " + " | ".join(map(plain_markdown, table.headings)) + " |",
        "|" + "---|" * len(table.headings),
    ]
    for row in table.rows:
        lines.append("| " + " | ".join(map(_entry_markdown, row)) + " |")
    return "\n".join(lines)


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    shown = html.escape(" ".join(text.split()), quote=False)
    shown = re.sub(r"([\\`*\[\]|~])", r"\\\1", shown)
    # An underscore inside a word is safe, and most names have them.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", shown)


def _entry_html(entry: Entry) -> str:
    text = html.escape(entry.text)
    if entry.link:
        text = f'<a href="{html.escape(entry.link)}">{text}</a>'
    if entry.best:
        text = f"<b>{text}</b>"
    if not entry.note:
        return text
    place = " class='below'" if len(entry.note) > 10 else ""
    return f"{text}<small{place}>{html.escape(entry.note)}</small>"


def _entry_markdown(entry: Entry) -> str:
    text = plain_markdown(entry.text)
    if entry.link:
        text = f"[{text}]({entry.link})"
    if entry.best:
        text = f"**{text}**"
    return f"{text} ({plain_markdown(entry.note)})" if entry.note else text


def _cell_entry(
    group: Group | None, cell: Cell | None, task: str, setting: Setting, metric: str
) -> Entry:
    """Our number, and the paper's where it has the same cell."""
    if group is None:
        return Entry()
    number = results.paper_number(group, task, setting, metric)
    notes = [f"n = {cell.n}"] if cell else []
    if number:
        notes.append(f"paper {number.value:.2f}, {number.figure}, {number.decoding}")
    return Entry(_mean(cell), "; ".join(notes))


def _mean(cell: Cell | None) -> str:
    if cell is None:
        return ""
    digits = 2 if abs(cell.mean) < 100 else 1
    if 0 < abs(cell.mean) < 0.1:
        digits = 4
    error = "" if cell.error is None else f" ± {cell.error:.{digits}f}"
    return f"{cell.mean:.{digits}f}{error}"


def _evaluated(group: Group, task: str) -> bool:
    return any(e.task == task for run in group.runs for e in run.evaluations)
