"""Every reader of text returns rows or raises one ValueError that names file and line."""

from collections.abc import Callable
import errno
import gzip
import json
import pathlib
import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from gkd_jax.tasks import bbh, flan, mmlu, multi30k, rte
from gkd_jax.text import files, vocabularies


GOOD = {"inputs": "a", "targets": "b"}


def write(path: pathlib.Path, content: bytes | str) -> pathlib.Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\nb", ["a", "b"]),
        ("", []),
        ("\n", [""]),
        ("a\n\nb\n", ["a", "", "b"]),
        # Only a newline ends a line.
        ("a\u2028b\u2029c\x0cd\x0be\x1cf\x85g\n", ["a\u2028b\u2029c\x0cd\x0be\x1cf\x85g"]),
        # A byte order mark is dropped at the start and kept as text elsewhere.
        ("\ufeffa\n\ufeffb\n", ["a", "\ufeffb"]),
        # `\r\n` ends the lines of a file that has no other end.
        ("a\r\nb\r\n", ["a", "b"]),
        ("a\r\nb", ["a", "b"]),
        ("a\r\r\nb\r\n", ["a\r", "b"]),
        ("a\r\nb\nc\r\n", ["a\r", "b", "c\r"]),
        ("a\rb\n", ["a\rb"]),
        ("a\0b\n", ["a\0b"]),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_end_at_newlines_only(tmp_path, content, lines, suffix):
    packed = gzip.compress(content.encode()) if suffix else content
    assert files.read_lines(write(tmp_path / f"x.txt{suffix}", packed)) == lines


def test_archives_of_several_parts_are_read_whole(tmp_path):
    path = write(tmp_path / "x.gz", gzip.compress(b"a\nb") + gzip.compress(b"c\n"))
    assert files.read_lines(path) == ["a", "bc"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:d60a\nsize 791656\n"
WHOLE = gzip.compress(bytes(range(32, 127)) * 50 + b"\n" + b"end\n", mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a\ncaf\xe9\n", r"line 2: expected UTF-8 text, got the byte 0xe9 at byte 4"),
        (
            "x.txt",
            b"\xef\xbb\xbf\xe9\n",
            r"line 1: expected UTF-8 text, got the byte 0xe9 at byte 1",
        ),
        ("x.txt", b"\xed\xa0\x80\n", "line 1: expected UTF-8 text"),  # a surrogate
        ("x.txt", "a\n".encode("utf-16"), "line 1: expected UTF-8 text, got UTF-16"),
        ("x.txt", "a\n".encode("utf-32"), "line 1: expected UTF-8 text, got UTF-32"),
        (
            "x.txt",
            gzip.compress(b"a", mtime=0),
            r"line 1: .* gzip archive, whose name must end in \.gz",
        ),
        ("x.txt", POINTER, "line 1: .*Git LFS pointer"),
        ("x.txt.gz", POINTER, "line 1: .*Git LFS pointer"),
        ("x.txt.gz", b"plain\n", r"line 1: expected a gzip archive, got .*b'plain\\n'"),
        ("x.txt.gz", WHOLE[:-9], "line 3: expected a whole gzip archive"),
        ("x.txt.gz", WHOLE[:-1] + b"x", "expected a whole gzip archive"),
        ("x.txt.gz", WHOLE + b"more", "expected a whole gzip archive"),
        ("x.txt.gz", b"\x1f\x8b", "line 1: expected a whole gzip archive"),
        ("x.txt.gz", gzip.compress(b"a\nb\n\xff", mtime=0), "line 3: expected UTF-8 text"),
    ],
)
def test_what_is_no_text_is_named_by_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ",? ?.*" + message) as error:
        files.read_lines(path)
    assert "\n" not in str(error.value)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ": .*got a folder"):
        files.read_lines(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        files.read_lines(tmp_path / "absent.txt")
    path = write(tmp_path / "x", "")
    for name in (f"{path}/y", "a\0b"):
        with pytest.raises(ValueError, match="cannot be read"):
            files.read_lines(name)


# JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected a JSON object, got an empty line"),
        (" \t", "expected a JSON object, got an empty line"),
        ('"text"', "expected a JSON object, got '\"text\"'"),
        ("null", "expected a JSON object, got 'null'"),
        ('{"inputs": "a", "targets": null}', "'targets' must be a string, got null"),
        ('{"inputs": 1.5, "targets": "b"}', "'inputs' must be a string, got 1.5"),
        ('{"inputs": ["a"], "targets": "b"}', "'inputs' must be a string, got a list"),
        ('{"inputs": "a"}', "key 'targets' is missing"),
        ('{"inputs": "a", "targets": "\\ud83d"}', r"half of a surrogate pair in '\\ud83d'"),
        ('{"inputs": "a", "targets": "b", "\\udc00": 1}', "half of a surrogate pair"),
        ('{"inputs": "a", "targets": "b", "more": [{"x": ["\\ud800"]}]}', "surrogate pair"),
        ('{"inputs": "a" "targets": "b"}', r"not JSON: Expecting ',' delimiter \(character 16\)"),
        ('{"inputs": "a", "targets": "b", "inputs": "c"}', "key 'inputs' occurs twice"),
        ('{"inputs": "a", "targets": "b", "x": [{"y": 1, "y": 1}]}', "key 'y' occurs twice"),
        ("[" * 200_000, "not JSON that can be read"),
        (f'{{"inputs": "a", "targets": "b", "n": {"9" * 5000}}}', "not JSON that can be read"),
        ('{"inputs": "a\tb", "targets": ""}', "not JSON: Invalid control character"),
    ],
)
def test_bad_json_lines_name_file_line_and_what_was_expected(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + ".*" + message) as error:
        flan.read_file(str(path))
    assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"inputs": "a"}]', "an object a line, got an array: `jq -c '.[]'` writes"),
        ('[\n  {"inputs": "a"}\n]\n', "an object a line, got an array"),
        ('{\n  "inputs": "a"\n}\n', "a whole JSON object in each line: `jq -c .` writes"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_answered_with_what_makes_lines(
    tmp_path, content, message
):
    path = write(tmp_path / "x.jsonl", content)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 1: expected {message}")):
        files.read_objects(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", ": expected a JSON object, got a list"),
        ("3", ": expected a JSON object, got 3"),
        ('{\n"a": }', ", line 2: not JSON"),
        ("", ", line 1: not JSON"),
    ],
)
def test_a_file_without_an_object_is_named(tmp_path, content, message):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        files.read_json_object(path)
    assert files.read_record(path) is None
    assert files.read_json_object(write(tmp_path / "y.json", '{"a": 1}')) == {"a": 1}


