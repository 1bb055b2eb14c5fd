"""On-policy distillation of T5 in JAX: GKD (Agarwal et al., ICLR 2024).

The public names. `load_model` is imported at its first use: it brings TensorFlow's file systems.
"""

from typing import TYPE_CHECKING

from gkd_jax.batch import Batch
from gkd_jax.divergences import forward_kl, jsd, reverse_kl, total_variation
from gkd_jax.models.t5_config import T5Config
from gkd_jax.sampling import sample


if TYPE_CHECKING:
    from gkd_jax.storage.pretrained import load_model

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "T5Config",
    "forward_kl",
    "jsd",
    "load_model",
    "reverse_kl",
    "sample",
    "total_variation",
]


def __getattr__(name: str):
    if name != "load_model":
        raise AttributeError(f"module 'gkd_jax' has no attribute {name!r}")
    from gkd_jax.storage.pretrained import load_model

    return load_model
