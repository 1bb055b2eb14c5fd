"""Builds the modules of `gkd_jax.models.t5_layers` with the sizes of a `T5Config`."""

from typing import Any

from flax import linen as nn

from gkd_jax.models import t5_layers
from gkd_jax.models.t5_config import T5Config


def relpos(config: T5Config, stack: str) -> t5_layers.RelativePositionBias:
    """Returns the position bias of a stack, "encoder" or "decoder"."""
    return t5_layers.RelativePositionBias(
        num_heads=config.num_heads,
        buckets=config.relpos_buckets,
        max_distance=config.relpos_max_distance,
        bidirectional=stack == "encoder",
    )


def _attention(config: T5Config) -> t5_layers.Attention:
    return t5_layers.Attention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        d_model=config.d_model,
        dropout_rate=config.dropout_rate,
        dtype=config.dtype,
        by_row=config.attention_by_row,
    )


def _block(config: T5Config, stack: str) -> dict[str, Any]:
    """Returns the parts that encoder and decoder layers have in common, by field name."""
    mlp = t5_layers.MLP(
        d_ff=config.d_ff,
        d_model=config.d_model,
        activations=config.mlp_activations,
        dropout_rate=config.dropout_rate,
        dtype=config.dtype,
    )
    return {
        "mlp": mlp,
        "pre_mlp_layer_norm": t5_layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        "dropout": nn.Dropout(config.dropout_rate, broadcast_dims=(-2,)),
        "relpos_bias": relpos(config, stack) if config.per_layer_relpos else None,
    }


def encoder_layer(config: T5Config) -> t5_layers.EncoderLayer:
    """Returns one layer of the encoder."""
    return t5_layers.EncoderLayer(
        attention=_attention(config),
        pre_attention_layer_norm=t5_layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        **_block(config, "encoder"),
    )


def decoder_layer(config: T5Config) -> t5_layers.DecoderLayer:
    """Returns one layer of the decoder."""
    return t5_layers.DecoderLayer(
        self_attention=_attention(config),
        encoder_decoder_attention=_attention(config),
        pre_self_attention_layer_norm=t5_layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        pre_cross_attention_layer_norm=t5_layers.RMSNorm(config.layer_norm_epsilon, config.dtype),
        **_block(config, "decoder"),
    )
