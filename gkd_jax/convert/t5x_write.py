"""Writes checkpoints in T5X's native format, version 3, which T5X itself loads."""

import itertools
import math
import os
import pathlib
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts

from gkd_jax.convert.layout import unflatten
from gkd_jax.convert.stored import as_dtype
from gkd_jax.convert.t5x import t5x_activations, t5x_layout
from gkd_jax.convert.writing import complete_folder, unwritten
from gkd_jax.models import lm, t5


_LARGEST_CHUNK = 64 * 2**20  # The largest uncompressed size of a zarr chunk, in bytes.


def write_t5x(
    path: str | os.PathLike[str],
    config: t5.T5Config,
    params: t5.Params,
    *,
    step: int,
    dtype: str = "float32",
) -> str:
    """Writes a T5X checkpoint to the folder `<path>/checkpoint_<step>`, and returns its path.

    A model with a position bias in every layer is written in the layout of T5X's scanned network
    (`examples/scalable_t5`), any other model in the layout of its plain network (`examples/t5`).

    Args:
        path: the folder in which the checkpoint's folder is created.
        step: the number in the folder's name and in the stored training state.
        dtype: the dtype of the stored parameters, "float32" or "bfloat16".

    Raises:
        ValueError: if the checkpoint's folder exists or is remote, if `step` is negative, or if
            `check_t5x` refuses the model.
    """
    check_t5x(config)
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    kind = as_dtype(dtype)
    arrays = unwritten(t5x_layout(config, scanned=config.per_layer_relpos), params)
    target = f"{os.fspath(path).rstrip('/')}/checkpoint_{step}"
    index: dict[str, Any] = {"state.step": _packed(np.asarray(step, np.int32))}
    with complete_folder(target) as folder:
        for array in arrays:
            name = f"target.{array.part.name}"
            index[name] = _write_array(folder, name, array.values().astype(kind), dtype)
        # The optimizer's `param_states` are left out: T5X would read an empty map as an array.
        tree = unflatten(index, separator=".")
        with (folder / "checkpoint").open("wb") as file:
            msgpack.pack({"version": 3, "optimizer": tree}, file)
    return target


def check_t5x(config: lm.Config) -> None:
    """Raises ValueError for a model that T5X would compute otherwise.

    A T5X checkpoint holds arrays alone. The settings checked here are fixed in T5X's networks, or
    `t5x.read_config` infers them from the arrays.
    """
    if not isinstance(config, t5.T5Config):
        raise ValueError(f"T5X's format is for T5s alone, got a {type(config).__name__}")
    fixed = {
        "mlp_activations": t5x_activations(len(config.mlp_activations) > 1),
        "scale_logits": config.tie_embeddings,
        "relpos_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    wrong = [
        f"{name}={value!r}, got {getattr(config, name)!r}"
        for name, value in fixed.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(
            "T5X's format holds no settings, and its checkpoints are read with "
            f"{'; '.join(wrong)}: T5X would compute another model"
        )


def _packed(array: np.ndarray) -> msgpack.ExtType:
    """Returns an array as the msgpack extension type that Flax uses for arrays."""
    fields = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(fields, use_bin_type=True))


def _write_array(folder: pathlib.Path, name: str, array: np.ndarray, dtype: str) -> dict[str, Any]:
    """Writes one zarr array and returns the TensorStore specification with which T5X opens it."""
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
    """Returns the shape of the zarr chunks of an array; a chunk has at most 64 MiB.

    While a chunk is too large, its longest dimension is divided by that dimension's smallest prime
    factor, so that every chunk of the array has the same shape.
    """
    chunk = list(shape)
    while math.prod(chunk) * itemsize > _LARGEST_CHUNK:
        axis = int(np.argmax(chunk))
        divisor = next(d for d in itertools.count(2) if chunk[axis] % d == 0)
        chunk[axis] //= divisor
    return chunk
