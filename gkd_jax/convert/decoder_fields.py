"""Reads and writes the `config.json` of decoder-only models in a Hugging Face folder.

`read` accepts the keys of transformers 4 (`rope_theta` with `rope_scaling`) and of transformers 5
(`rope_parameters`). An absent key has the default of the model's class in transformers, and the
classes have different defaults. A key or value that may change what the model computes and that
gkd_jax does not implement is an error that names the key.
"""

import contextlib
import dataclasses
from typing import Any

from gkd_jax.convert import field_values, rope_fields
from gkd_jax.convert.decoder_families import FAMILIES, Family
from gkd_jax.convert.rope_fields import LAYER_TYPES
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.execution import ExecutionSettings


COMPOSITE = "gemma3"  # A Gemma 3 with a vision tower; its `text_config` is a "gemma3_text".
MODEL_TYPES = (*FAMILIES, COMPOSITE)
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_length",
}
# The keys that `read` and `rope_fields.read` use.
_READ = frozenset().union(*(family.defaults for family in FAMILIES.values())) | {
    *("model_type", "rope_scaling", "rope_parameters", "layer_types"),
    *("original_max_position_embeddings", "attn_logit_softcapping"),
}
# Of these, the keys that no other class of transformers reads.
_GEMMA_ALONE = frozenset(
    {
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
        *("sliding_window_pattern", "rope_local_base_freq"),
    }
)
# Keys that do not change the logits of the model, whatever their values are.
WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "_name_or_path", "name_or_path", "transformers_version", "auto_map"),
        *("torch_dtype", "dtype", "use_cache", "cache_implementation", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("attention_dropout", "hidden_dropout", "pretraining_tp", "tokenizer_class"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "num_beams"),
        *("repetition_penalty", "keys_to_ignore_at_inference", "torchscript", "is_llama_config"),
        *("_attn_implementation_autoset", "attn_implementation", "_attn_implementation"),
        *("transformers.js_config", "unsloth_version", "unsloth_fixed", "tie_encoder_decoder"),
        *("eoi_token_index", "boi_token_index", "image_token_index", "mm_tokens_per_image"),
        *("max_window_layers", "use_sliding_window"),
        # transformers writes it beside `layer_types`, and never reads it.
        "_sliding_window_pattern",
    }
)
# Keys that do not change the logits if they have one of these values; other values are an error.
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_mrope": (None, False),
    "rope_interleaved": (None, False),
    "use_bidirectional_attention": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "chunk_size_feed_forward": (None, 0),
    "is_decoder": (None, False, True),
    "pruned_heads": (None, {}),
}


def read(fields: dict[str, Any]) -> DecoderConfig:
    """Returns the config that a `config.json` describes.

    Raises:
        ValueError: if the model type is not supported, or if a key is unknown or has a value that
            is not supported.
    """
    kind = field_values.choice(fields, "model_type", MODEL_TYPES)
    if fields.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config must be null or absent: quantised weights are not read, so give "
            "the folder of the same model in bfloat16 or float32"
        )
    composite = kind == COMPOSITE
    if composite:
        fields, kind = _text_fields(fields), "gemma3_text"
    family = FAMILIES[kind]
    _check_keys(family, fields)
    known = {**family.defaults, **fields}
    sizes = _sizes(known)
    out_bias = field_values.switch(known, "attention_bias") and family.attention_bias == "key"
    mlp_bias = field_values.switch(known, "mlp_bias")
    types = _layer_types(kind, known)
    windows = _windows(kind, fields, known, types)
    ropes, rope_of_layer = rope_fields.read(known, types, two_ropes=family.two_ropes)
    activation = field_values.choice(known, _activation_key(family), _ACTIVATIONS)
    scale = field_values.positive(known, "query_pre_attn_scalar") ** -0.5 if family.gemma else None
    attention_softcap = field_values.positive_or_null(known, "attn_logit_softcapping")
    final_softcap = field_values.positive_or_null(known, "final_logit_softcapping")
    return DecoderConfig(
        **sizes,
        activation=_ACTIVATIONS[activation],
        qkv_bias=family.attention_bias == "inputs" or out_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias and family.mlp_bias,
        qk_norm=family.qk_norm,
        unit_offset=family.gemma,
        post_norms=family.gemma,
        scale_embedding=family.gemma,
        attention_scale=scale,
        attention_softcap=attention_softcap if family.attention_softcap else None,
        # transformers' class for the composite model applies no soft cap to the logits, even if
        # its text_config states one.
        final_softcap=None if composite else final_softcap,
        windows=windows,
        ropes=ropes,
        rope_of_layer=rope_of_layer,
        tie_embeddings=field_values.switch(known, "tie_word_embeddings"),
        layer_norm_epsilon=field_values.positive(known, "rms_norm_eps", below=1.0),
    )


