"""Generalized knowledge distillation: Algorithm 1 of Agarwal et al. (2024), start to finish.

    for each step:
        u ~ Uniform(0, 1)                                          `is_on_policy`
        if u < lambda:  y ~ student(. | x), for the inputs x       `sample_targets`
        else:           y = the dataset's targets
        theta <- theta - eta * grad of mean over (x, y) of
                 D(teacher || student_theta)(y | x)                `per_token_loss`, `update`

Supervised KD is lambda = 0; on-policy KD is lambda = 1; ImitKD and f-distill are lambda = 0.5 with
forward KL and total variation; SFT is lambda = 0 with no divergence: cross-entropy on the targets.
With `rl`, a reward of the student's samples joins the divergence (Eq. 5). The teacher is a frozen
model, the student itself or its moving average (`teacher_now`), and may read other prompts than the
student (`Batch.as_teacher_reads`). Of several teachers, each scores the rows of its own task
(`rows_by_teacher`).

P is the teacher, Q the student. Axes: B batch, N = B x samples a prompt, S source, T target,
V vocabulary.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
import numpy as np
import optax

from gkd_jax import accumulation, losses, sharding
from gkd_jax.batch import Batch, TopK
from gkd_jax.divergences import outcomes
from gkd_jax.gkd_config import GKDConfig, Learner, LiveStudent, ModelPair, MovingAverage
from gkd_jax.models import lm
from gkd_jax.rl import policy_loss
from gkd_jax.sampling import Sample, allowed_ids, sample
from gkd_jax.text import task_names


class StepKeys(NamedTuple):
    """The random keys of one step."""

    sampling: Key[Array, ""]
    dropout: Key[Array, ""]


def step_keys(seed: int, step: int) -> StepKeys:
    """Returns the keys of a step, a function of (seed, step): resuming a run changes no number."""
    return StepKeys(*jax.random.split(jax.random.fold_in(jax.random.key(seed), step)))


def is_on_policy(seed: int, step: int, config: GKDConfig) -> bool:
    """Returns whether the student samples the targets of a step: Algorithm 1's coin, u < lambda.

    One coin decides for the whole batch. It is tossed on the host and depends on (seed, step)
    alone, so all processes get the same result without waiting for a device. u lies in [0, 1):
    with lambda = 0 no step samples, with lambda = 1 every step does. With `mixing="example"`,
    every step samples some of its rows, unless lambda is 0.
    """
    fraction = config.on_policy_fraction
    if config.mixing == "example":
        return fraction != 0
    u = int(np.random.Philox(key=seed, counter=step).random_raw() >> np.uint64(11)) * 2.0**-53
    if not callable(fraction):
        return u < fraction
    with jax.default_device(sharding.host_device()):
        return u < float(fraction(step))


def num_on_policy_rows(on_policy_fraction: float, batch_size: int) -> int:
    """Returns ceil(lambda B), the number of rows of a batch that `mixing="example"` samples."""
    return math.ceil(on_policy_fraction * batch_size * (1 - 1e-12))  # 0.07 * 100 > 7 in float64


def sample_targets(
    config: GKDConfig,
    models: ModelPair,
    student_params: lm.Params,
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Batch, Sample]:
    """Replaces the targets of a batch by sequences that the student samples, without a gradient.

    Returns:
        The batch with `num_samples` rows of targets for each prompt, and the samples. With
        `mixing="example"`, only ceil(lambda B) rows get samples as targets, and only these rows are
        in `Sample`. They are spread evenly over the batch, so that every device samples some.
    """
    batch_size, length = batch.targets.shape
    # JAX cannot differentiate a decode loop: it has no reverse mode for a loop of unknown length.
    frozen = jax.lax.stop_gradient(student_params)

    draw = functools.partial(
        sample,
        models.student,
        frozen,
        key=key,
        max_length=length,
        sampling=models.student_sampling(config.sampling),
        num_samples=config.num_samples,
        decode_rows=config.decode_rows,
    )
    if config.mixing == "step":
        drawn = draw(batch.inputs, input_lengths=batch.input_lengths)
        return batch._replace(
            targets=drawn.tokens, weights=drawn.weights, teacher_scores=None
        ), drawn
    assert not callable(config.on_policy_fraction)
    num_rows = num_on_policy_rows(config.on_policy_fraction, batch_size)
    rows = np.arange(num_rows) * batch_size // num_rows
    lengths = None if batch.input_lengths is None else batch.input_lengths[rows]
    drawn = draw(batch.inputs[rows], input_lengths=lengths)
    targets = jnp.asarray(batch.targets, drawn.tokens.dtype).at[rows].set(drawn.tokens)
    weights = jnp.asarray(batch.weights, drawn.weights.dtype).at[rows].set(drawn.weights)
    return batch._replace(targets=targets, weights=weights, teacher_scores=None), drawn


class TaughtRows(NamedTuple):
    """Some rows of a batch with the teacher that scores them."""

    models: ModelPair
    teacher_params: lm.Params | None
    batch: Batch
    advantages: jax.Array | None = None  # of each row of targets; None without a reward


def per_token_loss(
    config: GKDConfig,
    models: ModelPair,
    student_params: lm.Params,
    teacher_params: lm.Params | None,
    batch: Batch,
    dropout_key: Key[Array, ""] | None = None,
    step: Int[Array, ""] | int = 0,
) -> Float[Array, "N T"]:
    """Returns the divergence at each target position, or the target's cross-entropy, in nats."""
    rows = TaughtRows(models, teacher_params, batch)
    return _token_values(config, student_params, rows, dropout_key, step).loss


