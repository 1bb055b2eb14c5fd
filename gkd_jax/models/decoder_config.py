"""The sizes and switches of a decoder-only model, which its configuration file names one by one."""

import dataclasses
from types import ModuleType
from typing import Any

from gkd_jax.models.products import check_dtype


ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings (Su et al., 2021) and how they are stretched for long texts.

    Attributes:
        kind: "default", "linear" (all frequencies divided by `factor`), "llama3" (the low ones,
            with a smooth passage) or "yarn" (Peng et al., 2023).
        theta: the base of the frequencies.
        factor: by which low frequencies are divided.
        original_length: the context before it was stretched, in tokens ("llama3", "yarn").
        low_freq_factor, high_freq_factor: where the passage of "llama3" begins and ends.
        beta_fast, beta_slow: where the passage of "yarn" begins and ends, in rotations.
        truncate: round the borders of yarn's passage to whole dimensions.
        attention_factor: multiplies the cosines and sines ("yarn").
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(ROPE_KINDS)}, got {self.kind!r}")
        if not self.theta > 0 or not self.factor > 0:
            raise ValueError(f"theta and factor must be positive, got {self.theta}, {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_length < 1:
            raise ValueError(
                f"original_length must be positive for {self.kind!r}, got {self.original_length}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and numerics of one decoder-only model.

    Attributes:
        vocab_size: rows of the embedding, V; may exceed the tokenizer's ids.
        d_model, num_heads, num_kv_heads, head_dim, d_ff, num_layers: D, H, K, head dim, F, L. Query
            head h reads key head h // (H / K).
        activation: of the gated MLP: "silu", "gelu_tanh" or "gelu" (the exact one).
        qkv_bias, out_bias, mlp_bias: which linear maps have a bias.
        qk_norm: queries and keys are normalised a head (Qwen3, Gemma 3).
        unit_offset: a norm multiplies by 1 + its scale, all in float32 (Gemma); otherwise by its
            scale, after the cast to the compute dtype (Llama, Qwen).
        post_norms: the attention's and the MLP's outputs are normalised too (Gemma).
        scale_embedding: embeddings are multiplied by sqrt(D) (Gemma).
        attention_scale: multiplies the scores; None is head_dim ** -0.5.
        attention_softcap, final_softcap: c tanh(x / c) of scores, of logits; None is off.
        windows: of each layer, the number of tokens that it sees, itself included; 0 is all. An
            empty tuple is all in every layer.
        ropes: the kinds of rotary embeddings that there are.
        rope_of_layer: which of them each layer has; an empty tuple is the first in every layer.
        tie_embeddings: the output head is the transposed embedding.
        layer_norm_epsilon: of the RMS norms.
        max_length: the longest text that the model was made for; a fact, not a limit.
        dropout_rate: of embeddings and of what the attention and the MLP add, while training.
        dtype, remat, layers_on_host, scan_unroll: as in `T5Config`.
        attention_by_row: attend for one row of the batch at a time where the scores of all rows
            are too many for a CPU's cache.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    num_layers: int
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_offset: bool = False
    post_norms: bool = False
    scale_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int, ...] = ()
    ropes: tuple[Rope, ...] = (Rope(),)
    rope_of_layer: tuple[int, ...] = ()
    tie_embeddings: bool = False
    layer_norm_epsilon: float = 1e-6
    max_length: int = 32_768
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    attention_by_row: bool = False
    layers_on_host: bool = False
    scan_unroll: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name in ("windows", "rope_of_layer"):
            values = getattr(self, name)
            if values and len(values) != self.num_layers:
                raise ValueError(f"{name} must have {self.num_layers} entries, got {len(values)}")
        if any(window < 0 for window in self.windows):
            raise ValueError(f"windows must be positive, or 0 for none, got {self.windows}")
        if not all(0 <= index < len(self.ropes) for index in (*self.rope_of_layer, 0)):
            raise ValueError(
                f"rope_of_layer must index {len(self.ropes)} ropes, got {self.rope_of_layer}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {self.dropout_rate}")
        check_dtype(self.dtype)

    @property
    def family(self) -> ModuleType:
        """The module with the functions of `gkd_jax.models.lm`."""
        from gkd_jax.models import decoder  # it needs this module first

        return decoder


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The inverse of `dataclasses.asdict`, after a passage through JSON."""
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return DecoderConfig(**{**fields, "ropes": tuple(Rope(**rope) for rope in fields["ropes"])})
