"""Maps each parameter of a T5 to the arrays of a T5X or Hugging Face checkpoint that hold it.

A layout states the names, the shapes and the order of dimensions of the stored arrays. gkd_jax
stacks the layers of a parameter on axis 0 of one array. T5X's plain network and Hugging Face store
one array per layer. T5X's scanned network stores one array with the layers stacked on axis 1, in
which heads and head dim are separate dimensions; gkd_jax fuses these two dimensions into one.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from gkd_jax.models import lm, t5


class Part(NamedTuple):
    """One stored array, which holds a whole parameter or one layer of a parameter.

    Attributes:
        name: the name of the stored array.
        shape: the shape of the stored array.
        axes: for each dimension of the parameter (or of its layer), the stored dimensions that form
            this dimension, outermost first. For example, ((0,), (2, 3)) fuses heads and head dim.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]


class Entry(NamedTuple):
    """One parameter and the stored arrays that hold it.

    Attributes:
        shape: the shape of the parameter in gkd_jax.
        parts: the one stored array of the parameter, or the stored array of each layer.
        by_layer: whether `parts` has one array per layer.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    by_layer: bool


Layout = dict[str, Entry]  # keys are paths such as "encoder/layers/attention/query/kernel"


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of nested dicts, keyed by their path, whose names are joined by "/"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


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


def t5x_layout(config: t5.T5Config, *, scanned: bool) -> Layout:
    """Returns the layout of a T5X checkpoint, with the names that T5X uses inside `target`.

    Args:
        config: the model's sizes.
        scanned: whether the checkpoint belongs to T5X's scanned network (`examples/scalable_t5`)
            rather than to its plain network (`examples/t5`).
    """
    layout = {}
    for path, leaf in flatten(lm.abstract_params(config)).items():
        names = path.split("/")
        if "layers" not in names:
            part = Part(".".join(names), leaf.shape, _identity(leaf.ndim))
            layout[path] = Entry(leaf.shape, (part,), by_layer=False)
        elif scanned:
            layout[path] = Entry(leaf.shape, (_scanned_part(config, names, leaf.shape),), False)
        else:
            parts = tuple(
                Part(
                    ".".join(f"layers_{layer}" if name == "layers" else name for name in names),
                    leaf.shape[1:],
                    _identity(leaf.ndim - 1),
                )
                for layer in range(leaf.shape[0])
            )
            layout[path] = Entry(leaf.shape, parts, by_layer=True)
    return layout


def _identity(ndim: int) -> tuple[tuple[int, ...], ...]:
    return tuple((axis,) for axis in range(ndim))


def _scanned_part(config: t5.T5Config, names: list[str], shape: tuple[int, ...]) -> Part:
    """Returns the stored array of a parameter in T5X's scanned network.

    The layers are stacked on axis 1, and heads and head dim are two dimensions.

    Args:
        config: the model's sizes.
        names: the components of the parameter's path.
        shape: the shape of the parameter in gkd_jax, with the layers on axis 0.
    """
    stored_name = ".".join(names[0] if name == "layers" else name for name in names)
    heads = (config.num_heads, config.head_dim)
    sizes: list[tuple[int, ...]] = [(size,) for size in shape[1:]]
    if names[-2] in ("query", "key", "value"):
        sizes[1] = heads
    elif names[-2] == "out":
        sizes[0] = heads
    axes, next_axis = [], 0
    for group in sizes:
        inner = range(next_axis, next_axis + len(group))
        axes.append(tuple(axis if axis == 0 else axis + 1 for axis in inner))
        next_axis += len(group)
    flat = [size for group in sizes for size in group]
    stored_shape = (flat[0], shape[0], *flat[1:])
    return Part(stored_name, stored_shape, ((1,), *axes))


_HF_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_HF_POSITION = "SelfAttention.relative_attention_bias.weight"


def hf_layout(config: t5.T5Config) -> Layout:
    """Returns the layout of transformers' T5, mT5 and umT5."""
    layout = {}
    for path, leaf in flatten(lm.abstract_params(config)).items():
        names = path.split("/")
        if "layers" in names:
            shape = leaf.shape[1:]
            parts = tuple(
                hf_part(_hf_layer_name(names, layer), shape, names[-1])
                for layer in range(leaf.shape[0])
            )
            layout[path] = Entry(leaf.shape, parts, by_layer=True)
        else:
            part = hf_part(_hf_name(names), leaf.shape, names[-1])
            layout[path] = Entry(leaf.shape, (part,), by_layer=False)
    return layout


def hf_part(name: str, shape: tuple[int, ...], kind: str) -> Part:
    """Returns the array of transformers that holds a parameter, or a layer of a parameter.

    Args:
        name: the name of the stored array.
        shape: the shape of the parameter, or of its layer.
        kind: the last component of the parameter's path. A "kernel" and a "rel_embedding" are
            stored transposed, because torch's layers hold them so.
    """
    if kind in ("kernel", "rel_embedding"):
        return Part(name, shape[::-1], ((1,), (0,)))
    return Part(name, shape, _identity(len(shape)))


def _hf_name(names: list[str]) -> str:
    if names[0] == "token_embedder":
        return "shared.weight"
    stack, module = names[:2]
    if module == "logits_dense":
        return "lm_head.weight"
    if module == "relpos_bias":
        return f"{stack}.block.0.layer.0.{_HF_POSITION}"
    return f"{stack}.final_layer_norm.weight"


def _hf_layer_name(names: list[str], layer: int) -> str:
    stack, _, module, *rest = names
    prefix = f"{stack}.block.{layer}.layer."
    mlp = 1 if stack == "encoder" else 2
    if module == "relpos_bias":
        return f"{prefix}0.{_HF_POSITION}"
    if module == "mlp":
        return f"{prefix}{mlp}.DenseReluDense.{rest[0]}.weight"
    if module == "encoder_decoder_attention":
        return f"{prefix}1.EncDecAttention.{_HF_ATTENTION[rest[0]]}.weight"
    if module in ("attention", "self_attention"):
        return f"{prefix}0.SelfAttention.{_HF_ATTENTION[rest[0]]}.weight"
    sublayer = {"pre_mlp_layer_norm": mlp, "pre_cross_attention_layer_norm": 1}.get(module, 0)
    return f"{prefix}{sublayer}.layer_norm.weight"


def to_ours(stored: np.ndarray, axes: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Returns a stored array with its dimensions reordered and fused as `axes` states.

    Args:
        stored: an array with the dimensions of the checkpoint.
        axes: the stored dimensions that form each dimension of the result; see `Part`.
    """
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
