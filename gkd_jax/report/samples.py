"""The tables of decoded texts on a run's page: prompt, reference, and the student before and after.

Each token is shaded by its divergence from the teacher, where it was recorded.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gkd_jax.report.record import Run, finite
from gkd_jax.text import files


_ROWS, _LONGEST = 20, 6000


def tables(run: Run) -> Iterator[dict[str, Any]]:
    """Yields one table for each task, from its first and its last evaluation.

    Yields:
        `task`, `first_step` (None if there is only one evaluation), `last_step`, `rows` of (prompt,
        the teacher's own prompt, reference, tokens before, tokens after), `has_own` (whether the
        teacher read prompts of its own), the numbers `total` and `damaged` of lines, and `scale`,
        the divergence that has the darkest shade; 0 if no divergence was recorded.
    """
    for task, found in run.samples.items():
        (first_step, first), (last_step, last) = found[0], found[-1]
        after, damaged = files.read_records(last)
        before, more = files.read_records(first) if first != last else ([], 0)
        earlier = {_text(row, "inputs"): row for row in before}
        # With several samples of a prompt, rows are matched by position, else by their prompt.
        same = [_text(row, "inputs") for row in before] == [_text(row, "inputs") for row in after]
        rows = []
        for index, row in enumerate(after[:_ROWS]):
            old = before[index] if same else earlier.get(_text(row, "inputs"), {})
            texts = (_text(row, name) for name in ("inputs", "teacher_inputs", "targets"))
            rows.append((*texts, _tokens(old), _tokens(row)))
        tokens = [token for *_, old, new in rows for token in (*old, *new)]
        values = [divergence for _, divergence in tokens if divergence is not None]
        # The 95th percentile gets the darkest shade, so that an outlier does not fade the rest.
        darkest = float(np.quantile(values or [0.0], 0.95, method="inverted_cdf"))
        yield {
            "task": task,
            "first_step": first_step if first != last else None,
            "last_step": last_step,
            "rows": rows,
            "has_own": any(own for _, own, *_ in rows),
            "total": len(after),
            "damaged": damaged + more,
            "scale": max(darkest, 1e-6) if values else 0.0,
        }


def _tokens(row: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The tokens of a row's prediction, each with KL(teacher || student) in nats.

    Texts have the prediction's spaces, which some vocabularies' pieces lack. The divergence is None
    if it was not recorded; without one for each token, the whole prediction is one token.
    """
    rest, found = _text(row, "prediction"), []
    tokens, values = row.get("tokens"), row.get("token_divergence")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values):
        return [(rest, None)]
    for piece, value in zip(tokens, values, strict=True):
        text = str(piece).replace("▁", " ").replace("<0x0A>", "\n").replace("</s>", " ■")
        spaces = len(rest) - len(rest.lstrip())
        if rest.startswith(text.strip(), spaces) and rest:
            end = spaces + len(text.strip())
            text, rest = rest[:end], rest[end:]
        found.append((text if found else text.lstrip(" "), finite(value)))
    return found or [(rest, None)]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    text = value if isinstance(value, str) else ""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " […]"
