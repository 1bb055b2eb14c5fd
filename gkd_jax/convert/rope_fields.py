"""Reads and writes the rotary embeddings in a `config.json` of transformers 4 or 5."""

import math
from typing import Any

from gkd_jax.models.decoder_config import DecoderConfig, Rope


LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor"),
    }
)


def read(
    kind: str, known: dict[str, Any], types: list[str]
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Returns the values of `DecoderConfig.ropes` and `DecoderConfig.rope_of_layer`.

    Args:
        kind: the model type.
        known: the keys of the `config.json`, completed with the defaults of the model's class.
        types: the type of each layer, one of `LAYER_TYPES`.

    Raises:
        ValueError: if a key is unknown or missing, or has a value that is not supported.
    """
    if kind != "gemma3_text":
        stated = known.get("rope_scaling") or known.get("rope_parameters") or {}
        return (_rope(stated, known["rope_theta"], known),), ()
    stated = known.get("rope_parameters") or {}
    if stated and not set(stated) <= set(LAYER_TYPES):
        raise ValueError(
            f"rope_parameters of gemma3 must be given for {' and '.join(LAYER_TYPES)}, "
            f"got {sorted(stated)}"
        )
    full = {**(stated.get("full_attention") or {}), **(known.get("rope_scaling") or {})}
    sliding = stated.get("sliding_attention") or {}
    ropes = (
        _rope(full, known["rope_theta"], known),
        _rope(sliding, known["rope_local_base_freq"], known),
    )
    return ropes, tuple(LAYER_TYPES.index(name) for name in types)


def _rope(stated: Any, theta: float, known: dict[str, Any]) -> Rope:
    """Returns one kind of rotary embeddings.

    Args:
        stated: the object `rope_scaling`, or (a part of) the object `rope_parameters`.
        theta: the base of the frequencies if `stated` has none.
        known: the keys of the `config.json`, completed with defaults.
    """
    if not isinstance(stated, dict):
        raise ValueError(f"rope_scaling and rope_parameters must be objects, got {stated!r}")
    unknown = sorted(name for name in stated if name not in _ROPE_KEYS)
    if unknown:
        raise ValueError(f"rotary embeddings have keys that are not known: {', '.join(unknown)}")
    if stated.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            "partial_rotary_factor changes the numbers and is not supported, got "
            f"{stated['partial_rotary_factor']!r}"
        )
    kind = stated.get("rope_type", stated.get("type", "default"))
    fields: dict[str, Any] = {"kind": kind, "theta": float(stated.get("rope_theta") or theta)}
    if kind in ("linear", "llama3", "yarn"):
        if kind != "yarn" and not stated.get("factor"):
            raise ValueError(f"rope_type {kind!r} needs a factor, got {stated}")
        original = (
            known.get("original_max_position_embeddings")
            or stated.get("original_max_position_embeddings")
            or known["max_position_embeddings"]
        )
        factor = float(stated.get("factor") or known["max_position_embeddings"] / original)
        fields["factor"] = factor
        if kind != "linear":
            fields["original_length"] = original
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in stated:
                raise ValueError(f"rope_type 'llama3' needs {name}, got {stated}")
            fields[name] = float(stated[name])
    if kind == "yarn":
        fields |= {
            "beta_fast": float(stated.get("beta_fast") or 32),
            "beta_slow": float(stated.get("beta_slow") or 1),
            "truncate": stated.get("truncate", True),
            "attention_factor": _attention_factor(stated, factor),
        }
    return Rope(**fields)


def _attention_factor(stated: dict[str, Any], factor: float) -> float:
    """Returns the factor by which YaRN multiplies the cosines and sines."""

    def by_scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        return by_scale(stated["mscale"]) / by_scale(stated["mscale_all_dim"])
    return by_scale(1.0)


# Writing ------------------------------------------------------------------------------------------


def write(kind: str, config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys of a `config.json` that describe the rotary embeddings of a model.

    transformers 4 reads `rope_theta` and `rope_scaling`. transformers 5 reads `rope_parameters`, or
    the older keys.
    """
    if kind == "gemma3_text":
        full, sliding = config.ropes[0], config.ropes[-1]
        both = {"full_attention": _rope_keys(full), "sliding_attention": _rope_keys(sliding)}
        old: dict[str, Any] = {"rope_theta": full.theta, "rope_local_base_freq": sliding.theta}
        if full.kind != "default":
            old["rope_scaling"] = _rope_keys(full)
        return {**old, "rope_parameters": both}
    rope = config.ropes[0]
    scaling = None if rope.kind == "default" else _rope_keys(rope)
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": _rope_keys(rope)}


def _rope_keys(rope: Rope) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        keys["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        keys |= {name: getattr(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if rope.kind == "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        keys |= {name: getattr(rope, name) for name in names}
    return keys
