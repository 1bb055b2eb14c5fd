"""Tasks of JSONL files, which need no registration: MIXTURE_OR_TASK_NAME may be a path.

    data.jsonl, data.jsonl.gz     split `train`; `validation` if there is a file for it beside
    a folder                      train.jsonl, validation.jsonl and test.jsonl, those that are there

What rows may look like is in `rows`. The validation file of `data.jsonl` is the first that exists
of `data.validation.jsonl` and `validation.jsonl`, and that of `x_train.jsonl` also
`x_validation.jsonl`, each plain or `.gz`. Without one, `eval_fraction` holds a share of the rows
out, which are never trained on. Files are read when a dataset is asked for, so that a task can be
named before another run has written its file.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import re
import sys
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.tasks import features, rows
from gkd_jax.text import files, text_metrics, vocabularies


ENDINGS = (".jsonl", ".jsonl.gz")
SPLITS = ("train", "validation", "test")
LONG_PROMPTS = ("skip", "cut")

_said: set[tuple] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the rows of a file become examples.

    Attributes:
        eval_fraction: the share of the training rows that is the split `validation` instead.
        seed: of the choice of these rows, with the row's number.
        long_prompts: what happens to a prompt of more tokens than `limit`: "skip" leaves the row
            out, "cut" keeps the prompt's last tokens.
        limit: most tokens of a prompt; None is no limit.
        template_variables: further names that the chat template reads.
    """

    eval_fraction: float | None = None
    seed: int = 0
    long_prompts: str = "skip"
    limit: int | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction!r}")
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts must be 'skip' or 'cut', got {self.long_prompts!r}")


def is_path(name: str) -> bool:
    """Whether a task's name is a path: of a JSONL file, or of a folder."""
    return name.endswith(ENDINGS) or "/" in name


def display_name(name: str) -> str:
    """What metrics and pages call a task: a path's last part, any other name itself."""
    return os.path.basename(name.rstrip("/")) if is_path(name) else name


def make_task(
    path: str | os.PathLike,
    *,
    vocabulary: seqio.Vocabulary,
    options: Options = Options(),
    metric_fns: Sequence[Callable] = (text_metrics.exact_match,),
) -> seqio.Task:
    """The task of a JSONL file or of a folder of them, not registered.

    Args:
        path: local or `gs://`.
        vocabulary: the model's.
        options: how rows become examples.
        metric_fns: seqio metric functions of `targets` and `predictions`; rows without a target
            do not count.

    Raises:
        FileNotFoundError: if there is no such file, or no split in the folder.
        ValueError: if a share is to be held out and there is a file of the split as well.
    """
    source = JsonlSource(_absolute(path), vocabulary, options)
    return seqio.Task(
        task_name(path),
        source=source,
        output_features=features.output_features(vocabulary),
        preprocessors=[functools.partial(_same_vocabulary, vocabulary=vocabulary)],
        postprocess_fn=_postprocess,
        metric_fns=[_of_rows_with_targets(metric_fn) for metric_fn in metric_fns],
    )


