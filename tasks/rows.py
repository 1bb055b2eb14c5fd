"""Reads the rows of JSONL files, and turns their prompts and targets into token ids.

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
"""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import seqio

from gkd_jax.text import files, teacher_template
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


# The date that chat templates print. It is fixed, because the current date would change the ids
# from day to day, and a resumed run would then train on other ids.
DATE = datetime.datetime(2024, 7, 26)

_TARGET_OF = {"inputs": "targets", "prompt": "completion"}


class Row(NamedTuple):
    """One line of a JSONL file.

    Attributes:
        prompt: a text or a list of messages.
        target: a text or a message of the assistant; None if the row is only a prompt.
        tools: JSON schemas of tools for the chat template; None if there are none.
        line: the number of the line, counted from 1.
        teacher_prompt: a text or a list of messages that the teacher reads instead of the prompt;
            None if it reads the prompt.
        teacher: the row's field `teacher` as it stands there, which is a name in files whose rows
            are selected by it; None without such a field.
    """

    prompt: str | list[dict[str, Any]]
    target: str | dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    line: int
    teacher_prompt: str | list[dict[str, Any]] | None = None
    teacher: Any = None


class Example(NamedTuple):
    """A tokenized row, without a limit on its length.

    Attributes:
        inputs: the ids of the prompt, including the special tokens that the model expects.
        targets: the ids of the target, ending in an id that ends a text; empty without a target.
        prompt: the text of the prompt; for messages, the rendered chat.
        target: the text of the target; for messages, the decoded `targets`; None without a target.
        chat: the messages and tools of the prompt as JSON; "" if the prompt is a text.
        line: the number of the line in the file, counted from 1.
        teacher_inputs: the ids of the prompt that the teacher reads; None if nothing reads them.
        teacher_prompt: the text of the prompt that the teacher reads.
    """

    inputs: np.ndarray
    targets: np.ndarray
    prompt: str
    target: str | None
    chat: str
    line: int
    teacher_inputs: np.ndarray | None = None
    teacher_prompt: str = ""


def read(path: str | os.PathLike) -> list[Row]:
    """Returns the rows of a JSONL file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is not as expected; the message names the file and the line.
    """
    objects = files.parse_objects(files.read_lines(path), path)
    return [_row(row, path, number) for number, row in enumerate(objects, start=1)]


def of_teacher(
    rows: Sequence[Row], path: str | os.PathLike, teacher: str, allowed: Sequence[str] = ()
) -> list[Row]:
    """Returns the rows whose field `teacher` has a value.

    Args:
        rows: the result of `read`.
        path: the file of the rows, for error messages.
        teacher: the value.
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


def tokenize(
    rows: Sequence[Row],
    vocabulary: seqio.Vocabulary,
    path: str | os.PathLike,
    variables: Mapping[str, Any] | None = None,
    *,
    with_teacher: bool = False,
    template: str | None = None,
) -> list[Example]:
    """Returns rows as token ids.

    A prompt that is a text gets the special tokens of its vocabulary: with T5 it ends in EOS, with
    Llama it begins with BOS. Messages become the ids of the rendered chat with its generation
    prompt. The target of messages becomes the ids that the whole rendered chat has after the
    prompt, up to and including the first id that ends a text.

    Args:
        rows: the result of `read`.
        vocabulary: the vocabulary of the model.
        path: the file of the rows, for error messages.
        variables: further variables of the chat template, such as `enable_thinking`.
        with_teacher: whether the examples have the teacher's prompts. These are the rows' own, or
            those that `template` makes, or else the student's.
        template: the template of the teacher's prompts (see `gkd_jax.text.teacher_template`).

    Raises:
        ValueError: if a prompt is empty, if there is no chat template for messages, or if the
            template refuses the messages; the message names the file and the line.
    """
    examples = []
    for row in rows:
        with files.faults_in(path, row.line):
            if isinstance(row.prompt, str):
                example = _text_example(row, vocabulary)
            else:
                example = _chat_example(row, vocabulary, dict(variables or {}))
            if with_teacher:
                own = _teacher_prompt(row, template)
                ids, text = _prompt(own, row.tools, vocabulary, dict(variables or {}))
                if not ids or not text.strip():
                    raise ValueError("expected a teacher's prompt with text, got an empty one")
                example = example._replace(teacher_inputs=_array(ids), teacher_prompt=text)
            if not example.inputs.size or not example.prompt.strip():
                raise ValueError("expected a prompt with text, got an empty one")
        examples.append(example)
    return examples


def prompt_ids(vocabulary: seqio.Vocabulary, text: str) -> list[int]:
    """Returns the ids of a prompt, including the special tokens that the model expects."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.encode_prompt(text)
    return [*vocabulary.encode(text), *_end(vocabulary)]


