"""The numbers of Agarwal et al. (2024), ICLR camera-ready, and which of them compare with a run.

`paper.json` holds the numbers. A number compares with a run if both have the same `Cell` and were
decoded alike.
"""

from collections.abc import Iterator
import functools
import importlib.resources
import json
import re
from typing import Any, NamedTuple

from gkd_jax.report.record import Run, Setting


DIVERGENCES = ("forward_kl", "jsd(0.1)", "jsd(0.5)", "jsd(0.9)", "reverse_kl")


class Cell(NamedTuple):
    """The settings that must be equal for two numbers to be comparable, besides the decoding.

    Attributes:
        task: the paper's task: "xsum", "wmt", "gsm8k", "mmlu" or "bbh".
        size: the student's size: "small", "base", "large" or "xl".
        teacher: the teacher's size; None for SFT and SeqKD.
        method: "SFT" or "SeqKD", else "".
        divergence: the divergence, such as "jsd(0.1)"; None for SFT and SeqKD.
        fraction: the paper's lambda.
        teacher_temperature: the teacher's temperature in the divergence; None without one.
        sampling_temperature: the student's temperature in training; None if it samples nothing.
        examples: the number of training examples; None is all.
    """

    task: str
    size: str
    teacher: str | None
    method: str
    divergence: str | None
    fraction: Any
    teacher_temperature: Any
    sampling_temperature: Any
    examples: Any


class Number(NamedTuple):
    """One number of the paper.

    Attributes:
        figure: the figure that shows it.
        cell: the settings of the run behind it.
        setting: how it was decoded.
        value: the metric, in percent.
        gain: the printed gain over the student before, if there is one.
        self_bleu: the printed Self-BLEU, if there is one.
    """

    figure: str
    cell: Cell
    setting: Setting
    value: float
    gain: float | None
    self_bleu: float | None


@functools.cache
def content() -> dict[str, Any]:
    file = importlib.resources.files("gkd_jax.report") / "paper.json"
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def numbers() -> tuple[Number, ...]:
    """All numbers of the paper. If several compare with one run, the report shows the first."""
    return tuple(map(_number, content()["numbers"]))


def task_of(name: str) -> str | None:
    """The paper's name of a task, such as "wmt" for "wmt_t2t_ende_v003"; None if it has none."""
    return next((task for task, one in content()["tasks"].items() if re.fullmatch(one, name)), None)


def metric_of(task: str) -> str | None:
    """The metric that the paper reports for a task; None if the paper does not have the task."""
    return content()["metrics"].get(task_of(task))


def cell(run: Run, task: str) -> Cell | None:
    """The cell of a run's recipe; None if the paper has no comparable run."""
    fields, method, known = run.fields, run.method, task_of(task)
    size = _size(run, "student")
    if method.kind not in ("sft", "seqkd", "distillation") or known is None or size is None:
        return None
    common = content()["in_common"].items()
    same = all(fields.get(name, value) == value for name, value in common)
    if not same or "changes" in fields or run.several_tasks:
        return None
    distils = method.kind == "distillation"
    return Cell(
        task=known,
        size=size,
        teacher=_size(run, "teacher") if distils else None,
        method={"sft": "SFT", "seqkd": "SeqKD"}.get(method.kind, ""),
        divergence=method.divergence if distils else None,
        fraction=method.fraction,
        teacher_temperature=fields.get("method.teacher_temperature") if distils else None,
        sampling_temperature=fields.get("method.sampling.temperature") if method.fraction else None,
        examples=fields.get("data.num_examples"),
    )


def matching(cell: Cell, setting: Setting) -> Iterator[Number]:
    """Yields the numbers with this cell, decoding and split, if all examples were evaluated."""
    decoding = setting._replace(num_samples=None, target_length=None)
    return (one for one in numbers() if one.cell == cell and one.setting == decoding)


def beside(run: Run, task: str, setting: Setting, metric: str, *, started: bool) -> Number | None:
    """The paper's number for a run, decoding and split; None if there is none.

    `started` says whether the run started from another run of the study. An SFT run then has no
    number, because the paper's SFT starts from public checkpoints.
    """
    where = cell(run, task)
    if where is None or metric != metric_of(task) or (started and where.method == "SFT"):
        return None
    return next(matching(where, setting), None)


def _size(run: Run, role: str) -> str | None:
    """The name of a model's size; without a recorded name, the size of about as many parameters."""
    name, count = run.fields.get(f"{role}.size"), run.parameters(role)
    close = [
        size for size, n in content()["parameters"].items() if count and abs(count - n) < 0.05 * n
    ]
    return name if isinstance(name, str) else next(iter(close), None)


def _number(row: dict[str, Any]) -> Number:
    beta, distils = row["beta"], row["divergence"] is not None
    values = {name: row[name] for name in Cell._fields if name in row}
    values["divergence"] = row["divergence"] if beta is None else f"jsd({beta:g})"
    values["method"] = "" if distils else row["method"]
    beams = {"num_beams": 4, "alpha": 0.6} if row["decoding"] == "beam" else {}
    decoded = {name: row[name] for name in ("decoding", "temperature", "calculator", "split")}
    where = Cell(**values, fraction=row["lambda"])
    setting = Setting(**decoded, **beams)
    return Number(
        row["figure"], where, setting, row["value"], row.get("gain"), row.get("self_bleu")
    )
