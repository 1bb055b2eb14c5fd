"""The task `xsum`: summarize an article in one sentence (XSum, Narayan et al., 2018).

The data set is `xsum:1.1.0` of TFDS, which cannot download the articles automatically. Create
`xsum-extracts-from-downloads.tar.gz` as https://github.com/EdinburghNLP/XSum describes, put the
file into a folder, and prepare the data set once:

    tfds build xsum --manual_dir=FOLDER --data_dir=TFDS_DATA_DIR

Alternatively, put `{train,validation,test}.jsonl` with `document` and `summary` into the folder
`xsum` of DATA_DIR (`gkd_jax.tasks.tfds_or_files`).
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, tfds_or_files
from gkd_jax.text import text_metrics


PREFIX = "summarize: "  # The prefix of T5's summarization tasks.


@seqio.map_over_dataset
def document_to_summary(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns `inputs` and `targets` of a TFDS example with `document` and `summary`."""
    return {
        "inputs": tf.strings.join([PREFIX, example["document"]]),
        "targets": example["summary"],
    }


features.register(
    "xsum",
    source=tfds_or_files.TfdsOrFiles(
        "xsum:1.1.0",
        family="xsum",
        fields={"inputs": "document", "targets": "summary"},
        hint=(
            "XSum's articles are downloaded by hand (gkd_jax/tasks/xsum.py says how), then: "
            "tfds build xsum --manual_dir=FOLDER. "
        ),
    ),
    preprocessors=[document_to_summary],
    metric_fns=[text_metrics.rouge],
)
