"""Reads and writes Hugging Face folders of any model family."""

import dataclasses
import os
from typing import Any

from etils import epath
import numpy as np

from gkd_jax.convert import (
    decoder_fields,
    decoder_huggingface,
    field_values,
    hf_folder,
    t5_huggingface,
)
from gkd_jax.convert.stored import as_dtype
from gkd_jax.convert.writing import complete_folder, unwritten
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.text import special_ids
from gkd_jax.text.files import read_json_object


def read_config(path: str) -> lm.Config:
    """Returns the config of the model in a folder; see `reading.read_config` for the errors."""
    folder = hf_folder.local(path)
    fields = read_json_object(folder / "config.json")
    arrays = hf_folder.open_weights(folder)  # a file that is missing or cut is named at once
    kinds = (*t5_huggingface.ARCHITECTURES, *decoder_fields.MODEL_TYPES)
    try:
        if field_values.choice(fields, "model_type", kinds) in decoder_fields.MODEL_TYPES:
            return decoder_fields.read(fields)
        config = t5_huggingface.read_fields(fields)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error
    t5_huggingface.check_special_ids(folder, fields)
    return dataclasses.replace(config, tie_embeddings=not t5_huggingface.has_own_head(arrays))


def write_hf(
    path: str | os.PathLike[str],
    config: lm.Config,
    params: lm.Params,
    *,
    dtype: str = "float32",
    num_pieces: int | None = None,
    source: str | os.PathLike[str] | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that transformers loads with `from_pretrained`.

    Args:
        path: the folder to create. It appears under this name only when it is complete.
        dtype: the dtype of the stored weights: "float32", "bfloat16" or "float16".
        num_pieces: the number of pieces in the vocabulary; None if unknown. An embedding may have
            more rows than that. Training does not change these spare rows, so their ids are
            written into generation_config.json as `suppress_tokens` and are never generated. For
            a T5 the pad id is always written there, because gkd_jax never decodes it.
        source: a Hugging Face folder, local or in a bucket, whose tokenizer and other companion
            files are copied.
        card: the text of README.md; None writes no README.md.

    Raises:
        ValueError: if the folder exists or is remote, or if transformers has no such model.
    """
    family = family_of(config)
    kind = np.dtype(np.float16) if dtype == "float16" else as_dtype(dtype)
    fields = family.config_fields(config, dtype)
    arrays = unwritten(family.hf_layout(config), params)
    beside = None if source is None else epath.Path(source)
    if beside is not None and family is decoder_huggingface:  # a T5's special ids are built in
        fields |= special_ids.stated(beside)
    with complete_folder(os.fspath(path)) as folder:
        hf_folder.write_weights(folder, arrays, kind)
        hf_folder.write_json(folder / "config.json", fields)
        if beside is not None:
            hf_folder.copy_companions(beside, folder)
        family.write_generation(folder, config, num_pieces)
        if card is not None:
            (folder / "README.md").write_text(card, "utf-8")


def check_hf(config: lm.Config) -> None:
    """Raises ValueError if no class of transformers computes this model."""
    family_of(config).config_fields(config, "float32")


def family_of(config: lm.Config) -> Any:
    """Returns the module with the functions for a model's family in Hugging Face folders."""
    return decoder_huggingface if isinstance(config, DecoderConfig) else t5_huggingface
