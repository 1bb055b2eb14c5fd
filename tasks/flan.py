"""The tasks `flan` and `flan_all`: mixtures of instruction data in proportion to size.

DATA_DIR, or its folder `flan`, must hold the files, plain or as `.gz`; subfolders are read too:

    *.jsonl  one object per line with `inputs`, `targets` and optionally `task_name`, as in the
             published Flan 2021 submixture
             (huggingface.co/datasets/conceptofmind/flan2021_submix_original)
    *.tsv    inputs TAB targets; or question TAB answer TAB explanation, as in FLAN's
             chain-of-thought data (https://github.com/google-research/FLAN), whose targets become
             `<explanation> So the answer is <answer>.`; `\\n` stands for a newline

All examples with the same `task_name` are one data set, even in several files. The examples of a
file without `task_name` are one data set too. `flan` mixes the data sets in proportion to their
sizes, where no size counts as more than 30,000. The Flan 2021 submixture, on which the GKD paper
trains, has this maximum (Longpre et al., 2023; Wei et al., 2022, used 3,000). `flan_all` has no
maximum, so that a pass has every example once. `mixture_task` registers mixtures of other folders
and with other maxima.

A mixture is one seqio task rather than a seqio Mixture, because the parts of a Mixture would have
to be known before DATA_DIR is known. The only split is `train`. All files are held in memory.
"""

from collections.abc import Sequence
import functools
import os

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.tasks import features, few_shot
from gkd_jax.tasks import folder as folders
from gkd_jax.text import files, text_metrics


MAXIMUM = 30_000
ENDINGS = (".jsonl", ".tsv")


def mixture_task(
    name: str, *, folder: str | os.PathLike | None = None, maximum: int | None = MAXIMUM
) -> seqio.Task:
    """Registers a mixture as a task and returns the task, or the task that has this name already.

    Args:
        name: the task's name.
        folder: the folder of the files, local or `gs://`; None means DATA_DIR.
        maximum: the size that counts for a data set with more examples; None means no maximum.

    Raises:
        ValueError: if `maximum` is not positive.
    """
    if maximum is not None and maximum < 1:
        raise ValueError(f"maximum must be positive or None, got {maximum}")
    where = None if folder is None else os.fspath(folder)
    return features.register(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, name=name, folder=where, maximum=maximum), splits=["train"]
        ),
        metric_fns=[text_metrics.exact_match],
    )


def mixed_order(sizes: Sequence[int], maximum: int | None, seed: int) -> np.ndarray:
    """Returns the order of examples in one pass over several data sets.

    A pass consists of rounds. In each round, every data set contributes `min(size, maximum)`
    examples, and the examples of the round are shuffled. A small data set contributes all of its
    examples; a larger one contributes the next examples of its own random order, which starts again
    at its end. A pass has as many rounds as the largest data set needs to contribute all of its
    examples.

    Args:
        sizes: the number of examples of each data set, at least 1.
        maximum: the largest number of examples of a data set in a round; None means no maximum.
        seed: the seed of all random orders.

    Returns:
        Indices into the concatenated data sets, `rounds * sum(min(size, maximum))` of them.
    """
    rng = np.random.default_rng(seed)
    shares = [size if maximum is None else min(size, maximum) for size in sizes]
    starts = np.cumsum([0, *sizes[:-1]])
    orders = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=True)]
    rounds = max(-(-size // share) for size, share in zip(sizes, shares, strict=True))
    parts = []
    for number in range(rounds):
        turn = [
            np.take(order, np.arange(number * share, (number + 1) * share), mode="wrap")
            for order, share in zip(orders, shares, strict=True)
        ]
        parts.append(rng.permutation(np.concatenate(turn)))
    return np.concatenate(parts)


def find_files(folder: str) -> list[str]:
    """Returns the sorted paths of the instruction files in a folder and its subfolders.

    Raises:
        FileNotFoundError: if there are no such files; the message names the folder.
        ValueError: if a file is there both plain and as `.gz`.
    """
    found = (
        folders.existing(os.path.join(where, name.removesuffix(".gz")))
        for where, _, names in tf.io.gfile.walk(folder)
        for name in names
        if name.removesuffix(".gz").endswith(ENDINGS)
    )
    paths = sorted(filter(None, found))
    if not paths:
        raise FileNotFoundError(f"there is no .jsonl or .tsv file (or .gz of one) in {folder!r}")
    return paths


def read_file(path: str) -> list[dict[str, str]]:
    """Returns `inputs`, `targets` and, if stated, `task_name` of every line of a file.

    Args:
        path: a JSONL or TSV file.

    Raises:
        ValueError: if a line is not as expected; the message names the file and the line.
    """
    if ".jsonl" not in os.path.basename(path):
        return _read_tsv(path)
    found = []
    rows = files.read_objects(path)
    for number, row in enumerate(rows, start=1):
        keys = ("inputs", "targets", *(["task_name"] if "task_name" in row else []))
        with files.faults_in(path, number):
            features.check_complete(row)
            found.append({key: files.string(row, key) for key in keys})
    return found


def group_by_task(paths: Sequence[str]) -> list[list[dict[str, str]]]:
    """Returns the examples of each data set.

    A data set has the examples with the same `task_name`, or the examples of one file without it.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for path in paths:
        for row in read_file(path):
            key = ("task", row["task_name"]) if "task_name" in row else ("file", path)
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def _read_tsv(path: str) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(files.read_lines(path), start=1):
        columns = [few_shot.one_line(text.replace("\\n", "\n")) for text in line.split("\t")]
        if len(columns) not in (2, 3) or not all(columns):
            raise ValueError(
                f"{path}, line {number}: expected 2 or 3 columns with text, got {line[:80]!r}"
            )
        inputs, answer = columns[:2]
        targets = answer if len(columns) == 2 else f"{columns[2]} So the answer is {answer}."
        rows.append({"inputs": inputs, "targets": targets})
    if not rows:
        raise ValueError(f"{path}: expected 2 or 3 columns a line, got an empty file")
    return rows


def _dataset(
    split: str,
    shuffle_files: bool,
    seed: int | None = None,
    *,
    name: str,
    folder: str | None,
    maximum: int | None,
) -> tf.data.Dataset:
    # The data sets are mixed even if the stream is not shuffled, so that the first N examples come
    # from all data sets.
    del split, shuffle_files
    where = folders.family_folder(name, "flan", "") if folder is None else folder
    groups = group_by_task(find_files(where))
    order = mixed_order([len(rows) for rows in groups], maximum, seed or 0)
    table = {
        key: tf.constant([row[key] for rows in groups for row in rows])
        for key in ("inputs", "targets")
    }
    return tf.data.Dataset.from_tensor_slices(order).map(
        lambda index: {key: column[index] for key, column in table.items()}
    )


mixture_task("flan")
mixture_task("flan_all", maximum=None)
