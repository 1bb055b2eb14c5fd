"""Reads and writes decoder-only models in Hugging Face folders: config.json and safetensors."""

import pathlib
import re

from gkd_jax.convert import hf_folder
from gkd_jax.convert.decoder_fields import config_fields
from gkd_jax.convert.layout import Layout, Part, hf_part, layer_by_layer
from gkd_jax.convert.stored import Stored, check, same
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.text import special_ids
from gkd_jax.text.files import read_json_object


__all__ = ["config_fields", "hf_layout", "open_model", "write_generation"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Names of the text model's arrays start with one of these prefixes or with none of them.
_PREFIX = re.compile(r"(language_model\.model\.|model\.language_model\.|model\.)?")
_NOT_TEXT = (
    *("vision_tower.", "multi_modal_projector."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)
_OUTSIDE_LAYERS = {
    "token_embedder": _EMBEDDING,
    "decoder/decoder_norm": "model.norm.weight",
    "decoder/logits_dense": _HEAD,
}
_MODULES = {
    "self_attention/query": "self_attn.q_proj",
    "self_attention/key": "self_attn.k_proj",
    "self_attention/value": "self_attn.v_proj",
    "self_attention/out": "self_attn.o_proj",
    "self_attention/query_norm": "self_attn.q_norm",
    "self_attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
    "pre_self_attention_layer_norm": "input_layernorm",
}
_NORMS = {"pre_mlp_layer_norm": "post_attention_layernorm"}
_NORMS_WITH_POST = {
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}


def open_model(path: str, config: DecoderConfig) -> tuple[Layout, dict[str, Stored]]:
    """Returns the layout of a model and the stored arrays of a folder, which fit each other.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the arrays do not fit the model or a file is damaged.
    """
    stored = hf_folder.open_weights(hf_folder.local(path))
    arrays = {_plain(name): array for name, array in stored.items() if not _is_other(name)}
    head, embedding = arrays.get(_HEAD), arrays.get(_EMBEDDING)
    if config.tie_embeddings and head is not None:
        if embedding is None:
            arrays[_EMBEDDING] = head
        elif not same(head, embedding):
            raise ValueError(
                f"{path}: {head.name} differs from {embedding.name}, but config.json ties them: "
                "set tie_word_embeddings to false, or leave one out"
            )
        del arrays[_HEAD]
    if not config.tie_embeddings and head is None:
        raise ValueError(
            f"{path}: there is no {_HEAD}, and config.json does not tie it to the embedding: "
            "set tie_word_embeddings to true if it is meant to be"
        )
    layout = hf_layout(config)
    check(layout, arrays, path)
    return layout, arrays


def _is_other(name: str) -> bool:
    """Returns whether an array is no parameter of the text model.

    Such arrays belong to the vision part of a composite model, or are the rotary frequencies in old
    Llama files, which follow from config.json.
    """
    return name.startswith(_NOT_TEXT) or name.endswith("rotary_emb.inv_freq")


def _plain(name: str) -> str:
    """Returns the name that an array has in a text-only model, with the prefix "model."."""
    return _HEAD if name.endswith(_HEAD) else _PREFIX.sub("model.", name, count=1)


def hf_layout(config: DecoderConfig) -> Layout:
    """Returns the layout of transformers' causal language models."""
    modules = {**_MODULES, **(_NORMS_WITH_POST if config.post_norms else _NORMS)}

    def part(names: list[str], shape: tuple[int, ...], layer: int | None) -> Part:
        *path, kind = names
        if layer is None:
            return hf_part(_OUTSIDE_LAYERS["/".join(path)], shape, kind)
        module = modules["/".join(path).removeprefix("decoder/layers/")]
        suffix = "bias" if kind == "bias" else "weight"
        return hf_part(f"model.layers.{layer}.{module}.{suffix}", shape, kind)

    return layer_by_layer(config, part)


def write_generation(folder: pathlib.Path, config: DecoderConfig, num_pieces: int | None) -> None:
    """Makes transformers never generate the ids of the embedding that no piece has.

    Training does not change the rows of these ids, so their logits mean nothing. Where the folder
    has a generation_config.json, transformers reads the special ids in that file alone, so a new
    file repeats those of config.json.
    """
    spare = hf_folder.spare_ids(config.vocab_size, num_pieces)
    if not spare:
        return
    file = folder / hf_folder.GENERATION
    fields = read_json_object(file) if file.is_file() else special_ids.stated(folder)
    suppressed = sorted({*(fields.get("suppress_tokens") or ()), *spare})
    hf_folder.write_json(file, {**fields, "suppress_tokens": suppressed})
