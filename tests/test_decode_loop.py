"""Halving, refill and a cache in segments give the plain loop's samples."""

import dataclasses
import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from gkd_jax import sampling, sharding
from gkd_jax.decoding.beam_search import beam_search
from gkd_jax.models import decode_loop, decoder, kv_cache, refill, t5
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.sampling import SamplingConfig


T, S, VOCAB = 22, 5, 24
SIZES = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 4, "head_dim": 4, "d_ff": 16}
SIZES["cache_segment"] = 4  # segments of 4, 4, 8 and 6 positions
T5 = t5.T5Config(
    **SIZES, num_encoder_layers=1, num_decoder_layers=2, relpos_buckets=8, relpos_max_distance=20
)
DECODER = DecoderConfig(**SIZES, num_layers=2, num_kv_heads=2, qk_norm=True, windows=(6, 0))
CONFIGS = {"t5": T5, "decoder": DECODER}


@pytest.fixture(autouse=True)
def short_loops(monkeypatch):
    """Batches halve for short answers too, and a refill takes half of the slots."""
    monkeypatch.setattr(decode_loop, "_TOKENS_OF_A_LOOP", 4)
    monkeypatch.setattr(refill, "_SHARE", 2)


@functools.cache
def model(family):
    if family == "t5":
        return T5, random_params(T5)
    return DECODER, decoder.init(DECODER, jax.random.key(0))


@functools.cache
def prompts(rows):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB, (rows, S)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(rng.integers(1, S + 1, rows), jnp.int32)


@functools.cache
def sampler(family, *, data, greedy=False, **options):
    """A compiled function (inputs, lengths, key, limits) -> Sample on a mesh of `data` devices."""
    config, params = model(family)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=data), jax.devices()[:data])
    drawing = SamplingConfig(eos_ids=(1, 2), banned_ids=(0,), temperature=0.0 if greedy else 1.0)

    def run(params, inputs, lengths, key, limits):
        with sharding.use(mesh):
            return sampling.sample(
                config,
                params,
                inputs,
                None if greedy else key,
                max_length=T,
                input_lengths=lengths,
                sampling=drawing,
                limits=limits,
                **options,
            )

    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    placed = (everywhere, rows, rows, everywhere, rows)
    return functools.partial(jax.jit(run, in_shardings=placed), params)


def check_samples(found, expected, limits):
    """Fails unless the samples are the expected ones, and end where they should."""
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.weights, expected.weights)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    sizes = np.asarray(found.weights).sum(axis=1)
    ended = np.isin(np.asarray(found.tokens), (1, 2)).any(axis=1)
    assert (sizes <= limits).all()
    assert (sizes[~ended] == limits[~ended]).all()


@pytest.mark.parametrize("data", [1, 8])
@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(cases=st.data())
def test_samples_are_those_of_the_plain_loop(family, data, cases):
    rows = cases.draw(st.sampled_from([5, 40] if data == 1 else [40]))
    limits = cases.draw(hnp.arrays(np.int32, rows, elements=st.integers(0, T)))
    key = jax.random.key(cases.draw(st.integers(0, 2**31 - 1)))
    inputs, lengths = prompts(rows)
    expected = sampler(family, data=1, plain=True)(inputs, lengths, key, limits)
    found = sampler(family, data=data)(inputs, lengths, key, limits)
    check_samples(found, expected, limits)


# Prompts, rows that are decoded at a time, and how. On eight devices, each has 5 rows and 4 slots,
# or 4 rows and one slot.
TWO_GREEDY = {"greedy": True, "num_samples": 2}
REFILLS = {1: [(40, 16, {}), (16, 5, TWO_GREEDY)], 8: [(40, 32, {}), (16, 8, TWO_GREEDY)]}


@pytest.mark.parametrize("data", REFILLS)
@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(cases=st.data())
def test_samples_in_fewer_rows_are_those_of_the_plain_loop(family, data, cases):
    rows, decode_rows, how = cases.draw(st.sampled_from(REFILLS[data]))
    sizes = rows * how.get("num_samples", 1)
    limits = cases.draw(hnp.arrays(np.int32, sizes, elements=st.integers(0, T + 1)))
    arguments = (*prompts(rows), jax.random.key(cases.draw(st.integers(0, 2**31 - 1))), limits)
    expected = sampler(family, data=1, plain=True, **how)(*arguments)
    found = sampler(family, data=data, decode_rows=decode_rows, **how)(*arguments)
    check_samples(found, expected, np.minimum(limits, T))


@pytest.fixture
def row_counts(monkeypatch):
    """The rows of each decoding step of a T5, and of each pass over its prompts."""
    seen = {"decode_step": [], "encode": []}
    for name, found in seen.items():
        function = getattr(t5, name)

        def counted(config, params, tokens, *rest, function=function, found=found, **options):
            jax.debug.callback(lambda: found.append(len(tokens)))
            return function(config, params, tokens, *rest, **options)

        monkeypatch.setattr(t5, name, counted)
    return seen


