"""GSM8K (Cobbe et al., 2021): `gsm8k` and, with a few-shot prompt, `gsm8k_cot`.

TFDS `gsm8k:1.0.0`, splits `train` and `test`. In the targets the calculator's `<<...>>` marks are
removed (T5's vocabulary has no `<`), lines are joined by spaces (T5's has no newline either), and
`#### N` becomes `The answer is N.`

`train.jsonl` in the folder `gsm8k` of DATA_DIR, with `inputs` (the question) and `targets` (a chain
of thought that ends in `The answer is N.`), takes the place of the training split for both tasks:
so the chains of a larger model train with the few-shot prompt that evaluation uses, and the test
split stays the original (`gkd_jax.tasks.tfds_or_files`).

`gsm8k_cot` puts worked problems before every question, in the form of Wei et al. (2022); in the
GKD paper they are four:

    inputs:  Q: ... A: ... The answer is 22. Q: ... A: ... The answer is 45. Q: <the question> A:
    targets: those of `gsm8k`

The worked problems are those of `cot_prompt.txt` in DATA_DIR, or in its folder `gsm8k`: blocks of
a `Q:` line and an `A:` line, each of which may go on over further lines. Without that file they are
the four of `COT_PROMPT`, which are this project's own and not the paper's: 285 tokens of T5. The
paper's, the first four of Wei et al. (2022), have 284: both fit 512 with every question.
"""

from collections.abc import Mapping
import os
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, few_shot, folder, tfds_or_files
from gkd_jax.text import text_metrics


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


@seqio.map_over_dataset
def question_to_answer(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`inputs` and `targets` of a TFDS example with `question` and `answer`."""
    answer = tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", "")
    answer = tf.strings.regex_replace(answer, r"\s*####\s*(\S+)\s*$", r" The answer is \1.")
    return {
        "inputs": tf.strings.strip(tf.strings.regex_replace(example["question"], r"\s+", " ")),
        "targets": tf.strings.strip(tf.strings.regex_replace(answer, r"\s+", " ")),
    }


def cot_prompt() -> tuple[str, list[few_shot.Shot]]:
    """Header and worked problems of `gsm8k_cot`: DATA_DIR's, else those of `COT_PROMPT`.

    Raises:
        ValueError: naming file and line, if an answer does not say `The answer is <number>`.
    """
    lines, path = COT_PROMPT.splitlines(), "COT_PROMPT"
    try:
        where = few_shot.family_folder("gsm8k_cot", "gsm8k", COT_FILE)
    except ValueError:
        where = ""  # this task needs no DATA_DIR
    if where and tf.io.gfile.exists(os.path.join(where, COT_FILE)):
        lines, path = folder.read_lines(where, COT_FILE), os.path.join(where, COT_FILE)
    header, shots = few_shot.parse_shots(lines, path)
    for shot in shots:
        if text_metrics.answer(shot.answer) is None:
            raise ValueError(
                f"{path}, line {shot.line}: the answer must say 'The answer is <number>', "
                f"got {shot.answer!r}"
            )
    return header, shots


def add_cot_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """`header`, `shots` and `question` in place of `inputs`, for `few_shot.join_prompt`."""
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
    return text if is_target else few_shot.until_next_question(text)


_SOURCE = tfds_or_files.TfdsOrFiles(
    "gsm8k:1.0.0", family="gsm8k", fields={"inputs": "question", "targets": "answer"}
)

features.register(
    "gsm8k",
    source=_SOURCE,
    preprocessors=[question_to_answer],
    metric_fns=[text_metrics.answer_accuracy],
)
few_shot.register(
    "gsm8k_cot",
    source=_SOURCE,
    preprocessors=[question_to_answer, add_cot_prompt],
    metric_fns=[text_metrics.answer_accuracy],
    postprocess_fn=first_answer,
)
