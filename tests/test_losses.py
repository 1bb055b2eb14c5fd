"""Reductions and cross-entropy equal plain Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import losses


REDUCTIONS = (losses.sequence_mean, losses.token_mean)
LENGTHS = (3, 1, 6, 0, 4)


def _values_and_weights(lengths=LENGTHS, length=6):
    values = np.random.default_rng(0).gamma(2.0, size=(len(lengths), length)).astype(np.float32)
    weights = (np.arange(length)[None] < np.array(lengths)[:, None]).astype(np.float32)
    return values, weights


def _mean(reduction, values, weights):
    total, count = reduction(jnp.asarray(values), jnp.asarray(weights))
    return total / jnp.maximum(count, 1.0)


def _loop(reduction, values, lengths):
    """The paper's Eq. 2 and the mean over tokens, written as loops."""
    rows = [list(map(float, row[:n])) for row, n in zip(values, lengths, strict=True) if n]
    if reduction is losses.token_mean:
        tokens = [value for row in rows for value in row]
        return sum(tokens) / len(tokens)
    return sum(sum(row) / len(row) for row in rows) / len(rows)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_against_a_plain_loop(reduction):
    values, weights = _values_and_weights()
    got = _mean(reduction, values, weights)
    np.testing.assert_allclose(got, _loop(reduction, values, LENGTHS), rtol=1e-6)


@pytest.mark.parametrize("length", [2, 6])
def test_weights_may_be_fractions(length):
    """The weights of a row of two tokens sum to less than 1."""
    rng = np.random.default_rng(4)
    values = rng.gamma(2.0, size=(5, length)).astype(np.float32)
    weights = rng.uniform(0.1, 0.45, (5, length)).astype(np.float32)
    weights[1] = 0.0
    means = [np.average(v, weights=w) for v, w in zip(values, weights, strict=True) if w.any()]
    total, count = losses.sequence_mean(jnp.asarray(values), jnp.asarray(weights))
    np.testing.assert_allclose(total / count, np.mean(means), rtol=1e-6)
    total, count = losses.token_mean(jnp.asarray(values), jnp.asarray(weights))
    np.testing.assert_allclose(total / count, np.average(values, weights=weights), rtol=1e-6)


def test_counts():
    values, weights = _values_and_weights()
    assert losses.sequence_mean(jnp.asarray(values), jnp.asarray(weights))[1] == 4
    assert losses.token_mean(jnp.asarray(values), jnp.asarray(weights))[1] == sum(LENGTHS)


def test_the_two_means_weigh_long_sequences_differently():
    values = np.array([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]], np.float32)
    weights = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]], np.float32)
    assert _mean(losses.sequence_mean, values, weights) == 3.0
    np.testing.assert_allclose(_mean(losses.token_mean, values, weights), 9 / 5, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_targets_has_loss_zero(reduction):
    values, weights = _values_and_weights((0, 0, 0))
    value, gradient = jax.value_and_grad(lambda v: _mean(reduction, v, weights))(values)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(values))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_masked_leaks_into_neither_value_nor_gradient(reduction, poison):
    values, weights = _values_and_weights()
    clean = jax.value_and_grad(lambda v: _mean(reduction, v, weights))(values)
    poisoned = np.where(weights > 0, values, np.float32(poison))
    dirty = jax.value_and_grad(lambda v: _mean(reduction, v, weights))(poisoned)
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert not np.asarray(dirty[1])[weights == 0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masking_a_column_equals_dropping_it(reduction):
    values, weights = _values_and_weights()
    dropped = np.delete(values, 2, axis=1), np.delete(weights, 2, axis=1)
    weights[:, 2] = 0.0
    np.testing.assert_allclose(
        _mean(reduction, values, weights), _mean(reduction, *dropped), rtol=1e-6
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_microbatches_add_up(reduction):
    values, weights = _values_and_weights()
    whole = reduction(jnp.asarray(values), jnp.asarray(weights))
    for cuts in ([2], [1, 3, 4]):
        parts = [
            reduction(jnp.asarray(v), jnp.asarray(w))
            for v, w in zip(np.split(values, cuts), np.split(weights, cuts), strict=True)
        ]
        for index in range(2):
            np.testing.assert_allclose(sum(p[index] for p in parts), whole[index], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy(smoothing):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (2, 4, 7)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, 5, (2, 4)), jnp.int32)
    logits[..., 5:] = -np.inf  # ids without a piece take no part
    got = losses.cross_entropy(jnp.asarray(logits), targets, label_smoothing=smoothing)
    for b in range(2):
        for t in range(4):
            scores = logits[b, t, :5].astype(np.float64)
            log_q = scores - np.log(np.sum(np.exp(scores)))
            smooth = np.full(5, smoothing / 5)
            smooth[targets[b, t]] += 1 - smoothing
            np.testing.assert_allclose(got[b, t], -np.dot(smooth, log_q), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_cross_entropy_is_softmax_minus_target(smoothing):
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (2, 4, 7)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, 5, (2, 4)), jnp.int32)
    logits[..., 5:] = -np.inf

    def total(z):
        return losses.cross_entropy(z, targets, label_smoothing=smoothing).sum()

    gradient = jax.grad(total)(jnp.asarray(logits))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    smooth = (1 - smoothing) * np.eye(7)[targets] + smoothing / 5 * (np.arange(7) < 5)
    np.testing.assert_allclose(gradient, q - smooth, atol=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_float32():
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 3, (1, 2, 300)), jnp.bfloat16)
    targets = jnp.asarray([[4, 299]], jnp.int32)
    got = losses.cross_entropy(logits, targets)
    exact = np.asarray(logits, np.float64)
    expected = (
        np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
