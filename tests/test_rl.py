"""The gradient of Eq. 5 equals that by enumeration of all sequences of two tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params, update
import seqio
import small_runs

from gkd_jax import divergences, gkd, losses, rl
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.gkd import GKDConfig, ModelPair
from gkd_jax.models import t5
from gkd_jax.rl import RLConfig
from gkd_jax.sampling import SamplingConfig
from gkd_jax.storage import pretrained
from gkd_jax.training import train, train_state


# Ids: pad (never drawn), EOS, one word.
STUDENT = t5.T5Config(
    vocab_size=3,
    d_model=8,
    num_heads=2,
    head_dim=4,
    d_ff=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    relpos_buckets=4,
    relpos_max_distance=8,
)
MODELS = ModelPair(student=STUDENT, teacher=dataclasses.replace(STUDENT, d_ff=12), num_pieces=3)
SEQUENCES = jnp.array([[1, 0], [2, 1], [2, 2]])  # all there are
WEIGHTS = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
REWARDS = np.array([0.3, -1.0, 2.0], np.float32)
INPUTS = jnp.array([[2, 2, 1, 0]])
ALL = Batch(jnp.repeat(INPUTS, 3, axis=0), SEQUENCES, WEIGHTS)
SGD = optax.sgd(1.0)
KEY = jax.random.key(0)
ALPHAS = (0.0, 0.25, 1.0)
TEXTS = ["one", "two"]


def reward(prompts, outputs, references):
    return np.zeros(len(outputs))


def method(alpha, **more):
    return GKDConfig(
        divergence=partial(divergences.jsd, beta=0.9),
        rl=RLConfig(reward=reward, alpha=alpha),
        **more,
    )


@pytest.fixture(scope="module")
def student():
    return random_params(STUDENT, 0)


@pytest.fixture(scope="module")
def teacher():
    assert MODELS.teacher is not None
    return random_params(MODELS.teacher, 1)


def log_q_of_sequences(params, temperature=1.0):
    """The log-probability of each of SEQUENCES, pad excluded, token by token."""
    logits = t5.logits(STUDENT, params, ALL)[..., 1:] / temperature
    log_q = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_q, jnp.maximum(SEQUENCES - 1, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(picked * WEIGHTS, axis=1)


def exact_gradient(params, teacher, alpha, temperature=1.0):
    """The gradient of minus Eq. 5: through the policy for the reward's expectation, not for D's."""

    def objective(params):
        q = jnp.exp(log_q_of_sequences(params, temperature))
        values = gkd.per_token_loss(method(alpha), MODELS, params, teacher, ALL)
        mean = jnp.sum(values * WEIGHTS, axis=1) / WEIGHTS.sum(1)
        return -(1 - alpha) * jnp.sum(q * REWARDS) + alpha * jnp.sum(
            jax.lax.stop_gradient(q) * mean
        )

    return jax.jit(jax.grad(objective))(params)


def gradient(config, params, teacher, batch, advantages, num_microbatches=1):
    """The gradient that `gkd.update` descends, from SGD's step at learning rate 1."""
    state = train_state.create(params, SGD)
    new, _ = update(config, MODELS, SGD, num_microbatches, state, teacher, batch, KEY, advantages)
    return jax.tree.map(lambda before, after: before - after, params, new.params)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


@pytest.mark.parametrize(
    ("alpha", "temperature"), [*((alpha, 1.0) for alpha in ALPHAS), (0.25, 1.7)]
)
def test_the_estimator_s_expectation_is_the_exact_gradient(alpha, temperature, student, teacher):
    """The estimator of each sequence, weighted by the sequence's probability."""
    sampling = dataclasses.replace(GKDConfig().sampling, temperature=temperature)
    config = method(alpha, sampling=sampling)
    q = np.exp(log_q_of_sequences(student, temperature))
    assert abs(q.sum() - 1) < 1e-5
    total = 0.0
    for i, probability in enumerate(q):
        batch = Batch(INPUTS, SEQUENCES[i : i + 1], WEIGHTS[i : i + 1])
        got = gradient(config, student, teacher, batch, jnp.asarray(REWARDS[i : i + 1]))
        total = total + probability * flat(got)
    expected = flat(exact_gradient(student, teacher, alpha, temperature))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(total, expected, atol=2e-5)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_gradient_of_samples_with_a_baseline_is_unbiased(num_samples, student, teacher):
    """Sampling, leave-one-out baseline and update as in a run, over many batches."""
    config = method(0.25, num_samples=num_samples)
    prompts = 256 // num_samples
    batch = Batch(
        jnp.repeat(INPUTS, prompts, axis=0),
        jnp.zeros((prompts, 2), jnp.int32),
        jnp.ones((prompts, 2)),
    )
    draw = jax.jit(partial(gkd.sample_targets, config, MODELS))
    found = []
    for seed in range(24):
        drawn, _ = draw(student, batch, jax.random.key(seed))
        tokens = np.asarray(drawn.targets)
        which = np.where(tokens[:, 0] == 1, 0, tokens[:, 1])  # SEQUENCES' rows
        scores = rl.advantages(REWARDS[which], num_samples)
        found.append(flat(gradient(config, student, teacher, drawn, jnp.asarray(scores))))
    mean, error = np.mean(found, 0), np.std(found, 0, ddof=1) / np.sqrt(len(found))
    expected = flat(exact_gradient(student, teacher, 0.25))
    assert np.all(np.abs(mean - expected) < 6 * error + 1e-5)
    assert np.linalg.norm(error) < 0.3 * np.linalg.norm(expected)  # the test could see a bias


