"""Checkpoints of others: Hugging Face's and T5X's, read and written.

    config = read_config(path)
    params = read_params(path, config, shardings=shardings)
    write_hf("out", config, params)

The format is detected. Our own checkpoints ("gkd") are read by `gkd_jax.storage.checkpoints`.
"""

from typing import Any

from gkd_jax.convert import huggingface, t5x
from gkd_jax.convert.formats import Format, detect, t5x_root
from gkd_jax.convert.huggingface import check_hf, write_hf
from gkd_jax.convert.layout import Layout, t5x_layout
from gkd_jax.convert.stored import Stored, as_dtype, check, read_tree
from gkd_jax.convert.t5x_write import write_t5x
from gkd_jax.models import t5


__all__ = [
    "Format",
    "check_arrays",
    "check_hf",
    "detect",
    "read_config",
    "read_params",
    "t5x_root",
    "write_hf",
    "write_t5x",
]


def read_config(path: str) -> t5.T5Config:
    """The sizes of the model in a Hugging Face or T5X checkpoint; reads no weights.

    Dropout and compute dtype are choices of a run: they stay at `T5Config`'s defaults.

    Raises:
        FileNotFoundError: where the folder or a file of it is missing.
        ValueError: where it is no checkpoint, or not one of a T5.
    """
    if _foreign(path) == "hf":
        return huggingface.read_config(path)
    return t5x.infer_config(path, t5x.open_arrays(path))


def read_params(
    path: str,
    config: t5.T5Config,
    *,
    dtype: Any | None = "float32",
    shardings: Any | None = None,
) -> t5.Params:
    """The parameters of a Hugging Face or T5X checkpoint.

    Only the slices that this process's devices hold are read, each once, and cast on the way.

    Args:
        path: the checkpoint's folder.
        config: the sizes to expect, as from `read_config`.
        dtype: in memory: "float32" or "bfloat16", by name or as a dtype; None for the stored one.
        shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; None puts
            everything on the default device.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: lists every array that is missing, of another shape or dtype, or unexpected;
            or names the array whose data are damaged.
    """
    if dtype is not None:
        as_dtype(dtype)
    layout, arrays = _open(path, config)
    return read_tree(layout, arrays, dtype, shardings)


def check_arrays(path: str, config: t5.T5Config) -> None:
    """Compares names, shapes and dtypes of a checkpoint's arrays with a model's; reads none.

    Raises:
        FileNotFoundError, ValueError: as `read_params`.
    """
    _open(path, config)


def _open(path: str, config: t5.T5Config) -> tuple[Layout, dict[str, Stored]]:
    if _foreign(path) == "hf":
        return huggingface.open_model(path, config)
    opened = t5x.open_arrays(path)
    arrays = {name.removeprefix("target."): array for name, array in opened.arrays.items()}
    layout = t5x_layout(config, scanned=opened.scanned)
    check(layout, arrays, path)
    return layout, arrays


def _foreign(path: str) -> Format:
    found = detect(path)
    if found == "gkd":
        raise ValueError(f"{path} is a checkpoint of gkd_jax: read it with gkd_jax.load_model")
    return found
