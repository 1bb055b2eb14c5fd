"""Divergences equal hand-computed values, float64 NumPy formulas and their limits."""

from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gkd_jax import divergences


# P = (0.7, 0.2, 0.1) is the teacher, Q = (0.4, 0.4, 0.2) the student: the value in nats, and the
# gradient with respect to the student's logits, computed in float64.
P, Q = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.4, 0.2])
VECTORS = {
    "forward_kl": (divergences.forward_kl, 0.1837868974, (-0.3, 0.2, 0.1)),
    "reverse_kl": (divergences.reverse_kl, 0.1920419932, (-0.30066311, 0.20044207, 0.10022104)),
    "jsd_0.1": (
        partial(divergences.jsd, beta=0.1),
        0.0165179831,
        (-0.02670061, 0.01780041, 0.00890020),
    ),
    "jsd_0.5": (
        partial(divergences.jsd, beta=0.5),
        0.0462008292,
        (-0.07273630, 0.04849086, 0.02424543),
    ),
    "jsd_0.9": (
        partial(divergences.jsd, beta=0.9),
        0.0170995972,
        (-0.02672760, 0.01781840, 0.00890920),
    ),
    "total_variation": (divergences.total_variation, 0.3, (-0.24, 0.16, 0.08)),
}
FUNCTIONS = {name: vector[0] for name, vector in VECTORS.items()}
NAMES = list(VECTORS)
JITTED = {name: jax.jit(function) for name, function in FUNCTIONS.items()}


@jax.jit
def _gradients(student, teacher):
    """The gradients of all divergences with respect to the student's logits."""
    return {
        name: jax.grad(lambda z, f=function: f(z, teacher).sum())(student)
        for name, function in FUNCTIONS.items()
    }


KLS = ("forward_kl", "reverse_kl")  # infinite where one distribution excludes an id


def _numpy(name, student, teacher):
    """The textbook formula from probabilities, and its gradient in closed form, in float64.

    `slopes` are q times the derivatives of the sum of `terms` with respect to q.
    """
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    q, p = special.softmax(student, axis=-1), special.softmax(teacher, axis=-1)
    log_q, log_p = special.log_softmax(student, axis=-1), special.log_softmax(teacher, axis=-1)
    if name == "forward_kl":
        terms, slopes = p * (log_p - log_q), -p
    elif name == "reverse_kl":
        terms = slopes = q * (log_q - log_p)
    elif name == "total_variation":
        terms, slopes = 0.5 * np.abs(p - q), 0.5 * q * np.sign(q - p)
    else:
        beta = float(name.removeprefix("jsd_"))
        m = beta * p + (1 - beta) * q
        slopes = (1 - beta) * special.rel_entr(q, m)
        terms = beta * special.rel_entr(p, m) + slopes
    return terms.sum(axis=-1), slopes - q * slopes.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("name", NAMES)
def test_hand_computed_values_and_gradients(name):
    function, value, gradient = VECTORS[name]
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(np.log(Q)), jnp.asarray(np.log(P))
        got, got_gradient = jax.value_and_grad(lambda z: function(z, teacher))(student)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, value, atol=1e-10)
        np.testing.assert_allclose(got_gradient, gradient, atol=1e-8)


# Standard deviations of the logits: mild, a trained model's, and one token taking everything.
@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("name", NAMES)
def test_float64_agrees_with_numpy(name, spread):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, spread, (2, 3, 5, 11))
    with jax.enable_x64(True):
        got = JITTED[name](jnp.asarray(student), jnp.asarray(teacher))
        gradient = _gradients(jnp.asarray(student), jnp.asarray(teacher))[name]
    expected, expected_gradient = _numpy(name, student, teacher)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_with_numpy(name, spread):
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(0, spread, (2, 3, 5, 11)).astype(np.float32)
    got = JITTED[name](student, teacher)
    assert got.dtype == jnp.float32
    # A log-probability of size |z| carries an error of |z| * 2^-24, and a KL is a mean of those.
    size = spread if name in KLS else 1.0
    expected, expected_gradient = _numpy(name, student, teacher)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-7 * max(size, 1.0))
    np.testing.assert_allclose(
        _gradients(student, teacher)[name],
        expected_gradient,
        rtol=1e-4,
        atol=2e-6 * max(size, 1.0),
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_has_the_gradients_of_both_logits_for_any_weight_of_a_token(beta):
    """Seen from the teacher, JSD(beta) is JSD(1 - beta) with the two exchanged."""
    rng = np.random.default_rng(11)
    student, teacher = rng.normal(0, 2, (2, 4, 9))
    weights = np.array([1.0, 0.25, 0.0, -3.0])
    with jax.enable_x64(True):
        divergence = divergences.JSD(beta=beta)
        _, pull = jax.vjp(divergence, jnp.asarray(student), jnp.asarray(teacher))
        of_student, of_teacher = pull(jnp.asarray(weights))
    for got, expected in (
        (of_student, _numpy(f"jsd_{beta}", student, teacher)[1]),
        (of_teacher, _numpy(f"jsd_{1 - beta}", teacher, student)[1]),
    ):
        np.testing.assert_allclose(got, weights[:, None] * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["jsd_0.1", "jsd_0.5", "jsd_0.9"])
def test_jsd_of_close_distributions_keeps_its_digits(name):
    """P and Q differ by 1e-3: the divergence of 1e-7 is below float32's resolution of log M."""
    rng = np.random.default_rng(2)
    teacher = rng.normal(0, 1, (4, 50)).astype(np.float32)
    student = teacher + rng.normal(0, 1e-3, (4, 50)).astype(np.float32)
    expected, _ = _numpy(name, student, teacher)
    assert expected.max() < 1e-6
    np.testing.assert_allclose(JITTED[name](student, teacher), expected, rtol=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 259), (2, 3, 32128)])
