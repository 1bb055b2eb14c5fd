"""Arrays on disk, read slice by slice straight into the layout of the devices."""

from collections.abc import Callable, Iterable
import concurrent.futures
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gkd_jax.convert.layout import Entry, Layout, Part, flatten, to_ours, unflatten
from gkd_jax.models import t5


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
_READERS = 8  # layers read at the same time: enough to hide a bucket's latency
_MOST_LINES = 40

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One array of a checkpoint, not read yet.

    Attributes:
        name: in the checkpoint.
        shape, dtype: as stored.
        read: gives the slice of an index of `slice(start, stop)`s, one a dimension; raises
            ValueError or FileNotFoundError that name the array where its data are damaged.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]


def in_memory(name: str, array: np.ndarray) -> Stored:
    """An array that was part of an index file."""
    return Stored(name=name, shape=array.shape, dtype=array.dtype, read=lambda index: array[index])


def whole(shape: tuple[int, ...]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def as_dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of "float32" or "bfloat16", by name or as a dtype.

    Raises:
        ValueError: for another one.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {name!r}")
    return BFLOAT16 if name == "bfloat16" else np.dtype(np.float32)


def check(
    layout: Layout, arrays: dict[str, Stored], where: str, *, ignored: Iterable[str] = ()
) -> None:
    """Compares what a model needs with what a checkpoint has.

    Raises:
        ValueError: lists every array that is missing, of another shape or dtype, or unexpected.
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
    layout: Layout, arrays: dict[str, Stored], dtype: Any | None, shardings: Any | None
) -> t5.Params:
    """Reads every parameter; each process only what its own devices hold.

    Args:
        layout: which stored arrays make up a parameter; `check`ed.
        arrays: the stored arrays by name.
        dtype: "float32", "bfloat16", or None for the stored dtype.
        shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; None puts
            everything on the default device.
    """
    places = None if shardings is None else flatten(shardings)
    if places is not None and places.keys() != layout.keys():
        odd = sorted(places.keys() ^ layout.keys())
        raise ValueError(f"shardings must have the parameters' tree; these differ: {odd}")
    leaves = {}
    for path, entry in layout.items():
        kind = arrays[entry.parts[0].name].dtype if dtype is None else as_dtype(dtype)
        if places is None:
            leaves[path] = jnp.asarray(_read_entry(entry, arrays, whole(entry.shape), kind))
        else:
            leaves[path] = _read_sharded(entry, arrays, kind, places[path])
    return unflatten(leaves)


def _read_sharded(
    entry: Entry, arrays: dict[str, Stored], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    read: dict[Any, np.ndarray] = {}  # replicas share one reading

    def shard(index):
        bounds = tuple(
            slice(*part.indices(size)[:2]) for part, size in zip(index, entry.shape, strict=True)
        )
        key = tuple((part.start, part.stop) for part in bounds)
        if key not in read:
            read[key] = _read_entry(entry, arrays, bounds, dtype)
        return read[key]

    return jax.make_array_from_callback(entry.shape, sharding, shard)


def _read_entry(
    entry: Entry, arrays: dict[str, Stored], index: Index, dtype: np.dtype
) -> np.ndarray:
    """One slice of one parameter."""
    out = np.empty([part.stop - part.start for part in index], dtype)
    if not entry.by_layer:
        out[...] = _read_part(entry.parts[0], arrays, index)
        return out
    layers, inner = index[0], index[1:]

    def read_layer(layer: int) -> None:
        out[layer - layers.start] = _read_part(entry.parts[layer], arrays, inner)

    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(read_layer, range(layers.start, layers.stop)):
            pass
    return out


def _read_part(part: Part, arrays: dict[str, Stored], index: Index) -> np.ndarray:
    """The slice `index` of a parameter's (a layer's) dimensions, read from one stored array."""
    stored_index = list(whole(part.shape))
    trim = []
    for group, wanted in zip(part.axes, index, strict=True):
        if len(group) == 1:
            stored_index[group[0]] = wanted
            trim.append(slice(None))
        else:  # fused heads: read the heads that the slice touches, then cut
            outer, inner = group
            size = part.shape[inner]
            first = wanted.start // size
            stored_index[outer] = slice(first, -(-wanted.stop // size))
            trim.append(slice(wanted.start - first * size, wanted.stop - first * size))
    stored = arrays[part.name].read(tuple(stored_index))
    return to_ours(stored, part.axes)[tuple(trim)]
