"""Turns the prompts and targets of `rows` into token ids."""

from collections.abc import Mapping, Sequence
import datetime
import json
import os
import re
from typing import Any, NamedTuple

import numpy as np
import seqio

from gkd_jax.input import fit
from gkd_jax.input.rows import FileRow, Prompt, Tools
from gkd_jax.text import files, teacher_template, vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


# The date that chat templates print. It is fixed, because the current date would change the ids
# from day to day, and a resumed run would then train on other ids.
DATE = datetime.datetime(2024, 7, 26)


class Example(NamedTuple):
    """A tokenized row, without a limit on its length."""

    inputs: np.ndarray  # the ids of the prompt, with the special tokens that the model expects
    targets: np.ndarray  # the last id ends a text, unless the target was cut off; may be empty
    prompt: str  # the text of `inputs`; for messages, the rendered chat
    target: str | None  # the text of `targets`; with the tokenizer of a folder, as decoded
    chat: str  # the messages and tools of the prompt as JSON; "" if the prompt is a text
    line: int  # of the file, counted from 1
    teacher_inputs: np.ndarray | None = None  # of the prompt that the teacher reads, if any
    teacher_prompt: str = ""


def tokenize(
    rows: Sequence[FileRow],
    vocabulary: seqio.Vocabulary,
    path: str | os.PathLike,
    variables: Mapping[str, Any] = {},
    *,
    with_teacher: bool = False,
    template: str | None = None,
) -> list[Example]:
    """Returns rows as token ids.

    A prompt that is a text gets the special tokens of its vocabulary: with T5 it ends in EOS, with
    Llama it begins with BOS. Messages become the ids of the rendered chat with its generation
    prompt. The target of messages becomes the ids that the whole rendered chat has after the
    prompt. Every target goes up to and including the first id that ends a text, which is added if
    the target has none. A target that was cut off becomes the ids of its text alone: a student must
    not learn to end there.

    Args:
        variables: further variables of the chat template, such as `enable_thinking`.
        with_teacher: whether the examples have the teacher's prompts. These are the rows' own, or
            those that `template` makes, or else the student's.
        template: the template of the teacher's prompts (see `gkd_jax.text.teacher_template`).

    Raises:
        ValueError: if a prompt is empty, if there is no chat template for messages, or if the
            template refuses the messages; the message names the file and the line.
    """
    if any(not isinstance(row.prompt, str) for row in rows):
        _warn_of_turns_without_end(vocabulary, variables)
    examples = []
    for row in rows:
        with files.faults_in(path, row.line):
            example = _example(row, vocabulary, variables)
            if with_teacher:
                own = _teacher_prompt(row, template)
                ids, text = _prompt(own, row.tools, vocabulary, variables)
                if not ids or not text.strip():
                    raise ValueError("expected a teacher's prompt with text, got an empty one")
                example = example._replace(teacher_inputs=_array(ids), teacher_prompt=text)
        examples.append(example)
    return examples


def fitting(
    examples: list[Example],
    name: str,
    limit: int,
    vocabulary: seqio.Vocabulary,
    *,
    skips: bool,
    where: str,
    advice: str,
) -> list[Example]:
    """Returns examples whose prompts have at most `limit` tokens, and warns of longer ones once.

    The prompts are the feature `name`. The warning begins with `where` and ends with `advice`.

    Args:
        skips: whether examples with longer prompts are left out. Otherwise these prompts keep
            their last tokens, and a BOS at their start.

    Raises:
        ValueError: if every example would be left out.
    """
    lengths = [len(getattr(example, name)) for example in examples]
    long = sum(length > limit for length in lengths)
    if not long:
        return examples
    whose = "of the teacher " if name == "teacher_inputs" else ""
    if skips and long == len(examples):
        raise ValueError(
            f"{where}: all {long} prompts {whose}are longer than {limit} tokens. {advice}"
        )
    share = f"{long} of {len(examples)} prompts {whose}({100 * long / len(examples):.1f} %)"
    done = "skipped" if skips else "cut from the left"
    fit.warn(f"{where}: {share} are longer than {limit} tokens and {done}. {advice}")
    if skips:
        pairs = zip(examples, lengths, strict=True)
        return [example for example, length in pairs if length <= limit]
    return [
        example._replace(**{name: cut(getattr(example, name), limit, vocabulary)})
        for example in examples
    ]


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
    rows = [FileRow(line, None, None, number) for number, line in enumerate(lines, start=1)]
    examples = fitting(
        tokenize(rows, vocabulary, path),
        "inputs",
        limit,
        vocabulary,
        skips=False,
        where=os.fspath(path),
        advice="TASK_FEATURE_LENGTHS sets the length.",
    )
    return [
        {
            "inputs": example.inputs,
            "targets": example.targets,
            "inputs_pretokenized": example.prompt,
            "targets_pretokenized": "",
        }
        for example in examples
    ]


