"""Files: text that is read by one set of rules, and files that are written whole or not at all.

What counts as text is the same for every file that people bring (JSONL, TSV, CSV, plain, each also
as `.gz`): UTF-8, whose byte order mark is dropped. A line ends at a newline and nowhere else: form
feeds and Unicode's own separators (U+2028, U+0085) stay inside it. In a file whose lines all end in
`\\r\\n`, as Windows writes them, the `\\r` belongs to the line's end; elsewhere it is text. What
breaks these rules is one ValueError that names the file, the line and what was expected.
"""

import codecs
from collections.abc import Sequence
import gzip
import io
import json
import os
import pathlib
from typing import Any, NoReturn
import zlib


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b"
_WIDE_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_WIDE_MARKS |= {codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_BE: "UTF-16"}
_CHUNK = 1 << 20


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under another name beside it, then gives it its own; text is UTF-8."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def fault(path: str | os.PathLike, line: int | None, message: str) -> NoReturn:
    """Raises the ValueError of a fault in a file.

    Args:
        path: of the file.
        line: from 1; None where the fault is in no line.
        message: what was expected and what was found.
    """
    place = os.fspath(path) if line is None else f"{os.fspath(path)}, line {line}"
    # One line, whatever the file holds: the message is the whole of what a command prints.
    raise ValueError(f"{place}: {message}".replace("\n", " ")) from None


def read_bytes(path: str | os.PathLike) -> bytes:
    """A file's content, local or remote (`gs://`), unpacked where its name ends in `.gz`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a folder, a Git LFS pointer, an archive that is cut off or none at all, and
            a file that the system does not let us read.
    """
    name = os.fspath(path)
    content = _content(name)
    if content.startswith(_LFS_POINTER):
        fault(name, 1, "expected the file, got a Git LFS pointer to it: `git lfs pull` fetches it")
    return _unpack(content, name) if name.endswith(".gz") else content


def read_text(path: str | os.PathLike) -> str:
    """A file's text, by the rules of this module, with newlines as the only line ends.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line (from 1) and what was expected.
    """
    content = read_bytes(path)
    for mark, encoding in _WIDE_MARKS.items():
        if content.startswith(mark):
            fault(path, 1, f"expected UTF-8 text, got {encoding}")
    if content.startswith(_GZIP):
        fault(path, 1, "expected UTF-8 text, got a gzip archive, whose name must end in .gz")
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        fault(
            path,
            line,
            f"expected UTF-8 text, got the byte 0x{content[error.start]:02x} at byte {column} of "
            "the line (`iconv -f latin1 -t utf-8` converts a Latin-1 file)",
        )
    ends = text.count("\n")
    return text.replace("\r\n", "\n") if ends and text.count("\r\n") == ends else text


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file without their ends, by the rules of this module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line (from 1) and what was expected.
    """
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_json(text: str, path: str | os.PathLike, line: int | None) -> Any:
    """The JSON value of a line, or of a whole file where line is None.

    Raises:
        ValueError: naming the file, the line and what is wrong, lone surrogates included: a string
            with one is no text and could not be written again.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at = line if line is not None else error.lineno
        fault(path, at, f"not JSON: {error.msg} (character {error.colno})")
    except (RecursionError, ValueError) as error:  # thousands of brackets, or of digits
        fault(path, line, f"not JSON that can be read: {error}")
    if "\\" in text and (found := _lone_surrogate(value)) is not None:
        fault(path, line, f"expected text, got half of a surrogate pair in {found[:60]!a}")
    return value


def parse_objects(
    lines: Sequence[str], path: str | os.PathLike, keys: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The JSON objects of lines, each with all of the keys.

    Raises:
        ValueError: naming the file, the line (from 1) and what is wrong with it.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            fault(path, number, "expected a JSON object, got an empty line")
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            fault(path, number, f"expected a JSON object, got {line[:60]!r}")
        for key in keys:
            if key not in row:
                fault(path, number, f"key {key!r} is missing")
        rows.append(row)
    if not rows:
        fault(path, None, "expected a JSON object a line, got an empty file")
    return rows


def string(row: dict[str, Any], key: str, path: str | os.PathLike, line: int) -> str:
    """The text under a key of a JSON object; numbers, nulls and all else are refused."""
    if key not in row:
        fault(path, line, f"key {key!r} is missing")
    value = row[key]
    if not isinstance(value, str):
        fault(path, line, f"{key!r} must be a string, got {_shown(value)}")
    return value


def _content(name: str) -> bytes:
    if "://" in name:
        return _remote_content(name)
    try:
        return pathlib.Path(name).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name!r}") from None
    except IsADirectoryError:
        fault(name, None, "expected a file, got a folder")
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        fault(name.replace("\0", "\\0"), None, f"cannot be read: {error}")


def _remote_content(name: str) -> bytes:
    import tensorflow as tf  # Slow to import, and needed for remote files only.

    try:
        with tf.io.gfile.GFile(name, "rb") as file:
            return file.read()
    except tf.errors.NotFoundError:
        raise FileNotFoundError(f"there is no file {name!r}") from None
    except (tf.errors.OpError, NotImplementedError) as error:
        fault(name, None, f"cannot be read: {error}")


def _unpack(content: bytes, name: str) -> bytes:
    if not content.startswith(_GZIP):
        fault(name, 1, f"expected a gzip archive, got a file that begins with {content[:16]!r}")
    # Read piece by piece, so that a fault can be placed: whoever made the file counts its lines.
    parts: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while part := file.read1(_CHUNK):
                parts.append(part)
    except (EOFError, OSError, zlib.error) as error:
        line = sum(part.count(b"\n") for part in parts) + 1
        fault(name, line, f"expected a whole gzip archive, got one that is damaged: {error}")
    return b"".join(parts)


def _lone_surrogate(value: Any) -> str | None:
    """The first string in a JSON value that UTF-8 cannot express."""
    pending = [value]  # a list and no recursion: JSON may be nested deeper than Python calls
    while pending:
        item = pending.pop()
        if isinstance(item, str) and any("\ud800" <= char <= "\udfff" for char in item):
            return item
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
    return None


def _shown(value: Any) -> str:
    """A JSON value as a message shows it."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:60]
