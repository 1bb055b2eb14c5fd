"""RTE (Dagan et al., 2006; GLUE's files): `rte`, does a premise entail a hypothesis?

DATA_DIR, or its folder `rte`, holds train.tsv and dev.tsv (split `validation`), plain or `.gz`,
with a header line: index TAB sentence1 TAB sentence2 TAB label.

    inputs:  premise: <sentence1> hypothesis: <sentence2>
    targets: entailment  or  not_entailment

The form is that of `rewards.Entailment`: a T5 trained on this task can be its classifier, with
`label = 'entailment'`.
"""

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, few_shot, folder
from gkd_jax.text import text_metrics


SPLITS = {"train": "train.tsv", "validation": "dev.tsv"}
LABELS = ("entailment", "not_entailment")


def read_rows(where: str, name: str) -> list[tuple[str, str]]:
    """(inputs, targets) of a file.

    Raises:
        FileNotFoundError: naming file and folder.
        ValueError: naming the file, the line (from 1), and what is wrong with it.
    """
    rows = []
    for number, line in enumerate(folder.read_lines(where, name)[1:], start=2):
        columns = line.split("\t")
        if len(columns) != 4 or columns[3] not in LABELS:
            raise ValueError(
                f"{where}/{name}, line {number}: expected index, two sentences and one of "
                f"{list(LABELS)}, got {line[:80]!r}"
            )
        _, premise, hypothesis, label = columns
        rows.append((f"premise: {premise} hypothesis: {hypothesis}", label))
    if not rows:
        raise ValueError(f"{where}/{name}: expected a header and rows, got none")
    return rows


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # one table in memory: seqio shuffles it
    where = few_shot.family_folder("rte", "rte", "dev.tsv")
    inputs, targets = zip(*read_rows(where, SPLITS[split]), strict=True)
    return tf.data.Dataset.from_tensor_slices({"inputs": list(inputs), "targets": list(targets)})


features.register(
    "rte",
    source=seqio.FunctionDataSource(_dataset, splits=list(SPLITS)),
    preprocessors=[],
    metric_fns=[text_metrics.exact_match],
)
