"""Reads which special ids a Hugging Face folder states."""

import os
from typing import Any

from gkd_jax.text import files


def stated(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns `bos_token_id`, `eos_token_id` and `pad_token_id` of a folder, where they are stated.

    generation_config.json overrides config.json: several ids end a text of an instruct model, and
    only generation_config.json names all of them. A composite model has the keys of its text model
    in `text_config`.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found: dict[str, Any] = {}
    for file in ("config.json", "generation_config.json"):
        fields = files.read_json_in(folder, file)
        inner = fields.get("text_config")
        fields = {**(inner if isinstance(inner, dict) else {}), **fields}
        found |= {name: fields[name] for name in names if fields.get(name) is not None}
    return found
