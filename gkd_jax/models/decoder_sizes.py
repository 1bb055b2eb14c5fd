"""The configs of public decoder-only models by family and size; they need no download.

A gin file names one so:

    ARCHITECTURE = @decoder_sizes.qwen3
    STUDENT_SIZE = '0.6b'

Sizes named "tiny" or after their width and depth are not public models: they serve tests, small
tasks and benchmarks.
"""

from typing import Any, NamedTuple

from gkd_jax.models.decoder_config import DecoderConfig, Rope


class _Size(NamedTuple):
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    tie_embeddings: bool


_TINY = (2, 64, 4, 2, 16, 128)
_QWEN3 = {
    "tiny": _Size(*_TINY, 151_936, True),
    "64x2": _Size(2, 64, 4, 2, 16, 192, 151_936, True),
    "64x4": _Size(4, 64, 4, 2, 16, 192, 151_936, True),
    "128x4": _Size(4, 128, 4, 2, 32, 384, 151_936, True),
    "256x4": _Size(4, 256, 4, 2, 64, 768, 151_936, True),
    "512x6": _Size(6, 512, 8, 4, 64, 1536, 151_936, True),
    "0.6b": _Size(28, 1024, 16, 8, 128, 3072, 151_936, True),
    "1.7b": _Size(28, 2048, 16, 8, 128, 6144, 151_936, True),
    "4b": _Size(36, 2560, 32, 8, 128, 9728, 151_936, True),
    "8b": _Size(36, 4096, 32, 8, 128, 12_288, 151_936, False),
    "14b": _Size(40, 5120, 40, 8, 128, 17_408, 151_936, False),
    "32b": _Size(64, 5120, 64, 8, 128, 25_600, 151_936, False),
}
_QWEN2_5 = {
    "tiny": _Size(*_TINY, 151_936, True),
    "0.5b": _Size(24, 896, 14, 2, 64, 4864, 151_936, True),
    "1.5b": _Size(28, 1536, 12, 2, 128, 8960, 151_936, True),
    "7b": _Size(28, 3584, 28, 4, 128, 18_944, 152_064, False),
}
_LLAMA3 = {
    "tiny": _Size(*_TINY, 128_256, True),
    "1b": _Size(16, 2048, 32, 8, 64, 8192, 128_256, True),
    "3b": _Size(28, 3072, 24, 8, 128, 8192, 128_256, True),
    "8b": _Size(32, 4096, 32, 8, 128, 14_336, 128_256, False),
    "70b": _Size(80, 8192, 64, 8, 128, 28_672, 128_256, False),
}
_GEMMA2 = {
    "tiny": _Size(*_TINY, 256_000, True),
    "2b": _Size(26, 2304, 8, 4, 256, 9216, 256_000, True),
    "9b": _Size(42, 3584, 16, 8, 256, 14_336, 256_000, True),
    "27b": _Size(46, 4608, 32, 16, 128, 36_864, 256_000, True),
}
_GEMMA3 = {
    "tiny": _Size(*_TINY, 262_144, True),
    "270m": _Size(18, 640, 4, 1, 256, 2048, 262_144, True),
    "1b": _Size(26, 1152, 4, 1, 256, 6912, 262_144, True),
    "4b": _Size(34, 2560, 8, 4, 256, 10_240, 262_208, True),
    "12b": _Size(48, 3840, 16, 8, 256, 15_360, 262_208, True),
    "27b": _Size(62, 5376, 32, 16, 128, 21_504, 262_208, True),
}
# Gemma divides scores by the root of its `query_pre_attn_scalar`. In all sizes but these the scalar
# is 256, the head dim.
_QUERY_SCALARS = {("gemma2", "27b"): 144, ("gemma3", "27b"): 168}


