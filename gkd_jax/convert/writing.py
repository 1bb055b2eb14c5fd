"""Code shared by the writers of Hugging Face and T5X checkpoints."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import secrets
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from gkd_jax.convert.layout import Layout, Part, to_stored
from gkd_jax.models.parameters import Params, flatten
from gkd_jax.text import files


def check_output(path: str) -> None:
    """Raises ValueError if a path exists, is remote, or cannot become a folder."""
    if os.path.lexists(path):
        raise ValueError(f"output {path!r} exists already: give a new folder")
    files.check_can_be_folder(path, "output")


@contextlib.contextmanager
def complete_folder(path: str) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `path` when the body of the `with` succeeds.

    A reader therefore never sees a folder that is only partly written. If the body fails, the
    temporary folder is removed.

    Raises:
        ValueError: if `path` exists or cannot be created (see `check_output`).
    """
    check_output(path)
    final = pathlib.Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class Unwritten(NamedTuple):
    """An array that is yet to be written; memory holds its values only when its turn comes."""

    part: Part  # the name and the form of the stored array
    leaf: Any  # the parameter
    layer: int | None  # the one that the stored array holds; None if it holds all of them

    def values(self) -> np.ndarray:
        """Copies the values to the host, in the form of the stored array."""
        value = self.leaf if self.layer is None else self.leaf[self.layer]
        return to_stored(np.asarray(jax.device_get(value)), self.part.axes, self.part.shape)


def unwritten(layout: Layout, params: Params) -> list[Unwritten]:
    """Returns the stored arrays of a model in the order of its parameters.

    Raises:
        ValueError: if a part of a parameter is only on the devices of another process.
    """
    leaves = flatten(params)
    for path, leaf in leaves.items():
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"{path} is spread over several processes: save a checkpoint of the run and "
                "convert that on one"
            )
    return [
        Unwritten(part, leaves[path], layer if entry.by_layer else None)
        for path, entry in layout.items()
        for layer, part in enumerate(entry.parts)
    ]
