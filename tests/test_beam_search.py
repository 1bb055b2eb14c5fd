"""Beam search gives T5X's golden beams, and the best of all sequences where these can be listed."""

import dataclasses
import itertools

from conftest import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from gkd_jax import convert
from gkd_jax.batch import Batch
from gkd_jax.decoding.beam_search import EMPTY, beam_search, length_penalty
from gkd_jax.models import t5
from gkd_jax.sampling import SamplingConfig, sample, weights_until_eos


def tiny(vocab_size=6, **more):
    return t5.T5Config(
        vocab_size=vocab_size,
        d_model=16,
        num_heads=2,
        head_dim=8,
        d_ff=32,
        num_encoder_layers=1,
        num_decoder_layers=2,
        **more,
    )


INPUTS = jnp.array([[3, 4, 5, 1, 0], [5, 5, 2, 4, 1], [2, 1, 0, 0, 0]])


def run(config, params, **options):
    function = jax.jit(lambda params, inputs: beam_search(config, params, inputs, **options))
    return jax.tree.map(np.asarray, function(params, INPUTS))


@pytest.mark.parametrize("name", ["t5", "scalable_t5"])
def test_tokens_and_scores_are_those_of_t5x(t5x_checkpoint, name):
    path, arrays = t5x_checkpoint(name, "native_f32"), golden(name)
    config = convert.read_config(path)
    params = convert.read_params(path, config)
    inputs = jnp.asarray(arrays["batch/encoder_input_tokens"])
    length = arrays["beam4/tokens"].shape[-1]
    # T5X bans nothing and lists the best beam last.
    beams = jax.jit(
        lambda params: beam_search(config, params, inputs, max_length=length, banned_ids=())
    )(params)
    np.testing.assert_array_equal(beams.tokens[:, ::-1], arrays["beam4/tokens"])
    np.testing.assert_allclose(beams.scores[:, ::-1], arrays["beam4/scores"], atol=1e-3)


def all_scores(config, params, row, length, alpha):
    """The score of every sequence that ends within `length`, by teacher forcing."""
    ids = range(2, config.vocab_size)
    sequences = [(*body, 1) for n in range(length) for body in itertools.product(ids, repeat=n)]
    targets = np.zeros((len(sequences), length), np.int32)
    for index, sequence in enumerate(sequences):
        targets[index, : len(sequence)] = sequence
    weights = np.asarray(weights_until_eos(jnp.asarray(targets), (1,)))
    inputs = jnp.broadcast_to(INPUTS[row], (len(sequences), INPUTS.shape[1]))
    logits = t5.logits(config, params, Batch(inputs, jnp.asarray(targets), jnp.asarray(weights)))
    logits = logits.at[..., 0].set(-jnp.inf)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    picked = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    total = np.where(weights > 0, picked, 0).sum(1)
    return sequences, total / length_penalty(weights.sum(1), alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_enough_beams_find_the_best_sequence_there_is(alpha):
    config, length = tiny(), 4
    params = random_params(config, 3)
    beams = run(config, params, max_length=length, num_beams=64, alpha=alpha)
    for row in range(len(INPUTS)):
        sequences, scores = all_scores(config, params, row, length, alpha)
        order = np.argsort(-scores)[:5]
        np.testing.assert_allclose(beams.scores[row, :5], scores[order], atol=2e-5)
        best = sequences[order[0]]
        assert tuple(beams.tokens[row, 0, : len(best)]) == best
        assert not beams.tokens[row, 0, len(best) :].any()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_no_search_ends_while_a_longer_sequence_may_still_win(num_beams):
    """With one word and two ends there are two sequences of each length, and one beam goes on."""
    config, length, alpha = tiny(), 8, 4.0
    banned, ends = (0, 4, 5), (1, 3)
    targets = jnp.full((len(INPUTS), length), 2)
    batch = Batch(INPUTS, targets, jnp.ones(targets.shape))

    @jax.jit
    def both(params):
        beams = beam_search(
            config,
            params,
            INPUTS,
            max_length=length,
            num_beams=num_beams,
            alpha=alpha,
            banned_ids=banned,
            eos_ids=ends,
        )
        logits = t5.logits(config, params, batch).at[..., banned].set(-jnp.inf)
        return beams.scores, jax.nn.log_softmax(logits)

    for seed in range(16):
        found, log_probs = map(np.asarray, both(random_params(config, seed)))
        before = np.cumsum(log_probs[..., 2:3], axis=1) - log_probs[..., 2:3]
        penalty = ((5 + np.arange(1, length + 1)[:, None]) / 6) ** alpha
        scores = (before + log_probs[..., ends]) / penalty
        scores = np.sort(scores.reshape(len(INPUTS), -1))[:, ::-1]
        np.testing.assert_allclose(found, scores[:, :num_beams], atol=2e-5)


def test_one_beam_without_eos_is_greedy():
    config = tiny(vocab_size=40)
    params = random_params(config)
    beams = run(config, params, max_length=6, num_beams=1, banned_ids=(0, 1), eos_ids=())
    greedy = sample(
        config,
        params,
        INPUTS,
        max_length=6,
        sampling=SamplingConfig(temperature=0.0, banned_ids=(0, 1), eos_ids=(2,)),
    )
    assert not (greedy.tokens == 2).any()  # else it would stop where the beam goes on
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(beams.scores[:, 0], greedy.log_probs.sum(1), rtol=1e-5)


def test_scores_descend_and_banned_ids_never_occur():
    config = dataclasses.replace(tiny(vocab_size=40), per_layer_relpos=True)
    params = random_params(config, 1)
    beams = run(config, params, max_length=7, banned_ids=(0, 7, 8, 9))
    assert (np.diff(beams.scores, axis=1) <= 0).all()
    found = beams.tokens[beams.scores > EMPTY]  # the others are slots that hold nothing
    assert len(found) >= len(INPUTS)
    weights = np.asarray(weights_until_eos(jnp.asarray(found), (1,)))
    assert not np.isin(found[weights > 0], (0, 7, 8, 9)).any()


def test_no_beams_are_refused():
    config = tiny()
    with pytest.raises(ValueError, match="num_beams must be positive, got 0"):
        beam_search(config, random_params(config), INPUTS, max_length=3, num_beams=0)
