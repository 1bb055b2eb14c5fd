"""The checks of the suite: one or more small experiments for each trap.

A check calls only the functions of the implementation. Some checks compare results with references,
others test properties that results must have.

Axes: B batch, S source, T target, V vocabulary, D model.
"""

from collections.abc import Callable, Iterator
import functools
from typing import NamedTuple

import numpy as np

from gkd_jax.conformance.references import Measurement, close, divergence, mean, raises, softmax
from gkd_jax.conformance.target import NotGivenError, Target


TITLES = {
    "T1": "JSD(beta) is Eq. 1, the mixture in probabilities, beta the teacher's weight",
    "T2": "beta's scale: JSD(b) / b tends to KL(P || Q); the ends are KLs or refused, never 0",
    "T3": "microbatches change neither loss nor gradient",
    "T4": "the mean of Eq. 2, over each sequence first; no target at all gives 0",
    "T5": "EOS counts and nothing after it does; weights, not ids, mark padding",
    "T6": "logits at t predict target t, the first included, and see none of the later",
    "T7": "prompt and padding have no part in loss and gradient",
    "T8": "separate temperatures of student, teacher and sampling, whose default is 1",
    "T9": "a fused loss equals the dense one",
    "T10": "no gradient into the teacher; equal models give loss 0 and gradient 0",
    "T11": "coins and samples are functions of (seed, step)",
    "T12": "decoding with a cache gives the teacher-forced logits",
    "T13": "finite values and gradients where logits are -inf or far apart",
    "T14": "top-k with a tail: between 0 and the full divergence, equal to it at k = V",
    "T15": "a sampled estimate weighs each token by its own log-ratio, held constant",
    "T16": "no cross-entropy on the student's own samples",
    "T17": "vocabularies are compared by content, not by size",
    "T18": "no empty generation",
    "T19": "memory of the second step (not visible from outside)",
    "T20": "lengths, truncation and repetition of samples are measured",
}
BETA = 0.3
NUM_SAMPLES = 4096
EXAMPLE_P, EXAMPLE_Q = np.log([[0.7, 0.2, 0.1]]), np.log([[0.4, 0.4, 0.2]])


Check = Callable[[Target], Iterator[Measurement]]
CHECKS: list[tuple[str, Check]] = []


def _checks(trap: str) -> Callable[[Check], Check]:
    """Returns a decorator that adds a check of a trap to `CHECKS`."""

    def register(check: Check) -> Check:
        CHECKS.append((trap, check))
        return check

    return register


class _Data(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def _data() -> _Data:
    """Returns four rows of 5 tokens with logits over 7 ids.

    The first row has 5 tokens that count, the second only padding, the third one token that counts,
    and the fourth a prompt of two tokens before three that count.
    """
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 1.5, (2, 4, 5, 7)).astype(np.float32)
    weights = np.array([[1, 1, 1, 1, 1], [0] * 5, [1, 0, 0, 0, 0], [0, 0, 1, 1, 1]], np.float32)
    return _Data(student, teacher, rng.integers(2, 7, (4, 5)), weights)


@_checks("T1")
def _equation_1(target: Target) -> Iterator[Measurement]:
    data = _data()
    for beta in (0.1, 0.5, 0.9):
        found = target.divergence(EXAMPLE_Q, EXAMPLE_P, beta)
        expected = divergence(EXAMPLE_Q, EXAMPLE_P, beta)
        yield close(f"JSD({beta}), P = .7 .2 .1, Q = .4 .4 .2", found, expected)
        found = target.divergence(data.student, data.teacher, beta)
        expected = divergence(data.student, data.teacher, beta)
        yield close(f"JSD({beta}) of random logits", found, expected)


