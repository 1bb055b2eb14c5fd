"""Opens seqio tasks by their name or path, and checks that they have what a run needs of them."""

from collections.abc import Sequence
import dataclasses
import difflib
import os
from typing import Any

import seqio

from gkd_jax import tasks  # pyright: ignore[reportAttributeAccessIssue]
from gkd_jax.input import jsonl, rows
from gkd_jax.input.data import TEACHER_INPUTS, DataConfig
from gkd_jax.tasks import features, folder  # pyright: ignore[reportMissingImports]
from gkd_jax.text import files, task_names, vocabularies


_T5_TYPES = ("t5", "mt5", "umt5")


def open_tasks(
    config: DataConfig,
    *,
    tokenizer: str | seqio.Vocabulary | None = None,
    check_remote: bool = True,
) -> tuple[dict[str, Any], seqio.Vocabulary]:
    """Returns the tasks of a configuration by their names, and the vocabulary that they share.

    Arguments and errors are those of `open_task`, which opens each of the tasks.

    Raises:
        ValueError: also if two tasks have different vocabularies, or the same name in metrics.
    """
    found: dict[str, Any] = {}
    shared, has_files = None, any(map(task_names.is_path, config.task_rows))
    several = () if isinstance(config.task, str) else tuple(config.task)
    for name in config.task_rows:
        # Rows are held out of files alone. Without any file, `open_task` refuses the setting.
        holds_out = task_names.is_path(name) or not has_files
        one = dataclasses.replace(
            config, task=name, eval_fraction=config.eval_fraction if holds_out else None
        )
        found[name], vocabulary = open_task(
            one, tokenizer=tokenizer, check_remote=check_remote, beside=several
        )
        if shared is not None and not vocabularies.same(shared, vocabulary):
            raise ValueError(
                f"task {name!r} has another vocabulary than {next(iter(found))!r}: VOCABULARY must "
                "name one for both"
            )
        shared = vocabulary
    if len({task_names.display_name(name) for name in found}) < len(found):
        raise ValueError(
            f"the tasks {list(found)} need different names, because metrics have the last part of "
            "a path as the name of the task"
        )
    assert shared is not None
    return found, shared


def open_task(
    config: DataConfig,
    *,
    tokenizer: str | seqio.Vocabulary | None = None,
    check_remote: bool = True,
    beside: Sequence[str] = (),
    file_vocabulary: seqio.Vocabulary | None = None,
) -> tuple[Any, seqio.Vocabulary]:
    """Returns the only task of a configuration, and the vocabulary of its inputs and targets.

    Args:
        tokenizer: the Hugging Face folder of the model that reads the task, or None. If `config`
            names no vocabulary and the folder has a tokenizer, that tokenizer is used. A dry run
            that does not open the model may give an `Unread` vocabulary.
        check_remote: whether remote files may be read; False in a dry run.
        beside: the names of all tasks of the run. Where some of them select rows of a JSONL file by
            the field `teacher`, each row of the file must belong to one of them.
        file_vocabulary: the vocabulary of a JSONL file if neither `config` nor `tokenizer` has one;
            None is T5's public vocabulary.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or not as expected, if settings
            contradict each other, or if the configuration has several tasks.
    """
    if not isinstance(config.task, str):
        raise ValueError(
            f"only training reads several tasks at once, expected the name of one task, got "
            f"{dict(config.task)}"
        )
    folder.set_data_dir(config.data_dir)
    vocabulary = _named_vocabulary(config, tokenizer, check_remote)
    if task_names.is_path(config.task):
        vocabulary = file_vocabulary if vocabulary is None else vocabulary
        if vocabulary is None and isinstance(tokenizer, str):
            _check_has_t5_vocabulary(tokenizer)
        path, _ = task_names.split(config.task)
        task = jsonl.make_task(
            config,
            vocabulary or vocabularies.t5_default(),
            teachers=task_names.teachers_of(path, beside),
            check_remote=check_remote,
        )
    else:
        task = _with_teacher_inputs(find_task(config.task, vocabulary), config)
        if config.eval_fraction is not None:
            raise ValueError(
                f"eval_fraction={config.eval_fraction} holds rows of a JSONL file out, got the "
                f"task {config.task!r}, whose own splits are read with --gin.EVAL_FRACTION=None"
            )
    vocabularies.check_readable(
        task.output_features["targets"].vocabulary, check_remote=check_remote
    )
    return task, task.output_features["targets"].vocabulary


