"""Saving and resuming a run: orbax, one atomic folder a step.

    MODEL_DIR/checkpoints/<step>/params      the student's parameters
                                 opt_state   the optimizer's state
                                 stream      the position of the training data
                                 model       JSON: sizes of the model, hash of its vocabulary

Parameters are an item of their own, so that a model can be loaded without its optimizer.
"""

import dataclasses
import json
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gkd_jax.data import TrainIterator
from gkd_jax.models import t5
from gkd_jax.train_state import TrainState


FOLDER = "checkpoints"


class _StreamHandler(ocp.CheckpointHandler):
    """Lets a data stream write itself into the step's folder. Every process has the same stream."""

    def save(self, directory: epath.Path, args: "StreamSave") -> None:
        if jax.process_index() == 0:
            args.stream.save(pathlib.Path(directory))

    def restore(self, directory: epath.Path, args: "StreamRestore") -> None:
        args.stream.restore(pathlib.Path(directory))

    def finalize(self, directory: epath.Path) -> None:
        pass

    def close(self) -> None:
        pass


@ocp.args.register_with_handler(_StreamHandler, for_save=True)
@dataclasses.dataclass
class StreamSave(ocp.args.CheckpointArgs):
    """Saves a `TrainIterator`."""

    stream: TrainIterator


@ocp.args.register_with_handler(_StreamHandler, for_restore=True)
@dataclasses.dataclass
class StreamRestore(ocp.args.CheckpointArgs):
    """Restores a `TrainIterator` in place."""

    stream: TrainIterator


class Checkpoints:
    """The checkpoints of one MODEL_DIR, written in the background."""

    def __init__(self, model_dir: str, *, keep: int | None = None):
        self._orbax = ocp.CheckpointManager(
            epath.Path(model_dir).resolve() / FOLDER,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "stream": _StreamHandler(),
                "model": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._orbax.latest_step()

    def save(
        self, step: int, state: TrainState, stream: TrainIterator, description: dict[str, Any]
    ) -> None:
        """Copies the state off the device and writes it while training goes on."""
        if step in self._orbax.all_steps():
            return
        self._orbax.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                stream=StreamSave(stream),
                model=ocp.args.JsonSave(description),
            ),
        )

    def restore(self, step: int, target: TrainState, stream: TrainIterator) -> TrainState:
        """The state at a step, laid out as `target` (arrays or placed `ShapeDtypeStruct`s)."""
        restored: Any = self._orbax.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                opt_state=ocp.args.StandardRestore(target.opt_state),
                stream=StreamRestore(stream),
            ),
        )
        count = jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding)
        return TrainState(count, restored.params, restored.opt_state)

    def close(self) -> None:
        """Waits until everything is written."""
        self._orbax.wait_until_finished()
        self._orbax.close()


def describe_model(config: t5.T5Config, vocabulary_hash: str) -> dict[str, Any]:
    """The JSON beside a step's parameters."""
    return {"config": dataclasses.asdict(config), "vocabulary": vocabulary_hash}


def find_step(path: str) -> epath.Path | None:
    """The step folder that a MODEL_DIR (its newest) or a step folder means; None if neither."""
    folder = epath.Path(path)
    if (folder / "params").is_dir() and (folder / "model").is_dir():
        return folder
    if not (folder / FOLDER).is_dir():
        return None
    steps = [
        int(child.name)
        for child in (folder / FOLDER).iterdir()
        if child.name.isdecimal() and (child / "params").is_dir() and (child / "model").is_dir()
    ]
    return folder / FOLDER / str(max(steps)) if steps else None


def read_description(step_folder: epath.Path) -> dict[str, Any]:
    """What `describe_model` wrote."""
    return json.loads((step_folder / "model" / "metadata").read_text())


def read_config(step_folder: epath.Path) -> t5.T5Config:
    """Sizes of the model in a step folder."""
    fields = read_description(step_folder)["config"]
    fields["mlp_activations"] = tuple(fields["mlp_activations"])
    return t5.T5Config(**fields)


def read_params(step_folder: epath.Path, target: t5.Params) -> t5.Params:
    """Parameters alone, in the shapes, dtypes and shardings of `target`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(step_folder.resolve() / "params", target)


def write_params(folder: str, config: t5.T5Config, params: t5.Params, vocabulary_hash: str) -> None:
    """A model without training state, in a step folder of its own; an empty hash is unknown."""
    target = epath.Path(folder).resolve()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "model")) as checkpointer:
        checkpointer.save(
            target,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                model=ocp.args.JsonSave(describe_model(config, vocabulary_hash)),
            ),
        )
