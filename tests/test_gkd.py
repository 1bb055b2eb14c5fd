"""Algorithm 1 equals plain NumPy: the coin, the samples, the loss and the update."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params, update, update_with
from scipy import special

from gkd_jax import accumulation, divergences, gkd, losses, sampling, sharding
from gkd_jax.batch import Batch
from gkd_jax.gkd import GKDConfig, ModelPair
from gkd_jax.models import lm, t5
from gkd_jax.training import optimizers, train_state


STUDENT = t5.T5Config(
    vocab_size=32,
    d_model=16,
    num_heads=4,
    head_dim=4,
    d_ff=16,
    num_encoder_layers=1,
    num_decoder_layers=2,
    relpos_buckets=8,
    relpos_max_distance=20,
)
TEACHER = dataclasses.replace(STUDENT, d_ff=24, num_encoder_layers=2, vocab_size=40)
PIECES = 28
MODELS = ModelPair(student=STUDENT, teacher=TEACHER, num_pieces=PIECES)
B, S, T = 8, 6, 7
LENGTHS = (7, 1, 3, 0, 5, 7, 2, 4)  # one row of padding
KEY = jax.random.key(0)
SGD = optax.sgd(0.5)
ADAFACTOR = optimizers.Adafactor()(lambda _: 0.01)
CONFIGS = {
    "gkd": GKDConfig(teacher_temperature=0.1),
    "gkd_token_mean": GKDConfig(teacher_temperature=0.1, reduction=losses.token_mean),
    "reverse_kl": GKDConfig(divergence=divergences.reverse_kl, student_temperature=2.0),
    "jsd": GKDConfig(divergence=partial(divergences.jsd, beta=0.1)),
    "sft": GKDConfig(on_policy_fraction=0.0, divergence=None, label_smoothing=0.1),
    "sft_token_mean": GKDConfig(
        on_policy_fraction=0.0, divergence=None, reduction=losses.token_mean
    ),
}


score = jax.jit(gkd.per_token_loss, static_argnums=(0, 1))
logits = jax.jit(t5.logits, static_argnums=0)


@pytest.fixture(scope="module")
def student():
    return random_params(STUDENT, 0, norm_spread=0.0)


@pytest.fixture(scope="module")
def teacher():
    return random_params(TEACHER, 1, norm_spread=0.0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    inputs = rng.integers(2, PIECES, (B, S)).astype(np.int32)
    inputs[np.arange(S)[None] >= rng.integers(2, S + 1, B)[:, None]] = 0
    targets = rng.integers(2, PIECES, (B, T)).astype(np.int32)
    weights = (np.arange(T)[None] < np.array(LENGTHS)[:, None]).astype(np.float32)
    return Batch(*map(jnp.asarray, (inputs, targets * weights.astype(np.int32), weights)))


@pytest.fixture(scope="module")
def step(student, teacher, batch):
    """(state, metrics) after one plain SGD update of each configuration, computed once."""
    done = {}

    def run(name, num_microbatches=1):
        key = name, num_microbatches
        if key not in done:
            state = train_state.create(student, SGD)
            config = CONFIGS[name]
            teacher_params = None if config.divergence is None else teacher
            done[key] = update(
                config, MODELS, SGD, num_microbatches, state, teacher_params, batch, KEY
            )
        return done[key]

    return run


def _assert_trees_close(got, expected, atol):
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            x, y, rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path, simple=True)
        )


# The coin -----------------------------------------------------------------------------------------


def test_the_coin_comes_up_lambda_of_the_time():
    for fraction in (0.1, 0.25, 0.5):
        config = GKDConfig(on_policy_fraction=fraction)
        heads = np.mean([gkd.is_on_policy(3, step, config) for step in range(10_000)])
        # Five standard deviations.
        assert abs(heads - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 10_000)


def test_lambda_zero_never_and_one_always():
    never, always = (GKDConfig(on_policy_fraction=fraction) for fraction in (0.0, 1.0))
    assert not any(gkd.is_on_policy(0, step, never) for step in range(10_000))
    assert all(gkd.is_on_policy(0, step, always) for step in range(10_000))


def test_the_coin_depends_on_seed_and_step_alone():
    def coins(seed, steps, fraction=0.5):
        config = GKDConfig(on_policy_fraction=fraction)
        return [gkd.is_on_policy(seed, step, config) for step in steps]

    first = coins(1, range(200))
    assert coins(1, reversed(range(200))) == first[::-1]  # no state, in any order
    agreement = np.mean(np.equal(first, coins(2, range(200))))
    assert 0.3 < agreement < 0.7
    assert 0.3 < np.mean(np.equal(first[1:], first[:-1])) < 0.7
    # A larger lambda only adds on-policy steps: one u decides.
    wider = coins(1, range(200), 0.7)
    assert all(more or not fewer for fewer, more in zip(first, wider, strict=True))


def test_step_keys_are_a_function_of_seed_and_step():
    def data(seed, step):
        return [tuple(np.asarray(jax.random.key_data(key))) for key in gkd.step_keys(seed, step)]

    assert data(1, 5) == data(1, 5)
    keys = [key for seed in (0, 1) for step in range(20) for key in data(seed, step)]
    assert len(set(keys)) == len(keys)


# The loss -----------------------------------------------------------------------------------------


def _numpy_loss(name, student, teacher, batch):
    """Eq. 2 and the token mean, from teacher-forced logits in float64, token by token."""
    config = CONFIGS[name]
    q_logits = np.asarray(logits(STUDENT, student, batch), np.float64)[..., :PIECES]
    p_logits = np.asarray(logits(TEACHER, teacher, batch), np.float64)[..., :PIECES]
    log_q = special.log_softmax(q_logits / config.student_temperature, axis=-1)
    assert not callable(config.teacher_temperature)
    log_p = special.log_softmax(p_logits / config.teacher_temperature, axis=-1)
    p, q = np.exp(log_p), np.exp(log_q)
    sequences, tokens = [], []
    for b, length in enumerate(LENGTHS):
        values = []
        for t in range(length):
            if name.startswith("sft"):
                smooth = np.full(PIECES, config.label_smoothing / PIECES)
                smooth[batch.targets[b, t]] += 1 - config.label_smoothing
                values.append(-smooth @ log_q[b, t])
            elif name == "reverse_kl":
                values.append(q[b, t] @ (log_q[b, t] - log_p[b, t]))
            elif name == "jsd":
                m = 0.1 * p[b, t] + 0.9 * q[b, t]
                values.append(
                    0.1 * special.rel_entr(p[b, t], m).sum()
                    + 0.9 * special.rel_entr(q[b, t], m).sum()
                )
            else:
                values.append(p[b, t] @ (log_p[b, t] - log_q[b, t]))
        tokens += values
        sequences += [np.mean(values)] if values else []
    return np.mean(sequences), np.mean(tokens)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_loss_equals_numpy(name, student, teacher, batch, step):
    state, metrics = step(name)
    sequence_mean, token_mean = _numpy_loss(name, student, teacher, batch)
    assert abs(sequence_mean - token_mean) > 1e-3  # uneven lengths tell the two apart
    np.testing.assert_allclose(metrics["loss_sequence_mean"], sequence_mean, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_token_mean"], token_mean, rtol=1e-4)
    expected = token_mean if name.endswith("token_mean") else sequence_mean
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["target_length"], sum(LENGTHS) / 7, rtol=1e-6)
    assert metrics["target_tokens"] == sum(LENGTHS)
    assert metrics["prompt_tokens"] == np.count_nonzero(batch.inputs)
    assert state.step == 1


@pytest.mark.parametrize("name", ["gkd", "gkd_token_mean", "sft"])
def test_the_update_descends_the_gradient_of_the_reported_loss(name, student, teacher, batch, step):
    """With SGD's step -0.5 g, the loss falls by 0.5 |g|^2 to first order."""
    state, metrics = step(name)
    grads = jax.tree.map(lambda new, old: (old - new) / 0.5, state.params, student)
    norm = float(metrics["grad_norm"])
    squares = [np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(grads)]
    np.testing.assert_allclose(np.sqrt(sum(squares)), norm, rtol=1e-3)
    small = 1e-2 / norm

    def moved(sign):
        params = jax.tree.map(lambda x, g: x + sign * small * g, student, grads)
        values = _numpy_loss(name, params, teacher, batch)
        return values[1] if name.endswith("token_mean") else values[0]

    slope = (moved(1) - moved(-1)) / (2 * small)
    np.testing.assert_allclose(slope, norm**2, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "num_microbatches"), [("gkd", 2), ("gkd", 4), ("gkd_token_mean", 4), ("sft", 2)]
)
def test_microbatches_change_nothing(name, num_microbatches, step):
    state, metrics = step(name)
    split_state, split_metrics = step(name, num_microbatches)
    _assert_trees_close(split_metrics, metrics, atol=1e-6)
    _assert_trees_close(split_state.params, state.params, atol=1e-6)


