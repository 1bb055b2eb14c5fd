"""The tasks `gsm8k` and, with a few-shot prompt, `gsm8k_cot` of GSM8K (Cobbe et al., 2021).

The data set is `gsm8k:1.0.0` of TFDS with the splits `train` and `test`. The targets are changed in
three ways: the calculator's `<<...>>` marks are removed, because T5's vocabulary has no `<`; lines
are joined by spaces, because T5's vocabulary has no newline; and `#### N` becomes
`The answer is N.`

A file `train.jsonl` in the folder `gsm8k` of DATA_DIR, with `inputs` (a question) and `targets` (a
chain of thought that ends in `The answer is N.`), replaces the training split of both tasks, while
the test split stays the original one (`gkd_jax.tasks.tfds_or_files`). In this way a model can be
trained on the chains of thought of a larger model, with the few-shot prompt of the evaluation.

`gsm8k_cot` puts worked problems before every question, in the form of Wei et al. (2022). The GKD
paper uses four worked problems:

    inputs:  Q: ... A: ... The answer is 22. Q: ... A: ... The answer is 45. Q: <the question> A:
    targets: the targets of `gsm8k`

The worked problems are read from `cot_prompt.txt` in DATA_DIR or in its folder `gsm8k`. The file
has a `Q:` line and an `A:` line for each problem, which may continue on further lines. Without this
file, the four problems of `COT_PROMPT` are used. These were written for gkd_jax and have 285 tokens
of T5. The paper uses the first four problems of Wei et al. (2022), which have 284 tokens. Both
prompts fit into 512 tokens with every question.
"""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, few_shot, folder, tfds_or_files
from gkd_jax.text import files, text_metrics


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
    """Returns `inputs` and `targets` of a TFDS example with `question` and `answer`."""
    answer = tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", "")
    answer = tf.strings.regex_replace(answer, r"\s*####\s*(\S+)\s*$", r" The answer is \1.")
    return {
        "inputs": tf.strings.strip(tf.strings.regex_replace(example["question"], r"\s+", " ")),
        "targets": tf.strings.strip(tf.strings.regex_replace(answer, r"\s+", " ")),
    }


def cot_prompt() -> tuple[str, list[few_shot.Shot]]:
    """Returns the header and the worked problems of `gsm8k_cot`.

    They come from `cot_prompt.txt` in DATA_DIR, or else from `COT_PROMPT`.

    Raises:
        ValueError: if an answer does not state `The answer is <number>`; the message names the file
            and the line.
    """
    file = folder.find("gsm8k", COT_FILE)
    lines = COT_PROMPT.splitlines() if file is None else files.read_lines(file)
    path = file or "COT_PROMPT"
    header, shots = few_shot.parse_shots(lines, path)
    for shot in shots:
        if text_metrics.answer(shot.answer) is None:
            raise ValueError(
                f"{path}, line {shot.line}: the answer must say 'The answer is <number>', "
                f"got {shot.answer!r}"
            )
    return header, shots


def add_cot_prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Replaces `inputs` by `header`, `shots` and `question`, which `few_shot.join_prompt` needs."""
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
    """Returns a prediction without what follows its first answer: a seqio postprocess_fn."""
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
features.register(
    "gsm8k_cot",
    source=_SOURCE,
    preprocessors=[question_to_answer, add_cot_prompt],
    tokenize=few_shot.TOKENIZE,
    metric_fns=[text_metrics.answer_accuracy],
    postprocess_fn=first_answer,
)
