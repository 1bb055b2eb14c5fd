"""Rows of a JSONL file: prompts and targets in the forms that people have them, and their ids.

    {"inputs": "...", "targets": "..."}       a prompt and its target
    {"prompt": "...", "completion": "..."}    the same
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

The last turn of `messages` is the target if it is the assistant's; otherwise all of them are a
prompt. `prompt` and `completion` may be lists of messages too. `tools` beside messages holds JSON
schemas for the chat template. A row without a target is a prompt: none is invented for it.
"""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import seqio

from gkd_jax.text import files
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


# A template that prints the date would give other ids each day, and a resumed run another stream.
DATE = datetime.datetime(2024, 7, 26)

_TARGET_OF = {"inputs": "targets", "prompt": "completion"}


class Row(NamedTuple):
    """A line of a file.

    Attributes:
        prompt: a text, or messages.
        target: a text, or the assistant's message; None where the row is only a prompt.
        tools: of messages.
        line: of the file, from 1.
    """

    prompt: str | list[dict[str, Any]]
    target: str | dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    line: int


class Example(NamedTuple):
    """A row as ids, of any length.

    Attributes:
        inputs: of the prompt, with what a model expects around it.
        targets: of the target, with an end; empty where there is none.
        prompt: the prompt's text, a chat's as rendered.
        target: the target's text as the vocabulary decodes it; None where there is none.
        chat: the prompt's messages and tools as JSON; "" where the prompt is a text.
        line: of the file, from 1.
    """

    inputs: np.ndarray
    targets: np.ndarray
    prompt: str
    target: str | None
    chat: str
    line: int


def read(path: str | os.PathLike) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line (from 1) and what was expected.
    """
    objects = files.parse_objects(files.read_lines(path), path)
    return [_row(row, path, number) for number, row in enumerate(objects, start=1)]


def tokenize(
    rows: Sequence[Row],
    vocabulary: seqio.Vocabulary,
    path: str | os.PathLike,
    variables: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Rows as ids.

    A text becomes what its vocabulary makes of a prompt: T5's ends in EOS, Llama's begins with BOS.
    Messages become the ids of the rendered chat with its generation prompt, and their target those
    that the whole chat has after it, up to and with the first id that ends a text.

    Args:
        rows: of `read`.
        vocabulary: the model's.
        path: of the file, for messages.
        variables: further names that the chat template reads, such as `enable_thinking`.

    Raises:
        ValueError: naming the file, the line and what was expected: a chat template where there are
            messages, one that takes them, and a prompt that is not empty.
    """
    examples = []
    for row in rows:
        try:
            if isinstance(row.prompt, str):
                example = _text_example(row, vocabulary)
            else:
                example = _chat_example(row, vocabulary, dict(variables or {}))
        except ValueError as error:
            files.fault(path, row.line, str(error))
        if not example.inputs.size or not example.prompt.strip():
            files.fault(path, row.line, "expected a prompt with text, got an empty one")
        examples.append(example)
    return examples


