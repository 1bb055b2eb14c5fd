"""Runs of one test module share the functions that they compile, if they compile the same.

Tracing and compiling is most of the work of a run of a few steps, and the runs of a module mostly
differ in their folders and lengths alone. `shared` keeps compiled functions by everything that they
are made of. A test that changes a function which is traced must not be in a module that shares.
"""

import contextlib
import dataclasses
import functools

import jax
import pytest

from gkd_jax.evaluation import evaluate
from gkd_jax.text import vocabularies
from gkd_jax.training import program


def _of_steps(built):
    """Everything that `program.compile_steps` reads."""
    recipe, learner = built.recipe, built.learner
    shapes, rows = recipe.data.shapes(), recipe.data.batch_size
    arguments = [program.step_arguments(built, rows, shape) for shape in shapes]
    leaves, structure = jax.tree.flatten(arguments)
    arrays = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    # The optimizer is a pair of functions, which the recipe's optimizer and schedule make.
    names = [field.name for field in dataclasses.fields(learner) if field.name != "optimizer"]
    method = tuple(getattr(learner, name) for name in names)
    # The end of the run is in the program if the learning rate falls towards it.
    end = recipe.train.train_steps if recipe.schedule.cooldown_steps else None
    optimizer = (recipe.optimizer, recipe.schedule, end, recipe.train.skip_nonfinite)
    return (*method, *optimizer, built.mesh, tuple(shapes), structure, arrays)


@contextlib.contextmanager
def shared():
    """While it is open, no step is compiled twice."""
    steps, decoders = {}, {}

    def compile_steps(built, make=program.compile_steps):
        key = _of_steps(built)
        if key not in steps:
            steps[key] = make(built)
        return steps[key]

    def make_decoder(config, evaluation, *, make=evaluate.make_decoder, **more):
        content = vocabularies.content_hash(more["vocabulary"])
        rest = tuple((name, value) for name, value in more.items() if name != "vocabulary")
        key = (config, evaluation, content, rest)
        if key not in decoders:
            decoders[key] = make(config, evaluation, **more)
        return decoders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "compile_steps", compile_steps)
        patch.setattr(evaluate, "make_decoder", make_decoder)
        patch.setattr(evaluate, "teacher_divergence", functools.cache(evaluate.teacher_divergence))
        yield
