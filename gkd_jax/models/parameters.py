"""Functions on the parameter trees of all model families.

A parameter tree is a nested dict with T5X's names; `logical_axes` derives T5X's logical axis names
from them.
"""

import math
from typing import Any

import jax

from gkd_jax.models import quantized
from gkd_jax.sharding import constrain


Params = dict[str, Any]

_LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "query": ("embed", "joined_kv"),
    "key": ("embed", "joined_kv"),
    "value": ("embed", "joined_kv"),
    "out": ("joined_kv", "embed"),
    "wi": ("embed", "mlp"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "scale": ("embed",),
    "rel_embedding": ("heads", "relpos_buckets"),
    "logits_dense": ("embed", "vocab"),
}
_PER_HEAD = ("query_norm", "key_norm")  # norms over the head dim, with one scale for all heads


def logical_axes(params: Params) -> Params:
    """Returns the tree of `params` with a tuple of T5X's logical axis names at each leaf."""

    def axes(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names[-1] == "bias":
            found = _LOGICAL_AXES[names[-2]][1:]
        elif names[-2] in _PER_HEAD:
            found = ("kv",)
        else:
            found = _LOGICAL_AXES[names[-2] if names[-1] == "kernel" else names[-1]]
        found = (("layers",) if "layers" in names else ()) + found
        if getattr(path[-1], "name", None) == "scales":  # a quantized kernel's, [*L 1 F]
            return (*found[:-2], None, found[-1])
        return found

    return jax.tree_util.tree_map_with_path(axes, params)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name: the keys of the path to the leaf, joined by "/"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def num_layers(stacked: Params) -> int:
    """Returns the number of layers whose parameters are stacked on axis 0."""
    return jax.tree.leaves(stacked)[0].shape[0]


def num_params(params: Params) -> int:
    """Returns the number of parameters in a tree; the scales of quantized kernels do not count."""
    leaves = jax.tree.leaves(params, is_leaf=quantized.is_int8)
    return sum(math.prod(getattr(leaf, "values", leaf).shape) for leaf in leaves)


def for_decoding(params: Params, dtype: str) -> Params:
    """Returns parameters prepared for a decoding loop, once for all tokens.

    Kernels and embeddings are cast to the compute dtype, and no parameter is sharded over `fsdp`: a
    loop over sharded weights would all-gather all of them for every token. The samples stay the
    same, because matrix products cast their weights to the compute dtype in any case.
    """
    params = quantized.restore(params)

    def lay_out(path, x, axes):
        if path[-1].key in ("kernel", "embedding"):
            x = x.astype(dtype)
        return constrain(x, [None if axis == "embed" else axis for axis in axes])

    return jax.tree_util.tree_map_with_path(lay_out, params, logical_axes(params))
