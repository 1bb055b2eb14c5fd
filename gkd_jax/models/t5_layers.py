"""The layers of T5 as Flax Linen modules with T5X's parameter names.

Each module is one layer or a part of one; `gkd_jax.models.t5` stacks the layers. Matrix products
take operands of the compute dtype and accumulate in float32. Norms, the softmax and attention
biases are computed in float32.

Axes: B batch, T queries, S keys, D model, H heads, K head dim, F mlp.
"""

from collections.abc import Sequence
import functools
import math
import operator
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gkd_jax import sharding
from gkd_jax.models import kv_cache
from gkd_jax.models.attention import Heads, Padding, PositionBiases, attend, gains_by_row
from gkd_jax.models.kv_cache import LayerCache
from gkd_jax.models.products import project
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sharding import ACTIVATIONS, constrain


MASKED = -1e10  # T5X's additive mask: exp(MASKED - max) is exactly 0 in float32
fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
fan_in_truncated = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Dense(nn.Module):
    """A linear map without bias; its parameter is `kernel` [in, features]."""

    features: int
    dtype: str
    kernel_init: nn.initializers.Initializer = fan_in_truncated

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return project(x, kernel, self.dtype).astype(self.dtype)


class RMSNorm(nn.Module):
    """T5's layer norm, which subtracts no mean and adds no bias; computed in float32."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x, epsilon = x.astype(jnp.float32), self.config.layer_norm_epsilon
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
        return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.config.dtype)


class Dropout(nn.Dropout):
    """T5's dropout: all positions of a row share one draw; without a key, nothing is dropped."""

    broadcast_dims: Sequence[int] = (-2,)

    def __call__(self, x: Float[Array, "*B S D"]) -> Float[Array, "*B S D"]:
        return super().__call__(x, deterministic=not self.has_rng("dropout"))


class Attention(nn.Module):
    """Multi-head attention: the projections around `gkd_jax.models.attention.attend`."""

    config: T5Config

    def setup(self):
        config = self.config
        inner = config.num_heads * config.head_dim

        def query_init(key, shape, dtype=jnp.float32):
            return fan_in_normal(key, shape, dtype) / math.sqrt(config.head_dim)

        self.query = Dense(inner, config.dtype, query_init)
        self.key = Dense(inner, config.dtype, fan_in_normal)
        self.value = Dense(inner, config.dtype, fan_in_normal)
        self.out = Dense(config.d_model, config.dtype, fan_in_normal)
        self.dropout = Dropout(config.dropout_rate)

    def split_heads(self, x: Float[Array, "B S HK"]) -> Heads:
        sizes = self.config.num_heads, self.config.head_dim
        x = x.reshape(*x.shape[:2], *sizes).swapaxes(1, 2)
        return constrain(x, ("batch", "heads", "length", "kv"))

    def keys_values(self, x: Float[Array, "B S D"]) -> tuple[Heads, Heads]:
        """Returns the keys and values of the states that are attended to.

        In cross-attention, decoding calls this once for a sequence.
        """
        return self.split_heads(self.key(x)), self.split_heads(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys: Heads,
        values: Heads,
        position_biases: PositionBiases,
        padding: Padding | None,
    ) -> Float[Array, "B T D"]:
        queries = self.split_heads(self.query(x))
        dropout_mask = None  # for the attention probabilities; all queries share one draw
        if self.has_rng("dropout") and self.config.dropout_rate > 0:
            dropout_mask = self.dropout(jnp.ones((*keys.shape[:2], 1, keys.shape[2])))
        by_row = self.config.attention_by_row and gains_by_row(queries, keys)
        mixed = attend(queries, keys, values, position_biases, padding, dropout_mask, by_row=by_row)
        return self._join_heads(mixed)

    def decode(
        self, x: Float[Array, "B 1 D"], parts: list[kv_cache.Part], bias: Float[Array, "#B H 1 S"]
    ) -> Float[Array, "B 1 D"]:
        """Attends from one position of each row to the parts of a KV cache."""
        queries = self.split_heads(self.query(x))
        return self._join_heads(kv_cache.attend(queries, parts, lambda scores: scores + bias))

    def _join_heads(self, mixed: Float[Array, "B H T K"]) -> Float[Array, "B T D"]:
        mixed = mixed.swapaxes(1, 2)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class MLP(nn.Module):
    """T5's feed-forward block.

    T5 1.0 computes act(x wi) wo, and T5 1.1 (act0(x wi_0) * act1(x wi_1)) wo.
    """

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config, gated = self.config, len(self.config.mlp_activations) > 1
        branches = [
            _activate(name, Dense(config.d_ff, config.dtype, name=f"wi_{i}" if gated else "wi")(x))
            for i, name in enumerate(config.mlp_activations)
        ]
        hidden = Dropout(config.dropout_rate)(functools.reduce(operator.mul, branches))
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return Dense(config.d_model, config.dtype, name="wo")(hidden)


