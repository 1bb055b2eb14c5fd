"""Rotary position embeddings (Su et al., 2021) of queries and keys.

Dimension i of a head is paired with dimension i + K / 2, and each pair is rotated by an angle that
is its frequency times the position. The frequencies are computed in float32 on the host, with
torch's order of operations: a frequency that is rounded differently moves logits by 5e-4 at
position 1500.

Axes: B batch, T positions, K head dim, K2 = K / 2 pairs, R kinds of embeddings.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from gkd_jax.models.decoder_config import DecoderConfig, Rope


class Rotation(NamedTuple):
    """Cosines and sines of every position, in the compute dtype.

    Axis R is the kind of embedding; `select` removes this axis.
    """

    cos: Float[Array, "*R #B T K2"]
    sin: Float[Array, "*R #B T K2"]


def rotations(config: DecoderConfig, positions: Int[Array, "B T"]) -> Rotation:
    """Returns the rotations at these positions of each kind of embedding, stacked on axis 0."""
    found = []
    for rope in config.ropes:
        frequencies = jnp.asarray(inverse_frequencies(rope, config.head_dim))
        angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if rope.attention_factor != 1:
            cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
        found.append((cos.astype(config.dtype), sin.astype(config.dtype)))
    return Rotation(*(jnp.stack(x) for x in zip(*found, strict=True)))


def rotate(x: Float[Array, "B H T K"], rotation: Rotation) -> Float[Array, "B H T K"]:
    """Returns queries or keys rotated by their positions, in the compute dtype."""
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1)


def inverse_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " K2"]:
    """Returns the frequency of each pair of dimensions, in radians per token."""
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # Like torch, round each power once. NumPy's float32 power is off by an ulp in many places.
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
    """Divides low frequencies by `factor`, keeps high ones, and interpolates between the two.

    As in Llama 3.1. A frequency is low or high by its wavelength in tokens.
    """
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
    """Divides the frequencies of pairs with few rotations over the original length by `factor`.

    As in YaRN (Peng et al., 2023). Pairs with many rotations keep their frequency, and a linear
    ramp over the pairs interpolates between the two.
    """

    def dimension(rotations: float) -> float:
        """The pair (a real number) that makes so many rotations over the original length."""
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


def select(rotation: Rotation, index: Int[Array, ""] | np.integer | int) -> Rotation:
    """Returns the rotations of one kind; `index` may be traced."""
    if rotation.cos.shape[0] == 1:  # no dynamic slice for the only kind
        return Rotation(rotation.cos[0], rotation.sin[0])
    return Rotation(
        *(jax.lax.dynamic_index_in_dim(x, jnp.asarray(index), keepdims=False) for x in rotation)
    )
