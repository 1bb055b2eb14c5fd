"""Detects the format of a checkpoint folder from the files in it."""

from typing import Literal

from etils import epath


Format = Literal["gkd", "hf", "t5x"]
_T5X_INDICES = ("checkpoint", "manifest.ocdbt")

_LOOKED_FOR = (
    "gkd_jax: checkpoints/ (a MODEL_DIR), or params/ and model/ (one step); "
    "Hugging Face: config.json with model.safetensors or model.safetensors.index.json; "
    "T5X: checkpoint, state/checkpoint or state/manifest.ocdbt"
)

_GGUF = "GGUF is not read: give the Hugging Face folder (safetensors) that it was made from"


def detect(path: str) -> Format:
    """Returns the format of the checkpoint in a folder, local or gs://.

    Raises:
        FileNotFoundError: if nothing is there.
        NotADirectoryError: if a file is there.
        ValueError: if the folder has none of the formats; the message says which files were
            looked for, or what the folder lacks.
    """
    folder = epath.Path(path)
    if folder.is_file():
        gguf = f". {_GGUF}" if path.endswith(".gguf") else ""
        raise NotADirectoryError(f"no checkpoint at {path!r}: it is a file, not a folder{gguf}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path!r}: there is no such file or folder")
    if is_step(folder) or any(map(is_step, folder.glob("checkpoints/*"))):
        return "gkd"
    # Even beside a whole model: transformers would add the adapter to it.
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds a LoRA adapter (adapter_config.json), which is not read: merge it into "
            "its model with peft, model.merge_and_unload().save_pretrained(DIR), and give DIR"
        )
    weights = [
        name
        for name in ("model.safetensors", "model.safetensors.index.json")
        if (folder / name).is_file()
    ]
    if (folder / "config.json").is_file() and weights:
        return "hf"
    if any((t5x_root(path) / name).is_file() for name in _T5X_INDICES):
        return "t5x"
    raise ValueError(f"{path} is no known checkpoint. {_hint(folder, weights)}")


def is_step(folder: epath.Path) -> bool:
    """Returns whether a folder is a step of gkd_jax, with its parameters and their description."""
    return (folder / "params").is_dir() and (folder / "model").is_dir()


def t5x_root(path: str) -> epath.Path:
    """Returns the folder that holds a T5X checkpoint's arrays: `path` itself or `path`/state."""
    folder = epath.Path(path)
    return folder if any((folder / name).is_file() for name in _T5X_INDICES) else folder / "state"


def _hint(folder: epath.Path, weights: list[str]) -> str:
    if any(folder.glob("pytorch_model.bin*")):
        return (
            "It has pytorch_model.bin, which is refused: it is a pickle, and unpickling executes "
            "code from the file. Save it again as safetensors: "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    if any(folder.glob("*.gguf")):
        return _GGUF
    if weights:
        return f"It has {weights[0]} but no config.json"
    if (folder / "config.json").is_file():
        return "It has config.json but no model.safetensors or model.safetensors.index.json"
    if (folder / "checkpoints").is_dir():
        return "It is a MODEL_DIR whose checkpoints/ holds no complete step yet"
    if own := sorted(child.name for child in folder.iterdir() if is_step(child)):
        return f"It contains the steps {', '.join(own[:5])} of a run: give one of these folders"
    begins = ("checkpoint_", "checkpoint-")  # T5X's steps, and those of transformers' Trainer
    steps = sorted(child.name for child in folder.iterdir() if child.name.startswith(begins))
    if steps:
        return f"It contains {', '.join(steps[:5])}: give one of these folders"
    return f"Looked for {_LOOKED_FOR}"