@_checks("T2")
def _scale(target: Target) -> Iterator[Measurement]:
    for end, near, name in ((0.0, 0.01, "KL(P || Q)"), (1.0, 0.99, "KL(Q || P)")):
        expected = divergence(EXAMPLE_Q, EXAMPLE_P, end)
        found = np.asarray(target.divergence(EXAMPLE_Q, EXAMPLE_P, near)) / 0.01
        yield close(f"JSD({near}) / 0.01, near {name}", found, expected, rtol=0.03)
        what = f"beta = {end:g}: {name} or refused"
        try:
            found = target.divergence(EXAMPLE_Q, EXAMPLE_P, end)
        except ValueError:
            yield Measurement(what, "refused", "refused", True)
        else:
            yield close(what, found, expected)


@_checks("T3")
def _microbatches(target: Target) -> Iterator[Measurement]:
    whole, gradient, _ = target.loss_and_gradients(*_data(), BETA, 1)
    # The second of the four microbatches has only padding.
    found, found_gradient, _ = target.loss_and_gradients(*_data(), BETA, 4)
    yield close("loss in 4 microbatches, as in one", found, whole)
    yield close("gradient in 4 microbatches, as in one", found_gradient, gradient)


@_checks("T4")
def _normalisation(target: Target) -> Iterator[Measurement]:
    data = _data()
    values = np.asarray(target.or_reference()(data.student, data.teacher, BETA))
    found = float(target.loss(*data, BETA))
    # If the loss is wrong, the message says whether it is the most common mistake.
    other = mean(values, data.weights, "token_mean")
    name = ", is the mean over all tokens" if np.isclose(found, other, rtol=1e-3) else ""
    expected = target.reduce(values, data.weights)
    measurement = close("loss of rows of 5, 0, 1, 3 tokens", found, expected)
    found_and_name = measurement.found + ("" if measurement.holds else name)
    yield measurement._replace(found=found_and_name)
    nothing = np.zeros_like(data.weights)
    yield close("no targets", target.loss(*data[:3], nothing, BETA), 0)


@_checks("T5")
def _end_of_sequence(target: Target) -> Iterator[Measurement]:
    for name, eos, pad, row, expected in (
        ("EOS, then padding", 1, 0, [5, 1, 0, 0], [1, 1, 0, 0]),
        ("anything after EOS", 1, 0, [5, 1, 7, 1], [1, 1, 0, 0]),
        ("cut before EOS", 1, 0, [5, 6, 7, 8], [1, 1, 1, 1]),
        ("a drawn token with pad's id", 1, 0, [5, 0, 6, 1], [1, 1, 1, 1]),
        ("EOS first", 1, 0, [1, 0, 0, 0], [1, 0, 0, 0]),
        ("EOS is pad", 0, 0, [5, 6, 0, 0], [1, 1, 1, 0]),
    ):
        found = np.sum(target.target_weights(np.array([row]), eos, pad) * [8, 4, 2, 1])
        found, wanted = (format(int(n), "04b") for n in (found, np.dot(expected, [8, 4, 2, 1])))
        yield Measurement(f"weights, {name}", found, wanted, found == wanted)


@_checks("T5")
def _weights_rule(target: Target) -> Iterator[Measurement]:
    data = _data()
    loss = float(target.loss(*data, BETA))
    targets = data.targets.copy()
    targets[(0, 3), -1] = 0, 1  # The ids of pad and EOS, at positions whose weights are 1.
    changed = target.loss(*data[:2], targets, data.weights, BETA)
    yield close("loss where a last target is id 0 or EOS and counts", changed, loss)


@_checks("T5")
def _weights_of_samples(target: Target) -> Iterator[Measurement]:
    tokens, weights = map(np.asarray, target.sample(_inputs(NUM_SAMPLES), 0, 0))
    eos = tokens == 1
    yield close("weights of samples", weights, np.cumsum(eos, axis=1) - eos == 0)


@_checks("T6")
def _shift_of_targets(target: Target) -> Iterator[Measurement]:
    targets = np.array([[5, 6, 7, 1]])
    yield close("decoder's inputs of 5 6 7 1", target.decoder_inputs(targets), [[0, 5, 6, 7]])