def test_a_microbatch_of_padding_alone_and_a_batch_of_it(student, teacher, batch):
    """Rows 1 and 5 are microbatch 1 of 4; they have no targets and must add nothing."""
    config, state = CONFIGS["gkd"], train_state.create(student, SGD)
    weights = batch.weights.at[jnp.asarray([1, 5])].set(0.0)
    some = batch._replace(weights=weights)
    keep = np.delete(np.arange(B), [1, 5])
    got, metrics = update(config, MODELS, SGD, 4, state, teacher, some, KEY)
    fewer = jax.tree.map(lambda x: x[keep], some)
    expected, fewer_metrics = update(config, MODELS, SGD, 1, state, teacher, fewer, KEY)
    np.testing.assert_allclose(metrics["loss"], fewer_metrics["loss"], rtol=1e-5)
    _assert_trees_close(got.params, expected.params, atol=1e-6)

    none = batch._replace(weights=jnp.zeros_like(batch.weights))
    got, metrics = update(config, MODELS, SGD, 4, state, teacher, none, KEY)
    assert metrics["loss"] == 0
    _assert_trees_close(got.params, student, atol=0)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(student, batch):
    models = ModelPair(student=STUDENT, teacher=STUDENT, num_pieces=PIECES)

    def loss(params, divergence):
        config = GKDConfig(divergence=divergence)
        values = gkd.per_token_loss(config, models, params, student, batch, None)
        return losses.token_mean(values, batch.weights)[0]

    @jax.jit
    def all_of_them(params):
        functions = (divergences.forward_kl, divergences.reverse_kl, divergences.jsd)
        return [jax.value_and_grad(loss)(params, function) for function in functions]

    for value, gradient in all_of_them(student):
        np.testing.assert_allclose(value, 0.0, atol=1e-5)
        _assert_trees_close(gradient, jax.tree.map(jnp.zeros_like, gradient), atol=1e-4)