def cut(ids: np.ndarray, limit: int, vocabulary: seqio.Vocabulary) -> np.ndarray:
    """Returns the last `limit` ids of a prompt; a BOS at the start of the prompt is kept."""
    if len(ids) <= limit:
        return ids
    begins = isinstance(vocabulary, TokenizerVocabulary) and ids[0] == vocabulary.bos_id
    if not begins or limit == 1:
        return ids[len(ids) - limit :]
    return np.concatenate([ids[:1], ids[len(ids) - limit + 1 :]])


def read_prompts(
    path: str | os.PathLike, vocabulary: seqio.Vocabulary, limit: int
) -> list[dict[str, Any]]:
    """Returns the lines of a plain text file as examples without targets; each line is a prompt.

    A prompt of more than `limit` tokens is cut to its last tokens, and a warning tells how many
    prompts were cut.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not text, or has no lines or an empty line; the message names the
            file and the line.
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
    """Returns the row of a JSON object in any of the forms of this module's docstring."""
    with files.faults_in(path, line):
        prompt, target, tools = _prompt_and_target(row)
        return Row(prompt, target, tools, line, _own_teacher_prompt(row), row.get("teacher"))


def _own_teacher_prompt(row: dict[str, Any]) -> str | list[dict[str, Any]] | None:
    given = [key for key in ("teacher_inputs", "teacher_messages") if key in row]
    if len(given) > 1:
        raise ValueError("expected one of 'teacher_inputs' and 'teacher_messages', got both")
    if given == ["teacher_inputs"]:
        return files.string(row, "teacher_inputs")
    if not given:
        return None
    messages = _checked(row["teacher_messages"], "teacher_messages")
    if messages[-1]["role"] == "assistant":
        raise ValueError("'teacher_messages' must end before the assistant's answer")
    return messages


def _prompt_and_target(row: dict[str, Any]) -> tuple[Any, Any, list[dict[str, Any]] | None]:
    """Returns the prompt, the target and the tools; see `Row`."""
    if "messages" in row:
        return _of_chat(row, row["messages"])
    key = next((key for key in _TARGET_OF if key in row), None)
    if key is None:
        raise ValueError("expected 'inputs', 'prompt' or 'messages', got none of these keys")
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


def _checked(messages: Any, name: str) -> list[dict[str, Any]]:
    """Returns the messages, or raises ValueError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name!r} must be a list of messages that is not empty")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} must be an object with a string 'role'")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and len(message) > 2):
            raise ValueError(f"message {number} must have a string 'content'")
    return messages


def _of_chat(
    row: dict[str, Any], messages: Any
) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Returns the prompt, the target and the tools of messages; the target may be their last."""
    messages = _checked(messages, "messages")
    tools = row.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise ValueError("'tools' must be a list of objects")
    if messages[-1]["role"] != "assistant":
        return messages, None, tools or None
    if len(messages) == 1:
        raise ValueError("expected a turn before the assistant's, got none")
    return messages[:-1], messages[-1], tools or None


def _text_example(row: Row, vocabulary: seqio.Vocabulary) -> Example:
    assert isinstance(row.prompt, str)
    inputs, _ = _prompt(row.prompt, None, vocabulary, {})
    targets: list[int] = []
    if row.target is not None:
        assert isinstance(row.target, str)
        targets = [*vocabulary.encode(row.target), *_end(vocabulary)]
    return Example(_array(inputs), _array(targets), row.prompt, row.target, "", row.line)


