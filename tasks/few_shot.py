"""Few-shot prompts, which have worked examples before the question: `gsm8k_cot`, `mmlu`, `bbh_*`.

A task makes examples with a `header`, `shots` (worked examples) and a `question`. `join_prompt`
joins them to `inputs`, with as many of the first shots as fit into the feature length.
"""

from collections.abc import Mapping, Sequence
import itertools
import re
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from gkd_jax.tasks import features


class Shot(NamedTuple):
    """A worked example of a prompt.

    Attributes:
        question: the question without `Q:`.
        answer: the answer without `A:`.
        line: the number of the question's line in the prompt's file, counted from 1.
    """

    question: str
    answer: str
    line: int

    def text(self) -> str:
        """Returns the example in the form that it has in a prompt."""
        return f"Q: {self.question} A: {self.answer}"


def parse_shots(lines: Sequence[str], path: str) -> tuple[str, list[Shot]]:
    """Returns the header of a prompt file (the text before the first question) and its examples.

    A line that begins with `Q:` begins an example, and the next line that begins with `A:` begins
    the answer. White space, including newlines, becomes one space.

    Args:
        lines: the lines of the file.
        path: the file, for error messages.

    Raises:
        ValueError: if there are no questions, or if a question does not have exactly one answer;
            the message names the file and the line.
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
    """Returns a text in which every sequence of white space is one space, as T5 tokenizes it."""
    return " ".join(text.split())


def join_prompt(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, Any],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Joins `header`, `shots` and `question` to `inputs`, with as many shots as fit.

    The first k shots are kept, where k is the largest number for which the prompt has at most
    `sequence_length["inputs"]` tokens, including EOS. `evaluate.py` of
    https://github.com/hendrycks/test does the same. A question that does not fit even without shots
    is cut at its end like every input.

    Args:
        dataset: examples with `header` (a string, which may be empty), `shots` (strings) and
            `question`; other features are kept.
        output_features: seqio's output features; the vocabulary of `inputs` counts the tokens.
        sequence_length: seqio's feature lengths; None keeps all shots.

    Returns:
        Examples with `inputs`, `kept_shots` (the number of shots in the prompt) and `all_shots`
        (the number of shots before the prompt was shortened).
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


TOKENIZE = (
    join_prompt,
    seqio.preprocessors.tokenize,
    features.count_tokens,
    seqio.preprocessors.append_eos_after_trim,
)
"""The preprocessors that end every task with few-shot prompts.

seqio cannot cache such a task, because its prompts depend on the feature lengths. `TOKENIZE` of
`features` is therefore the same with a place for a cache.
"""


def until_next_question(text: str) -> str:
    """Returns a prediction without further `Q: ... A: ...`, which a model may write after it."""
    return re.split(r"\bQ:", text, maxsplit=1)[0].strip()


class Group(NamedTuple):
    """A group of questions with one prompt: a subject of MMLU or a file of BBH.

    Metrics are averaged over groups of equal weight.

    Attributes:
        name: the group's name.
        header: the text at the beginning of the prompt.
        shots: the texts of the worked examples.
        questions: (question, answer) of each example.
    """

    name: str
    header: str
    shots: list[str]
    questions: list[tuple[str, str]]


def group_dataset(groups: Sequence[Group]) -> tf.data.Dataset:
    """Returns a dataset of examples for `join_prompt`, which also have the name of their `group`.

    The examples of the groups alternate. All groups must have the same number of shots.
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

    # The prompt of a group is stored once instead of with each of the group's questions.
    indices, questions, answers = map(list, zip(*rows, strict=True))
    return tf.data.Dataset.from_tensor_slices((indices, questions, answers)).map(example)


def with_group(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | tuple[str, str]:
    """Returns (group, target) for a target, and a prediction unchanged.

    This is the seqio postprocess_fn that `text_metrics.grouped_exact_match` needs.
    """
    return (example["group"].decode(), text) if is_target else text
