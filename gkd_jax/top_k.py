"""The k most probable ids of a teacher, and the outcomes that a divergence from them compares.

A stored teacher (`gkd_jax.input.teacher_cache`) has its k most probable ids at each position, and
the probability mass of all other ids. The divergence is computed over these k + 1 outcomes. It is
at least 0 and at most the divergence of the whole distributions, because merging outcomes cannot
increase a divergence; for k = V both are equal.

Axes: B batch, T target, V vocabulary, k most probable ids, K outcomes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gkd_jax.batch import TopK


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
