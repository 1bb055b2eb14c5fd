"""What is known of a run before any array exists: shapes, shardings and jitted functions."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax
import seqio

from gkd_jax import data, gkd, pretrained, sharding, train_state
from gkd_jax.batch import Batch
from gkd_jax.models import t5
from gkd_jax.optimizers import Schedule
from gkd_jax.pretrained import Model
from gkd_jax.sampling import banned_tail
from gkd_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """How long a run is and what it leaves behind.

    Attributes:
        train_steps: updates, counted from 0.
        seed: of initialisation, coins, samples and dropout.
        eval_period: evaluate every so many steps, and at the end; None evaluates at the end.
        save_period: save every so many steps, and at the end.
        keep: newest checkpoints kept; None keeps all.
        num_microbatches: accumulate gradients over so many parts of the batch.
        log_period: steps between lines where there is no terminal.
    """

    train_steps: int
    seed: int = 0
    eval_period: int | None = None
    save_period: int = 1000
    keep: int | None = 1
    num_microbatches: int = 1
    log_period: int = 50

    def __post_init__(self):
        for name in ("train_steps", "save_period", "num_microbatches", "log_period"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("eval_period", "keep"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
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

    def batch(self, rows: int, shape: tuple[int, int]) -> Batch:
        """An abstract batch of `rows` and (S, T)."""
        where = sharding.batch_sharding(self.mesh)
        source, target = shape
        return Batch(
            jax.ShapeDtypeStruct((rows, source), jnp.int32, sharding=where),
            jax.ShapeDtypeStruct((rows, target), jnp.int32, sharding=where),
            jax.ShapeDtypeStruct((rows, target), jnp.float32, sharding=where),
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
) -> Program:
    """Checks a configuration and makes its jitted functions, from shapes alone.

    Args:
        pending: checkpoints that do not exist yet, since another run will make them.

    Raises:
        ValueError: for whatever does not fit together, naming the value and what was expected.
    """
    task, vocabulary = data.open_task(data_config)
    data.check_split(task, data_config.split)
    if method.divergence is None:
        teacher = None
    elif teacher is None:
        raise ValueError("a divergence needs a teacher, got teacher=None")
    models = _models(vocabulary, student, teacher, pending)
    mesh = sharding.make_mesh(mesh_config)
    _check_batch(data_config.batch_size, trainer.num_microbatches, mesh)

    banned = banned_tail(models.student, models.num_pieces)
    method = dataclasses.replace(
        method, sampling=dataclasses.replace(method.sampling, banned_ids=banned)
    )
    transformation = optimizer(schedule=schedule)
    state = train_state.abstract(models.student, transformation)
    state = _with_shardings(state, train_state.shardings(state, mesh))
    teacher_params = None if teacher is None else _abstract_teacher(models, teacher, mesh)

    def sample_batch(params, batch, key):
        with sharding.use(mesh):
            return gkd.sample_targets(method, models, params, batch, key)

    parts = (method, models, transformation, trainer.num_microbatches)

    def update_batch(state, teacher_params, batch, key):
        with sharding.use(mesh):
            return gkd.update(*parts, state, teacher_params, batch, key)

    return Program(
        mesh=mesh,
        task=task,
        vocabulary=vocabulary,
        models=models,
        method=method,
        optimizer=transformation,
        state=state,
        teacher=teacher_params,
        sample=jax.jit(sample_batch, out_shardings=sharding.batch_sharding(mesh)),
        update=jax.jit(
            update_batch,
            out_shardings=(shardings_of(state), sharding.replicated(mesh)),
            donate_argnums=0,
        ),
    )


def _models(
    vocabulary: seqio.Vocabulary, student: Model, teacher: Model | None, pending: frozenset[str]
) -> gkd.Models:
    """Both models' sizes, and their vocabularies compared."""
    num_pieces = vocabulary.vocab_size
    pretrained.check_vocabularies(vocabulary, {"student": student, "teacher": teacher}, pending)

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


def _abstract_teacher(models: gkd.Models, teacher: Model, mesh: Mesh) -> t5.Params:
    assert models.teacher is not None
    shapes = t5.abstract_params(models.teacher, teacher.param_dtype)
    placed = sharding.tree_shardings(shapes, t5.logical_axes(shapes), mesh)
    return _with_shardings(shapes, placed)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def shardings_of(shapes: Any) -> Any:
    """The shardings of placed arrays or `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: x.sharding, shapes)


def plan(program: Program, data_config: data.DataConfig, trainer: Trainer) -> str:
    """What a run will do, in a few lines."""
    models, method = program.models, program.method
    mesh = " x ".join(f"{name}={size}" for name, size in program.mesh.shape.items())
    divergence = method.divergence
    name = getattr(divergence, "__name__", str(divergence)) if divergence else "cross-entropy"
    lines = [
        f"task       {data_config.task} ({data_config.split}), batch {data_config.batch_size}, "
        f"lengths {_shapes_text(data_config)}, {models.num_pieces} pieces",
        f"student    {t5.num_params(program.state.params):,} parameters",
        "teacher    "
        + (f"{t5.num_params(program.teacher):,} parameters" if program.teacher else "none"),
        f"loss       {name}, {method.reduction.__name__}, "
        f"on-policy fraction {method.on_policy_fraction}",
        f"steps      {trainer.train_steps}",
        f"mesh       {mesh}",
    ]
    return "\n".join(lines)


def _shapes_text(data_config: data.DataConfig) -> str:
    return ", ".join(f"{source}/{target}" for source, target in data_config.shapes())


def compile_steps(program: Program, data_config: data.DataConfig):
    """The step kinds that lambda can reach, compiled for each shape of batch."""
    fraction = program.method.on_policy_fraction
    key = jax.eval_shape(lambda: jax.random.key(0))
    sample_fns, update_fns = {}, {}
    for shape in data_config.shapes():
        batch = program.batch(data_config.batch_size, shape)
        if fraction > 0:
            sample_fns[shape] = program.sample.lower(program.state.params, batch, key).compile()
        update_fns[shape] = program.update.lower(
            program.state, program.teacher, batch, key
        ).compile()
    return sample_fns, update_fns


def model_info(program: Program) -> str:
    """Every array of both models; goes to model_info.txt."""
    student = program.state.params
    text = "student\n" + train_state.describe(student, shardings_of(student))
    if program.teacher is not None:
        described = train_state.describe(program.teacher, shardings_of(program.teacher))
        text += "\n\nteacher\n" + described
    return text + "\n"
