"""Opens the model and the task that `infer`, `eval` and `score` read."""

import dataclasses
import hashlib
import json
import os
from typing import Any

import seqio

from gkd_jax.input import named_tasks
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm
from gkd_jax.storage import content, saved_model, tokenizer_files
from gkd_jax.storage.pretrained import (
    ModelConfig,
    check_exists,
    is_remote,
    remote_checkpoints,
    with_local_files,
)
from gkd_jax.storage.vocabulary_checks import check_special_ids, shared_pieces
from gkd_jax.text import files, vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


_OF_MODEL = ("checkpoint", "size", "dtype", "param_dtype")
_OF_DATA = ("task", "data_dir", "vocabulary", "extra_ids", "batch_size", "long_prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and a task. A dry run reads of them what lies on this machine, and nothing else."""

    model: ModelConfig  # its checkpoint is local or in a bucket, except in a dry run
    checkpoint: str | None  # as it is named; that of `model` is the step in it, if it has one
    data: DataConfig  # its vocabulary is not on the hub either
    task: Any
    vocabulary: seqio.Vocabulary
    dry_run: bool

    def check_split(self, split: str) -> None:
        """Raises ValueError if the task has no such split, or if a row of it cannot be read."""
        named_tasks.check_split(self.task, split)
        named_tasks.check_rows(self.task, split, check_remote=not self.dry_run)

    def config_and_num_pieces(self) -> tuple[lm.Config, int]:
        """Returns the model's config, and the number of ids that it shares with the vocabulary.

        Raises:
            ValueError: if the model does not fit the vocabulary or its own settings, or if a dry
                run would need a remote checkpoint for the config.
        """
        reads = not self.dry_run
        unread = remote_checkpoints(self.model) if self.dry_run else frozenset()
        compared = {"model": self.model}
        if self.dry_run and vocabularies.is_remote(self.vocabulary):
            compared = {}
        num_pieces = shared_pieces(self.vocabulary, compared, unread, check_remote=reads)
        config = self.model.config(num_pieces, pending=self.model.checkpoint in unread)
        check_special_ids(config, self.vocabulary, check_remote=reads)
        return config, num_pieces

    def describe(self, split: str | None) -> tuple[dict[str, Any], list[str]]:
        """Returns what determines the examples and the model's answers, for a record of the output.

        Args:
            split: the split that is read; None if only the vocabulary of the task is used.

        Returns:
            The fields of the model and of the data, with the SHA-256 of what they name: `content`
            of the checkpoint, `vocabulary_content` and, for a split, `task_content`, which is None
            for a task without a file; for a tokenizer's folder also `end_ids` and the SHA-256 of
            its `chat_template`. Then the names of the fields that a dry run leaves out, because
            what they belong to is remote.
        """
        model, data = self.model, self.data
        about = {name: getattr(model, name) for name in _OF_MODEL}
        about |= {"checkpoint": self.checkpoint, "content": None}
        about |= {name: getattr(data, name) for name in _OF_DATA}
        about["feature_lengths"] = dict(data.feature_lengths)
        about["template_variables"] = dict(data.template_variables)
        about["teacher_template"] = data.teacher_template
        if data.eval_fraction is not None:
            about |= {"eval_fraction": data.eval_fraction, "data_seed": data.seed}
        unread = []
        if split is not None:
            about |= {"split": split, "use_cached": data.use_cached}
            if self.dry_run and files.is_remote(str(data.task)):
                unread.append("task_content")
            else:
                about["task_content"] = named_tasks.content_of(str(data.task), split)
        if self.dry_run and vocabularies.is_remote(self.vocabulary):
            unread += ["vocabulary_content", "end_ids", "chat_template"]
        else:
            about["vocabulary_content"] = vocabularies.content_hash(self.vocabulary)
            about |= _describe_chats(self.vocabulary)
        if self.dry_run and is_remote(model.checkpoint):
            unread.append("content")
        elif model.checkpoint is not None:
            about["content"] = content.content_id(model.checkpoint)
        return about, unread


def _describe_chats(vocabulary: seqio.Vocabulary) -> dict[str, Any]:
    """Returns what the other files of a tokenizer's folder decide: ends of texts, and prompts."""
    if not isinstance(vocabulary, TokenizerVocabulary):
        return {}
    chats = vocabulary.chat_template
    text = "" if chats is None else json.dumps([*chats.templates.items(), chats.special_tokens])
    return {
        "end_ids": list(vocabulary.eos_ids),
        "chat_template": hashlib.sha256(text.encode()).hexdigest(),
    }


def open_model_and_task(model: ModelConfig, data: DataConfig, *, dry_run: bool) -> Opened:
    """Opens the task and finds the model, without its parameters.

    Raises:
        FileNotFoundError, ValueError: if a checkpoint, a file or the vocabulary is missing or not
            as expected, or if the task is a mixture.
    """
    models, data, _ = with_local_files({"model": model}, data, dry_run=dry_run)
    model = models["model"]
    check_exists(checkpoint := model.checkpoint)
    # A run that goes on meanwhile saves newer steps, and all that is read must be of one step.
    if not dry_run and checkpoint and (step_folder := saved_model.find_step(checkpoint)):
        model = dataclasses.replace(model, checkpoint=os.fspath(step_folder))
    tokenizer = tokenizer_files.find_for_task(data, model, check_remote=not dry_run)
    task, vocabulary = named_tasks.open_task(data, tokenizer=tokenizer, check_remote=not dry_run)
    if isinstance(task, seqio.Mixture):
        raise ValueError(
            f"{data.task!r} is a mixture, whose examples end with those of its shortest task: name "
            f"one of its tasks, {', '.join(sorted(part.name for part in task.tasks))}"
        )
    return Opened(
        model=model,
        checkpoint=checkpoint,
        data=data,
        task=task,
        vocabulary=vocabulary,
        dry_run=dry_run,
    )