class _TokenValues(NamedTuple):
    """The loss of each target token and, if a reward needs it, the token's log Q."""

    loss: Float[Array, "N T"]
    log_probs: Float[Array, "N T"] | None


def _token_values(
    config: GKDConfig,
    student_params: lm.Params,
    rows: TaughtRows,
    dropout_key: Key[Array, ""] | None,
    step: Int[Array, ""] | int,
    *,
    with_log_probs: bool = False,
) -> _TokenValues:
    """Computes the last hidden states for all rows, and logits for one part of T at a time.

    The logits of all positions at once would often be the largest arrays of a step.
    """
    models, teacher_params, batch, _ = rows
    states = [lm.hidden(models.student, student_params, batch, dropout_key=dropout_key)]
    heads = [lm.head_params(student_params)]
    if config.divergence is not None and batch.teacher_scores is None:
        if models.teacher is None or teacher_params is None:
            raise ValueError("a divergence needs the teacher's config and its parameters, got None")
        with sharding.use_sizes(models.teacher_mesh):
            states.append(lm.hidden(models.teacher, teacher_params, batch.as_teacher_reads()))
        heads.append(lm.head_params(teacher_params))
    temperature = config.teacher_temperature
    temperature = temperature(step) if callable(temperature) else temperature

    def of_part(heads, states, targets, cached: TopK | None) -> _TokenValues:
        logits = lm.apply_head(models.student, heads[0], states[0])
        log_probs = None
        if with_log_probs:
            log_probs = sample_log_probs(config, models, logits, targets)
        logits = of_pieces(logits / config.student_temperature, models.num_pieces)
        if config.divergence is None:
            smoothing = config.label_smoothing
            loss = losses.cross_entropy(logits, targets, label_smoothing=smoothing)
        elif cached is not None:
            loss = config.divergence(*outcomes(logits, cached))
        else:
            teacher_logits = _teacher_logits(models, heads[1], states[1])
            teacher_logits = of_pieces(teacher_logits / temperature, models.num_pieces)
            loss = config.divergence(logits, jax.lax.stop_gradient(teacher_logits))
        return _TokenValues(loss, log_probs)

    num_rows, length = batch.targets.shape
    parts = accumulation.num_length_parts(
        num_rows, length, models.student.vocab_size, config.loss_parts
    )
    inputs = (states, batch.targets, batch.teacher_scores)
    return accumulation.map_length_parts(of_part, heads, inputs, parts)


def _teacher_logits(models: ModelPair, head: lm.Params, states: jax.Array) -> jax.Array:
    """Returns the teacher's logits, sharded like the student's if the teacher has its own mesh."""
    assert models.teacher is not None
    with sharding.use_sizes(models.teacher_mesh):
        logits = lm.apply_head(models.teacher, head, states)
    if models.teacher_mesh is None:
        return logits
    return sharding.constrain(logits, ("batch", "length", "vocab"))


