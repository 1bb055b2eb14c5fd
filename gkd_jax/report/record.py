"""`Run`: one run with its recipe, its curves and its evaluations.

`Run.identity` tells configurations apart, `Method` names what a run minimises, and `Setting` says
how an evaluation decoded.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, NamedTuple

from gkd_jax.evaluation import decodings
from gkd_jax.text import task_names


# Parts of a recipe that cannot change a result: where and how often a run saves and evaluates,
# where its arrays are stored, and which arrays are recomputed instead of kept.
# fmt: off
UNCHANGING = frozenset({
    "model_dir", "mesh", "num_microbatches", "eval_period", "save_period", "log_period",
    "metrics_to", "keep", "keep_period", "best_metric", "best_mode",
    "memory", "remat", "scan_unroll", "unroll_decoding", "cache_segment", "attention_by_row",
    "loss_parts", "decode_rows",
})
# Fields of an evaluation that say nothing about how it decoded.
_NOT_DECODING = frozenset({
    "type", "task", "batch_size", "decode_rows", "seed", "rewards", "checkpoint", "step", "content",
    "model_and_data",
})
# fmt: on
SEEDS = ("data.seed", "train.seed")
_NAMES: dict[Any, str] = {
    ("forward_kl", 0.0): "Supervised KD",
    ("forward_kl", 0.5): "ImitKD",
    ("total_variation", 0.5): "f-distill",
}
_MIXES: dict[Any, str] = {0.0: "Supervised GKD", 0.5: "Mixed GKD", 1.0: "On-policy GKD"}
_SHORT = {"forward_kl": "FKL", "reverse_kl": "RKL", "total_variation": "TV"}


class Setting(NamedTuple):
    """How an evaluation decoded, and which examples. A field is None if the run did not record it.

    The fields are those of `EvalConfig`; `others` holds further settings as text.
    """

    decoding: Any = None
    temperature: Any = None
    num_samples: Any = None
    num_beams: Any = None
    alpha: Any = None
    calculator: Any = False
    split: Any = None
    num_examples: Any = None
    target_length: Any = None
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Setting":
        """Makes a setting from the description of an `EvalConfig`, without the unused fields."""
        used = decodings.USED_BY.get(str(config.get("decoding")), ())
        unused = {one for names in decodings.USED_BY.values() for one in names}.difference(used)
        known = {key: v for key, v in config.items() if key not in unused | _NOT_DECODING and v}
        others = [f"{key} {said(v)}" for key, v in known.items() if key not in cls._fields]
        plain = {
            key: v for key in cls._fields if isinstance(v := known.get(key), str | int | float)
        }
        return cls(**plain, others=tuple(others))

    @property
    def is_main(self) -> bool:
        """False for samples at temperatures other than 1: of the figures only Fig. 4 shows them."""
        return self.decoding != "sample" or self.temperature in (None, 1)

    def __str__(self) -> str:
        """The setting in words, such as "greedy with the calculator, test, first 512 examples"."""
        text = self.decoding or "decoding not recorded"
        if self.decoding == "sample":
            text = f"sampled at temperature {said(self.temperature)}"
            text += f", {self.num_samples} each" if (self.num_samples or 1) > 1 else ""
        if self.decoding == "beam":
            text = f"{said(self.num_beams)} beams of alpha {said(self.alpha)}"
        text += " with the calculator" if self.calculator else ""
        text = ", ".join([text, *self.others, *([self.split] if self.split else [])])
        text += f", first {said(self.num_examples)} examples" if self.num_examples else ""
        return text + (f", up to {self.target_length} tokens" if self.target_length else "")


class Evaluation(NamedTuple):
    """The metrics of one task at one step; `step` is None if it was not recorded."""

    task: str
    setting: Setting
    step: int | None
    values: dict[str, float]


class Method(NamedTuple):
    """The loss that a run minimises."""

    kind: str  # "sft", "seqkd", "distillation", "rl"; "unknown" without a readable run.json
    divergence: str = ""  # such as "jsd(0.1)" or "forward_kl"; "" for a cross-entropy
    fraction: float | str = 0.0  # the paper's lambda; for a schedule, its description
    alpha: float | None = None  # the weight of the divergence in RL + GKD

    @property
    def title(self) -> str:
        """The paper's name of the method."""
        name = divergence_name(self.divergence)
        if self.kind == "rl":
            return "RL" if self.alpha == 0 or not self.divergence else f"RL + GKD, {name}"
        if self.kind != "distillation":
            return {"sft": "SFT", "seqkd": "SeqKD"}.get(self.kind, "no readable run.json")
        mix = _MIXES.get(self.fraction)
        described = f"{mix}, {name}" if mix else f"GKD, {name}, λ = {self.fraction}"
        return _NAMES.get((self.divergence, self.fraction), described)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run, from its folder or from a line of an archive."""

    name: str  # the path of the run below its RUN_DIR
    slug: str = ""  # the name as a file name, unique within a report
    root: pathlib.Path  # the RUN_DIR or the archive that the run was read from
    folder: pathlib.Path  # of the run; in an archive, the archive followed by the name
    about: dict[str, Any]  # the content of run.json; {} if it cannot be read
    lines: list[dict[str, Any]]  # of metrics.jsonl, in the order of their steps
    decoded: list[dict[str, Any]]  # each metrics.json that `gkd-jax eval` wrote for its checkpoints
    # Task -> (step, file of decoded rows), in the order of the steps.
    samples: dict[str, list[tuple[int, pathlib.Path]]] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)  # what is unreadable or disagrees

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The recorded configuration, by dotted names such as "method.divergence.beta"."""
        names = ("contents", "parameters", "process_shards")
        beside = {name: self.about.get(name) for name in names}
        changes = as_objects(self.about.get("changes"))
        beside["changes"] = [one for one in changes if not _is_harmless(str(one.get("field")))]
        beside["targets_made_by_a_model"] = bool(self.about.get("targets_made_by"))
        recorded = {name: value for name, value in beside.items() if value}
        return dict(_flat({**as_object(self.about.get("recipe")), **recorded}))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The fields that identify the configuration; runs that share them differ in the seed.

        The hash of a content stands in the place of its path.
        """
        kept = {}
        for name, value in self.fields.items():
            path = name.removeprefix("contents.")
            # Of several tasks, the field that is named by the path has the number of rows.
            if path != name and whole(kept.get(path)) is None:
                kept.pop(path, None)
                name = path
            if name not in SEEDS and UNCHANGING.isdisjoint(name.split(".")):
                kept[name] = value
        return kept or {"name": self.name}

    @property
    def seed(self) -> tuple[Any, ...]:
        return tuple(self.fields.get(name) for name in SEEDS)

    @functools.cached_property
    def method(self) -> Method:
        method = as_object(as_object(self.about.get("recipe")).get("method"))
        divergence, rl = method.get("divergence"), as_object(method.get("rl"))
        name = "" if divergence is None else said(divergence)
        if isinstance(divergence, dict) and divergence.get("type") == "JSD":
            name = f"jsd({said(divergence.get('beta'))})"
        fraction = finite(method.get("on_policy_fraction", 0.0))
        fraction = said(method.get("on_policy_fraction")) if fraction is None else fraction
        if rl:
            return Method("rl", name, fraction, finite(rl.get("alpha")))
        if name:
            return Method("distillation", name, fraction)
        cross_entropy = "seqkd" if self.about.get("targets_made_by") else "sft"
        return Method(cross_entropy if method else "unknown")

    @property
    def task(self) -> str | None:
        """The task on which the recipe evaluates, named as in its metrics."""
        task = self.fields.get("evaluation.task") or self.fields.get("data.task")
        return task_names.display_name(task) if isinstance(task, str) else None

    @functools.cached_property
    def tasks(self) -> frozenset[str]:
        """The tasks that the run was evaluated on, and the task that its recipe evaluates."""
        evaluated = frozenset(one.task for one in self.evaluations)
        return evaluated | {self.task} if self.task else evaluated

    @property
    def several_tasks(self) -> str:
        """The names of the tasks that share every batch; "" for one task."""
        tasks = as_object(as_object(self.about.get("recipe")).get("data")).get("task")
        return " + ".join(map(task_names.display_name, tasks)) if isinstance(tasks, dict) else ""

    @property
    def train_steps(self) -> int | None:
        return whole(self.fields.get("train.train_steps"))

    @property
    def last_step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def finished(self) -> bool:
        return self.train_steps is None or self.last_step >= self.train_steps

    def parameters(self, role: str) -> int | None:
        return whole(self.fields.get(f"parameters.{role}"))

    def size(self, role: str) -> str:
        """The size with the number of parameters, such as "small (77M)"; "" without such a model.

        The number is part of the text because architectures share the names of sizes.
        """
        name, count = self.fields.get(f"{role}.size"), self.parameters(role)
        shown = "" if count is None else short_count(count)
        if not isinstance(name, str) or (name == "tiny" and shown):  # "tiny" may be any size
            return shown
        return f"{name} ({shown})" if shown else name

    @property
    def teacher(self) -> str:
        """The teacher in words: its size, or that it is the student; "" without a teacher."""
        decay = said(self.fields.get("teacher.decay"))
        learning = {
            "LiveStudent": "the student itself",
            "MovingAverage": f"the student's moving average, decay {decay}",
            "TaskTeachers": f"one for each task ({short_count(self.parameters('teacher') or 0)})",
        }
        return learning.get(str(self.fields.get("teacher.type")), self.size("teacher"))

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """The points (step, value) of every line that has a finite `metric`."""
        values = ((line["step"], finite(line.get(metric))) for line in self.lines)
        return [(float(step), value) for step, value in values if value is not None]

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations of training in order, then those of `gkd-jax eval`."""
        recorded = as_object(as_object(self.about.get("recipe")).get("evaluation"))
        found = []
        for line in self.lines:
            how = {**recorded, "step": line["step"]}
            found += _evaluations(how, task_names.evaluation_in(line))
        for content in self.decoded:
            how = as_object(content.get("evaluation"))
            for task in (name for name in content if name != "evaluation"):
                named = as_object(content[task]).items()
                found += _evaluations(how, {f"{task}/{metric}": value for metric, value in named})
        return found

    @functools.cached_property
    def finals(self) -> dict[tuple[str, Setting], dict[str, float]]:
        """The metrics of the final checkpoint, by (task, setting).

        Where training and `gkd-jax eval` report the same metric, the number of training counts.
        """
        found: dict[tuple[str, Setting], dict[str, float]] = {}
        for task, setting, step, values in self.evaluations:
            if self.finished and step == self.last_step:
                found[task, setting] = {**values, **found.get((task, setting), {})}
        return found


