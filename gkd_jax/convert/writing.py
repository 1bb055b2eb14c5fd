"""What the writers of foreign checkpoints share."""

from collections.abc import Iterator
import contextlib
import pathlib
import secrets
import shutil
from typing import Any


@contextlib.contextmanager
def complete_folder(path: str) -> Iterator[pathlib.Path]:
    """A folder to fill that gets its name only at the end, so that no half of one is ever seen.

    Raises:
        ValueError: where `path` exists or is remote.
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
    """Writers copy every array to this process.

    Raises:
        ValueError: where an array lies partly on another process's devices.
    """
    for path, leaf in leaves.items():
        if not getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"{path} is spread over several processes: save a checkpoint of the run and "
                "convert that on one"
            )