def _teacher_prompt(row: Row, template: str | None) -> str | list[dict[str, Any]]:
    """Returns the prompt that the teacher reads.

    The template makes it, if there is one. Otherwise it is the row's own prompt for the teacher, or
    else the prompt of the student.

    Raises:
        ValueError: if there is a template and the row has its own prompt for the teacher, or if the
            template needs a text that the row does not have.
    """
    if template is None:
        return row.prompt if row.teacher_prompt is None else row.teacher_prompt
    if row.teacher_prompt is not None:
        raise ValueError(
            "the row has a prompt for the teacher and TEACHER_TEMPLATE is set: expected one of them"
        )
    target = (
        row.target
        if isinstance(row.target, str) or row.target is None
        else row.target.get("content")
    )
    if isinstance(row.prompt, str):
        return teacher_template.fill(template, inputs=row.prompt, targets=target)
    *before, last = row.prompt
    if not isinstance(last.get("content"), str) or not isinstance(target, str | None):
        raise ValueError("TEACHER_TEMPLATE needs messages whose 'content' is a string")
    filled = teacher_template.fill(template, inputs=last["content"], targets=target)
    return [*before, {**last, "content": filled}]


def _prompt(
    prompt: str | list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    vocabulary: seqio.Vocabulary,
    variables: Mapping[str, Any],
) -> tuple[list[int], str]:
    """Returns the ids and the text of a prompt, which is a text or a list of messages."""
    if isinstance(prompt, str):
        return (prompt_ids(vocabulary, prompt) if prompt else []), prompt
    text = _render(vocabulary, prompt, tools, variables, add_generation_prompt=True)
    ends = isinstance(vocabulary, TokenizerVocabulary) and vocabulary.ends_prompts
    return [*vocabulary.encode(text), *(_end(vocabulary) if ends else [])], text


def _render(
    vocabulary: seqio.Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """Returns messages as the chat template of the vocabulary renders them.

    Raises:
        ValueError: if the vocabulary has no chat template, or the template refuses the messages.
    """
    template = getattr(vocabulary, "chat_template", None)
    if not isinstance(vocabulary, TokenizerVocabulary) or template is None:
        raise ValueError(
            "'messages' need a vocabulary with a chat template (a Hugging Face folder with "
            "chat_template.jinja, or one in tokenizer_config.json), and this one has none"
        )
    return template.render(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        now=DATE,
        **variables,
    )


def _chat_example(row: Row, vocabulary: seqio.Vocabulary, variables: dict[str, Any]) -> Example:
    assert isinstance(row.prompt, list)
    inputs, prompt = _prompt(row.prompt, row.tools, vocabulary, variables)
    chat: dict[str, Any] = {"messages": row.prompt}
    chat |= {"tools": row.tools} if row.tools else {}
    described = json.dumps(chat, ensure_ascii=False)
    targets: list[int] = []
    target = None
    if row.target is not None:
        assert isinstance(row.target, dict)
        assert isinstance(vocabulary, TokenizerVocabulary)
        messages = [*row.prompt, row.target]
        whole = _render(vocabulary, messages, row.tools, variables, add_generation_prompt=False)
        targets = _answer_ids(vocabulary, prompt, whole, row.target.get("content"))
        target = vocabulary.decode(targets)
        _check_calls(row.target, target)
    return Example(_array(inputs), _array(targets), prompt, target, described, row.line)


def _check_calls(message: Mapping[str, Any], printed: str) -> None:
    """Raises ValueError if the text of an answer lacks a call of a tool that the message has.

    Not every chat template prints calls. The answer would then be a text without them, and often
    one without any token but the end.
    """
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in printed:
            raise ValueError(
                f"the answer's 'tool_calls' have a call of {name!r}, which the chat template does "
                f"not print: the answer would be {printed[:60]!r}"
            )


def _answer_ids(
    vocabulary: TokenizerVocabulary, prompt: str, whole: str, content: Any
) -> list[int]:
    """Returns the ids of the answer in a chat, up to and including the first id that ends a text.

    The answer is the part of the whole rendered chat after its prompt. Some templates render the
    prompt differently when an answer follows; for example, they drop the reasoning of past turns.
    In this case the answer is the text in `content`, with an id that ends a text added.

    Args:
        vocabulary: the vocabulary of the model.
        prompt: the rendered messages before the answer, with the generation prompt.
        whole: all messages as rendered.
        content: the content of the answer's message.
    """
    if whole.startswith(prompt):
        before, ids = list(vocabulary.encode(prompt)), list(vocabulary.encode(whole))
        # A token may contain both the end of the prompt and the start of the answer. The answer is
        # then tokenized alone, because the model generates from the ids of the prompt alone.
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
    """Returns the id that ends a text, as a list of one id."""
    if vocabulary.eos_id is None:
        raise ValueError("the vocabulary names no token that ends a text (eos_token)")
    return [vocabulary.eos_id]


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