def _activate(name: str, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    return x if name == "linear" else {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[name](x)


class RelativePositionBias(nn.Module):
    """T5's position bias: a learned number for each head and bucket of distances.

    The numbers are added to the attention scores.
    """

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int, num_rows: int = 1) -> Float[Array, "G H T S"]:
        """Returns identical biases, one for each of the G shards of a batch of `num_rows` rows.

        The gradient of a single bias (H x T x S numbers) would need an all-reduce over the devices
        at every layer. With copies, each device adds up the gradient of its copy over the layers,
        and one all-reduce of H x (T + S) numbers follows.
        """
        copies = sharding.row_shards(num_rows)
        num_heads, buckets = self.config.num_heads, self.config.relpos_buckets
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        embedding = self.param("rel_embedding", init, (num_heads, buckets))
        # The bias depends on s - t alone. So the T + S distances (the last one is padding) are
        # looked up in one row, which is then sheared: out[t, s] = row[s - t + T - 1]. The gradient
        # of this needs no scatter over T x S and no one-hot array [T, S, buckets].
        distances = jnp.arange(-(queries - 1), keys + 1)
        bucket = relative_position_bucket(
            distances, self.bidirectional, buckets, self.config.relpos_max_distance
        )
        row = jnp.broadcast_to(embedding[:, bucket], (copies, *embedding[:, bucket].shape))
        row = constrain(row, ("batch", "heads", "length"))
        sheared = jnp.tile(row, (1, 1, queries))[..., : queries * (queries + keys - 1)]
        sheared = sheared.reshape(copies, num_heads, queries, queries + keys - 1)
        return sheared[..., queries - 1 :]


def relative_position_bucket(
    distance: Int[Array, " N"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, " N"]:
    """Returns T5's bucket of each distance `key position - query position`.

    A short distance has a bucket of its own; the buckets of long distances grow logarithmically.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (ratio / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def hide_padding(mask: Bool[Array, "B S"], lengths: Int[Array, " B"] | None = None) -> Padding:
    """Returns the padding where `mask` is false; `lengths` are those of the rows, if known."""
    return Padding(jnp.where(mask, 0.0, MASKED)[:, None, None, :], lengths)


def causal_bias(length: int) -> Float[Array, "1 1 T T"]:
    """Returns the bias that hides the future: 0 for keys up to the query, MASKED after it."""
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, MASKED)[None, None]


class EncoderLayer(nn.Module):
    """One encoder layer: self-attention and an MLP, each behind a norm and with a residual."""

    config: T5Config

    def setup(self):
        self.attention, self.mlp = Attention(self.config), MLP(self.config)
        self.pre_attention_layer_norm = RMSNorm(self.config)
        self.pre_mlp_layer_norm = RMSNorm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)
        if self.config.per_layer_relpos:
            self.relpos_bias = RelativePositionBias(self.config, bidirectional=True)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        position_bias: Float[Array, "G H S S"] | None,
        padding: Padding,
    ) -> Float[Array, "B S D"]:
        if self.config.per_layer_relpos:
            position_bias = self.relpos_bias(x.shape[1], x.shape[1], num_rows=x.shape[0])
        assert position_bias is not None
        normed = self.pre_attention_layer_norm(x)
        keys, values = self.attention.keys_values(normed)
        y = self.attention(normed, keys, values, (position_bias,), padding)
        x = constrain(x + self.dropout(y), ACTIVATIONS)
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return constrain(x + self.dropout(y), ACTIVATIONS)


class Encoded(NamedTuple):
    """What cross-attention reads: keys and values of the encoder's states, and their padding."""

    keys: Heads
    values: Heads
    padding: Padding


class DecoderLayer(nn.Module):
    """One decoder layer: causal self-attention, cross-attention and an MLP.

    Each of the three stands behind a norm and has a residual connection.
    """

    config: T5Config

    def setup(self):
        self.self_attention, self.mlp = Attention(self.config), MLP(self.config)
        self.encoder_decoder_attention = Attention(self.config)
        self.pre_self_attention_layer_norm = RMSNorm(self.config)
        self.pre_cross_attention_layer_norm = RMSNorm(self.config)
        self.pre_mlp_layer_norm = RMSNorm(self.config)
        self.dropout = Dropout(self.config.dropout_rate)
        if self.config.per_layer_relpos:
            self.relpos_bias = RelativePositionBias(self.config, bidirectional=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        position_bias: Float[Array, "G H T T"] | None,
        padding: Padding,
    ) -> Float[Array, "B T D"]:
        """Runs the layer on all target positions at once (teacher forcing).

        `padding` is that of `encoded`.
        """
        if self.config.per_layer_relpos:
            position_bias = self.relpos_bias(x.shape[1], x.shape[1], num_rows=x.shape[0])
        assert position_bias is not None
        normed = self.pre_self_attention_layer_norm(x)
        keys, values = self.self_attention.keys_values(normed)
        biases = (position_bias, causal_bias(x.shape[1]))
        y = self.self_attention(normed, keys, values, biases, None)
        x = constrain(x + self.dropout(y), ACTIVATIONS)
        return self._cross_attention_and_mlp(x, Encoded(*self.cross_keys_values(encoded), padding))

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: LayerCache,
        self_bias: Float[Array, "#B H 1 T"],
        encoded: Encoded,
    ) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """Runs the layer on one position of each row and returns its output and the new KV cache.

        The key and value of this position are written into the cache before the attention.

        Args:
            x: the states at this position.
            cache: the KV cache of self-attention.
            self_bias: the position bias of all places of the cache, and the mask of those that
                hold no token of a row.
            encoded: what cross-attention reads.
        """
        normed = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(normed)
        cache = kv_cache.write(cache, key, value)
        x = x + self.self_attention.decode(normed, kv_cache.parts(cache), self_bias)
        return self._cross_attention_and_mlp(x, encoded), cache

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> tuple[Heads, Heads]:
        return self.encoder_decoder_attention.keys_values(encoded)

    def bias_by_age(self, length: int) -> Float[Array, "1 H T"]:
        """Returns the position bias of the keys that are 0, 1, ... `length` - 1 tokens old."""
        return self.relpos_bias(length, 1)[..., 0]

    def _cross_attention_and_mlp(self, x, encoded):
        keys, values, padding = encoded
        normed = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(normed, keys, values, (), padding)
        x = constrain(x + self.dropout(y), ACTIVATIONS)
        y = self.mlp(self.pre_mlp_layer_norm(x))
        return constrain(x + self.dropout(y), ACTIVATIONS)
