"""The task `scitldr`: summarize a paper's abstract in one sentence (SciTLDR, Cachola et al., 2020).

DATA_DIR must hold {train,dev,test}.jsonl of SciTLDR-A (https://github.com/allenai/scitldr), plain
or as `.gz`. The target is the first summary of a paper, which the paper's authors wrote; the split
`train` has only this summary. Predictions are scored against all summaries of a paper, of which the
one with the best ROUGE-1 counts, as in the evaluation of the data set's authors.
"""

from collections.abc import Mapping
import json
import os
from typing import Any

from gkd_jax.tasks import features, folder
from gkd_jax.tasks.few_shot import one_line
from gkd_jax.text import files, text_metrics


TASK = "scitldr"
PREFIX = "summarize: "
FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}


def _columns(split: str) -> dict[str, list[str]]:
    data_dir = folder.data_dir(TASK)
    path = os.path.join(data_dir, FILES[split])
    rows = []
    parsed = files.parse_objects(folder.read_lines(data_dir, FILES[split]), path)
    for number, row in enumerate(parsed, start=1):
        with files.faults_in(path, number):
            source, target = _texts(row, "source"), _texts(row, "target")
        rows.append((PREFIX + one_line(" ".join(source)), [one_line(text) for text in target]))
    return {
        "inputs": [inputs for inputs, _ in rows],
        "targets": [references[0] for _, references in rows],
        # JSON in one string, because examples have different numbers of references.
        "references": [json.dumps(references) for _, references in rows],
    }


def _texts(row: dict[str, Any], key: str) -> list[str]:
    """Returns the list of strings under a key; raises ValueError for any other value."""
    texts = row.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{key!r} must be a list of strings, got {str(texts)[:60]!r}")
    return texts


def all_references(
    text: str, *, example: Mapping[str, Any], is_target: bool = False
) -> str | list[str]:
    """Returns all references of an example for a target, and a prediction unchanged.

    This is a seqio postprocess_fn.
    """
    return json.loads(example["references"]) if is_target else text


features.register(
    TASK,
    source=features.Table(_columns, FILES),
    metric_fns=[text_metrics.rouge],
    postprocess_fn=all_references,
)