def test_no_gradient_flows_into_the_teacher(student, teacher, batch):
    @jax.jit
    def gradients(student, teacher):
        def total(student, teacher):
            config = CONFIGS["jsd"]
            return gkd.per_token_loss(config, MODELS, student, teacher, batch, None).sum()

        return jax.grad(total, argnums=(0, 1))(student, teacher)

    into_student, into_teacher = gradients(student, teacher)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(into_student)) > 1e-3
    for leaf in jax.tree.leaves(into_teacher):
        assert not np.asarray(leaf).any()


def test_ids_without_a_piece_have_no_influence(student, teacher, batch):
    """Columns of the heads beyond the vocabulary change neither loss nor update."""

    def total(params, teacher_params):
        values = gkd.per_token_loss(CONFIGS["gkd"], MODELS, params, teacher_params, batch, None)
        return losses.sequence_mean(values, batch.weights)[0]

    def with_tail(params, value):
        decoder = params["decoder"]
        kernel = decoder["logits_dense"]["kernel"].at[:, PIECES:].set(value)
        return params | {"decoder": decoder | {"logits_dense": {"kernel": kernel}}}

    value_and_grad = jax.jit(jax.value_and_grad(total))
    expected, gradient = value_and_grad(student, teacher)
    got, moved = value_and_grad(with_tail(student, 3.0), with_tail(teacher, -5.0))
    np.testing.assert_array_equal(got, expected)
    _assert_trees_close(moved, gradient, atol=1e-7)
    tail = gradient["decoder"]["logits_dense"]["kernel"][:, PIECES:]
    np.testing.assert_array_equal(tail, np.zeros_like(tail))


