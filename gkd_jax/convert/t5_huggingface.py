"""Reads and writes T5, mT5 and umT5 models in Hugging Face folders: config.json and safetensors."""

import json
import pathlib
from typing import Any

from gkd_jax.convert import field_values, hf_folder
from gkd_jax.convert.layout import Layout, Part, hf_part, layer_by_layer
from gkd_jax.convert.stored import Stored, check, same
from gkd_jax.models import t5
from gkd_jax.text.files import read_json_in


_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_SAME_AS_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old T5 files contain a position bias for the cross-attention. T5's cross-attention uses none, and
# transformers ignores this array too.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_POSITION_BIAS = "SelfAttention.relative_attention_bias"
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "gated-relu": ("relu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
}
ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "d_ff",
    "num_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
    "relative_attention_num_buckets": "relpos_buckets",
    "relative_attention_max_distance": "relpos_max_distance",
}
_SPECIAL_IDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
# Generation settings with which transformers would generate other tokens than gkd_jax.
_FORCED = (
    *("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids"),
    *("begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
)
_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}
_MT5_VOCAB_SIZE = 250_112


def read_fields(fields: dict[str, Any]) -> t5.T5Config:
    """Returns the config that a config.json states; `has_own_head` tells whether the head is tied.

    Raises:
        ValueError: if the model type is not supported, or if a field is missing or has a value that
            is not supported.
    """
    kind = field_values.choice(fields, "model_type", ARCHITECTURES)
    default = "relu" if kind == "t5" else "gated-gelu"
    activations = field_values.choice(
        {"feed_forward_proj": default, **fields}, "feed_forward_proj", _ACTIVATIONS
    )
    needed = ("vocab_size", "d_model", "num_heads", "d_kv", "d_ff", "num_layers")
    absent = [name for name in needed if name not in fields]
    if absent:
        raise ValueError(f"it lacks {', '.join(absent)}")
    for name, usual in _implied(activations).items():
        if fields.get(name) not in (None, usual):
            raise ValueError(f"{name} must be {json.dumps(usual)} or absent, got {fields[name]!r}")
    return t5.T5Config(
        **_numbers(fields),
        mlp_activations=_ACTIVATIONS[activations],
        scale_logits=_is_scaled(fields),
        per_layer_relpos=kind == "umt5",
    )


def _implied(activations: str) -> dict[str, Any]:
    """Returns the keys that transformers obeys although the model has one value for them only."""
    names = activations.split("-")
    return {
        "is_gated_act": len(names) > 1,
        "dense_act_fn": "relu" if names[-1] == "relu" else "gelu_new",
        "is_encoder_decoder": True,
        "quantization_config": None,
    }


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes in a config.json by the names of `T5Config`'s fields."""
    known = {**_DEFAULTS, **fields}
    if known.get("num_decoder_layers") is None:
        known["num_decoder_layers"] = known["num_layers"]
    for name in ("num_layers", "num_decoder_layers"):
        field_values.size(known, name, field_values.MOST_LAYERS)
    numbers = {ours: field_values.size(known, theirs) for theirs, ours in _SIZES.items()}
    buckets, distance = numbers["relpos_buckets"], numbers["relpos_max_distance"]
    # The buckets of distances from `buckets // 2` on grow up to the largest distance.
    if buckets < 4 or distance <= buckets // 2:
        raise ValueError(
            "relative_attention_num_buckets must be at least 4, and "
            "relative_attention_max_distance more than half of it, got "
            f"{buckets} and {distance}"
        )
    epsilon = field_values.positive(known, "layer_norm_epsilon", below=1.0)
    return {**numbers, "layer_norm_epsilon": epsilon}


def _is_scaled(fields: dict[str, Any]) -> bool:
    """Returns whether hidden states are divided by sqrt(D) before the output head."""
    # transformers never scales an mT5, whatever these two keys say.
    if fields["model_type"] == "mt5":
        return False
    if fields.get("scale_decoder_outputs") is None:
        return fields.get("tie_word_embeddings") is not False
    return field_values.switch(fields, "scale_decoder_outputs")