@_checks("T6")
def _causality(target: Target) -> Iterator[Measurement]:
    targets = np.array([[5, 6, 7, 8]])
    before = np.asarray(target.teacher_forced_logits(_inputs(1), targets))
    targets[0, 1] = 9
    after = np.asarray(target.teacher_forced_logits(_inputs(1), targets))
    yield close("logits of targets 0 and 1 with another target 1", after[:, :2], before[:, :2])
    moved = np.abs(after[:, 2] - before[:, 2]).max()
    yield Measurement("target 2's logits see target 1", f"{moved:.3g}", "> 0", bool(moved > 1e-4))


@_checks("T6")
def _alignment(target: Target) -> Iterator[Measurement]:
    data = _data()
    values = np.asarray(target.or_reference()(data.student, data.teacher, BETA))
    for t in (0, 2, 4):
        weights = np.zeros_like(data.weights)
        weights[3, t] = 1
        found = target.loss(*data[:3], weights, BETA)
        yield close(f"loss of target {t} alone", found, values[3, t])


@_checks("T7")
def _masked_positions(target: Target) -> Iterator[Measurement]:
    data = _data()
    loss = float(target.loss(*data, BETA))
    student, teacher = data.student.copy(), data.teacher.copy()
    student[data.weights == 0] += np.linspace(-30, 30, 7)
    teacher[data.weights == 0] += np.linspace(20, -20, 7)
    found = target.loss(student, teacher, *data[2:], BETA)
    yield close("loss with other logits at prompt and padding", found, loss)
    _, gradient, _ = target.loss_and_gradients(*data, BETA, 1)
    yield close("gradient at prompt and padding", np.abs(gradient)[data.weights == 0].max(), 0)


@_checks("T8")
def _temperatures(target: Target) -> Iterator[Measurement]:
    data = _data()
    for student, teacher in ((1.0, 0.1), (2.0, 1.0)):
        found = target.tempered_divergence(data.student, data.teacher, BETA, student, teacher)
        values = target.or_reference()(data.student / student, data.teacher / teacher, BETA)
        what = f"temperatures {student} of the student, {teacher} of the teacher, no factor T^2"
        yield close(what, found, values)


@_checks("T8")
def _sampling_distribution(target: Target) -> Iterator[Measurement]:
    tokens, _ = target.sample(_inputs(NUM_SAMPLES, identical=True), 0, 0)
    first = np.asarray(tokens)[:, 0]
    logits = np.asarray(target.teacher_forced_logits(_inputs(1), np.array([[2, 2, 2, 2]])))[0, 0]
    p = softmax(logits[1:])  # An implementation may exclude pad from sampling.
    log_p = np.log(p)
    found, expected = log_p[first[first > 0] - 1].mean(), (p * log_p).sum()
    error = float(5 * np.sqrt((p * (log_p - expected) ** 2).sum() / NUM_SAMPLES))
    yield close("mean log Q of first tokens drawn", found, expected, rtol=0.0, atol=error)


@_checks("T9")
def _fused(target: Target) -> Iterator[Measurement]:
    data, rng = _data(), np.random.default_rng(1)
    states = rng.normal(0, 1, (2, 4, 5, 8)).astype(np.float32)
    heads = rng.normal(0, 0.7, (2, 7, 8)).astype(np.float32)
    args = (states[0], heads[0], states[1], heads[1], data.weights, BETA)

    def dense(student_states, student_head):
        logits = student_states @ student_head.T, states[1] @ heads[1].T
        try:
            return float(target.loss(*logits, data.targets, data.weights, BETA))
        except NotGivenError:
            return target.reduce(divergence(*logits, BETA), data.weights)

    found, *gradients = target.fused_loss_and_gradients(*args)
    yield close("fused loss", found, dense(states[0], heads[0]))
    for index, name in enumerate(("states", "head")):
        direction = rng.normal(0, 1, (states[0], heads[0])[index].shape).astype(np.float32)
        ends = []
        for size in (0.01, -0.01):
            moved = [states[0], heads[0]]
            moved[index] = moved[index] + size * direction
            ends.append(dense(*moved))
        slope, expected = float(np.sum(gradients[index] * direction)), (ends[0] - ends[1]) / 0.02
        yield close(f"fused gradient of the {name}, along a line", slope, expected, rtol=0.02)


