"""Properties of masks, batching and keys that hold for any input, checked by hypothesis."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import gkd, losses, sampling


REDUCTIONS = {"sequence_mean": losses.sequence_mean, "token_mean": losses.token_mean}
quick = settings(max_examples=40, deadline=None)
few = settings(max_examples=12, deadline=None)  # each shape is compiled


@st.composite
def masked(draw):
    """Values, weights that are 1 on a prefix of each row, and values with rubbish at weight 0."""
    rows, length = draw(st.sampled_from([(1, 1), (4, 5), (3, 8)]))
    floats = st.floats(-50, 50, width=32)
    values = draw(hnp.arrays(np.float32, (rows, length), elements=floats))
    lengths = draw(hnp.arrays(np.int64, rows, elements=st.integers(0, length)))
    weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
    rubbish = draw(st.sampled_from([0.0, -7.5, np.nan, np.inf, -np.inf]))
    dirty = np.where(weights > 0, values, np.float32(rubbish))
    return tuple(map(jnp.asarray, (values, weights, dirty)))


def by_hand(name, values, weights):
    rows = [
        [float(x) for x, w in zip(v, w, strict=True) if w]
        for v, w in zip(values, weights, strict=True)
    ]
    if name == "token_mean":
        return sum(map(sum, rows)), sum(map(len, rows))
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means), len(means)


@few
@given(case=masked(), name=st.sampled_from(sorted(REDUCTIONS)))
def test_a_mask_drops_what_it_covers(case, name):
    values, weights, dirty = case
    expected = by_hand(name, values, weights)
    np.testing.assert_allclose(REDUCTIONS[name](dirty, weights), expected, rtol=1e-4, atol=1e-3)
    gradient = jax.grad(lambda x: REDUCTIONS[name](x, weights)[0])(dirty)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.where(weights == 0, gradient, 0) == 0)


@few
@given(case=masked(), name=st.sampled_from(sorted(REDUCTIONS)), data=st.data())
def test_parts_of_a_batch_add_up_to_it(case, name, data):
    values, weights, _ = case
    cut = data.draw(st.integers(0, len(values)))
    order = np.asarray(data.draw(st.permutations(range(len(values)))))
    reduce = REDUCTIONS[name]
    whole = reduce(values, weights)
    rows = [order[:cut], order[cut:]]
    parts = [reduce(values[part], weights[part]) for part in rows if len(part)]
    total = [sum(part[i] for part in parts) for i in (0, 1)]
    np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-3)


@few
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_number_is_one_of_its_row_and_position_alone(seed, rows, lengths):
    """A random number does not depend on the other rows or on the length of the batch."""
    key = jax.random.key(seed)
    first, second = (
        np.asarray(sampling.row_uniforms(key, n, t)) for n, t in zip(rows, lengths, strict=True)
    )
    t, n = min(lengths), min(rows)
    np.testing.assert_array_equal(first[:t, :n], second[:t, :n])
    assert np.unique(first).size == first.size  # no two alike
    assert first.min() >= 0
    assert first.max() < 1


@quick
@given(
    places=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 10**6)), unique=True, max_size=20
    )
)
def test_each_seed_and_step_has_keys_of_its_own(places):
    keys = [key for place in places for key in gkd.step_keys(*place)]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
    assert len(data) == len(keys)


@quick
@given(
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10**9),
    fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_larger_lambda_samples_wherever_a_smaller_one_does(seed, step, fractions):
    def coin(fraction):
        return gkd.is_on_policy(seed, step, gkd.GKDConfig(on_policy_fraction=fraction))

    low, high = sorted(fractions)
    assert coin(high) or not coin(low)
    assert coin(1.0)
    assert not coin(0.0)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_coin_falls_as_often_as_lambda_says(fraction):
    config = gkd.GKDConfig(on_policy_fraction=fraction)
    tosses = np.mean([gkd.is_on_policy(3, step, config) for step in range(4000)])
    assert abs(tosses - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / 4000)
