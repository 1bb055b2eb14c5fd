"""Reference values in float64, and the comparisons of an implementation's results with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Measurement(NamedTuple):
    """One comparison of a result with the expected value."""

    what: str
    found: str  # of an array, the entry with the largest error
    expected: str  # of the same entry
    holds: bool  # for all entries


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities over the last axis."""
    exps = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)


def divergence(student_logits: np.ndarray, teacher_logits: np.ndarray, beta: float) -> np.ndarray:
    """Returns JSD(beta) per token in nats: Eq. 1 of Agarwal et al. (2024).

    For beta 0 and 1 the result is KL(P || Q) and KL(Q || P), where P is the teacher.
    """
    p, q = softmax(teacher_logits), softmax(student_logits)
    if beta in (0, 1):
        return _kl(q, p) if beta else _kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def mean(values: np.ndarray, weights: np.ndarray, reduction: str) -> float:
    """Returns the mean of per-token values by one of two reductions; 0 if no token counts.

    "sequence_mean" is Eq. 2 and Algorithm 1 of Agarwal et al. (2024): the mean over sequences of
    each sequence's mean over its tokens, without sequences in which no token counts. "token_mean"
    is the mean over all tokens of the batch. Values and weights are [B T], and a weight is 1 where
    a token counts, else 0.
    """
    if not weights.any():
        return 0.0
    if reduction == "token_mean":
        return float((values * weights).sum() / weights.sum())
    if reduction != "sequence_mean":
        raise ValueError(f"reduction must be sequence_mean or token_mean, got {reduction!r}")
    lengths = weights.sum(1)
    return float(((values * weights).sum(1)[lengths > 0] / lengths[lengths > 0]).mean())


def close(
    what: str, found: Any, expected: Any, *, rtol: float = 1e-3, atol: float = 1e-5
) -> Measurement:
    """Returns a measurement that holds if every entry is within atol + rtol |expected|.

    NaN and infinite results never hold.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return Measurement(what, f"shape {found.shape}", f"shape {expected.shape}", False)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - expected) / (atol + rtol * np.abs(expected))
    error = np.where(np.isfinite(found), error, np.inf).ravel()
    worst = int(np.argmax(error))
    numbers = [f"{x.ravel()[worst]:.6g}" for x in (found, expected)]
    return Measurement(what, numbers[0], numbers[1], bool(error[worst] <= 1))


def raises(what: str, call: Callable[[], Any], expected: bool) -> Measurement:
    """Returns a measurement that holds if the call raises exactly when this is expected."""
    words = ("accepted", "refused")
    try:
        call()
    except Exception:
        return Measurement(what, words[1], words[expected], expected)
    return Measurement(what, words[0], words[expected], not expected)
