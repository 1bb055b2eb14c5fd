"""Identifies a checkpoint by its content."""

from collections.abc import Iterator
import concurrent.futures
import hashlib
import json
import os
import re

from etils import epath

from gkd_jax import convert
from gkd_jax.models import lm
from gkd_jax.storage import saved_model
from gkd_jax.text import files


_ENDS = 2**20  # The number of bytes that are read at each end of a file.
_READERS = 16  # The number of files read concurrently, enough to hide the latency of a bucket.


def content_id(path: str) -> str:
    """Returns a hash of a checkpoint's content, which does not depend on the checkpoint's path.

    No array is loaded. For a checkpoint of gkd_jax, the hash covers the architecture of the model
    (`lm.architecture`) and the fingerprints of the parameters, both from the JSON of the step. So
    equal weights have one id, whatever the execution settings of the run that saved them. For any
    other checkpoint, the hash covers the files that hold weights and configuration: the name, the
    size, the first MiB and the last MiB of each file.

    Args:
        path: a MODEL_DIR (which refers to its newest step), one of its steps, a Hugging Face folder
            or a T5X checkpoint; local or gs://.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder is no checkpoint.
    """
    step_folder = saved_model.find_step(path)
    if step_folder is not None:
        marks = saved_model.read_fingerprints(step_folder)["params"]
        architecture = lm.architecture(saved_model.read_config(step_folder))
        text = json.dumps([architecture, marks], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
    if convert.detect(path) == "hf":
        return _hash_of_files(epath.Path(path), r"config\.json|[^/]*\.safetensors(\.index\.json)?")
    # Leave out the files of the optimizer's state. An OCDBT checkpoint has the arrays of the model
    # and of the optimizer in the same files, so there the hash covers both.
    return _hash_of_files(convert.t5x_root(path), r"(?!state\.).*")


def _hash_of_files(folder: epath.Path, pattern: str) -> str:
    """Returns a hash of the files under a folder whose relative paths fully match `pattern`."""
    found = ((os.fspath(file.relative_to(folder)), file) for file in _files_under(folder))
    named = sorted((name, file) for name, file in found if re.fullmatch(pattern, name))
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        contents = pool.map(_size_and_ends, (file for _, file in named))
        for (name, _), (size, ends) in zip(named, contents, strict=True):
            digest.update(f"{len(name)} {name} {size} ".encode() + ends)
    return digest.hexdigest()


def _files_under(folder: epath.Path) -> Iterator[epath.Path]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files_under(child)
        else:
            yield child


def _size_and_ends(file: epath.Path) -> tuple[int, bytes]:
    """Returns a file's size in bytes, and its first and last MiB joined without overlap."""
    size = files.size_of(file)
    with file.open("rb") as opened:
        ends = opened.read(_ENDS)
        if size > _ENDS:
            opened.seek(max(size - _ENDS, _ENDS))
            ends += opened.read(_ENDS)
    return size, ends
