"""GSM8K (Cobbe et al., 2021): `gsm8k` and, with a few-shot prompt, `gsm8k_cot`.

TFDS `gsm8k:1.0.0`, splits `train` and `test`. In the targets the calculator's `<<...>>` marks are
removed (T5's vocabulary has no `<`), lines are joined by spaces (T5's has no newline either), and
`#### N` becomes `The answer is N.`

`gsm8k_cot` puts worked problems before every question, in the form of Wei et al. (2022); in the
GKD paper they are four:

    inputs:  Q: ... A: ... The answer is 22. Q: ... A: ... The answer is 45. Q: <the question> A:
    targets: those of `gsm8k`

The worked problems are those of `cot_prompt.txt` in DATA_DIR, or in its folder `gsm8k`: blocks of
a `Q:` line and an `A:` line, each of which may go on over further lines. Without that file they are
the four of `COT_PROMPT`, which are this project's own and not the paper's: 285 tokens of T5.

The few-shot prompts of MMLU and BBH are made by the functions of the first half of this file.
"""

from collections.abc import Callable, Mapping, Sequence
import os
import re
from typing import Any, NamedTuple

import seqio
import tensorflow as tf

from gkd_jax import text_metrics
from gkd_jax.tasks import features, folder


COT_FILE = "cot_prompt.txt"
COT_PROMPT = """\
Q: A baker fills 6 trays with 12 rolls each. Then she sells 50 rolls. How many rolls are left?
A: She bakes 6 * 12 = 72 rolls. After 50 are sold, 72 - 50 = 22 are left. The answer is 22.

Q: Omar reads 15 pages on Monday and twice as many on Tuesday. His book has 90 pages. How many \
pages does he still have to read?
A: On Tuesday he reads 2 * 15 = 30 pages. On both days he reads 15 + 30 = 45 pages. He still has \
to read 90 - 45 = 45 pages. The answer is 45.

Q: A ticket costs $8 for an adult and $5 for a child. What do 2 adults and 3 children pay?
A: The adults pay 2 * 8 = 16 dollars. The children pay 3 * 5 = 15 dollars. Together they pay \
16 + 15 = 31 dollars. The answer is 31.

Q: A tank for 120 litres is a quarter full. A pump adds 9 litres a minute. After how many minutes \
is the tank full?
A: A quarter of the tank is 120 / 4 = 30 litres. 120 - 30 = 90 litres are missing. The pump needs \
90 / 9 = 10 minutes. The answer is 10.
"""


# Few-shot prompts ---------------------------------------------------------------------------------


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

    The first shots are left out until the prompt has at most `sequence_length["inputs"]` tokens,
    EOS included, as in https://github.com/hendrycks/test. A question that does not fit without any
    shot is cut at its end, as every input is.

    Args:
        dataset: examples with `header` (a string, may be empty), `shots` (strings) and `question`;
            other features are kept.
        output_features: seqio's; the vocabulary of `inputs` counts the tokens.
        sequence_length: seqio's; None keeps all shots.
    """
    feature = output_features["inputs"]
    limit = None if sequence_length is None else sequence_length.get("inputs")

    def prompt(example: Mapping[str, tf.Tensor], first: Any) -> tf.Tensor:
        parts = [example["header"][None], example["shots"][first:], example["question"][None]]
        return tf.strings.strip(tf.strings.reduce_join(tf.concat(parts, 0), separator=" "))

    def joined(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        def too_long(first):
            tokens = tf.size(feature.vocabulary.encode_tf(prompt(example, first)))
            return (first < tf.size(example["shots"])) & (tokens + feature.add_eos > limit)

        first = 0
        if limit is not None:
            (first,) = tf.while_loop(too_long, lambda first: [first + 1], [tf.constant(0)])
        kept = {key: value for key, value in example.items() if key not in ("header", "shots")}
        return {**kept, "inputs": prompt(example, first)}

    return dataset.map(joined, num_parallel_calls=tf.data.AUTOTUNE)


def register_few_shot(
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
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features.output_features(),
        metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn,
    )


def until_next_question(text: str) -> str:
    """A prediction without the further `Q: ... A: ...` that a model may go on to write."""
    return re.split(r"\bQ:", text, maxsplit=1)[0].strip()


# The tasks ----------------------------------------------------------------------------------------


@seqio.map_over_dataset
def question_to_answer(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`inputs` and `targets` of a TFDS example with `question` and `answer`."""
    answer = tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", "")
    answer = tf.strings.regex_replace(answer, r"\s*####\s*(\S+)\s*$", r" The answer is \1.")
    return {
        "inputs": tf.strings.strip(tf.strings.regex_replace(example["question"], r"\s+", " ")),
        "targets": tf.strings.strip(tf.strings.regex_replace(answer, r"\s+", " ")),
    }


def cot_prompt() -> tuple[str, list[Shot]]:
    """Header and worked problems of `gsm8k_cot`: DATA_DIR's, else those of `COT_PROMPT`.

    Raises:
        ValueError: naming file and line, if an answer does not say `The answer is <number>`.
    """
    lines, path = COT_PROMPT.splitlines(), "COT_PROMPT"
    try:
        where = family_folder("gsm8k_cot", "gsm8k", COT_FILE)
    except ValueError:
        where = ""  # this task needs no DATA_DIR
    if where and tf.io.gfile.exists(os.path.join(where, COT_FILE)):
        lines, path = folder.read_lines(where, COT_FILE), os.path.join(where, COT_FILE)
    header, shots = parse_shots(lines, path)
    for shot in shots:
        if text_metrics.answer(shot.answer) is None:
            raise ValueError(
                f"{path}, line {shot.line}: the answer must say 'The answer is <number>', "
                f"got {shot.answer!r}"
            )
    return header, shots


def add_cot_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """`header`, `shots` and `question` in place of `inputs`, for `join_prompt`."""
    header, shots = cot_prompt()
    texts = [shot.text() for shot in shots]

    def added(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {
            "header": tf.constant(header),
            "shots": tf.constant(texts),
            "question": tf.strings.join(["Q: ", example["inputs"], " A:"]),
            "targets": example["targets"],
        }

    return dataset.map(added, num_parallel_calls=tf.data.AUTOTUNE)


def first_answer(text: str, *, example: Any = None, is_target: bool = False) -> str:
    """seqio's postprocess_fn: what follows a prediction's own answer does not count."""
    del example
    return text if is_target else until_next_question(text)


features.register(
    "gsm8k",
    source=seqio.TfdsDataSource(tfds_name="gsm8k:1.0.0"),
    preprocessors=[question_to_answer],
    metric_fns=[text_metrics.answer_accuracy],
)
register_few_shot(
    "gsm8k_cot",
    source=seqio.TfdsDataSource(tfds_name="gsm8k:1.0.0"),
    preprocessors=[question_to_answer, add_cot_prompt],
    metric_fns=[text_metrics.answer_accuracy],
    postprocess_fn=first_answer,
)
