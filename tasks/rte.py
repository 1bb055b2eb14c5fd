"""The task `rte`: whether a premise entails a hypothesis (RTE, Dagan et al., 2006; files of GLUE).

DATA_DIR, or its folder `rte`, must hold train.tsv and dev.tsv (the split `validation`), plain or as
`.gz`. A file has a header line and the columns index, sentence1, sentence2 and label.

    inputs:  premise: <sentence1> hypothesis: <sentence2>
    targets: entailment  or  not_entailment

`rewards.Entailment` uses the same form of inputs: a T5 that was trained on this task can be its
classifier, with `label = 'entailment'`.
"""

from gkd_jax.tasks import features, folder
from gkd_jax.text import text_metrics


SPLITS = {"train": "train.tsv", "validation": "dev.tsv"}
LABELS = ("entailment", "not_entailment")


def read_rows(where: str, name: str) -> list[tuple[str, str]]:
    """Returns (inputs, targets) of each row of a file.

    Raises:
        FileNotFoundError: if the file is missing; the message names the file and the folder.
        ValueError: if a row is not as expected; the message names the file and the line.
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


def _columns(split: str) -> dict[str, list[str]]:
    where = folder.family_folder("rte", "rte", "dev.tsv")
    inputs, targets = zip(*read_rows(where, SPLITS[split]), strict=True)
    return {"inputs": list(inputs), "targets": list(targets)}


features.register(
    "rte",
    source=features.Table(_columns, SPLITS),
    metric_fns=[text_metrics.exact_match],
)
