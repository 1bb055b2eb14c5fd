"""Sampled tokens follow teacher-forced probabilities, by NumPy and by chi-square tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params
from scipy import special, stats

from gkd_jax import sampling, sharding
from gkd_jax.batch import Batch
from gkd_jax.models import lm, t5
from gkd_jax.planning import hlo, hlo_text
from gkd_jax.sampling import SamplingConfig


CONFIG = t5.T5Config(
    vocab_size=32,
    d_model=16,
    num_heads=4,
    head_dim=4,
    d_ff=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relpos_buckets=8,
    relpos_max_distance=20,
)
B, S, T = 8, 7, 10
decode = jax.jit(sampling.sample, static_argnames=("config", "max_length", "sampling"))
logits = jax.jit(t5.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, norm_spread=0.0)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    ids = rng.integers(2, 32, (B, S)).astype(np.int32)
    ids[np.arange(S)[None] >= rng.integers(3, S + 1, B)[:, None]] = 0
    return jnp.asarray(ids)


def _log_softmax(params, inputs, tokens, settings):
    """Teacher-forced log-probabilities of the sampled distribution, in float64."""
    batch = Batch(inputs, tokens, jnp.ones(tokens.shape))
    scores = np.array(logits(CONFIG, params, batch), np.float64) / (settings.temperature or 1.0)
    scores[..., list(settings.banned_ids)] = -np.inf
    return special.log_softmax(scores, axis=-1)


# Against teacher forcing --------------------------------------------------------------------------


@pytest.mark.parametrize("banned", [(), (0,), (0, 3, 4, 30, 31)])
def test_greedy_is_the_argmax_of_teacher_forced_logits(banned, params, inputs):
    settings = SamplingConfig(temperature=0.0, banned_ids=banned)
    drawn = decode(CONFIG, params, inputs, max_length=T, sampling=settings)
    log_q = _log_softmax(params, inputs, drawn.tokens, settings)
    counts = np.asarray(drawn.weights) > 0
    np.testing.assert_array_equal(log_q.argmax(-1)[counts], np.asarray(drawn.tokens)[counts])
    np.testing.assert_allclose(
        np.asarray(drawn.log_probs)[counts], log_q.max(-1)[counts], atol=1e-4
    )


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probs_are_those_of_the_distribution_drawn_from(temperature, params, inputs):
    settings = SamplingConfig(temperature=temperature, banned_ids=(0, 30, 31))
    drawn = decode(CONFIG, params, inputs, jax.random.key(0), max_length=T, sampling=settings)
    log_q = _log_softmax(params, inputs, drawn.tokens, settings)
    expected = np.take_along_axis(log_q, np.asarray(drawn.tokens)[..., None], -1)[..., 0]
    expected = np.where(np.asarray(drawn.weights) > 0, expected, 0.0)
    np.testing.assert_allclose(drawn.log_probs, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_follow_the_model(temperature, params, inputs):
    """A chi-square test of 8,192 first tokens for one input."""
    settings = SamplingConfig(temperature=temperature, banned_ids=(0, 9))
    rows = jnp.broadcast_to(inputs[:1], (8192, S))
    drawn = decode(CONFIG, params, rows, jax.random.key(1), max_length=1, sampling=settings)
    expected = np.exp(_log_softmax(params, inputs[:1], drawn.tokens[:1], settings)[0, 0])
    _assert_chi_square(np.asarray(drawn.tokens)[:, 0], expected)


def test_temperature_near_zero_is_greedy(params, inputs):
    cold = SamplingConfig(temperature=1e-5)
    greedy = SamplingConfig(temperature=0.0)
    got = decode(CONFIG, params, inputs, jax.random.key(0), max_length=T, sampling=cold)
    expected = decode(CONFIG, params, inputs, max_length=T, sampling=greedy)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_an_encoder_result_can_be_given(params, inputs):
    encoded = jax.jit(t5.encode, static_argnums=0)(CONFIG, params, inputs)
    key = jax.random.key(3)
    got = decode(CONFIG, params, jnp.zeros_like(inputs), key, max_length=T, context=encoded)
    expected = decode(CONFIG, params, inputs, key, max_length=T)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


# The end of a sequence ----------------------------------------------------------------------------

ONLY_EOS = SamplingConfig(banned_ids=(0, *range(2, 32)))
EOS_OR_TWO = SamplingConfig(banned_ids=(0, *range(3, 32)), temperature=3.0)


def test_nothing_comes_after_eos(params, inputs):
    rows = jnp.tile(inputs, (8, 1))
    key = jax.random.key(5)
    drawn = decode(CONFIG, params, rows, key, max_length=T, sampling=EOS_OR_TWO)
    lengths = []
    for tokens, weights, log_probs in zip(*map(np.asarray, drawn), strict=True):
        ended = np.flatnonzero(tokens == 1)
        length = int(ended[0]) + 1 if ended.size else T
        np.testing.assert_array_equal(weights, (np.arange(T) < length).astype(np.float32))
        assert (tokens[:length] > 0).all()
        assert not tokens[length:].any()
        assert not log_probs[length:].any()
        lengths.append(length if ended.size else T + 1)
    assert min(lengths) == 1
    assert max(lengths) > 3


def test_truncated_rows_keep_all_weights(params, inputs):
    never = SamplingConfig(banned_ids=(0,), eos_ids=(31,), temperature=0.0)
    drawn = decode(CONFIG, params, inputs, max_length=3, sampling=never)
    truncated = ~(np.asarray(drawn.tokens) == 31).any(axis=1)
    assert truncated.any()
    np.testing.assert_array_equal(np.asarray(drawn.weights)[truncated], 1.0)
    assert (np.asarray(drawn.tokens)[truncated] > 0).all()


def test_weights_until_eos():
    tokens = jnp.asarray([[5, 1, 0, 0], [1, 1, 7, 1], [5, 6, 7, 8], [0, 5, 0, 1]], jnp.int32)
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(sampling.weights_until_eos(tokens, (1,)), expected)
    np.testing.assert_array_equal(sampling.weights_until_eos(tokens, (5,))[0], [1, 0, 0, 0])


@pytest.mark.parametrize("settings", [ONLY_EOS, EOS_OR_TWO])
def test_the_loop_ends_with_the_last_row(settings, params, inputs, monkeypatch):
    calls = []
    decode_step = t5.decode_step

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return decode_step(*args)

    monkeypatch.setattr(t5, "decode_step", counted)
    drawn = sampling.sample(
        CONFIG, params, inputs[:2], jax.random.key(0), max_length=200, sampling=settings
    )
    jax.effects_barrier()
    lengths = np.asarray(drawn.weights).sum(axis=1)
    assert len(calls) == lengths.max()
    assert len(calls) < 200


# What can be drawn --------------------------------------------------------------------------------


def test_banned_ids_are_never_drawn(params, inputs):
    """None of seven banned ids (of 32) is among 5,000 tokens at a high temperature."""
    banned = sampling.banned_tail(CONFIG, 26)
    assert banned == (0, 26, 27, 28, 29, 30, 31)
    settings = SamplingConfig(temperature=8.0, banned_ids=banned)
    rows = jnp.tile(inputs, (100, 1))
    drawn = decode(CONFIG, params, rows, jax.random.key(2), max_length=T, sampling=settings)
    tokens = np.asarray(drawn.tokens)[np.asarray(drawn.weights) > 0]
    assert tokens.size > 5000
    assert set(np.unique(tokens)) == set(range(1, 26))


def test_by_default_a_t5_draws_no_pad_and_ends_at_its_eos():
    assert SamplingConfig().special_ids(CONFIG) == ((0,), (1,))
    assert SamplingConfig(banned_ids=(), eos_ids=(2, 3)).special_ids(CONFIG) == ((), (2, 3))


def _numpy_filter(row, top_k, top_p):
    """The kept ids, most probable first: the first k, then the shortest prefix of enough mass."""
    order = np.argsort(-row, kind="stable")
    if top_k:
        order = order[:top_k]
    probabilities = special.softmax(row[order])
    kept, mass = [], 0.0
    for index, probability in zip(order, probabilities, strict=True):
        kept.append(index)
        mass += probability
        if mass >= top_p:
            break
    return set(kept)


@pytest.mark.parametrize("top_k", [0, 1, 4, 49, 50, 51])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_filters(top_k, top_p):
    rows = np.random.default_rng(3).normal(0, 2, (20, 50)).astype(np.float32)
    rows[:, 7] = -np.inf
    settings = SamplingConfig(top_k=top_k, top_p=top_p)
    got = np.asarray(sampling.filter_logits(jnp.asarray(rows), settings))
    for row, filtered in zip(rows, got, strict=True):
        kept = _numpy_filter(row.astype(np.float64), min(top_k, 49), top_p) - {7}
        assert set(np.flatnonzero(filtered > -np.inf)) == kept
        np.testing.assert_array_equal(filtered[list(kept)], row[list(kept)])


TIED = {
    "all": [0.5] * 9,
    "at the border": [2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 0.0],
    "two borders": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0],
    "beside ids that are banned": [-np.inf, 1.0, 1.0, -np.inf, 1.0, 0.5, 0.5],
}


@pytest.mark.parametrize("row", TIED)
@pytest.mark.parametrize("changes", [{"top_k": 2}, {"top_k": 4}, {"top_p": 0.3}, {"top_p": 0.77}])
def test_of_equally_likely_tokens_no_more_stay_than_asked(row, changes):
    values = np.asarray(TIED[row])
    logits = jnp.asarray(values[None], jnp.float32)
    got = np.asarray(sampling.filter_logits(logits, SamplingConfig(**changes)))[0]
    kept = _numpy_filter(values, changes.get("top_k", 0), changes.get("top_p", 1.0))
    assert set(np.flatnonzero(got > -np.inf)) == kept


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"top_p": 0.4}])
def test_filters_act_in_sampling(changes, params, inputs):
    settings = SamplingConfig(temperature=1.3, banned_ids=(0,), **changes)
    rows = jnp.tile(inputs, (8, 1))
    drawn = decode(CONFIG, params, rows, jax.random.key(4), max_length=4, sampling=settings)
    log_q = _log_softmax(params, rows, drawn.tokens, settings)
    for b, t in zip(*np.nonzero(np.asarray(drawn.weights)), strict=True):
        kept = _numpy_filter(log_q[b, t], changes.get("top_k", 0), changes.get("top_p", 1.0))
        token = int(drawn.tokens[b, t])
        assert token in kept
        expected = log_q[b, t, token] - special.logsumexp(log_q[b, t, list(kept)])
        np.testing.assert_allclose(drawn.log_probs[b, t], expected, atol=1e-4)


# The draw -----------------------------------------------------------------------------------------


def _assert_chi_square(tokens, probabilities):
    """Bins have at least 10 expected draws; all other ids share one bin."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    expected = probabilities * len(tokens)
    large = expected >= 10
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 10:
        observed, expected = (np.append(x[:-2], x[-2:].sum()) for x in (observed, expected))
    expected *= observed.sum() / expected.sum()  # scipy wants equal sums to 1e-8
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@jax.jit
def _draw_many(scores, uniforms):
    return jax.lax.map(lambda u: sampling.draw(scores[None], u[None])[0], uniforms, batch_size=500)