@_checks("T10")
def _gradients(target: Target) -> Iterator[Measurement]:
    data = _data()
    loss, gradient, _ = target.loss_and_gradients(*data[:1], *data[:1], *data[2:], BETA, 1)
    yield close("loss of equal models", loss, 0)
    yield close("largest gradient of equal models", np.abs(gradient).max(), 0)
    _, gradient, of_teacher = target.loss_and_gradients(*data, BETA, 1)
    largest = 0.0 if of_teacher is None else float(np.abs(of_teacher).max())
    yield close("largest gradient into the teacher's logits", largest, 0)
    direction = np.random.default_rng(2).normal(0, 1, data.student.shape).astype(np.float32)
    ends = [target.loss(data.student + x * direction, *data[1:], BETA) for x in (0.02, -0.02)]
    slope = float(np.sum(gradient * direction))
    expected = (float(ends[0]) - float(ends[1])) / 0.04
    yield close("student's gradient along a line, by differences", slope, expected, rtol=0.02)


@_checks("T11")
def _coins(target: Target) -> Iterator[Measurement]:
    steps = list(range(64))
    coins = [bool(target.is_on_policy(7, step, 0.5)) for step in steps]
    again = [bool(target.is_on_policy(7, step, 0.5)) for step in reversed(steps)][::-1]
    changed = sum(a != b for a, b in zip(coins, again, strict=True))
    yield close("coins of 64 steps that change when asked in another order", changed, 0)
    yield close("share of on-policy steps at lambda 0.5", np.mean(coins), 0.5, atol=0.25)
    for fraction in (0.0, 1.0):
        share = np.mean([target.is_on_policy(7, step, fraction) for step in steps])
        yield close(f"share of on-policy steps at lambda {fraction}", share, fraction)


@_checks("T11")
def _samples(target: Target) -> Iterator[Measurement]:
    tokens = [np.asarray(target.sample(_inputs(NUM_SAMPLES), 3, step)[0]) for step in (5, 6, 5)]
    changed = int((tokens[0] != tokens[2]).any(1).sum())
    yield close("samples that change when a step is sampled again", changed, 0)
    changed = int((tokens[0] != tokens[1]).any(1).sum())
    yield Measurement("samples that change from step to step", f"{changed}", "> 0", changed > 0)


@_checks("T12")
def _cache(target: Target) -> Iterator[Measurement]:
    targets = np.random.default_rng(3).integers(2, 16, (4, 6))
    found = target.cached_logits(_inputs(4), targets)
    expected = target.teacher_forced_logits(_inputs(4), targets)
    yield close("logits decoded with a cache", found, expected, atol=2e-3)


@_checks("T13")
def _masked_logits(target: Target) -> Iterator[Measurement]:
    with_gradient = getattr(target.implementation, "divergence_and_gradient", None)
    student, teacher = np.zeros((2, 1, 4)), np.array([[[1.0, 0.0, -1.0, 2.0]]])
    both, one, far = (x.copy() for x in (teacher, teacher, 1e4 * teacher))
    both[..., 3] = one[..., 3] = -np.inf
    student[1, :, 3] = -np.inf
    for name, q, p, betas in (
        ("an id that both exclude", student[1], both[0], (0.0, 0.1, 0.5, 1.0)),
        ("an id that the teacher excludes", student[0], one[0], (0.0, 0.5)),
        ("an id that the student excludes", student[1], teacher[0], (0.5, 1.0)),
        ("logits 1e4 apart", student[0], far[0], (0.0, 0.5)),
    ):
        for beta in betas:
            expected = divergence(q, p, beta)
            arrays = q.astype(np.float32), p.astype(np.float32)
            yield close(f"beta {beta:g}, {name}", target.divergence(*arrays, beta), expected)
            if with_gradient is not None:
                unusable = np.sum(~np.isfinite(with_gradient(*arrays, beta)[1]))
                yield close(f"gradient's NaN or inf, beta {beta:g}, {name}", unusable, 0)