def test_escaped_pairs_are_text(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"inputs": "\\ud83d\\ude00", "targets": "\\\\ud83d"}\n')
    assert flan.read_file(str(path)) == [{"inputs": "\U0001f600", "targets": "\\ud83d"}]


def test_a_vocabulary_that_is_none_is_named(tmp_path):
    path = write(tmp_path / "spiece.model", POINTER)
    with pytest.raises(ValueError, match=r"spiece\.model, line 1: .*Git LFS pointer"):
        vocabularies.load(str(path))
    for content, found in (("nothing", "a file that is none"), ("", "an empty file")):
        write(path, content)
        with pytest.raises(ValueError, match=rf"spiece\.model: expected a Sent.* got {found}"):
            vocabularies.load(str(path))


# Any bytes ----------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["a", "b\tc", "yes\tno\tso", "q,a,b,c,d,A", "Q: x", "A: y"]
)
LINES = st.one_of(
    TEXTS,
    JSON_VALUES.map(json.dumps),
    st.fixed_dictionaries({"inputs": JSON_VALUES | TEXTS, "targets": TEXTS}).map(json.dumps),
    st.just(json.dumps(GOOD)),
)
FILES = st.one_of(
    st.binary(max_size=60),
    st.tuples(st.lists(LINES, max_size=4), st.sampled_from(["\n", "\r\n", "\u2028", "\r"])).map(
        lambda parts: (parts[1].join(parts[0]) + parts[1]).encode("utf-8", "surrogatepass")
    ),
    st.lists(LINES, max_size=4).map(lambda lines: b"\xef\xbb\xbf" + "\n".join(lines).encode()),
    st.lists(TEXTS, max_size=3).map(lambda lines: "\n".join(lines).encode("utf-16")),
)


def readers(folder: pathlib.Path, content: bytes):
    """(path, reader) for every kind of file, each written with this content."""
    for name in ("x.jsonl", "x.jsonl.gz", "x.tsv", "x.txt", "dev.tsv", "val.en", "val.de"):
        write(folder / name, content)
    yield "x.jsonl", lambda: flan.read_file(str(folder / "x.jsonl"))
    yield "x.jsonl.gz", lambda: flan.read_file(str(folder / "x.jsonl.gz"))
    yield "x.tsv", lambda: flan.read_file(str(folder / "x.tsv"))
    yield "x.txt", lambda: files.read_lines(folder / "x.txt")
    yield "dev.tsv", lambda: rte.read_rows(str(folder), "dev.tsv")
    yield "val.en", lambda: multi30k.read_pairs(str(folder), "validation")
    for part in ("dev", "val"):
        (folder / part).mkdir(exist_ok=True)
        write(folder / part / f"anatomy_{part}.csv", content)
    yield "anatomy_dev.csv", lambda: mmlu.read_subject(str(folder), "anatomy", "validation")
    for part, ending in (("bbh", "json"), ("cot-prompts", "txt")):
        (folder / part).mkdir(exist_ok=True)
        write(folder / part / f"snarks.{ending}", content)
    yield "snarks", lambda: bbh.read_file(str(folder), "snarks", cot=False)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=FILES, pack=st.sampled_from(["no", "whole", "cut"]), cut=st.integers(1, 30))
def test_any_file_gives_rows_or_one_error_of_its_name(tmp_path, content, pack, cut):
    if pack != "no":
        packed = gzip.compress(content)
        content = packed if pack == "whole" else packed[: max(len(packed) - cut, 0)]
    for name, read in readers(tmp_path, content):
        message = fault_of(read)
        assert message is None or (name in message and "\n" not in message)


def fault_of(read: Callable[[], Any]) -> str | None:
    """The message of the ValueError that a reader raises, else None; other errors propagate."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return None


# Writing ------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_the_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = write(tmp_path / "run.json", "before")

    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*run\.json'"):
            files.write_whole(path, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "before"
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        fill(pathlib.Path("/dev/full"))


def fill(path):
    with files.naming(path), path.open("w") as file:
        file.write("a line")
