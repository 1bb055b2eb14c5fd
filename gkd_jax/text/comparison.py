"""Compares the tokenizers of a student and a teacher.

The divergence compares the probabilities of both models id by id, so an id must mean the same token
to both.
"""

import seqio

from gkd_jax.text import vocabularies
from gkd_jax.text.tokenizer_folder import comparable


def shared_pieces(
    student: seqio.Vocabulary, teacher: seqio.Vocabulary, *, student_name: str, teacher_name: str
) -> int:
    """Returns how many ids, counted from 0, mean the same token to a student and a teacher.

    The divergence is computed over these ids. Two tokenizers agree if they make ids in the same way
    and have the same tokens, where one of them may have further tokens at the end. The number of
    embedding rows is not compared: two sizes of one model family may have 151,936 and 152,064 rows
    for the same 151,665 tokens.

    Raises:
        ValueError: if the tokenizers do not agree. The message names the first id that differs and
            suggests SeqKD, which works with different tokenizers.
    """
    if vocabularies.content_hash(student) == vocabularies.content_hash(teacher):
        return len(vocabularies.pieces(student))
    ours, theirs = (comparable(vocabularies.pieces(one)) for one in (student, teacher))
    shared = min(len(ours), len(theirs))
    differs = next((i for i in range(shared) if ours[i] != theirs[i]), None)
    # Only a tokenizer of a folder has rules besides its pieces, and it may be unigram, too.
    rules = [getattr(vocabulary, "rules", "unigram") for vocabulary in (student, teacher)]
    if differs is None and rules[0] == rules[1]:
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
