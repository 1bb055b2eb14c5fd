"""Reads and writes the checkpoint formats of Hugging Face and T5X.

    config = read_config(path)
    params = read_params(path, config, shardings=shardings)
    write_hf("out", config, params)

The functions detect the format of a folder from its files. Checkpoints in gkd_jax's own format
("gkd") are read by `gkd_jax.storage.saved_model` instead.
"""

import os
import pathlib
import shutil
from typing import Any

from gkd_jax.convert import decoder_fields, decoder_huggingface, hf_folder, huggingface, t5x
from gkd_jax.convert.formats import Format, detect, t5x_root
from gkd_jax.convert.layout import Layout, t5x_layout
from gkd_jax.convert.stored import FLOATS, Stored, as_dtype, as_stored_dtype, check, read_tree
from gkd_jax.convert.t5x_write import write_t5x
from gkd_jax.convert.writing import complete_folder, unwritten
from gkd_jax.models import t5
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.text.files import read_json_object


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
    """Returns the sizes of the model in a Hugging Face or T5X checkpoint.

    Weights are read only where the sizes depend on them: a Hugging Face T5's output head is
    compared with its embedding. But every weight file of a Hugging Face folder must be there and
    have the size that its header states. A run chooses dropout and the compute dtype, so these
    fields of the returned config have their defaults.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if the folder is no checkpoint, if a weight file is cut or damaged, or if the
            architecture is not supported.
    """
    if _foreign(path) == "hf":
        folder = hf_folder.local(path)
        fields = read_json_object(folder / "config.json")
        if fields.get("model_type") in decoder_fields.MODEL_TYPES:
            hf_folder.open_weights(folder)  # a file that is missing or cut is named at once
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
    """Returns the parameters of a Hugging Face or T5X checkpoint.

    Each process reads only the slices that its own devices hold. Every slice is read once and cast
    to `dtype` while it is read.

    Args:
        path: the checkpoint's folder.
        config: the expected sizes, for example the result of `read_config`.
        dtype: the dtype in memory, "float32" or "bfloat16", by name or as a dtype; None keeps the
            stored dtype.
        shardings: a tree with the structure of the parameters and a `jax.sharding.Sharding` at each
            leaf; None puts every array on the default device.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if arrays do not fit the model (the message lists every array that is missing,
            unexpected, or of another shape or dtype), or if the data of an array are damaged.
    """
    if dtype is not None:
        as_dtype(dtype)
    layout, arrays = _open(path, config)
    return read_tree(layout, arrays, dtype, shardings)


def check_arrays(path: str, config: t5.T5Config | DecoderConfig) -> None:
    """Compares the names, shapes and dtypes of a checkpoint's arrays with those of a model.

    No parameters are loaded.

    Raises:
        FileNotFoundError, ValueError: for the same mismatches as `read_params`.
    """
    _open(path, config)


def _open(path: str, config: t5.T5Config | DecoderConfig) -> tuple[Layout, dict[str, Stored]]:
    if _foreign(path) == "hf":
        return _family(config).open_model(path, config)
    if isinstance(config, DecoderConfig):
        raise ValueError(f"{path} is a T5X checkpoint, which holds T5s, not a decoder-only model")
    opened = t5x.open_arrays(path)
    arrays = {name.removeprefix("target."): array for name, array in opened.arrays.items()}
    layout = t5x_layout(config, scanned=opened.scanned)
    check(layout, arrays, path)
    return layout, arrays


def stored_dtype(path: str) -> str:
    """Returns the name of the dtype of a checkpoint's weights; "float32" if there are several.

    Args:
        path: the folder of a Hugging Face or T5X checkpoint.
    """
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
        path: the folder to create. It appears under this name only when it is complete.
        config: the model's sizes.
        params: the model's parameters.
        dtype: the dtype of the stored weights: "float32", "bfloat16" or "float16".
        num_pieces: the number of pieces in the vocabulary; None if unknown. An embedding may have
            more rows than that. Training does not change these spare rows, so their ids are
            written into generation_config.json as `suppress_tokens` and are never generated. For
            a T5 the pad id is always written there, because gkd_jax never decodes it.
        source: a Hugging Face folder whose tokenizer and other companion files are copied.
        card: the text of README.md; None writes no README.md.

    Raises:
        ValueError: if the folder exists or is remote, or if transformers has no such model.
    """
    family = _family(config)
    kind = as_stored_dtype(dtype)
    fields = family.config_fields(config, dtype)
    arrays = unwritten(family.hf_layout(config), params)
    beside = None if source is None else pathlib.Path(source)
    if beside is not None and family is decoder_huggingface:  # a T5's special ids are built in
        fields |= hf_folder.token_ids(beside)
    with complete_folder(path) as folder:
        hf_folder.write_weights(folder, arrays, kind)
        hf_folder.write_json(folder / "config.json", fields)
        for file in () if beside is None else hf_folder.companions(beside):
            shutil.copy(file, folder)
        family.write_generation(folder, config, num_pieces)
        if card is not None:
            (folder / "README.md").write_text(card, "utf-8")


def check_hf(config: t5.T5Config | DecoderConfig) -> None:
    """Raises ValueError if no class of transformers computes this model."""
    _family(config).config_fields(config, "float32")


def _family(config: t5.T5Config | DecoderConfig) -> Any:
    """Returns the module with the functions for a model's family in Hugging Face folders."""
    return decoder_huggingface if isinstance(config, DecoderConfig) else huggingface


def _foreign(path: str) -> Format:
    found = detect(path)
    if found == "gkd":
        raise ValueError(f"{path} is a checkpoint of gkd_jax: read it with gkd_jax.load_model")
    return found
