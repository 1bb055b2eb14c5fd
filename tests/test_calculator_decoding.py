"""Decoding with the calculator makes a model that cannot add write the right sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, tiny_t5

from gkd_jax import sharding
from gkd_jax.decoding import calculator_decoding
from gkd_jax.models import decode_loop, t5
from gkd_jax.sampling import SamplingConfig, sample
from gkd_jax.text import vocabularies


VOCABULARY = vocabularies.arithmetic()
CONFIG = tiny_t5(VOCABULARY.vocab_size)
MESH = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
LENGTH = 16


def scripted(monkeypatch, *texts):
    """A model that writes the given texts whatever it reads, and records what it reads."""
    scripts = [[*VOCABULARY.encode(text), 1] for text in texts]
    fed = []

    def decode_step(config, params, tokens, cache):
        jax.debug.callback(lambda x: fed.append(np.asarray(x).tolist()), tokens, ordered=True)
        table = np.zeros((len(scripts), LENGTH), np.int32)
        for row, script in enumerate(scripts):
            table[row, : len(script)] = script
        wanted = jnp.asarray(table)[:, cache.time]
        logits = jax.nn.one_hot(wanted, CONFIG.vocab_size)
        return logits, cache._replace(time=cache.time + 1)

    monkeypatch.setattr(t5, "decode_step", decode_step)
    return fed


def decoded(tokens):
    return [VOCABULARY.decode([t for t in row.tolist() if t > 1]) for row in tokens]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_results_are_forced_into_the_text_and_fed_to_the_model(monkeypatch, params):
    fed = scripted(
        monkeypatch,
        "7 + 5 = 13 . 12 * 2 = 99 .",  # wrong twice
        "3 - 1 = 2 . The answer is 2 .",  # right: nothing changes
        "How many eggs are there = 4 .",  # no arithmetic before the equals sign
    )
    decode = calculator_decoding.make_decode(CONFIG, VOCABULARY, mesh=MESH, max_length=LENGTH)
    tokens = decode(params, jnp.asarray(np.full((3, 4), 5, np.int32)))
    assert decoded(tokens) == [
        VOCABULARY.decode(VOCABULARY.encode(text))
        for text in (
            "7 + 5 = 12 . 12 * 2 = 24 .",
            "3 - 1 = 2 . The answer is 2 .",
            "How many eggs are there = 4 .",
        )
    ]
    jax.effects_barrier()
    # What the model sees next is the forced token, not its own.
    first_row = [step[0] for step in fed]
    assert VOCABULARY.decode([first_row[5]]) == "12"


def test_without_arithmetic_it_is_greedy_decoding(monkeypatch, params):
    """On two devices, whose 16 rows each become 8 when half of them have ended."""
    monkeypatch.setattr(decode_loop, "_TOKENS_OF_A_LOOP", 4)
    inputs = jnp.asarray(np.random.default_rng(1).integers(2, 40, (32, 6)), jnp.int32)
    banned = (0, VOCABULARY.encode("=")[0])  # no equals sign, nothing to calculate
    special = {"banned_ids": banned, "eos_ids": tuple(range(2, 22))}
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2), jax.devices()[:2])
    decode = calculator_decoding.make_decode(
        CONFIG, VOCABULARY, mesh=mesh, max_length=LENGTH, **special
    )
    greedy = SamplingConfig(temperature=0.0, **special)
    expected = sample(CONFIG, params, inputs, max_length=LENGTH, sampling=greedy, plain=True)
    going_on = np.sum(np.reshape(expected.weights, (2, 16, LENGTH)), axis=1)
    assert (going_on[:, 10] <= 8).all()
    np.testing.assert_array_equal(decode(params, inputs), expected.tokens)


def test_a_result_that_the_vocabulary_cannot_spell_is_left_to_the_model(monkeypatch, params):
    scripted(monkeypatch, "40 * 40 = 12 .")  # 1600 is no piece
    decode = calculator_decoding.make_decode(CONFIG, VOCABULARY, mesh=MESH, max_length=LENGTH)
    tokens = decode(params, jnp.asarray([[5, 1]]))
    assert decoded(tokens) == [VOCABULARY.decode(VOCABULARY.encode("40 * 40 = 12 ."))]