@pytest.mark.parametrize("vocab_size", [1, 37, 128, 1000, 32128])
def test_draw_inverts_the_cumulative_softmax(vocab_size):
    rng = np.random.default_rng(vocab_size)
    scores = rng.normal(0, 2, vocab_size).astype(np.float32)
    scores[3::7] = -np.inf
    uniforms = rng.random(20_000).astype(np.float32)
    tokens = np.asarray(_draw_many(jnp.asarray(scores), jnp.asarray(uniforms)))
    probabilities = special.softmax(scores.astype(np.float64))
    cumulative = np.cumsum(probabilities)
    # Each uniform lies in its token's interval, up to float32 sums of probabilities.
    assert (uniforms >= cumulative[tokens] - probabilities[tokens] - 2e-6).all()
    assert (uniforms <= cumulative[tokens] + 2e-6).all()
    if vocab_size >= 1000:
        _assert_chi_square(tokens, probabilities)


@pytest.mark.parametrize("hole", [-np.inf, -500.0])
def test_what_has_probability_zero_is_never_drawn(hole):
    """Zeros at both ends, in whole blocks and around a single token, with extreme uniforms."""
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, (5, 600)).astype(np.float32)
    rows[0, :300] = hole
    rows[1, 300:] = hole
    rows[2, rng.random(600) < 0.9] = hole
    rows[3, :] = hole
    rows[3, 271] = 0.0
    rows[4, 128:512] = hole
    below_one = 1 - 2.0**-24
    for u in (0.0, 1e-30, 2.0**-24, 0.5, below_one, 1.0):
        tokens = sampling.draw(jnp.asarray(rows), jnp.full((5,), u, jnp.float32))
        assert (rows[np.arange(5), tokens] > hole).all()
        assert tokens[3] == 271
    first = sampling.draw(jnp.asarray(rows), jnp.zeros(5))
    last = sampling.draw(jnp.asarray(rows), jnp.full((5,), below_one, jnp.float32))
    np.testing.assert_array_equal(first, (rows > hole).argmax(axis=1))
    assert (np.asarray(last) >= np.asarray(first)).all()