def test_dropout_acts_where_the_student_has_a_rate_and_on_the_student_alone(
    student, teacher, batch
):
    models = dataclasses.replace(
        MODELS,
        student=dataclasses.replace(STUDENT, dropout_rate=0.2),
        teacher=dataclasses.replace(TEACHER, dropout_rate=0.2),
    )
    config = CONFIGS["gkd"]
    plain = score(config, MODELS, student, teacher, batch, None)
    np.testing.assert_array_equal(score(config, models, student, teacher, batch, None), plain)
    dropped = score(config, models, student, teacher, batch, KEY)
    assert np.abs(dropped - plain).max() > 1e-2
    # Only the teacher has a rate: no dropout at all, though a key is given.
    models = dataclasses.replace(models, student=STUDENT)
    np.testing.assert_allclose(
        score(config, models, student, teacher, batch, KEY), plain, rtol=1e-5, atol=1e-5
    )


# The loss in parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_in_parts_of_the_length_is_the_whole_loss(name, student, teacher, batch, step):
    config = dataclasses.replace(CONFIGS[name], loss_parts=T)
    state = train_state.create(student, SGD)
    teacher_params = None if config.divergence is None else teacher
    got, metrics = update(config, MODELS, SGD, 1, state, teacher_params, batch, KEY)
    expected, expected_metrics = step(name)
    _assert_trees_close(metrics, expected_metrics, atol=1e-6)
    _assert_trees_close(got.params, expected.params, atol=1e-6)


def test_memory_of_the_loss_does_not_grow_with_the_length_times_the_vocabulary():
    sizes = {"vocab_size": 8192, "d_model": 8, "d_ff": 8, "num_heads": 1, "head_dim": 8}
    config = dataclasses.replace(STUDENT, **sizes, num_decoder_layers=1)
    models = ModelPair(student=config, teacher=config, num_pieces=8192)
    params = lm.abstract_params(config)

    def bytes_of(length, parts):
        targets = jax.ShapeDtypeStruct((4, length), jnp.int32)
        weights = jax.ShapeDtypeStruct((4, length), jnp.float32)
        batch = Batch(jax.ShapeDtypeStruct((4, 8), jnp.int32), targets, weights)
        method = GKDConfig(loss_parts=parts)

        def loss(params, teacher, batch):
            values = gkd.per_token_loss(method, models, params, teacher, batch)
            return losses.sequence_mean(values, batch.weights)[0]

        lowered = jax.jit(jax.grad(loss)).lower(params, params, batch)
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logits = 4 * 4 * 64 * 8192  # bytes of one model's for the longer targets
    assert bytes_of(64, 1) - bytes_of(16, 1) > logits  # whole: several arrays of this kind
    assert bytes_of(64, 16) - bytes_of(16, 4) < logits / 8


def test_parts_are_chosen_by_the_size_of_the_logits():
    def parts(rows, length, chosen=None):
        return accumulation.num_length_parts(rows, length, 32128, chosen)

    assert parts(16, 32) == 1  # 63 MiB
    assert parts(32, 64) == 1  # 251 MiB
    assert parts(32, 256) == 4  # 1004 MiB
    assert parts(4096, 7) == 7  # never less than a token a row at once
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    with sharding.use(mesh):
        assert parts(256, 256) == 4  # of 32 rows a device
        assert parts(257, 256) == 8  # of 33 rows on one device
    with pytest.raises(ValueError, match="loss_parts=3 does not divide the target length 32"):
        parts(16, 32, 3)


# On-policy batches --------------------------------------------------------------------------------