def sample_log_probs(
    config: GKDConfig,
    models: ModelPair,
    student_logits: Float[Array, "N T V"],
    targets: Int[Array, "N T"],
) -> Float[Array, "N T"]:
    """Returns log Q of each target under the distribution that samples are drawn from, in nats.

    Banned ids are left out of the softmax, as they are when tokens are drawn. Padding, where it is
    a banned id, has -inf.
    """
    special = models.student_sampling(config.sampling).special_ids(models.student)
    allowed = allowed_ids(models.student.vocab_size, special.banned)
    logits = jnp.where(allowed, student_logits / config.sampling.temperature, -jnp.inf)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def of_pieces(logits: Float[Array, "B T V"], num_pieces: int) -> Float[Array, "B T pieces"]:
    """Returns the logits of the ids that have a piece; an embedding may have further rows."""
    return logits[..., :num_pieces]


class LossSums(NamedTuple):
    """Sums over some rows of a batch. The sums of all microbatches add up to those of the batch."""

    loss: Float[Array, ""]  # the numerator of the method's reduction
    tokens: Float[Array, ""]  # the sum of the losses of all tokens
    sequences: Float[Array, ""]  # the sum over sequences of the mean loss of their tokens
    policy: Float[Array, ""]  # the sum over sequences of -advantage x log Q(sequence)


class TrainState(NamedTuple):
    """The state of a student in training; a frozen teacher is never a part of it.

    Attributes:
        step: the number of updates done.
        params: the student's float32 parameters.
        opt_state: the state of the optimizer.
        average: the moving average of the parameters if it is the teacher, else None.
    """

    step: Int[Array, ""]
    params: lm.Params
    opt_state: Any
    average: lm.Params | None = None


def teacher_now(learner: Learner, state: TrainState, frozen: lm.Params | None) -> lm.Params | None:
    """Returns the teacher's parameters for an update: frozen, the student's, or their average."""
    if isinstance(learner.self_teacher, LiveStudent):
        return state.params
    if isinstance(learner.self_teacher, MovingAverage):
        if state.average is None:
            raise ValueError(
                "the teacher is the moving average, which the state lacks: begin with "
                "train_state.create(params, optimizer, with_average=True)"
            )
        return state.average
    return frozen


def rows_by_teacher(
    learner: Learner,
    teacher_params: lm.Params | None,
    batch: Batch,
    advantages: Float[Array, " N"] | None = None,
) -> list[TaughtRows]:
    """Splits a batch by teacher; if there is only one teacher, all rows are its own.

    Args:
        teacher_params: the parameters of the teacher, or those of several teachers by task.
        batch: whole blocks of rows. A prompt may have several neighbouring rows of targets.
        advantages: the advantage of each row of targets; None without a reward.
    """
    if not learner.teacher_shares:
        return [TaughtRows(learner.models, teacher_params, batch, advantages)]
    assert teacher_params is not None
    sizes = [teacher.num_rows for teacher in learner.teacher_shares]
    parts = accumulation.split_blocks((batch, advantages), sizes, batch.inputs.shape[0])
    return [
        TaughtRows(teacher.models, teacher_params[teacher.task], *rows)
        for teacher, rows in zip(learner.teacher_shares, parts, strict=True)
    ]


def next_average(learner: Learner, state: TrainState, params: lm.Params) -> lm.Params | None:
    """Returns the moving average after an update whose result is `params`; None if not needed."""
    if not isinstance(learner.self_teacher, MovingAverage):
        return None
    decay = learner.self_teacher.decay
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params)


