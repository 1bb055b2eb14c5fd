"""Per-token divergences between a teacher's and a student's next-token distributions.

Every function maps `(student_logits, teacher_logits)` to one non-negative number per token, in
nats. `P` is the teacher and `Q` the student throughout, as in Agarwal et al. (2024), section 2.
They compute in float32, or in float64 where the logits are, and take logits of -inf (ids that
cannot occur): what has probability 0 under the weighting distribution contributes nothing, an id
that only the other distribution excludes costs 1e4 nats times its probability where the KL itself
would be infinite, and gradients are always finite.

Axes: B any leading axes, V vocabulary.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


Logits = Float[Array, "*B V"]
PerToken = Float[Array, "*B"]
_IMPOSSIBLE = (
    -1e4
)  # stands for log 0 where a KL would be infinite: a large penalty, finite gradient
_LARGEST_EXPONENT = 80.0  # exp(80) is finite in float32, exp(-80) a normal number


def forward_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """KL(P || Q), teacher first and mode-covering: the classic distillation loss."""
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return _kl(log_p, log_q)


def reverse_kl(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """KL(Q || P), student first and mode-seeking."""
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    return _kl(log_q, log_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JSD:
    """Generalized Jensen-Shannon divergence, the paper's Eq. 1, as a value that can be called.

    beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q. As beta -> 0 it tends
    to beta KL(P || Q), as beta -> 1 to (1 - beta) KL(Q || P): its gradients at 0.1 and 0.9 are 10
    to 20 times smaller than those of the KLs.

    Attributes:
        beta: the weight of the teacher, strictly between 0 and 1.
        scale: "paper", or "unit", which divides by beta (1 - beta) so that both limits are the KLs.
    """

    beta: float = 0.5
    scale: str = "paper"

    def __post_init__(self):
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}; the limits at 0 and 1 "
                "are forward_kl and reverse_kl"
            )
        if self.scale not in ("paper", "unit"):
            raise ValueError(f"scale must be 'paper' or 'unit', got {self.scale!r}")

    def __call__(self, student_logits: Logits, teacher_logits: Logits) -> PerToken:
        divergence: PerToken = _jsd(student_logits, teacher_logits, self.beta)
        return divergence / (self.beta * (1 - self.beta)) if self.scale == "unit" else divergence


def jsd(
    student_logits: Logits | None = None,
    teacher_logits: Logits | None = None,
    *,
    beta: float = 0.5,
    scale: str = "paper",
) -> Any:
    """Generalized Jensen-Shannon divergence of each token; see `JSD` for beta and scale.

    Args:
        student_logits: Q's.
        teacher_logits: P's.
        beta: the weight of the teacher, strictly between 0 and 1.
        scale: "paper" or "unit".

    Returns:
        One number a token, in nats. Without logits, the divergence itself: `JSD(beta, scale)`.

    Raises:
        ValueError: for beta outside (0, 1) or another scale.
    """
    divergence = JSD(beta=beta, scale=scale)
    if student_logits is None or teacher_logits is None:
        return divergence
    return divergence(student_logits, teacher_logits)


def as_value(divergence: Any) -> Any:
    """`jsd` with the settings that gin or `functools.partial` gives it, as a `JSD` that shows them.

    Any other divergence is returned as it is.
    """
    function = inspect.unwrap(getattr(divergence, "func", divergence))
    return divergence() if function is inspect.unwrap(jsd) else divergence


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
    """d/dlogit of Q = (1 - beta) Q (log(Q / M) - KL(Q || M)), and alike for P: what comes through M
    itself cancels. One pass over the logits, where differentiating the forward pass takes several.
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
    """(log(P / M), log(Q / M)), by log1p and expm1: exact where P and Q are close, 0 where equal.

    Without a select: XLA does not vectorise a sum over one on CPU. Not expm1(-log(Q / P)) in the
    second: XLA of jaxlib 0.10.2 miscompiles that there.
    """

    def log_ratio(log_a, log_b):
        """log(A / B), within what float32 can exponentiate: beyond it, A or B is 0 anyway."""
        ratio = jnp.maximum(log_a, _IMPOSSIBLE) - jnp.maximum(log_b, _IMPOSSIBLE)
        return jnp.clip(ratio, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)

    return (
        -jnp.log1p((1 - beta) * jnp.expm1(log_ratio(log_q, log_p))),
        -jnp.log1p(beta * jnp.expm1(log_ratio(log_p, log_q))),
    )


def total_variation(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """Half the L1 distance of P and Q, in [0, 1]: f-distill's divergence (Wen et al., 2023)."""
    q, p = (jnp.exp(_log_softmax(x)) for x in (student_logits, teacher_logits))
    difference = p - q
    # Rounding noise has a sign too, and the gradient is made of signs: equal means no difference.
    noise = jnp.abs(difference) <= 4 * jnp.finfo(p.dtype).eps * (p + q)
    return 0.5 * jnp.sum(jnp.where(noise, 0.0, jnp.abs(difference)), axis=-1)


def _log_softmax(logits: Logits) -> Logits:
    return jax.nn.log_softmax(_at_least_float32(logits))


def _normalizer(logits: Logits) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """The two numbers a row that `jax.nn.log_softmax` subtracts, the largest logit first."""
    logits = _at_least_float32(logits)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return largest, jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True))


def _normalized(logits: Logits, normalizer: tuple[jax.Array, jax.Array]) -> Logits:
    return _at_least_float32(logits) - normalizer[0] - normalizer[1]


def _at_least_float32(logits: Logits) -> Logits:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _kl(log_p: Logits, log_q: Logits) -> PerToken:
    """KL(P || Q). Where P = 0 the term is 0, and so is its gradient, even for log_p = -inf."""
    possible = log_p != -jnp.inf  # true of NaN, which must not be lost
    safe_p = jnp.where(possible, log_p, 0.0)
    safe_q = jnp.where(possible, _floor(log_q), 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(safe_p) * (safe_p - safe_q), 0.0), axis=-1)


def _floor(log_p: Logits) -> Logits:
    """Log-probabilities with -inf replaced by a finite number, through which no gradient flows."""
    return jnp.where(log_p != -jnp.inf, log_p, _IMPOSSIBLE)
