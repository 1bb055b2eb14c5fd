"""What is known of a run before any array exists: shapes, shardings and jitted functions."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax
import seqio

from gkd_jax import gkd, sharding, train_state
from gkd_jax.batch import Batch, TopK
from gkd_jax.input import data, teacher_cache
from gkd_jax.models import t5
from gkd_jax.optimizers import Schedule
from gkd_jax.sampling import banned_tail
from gkd_jax.storage import pretrained
from gkd_jax.storage.pretrained import Model
from gkd_jax.text import vocabularies
from gkd_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long a run is and what it leaves behind.

    Attributes:
        train_steps: updates, counted from 0.
        seed: of initialisation, coins, samples and dropout.
        eval_period: evaluate every so many steps, and at the end; None evaluates at the end.
        save_period: save every so many steps, and at the end.
        keep: newest checkpoints kept, two so that a damaged one has one before it; None keeps all.
        keep_period: checkpoints of steps that it divides are kept besides.
        best_metric: a number of the evaluation, such as "accuracy": the checkpoint with the best is
            kept besides, of those that were saved where EVAL_PERIOD evaluates.
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
        for name in ("train_steps", "save_period", "num_microbatches", "log_period"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("eval_period", "keep", "keep_period"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        if self.best_mode not in ("max", "min"):
            raise ValueError(f"best_mode must be 'max' or 'min', got {self.best_mode!r}")
        if self.best_metric is not None and self.eval_period is None:
            raise ValueError(f"best_metric={self.best_metric!r} needs EVAL_PERIOD, got None")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything about a run that is known before any array exists."""

    mesh: Mesh
    task: Any
    vocabulary: seqio.Vocabulary
    models: gkd.Models
    method: gkd.GKDConfig
    optimizer: optax.GradientTransformation
    state: TrainState  # abstract, with shardings
    teacher: t5.Params | None  # abstract, with shardings
    sample: Callable[..., Any]
    update: Callable[..., Any]
    cached_k: int = 0  # of the teacher's cached scores, which batches of the dataset have

    def batch(self, rows: int, shape: tuple[int, int], num_samples: int = 1, k: int = 0) -> Batch:
        """An abstract batch of `rows` prompts, `num_samples` targets each, of lengths (S, T)."""
        where = sharding.batch_sharding(self.mesh)
        source, target = shape

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        per_token = rows * num_samples, target
        return Batch(
            array(jnp.int32, rows, source),
            array(jnp.int32, *per_token),
            array(jnp.float32, *per_token),
            None
            if k == 0
            else TopK(
                array(jnp.int32, *per_token, k),
                array(jnp.float32, *per_token, k),
                array(jnp.float32, *per_token),
            ),
        )


def build(
    *,
    student: Model,
    teacher: Model | None,
    data_config: data.DataConfig,
    method: gkd.GKDConfig,
    optimizer: Callable[..., optax.GradientTransformation],
    schedule: Schedule,
    trainer: Trainer,
    mesh_config: sharding.MeshConfig,
    pending: frozenset[str] = frozenset(),
    check_remote: bool = True,
    devices: Sequence[Any] | None = None,
) -> Program:
    """Checks a configuration and makes its jitted functions, from shapes alone.

    Args:
        pending: checkpoints that are not looked at: another run will make them, or they are remote
            and this is a dry run.
        check_remote: False leaves remote vocabularies untouched.
        devices: of the mesh; None takes all there are.

    Raises:
        ValueError: for whatever does not fit together, naming the value and what was expected.
    """
    task, vocabulary = data.open_task(data_config, check_remote=check_remote)
    data.check_split(task, data_config.split)
    _check_student(student, method)
    cached_k = _check_cache(data_config.teacher_cache, method, vocabulary)
    if student.memory != "device":
        raise ValueError(f"a student is trained in memory='device', got {student.memory!r}")
    if method.divergence is None:
        teacher = None
    elif teacher is None and (cached_k == 0 or method.uses_samples()):
        raise ValueError(
            "a divergence needs a teacher (or, with on_policy_fraction 0, a teacher_cache), "
            "got teacher=None"
        )
    pretrained.check_vocabularies(vocabulary, {"student": student, "teacher": teacher}, pending)
    num_pieces = vocabularies.num_pieces(vocabulary, check_remote=check_remote)
    models = _models(num_pieces, student, teacher, pending)
    pretrained.check_special_ids(models.student, vocabulary, check_remote=check_remote)
    mesh = sharding.make_mesh(mesh_config, devices)
    _check_batch(data_config.batch_size, trainer.num_microbatches, mesh)

    banned = banned_tail(models.student, models.num_pieces)
    method = dataclasses.replace(
        method, sampling=dataclasses.replace(method.sampling, banned_ids=banned)
    )
    transformation = optimizer(schedule=schedule)
    state = train_state.abstract(models.student, transformation)
    state = sharding.with_shardings(state, train_state.shardings(state, mesh))
    teacher_params = None
    if teacher is not None:
        assert models.teacher is not None
        teacher_params = pretrained.frozen_shapes(teacher, models.teacher, mesh)

    sample, update = _jit(method, models, transformation, trainer, mesh, state)
    return Program(
        mesh=mesh,
        task=task,
        vocabulary=vocabulary,
        models=models,
        method=method,
        optimizer=transformation,
        state=state,
        teacher=teacher_params,
        sample=sample,
        update=update,
        cached_k=cached_k,
    )


