"""`Batch`, on which every step works: token ids of inputs and targets, and the targets' weights.

Axes: B batch, S source length, T target length, R length of the teacher's own prompts, k most
probable ids.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int


class TopK(NamedTuple):
    """The most probable ids at each target position, with their probabilities.

    Attributes:
        ids: the k most probable ids.
        log_probs: the log-probabilities of these ids, in nats.
        tails: the log of the total probability of all other ids, in nats.
    """

    ids: Int[Any, "B T k"]
    log_probs: Float[Any, "B T k"]
    tails: Float[Any, "B T"]


class Batch(NamedTuple):
    """One global batch, of JAX or NumPy arrays.

    Inputs are padded on the right. An encoder-decoder's inputs are padded with id 0, which the
    encoder masks. A decoder-only model's inputs may be padded with any id, because `input_lengths`
    says how many tokens are text. Targets are masked by `weights` alone: a student can sample any
    id, so an id does not tell where a sequence ends.

    Attributes:
        inputs: the ids of the prompts. A T5's prompts end in EOS.
        targets: the ids of the targets, which end in EOS unless they are truncated.
        weights: 1.0 where a target token counts (EOS included), 0.0 elsewhere.
        teacher_scores: what `teacher_cache` stored of the teacher for these targets; None without.
        input_lengths: the number of tokens of each prompt. An encoder-decoder may do without, and
            then counts the ids other than 0.
        teacher_inputs: prompts that the teacher reads instead of `inputs`, padded in the same way;
            None if the teacher reads `inputs`.
        teacher_input_lengths: the number of tokens of each prompt in `teacher_inputs`.
    """

    inputs: Int[Any, "B S"]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    teacher_scores: TopK | None = None
    input_lengths: Int[Any, " B"] | None = None
    teacher_inputs: Int[Any, "B R"] | None = None
    teacher_input_lengths: Int[Any, " B"] | None = None

    def as_teacher_reads(self) -> "Batch":
        """Returns the batch with the teacher's own prompts as its inputs, if there are any."""
        if self.teacher_inputs is None:
            return self
        return self._replace(
            inputs=self.teacher_inputs,
            input_lengths=self.teacher_input_lengths,
            teacher_inputs=None,
            teacher_input_lengths=None,
        )
