"""The safetensors format: 8 bytes of length, a JSON header, then the arrays' bytes.

Read through memory maps, so that a slice costs only its own bytes; written one array at a time.
"""

from collections.abc import Callable, Iterable
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from gkd_jax.convert.stored import BFLOAT16, Stored


_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {np.dtype(np.float32): "F32", BFLOAT16: "BF16"}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def open_file(file: pathlib.Path) -> dict[str, Stored]:
    """The arrays of one file by name, not read yet.

    Raises:
        FileNotFoundError: where the file is missing.
        ValueError: where it is cut or its header is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{file} is cut or no safetensors file: header of {length} bytes")
        header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file} has a damaged header: expected an object")
    header.pop("__metadata__", None)
    start = 8 + length
    buffer = np.memmap(file, np.uint8, "r")
    return {
        name: _stored(f"{name} in {file}", name, fields, buffer[start:])
        for name, fields in header.items()
    }


def _stored(what: str, name: str, fields: Any, data: np.ndarray) -> Stored:
    try:
        dtype, shape, (first, last) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected dtype, shape and data_offsets, got {fields}") from error
    if dtype not in _DTYPES:
        raise ValueError(f"{what}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    numbers = [*shape, first, last] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{what}: damaged shape or offsets: {shape}, {first}, {last}")
    if last > data.size:
        raise ValueError(f"{what}: ends at byte {last}, but the file holds {data.size}: it is cut")
    if last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{what}: {last - first} bytes for shape {shape} of {dtype}")
    array = data[first:last].view(_DTYPES[dtype]).reshape(shape)
    return Stored(
        name=name, shape=array.shape, dtype=array.dtype, read=lambda index: np.asarray(array[index])
    )


def write_file(
    file: pathlib.Path,
    arrays: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: np.dtype,
) -> None:
    """Writes (name, shape, function that makes the array) triples; one array is alive at a time."""
    arrays = list(arrays)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in arrays:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in arrays:
            np.ascontiguousarray(make(), dtype).tofile(stream)
        stream.flush()
        os.fsync(stream.fileno())
