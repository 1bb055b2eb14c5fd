"""Reads a checkpoint of Hugging Face or T5X, whose format is detected from its files."""

import os
from typing import Any

from gkd_jax.convert import hf_folder, huggingface, t5x
from gkd_jax.convert.formats import Format, detect
from gkd_jax.convert.layout import Layout
from gkd_jax.convert.stored import FLOATS, Stored, as_dtype, read_tree
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig


def read_config(path: str | os.PathLike[str]) -> lm.Config:
    """Returns the config of the model in a Hugging Face or T5X checkpoint.

    Weights are read only where the config depends on them: a Hugging Face T5's output head is
    compared with its embedding. But every weight file of a Hugging Face folder must be there and
    have the size that its header states. A run chooses dropout and the compute dtype, so these
    fields of the returned config have their defaults.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the folder is no checkpoint, if a weight file is cut or damaged, or if the
            architecture is not supported.
    """
    path = os.fspath(path)
    return huggingface.read_config(path) if _foreign(path) == "hf" else t5x.read_config(path)


def read_params(
    path: str | os.PathLike[str],
    config: lm.Config,
    *,
    dtype: Any = "float32",
    shardings: Any | None = None,
) -> lm.Params:
    """Returns the parameters of a Hugging Face or T5X checkpoint.

    Each process reads only the slices that its own devices hold. Every slice is read once and cast
    to `dtype` while it is read.

    Args:
        config: the expected config, for example the result of `read_config`.
        dtype: the dtype in memory, "float32" or "bfloat16", by name or as a dtype.
        shardings: a tree with the structure of the parameters and a `jax.sharding.Sharding` at each
            leaf; None puts every array on the default device.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if arrays do not fit the model (the message lists every array that is missing,
            unexpected, or of another shape or dtype), or if the data of an array are damaged.
    """
    kind = as_dtype(dtype)
    layout, arrays = _open(os.fspath(path), config)
    return read_tree(layout, arrays, kind, shardings)


def check_arrays(path: str | os.PathLike[str], config: lm.Config) -> None:
    """Compares the names, shapes and dtypes of a checkpoint's arrays with those of a model.

    No parameters are loaded.

    Raises:
        FileNotFoundError, ValueError: for the same mismatches as `read_params`.
    """
    _open(os.fspath(path), config)


def _open(path: str, config: lm.Config) -> tuple[Layout, dict[str, Stored]]:
    if _foreign(path) == "hf":
        return huggingface.family_of(config).open_model(path, config)
    if isinstance(config, DecoderConfig):
        raise ValueError(f"{path} is a T5X checkpoint, which holds T5s, not a decoder-only model")
    return t5x.open_model(path, config)


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """Returns the name of the dtype of a checkpoint's weights; "float32" if there are several."""
    path = os.fspath(path)
    if _foreign(path) == "hf":
        arrays = hf_folder.open_weights(hf_folder.local(path))
    else:
        arrays = t5x.open_arrays(path)
    found = {array.dtype.name for array in arrays.values() if array.dtype in FLOATS}
    return found.pop() if len(found) == 1 else "float32"


def _foreign(path: str) -> Format:
    found = detect(path)
    if found == "gkd":
        raise ValueError(f"{path} is a checkpoint of gkd_jax: read it with gkd_jax.load_model")
    return found
