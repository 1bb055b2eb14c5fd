"""`gkd-jax convert`: a checkpoint of any format, written in another."""

import json
import os
import pathlib
import re
import sys
from typing import Any

from etils import epath

from gkd_jax import convert
from gkd_jax.convert import hf_folder
from gkd_jax.convert.stored import as_dtype
from gkd_jax.models import lm
from gkd_jax.models.t5_config import T5Config
from gkd_jax.storage import checkpoints, model_card, pretrained
from gkd_jax.text import vocabularies


FORMATS = ("hf", "t5x", "gkd")
STORED = "stored"  # the dtype that the source's weights have
_HF_FILES = "hf"  # of one of our checkpoints: what lay beside the weights it was made from


def convert_checkpoint(
    source: str,
    output: str,
    *,
    to: str,
    dtype: str = STORED,
    step: int | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a checkpoint in another format, and says on standard error what it wrote.

    Args:
        source: as for `pretrained.load_config`.
        output: a local folder that does not exist yet.
        to: "hf", "t5x" (a `checkpoint_<step>` inside `output`) or "gkd".
        dtype: of the written parameters: "float32", "bfloat16" or "stored", the source's own. "gkd"
            has float32, which loses nothing, and remembers the source's.
        step: of a T5X checkpoint; None takes the source's (`checkpoint_<step>`, `<step>`), else 0.
        dry_run: check all that can be checked without reading an array, and write nothing.

    Raises:
        FileNotFoundError: where there is no source.
        ValueError: where the output exists or cannot be made, or the source is damaged or has no
            counterpart in the format.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if dtype != STORED:
        as_dtype(dtype)
    _check_output(output)
    if dry_run and "://" in source:
        print(f"dry run: {source} is remote and was not looked at", file=sys.stderr)
        return
    config = pretrained.load_config(source)
    if to == "t5x" and lm.family_name(config) != "t5":
        raise ValueError(f"{source!r} is no T5, and T5X's format is for those alone")
    step_folder = checkpoints.find_step(source)
    about = {} if step_folder is None else checkpoints.read_description(step_folder)
    step = _step_of(source) if step is None else step
    if step_folder is None:
        convert.check_arrays(source, config)
    if to == "hf":
        convert.check_hf(config)
    what = f"{output}/checkpoint_{step}" if to == "t5x" else output
    size = f"{lm.num_params(lm.abstract_params(config)):,} parameters"
    if dry_run:
        print(
            f"dry run: {source} ({size}) can be written to {what} as {to}; its numbers were not "
            "read",
            file=sys.stderr,
        )
        return
    stored = about.get("dtype", "float32") if step_folder else convert.stored_dtype(source)
    dtype = stored if dtype == STORED else dtype
    narrow = dtype == stored == "bfloat16" and to != "gkd"
    shapes = lm.abstract_params(config, "bfloat16" if narrow else "float32")
    params = pretrained.load_params(source, shapes, config)
    beside = _tokenizer_folder(source, about)
    if to == "hf":
        _write_hf(output, config, params, about, dtype, beside, step_folder)
    elif to == "t5x":
        assert isinstance(config, T5Config)
        dtype = "float32" if dtype == "float16" else dtype  # exact, and T5X has no float16
        convert.write_t5x(output, config, params, step=step, dtype=dtype)
    else:
        _write_own(output, config, params, {**about, "dtype": stored}, beside)
    print(f"wrote {what} as {to}: {size}", file=sys.stderr)


def _write_hf(
    output: str,
    config: lm.Config,
    params: lm.Params,
    about: dict[str, Any],
    dtype: str,
    beside: str | None,
    step_folder: epath.Path | None,
) -> None:
    """A Hugging Face folder with its tokenizer's files and, of a run, a model card."""
    card = None
    if step_folder is not None:
        card = model_card.of_run(pathlib.Path(step_folder.parent.parent))
    num_pieces = about.get("num_pieces")
    convert.write_hf(
        output, config, params, dtype=dtype, num_pieces=num_pieces, source=beside, card=card
    )
    if beside is None:
        print("no tokenizer was copied: the source names no folder with its own", file=sys.stderr)


def _write_own(
    output: str, config: lm.Config, params: lm.Params, about: dict[str, Any], beside: str | None
) -> None:
    """One of our checkpoints, which remembers the stored dtype and the tokenizer's files."""
    vocabulary, num_pieces = about.get("vocabulary", ""), about.get("num_pieces")
    more = {"dtype": about["dtype"]}
    checkpoints.write_params(output, config, params, vocabulary, num_pieces, more)
    if beside is not None:
        hf_folder.copy_companions(pathlib.Path(beside), pathlib.Path(output) / _HF_FILES)


def _check_output(output: str) -> None:
    """Refuses an output that cannot become a new local folder."""
    if "://" in output:
        raise ValueError(f"output must be a local folder, got {output}: write locally, then copy")
    path = pathlib.Path(output)
    if path.exists():
        raise ValueError(f"output {output!r} exists already: convert writes to a new folder")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {output!r} cannot be made: {parent} is no folder to write to")


def _tokenizer_folder(source: str, about: dict[str, Any]) -> str | None:
    """The Hugging Face folder with a model's tokenizer; None where none is known.

    Of a run, that is what VOCABULARY names or the folder that its student started from, if its
    vocabulary is the run's.
    """
    step_folder = checkpoints.find_step(source)
    if step_folder is None:
        return source if convert.detect(source) == "hf" else None
    if (step_folder / _HF_FILES).is_dir():
        return str(step_folder / _HF_FILES)
    record = step_folder.parent.parent / "run.json"
    if not record.is_file():
        return None
    recipe = json.loads(record.read_text()).get("recipe", {})
    places = (recipe.get("data", {}).get("vocabulary"), recipe.get("student", {}).get("checkpoint"))
    for place in places:
        if not place or "://" in place or not pathlib.Path(place).is_dir():
            continue
        if checkpoints.find_step(place) is not None:  # that was a run too
            found = _tokenizer_folder(place, about)
            if found is not None:
                return found
        elif _has_vocabulary(place, about["vocabulary"]):
            return place
    return None


def _has_vocabulary(folder: str, expected: str) -> bool:
    try:
        return vocabularies.content_hash(vocabularies.of_folder(folder)) == expected
    except (ValueError, FileNotFoundError):
        return False


def _step_of(source: str) -> int:
    """The step that a checkpoint's folder is named after; 0 where it is named otherwise."""
    name = (checkpoints.find_step(source) or epath.Path(source)).name
    match = re.fullmatch(r"(?:checkpoint_)?(\d+)", name)
    return int(match[1]) if match else 0