def jsonl_task(
    path: str | os.PathLike,
    *,
    metric_fns: Sequence[Callable] = (text_metrics.exact_match,),
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """`make_task`, registered under a name made from the path: for mixtures.

    Args:
        path: a file or folder; local or `gs://`.
        metric_fns: seqio metric functions of `targets` and `predictions`.
        vocabulary: T5's if None.

    Returns:
        The task; the same one for the same path (its first metrics and vocabulary stay).
    """
    name = task_name(path)
    if name not in seqio.TaskRegistry.names():
        chosen = vocabularies.t5_default() if vocabulary is None else vocabulary
        task = make_task(path, vocabulary=chosen, metric_fns=metric_fns)
        seqio.TaskRegistry.add_provider(name, task)
    return seqio.TaskRegistry.get(name)


def task_name(path: str | os.PathLike) -> str:
    """The name of a file's task: `jsonl_<stem>_<hash of the absolute path>`."""
    absolute = _absolute(path)
    stem = re.sub(r"\W+", "_", os.path.basename(absolute).split(".")[0])
    return f"jsonl_{stem}_{hashlib.sha256(absolute.encode()).hexdigest()[:8]}"


def read_rows(path: str | os.PathLike) -> list[dict[str, str]]:
    """`inputs` and `targets` of every line, of a file in which each line has both.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, the line (from 1), and what is wrong with it.
    """
    objects = files.parse_objects(files.read_lines(path), path, ("inputs", "targets"))
    return [
        {key: files.string(row, key, path, number) for key in ("inputs", "targets")}
        for number, row in enumerate(objects, start=1)
    ]


def is_held_out(index: int, options: Options) -> bool:
    """Whether a training row, counted from 0, is of the share that is held out."""
    if options.eval_fraction is None:
        return False
    digest = hashlib.sha256(f"{options.seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.eval_fraction * 2**64


def find_splits(path: str) -> dict[str, str]:
    """The file of each split of a task's path.

    Raises:
        FileNotFoundError: if the path is a folder without any of the files.
    """
    if path.endswith(ENDINGS):
        validation = _validation_file(path)
        return {"train": path} | ({} if validation is None else {"validation": validation})
    found = {
        split: file
        for split in SPLITS
        if (file := _existing(os.path.join(path, f"{split}.jsonl"))) is not None
    }
    if not found:
        raise FileNotFoundError(
            f"expected a JSONL file or a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)} "
            f"(or .gz of one), found none at {path!r}"
        )
    return found


class JsonlSource(seqio.FunctionDataSource):
    """Where a task's examples come from: files, as ids of one vocabulary, in memory.

    Attributes:
        path: of the task.
        files: of each split.
    """

    def __init__(self, path: str, vocabulary: seqio.Vocabulary, options: Options):
        self.path = path
        self.files = find_splits(path)
        if options.eval_fraction is not None:
            if "train" not in self.files or "validation" in self.files:
                raise ValueError(
                    f"eval_fraction={options.eval_fraction} holds rows of the training file out, "
                    f"but {path!r} has files of its own: {self.files}"
                )
            self.files["validation"] = self.files["train"]
        self._vocabulary, self._options = vocabulary, options
        self._tables: dict[str, list[rows.Example]] = {}
        super().__init__(self._dataset, splits=list(self.files), caching_permitted=False)

    def examples(self, split: str) -> list[rows.Example]:
        """The rows of a split as ids, without those whose prompts are too long.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, the line and what was expected.
        """
        if split not in self._tables:
            self._tables[split] = self._read(split)
        return self._tables[split]

    def first_without_target(self, split: str) -> int | None:
        """The first line of a split (from 1) that is only a prompt; None if all have targets."""
        return next((row.line for row in self.examples(split) if row.target is None), None)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # the stream shuffles what is in memory
        examples = self.examples(split)
        ends = {}
        for name in ("inputs", "targets"):
            ids = [getattr(example, name) for example in examples]
            splits = np.cumsum([0, *map(len, ids)])
            ends[name] = tf.constant(np.concatenate(ids), tf.int32), tf.constant(splits, tf.int64)
        constant = {
            "inputs_pretokenized": tf.constant([example.prompt for example in examples]),
            "targets_pretokenized": tf.constant([example.target or "" for example in examples]),
            "has_target": tf.constant([example.target is not None for example in examples]),
            "chat": tf.constant([example.chat for example in examples]),
            "inputs_tokens": tf.constant([len(example.inputs) for example in examples]),
            "targets_tokens": tf.constant([len(example.targets) for example in examples]),
        }

        def example(index: tf.Tensor) -> dict[str, tf.Tensor]:
            sliced = {
                name: values[splits[index] : splits[index + 1]]
                for name, (values, splits) in ends.items()
            }
            return sliced | {name: column[index] for name, column in constant.items()}

        return tf.data.Dataset.range(len(examples)).map(example)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _read(self, split: str) -> list[rows.Example]:
        path, options = self.files[split], self._options
        read = rows.read(path)
        if options.eval_fraction is not None:
            wanted = split == "validation"
            read = [row for row in read if is_held_out(row.line - 1, options) == wanted]
            if not read:
                files.fault(
                    path,
                    None,
                    f"eval_fraction={options.eval_fraction} of its rows leaves none for {split!r}",
                )
        examples = rows.tokenize(read, self._vocabulary, path, options.template_variables)
        return self._fitting(examples, split)

    def _fitting(self, examples: list[rows.Example], split: str) -> list[rows.Example]:
        """Without the prompts that are longer than the limit, or with their last tokens only."""
        path, limit = self.files[split], self._options.limit
        if limit is None:
            return examples
        long = sum(len(example.inputs) > limit for example in examples)
        if not long:
            return examples
        skips = self._options.long_prompts == "skip"
        share = f"{long} of {len(examples)} prompts ({100 * long / len(examples):.1f} %)"
        if skips and long == len(examples):
            files.fault(path, None, f"all {long} prompts are longer than {limit} tokens")
        if (path, split, limit, skips) not in _said:
            _said.add((path, split, limit, skips))
            print(
                f"WARNING: {path}, split {split!r}: {share} are longer than {limit} tokens and "
                f"{'skipped' if skips else 'cut from the left'}. TASK_FEATURE_LENGTHS sets the "
                "length, LONG_PROMPTS what happens ('skip', 'cut').",
                file=sys.stderr,
            )
        if skips:
            return [example for example in examples if len(example.inputs) <= limit]
        return [
            example._replace(inputs=rows.cut(example.inputs, limit, self._vocabulary))
            for example in examples
        ]


def _validation_file(path: str) -> str | None:
    where, name = os.path.split(path)
    stem = name.removesuffix(".gz").removesuffix(".jsonl")
    candidates = [f"{stem}.validation.jsonl", "validation.jsonl"]
    if re.search(r"(^|[._-])train$", stem):
        candidates.insert(0, f"{stem.removesuffix('train')}validation.jsonl")
    found = (_existing(os.path.join(where, candidate)) for candidate in candidates)
    return next((file for file in found if file is not None and file != path), None)


def _existing(path: str) -> str | None:
    """The path itself, or with `.gz`, whichever exists."""
    return next((p for p in (path, f"{path}.gz") if tf.io.gfile.exists(p)), None)


def _postprocess(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> str | None:
    """seqio's postprocess_fn: a row without a target has None in its place."""
    return None if is_target and not example["has_target"] else text


def _same_vocabulary(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    *,
    vocabulary: seqio.Vocabulary,
) -> tf.data.Dataset:
    """Refuses a task that was copied with another vocabulary: its examples are ids already."""
    if output_features["targets"].vocabulary is not vocabulary:
        raise ValueError(
            "the task of a JSONL file has the vocabulary it was made with; make it again with "
            "another (make_task), in place of replacing its features"
        )
    return dataset


def _of_rows_with_targets(metric_fn: Callable) -> Callable:
    """A metric function that leaves out rows whose target is None; of none there is no number."""

    @functools.wraps(metric_fn)
    def of_those(targets, predictions):
        kept = [
            (target, prediction)
            for target, prediction in zip(targets, predictions, strict=True)
            if target is not None
        ]
        return metric_fn(*map(list, zip(*kept, strict=True))) if kept else {}

    return of_those


def _absolute(path: str | os.PathLike) -> str:
    name = os.fspath(path)
    return name if "://" in name else os.path.abspath(os.path.expanduser(name))
