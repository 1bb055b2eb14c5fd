"""Opens the model and the task that `infer`, `eval` and `score` read."""

import dataclasses
from typing import Any

import seqio

from gkd_jax.input import named_tasks
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm
from gkd_jax.storage import tokenizer_files
from gkd_jax.storage.pretrained import (
    ModelConfig,
    check_exists,
    remote_checkpoints,
    with_local_files,
)
from gkd_jax.storage.vocabulary_checks import check_special_ids, shared_pieces
from gkd_jax.text import vocabularies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model and a task. A dry run reads of them what lies on this machine, and nothing else.

    Attributes:
        model: the model; its checkpoint is local or in a bucket, except in a dry run.
        data: the configuration of the task, whose vocabulary is not on the hub either.
        task: the task.
        vocabulary: the vocabulary of the task.
        dry_run: whether this is a dry run.
    """

    model: ModelConfig
    data: DataConfig
    task: Any
    vocabulary: seqio.Vocabulary
    dry_run: bool

    def check_split(self, split: str) -> None:
        """Raises ValueError if the task has no such split, or if a row of it cannot be read."""
        named_tasks.check_split(self.task, split)
        named_tasks.check_rows(self.task, split, check_remote=not self.dry_run)

    def sizes(self) -> tuple[lm.Config, int]:
        """Returns the sizes of the model, and the number of ids that it shares with the vocabulary.

        Raises:
            ValueError: if the model does not fit the vocabulary or its own settings, or if a dry
                run would need a remote checkpoint for the sizes.
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


def open_model_and_task(model: ModelConfig, data: DataConfig, *, dry_run: bool) -> Opened:
    """Opens the task and finds the model, without its parameters.

    Raises:
        FileNotFoundError, ValueError: if a checkpoint, a file or the vocabulary is missing or not
            as expected.
    """
    model, commits = with_local_files(model, dry_run=dry_run)
    check_exists(model.checkpoint)
    data, _ = tokenizer_files.with_local_vocabulary(data, commits, dry_run=dry_run)
    tokenizer = tokenizer_files.find(model.checkpoint)
    task, vocabulary = named_tasks.open_task(data, tokenizer=tokenizer, check_remote=not dry_run)
    return Opened(model=model, data=data, task=task, vocabulary=vocabulary, dry_run=dry_run)