def check_special_ids(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises ValueError for a model whose special ids or decoding rules differ from those of T5.

    gkd_jax's T5 has its special ids built in: id 0 is masked and starts a target, and id 1 ends a
    target. Some models, such as MADLAD-400 and CodeT5, have the architecture of T5 but other ids.
    """
    generation = read_json_in(folder, hf_folder.GENERATION)
    wrong = []
    for file, fields in {"config.json": config, hf_folder.GENERATION: generation}.items():
        for name, usual in _SPECIAL_IDS.items():
            given = fields.get(name)
            if given is not None and given not in (usual, [usual]):
                wrong.append(f"{file}: {name} must be {usual}, got {given!r}")
        wrong += [
            f"{file}: {name} must be absent, got {fields[name]!r}"
            for name in _FORCED
            if fields.get(name) is not None
        ]
        suppressed = fields.get("suppress_tokens")
        if suppressed and not _is_tail(suppressed, config["vocab_size"]):
            wrong.append(
                f"{file}: suppress_tokens must be the last ids of the embedding, which no piece "
                f"has, got {str(suppressed)[:60]}"
            )
    if wrong:
        raise ValueError(f"{folder}: this model is not decoded as T5 is: {'; '.join(wrong)}")


def _is_tail(ids: Any, vocab_size: Any) -> bool:
    """Returns whether `ids`, apart from the pad id 0, are the last ids of a vocabulary."""
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        return False
    rest = sorted(set(ids) - {0})
    return type(vocab_size) is int and rest == list(range(vocab_size - len(rest), vocab_size))


def open_model(path: str, config: t5.T5Config) -> tuple[Layout, dict[str, Stored]]:
    """Returns the layout of a model and the stored arrays of a folder, which fit each other.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the arrays do not fit the model or a file is damaged.
    """
    folder = hf_folder.local(path)
    arrays = hf_folder.open_weights(folder)
    ignored = [*_SAME_AS_SHARED, _UNUSED]
    # torch arrays that share memory are stored once, under any of their names.
    if _SHARED not in arrays:
        for name in (*_SAME_AS_SHARED, _HEAD):
            if name in arrays and (name != _HEAD or config.tie_embeddings):
                arrays[_SHARED] = arrays[name]
                break
    if config.tie_embeddings and not has_own_head(arrays):
        ignored.append(_HEAD)
    for name in _SAME_AS_SHARED:
        if name in arrays and _SHARED in arrays and not same(arrays[name], arrays[_SHARED]):
            raise ValueError(
                f"{path}: {name} differs from {_SHARED}: encoder and decoder must share one "
                "embedding"
            )
    layout = hf_layout(config)
    check(layout, arrays, path, ignored=ignored)
    return layout, arrays


def has_own_head(arrays: dict[str, Stored]) -> bool:
    """Returns whether the stored output head differs from the embedding, and so is not tied to it.

    The weights decide, because `tie_word_embeddings` has had several meanings in transformers.
    """
    head = arrays.get(_HEAD)
    names = (_SHARED, *_SAME_AS_SHARED)
    embedding = next((arrays[name] for name in names if name in arrays), None)
    return head is not None and embedding is not None and not same(head, embedding)


def hf_layout(config: t5.T5Config) -> Layout:
    """Returns the layout of transformers' T5, mT5 and umT5."""
    return layer_by_layer(config, _part)


def _part(names: list[str], shape: tuple[int, ...], layer: int | None) -> Part:
    """Returns the stored array of a parameter, or of one layer of it; see `layer_by_layer`."""
    name = _name(names) if layer is None else _name_in_layer(names, layer)
    return hf_part(f"{name}.weight", shape, names[-1])


def _name(names: list[str]) -> str:
    if names[0] == "token_embedder":
        return "shared"
    stack, module = names[:2]
    if module == "logits_dense":
        return "lm_head"
    if module == "relpos_bias":
        return f"{stack}.block.0.layer.0.{_POSITION_BIAS}"
    return f"{stack}.final_layer_norm"


def _name_in_layer(names: list[str], layer: int) -> str:
    stack, _, module, inner, *_ = names
    mlp = 1 if stack == "encoder" else 2
    if module == "relpos_bias":
        name = f"0.{_POSITION_BIAS}"
    elif module == "mlp":
        name = f"{mlp}.DenseReluDense.{inner}"
    elif module == "encoder_decoder_attention":
        name = f"1.EncDecAttention.{_ATTENTION[inner]}"
    elif module in ("attention", "self_attention"):
        name = f"0.SelfAttention.{_ATTENTION[inner]}"
    else:
        norms = {"pre_mlp_layer_norm": mlp, "pre_cross_attention_layer_norm": 1}
        name = f"{norms.get(module, 0)}.layer_norm"
    return f"{stack}.block.{layer}.layer.{name}"


# Writing ------------------------------------------------------------------------------------------


def write_generation(folder: pathlib.Path, config: t5.T5Config, num_pieces: int | None) -> None:
    """Writes generation_config.json, with which transformers generates what gkd_jax decodes.

    gkd_jax never decodes the pad id 0, nor the ids that no vocabulary piece has. transformers by
    itself decodes any id, so all of these are suppressed. Settings that are in the folder already
    are kept, apart from the keys written here.
    """
    spare = hf_folder.spare_ids(config.vocab_size, num_pieces)
    fields = {**_SPECIAL_IDS, "suppress_tokens": [_SPECIAL_IDS["pad_token_id"], *spare]}
    before = read_json_in(folder, hf_folder.GENERATION)
    hf_folder.write_json(folder / hf_folder.GENERATION, {**before, **fields})


def config_fields(config: t5.T5Config, dtype: str) -> dict[str, Any]:
    """Returns the fields of a T5's config.json; the weights are stored in `dtype`.

    Raises:
        ValueError: if no class of transformers computes this T5.
    """
    # Several names may mean one activation; `reversed` makes the first of them the written one.
    names = {acts: name for name, acts in reversed(_ACTIVATIONS.items())}
    if config.mlp_activations not in names:
        raise ValueError(
            f"transformers' T5 knows mlp_activations {sorted(names)}, got {config.mlp_activations}"
        )
    kind = "t5"
    if config.per_layer_relpos:
        kind = "umt5"
    elif config.vocab_size == _MT5_VOCAB_SIZE and not config.scale_logits:
        kind = "mt5"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "feed_forward_proj": names[config.mlp_activations],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        # transformers 4 decides by `tie_word_embeddings` whether to tie and to scale; transformers
        # 5 decides by `scale_decoder_outputs` whether to scale.
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        **_SPECIAL_IDS,
        "torch_dtype": dtype,
    }