def _named_vocabulary(
    config: DataConfig, tokenizer: str | seqio.Vocabulary | None, check_remote: bool
) -> seqio.Vocabulary | None:
    """Returns the vocabulary of the configuration, or else of a model's folder; None if neither."""
    if config.vocabulary is not None:
        return vocabularies.load(
            config.vocabulary, extra_ids=config.extra_ids, check_remote=check_remote
        )
    return vocabularies.find_in_folder(tokenizer) if isinstance(tokenizer, str) else tokenizer


def _check_has_t5_vocabulary(folder: str) -> None:
    """Raises FileNotFoundError if a Hugging Face folder without a tokenizer is no T5's."""
    kind = files.read_json_in(folder, "config.json").get("model_type")
    if kind not in _T5_TYPES:
        raise FileNotFoundError(
            f"there is no tokenizer in {folder!r}, whose model is a {kind!r} and not a T5 (whose "
            "public vocabulary is known): copy its tokenizer.json there, or name it as VOCABULARY"
        )


def _with_teacher_inputs(task: Any, config: DataConfig) -> Any:
    """Returns a task whose examples have the teacher's prompts that a template makes."""
    template = config.teacher_template
    if template is None:
        return task
    if TEACHER_INPUTS in task.output_features:
        raise ValueError(
            f"task {config.task!r} has {TEACHER_INPUTS!r} of its own: teacher_template must be "
            f"None, got {template!r}"
        )
    if config.use_cached:
        raise ValueError(
            f"seqio's cache of {config.task!r} has no {TEACHER_INPUTS!r}: with teacher_template, "
            "use_cached must be False"
        )
    return features.with_teacher_inputs(task, template)


def find_task(name: str, vocabulary: seqio.Vocabulary | None) -> seqio.Task | seqio.Mixture:
    """Returns a registered task or mixture; a vocabulary that is given replaces its own.

    Raises:
        ValueError: if no task has this name, if the task lacks a feature, or if a vocabulary is
            given for a mixture.
    """
    tasks.register()
    known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
    if name not in known:
        if os.path.exists(name):
            raise ValueError(
                f"unknown task or mixture {name!r}; write './{name}' for the file or folder that "
                "has this name"
            )
        close = difflib.get_close_matches(name, sorted(known), n=12, cutoff=0.0)
        raise ValueError(
            f"unknown task or mixture {name!r}, expected one of the {len(known)} registered, "
            f"closest first: {', '.join(close)}"
        )
    task = seqio.get_mixture_or_task(name)
    missing = {"inputs", "targets"} - set(task.output_features)
    if missing:
        raise ValueError(f"task {name!r} has no feature {sorted(missing)}: it needs both")
    if vocabulary is None:
        return task
    if isinstance(task, seqio.Mixture):
        raise ValueError(
            f"{name!r} is a mixture, whose vocabulary is that of its tasks: leave VOCABULARY None"
        )
    # The copy needs no registration: preprocessors receive the output features of the task that
    # calls them.
    return task.replace(
        name=f"{name}__{vocabularies.short_name(vocabulary)}",
        output_features=features.with_vocabulary(task.output_features, vocabulary),
    )


def file_of(name: str, split: str) -> str | None:
    """Returns the file from which a split of a JSONL task is read; None for other tasks.

    The result is also None for a local file that another run has still to write.

    Args:
        split: a split. One that has no file of its own is held out of the training file.

    Raises:
        FileNotFoundError: if the path is a folder without a file of any split.
    """
    path, _ = task_names.split(name)
    if not task_names.is_path(name):
        return None
    found = jsonl.find_splits(os.path.expanduser(path))
    file = found.get(split.partition("[")[0], found.get("train"))
    exists = file is not None and (files.is_remote(file) or os.path.isfile(file))
    return file if exists else None