def _check_student(student: Model, method: gkd.GKDConfig) -> None:
    if method.rl is not None and student.dropout_rate > 0:
        raise ValueError(
            "a reward needs DROPOUT_RATE 0: samples are drawn without dropout, and log Q of a "
            f"sample must be that of the draw; got dropout_rate={student.dropout_rate}"
        )
    if student.param_dtype != "float32":
        raise ValueError(
            f"a student is trained in param_dtype='float32', got {student.param_dtype!r}; "
            "dtype is that of its matrix products"
        )


def _check_cache(path: str | None, method: gkd.GKDConfig, vocabulary: seqio.Vocabulary) -> int:
    """The k of a teacher cache that fits the method; 0 where there is none."""
    if path is None:
        return 0
    about = teacher_cache.read_about(path)
    if method.divergence is None or (method.mixing == "example" and method.uses_samples()):
        raise ValueError(
            f"teacher_cache={path!r} serves steps on the dataset's targets alone: it needs a "
            "divergence, and mixing='step'"
        )
    if method.teacher_temperature != about["temperature"]:
        raise ValueError(
            f"teacher_cache={path!r} was made at temperature {about['temperature']}, got "
            f"teacher_temperature {number_or_name(method.teacher_temperature)}"
        )
    expected = vocabularies.content_hash(vocabulary)
    if about["vocabulary"] != expected:
        raise ValueError(
            f"teacher_cache={path!r} was made with another vocabulary (content "
            f"{about['vocabulary'][:12]}) than this task's (content {expected[:12]})"
        )
    return about["k"]