def test_compiled_values_of_real_vocabularies(name, shape):
    """XLA once fused the JSD without its gradient into wrong values from 256 ids on."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, 2, (2, *shape)).astype(np.float32)
    got = JITTED[name](student, teacher)
    expected, _ = _numpy(name, student, teacher)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_is_not_lost(name, whose):
    """A NaN in the logits must stop the run, and must not count as nothing to learn."""
    good, bad = np.zeros((2, 5), np.float32), np.full((2, 5), np.nan, np.float32)
    values = JITTED[name](*((bad, good) if whose == "student" else (good, bad)))
    assert np.isnan(values).all()


def test_the_teacher_weights_forward_kl():
    """Forward KL punishes a student that gives no mass to one of the teacher's modes."""
    teacher, student = np.log([0.5, 0.5]), np.log([1 - 1e-6, 1e-6])
    covering = divergences.forward_kl(jnp.asarray(student), jnp.asarray(teacher))
    seeking = divergences.reverse_kl(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(covering, 0.5 * np.log(0.25 / 1e-6), rtol=1e-4)
    np.testing.assert_allclose(seeking, np.log(2), rtol=1e-4)


def test_jsd_limits():
    """JSD(b) / b -> KL(P || Q) and JSD(b) / (1 - b) -> KL(Q || P), in values and gradients."""
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, 0.5, (2, 4, 9))
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(student), jnp.asarray(teacher)

        def both(function):
            return function(student, teacher), jax.grad(lambda z: function(z, teacher).sum())(
                student
            )

        for beta, limit in ((1e-6, divergences.forward_kl), (1 - 1e-6, divergences.reverse_kl)):
            expected = both(limit)
            weak = both(partial(divergences.jsd, beta=beta))
            unit = both(partial(divergences.jsd, beta=beta, scale="unit"))
            for want, got, scaled in zip(expected, weak, unit, strict=True):
                np.testing.assert_allclose(got / min(beta, 1 - beta), want, rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(scaled, want, rtol=1e-4, atol=1e-7)


def test_jsd_is_symmetric_at_one_half_and_mirrored_elsewhere():
    rng = np.random.default_rng(4)
    x, y = jnp.asarray(rng.normal(0, 2, (2, 6, 9)), jnp.float32)
    np.testing.assert_allclose(divergences.jsd(x, y), divergences.jsd(y, x), rtol=1e-5)
    np.testing.assert_allclose(
        divergences.jsd(x, y, beta=0.2), divergences.jsd(y, x, beta=0.8), rtol=1e-5
    )
    # ... which the swap of the arguments alone is not.
    assert np.abs(divergences.jsd(x, y, beta=0.2) - divergences.jsd(y, x, beta=0.2)).max() > 1e-2


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_unit_scale_divides_by_beta_times_one_minus_beta(beta):
    rng = np.random.default_rng(5)
    x, y = jnp.asarray(rng.normal(0, 2, (2, 6, 9)), jnp.float32)
    expected = np.asarray(divergences.jsd(x, y, beta=beta)) / (beta * (1 - beta))
    np.testing.assert_allclose(divergences.jsd(x, y, beta=beta, scale="unit"), expected, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_jsd_refuses_its_limits_and_names_the_functions(beta):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=rf"got {beta}.*forward_kl and reverse_kl"):
        divergences.jsd(x, x, beta=beta)


def test_the_class_and_the_function_have_the_same_defaults():
    assert divergences.JSD() == divergences.jsd() == divergences.JSD(beta=0.5, scale="paper")


def test_jsd_refuses_an_unknown_scale():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"'paper' or 'unit', got 'kl'"):
        divergences.jsd(x, x, scale="kl")


