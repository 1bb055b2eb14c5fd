"""On-policy distillation of language models in JAX: GKD (Agarwal et al., ICLR 2024).

The public names. Each is imported at its first use, so that `import gkd_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from gkd_jax.batch import Batch
    from gkd_jax.divergences import forward_kl, jsd, reverse_kl, total_variation
    from gkd_jax.models.t5_config import T5Config
    from gkd_jax.sampling import jitted_sample as sample
    from gkd_jax.storage.loading import load_model, num_pieces

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "T5Config",
    "forward_kl",
    "jsd",
    "load_model",
    "num_pieces",
    "reverse_kl",
    "sample",
    "total_variation",
]
# The module of each name, and its name there.
_PLACES = {
    "Batch": ("batch", "Batch"),
    "T5Config": ("models.t5_config", "T5Config"),
    "forward_kl": ("divergences", "forward_kl"),
    "jsd": ("divergences", "jsd"),
    "load_model": ("storage.loading", "load_model"),
    "num_pieces": ("storage.loading", "num_pieces"),
    "reverse_kl": ("divergences", "reverse_kl"),
    "sample": ("sampling", "jitted_sample"),
    "total_variation": ("divergences", "total_variation"),
}


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'gkd_jax' has no attribute {name!r}")
    module, name_there = _PLACES[name]
    return getattr(importlib.import_module(f"gkd_jax.{module}"), name_there)


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__version__"])
