"""Vocabularies of tasks and models: SentencePiece files, bytes, and the words of `arithmetic`."""

from collections.abc import Iterable, Sequence
import hashlib
import io
import os
import pathlib
import re

import sentencepiece
import seqio
import tensorflow as tf

from gkd_jax.text import files


T5_PATH = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"
T5_EXTRA_IDS = 100

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

ARITHMETIC_LARGEST = 99
_ARITHMETIC_WORDS = (
    ". ? + - * = The answer is has more How many are there now "
    "gets finds buys wins gives away loses sells drops doubles triples the number of "
    "Ada Ben Cleo Dan Eve Finn Gus Ivy "
    "apples books coins eggs pens shells stamps stones"
)


def load(spec: str, *, extra_ids: int = 0, check_remote: bool = True) -> seqio.Vocabulary:
    """The vocabulary that a gin file or flag names.

    Args:
        spec: "bytes" (ByT5's 256 bytes), "arithmetic" (the words of that task), "t5" (T5's public
            32,000 pieces with 100 extra ids) or the path of a SentencePiece `.model` file, also
            `gs://`.
        extra_ids: sentinels after the pieces: 100 for T5's file. Not for "arithmetic" and "t5".
        check_remote: False leaves `gs://` and other remote paths untouched.

    Raises:
        ValueError: if extra_ids do not fit the spec; if the file is no SentencePiece model.
        FileNotFoundError: naming the path, if it does not exist or cannot be reached.
    """
    if not isinstance(extra_ids, int) or extra_ids < 0:
        raise ValueError(f"extra_ids must be 0 or a positive integer, got {extra_ids!r}")
    if spec == "bytes":
        return seqio.ByteVocabulary(extra_ids=extra_ids)
    if spec == "arithmetic":
        if extra_ids:
            raise ValueError(f"the vocabulary 'arithmetic' has no extra_ids, got {extra_ids}")
        return arithmetic()
    if spec == "t5":
        if extra_ids not in (0, T5_EXTRA_IDS):
            raise ValueError(f"the vocabulary 't5' has {T5_EXTRA_IDS} extra_ids, got {extra_ids}")
        vocabulary = t5_default()
    else:
        vocabulary = seqio.SentencePieceVocabulary(spec, extra_ids=extra_ids)
    check_readable(vocabulary, check_remote=check_remote)
    return vocabulary


def t5_default() -> seqio.SentencePieceVocabulary:
    """T5's public vocabulary: 32,000 pieces and 100 extra ids. Read when first used, not here."""
    return seqio.SentencePieceVocabulary(T5_PATH, extra_ids=T5_EXTRA_IDS)


def check_readable(vocabulary: seqio.Vocabulary, *, check_remote: bool = True) -> None:
    """Checks the file of a SentencePiece vocabulary, which seqio opens only when first used.

    Args:
        vocabulary: any vocabulary; those without a file pass.
        check_remote: False leaves `gs://` and other remote paths untouched.

    Raises:
        FileNotFoundError: naming the path, if it does not exist or cannot be reached.
        ValueError: naming the path, if it is no SentencePiece model (a Git LFS pointer, say).
    """
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return
    path = vocabulary.sentencepiece_model_file
    remote = "://" in path
    if remote and not check_remote:
        return
    try:
        found = tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)
    except (tf.errors.OpError, NotImplementedError) as error:
        raise FileNotFoundError(
            f"vocabulary {path!r} cannot be reached: {error}. A local copy can be named instead"
        ) from None
    if not found:
        hint = "" if remote else ", nor is it 'bytes', 'arithmetic' or 't5'"
        raise FileNotFoundError(f"vocabulary {path!r}: there is no such file{hint}")
    try:
        sentencepiece.SentencePieceProcessor(model_proto=files.read_bytes(path))
    except RuntimeError as error:
        files.fault(path, None, f"expected a SentencePiece model, got a file that is none: {error}")


def num_pieces(vocabulary: seqio.Vocabulary, *, check_remote: bool = True) -> int:
    """How many ids a vocabulary has, extra ids included.

    Args:
        vocabulary: any.
        check_remote: False leaves remote files untouched: of those only T5's size is known.

    Raises:
        ValueError: naming a remote file that may not be read.
    """
    path = getattr(vocabulary, "sentencepiece_model_file", "")
    if check_remote or "://" not in path:
        return vocabulary.vocab_size
    if path == T5_PATH:
        return 32_000 + vocabulary.extra_ids
    raise ValueError(
        f"vocabulary {path!r} is remote and is not read in a dry run: name a local copy"
    )


