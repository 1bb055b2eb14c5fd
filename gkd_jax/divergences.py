"""Per-token divergences between a teacher's and a student's next-token distributions.

Every function maps `(student_logits, teacher_logits)` to one non-negative number per token, in
nats. `P` is the teacher and `Q` the student throughout, as in Agarwal et al. (2024), section 2.
They compute in float32, or in float64 where the logits are, and take logits of -inf (ids that
cannot occur): what has probability 0 under the weighting distribution contributes nothing, an id
that only the other distribution excludes costs 1e4 nats times its probability where the KL itself
would be infinite, and gradients are always finite.

Axes: B any leading axes, V vocabulary.
"""

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


def jsd(
    student_logits: Logits, teacher_logits: Logits, *, beta: float = 0.5, scale: str = "paper"
) -> PerToken:
    """Generalized Jensen-Shannon divergence, the paper's Eq. 1.

    beta KL(P || M) + (1 - beta) KL(Q || M), with M = beta P + (1 - beta) Q. As beta -> 0 it tends
    to beta KL(P || Q), as beta -> 1 to (1 - beta) KL(Q || P): its gradients at 0.1 and 0.9 are 10
    to 20 times smaller than those of the KLs.

    Args:
        student_logits: Q's.
        teacher_logits: P's.
        beta: the weight of the teacher, strictly between 0 and 1.
        scale: "paper", or "unit", which divides by beta (1 - beta) so that both limits are the KLs.

    Raises:
        ValueError: for beta outside (0, 1) or another scale.
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, got {beta}; the limits at 0 and 1 are "
            "forward_kl and reverse_kl"
        )
    if scale not in ("paper", "unit"):
        raise ValueError(f"scale must be 'paper' or 'unit', got {scale!r}")
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    possible = (log_p != -jnp.inf) | (log_q != -jnp.inf)

    def log_ratio(log_a, log_b):
        """log(A / B), within what float32 can exponentiate: beyond it, A or B is 0 anyway."""
        ratio = jnp.where(possible, _floor(log_a) - _floor(log_b), 0.0)
        return jnp.clip(ratio, -_LARGEST_EXPONENT, _LARGEST_EXPONENT)

    # log(M / P) and log(M / Q) by log1p and expm1: exact where P and Q are close, 0 where equal.
    # Not expm1(-log(Q / P)) in the second: XLA of jaxlib 0.10.2 miscompiles that on CPU.
    log_m_over_p = jnp.log1p((1 - beta) * jnp.expm1(log_ratio(log_q, log_p)))
    log_m_over_q = jnp.log1p(beta * jnp.expm1(log_ratio(log_p, log_q)))
    terms = beta * jnp.exp(log_p) * log_m_over_p + (1 - beta) * jnp.exp(log_q) * log_m_over_q
    divergence = -jnp.sum(terms, axis=-1)
    return divergence / (beta * (1 - beta)) if scale == "unit" else divergence


def total_variation(student_logits: Logits, teacher_logits: Logits) -> PerToken:
    """Half the L1 distance of P and Q, in [0, 1]: f-distill's divergence (Wen et al., 2023)."""
    q, p = (jnp.exp(_log_softmax(x)) for x in (student_logits, teacher_logits))
    difference = p - q
    # Rounding noise has a sign too, and the gradient is made of signs: equal means no difference.
    noise = jnp.abs(difference) <= 4 * jnp.finfo(p.dtype).eps * (p + q)
    return 0.5 * jnp.sum(jnp.where(noise, 0.0, jnp.abs(difference)), axis=-1)


def _log_softmax(logits: Logits) -> Logits:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def _kl(log_p: Logits, log_q: Logits) -> PerToken:
    """KL(P || Q). Where P = 0 the term is 0, and so is its gradient, even for log_p = -inf."""
    possible = log_p != -jnp.inf  # true of NaN, which must not be lost
    safe_p = jnp.where(possible, log_p, 0.0)
    safe_q = jnp.where(possible, _floor(log_q), 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(safe_p) * (safe_p - safe_q), 0.0), axis=-1)


def _floor(log_p: Logits) -> Logits:
    """Log-probabilities with -inf replaced by a finite number, through which no gradient flows."""
    return jnp.where(log_p != -jnp.inf, log_p, _IMPOSSIBLE)