def qwen3(size: str, **changes: Any) -> DecoderConfig:
    """Returns the config of a dense Qwen3 model.

    Args:
        size: tiny, 0.6b, 1.7b, 4b, 8b, 14b or 32b, or a width and a number of layers (64x2, 64x4,
            128x4, 256x4, 512x6).
        **changes: fields of `DecoderConfig` that replace those of the size, such as `vocab_size`,
            `num_layers`, `d_model`, `num_heads`, `num_kv_heads`, `head_dim` and `d_ff`.

    Raises:
        ValueError: for another size.
    """
    ropes = (Rope(theta=1e6),)
    return _config(_QWEN3, size, {"qk_norm": True, "ropes": ropes, "max_length": 40_960}, changes)


def qwen2_5(size: str, **changes: Any) -> DecoderConfig:
    """Returns the config of Qwen2.5: tiny, 0.5b, 1.5b or 7b. `changes` and errors as in `qwen3`."""
    return _config(_QWEN2_5, size, {"qkv_bias": True, "ropes": (Rope(theta=1e6),)}, changes)


def llama3(size: str, **changes: Any) -> DecoderConfig:
    """Returns the config of Llama 3.2 (1b, 3b) or Llama 3.1 (8b, 70b), or tiny.

    `changes` and errors are those of `qwen3`.
    """
    factor = 32.0 if size in ("1b", "3b") else 8.0
    rope = Rope(kind="llama3", theta=5e5, factor=factor, original_length=8192)
    own = {"ropes": (rope,), "layer_norm_epsilon": 1e-5, "max_length": 131_072}
    return _config(_LLAMA3, size, own, changes)


def gemma2(size: str, **changes: Any) -> DecoderConfig:
    """Returns the config of Gemma 2: tiny, 2b, 9b or 27b. `changes` and errors as in `qwen3`."""
    own = {"attention_softcap": 50.0, "final_softcap": 30.0, "max_length": 8192}
    return _gemma("gemma2", _GEMMA2, size, own, changes, pattern=2, window=4096)


def gemma3(size: str, **changes: Any) -> DecoderConfig:
    """Returns the config of Gemma 3's text model: tiny, 270m, 1b, 4b, 12b or 27b.

    `changes` and errors are those of `qwen3`.
    """
    stretched = size in ("4b", "12b", "27b")
    full = Rope(kind="linear", theta=1e6, factor=8.0) if stretched else Rope(theta=1e6)
    own = {
        "qk_norm": True,
        "ropes": (full, Rope(theta=1e4)),
        "max_length": 131_072 if stretched else 32_768,
    }
    window = 1024 if stretched else 512
    return _gemma("gemma3", _GEMMA3, size, own, changes, pattern=6, window=window)


def _gemma(
    name: str,
    sizes: dict[str, _Size],
    size: str,
    own: dict[str, Any],
    changes: dict[str, Any],
    *,
    pattern: int,
    window: int,
) -> DecoderConfig:
    """Returns the config of a Gemma model with local and global layers.

    Every `pattern`-th layer is global: its queries see all tokens before them. All other layers are
    local: their queries see a window. Where the model has two kinds of rotary embeddings, the first
    is that of global layers.
    """
    num_layers = changes.get("num_layers") or _get(sizes, size).num_layers
    local = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    scalar = _QUERY_SCALARS.get((name, size), 256)
    gemma = {
        "activation": "gelu_tanh",
        "unit_offset": True,
        "post_norms": True,
        "scale_embedding": True,
        "windows": tuple(window if is_local else 0 for is_local in local),
        "attention_scale": None if size == "tiny" else scalar**-0.5,
    }
    if len(own.get("ropes", ())) > 1:
        gemma["rope_of_layer"] = tuple(int(is_local) for is_local in local)
    return _config(sizes, size, {**gemma, **own}, changes)


def _get(sizes: dict[str, _Size], size: str) -> _Size:
    if size not in sizes:
        raise ValueError(f"size must be one of {', '.join(sizes)}, got {size!r}")
    return sizes[size]


def _config(
    sizes: dict[str, _Size], size: str, own: dict[str, Any], changes: dict[str, Any]
) -> DecoderConfig:
    """Joins the fields of a size, of its family and of the caller; later ones replace earlier."""
    return DecoderConfig(**{**_get(sizes, size)._asdict(), **own, **changes})
