"""`build`: checks a recipe and makes the shapes, shardings and jitted functions of a run.

No array exists yet. `train` compiles and runs these functions (`compile_steps`); `precompile` and
`bench` take the same ones (`step_functions`).

Axes: S source, T target.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import functools
import sys
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from gkd_jax import gkd, sharding
from gkd_jax.batch import Batch, TopK
from gkd_jax.gkd import TrainState
from gkd_jax.input.data import Shape
from gkd_jax.models import lm
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import teachers, train_state
from gkd_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything about a run that is known before any array exists.

    Attributes:
        recipe: the configuration of the run.
        mesh: the mesh over all devices.
        learner: the method with the ids that end a sample, the configs of both models, and the
            optimizer.
        state: the student's training state as shapes with shardings.
        teacher: the teacher's parameters as shapes with shardings, or those of several teachers by
            their tasks; None without a frozen teacher.
        sample: the jitted function (student parameters, batch, key) -> (batch with the samples as
            targets, `Sample`).
        update: the jitted function (state, teacher parameters, batch, key, advantages) -> (state,
            metrics). It donates the state.
        cached_k: the number of ids per position in the teacher's stored scores, which batches of
            the data set then carry; 0 without a cache.
    """

    recipe: Recipe
    mesh: Mesh
    learner: gkd.Learner
    state: TrainState
    teacher: lm.Params | None
    sample: Callable[..., Any]
    update: Callable[..., Any]
    cached_k: int = 0

    @property
    def models(self) -> gkd.ModelPair:
        """The configs of the student and of its one teacher; see `gkd.Learner`."""
        return self.learner.models

    @property
    def reads_own_prompts(self) -> bool:
        """Whether the teacher reads other prompts than the student."""
        return self.recipe.teacher is not None and self.recipe.data.has_teacher_inputs

    @property
    def method(self) -> gkd.GKDConfig:
        """The recipe's method, with the ids that end a sample (see `build`)."""
        return self.learner.config

    def batch(self, rows: int, shape: Shape, num_samples: int = 1, k: int = 0) -> Batch:
        """Returns an abstract batch of `rows` prompts: shapes with shardings.

        Each prompt has `num_samples` targets. With `k`, each position of a target has k of the
        teacher's stored ids.
        """
        where = sharding.batch_sharding(self.mesh)
        source, target, *teachers = shape

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        per_token = rows * num_samples, target
        scores = (
            array(jnp.int32, *per_token, k),
            array(jnp.float32, *per_token, k),
            array(jnp.float32, *per_token),
        )
        return Batch(
            array(jnp.int32, rows, source),
            array(jnp.int32, *per_token),
            array(jnp.float32, *per_token),
            TopK(*scores) if k else None,
            input_lengths=array(jnp.int32, rows),
            teacher_inputs=array(jnp.int32, rows, *teachers) if teachers else None,
            teacher_input_lengths=array(jnp.int32, rows) if teachers else None,
        )


def build(
    recipe: Recipe,
    num_pieces: int,
    *,
    eos_ids: tuple[int, ...] | None = None,
    cached_k: int = 0,
    pending: frozenset[str] = frozenset(),
    devices: Sequence[Any] | None = None,
) -> Program:
    """Checks a recipe and makes its jitted functions, from shapes alone.

    Args:
        num_pieces: the number of ids in the vocabulary, extra ids included.
        eos_ids: the ids that end the student's samples, unless the recipe names others; None takes
            those of the model family.
        pending: checkpoints that are not opened, because another run will make them, or because
            they are remote and this is a dry run.

    Raises:
        ValueError: if settings do not fit together; the message names the value and what was
            expected.
    """
    _check_student(recipe.student, recipe.method)
    teacher, method = recipe.teacher, recipe.method
    has_scores = teacher is not None or (cached_k > 0 and not method.uses_samples())
    if method.divergence is not None and not has_scores:
        raise ValueError(
            "a divergence needs a teacher (or, with on_policy_fraction 0, a teacher_cache), "
            "got teacher=None"
        )
    _warn_of_nothing_to_learn(recipe)
    models = _models(num_pieces, recipe, pending)
    mesh = sharding.make_mesh(recipe.mesh, devices)
    _check_batch(recipe.data.batch_size, recipe.train.num_microbatches, mesh)
    if method.decode_rows is not None:
        sharding.check_batch_size(method.decode_rows, mesh, name="decode_rows")
    teachers.check_rows(recipe, mesh)

    if method.sampling.eos_ids is None:
        sampling = dataclasses.replace(method.sampling, eos_ids=eos_ids)
        method = dataclasses.replace(method, sampling=sampling)
    learner = gkd.Learner(
        config=method,
        models=models,
        optimizer=recipe.optimizer(recipe.learning_rate()),
        num_microbatches=recipe.train.num_microbatches,
        self_teacher=recipe.self_teacher,
        teacher_shares=teachers.teacher_shares(recipe, models.student, num_pieces, pending),
    )
    state = train_state.abstract(
        models.student,
        learner.optimizer,
        with_average=isinstance(recipe.teacher, gkd.MovingAverage),
    )
    state = sharding.with_shardings(state, train_state.shardings(state, mesh))
    sample, update = _jit(learner, mesh, state, recipe)
    return Program(
        recipe=recipe,
        mesh=mesh,
        learner=learner,
        state=state,
        teacher=teachers.abstract_params(recipe, learner, mesh),
        sample=sample,
        update=update,
        cached_k=cached_k,
    )


