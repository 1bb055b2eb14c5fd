"""What a step of GKD is made of: the hyperparameters of Algorithm 1, and the models' configs."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gkd_jax import divergences, losses
from gkd_jax.models import lm
from gkd_jax.rl import RLConfig
from gkd_jax.sampling import SamplingConfig, banned_tail
from gkd_jax.sharding import MeshConfig
from gkd_jax.text import settings


Divergence = Callable[[jax.Array, jax.Array], jax.Array]
Reduction = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Schedule = Callable[[Any], Any]
"""A schedule takes the number of a step and returns a number, such as a temperature."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKDConfig:
    """The hyperparameters of Algorithm 1.

    Attributes:
        on_policy_fraction: the paper's lambda, the probability that a step trains on the student's
            own samples; or a schedule of the step, such as `@optax.linear_schedule()`.
        mixing: "step" tosses one coin for the whole batch (Algorithm 1); "example" makes exactly
            ceil(lambda B) rows of every batch on-policy.
        divergence: D(student_logits, teacher_logits) -> per token, or None for the cross-entropy of
            the dataset's targets (SFT, SeqKD), which needs no teacher.
        teacher_temperature: divides the teacher's logits inside the divergence (the paper: 1, or
            0.1 for GSM8K and for XSum students that will be sampled from); a number or a schedule.
        student_temperature: divides the student's logits inside the divergence (the paper: 1).
        sampling: how the student's sequences are drawn (the paper: temperature 1, nothing cut).
        num_samples: sequences drawn for each prompt of an on-policy batch; the encoders run once.
        decode_rows: the most sequences that are decoded at a time, over all devices; one that ends
            makes place for the next prompt (see `sampling.sample`). None decodes all at once.
        rl: a reward beside the divergence (Eq. 5); None is pure distillation.
        reduction: `losses.sequence_mean` (Eq. 2 and Algorithm 1's 1/B) or `losses.token_mean`.
        label_smoothing: the share of each target's probability that the cross-entropy spreads over
            all ids.
        loss_parts: how many parts of the target length have their logits computed one after the
            other, and again in the backward pass, so that those of one part are in memory at once;
            None takes the fewest with which a device's student logits fit 256 MiB.
    """

    on_policy_fraction: float | Schedule = 1.0
    mixing: str = "step"
    divergence: Divergence | None = divergences.forward_kl
    teacher_temperature: float | Schedule = 1.0
    student_temperature: float = 1.0
    sampling: SamplingConfig = SamplingConfig()
    num_samples: int = 1
    decode_rows: int | None = None
    rl: RLConfig | None = None
    reduction: Reduction = losses.sequence_mean
    label_smoothing: float = 0.0
    loss_parts: int | None = None

    def __post_init__(self):
        settings.check_types(self)
        object.__setattr__(self, "divergence", divergences.as_value(self.divergence))
        scheduled = callable(self.on_policy_fraction)
        if not callable(self.on_policy_fraction) and not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(
                f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}"
            )
        if self.divergence is not None and not callable(self.divergence):
            raise ValueError(
                "divergence must be a function such as @divergences.forward_kl, "
                f"got {self.divergence!r}"
            )
        if self.divergence is not None:  # what it refuses (beta), it refuses now
            logits = jax.ShapeDtypeStruct((1, 4096), jnp.float32)  # enough for any top-k
            divergence = self.divergence  # in a new function: JAX remembers those it has traced
            found = jax.eval_shape(lambda *both: divergence(*both), logits, logits)
            if getattr(found, "shape", None) != (1,):
                raise ValueError(
                    "divergence must return one number for each token, so an array of shape (1,) "
                    f"for logits of shape {logits.shape}; {divergence!r} returns {found!r}"
                )
        if self.divergence is None and self.on_policy_fraction != 0:
            raise ValueError(
                "without a divergence the loss is the cross-entropy of the targets, which must "
                "never be the student's own samples: on_policy_fraction must be 0, got "
                f"{self.on_policy_fraction}"
            )
        if self.mixing not in ("step", "example"):
            raise ValueError(f"mixing must be 'step' or 'example', got {self.mixing!r}")
        if self.mixing == "example" and (scheduled or self.num_samples > 1 or self.rl):
            raise ValueError(
                "mixing='example' compiles a fixed number of rows to sample: it needs a constant "
                "on_policy_fraction, num_samples=1 and no reward"
            )
        if not callable(self.teacher_temperature) and not self.teacher_temperature > 0:
            raise ValueError(
                f"teacher_temperature must be positive, got {self.teacher_temperature}"
            )
        if not self.student_temperature > 0:
            raise ValueError(
                f"student_temperature must be positive, got {self.student_temperature}"
            )
        if self.on_policy_fraction != 0 and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be positive in training, got 0 (greedy)")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        settings.check_positive(self, "num_samples", "loss_parts", "decode_rows")
        if self.rl is not None:
            if self.on_policy_fraction == 0:
                raise ValueError("a reward needs samples: on_policy_fraction must not be 0")
            if self.sampling.top_k or self.sampling.top_p < 1:
                raise ValueError("a reward needs samples of the whole policy: top_k=0 and top_p=1")

    def uses_samples(self) -> bool:
        """Whether any step may train on the student's own samples."""
        return callable(self.on_policy_fraction) or self.on_policy_fraction > 0

    def uses_targets(self) -> bool:
        """Whether any row may be trained on its target in the data set."""
        return callable(self.on_policy_fraction) or self.on_policy_fraction < 1

    def uses_dataset(self) -> bool:
        """Whether any step may train on a batch as the dataset has it."""
        if self.mixing == "example":
            return self.on_policy_fraction == 0
        return self.uses_targets()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveStudent:
    """The teacher is the student with its weights of the same step.

    No gradient flows through the teacher's scores, and the weights are not copied.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """The teacher is the exponential moving average of the student's parameters.

    The average starts as a copy of the parameters. After each update,
    average <- decay * average + (1 - decay) * parameters.

    Attributes:
        decay: a number in [0, 1). With 0.999 about the last 1,000 updates count.
    """

    decay: float = 0.999

    def __post_init__(self):
        settings.check_types(self)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPair:
    """What is static about the two models.

    Attributes:
        student: the student's config.
        teacher: the teacher's config; None without a divergence, with stored scores alone, and in
            `Learner.models` where several teachers have pairs of their own (`teacher_shares`).
        num_pieces: pieces of the shared vocabulary. Ids beyond it exist only to round the
            embedding up (32128 for 32100): they are left out of every softmax.
        teacher_mesh: the axis sizes of the teacher's own mesh over the same devices; None if it has
            the student's.
    """

    student: lm.Config
    teacher: lm.Config | None
    num_pieces: int
    teacher_mesh: MeshConfig | None = None

    def __post_init__(self):
        for name, config in (("student", self.student), ("teacher", self.teacher)):
            if config is not None and config.vocab_size < self.num_pieces:
                raise ValueError(
                    f"the {name}'s embedding has {config.vocab_size} rows, fewer than the "
                    f"vocabulary's {self.num_pieces} pieces"
                )

    def student_sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        """Returns settings that also ban a T5's pad and the ids without a piece."""
        banned = (*(sampling.banned_ids or ()), *banned_tail(self.student, self.num_pieces))
        return dataclasses.replace(sampling, banned_ids=tuple(dict.fromkeys(banned)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherShare:
    """One of several teachers, and its share of a batch: the rows of its task.

    A batch is a sequence of equal blocks, and the rows of a task are neighbours in each block.
    """

    task: str  # by which the teacher's parameters are found
    models: ModelPair  # the student and this teacher
    num_rows: int  # of the task in a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """What is the same in every update of a run.

    Attributes:
        config: the method.
        models: the configs of the student and of its one teacher.
        optimizer: the optimizer of the student's parameters.
        num_microbatches: parts of the batch whose gradients are added up.
        self_teacher: the teacher where it is the student itself; None for a frozen one.
        teacher_shares: several frozen teachers, in the order of their rows in a block; () for one.
    """

    config: GKDConfig
    models: ModelPair
    optimizer: optax.GradientTransformation
    num_microbatches: int = 1
    self_teacher: LiveStudent | MovingAverage | None = None
    teacher_shares: tuple[TeacherShare, ...] = ()

    @property
    def teachers(self) -> list[tuple[lm.Config, float]]:
        """The config of each teacher, with the share of the rows that it scores."""
        pairs = [(one.models.teacher, one.num_rows) for one in self.teacher_shares]
        pairs = pairs or [(self.models.teacher, 1)]
        return [(config, rows / self.block_size) for config, rows in pairs if config is not None]

    @property
    def block_size(self) -> int:
        """The number of neighbouring prompts that a split of the batch must keep together."""
        return sum(teacher.num_rows for teacher in self.teacher_shares) or 1
