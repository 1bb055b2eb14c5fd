"""Adafactor's state in T5X's checkpoints, to and from that of `gkd_jax.optimizers.adafactor`.

T5X keeps four arrays a parameter: `v_row` and `v_col` where it is factored, `v` elsewhere, `m` for
momentum, each of shape (1,) where unused. Its plain network averages over the longer dimension for
`v_row`, its scanned one over all but the model's; ours over the last. So which is which is decided
by the shapes, and by the network's rule where they agree with both.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.convert import t5x
from gkd_jax.convert.layout import (
    Entry,
    Layout,
    Part,
    flatten,
    t5x_layout,
    to_ours,
    to_stored,
    unflatten,
)
from gkd_jax.convert.stored import Stored, whole
from gkd_jax.models import t5
from gkd_jax.optimizers import AdafactorState


PARAM_STATES = "param_states"
_UNUSED = (1,)


class _Factor(NamedTuple):
    """A mean of squared gradients over one dimension: its stored shape and its own dimensions."""

    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]


class _Moments(NamedTuple):
    v_row: Any
    v_col: Any
    v: Any


def read_t5x_optimizer(path: str, config: t5.T5Config) -> AdafactorState:
    """Adafactor's state in a T5X checkpoint, plain or scanned.

    Args:
        path: a folder `checkpoint_<step>`, local or gs://.
        config: the model's sizes.

    Returns:
        The state that `gkd_jax.optimizers.adafactor` continues from, float32. Which parameters are
        factored is as T5X had it: scanned networks factor layers of any size, the optimizer's
        default; the plain one from 128, `stacked_min_dim_size_to_factor=128`.

    Raises:
        ValueError: where the checkpoint has no Adafactor state, one with momentum, or one that does
            not fit the model; lists every array.
    """
    opened = t5x.open_arrays(path, prefix="state.")
    layout = t5x_layout(config, scanned=opened.scanned)
    step = opened.arrays.get("state.step")
    if step is None or step.shape != ():
        raise ValueError(f"{path}: expected a number state.step")
    moments, problems = {}, []
    for key, entry in layout.items():
        layers = []
        for part in entry.parts:
            try:
                layers.append(_read_part(part, opened.arrays, key, scanned=opened.scanned))
            except ValueError as error:
                problems.append(str(error))
        if layers and not problems:
            moments[key] = _stack(layers) if entry.by_layer else layers[0]
    if problems:
        raise ValueError(f"{path}: no fitting Adafactor state:\n  " + "\n  ".join(problems[:40]))
    trees = [
        unflatten({key: jnp.asarray(getattr(value, field)) for key, value in moments.items()})
        for field in _Moments._fields
    ]
    return AdafactorState(jnp.asarray(step.read(()), jnp.int32), *trees)


def _stack(layers: list[_Moments]) -> _Moments:
    return _Moments(*(np.stack(values) for values in zip(*layers, strict=True)))


def _read_part(part: Part, arrays: dict[str, Stored], key: str, *, scanned: bool) -> _Moments:
    name = f"state.{PARAM_STATES}.{part.name}"
    found = {field: arrays.get(f"{name}.{field}") for field in ("v_row", "v_col", "v", "m")}
    absent = [field for field in _Moments._fields if found[field] is None]
    if absent:
        raise ValueError(f"{name}: missing {', '.join(absent)}")
    momentum = found["m"]
    if momentum is not None and momentum.shape != _UNUSED:
        raise ValueError(f"{name}.m: momentum is not supported, found {momentum.shape}")

    def read(field: str) -> np.ndarray:
        stored = arrays[f"{name}.{field}"]
        return np.asarray(stored.read(whole(stored.shape)), np.float32)

    lead = _lead(part, key)
    empty = np.zeros((*lead, 1), np.float32)
    shapes = tuple(arrays[f"{name}.{field}"].shape for field in _Moments._fields)
    if shapes == (_UNUSED, _UNUSED, part.shape):
        return _Moments(empty, empty, to_ours(read("v"), part.axes))
    for first, second, swapped in _factorings(part, key, scanned=scanned):
        if shapes == (first.shape, second.shape, _UNUSED):
            row, col = to_ours(read("v_row"), first.axes), to_ours(read("v_col"), second.axes)
            return _Moments(col, row, empty) if swapped else _Moments(row, col, empty)
    raise ValueError(f"{name}: v_row, v_col, v {shapes} do not fit a parameter of {part.shape}")


def _lead(part: Part, key: str) -> tuple[int, ...]:
    """(L,) where a stored array holds all layers, () elsewhere."""
    scanned = "layers" in key.split("/") and part.axes[0] == (1,) and len(part.axes) > 1
    return (part.shape[1],) if scanned else ()


def _factorings(part: Part, key: str, *, scanned: bool) -> Iterator[tuple[_Factor, _Factor, bool]]:
    """The two ways to name a matrix's factors v_row and v_col; the network's own first.

    The flag tells that v_row is what we call v_col.
    """
    if len(part.axes) - len(_lead(part, key)) != 2:
        return
    rows, cols = _without(part, -1), _without(part, -2)
    if scanned and _lead(part, key):
        swapped_first = key.split("/")[-2] in ("out", "wo")  # v_row goes along the model dimension
    else:
        swapped_first = part.shape[0] > part.shape[1]
    ways = [(rows, cols, False), (cols, rows, True)]
    yield from reversed(ways) if swapped_first else ways


def _without(part: Part, dimension: int) -> _Factor:
    """What is left of a stored array after a mean over one of the parameter's dimensions."""
    dropped = part.axes[dimension]
    kept = [axis for axis in range(len(part.shape)) if axis not in dropped]
    position = {axis: number for number, axis in enumerate(kept)}
    groups = [group for group in part.axes if group != dropped]
    axes = tuple(tuple(position[axis] for axis in group) for group in groups)
    return _Factor(tuple(part.shape[axis] for axis in kept), axes)


def stored_states(layout: Layout, state: AdafactorState) -> Iterator[tuple[str, np.ndarray, bool]]:
    """T5X's arrays of an Adafactor state: name, array, whether it goes into the msgpack."""
    trees = [flatten(tree) for tree in (state.v_row, state.v_col, state.v)]
    for key, entry in layout.items():
        for layer, part in enumerate(entry.parts):
            values = [tree[key][layer] if entry.by_layer else tree[key] for tree in trees]
            arrays = [np.asarray(jax.device_get(value), np.float32) for value in values]
            yield from _store_part(part, entry, key, _Moments(*arrays))


def _store_part(
    part: Part, entry: Entry, key: str, moments: _Moments
) -> Iterator[tuple[str, np.ndarray, bool]]:
    name = f"state.{PARAM_STATES}.{part.name}"
    empty = np.zeros(_UNUSED, np.float32)
    yield f"{name}.m", empty, True
    shape = entry.shape[1:] if entry.by_layer else entry.shape
    if moments.v.shape == shape:
        yield f"{name}.v_row", empty, True
        yield f"{name}.v_col", empty, True
        yield f"{name}.v", to_stored(moments.v, part.axes, part.shape), False
        return
    scanned = bool(_lead(part, key))
    first, second, swapped = next(_factorings(part, key, scanned=scanned))
    row, col = (moments.v_col, moments.v_row) if swapped else (moments.v_row, moments.v_col)
    yield f"{name}.v_row", to_stored(row, first.axes, first.shape), True
    yield f"{name}.v_col", to_stored(col, second.axes, second.shape), True
    yield f"{name}.v", empty, True
