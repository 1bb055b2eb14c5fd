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

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import os
import re
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.input import fit, row_ids, rows
from gkd_jax.input.data import TEACHER_INPUTS, DataConfig
from gkd_jax.input.row_ids import Example
from gkd_jax.tasks import features  # pyright: ignore[reportMissingImports]
from gkd_jax.tasks import folder as data_folder  # pyright: ignore[reportMissingImports]
from gkd_jax.tasks.features import Row  # pyright: ignore[reportMissingImports]
from gkd_jax.text import files, task_names, text_metrics


SPLITS = ("train", "validation", "test")
_TEXTS = {"inputs": "prompt", "targets": "target", TEACHER_INPUTS: "teacher_prompt"}


def make_task(
    config: DataConfig,
    vocabulary: seqio.Vocabulary,
    *,
    teachers: Sequence[str] = (),
    check_remote: bool = True,
) -> seqio.Task:
    """Returns the task of a JSONL file or of a folder of JSONL files, without registering it.

    Args:
        teachers: all values that the field `teacher` of the rows may have, for a path that selects
            rows by this field. () allows any.
        check_remote: whether a remote path may be looked at; without looking, every file that can
            be there counts as existing.

    Raises:
        FileNotFoundError: if the folder has no file of any split.
        ValueError: if rows are to be held out although there is a validation file, or no training
            file.
    """
    assert isinstance(config.task, str)
    path = config.task
    if not files.is_remote(path):
        path = os.path.abspath(os.path.expanduser(path))
    splits = _splits(path, config.eval_fraction, check_remote)
    source = JsonlSource(path, splits, vocabulary, config, teachers)
    return seqio.Task(
        task_name(path),
        source=source,
        output_features=features.output_features(
            vocabulary, with_teacher=config.has_teacher_inputs
        ),
        preprocessors=source.preprocessors,
        postprocess_fn=_postprocess,
        metric_fns=[_exact_match],
    )


def task_name(path: str) -> str:
    """Returns the name of the task of an absolute path: `jsonl_<stem>_<hash of the path>`."""
    stem = re.sub(r"\W+", "_", os.path.basename(path).split(".")[0])
    return f"jsonl_{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _splits(path: str, eval_fraction: float | None, check_remote: bool) -> dict[str, str]:
    """Returns the file of each split; the split that is held out has the training file."""
    where, _ = task_names.split(path)
    if files.is_remote(path) and not check_remote:
        is_file = where.endswith(task_names.ENDINGS)
        return {split: where if is_file else f"{where}/{split}.jsonl" for split in SPLITS}
    found = find_splits(where)
    if eval_fraction is None:
        return found
    if "train" not in found or "validation" in found:
        raise ValueError(
            f"eval_fraction={eval_fraction} holds rows of the training file out, "
            f"but {path!r} has files of its own: {found}; "
            "with --gin.EVAL_FRACTION=None these are read as they are"
        )
    return {**found, "validation": found["train"]}


