"""The student's training state before the first update: arrays, shapes, and shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from gkd_jax import sharding
from gkd_jax.gkd import TrainState
from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten


def create(
    params: lm.Params, optimizer: optax.GradientTransformation, *, with_average: bool = False
) -> TrainState:
    """Returns the state before the first update: step 0, and a new state of the optimizer.

    `with_average` adds the moving average of the parameters, which starts as a copy of them.
    """
    average = jax.tree.map(jnp.copy, params) if with_average else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def abstract(
    config: lm.Config, optimizer: optax.GradientTransformation, *, with_average: bool = False
) -> TrainState:
    """Returns the state of `create` as `jax.ShapeDtypeStruct`s, without any array."""
    return jax.eval_shape(
        lambda params: create(params, optimizer, with_average=with_average),
        lm.abstract_params(config),
    )


def shardings(state: TrainState, mesh: Mesh) -> Any:
    """Returns the sharding of every array of an abstract state.

    An array of the optimizer is sharded like the parameter that has the same dict keys in its path.
    If the array is a mean over one of the parameter's dimensions (Adafactor), that dimension's axis
    is left out. Any other array is replicated.
    """
    axes = lm.logical_axes(state.params)
    leaf_axes = jax.tree.leaves(axes, is_leaf=lambda x: type(x) is tuple)
    by_name = {
        name: (leaf.shape, names)
        for (name, leaf), names in zip(flatten(state.params).items(), leaf_axes, strict=True)
    }

    def opt_axes(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        shape, names = by_name.get("/".join(keys), ((), ()))
        if leaf.shape == shape:
            return names
        for dropped in reversed(range(len(shape))):
            if leaf.shape == shape[:dropped] + shape[dropped + 1 :]:
                return names[:dropped] + names[dropped + 1 :]
        return (None,) * leaf.ndim

    opt = jax.tree_util.tree_map_with_path(opt_axes, state.opt_state)
    where: Any = sharding.replicated(mesh)
    of_params = sharding.tree_shardings(state.params, axes, mesh)
    return TrainState(
        step=where,
        params=of_params,
        opt_state=sharding.tree_shardings(state.opt_state, opt, mesh),
        average=None if state.average is None else of_params,
    )