# Keys ---------------------------------------------------------------------------------------------


def test_uniforms_depend_on_key_row_and_position_alone():
    key = jax.random.key(7)
    wide = np.asarray(sampling.row_uniforms(key, 8, 12))
    np.testing.assert_array_equal(sampling.row_uniforms(key, 3, 5), wide[:5, :3])
    assert len(np.unique(wide)) == wide.size
    assert (wide >= 0).all()
    assert (wide < 1).all()
    assert not np.isin(sampling.row_uniforms(jax.random.key(8), 8, 12), wide).any()


def test_a_row_does_not_depend_on_the_others(params, inputs):
    key = jax.random.key(6)
    expected = decode(CONFIG, params, inputs, key, max_length=T)
    fewer = decode(CONFIG, params, inputs[:3], key, max_length=T)
    others = decode(CONFIG, params, inputs.at[3:].set(inputs[:1]), key, max_length=T)
    np.testing.assert_array_equal(fewer.tokens, expected.tokens[:3])
    np.testing.assert_array_equal(others.tokens[:3], expected.tokens[:3])
    assert (np.asarray(others.tokens[3:]) != np.asarray(expected.tokens[3:])).any()


def test_with_64_bits_enabled_the_samples_are_the_same(params, inputs):
    expected = decode(CONFIG, params, inputs, jax.random.key(4), max_length=T).tokens
    with jax.enable_x64(True):
        found = decode(CONFIG, params, inputs, jax.random.key(4), max_length=T).tokens
        np.testing.assert_array_equal(found, expected)


