"""Models and tokenizers named as on the Hugging Face hub, such as "google/flan-t5-small".

A name means a local folder where there is one. Otherwise `local_folder` downloads the model with
the client `huggingface_hub`, which keeps it in its cache, and returns the cache's folder. The name
may end in "@" and a revision: a branch, a tag or a commit. A branch moves, so a run records the
commit that it got and keeps to it (`hub` in run.json).
"""

from collections.abc import Mapping
import pathlib
import re
import sys


# What a model is read from. Pickles (*.bin) are never downloaded.
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# What a tokenizer is read from (`gkd_jax.text.tokenizer_folder`); config.json states its end ids.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("config.json", "generation_config.json", "*.model", "*.jinja"),
)
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def is_name(path: str) -> bool:
    """Returns whether a path is a name on the hub: it looks like one, and nothing lies there.

    A missing `folder/spiece.model` or `folder/tokenizer.json` is a missing file.
    """
    looks_like_one = _NAME.fullmatch(path) is not None and not path.endswith((".model", ".json"))
    return looks_like_one and not pathlib.Path(path).exists()


def local_folder(path: str) -> str:
    """Returns `path` itself, or the folder of the downloaded model if it is a name on the hub.

    Raises:
        FileNotFoundError: as `download` does.
    """
    return download(path) if is_name(path) else path


def local_copy(
    path: str, pinned: Mapping[str, str] = {}, *, tokenizer_only: bool = False
) -> tuple[str, dict[str, str]]:
    """Downloads what a run reads, if its path is a name on the hub, and says of which commit it is.

    Arguments and errors are those of `download`.

    Returns:
        The folder, and the commit by name; the path itself and {} if it is no name on the hub.
    """
    if not is_name(path):
        return path, {}
    folder = download(path, pinned, tokenizer_only=tokenizer_only)
    commit = pathlib.Path(folder).name
    print(f"{path} is at commit {commit} of the hub", file=sys.stderr)
    return folder, {path: commit}


def download(name: str, pinned: Mapping[str, str] = {}, *, tokenizer_only: bool = False) -> str:
    """Downloads a model, unless the client's cache has it, and returns the folder of its files.

    The client names the folder by the commit of the files.

    Args:
        name: a name by `is_name`, such as "google/flan-t5-small" or "google/flan-t5-small@main".
        pinned: the commits of names that were downloaded before.
        tokenizer_only: download the files of the tokenizer alone.

    Raises:
        FileNotFoundError: if the client is not installed, or cannot get the model.
    """
    found = _NAME.fullmatch(name)
    assert found is not None
    what = "vocabulary" if tokenizer_only else "checkpoint"
    nothing_here = f"no {what} at {name!r}: there is no such file or folder"
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{nothing_here}; if it is a model on the Hugging Face hub: "
            "pip install huggingface_hub, and run this again"
        ) from None
    try:
        return huggingface_hub.snapshot_download(
            found["name"],
            revision=pinned.get(name, found["revision"]),
            allow_patterns=list(_TOKENIZER_FILES if tokenizer_only else _FILES),
        )
    except Exception as error:  # The client raises errors of its own and of two HTTP libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{nothing_here}, and the Hugging Face hub gave no such model ({reason})"
        ) from None
