"""Adafactor and AdamW equal optax layer by layer, and the schedule equals its definition."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params

from gkd_jax.models import t5
from gkd_jax.training import optimizers


LEARNING_RATE = 0.02
STEPS = 5
KEY = jax.random.key(0)


def _constant(_count):
    return LEARNING_RATE


def _optax_adafactor(min_dim_size_to_factor, **changes):
    """T5X's Adafactor built from optax."""
    settings = {
        "learning_rate": LEARNING_RATE,
        "min_dim_size_to_factor": min_dim_size_to_factor,
        "decay_rate": 0.8,
        "multiply_by_parameter_scale": True,
        "clipping_threshold": 1.0,
        "momentum": None,
        "eps": 1e-30,
    }
    return optax.adafactor(**(settings | changes))


def _normal(shape, seed, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def _run(optimizer, params, steps=STEPS):
    """Updates with growing gradients, so that clipping acts; returns the last parameters."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for index in range(steps):
        leaves, structure = jax.tree.flatten(params)
        grads = [
            _normal(x.shape, 100 * index + x.size, 10.0 ** (index % 3)) * (1 + index)
            for x in leaves
        ]
        params, state = step(params, state, jax.tree.unflatten(structure, grads))
    return params


def _layer(params, index):
    return jax.tree.map(lambda x: x[index], params)


def _run_layers(optimizer, stacked, num_layers):
    """The updates of `_run(stacked)` with each layer as a tree of its own; stacked again."""
    results = []
    for layer in range(num_layers):

        def only(index, _layer=layer):
            return lambda x: _normal(x.shape, 100 * index + x.size, 10.0 ** (index % 3))[_layer]

        params = _layer(stacked, layer)
        state = optimizer.init(params)
        for index in range(STEPS):
            grads = jax.tree.map(lambda x, f=only(index), i=index: f(x) * (1 + i), stacked)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


def _assert_trees_close(got, expected, rtol=2e-5):
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            x, y, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path, simple=True)
        )


def test_unstacked_parameters_equal_optax():
    params = {
        "token_embedder": {"embedding": _normal((300, 160), 0)},  # factored
        "decoder": {
            "logits_dense": {"kernel": _normal((160, 200), 1, 1e-5)},  # under the least scale
            "decoder_norm": {"scale": jnp.ones(160)},
            "relpos_bias": {"rel_embedding": _normal((4, 32), 2)},  # too small to factor
        },
        "small": {"kernel": _normal((160, 100), 3)},
        "just_factored": {"kernel": _normal((128, 128), 4)},
    }
    got = _run(optimizers.Adafactor()(_constant), params)
    _assert_trees_close(got, _run(_optax_adafactor(128), params))


@pytest.mark.parametrize(
    "changes", [{"decay_rate": 0.6}, {"clipping_threshold": 0.3}, {"min_dim_size_to_factor": 50}]
)
def test_settings_equal_optax(changes):
    params = {"a": _normal((60, 80), 0), "b": _normal((7,), 1)}
    got = _run(optimizers.Adafactor(**changes)(_constant), params)
    settings = {"min_dim_size_to_factor": 128} | changes
    _assert_trees_close(got, _run(_optax_adafactor(**settings), params))
    default = _run(optimizers.Adafactor()(_constant), params)
    assert not np.allclose(got["a"], default["a"], rtol=1e-4)


def _stacked(num_layers, sizes):
    """Layers of very different scales, so that scaling or clipping across layers would show."""
    scales = (10.0 ** -np.arange(num_layers, dtype=np.float32))[:, None]
    return {
        "kernel": _normal((num_layers, *sizes), 5) * scales[:, :, None],
        "scale": _normal((num_layers, sizes[0]), 6) * scales,
        "rel_embedding": _normal((num_layers, 4, 32), 7) * scales[:, :, None],
    }


def test_each_stacked_layer_is_a_parameter_of_its_own():
    stacked = _stacked(3, (20, 24))
    got = _run(optimizers.Adafactor()(_constant), {"layers": stacked})["layers"]
    for name, least in (("kernel", 0), ("scale", 128), ("rel_embedding", 128)):
        part = {name: stacked[name]}
        _assert_trees_close({name: got[name]}, _run_layers(_optax_adafactor(least), part, 3))


@pytest.mark.parametrize("size", [100, 140])
def test_stacked_min_dim_size_to_factor(size):
    """With T5X's default of 128, kernels of 100 stay unfactored and kernels of 140 do not."""
    stacked = {"kernel": _stacked(2, (size, 150))["kernel"]}
    optimizer = optimizers.Adafactor(stacked_min_dim_size_to_factor=128)(_constant)
    got = _run(optimizer, {"layers": stacked})["layers"]
    _assert_trees_close(got, _run_layers(_optax_adafactor(128), stacked, 2))
    state = optimizer.init({"layers": stacked})
    assert state.v["layers"]["kernel"].shape == ((2, size, 150) if size < 128 else (2, 1))


def test_adafactor_follows_its_schedule():
    """The update at step n is that of a constant rate, times schedule(n)."""
    params = {"w": _normal((6, 5), 0)}
    grads = {"w": _normal((6, 5), 1)}
    plain = optimizers.Adafactor()(_constant)
    moving = optimizers.Adafactor()(lambda count: LEARNING_RATE * (1 + count))
    plain_state, moving_state = plain.init(params), moving.init(params)
    for count in range(3):
        expected, plain_state = plain.update(grads, plain_state, params)
        got, moving_state = moving.update(grads, moving_state, params)
        np.testing.assert_allclose(got["w"], (1 + count) * expected["w"], rtol=1e-6)


def test_adafactor_of_a_zero_gradient_is_finite():
    params = {"layers": {"kernel": jnp.zeros((2, 3, 4))}, "w": jnp.zeros((3,))}
    optimizer = optimizers.Adafactor()(_constant)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_adafactor_state_shares_no_buffer():
    """Donation refuses a buffer that occurs twice."""
    params = {"layers": {"scale": jnp.ones((2, 1))}, "w": jnp.ones((1,))}
    state = optimizers.Adafactor()(_constant).init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(pointers) == len(set(pointers))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_its_definition(weight_decay):
    """Loshchilov & Hutter (2019), Algorithm 2, written out for one parameter."""
    b1, b2, eps = 0.8, 0.95, 1e-6
    settings = optimizers.AdamW(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    optimizer = settings(_constant)
    param = np.array([1.0, -2.0, 0.5])
    params = jnp.asarray(param, jnp.float32)
    state, m, v = optimizer.init(params), 0.0, 0.0
    for count in range(1, 5):
        grad = np.random.default_rng(count).normal(size=3)
        updates, state = optimizer.update(jnp.asarray(grad, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        step = (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)
        param = param - LEARNING_RATE * (step + weight_decay * param)
        np.testing.assert_allclose(params, param, rtol=1e-5)


def test_adamw_has_the_usual_defaults():
    """Small gradients at first, so that epsilon and the two rates all show."""
    params = {"kernel": _normal((4, 5), 0), "scale": _normal((4,), 1)}
    optimizer, theirs = optimizers.AdamW()(_constant), optax.adam(LEARNING_RATE)
    state, their_state = optimizer.init(params), theirs.init(params)
    for scale in (1e-8, 1e-6, 1.0, 0.1):
        grads = jax.tree.map(lambda x, s=scale: _normal(x.shape, x.size, s), params)
        got, state = optimizer.update(grads, state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        _assert_trees_close(got, expected)


@pytest.mark.parametrize("per_layer_relpos", [False, True])
def test_adamw_decays_neither_norms_nor_biases(per_layer_relpos):
    """Names decide, because a stacked norm [L, D] has the shape of a matrix."""
    config = t5.t5_1_1("32x2", vocab_size=16)
    params = random_params(dataclasses.replace(config, per_layer_relpos=per_layer_relpos))
    params["decoder"]["layers"]["self_attention"]["query"]["bias"] = jnp.ones((2, 32))
    optimizer = optimizers.AdamW(weight_decay=0.1)(_constant)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {True: set(), False: set()}
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        moved[bool(jnp.any(update))].add(path[-1].key)
    assert moved == {True: {"kernel", "embedding"}, False: {"scale", "bias", "rel_embedding"}}
    kernel = params["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    decayed = updates["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    np.testing.assert_allclose(decayed, -LEARNING_RATE * 0.1 * kernel, rtol=1e-6)


@pytest.mark.parametrize(
    "make", [partial(optimizers.Adafactor, clipping_threshold=10.0), optimizers.AdamW]
)
def test_max_grad_norm_clips_the_global_norm_first(make):
    params = {"a": _normal((4, 5), 0), "layers": {"b": _normal((2, 3, 3), 1)}}
    grads = jax.tree.map(lambda x: _normal(x.shape, x.size, 5.0), params)
    first = jax.tree.map(lambda x: 0.05 * _normal(x.shape, x.size + 1, 5.0), params)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
    assert norm > 2
    plain, clipped = make()(_constant), make(max_grad_norm=2.0)(_constant)
    states = plain.init(params), clipped.init(params)
    # A gradient that is not clipped first, so that the second one's size matters to the moments.
    _, plain_state = plain.update(first, states[0], params)
    _, clipped_state = clipped.update(first, states[1], params)
    scaled = jax.tree.map(lambda x: x * (2.0 / norm), grads)
    expected, _ = plain.update(scaled, plain_state, params)
    got, _ = clipped.update(grads, clipped_state, params)
    _assert_trees_close(got, expected)
    unclipped, _ = plain.update(grads, plain_state, params)
    assert not np.allclose(unclipped["a"], got["a"], rtol=1e-3)


@pytest.mark.parametrize("make", [optimizers.Adafactor, optimizers.AdamW])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_max_grad_norm_is_checked(make, value):
    with pytest.raises(ValueError, match=f"max_grad_norm must be .* or None, got {value}"):
        make(max_grad_norm=value)


def test_schedule_values():
    """The paper's XSum schedule at a hundredth: 20 of 400 steps up, the last 100 down."""
    schedule = optimizers.Linear(learning_rate=3e-4, warmup_steps=20, cooldown_steps=100).over(400)
    counts = [0, 1, 10, 20, 21, 299, 300, 301, 350, 399, 400, 500]
    shares = [0, 0.05, 0.5, 1, 1, 1, 1, 0.99, 0.5, 0.01, 0, 0]
    got = [schedule(count) for count in counts]
    np.testing.assert_allclose(got, 3e-4 * np.array(shares), rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.asarray(350)), 1.5e-4, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_full_rate():
    schedule = optimizers.Linear(learning_rate=0.5).over(10)
    np.testing.assert_array_equal([schedule(count) for count in (0, 5, 10)], [0.5, 0.5, 0.5])


def test_schedule_of_overlapping_parts_fits_exactly():
    schedule = optimizers.Linear(learning_rate=1.0, warmup_steps=4, cooldown_steps=6).over(10)
    np.testing.assert_allclose([schedule(count) for count in (2, 4, 7)], [0.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0, got -1"),
        ({"cooldown_steps": -2}, "cooldown_steps must be an integer of at least 0, got -2"),
        ({"warmup_steps": 6, "cooldown_steps": 5}, r"fit the run's 10 steps, got 6 \+ 5"),
    ],
)
def test_refused_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizers.Linear(**{"learning_rate": 1.0, **changes}).over(10)
