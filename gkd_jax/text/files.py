"""Reads text files by one set of rules, and writes files atomically.

The rules hold for every file that a user provides (JSONL, TSV, CSV, plain text, each also as
`.gz`). Text is UTF-8, and a byte order mark is dropped. Only a newline ends a line: form feeds and
Unicode's line separators (U+2028, U+0085) are part of the line. If all lines of a file end in
`\\r\\n`, as on Windows, the `\\r` belongs to the end of the line; in any other file it is text. A
file that breaks these rules causes a ValueError that names the file, the line and the fault.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
from typing import Any, NoReturn
import zlib

from etils import epath


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_GZIP = b"\x1f\x8b"
_WIDE_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_WIDE_MARKS |= {codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_BE: "UTF-16"}
_CHUNK = 1 << 20
_REMOTE = re.compile("(gs|s3|az|hdfs|https?|file):/")  # of gs://bucket, pathlib makes gs:/bucket

AnyPath = pathlib.Path | epath.Path
"""A path on a disk, or a path of etils, which may be in a bucket as well."""


def in_bucket(path: str | os.PathLike) -> bool:
    """Returns whether a path is the address of a file or a folder in a bucket, `gs://BUCKET/...`."""
    return os.fspath(path).startswith("gs://")


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is an address, such as `gs://BUCKET/data.jsonl`."""
    return "://" in os.fspath(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns the absolute form of a path; the address of a bucket is absolute as it is.

    `resolve` of etils makes a local folder `gs:` of such an address.
    """
    return epath.Path(path) if in_bucket(path) else epath.Path(path).resolve()


def size_of(path: epath.Path) -> int:
    """Returns the number of bytes of a file on a disk or in a bucket.

    `stat` of etils looks for the name of the file's owner as well, and raises a KeyError if this
    machine knows none. In containers that is the rule for mounted files.
    """
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        return file.tell()


def write_whole(path: AnyPath, content: str | bytes) -> None:
    """Writes or replaces a file atomically: a temporary file in the same folder is renamed.

    In a bucket, every write is atomic by itself. Text is written as UTF-8.

    Raises:
        OSError: if the file cannot be written; the temporary file is then removed.
    """
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        path.write_bytes(data)
        return
    temporary = pathlib.Path(path).with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the name of a file to an OSError that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def check_can_be_folder(
    path: str | os.PathLike, name: str, *, may_be_in_bucket: bool = False
) -> None:
    """Checks that a path is a folder, or that a folder can be made there.

    Args:
        name: what the folder is for, for the message.
        may_be_in_bucket: whether the folder may be in a bucket, which is not looked at.

    Raises:
        ValueError: if the path is remote and may not be, if a part of it is a file or a link that
            leads nowhere, if the folder to write to is not writable, or if the package is missing
            that writes to a bucket.
    """
    if may_be_in_bucket and in_bucket(path):
        # Orbax needs the package to write to a bucket.
        try:
            importlib.metadata.version("google-cloud-storage")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"{name} {os.fspath(path)!r} needs the package google-cloud-storage, which the "
                "extra `gcs` installs"
            ) from None
        return
    if _REMOTE.match(os.fspath(path)):
        raise ValueError(
            f"{name} must be {'local or at gs://' if may_be_in_bucket else 'local'}, got "
            f"{os.fspath(path)!r}: write to a disk or to a mounted bucket"
        )
    folder = pathlib.Path(path).absolute()
    parent = next(above for above in (folder, *folder.parents) if os.path.lexists(above))
    if not parent.is_dir():
        what = "a link that leads nowhere" if parent.is_symlink() else "a file"
        raise ValueError(f"{name} must be a folder, and {str(parent)!r} is {what}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{name} {os.fspath(path)!r}: {str(parent)!r} cannot be written to")


def fault(path: str | os.PathLike, line: int | None, message: str) -> NoReturn:
    """Raises a ValueError about a fault in a file.

    The line is counted from 1, and None if the fault is not in one line. The message says what was
    expected and what was found.
    """
    place = os.fspath(path) if line is None else f"{os.fspath(path)}, line {line}"
    # Commands print the message as one line, so newlines from the file's content are removed.
    raise ValueError(f"{place}: {message}".replace("\n", " ")) from None


@contextlib.contextmanager
def faults_in(path: str | os.PathLike, line: int) -> Iterator[None]:
    """Names a file and a line in every ValueError that is raised inside the `with`."""
    try:
        yield
    except ValueError as error:
        fault(path, line, str(error))


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the content of a local or remote (`gs://`) file; a `.gz` file is decompressed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the path is a folder, if the file is a Git LFS pointer, if a `.gz` file is no
            gzip archive or a damaged one, or if the file cannot be read.
    """
    name = os.fspath(path)
    content = _content(name)
    check_no_pointer(name, content)
    return _unpack(content, name) if name.endswith(".gz") else content


def check_no_pointer(path: str | os.PathLike, beginning: bytes) -> None:
    """Raises ValueError if a file, which begins with these bytes, is a Git LFS pointer."""
    if beginning.startswith(_LFS_POINTER):
        fault(path, 1, "expected the file, got a Git LFS pointer to it: `git lfs pull` fetches it")


def read_text(path: str | os.PathLike) -> str:
    """Returns the text of a file, read by the rules of this module; lines end in newlines only.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not UTF-8 text or cannot be read; the message names the file, the
            line and what was expected.
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
    """Returns the lines of a text file without line ends; see `read_text` for rules and errors."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def parse_json(text: str, path: str | os.PathLike, line: int | None) -> Any:
    """Returns the JSON value in a text.

    Args:
        line: the number of the line, counted from 1; None if `text` is a whole file.

    Raises:
        ValueError: if the text is not JSON, if a string has half of a surrogate pair, which UTF-8
            cannot encode, or if an object in a line has a key twice, of which Python would keep the
            last; the message names the file and the line.
    """
    try:
        value = json.loads(text, object_pairs_hook=None if line is None else _object)
        if "\\" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        fault(path, line, f"expected text, got half of a surrogate pair in {half!a}")
    except json.JSONDecodeError as error:
        at = line if line is not None else error.lineno
        fault(path, at, f"not JSON: {error.msg} (character {error.colno})")
    # The text has thousands of brackets or digits, or a key twice.
    except (RecursionError, ValueError) as error:
        fault(path, line, f"not JSON that can be read: {error}")
    return value


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or holds no JSON object; the message names the file.
    """
    value = parse_json(read_text(path), path, None)
    if not isinstance(value, dict):
        fault(path, None, f"expected a JSON object, got {_shown(value)}")
    return value


def read_json_in(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Returns the JSON object in a file of a folder; {} if the folder has no such file.

    Raises:
        ValueError: if the file cannot be read or holds no JSON object; the message names the file.
    """
    try:
        return read_json_object(os.path.join(folder, name))
    except FileNotFoundError:
        return {}


def read_objects(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the JSON objects of a JSONL file; see `read_text` and `parse_objects` for errors."""
    return parse_objects(read_lines(path), path)


def parse_objects(lines: Sequence[str], path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the JSON object in each line of a JSONL file.

    Raises:
        ValueError: if there are no lines, or if a line is empty or is no JSON object; the message
            names the file and the line.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            fault(path, number, "expected a JSON object, got an empty line")
        if number == 1 and line.lstrip().startswith("["):
            fault(path, 1, "expected an object a line, got an array: `jq -c '.[]'` writes lines")
        if number == 1 and line.strip() == "{":
            fault(path, 1, "expected a whole JSON object in each line: `jq -c .` writes them so")
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            fault(path, number, f"expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    if not rows:
        fault(path, None, "expected a JSON object a line, got an empty file")
    return rows


def read_records(path: AnyPath) -> tuple[list[dict[str, Any]], int]:
    """Returns the JSON objects of a file that a run appends to, and the number of damaged lines.

    A run that is writing, or that was killed, leaves its last line cut short. Without a file, there
    are no objects and one damaged line.
    """
    try:
        lines = path.read_bytes().decode(errors="replace").split("\n")
    except OSError:
        return [], 1
    values = [_parsed(line) for line in lines if line.strip()]
    objects = [value for value in values if isinstance(value, dict)]
    return objects, len(values) - len(objects)


def write_record(path: AnyPath, record: Mapping[str, Any]) -> None:
    """Writes a JSON object to a file of a run; see `write_whole`."""
    write_whole(path, json.dumps(record, indent=1) + "\n")


def read_record(path: AnyPath) -> dict[str, Any] | None:
    """Returns the JSON object in a file of a run; None if there is no file, or a damaged one."""
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _parsed(text: str) -> Any:
    """Returns the JSON value in a text; None if it has none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def string(row: dict[str, Any], key: str) -> str:
    """Returns the string under a key of a JSON object.

    Raises:
        ValueError: if the key is missing, or if its value is no string; inside `faults_in`, the
            message names the file and the line.
    """
    if key not in row:
        raise ValueError(f"key {key!r} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {_shown(value)}")
    return value


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, on a disk or remote, as a hexadecimal number.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read.
    """
    return hashlib.sha256(_content(os.fspath(path))).hexdigest()


def _content(name: str) -> bytes:
    if is_remote(name):
        return _remote_content(name)
    try:
        return pathlib.Path(name).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {name!r}") from None
    except IsADirectoryError:
        fault(name, None, "expected a file, got a folder")
    except (OSError, ValueError) as error:  # A name with a zero byte raises ValueError.
        fault(name.replace("\0", "\\0"), None, f"cannot be read: {error}")


def _remote_content(name: str) -> bytes:
    import tensorflow as tf  # TensorFlow is slow to import; only remote files need it.

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
    # Decompress in pieces, so that the error message can name the line where the damage begins.
    parts: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while part := file.read1(_CHUNK):
                parts.append(part)
    except (EOFError, OSError, zlib.error) as error:
        line = sum(part.count(b"\n") for part in parts) + 1
        fault(name, line, f"expected a whole gzip archive, got one that is damaged: {error}")
    return b"".join(parts)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object, whose keys must differ; Python would keep the last of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {repeated!r} occurs twice in one object")
    return found


def _shown(value: Any) -> str:
    """Returns a short description of a JSON value for an error message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:60]
