"""Decoded rows of a run's page: prompt, reference, the student before and after, token by token."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.report.reading import read_jsonl
from gkd_jax.report.record import Run, finite


_ROWS, _LONGEST = 20, 6000


class Token(NamedTuple):
    """Text as it stands in the prediction; `depth` in [0, 1] is its shade, if it has a number."""

    text: str
    depth: float | None
    divergence: float | None


class Samples(NamedTuple):
    """The samples of one task: `rows` of (prompt, reference, tokens before, tokens after)."""

    task: str
    first_step: int | None
    last_step: int
    rows: list[tuple[str, str, list[Token], list[Token]]]
    total: int
    damaged: int
    scale: float


def tables(run: Run) -> Iterator[Samples]:
    """One a task, from its first and its last evaluation."""
    for task, found in run.samples.items():
        (first_step, first), (last_step, last) = found[0], found[-1]
        after, damaged = read_jsonl(last)
        before, more = read_jsonl(first) if first != last else ([], 0)
        earlier = {_text(row, "inputs"): row for row in before}
        # Several samples of one prompt follow each other: the same place is the same sample.
        same = [_text(row, "inputs") for row in before] == [_text(row, "inputs") for row in after]
        chosen = [
            (before[index] if same else earlier.get(_text(row, "inputs"), {}), row)
            for index, row in enumerate(after[:_ROWS])
        ]
        values = [v for pair in chosen for row in pair for _, v in _tokens(row) if v is not None]
        # The 95th percentile is darkest, so that one outlier does not fade the rest.
        scale = (
            max(float(np.quantile(values, 0.95, method="inverted_cdf")), 1e-6) if values else 0.0
        )
        rows = [
            (
                _text(row, "inputs"),
                _text(row, "targets"),
                _decoded(old, scale),
                _decoded(row, scale),
            )
            for old, row in chosen
        ]
        step = first_step if first != last else None
        yield Samples(task, step, last_step, rows, len(after), damaged + more, scale)


def _tokens(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """(token, divergence), [] for rows without them."""
    tokens, values = row.get("tokens"), row.get("token_divergence")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        return []
    pairs = zip(tokens, values, strict=True)
    return [(token, finite(value)) for token, value in pairs if isinstance(token, str)]


def _decoded(row: Mapping[str, Any], scale: float) -> list[Token]:
    """The tokens with the spaces of the prediction, which pieces of some vocabularies lack."""
    prediction, place, found = _text(row, "prediction"), 0, []
    for piece, value in _tokens(row):
        text = piece.replace("▁", " ").replace("<0x0A>", "\n").replace("</s>", " ■")
        rest = prediction[place:]
        start = place + len(rest) - len(rest.lstrip())
        if prediction.startswith(text.strip(), start) and rest:
            end = start + len(text.strip())
            text, place = prediction[place:end], end
        elif not found:
            text = text.lstrip(" ")
        depth = None if value is None else min(max(value, 0.0) / scale, 1.0) if scale else 0.0
        found.append(Token(text, depth, value))
    return found or [Token(prediction, None, None)]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    text = value if isinstance(value, str) else ""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " […]"
