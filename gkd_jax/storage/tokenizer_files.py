"""Finds tokenizers: that of a checkpoint, and one that is named as on the Hugging Face hub."""

from collections.abc import Mapping
import dataclasses
import json
import os

from etils import epath

from gkd_jax.input.data import DataConfig
from gkd_jax.storage import hub, saved_model
from gkd_jax.text import vocabularies


# A folder in a step folder, with the tokenizer's and other files of the Hugging Face folder from
# which the checkpoint was converted.
HF_FILES = "hf"


def with_local_vocabulary(
    data: DataConfig, pinned: Mapping[str, str] = {}, *, dry_run: bool = False
) -> tuple[DataConfig, dict[str, str]]:
    """Downloads the tokenizer of `data.vocabulary` if it is a name on the Hugging Face hub.

    Args:
        data: any configuration of data.
        pinned: the commits to take, by name.
        dry_run: download nothing.

    Returns:
        The configuration with the downloaded folder as its vocabulary, and the commit by name; the
        configuration itself and {} if its vocabulary is no such name.

    Raises:
        FileNotFoundError: as `hub.download` does.
        ValueError: in a dry run, which cannot know the tokenizer.
    """
    name = data.vocabulary
    if name is None or not hub.is_name(name):
        return data, {}
    if dry_run:
        raise ValueError(
            f"no vocabulary at {name!r}: there is no such file or folder, and a dry run does not "
            "look on the Hugging Face hub; if it is a model there, name a local copy"
        )
    folder, commits = hub.local_copy(name, pinned, tokenizer_only=True)
    return dataclasses.replace(data, vocabulary=folder), commits


def find(checkpoint: str | None) -> str | None:
    """Returns a Hugging Face folder with the tokenizer of a checkpoint; None if none is known.

    For a run, the candidates are the folder that VOCABULARY names and the folder from which the
    student was initialised. A candidate must have the vocabulary of the run.

    Args:
        checkpoint: the path of a checkpoint in any format. For a remote or absent one the result is
            None.
    """
    if checkpoint is None or not os.path.isdir(checkpoint):
        return None
    step_folder = saved_model.find_step(checkpoint)
    if step_folder is None:
        return checkpoint if os.path.isfile(os.path.join(checkpoint, "config.json")) else None
    return _of_run(step_folder, saved_model.read_description(step_folder)["vocabulary"], ())


def _of_run(step_folder: epath.Path, expected: str, later: tuple[epath.Path, ...]) -> str | None:
    """Returns the folder for one of our step folders.

    Args:
        step_folder: the folder of the step.
        expected: the content hash that the vocabulary must have.
        later: the step folders of the runs that started from this one. Since folders may be
            renamed, a run can seem to have started from itself.
    """
    if step_folder in later:
        return None
    if (step_folder / HF_FILES).is_dir():
        return str(step_folder / HF_FILES)
    record = step_folder.parent.parent / "run.json"
    if not record.is_file():
        return None
    recipe = json.loads(record.read_text()).get("recipe", {})
    places = (recipe.get("data", {}).get("vocabulary"), recipe.get("student", {}).get("checkpoint"))
    for place in places:
        if not place or not os.path.isdir(place):
            continue
        # If the student started from another run, look for that run's tokenizer.
        earlier = saved_model.find_step(place)
        if earlier is not None:
            found = _of_run(earlier, expected, (*later, step_folder))
            if found is not None:
                return found
        elif _has_vocabulary(place, expected):
            return place
    return None


def _has_vocabulary(folder: str, expected: str) -> bool:
    try:
        return vocabularies.content_hash(vocabularies.of_folder(folder)) == expected
    except (ValueError, FileNotFoundError):
        return False
