"""Per-token divergences between a teacher's and a student's next-token distributions.

Every divergence maps `(student_logits, teacher_logits)` to one number per token, in nats, which is
at least 0 but for rounding (1e-6). `P` is the teacher and `Q` the student throughout, as in Agarwal
et al. (2024), section 2. The computation is in float32, or in float64 for float64 logits. Logits of
different shapes are a ValueError.

Logits may be -inf, for ids that cannot occur. In KL(A || B), an id with A = 0 contributes nothing.
An id with B = 0 and A > 0 contributes 1e4 nats times A, where the KL itself would be infinite.
Gradients are always finite.

Axes: B any leading axes, V vocabulary.
"""

import dataclasses
import functools
import inspect
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gkd_jax.batch import TopK


Logits = Float[Array, "*B V"]
PerToken = Float[Array, "*B"]
# Replaces log 0 where a KL would be infinite: a large penalty with a finite gradient.
_IMPOSSIBLE = -1e4
_LARGEST_EXPONENT = 80.0  # exp(80) is finite in float32, exp(-80) a normal number


def forward_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """Returns KL(P || Q) of each token, in nats: mode-covering, the classic distillation loss."""
    _check_shapes(student_logits, teacher_logits)
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """Returns KL(Q || P) of each token, in nats: mode-seeking."""
    _check_shapes(student_logits, teacher_logits)
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return _kl(log_q, log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSD:
    """Generalized Jensen-Shannon divergence (the paper's Eq. 1) as a callable value.

    The divergence is beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q. It
    tends to beta KL(P || Q) as beta -> 0, and to (1 - beta) KL(Q || P) as beta -> 1. So its
    gradients at beta = 0.1 and 0.9 are 10 to 20 times smaller than those of the KLs.

    Attributes:
        beta: the weight of the teacher, strictly between 0 and 1.
        scale: "paper" for Eq. 1 as it stands, or "unit" for Eq. 1 divided by beta (1 - beta), whose
            limits at beta = 0 and 1 are the two KLs.
    """

    beta: float = 0.5
    scale: str = "paper"

    def __post_init__(self):
        if not isinstance(self.beta, numbers.Real) or not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta!r}; the limits at 0 and 1 "
                "are forward_kl and reverse_kl"
            )
        if self.scale not in ("paper", "unit"):
            raise ValueError(f"scale must be 'paper' or 'unit', got {self.scale!r}")

    def __call__(self, student_logits: Logits, teacher_logits: Logits) -> PerToken:
        _check_shapes(student_logits, teacher_logits)
        divergence: PerToken = _jsd(student_logits, teacher_logits, self.beta)
        return divergence / (self.beta * (1 - self.beta)) if self.scale == "unit" else divergence


def jsd(
    student_logits: Logits | None = None,
    teacher_logits: Logits | None = None,
    *,
    beta: float = 0.5,
    scale: str = "paper",
) -> Any:
    """Returns the generalized Jensen-Shannon divergence of each token, or the divergence itself.

    `JSD` says what beta and scale are.

    Returns:
        One number per token, in nats. Without logits, the callable `JSD(beta=beta, scale=scale)`.

    Raises:
        ValueError: for beta outside (0, 1) or another scale.
    """
    divergence = JSD(beta=beta, scale=scale)
    if student_logits is None or teacher_logits is None:
        return divergence
    return divergence(student_logits, teacher_logits)


def as_value(divergence: Any) -> Any:
    """Returns a divergence with settings as a value that shows them when it is printed.

    For `@divergences.NAME` gin gives a class or the function `jsd`, either of which makes such a
    value when it is called without logits. Any other divergence is returned as it is.
    """
    function = inspect.unwrap(getattr(divergence, "func", divergence))
    makes_value = isinstance(function, type) or function is inspect.unwrap(jsd)
    return divergence() if makes_value else divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _jsd(student_logits: Logits, teacher_logits: Logits, beta: float) -> PerToken:
    return _jsd_forward(student_logits, teacher_logits, beta)[0]


def _jsd_forward(student_logits, teacher_logits, beta):
    logits = student_logits, teacher_logits
    normalizers = tuple(map(_normalizer, logits))
    log_q, log_p = map(_normalized, logits, normalizers)
    p_over_m, q_over_m = _log_ratios_to_mixture(log_q, log_p, beta)
    kl_p = jnp.sum(jnp.exp(log_p) * p_over_m, axis=-1)
    kl_q = jnp.sum(jnp.exp(log_q) * q_over_m, axis=-1)
    return beta * kl_p + (1 - beta) * kl_q, (logits, normalizers, (kl_q, kl_p))


def _jsd_backward(beta, kept, cotangent):
    """Returns the gradients of both logits in one pass over the vocabulary.

    The gradient of Q's logits is (1 - beta) Q (log(Q / M) - KL(Q || M)), and that of P's is
    analogous; the terms that come from M cancel. JAX's own gradient of the forward pass would take
    several passes.
    """
    logits, normalizers, (kl_q, kl_p) = kept
    log_q, log_p = map(_normalized, logits, normalizers)
    p_over_m, q_over_m = _log_ratios_to_mixture(log_q, log_p, beta)

    def gradient(weight, log_probs, over_m, kl, like):
        scale = (cotangent * weight)[..., None]
        return (scale * jnp.exp(log_probs) * (over_m - kl[..., None])).astype(like.dtype)

    return (
        gradient(1 - beta, log_q, q_over_m, kl_q, logits[0]),
        gradient(beta, log_p, p_over_m, kl_p, logits[1]),
    )


