"""The sizes of vocabularies that are known by name.

Code that only needs the shapes of a model finds the size of the vocabulary here, without importing
TensorFlow and without the files of the vocabulary.
"""

import pathlib
from typing import Any


ARITHMETIC_LARGEST = 99
_WORDS = (
    ". ? + - * = The answer is has more How many are there now "
    "gets finds buys wins gives away loses sells drops doubles triples the number of "
    "Ada Ben Cleo Dan Eve Finn Gus Ivy "
    "apples books coins eggs pens shells stamps stones"
)
ARITHMETIC_WORDS: tuple[str, ...] = (*_WORDS.split(), *map(str, range(ARITHMETIC_LARGEST + 1)))
_SPECIAL = 3  # The ids for padding, the end of a text and unknown words.
_BYTES = 256
_T5 = 32_100


def num_pieces(vocabulary: str | None, extra_ids: int, task: str) -> int | None:
    """Returns the number of ids of a vocabulary; None if it is not known without TensorFlow.

    Args:
        vocabulary: a name or path that `vocabularies.load` accepts; None is the vocabulary of the
            task.
        extra_ids: the number of sentinel ids after the pieces.
    """
    if vocabulary is None and task == "arithmetic":
        vocabulary = "arithmetic"
    if vocabulary == "arithmetic":
        return _SPECIAL + len(ARITHMETIC_WORDS)
    if vocabulary == "bytes":
        return _SPECIAL + _BYTES + extra_ids
    if vocabulary == "t5":
        return _T5
    if vocabulary is not None and vocabulary.endswith(".model"):
        import sentencepiece

        if pathlib.Path(vocabulary).is_file():
            model: Any = sentencepiece.SentencePieceProcessor()
            model.Load(vocabulary)
            return model.get_piece_size() + extra_ids
    return None
