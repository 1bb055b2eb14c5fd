"""WMT14 English to German as T5 has it: `wmt_t2t_ende_v003` (Raffel et al., 2020)."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

from gkd_jax.tasks import features
from gkd_jax.text import text_metrics


PREFIX = "translate English to German: "


@seqio.map_over_dataset
def english_to_german(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """`inputs` and `targets` of a TFDS example with `en` and `de`."""
    return {"inputs": tf.strings.join([PREFIX, example["en"]]), "targets": example["de"]}


features.register(
    "wmt_t2t_ende_v003",
    source=seqio.TfdsDataSource(tfds_name="wmt_t2t_translate/de-en:1.0.0"),
    preprocessors=[english_to_german],
    metric_fns=[text_metrics.bleu],
)
