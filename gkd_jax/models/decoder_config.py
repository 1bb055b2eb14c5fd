"""The config of a decoder-only model: sizes, and the switches that tell the families apart.

`decoder_sizes` has the configs of public models by name, and `gkd_jax.convert.decoder_fields` reads
a config from a Hugging Face folder.
"""

import dataclasses
from typing import Any, ClassVar

from gkd_jax.models.execution import ExecutionSettings


ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of rotary position embeddings (Su et al., 2021), and their scaling.

    Scaling divides frequencies by `factor`, so that a model can read longer texts than it was
    first trained on.

    Attributes:
        kind: "default" (no scaling), "linear" (all frequencies are divided), "llama3" (low
            frequencies are divided, with an interpolation between low and high) or "yarn" (likewise
            by another rule; Peng et al., 2023).
        theta: the base of the frequencies.
        factor: the number by which frequencies are divided.
        original_length: the context length before scaling, in tokens ("llama3", "yarn").
        low_freq_factor, high_freq_factor: the bounds of the interpolation of "llama3". A frequency
            is low, or high, if its wavelength is longer, or shorter, than `original_length` divided
            by the bound.
        beta_fast, beta_slow: the bounds of the interpolation of "yarn", in rotations over
            `original_length`.
        truncate: the bounds of "yarn" are rounded outwards to whole pairs of dimensions.
        attention_factor: a number that multiplies the cosines and sines; 1 changes nothing.
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
class DecoderConfig(ExecutionSettings):
    """The architecture of one decoder-only model, and the settings by which it is run.

    Attributes:
        family: the name of the module with a decoder-only model's functions, in `lm`.
        vocab_size: the rows of the embedding, V. There may be more rows than the tokenizer has ids.
        d_model: the width of the hidden states, D.
        num_heads, num_kv_heads: the numbers of query heads, H, and of key heads, G. Query head h
            reads key head h // (H / G).
        head_dim, d_ff, num_layers: the sizes K, F and L.
        activation: the activation of the gated MLP: "silu", "gelu_tanh" or "gelu" (the exact one).
        qkv_bias, out_bias, mlp_bias: the linear maps concerned have a bias.
        qk_norm: queries and keys are normalised within each head (Qwen3, Gemma 3).
        unit_offset: a norm multiplies by 1 + its scale, all in float32 (Gemma). Otherwise it
            multiplies by its scale, after the cast to the compute dtype (Llama, Qwen).
        post_norms: the outputs of the attention and of the MLP are normalised too (Gemma).
        scale_embedding: embeddings are multiplied by sqrt(D) (Gemma).
        attention_scale: the factor of the attention scores; None is head_dim ** -0.5.
        attention_softcap, final_softcap: c in c tanh(x / c), which bounds the attention scores and
            the logits respectively; None is off.
        windows: for each layer, the number of tokens that a query sees, its own included; 0 is no
            limit. An empty tuple is no limit in any layer.
        ropes: the kinds of rotary embeddings in the model.
        rope_of_layer: for each layer, the index of its kind in `ropes`. An empty tuple gives every
            layer the first kind.
        tie_embeddings: the output head is the transposed embedding.
        layer_norm_epsilon: the epsilon of the RMS norms.
        max_length: the longest text that the model was made for, in tokens (`context_length` counts
            the scaling of "yarn" as well). It is not enforced.
    """

    family: ClassVar[str] = "decoder"

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

    def __post_init__(self):
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if not 0 < self.layer_norm_epsilon < 1:
            raise ValueError(
                f"layer_norm_epsilon must be a number in (0, 1), got {self.layer_norm_epsilon!r}"
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

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def context_length(self) -> int:
        """The longest text that the model was made for, in tokens of prompt and answer."""
        scaled = (rope.original_length * rope.factor for rope in self.ropes if rope.kind == "yarn")
        return max([self.max_length, *map(int, scaled)])


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """Restores a config from the fields of `dataclasses.asdict` that were stored as JSON."""
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    return DecoderConfig(**{**fields, "ropes": tuple(Rope(**rope) for rope in fields["ropes"])})
