"""The matrix products that a model needs, counted from its config: no program is compiled.

The counts are those of the usual "model FLOPs utilisation" (Chowdhery et al., 2022, App. B): two
FLOPs for each weight and token, and the products of attention. Padding, recomputation and
everything that is no matrix product count nothing. A causal position attends to half of its
sequence on average.
"""

import math

from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten
from gkd_jax.models.t5_config import T5Config


def forward_flops(
    config: lm.Config, *, prompt_tokens: float, target_tokens: float, prompts: int, targets: int
) -> float:
    """Returns the FLOPs of reading some prompts and targets once, with logits of all targets.

    A backward pass takes twice as many, and decoding token by token takes the same number. The
    numbers of tokens are those of all prompts and of all targets together.
    """
    has_encoder = isinstance(config, T5Config)
    source, target = prompt_tokens / max(prompts, 1), target_tokens / max(targets, 1)
    total = 0.0
    for name, leaf in flatten(lm.abstract_params(config)).items():
        tokens = _tokens_through(name, has_encoder, prompt_tokens, target_tokens)
        if config.tie_embeddings and name.endswith("/embedding"):  # the output head
            tokens = target_tokens
        total += 2.0 * math.prod(leaf.shape) * tokens
    width = 4.0 * config.num_heads * config.head_dim  # scores, and the sums that they weigh
    if isinstance(config, T5Config):
        total += width * config.num_encoder_layers * prompt_tokens * source
        contexts = config.num_decoder_layers * (source + target / 2)
        return total + width * target_tokens * contexts
    for window in config.windows or (0,) * config.num_layers:
        seen = window or math.inf
        total += width * prompt_tokens * min(source / 2, seen)
        total += width * target_tokens * min(source + target / 2, seen)
    return total


def _tokens_through(
    name: str, has_encoder: bool, prompt_tokens: float, target_tokens: float
) -> float:
    """Returns how many tokens are multiplied by a parameter; 0 for a norm or an embedding."""
    if not name.endswith("/kernel"):
        return 0.0
    if name.endswith("logits_dense/kernel"):
        return target_tokens
    if not has_encoder:
        return prompt_tokens + target_tokens
    reads_prompt = name.endswith(("decoder_attention/key/kernel", "decoder_attention/value/kernel"))
    return prompt_tokens if name.startswith("encoder/") or reads_prompt else target_tokens
