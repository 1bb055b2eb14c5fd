"""DATA_DIR: the folder that the tasks made of plain files (multi30k_ende, scitldr) read.

The trainer calls `set_data_dir` once, before a dataset is built; the tasks read it when they are
asked for a dataset, so that they can be registered without it.
"""

import gzip
import os

import tensorflow as tf


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
    """Lines of a UTF-8 text file, without their ends; `name` or `name.gz`.

    Only newlines end a line: other separators of Unicode stay inside it, as in parallel text.

    Raises:
        FileNotFoundError: naming file and folder.
    """
    for candidate in (name, f"{name}.gz"):
        path = os.path.join(folder, candidate)
        if tf.io.gfile.exists(path):
            with tf.io.gfile.GFile(path, "rb") as file:
                content = file.read()
            if candidate.endswith(".gz"):
                content = gzip.decompress(content)
            lines = content.decode("utf-8").split("\n")
            if not lines[-1]:
                lines.pop()
            return [line.rstrip("\r") for line in lines]
    raise FileNotFoundError(f"there is no file {name!r} (or {name + '.gz'!r}) in {folder!r}")
