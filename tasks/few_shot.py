"""Prompts of worked examples before the question: what `gsm8k_cot`, `mmlu` and `bbh_*` share.

A task makes examples with a `header`, `shots` and a `question`; `join_prompt` turns them into
`inputs` with as many shots as fit the feature length, the first ones.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import os
import re
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, folder


class Shot(NamedTuple):
    """A worked example of a prompt."""

    question: str
    answer: str
    line: int  # of the file it comes from, from 1

    def text(self) -> str:
        return f"Q: {self.question} A: {self.answer}"


def parse_shots(lines: Sequence[str], path: str) -> tuple[str, list[Shot]]:
    """The text before the first question, and the worked examples of a prompt file.

    Args:
        lines: of the file. A line that begins with `Q:` begins an example, the next that begins
            with `A:` its answer. White space, newlines included, becomes one space.
        path: for messages.

    Raises:
        ValueError: naming file and line, if a question has not one answer; or if there is none.
    """
    starts = [index for index, line in enumerate(lines) if line.startswith("Q:")]
    if not starts:
        raise ValueError(f"{path}: expected lines that begin with 'Q:', found none")
    shots = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        answers = [index for index in range(start, end) if lines[index].startswith("A:")]
        if len(answers) != 1:
            raise ValueError(
                f"{path}, line {start + 1}: expected one line that begins with 'A:' after this "
                f"question, found {len(answers)}"
            )
        question = " ".join(lines[start : answers[0]]).removeprefix("Q:")
        answer = " ".join(lines[answers[0] : end]).removeprefix("A:")
        shots.append(Shot(one_line(question), one_line(answer), start + 1))
    return one_line(" ".join(lines[: starts[0]])), shots


def one_line(text: str) -> str:
    """Every stretch of white space becomes one space, as T5's vocabulary has it anyway."""
    return " ".join(text.split())


def family_folder(task: str, family: str, entry: str) -> str:
    """DATA_DIR, or its folder `family` where that has the entry (a file or folder).

    So that one DATA_DIR can serve the task that is trained on and the one that is evaluated.

    Raises:
        ValueError: if DATA_DIR is not set.
    """
    root = folder.data_dir(task)
    inner = os.path.join(root, family)
    return inner if tf.io.gfile.exists(os.path.join(inner, entry)) else root


def join_prompt(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """`inputs` = `header`, `shots` and `question`, with as many shots as fit.

    The first k shots are kept, k as large as the prompt has at most `sequence_length["inputs"]`
    tokens, EOS included: so does `evaluate.py` of https://github.com/hendrycks/test. A question
    that does not fit without any shot is cut at its end, as every input is.

    Args:
        dataset: examples with `header` (a string, may be empty), `shots` (strings) and `question`;
            other features are kept.
        output_features: seqio's; the vocabulary of `inputs` counts the tokens.
        sequence_length: seqio's; None keeps all shots.

    Returns:
        Examples with `inputs`, and in `kept_shots` and `all_shots` how many shots they have and how
        many there are.
    """
    feature = output_features["inputs"]
    limit = None if sequence_length is None else sequence_length.get("inputs")

    def prompt(example: Mapping[str, tf.Tensor], kept: Any) -> tf.Tensor:
        parts = [example["header"][None], example["shots"][:kept], example["question"][None]]
        return tf.strings.strip(tf.strings.reduce_join(tf.concat(parts, 0), separator=" "))

    def joined(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        def too_long(kept):
            tokens = tf.size(feature.vocabulary.encode_tf(prompt(example, kept)))
            return (kept > 0) & (tokens + feature.add_eos > limit)

        kept = all_shots = tf.size(example["shots"])
        if limit is not None:
            (kept,) = tf.while_loop(too_long, lambda kept: [kept - 1], [kept])
        others = {key: value for key, value in example.items() if key not in ("header", "shots")}
        inputs = prompt(example, kept)
        return {**others, "inputs": inputs, "kept_shots": kept, "all_shots": all_shots}

    return dataset.map(joined, num_parallel_calls=tf.data.AUTOTUNE)


def register(
    name: str,
    *,
    source: seqio.DataSource,
    preprocessors: Sequence[Callable] = (),
    metric_fns: Sequence[Callable],
    postprocess_fn: Callable,
) -> seqio.Task:
    """Registers a task whose examples `join_prompt` completes, or returns the one of that name.

    It cannot be cached by seqio: its prompts depend on the feature lengths.
    """
    if name in seqio.TaskRegistry.names():
        return seqio.TaskRegistry.get(name)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            *preprocessors,
            join_prompt,
            seqio.preprocessors.tokenize,
            features.count_tokens,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features.output_features(),
        metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn,
    )


def until_next_question(text: str) -> str:
    """A prediction without the further `Q: ... A: ...` that a model may go on to write."""
    return re.split(r"\bQ:", text, maxsplit=1)[0].strip()


class Group(NamedTuple):
    """What is averaged with the same weight as its like: a subject of MMLU, a file of BBH."""

    name: str
    header: str
    shots: list[str]
    questions: list[tuple[str, str]]  # with their answers


def group_dataset(groups: Sequence[Group]) -> tf.data.Dataset:
    """Examples for `join_prompt`, with `group`; the groups take turns.

    All groups must have the same number of shots.
    """
    turns = itertools.zip_longest(
        *([(i, *row) for row in g.questions] for i, g in enumerate(groups))
    )
    rows = [row for turn in turns for row in turn if row is not None]
    names, headers, shots = (
        tf.constant([group[column] for group in groups]) for column in range(3)
    )

    def example(index: tf.Tensor, question: tf.Tensor, answer: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "group": names[index],
            "header": headers[index],
            "shots": shots[index],
            "question": question,
            "targets": answer,
        }

    # The prompts of a group are stored once, not with each of its questions.
    indices, questions, answers = map(list, zip(*rows, strict=True))
    return tf.data.Dataset.from_tensor_slices((indices, questions, answers)).map(example)


def with_group(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | tuple[str, str]:
    """seqio's postprocess_fn: a target becomes (group, target), for `grouped_exact_match`."""
    return (example["group"].decode(), text) if is_target else text