_jsd.defvjp(_jsd_forward, _jsd_backward)


def _log_ratios_to_mixture(log_q: Logits, log_p: Logits, beta: float) -> tuple[Logits, Logits]:
    """Returns (log(P / M), log(Q / M)).

    The formulas use log1p and expm1, which makes them accurate where P and Q are close, and 0 where
    P and Q are equal. They contain no `jnp.where`, because XLA on CPU does not vectorise a sum over
    one. The second ratio is not computed as expm1(-log(Q / P)), because the XLA of jaxlib 0.10.2
    miscompiles this.
    """

    def log_ratio(log_a, log_b):
        """Returns log(A / B), clipped to exponents that float32 can represent.

        Where the clipping changes the ratio, A or B is practically 0.
        """
        ratio = jnp.maximum(log_a, _IMPOSSIBLE) - jnp.maximum(log_b, _IMPOSSIBLE)
        return jnp.clip(ratio, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)

    return (
        -jnp.log1p((1 - beta) * jnp.expm1(log_ratio(log_q, log_p))),
        -jnp.log1p(beta * jnp.expm1(log_ratio(log_p, log_q))),
    )


def total_variation(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """Returns the total variation distance of each token: half the L1 distance of P and Q.

    The distance lies in [0, 1]. It is f-distill's divergence (Wen et al., 2023).
    """
    _check_shapes(student_logits, teacher_logits)
    q, p = (jnp.exp(_log_softmax(x)) for x in (student_logits, teacher_logits))
    difference = p - q
    # The gradient takes the sign of each difference, and rounding noise has a sign too. So a
    # difference no larger than rounding noise counts as 0.
    noise = jnp.abs(difference) <= 4 * jnp.finfo(p.dtype).eps * (p + q)
    return 0.5 * jnp.sum(jnp.where(noise, 0.0, jnp.abs(difference)), axis=-1)


# A stored teacher ---------------------------------------------------------------------------------
# A teacher that `gkd_jax.input.teacher_cache` stored has its k most probable ids at each position,
# and the probability mass of all other ids. A divergence from it compares these k + 1 outcomes. It
# is at least 0 and at most the divergence of the whole distributions, because merging outcomes
# cannot increase a divergence; for k = V both are equal. Axes: T target, k ids, K outcomes.


def top_k(logits: Float[Array, "B T V"], k: int) -> TopK:
    """Returns the k most probable ids at each position and the log mass of all other ids."""
    log_probs = jax.nn.log_softmax(logits)
    values, ids = jax.lax.top_k(log_probs, k)
    return TopK(ids, values, _log_mass_without(log_probs, ids))


def outcomes(
    student_logits: Float[Array, "B T V"], teacher: TopK
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Returns the student's and the teacher's log-probabilities of the same K outcomes.

    The outcomes are the teacher's k ids and, unless k = V, one outcome for all other ids. Any
    divergence accepts the results as logits.
    """
    log_q = jax.nn.log_softmax(student_logits)
    picked = jnp.take_along_axis(log_q, teacher.ids, axis=-1)
    if teacher.ids.shape[-1] == log_q.shape[-1]:
        return picked, teacher.log_probs
    rest = _log_mass_without(log_q, teacher.ids)
    return (
        jnp.concatenate([picked, rest[..., None]], axis=-1),
        jnp.concatenate([teacher.log_probs, teacher.tails[..., None]], axis=-1),
    )


def _log_mass_without(log_probs: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the log of the total probability of the ids that are not in `ids`.

    The probabilities of the other ids are summed directly, because log(1 - mass of `ids`) has a
    large rounding error if that mass is close to 1.
    """
    # `vmap` scatters within each position. For one scatter over all positions, the compiler would
    # gather the indices on every device.
    without = jax.vmap(jax.vmap(lambda row, picked: row.at[picked].set(-jnp.inf)))
    return jax.nn.logsumexp(without(log_probs, ids), axis=-1)


def _check_shapes(student_logits: Any, teacher_logits: Any) -> None:
    """Raises ValueError unless both have one shape: broadcasting would compare other tokens."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "the student's and the teacher's logits must have the same shape, got "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )


def _log_softmax(logits: Logits) -> Logits:
    return jax.nn.log_softmax(_at_least_float32(logits))


def _normalizer(logits: Logits) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """Returns what `jax.nn.log_softmax` subtracts: the largest logit, then the log of the sum."""
    logits = _at_least_float32(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return largest, jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))


def _normalized(logits: Logits, normalizer: tuple[jax.Array, jax.Array]) -> Logits:
    return _at_least_float32(logits) - normalizer[0] - normalizer[1]


def _at_least_float32(logits: Logits) -> Logits:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _kl(log_p: Logits, log_q: Logits) -> PerToken:
    """Returns KL(P || Q). Where log P = -inf, the term is 0 and so is its gradient."""
    possible = log_p != -jnp.inf  # this is true for NaN, so that NaN reaches the sum
    safe_p = jnp.where(possible, log_p, 0.0)
    floored = jnp.where(log_q != -jnp.inf, log_q, _IMPOSSIBLE)  # no gradient where it is -inf
    safe_q = jnp.where(possible, floored, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(safe_p) * (safe_p - safe_q), 0.0), axis=-1)
