"""`flan`: a mixture of instruction files, each in proportion to its size up to a maximum.

DATA_DIR, or its folder `flan`, holds files of instructions, also in folders within, plain or `.gz`:

    *.jsonl  an object a line with `inputs` and `targets`, maybe `task_name`, as in the published
             Flan 2021 submixture (huggingface.co/datasets/conceptofmind/flan2021_submix_original)
    *.tsv    inputs TAB targets; or, as FLAN's chain-of-thought data
             (https://github.com/google-research/FLAN), question TAB answer TAB explanation,
             whose targets are `<explanation> So the answer is <answer>.`; `\\n` is a newline

The examples of one `task_name` are one data set, in whichever files they are; so are those of a
file that gives none. The Flan 2021 submixture, on which the GKD paper trains, mixes in proportion
to size with a maximum of 30,000 a task (Longpre et al., 2023; Wei et al., 2022, had 3,000): `flan`
does. `flan_all` has no maximum: every example once a pass. Both are one seqio task of one stream
and no Mixture, whose parts would have to be known before DATA_DIR is. Other folders and maxima:
`mixture_task`. Split `train`; all files are held in memory.
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
    """Registers a mixture under a name, or returns the task of that name.

    Args:
        name: of the task.
        folder: of the files, local or `gs://`; None is DATA_DIR.
        maximum: a data set of more examples is drawn from as one of so many; None is no maximum.

    Raises:
        ValueError: if maximum is not positive.
    """
    if maximum is not None and maximum < 1:
        raise ValueError(f"maximum must be positive or None, got {maximum}")
    where = None if folder is None else os.fspath(folder)
    return features.register(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, name=name, folder=where, maximum=maximum), splits=["train"]
        ),
        preprocessors=[],
        metric_fns=[text_metrics.exact_match],
    )


def mixed_order(sizes: Sequence[int], maximum: int | None, seed: int) -> np.ndarray:
    """Which example comes when, in one pass over files that lie one behind the other.

    A pass has as many rounds as the largest file needs to be seen whole. In a round a file gives
    `min(size, maximum)` examples, those of all files shuffled: a small file all it has, a larger
    one the next of its own order, which starts again at its end.

    Args:
        sizes: examples of each file, positive.
        maximum: at most so many of a file in a round; None is no maximum.
        seed: of all orders.

    Returns:
        Indices into the files' examples, `rounds * sum(min(size, maximum))` of them.
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
    """Paths of the instruction files in a folder and the folders within, in order.

    Raises:
        FileNotFoundError: naming the folder, if there are none.
    """
    paths = sorted(
        os.path.join(where, name)
        for where, _, names in tf.io.gfile.walk(folder)
        for name in names
        if name.removesuffix(".gz").endswith(ENDINGS)
    )
    if not paths:
        raise FileNotFoundError(f"there is no .jsonl or .tsv file (or .gz of one) in {folder!r}")
    return paths


def read_file(path: str) -> list[dict[str, str]]:
    """`inputs` and `targets` of every line of a JSONL or TSV file, and `task_name` where it is.

    Raises:
        ValueError: naming the file, the line (from 1), and what is wrong with it.
    """
    if ".jsonl" not in os.path.basename(path):
        return _read_tsv(path)
    rows = files.parse_objects(folders.read_lines(*os.path.split(path)), path)
    return [
        {
            key: files.string(row, key, path, number)
            for key in ("inputs", "targets", *(["task_name"] if "task_name" in row else []))
        }
        for number, row in enumerate(rows, start=1)
    ]


def group_by_task(paths: Sequence[str]) -> list[list[dict[str, str]]]:
    """The examples of each data set: those of one `task_name`, else those of one file."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for path in paths:
        for row in read_file(path):
            key = ("task", row["task_name"]) if "task_name" in row else ("file", path)
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def _read_tsv(path: str) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(folders.read_lines(*os.path.split(path)), start=1):
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
    # Mixed here whether or not the stream is shuffled: the first N examples are of all data sets.
    del split, shuffle_files
    where = few_shot.family_folder(name, "flan", "") if folder is None else folder
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