def _jit(
    method: gkd.GKDConfig,
    models: gkd.Models,
    optimizer: optax.GradientTransformation,
    trainer: Trainer,
    mesh: Mesh,
    state: TrainState,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two jitted functions of a step, sample and update."""

    def sample_batch(params, batch, key):
        with sharding.use(mesh):
            return gkd.sample_targets(method, models, params, batch, key)

    parts = (method, models, optimizer, trainer.num_microbatches)

    def update_batch(state, teacher_params, batch, key, advantages=None):
        with sharding.use(mesh):
            new, metrics = gkd.update(*parts, state, teacher_params, batch, key, advantages)
        if not trainer.skip_nonfinite:
            return new, metrics
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)
        return kept._replace(step=new.step), {**metrics, "skipped": 1.0 - finite}

    # What was drawn is replicated: every process reads all of it, for logs and rewards.
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return (
        jax.jit(sample_batch, out_shardings=(rows, everywhere)),
        jax.jit(update_batch, out_shardings=(shardings_of(state), everywhere), donate_argnums=0),
    )


def _models(
    num_pieces: int, student: Model, teacher: Model | None, pending: frozenset[str]
) -> gkd.Models:
    def config(model: Model) -> t5.T5Config:
        return model.config(num_pieces, pending=model.checkpoint in pending)

    return gkd.Models(
        student=config(student),
        teacher=None if teacher is None else config(teacher),
        num_pieces=num_pieces,
    )


def _check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    sharding.check_batch_size(batch_size, mesh)
    if batch_size % num_microbatches:
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide the batch size {batch_size}"
        )
    sharding.check_batch_size(batch_size // num_microbatches, mesh)


def shardings_of(shapes: Any) -> Any:
    """The shardings of placed arrays or `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: x.sharding, shapes)


def plan(program: Program, data_config: data.DataConfig, trainer: Trainer) -> str:
    """What a run will do, in a few lines."""
    models, method = program.models, program.method
    mesh = " x ".join(f"{name}={size}" for name, size in program.mesh.shape.items())
    name = name_of(method.divergence) or "cross-entropy"
    lines = [
        f"task       {data_config.task} ({data_config.split}), batch {data_config.batch_size}, "
        f"lengths {_shapes_text(data_config)}, {models.num_pieces} pieces",
        f"student    {t5.num_params(program.state.params):,} parameters",
        "teacher    "
        + (f"{t5.num_params(program.teacher):,} parameters" if program.teacher else "none")
        + (f", top {program.cached_k} of {data_config.teacher_cache}" if program.cached_k else ""),
        f"loss       {name}, {method.reduction.__name__}, "
        f"on-policy fraction {number_or_name(method.on_policy_fraction)}"
        + (" of each batch" if method.mixing == "example" else "")
        + (f", {method.num_samples} samples a prompt" if method.num_samples > 1 else "")
        + (f", reward {name_of(method.rl.reward)}, alpha {method.rl.alpha}" if method.rl else ""),
        f"steps      {trainer.train_steps}",
        f"mesh       {mesh}",
    ]
    return "\n".join(lines)


def name_of(function: Any) -> str | None:
    """A function's own name, through `functools.partial`; a callable object's class."""
    if function is None:
        return None
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def number_or_name(value: Any) -> Any:
    return name_of(value) if callable(value) else value


def _shapes_text(data_config: data.DataConfig) -> str:
    return ", ".join(f"{source}/{target}" for source, target in data_config.shapes())


class Steps(NamedTuple):
    """Compiled functions by (S, T).

    Attributes:
        sample: of on-policy steps.
        update_samples: of a batch that `sample` made.
        update_dataset: of a batch as the dataset has it.
    """

    sample: dict[tuple[int, int], Any]
    update_samples: dict[tuple[int, int], Any]
    update_dataset: dict[tuple[int, int], Any]


class StepArguments(NamedTuple):
    """Abstract arguments of `Program.sample` and `Program.update`, of the step kinds that lambda
    can reach; None for the others."""

    sample: tuple[Any, ...] | None
    update_samples: tuple[Any, ...] | None
    update_dataset: tuple[Any, ...] | None


def step_arguments(program: Program, rows: int, shape: tuple[int, int]) -> StepArguments:
    """Those of a batch of `rows` prompts of lengths (S, T)."""
    method = program.method
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = program.batch(rows, shape)
    common = (program.state, program.teacher)
    of_dataset = program.batch(rows, shape, k=program.cached_k)
    update_dataset = (*common, of_dataset, key) if method.uses_dataset() else None
    if not method.uses_samples():
        return StepArguments(None, None, update_dataset)
    drawn = program.batch(rows, shape, method.num_samples)
    extra = ()
    if method.rl is not None:
        where = sharding.batch_sharding(program.mesh)
        extra = (jax.ShapeDtypeStruct(drawn.targets.shape[:1], jnp.float32, sharding=where),)
    sample = (program.state.params, batch, key)
    return StepArguments(sample, (*common, drawn, key, *extra), update_dataset)


def compile_steps(program: Program, data_config: data.DataConfig) -> Steps:
    """The step kinds that lambda can reach, compiled for each shape of batch."""
    steps = Steps({}, {}, {})
    for shape in data_config.shapes():
        arguments = step_arguments(program, data_config.batch_size, shape)
        if arguments.update_dataset is not None:
            lowered = program.update.lower(*arguments.update_dataset)
            steps.update_dataset[shape] = lowered.compile()
        if arguments.sample is None or arguments.update_samples is None:
            continue
        steps.sample[shape] = program.sample.lower(*arguments.sample).compile()
        if arguments.update_samples == arguments.update_dataset:
            steps.update_samples[shape] = steps.update_dataset[shape]
        else:
            lowered = program.update.lower(*arguments.update_samples)
            steps.update_samples[shape] = lowered.compile()
    return steps


def phases(
    program: Program, data_config: data.DataConfig
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The jitted functions of a step with their abstract arguments, as `compile_steps` has them.

    "score" is the teacher alone, which a run has inside "update". "update_dataset" is there where
    batches of the dataset have another shape than sampled ones.
    """
    rows, shape, config = data_config.batch_size, data_config.shapes()[-1], program.models.teacher
    arguments = step_arguments(program, rows, shape)
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    if arguments.sample is not None:
        found["sample"] = (program.sample, arguments.sample)
    update = arguments.update_samples or arguments.update_dataset
    assert update is not None  # every run has steps
    if config is not None:

        def score(params, batch):
            with sharding.use(program.mesh):
                return t5.logits(config, params, batch)

        where = sharding.batch_sharding(program.mesh)
        found["score"] = (jax.jit(score, out_shardings=where), (program.teacher, update[2]))
    found["update"] = (program.update, update)
    if arguments.update_dataset is not None and arguments.update_dataset != update:
        found["update_dataset"] = (program.update, arguments.update_dataset)
    return found


def model_info(program: Program) -> str:
    """Every array of both models; goes to model_info.txt."""
    student = program.state.params
    text = "student\n" + train_state.describe(student, shardings_of(student))
    if program.teacher is not None:
        described = train_state.describe(program.teacher, shardings_of(program.teacher))
        text += "\n\nteacher\n" + described
    return text + "\n"
