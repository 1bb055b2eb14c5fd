"""Loads a checkpoint of any format: its config, its parameters, and its number of ids."""

from collections.abc import Iterable, Iterator
import functools
import os
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from gkd_jax import convert
from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten
from gkd_jax.storage import hub, saved_model


_MOST_NAMES = 10  # The number of arrays that one error message names.


def load_config(path: str | os.PathLike[str]) -> lm.Config:
    """Returns the config of the model in a checkpoint of any format.

    Args:
        path: a MODEL_DIR (which refers to its newest step), one of its folders
            `checkpoints/<step>`, a Hugging Face folder (local only) or a T5X `checkpoint_<step>`;
            local or gs://; or a name on the Hugging Face hub, such as "google/flan-t5-small".

    Raises:
        FileNotFoundError: if there is no such file or folder, nor such a model on the hub.
        ValueError: if the folder has none of the formats; the message says what was looked for.
    """
    path = hub.local_folder(os.fspath(path))
    if not path or not epath.Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path!r}: there is no such file or folder")
    step_folder = saved_model.find_step(path)
    return (
        convert.read_config(path) if step_folder is None else saved_model.read_config(step_folder)
    )


def load_params(path: str | os.PathLike[str], target: lm.Params, config: lm.Config) -> lm.Params:
    """Returns the parameters in a checkpoint of any format.

    Args:
        path: the checkpoint; see `load_config`.
        target: `ShapeDtypeStruct`s with the wanted dtypes and, for sharded arrays, shardings.
        config: the result of `load_config`.

    Raises:
        ValueError: if arrays are damaged or do not fit the model, or if an array has a NaN or an
            infinity; the message names the arrays.
    """
    path = hub.local_folder(os.fspath(path))
    step_folder = saved_model.find_step(path)
    if step_folder is not None:
        params = saved_model.read_params(step_folder, target)
    else:
        leaf = jax.tree.leaves(target)[0]
        shardings = None if leaf.sharding is None else jax.tree.map(lambda x: x.sharding, target)
        params = convert.read_params(path, config, dtype=leaf.dtype, shardings=shardings)
    check_finite(params, path)
    return params


def check_finite(params: Any, path: str) -> None:
    """Checks that all parameters are finite, because other models decode empty texts silently.

    Raises:
        ValueError: if an array has a NaN or an infinity; the message names the arrays, and the
            layers of arrays that stack the layers of a model.
    """
    named = flatten(params)
    stacked = tuple("/layers/" in name for name in named)
    flags = jax.device_get(_finite([*named.values()], stacked))
    wrong = list(_not_finite(named, flags))
    if wrong:
        more = f" and {len(wrong) - _MOST_NAMES} more" if len(wrong) > _MOST_NAMES else ""
        raise ValueError(
            f"the checkpoint {path!r} holds numbers that are not finite (NaN or infinity), in "
            f"{', '.join(wrong[:_MOST_NAMES])}{more}"
        )


def _not_finite(names: Iterable[str], flags: list[Any]) -> Iterator[str]:
    for name, flag in zip(names, flags, strict=True):
        if flag.ndim == 0 and not flag:
            yield name
        elif flag.ndim:
            yield from (f"{name} (layer {layer})" for layer in (~flag).nonzero()[0])


@functools.partial(jax.jit, static_argnums=1)
def _finite(leaves: list[jax.Array], stacked: tuple[bool, ...]) -> list[jax.Array]:
    return [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(int(by_layer), leaf.ndim)))
        for leaf, by_layer in zip(leaves, stacked, strict=True)
    ]


def load_model(path: str | os.PathLike[str]) -> tuple[lm.Config, lm.Params]:
    """Returns the config and the float32 parameters of the model in a checkpoint of any format.

    See `load_config` for the formats, and `load_config` and `load_params` for the errors.
    """
    path = hub.local_folder(os.fspath(path))
    config = load_config(path)
    return config, load_params(path, lm.abstract_params(config), config)


def num_pieces(*paths: str | os.PathLike[str]) -> int:
    """Returns the number of ids that mean the same token to all of some checkpoints.

    An embedding often has more rows than the vocabulary has ids, and those rows must be neither
    sampled nor distilled. A checkpoint of gkd_jax stores the number of ids and a hash of its
    vocabulary; a Hugging Face folder, and a checkpoint converted from one, hold the tokenizer.
    Where neither is there, the rows of the embedding count, and nothing can be compared.

    Args:
        paths: checkpoints, each as for `load_config`; a student and its teacher, say.

    Raises:
        FileNotFoundError, ValueError: as `load_config` does, if no checkpoint is given, or if two
            of them have different vocabularies.
    """
    if not paths:
        raise ValueError("num_pieces needs at least one checkpoint, got none")
    found = [_vocabulary(hub.local_folder(os.fspath(path))) for path in paths]
    first, *others = [one for one in found if one.content] or found
    shared = [_num_shared(first, other) for other in others if other.content]
    return min([one.num_pieces for one in found] + shared)


class _Vocabulary(NamedTuple):
    """What a checkpoint says of its vocabulary."""

    path: str  # of the checkpoint
    num_pieces: int
    content: str  # its hash; "" if the checkpoint has none
    tokenizer: Any  # of a Hugging Face folder, or of what was converted from one; else None


def _vocabulary(path: str) -> _Vocabulary:
    step_folder = saved_model.find_step(path)
    about = {} if step_folder is None else saved_model.read_description(step_folder)
    rows = about.get("num_pieces") or load_config(path).vocab_size
    # A converted checkpoint has the tokenizer of its source in the place of a hash.
    folder = saved_model.tokenizer_folder(step_folder) if step_folder else epath.Path(path)
    if about.get("vocabulary") or not folder.is_dir():
        return _Vocabulary(path, rows, about.get("vocabulary", ""), None)
    from gkd_jax.text import vocabularies  # brings TensorFlow and seqio

    own = vocabularies.find_in_folder(folder)
    if own is None:
        return _Vocabulary(path, rows, "", None)
    size = min(vocabularies.num_pieces(own), rows)
    return _Vocabulary(path, size, vocabularies.content_hash(own), own)


def _num_shared(one: _Vocabulary, other: _Vocabulary) -> int:
    """Returns how many ids two vocabularies share, or raises ValueError if they differ."""
    if one.content == other.content:
        return min(one.num_pieces, other.num_pieces)
    if one.tokenizer is None or other.tokenizer is None:
        raise ValueError(
            f"{one.path!r} and {other.path!r} have different vocabularies (content "
            f"{one.content[:12]} and {other.content[:12]}): their ids do not mean the same tokens"
        )
    from gkd_jax.text import vocabularies

    return vocabularies.shared_pieces(
        one.tokenizer, other.tokenizer, student_name=one.path, teacher_name=other.path
    )
