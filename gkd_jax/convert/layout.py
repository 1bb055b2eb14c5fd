"""Maps each parameter of a model to the arrays of a foreign checkpoint that hold it.

A layout states the names, the shapes and the order of dimensions of the stored arrays; the modules
of the formats make it. gkd_jax stacks the layers of a parameter on axis 0 of one array. Most
formats store one array per layer instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten


class Part(NamedTuple):
    """One stored array, which holds a whole parameter or one layer of a parameter.

    For each dimension of the parameter (or of its layer), `axes` has the stored dimensions that
    form it, outermost first. For example, ((0,), (2, 3)) fuses heads and head dim.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]


class Entry(NamedTuple):
    """One parameter and the stored arrays that hold it."""

    shape: tuple[int, ...]  # of the parameter in gkd_jax
    parts: tuple[Part, ...]  # the one stored array of the parameter, or that of each layer

    @property
    def by_layer(self) -> bool:
        """Whether `parts` has one array per layer, which lacks the dimension of the layers."""
        return len(self.parts[0].axes) < len(self.shape)


Layout = dict[str, Entry]  # keys are paths such as "encoder/layers/attention/query/kernel"


def unflatten(leaves: dict[str, Any], separator: str = "/") -> dict[str, Any]:
    """Returns the nested dicts that `flatten` would turn into `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split(separator)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def layer_by_layer(
    config: lm.Config, part_of: Callable[[list[str], tuple[int, ...], int | None], Part]
) -> Layout:
    """Returns the layout of a checkpoint with one array for each layer of a parameter.

    Args:
        part_of: returns a stored array from the components of the parameter's path, the shape of
            the parameter or of its layer, and the layer, which is None outside the layers.
    """
    layout = {}
    for path, leaf in flatten(lm.abstract_params(config)).items():
        names = path.split("/")
        if "layers" in names:
            num_layers, *shape = leaf.shape
            parts = [part_of(names, tuple(shape), layer) for layer in range(num_layers)]
        else:
            parts = [part_of(names, leaf.shape, None)]
        layout[path] = Entry(leaf.shape, tuple(parts))
    return layout


def unchanged(name: str, shape: tuple[int, ...]) -> Part:
    """Returns a stored array that has the dimensions of its parameter."""
    return Part(name, shape, tuple((axis,) for axis in range(len(shape))))


def hf_part(name: str, shape: tuple[int, ...], kind: str) -> Part:
    """Returns the array of transformers that holds a parameter, or a layer of a parameter.

    The kind is the last component of the parameter's path. A "kernel" and a "rel_embedding" are
    stored transposed, because torch's layers hold them so.
    """
    if kind in ("kernel", "rel_embedding"):
        return Part(name, shape[::-1], ((1,), (0,)))
    return unchanged(name, shape)


def to_ours(stored: np.ndarray, axes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Returns a stored array with its dimensions reordered and fused by the axes of a `Part`."""
    ordered = stored.transpose([axis for group in axes for axis in group])
    sizes = [int(np.prod([stored.shape[axis] for axis in group])) for group in axes]
    return ordered.reshape(sizes)


def to_stored(
    ours: np.ndarray, axes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]
) -> np.ndarray:
    """Returns a parameter in the form of a stored array of `shape`: the inverse of `to_ours`."""
    order = [axis for group in axes for axis in group]
    split = ours.reshape([shape[axis] for axis in order])
    return np.ascontiguousarray(split.transpose(np.argsort(order)))