@pytest.mark.parametrize("name", NAMES)
def test_ids_that_both_exclude_change_nothing(name):
    rng = np.random.default_rng(6)
    student, teacher = rng.normal(0, 2, (2, 4, 6)).astype(np.float32)
    tail = np.full((4, 3), -np.inf, np.float32)
    wide = [np.concatenate([x[:, :2], tail, x[:, 2:]], axis=1) for x in (student, teacher)]
    np.testing.assert_allclose(
        JITTED[name](*wide), JITTED[name](student, teacher), rtol=1e-6, atol=1e-7
    )
    gradient = np.asarray(_gradients(*wide)[name])
    assert not gradient[:, 2:5].any()
    np.testing.assert_allclose(
        np.delete(gradient, [2, 3, 4], axis=1),
        _gradients(student, teacher)[name],
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("excluded_by", ["student", "teacher"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_that_one_excludes(name, excluded_by):
    """Finite divergences keep their value; an infinite KL costs 1e4 nats times the probability."""
    rng = np.random.default_rng(7)
    student, teacher = rng.normal(0, 1, (2, 4, 6)).astype(np.float32)
    one_sided = student if excluded_by == "student" else teacher
    one_sided[:, 1] = -np.inf
    q, p = (special.softmax(x.astype(np.float64), axis=-1) for x in (student, teacher))
    if name not in KLS:
        expected, _ = _numpy(name, student, teacher)
    else:
        weighting, other = (p, q) if name == "forward_kl" else (q, p)
        logs = np.log(other, out=np.full_like(other, -1e4), where=other > 0)
        expected = np.sum(special.xlogy(weighting, weighting) - weighting * logs, axis=-1)
    np.testing.assert_allclose(JITTED[name](student, teacher), expected, rtol=1e-5, atol=1e-6)
    gradient = np.asarray(_gradients(student, teacher)[name])
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-3
    if excluded_by == "student":
        assert not gradient[:, 1].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_extremes(name):
    extremes = np.array([-np.inf, -1e30, -1e4, -100.0, 0.0, 100.0, 1e4], np.float32)
    rng = np.random.default_rng(8)
    student, teacher = rng.choice(extremes, (2, 500, 5))
    student[:, 0], teacher[:, 4] = 0.0, 0.0  # at least one possible id
    assert np.isfinite(JITTED[name](student, teacher)).all()
    assert np.isfinite(_gradients(student, teacher)[name]).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_divergence_zero_and_no_gradient(name):
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 4, (5, 40)).astype(np.float32)
    logits[:, 7] = -np.inf
    np.testing.assert_array_equal(JITTED[name](logits, logits), np.zeros(5))
    # Not exactly 0: the probabilities sum to 1 up to float32 rounding. Total variation has a kink
    # here, where rounding picks a subgradient: q (s - E s) / 2 with any signs s is right.
    largest = 1e-6 + (special.softmax(logits, axis=-1) if name == "total_variation" else 0.0)
    assert (np.abs(_gradients(logits, logits)[name]) <= largest).all()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_are_computed_in_float32(name):
    rng = np.random.default_rng(10)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in rng.normal(0, 3, (2, 4, 300)))
    got = JITTED[name](student, teacher)
    assert got.dtype == jnp.float32
    expected, expected_gradient = _numpy(name, student, teacher)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    gradient = _gradients(student, teacher)[name]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), expected_gradient, rtol=1e-2, atol=1e-6
    )


def test_rounding_noise_gives_total_variation_no_gradient():
    """The logits differ by a constant, so that P and Q are equal but for rounding."""
    student = np.random.default_rng(12).uniform(-1, 1, (5, 8)).astype(np.float32)
    teacher = student + np.float32(0.3)
    assert (jax.nn.softmax(student) != jax.nn.softmax(teacher)).any()
    np.testing.assert_array_equal(JITTED["total_variation"](student, teacher), np.zeros(5))
    gradient = _gradients(student, teacher)["total_variation"]
    np.testing.assert_array_equal(gradient, np.zeros_like(student))


LOGITS = hnp.arrays(np.float32, (3, 6), elements=st.floats(-30, 30, width=32))


@settings(max_examples=60, deadline=None)
@given(student=LOGITS, teacher=LOGITS, shift=st.floats(-40, 40))
def test_properties(student, teacher, shift):
    values = {name: np.asarray(function(student, teacher)) for name, function in JITTED.items()}
    moved = np.float32(shift) + teacher
    for name, value in values.items():
        assert (value >= -1e-6).all(), name
        np.testing.assert_allclose(
            JITTED[name](student, moved), value, rtol=1e-4, atol=1e-4, err_msg=name
        )
    for beta in (0.1, 0.5, 0.9):
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        assert (values[f"jsd_{beta}"] <= entropy + 1e-6).all()
    assert (values["total_variation"] <= 1 + 1e-6).all()
    # Pinsker's inequality ties three of them together.
    least = np.minimum(values["forward_kl"], values["reverse_kl"])
    assert (2 * values["total_variation"] ** 2 <= least + 1e-4).all()
