"""Saving and resuming a run: orbax, one atomic folder a step.

    MODEL_DIR/checkpoints/<step>/params      the student's parameters
                                 opt_state   the optimizer's state
                                 stream      the position of the training data
                                 model       JSON: sizes of the model, hash of its vocabulary,
                                             a fingerprint of every array

Parameters are an item of their own, so that a model can be loaded without its optimizer. A folder
gets its name only when it is complete. Storage formats do not notice a flipped bit; fingerprints,
computed from the arrays on the device before they are written, do.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import sys
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from gkd_jax.input.data import TrainIterator
from gkd_jax.models import t5
from gkd_jax.train_state import TrainState


FOLDER = "checkpoints"


class _StreamHandler(ocp.CheckpointHandler):
    """Lets a data stream write itself into the step's folder."""

    def save(self, directory: epath.Path, args: "StreamSave") -> None:
        args.stream.save(pathlib.Path(directory))

    def restore(self, directory: epath.Path, args: "StreamRestore") -> None:
        try:  # a shard's file may be damaged for one process alone, and the others wait for it
            args.stream.restore(pathlib.Path(directory))
        except Exception as error:
            args.errors.append(error)

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
    """Restores a `TrainIterator` in place; `errors` has what was wrong."""

    stream: TrainIterator
    errors: list[Exception] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one MODEL_DIR, written in the background."""

    def __init__(
        self,
        model_dir: str,
        *,
        keep: int | None = None,
        keep_period: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "max",
    ):
        """Opens or makes the folder.

        Args:
            model_dir: of the run.
            keep: newest checkpoints that stay; None keeps all.
            keep_period: those of steps that it divides stay besides.
            best_metric: the one with the best of this number of `save`'s scores stays besides.
            best_mode: whether the best is the "max" or the "min".
        """
        self._folder = epath.Path(model_dir).resolve() / FOLDER
        self._best_metric = best_metric
        policies: list[PreservationPolicy] = [LatestN(n=keep)]
        if keep_period is not None:
            policies.append(EveryNSteps(keep_period))
        if best_metric is not None:
            best = BestN(
                get_metric_fn=self._score,
                reverse=best_mode == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self._orbax = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                create=True,
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=None if best_metric is None else self._score,
                best_mode=best_mode,
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "stream": _StreamHandler(),
                "model": ocp.JsonCheckpointHandler(),
            },
        )

    def restore_newest(
        self, target: TrainState, stream: TrainIterator
    ) -> tuple[int, TrainState] | None:
        """The newest checkpoint that can be read whole, and its step; None where there is none.

        One that cannot is named in a warning, moved to MODEL_DIR/damaged/<step>, and the one before
        it is tried.

        Raises:
            ValueError: if there are checkpoints, but none can be read.
        """
        steps = sorted(self._orbax.all_steps(), reverse=True)
        for step in steps:
            try:
                state = self._restore(step, target, stream)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                print(f"WARNING: checkpoint {step} is damaged: {reason}", file=sys.stderr)
                self._put_aside(step)
                continue
            return step, state
        if steps:
            raise ValueError(f"none of the checkpoints {steps} of {self._folder} can be read")
        return None

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder.parent / "damaged"
            aside.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self._orbax.reload()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._orbax.latest_step()

    def best(self) -> tuple[int, float] | None:
        """The step of the best checkpoint and its score; None where none has a score."""
        if self._best_metric is None:
            return None
        step = self._orbax.best_step()
        scores = None if step is None else self._orbax.metrics(step)
        return None if step is None or scores is None else (step, self._score(scores))

    def _score(self, scores: Mapping[str, float]) -> float:
        assert self._best_metric is not None
        return scores[self._best_metric]

    def save(
        self,
        step: int,
        state: TrainState,
        stream: TrainIterator,
        description: dict[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the state off the device and writes it while training goes on.

        Args:
            step: updates done.
            state: after them.
            stream: the position of the training data.
            description: see `describe_model`.
            scores: of the evaluation of this step; None where there was none.
        """
        if step in self._orbax.all_steps():
            return
        description = {
            **description,
            "fingerprints": {
                "params": fingerprints(state.params),
                "opt_state": fingerprints(state.opt_state),
            },
        }
        metrics = None
        if scores is not None and self._best_metric is not None:
            if self._best_metric in scores:
                metrics = {self._best_metric: float(scores[self._best_metric])}
            else:
                print(
                    f"WARNING: no best checkpoint: the evaluation has no {self._best_metric}, "
                    f"but {', '.join(scores)}",
                    file=sys.stderr,
                )
        self._orbax.save(
            step,
            metrics=metrics,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                stream=StreamSave(stream),
                model=ocp.args.JsonSave(description),
            ),
        )

    def _restore(self, step: int, target: TrainState, stream: TrainIterator) -> TrainState:
        """The state at a step, laid out as `target` (arrays or placed `ShapeDtypeStruct`s)."""
        position = StreamRestore(stream)
        restored: Any = self._orbax.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                opt_state=ocp.args.StandardRestore(target.opt_state),
                stream=position,
            ),
        )
        if np.any(multihost_utils.process_allgather(np.asarray(bool(position.errors)))):
            here = position.errors[0] if position.errors else "of another process' part"
            raise ValueError(f"the position of the data cannot be read: {here}")
        stored = read_description(self._folder / str(step)).get("fingerprints", {})
        _check_fingerprints(restored.params, stored.get("params"))
        _check_fingerprints(restored.opt_state, stored.get("opt_state"))
        count = jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding)
        return TrainState(count, restored.params, restored.opt_state)

    def close(self) -> None:
        """Waits until everything is written."""
        self._orbax.wait_until_finished()
        self._orbax.close()