def test_an_on_policy_batch_is_the_student_s_own_text(student, batch):
    config = GKDConfig(sampling=sampling.SamplingConfig(banned_ids=(7,)))
    banned = (0, 7, *range(PIECES, STUDENT.vocab_size))  # the pad, the user's, and no pieces
    run = jax.jit(partial(gkd.sample_targets, config, MODELS))
    got, drawn = run(student, batch, KEY)
    np.testing.assert_array_equal(got.inputs, batch.inputs)
    np.testing.assert_array_equal(got.targets, drawn.tokens)
    np.testing.assert_array_equal(got.weights, drawn.weights)
    tokens, weights = np.asarray(got.targets), np.asarray(got.weights)
    assert got.targets.shape == (B, T)
    assert not np.isin(tokens[weights > 0], banned).any()
    for row, row_weights in zip(tokens, weights, strict=True):
        length = int(np.argmax(row == 1)) + 1 if (row == 1).any() else T
        np.testing.assert_array_equal(row_weights, np.arange(T) < length)
        assert (row[:length] > 0).all()

    # They have the student's probabilities, not the teacher's.
    scores = np.array(logits(STUDENT, student, got), np.float64)
    scores[..., list(banned)] = -np.inf
    log_q = np.take_along_axis(special.log_softmax(scores, -1), tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(drawn.log_probs, np.where(weights > 0, log_q, 0.0), atol=1e-4)

    # The dataset's targets play no part, the key does.
    other = batch._replace(targets=jnp.zeros_like(batch.targets))
    np.testing.assert_array_equal(run(student, other, KEY)[0].targets, tokens)
    assert (np.asarray(run(student, batch, jax.random.key(1))[0].targets) != tokens).any()


def test_no_gradient_flows_through_the_samples(student, batch):
    def of_samples(params):
        rows, drawn = gkd.sample_targets(CONFIGS["gkd"], MODELS, params, batch, KEY)
        return (rows.weights * drawn.log_probs).sum()

    value, gradient = jax.jit(jax.value_and_grad(of_samples))(student)
    assert value < 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, np.zeros(g.shape)), gradient)


