"""What sets the classes of transformers apart that read the `config.json` of decoder-only models.

`FAMILIES` is the table of these classes, and `decoder_fields` reads and writes by it.
"""

import dataclasses
from typing import Any


_COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a class of transformers reads and computes, where the classes differ.

    Attributes:
        architecture: the name of the class.
        defaults: the values that the class has for absent keys.
        attention_bias: "key" if the key `attention_bias` says whether the four projections of
            attention have a bias; "inputs" if those of queries, keys and values always have one;
            None if there is none.
        mlp_bias: whether the class reads the key `mlp_bias`.
        windows: which layers have a window if `layer_types` is absent: "all" of them; "last", those
            from `max_window_layers` on, if `use_sliding_window` is true; "pattern", all but every
            n-th one, where n is `sliding_window_pattern`, or 2 if the class has no such key. None
            if no layer may have one.
        qk_norm: whether queries and keys are normalised.
        gemma: whether the norms, the embedding, the scale of the scores, and the keys for these,
            are those of Gemma.
        attention_softcap: whether the scores have the soft cap `attn_logit_softcapping`.
        two_ropes: whether layers with a window have rotary embeddings of their own.
    """

    architecture: str
    defaults: dict[str, Any]
    attention_bias: str | None = "key"
    mlp_bias: bool = False
    windows: str | None
    qk_norm: bool = False
    gemma: bool = False
    attention_softcap: bool = False
    two_ropes: bool = False


# By `model_type`. A model is written as the first family that reads it back unchanged.
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={**_COMMON, **_LLAMA},
        mlp_bias=True,
        windows=None,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            **_COMMON,
            **_LLAMA,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        attention_bias=None,
        windows="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults={**_COMMON, **_QWEN},
        attention_bias="inputs",
        windows="last",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_COMMON, **_QWEN, "head_dim": 128},
        windows="last",
        qk_norm=True,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults={
            **_COMMON,
            **_GEMMA,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="pattern",
        gemma=True,
        attention_softcap=True,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults={
            **_COMMON,
            **_GEMMA,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        windows="pattern",
        qk_norm=True,
        gemma=True,
        two_ropes=True,
    ),
}
