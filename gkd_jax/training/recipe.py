"""`Recipe`: everything that a run is, as one frozen value; and its description for run.json.

Whatever identifies a run reads `describe(recipe)`: the record of the run, the refusal to go on with
another one, and the report's grouping. A field that is added to any of the configurations is
described, compared and grouped by without further code.
"""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.gkd_config import GKDConfig, Schedule
from gkd_jax.input.data import DataConfig
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import settings
from gkd_jax.text.settings import describe
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
