"""The config of a T5 model, and the sizes of T5 1.0 and 1.1 by name.

Sizes are Python constants rather than gin files. Gin bindings are global, so including one size
file for the student and another for the teacher would silently give both models the same size.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

from gkd_jax.models.execution import ExecutionSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ExecutionSettings):
    """The architecture of one T5, and the settings by which it is run.

    Attributes:
        family: the name of the module with a T5's functions, in `lm`.
        context_length: the longest text that the model was made for; None, because the buckets of
            distances have no end.
        vocab_size: the rows of the embedding, V. There may be more rows than the vocabulary has
            pieces (32128 for 32100).
        d_model, num_heads, head_dim, d_ff: the sizes D, H, K and F.
        num_encoder_layers, num_decoder_layers: the number of layers L of each stack.
        mlp_activations: ("gelu", "linear") for T5 1.1, ("relu",) for T5 1.0.
        tie_embeddings: the output head is the transposed embedding (T5 1.0).
        scale_logits: hidden states are divided by sqrt(D) before the head (T5 1.0).
        relpos_buckets: the number of buckets of the relative position bias.
        relpos_max_distance: the distance from which on all keys share the last bucket.
        per_layer_relpos: every layer has a position bias of its own (umT5, T5X's scanned T5).
        layer_norm_epsilon: the epsilon of the RMS norms.
    """

    family: ClassVar[str] = "t5"
    context_length: ClassVar[None] = None

    vocab_size: int
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    tie_embeddings: bool = False
    scale_logits: bool = False
    relpos_buckets: int = 32
    relpos_max_distance: int = 128
    per_layer_relpos: bool = False
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        known = {"relu", "gelu", "linear"}
        if not self.mlp_activations or not set(self.mlp_activations) <= known:
            raise ValueError(
                f"mlp_activations must be one or more of {sorted(known)}, "
                f"got {self.mlp_activations!r}"
            )


def from_fields(fields: dict[str, Any]) -> T5Config:
    """Restores a config from the fields of `dataclasses.asdict` that were stored as JSON."""
    return T5Config(**{**fields, "mlp_activations": tuple(fields["mlp_activations"])})


class _Size(NamedTuple):
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_layers: int  # of each stack


# Sizes that are named after their width and depth are not public: they serve small tasks and
# benchmarks.
_T5_1_0 = {
    "32x2": _Size(32, 4, 8, 128, 2),
    "48x2": _Size(48, 4, 16, 192, 2),
    "tiny": _Size(64, 4, 16, 256, 2),
    "128x2": _Size(128, 4, 32, 512, 2),
    "256x3": _Size(256, 4, 64, 1024, 3),
    "256x4": _Size(256, 4, 64, 1024, 4),
    "512x6": _Size(512, 8, 64, 2048, 6),
    "small": _Size(512, 8, 64, 2048, 6),
    "base": _Size(768, 12, 64, 3072, 12),
    "large": _Size(1024, 16, 64, 4096, 24),
    "xl": _Size(1024, 32, 128, 16384, 24),
    "xxl": _Size(1024, 128, 128, 65536, 24),
}
_T5_1_1 = {
    "32x2": _Size(32, 4, 8, 64, 2),
    "48x2": _Size(48, 4, 16, 128, 2),
    "tiny": _Size(64, 4, 16, 128, 2),
    "128x2": _Size(128, 4, 32, 256, 2),
    "256x3": _Size(256, 4, 64, 512, 3),
    "256x4": _Size(256, 4, 64, 512, 4),
    "512x6": _Size(512, 8, 64, 1024, 6),
    "small": _Size(512, 6, 64, 1024, 8),
    "base": _Size(768, 12, 64, 2048, 12),
    "large": _Size(1024, 16, 64, 2816, 24),
    "xl": _Size(2048, 32, 64, 5120, 24),
    "xxl": _Size(4096, 64, 64, 10240, 24),
}


def t5_1_1(size: str, vocab_size: int = 32128) -> T5Config:
    """Returns the config of T5 1.1, LM-adapted T5 or FLAN-T5: gated GELU and a separate head.

    Args:
        size: tiny, small, base, large, xl or xxl, or a width and a number of layers (32x2, 48x2,
            128x2, 256x3, 256x4, 512x6).

    Raises:
        ValueError: for another size.
    """
    return _config(_T5_1_1, size, vocab_size)


def t5_1_0(size: str, vocab_size: int = 32128) -> T5Config:
    """Returns the config of the first T5 (1.0): ReLU, and a head that is the tied embedding.

    The head's input is divided by sqrt(D). Sizes and errors are those of `t5_1_1`.
    """
    own = {"mlp_activations": ("relu",), "tie_embeddings": True, "scale_logits": True}
    return _config(_T5_1_0, size, vocab_size, **own)


def _config(sizes: dict[str, _Size], size: str, vocab_size: int, **own: Any) -> T5Config:
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    fields = sizes[size]._asdict()
    depth = fields.pop("num_layers")
    depths = {"num_encoder_layers": depth, "num_decoder_layers": depth}
    return T5Config(vocab_size=vocab_size, **fields, **depths, **own)
