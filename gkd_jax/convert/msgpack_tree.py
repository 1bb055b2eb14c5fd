"""Parses the msgpack files of T5X and Flax safely.

Flax (flax.serialization) packs arrays as msgpack extension types: type 1 is an ndarray as (shape,
dtype name, bytes), type 2 is a complex number, and type 3 is a NumPy scalar packed as an ndarray.
The parser treats a file as untrusted input: it executes nothing from the file, and it checks sizes
before it allocates memory.
"""

import math
from typing import Any

import ml_dtypes
import msgpack
import numpy as np


_NUMPY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_DTYPES = {name: np.dtype(name) for name in _NUMPY_DTYPES}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
# These limits bound what a damaged or malicious file can make the parser allocate.
_MOST_ENTRIES = 1_000_000  # The number of entries in one map.
_LONGEST_LIST = 4096
_LONGEST_STRING = 65_536
_DEEPEST = 64  # The depth to which maps may be nested.
_CHUNKED = "__msgpack_chunked_array__"


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Returns the nested dicts in a msgpack file; arrays at the leaves are NumPy arrays.

    Raises:
        ValueError: if the bytes are no such file, are damaged, or exceed a limit.
    """
    if data.startswith(b"model_checkpoint_path"):
        raise ValueError(f"{where} belongs to a TensorFlow checkpoint, expected T5X's msgpack")
    try:
        tree = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_extension,
            max_str_len=_LONGEST_STRING,
            max_array_len=_LONGEST_LIST,
            max_map_len=_MOST_ENTRIES,
            max_bin_len=len(data),
            max_ext_len=len(data),
        )
        if not isinstance(tree, dict):
            raise ValueError(f"expected a map, found {type(tree).__name__}")
        return _join_chunks(tree, 0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"{where} is damaged or not T5X's msgpack: {error}") from error


def _extension(code: int, data: bytes) -> Any:
    if code in (1, 3):
        array = _array(data)
        if code == 3 and array.ndim:
            raise ValueError(f"a scalar has shape {array.shape}")
        return array
    if code == 2:
        real, imaginary = msgpack.unpackb(data)
        return complex(real, imaginary)
    raise ValueError(f"unknown msgpack extension type {code}")


def _array(data: bytes) -> np.ndarray:
    fields = msgpack.unpackb(data, raw=False, max_array_len=64, max_bin_len=len(data))
    if not isinstance(fields, list) or len(fields) != 3:
        raise ValueError("an array must be (shape, dtype, bytes)")
    shape, name, buffer = fields
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"array dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    shape = _shape(shape)
    dtype = _DTYPES[name]
    if not isinstance(buffer, bytes) or len(buffer) != math.prod(shape) * dtype.itemsize:
        found = len(buffer) if isinstance(buffer, bytes) else type(buffer).__name__
        raise ValueError(f"an array of shape {shape} and dtype {name} has {found} bytes")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"an array's shape must be a list of sizes, got {sizes!r}")
    return tuple(sizes)


def _join_chunks(node: Any, depth: int) -> Any:
    """Joins the arrays that Flax split into chunks because msgpack limits the size of one value."""
    if not isinstance(node, dict):
        return node
    if depth > _DEEPEST:
        raise ValueError(f"maps are nested deeper than {_DEEPEST}")
    if _CHUNKED not in node:
        return {key: _join_chunks(child, depth + 1) for key, child in node.items()}
    shape, chunks = node.get("shape"), node.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict):
        raise ValueError("a split array must have a shape and chunks")
    sizes = _shape([shape.get(str(axis)) for axis in range(len(shape))])
    found = [chunks.get(str(number)) for number in range(len(chunks))]
    pieces = [piece.ravel() for piece in found if isinstance(piece, np.ndarray)]
    if not found or len(pieces) != len(found):
        raise ValueError("a split array's chunks must be arrays")
    joined = np.concatenate(pieces)
    if joined.size != math.prod(sizes):
        raise ValueError(f"a split array of shape {sizes} has {joined.size} numbers")
    return joined.reshape(sizes)