def prompt_ids(vocabulary: seqio.Vocabulary, text: str) -> list[int]:
    """Returns the ids of a prompt, including the special tokens that the model expects."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.encode_prompt(text)
    return [*vocabulary.encode(text), *_end(vocabulary)]


def _example(row: FileRow, vocabulary: seqio.Vocabulary, variables: Mapping[str, Any]) -> Example:
    """Returns a row as token ids, without the teacher's prompt."""
    inputs, prompt = _prompt(row.prompt, row.tools, vocabulary, variables)
    if not inputs or not prompt.strip():
        raise ValueError("expected a prompt with text, got an empty one")
    targets, target = _target(row, prompt, vocabulary, variables)
    chat = ""
    if not isinstance(row.prompt, str):
        tools = {"tools": row.tools} if row.tools else {}
        chat = json.dumps({"messages": row.prompt, **tools}, ensure_ascii=False)
    return Example(_array(inputs), _array(targets), prompt, target, chat, row.line)


def _target(
    row: FileRow, prompt: str, vocabulary: seqio.Vocabulary, variables: Mapping[str, Any]
) -> tuple[list[int], str | None]:
    """Returns the ids and the text of a row's target; `prompt` is the text of its prompt."""
    if row.target is None:
        return [], None
    if row.truncated:
        cut = row.target if isinstance(row.target, str) else row.target.get("content")
        if not isinstance(cut, str):
            raise ValueError("a truncated answer must have a string 'content'")
        return list(vocabulary.encode(cut)), cut
    if isinstance(row.target, str):
        ids = _ended(vocabulary.encode(row.target), vocabulary)
        # A prediction is a decoded text, too: without special tokens, and as the normalizer has it.
        has_special = isinstance(vocabulary, TokenizerVocabulary)
        return ids, vocabulary.decode(ids) if has_special else row.target
    assert isinstance(vocabulary, TokenizerVocabulary)
    messages = [*row.prompt, row.target]
    whole = _render(vocabulary, messages, row.tools, variables, add_generation_prompt=False)
    ids = _answer_ids(vocabulary, prompt, whole, row.target.get("content"))
    text = vocabulary.decode(ids)
    _check_calls(row.target, text)
    return ids, text


def _answer_ids(
    vocabulary: TokenizerVocabulary, prompt: str, whole: str, content: Any
) -> list[int]:
    """Returns the ids of the answer in a chat, up to and including the first id that ends a text.

    The answer is the part of the whole rendered chat after its prompt. Some templates render the
    prompt differently when an answer follows; for example, they drop the reasoning of past turns.
    In this case the answer is the text in `content`, with an id that ends a text added.
    """
    if whole.startswith(prompt):
        before, ids = list(vocabulary.encode(prompt)), list(vocabulary.encode(whole))
        # A token may contain both the end of the prompt and the start of the answer. The answer is
        # then tokenized alone, because the model generates from the ids of the prompt alone.
        follows = ids[: len(before)] == before
        ids = ids[len(before) :] if follows else list(vocabulary.encode(whole[len(prompt) :]))
        return _ended(ids, vocabulary)
    if not isinstance(content, str):
        raise ValueError(
            "the chat template does not print the prompt of these messages again before the "
            "answer, whose 'content' must then be a string"
        )
    return _ended(vocabulary.encode(content), vocabulary)


def _warn_of_turns_without_end(vocabulary: seqio.Vocabulary, variables: Mapping[str, Any]) -> None:
    """Warns if the chat template ends an answer with no id that ends a text.

    The folder of a base model often has the template of the chat models and another end of texts.
    """
    content = "Yes."
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": content}]
    try:
        whole = _render(vocabulary, chat, None, variables, add_generation_prompt=False)
    except ValueError:  # there is no template, or it refuses this chat: rows are judged one by one
        return
    assert isinstance(vocabulary, TokenizerVocabulary)
    _, found, after = whole.rpartition(content)
    ids = vocabulary.encode(after)
    if not found or not after.strip() or any(token in vocabulary.eos_ids for token in ids):
        return
    ends = " or ".join(repr(vocabulary.piece(token)) for token in vocabulary.eos_ids)
    fit.warn(
        f"the chat template of {vocabulary.folder!r} ends an answer with {after.strip()!r} (ids "
        f"{list(ids)}), and texts end with {ends or 'no token'}: samples go on after the answer. "
        "If the model is to stop there, add the id to eos_token_id in the folder's "
        "generation_config.json."
    )