def test_several_samples_a_prompt_are_rows_of_a_longer_batch(student, teacher, batch):
    """Samples of a prompt are neighbours; the loss is that of a batch with each prompt twice."""
    config = GKDConfig(num_samples=2, divergence=divergences.reverse_kl)
    got, drawn = jax.jit(partial(gkd.sample_targets, config, MODELS))(student, batch, KEY)
    assert got.inputs.shape == (B, S)
    assert got.targets.shape == drawn.tokens.shape == (2 * B, T)
    repeated = batch.inputs[np.arange(2 * B) // 2]
    plain = Batch(repeated, batch.targets[np.arange(2 * B) // 2], batch.weights)
    alone = jax.jit(partial(gkd.sample_targets, CONFIGS["reverse_kl"], MODELS))(
        student, plain, KEY
    )[0]
    np.testing.assert_array_equal(alone.targets, got.targets)
    state = train_state.create(student, SGD)
    expected, _ = update(config, MODELS, SGD, 1, state, teacher, alone, KEY)
    for num_microbatches in (1, 4):
        new, _ = update(config, MODELS, SGD, num_microbatches, state, teacher, got, KEY)
        _assert_trees_close(new.params, expected.params, atol=1e-5)


@pytest.mark.parametrize(("fraction", "count"), [(0.25, 2), (0.3, 3), (0.999, 8), (1.0, 8)])
def test_mixing_by_example_rounds_its_share_up(fraction, count, student, batch):
    config = GKDConfig(on_policy_fraction=fraction, mixing="example")
    _, drawn = jax.eval_shape(partial(gkd.sample_targets, config, MODELS), student, batch, KEY)
    assert drawn.tokens.shape == (count, T)


def test_the_share_is_not_rounded_up_by_a_rounding_error():
    """0.07 x 100 is 7.000000000000001 in floating point."""
    assert gkd.num_on_policy_rows(0.07, 100) == 7
    assert gkd.num_on_policy_rows(0.0701, 100) == 8


def test_the_smallest_share_is_a_row():
    assert gkd.num_on_policy_rows(1e-9, 100) == 1
    assert gkd.num_on_policy_rows(0.0, 100) == 0


@pytest.mark.parametrize("mixing", ["step", "example"])
def test_samples_have_no_stored_scores_of_the_data_set_s_targets(mixing, student, batch):
    scored = batch._replace(teacher_scores=divergences.top_k(jnp.zeros((B, T, PIECES)), 3))
    run = partial(gkd.sample_targets, GKDConfig(mixing=mixing), MODELS)
    assert jax.eval_shape(run, student, scored, KEY)[0].teacher_scores is None


@pytest.mark.parametrize(("fraction", "count"), [(0.3, 3), (1.0, 8)])
def test_mixing_by_example_samples_exactly_its_share_of_every_batch(
    fraction, count, student, batch
):
    config = GKDConfig(on_policy_fraction=fraction, mixing="example")
    batch = batch._replace(input_lengths=jnp.sum(batch.inputs > 0, axis=1))
    assert all(gkd.is_on_policy(0, step, config) for step in range(20))
    got, drawn = jax.jit(partial(gkd.sample_targets, config, MODELS))(student, batch, KEY)
    assert drawn.tokens.shape == (count, T)
    rows = np.arange(count) * B // count
    kept = np.setdiff1d(np.arange(B), rows)
    np.testing.assert_array_equal(got.targets[rows], drawn.tokens)
    np.testing.assert_array_equal(got.weights[rows], drawn.weights)
    np.testing.assert_array_equal(got.targets[kept], batch.targets[kept])
    np.testing.assert_array_equal(got.weights[kept], batch.weights[kept])
    # The sampled rows answer their own prompts.
    alone = sampling.jitted_sample(
        STUDENT,
        student,
        batch.inputs[rows],
        KEY,
        max_length=T,
        sampling=MODELS.student_sampling(config.sampling),
    )
    np.testing.assert_array_equal(alone.tokens, drawn.tokens)


def test_mixing_by_example_on_eight_devices_draws_the_same(student, batch):
    config = GKDConfig(on_policy_fraction=0.3, mixing="example")  # 3 rows: uneven on 8 devices
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    expected, _ = jax.jit(partial(gkd.sample_targets, config, MODELS))(student, batch, KEY)

    def run(params, batch, key):
        with sharding.use(mesh):
            return gkd.sample_targets(config, MODELS, params, batch, key)[0]

    rows = sharding.batch_sharding(mesh)
    got = jax.jit(run, in_shardings=(None, rows, None), out_shardings=rows)(student, batch, KEY)
    np.testing.assert_array_equal(got.targets, expected.targets)


def test_schedules_of_lambda_and_of_the_teacher_s_temperature(student, teacher, batch):
    ramp = optax.linear_schedule(0.0, 1.0, 100)
    config = GKDConfig(
        on_policy_fraction=ramp, teacher_temperature=optax.linear_schedule(2.0, 0.5, 3)
    )
    share = [
        np.mean([gkd.is_on_policy(seed, step, config) for seed in range(100)])
        for step in (0, 50, 100)
    ]
    assert share[0] == 0.0
    assert 0.35 < share[1] < 0.65
    assert share[2] == 1.0
    state = train_state.create(student, SGD)
    for step, temperature in ((2, 1.0), (7, 0.5)):
        now = state._replace(step=jnp.asarray(step, jnp.int32))
        got, _ = update(config, MODELS, SGD, 1, now, teacher, batch, KEY)
        fixed = GKDConfig(teacher_temperature=temperature)
        expected, _ = update(fixed, MODELS, SGD, 1, now, teacher, batch, KEY)
        _assert_trees_close(got.params, expected.params, atol=1e-6)


# Eight devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "num_microbatches"), [((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 1)]
)
def test_eight_devices_equal_one(sizes, num_microbatches, student, teacher, batch):
    """Adafactor's factored moments are sharded like their parameters."""
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    config, optimizer = CONFIGS["gkd"], ADAFACTOR
    state = train_state.create(student, optimizer)
    expected, metrics = update(config, MODELS, optimizer, 1, state, teacher, batch, KEY)

    def run(state, teacher, batch, key):
        with sharding.use(mesh):
            return update_with(
                config, MODELS, optimizer, num_microbatches, state, teacher, batch, key
            )

    state_shardings = train_state.shardings(train_state.abstract(STUDENT, optimizer), mesh)
    teacher_shardings = sharding.tree_shardings(teacher, lm.logical_axes(teacher), mesh)
    rows = sharding.batch_sharding(mesh)
    placed = (state_shardings, teacher_shardings, Batch(rows, rows, rows))
    jitted = jax.jit(
        run,
        in_shardings=(*placed, sharding.replicated(mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
    )
    got, got_metrics = jitted(*jax.device_put((state, teacher, batch), placed), KEY)
    _assert_trees_close(got_metrics, metrics, atol=1e-6)
    _assert_trees_close(got.params, expected.params, atol=1e-5)
    kernel = got.params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    parts = {part.data.shape for part in kernel.addressable_shards}
    assert parts == {(2, 16 // fsdp, 16 // tensor)}
    row = got.opt_state.v_row["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert {part.data.shape for part in row.addressable_shards} == {(2, 16 // fsdp)}


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_policy_fraction": 1.5}, r"on_policy_fraction must lie in \[0, 1\], got 1.5"),
        ({"on_policy_fraction": -0.1}, r"on_policy_fraction must lie in \[0, 1\], got -0.1"),
        ({"divergence": None}, "on_policy_fraction must be 0, got 1.0"),
        ({"mixing": "token"}, "mixing must be 'step' or 'example', got 'token'"),
        ({"mixing": "example", "num_samples": 2}, "compiles a fixed number of rows"),
        ({"loss_parts": 0}, "loss_parts must be a positive integer or None, got 0"),
        ({"decode_rows": 0}, "decode_rows must be a positive integer or None, got 0"),
        ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be positive, got 0.0"),
        ({"student_temperature": -1.0}, "student_temperature must be positive, got -1.0"),
        ({"student_temperature": 0.0}, "student_temperature must be positive, got 0.0"),
        (
            {"sampling": sampling.SamplingConfig(temperature=0.0)},
            "sampling.temperature must be positive in training, got 0",
        ),
        ({"divergence": lambda q, p: jnp.mean((q - p) ** 2)}, "one number for each token"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GKDConfig(**changes)


def test_the_defaults_are_those_of_the_paper():
    paper = GKDConfig(
        on_policy_fraction=1.0,
        mixing="step",
        divergence=divergences.forward_kl,
        teacher_temperature=1.0,
        student_temperature=1.0,
        sampling=sampling.SamplingConfig(temperature=1.0, top_k=0, top_p=1.0),
        num_samples=1,
        rl=None,
        reduction=losses.sequence_mean,
        label_smoothing=0.0,
    )
    assert GKDConfig() == paper


def test_a_divergence_may_read_the_likeliest_ids_alone():
    GKDConfig(divergence=lambda q, p: jnp.sum(jax.lax.top_k(p - q, 50)[0], axis=-1))


def test_greedy_sampling_is_allowed_where_nothing_is_sampled():
    GKDConfig(on_policy_fraction=0.0, sampling=sampling.SamplingConfig(temperature=0.0))


@pytest.mark.parametrize(("name", "changes"), [("student", {}), ("teacher", {"num_pieces": 36})])
def test_a_vocabulary_larger_than_an_embedding_is_refused(name, changes):
    wide = dataclasses.replace(STUDENT, vocab_size=40)
    small = dataclasses.replace(STUDENT, vocab_size=32)
    sizes = {"student": wide, "teacher": wide, "num_pieces": 40} | changes | {name: small}
    message = rf"the {name}'s embedding has 32 rows, fewer than .* {sizes['num_pieces']} pieces"
    with pytest.raises(ValueError, match=message):
        ModelPair(**sizes)
