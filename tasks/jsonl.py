"""Makes tasks from JSONL files; MIXTURE_OR_TASK_NAME may be a path instead of a registered name.

    data.jsonl, data.jsonl.gz     the split `train`, and `validation` if a validation file exists
    a folder                      train.jsonl, validation.jsonl and test.jsonl, as far as they exist

The module `rows` describes the forms of rows. The validation file of `data.jsonl` is the first of
`data.validation.jsonl` and `validation.jsonl` that exists, plain or as `.gz`; for `x_train.jsonl`,
`x_validation.jsonl` is looked for first. If there is no validation file, `eval_fraction` holds out
a share of the rows, which are never trained on. Files are read only when a dataset is requested, so
that a configuration can name a file that another run will write.

A path may end in ":" and a value of the field `teacher`, such as `data.jsonl:mathematics`: the task
has the rows with this value (`gkd_jax.text.task_names`).
"""

from collections.abc import Mapping, Sequence
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
from gkd_jax.text import files, task_names, text_metrics


SPLITS = ("train", "validation", "test")
LONG_PROMPTS = ("skip", "cut")

_said: set[tuple] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings for turning the rows of a file into examples.

    Attributes:
        eval_fraction: the share of the training rows that is held out as the split `validation`;
            None holds out no rows.
        seed: the seed of the choice of held-out rows.
        long_prompts: what happens to a prompt with more tokens than `limit`: "skip" leaves the row
            out, "cut" keeps the last tokens of the prompt.
        limit: the largest number of tokens of a prompt; None means no limit.
        template_variables: further variables of the chat template.
        teacher_limit: the largest number of tokens of a teacher's own prompt; None if examples have
            no such prompts.
        teacher_template: the template of these prompts (see `gkd_jax.text.teacher_template`).
        teachers: all values that the field `teacher` of the rows may have, for a path that selects
            rows by this field. () allows any.
    """

    eval_fraction: float | None = None
    seed: int = 0
    long_prompts: str = "skip"
    limit: int | None = None
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher_limit: int | None = None
    teacher_template: str | None = None
    teachers: tuple[str, ...] = ()

    def __post_init__(self):
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction!r}")
        if self.long_prompts not in LONG_PROMPTS:
            raise ValueError(f"long_prompts must be 'skip' or 'cut', got {self.long_prompts!r}")


def make_task(
    path: str | os.PathLike,
    *,
    vocabulary: seqio.Vocabulary,
    options: Options = Options(),
) -> seqio.Task:
    """Returns the task of a JSONL file or of a folder of JSONL files, without registering it.

    Args:
        path: the file or folder, local or `gs://`, perhaps with a selection of rows.
        vocabulary: the vocabulary of the model.
        options: settings for turning rows into examples.

    Raises:
        FileNotFoundError: if the folder has no file of any split.
        ValueError: if rows are to be held out although there is a validation file, or no training
            file.
    """
    source = JsonlSource(_absolute(path), vocabulary, options)
    return seqio.Task(
        task_name(path),
        source=source,
        output_features=features.output_features(
            vocabulary, with_teacher=options.teacher_limit is not None
        ),
        preprocessors=[functools.partial(_same_vocabulary, vocabulary=vocabulary)],
        postprocess_fn=_postprocess,
        metric_fns=[_exact_match],
    )


def task_name(path: str | os.PathLike) -> str:
    """Returns the name of the task of a path: `jsonl_<stem>_<hash of the absolute path>`."""
    absolute = _absolute(path)
    stem = re.sub(r"\W+", "_", os.path.basename(absolute).split(".")[0])
    return f"jsonl_{stem}_{hashlib.sha256(absolute.encode()).hexdigest()[:8]}"


def is_held_out(index: int, options: Options) -> bool:
    """Returns whether a training row is held out for validation.

    The decision depends only on the seed and the row, so it is the same in every run and process.

    Args:
        index: the index of the row, counted from 0.
        options: the settings `eval_fraction` and `seed`.
    """
    if options.eval_fraction is None:
        return False
    digest = hashlib.sha256(f"{options.seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < options.eval_fraction * 2**64


def find_splits(path: str) -> dict[str, str]:
    """Returns the file of each split, by the name of the split.

    Args:
        path: the path of a JSONL file or of a folder.

    Raises:
        FileNotFoundError: if the path is a folder without a file of any split.
        ValueError: if the path is a file whose name has another ending.
    """
    if path.endswith(task_names.ENDINGS):
        validation = _validation_file(path)
        return {"train": path} | ({} if validation is None else {"validation": validation})
    found = {
        split: file
        for split in SPLITS
        if (file := _existing(os.path.join(path, f"{split}.jsonl"))) is not None
    }
    if not found and os.path.isfile(path):
        raise ValueError(
            f"the name of a file with one JSON object a line must end in "
            f"{' or '.join(task_names.ENDINGS)}, got {path!r}"
        )
    if not found:
        raise FileNotFoundError(
            f"expected a JSONL file or a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)} "
            f"(or .gz of one), found none at {path!r}"
        )
    return found


class JsonlSource(seqio.FunctionDataSource):
    """A seqio source that tokenizes the rows of JSONL files and keeps the examples in memory.

    Attributes:
        path: the path of the file or folder, perhaps with a selection of rows.
        files: the file of each split.
    """

    def __init__(self, path: str, vocabulary: seqio.Vocabulary, options: Options):
        self.path = path
        folder, self._teacher = task_names.split(path)
        self.files = find_splits(folder)
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
        """Returns the tokenized rows of a split; long prompts are cut or left out.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a row is not as expected (the message names the file and the line), or if
                no rows remain.
        """
        if split not in self._tables:
            self._tables[split] = self._read(split)
        return self._tables[split]

    def first_without_target(self, split: str) -> int | None:
        """Returns the number of the first line without a target; None if all lines have targets.

        Lines are counted from 1.
        """
        return next((row.line for row in self.examples(split) if row.target is None), None)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        # The dataset is a table in memory, which its reader shuffles.
        del shuffle_files, seed
        examples = self.examples(split)
        ends = {}
        has_own = self._options.teacher_limit is not None
        for name in ("inputs", "targets", *(["teacher_inputs"] if has_own else [])):
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
        if has_own:
            prompts = tf.constant([example.teacher_prompt for example in examples])
            lengths = tf.constant([_length(example, "teacher_inputs") for example in examples])
            constant |= {
                "teacher_inputs_pretokenized": prompts,
                "teacher_inputs_tokens": lengths,
            }

        def example(index: tf.Tensor) -> dict[str, tf.Tensor]:
            sliced = {
                name: values[splits[index] : splits[index + 1]]
                for name, (values, splits) in ends.items()
            }
            return sliced | {name: column[index] for name, column in constant.items()}

        return tf.data.Dataset.range(len(examples)).map(example)

    # A pickled source reads its files again instead of carrying the examples.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _read(self, split: str) -> list[rows.Example]:
        """Reads and tokenizes the rows of a split; held-out rows belong to `validation` only."""
        path, options = self.files[split], self._options
        read = rows.read(path)
        if self._teacher is not None:
            read = rows.of_teacher(read, path, self._teacher, options.teachers)
        elif (path, "teacher") not in _said and any(isinstance(row.teacher, str) for row in read):
            _said.add((path, "teacher"))
            part = self.path + (":NAME" if self.path.endswith(task_names.ENDINGS) else "/:NAME")
            print(
                f"WARNING: {path} has rows that name their teacher, which is left alone: the task "
                f"{part!r} has the rows of one teacher.",
                file=sys.stderr,
            )
        if options.eval_fraction is not None:
            wanted = split == "validation"
            read = [row for row in read if is_held_out(row.line - 1, options) == wanted]
            if not read:
                files.fault(
                    path,
                    None,
                    f"eval_fraction={options.eval_fraction} of its rows leaves none for {split!r}",
                )
        has_own = any(row.teacher_prompt is not None for row in read)
        asked = options.teacher_limit is not None
        if asked and options.teacher_template is None and not has_own and split == "train":
            files.fault(
                path,
                None,
                "TASK_FEATURE_LENGTHS has 'teacher_inputs', and no line has 'teacher_inputs' or "
                "'teacher_messages'",
            )
        if has_own and not asked and (path, "teacher_inputs") not in _said:
            _said.add((path, "teacher_inputs"))
            print(
                f"WARNING: {path} has prompts for the teacher, which are left alone: "
                "TASK_FEATURE_LENGTHS has no length for 'teacher_inputs'.",
                file=sys.stderr,
            )
        examples = rows.tokenize(
            read,
            self._vocabulary,
            path,
            options.template_variables,
            with_teacher=asked,
            template=options.teacher_template,
        )
        examples = self._fitting(examples, split, "inputs", options.limit)
        return self._fitting(examples, split, "teacher_inputs", options.teacher_limit)

    def _fitting(
        self, examples: list[rows.Example], split: str, name: str, limit: int | None
    ) -> list[rows.Example]:
        """Applies `long_prompts` to the prompts of one feature that are longer than the limit.

        A warning tells once how many prompts are too long.

        Raises:
            ValueError: if every prompt would be left out.
        """
        path = self.files[split]
        if limit is None:
            return examples
        long = sum(_length(example, name) > limit for example in examples)
        if not long:
            return examples
        skips = self._options.long_prompts == "skip"
        whose = "of the teacher " if name == "teacher_inputs" else ""
        share = f"{long} of {len(examples)} prompts {whose}({100 * long / len(examples):.1f} %)"
        if skips and long == len(examples):
            files.fault(path, None, f"all {long} prompts {whose}are longer than {limit} tokens")
        if (path, split, name, limit, skips) not in _said:
            _said.add((path, split, name, limit, skips))
            print(
                f"WARNING: {path}, split {split!r}: {share} are longer than {limit} tokens and "
                f"{'skipped' if skips else 'cut from the left'}. TASK_FEATURE_LENGTHS sets the "
                "length, LONG_PROMPTS what happens ('skip', 'cut').",
                file=sys.stderr,
            )
        if skips:
            return [example for example in examples if _length(example, name) <= limit]
        return [
            example._replace(**{name: rows.cut(getattr(example, name), limit, self._vocabulary)})
            for example in examples
        ]


def _length(example: rows.Example, name: str) -> int:
    """Returns the number of tokens of a feature."""
    return len(getattr(example, name))


def _validation_file(path: str) -> str | None:
    """Returns the validation file of a training file; None if there is none."""
    where, name = os.path.split(path)
    stem = name.removesuffix(".gz").removesuffix(".jsonl")
    candidates = [f"{stem}.validation.jsonl", "validation.jsonl"]
    if re.search(r"(^|[._-])train$", stem):
        candidates.insert(0, f"{stem.removesuffix('train')}validation.jsonl")
    found = (_existing(os.path.join(where, candidate)) for candidate in candidates)
    return next((file for file in found if file is not None and file != path), None)


def _existing(path: str) -> str | None:
    """Returns `path` or `path`.gz, whichever exists; None if neither exists."""
    return next((p for p in (path, f"{path}.gz") if tf.io.gfile.exists(p)), None)


def _postprocess(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> str | None:
    """Returns None for the target of a row without a target, and any other text unchanged.

    This is a seqio postprocess_fn.
    """
    return None if is_target and not example["has_target"] else text


def _same_vocabulary(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    *,
    vocabulary: seqio.Vocabulary,
) -> tf.data.Dataset:
    """Raises ValueError if the task was copied with another vocabulary.

    The source tokenizes the examples with its own vocabulary, so the copy would have wrong ids.
    """
    if output_features["targets"].vocabulary is not vocabulary:
        raise ValueError(
            "the task of a JSONL file has the vocabulary it was made with; make it again with "
            "another (make_task), in place of replacing its features"
        )
    return dataset


def _exact_match(targets: Sequence[str | None], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the exact match of the rows that have a target; {} if none has."""
    kept = [
        (target, prediction)
        for target, prediction in zip(targets, predictions, strict=True)
        if target is not None
    ]
    return text_metrics.exact_match(*zip(*kept, strict=True)) if kept else {}


def _absolute(path: str | os.PathLike) -> str:
    name = os.fspath(path)
    return name if "://" in name else os.path.abspath(os.path.expanduser(name))
