"""Saves and resumes a run with Orbax checkpoints.

Each saved step has one folder:

    MODEL_DIR/checkpoints/<step>/params      the student's parameters
                                 opt_state   the optimizer's state
                                 average     the parameters' moving average, if that is the teacher
                                 stream      the position in the training data
                                 model       JSON: config of the model, hash of its vocabulary,
                                             a fingerprint of every array

Parameters are an item of their own, so that a model can be loaded without its optimizer. Orbax
gives a folder its final name only when the folder is complete. `fingerprints` tells whether the
stored bytes are those that were written.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
)

from gkd_jax.gkd import TrainState
from gkd_jax.models.parameters import flatten
from gkd_jax.storage import fingerprints, processes, saved_model
from gkd_jax.text import files


_TREE_FILE = "_METADATA"  # Orbax's record of the structure of an item
DAMAGED = "damaged"
_NO_POSITION = "the position of the data cannot be read"


class _StreamHandler(ocp.CheckpointHandler):
    """Lets a data stream save its position into the step's folder and restore it from there."""

    def save(self, directory: epath.Path, args: "StreamSave") -> None:
        args.stream.save(directory)

    def restore(self, directory: epath.Path, args: "StreamRestore") -> None:
        try:  # If one process raised here, the others would wait for it: see `_restore`.
            args.stream.restore(directory)
        except Exception as error:
            args.errors.append(fingerprints.DamagedError(f"{_NO_POSITION}: {error}"))


@ocp.args.register_with_handler(_StreamHandler, for_save=True)
@dataclasses.dataclass
class StreamSave(ocp.args.CheckpointArgs):
    """Tells Orbax to save the position of `stream`, a `TrainIterator`."""

    stream: Any


@ocp.args.register_with_handler(_StreamHandler, for_restore=True)
@dataclasses.dataclass
class StreamRestore(ocp.args.CheckpointArgs):
    """Tells Orbax to restore the position of `stream` in place; errors go into `errors`."""

    stream: Any
    errors: list[Exception]


