"""Reads and writes the model in a step's folder: its parameters, and the JSON beside them.

`gkd_jax.storage.checkpoints` says what else the folder of a step holds.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gkd_jax.convert import formats
from gkd_jax.models import lm
from gkd_jax.models.parameters import flatten
from gkd_jax.storage import fingerprints
from gkd_jax.text import files


FOLDER = "checkpoints"  # of a MODEL_DIR, with one folder for each saved step
# The folder in a MODEL_DIR, or in a converted checkpoint, with the tokenizer's and other files of
# the Hugging Face folder from which the model began.
TOKENIZER = "tokenizer"
# Orbax writes this file into the folder of a step when the step is complete. It does so only in a
# bucket, where a folder cannot get its final name in one go.
_COMMITTED = "commit_success.txt"


def saved_steps(model_dir: str | os.PathLike[str]) -> list[int]:
    """Returns the steps of the complete checkpoints of a MODEL_DIR, in ascending order."""
    folder = epath.Path(model_dir) / FOLDER
    if not folder.is_dir():
        return []
    in_bucket = files.in_bucket(folder)
    return sorted(
        int(child.name)
        for child in folder.iterdir()
        if child.name.isdecimal()
        and (child / "params").is_dir()
        and (not in_bucket or (child / _COMMITTED).exists())
    )


def describe_model(
    config: lm.Config, vocabulary_hash: str, num_pieces: int | None = None
) -> dict[str, Any]:
    """Returns the JSON that is stored beside a step's parameters.

    Args:
        vocabulary_hash: the `vocabularies.content_hash` of the vocabulary; "" if unknown.
        num_pieces: the number of ids that the vocabulary has; None if unknown. Further rows of the
            embedding only round its size up.
    """
    about: dict[str, Any] = {
        "family": config.family,
        "config": dataclasses.asdict(config),
        "vocabulary": vocabulary_hash,
    }
    return about if num_pieces is None else {**about, "num_pieces": num_pieces}


def find_step(path: str) -> epath.Path | None:
    """Returns `path` if it is a step folder, the newest step folder of a MODEL_DIR, else None."""
    folder = epath.Path(path)
    if formats.is_step(folder):
        return folder
    steps = saved_steps(path)
    return folder / FOLDER / str(steps[-1]) if steps else None


def tokenizer_folder(step_folder: epath.Path) -> epath.Path:
    """Returns the folder of the tokenizer of a step: beside its parameters, or in its MODEL_DIR.

    It is beside the parameters of a converted checkpoint, which may lie in any folder.
    """
    folder = files.absolute(step_folder)
    beside = folder / TOKENIZER
    is_of_run = folder.parent.name == FOLDER and not beside.is_dir()
    return folder.parent.parent / TOKENIZER if is_of_run else beside


def read_description(step_folder: epath.Path) -> dict[str, Any]:
    """Returns the JSON beside a step's parameters; see `describe_model`.

    Raises:
        DamagedError: if the file is cut or damaged; the message names it.
    """
    file = step_folder / "model" / "metadata"
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise fingerprints.DamagedError(f"{file} is damaged: {error}") from error


def read_fingerprints(step_folder: epath.Path) -> dict[str, dict[str, int]]:
    """Returns the fingerprints of a step's arrays, by item ("params", say) and name.

    Raises:
        DamagedError: if there are none.
    """
    found = read_description(step_folder).get("fingerprints")
    if not isinstance(found, dict) or "params" not in found:
        raise fingerprints.DamagedError(f"{step_folder}/model/metadata has no fingerprints")
    return found


def read_config(step_folder: epath.Path) -> lm.Config:
    """Returns the config of the model in a step folder."""
    about = read_description(step_folder)
    return lm.from_fields(about["family"], about["config"])


def read_params(step_folder: epath.Path, target: lm.Params) -> lm.Params:
    """Returns the parameters in a step folder, with the shapes, dtypes and shardings of `target`.

    Raises:
        DamagedError: if the bytes of an array differ from the bytes that were written; the message
            names the array.
    """
    stored = read_fingerprints(step_folder)["params"]
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(target)):
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(files.absolute(step_folder) / "params", target)
        fingerprints.check(params, stored)
        return params
    # Parameters are written in float32, and a fingerprint is valid for the written dtype only. One
    # array is read in float32, checked and cast at a time: the memory never holds the model twice.
    leaves, structure = jax.tree.flatten(target)
    names, params = list(flatten(target)), []
    with ocp.PyTreeCheckpointer() as checkpointer:
        for index, leaf in enumerate(leaves):
            wide = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
            items: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
            arguments: list[Any] = [ocp.RestoreArgs()] * len(leaves)
            items[index], arguments[index] = wide, ocp.checkpoint_utils.construct_restore_args(wide)
            wanted = ocp.args.PyTreeRestore(
                item=structure.unflatten(items), restore_args=structure.unflatten(arguments)
            )
            restored = checkpointer.restore(files.absolute(step_folder) / "params", args=wanted)
            array = jax.tree.leaves(restored)[index]
            fingerprints.check({names[index]: array}, stored)
            params.append(array.astype(leaf.dtype))
    return structure.unflatten(params)


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns Orbax's handler of trees, which writes small arrays in one piece.

    By itself Orbax cuts an array of which this process holds several copies into a slice for each
    copy, so that every device sends one to the host. It compiles a program for each slice: for 58
    arrays on eight devices of a CPU the first save took 4.0 s in place of 0.1 s. Arrays whose
    slices have 16 MiB or more are still cut. Several processes share the writing, so they have
    Orbax's own handler, which also compares what the processes say of each array.
    """
    if jax.process_count() > 1:
        return ocp.PyTreeCheckpointHandler()
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, types.ArrayHandler(min_slice_bytes_for_replica_parallel=16 << 20)),
        (np.ndarray, types.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def write_params(
    folder: str,
    config: lm.Config,
    params: lm.Params,
    vocabulary_hash: str,
    num_pieces: int | None = None,
    more: Mapping[str, Any] = {},
) -> None:
    """Writes a model without training state to the step folder `folder`.

    The JSON beside the parameters is the result of `describe_model` with the entries of `more`.
    """
    target = files.absolute(folder)
    about = {**describe_model(config, vocabulary_hash, num_pieces), **more}
    about["fingerprints"] = {"params": fingerprints.of_tree(params)}
    handler = ocp.CompositeCheckpointHandler("model", params=tree_handler())
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            target,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(params), model=ocp.args.JsonSave(about)
            ),
        )
