"""The folder DATA_DIR, from which tasks made of plain files (such as multi30k_ende) read.

`set_data_dir` is called once, before a dataset is built. A task looks the folder up only when a
dataset is requested, so that tasks can be registered before DATA_DIR is known.
"""

import os

import tensorflow as tf

from gkd_jax.text import files


_data_dir: str | None = None


def set_data_dir(path: str | os.PathLike | None) -> None:
    """Sets DATA_DIR for this process; None removes the setting.

    Raises:
        NotADirectoryError: if `path` is local and no such folder exists.
    """
    global _data_dir
    chosen = None if path is None else os.fspath(path)
    if chosen is not None and "://" not in chosen and not os.path.isdir(chosen):
        raise NotADirectoryError(f"DATA_DIR: there is no folder {chosen!r}")
    _data_dir = chosen


def data_dir(task: str) -> str:
    """Returns DATA_DIR for a task that needs it.

    Raises:
        ValueError: if DATA_DIR is not set; the message names the task.
    """
    if _data_dir is None:
        raise ValueError(f"task {task!r} reads its files from DATA_DIR, which is not set")
    return _data_dir


def family_folder(task: str, family: str, entry: str) -> str:
    """Returns the folder DATA_DIR/`family` if it has `entry`, or else DATA_DIR.

    Folders of their own let the files of several tasks, such as those for training and evaluation,
    share one DATA_DIR.

    Args:
        task: the task's name, for error messages.
        family: the name of the folder.
        entry: the name of a file or folder.

    Raises:
        ValueError: if DATA_DIR is not set.
    """
    root = data_dir(task)
    inner = os.path.join(root, family)
    return inner if tf.io.gfile.exists(os.path.join(inner, entry)) else root


def read_lines(folder: str, name: str) -> list[str]:
    """Returns the lines of the text file `name` or `name`.gz in a folder; see `files.read_lines`.

    Raises:
        FileNotFoundError: if there is no such file; the message names the file and the folder.
        ValueError: if the file is not UTF-8 text; the message names the file and the line.
    """
    for candidate in (name, f"{name}.gz"):
        path = os.path.join(folder, candidate)
        if tf.io.gfile.exists(path):
            return files.read_lines(path)
    raise FileNotFoundError(f"there is no file {name!r} (or {name + '.gz'!r}) in {folder!r}")