def draw(limits, **options):
    """Samples from the T5 without an EOS, and returns the tokens."""
    config, params = model("t5")
    inputs, lengths = prompts(len(limits))

    def run(params, inputs, lengths, limits):
        return sampling.sample(
            config,
            params,
            inputs,
            jax.random.key(0),
            max_length=T,
            input_lengths=lengths,
            sampling=SamplingConfig(eos_ids=()),
            limits=limits,
            **options,
        )

    found = jax.jit(run)(params, inputs, lengths, jnp.asarray(limits))
    jax.effects_barrier()
    return np.asarray(found.tokens)


def test_a_row_that_ends_makes_place_for_the_next(row_counts):
    """Beside one long row, 11 short ones pass through three slots; two free slots are refilled."""
    draw([T] + [2] * 11, decode_rows=4)
    assert row_counts["decode_step"] == [4] * T
    assert row_counts["encode"] == [4, 2, 2, 2, 2]


def test_two_free_slots_are_refilled_while_the_others_go_on(row_counts):
    draw([6, 6, 2, 2, 6, 6], decode_rows=4)
    assert row_counts["decode_step"] == [4] * 8


def test_what_fills_up_a_refill_is_not_decoded(row_counts):
    """Two free slots are refilled by the fifth row, which may have no token, and by none."""
    draw([2] * 4 + [0], decode_rows=4)
    assert row_counts["decode_step"] == [4] * 2


def test_rows_that_have_ended_are_not_decoded(row_counts):
    """One row of 16 is long: most steps run on 8 rows."""
    draw([2] * 7 + [T] + [4] * 4 + [6] * 4)
    assert row_counts["decode_step"] == [16] * 4 + [8] * (T - 4)
    assert row_counts["encode"] == [16]


def test_the_plain_loop_keeps_all_rows(row_counts):
    draw([2] * 15 + [T], plain=True)
    assert row_counts["decode_step"] == [16] * T


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_rows": 0}, "decode_rows must be a positive integer .*, got 0"),
        ({"decode_rows": 2, "plain": True}, "there is no plain loop for it"),
    ],
)
def test_decode_rows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        draw([T] * 4, **options)


def test_decode_rows_on_a_mesh():
    """Each device has as many rows; a batch may have other numbers of rows (`mixing="example"`)."""
    limits = [3, T, 1, 5, 2, 9, 4, 1, 6, 7]
    expected = draw(limits)
    with sharding.use(sharding.make_mesh(sharding.MeshConfig(data=8))):
        np.testing.assert_array_equal(draw(limits, decode_rows=8), expected)
        with pytest.raises(ValueError, match=r"\(8 devices\), or None, got 12"):
            draw([T] * 16, decode_rows=12)


@pytest.mark.parametrize("family", CONFIGS)
def test_beams_are_those_of_a_batch_that_keeps_its_size(family, monkeypatch):
    """On one device and on two."""
    config, params = model(family)
    inputs, lengths = prompts(16)

    def search(config, data):
        mesh = sharding.make_mesh(sharding.MeshConfig(data=data), jax.devices()[:data])

        def run(params, inputs, lengths):
            with sharding.use(mesh):
                return beam_search(
                    config,
                    params,
                    inputs,
                    max_length=T,
                    input_lengths=lengths,
                    num_beams=3,
                    banned_ids=(0,),
                    eos_ids=(1, 2),
                )

        rows = sharding.batch_sharding(mesh)
        placed = (sharding.replicated(mesh), rows, rows)
        return jax.jit(run, in_shardings=placed)(params, inputs, lengths)

    found = [search(config, data) for data in (1, 2)]
    monkeypatch.setattr(decode_loop, "_MAX_HALVINGS", 0)
    expected = search(dataclasses.replace(config, cache_segment=T), 1)
    for beams in found:
        np.testing.assert_array_equal(beams.tokens, expected.tokens)
        np.testing.assert_allclose(beams.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("groups", "shards", "length", "expected"),
    [
        (64, 1, 12, [32, 16, 8]),
        (256, 1, 100, [128, 64, 32]),
        (64, 1, 8, [32, 16]),
        (64, 1, 3, []),
        (64, 8, 100, [4, 2, 1]),
        (15, 1, 100, []),
        (17, 1, 100, [9]),
        (8, 8, 100, []),
    ],
)
def test_halvings(groups, shards, length, expected):
    assert decode_loop.halvings(groups, shards, length) == expected


def test_the_plain_loop_has_one_segment():
    started = decode_loop.start(*model("t5"), *prompts(2), length=T, in_segments=False)
    assert {x.shape[-2] for x in jax.tree.leaves(started.cache.keys)} == {T}


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (32, [32]),
        (64, [64]),
        (100, [64, 36]),
        (300, [64, 64, 128, 44]),
    ],
)
def test_segments_cover_all_positions(length, expected):
    assert kv_cache.segment_sizes(length, 64) == expected
