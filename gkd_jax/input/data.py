"""The configuration of a run's training data, and the sharding of batches over devices.

This module needs neither TensorFlow nor seqio. The module `gkd_jax.input.streams` reads the
examples.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from gkd_jax import sharding
from gkd_jax.batch import Batch
from gkd_jax.text import settings, teacher_template


TEACHER_INPUTS = "teacher_inputs"
FEATURES = ("inputs", "targets", TEACHER_INPUTS)

Shape = tuple[int, ...]
"""The lengths (S, T) of a batch; (S, T, R) where the teacher reads prompts of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """States the training data of a run.

    Attributes:
        task: the name of a seqio task or mixture, or the path of a JSONL file or of a folder with
            train.jsonl (see `gkd_jax.input.jsonl`). For several tasks, a mapping from each name or
            path to the number of rows that the task has in every batch, such as
            {"arithmetic": 24, "./texts.jsonl": 8}. A path may select the rows whose field `teacher`
            has a value: {"./data.jsonl:mathematics": 24, "./data.jsonl:texts": 8}.
        feature_lengths: {"inputs": S, "targets": T}. Longer sequences are cut, shorter ones padded.
            With "teacher_inputs": R as well, the teacher reads prompts of its own: the task's
            feature of that name, or what `teacher_template` makes.
        batch_size: the number of rows of the global batch.
        seed: the seed of the order of examples.
        data_dir: the folder from which tasks made of plain files read.
        vocabulary: "bytes", "arithmetic", "t5", a SentencePiece file or a Hugging Face folder; None
            means the tokenizer in the student's Hugging Face folder if there is one, or else the
            vocabulary of the task. Commands also take a name on the Hugging Face hub, which they
            replace by the downloaded folder.
        extra_ids: the number of sentinel ids after the pieces of a SentencePiece file (T5: 100).
        split: the split of the task.
        num_examples: how many of the first examples of each task are trained on; None means all.
        use_cached: whether the task is read from seqio's cache.
        length_buckets: increasing lengths. A batch has examples of similar length, padded to the
            smallest of these lengths that holds all of them, or else to `feature_lengths`. () pads
            every batch to `feature_lengths`. The student's samples do not depend on the bucket:
            they have at most as many tokens as `feature_lengths` allows for targets.
        teacher_cache: a folder with the teacher's scores of the targets, which `gkd-jax score`
            wrote. Steps on the data set's targets then need no teacher.
        shard_by_process: whether each process reads only a part of the examples, from which it
            makes its own rows of every batch. The part is a share of the source's files if there
            are enough files, or else a share of the examples. Batches then depend on the number of
            processes, which a resumed run must keep.
        eval_fraction: the share of a JSONL file's rows that, chosen by `seed`, becomes the split
            "validation" and is not trained on.
        long_prompts: whether prompts of a JSONL file with more tokens than `feature_lengths` allows
            are left out ("skip") or keep only their last tokens ("cut").
        template_variables: further variables of the chat template for a JSONL file with messages,
            such as {"enable_thinking": False}.
        teacher_template: the text of the teacher's own prompts, such as
            "{inputs} Solution: {targets}" (see `gkd_jax.text.teacher_template`).
    """

    task: str | Mapping[str, int]
    feature_lengths: Mapping[str, int]
    batch_size: int
    seed: int = 0
    data_dir: str | None = None
    vocabulary: str | None = None
    extra_ids: int = 0
    split: str = "train"
    num_examples: int | None = None
    use_cached: bool = False
    length_buckets: tuple[int, ...] = ()
    teacher_cache: str | None = None
    shard_by_process: bool = False
    eval_fraction: float | None = None
    long_prompts: str = "skip"
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher_template: str | None = None

    def __post_init__(self):
        settings.check_types(self)
        if not self.task:
            raise ValueError(f"task must be the name of a seqio task, got {self.task!r}")
        given = self.feature_lengths
        if {*given, TEACHER_INPUTS} != {*FEATURES}:
            raise ValueError(
                "feature_lengths must be {'inputs': ..., 'targets': ...}, and may have "
                f"{TEACHER_INPUTS!r}, got {given!r}"
            )
        if self.teacher_template is not None:
            teacher_template.parts(self.teacher_template)
            if TEACHER_INPUTS not in given:
                raise ValueError(
                    f"teacher_template={self.teacher_template!r} needs the length of what it "
                    f"makes: feature_lengths[{TEACHER_INPUTS!r}] is missing, got {dict(given)}"
                )
        for name, length in self.feature_lengths.items():
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"feature_lengths[{name!r}] must be positive, got {length!r}")
        settings.check_positive(self, "batch_size", "num_examples")
        settings.check_seed(self.seed)
        if not all(isinstance(length, int) and length > 0 for length in self.length_buckets):
            raise ValueError(f"length_buckets must be positive integers, got {self.length_buckets}")
        if tuple(sorted(set(self.length_buckets))) != tuple(self.length_buckets):
            raise ValueError(f"length_buckets must increase, got {self.length_buckets}")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction!r}")
        if self.long_prompts not in ("skip", "cut"):
            raise ValueError(f"long_prompts must be 'skip' or 'cut', got {self.long_prompts!r}")
        if not isinstance(self.task, str):
            self._check_tasks()
        if self.shard_by_process and self.length_buckets:
            raise ValueError(
                "shard_by_process needs batches of one shape, lest processes take different ones: "
                f"length_buckets must be (), got {self.length_buckets}"
            )

    def _check_tasks(self) -> None:
        assert isinstance(self.task, Mapping)
        for name, rows in self.task.items():
            if not isinstance(name, str) or not isinstance(rows, int) or rows < 1:
                raise ValueError(
                    "several tasks are given as {name: rows in every batch}, with positive "
                    f"integers, got {dict(self.task)}"
                )
        if sum(self.task.values()) != self.batch_size:
            raise ValueError(
                f"the rows of the tasks {dict(self.task)} add up to {sum(self.task.values())}, "
                f"and batch_size is {self.batch_size}"
            )
        if self.length_buckets:
            raise ValueError(
                "several tasks need batches of one shape, lest a bucket hold other shares of their "
                f"rows: length_buckets must be (), got {self.length_buckets}"
            )
        if self.teacher_cache is not None:
            raise ValueError(
                "a teacher cache holds the scores of one task: with several tasks teacher_cache "
                f"must be None, got {self.teacher_cache!r}"
            )

    @property
    def task_rows(self) -> dict[str, int]:
        """Returns the number of rows that each task has in every batch."""
        return {self.task: self.batch_size} if isinstance(self.task, str) else dict(self.task)

    @property
    def block(self) -> dict[str, int]:
        """Returns the number of rows that each task has in a block.

        A batch is a sequence of equal blocks, in each of which the rows of a task are neighbours.
        The blocks are as small as possible, so that each device holds whole ones, and the order of
        the rows does not depend on the mesh.
        """
        num_blocks = math.gcd(*self.task_rows.values())
        return {name: rows // num_blocks for name, rows in self.task_rows.items()}

    @property
    def name(self) -> str:
        """Returns the name of the task, or the names of several tasks, for messages."""
        return " + ".join(self.task_rows)

    @property
    def has_teacher_inputs(self) -> bool:
        """Whether the teacher reads prompts of its own."""
        return TEACHER_INPUTS in self.feature_lengths

    def features(self) -> tuple[str, ...]:
        """Returns the names of the features that an example has, in the order of a shape."""
        return tuple(name for name in FEATURES if name in self.feature_lengths)

    def shapes(self) -> list[Shape]:
        """Returns the shapes that batches can have, with the largest shape last."""
        limits = [self.feature_lengths[name] for name in self.features()]
        buckets = [[min(length, limit) for limit in limits] for length in self.length_buckets]
        return list(dict.fromkeys(map(tuple, [*buckets, limits])))

    def shape_for_samples(self, shape: Shape) -> Shape:
        """Returns the shape that a batch of one of `shapes` has when the student samples targets.

        The length of a sample must not depend on the bucket, which the reference answer decides.
        """
        source, _, *teachers = shape
        return (source, self.feature_lengths["targets"], *teachers)


def shape_of(batch: Batch) -> Shape:
    """Returns the lengths of a batch."""
    arrays = (batch.inputs, batch.targets, batch.teacher_inputs)
    return tuple(array.shape[1] for array in arrays if array is not None)


def with_target_length(batch: Batch, length: int) -> Batch:
    """Returns a batch of NumPy arrays whose targets are padded to `length` tokens of weight 0."""
    missing = ((0, 0), (0, length - batch.targets.shape[1]))
    return batch._replace(
        targets=np.pad(batch.targets, missing), weights=np.pad(batch.weights, missing)
    )


def check_ids(batch: Batch, num_pieces: int) -> None:
    """Checks that all models know every token of a batch on the host, and that no prompt is empty.

    A tokenizer may have further tokens at its end that one of the models lacks. Such an id would
    read a row of an embedding that nobody trained, or none at all. Without a prompt, a decoder-only
    model has no token from which to predict the first token of the target.

    Raises:
        ValueError: if the batch has an id outside the `num_pieces` that vocabulary and models
            share, or a prompt without tokens.
    """
    for name in FEATURES:
        ids = getattr(batch, name)
        if ids is None:
            continue
        if unknown := ids[(ids < 0) | (ids >= num_pieces)].tolist():
            raise ValueError(
                f"{name!r} of a batch have the id {unknown[0]}, and the vocabulary and the models "
                f"share the ids 0 to {num_pieces - 1} alone: leave texts with this token out, or "
                "take models with the same tokens (SeqKD works with different tokenizers)"
            )
    for name, lengths in (
        ("inputs", batch.input_lengths),
        (TEACHER_INPUTS, batch.teacher_input_lengths),
    ):
        if lengths is not None and not np.all(lengths):
            row = int(np.argmin(lengths))
            raise ValueError(
                f"{name!r} must have one token or more in every row of a batch, and row {row} has "
                f"none (its target begins with the ids {batch.targets[row, :8].tolist()}): leave "
                "texts without a prompt out"
            )


class Shard(NamedTuple):
    """The part of a stream's examples that a process reads."""

    index: int = 0
    num_shards: int = 1  # of the stream
    first_process: int = 0  # the lowest index of the processes that read this shard


WHOLE = Shard()


def process_shard(config: DataConfig, mesh: Mesh) -> Shard:
    """Returns the part of the examples that this process reads.

    Processes whose devices hold the same rows of a batch read the same part.

    Raises:
        ValueError: if two processes share only some of their rows, if processes have different
            numbers of rows, if a process would have other shares of several tasks than the batch,
            or if there are more shards than examples.
    """
    if not config.shard_by_process:
        return WHOLE
    starts: dict[int, set[int]] = {}
    where = sharding.batch_sharding(mesh).devices_indices_map((config.batch_size,))
    for device, (rows,) in where.items():
        starts.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(mine)) for mine in starts.values()})
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) != sum(map(len, parts)):
        raise ValueError(
            "shard_by_process needs processes with as many rows of a batch each, all the same or "
            f"all different, got a mesh of {dict(mesh.shape)} whose processes start at {parts}"
        )
    if any(rows % len(parts) for rows in config.task_rows.values()):
        raise ValueError(
            f"with shard_by_process each of {len(parts)} shards has the same number of rows of "
            f"every task, got {config.task_rows}"
        )
    if config.num_examples is not None and config.num_examples < len(parts):
        raise ValueError(
            f"shard_by_process needs an example for each of {len(parts)} shards, "
            f"got num_examples={config.num_examples}"
        )
    mine = tuple(sorted(starts[jax.process_index()]))
    readers = [process for process, rows in starts.items() if tuple(sorted(rows)) == mine]
    return Shard(parts.index(mine), len(parts), min(readers))


def place(tree: Any, mesh: Mesh, *, num_rows: int | None = None) -> Any:
    """Returns a tree, such as a batch, as global JAX arrays with rows sharded over the devices.

    Args:
        tree: NumPy arrays with the rows of the whole global batch, or with those of this process
            (from the `TrainIterator` of a shard).
        num_rows: the number of rows of the global batch; None if the arrays have all of them.
    """
    where = sharding.batch_sharding(mesh)

    def placed(values: np.ndarray) -> jax.Array:
        shape = (num_rows or len(values), *values.shape[1:])
        return jax.make_array_from_process_local_data(where, values, shape)

    return jax.tree.map(placed, tree)
