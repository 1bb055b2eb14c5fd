"""Reads the arrays of a checkpoint slice by slice into the shards of the devices.

`Stored` is an array on disk with a function that reads a slice of the array. `check` compares the
arrays of a checkpoint with the arrays that a model needs, and `read_tree` reads the parameters. A
process reads only the slices that its own devices hold, so no host needs memory for a whole model.
"""

from collections.abc import Callable, Iterable
import concurrent.futures
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gkd_jax.convert.layout import Entry, Layout, Part, to_ours, unflatten
from gkd_jax.models import t5
from gkd_jax.models.execution import check_dtype
from gkd_jax.models.parameters import flatten


FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_READERS = 8  # The number of layers read concurrently, enough to hide the latency of a bucket.
_MOST_LINES = 40  # The number of problems that one error message lists.
_ROWS = 4096  # The number of rows that `same` compares at a time.

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One array of a checkpoint whose values have not been read yet.

    `read` returns the values at an index, which has one `slice(start, stop)` per dimension. It
    raises ValueError or FileNotFoundError, naming the array, if the data are damaged or missing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]


def in_memory(name: str, array: np.ndarray) -> Stored:
    """Returns a `Stored` for an array that is in memory because an index file contained it."""
    return Stored(name=name, shape=array.shape, dtype=array.dtype, read=lambda index: array[index])


def whole(shape: tuple[int, ...]) -> Index:
    """Returns the index that selects every element of an array of `shape`."""
    return tuple(slice(0, size) for size in shape)


def as_dtype(dtype: Any) -> np.dtype:
    """Returns the NumPy dtype of "float32" or "bfloat16"; any other dtype is a ValueError."""
    check_dtype(dtype if isinstance(dtype, str) else np.dtype(dtype).name)
    return np.dtype(dtype)


def same(one: Stored, other: Stored) -> bool:
    """Returns whether two stored matrices have the same shape, dtype and values.

    Only `_ROWS` rows are in memory at a time, and reading stops at the first rows that differ.
    """
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    for row in range(0, one.shape[0], _ROWS):
        index = (slice(row, min(row + _ROWS, one.shape[0])), slice(0, one.shape[1]))
        if not np.array_equal(one.read(index), other.read(index)):
            return False
    return True


def check(
    layout: Layout, arrays: dict[str, Stored], where: str, *, ignored: Iterable[str] = ()
) -> None:
    """Compares the arrays that a model needs with those of the checkpoint `where`, by name.

    Args:
        ignored: names of arrays that the checkpoint may have although the model does not need them.

    Raises:
        ValueError: if arrays are missing, unexpected, or of another shape or dtype; the message
            lists the arrays.
    """
    parts = {
        part.name: (path, part.shape) for path, entry in layout.items() for part in entry.parts
    }
    problems = []
    for name, (path, shape) in parts.items():
        found = arrays.get(name)
        if found is None:
            problems.append(f"{name} ({path}): expected {shape}, missing")
        elif found.shape != shape:
            problems.append(f"{name} ({path}): expected {shape}, found {found.shape}")
        elif found.dtype not in FLOATS:
            problems.append(
                f"{name} ({path}): expected float32, float16 or bfloat16, found {found.dtype}"
            )
    unexpected = arrays.keys() - parts.keys() - set(ignored)
    problems += [f"{name}: unexpected, {arrays[name].shape}" for name in sorted(unexpected)]
    if problems:
        more = len(problems) - _MOST_LINES
        tail = [f"... and {more} more"] if more > 0 else []
        lines = "\n  ".join(problems[:_MOST_LINES] + tail)
        raise ValueError(f"{where} does not fit the model:\n  {lines}")


def read_tree(
    layout: Layout, arrays: dict[str, Stored], dtype: np.dtype, shardings: Any | None
) -> t5.Params:
    """Returns all parameters; each process reads only the slices that its own devices hold.

    Args:
        layout: the stored arrays of each parameter; `check` must have accepted the layout.
        shardings: a tree with the structure of the parameters and a `jax.sharding.Sharding` at each
            leaf; None puts every array on the default device.

    Raises:
        FileNotFoundError: if a stored array lacks a part of its data.
        ValueError: if `shardings` has another structure, if the data of an array are damaged, or if
            the host has no memory for an array.
    """
    places = None if shardings is None else flatten(shardings)
    if places is not None and places.keys() != layout.keys():
        odd = sorted(places.keys() ^ layout.keys())
        raise ValueError(f"shardings must have the parameters' tree; these differ: {odd}")
    leaves = {}
    for path, entry in layout.items():
        try:
            if places is None:
                leaves[path] = jnp.asarray(_read(entry, arrays, [whole(entry.shape)], dtype)[0])
            else:
                leaves[path] = _read_sharded(entry, arrays, dtype, places[path])
        except MemoryError as error:
            raise ValueError(f"{path}: no memory for {entry.shape} of {dtype}") from error
    return unflatten(leaves)


def _read_sharded(
    entry: Entry, arrays: dict[str, Stored], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Returns one parameter with the given sharding."""

    def bounds(index: Index) -> tuple[tuple[int, int], ...]:
        # A sharding's index may contain slice(None); explicit bounds also serve as dict keys, which
        # slices cannot do before Python 3.12.
        sizes = zip(index, entry.shape, strict=True)
        return tuple(part.indices(size)[:2] for part, size in sizes)

    here = sharding.addressable_devices_indices_map(entry.shape).values()
    wanted = list(dict.fromkeys(bounds(index) for index in here if index is not None))
    indices = [tuple(slice(*pair) for pair in pairs) for pairs in wanted]
    shards = dict(zip(wanted, _read(entry, arrays, indices, dtype), strict=True))
    return jax.make_array_from_callback(
        entry.shape, sharding, lambda index: shards[bounds(index or ())], dtype=dtype
    )


def _read(
    entry: Entry, arrays: dict[str, Stored], indices: list[Index], dtype: np.dtype
) -> list[np.ndarray]:
    """Returns several slices of one parameter.

    Each layer is read for all slices before the next layer: the slices of a layer come from the
    same chunks on disk, which the reader decompresses once and keeps in a cache.
    """
    slices = [np.empty([part.stop - part.start for part in index], dtype) for index in indices]
    if not entry.by_layer:
        for out, index in zip(slices, indices, strict=True):
            out[...] = _read_part(entry.parts[0], arrays, index)
        return slices

    def read_layer(layer: int) -> None:
        for out, (layers, *inner) in zip(slices, indices, strict=True):
            if layers.start <= layer < layers.stop:
                out[layer - layers.start] = _read_part(entry.parts[layer], arrays, tuple(inner))

    needed = {layer for index in indices for layer in range(index[0].start, index[0].stop)}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read_layer, sorted(needed)):
            pass
    return slices


def _read_part(part: Part, arrays: dict[str, Stored], index: Index) -> np.ndarray:
    """Reads from one stored array the values at `index`, in the dimensions of gkd_jax."""
    stored_index = list(whole(part.shape))
    trim = []
    for group, wanted in zip(part.axes, index, strict=True):
        if len(group) == 1:
            stored_index[group[0]] = wanted
            trim.append(slice(None))
        else:
            # Heads and head dim are two dimensions on disk and one in gkd_jax. Read every head that
            # the slice touches, then cut off what lies outside the slice.
            outer, inner = group
            size = part.shape[inner]
            first = wanted.start // size
            stored_index[outer] = slice(first, -(-wanted.stop // size))
            trim.append(slice(wanted.start - first * size, wanted.stop - first * size))
    stored = arrays[part.name].read(tuple(stored_index))
    return to_ours(stored, part.axes)[tuple(trim)]
