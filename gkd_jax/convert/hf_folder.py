"""Reads and writes the files of a Hugging Face folder: JSON files, and weights in safetensors.

The functions serve every architecture. Weights are read with the `safetensors` package, which maps
a file into memory and copies only the requested slices. When the package opens a file, it checks
the sizes, offsets and dtypes in the file's header.
"""

from collections.abc import Iterable
import fnmatch
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from gkd_jax.convert.stored import Index, Stored
from gkd_jax.convert.writing import Unwritten
from gkd_jax.text.files import AnyPath, check_no_pointer, is_remote, read_json_object


WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# The files that stay valid for a model after its weights have been trained further.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "chat_template*"),
    *(GENERATION, "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder beside the other files
_LARGEST_FILE = 5 * 10**9  # Bytes; the default of transformers for one of several files.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def local(path: str) -> pathlib.Path:
    """Returns a local folder as a path.

    Raises:
        ValueError: if the folder is remote, because its files cannot be mapped into memory.
    """
    if is_remote(path):
        raise ValueError(f"a Hugging Face folder must be local, got {path}: copy it first")
    return pathlib.Path(path)


def write_json(file: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes an object as JSON with sorted keys and indentation, as transformers writes it."""
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def copy_companions(source: AnyPath, folder: AnyPath, *more: str) -> None:
    """Copies the files that accompany a model's weights, and those with one of the names `more`.

    They are the files of the tokenizer and the chat template, generation_config.json and licences.
    The folders may be in a bucket, and the one to write to must exist.
    """
    for file in source.iterdir():
        if file.name == _MORE_TEMPLATES and file.is_dir():
            (folder / file.name).mkdir()
            copy_companions(file, folder / file.name, "*.jinja")
            continue
        is_one = any(fnmatch.fnmatchcase(file.name, name) for name in (*_COMPANIONS, *more))
        if is_one and file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())


def spare_ids(vocab_size: int, num_pieces: int | None) -> range:
    """Returns the ids of an embedding that no piece has; none if `num_pieces` is not known."""
    return range(vocab_size if num_pieces is None else num_pieces, vocab_size)


def open_weights(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the arrays in the weight files of a folder by name, without reading their values.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is cut or damaged, or if the index names an array that its file lacks.
    """
    if (folder / WEIGHTS).is_file():
        return _open_file(folder / WEIGHTS)
    index = folder / WEIGHTS_INDEX
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index}: expected an object weight_map, got {places!r}")
    for file in places.values():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or file == "..":
            raise ValueError(f"{index}: a shard must be a file of the folder, got {file!r}")
    shards = {file: _open_file(folder / file) for file in sorted(set(places.values()))}
    absent = [f"{name} in {file}" for name, file in places.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"{index} names arrays that are not there: {', '.join(absent)}")
    return {name: shards[file][name] for name, file in places.items()}


def _open_file(file: pathlib.Path) -> dict[str, Stored]:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    with file.open("rb") as beginning:
        check_no_pointer(file, beginning.read(100))
    try:
        opened = safetensors.safe_open(file, framework="np")
        names = opened.keys()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is cut, damaged or no safetensors file: {error}") from error
    return {name: _stored(opened, name, file) for name in names}


def _stored(opened: Any, name: str, file: pathlib.Path) -> Stored:
    array = opened.get_slice(name)
    dtype = array.get_dtype()
    if dtype not in _DTYPES:
        raise ValueError(
            f"{name} in {file}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}"
        )

    def read(index: Index) -> np.ndarray:
        return array[index] if index else array[...]

    shape = tuple(array.get_shape())
    return Stored(name=name, shape=shape, dtype=_DTYPES[dtype], read=read)


def write_weights(folder: pathlib.Path, arrays: Iterable[Unwritten], dtype: np.dtype) -> None:
    """Writes arrays to one safetensors file, or to several and an index beyond 5 GB.

    All arrays of one file are in host memory at the same time, because the package writes a file
    with one call.
    """
    files: list[list[Unwritten]] = [[]]
    size = total = 0
    for array in arrays:
        length = math.prod(array.part.shape) * dtype.itemsize
        if files[-1] and size + length > _LARGEST_FILE:
            files.append([])
            size = 0
        files[-1].append(array)
        size, total = size + length, total + length
    places = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else WEIGHTS
        tensors = {one.part.name: np.ascontiguousarray(one.values(), dtype) for one in content}
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / WEIGHTS_INDEX, index)