def pieces(vocabulary: seqio.Vocabulary) -> list[str]:
    """What each id means, in the order of ids.

    Raises:
        ValueError: for a kind of vocabulary that is not known here.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        model = vocabulary.tokenizer
        return list(model.id_to_piece(list(range(model.get_piece_size()))))
    if isinstance(vocabulary, seqio.ByteVocabulary):
        special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return special + [f"<extra_id_{i}>" for i in range(vocabulary.extra_ids)]
    if isinstance(vocabulary, WordVocabulary):
        return list(vocabulary.pieces)
    raise ValueError(
        "expected a SentencePieceVocabulary, ByteVocabulary or WordVocabulary, "
        f"got {type(vocabulary).__name__}"
    )


def content_hash(vocabulary: seqio.Vocabulary) -> str:
    """SHA-256 of the pieces: equal where every id means the same, whatever file it came from."""
    digest = hashlib.sha256()
    for piece in pieces(vocabulary):
        encoded = piece.encode()
        digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return digest.hexdigest()


class WordVocabulary(seqio.Vocabulary):
    """Whole words and numbers separated by spaces; `.`, `?` and `,` are words of their own.

    Ids: pad 0, EOS 1, unknown 2, then the words in their order. Decoding joins by spaces and puts
    punctuation back against the word before it; pad and EOS are left out.
    """

    def __init__(self, words: Sequence[str]):
        super().__init__(extra_ids=0)
        if len(set(words)) != len(words):
            repeated = sorted({word for word in words if list(words).count(word) > 1})
            raise ValueError(f"words must differ from each other, got {repeated} more than once")
        self.pieces = ("<pad>", "</s>", "<unk>", *words)
        self._ids = {piece: i for i, piece in enumerate(self.pieces) if i > UNK_ID}
        self._table: tf.lookup.StaticHashTable | None = None

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

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        words = tf.strings.split(tf.strings.regex_replace(s, r"([.,?])", r" \1 "))
        return self._lookup().lookup(words)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        kept = tf.ragged.boolean_mask(ids, (ids != PAD_ID) & (ids != EOS_ID))
        words = tf.gather(tf.constant(self.pieces), kept)
        text = tf.strings.reduce_join(words, axis=-1, separator=" ")
        return tf.strings.regex_replace(text, r" ([.,?])", r"\1")

    def _lookup(self) -> tf.lookup.StaticHashTable:
        if self._table is None:
            # Outside the graph of a dataset's map, where this is first called.
            with tf.init_scope():
                self._table = tf.lookup.StaticHashTable(
                    tf.lookup.KeyValueTensorInitializer(
                        list(self._ids), list(self._ids.values()), tf.string, tf.int32
                    ),
                    default_value=UNK_ID,
                )
        return self._table

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_table": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(self.pieces)


def arithmetic() -> WordVocabulary:
    """The words of the task `arithmetic`, with every number as one token."""
    return WordVocabulary([*_ARITHMETIC_WORDS.split(), *map(str, range(ARITHMETIC_LARGEST + 1))])


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int,
    character_coverage: float = 1.0,
) -> None:
    """Trains a SentencePiece unigram vocabulary and writes it.

    Ids as T5's: pad 0, EOS 1, unknown 2, no BOS. The same texts give the same file.

    Args:
        texts: one sentence each.
        path: the local `.model` file; written whole or not at all. Its folder is made.
        vocab_size: pieces, special ones included.
        character_coverage: share of the text's characters that get a piece.

    Raises:
        ValueError: if the texts cannot give that many pieces, there are none, or path is remote.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"path must be local, to be renamed into place; got {os.fspath(path)!r}")
    sentences = list(texts)
    if not sentences:
        raise ValueError("train_sentencepiece needs sentences, got none")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            byte_fallback=False,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"no vocabulary with vocab_size {vocab_size} from {len(sentences)} sentences: {error}"
        ) from None
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(target, model.getvalue())
