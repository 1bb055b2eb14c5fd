"""The frozen teachers of a run, one or several: their configs, their shapes and their parameters.

The parameters of one teacher are a tree. Those of several teachers (`TaskTeachers`) are a dict of
trees by the names of the tasks.
"""

import math
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from gkd_jax import gkd, sharding
from gkd_jax.gkd_config import TeacherShare
from gkd_jax.models import lm
from gkd_jax.storage import pretrained
from gkd_jax.training.recipe import Recipe, TaskTeachers


def teacher_shares(
    recipe: Recipe, student: lm.Config, num_pieces: int, pending: frozenset[str]
) -> tuple[TeacherShare, ...]:
    """Returns several teachers in the order of their rows in a batch; () for any other teacher.

    Raises:
        ValueError: if a teacher's embedding has fewer rows than the vocabulary has ids; the message
            names its task.
    """
    if not isinstance(recipe.teacher, TaskTeachers):
        return ()
    found = []
    for task, num_rows in recipe.data.block.items():
        model = recipe.teacher.models[task]
        config = model.config(num_pieces, pending=model.checkpoint in pending)
        try:
            pair = gkd.ModelPair(
                student=student, teacher=config, num_pieces=num_pieces, teacher_mesh=model.mesh
            )
        except ValueError as error:
            raise ValueError(f"task {task!r}: {error}") from None
        found.append(TeacherShare(task=task, models=pair, num_rows=num_rows))
    return tuple(found)


def check_rows(recipe: Recipe, mesh: Mesh) -> None:
    """Checks that each device has the same share of every teacher's rows in each microbatch.

    Raises:
        ValueError: if it does not, or if a teacher's own mesh does not fit the devices.
    """
    rows, num_parts = recipe.data.task_rows, recipe.train.num_microbatches
    several = isinstance(recipe.teacher, TaskTeachers)
    num_shards = sharding.batch_shards(mesh)
    if several and math.gcd(*rows.values()) % (num_shards * num_parts):
        raise ValueError(
            "each device scores as many rows of each teacher in each microbatch: data x fsdp "
            f"({num_shards}) x num_microbatches ({num_parts}) = {num_shards * num_parts} must "
            f"divide the rows of every task, got {rows}"
        )
    for name, model in recipe.teachers.items():
        own_rows = rows[name.removeprefix("teacher.models.")] if several else sum(rows.values())
        own_mesh = sharding.with_sizes(mesh, model.mesh)
        what = f"the rows of {name} in a microbatch"
        sharding.check_batch_size(own_rows // num_parts, own_mesh, what)


def abstract_params(recipe: Recipe, learner: gkd.Learner, mesh: Mesh) -> lm.Params | None:
    """Returns the shapes, dtypes and shardings of the teachers' parameters; None without any."""
    if isinstance(recipe.teacher, TaskTeachers):
        return {
            one.task: pretrained.frozen_shapes(
                recipe.teacher.models[one.task], _config(one.models), mesh
            )
            for one in learner.teacher_shares
        }
    model = recipe.teachers.get("teacher")
    return model and pretrained.frozen_shapes(model, _config(learner.models), mesh)


def initial_params(
    recipe: Recipe, learner: gkd.Learner, shapes: lm.Params | None
) -> lm.Params | None:
    """Returns the teachers' parameters, from their checkpoints or random; None without any.

    `shapes` is the result of `abstract_params`.
    """
    if shapes is None:
        return None
    key = jax.random.key(recipe.train.seed + 1)
    if isinstance(recipe.teacher, TaskTeachers):
        return {
            one.task: pretrained.initial_params(
                recipe.teacher.models[one.task],
                _config(one.models),
                shapes[one.task],
                jax.random.fold_in(key, index),
                "teacher",
            )
            for index, one in enumerate(learner.teacher_shares)
        }
    model = recipe.teachers["teacher"]
    return pretrained.initial_params(model, _config(learner.models), shapes, key, "teacher")


def warn_of_random_weights(recipe: Recipe) -> None:
    """Prints a warning for each frozen teacher that has no checkpoint."""
    for name, model in recipe.teachers.items():
        if model.checkpoint is None:
            setting = "TEACHER_CHECKPOINT" if name == "teacher" else f"{name}.checkpoint"
            print(
                f"WARNING: the teacher has random weights ({setting} is None): the student learns "
                "noise",
                file=sys.stderr,
            )


def in_words(recipe: Recipe, shapes: Any, task: str | None = None) -> str:
    """Returns who the teacher is, in words.

    Of several teachers, the one of `task` is described, or all of them if `task` is None. `shapes`
    is the result of `abstract_params`.
    """
    teacher = recipe.teacher
    if isinstance(teacher, gkd.LiveStudent):
        return "the student itself"
    if isinstance(teacher, gkd.MovingAverage):
        return f"the student's moving average, decay {teacher.decay}"
    if shapes is None:
        return "none"
    if isinstance(teacher, TaskTeachers) and task is None:
        return "; ".join(
            f"{lm.num_params(params):,} parameters for {one}" for one, params in shapes.items()
        )
    params = shapes[task] if isinstance(teacher, TaskTeachers) else shapes
    return f"{lm.num_params(params):,} parameters"


def _config(models: gkd.ModelPair) -> lm.Config:
    assert models.teacher is not None
    return models.teacher
