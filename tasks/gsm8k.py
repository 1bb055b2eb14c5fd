"""GSM8K (Cobbe et al., 2021): `gsm8k`, school problems answered by a chain of thought.

TFDS `gsm8k:1.0.0`, splits `train` and `test`. In the targets the calculator's `<<...>>` marks are
removed (T5's vocabulary has no `<`), lines are joined by spaces (T5's has no newline either), and
`#### N` becomes `The answer is N.`
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax import text_metrics
from gkd_jax.tasks import features


@seqio.map_over_dataset
def question_to_answer(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`inputs` and `targets` of a TFDS example with `question` and `answer`."""
    answer = tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", "")
    answer = tf.strings.regex_replace(answer, r"\s*####\s*(\S+)\s*$", r" The answer is \1.")
    return {
        "inputs": tf.strings.strip(tf.strings.regex_replace(example["question"], r"\s+", " ")),
        "targets": tf.strings.strip(tf.strings.regex_replace(answer, r"\s+", " ")),
    }


features.register(
    "gsm8k",
    source=seqio.TfdsDataSource(tfds_name="gsm8k:1.0.0"),
    preprocessors=[question_to_answer],
    metric_fns=[text_metrics.answer_accuracy],
)
