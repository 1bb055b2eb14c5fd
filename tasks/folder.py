"""DATA_DIR: the folder that the tasks made of plain files (multi30k_ende, scitldr) read.

The trainer calls `set_data_dir` once, before a dataset is built; the tasks read it when they are
asked for a dataset, so that they can be registered without it.
"""

import os

import tensorflow as tf

from gkd_jax.text import files


_data_dir: str | None = None


def set_data_dir(path: str | os.PathLike | None) -> None:
    """Sets the folder for this process. None unsets it.

    Raises:
        NotADirectoryError: if a local folder does not exist.
    """
    global _data_dir
    chosen = None if path is None else os.fspath(path)
    if chosen is not None and "://" not in chosen and not os.path.isdir(chosen):
        raise NotADirectoryError(f"DATA_DIR: there is no folder {chosen!r}")
    _data_dir = chosen


def data_dir(task: str) -> str:
    """The folder, for a task that needs it.

    Raises:
        ValueError: naming the task, if none is set.
    """
    if _data_dir is None:
        raise ValueError(f"task {task!r} reads its files from DATA_DIR, which is not set")
    return _data_dir


def read_lines(folder: str, name: str) -> list[str]:
    """Lines of a text file (`files.read_lines`), `name` or `name.gz`.

    Raises:
        FileNotFoundError: naming file and folder.
        ValueError: naming file and line, where it is no text.
    """
    for candidate in (name, f"{name}.gz"):
        path = os.path.join(folder, candidate)
        if tf.io.gfile.exists(path):
            return files.read_lines(path)
    raise FileNotFoundError(f"there is no file {name!r} (or {name + '.gz'!r}) in {folder!r}")
