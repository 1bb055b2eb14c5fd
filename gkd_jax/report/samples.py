"""The tables of decoded texts on a run's page: prompt, reference, and the student before and after.

Each token is shaded by its divergence from the teacher, where it was recorded.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.report.record import Run, finite
from gkd_jax.text import files


_ROWS, _LONGEST = 20, 6000


class Token(NamedTuple):
    """One token of a prediction.

    Attributes:
        text: the token's text as it stands in the prediction.
        depth: its shade in [0, 1]; None without a divergence.
        divergence: KL(teacher || student) at the token, in nats; None if it was not recorded.
    """

    text: str
    depth: float | None
    divergence: float | None


def tables(run: Run) -> Iterator[dict[str, Any]]:
    """Yields one table for each task, from its first and its last evaluation.

    Yields:
        `task`, `first_step` (None if there is only one evaluation), `last_step`, `rows` of (prompt,
        the teacher's own prompt, reference, tokens before, tokens after), `has_own` (whether the
        teacher read prompts of its own), the numbers `total` and `damaged` of lines, and `scale`,
        the divergence that has the darkest shade.
    """
    for task, found in run.samples.items():
        (first_step, first), (last_step, last) = found[0], found[-1]
        after, damaged = files.read_records(last)
        before, more = files.read_records(first) if first != last else ([], 0)
        earlier = {_text(row, "inputs"): row for row in before}
        # With several samples of a prompt, rows are matched by position, else by their prompt.
        same = [_text(row, "inputs") for row in before] == [_text(row, "inputs") for row in after]
        chosen = [
            (before[index] if same else earlier.get(_text(row, "inputs"), {}), row)
            for index, row in enumerate(after[:_ROWS])
        ]
        values = [v for pair in chosen for row in pair for _, v in _tokens(row) if v is not None]
        # The 95th percentile gets the darkest shade, so that an outlier does not fade the rest.
        darkest = float(np.quantile(values or [0.0], 0.95, method="inverted_cdf"))
        scale = max(darkest, 1e-6) if values else 0.0
        names = ("inputs", "teacher_inputs", "targets")
        rows = [
            (*(_text(row, name) for name in names), _decoded(old, scale), _decoded(row, scale))
            for old, row in chosen
        ]
        steps = {"first_step": first_step if first != last else None, "last_step": last_step}
        counts = {"total": len(after), "damaged": damaged + more}
        counts["has_own"] = any(own for _, own, *_ in rows)
        yield {"task": task, **steps, "rows": rows, **counts, "scale": scale}


def _tokens(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The (token, divergence) pairs of a row; [] if it has none."""
    tokens, values = row.get("tokens"), row.get("token_divergence")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        return []
    return [(str(token), finite(value)) for token, value in zip(tokens, values, strict=True)]


def _decoded(row: Mapping[str, Any], scale: float) -> list[Token]:
    """The tokens of a row, with the prediction's spaces, which some vocabularies' pieces lack."""
    rest, found = _text(row, "prediction"), []
    for piece, value in _tokens(row):
        text = piece.replace("▁", " ").replace("<0x0A>", "\n").replace("</s>", " ■")
        spaces = len(rest) - len(rest.lstrip())
        if rest.startswith(text.strip(), spaces) and rest:
            end = spaces + len(text.strip())
            text, rest = rest[:end], rest[end:]
        depth = None if value is None else min(max(value, 0.0) / scale, 1.0) if scale else 0.0
        found.append(Token(text if found else text.lstrip(" "), depth, value))
    return found or [Token(rest, None, None)]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    text = value if isinstance(value, str) else ""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " […]"
