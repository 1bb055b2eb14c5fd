"""Rotary position embeddings in halves: dimension i of a head turns with dimension i + K / 2.

Frequencies are float32 and computed on the host, step by step as torch computes them: another
rounding of one of them moves logits by 5e-4 at position 1500.

Axes: B batch, T positions, K head dim, R kinds.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from gkd_jax.models.decoder_config import Rope


class Rotation(NamedTuple):
    """Cosines and sines of every position, in the compute dtype; stacked where layers differ."""

    cos: Float[Array, "*R #B T K2"]
    sin: Float[Array, "*R #B T K2"]


def rotations(
    ropes: tuple[Rope, ...], head_dim: int, positions: Int[Array, "B T"], dtype: str
) -> Rotation:
    """The rotations of each kind, stacked."""
    found = []
    for rope in ropes:
        frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
        angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if rope.attention_factor != 1:
            cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
        found.append((cos.astype(dtype), sin.astype(dtype)))
    return Rotation(*(jnp.stack(x) for x in zip(*found, strict=True)))


def rotate(x: Float[Array, "B H T K"], rotation: Rotation) -> Float[Array, "B H T K"]:
    """Queries or keys, turned by their positions; in the compute dtype."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1)


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " K2"]:
    """Radians a token of each pair of dimensions."""
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # A power rounded once, as torch's; NumPy's own float32 power is off by an ulp in many places.
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return plain / factor
    if rope.kind == "llama3":
        return _llama3(rope, plain, factor)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, powers, plain)
    return plain


def _llama3(rope: Rope, plain: np.ndarray, factor: np.float32) -> np.ndarray:
    """Long waves are stretched, short ones stay, with a passage between."""
    low = rope.original_length / rope.low_freq_factor
    high = rope.original_length / rope.high_freq_factor
    waves = np.float32(2 * math.pi) / plain
    stretched = np.where(waves > low, plain / factor, plain)
    smooth = (np.float32(rope.original_length) / waves - np.float32(rope.low_freq_factor)) / (
        np.float32(rope.high_freq_factor - rope.low_freq_factor)
    )
    passage = (1 - smooth) * stretched / factor + smooth * stretched
    between = (waves >= high) & (waves <= low)
    return np.where(between, passage, stretched).astype(np.float32)


def _yarn(rope: Rope, head_dim: int, powers: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Dimensions with few rotations over the original length are stretched."""

    def dimension(rotations: float) -> float:
        turns = rope.original_length / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    stretched = np.float32(1) / (np.float32(rope.factor) * powers)
    return (stretched * (1 - keep) + plain * keep).astype(np.float32)


def select(rotation: Rotation, index: Int[Array, ""] | int) -> Rotation:
    """One kind of those stacked."""
    return Rotation(
        *(jax.lax.dynamic_index_in_dim(x, jnp.asarray(index), keepdims=False) for x in rotation)
    )
