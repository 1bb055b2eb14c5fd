"""The gin and TOML files that come with the package: where they are, and a list of them."""

from collections.abc import Iterable
import pathlib
import re

import gkd_jax


# Folders and files that other gin files include, and that no command can run alone.
_PARTS = ("decode", "settings", "sweeps")


def folder() -> pathlib.Path:
    """Returns the folder of our gin files, which is in the package only if that is a wheel.

    Raises:
        FileNotFoundError: if the package was copied without this folder.
    """
    package = pathlib.Path(gkd_jax.__file__).parent
    candidates = (package.parent / "gin", package / "gin")
    for path in candidates:
        if (path / "gkd.gin").is_file():
            return path
    raise FileNotFoundError(
        f"gkd_jax lacks its gin files: expected {candidates[0]} or {candidates[1]}"
    )


def find(name: str, ending: str, search_paths: Iterable[str] = ()) -> str:
    """Returns the path of a file that a flag names; the name itself if there is no such file.

    The name is a path, such as `gin/quickstart.gin`, or the name of a file of the folder `gin`
    without its ending, such as `quickstart`.

    Args:
        search_paths: folders that are searched after the working directory, and before the one
            that our folder `gin` is in.
    """
    roots = [pathlib.Path(root) for root in ("", *search_paths, folder().parent)]
    candidates = [root / name for root in roots]
    if re.fullmatch(r"\w[\w./]*", name):
        candidates += [root / "gin" / f"{name}{ending}" for root in roots]
    return next((str(path) for path in candidates if path.is_file()), name)


def listing() -> str:
    """Returns a line for each gin file: its name as `--gin_file` takes it, and what it does."""
    root = folder()
    found = []
    for path in sorted(root.rglob("*.gin"), key=lambda path: (len(path.parts), path)):
        name = path.relative_to(root).with_suffix("")
        if name.parts[0] not in _PARTS:
            found.append((name.as_posix(), _first_sentence(path.read_text(encoding="utf-8"))))
    width = max(len(name) for name, _ in found) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in found)


def _first_sentence(text: str) -> str:
    """Returns the first sentence of the comment at the top of a gin file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return re.split(r"(?<!Eq)(?<!Fig)\.(?:\s|$)", " ".join(lines), maxsplit=1)[0]
