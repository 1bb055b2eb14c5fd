"""The two ends of a model of any family: the embeddings of its tokens, and the head.

Axes: B batch, T tokens, D model, V vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gkd_jax.models import quantized
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.parameters import Params
from gkd_jax.models.products import project
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sharding import ACTIVATIONS, constrain


def embed(
    config: T5Config | DecoderConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    scale: float | None = None,
) -> Float[Array, "B T D"]:
    """Returns the embeddings of tokens in the compute dtype, multiplied by `scale` if given."""
    x = jnp.take(params["token_embedder"]["embedding"], tokens, axis=0).astype(config.dtype)
    if scale is not None:  # like transformers, round the scale to the compute dtype too
        x = x * jnp.asarray(scale, config.dtype)
    return constrain(x, ACTIVATIONS)


def apply_head(
    config: T5Config | DecoderConfig,
    params: Params,
    states: Float[Array, "*B D"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*B V"]:
    """Returns the float32 logits of hidden states, softcap x tanh(logits / softcap) if given."""
    if config.tie_embeddings:
        embedding = params["token_embedder"]["embedding"]
        out = project(states, embedding, config.dtype, transposed=True)
    else:
        kernel = quantized.restore(params["decoder"]["logits_dense"]["kernel"])
        out = project(states, kernel, config.dtype)
    if softcap is not None:
        out = softcap * jnp.tanh(out / softcap)
    return constrain(out, ("batch", "length", "vocab")) if out.ndim == 3 else out
