"""The config of a T5 model, and the sizes of T5 1.0 and 1.1 by name.

Sizes are Python constants rather than gin files. Gin bindings are global, so including one size
file for the student and another for the teacher would silently give both models the same size.
"""

import dataclasses
from typing import Any, ClassVar

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


# d_model, num_heads, head_dim, d_ff (1.0), d_ff (1.1), layers (1.0), layers (1.1). The sizes that
# are named after their width and depth are not public ones: they serve small tasks and benchmarks.
_SIZES = {
    "32x2": (32, 4, 8, 128, 64, 2, 2),
    "48x2": (48, 4, 16, 192, 128, 2, 2),
    "tiny": (64, 4, 16, 256, 128, 2, 2),
    "128x2": (128, 4, 32, 512, 256, 2, 2),
    "256x3": (256, 4, 64, 1024, 512, 3, 3),
    "256x4": (256, 4, 64, 1024, 512, 4, 4),
    "512x6": (512, 8, 64, 2048, 1024, 6, 6),
    "small": (512, 8, 64, 2048, 1024, 6, 8),
    "base": (768, 12, 64, 3072, 2048, 12, 12),
    "large": (1024, 16, 64, 4096, 2816, 24, 24),
    "xl": (1024, 32, 128, 16384, 5120, 24, 24),
    "xxl": (1024, 128, 128, 65536, 10240, 24, 24),
}
_T5_1_1_WIDTHS = {"small": (512, 6, 64), "xl": (2048, 32, 64), "xxl": (4096, 64, 64)}


def t5_1_1(size: str, vocab_size: int = 32128) -> T5Config:
    """Returns the config of T5 1.1, LM-adapted T5 or FLAN-T5: gated GELU and a separate head.

    Args:
        size: tiny, small, base, large, xl or xxl, or a width and a number of layers (32x2, 48x2,
            128x2, 256x3, 256x4, 512x6).
        vocab_size: the rows of the embedding.

    Raises:
        ValueError: for another size.
    """
    width, heads, dim, _, ff, _, depth = _size(size)
    width, heads, dim = _T5_1_1_WIDTHS.get(size, (width, heads, dim))
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        num_heads=heads,
        head_dim=dim,
        d_ff=ff,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
    )


def t5_1_0(size: str, vocab_size: int = 32128) -> T5Config:
    """Returns the config of the first T5 (1.0): ReLU, and a head that is the tied embedding.

    The head's input is divided by sqrt(D).

    Args:
        size: one of the sizes of `t5_1_1`.
        vocab_size: the rows of the embedding.

    Raises:
        ValueError: for another size.
    """
    width, heads, dim, ff, _, depth, _ = _size(size)
    return T5Config(
        vocab_size=vocab_size,
        d_model=width,
        num_heads=heads,
        head_dim=dim,
        d_ff=ff,
        num_encoder_layers=depth,
        num_decoder_layers=depth,
        mlp_activations=("relu",),
        tie_embeddings=True,
        scale_logits=True,
    )


def _size(size: str) -> tuple[int, ...]:
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
    return _SIZES[size]
