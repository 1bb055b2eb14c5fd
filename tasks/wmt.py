"""The task `wmt_t2t_ende_v003`: WMT14 English to German as in T5 (Raffel et al., 2020).

The data set is `wmt_t2t_translate/de-en:1.0.0` of TFDS, or the files
`{train,validation,test}.jsonl` with `en` and `de` in the folder `wmt` of DATA_DIR
(`gkd_jax.tasks.tfds_or_files`).
"""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, tfds_or_files
from gkd_jax.text import text_metrics


PREFIX = "translate English to German: "


@seqio.map_over_dataset
def english_to_german(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns `inputs` and `targets` of a TFDS example with `en` and `de`."""
    return {"inputs": tf.strings.join([PREFIX, example["en"]]), "targets": example["de"]}


features.register(
    "wmt_t2t_ende_v003",
    source=tfds_or_files.TfdsOrFiles(
        "wmt_t2t_translate/de-en:1.0.0", family="wmt", fields={"inputs": "en", "targets": "de"}
    ),
    preprocessors=[english_to_german],
    metric_fns=[text_metrics.bleu],
)
