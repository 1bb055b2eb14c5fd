"""Checks that a run's models and its vocabulary fit each other."""

from collections.abc import Mapping

import seqio

from gkd_jax.models import lm
from gkd_jax.storage import saved_model, tokenizer_files
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import vocabularies


def shared_pieces(
    vocabulary: seqio.Vocabulary,
    chosen: Mapping[str, ModelConfig],
    pending: frozenset[str] = frozenset(),
    *,
    check_remote: bool = True,
) -> int:
    """Returns the number of ids that mean the same token to a run's vocabulary and all its models.

    A checkpoint of gkd_jax stores a hash of its vocabulary and the number of its ids; a Hugging
    Face folder, and a checkpoint converted from one, hold the tokenizer. A T5X checkpoint holds
    nothing to compare and is not checked.

    Args:
        chosen: the models, by the names that error messages use.
        pending: the checkpoints that must not be opened.
        check_remote: whether a vocabulary in a remote file is read and compared with the models.

    Raises:
        ValueError: if a model has another vocabulary; the message names the model.
    """
    shared = vocabularies.num_pieces(vocabulary, check_remote=check_remote)
    if vocabularies.is_remote(vocabulary) and not check_remote:
        return shared
    for name, model in chosen.items():
        path = model.checkpoint
        if path is None or path in pending:
            continue
        step_folder = saved_model.find_step(path)
        about = {} if step_folder is None else saved_model.read_description(step_folder)
        shared = min(shared, about.get("num_pieces") or shared)
        if found := about.get("vocabulary"):
            expected = vocabularies.content_hash(vocabulary)
            if found != expected:
                raise ValueError(
                    f"the {name}'s checkpoint {path!r} was trained with another vocabulary "
                    f"(content {found[:12]}) than this task's (content {expected[:12]})"
                )
            continue
        # A converted checkpoint has the tokenizer of its source in the place of a hash.
        folder = tokenizer_files.find(path)
        own = None if folder is None else vocabularies.find_in_folder(folder)
        if own is not None:
            agreed = vocabularies.shared_pieces(
                vocabulary, own, student_name="this run's vocabulary", teacher_name=f"{name} {path}"
            )
            shared = min(shared, agreed)
    return shared


def check_special_ids(
    config: lm.Config, vocabulary: seqio.Vocabulary, *, check_remote: bool = True
) -> None:
    """Checks that the vocabulary has the special ids that are built into the model's family.

    A T5 masks id 0, starts a target with id 0 and ends a target with id 1. The other families have
    no special ids built in and accept every vocabulary. A remote vocabulary is read with
    `check_remote` only.

    Raises:
        ValueError: if the vocabulary has other special ids; the message names them.
    """
    unread = vocabularies.is_remote(vocabulary) and not check_remote
    if unread or not lm.eos_ids(config):
        return
    ends, pad, unknown = vocabularies.end_ids(vocabulary), vocabulary.pad_id, vocabulary.unk_id
    expected = lm.eos_ids(config), lm.banned_ids(config)[0]
    if (ends, pad) != expected or unknown == pad:
        raise ValueError(
            f"a T5 needs a vocabulary with pad {expected[1]}, end of text {expected[0][0]} and a "
            "piece that is masked nowhere for what is unknown; this one has "
            f"pad {pad}, end of text {', '.join(map(str, ends)) or 'none'} and unknown {unknown}"
        )
