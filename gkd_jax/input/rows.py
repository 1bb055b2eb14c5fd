"""Reads the rows of JSONL files.

A row may have one of these forms:

    {"inputs": "...", "targets": "..."}       a prompt and its target
    {"prompt": "...", "completion": "..."}    the same with other names
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

If the last message is the assistant's, it is the target and the messages before it are the prompt;
otherwise all messages are the prompt. `prompt` and `completion` may be lists of messages too.
`tools` beside messages holds JSON schemas for the chat template. A row without a target is only a
prompt.

Besides, a row may have `teacher_inputs` (a text) or `teacher_messages` (messages that end before
the answer), which the teacher reads instead of the prompt, and `teacher`, the name of its teacher.
`truncated: true` says that the target was cut off before its end, as `gkd-jax infer` writes it.
"""

from collections.abc import Sequence
import json
import os
from typing import Any, NamedTuple

from gkd_jax.text import files


Messages = list[dict[str, Any]]
Prompt = str | Messages
Tools = list[dict[str, Any]]
_TARGET_OF = {"inputs": "targets", "prompt": "completion"}
# Roles by the names that other data give them. Under such a name a chat template prints a turn with
# a header that the model has never seen, or not at all, and an answer would not be the target.
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", **dict.fromkeys(("ai", "bot", "chatbot", "gpt", "model"), "assistant")}


class FileRow(NamedTuple):
    """One line of a JSONL file, or of a text file of prompts."""

    prompt: Prompt
    target: str | dict[str, Any] | None  # a text or a message of the assistant; None if it has none
    tools: Tools | None  # JSON schemas for the chat template
    line: int  # counted from 1
    teacher_prompt: Prompt | None = None  # what the teacher reads; None if that is `prompt`
    teacher: Any = None  # the field `teacher` as it stands there; None without one
    truncated: bool = False  # the target was cut off before its end


def read(path: str | os.PathLike) -> list[FileRow]:
    """Returns the rows of a JSONL file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is not as expected; the message names the file and the line.
    """
    objects = files.read_objects(path)
    return [_row(row, path, number) for number, row in enumerate(objects, start=1)]


def of_teacher(
    rows: Sequence[FileRow], path: str | os.PathLike, teacher: str, allowed: Sequence[str] = ()
) -> list[FileRow]:
    """Returns the rows whose field `teacher` has a value.

    Args:
        allowed: all values that the rows may have; () allows any value, and rows without one.

    Raises:
        ValueError: if a row has a value that is not allowed (the message names the line), or if no
            row has the value of `teacher`.
    """
    for row in rows:
        if allowed and row.teacher not in allowed:
            given = "none" if row.teacher is None else json.dumps(row.teacher)
            expected = " or ".join(map(json.dumps, allowed))
            files.fault(path, row.line, f"'teacher' must be {expected}, got {given}")
    chosen = [row for row in rows if row.teacher == teacher]
    if not chosen:
        files.fault(path, None, f"no line has the 'teacher' {json.dumps(teacher)}")
    return chosen


def _row(row: dict[str, Any], path: str | os.PathLike, line: int) -> FileRow:
    """Returns the row of a JSON object in any of the forms of this module's docstring."""
    with files.faults_in(path, line):
        prompt, target, tools = _prompt_and_target(row)
        truncated = row.get("truncated", False)
        if not isinstance(truncated, bool):
            raise ValueError(f"'truncated' must be true or false, got {json.dumps(truncated)}")
        own = _own_teacher_prompt(row)
        return FileRow(prompt, target, tools, line, own, row.get("teacher"), truncated)


def _prompt_and_target(row: dict[str, Any]) -> tuple[Any, Any, Tools | None]:
    """Returns the prompt, the target and the tools; see `FileRow`."""
    if "messages" in row:
        return _of_chat(row, row["messages"])
    key = next((key for key in _TARGET_OF if key in row), None)
    if key is None:
        given = ", ".join(map(repr, [*row][:8])) or "an empty object"
        raise ValueError(f"expected 'inputs', 'prompt' or 'messages', got {given}")
    target_key = _TARGET_OF[key]
    others = {*_TARGET_OF.values()} & row.keys()
    if target_key not in row and others:
        raise ValueError(f"{key!r} goes with {target_key!r}, got {min(others)!r}")
    if isinstance(row[key], list):
        answer = row.get(target_key, [])
        if not isinstance(answer, list):
            raise ValueError(f"{target_key!r} must be messages, as {key!r} is")
        return _of_chat(row, [*row[key], *answer])
    prompt = files.string(row, key)
    return prompt, files.string(row, target_key) if target_key in row else None, None


def _of_chat(
    row: dict[str, Any], messages: Any
) -> tuple[Messages, dict[str, Any] | None, Tools | None]:
    """Returns the prompt, the target and the tools of messages; the target may be their last."""
    messages = _checked(messages, "messages")
    tools = row.get("tools")
    if not isinstance(tools, list | None) or not all(isinstance(x, dict) for x in tools or ()):
        raise ValueError("'tools' must be a list of objects")
    if messages[-1]["role"] != "assistant":
        return messages, None, tools or None
    if len(messages) == 1:
        raise ValueError("expected a turn before the assistant's, got none")
    return messages[:-1], messages[-1], tools or None


def _checked(messages: Any, name: str) -> Messages:
    """Returns the messages, or raises ValueError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} must be a list of messages that is not empty")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} must be an object with a string 'role'")
        role = message["role"]
        if (expected := _ROLES.get(role.strip().lower(), role)) != role:
            raise ValueError(f"message {number} must have the role {expected!r}, got {role!r}")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and len(message) > 2):
            raise ValueError(f"message {number} must have a string 'content'")
        # A template prints a mark in the place of an image, which the model would read without it.
        parts = content if isinstance(content, list) and role != "tool" else ()
        kinds = [part.get("type", "text") for part in parts if isinstance(part, dict)]
        if other := next((kind for kind in kinds if kind != "text"), None):
            raise ValueError(f"message {number} must have parts of the type 'text', got {other!r}")
    return messages


def _own_teacher_prompt(row: dict[str, Any]) -> Prompt | None:
    if "teacher_inputs" in row and "teacher_messages" in row:
        raise ValueError("expected one of 'teacher_inputs' and 'teacher_messages', got both")
    if "teacher_inputs" in row:
        return files.string(row, "teacher_inputs")
    if "teacher_messages" not in row:
        return None
    messages = _checked(row["teacher_messages"], "teacher_messages")
    if messages[-1]["role"] == "assistant":
        raise ValueError("'teacher_messages' must end before the assistant's answer")
    return messages
