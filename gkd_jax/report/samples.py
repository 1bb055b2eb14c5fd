"""Decoded rows as HTML: prompt, reference, the student before and after, shaded by token."""

from collections.abc import Sequence
import html
import math
from typing import Any, NamedTuple

from gkd_jax.report import runs


_ROWS = 20
_LONGEST = 6000
_SHADE = "179, 98, 45"


class Sample(NamedTuple):
    """One prompt and what was decoded for it; either may be missing."""

    inputs: str
    targets: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Table(NamedTuple):
    """The samples of one task: the first of `total`."""

    task: str
    first_step: int | None
    last_step: int
    samples: Sequence[Sample]
    total: int
    damaged: int


def tables(run: runs.Run) -> list[Table]:
    """One a task, from its first and its last evaluation."""
    found = []
    for task, files in runs.samples(run).items():
        (first_step, first), (last_step, last) = files[0], files[-1]
        after, damaged = runs.read_jsonl(last)
        before: list[dict[str, Any]] = []
        if first != last:
            before, more = runs.read_jsonl(first)
            damaged += more
        earlier = {_text(row, "inputs"): row for row in before}
        # Several samples of one prompt follow each other: the same place is the same sample.
        same = [_text(row, "inputs") for row in before] == [_text(row, "inputs") for row in after]
        chosen = []
        for index, row in enumerate(after[:_ROWS]):
            prompt = _text(row, "inputs")
            old = before[index] if same and before else earlier.get(prompt)
            chosen.append(Sample(prompt, _text(row, "targets"), old, row))
        step = first_step if first != last else None
        found.append(Table(task, step, last_step, chosen, len(after), damaged))
    return found


def to_html(table: Table) -> str:
    """A heading, a legend where tokens are shaded, and the table."""
    scale = _scale(table)
    shown = f"the first {len(table.samples)} of {table.total:,}"
    if len(table.samples) == table.total:
        shown = f"all {table.total:,}"
    parts = [f"<h2>Samples of {html.escape(table.task)}</h2>", f"<p class='note'>{shown}</p>"]
    if table.damaged:
        parts.append(f"<p class='note'>{table.damaged} damaged lines left out</p>")
    if scale:
        parts.append(_legend(scale))
    before = "" if table.first_step is None else f"<th>student at step {table.first_step:,}</th>"
    parts.append(
        "<div class='wide'><table class='samples'><thead><tr><th>prompt</th><th>reference</th>"
        f"{before}<th>student at step {table.last_step:,}</th></tr></thead><tbody>"
    )
    for sample in table.samples:
        cells = [_clip(_plain(sample.inputs)), _clip(_plain(sample.targets))]
        if table.first_step is not None:
            cells.append(_clip(_decoded(sample.before, scale)))
        cells.append(_clip(_decoded(sample.after, scale)))
        parts.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    parts.append("</tbody></table></div>")
    return "\n".join(parts)


def _scale(table: Table) -> float:
    """What is shaded darkest: the 95th percentile, so that one outlier does not fade the rest."""
    values = sorted(
        value
        for sample in table.samples
        for row in (sample.before, sample.after)
        for _, value in _tokens(row)
        if value is not None
    )
    if not values:
        return 0.0
    return max(values[min(math.ceil(0.95 * len(values)), len(values)) - 1], 1e-6)


def _tokens(row: dict[str, Any] | None) -> list[tuple[str, float | None]]:
    """(token, divergence), [] for rows without them."""
    tokens, divergences = (row or {}).get("tokens"), (row or {}).get("token_divergence")
    if not isinstance(tokens, list) or not isinstance(divergences, list):
        return []
    if len(tokens) != len(divergences) or not all(isinstance(token, str) for token in tokens):
        return []
    return [(token, _divergence(value)) for token, value in zip(tokens, divergences, strict=True)]


def _divergence(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _decoded(row: dict[str, Any] | None, scale: float) -> str:
    if row is None:
        return ""
    tokens = _tokens(row)
    if not tokens:
        return _plain(_text(row, "prediction") or _text(row, "predictions"))
    parts = []
    for index, (token, divergence) in enumerate(tokens):
        text = token.replace("▁", " ").replace("<0x0A>", "\n").replace("</s>", " ■")
        text = text.lstrip(" ") if index == 0 else text
        if divergence is None:
            parts.append(html.escape(text))
            continue
        depth = min(max(divergence, 0.0) / scale, 1.0) if scale else 0.0
        parts.append(
            f'<span style="background:rgba({_SHADE},{0.75 * depth:.2f})" '
            f'title="{divergence:.3g}">{html.escape(text)}</span>'
        )
    return "".join(parts)


def _legend(scale: float) -> str:
    boxes = "".join(
        f'<i style="background:rgba({_SHADE},{0.75 * depth:.2f})"></i>'
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    return (
        f"<p class='legend'>divergence from the teacher: 0 {boxes} {scale:.2g} or more "
        "<span class='note'>(point at a token for its number; ■ is the end)</span></p>"
    )


def _clip(inside: str) -> str:
    return f"<div class='clip'>{inside}</div>"


def _plain(text: str) -> str:
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + " […]"
    return html.escape(shown)


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""
