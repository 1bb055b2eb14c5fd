"""XSum (Narayan et al., 2018): `xsum`, one sentence that says what an article is about."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax.tasks import features
from gkd_jax.text import text_metrics


PREFIX = "summarize: "  # T5's, for its summarization tasks


@seqio.map_over_dataset
def document_to_summary(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`inputs` and `targets` of a TFDS example with `document` and `summary`."""
    return {
        "inputs": tf.strings.join([PREFIX, example["document"]]),
        "targets": example["summary"],
    }


features.register(
    "xsum",
    source=seqio.TfdsDataSource(tfds_name="xsum:1.1.0"),
    preprocessors=[document_to_summary],
    metric_fns=[text_metrics.rouge],
)
