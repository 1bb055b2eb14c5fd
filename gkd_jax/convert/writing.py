"""Code shared by the writers of Hugging Face and T5X checkpoints."""

from collections.abc import Iterator
import contextlib
import pathlib
import secrets
import shutil
from typing import Any


@contextlib.contextmanager
def complete_folder(path: str) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `path` when the body of the `with` succeeds.

    A reader therefore never sees a folder that is only partly written. If the body fails, the
    temporary folder is removed.

    Raises:
        ValueError: if `path` exists or is remote.
    """
    if "://" in path:
        raise ValueError(f"output must be a local folder, got {path}: write locally, then copy")
    final = pathlib.Path(path)
    if final.exists():
        raise ValueError(f"output {path} exists already: give a new folder")
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
        folder.rename(final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_on_this_host(leaves: dict[str, Any]) -> None:
    """Checks that this process can read every array, which the writers need.

    Raises:
        ValueError: if a part of an array is only on the devices of another process.
    """
    for path, leaf in leaves.items():
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"{path} is spread over several processes: save a checkpoint of the run and "
                "convert that on one"
            )
