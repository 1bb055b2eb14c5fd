"""The numbers of Agarwal et al. (2024), ICLR camera-ready, and which of them compare with a run.

`paper.json` holds the numbers. A number compares with a run if both have the same `Cell` and were
decoded alike.
"""

from collections.abc import Iterator, Sequence
import functools
import importlib.resources
import json
import re
from typing import Any, NamedTuple

from gkd_jax.report.record import Method, Run, Setting


class Cell(NamedTuple):
    """The settings that must be equal for two numbers to be comparable, besides the decoding."""

    task: str  # "xsum", "wmt", "gsm8k", "mmlu" or "bbh"
    size: str  # of the student: "small", "base", "large" or "xl"
    teacher: str | None  # its size; None for SFT and SeqKD
    method: Method
    teacher_temperature: Any  # in the divergence; None without a teacher
    sampling_temperature: Any  # of the student in training; None if it samples nothing
    examples: Any  # the number of training examples; None is all


class Number(NamedTuple):
    """One number of the paper."""

    figure: str
    cell: Cell
    setting: Setting
    value: float  # the metric, in percent
    gain: float | None  # over the student before, if it is printed
    self_bleu: float | None  # if it is printed


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


def cell(run: Run, task: str, metric: str) -> Cell | None:
    """The cell of a run's recipe; None if the paper has no comparable run or another metric."""
    fields, method, known = run.fields, run.method, task_of(task)
    size = _size(run, "student")
    if method.kind not in ("sft", "seqkd", "distillation") or known is None or size is None:
        return None
    common = content()["in_common"].items()
    same = all(fields.get(name, value) == value for name, value in common)
    if not same or "changes" in fields or run.several_tasks or metric != metric_of(task):
        return None
    distils = method.kind == "distillation"
    return Cell(
        task=known,
        size=size,
        teacher=_size(run, "teacher") if distils else None,
        method=method,
        teacher_temperature=fields.get("method.teacher_temperature") if distils else None,
        sampling_temperature=fields.get("method.sampling.temperature") if method.fraction else None,
        examples=fields.get("data.num_examples"),
    )


def matching(cell: Cell, setting: Setting, any_of: Sequence[str] = ()) -> Iterator[Number]:
    """Yields the numbers with this cell, decoding and split, if all examples were evaluated.

    The fields `any_of` of the cell may have any value.
    """
    decoding = setting._replace(num_samples=None, target_length=None)
    for one in numbers():
        wanted = cell._replace(**{name: getattr(one.cell, name) for name in any_of})
        if one.cell == wanted and one.setting == decoding:
            yield one


def beside(run: Run, task: str, setting: Setting, metric: str, *, started: bool) -> Number | None:
    """The paper's number for a run, decoding and split; None if there is none.

    `started` says whether the run started from another run of the study. An SFT run then has no
    number, because the paper's SFT starts from public checkpoints.
    """
    where = cell(run, task, metric)
    if where is None or (started and where.method.kind == "sft"):
        return None
    return next(matching(where, setting), None)


def _size(run: Run, role: str) -> str | None:
    """The name of a model's size; without a recorded name, the size of about as many parameters."""
    name, count = run.fields.get(f"{role}.size"), run.parameters(role) or 0
    known = content()["parameters"].items()
    close = [size for size, number in known if abs(count - number) < 0.05 * number]
    return name if isinstance(name, str) else next(iter(close), None)


def _number(row: dict[str, Any]) -> Number:
    kind = {"SFT": "sft", "SeqKD": "seqkd"}.get(row["method"], "distillation")
    divergence = row["divergence"] if row["beta"] is None else f"jsd({row['beta']:g})"
    method = Method(kind, divergence or "", row["lambda"])
    where = {name: row[name] for name in Cell._fields if name != "method"}
    beams = {"num_beams": 4, "alpha": 0.6} if row["decoding"] == "beam" else {}
    decoded = {name: row[name] for name in ("decoding", "temperature", "calculator", "split")}
    cell, setting = Cell(**where, method=method), Setting(**decoded, **beams)
    return Number(row["figure"], cell, setting, row["value"], row.get("gain"), row.get("self_bleu"))