def _warn_of_nothing_to_learn(recipe: Recipe) -> None:
    """Warns if the teacher is the student itself and no setting makes the two differ."""
    method = recipe.method
    differs = (
        recipe.data.has_teacher_inputs
        or recipe.student.dropout_rate > 0
        or method.teacher_temperature != method.student_temperature
    )
    if isinstance(recipe.teacher, gkd.LiveStudent) and not differs:
        print(
            "WARNING: the teacher is the student itself and reads the same prompts: loss and "
            "gradient are 0. TASK_FEATURE_LENGTHS with 'teacher_inputs' gives it its own prompts",
            file=sys.stderr,
        )


def _check_student(student: ModelConfig, method: gkd.GKDConfig) -> None:
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
    if student.mesh is not None:
        raise ValueError(
            f"a student has the mesh of the run, sharding.MeshConfig(), got mesh={student.mesh}"
        )
    if student.memory != "device":
        raise ValueError(f"a student is trained in memory='device', got {student.memory!r}")


def _jit(
    learner: gkd.Learner, mesh: Mesh, state: TrainState, recipe: Recipe
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the two jitted functions of a step: `Program.sample` and `Program.update`."""

    def sample_batch(params, batch, key):
        with sharding.use(mesh):
            return gkd.sample_targets(learner.config, learner.models, params, batch, key)

    def update_batch(state, teacher_params, batch, key, advantages):
        with sharding.use(mesh):
            new, metrics = gkd.update(learner, state, teacher_params, batch, key, advantages)
        if not recipe.train.skip_nonfinite:
            return new, metrics
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)
        # The optimizer's schedule follows its own count, which leaves out the skipped steps.
        (_, done), *_ = optax.tree.get_all_with_path(state.opt_state, "count")
        more = {"skipped": 1.0 - finite, "learning_rate": recipe.learning_rate()(done)}
        return kept._replace(step=new.step), {**metrics, **more}

    # The samples are replicated, because every process reads all of them for logs and rewards.
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return (
        jax.jit(sample_batch, out_shardings=(rows, everywhere)),
        jax.jit(update_batch, out_shardings=(shardings_of(state), everywhere), donate_argnums=0),
    )


def _models(num_pieces: int, recipe: Recipe, pending: frozenset[str]) -> gkd.ModelPair:
    def config(model: ModelConfig) -> lm.Config:
        return model.config(num_pieces, pending=model.checkpoint in pending)

    student = config(recipe.student)
    teacher = teacher_mesh = None
    if recipe.self_teacher is not None:
        teacher = student
    elif "teacher" in recipe.teachers:
        frozen = recipe.teachers["teacher"]
        teacher, teacher_mesh = config(frozen), frozen.mesh
    return gkd.ModelPair(
        student=student, teacher=teacher, num_pieces=num_pieces, teacher_mesh=teacher_mesh
    )


def _check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    sharding.check_batch_size(batch_size, mesh)
    if batch_size % num_microbatches:
        raise ValueError(
            f"num_microbatches={num_microbatches} does not divide the batch size {batch_size}"
        )
    sharding.check_batch_size(batch_size // num_microbatches, mesh)


def initial_state(program: Program, params: lm.Params) -> TrainState:
    """Returns the student's state before the first update, from its parameters."""
    create = functools.partial(
        train_state.create,
        optimizer=program.learner.optimizer,
        with_average=program.state.average is not None,
    )
    return jax.jit(create, out_shardings=shardings_of(program.state))(params)


def shardings_of(shapes: Any) -> Any:
    """Returns the tree of the shardings of arrays or `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: x.sharding, shapes)


class StepParts(NamedTuple):
    """The functions of a step for one shape (S, T) of a batch: compiled, or their arguments.

    A function that lambda excludes is None.
    """

    sample: Any  # for on-policy steps
    update_samples: Any  # on a batch that `sample` made
    update_dataset: Any  # on a batch of the data set


def step_arguments(program: Program, rows: int, shape: Shape) -> StepParts:
    """Returns the abstract arguments of a step for `rows` prompts of lengths (S, T).

    Samples have the largest T of the run, whatever the T of the shape.
    """
    method = program.method
    key = jax.eval_shape(lambda: jax.random.key(0))
    sample = update_samples = update_dataset = None
    if method.uses_dataset():
        of_dataset = program.batch(rows, shape, k=program.cached_k)
        update_dataset = (program.state, program.teacher, of_dataset, key, None)
    if method.uses_samples():
        longest = program.recipe.data.shape_for_samples(shape)
        sample = (program.state.params, program.batch(rows, longest), key)
        drawn = program.batch(rows, longest, method.num_samples)
        advantages = None
        if method.rl is not None:
            where = sharding.batch_sharding(program.mesh)
            size = drawn.targets.shape[:1]
            advantages = jax.ShapeDtypeStruct(size, jnp.float32, sharding=where)
        update_samples = (program.state, program.teacher, drawn, key, advantages)
    return StepParts(sample, update_samples, update_dataset)


def compile_steps(program: Program) -> dict[Shape, StepParts]:
    """Compiles the functions of every step kind that lambda allows, for each shape of a batch."""

    def compiled(function: Any, arguments: Any) -> Any:
        return None if arguments is None else function.lower(*arguments).compile()

    found, data = {}, program.recipe.data
    for shape in data.shapes():
        sample, update_samples, update_dataset = step_arguments(program, data.batch_size, shape)
        on_dataset = on_samples = compiled(program.update, update_dataset)
        if update_samples != update_dataset:
            on_samples = compiled(program.update, update_samples)
        found[shape] = StepParts(compiled(program.sample, sample), on_samples, on_dataset)
    return found


def start_compiling(program: Program) -> Callable[[], dict[Shape, StepParts]]:
    """Starts `compile_steps` in a thread, beside which the run reads its data and its checkpoints.

    Settings of `jax.config.update` hold in that thread. Those of JAX's context managers, such as
    `jax.default_matmul_precision`, hold for the caller's thread alone and do not reach the steps.

    Returns:
        A function that waits for the compiled steps and returns them, or raises what
        `compile_steps` has raised.
    """
    steps: concurrent.futures.Future[dict[Shape, StepParts]] = concurrent.futures.Future()

    def compile_all():
        try:
            steps.set_result(compile_steps(program))
        except BaseException as error:
            steps.set_exception(error)

    # A run that fails before its first step does not wait for a thread that is a daemon.
    threading.Thread(target=compile_all, name="compile", daemon=True).start()
    return steps.result


def step_functions(program: Program) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns the jitted functions of a step with their abstract arguments.

    Returns:
        "sample" and "update", the functions that `compile_steps` compiles, for the largest shape of
        a batch. "score" is the teacher's forward pass alone, which a run has inside "update".
        "update_dataset" is present if batches of the data set have another form than sampled ones.
    """
    batches, learner = program.recipe.data, program.learner
    arguments = step_arguments(program, batches.batch_size, batches.shapes()[-1])
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    if arguments.sample is not None:
        found["sample"] = (program.sample, arguments.sample)
    update = arguments.update_samples or arguments.update_dataset
    teacher = gkd.teacher_now(learner, program.state, program.teacher)
    if teacher is not None:

        def score(params, batch):
            with sharding.use(program.mesh):
                logits = []
                for models, own, rows, _ in gkd.rows_by_teacher(learner, params, batch):
                    assert models.teacher is not None
                    assert own is not None
                    with sharding.use_sizes(models.teacher_mesh):
                        logits.append(lm.logits(models.teacher, own, rows.as_teacher_reads()))
                return logits

        where = sharding.batch_sharding(program.mesh)
        found["score"] = (jax.jit(score, out_shardings=where), (teacher, update[2]))
    found["update"] = (program.update, update)
    if arguments.update_dataset is not None and arguments.update_dataset != update:
        found["update_dataset"] = (program.update, arguments.update_dataset)
    return found
