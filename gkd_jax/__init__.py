"""On-policy distillation of language models in JAX: GKD (Agarwal et al., ICLR 2024).

The public names. Each is imported at its first use, so that `import gkd_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from gkd_jax.batch import Batch
    from gkd_jax.divergences import forward_kl, jsd, reverse_kl, total_variation
    from gkd_jax.models.t5_config import T5Config
    from gkd_jax.sampling import sample
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
_MODULES = {
    "Batch": "batch",
    "T5Config": "models.t5_config",
    "forward_kl": "divergences",
    "jsd": "divergences",
    "load_model": "storage.pretrained",
    "reverse_kl": "divergences",
    "sample": "sampling",
    "total_variation": "divergences",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'gkd_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gkd_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