def test_rows_and_keys_differ(params, inputs):
    same = jnp.tile(inputs[:1], (B, 1))
    first = decode(CONFIG, params, same, jax.random.key(0), max_length=T)
    assert len({tuple(row) for row in np.asarray(first.tokens)}) > B // 2
    again = decode(CONFIG, params, same, jax.random.key(0), max_length=T)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = decode(CONFIG, params, same, jax.random.key(1), max_length=T)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_tokens_are_the_same_on_any_mesh(sizes, params, inputs):
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    key = jax.random.key(9)
    expected = decode(CONFIG, params, inputs, key, max_length=T)

    def run(params, inputs, key):
        with sharding.use(mesh):
            return sampling.sample(CONFIG, params, inputs, key, max_length=T)

    placed = (
        sharding.tree_shardings(params, lm.logical_axes(params), mesh),
        sharding.batch_sharding(mesh),
        sharding.replicated(mesh),
    )
    got = jax.jit(run, in_shardings=placed)(
        jax.device_put(params, placed[0]), jax.device_put(inputs, placed[1]), key
    )
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.weights, expected.weights)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-4)


# Errors -------------------------------------------------------------------------------------------


def test_no_weight_is_gathered_inside_the_decode_loop(params, inputs):
    """Weights that fsdp shards are gathered once, before the first token."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))

    def run(params, inputs, key):
        with sharding.use(mesh):
            return sampling.sample(CONFIG, params, inputs, key, max_length=16)

    where = (
        sharding.tree_shardings(params, lm.logical_axes(params), mesh),
        sharding.batch_sharding(mesh),
        None,
    )
    compiled = jax.jit(run, in_shardings=where).lower(params, inputs, jax.random.key(0)).compile()
    loops = hlo.costs(hlo_text.parse(compiled.as_text()))
    decoding = [cost for loop, cost in loops.items() if loop.startswith("16")]
    assert decoding  # the loop was found
    smallest_weight = 4 * CONFIG.d_model * CONFIG.num_heads * CONFIG.head_dim
    for cost in decoding:
        for (kind, _), found in cost.collectives.items():
            assert found.nbytes / found.count < smallest_weight, kind
    gathered = sum(
        found.nbytes
        for loop, cost in loops.items()
        for (kind, _), found in cost.collectives.items()
        if kind == "all-gather" and not loop.startswith("16")
    )
    assert gathered >= smallest_weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be at least 0 \(greedy\), got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"top_k": -1}, "top_k must be an integer of at least 0 .* got -1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"banned_ids": (0, 1), "eos_ids": (1,)}, "banned_ids contains all of eos_ids=.1,."),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SamplingConfig(), **changes)


def test_sampling_needs_a_key(params, inputs):
    with pytest.raises(ValueError, match=r"temperature=1\.0 needs a key"):
        sampling.sample(CONFIG, params, inputs, max_length=T)


@pytest.mark.parametrize("banned", [-1, 32])
def test_banned_ids_outside_the_vocabulary(banned, params, inputs):
    settings = SamplingConfig(banned_ids=(0, banned))
    with pytest.raises(ValueError, match=rf"\[0, 32\).*got \[{banned}\]"):
        sampling.sample(CONFIG, params, inputs, jax.random.key(0), max_length=T, sampling=settings)
