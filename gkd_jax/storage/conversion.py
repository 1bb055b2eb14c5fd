"""Implements `gkd-jax convert`, which reads a checkpoint in any format and writes it in another."""

import re
import sys
from typing import Any, NamedTuple

from etils import epath

from gkd_jax import convert
from gkd_jax.convert.stored import as_dtype
from gkd_jax.convert.writing import check_output
from gkd_jax.models import lm
from gkd_jax.models.t5_config import T5Config
from gkd_jax.storage import hub, loading, model_card, pretrained, saved_model, tokenizer_files


FORMATS = ("hf", "t5x", "gkd")
STORED = "stored"  # Stands for the dtype of the source's weights.


def convert_checkpoint(
    source: str,
    output: str,
    *,
    to: str,
    dtype: str = STORED,
    step: int | None = None,
    dry_run: bool = False,
) -> None:
    """Writes a checkpoint in another format, and prints to standard error what it wrote.

    Args:
        source: the path of the checkpoint to read; see `loading.load_config`.
        output: the local folder to create.
        to: the format to write: "hf", "t5x" (in a folder `checkpoint_<step>` inside `output`) or
            "gkd".
        dtype: the dtype of the written parameters: "float32", "bfloat16", or "stored" for the dtype
            of the source. The format "gkd" always stores float32, which loses nothing, and records
            the dtype of the source.
        step: the step of a written T5X checkpoint. None takes the step from the name of the
            source's folder (`checkpoint_<step>` or `<step>`). If the name has none, it is the step
            of that from which the source was converted to "gkd", or 0.
        dry_run: check everything that can be checked without loading arrays, and write nothing.

    Raises:
        FileNotFoundError: if there is no such source, or no tokenizer for a decoder-only model.
        ValueError: if the output exists or cannot be created, if the source is damaged, or if the
            format cannot represent the model.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if dtype != STORED:
        as_dtype(dtype)
    check_output(output)
    if dry_run and pretrained.is_remote(source):
        print(
            f"dry run: all is well, but {source} is remote and was not looked at", file=sys.stderr
        )
        return
    source = hub.local_folder(source)
    config, step_folder = loading.load_config(source), saved_model.find_step(source)
    about = {} if step_folder is None else saved_model.read_description(step_folder)
    opened = _Source(source, config, step_folder, about, tokenizer_files.find(source))
    if to == "t5x":
        convert.check_t5x(config)
    if step is None:
        name = (step_folder or epath.Path(source)).name
        match = re.fullmatch(r"(?:checkpoint_)?(\d+)", name)
        step = int(match[1] if match else about.get("step", 0))
    if opened.step_folder is None:
        convert.check_arrays(source, config)
    if to == "hf":
        convert.check_hf(config)
        tokenizer_files.check_known(source, opened.tokenizer)
    what = f"{output}/checkpoint_{step}" if to == "t5x" else output
    size = f"{lm.num_params(lm.abstract_params(config)):,} parameters"
    if dry_run:
        print(
            f"dry run: all is well; {source} ({size}) can be written to {what} as {to}, and its "
            "numbers were not read",
            file=sys.stderr,
        )
        return
    print(f"reading {source} ({size})", file=sys.stderr)
    stored = opened.dtype
    dtype = stored if dtype == STORED else dtype
    # Load in bfloat16 only if that loses nothing: then the host needs half of the memory.
    narrow = dtype == stored == "bfloat16" and to != "gkd"
    shapes = lm.abstract_params(config, "bfloat16" if narrow else "float32")
    params = loading.load_params(step_folder or source, shapes, config)  # a run may be going on
    if to == "hf":
        _write_hf(output, opened, params, dtype)
    elif to == "t5x":
        assert isinstance(config, T5Config)
        # T5X has no float16; float32 represents every float16 number exactly.
        dtype = "float32" if dtype == "float16" else dtype
        convert.write_t5x(output, config, params, step=step, dtype=dtype)
    else:
        _write_own(output, opened, params, step)
    print(f"wrote {what} as {to}: {size}", file=sys.stderr)


class _Source(NamedTuple):
    """The checkpoint that is converted."""

    path: str  # its folder
    config: lm.Config
    step_folder: epath.Path | None  # None if it is no checkpoint of gkd_jax
    about: dict[str, Any]  # the JSON of the step folder; {} without one
    tokenizer: str | None  # the Hugging Face folder that has it; None if none is known

    @property
    def dtype(self) -> str:
        """The dtype of the stored weights."""
        if self.step_folder is None:
            return convert.stored_dtype(self.path)
        return self.about.get("dtype", "float32")


def _write_hf(output: str, source: _Source, params: lm.Params, dtype: str) -> None:
    """Writes a Hugging Face folder with the tokenizer's files and, for a run, a model card."""
    run = None if source.step_folder is None else source.step_folder.parent.parent
    convert.write_hf(
        output,
        source.config,
        params,
        dtype=dtype,
        num_pieces=source.about.get("num_pieces"),
        source=source.tokenizer,
        card=None if run is None else model_card.of_run(run),
    )
    if source.tokenizer is None:
        print("no tokenizer was copied: the source has none", file=sys.stderr)


def _write_own(output: str, source: _Source, params: lm.Params, step: int) -> None:
    """Writes a checkpoint of gkd_jax, with the source's dtype and step and the tokenizer's files.

    They are kept so that a later conversion to the source's format reproduces the source.
    """
    vocabulary, num_pieces = source.about.get("vocabulary", ""), source.about.get("num_pieces")
    more = {"dtype": source.dtype, "step": step}
    saved_model.write_params(output, source.config, params, vocabulary, num_pieces, more)
    if source.tokenizer is not None:
        tokenizer_files.copy(source.tokenizer, epath.Path(output))
