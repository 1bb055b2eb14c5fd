"""A vocabulary of whole words, as a seqio vocabulary; the task `arithmetic` has one."""

from collections.abc import Iterable, Sequence
import functools
import re

import seqio
import tensorflow as tf


PAD_ID, EOS_ID, UNK_ID = 0, 1, 2  # the same ids as T5's


class WordVocabulary(seqio.Vocabulary):
    """A vocabulary of whole words and numbers; `.`, `?` and `,` are words of their own.

    The id of pad is 0, of EOS 1 and of unknown words 2; the words follow in their order. Decoding
    leaves out pad and EOS, joins the words by spaces and removes the space before punctuation.
    """

    def __init__(self, words: Sequence[str]):
        super().__init__(extra_ids=0)
        if len(set(words)) != len(words):
            repeated = sorted({word for word in words if list(words).count(word) > 1})
            raise ValueError(f"words must differ from each other, got {repeated} more than once")
        self.pieces = ("<pad>", "</s>", "<unk>", *words)
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i > UNK_ID}

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int | None:
        return EOS_ID

    @property
    def unk_id(self) -> int | None:
        return UNK_ID

    @property
    def _base_vocab_size(self) -> int:
        return len(self.pieces)

    def _encode(self, s: str | bytes) -> Sequence[int]:
        text = s.decode() if isinstance(s, bytes) else s
        words = re.sub(r"([.,?])", r" \1 ", text).split()
        return [self._ids.get(word, UNK_ID) for word in words]

    def _decode(self, ids: Iterable[int]) -> str:
        text = " ".join(self.pieces[i] for i in ids if i not in (PAD_ID, EOS_ID))
        return re.sub(r" ([.,?])", r"\1", text)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Returns the ids of a text, or the ragged rows of ids of a vector of texts."""
        words = tf.strings.split(tf.strings.regex_replace(s, r"([.,?])", r" \1 "))
        return self._table.lookup(words)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        kept = tf.ragged.boolean_mask(ids, (ids != PAD_ID) & (ids != EOS_ID))
        words = tf.gather(tf.constant(self.pieces), kept)
        text = tf.strings.reduce_join(words, axis=-1, separator=" ")
        return tf.strings.regex_replace(text, r" ([.,?])", r"\1")

    @functools.cached_property
    def _table(self) -> tf.lookup.StaticHashTable:
        # The first use is in a dataset's map function. The table must not be part of that
        # function's graph, because other graphs use the table too.
        with tf.init_scope():
            return tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(
                    list(self._ids), list(self._ids.values()), tf.string, tf.int32
                ),
                default_value=UNK_ID,
            )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)