def update(
    learner: Learner,
    state: TrainState,
    teacher_params: lm.Params | None,
    batch: Batch,
    dropout_key: Key[Array, ""],
    advantages: Float[Array, " N"] | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Does one step of gradient descent on the mean divergence (the last line of Algorithm 1).

    Any number of microbatches gives the gradient of the whole batch: the numerators of the mean are
    summed, and the sum is divided once by the count of the whole batch.

    Args:
        teacher_params: the parameters of a frozen teacher, or those of several teachers by task;
            None without a divergence, or if the teacher is the student.
        batch: the batch. A prompt may have several neighbouring rows of targets.
        advantages: the advantage of each row of targets; None without a reward. With advantages,
            the loss is that of Eq. 5: alpha D + (1 - alpha) times the policy loss.

    Returns:
        The state after the update, and the metrics of the step by name.

    Raises:
        ValueError: if the shapes of the arrays do not belong together, if the number of
            microbatches does not divide the prompts, or if a teacher is needed and absent.
    """
    config = learner.config
    lm.check_batch(batch)
    teacher_params = teacher_now(learner, state, teacher_params)
    _, count = config.reduction(batch.weights, batch.weights)  # the count needs no losses
    count = jnp.maximum(count, 1.0)  # a batch without any target has loss 0 and gradient 0
    num_tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
    num_sequences = jnp.maximum(jnp.sum(jnp.any(batch.weights > 0, axis=1)), 1.0)
    alpha = _divergence_share(config, advantages)

    def numerator(params, rows, key):
        # The policy loss is a mean over sequences for any reduction. The gradient is divided by
        # `count` below, and this scale turns that division into one by the number of sequences.
        policy_scale = count / num_sequences
        taught = rows_by_teacher(learner, teacher_params, *rows)
        found = []
        for index, part in enumerate(taught):
            own_key = key if key is None or len(taught) == 1 else jax.random.fold_in(key, index)
            found.append(_loss_sums(config, params, part, own_key, state.step, policy_scale))
        totals, sums = zip(*found, strict=True)
        return functools.reduce(jnp.add, totals), sums

    grads, parts = accumulation.sum_gradients(
        numerator,
        learner.num_microbatches,
        state.params,
        (batch, advantages),
        batch.inputs.shape[0] // learner.block_size,
        dropout_key if learner.models.student.dropout_rate > 0 else None,
    )
    sums = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts)
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)

    loss = sums.loss / count
    metrics = {
        "loss": loss,
        "cross_entropy" if config.divergence is None else "divergence": loss,
        "loss_token_mean": sums.tokens / num_tokens,
        "loss_sequence_mean": sums.sequences / num_sequences,
        "target_length": num_tokens / num_sequences,
        "target_tokens": jnp.sum(batch.weights),
        "prompt_tokens": _prompt_tokens(batch),
        "grad_norm": optax.tree.norm(grads),
    }
    if alpha < 1:
        metrics["policy_loss"] = sums.policy / num_sequences
        metrics["loss"] = alpha * loss + (1 - alpha) * metrics["policy_loss"]
    if learner.teacher_shares:
        metrics |= _divergences(learner, rows_by_teacher(learner, teacher_params, batch), parts)
    average = next_average(learner, state, params)
    return TrainState(state.step + 1, params, opt_state, average), metrics


def _divergence_share(config: GKDConfig, advantages: jax.Array | None) -> float:
    """Returns alpha of Eq. 5, which is 1 where no reward joins the divergence."""
    if advantages is None:
        return 1.0
    if config.rl is None:
        raise ValueError("advantages need GKDConfig.rl, which has the weight alpha; got rl=None")
    return config.rl.alpha


def _divergences(
    learner: Learner, taught: list[TaughtRows], parts: tuple[LossSums, ...]
) -> dict[str, Float[Array, ""]]:
    """Returns the mean divergence from each of several teachers over its own rows."""
    found = {}
    for teacher, rows, sums in zip(learner.teacher_shares, taught, parts, strict=True):
        _, count = learner.config.reduction(rows.batch.weights, rows.batch.weights)
        name = task_names.display_name(teacher.task)
        found[f"divergence/{name}"] = sums.loss / jnp.maximum(count, 1.0)
    return found


def _prompt_tokens(batch: Batch) -> Float[Array, ""]:
    """Returns the number of tokens of all prompts; without lengths, id 0 is padding."""
    counted = batch.inputs != 0 if batch.input_lengths is None else batch.input_lengths
    return jnp.sum(counted).astype(jnp.float32)


def _loss_sums(
    config: GKDConfig,
    params: lm.Params,
    rows: TaughtRows,
    dropout_key: Key[Array, ""] | None,
    step: Int[Array, ""],
    policy_scale: Float[Array, ""],
) -> tuple[Float[Array, ""], LossSums]:
    """Returns the numerator of the loss over some rows, and the sums that the metrics need.

    `policy_scale` multiplies the policy loss in the numerator; see `update`.
    """
    alpha, weights = _divergence_share(config, rows.advantages), rows.batch.weights
    values, log_probs = _token_values(
        config, params, rows, dropout_key, step, with_log_probs=alpha < 1
    )
    loss, _ = config.reduction(values, weights)
    tokens, _ = losses.token_mean(values, weights)
    sequences, _ = losses.sequence_mean(values, weights)
    policy, total = jnp.zeros(()), loss
    if log_probs is not None:
        assert rows.advantages is not None
        policy = policy_loss(log_probs, weights, rows.advantages)
        total = alpha * loss + (1 - alpha) * policy_scale * policy
    return total, LossSums(loss, tokens, sequences, policy)