def test_alpha_one_is_pure_distillation_bit_for_bit(student, teacher):
    pure = dataclasses.replace(method(1.0), rl=None)
    expected = gradient(pure, student, teacher, ALL, None)
    got = gradient(method(1.0), student, teacher, ALL, jnp.asarray(REWARDS))
    np.testing.assert_array_equal(flat(got), flat(expected))


@pytest.mark.parametrize("reduction", [losses.sequence_mean, losses.token_mean])
def test_microbatches_change_nothing(reduction, student, teacher):
    """With two prompts of two samples each, the policy term stays a mean over sequences."""
    config = method(0.25, num_samples=2, reduction=reduction)
    rows = np.array([0, 1, 2, 1])
    prompts = jnp.array([[2, 2, 1, 0], [2, 1, 0, 0]])
    batch = Batch(prompts, SEQUENCES[rows], WEIGHTS[rows])
    advantages = jnp.asarray(rl.advantages(REWARDS[rows], 2))
    whole = gradient(config, student, teacher, batch, advantages)
    parts = gradient(config, student, teacher, batch, advantages, num_microbatches=2)
    np.testing.assert_allclose(flat(parts), flat(whole), atol=5e-6)


def test_the_loss_in_parts_of_the_length_is_the_whole_loss(student, teacher):
    whole = gradient(method(0.25), student, teacher, ALL, jnp.asarray(REWARDS))
    parts = gradient(method(0.25, loss_parts=2), student, teacher, ALL, jnp.asarray(REWARDS))
    np.testing.assert_allclose(flat(parts), flat(whole), atol=5e-6)


def test_reward_and_divergence_are_reported_apart(student, teacher):
    state = train_state.create(student, SGD)
    config = method(0.25)
    _, values = update(config, MODELS, SGD, 1, state, teacher, ALL, KEY, jnp.asarray(REWARDS))
    log_q = np.asarray(log_q_of_sequences(student))
    np.testing.assert_allclose(values["policy_loss"], -np.mean(REWARDS * log_q), rtol=1e-5)
    np.testing.assert_allclose(
        values["loss"], 0.25 * values["divergence"] + 0.75 * values["policy_loss"], rtol=1e-5
    )


def test_advantages():
    rewards = np.array([1.0, 2.0, 6.0, 0.0])
    # Alone: against the mean of the other three.
    np.testing.assert_allclose(
        rl.advantages(rewards), [1 - 8 / 3, 2 - 7 / 3, 6 - 1, 0 - 3], rtol=1e-6
    )
    # Two a prompt: against the other one.
    np.testing.assert_allclose(rl.advantages(rewards, 2), [-1, 1, 6, -6])
    np.testing.assert_allclose(rl.advantages(np.array([5.0])), [5.0])  # nothing to compare with
    with pytest.raises(ValueError, match=r"must be a finite number, got \[1.0, nan\]"):
        rl.advantages(np.array([1.0, np.nan]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"one number for each of the 2 outputs, got an array of shape \(1,\)"),
        ([1.0] * 4, r"shape \(4,\)"),  # two samples of a prompt would share one advantage
        (0.5, r"shape \(\) and dtype float64: 0.5"),
        ([[1.0], [2.0]], r"shape \(2, 1\)"),
        ([[1.0], [1.0, 2.0]], "dtype object"),
        (["1.0", "2.0"], "dtype <U3: \\['1.0', '2.0'\\]"),
        ([1.0, None], "dtype object"),
        (None, r"shape \(\) and dtype object: None"),
        ([1.0, float("nan")], r"must be a finite number, got \[1.0, nan\]"),
        ([1.0, float("inf")], r"must be a finite number, got \[1.0, inf\]"),
    ],
)
def test_what_is_no_number_for_each_output_is_refused(returned, message, tmp_path):
    def broken(prompts, outputs, references):
        return returned

    with pytest.raises(ValueError, match=message):
        rl.rewards_of(broken, TEXTS, TEXTS, TEXTS)
    texts = {"inputs_pretokenized": "p", "targets_pretokenized": "The answer is 1."}
    rows = [evaluate.DecodedRow(texts, "The answer is 1.", [1], None)] * 2
    task = seqio.TaskRegistry.get("arithmetic")
    with pytest.raises(ValueError, match=message):
        evaluate.compute_metrics(task, rows, evaluate.EvalConfig(rewards=(broken,)))


@pytest.mark.parametrize(
    "returned", [[1, 0], [True, False], np.float32([1, 0]), jnp.array([1, 0], jnp.bfloat16)]
)
def test_any_kind_of_number_is_a_reward(returned):
    assert rl.rewards_of(lambda *_: returned, TEXTS, TEXTS, TEXTS).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RLConfig(reward=reward, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: method(0.5, on_policy_fraction=0.0), "a reward needs samples"),
        (lambda: method(0.5, mixing="example"), "no reward"),
        (lambda: method(0.5, sampling=SamplingConfig(top_k=2)), "samples of the whole policy"),
        (lambda: method(0.5, sampling=SamplingConfig(top_p=0.9)), "samples of the whole policy"),
    ],
)
def test_bad_configurations_are_refused(make, message):
    with pytest.raises(Exception, match=message):
        make()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_is_refused_under_a_reward(rate, tmp_path):
    """With dropout, log Q of a sample would not be the log-probability of its draw."""
    student = pretrained.ModelConfig(architecture=small_runs.small, size="tiny", dropout_rate=rate)
    models = {"student": student, "teacher": student}
    rewarded = method(0.5, on_policy_fraction=1.0)
    with pytest.raises(ValueError, match=f"DROPOUT_RATE 0: .*got dropout_rate={rate}"):
        train.train(
            **small_runs.options(tmp_path, steps=1, **models, method=rewarded), dry_run=True
        )
    without = dataclasses.replace(rewarded, rl=None)
    train.train(**small_runs.options(tmp_path, steps=1, **models, method=without), dry_run=True)
