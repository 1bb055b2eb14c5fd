"""Whether a checkpoint is the same one as before, and whether its numbers are numbers."""

from collections.abc import Iterator
import concurrent.futures
import hashlib
import json
import os
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from gkd_jax import convert
from gkd_jax.storage import checkpoints


_ENDS = 2**20  # bytes that are read at each end of a file
_READERS = 16  # files read at the same time: enough to hide a bucket's latency
_MOST_NAMES = 10


def content_id(path: str) -> str:
    """A hash of a checkpoint's content, the same wherever it lies; no array is loaded.

    Of our own checkpoints it is made of the parameters' fingerprints, which every step has in its
    JSON. Of others it is made of the names and sizes of the files that hold weights and
    configuration, with the first and the last MiB of each.

    Args:
        path: a MODEL_DIR (its newest step is meant), one of its steps, a Hugging Face folder or a
            T5X checkpoint; local or gs://.

    Raises:
        FileNotFoundError: where there is nothing.
        ValueError: where it is no checkpoint.
    """
    step_folder = checkpoints.find_step(path)
    if step_folder is not None:
        stored = checkpoints.read_description(step_folder)
        fingerprints = stored.get("fingerprints", {}).get("params")
        if fingerprints:
            text = json.dumps([stored["config"], fingerprints], sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()
        return _hash_of_files(step_folder / "params", ".*")
    if convert.detect(path) == "hf":
        return _hash_of_files(epath.Path(path), r"config\.json|[^/]*\.safetensors(\.index\.json)?")
    # The arrays of the model, not those of the optimizer; OCDBT has both in the same files.
    return _hash_of_files(convert.t5x_root(path), r"(?!state\.).*")


def _hash_of_files(folder: epath.Path, pattern: str) -> str:
    """Of the files under a folder whose names, relative to it, match a regular expression."""
    files = ((os.fspath(file.relative_to(folder)), file) for file in _files_under(folder))
    named = sorted((name, file) for name, file in files if re.fullmatch(pattern, name))
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
    size = int(file.stat().length)
    with file.open("rb") as opened:
        ends = opened.read(_ENDS)
        if size > _ENDS:
            opened.seek(max(size - _ENDS, _ENDS))
            ends += opened.read(_ENDS)
    return size, ends


def check_finite(params: Any, path: str) -> None:
    """Refuses parameters that are not all finite: such a model decodes empty texts, silently.

    Args:
        params: as loaded, spread over devices or not.
        path: of the checkpoint, for the message.

    Raises:
        ValueError: naming the arrays with a NaN or an infinity, and the layer of stacked ones.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    stacked = tuple("/layers/" in name for name in names)
    flags = jax.device_get(_finite([leaf for _, leaf in leaves], stacked))
    wrong = list(_not_finite(names, flags))
    if wrong:
        more = f" and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
        raise ValueError(
            f"the checkpoint {path!r} holds numbers that are not finite (NaN or infinity), in "
            f"{', '.join(wrong[:_MOST_NAMES])}{more}"
        )


def _not_finite(names: list[str], flags: list[Any]) -> Iterator[str]:
    for name, flag in zip(names, flags, strict=True):
        if flag.ndim == 0 and not flag:
            yield name
        elif flag.ndim:
            yield from (f"{name} (layer {layer})" for layer in (~flag).nonzero()[0])


def _all_finite(leaves: list[jax.Array], stacked: tuple[bool, ...]) -> list[jax.Array]:
    return [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(by_layer), leaf.ndim)))
        for leaf, by_layer in zip(leaves, stacked, strict=True)
    ]


_finite = jax.jit(_all_finite, static_argnums=1)