@_checks("T14")
def _top_k(target: Target) -> Iterator[Measurement]:
    data = _data()
    full = target.or_reference()(data.student, data.teacher, BETA)
    for k in (1, 3):
        found = np.asarray(target.top_k_divergence(data.student, data.teacher, BETA, k))
        yield close(f"top {k} within [0, full]", found, np.clip(found, 0, full))
    found = target.top_k_divergence(data.student, data.teacher, BETA, 7)
    yield close("top V, the full divergence", found, full)


@_checks("T15")
def _estimate(target: Target) -> Iterator[Measurement]:
    student, teacher = np.log(np.random.default_rng(4).uniform(0.1, 0.9, (2, 3, 4)))
    weights = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], np.float32)
    found = np.asarray(target.policy_gradient(student, teacher, weights), np.float64)
    expected = (student - teacher) * weights
    expected = expected / np.abs(expected).max() * np.abs(found).max()  # Any factor is allowed.
    yield close("gradient over log-probabilities, as their log-ratio", found, expected, atol=1e-4)


@_checks("T16")
def _no_cross_entropy(target: Target) -> Iterator[Measurement]:
    data = _data()
    targets = data.targets.copy()
    targets[:, -1] = 2 + (targets[:, -1] - 1) % 5
    losses = [float(target.loss(*data[:2], t, data.weights, BETA)) for t in (data.targets, targets)]
    yield close("loss with other ids as last targets", losses[1], losses[0])
    loss = target.loss(data.student, data.student, *data[2:], BETA)
    yield close("loss of equal models", loss, 0)


@_checks("T16")
def _sft_is_off_policy(target: Target) -> Iterator[Measurement]:
    for fraction, refused in ((0.0, False), (0.5, True), (1.0, True)):
        call = functools.partial(target.configure_sft, fraction)
        yield raises(f"cross-entropy with lambda {fraction}", call, refused)


@_checks("T17")
def _vocabularies(target: Target) -> Iterator[Measurement]:
    pieces = ["<pad>", "</s>", "<unk>", "red", "green", "blue"]
    swapped = [*pieces[:3], "green", "red", "blue"]
    for what, other, refused in (
        ("the same", pieces, False),
        ("the same size, other ids", swapped, True),
    ):
        yield raises(what, functools.partial(target.check_vocabularies, pieces, other), refused)


@_checks("T18")
def _generations(target: Target) -> Iterator[Measurement]:
    tokens, weights = map(np.asarray, target.sample(_inputs(NUM_SAMPLES), 0, 0))
    shortest = weights.sum(1).min() if weights.size else 0
    holds = bool(shortest >= 1 and len(tokens) == NUM_SAMPLES)
    yield Measurement("tokens of the shortest sample", f"{shortest:g}", ">= 1", holds)


@_checks("T20")
def _statistics(target: Target) -> Iterator[Measurement]:
    tokens = np.array([[5, 6, 1, 0], [5, 5, 5, 5], [5, 6, 7, 8], [1, 0, 0, 0]])
    weights = np.array([[1, 1, 1, 0], [1] * 4, [1] * 4, [1, 0, 0, 0]], np.float32)
    found = target.sample_statistics(tokens, weights)
    for name, expected in (("length", 3), ("truncated_fraction", 0.5), ("distinct_2", 7 / 9)):
        yield close(name, found[name], expected)


def _inputs(rows: int, *, identical: bool = False) -> np.ndarray:
    """Returns prompts of 6 places with ids from 2 to 15 and EOS at the end.

    Every second prompt has two places of padding. With `identical`, all prompts are the same.
    """
    inputs = np.random.default_rng(5).integers(2, 16, (rows, 6))
    inputs[:, -1] = 1
    inputs[1::2, -3:] = 1, 0, 0
    return np.repeat(inputs[:1], rows, axis=0) if identical else inputs
