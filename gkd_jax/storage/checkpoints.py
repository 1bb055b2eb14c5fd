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

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import os
import pathlib
import re
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
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from gkd_jax.gkd import TrainState
from gkd_jax.models import lm


FOLDER = "checkpoints"
DAMAGED = "damaged"


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

    stream: Any


@ocp.args.register_with_handler(_StreamHandler, for_restore=True)
@dataclasses.dataclass
class StreamRestore(ocp.args.CheckpointArgs):
    """Restores a `TrainIterator` in place; `errors` has what was wrong."""

    stream: Any
    errors: list[Exception] = dataclasses.field(default_factory=list)


class _KeepBest(PreservationPolicy):
    """Keeps the checkpoint whose step has the best score so far."""

    def __init__(self, scores: dict[int, float], mode: str):
        self._scores, self._mode = scores, mode

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = best_step(self._scores, self._mode, [c.step for c in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def best_step(scores: Mapping[int, float], mode: str, steps: Sequence[int]) -> int | None:
    """The step of some with the best score, the latest of equals; None where none has one."""
    scored = [step for step in steps if step in scores]
    sign = 1 if mode == "max" else -1
    return max(scored, key=lambda step: (sign * scores[step], step), default=None)


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
        scores: Mapping[int, float] = {},
    ):
        """Opens or makes the folder.

        Args:
            model_dir: of the run.
            keep: newest checkpoints that stay; None keeps all.
            keep_period: those of steps that it divides stay besides.
            best_metric: the one with the best of this number of `score`'s stays besides.
            best_mode: whether the best is the "max" or the "min".
            scores: the numbers of steps that were evaluated before this start.
        """
        self._folder = epath.Path(model_dir).resolve() / FOLDER
        self._best_metric, self._best_mode = best_metric, best_mode
        self._scores = dict(scores)
        policies: list[PreservationPolicy] = [LatestN(n=keep)]
        if keep_period is not None:
            policies.append(EveryNSteps(keep_period))
        if best_metric is not None:
            policies.append(_KeepBest(self._scores, best_mode))
        self._orbax = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                create=True, preservation_policy=AnyPreservationPolicy(policies)
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "stream": _StreamHandler(),
                "model": ocp.JsonCheckpointHandler(),
            },
        )

    def restore_newest(self, target: TrainState, stream: Any) -> tuple[int, TrainState]:
        """The newest checkpoint that can be read whole: its step and its state.

        One that fails its own integrity check is named in a warning, and the one before it is
        tried. Once one has been read, those that failed are moved to MODEL_DIR/damaged/<step>.

        Args:
            target: arrays or placed `ShapeDtypeStruct`s, as which the state is laid out.
            stream: goes on where the checkpoint was saved; None leaves the data where they are.

        Raises:
            ValueError: if no checkpoint can be read, or if they hold other arrays than `target`;
                nothing is moved then.
            Exception: of the file system, as it comes; nothing is moved then.
        """
        steps = sorted(self._orbax.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            try:
                state = self._restore(step, target, stream)
            except Exception as error:
                if not _is_damage(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                print(f"WARNING: checkpoint {step} is damaged: {reason}", file=sys.stderr)
                damaged.append(step)
                continue
            for failed in damaged:
                self._put_aside(failed)
            return step, state
        raise ValueError(f"none of the checkpoints {steps} of {self._folder} can be read")

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            aside = self._folder.parent / DAMAGED
            aside.mkdir(exist_ok=True)
            names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(2)))
            free = next(name for name in names if not (aside / name).exists())
            (self._folder / str(step)).rename(aside / free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged {step}")
        self._orbax.reload()

    def best(self) -> tuple[int, float] | None:
        """The step of the best checkpoint and its score; None where none has a score."""
        step = best_step(self._scores, self._best_mode, self._orbax.all_steps())
        return None if step is None else (step, self._scores[step])

    def score(self, step: int, scores: Mapping[str, float]) -> None:
        """Takes the numbers of the evaluation of a step that is, or was, saved."""
        if self._best_metric is None:
            return
        if self._best_metric in scores:
            self._scores[step] = float(scores[self._best_metric])
        else:
            print(
                f"WARNING: no best checkpoint: the evaluation has no {self._best_metric}, "
                f"but {', '.join(scores)}",
                file=sys.stderr,
            )

    def save(self, step: int, state: TrainState, stream: Any, description: dict[str, Any]) -> None:
        """Copies the state off the device and writes it while training goes on.

        Args:
            step: updates done.
            state: after them.
            stream: the position of the training data.
            description: see `describe_model`.
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
        self._orbax.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                stream=StreamSave(stream),
                model=ocp.args.JsonSave(description),
            ),
        )

    def wait(self) -> None:
        """Returns once everything that was saved is written."""
        self._orbax.wait_until_finished()

    def _restore(self, step: int, target: TrainState, stream: Any) -> TrainState:
        """The state at a step, laid out as `target` (arrays or placed `ShapeDtypeStruct`s)."""
        stored = read_description(self._folder / str(step)).get("fingerprints", {})
        for name in ("params", "opt_state"):
            _check_arrays(step, stored.get(name), getattr(target, name))
        position = None if stream is None else StreamRestore(stream)
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(target.params),
            "opt_state": ocp.args.StandardRestore(target.opt_state),
        }
        if position is not None:
            items["stream"] = position
        restored: Any = self._orbax.restore(step, args=ocp.args.Composite(**items))
        errors = [] if position is None else position.errors
        if np.any(multihost_utils.process_allgather(np.asarray(bool(errors)))):
            here = errors[0] if errors else "of another process' part"
            raise DamagedError(f"the position of the data cannot be read: {here}")
        _check_fingerprints(restored.params, stored.get("params"))
        _check_fingerprints(restored.opt_state, stored.get("opt_state"))
        count = jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding)
        return TrainState(count, restored.params, restored.opt_state)

    def close(self) -> None:
        """Waits until everything is written."""
        self._orbax.wait_until_finished()
        self._orbax.close()


class DamagedError(ValueError):
    """Stored bytes are not those that were written."""


# What TensorStore and Orbax say of files that are cut short, altered or gone.
_DAMAGE = re.compile(
    r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|checksum|corrupt|[Dd]ecod|[Tt]runcated"
    r"|was not found in the checkpoint"
)


def _is_damage(error: BaseException) -> bool:
    """Whether an error of a restore says that the checkpoint's own bytes are wrong or gone.

    A file system that is away for a moment, or a target of other shapes, says nothing of the kind.
    """
    if isinstance(error, DamagedError | json.JSONDecodeError | FileNotFoundError):
        return True
    return bool(_DAMAGE.search(str(error)))


def _check_arrays(step: int, stored: Mapping[str, int] | None, target: Any) -> None:
    """Raises ValueError where a checkpoint holds arrays of other names than the run has."""
    if not stored:
        return
    expected = set(array_names(target))
    if unexpected := sorted(expected ^ set(stored)):
        raise ValueError(
            f"checkpoint {step} is of another model or optimizer: only one of the two has "
            f"{', '.join(unexpected[:4])}{' ...' if len(unexpected) > 4 else ''}"
        )


def saved_steps(model_dir: str | os.PathLike[str]) -> list[int]:
    """The steps of a MODEL_DIR's complete checkpoints; empty where it has none."""
    folder = epath.Path(model_dir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(
        int(child.name)
        for child in folder.iterdir()
        if child.name.isdecimal() and (child / "params").is_dir()
    )


def describe_model(
    config: lm.Config, vocabulary_hash: str, num_pieces: int | None = None
) -> dict[str, Any]:
    """The JSON beside a step's parameters.

    Args:
        config: the model's sizes.
        vocabulary_hash: `vocabularies.content_hash`; empty where it is unknown.
        num_pieces: of the vocabulary; ids beyond it exist only to round the embedding up.
    """
    about: dict[str, Any] = {
        "family": lm.family_name(config),
        "config": dataclasses.asdict(config),
        "vocabulary": vocabulary_hash,
    }
    return about if num_pieces is None else {**about, "num_pieces": num_pieces}


def find_step(path: str) -> epath.Path | None:
    """The step folder that a MODEL_DIR (its newest) or a step folder means; None if neither."""
    folder = epath.Path(path)
    if (folder / "params").is_dir() and (folder / "model").is_dir():
        return folder
    steps = saved_steps(path)
    return folder / FOLDER / str(steps[-1]) if steps else None


def read_description(step_folder: epath.Path) -> dict[str, Any]:
    """What `describe_model` wrote."""
    return json.loads((step_folder / "model" / "metadata").read_text())


def read_config(step_folder: epath.Path) -> lm.Config:
    """Sizes of the model in a step folder."""
    about = read_description(step_folder)
    return lm.from_fields(about.get("family", "t5"), about["config"])


def read_params(step_folder: epath.Path, target: lm.Params) -> lm.Params:
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
    values = _fingerprint(jax.tree.leaves(tree))
    return dict(zip(array_names(tree), (int(value) for value in values), strict=True))


def array_names(tree: Any) -> list[str]:
    """The path of each array of a tree, as fingerprints name it."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


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
        raise DamagedError(
            f"the stored bytes of {', '.join(wrong)} are not those that were written"
        )


def write_params(
    folder: str,
    config: lm.Config,
    params: lm.Params,
    vocabulary_hash: str,
    num_pieces: int | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """A model without training state, in a step folder of its own; see `describe_model`."""
    target = epath.Path(folder).resolve()
    about = {**describe_model(config, vocabulary_hash, num_pieces), **(more or {})}
    about["fingerprints"] = {"params": fingerprints(params)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "model")) as checkpointer:
        checkpointer.save(
            target,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                model=ocp.args.JsonSave(about),
            ),
        )
