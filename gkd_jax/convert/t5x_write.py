"""Writing T5X's native format, version 3: what T5X trains on, evaluates and decodes with."""

import itertools
import math
import pathlib
from typing import Any

import jax
import msgpack
import numpy as np
import tensorstore as ts

from gkd_jax.convert.layout import flatten, t5x_layout, to_stored, unflatten
from gkd_jax.convert.stored import as_dtype
from gkd_jax.convert.writing import check_on_this_host, complete_folder
from gkd_jax.models import t5


_LARGEST_CHUNK = 64 * 2**20  # bytes


def write_t5x(
    path: str,
    config: t5.T5Config,
    params: t5.Params,
    *,
    step: int,
    dtype: str = "float32",
) -> str:
    """Writes `<path>/checkpoint_<step>`.

    A model with a position bias in every layer is written as T5X's scanned network
    (`examples/scalable_t5`) has it, others as the plain one (`examples/t5`) has it.

    Args:
        path: the folder to put the checkpoint into.
        config: the model's sizes.
        params: its parameters.
        step: the number in the folder's name and in the state.
        dtype: of the stored parameters, "float32" or "bfloat16".

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: where the folder exists or is remote, or step is negative.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    kind = as_dtype(dtype)
    layout = t5x_layout(config, scanned=config.per_layer_relpos)
    leaves = flatten(params)
    check_on_this_host(leaves)
    target = f"{path.rstrip('/')}/checkpoint_{step}"
    index: dict[str, Any] = {"state.step": _packed(np.asarray(step, np.int32))}
    with complete_folder(target) as folder:
        for key, entry in layout.items():
            for layer, part in enumerate(entry.parts):
                value = leaves[key][layer] if entry.by_layer else leaves[key]
                array = to_stored(np.asarray(jax.device_get(value)), part.axes, part.shape)
                name = f"target.{part.name}"
                index[name] = _write_array(folder, name, array.astype(kind), dtype)
        # No empty map of param_states: T5X would take it for an array.
        tree = unflatten(index, separator=".")
        with (folder / "checkpoint").open("wb") as file:
            msgpack.pack({"version": 3, "optimizer": tree}, file)
    return target


def _packed(array: np.ndarray) -> msgpack.ExtType:
    """Flax's extension type for an array."""
    fields = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(fields, use_bin_type=True))


def _write_array(folder: pathlib.Path, name: str, array: np.ndarray, dtype: str) -> dict[str, Any]:
    """Writes one zarr array and returns the specification that T5X opens it by."""
    metadata = {
        "shape": list(array.shape),
        "chunks": chunk_shape(array.shape, array.dtype.itemsize),
        "compressor": {"id": "gzip", "level": 1},
    }
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder / name}/"},
            "metadata": {**metadata, "dtype": "bfloat16" if dtype == "bfloat16" else "<f4"},
            "store_data_equal_to_fill_value": True,
        },
        create=True,
    ).result()
    store.write(array).result()
    return {
        "driver": "zarr",
        "dtype": dtype,
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": metadata,
    }


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The shape over the smallest divisors, longest dimension first, that stays below 64 MiB."""
    chunk = list(shape)
    while math.prod(chunk) * itemsize > _LARGEST_CHUNK:
        axis = int(np.argmax(chunk))
        divisor = next(d for d in itertools.count(2) if chunk[axis] % d == 0)
        chunk[axis] //= divisor
    return chunk