class _KeepBest(PreservationPolicy):
    """Preserves the checkpoint whose step has the best score so far."""

    def __init__(self, scores: dict[int, float], mode: str):
        self._scores, self._mode = scores, mode

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = best_step(self._scores, self._mode, [c.step for c in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


def best_step(scores: Mapping[int, float], mode: str, steps: Sequence[int]) -> int | None:
    """Returns which of `steps` has the best score; None if none of them has a score.

    The best score is the largest for the mode "max" and the smallest for "min". If several steps
    have the best score, the latest of them is returned.
    """
    scored = [step for step in steps if step in scores]
    sign = 1 if mode == "max" else -1
    return max(scored, key=lambda step: (sign * scores[step], step), default=None)


class Checkpoints:
    """The checkpoints of one MODEL_DIR, which Orbax writes in the background."""

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
        """Opens the folder of checkpoints, and creates it if it does not exist.

        Args:
            keep: how many of the newest checkpoints are kept; None keeps all checkpoints.
            keep_period: checkpoints of steps divisible by this number are kept as well.
            best_metric: the checkpoint with the best value of this metric is kept as well.
            best_mode: whether the best value is the "max" or the "min".
            scores: the values of `best_metric` from earlier starts of the run, by step.
        """
        self._folder = files.absolute(model_dir) / saved_model.FOLDER
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
                "params": saved_model.tree_handler(),
                "opt_state": saved_model.tree_handler(),
                "average": saved_model.tree_handler(),
                "stream": _StreamHandler(),
                "model": ocp.JsonCheckpointHandler(),
            },
        )

    def restore_newest(
        self, target: TrainState, stream: Any, *, stream_since: int = -1
    ) -> tuple[int, TrainState]:
        """Restores the newest undamaged checkpoint and returns its step and its state.

        If a checkpoint is damaged, a warning names it, and the checkpoint before it is tried. Once
        a checkpoint has been restored, the damaged ones are moved to `MODEL_DIR/damaged/<step>`; if
        an error is raised, none is moved.

        Args:
            target: arrays, or `ShapeDtypeStruct`s with shardings, of the returned state.
            stream: the training data, whose position is restored in place; None skips this.
            stream_since: the step after which the run has read `stream`. Checkpoints of this step
                and earlier ones hold the position in other data, which is skipped.

        Raises:
            ValueError: if no checkpoint can be read, or if one holds other arrays than `target`.
            Exception: any other error, such as one of the file system.
        """
        steps = sorted(self._orbax.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            try:
                state = self._restore(step, target, stream if step > stream_since else None)
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
        """Moves a damaged checkpoint to MODEL_DIR/damaged, under a name that is still free."""
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
        """Returns the step and the score of the best checkpoint; None if none has a score."""
        step = best_step(self._scores, self._best_mode, self._orbax.all_steps())
        return None if step is None else (step, self._scores[step])

    def record_metrics(self, step: int, scores: Mapping[str, float]) -> None:
        """Records the metrics of a step's evaluation, from which the best checkpoint is chosen."""
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
        """Copies the state to the host and writes it in the background, unless the step is saved.

        The position of the stream is saved with it, and `description`
        (`saved_model.describe_model`).
        """
        if step in self._orbax.all_steps():
            return
        items = _items(state)
        marks = {name: fingerprints.of_tree(tree) for name, tree in items.items()}
        with _writing():
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()},
                    stream=StreamSave(stream),
                    model=ocp.args.JsonSave({**description, "fingerprints": marks}),
                ),
            )

    def wait(self) -> None:
        """Waits until all saved checkpoints are written.

        Raises:
            OSError: if one cannot be written, for example because the disk is full.
        """
        with _writing():
            self._orbax.wait_until_finished()

    def _restore(self, step: int, target: TrainState, stream: Any) -> TrainState:
        """Restores one step; see `restore_newest` for the arguments.

        If one process cannot read its part of the data's position, all processes raise together.
        """
        stored = saved_model.read_fingerprints(self._folder / str(step))
        wanted = _items(target)
        if "average" in wanted and "average" not in stored:
            raise ValueError(
                f"checkpoint {step} has no moving average of the student's parameters, which is "
                "the teacher: begin in another MODEL_DIR with this one as STUDENT_CHECKPOINT"
            )
        for name, tree in wanted.items():
            _check_arrays(step, stored.get(name, {}), tree)
            # Without this file, Orbax returns a tree of another form.
            if not (self._folder / str(step) / name / _TREE_FILE).exists():
                raise fingerprints.DamagedError(f"there is no file {name}/{_TREE_FILE}")
        places = ocp.checkpoint_utils.construct_restore_args
        items: dict[str, Any] = {
            name: ocp.args.PyTreeRestore(tree, restore_args=places(tree))
            for name, tree in wanted.items()
        }
        errors: list[Exception] = []
        if stream is not None:
            items["stream"] = StreamRestore(stream, errors)
        restored: Any = self._orbax.restore(step, args=ocp.args.Composite(**items))
        here = errors[0] if errors else None
        elsewhere = fingerprints.DamagedError(f"{_NO_POSITION} in another process")
        processes.raise_together(here, elsewhere)
        for name in wanted:
            fingerprints.check(restored[name], stored[name])
        count = jax.device_put(jnp.asarray(step, jnp.int32), target.step.sharding)
        return TrainState(step=count, **{name: restored[name] for name in wanted})

    def close(self) -> None:
        """Waits until all saved checkpoints are written, then releases Orbax's resources."""
        self.wait()
        self._orbax.close()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Raises OSError in place of the ValueError by which TensorStore tells of some full disks.

    A ValueError would count as a mistake in the configuration.
    """
    try:
        yield
    except ValueError as error:
        reason = (str(error).strip() or "ValueError").splitlines()[0][:300]
        raise OSError(f"a checkpoint cannot be written: {reason}") from error


def _items(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are saved, each as an item of its own."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items if state.average is None else {**items, "average": state.average}


# Error messages of TensorStore and Orbax for files that are truncated, altered or missing.
_DAMAGE = re.compile(
    r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|checksum|corrupt|\b[Dd]ecod(e|ing)\b|[Tt]runcated"
    r"|was not found in the checkpoint"
)
# The codes with which TensorStore begins an error that may be gone at the next attempt, or with
# other permissions.
_PASSING = re.compile(
    r"ABORTED|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED"
    r"|UNAVAILABLE"
)
# What TensorStore quotes: the names of arrays and files, which may contain any word.
_QUOTED = re.compile(r'"[^"]*"|\[tensorstore_spec=.*', re.DOTALL)


def _is_damage(error: BaseException) -> bool:
    """Returns whether an error during a restore means that the checkpoint's files are damaged.

    A file system that is temporarily unavailable or a target with other shapes is no damage.
    """
    if isinstance(error, fingerprints.DamagedError | json.JSONDecodeError | FileNotFoundError):
        return True
    if isinstance(error, OSError) or _PASSING.match(str(error)):
        return False
    if _DAMAGE.search(_QUOTED.sub("", str(error))):
        return True
    # Orbax raises an error of its own where TensorStore cannot read an array.
    return error.__cause__ is not None and _is_damage(error.__cause__)


def _check_arrays(step: int, stored: Mapping[str, int], target: Any) -> None:
    """Raises ValueError if `stored` fingerprints name other arrays than `target` has."""
    if unexpected := sorted(flatten(target).keys() ^ stored.keys()):
        raise ValueError(
            f"checkpoint {step} is of another model or optimizer, whose state cannot be continued: "
            "begin in another MODEL_DIR with this one as STUDENT_CHECKPOINT; only one of the two "
            f"has {', '.join(unexpected[:4])}{' ...' if len(unexpected) > 4 else ''}"
        )