def _activation_key(family: Family) -> str:
    return "hidden_activation" if family.gemma else "hidden_act"


def _text_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the text model in a composite model."""
    inner = fields.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"gemma3 needs an object text_config, got {inner!r}")
    return {**inner, "tie_word_embeddings": fields.get("tie_word_embeddings", True)}


def _sizes(known: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes of a model by the names of `DecoderConfig`'s fields."""
    field_values.size(known, "num_hidden_layers", field_values.MOST_LAYERS)
    heads, width = (field_values.size(known, key) for key in ("num_attention_heads", "hidden_size"))
    if known["num_key_value_heads"] is None:
        known = {**known, "num_key_value_heads": heads}
    if known["head_dim"] is None:
        if width % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads={heads} where head_dim is "
                f"absent, got {width}"
            )
        known = {**known, "head_dim": width // heads}
    key_heads = field_values.size(known, "num_key_value_heads")
    if heads % key_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads={key_heads}, "
            f"got {heads}"
        )
    return {ours: field_values.size(known, theirs) for theirs, ours in _SIZES.items()}


def _check_keys(family: Family, fields: dict[str, Any]) -> None:
    """Raises ValueError for a key that may change the logits and that `read` does not handle."""
    read = _READ if family.gemma else _READ - _GEMMA_ALONE
    for name, value in fields.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise ValueError(f"{name}={value!r} changes the numbers and is not supported")
        if value is not None and name not in read | WITHOUT_EFFECT | _ONLY.keys():
            raise ValueError(
                f"the key {name}={value!r} is not known: it may change what the model computes"
            )


def _layer_types(kind: str, known: dict[str, Any]) -> list[str]:
    """Returns the type of each layer: "full_attention" or "sliding_attention".

    A stated `layer_types` is used as it is, except that Llama and Mistral allow one type only.
    Without `layer_types`, the types follow from the other keys by the rule of the model's class in
    transformers.
    """
    num_layers, where = known["num_hidden_layers"], FAMILIES[kind].windows
    stated = known.get("layer_types")
    derived = [LAYER_TYPES[slides] for slides in _sliding_layers(kind, known)]
    if stated is None:
        return derived
    one_type = where is None or (where == "all" and known["sliding_window"] is not None)
    if one_type and stated != derived:
        raise ValueError(f"layer_types of {kind} must be {derived}, got {stated!r}")
    if (
        not isinstance(stated, list)
        or len(stated) != num_layers
        or not all(name in LAYER_TYPES for name in stated)
    ):
        raise ValueError(
            f"layer_types must be {num_layers} of {', '.join(LAYER_TYPES)}, got {stated!r}"
        )
    return derived if where == "all" else stated


