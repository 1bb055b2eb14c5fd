"""The unit of work of every step: token ids of inputs and targets, and the loss weights of targets.

Axes: B batch, S source length, T target length, R length of the teacher's own prompts, k.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int


class TopK(NamedTuple):
    """The most probable ids at each target position, and what the others have together.

    Attributes:
        ids: k different ids.
        log_probs: theirs, nats.
        tails: log of the mass of all other ids, nats.
    """

    ids: Int[Any, "B T k"]
    log_probs: Float[Any, "B T k"]
    tails: Float[Any, "B T"]


class Batch(NamedTuple):
    """One global batch, of JAX or NumPy arrays.

    Inputs are padded on the right: an encoder-decoder's with id 0, which the encoder masks; a
    decoder-only model's with any id, and `input_lengths` says how many tokens are text. Targets are
    masked by `weights` alone: a student can emit any id, so `targets > 0` says nothing about where
    a sequence ends.

    Attributes:
        inputs: source token ids, ending in EOS, padded with 0.
        targets: target token ids, ending in EOS unless truncated.
        weights: 1.0 where a target token counts (EOS included), 0.0 elsewhere.
        teacher: its scores of these targets where they come from a cache (`teacher_cache`).
        input_lengths: tokens of each prompt; an encoder-decoder may do without (ids != 0 count).
        teacher_inputs: prompts that the teacher reads instead of `inputs`, padded in the same way;
            None if the teacher reads `inputs`.
        teacher_input_lengths: the number of tokens of each prompt in `teacher_inputs`.
    """

    inputs: Int[Any, "B S"]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    teacher: TopK | None = None
    input_lengths: Int[Any, " B"] | None = None
    teacher_inputs: Int[Any, "B R"] | None = None
    teacher_input_lengths: Int[Any, " B"] | None = None

    def as_teacher_reads(self) -> "Batch":
        """Returns the same targets behind the teacher's own prompts, where it has any."""
        if self.teacher_inputs is None:
            return self
        return self._replace(
            inputs=self.teacher_inputs,
            input_lengths=self.teacher_input_lengths,
            teacher_inputs=None,
            teacher_input_lengths=None,
        )
