"""Checks which known traps of on-policy distillation an implementation falls into.

    python -m gkd_jax.conformance                    # this package
    python -m gkd_jax.conformance module:attribute   # any object with some of the functions below

Arguments and results are NumPy arrays. Logits at t predict `targets[:, t]`. Id 0 is pad and the
decoder's start token, id 1 is EOS. beta is the paper's; 0 stands for KL(P || Q) and 1 for
KL(Q || P), and a function may refuse these two values with a ValueError. The traps of a missing
function are reported as "not checked".

    divergence(student_logits, teacher_logits, beta) -> per token
    divergence_and_gradient(student_logits, teacher_logits, beta) -> per token, d sum / d student
    tempered_divergence(student_logits, teacher_logits, beta, student_temperature,
        teacher_temperature) -> per token
    top_k_divergence(student_logits, teacher_logits, beta, k) -> per token
    loss(student_logits, teacher_logits, targets, weights, beta) -> number
    loss_and_gradients(student_logits, teacher_logits, targets, weights, beta, num_microbatches)
        -> number, d / d student_logits, d / d teacher_logits or None
    fused_loss_and_gradients(student_states, student_head, teacher_states, teacher_head, weights,
        beta) -> number, d / d student_states, d / d student_head     (logits = states @ head.T)
    reduction = "sequence_mean" (Eq. 2, the default) or "token_mean"
    target_weights(tokens, eos_id, pad_id) -> weights
    decoder_inputs(targets) -> tokens
    teacher_forced_logits(inputs, targets) -> logits of the implementation's own student, 16 ids
        or more
    cached_logits(inputs, targets) -> the same logits, decoded one token at a time
    sample(inputs, seed, step) -> tokens, weights drawn from that student
    is_on_policy(seed, step, on_policy_fraction) -> bool
    policy_gradient(student_log_probs, teacher_log_probs, weights) -> d / d student_log_probs
    configure_sft(on_policy_fraction) -> nothing; raises if cross-entropy would be trained on the
        student's own samples
    check_vocabularies(student_pieces, teacher_pieces) -> nothing; raises if the vocabularies differ
    sample_statistics(tokens, weights) -> {"length", "truncated_fraction", "distinct_2"}

Axes: B batch, S source, T target, V vocabulary, D model.
"""

from typing import Any, NamedTuple

from gkd_jax.conformance.checks import CHECKS, TITLES
from gkd_jax.conformance.references import Measurement
from gkd_jax.conformance.target import NotGivenError, Target


class Verdict(NamedTuple):
    """The result for one trap."""

    trap: str  # its key in `TITLES`
    status: str  # "pass", "falls into it" or "not checked"
    measurements: list[Measurement]
    missing: list[str]  # the functions that checks of this trap need and that are missing


def run(implementation: Any) -> list[Verdict]:
    """Checks every trap for which the implementation has the functions.

    Args:
        implementation: an object with some of the functions in this module's docstring.
    """
    target = Target(implementation)
    verdicts = []
    for trap in TITLES:
        measurements: list[Measurement] = []
        missing: list[str] = []
        for check in (check for name, check in CHECKS if name == trap):
            try:
                measurements.extend(check(target))
            except NotGivenError as error:
                missing.append(str(error))
            except Exception as error:
                what = f"{check.__name__.strip('_')} ended in {type(error).__name__}"
                measurements.append(Measurement(what, str(error).split("\n")[0], "a result", False))
        status = "pass" if measurements else "not checked"
        if not all(measurement.holds for measurement in measurements):
            status = "falls into it"
        verdicts.append(Verdict(trap, status, measurements, missing))
    return verdicts


def render(verdicts: list[Verdict]) -> str:
    """Returns a report as text.

    The report has a line for each trap. Below this line follow every comparison that does not hold
    (or, if all hold, the first comparison) and the names of missing functions.
    """
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.trap:4}{verdict.status:15}{TITLES[verdict.trap]}")
        failed = [measurement for measurement in verdict.measurements if not measurement.holds]
        for what, found, expected, _ in failed or verdict.measurements[:1]:
            lines.append(f"{'':19}{what}: found {found}, expected {expected}")
        if verdict.missing:
            lines.append(f"{'':19}not given: {', '.join(dict.fromkeys(verdict.missing))}")
    counts = {
        status: sum(verdict.status == status for verdict in verdicts)
        for status in ("pass", "falls into it", "not checked")
    }
    return "\n".join([*lines, ", ".join(f"{status}: {num}" for status, num in counts.items())])