def prompt_ids(vocabulary: seqio.Vocabulary, text: str) -> list[int]:
    """Ids of a text that a model is to answer, with what the model expects around it."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.encode_prompt(text)
    return [*vocabulary.encode(text), *_end(vocabulary)]


def cut(ids: np.ndarray, limit: int, vocabulary: seqio.Vocabulary) -> np.ndarray:
    """The last ids of a prompt that is too long, after its BOS where it begins with one."""
    if len(ids) <= limit:
        return ids
    begins = isinstance(vocabulary, TokenizerVocabulary) and ids[0] == vocabulary.bos_id
    if not begins or limit == 1:
        return ids[len(ids) - limit :]
    return np.concatenate([ids[:1], ids[len(ids) - limit + 1 :]])


def read_prompts(
    path: str | os.PathLike, vocabulary: seqio.Vocabulary, limit: int
) -> list[dict[str, Any]]:
    """The lines of a plain text file, a prompt each, as examples without targets.

    A prompt of more than `limit` tokens keeps the last, and how many do is said.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line and what was expected.
    """
    lines = files.read_lines(path)
    if not lines:
        files.fault(path, None, "expected a prompt a line, got an empty file")
    rows = [Row(line, None, None, number) for number, line in enumerate(lines, start=1)]
    examples = tokenize(rows, vocabulary, path)
    long = sum(len(example.inputs) > limit for example in examples)
    if long:
        print(
            f"WARNING: {os.fspath(path)}: {long} of {len(lines)} lines "
            f"({100 * long / len(lines):.1f} %) are longer than {limit} tokens and cut from the "
            "left. TASK_FEATURE_LENGTHS sets the length.",
            file=sys.stderr,
        )
    return [
        {
            "inputs": cut(example.inputs, limit, vocabulary),
            "targets": example.targets,
            "inputs_pretokenized": example.prompt,
            "targets_pretokenized": "",
        }
        for example in examples
    ]


def _row(row: dict[str, Any], path: str | os.PathLike, line: int) -> Row:
    if "messages" in row:
        return _chat_row(row, row["messages"], path, line)
    key = next((key for key in _TARGET_OF if key in row), None)
    if key is None:
        files.fault(path, line, "expected 'inputs', 'prompt' or 'messages', got none of these keys")
    target_key = _TARGET_OF[key]
    if isinstance(row[key], list):
        answer = row.get(target_key, [])
        if not isinstance(answer, list):
            files.fault(path, line, f"{target_key!r} must be messages, as {key!r} is")
        return _chat_row(row, [*row[key], *answer], path, line)
    prompt = files.string(row, key, path, line)
    target = files.string(row, target_key, path, line) if target_key in row else None
    return Row(prompt, target, None, line)


def _chat_row(row: dict[str, Any], messages: Any, path: str | os.PathLike, line: int) -> Row:
    if not isinstance(messages, list) or not messages:
        files.fault(path, line, "'messages' must be a list of messages that is not empty")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            files.fault(path, line, f"message {number} must be an object with a string 'role'")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and len(message) > 2):
            files.fault(path, line, f"message {number} must have a string 'content'")
    tools = row.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        files.fault(path, line, "'tools' must be a list of objects")
    if messages[-1]["role"] != "assistant":
        return Row(messages, None, tools or None, line)
    if len(messages) == 1:
        files.fault(path, line, "expected a turn before the assistant's, got none")
    return Row(messages[:-1], messages[-1], tools or None, line)


def _text_example(row: Row, vocabulary: seqio.Vocabulary) -> Example:
    assert isinstance(row.prompt, str)
    inputs = prompt_ids(vocabulary, row.prompt) if row.prompt else []
    targets: list[int] = []
    if row.target is not None:
        assert isinstance(row.target, str)
        targets = [*vocabulary.encode(row.target), *_end(vocabulary)]
    return Example(_array(inputs), _array(targets), row.prompt, row.target, "", row.line)


def _chat_example(row: Row, vocabulary: seqio.Vocabulary, variables: dict[str, Any]) -> Example:
    template = getattr(vocabulary, "chat_template", None)
    if not isinstance(vocabulary, TokenizerVocabulary) or template is None:
        raise ValueError(
            "'messages' need a vocabulary with a chat template (a Hugging Face folder with "
            "chat_template.jinja, or one in tokenizer_config.json), and this one has none"
        )

    def render(messages, add_generation_prompt: bool) -> str:
        return template.render(
            messages,
            tools=row.tools,
            add_generation_prompt=add_generation_prompt,
            now=DATE,
            **variables,
        )

    assert isinstance(row.prompt, list)
    prompt = render(row.prompt, True)
    inputs = list(vocabulary.encode(prompt))
    if vocabulary.ends_prompts:
        inputs += _end(vocabulary)
    chat: dict[str, Any] = {"messages": row.prompt}
    chat |= {"tools": row.tools} if row.tools else {}
    described = json.dumps(chat, ensure_ascii=False)
    targets: list[int] = []
    target = None
    if row.target is not None:
        assert isinstance(row.target, dict)
        whole = render([*row.prompt, row.target], False)
        targets = _answer_ids(vocabulary, prompt, whole, row.target.get("content"))
        target = vocabulary.decode(targets)
    return Example(_array(inputs), _array(targets), prompt, target, described, row.line)


def _answer_ids(
    vocabulary: TokenizerVocabulary, prompt: str, whole: str, content: Any
) -> list[int]:
    """What a whole chat has after its prompt, up to and with the first id that ends a text.

    Some templates do not print the prompt again as it was (they drop the reasoning of turns that
    are past, say): then the answer is its own text and an end.
    """
    if whole.startswith(prompt):
        before, ids = list(vocabulary.encode(prompt)), list(vocabulary.encode(whole))
        # Tokens across the seam: the model goes on from the prompt's own ids.
        follows = ids[: len(before)] == before
        ids = ids[len(before) :] if follows else list(vocabulary.encode(whole[len(prompt) :]))
        end = next((i for i, token in enumerate(ids) if token in vocabulary.eos_ids), None)
        return ids[: end + 1] if end is not None else [*ids, *_end(vocabulary)]
    if not isinstance(content, str):
        raise ValueError(
            "the chat template does not print the prompt of these messages again before the "
            "answer, whose 'content' must then be a string"
        )
    return [*vocabulary.encode(content), *_end(vocabulary)]


def _end(vocabulary: seqio.Vocabulary) -> list[int]:
    if vocabulary.eos_id is None:
        raise ValueError("the vocabulary names no token that ends a text (eos_token)")
    return [vocabulary.eos_id]


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