def find_splits(path: str) -> dict[str, str]:
    """Returns the file of each split of a JSONL file or of a folder, by the name of the split.

    Raises:
        FileNotFoundError: if the path is a folder without a file of any split.
        ValueError: if the path is a file whose name has another ending, or if a file of a split is
            there both plain and as `.gz`.
    """
    if path.endswith(task_names.ENDINGS):
        validation = _validation_file(path)
        return {"train": path} | ({} if validation is None else {"validation": validation})
    found = {
        split: file
        for split in SPLITS
        if (file := data_folder.existing(os.path.join(path, f"{split}.jsonl"))) is not None
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


class JsonlSource(features.RowSource):
    """A seqio source that tokenizes the rows of JSONL files and keeps the examples in memory."""

    def __init__(
        self,
        path: str,
        splits: dict[str, str],
        vocabulary: seqio.Vocabulary,
        config: DataConfig,
        teachers: Sequence[str],
    ):
        self.path, self.files = path, splits  # a file or folder; the file of each split
        _, self._teacher = task_names.split(path)
        self._teachers = teachers
        self._vocabulary, self._config = vocabulary, config
        self._examples: dict[str, list[Example]] = {}
        self.preprocessors = (self._checked,)
        super().__init__(self._dataset, splits=list(self.files), caching_permitted=False)

    # A pickled source reads its files again instead of carrying the examples.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_examples": {}}

    def examples(self, split: str) -> list[Example]:
        """Returns the tokenized rows of a split; long prompts are cut or left out.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a row is not as expected (the message names the file and the line), or if
                no rows remain.
        """
        if split not in self._examples:
            self._examples[split] = self._tokenized(self._rows(split), split)
        return self._examples[split]

    def num_input_examples(self, split: str) -> int:
        return len(self.examples(split))

    def read_rows(self, split: str) -> Iterator[Row]:
        """Yields the examples of a split, as a task of this source has them."""
        for example in self.examples(split):
            row: Row = {"has_target": example.target is not None}
            row["chat"] = example.chat.encode()
            for name in self._config.features():
                ids, text = getattr(example, name), getattr(example, _TEXTS[name]) or ""
                row |= {name: ids, f"{name}_tokens": len(ids)}
                row[f"{name}_pretokenized"] = text.encode()
            yield row

    def finish(
        self, rows: Sequence[Row], output_features: Mapping[str, Any], lengths: Mapping[str, int]
    ) -> list[Row]:
        """Returns the rows, cut to the lengths; a feature without a length is not cut."""
        self._check_vocabulary(output_features)
        return [
            row | {name: row[name][: lengths.get(name)] for name in output_features} for row in rows
        ]

    def _checked(
        self, dataset: tf.data.Dataset, output_features: Mapping[str, Any]
    ) -> tf.data.Dataset:
        """A preprocessor that changes nothing: seqio calls it with the features of the task."""
        self._check_vocabulary(output_features)
        return dataset

    def _check_vocabulary(self, output_features: Mapping[str, Any]) -> None:
        """Raises ValueError if the task was copied with another vocabulary.

        The rows are tokenized with the vocabulary of the source, so the copy would have wrong ids.
        """
        if output_features["targets"].vocabulary is not self._vocabulary:
            raise ValueError(
                "the task of a JSONL file has the vocabulary it was made with; make it again with "
                "another (make_task), in place of replacing its features"
            )

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        # The dataset is a table in memory, which its reader shuffles.
        del shuffle_files, seed
        found = list(self.read_rows(split))
        ragged: Any = tf.RaggedTensor  # pyright does not see its class methods

        def column(name: str) -> Any:
            values = [row[name] for row in found]
            if name not in self._config.features():
                return tf.constant(values)
            return ragged.from_row_lengths(np.concatenate(values), [len(ids) for ids in values])

        columns = {name: column(name) for name in found[0]}
        return tf.data.Dataset.range(len(found)).map(
            lambda index: {name: values[index] for name, values in columns.items()}
        )

    def _rows(self, split: str) -> list[rows.FileRow]:
        """Returns the rows of a split; held-out rows belong to `validation` only."""
        path, config = self.files[split], self._config
        found = rows.read(path)
        if self._teacher is not None:
            found = rows.of_teacher(found, path, self._teacher, self._teachers)
        elif any(isinstance(row.teacher, str) for row in found):
            part = self.path + (":NAME" if self.path.endswith(task_names.ENDINGS) else "/:NAME")
            fit.warn(
                f"{path} has rows that name their teacher, which is left alone: the task {part!r} "
                "has the rows of one teacher."
            )
        if config.eval_fraction is None:
            return found
        wanted = split == "validation"
        kept = [row for row in found if _is_held_out(row, config) == wanted]
        if not kept:
            files.fault(
                path,
                None,
                f"eval_fraction={config.eval_fraction} of its rows leaves none for {split!r}, of "
                f"{len(found)}: {'raise' if wanted else 'lower'} EVAL_FRACTION, or give more rows",
            )
        return kept

    def _tokenized(self, found: list[rows.FileRow], split: str) -> list[Example]:
        """Returns the examples of a split, whose prompts have the lengths of the configuration."""
        path, config = self.files[split], self._config
        has_own = any(row.teacher_prompt is not None for row in found)
        asked = config.has_teacher_inputs
        if asked and config.teacher_template is None and not has_own and split == "train":
            files.fault(
                path,
                None,
                "TASK_FEATURE_LENGTHS has 'teacher_inputs', and no line has 'teacher_inputs' or "
                "'teacher_messages'",
            )
        if has_own and not asked:
            fit.warn(
                f"{path} has prompts for the teacher, which are left alone: TASK_FEATURE_LENGTHS "
                "has no length for 'teacher_inputs'."
            )
        made = row_ids.tokenize(
            found,
            self._vocabulary,
            path,
            config.template_variables,
            with_teacher=asked,
            template=config.teacher_template,
        )
        for name in ("inputs", TEACHER_INPUTS) if asked else ("inputs",):
            made = row_ids.fitting(
                made,
                name,
                config.feature_lengths[name],
                self._vocabulary,
                skips=config.long_prompts == "skip",
                where=f"{path}, split {split!r}",
                advice="TASK_FEATURE_LENGTHS sets the length, LONG_PROMPTS what happens ('skip', "
                "'cut').",
            )
        return made


def _is_held_out(row: rows.FileRow, config: DataConfig) -> bool:
    """Returns whether a training row is held out for validation.

    The decision depends only on the seed and the line, so it is the same in every run and process.
    """
    assert config.eval_fraction is not None
    digest = hashlib.sha256(f"{config.seed}:{row.line - 1}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.eval_fraction * 2**64


def _validation_file(path: str) -> str | None:
    """Returns the validation file of a training file; None if there is none."""
    where, name = os.path.split(path)
    stem = name.removesuffix(".gz").removesuffix(".jsonl")
    candidates = [f"{stem}.validation.jsonl", "validation.jsonl"]
    if re.search(r"(^|[._-])train$", stem):
        candidates.insert(0, f"{stem.removesuffix('train')}validation.jsonl")
    found = (data_folder.existing(os.path.join(where, candidate)) for candidate in candidates)
    return next((file for file in found if file is not None and file != path), None)


def _postprocess(text: str, *, example: Mapping[str, Any], is_target: bool = False) -> str | None:
    """Returns None for the target of a row without a target, and any other text unchanged.

    This is a seqio postprocess_fn.
    """
    return None if is_target and not example["has_target"] else text


def _exact_match(targets: Sequence[str | None], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the exact match of the rows that have a target; {} if none has."""
    kept = [
        (target, prediction)
        for target, prediction in zip(targets, predictions, strict=True)
        if target is not None
    ]
    return text_metrics.exact_match(*zip(*kept, strict=True)) if kept else {}
