"""`Recipe`: the whole configuration of a run as one frozen value, and how two recipes differ.

`describe(recipe)` identifies a run. It is recorded in run.json, it is compared when a MODEL_DIR is
resumed, and the report groups runs by it. A field that is added to any configuration is therefore
recorded, compared and grouped by without further code.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fnmatch
import os
from typing import Any

from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.gkd_config import GKDConfig, LiveStudent, MovingAverage, Schedule
from gkd_jax.input.data import DataConfig
from gkd_jax.sharding import MeshConfig
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import settings
from gkd_jax.text.settings import describe
from gkd_jax.training import save_times
from gkd_jax.training.optimizers import Linear, Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of a run, its periods, and which checkpoints it keeps.

    Attributes:
        train_steps: the number of updates.
        seed: the seed of initialisation, coins, samples and dropout.
        eval_period: steps between evaluations. The run also evaluates before the first step and
            after the last; None evaluates only then.
        save_period: the time between checkpoints, such as "10 minutes", "90 seconds" or "2h", or
            the number of steps. The run also saves before every evaluation but the first, and at
            the end.
        keep: the number of newest checkpoints to keep; None keeps all. With two, a damaged
            checkpoint has a predecessor.
        keep_period: checkpoints whose step is a multiple of this number are kept as well.
        best_metric: a metric of the evaluation, such as "accuracy"; of several tasks, one that
            names its task, such as "arithmetic/accuracy". The checkpoint with its best value is
            kept as well.
        best_mode: "max" or "min", whichever value of `best_metric` is the best.
        num_microbatches: the parts of the batch over which gradients are accumulated.
        log_period: steps between lines of progress where standard error is not a terminal.
        skip_nonfinite: True leaves the student unchanged at a step whose loss or gradient is not
            finite, and goes on; False ends the run there.
        sample_ahead: draw the samples of a step before the update of the previous step, so that
            host and device do not wait for each other. Unlike in Algorithm 1, such samples are one
            update old ("staleness" in the metrics). The step after a checkpoint draws its own.
        metrics_to: functions (step, values) that are given the numbers of each step as well, such
            as `trackers.WandB()`.
    """

    train_steps: int
    seed: int = 0
    eval_period: int | None = None
    save_period: int | str = "10 minutes"
    keep: int | None = 2
    keep_period: int | None = None
    best_metric: str | None = None
    best_mode: str = "max"
    num_microbatches: int = 1
    log_period: int = 50
    skip_nonfinite: bool = False
    sample_ahead: bool = False
    metrics_to: tuple[Callable[[int, Mapping[str, float]], None], ...] = ()

    def __post_init__(self):
        settings.check_types(self)
        settings.check_positive(self, "train_steps", "num_microbatches", "log_period")
        settings.check_positive(self, "eval_period", "keep", "keep_period")
        if isinstance(self.save_period, str):
            save_times.seconds(self.save_period)
        elif self.save_period < 1:
            raise ValueError(
                "save_period must be a positive integer or a time such as '10 minutes', got "
                f"{self.save_period!r}"
            )
        if self.sample_ahead and isinstance(self.save_period, str):
            raise ValueError(
                "with sample_ahead a save decides which weights draw the samples of the next step, "
                "so that saving by the clock would make a run that cannot be repeated: give "
                f"SAVE_PERIOD as a number of steps, such as 1000, got {self.save_period!r}"
            )
        if not all(callable(tracker) for tracker in self.metrics_to):
            raise ValueError(
                "metrics_to must be a tuple of functions (step, values) such as "
                f"(@trackers.WandB(),), got {self.metrics_to!r}"
            )
        if self.best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', got {self.best_mode!r}")
        if self.best_metric is not None and self.eval_period is None:
            raise ValueError(f"best_metric={self.best_metric!r} needs EVAL_PERIOD, got None")
        settings.check_seed(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskTeachers:
    """Several frozen teachers, each of which scores the rows of one task.

    The teachers may have different sizes and families. They share the vocabulary of the run.

    Attributes:
        models: the teacher of each task, by the name or path of the task in `DataConfig.task`.
    """

    models: Mapping[str, ModelConfig]

    def __post_init__(self):
        settings.check_types(self)
        for task, model in self.models.items():
            if not isinstance(model, ModelConfig):
                raise ValueError(
                    f"the teacher of each task must be a pretrained.ModelConfig, got {model!r} for "
                    f"{task!r}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run trains, on which data, with which loss, and for how long.

    Attributes:
        student: the model that is trained.
        data: the training data.
        method: the loss, which is GKD or one of its special cases.
        optimizer: `optimizers.Adafactor()` or `optimizers.AdamW()`; a class is instantiated.
        schedule: the learning-rate schedule.
        train: steps, seed and periods.
        teacher: a frozen model, one for each of several tasks, or the student itself: as it is at
            each step, or its moving average. It is set to None if the method has no divergence.
        evaluation: what is evaluated and how; None evaluates nothing.
        mesh: the sizes of the mesh axes.

    Raises:
        ValueError: for a field of the wrong type, a schedule longer than the run, or a value that
            cannot be described for the record.
    """

    student: ModelConfig
    data: DataConfig
    method: GKDConfig
    optimizer: Optimizer | type
    schedule: Linear
    train: TrainConfig
    teacher: ModelConfig | TaskTeachers | LiveStudent | MovingAverage | None = None
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
                advice = (
                    "; a reference begins with @: @optimizers.adamw" if type(value) is str else ""
                )
                raise ValueError(f"{field.name} must be a {field.type}, got {value!r}{advice}")
        self._check_tasks()
        self.learning_rate()
        describe(self)

    def _check_tasks(self) -> None:
        teacher, tasks = self.teacher, list(self.data.task_rows)
        if isinstance(teacher, TaskTeachers):
            if isinstance(self.data.task, str):
                raise ValueError(
                    "several teachers need several tasks: task must be {name: rows in every "
                    f"batch}}, got {self.data.task!r}"
                )
            if set(teacher.models) != set(tasks):
                raise ValueError(
                    "each task needs its teacher: the teachers are those of "
                    f"{list(teacher.models)}, and the tasks are {tasks}"
                )
        if len(tasks) > 1 and self.method.mixing == "example":
            raise ValueError(
                "mixing='example' samples rows by their places in the batch, and with several "
                "tasks these are rows of one task more often: mixing must be 'step'"
            )

    @property
    def teachers(self) -> dict[str, ModelConfig]:
        """The frozen teachers by the names of their fields, such as "teacher"."""
        if isinstance(self.teacher, TaskTeachers):
            return {f"teacher.models.{task}": model for task, model in self.teacher.models.items()}
        return {"teacher": self.teacher} if isinstance(self.teacher, ModelConfig) else {}

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The student and the frozen teachers by the names of their fields."""
        return {"student": self.student, **self.teachers}

    def with_models(self, models: Mapping[str, ModelConfig]) -> "Recipe":
        """Returns the recipe with other models, which are named as in `models`."""
        teacher = models.get("teacher", self.teacher)
        if isinstance(self.teacher, TaskTeachers):
            theirs = {task: models[f"teacher.models.{task}"] for task in self.teacher.models}
            teacher = TaskTeachers(models=theirs)
        return dataclasses.replace(self, student=models["student"], teacher=teacher)

    @property
    def self_teacher(self) -> LiveStudent | MovingAverage | None:
        """The teacher if it is the student or the student's average, else None."""
        teacher = self.teacher
        return teacher if isinstance(teacher, LiveStudent | MovingAverage) else None

    def evaluates_after(self, done: int) -> bool:
        """Returns whether the run evaluates after `done` steps: by `eval_period`, or at its end.

        As 0 is a multiple of every period, the run also evaluates before its first step.
        """
        last = self.train.train_steps
        is_due = done == last or (done < last and done % (self.train.eval_period or last) == 0)
        return is_due and self.evaluation is not None

    def learning_rate(self) -> Schedule:
        """Returns the learning rate as a function of the step."""
        return self.schedule.over(self.train.train_steps)


def choose_teacher(
    kind: str,
    frozen: Callable[[], ModelConfig],
    average: Callable[[], MovingAverage] = MovingAverage,
) -> ModelConfig | LiveStudent | MovingAverage:
    """Returns the teacher that the macro TEACHER names, for gin files.

    Args:
        kind: "frozen", "student" (the student with its weights of the step) or "ema" (the moving
            average of these weights).
        frozen: a function that makes the configuration of a frozen teacher. It is called for the
            kind "frozen" only, because the other kinds need neither a size nor a checkpoint.
        average: a function that makes the configuration of the moving average.

    Raises:
        ValueError: if there is no such kind.
    """
    kinds = {"frozen": frozen, "student": LiveStudent, "ema": average}
    if kind not in kinds:
        raise ValueError(f"TEACHER must be 'frozen', 'student' or 'ema', got {kind!r}")
    return kinds[kind]()


def phase_dir(model_dir: str, phase: str) -> str:
    """Returns the MODEL_DIR of a phase of a study, for gin files, which cannot join strings."""
    return os.path.join(model_dir, phase)


# Fields that a resumed run may change. They do not change what a training step computes, but for
# rounding, with two exceptions: `train_steps` moves the cool-down, and with `sample_ahead` the
# steps at which a run saves decide which samples are one update old.
MAY_CHANGE = (
    "train.train_steps",
    "train.eval_period",
    "train.save_period",
    "train.keep",
    "train.keep_period",
    "train.best_metric",
    "train.best_mode",
    "train.log_period",
    "train.metrics_to",
    "method.decode_rows",
    "evaluation",
    "mesh",
    "teacher.mesh",
    "teacher.models.*.mesh",
)

# Fields that hold paths. Their contents are compared instead, so that a folder may move but not be
# replaced by another.
PATHS = (
    "student.checkpoint",
    "teacher.checkpoint",
    "teacher.models.*.checkpoint",
    "data.task",
    "data.data_dir",
    "data.vocabulary",
    "data.teacher_cache",
)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted field name, old value, new value) for each difference of two descriptions."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else key
            yield from differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield name, old, new


def is_path(name: str) -> bool:
    """Returns whether a field holds a path, whose contents are compared."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATHS)


def is_below(name: str, fields: tuple[str, ...]) -> bool:
    """Returns whether a dotted name equals one of the fields or is nested inside one.

    A `*` in a field stands for any text, as in "teacher.models.*.mesh".
    """
    return any(
        name == field
        or name.startswith(f"{field}.")
        or fnmatch.fnmatchcase(name, field)
        or fnmatch.fnmatchcase(name, f"{field}.*")
        for field in fields
    )