def _sliding_layers(kind: str, known: dict[str, Any]) -> list[bool]:
    """Returns for each layer whether it has a window where `layer_types` is absent."""
    family, layers = FAMILIES[kind], range(known["num_hidden_layers"])
    if family.windows == "last":
        border = len(layers)
        if field_values.switch(known, "use_sliding_window") and known["sliding_window"] is not None:
            border = known["max_window_layers"]
            if type(border) is not int or border < 0:
                raise ValueError(f"max_window_layers must be an integer from 0, got {border!r}")
        return [layer >= border for layer in layers]
    if family.windows == "pattern":
        pattern = 2
        if "sliding_window_pattern" in family.defaults:
            pattern = field_values.size(known, "sliding_window_pattern")
        return [(layer + 1) % pattern != 0 for layer in layers]
    return [family.windows == "all"] * len(layers)


def _windows(
    kind: str, fields: dict[str, Any], known: dict[str, Any], types: list[str]
) -> tuple[int, ...]:
    """Returns the attention window of each layer in tokens, as `DecoderConfig.windows` holds it.

    `known` are the keys of `config.json`, completed with the defaults of the class.
    """
    window, where = known["sliding_window"], FAMILIES[kind].windows
    if where is None:
        if fields.get("sliding_window") is not None:
            raise ValueError(f"{kind} has no sliding_window, got {window!r}")
        return ()
    if "sliding_attention" not in types or (where == "all" and window is None):
        return ()
    if where == "last" and not known["use_sliding_window"]:
        raise ValueError(
            "layer_types has sliding_attention, for which use_sliding_window must be true, got "
            f"{known['use_sliding_window']!r}"
        )
    window = field_values.size(known, "sliding_window")
    return tuple(window if name == "sliding_attention" else 0 for name in types)


# Writing ------------------------------------------------------------------------------------------


def _model_type(config: DecoderConfig) -> str:
    """Returns the `model_type` whose class computes this model; raises ValueError if none does."""
    # `config.json` does not store the execution settings, so what is read has their defaults.
    settings = dataclasses.asdict(ExecutionSettings())
    plain = dataclasses.replace(config, **settings)
    for kind in FAMILIES:
        with contextlib.suppress(ValueError):  # the fields of another family may contradict it
            if read(_fields(kind, config)) == plain:
                return kind
    raise ValueError(f"no class of transformers has these switches together: {config}")


def config_fields(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a model whose weights are stored in `dtype`.

    It has the keys of transformers 4 and of transformers 5.

    Raises:
        ValueError: if no class of transformers computes the model.
    """
    kind = _model_type(config)
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "torch_dtype": dtype,
        "use_cache": True,
        "initializer_range": 0.02,
        **_fields(kind, config),
    }


def _fields(kind: str, config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys of a `config.json` that decide what a model of type `kind` computes."""
    # Several names may mean one activation; `reversed` makes the first of them the written one.
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    family = FAMILIES[kind]
    fields: dict[str, Any] = {
        "model_type": kind,
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        _activation_key(family): names[config.activation],
        "rms_norm_eps": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if family.attention_bias == "key":
        fields["attention_bias"] = config.out_bias
    if family.mlp_bias:
        fields["mlp_bias"] = config.mlp_bias
    window = max(config.windows, default=0) or None
    if family.windows is not None:
        # transformers' Gemma computes the mask of its windows even if no layer has one.
        unused = family.defaults["sliding_window"] if family.gemma else None
        fields["sliding_window"] = window or unused
    types = [LAYER_TYPES[window > 0] for window in config.windows]
    if family.windows == "last":
        fields["use_sliding_window"] = window is not None
        sliding = types.index("sliding_attention") if window else config.num_layers
        fields["max_window_layers"] = sliding
    if family.windows in ("last", "pattern"):
        if family.two_ropes:
            types = [LAYER_TYPES[index] for index in config.rope_of_layer]
        fields["layer_types"] = types or ["full_attention"] * config.num_layers
    if family.gemma:
        scale = config.attention_scale or config.head_dim**-0.5
        fields["query_pre_attn_scalar"] = round(scale**-2)
        fields["final_logit_softcapping"] = config.final_softcap
        if family.attention_softcap:
            fields["attn_logit_softcapping"] = config.attention_softcap
    return {**fields, **rope_fields.write(config, two_ropes=family.two_ropes)}
