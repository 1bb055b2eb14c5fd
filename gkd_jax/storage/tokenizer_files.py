"""Finds the tokenizers of checkpoints, and copies them."""

import os

from etils import epath
import seqio

from gkd_jax.convert import hf_folder
from gkd_jax.input.data import DataConfig
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.storage import hub, saved_model
from gkd_jax.storage.pretrained import ModelConfig, is_remote
from gkd_jax.text import files, task_names, vocabularies


def find(checkpoint: str | None) -> str | None:
    """Returns the Hugging Face folder with the tokenizer of a checkpoint; None if there is none.

    For a Hugging Face folder that is the folder itself, which may lack a tokenizer. A checkpoint of
    gkd_jax has the folder `tokenizer` in its MODEL_DIR or, if it was converted, in its own folder.
    It must have the vocabulary of the checkpoint, where that is known.
    """
    if not checkpoint:
        return None
    step_folder = saved_model.find_step(checkpoint)
    if step_folder is None:
        return checkpoint if os.path.isfile(os.path.join(checkpoint, "config.json")) else None
    folder = saved_model.tokenizer_folder(step_folder)
    if not folder.is_dir():
        return None
    expected = saved_model.read_description(step_folder)["vocabulary"]
    return str(folder) if not expected or _has_vocabulary(str(folder), expected) else None


def find_for_task(
    data: DataConfig,
    model: ModelConfig,
    pending: frozenset[str] = frozenset(),
    *,
    check_remote: bool = True,
) -> str | seqio.Vocabulary | None:
    """Returns the result of `find` for the model that reads a task.

    Checkpoints that are `pending`, or remote without `check_remote`, are not opened. The result for
    such a decoder-only model is an `Unread` vocabulary of the model's size.

    Raises:
        FileNotFoundError: if a decoder-only model of a run has no known tokenizer, and the task is
            a JSONL file, which has no vocabulary of its own either.
    """
    checkpoint = model.checkpoint
    if checkpoint is None:
        return None
    # A registered task keeps its vocabulary for a run, which may have been trained with that one.
    has_none = any(map(task_names.is_path, data.task_rows))
    if checkpoint in pending or (is_remote(checkpoint) and not check_remote):
        return _unread(checkpoint, model) if has_none or hub.is_name(checkpoint) else None
    found = find(checkpoint)
    if data.vocabulary is None and has_none:
        check_known(checkpoint, found, ", or set VOCABULARY")
    return found


def _unread(checkpoint: str, model: ModelConfig) -> vocabularies.Unread | None:
    """Returns the vocabulary of a decoder-only model that is not opened; None for another model."""
    if model.size is None:
        return None
    if not isinstance(model.architecture(model.size, vocab_size=1), DecoderConfig):
        return None
    return vocabularies.Unread(checkpoint, model.architecture(model.size).vocab_size)


def check_known(checkpoint: str, found: str | None, also: str = "") -> None:
    """Checks that the tokenizer of a run whose model is decoder-only was found by `find`.

    Without it nothing says where a text ends. A T5 has its special ids built in, and a Hugging Face
    folder is taken as it is.

    Raises:
        FileNotFoundError: if it was not. The message says what to do about it, and ends with what
            else can be done (`also`).
    """
    step_folder = None if found is not None else saved_model.find_step(checkpoint)
    if step_folder is None:
        return
    if isinstance(saved_model.read_config(step_folder), DecoderConfig):
        folder = saved_model.tokenizer_folder(step_folder)
        raise FileNotFoundError(
            f"no tokenizer of the decoder-only model {checkpoint!r} in {str(folder)!r}"
            ": copy tokenizer.json, tokenizer_config.json, config.json and generation_config.json "
            f"there from the Hugging Face folder that its student started from{also}"
        )


def for_run(data: DataConfig, checkpoint: str | None, expected: str) -> str | None:
    """Returns the Hugging Face folder with the tokenizer of a run that begins; None without one.

    The folder is that of `data.vocabulary`, or else that of the student's checkpoint. Its
    vocabulary must have the content hash `expected`.
    """
    named = None if data.vocabulary is None else vocabularies.folder_of(data.vocabulary)
    places = (named, find(checkpoint))
    return next((place for place in places if place and _has_vocabulary(place, expected)), None)


def copy(source: str, folder: files.AnyPath) -> None:
    """Copies the tokenizer and other small files of the folder `source` into `folder`/tokenizer.

    Both may be in a bucket. config.json is among the files, because it names the ids of special
    tokens. What `folder`/tokenizer held before is removed.
    """
    target = folder / saved_model.TOKENIZER
    if target.is_dir():
        epath.Path(target).rmtree()
    target.mkdir(parents=True)
    hf_folder.copy_companions(epath.Path(source), target, "config.json")


def _has_vocabulary(folder: str, expected: str) -> bool:
    """Returns whether a folder has a tokenizer with a content hash."""
    try:
        return vocabularies.content_hash(vocabularies.of_folder(folder)) == expected
    except (ValueError, FileNotFoundError):
        return False
