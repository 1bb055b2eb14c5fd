"""Reads and writes the checkpoint formats of Hugging Face and T5X.

Checkpoints in gkd_jax's own format ("gkd") are read by `gkd_jax.storage.saved_model` instead.
"""

from gkd_jax.convert.formats import Format, detect, t5x_root
from gkd_jax.convert.huggingface import check_hf, write_hf
from gkd_jax.convert.reading import check_arrays, read_config, read_params, stored_dtype
from gkd_jax.convert.t5x_write import check_t5x, write_t5x


__all__ = [
    "Format",
    "check_arrays",
    "check_hf",
    "check_t5x",
    "detect",
    "read_config",
    "read_params",
    "stored_dtype",
    "t5x_root",
    "write_hf",
    "write_t5x",
]
