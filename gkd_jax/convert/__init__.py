"""Checkpoints of others: Hugging Face's and T5X's, read and written.

    config = read_config(path)
    params = read_params(path, config, shardings=shardings)
    write_hf("out", config, params)

The format is detected. Our own checkpoints ("gkd") are read by `gkd_jax.storage.checkpoints`.
"""

import os
import pathlib
from typing import Any

from gkd_jax.convert import decoder_fields, decoder_huggingface, hf_folder, huggingface, t5x
from gkd_jax.convert.formats import Format, detect, t5x_root
from gkd_jax.convert.layout import Layout, t5x_layout
from gkd_jax.convert.stored import FLOATS, Stored, as_dtype, check, read_tree
from gkd_jax.convert.t5x_write import write_t5x
from gkd_jax.models import t5
from gkd_jax.models.decoder_config import DecoderConfig


__all__ = [
    "Format",
    "check_arrays",
    "check_hf",
    "detect",
    "read_config",
    "read_params",
    "stored_dtype",
    "t5x_root",
    "write_hf",
    "write_t5x",
]


def read_config(path: str) -> t5.T5Config | DecoderConfig:
    """The sizes of the model in a Hugging Face or T5X checkpoint; reads no weights.

    Dropout and compute dtype are choices of a run: they stay at `T5Config`'s defaults.

    Raises:
        FileNotFoundError: where the folder or a file of it is missing.
        ValueError: where it is no checkpoint, or not one of a T5.
    """
    if _foreign(path) == "hf":
        folder = hf_folder.local(path)
        fields = hf_folder.read_json(folder / "config.json")
        if fields.get("model_type") in decoder_fields.MODEL_TYPES:
            return decoder_huggingface.read_config(folder, fields)
        return huggingface.read_config(path)
    return t5x.infer_config(path, t5x.open_arrays(path))


def read_params(
    path: str,
    config: t5.T5Config | DecoderConfig,
    *,
    dtype: Any | None = "float32",
    shardings: Any | None = None,
) -> t5.Params:
    """The parameters of a Hugging Face or T5X checkpoint.

    Only the slices that this process's devices hold are read, each once, and cast on the way.

    Args:
        path: the checkpoint's folder.
        config: the sizes to expect, as from `read_config`.
        dtype: in memory: "float32" or "bfloat16", by name or as a dtype; None for the stored one.
        shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; None puts
            everything on the default device.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: lists every array that is missing, of another shape or dtype, or unexpected;
            or names the array whose data are damaged.
    """
    if dtype is not None:
        as_dtype(dtype)
    layout, arrays = _open(path, config)
    return read_tree(layout, arrays, dtype, shardings)


def check_arrays(path: str, config: t5.T5Config | DecoderConfig) -> None:
    """Compares names, shapes and dtypes of a checkpoint's arrays with a model's; reads none.

    Raises:
        FileNotFoundError, ValueError: as `read_params`.
    """
    _open(path, config)


def _open(path: str, config: t5.T5Config | DecoderConfig) -> tuple[Layout, dict[str, Stored]]:
    if _foreign(path) == "hf":
        if isinstance(config, DecoderConfig):
            return decoder_huggingface.open_model(path, config)
        return huggingface.open_model(path, config)
    if isinstance(config, DecoderConfig):
        raise ValueError(f"{path} is a T5X checkpoint, which holds T5s, not a decoder-only model")
    opened = t5x.open_arrays(path)
    arrays = {name.removeprefix("target."): array for name, array in opened.arrays.items()}
    layout = t5x_layout(config, scanned=opened.scanned)
    check(layout, arrays, path)
    return layout, arrays


def stored_dtype(path: str) -> str:
    """The dtype of a foreign checkpoint's weights; "float32" where they have several."""
    if _foreign(path) == "hf":
        arrays = hf_folder.open_weights(hf_folder.local(path))
    else:
        arrays = t5x.open_arrays(path).arrays
    found = {array.dtype.name for array in arrays.values() if array.dtype in FLOATS}
    return found.pop() if len(found) == 1 else "float32"


def write_hf(
    path: str,
    config: t5.T5Config | DecoderConfig,
    params: t5.Params,
    *,
    dtype: str = "float32",
    num_pieces: int | None = None,
    source: str | os.PathLike[str] | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that transformers loads with `from_pretrained`.

    Args:
        path: the folder to make; appears only when it is complete.
        config: the model's sizes.
        params: its parameters.
        dtype: of the stored weights, "float32", "bfloat16" or "float16".
        num_pieces: of the vocabulary: of a T5, ids from there on, which no piece has and which
            training leaves as they are, are never generated. None where unknown.
        source: a Hugging Face folder whose tokenizer and other companions are copied.
        card: the text of README.md; None writes none.

    Raises:
        ValueError: where the folder exists, is remote, or the model has no counterpart.
    """
    folder = None if source is None else pathlib.Path(source)
    if isinstance(config, DecoderConfig):
        decoder_huggingface.write(path, config, params, dtype=dtype, source=folder, card=card)
    else:
        huggingface.write(
            path, config, params, dtype=dtype, num_pieces=num_pieces, source=folder, card=card
        )


def check_hf(config: t5.T5Config | DecoderConfig) -> None:
    """Raises ValueError for a model that transformers has no counterpart of."""
    if isinstance(config, DecoderConfig):
        decoder_fields.model_type(config)
    else:
        huggingface.check_hf(config)


def _foreign(path: str) -> Format:
    found = detect(path)
    if found == "gkd":
        raise ValueError(f"{path} is a checkpoint of gkd_jax: read it with gkd_jax.load_model")
    return found
