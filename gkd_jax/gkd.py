"""Generalized knowledge distillation: Algorithm 1 of Agarwal et al. (2024), start to finish.

    for each step:
        u ~ Uniform(0, 1)                                          `is_on_policy`
        if u < lambda:  y ~ student(. | x), for the inputs x       `sample_targets`
        else:           y = the dataset's targets
        theta <- theta - eta * grad of mean over (x, y) of
                 D(teacher || student_theta)(y | x)                `loss`, `update`

Supervised KD is lambda = 0; on-policy KD is lambda = 1; ImitKD and f-distill are lambda = 0.5 with
forward KL and total variation; SFT is lambda = 0 with no divergence: cross-entropy on the targets.

P is the teacher, Q the student. Axes: B batch, S source, T target, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import optax

from gkd_jax import divergences, losses
from gkd_jax.batch import Batch
from gkd_jax.models import t5
from gkd_jax.sampling import Sample, SamplingConfig, sample
from gkd_jax.train_state import TrainState


Divergence = Callable[[jax.Array, jax.Array], jax.Array]
Reduction = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKDConfig:
    """The hyperparameters of Algorithm 1.

    Attributes:
        on_policy_fraction: the paper's lambda, the probability that a step trains on the student's
            own samples.
        divergence: D(student_logits, teacher_logits) -> per token, or None for the cross-entropy of
            the dataset's targets (SFT, SeqKD), which needs no teacher.
        teacher_temperature: divides the teacher's logits inside the divergence (the paper: 1, or
            0.1 for GSM8K and for XSum students that will be sampled from).
        student_temperature: divides the student's logits inside the divergence (the paper: 1).
        sampling: how the student's sequences are drawn (the paper: temperature 1, nothing cut).
        reduction: `losses.sequence_mean` (Eq. 2 and Algorithm 1's 1/B) or `losses.token_mean`.
        label_smoothing: of the cross-entropy.
    """

    on_policy_fraction: float = 1.0
    divergence: Divergence | None = divergences.forward_kl
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    sampling: SamplingConfig = SamplingConfig()
    reduction: Reduction = losses.sequence_mean
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 <= self.on_policy_fraction <= 1:
            raise ValueError(
                f"on_policy_fraction must lie in [0, 1], got {self.on_policy_fraction}"
            )
        if self.divergence is not None and not callable(self.divergence):
            raise ValueError(
                "divergence must be a function such as @divergences.forward_kl, "
                f"got {self.divergence!r}"
            )
        if self.divergence is None and self.on_policy_fraction > 0:
            raise ValueError(
                "without a divergence the loss is the cross-entropy of the targets, which must "
                "never be the student's own samples: on_policy_fraction must be 0, got "
                f"{self.on_policy_fraction}"
            )
        for name in ("teacher_temperature", "student_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.on_policy_fraction > 0 and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be positive in training, got 0 (greedy)")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """What is static about the two models.

    Attributes:
        student: the student's sizes.
        teacher: the teacher's, or None where nothing is distilled.
        num_pieces: pieces of the shared vocabulary. Ids beyond it exist only to round the
            embedding up (32128 for 32100): they are left out of every softmax.
    """

    student: t5.T5Config
    teacher: t5.T5Config | None
    num_pieces: int

    def __post_init__(self):
        for name, config in (("student", self.student), ("teacher", self.teacher)):
            if config is not None and config.vocab_size < self.num_pieces:
                raise ValueError(
                    f"the {name}'s embedding has {config.vocab_size} rows, fewer than the "
                    f"vocabulary's {self.num_pieces} pieces"
                )


class StepKeys(NamedTuple):
    """The randomness of one step."""

    sampling: Key[Array, ""]
    dropout: Key[Array, ""]


def step_keys(seed: int, step: int) -> StepKeys:
    """A function of (seed, step): a resumed run draws the same numbers as one never stopped."""
    return StepKeys(*jax.random.split(jax.random.fold_in(jax.random.key(seed), step)))


def is_on_policy(seed: int, step: int, on_policy_fraction: float) -> bool:
    """The coin of Algorithm 1, one for the whole batch: u < lambda.

    It is drawn on the host from (seed, step), so that every process decides alike without waiting
    for a device. u lies in [0, 1): lambda = 0 is never on-policy, lambda = 1 always.
    """
    u = int(np.random.Philox(key=seed, counter=step).random_raw() >> np.uint64(11)) * 2.0**-53
    return u < on_policy_fraction


def sample_targets(
    config: GKDConfig, models: Models, student_params: t5.Params, batch: Batch, key: Key[Array, ""]
) -> tuple[Batch, Sample]:
    """Replaces the targets of a batch by the student's own sequences. No gradient flows back."""
    drawn = sample(
        models.student,
        student_params,
        batch.inputs,
        key,
        max_length=batch.targets.shape[1],
        sampling=config.sampling,
    )
    return Batch(batch.inputs, drawn.tokens, drawn.weights), drawn


def per_token_loss(
    config: GKDConfig,
    models: Models,
    student_params: t5.Params,
    teacher_params: t5.Params | None,
    batch: Batch,
    dropout_key: Key[Array, ""] | None,
) -> Float[Array, "B T"]:
    """D(P || Q) at each target position, or the cross-entropy of the target; nats."""
    student_logits = t5.logits(models.student, student_params, batch, dropout_key=dropout_key)
    student_logits = of_pieces(student_logits / config.student_temperature, models.num_pieces)
    if config.divergence is None:
        return losses.cross_entropy(
            student_logits, batch.targets, label_smoothing=config.label_smoothing
        )
    assert models.teacher is not None
    assert teacher_params is not None
    teacher_logits = t5.logits(models.teacher, teacher_params, batch)
    teacher_logits = of_pieces(teacher_logits / config.teacher_temperature, models.num_pieces)
    return config.divergence(student_logits, jax.lax.stop_gradient(teacher_logits))


def of_pieces(logits: Float[Array, "B T V"], num_pieces: int) -> Float[Array, "B T P"]:
    """Without the ids that no piece has: two models may round their embeddings up differently."""
    return logits[..., :num_pieces]


class LossSums(NamedTuple):
    """Sums over some rows; adding those of microbatches gives those of the batch."""

    loss: Float[Array, ""]  # the reduction's numerator
    tokens: Float[Array, ""]  # of per-token losses, for the token mean
    sequences: Float[Array, ""]  # of per-sequence means


def update(
    config: GKDConfig,
    models: Models,
    optimizer: optax.GradientTransformation,
    num_microbatches: int,
    state: TrainState,
    teacher_params: t5.Params | None,
    batch: Batch,
    dropout_key: Key[Array, ""],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of gradient descent on the mean divergence over the batch (Algorithm 1's last line).

    The gradient is that of the whole batch for any number of microbatches: numerators are summed
    and divided by the batch's own count once. The teacher scores each microbatch inside it.
    """
    grads, sums = _summed_gradients(
        config, models, num_microbatches, state.params, teacher_params, batch, dropout_key
    )
    _, count = config.reduction(batch.weights, batch.weights)
    count = jnp.maximum(count, 1.0)  # a batch without any target: loss 0, gradient 0
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state)

    num_tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
    num_sequences = jnp.maximum(jnp.sum(jnp.any(batch.weights > 0, axis=1)), 1.0)
    metrics = {
        "loss": sums.loss / count,
        "cross_entropy" if config.divergence is None else "divergence": sums.loss / count,
        "loss_token_mean": sums.tokens / num_tokens,
        "loss_sequence_mean": sums.sequences / num_sequences,
        "target_length": num_tokens / num_sequences,
        "grad_norm": optax.tree.norm(grads),
    }
    return state, metrics


def _summed_gradients(
    config: GKDConfig,
    models: Models,
    num_microbatches: int,
    student_params: t5.Params,
    teacher_params: t5.Params | None,
    batch: Batch,
    dropout_key: Key[Array, ""],
) -> tuple[t5.Params, LossSums]:
    """The gradient of the reduction's numerator over all rows, and the sums to log."""
    use_dropout = models.student.dropout_rate > 0

    def numerator(params, rows: Batch, key):
        key = key if use_dropout else None
        values = per_token_loss(config, models, params, teacher_params, rows, key)
        loss, _ = config.reduction(values, rows.weights)
        tokens, _ = losses.token_mean(values, rows.weights)
        sequences, _ = losses.sequence_mean(values, rows.weights)
        return loss, LossSums(loss, tokens, sequences)

    gradient = jax.grad(numerator, has_aux=True)
    if num_microbatches == 1:
        return gradient(student_params, batch, dropout_key)

    def accumulate(carry, inputs):
        rows, index = inputs
        grads = gradient(student_params, rows, jax.random.fold_in(dropout_key, index))
        return jax.tree.map(jnp.add, carry, grads), None

    zeros = (
        jax.tree.map(jnp.zeros_like, student_params),
        LossSums(*(jnp.zeros(()) for _ in LossSums._fields)),
    )
    microbatches = jax.tree.map(lambda x: _split_rows(x, num_microbatches), batch)
    total, _ = jax.lax.scan(accumulate, zeros, (microbatches, jnp.arange(num_microbatches)))
    return total


def _split_rows(x: jax.Array, num: int) -> jax.Array:
    """[B, ...] to [num, B / num, ...]; row i goes to microbatch i % num, so that every device keeps
    rows of its own in each."""
    return x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)
