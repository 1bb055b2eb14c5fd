"""The folder DATA_DIR, from which tasks made of plain files (such as multi30k_ende) read.

`named_tasks.open_task` sets the folder whenever it opens a task, and the last value holds for the
process. A task looks the folder up only when a dataset is requested, so that tasks can be
registered before DATA_DIR is known.
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
    if chosen is not None and not files.is_remote(chosen) and not os.path.isdir(chosen):
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
        ValueError: if the file is not UTF-8 text (the message names the file and the line), or if
            the folder has both files.
    """
    path = existing(os.path.join(folder, name))
    if path is None:
        raise FileNotFoundError(f"there is no file {name!r} (or {name + '.gz'!r}) in {folder!r}")
    return files.read_lines(path)


def find(family: str, name: str) -> str | None:
    """Returns the path of a file in the folder DATA_DIR/`family`, or else in DATA_DIR.

    The result is None if there is no such file, plain or as `.gz`, or if DATA_DIR is not set.

    Raises:
        ValueError: if a folder has both the plain file and the `.gz`.
    """
    if _data_dir is None:
        return None
    found = (existing(os.path.join(_data_dir, *inner, name)) for inner in ([family], []))
    return next(filter(None, found), None)


def existing(path: str) -> str | None:
    """Returns `path` or `path`.gz, whichever exists; None if neither exists.

    Raises:
        ValueError: if both exist, because their contents may differ.
    """
    found = [name for name in (path, f"{path}.gz") if tf.io.gfile.exists(name)]
    if len(found) > 1:
        raise ValueError(f"there are both {found[0]!r} and {found[1]!r}: remove one of them")
    return next(iter(found), None)