def _check_printed(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises ValueError if a chat template left out a message, or printed its list as Python does.

    A template may print nothing for a role that it does not know, such as `developer`, `system` or
    `tool`. Of an answer in the past it may leave out the reasoning, so answers are not compared.
    Templates that only expect strings print a list of parts as `[{'type': 'text', ...}]`.
    """
    for number, message in enumerate(messages, start=1):
        content, role = message.get("content"), message["role"]
        if isinstance(content, list) and str(content) in text:
            raise ValueError(
                f"message {number} has a list as its 'content', which the chat template prints as "
                f"{str(content)[:60]!r}: it must be a string"
            )
        if role == "assistant":
            continue
        parts = [{"text": content}] if isinstance(content, str) else content or ()
        for part in parts:
            said = part.get("text") if isinstance(part, dict) else None
            if not isinstance(said, str):
                continue
            # A template may change a text, for example strip or quote it, but it keeps its words.
            if max(re.findall(r"\w+", said), key=len, default="") not in text:
                raise ValueError(
                    f"message {number} has the role {role!r}, of which the chat template prints "
                    f"nothing or a part: {said[:40]!r} is missing. Give it one text, and a role "
                    "that the template knows"
                )


def _check_calls(message: Mapping[str, Any], printed: str) -> None:
    """Raises ValueError if a text lacks the name of a tool that a message in it calls.

    Not every chat template prints calls. An answer would then be a text without them, and often
    one without any token but the end.
    """
    for call in message.get("tool_calls") or ():
        if not isinstance(name := _name_of(call), str) or not _has_word(printed, name):
            raise ValueError(
                f"'tool_calls' have a call of {name!r}, which the chat template does not print: "
                f"the text would be {printed[-60:]!r}"
            )


def _has_word(text: str, name: str) -> bool:
    """Returns whether a text has a name that is not a part of a longer word."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _name_of(tool: Any) -> Any:
    """Returns the name in a call or a JSON schema of a tool; None if it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _teacher_prompt(row: FileRow, template: str | None) -> Prompt:
    """Returns the prompt that the teacher reads.

    The template makes it, if there is one. Otherwise it is the row's own prompt for the teacher, or
    else the prompt of the student.
    """
    if template is None:
        return row.prompt if row.teacher_prompt is None else row.teacher_prompt
    if row.teacher_prompt is not None:
        raise ValueError(
            "the row has a prompt for the teacher and TEACHER_TEMPLATE is set: expected one of them"
        )
    target = row.target.get("content") if isinstance(row.target, dict) else row.target
    if isinstance(row.prompt, str):
        return teacher_template.fill(template, inputs=row.prompt, targets=target)
    *before, last = row.prompt
    if not isinstance(last.get("content"), str) or not isinstance(target, str | None):
        raise ValueError("TEACHER_TEMPLATE needs messages whose 'content' is a string")
    filled = teacher_template.fill(template, inputs=last["content"], targets=target)
    return [*before, {**last, "content": filled}]


def _prompt(
    prompt: Prompt, tools: Tools | None, vocabulary: seqio.Vocabulary, variables: Mapping[str, Any]
) -> tuple[list[int], str]:
    """Returns the ids and the text of a prompt, which is a text or a list of messages."""
    if isinstance(prompt, str):
        return prompt_ids(vocabulary, prompt), prompt
    text = _render(vocabulary, prompt, tools, variables, add_generation_prompt=True)
    ends = isinstance(vocabulary, TokenizerVocabulary) and vocabulary.ends_prompts
    return [*vocabulary.encode(text), *(_end(vocabulary) if ends else [])], text


def _render(
    vocabulary: seqio.Vocabulary,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools | None,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """Returns messages as the chat template of the vocabulary renders them."""
    has_own = isinstance(vocabulary, TokenizerVocabulary)
    template = vocabulary.chat_template if has_own else None
    if template is None:
        raise ValueError(
            "'messages' need a vocabulary with a chat template (a Hugging Face folder with "
            "chat_template.jinja, or one in tokenizer_config.json), and this one has none"
        )
    text = template.render(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, now=DATE, **variables
    )
    _check_printed(messages, text)
    for message in messages:
        _check_calls(message, text)
    for tool in tools or ():
        if isinstance(name := _name_of(tool), str) and not _has_word(text, name):
            raise ValueError(
                f"'tools' have {name!r}, which the chat template does not print: the model would "
                "know nothing of this tool"
            )
    return text


def _end(vocabulary: seqio.Vocabulary) -> list[int]:
    """Returns the id that ends a text, as a list of one id."""
    if vocabulary.eos_id is None:
        raise ValueError("the vocabulary names no token that ends a text (eos_token)")
    return [vocabulary.eos_id]


def _ended(ids: Sequence[int], vocabulary: seqio.Vocabulary) -> list[int]:
    """Returns the ids up to the first that ends a text, or else with such an id added.

    In some files the answers end in the name of the end token, and nothing is learnt behind it.
    """
    ends = vocabularies.end_ids(vocabulary)
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return [*ids[: end + 1]] if end is not None else [*ids, *_end(vocabulary)]


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)
