"""What is known of one run: its method, its models, its curves and evaluations."""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple


_DIVERGENCE_NAMES = {
    "forward_kl": "FKL",
    "reverse_kl": "RKL",
    "total_variation": "TV",
    "jsd": "JSD",
}


class Setting(NamedTuple):
    """How an evaluation decoded; None where the run did not record it."""

    decoding: str | None = None
    temperature: float | None = None
    split: str | None = None

    @property
    def is_main(self) -> bool:
        """False for samples at other temperatures than 1: the points of Fig. 4."""
        return self.decoding != "sample" or self.temperature in (None, 1.0)

    def __str__(self) -> str:
        """Such as "greedy, validation"."""
        decoding = self.decoding or "decoding not recorded"
        if self.decoding == "sample":
            decoding = "sampled"
            if self.temperature is not None:
                decoding += f" at temperature {self.temperature:g}"
        return f"{decoding}, {self.split}" if self.split else decoding


class Evaluation(NamedTuple):
    """The metrics of one task at one step."""

    task: str
    setting: Setting
    step: int | None
    values: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What run.json says about the loss; see `gkd.GKDConfig` for the meaning of each.

    A fraction or a temperature that is a text is the name of its schedule. `on_teacher_outputs` is
    read off names: run.json does not tell SeqKD from SFT on another task.
    """

    label: str | None = None
    divergence: str | None = None
    beta: float | None = None
    on_policy_fraction: float | str = 0.0
    teacher_temperature: float | str = 1.0
    student_temperature: float = 1.0
    sampling_temperature: float = 1.0
    mixing: str = "step"
    num_samples: int = 1
    sample_ahead: bool = False
    rl_alpha: float | None = None
    reward: str | None = None
    on_teacher_outputs: bool = False

    @property
    def kind(self) -> str:
        """One of "sft", "seqkd", "distillation", "rl"."""
        if self.rl_alpha is not None:
            return "rl"
        if self.divergence is not None:
            return "distillation"
        return "seqkd" if self.on_teacher_outputs else "sft"

    @property
    def divergence_id(self) -> str:
        """As `paper.Number.method`: "jsd(0.1)", "forward_kl", or "sft" and "seqkd"."""
        if self.divergence is None:
            return self.kind
        if self.divergence == "jsd" and self.beta is not None:
            return f"jsd({self.beta:g})"
        return self.divergence

    @property
    def title(self) -> str:
        """The label, else the paper's name of such a method."""
        return self.label or self._paper_name()

    def _paper_name(self) -> str:
        divergence, fraction = self.divergence_id, self.on_policy_fraction
        name = divergence_name(divergence)
        if self.kind == "rl":
            return f"RL + GKD, {name}" if self.divergence else "RL"
        known = {
            ("sft", 0.0): "SFT",
            ("seqkd", 0.0): "SeqKD",
            ("forward_kl", 0.0): "Supervised KD",
            ("forward_kl", 0.5): "ImitKD",
            ("total_variation", 0.5): "f-distill",
        }
        if isinstance(fraction, str):
            return f"GKD, {name}, λ by {fraction}"
        if (divergence, fraction) in known:
            return known[divergence, fraction]
        mixes = {0.0: "Supervised GKD", 0.5: "Mixed GKD", 1.0: "On-policy GKD"}
        if fraction in mixes:
            return f"{mixes[fraction]}, {name}"
        return f"GKD, {name}, λ = {fraction:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A student or a teacher."""

    parameters: int | None = None
    size: str | None = None
    checkpoint: str | None = None

    def __str__(self) -> str:
        """Such as "small (77M)": people reuse a size's name."""
        count = None if self.parameters is None else short_count(self.parameters)
        if self.size == "tiny" and count:  # of any size, in tests and studies on a CPU
            return count
        if self.size and count:
            return f"{self.size} ({count})"
        return self.size or count or "size not recorded"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder.

    Attributes:
        name: its path below the RUN_DIR that it was found in.
        slug: the same as a file name, unique within a report.
        folder: what was read.
        method: None without a readable run.json.
        student, teacher: the models.
        task, num_examples, batch_size: what it was trained on.
        eval_task: what it is evaluated on, whether or not an evaluation is there yet.
        setting: how its evaluations decoded.
        seed, train_steps, commit, devices: from run.json.
        lines: of metrics.jsonl, in the order of their steps.
        evaluations: those of training in order, then those of `decoded`.
        decoded: each metrics.json that `gkd-jax eval` wrote of its checkpoints.
        problems: what could not be read.
    """

    name: str
    slug: str
    folder: pathlib.Path
    method: Method | None = None
    student: Model = Model()
    teacher: Model | None = None
    task: str | None = None
    num_examples: int | None = None
    batch_size: int | None = None
    eval_task: str | None = None
    setting: Setting = Setting()
    seed: int | None = None
    train_steps: int | None = None
    commit: str | None = None
    devices: str | None = None
    lines: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    decoded: tuple[pathlib.Path, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The method's, else the run's name."""
        return self.method.title if self.method else self.name

    @property
    def learning_rate(self) -> float | None:
        """The highest of its schedule, to two digits; None where no step says it."""
        found = (finite(line.get("train/learning_rate")) for line in self.lines)
        rates = [rate for rate in found if rate is not None]
        return float(f"{max(rates):.2g}") if rates else None

    @property
    def last_step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def finished(self) -> bool:
        return self.train_steps is None or self.last_step >= self.train_steps

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has a finite `metric`."""
        values = ((line["step"], finite(line.get(metric))) for line in self.lines)
        return [(float(step), value) for step, value in values if value is not None]

    def final(self, task: str, setting: Setting) -> dict[str, float]:
        """The metrics of the last evaluation of `task`, {} where there is none."""
        values: dict[str, float] = {}
        for evaluation in self.evaluations:
            if (evaluation.task, evaluation.setting) == (task, setting):
                values.update(evaluation.values)
        return values


def divergence_name(divergence: str) -> str:
    """Short, as in the paper: "jsd(0.1)" -> "JSD(0.1)", "forward_kl" -> "FKL"."""
    name, bracket, rest = divergence.partition("(")
    return _DIVERGENCE_NAMES.get(name, name) + bracket + rest


def short_count(count: int) -> str:
    """77_000_000 -> "77M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def finite(value: Any) -> float | None:
    """A JSON value as a number; None for what is none, and for NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
