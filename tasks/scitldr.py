"""SciTLDR (Cachola et al., 2020): `scitldr`, a paper's abstract in one sentence.

DATA_DIR holds {train,dev,test}.jsonl of SciTLDR-A (https://github.com/allenai/scitldr), plain or
`.gz`. The training target is the first of a paper's summaries, its authors' (in `train` the only
one). Predictions are scored against all of them, the best by ROUGE-1 counting, as the data set's
authors do.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, folder, jsonl
from gkd_jax.text import text_metrics


TASK = "scitldr"
PREFIX = "summarize: "
FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # one table in memory: seqio shuffles it
    data_dir = folder.data_dir(TASK)
    lines = folder.read_lines(data_dir, FILES[split])
    rows = jsonl.parse(lines, os.path.join(data_dir, FILES[split]), ("source", "target"))
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [PREFIX + _clean(" ".join(row["source"])) for row in rows],
            "targets": [_clean(row["target"][0]) for row in rows],
            # One string: examples have different numbers of references.
            "references": [json.dumps([_clean(text) for text in row["target"]]) for row in rows],
        }
    )


def _clean(text: str) -> str:
    return " ".join(text.split())


def all_references(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | list[str]:
    """seqio's postprocess_fn: a target becomes the list of its example's references."""
    return json.loads(example["references"]) if is_target else text


features.register(
    TASK,
    source=seqio.FunctionDataSource(_dataset, splits=list(FILES)),
    preprocessors=[],
    metric_fns=[text_metrics.rouge],
    postprocess_fn=all_references,
)
