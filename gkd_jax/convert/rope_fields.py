"""Reads and writes the rotary embeddings in a `config.json` of transformers 4 or 5."""

import math
from typing import Any

from gkd_jax.convert import field_values
from gkd_jax.models.decoder_config import ROPE_KINDS, DecoderConfig, Rope


LAYER_TYPES = ("full_attention", "sliding_attention")
# Of each kind of frequencies, the fields of `Rope` that scale them; keys have the same names.
_SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}
_ROPE_KEYS = frozenset().union(*_SCALING.values()) | {
    *("rope_type", "type", "rope_theta", "original_max_position_embeddings"),
    *("mscale", "mscale_all_dim", "partial_rotary_factor"),
}


def read(
    known: dict[str, Any], types: list[str], *, two_ropes: bool
) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Returns the values of `DecoderConfig.ropes` and `DecoderConfig.rope_of_layer`.

    Args:
        known: the keys of the `config.json`, completed with the defaults of the model's class.
        types: the type of each layer, one of `LAYER_TYPES`.
        two_ropes: whether each type of layers has rotary embeddings of its own, as in Gemma 3.

    Raises:
        ValueError: if a key is unknown or missing, or has a value that is not supported.
    """
    if not two_ropes:
        stated = known.get("rope_scaling") or known.get("rope_parameters") or {}
        return (_rope(stated, "rope_theta", known),), ()
    stated = _object(known.get("rope_parameters") or {}, "rope_parameters")
    if stated and not set(stated) <= set(LAYER_TYPES):
        raise ValueError(
            f"rope_parameters of gemma3 must be given for {' and '.join(LAYER_TYPES)}, "
            f"got {sorted(stated)}"
        )
    full = {
        **_object(stated.get("full_attention") or {}, "rope_parameters"),
        **_object(known.get("rope_scaling") or {}, "rope_scaling"),
    }
    sliding = stated.get("sliding_attention") or {}
    ropes = (_rope(full, "rope_theta", known), _rope(sliding, "rope_local_base_freq", known))
    return ropes, tuple(LAYER_TYPES.index(name) for name in types)


def _object(stated: Any, key: str) -> dict[str, Any]:
    if not isinstance(stated, dict):
        raise ValueError(f"{key} must be an object, got {stated!r}")
    return stated


def _rope(stated: Any, theta_key: str, known: dict[str, Any]) -> Rope:
    """Returns one kind of rotary embeddings.

    Args:
        stated: the object `rope_scaling`, or (a part of) the object `rope_parameters`.
        theta_key: the key in `known` with the base of the frequencies if `stated` has none.
    """
    stated = _object(stated, "rope_scaling or rope_parameters")
    unknown = sorted(name for name in stated if name not in _ROPE_KEYS)
    if unknown:
        raise ValueError(
            "rope_scaling or rope_parameters has keys that are not known: " + ", ".join(unknown)
        )
    if stated.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            "partial_rotary_factor changes the numbers and is not supported, got "
            f"{stated['partial_rotary_factor']!r}"
        )
    # null means what an absent key means, except that transformers takes a null `truncate` as
    # false, and a null kind of frequencies as an error.
    keeps_null = ("truncate", "rope_type", "type")
    given = {name: x for name, x in stated.items() if x is not None or name in keeps_null}
    named = {"rope_type": given.get("type", "default"), **given}
    kind = field_values.choice(named, "rope_type", ROPE_KINDS)
    theta = (given, "rope_theta") if "rope_theta" in given else (known, theta_key)
    scaling = {} if kind == "default" else _scaling(kind, given, known)
    return Rope(kind=kind, theta=field_values.positive(*theta), **scaling)


def _scaling(kind: str, given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Rope` that say how the frequencies are scaled."""
    for name in () if kind == "yarn" else _SCALING[kind]:
        if name not in given:
            raise ValueError(f"rope_type {kind!r} needs {name}, got {given}")
    original = _original_length(given, known)
    factor = known["max_position_embeddings"] / original
    if "factor" in given:
        factor = field_values.positive(given, "factor")
    if kind == "linear":
        return {"factor": factor}
    fields: dict[str, Any] = {"factor": factor, "original_length": original}
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return fields | {name: field_values.positive(given, name) for name in names}
    bounds = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **given}
    return fields | {
        "beta_fast": field_values.positive(bounds, "beta_fast"),
        "beta_slow": field_values.positive(bounds, "beta_slow"),
        "truncate": field_values.switch(bounds, "truncate"),
        "attention_factor": _attention_factor(given, factor),
    }


def _original_length(given: dict[str, Any], known: dict[str, Any]) -> int:
    """Returns the context length before scaling, in tokens."""
    name = "original_max_position_embeddings"
    for fields in (known, given):
        if fields.get(name) is not None:
            return field_values.size(fields, name)
    return field_values.size(known, "max_position_embeddings")


def _attention_factor(given: dict[str, Any], factor: float) -> float:
    """Returns the factor by which YaRN multiplies the cosines and sines."""

    def by_scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in given:
        return field_values.positive(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        scales = [field_values.positive(given, name) for name in ("mscale", "mscale_all_dim")]
        return by_scale(scales[0]) / by_scale(scales[1])
    return by_scale(1.0)


# Writing ------------------------------------------------------------------------------------------


def write(config: DecoderConfig, *, two_ropes: bool) -> dict[str, Any]:
    """Returns the keys of a `config.json` that describe the rotary embeddings of a model (`read`).

    transformers 4 reads `rope_theta` and `rope_scaling`. transformers 5 reads `rope_parameters`, or
    the older keys.
    """
    if two_ropes:
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
    if rope.kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = rope.original_length
    return keys | {name: getattr(rope, name) for name in _SCALING[rope.kind]}
