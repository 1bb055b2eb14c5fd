"""`Recipe`: everything that a run is, as one frozen value; and its description for run.json.

Whatever identifies a run reads `describe(recipe)`: the record of the run, the refusal to go on with
another one, and the report's grouping. A field that is added to any of the configurations is
described, compared and grouped by without further code.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import inspect
import os
from typing import Any

import numpy as np

from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.gkd_config import GKDConfig, Schedule
from gkd_jax.input.data import DataConfig
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import settings
from gkd_jax.training.optimizers import Linear, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run is and what it leaves behind.

    Attributes:
        train_steps: updates, counted from 0.
        seed: of initialisation, coins, samples and dropout.
        eval_period: evaluate every so many steps, and at the end; None evaluates at the end.
        save_period: save every so many steps, at every evaluation and at the end.
        keep: newest checkpoints kept, two so that a damaged one has one before it; None keeps all.
        keep_period: checkpoints of steps that it divides are kept besides.
        best_metric: a number of the evaluation, such as "accuracy": the checkpoint with the best
            is kept besides.
        best_mode: whether the best is the "max" or the "min".
        num_microbatches: accumulate gradients over so many parts of the batch.
        log_period: steps between lines where there is no terminal.
        skip_nonfinite: where a step's loss or gradient is not finite, leave the student as it is
            and count; False ends the run there.
        sample_ahead: draw the samples of a step before the update of the step before it, so that
            neither host nor device waits between the two: they are one update old ("staleness" in
            the metrics), which Algorithm 1's are not. The step after a checkpoint draws its own.
    """

    train_steps: int
    seed: int = 0
    eval_period: int | None = None
    save_period: int = 1000
    keep: int | None = 2
    keep_period: int | None = None
    best_metric: str | None = None
    best_mode: str = "max"
    num_microbatches: int = 1
    log_period: int = 50
    skip_nonfinite: bool = False
    sample_ahead: bool = False

    def __post_init__(self):
        settings.check_types(self)
        for name in ("train_steps", "save_period", "num_microbatches", "log_period"):
            _check_positive(name, getattr(self, name))
        for name in ("eval_period", "keep", "keep_period"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name), " or None")
        if self.best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', got {self.best_mode!r}")
        if self.best_metric is not None and self.eval_period is None:
            raise ValueError(f"best_metric={self.best_metric!r} needs EVAL_PERIOD, got None")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")


def _check_positive(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer{alternative}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run trains, on what, how, and for how long.

    Attributes:
        student: what is trained.
        data: what it is trained on.
        method: the loss: GKD and its special cases.
        optimizer: `optimizers.Adafactor()` or `optimizers.AdamW()`, or the class alone.
        schedule: the learning rate.
        train: steps, seed and periods.
        teacher: None for SFT; left out where the method has no divergence.
        evaluation: None evaluates nothing.
        mesh: how devices are arranged.
    """

    student: ModelConfig
    data: DataConfig
    method: GKDConfig
    optimizer: Optimizer | type
    schedule: Linear
    train: TrainConfig
    teacher: ModelConfig | None = None
    evaluation: EvalConfig | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if isinstance(self.optimizer, type):  # from the command line: @optimizers.adamw
            make: Any = self.optimizer
            object.__setattr__(self, "optimizer", make())
        if self.method.divergence is None:
            object.__setattr__(self, "teacher", None)
        if self.evaluation is not None and self.evaluation.num_examples == 0:
            object.__setattr__(self, "evaluation", None)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type):  # pyright: ignore[reportArgumentType]
                raise ValueError(f"{field.name} must be a {field.type}, got {value!r}")
        self.learning_rate()
        describe(self)

    def learning_rate(self) -> Schedule:
        """The learning rate of each update."""
        return self.schedule.over(self.train.train_steps)


def phase_dir(model_dir: str, phase: str) -> str:
    """The MODEL_DIR of one run of a study; for gin files, which cannot join strings."""
    return os.path.join(model_dir, phase)


# What another run of the same MODEL_DIR may have changed: it does not change what a step computes.
MAY_CHANGE = (
    "train.train_steps",
    "train.eval_period",
    "train.save_period",
    "train.keep",
    "train.keep_period",
    "train.best_metric",
    "train.best_mode",
    "train.log_period",
    "evaluation",
    "mesh",
)

# Paths: what they lead to is compared, so that a folder may move and may not be replaced.
PATHS = (
    "student.checkpoint",
    "teacher.checkpoint",
    "data.task",
    "data.data_dir",
    "data.vocabulary",
    "data.teacher_cache",
)


def describe(value: Any) -> Any:
    """A value as JSON that holds everything that tells it from another.

    A dataclass becomes `{"type": its class, **its fields}`. A function becomes its name; where it
    closes over values or has keyword-only parameters, `{"function": its name, **those}`.

    Raises:
        ValueError: for a value whose settings cannot be read off it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic) or (hasattr(value, "item") and np.ndim(value) == 0):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [describe(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, functools.partial):
        inner = describe(value.func)
        inner = inner if isinstance(inner, dict) else {"function": inner}
        return {**inner, **describe(value.keywords), **_numbered(value.args)}
    if inspect.isfunction(value):
        return _describe_function(value)
    if inspect.isclass(value) or inspect.isbuiltin(value):
        return _name(value)
    raise ValueError(
        f"a recipe is made of plain values, functions and dataclasses, whose settings can be "
        f"recorded, got {value!r}"
    )


def _describe_function(function: Any) -> Any:
    original = inspect.unwrap(function)
    parameters = inspect.signature(original).parameters.values()
    settings = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    is_of_gin = function.__globals__["__name__"].startswith("gin.")
    if is_of_gin and settings:
        raise ValueError(
            f"the settings {sorted(settings)} of {_name(original)} are given to it by gin, where "
            "they cannot be recorded: write it as a frozen dataclass with __call__, as "
            "gkd_jax.divergences.JSD is"
        )
    closed_over = dict(inspect.getclosurevars(original).nonlocals)
    settings = {k: v for k, v in settings.items() if v is not inspect.Parameter.empty}
    if not settings and not closed_over:
        return _name(original)
    return {"function": _name(original), **describe(settings), **describe(closed_over)}


def _name(function: Any) -> str:
    """A name of ours alone; another's with its module."""
    name, module = function.__qualname__, function.__module__
    return name if module.startswith("gkd_jax.") else f"{module}.{name}"


def _numbered(arguments: tuple[Any, ...]) -> dict[str, Any]:
    return {f"argument_{i}": describe(argument) for i, argument in enumerate(arguments)}


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name of the field, old value, new value) wherever two descriptions differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else key
            yield from differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield name, old, new


def is_below(name: str, fields: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of some fields or lies inside one."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)