def _evaluations(how: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[Evaluation]:
    """One evaluation of each task, from how it decoded and the numbers by TASK/METRIC."""
    tasks: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        task, _, metric = name.rpartition("/")
        if task and (number := finite(value)) is not None:
            tasks.setdefault(task, {})[metric] = number
    setting, step = Setting.of(how), whole(how.get("step"))
    return [Evaluation(task, setting, step, values) for task, values in tasks.items()]


def divergence_name(divergence: str) -> str:
    """The paper's short name: "jsd(0.1)" -> "JSD(0.1)", "forward_kl" -> "FKL"."""
    return _SHORT.get(divergence, divergence.replace("jsd(", "JSD("))


def said(value: Any) -> str:
    """A recipe's value in words: {"type": "Linear", "warmup": 2} -> "Linear(warmup=2)"."""
    if isinstance(value, Mapping):
        names = ("type", "function")  # of a dataclass, and of a function with values of its own
        name = next((value[key] for key in names if key in value), "")
        inside = ", ".join(f"{key}={said(one)}" for key, one in value.items() if key not in names)
        return f"{name}({inside})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def short_count(count: int) -> str:
    """77_000_000 -> "77M"."""
    units = ((size, unit) for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if count >= size)
    size, unit = next(units, (1, ""))
    return f"{count / size:.3g}{unit}"


def finite(value: Any) -> float | None:
    """A JSON value as a number; None if it is not a number, or is NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: Any) -> int | None:
    number = finite(value)
    return int(number) if number is not None and number == int(number) else None


def real_path(path: pathlib.Path) -> pathlib.Path:
    """The path without links; the same path if it has a character that no path can have."""
    return path if "\0" in str(path) else path.resolve()


def as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _is_harmless(name: str) -> bool:
    """Whether a run is the same run if this field, such as a saving period, changed on the way."""
    return not UNCHANGING.isdisjoint(name.split(".")) or name.startswith("evaluation")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested fields. Lists become JSON text, which can be hashed."""
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            scalar = inner is None or isinstance(inner, str | int | float)
            yield f"{prefix}{name}", inner if scalar else json.dumps(inner, sort_keys=True)