def describe_model(
    config: t5.T5Config, vocabulary_hash: str, num_pieces: int | None = None
) -> dict[str, Any]:
    """The JSON beside a step's parameters.

    Args:
        config: the model's sizes.
        vocabulary_hash: `vocabularies.content_hash`; empty where it is unknown.
        num_pieces: of the vocabulary; ids beyond it exist only to round the embedding up.
    """
    about = {"config": dataclasses.asdict(config), "vocabulary": vocabulary_hash}
    return about if num_pieces is None else {**about, "num_pieces": num_pieces}


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
    """Parameters alone, in the shapes, dtypes and shardings of `target`.

    Raises:
        ValueError: naming the arrays that are not those that were written.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(step_folder.resolve() / "params", target)
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):  # as they were written
        stored = read_description(step_folder).get("fingerprints", {})
        _check_fingerprints(params, stored.get("params"))
    return params


def fingerprints(tree: Any) -> dict[str, int]:
    """A number for each array: the sum over its elements of bits x (2 index + 1), modulo 2^32.

    Integers that wrap around add up to the same in any order, and so on any mesh; every change of
    one element changes the sum.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    values = _fingerprint([leaf for _, leaf in leaves])
    return dict(zip(names, (int(value) for value in values), strict=True))


@jax.jit
def _fingerprint(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):  # no reshape: shards stay where they are
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _check_fingerprints(tree: Any, stored: dict[str, int] | None) -> None:
    """Checkpoints of before there were fingerprints have none to compare."""
    if not stored:
        return
    found = fingerprints(tree)
    wrong = [name for name, value in found.items() if stored.get(name) != value]
    if wrong:
        raise ValueError(f"the stored bytes of {', '.join(wrong)} are not those that were written")


def write_params(
    folder: str,
    config: t5.T5Config,
    params: t5.Params,
    vocabulary_hash: str,
    num_pieces: int | None = None,
) -> None:
    """A model without training state, in a step folder of its own; see `describe_model`."""
    target = epath.Path(folder).resolve()
    about = describe_model(config, vocabulary_hash, num_pieces)
    about["fingerprints"] = {"params": fingerprints(params)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "model")) as checkpointer:
        checkpointer.save(
            target,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                model=ocp.args.JsonSave(about),
            ),
        )