def content_of(name: str, split: str) -> str | None:
    """Returns the SHA-256 of the file of a split (see `file_of`); None if there is none."""
    file = file_of(name, split)
    return None if file is None else files.sha256(file)


def check_split(task: seqio.Task | seqio.Mixture, split: str) -> None:
    """Raises ValueError if a task has no such split.

    The splits of a TFDS data set that has not been prepared are unknown. They are not checked here:
    the error when the data set is read says what is missing.
    """
    try:
        known = list(task.splits or ())
    except ValueError:  # seqio raises this if the splits are unknown.
        return
    source: Any = getattr(task, "source", None)
    is_whole = isinstance(source, seqio.FunctionDataSource)
    if split not in known and "[" in split and is_whole:
        raise ValueError(
            f"task {task.name!r} has no parts of splits, as TFDS has, got {split!r}: NUM_EXAMPLES "
            "and EVAL_NUM_EXAMPLES choose the first examples"
        )
    if known and split.split("[")[0] not in known:
        name, hint = task.name, ""
        if isinstance(source, jsonl.JsonlSource):
            name = source.path
            hint = (
                ": a validation.jsonl beside the file makes a split, and EVAL_FRACTION=0.05 holds "
                "a share of its rows out"
            )
        raise ValueError(f"task {name!r} has no split {split!r}, expected one of {known}{hint}")


def check_teacher_inputs(name: str, task: seqio.Task | seqio.Mixture, config: DataConfig) -> None:
    """Raises ValueError if a length is given for the teacher's prompts and the task has none."""
    if TEACHER_INPUTS in config.feature_lengths and TEACHER_INPUTS not in task.output_features:
        raise ValueError(
            f"task {name!r} has no feature {TEACHER_INPUTS!r}: register it with one, set "
            f"TEACHER_TEMPLATE, or leave it out of TASK_FEATURE_LENGTHS, got "
            f"{dict(config.feature_lengths)}"
        )


def check_rows(task: seqio.Task | seqio.Mixture, split: str, *, check_remote: bool = True) -> None:
    """Reads the JSONL files of a split, so that a fault in one is found before a model is read.

    Their rows then stay in memory. Other tasks are not read.

    Args:
        check_remote: whether remote files may be read. Without the vocabulary, rows are not
            tokenized.

    Raises:
        FileNotFoundError, ValueError: if the file or a row is not as expected; the message names
            the file and the line.
    """
    name = split.split("[")[0]
    for part, source in _jsonl_parts(task, name, check_remote):
        vocabulary = part.output_features["targets"].vocabulary
        if check_remote or not vocabularies.is_remote(vocabulary):
            source.examples(name)
        else:
            rows.read(source.files[name])


def check_targets(
    task: seqio.Task | seqio.Mixture, split: str, why: str, *, check_remote: bool = True
) -> None:
    """Raises ValueError, naming the file and the line, if a row of a split has no target.

    Only JSONL files can have such rows. The message ends with `why`, the reason why targets are
    needed.
    """
    for _, source in _jsonl_parts(task, split, check_remote):
        examples = source.examples(split)
        line = next((example.line for example in examples if example.target is None), None)
        if line is not None:
            raise ValueError(
                f"{source.files[split]}, line {line}: expected a target, got only a prompt: {why}"
            )


def _jsonl_parts(
    task: seqio.Task | seqio.Mixture, split: str, check_remote: bool
) -> list[tuple[Any, jsonl.JsonlSource]]:
    """Returns the tasks of a task or mixture that read JSONL files, and their sources.

    Without `check_remote`, tasks whose file of the split is remote are left out.
    """
    parts: Any = task.tasks if isinstance(task, seqio.Mixture) else [task]
    found = [(part, part.source) for part in parts if isinstance(part.source, jsonl.JsonlSource)]
    return [one for one in found if check_remote or not files.is_remote(one[1].files[split])]
