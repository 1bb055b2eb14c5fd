"""The records of what made an output, by which a command knows whether it may go on with it.

The record of a file of predictions is kept beside it as `<file>.made_by.json`.

`gkd-jax infer` continues a run that was stopped after the lines it has written. `check` refuses to
continue with another model or other settings: lines of two models in one file could not be told
apart later, and SeqKD trains on such files. `check_scores` does the same for the teacher cache of
`gkd-jax score`, whose record is its about.json.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import re
from typing import Any

from etils import epath

from gkd_jax.input import teacher_cache
from gkd_jax.text import files


_DONE = "num_lines"
# The fields that name something, and the fields with the hash of what they name.
_CONTENT_OF = {
    "checkpoint": "content",
    "text_file": "text_content",
    "task": "task_content",
    "vocabulary": "vocabulary_content",
    "extra_ids": "vocabulary_content",
}


def path_of(output: str | os.PathLike[str]) -> epath.Path:
    """Returns the path of the record of a file, which may be in a bucket."""
    return epath.Path(f"{os.fspath(output)}.made_by.json")


def read_made_by(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the record of a file; None if there is none.

    Returns:
        `checkpoint`, `content` (see `storage.content.content_id`), `task` and `split` (or
        `text_file`), the settings of decoding, and `num_lines` once the file is complete.

    Raises:
        ValueError: if the record is damaged.
    """
    path = path_of(output)
    return files.read_json_object(path) if path.is_file() else None


def check(
    output: str | os.PathLike[str], about: dict[str, Any], unread: Sequence[str] = ()
) -> None:
    """Refuses a file that was not made by the same model and settings.

    Args:
        output: the file to write or to continue.
        about: the record of what would make the file now. Paths in it may differ from the earlier
            record if the contents behind them are equal.
        unread: fields of contents that were not read. They are not compared, nor are the fields
            that name these contents.

    Raises:
        ValueError: if the file has another origin or was changed after it was complete; the message
            names what differs.
    """
    path = pathlib.Path(output)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the name of a file to write")
    files.check_can_be_folder(path.parent, "the folder of OUTPUT")
    if not path.exists():
        return
    before = read_made_by(path)
    if before is None:
        raise ValueError(
            f"{path} exists and was not made by `infer` (there is no {path_of(path).name} beside "
            "it): give another OUTPUT"
        )
    lines = before.pop(_DONE, None)
    if changed := _changes(before, about, unread):
        raise ValueError(
            f"{path} was made by something else: {changed}. Give another OUTPUT, or delete the file"
        )
    if lines is not None and path.read_bytes().count(b"\n") != lines:
        raise ValueError(
            f"{path} was changed after it was complete with {lines} lines: give another OUTPUT, or "
            "delete the file"
        )


def check_scores(folder: str, about: dict[str, Any], unread: Sequence[str] = ()) -> None:
    """Refuses the folder of a teacher cache that was made from something else; see `check`.

    Raises:
        ValueError: if the folder holds another cache, or its record is damaged; the message names
            what differs.
    """
    path = pathlib.Path(folder) / teacher_cache.ABOUT
    if not path.exists():
        return
    before = files.read_json_object(path)
    before.pop(teacher_cache.DONE, None)
    if changed := _changes(before, about, unread):
        raise ValueError(
            f"{folder!r} holds the scores of something else: {changed}. Take another folder, or "
            "delete it"
        )


def check_evaluation(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder in which `eval` would write over files that it did not make.

    A later evaluation takes the place of an earlier one in its folder.

    Raises:
        ValueError: if the folder cannot be made, or if one of the two files has another origin.
    """
    files.check_can_be_folder(folder, "OUTPUT_DIR")
    metrics, predictions = (
        pathlib.Path(folder) / name for name in ("metrics.json", "predictions.jsonl")
    )
    scores = files.read_record(metrics)
    lines, damaged = files.read_records(predictions)
    for path, is_ours in (
        (metrics, scores is not None and "evaluation" in scores),
        # An evaluation that was killed leaves its last line cut short.
        (predictions, all("prediction" in line for line in lines) and len(lines) >= damaged),
    ):
        if path.exists() and not is_ours:
            raise ValueError(f"{path} exists and was not made by `eval`: give another OUTPUT_DIR")


def _changes(before: dict[str, Any], about: dict[str, Any], unread: Sequence[str]) -> str:
    """Returns the fields that differ between two records, for a message; "" if there are none."""
    about = json.loads(json.dumps(about))  # as the earlier record was read: tuples became lists
    return "; ".join(
        f"{name} {_short(before.get(name))} -> {_short(about.get(name))}"
        for name in [*about, *sorted(before.keys() - about.keys())]
        if name not in unread and _CONTENT_OF.get(name) not in unread
        if before.get(name) != about.get(name) and not _has_same_content(name, before, about)
    )


def _has_same_content(name: str, before: dict[str, Any], about: dict[str, Any]) -> bool:
    """Returns whether the content that a field names is known and unchanged."""
    content = _CONTENT_OF.get(name, "")
    return about.get(content) is not None and about[content] == before.get(content)


def _short(value: Any) -> str:
    """Returns a value for a message; a hash is shortened to its first characters."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}..." if is_hash else repr(value)


def write(
    output: str | os.PathLike[str], about: dict[str, Any], *, num_lines: int | None = None
) -> None:
    """Writes the record of a file; pass `num_lines` once the file is complete."""
    record = about if num_lines is None else {**about, _DONE: num_lines}
    files.write_whole(path_of(output), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
