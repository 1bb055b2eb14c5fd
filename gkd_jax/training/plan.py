"""Describes a run as text: `plan` in a few lines at its start, `model_info` array by array."""

from typing import Any

import jax
from jax.sharding import Mesh

from gkd_jax import sharding
from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten
from gkd_jax.text import settings
from gkd_jax.training import teachers
from gkd_jax.training.program import Program


def plan(program: Program) -> str:
    """Returns a summary of the run in a few lines, which is printed when it starts."""
    recipe, models, method = program.recipe, program.models, program.method
    config = recipe.data
    meshes = [_mesh_text(program.mesh)]
    for name, model in recipe.teachers.items():
        if model.mesh is not None:
            meshes.append(f"{name}: {_mesh_text(sharding.with_sizes(program.mesh, model.mesh))}")
    shapes = ", ".join("/".join(map(str, shape)) for shape in config.shapes())
    lines = [
        f"task       {config.name} ({config.split}), batch {config.batch_size}, "
        f"lengths {shapes}, {models.num_pieces} pieces",
        f"student    {lm.num_params(program.state.params):,} parameters",
        f"teacher    {teachers.in_words(recipe, program.teacher)}"
        + (", reads prompts of its own" if program.reads_own_prompts else "")
        + (f", top {program.cached_k} of {config.teacher_cache}" if program.cached_k else ""),
        f"loss       {_text(method.divergence) if method.divergence else 'cross-entropy'}, "
        f"{_text(method.reduction)}, on-policy fraction {_text(method.on_policy_fraction)}"
        + (" of each batch" if method.mixing == "example" else "")
        + (f", {method.num_samples} samples a prompt" if method.num_samples > 1 else "")
        + (f", reward {_text(method.rl.reward)}, alpha {method.rl.alpha}" if method.rl else ""),
        f"steps      {recipe.train.train_steps}",
        f"mesh       {'; '.join(meshes)}",
    ]
    return "\n".join(lines)


def _mesh_text(mesh: Mesh) -> str:
    return " x ".join(f"{name}={size}" for name, size in mesh.shape.items())


def _text(value: Any) -> str:
    return settings.in_words(settings.describe(value))


def model_info(program: Program) -> str:
    """Returns the text of model_info.txt, which describes every array of both models."""
    text = "student\n" + _describe(program.state.params)
    text += _replicated_heads(program.models.student, program.mesh)
    taught = {"teacher": (program.models, program.teacher)}
    if several := program.learner.teacher_shares:
        assert program.teacher is not None
        taught = {
            f"teacher of {one.task}": (one.models, program.teacher[one.task]) for one in several
        }
    for name, (models, params) in taught.items():
        if params is not None:
            assert models.teacher is not None
            own_mesh = sharding.with_sizes(program.mesh, models.teacher_mesh)
            text += f"\n\n{name}\n{_describe(params)}"
            text += _replicated_heads(models.teacher, own_mesh)
    return text + "\n"


def _replicated_heads(config: lm.Config, mesh: Mesh) -> str:
    """Returns a line about key heads that the devices of `tensor` cannot share, if any."""
    heads, parts = getattr(config, "num_kv_heads", None), mesh.shape["tensor"]
    if heads is None or heads % parts == 0:
        return ""
    what = "1 key head does" if heads == 1 else f"{heads} key heads do"
    return f"\n{what} not divide over tensor={parts}: each device of that axis computes all of them"


def _describe(params: lm.Params) -> str:
    """Returns a line per array: path, shape, dtype, logical axes, mesh axes, bytes per device."""
    lines, total = [], 0
    axes = jax.tree.leaves(lm.logical_axes(params), is_leaf=lambda x: type(x) is tuple)
    for (name, leaf), names in zip(flatten(params).items(), axes, strict=True):
        size, where = sharding.bytes_per_device(leaf), tuple(leaf.sharding.spec)
        total += size
        lines.append(f"{name:<64} {leaf.shape!s:<22} {leaf.dtype!s:<9} {names} {where} {size}")
    lines.append(f"total: {lm.num_params(params):,} parameters, {total:,} bytes per device")
    return "\n".join(lines)
