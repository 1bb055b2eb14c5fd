"""Whether two models' tokenizers agree, so that one can learn from the other's probabilities."""

import seqio

from gkd_jax.text import vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


def shared_pieces(
    student: seqio.Vocabulary, teacher: seqio.Vocabulary, *, student_name: str, teacher_name: str
) -> int:
    """How many ids, from 0, mean the same to both: over these a student learns from a teacher.

    Two tokenizers agree if all that decides ids is equal, or if one has further tokens after all
    of the other's. The rows of an embedding say nothing: 151,936 and 152,064 rows of two sizes of
    one family go with the same 151,665 tokens.

    Args:
        student, teacher: vocabularies.
        student_name, teacher_name: of the models, for the message.

    Returns:
        The number of pieces of the smaller one.

    Raises:
        ValueError: if the two differ, naming the first id that does and what works instead.
    """
    if vocabularies.content_hash(student) == vocabularies.content_hash(teacher):
        return len(vocabularies.pieces(student))
    ours, theirs = (_comparable(vocabulary) for vocabulary in (student, teacher))
    shared = min(len(ours), len(theirs))
    differs = next((i for i in range(shared) if ours[i] != theirs[i]), None)
    if differs is None and _same_rules(student, teacher):
        return shared
    where = (
        "the same tokens, which they make differently (merges, normalizer or pre-tokenizer)"
        if differs is None
        else f"id {differs} is {ours[differs]!r} to the one and {theirs[differs]!r} to the other"
    )
    raise ValueError(
        f"the student {student_name!r} and the teacher {teacher_name!r} have different tokenizers: "
        f"{where}. Their probabilities cannot be compared token by token. SeqKD works: let the "
        "teacher write the targets (gkd-jax infer --gin_file=gin/infer.gin) and train the student "
        "on them (gin/seqkd.gin)"
    )


def _comparable(vocabulary: seqio.Vocabulary) -> list[str]:
    return [piece.replace("▁<extra_id_", "<extra_id_") for piece in vocabularies.pieces(vocabulary)]


def _same_rules(one: seqio.Vocabulary, other: seqio.Vocabulary) -> bool:
    """Whether tokens apart, two tokenizers make ids in the same way."""
    rules = [
        vocabulary.rules if isinstance(vocabulary, TokenizerVocabulary) else "unigram"
        for vocabulary in (one, other)
    ]
    return rules[0] == rules[1]
