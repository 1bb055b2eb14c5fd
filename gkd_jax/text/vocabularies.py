"""Loads the vocabularies of tasks and models, and answers questions about them.

A vocabulary is a Hugging Face folder, a SentencePiece file, ByT5's bytes, or the words of the task
`arithmetic`. All of them are `seqio.Vocabulary` objects.
"""

from collections.abc import Sequence
import hashlib
from itertools import takewhile
import os

import sentencepiece
import seqio
import tensorflow as tf

from gkd_jax.text import files, known_sizes, tokenizer_folder
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary
from gkd_jax.text.word_vocabulary import PAD_ID, WordVocabulary


T5_PATH = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"
T5_EXTRA_IDS = 100

SENTENCEPIECE_FILE = "spiece.model"  # of T5, mT5 and umT5
# The SentencePiece files of other families, which lack the tokens that tokenizer.json adds.
UNREAD_FILES = ("sentencepiece.model", "tokenizer.model")


class Unread(seqio.PassThroughVocabulary):
    """The vocabulary of a checkpoint that a dry run does not read. It turns no text into ids."""

    def __init__(self, checkpoint: str, size: int):
        """Takes the number of rows of the model's embedding, which is at least that of ids."""
        super().__init__(size)
        self.checkpoint = checkpoint


def load(spec: str, *, extra_ids: int = 0, check_remote: bool = True) -> seqio.Vocabulary:
    """Returns the vocabulary that a gin file or a flag names.

    Args:
        spec: "bytes" (ByT5's 256 bytes), "arithmetic" (the words of that task), "t5" (T5's public
            32,000 pieces with 100 extra ids), the path of a local or remote SentencePiece `.model`
            file, or the path of a Hugging Face folder or of its `tokenizer.json`.
        extra_ids: the number of sentinel ids after the pieces, 100 for T5's file. The vocabularies
            "arithmetic" and "t5" and folders have a fixed number of sentinel ids.
        check_remote: whether remote files may be read.

    Raises:
        ValueError: if `extra_ids` does not fit the vocabulary, or if a file is not valid.
        FileNotFoundError: if a file does not exist or cannot be reached; the message names it.
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
    elif (folder := folder_of(spec)) is not None:
        if extra_ids:
            raise ValueError(f"the folder {folder!r} has its own extra ids, got {extra_ids}")
        return of_folder(folder)
    else:
        vocabulary = seqio.SentencePieceVocabulary(spec, extra_ids=extra_ids)
    check_readable(vocabulary, check_remote=check_remote)
    return vocabulary


def t5_default() -> seqio.SentencePieceVocabulary:
    """Returns T5's public vocabulary of 32,000 pieces and 100 extra ids.

    The remote file is read when the vocabulary is first used.
    """
    return seqio.SentencePieceVocabulary(T5_PATH, extra_ids=T5_EXTRA_IDS)


def find_in_folder(path: str | os.PathLike) -> seqio.Vocabulary | None:
    """Returns the vocabulary of a Hugging Face folder; None if there is no tokenizer in it.

    If the folder has a `spiece.model` (T5), SentencePiece reads this file, and the folder's
    configuration states the number of extra ids. Otherwise the library tokenizers reads the
    folder's `tokenizer.json`. A ByT5 has neither file; its vocabulary is bytes.

    Raises:
        ValueError: if a file is not as expected; the message names the file.
    """
    folder = os.fspath(path)
    config = files.read_json_in(folder, tokenizer_folder.CONFIG_FILE)
    if _exists(folder, SENTENCEPIECE_FILE):
        vocabulary = seqio.SentencePieceVocabulary(
            os.path.join(folder, SENTENCEPIECE_FILE), extra_ids=_extra_ids(folder, config)
        )
        check_readable(vocabulary)
        return vocabulary
    if _exists(folder, tokenizer_folder.TOKENIZER_FILE):
        return TokenizerVocabulary(folder)
    if str(config.get("tokenizer_class", "")).startswith("ByT5"):
        return seqio.ByteVocabulary(extra_ids=config.get("extra_ids", 125))
    return None


def of_folder(path: str | os.PathLike) -> seqio.Vocabulary:
    """Returns the vocabulary of a Hugging Face folder, which must have a tokenizer.

    Raises:
        FileNotFoundError: if the folder has no tokenizer; the message names the expected files.
        ValueError: see `find_in_folder`.
    """
    found, folder = find_in_folder(path), os.fspath(path)
    if found is not None:
        return found
    other = [name for name in UNREAD_FILES if _exists(folder, name)]
    hint = (
        f": it has {other[0]}, which `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of "
        "transformers makes into one"
        if other
        else ""
    )
    raise FileNotFoundError(
        f"there is no tokenizer in {folder!r}, expected {tokenizer_folder.TOKENIZER_FILE} or "
        f"{SENTENCEPIECE_FILE}{hint}"
    )


def folder_of(spec: str) -> str | None:
    """Returns the folder that `spec` names, directly or by its tokenizer.json; None if neither."""
    if os.path.basename(spec) == tokenizer_folder.TOKENIZER_FILE:
        return os.path.dirname(spec) or "."
    if not files.is_remote(spec) and os.path.isdir(spec):
        return spec
    return None


def _exists(folder: str, name: str) -> bool:
    return tf.io.gfile.exists(os.path.join(folder, name))


def _extra_ids(folder: str, config: dict) -> int:
    """Returns the number of sentinel ids after the SentencePiece pieces of a T5's folder."""
    if isinstance(config.get("extra_ids"), int):
        return config["extra_ids"]
    added = [
        token.get("content", "") for token in (config.get("added_tokens_decoder") or {}).values()
    ]
    if config:
        return sum(text.startswith("<extra_id_") for text in added)
    # The folder lacks tokenizer_config.json. T5 has sentinel ids and mT5 has none, and only the
    # embedding of T5 has more rows than the pieces need.
    model = files.read_json_in(folder, "config.json")
    file = os.path.join(folder, SENTENCEPIECE_FILE)
    rows = model.get("vocab_size")
    size = seqio.SentencePieceVocabulary(file).vocab_size
    return T5_EXTRA_IDS if isinstance(rows, int) and rows >= size + T5_EXTRA_IDS else 0


def end_ids(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
    """Returns the ids that end a text; the first of them is the one that ends targets."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.eos_ids
    return () if vocabulary.eos_id is None else (vocabulary.eos_id,)


def decode(vocabulary: seqio.Vocabulary, ids: Sequence[int]) -> str:
    """Returns the text of decoded ids up to the first id that ends a text, without padding."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.decode(ids)
    kept = takewhile(lambda token: token != vocabulary.eos_id, ids)
    return vocabulary.decode([token for token in kept if token != PAD_ID])


def decode_prompt(vocabulary: seqio.Vocabulary, ids: Sequence[int]) -> str:
    """Returns the text of a whole prompt; a chat goes on behind the ids that end its turns."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.decode_prompt(ids)
    return decode(vocabulary, ids)


def piece(vocabulary: seqio.Vocabulary, token: int) -> str:
    """Returns a readable form of one token: `</s>` for an end of text, and "▁" for a space."""
    if token in end_ids(vocabulary):
        return "</s>"
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.piece(token)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return vocabulary.tokenizer.id_to_piece(token)
    return vocabulary.decode([token])


def is_remote(vocabulary: seqio.Vocabulary) -> bool:
    """Returns whether a vocabulary is read from a remote file, or is `Unread`."""
    path = getattr(vocabulary, "sentencepiece_model_file", "")
    return isinstance(vocabulary, Unread) or files.is_remote(path)


def location(vocabulary: seqio.Vocabulary) -> str:
    """Returns where a vocabulary is that `is_remote`."""
    if isinstance(vocabulary, Unread):
        return f"the vocabulary of {vocabulary.checkpoint}"
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    return vocabulary.sentencepiece_model_file


def check_readable(vocabulary: seqio.Vocabulary, *, check_remote: bool = True) -> None:
    """Checks the file of a SentencePiece vocabulary, which seqio opens only on first use.

    Other vocabularies, and remote files without `check_remote`, are not checked.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be reached; the message names it.
        ValueError: if the file is no SentencePiece model; the message names it.
    """
    if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return
    path, remote = vocabulary.sentencepiece_model_file, is_remote(vocabulary)
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
    content = files.read_bytes(path)
    if not content:  # of which sentencepiece makes a processor without pieces
        files.fault(path, None, "expected a SentencePiece model, got an empty file")
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        files.fault(path, None, f"expected a SentencePiece model, got a file that is none: {error}")


def num_pieces(vocabulary: seqio.Vocabulary, *, check_remote: bool = True) -> int:
    """Returns the number of ids of a vocabulary, including extra ids.

    Args:
        check_remote: whether remote files may be read. The size of T5's remote file is known
            without reading the file.

    Raises:
        ValueError: if a remote file would have to be read and may not be; the message names it.
    """
    if check_remote or not is_remote(vocabulary) or isinstance(vocabulary, Unread):
        return vocabulary.vocab_size
    assert isinstance(vocabulary, seqio.SentencePieceVocabulary)
    path = vocabulary.sentencepiece_model_file
    if path == T5_PATH:
        return 32_000 + vocabulary.extra_ids
    raise ValueError(
        f"vocabulary {path!r} is remote and is not read in a dry run: name a local copy"
    )


def pieces(vocabulary: seqio.Vocabulary) -> list[str]:
    """Returns the piece of each id, in the order of ids.

    Raises:
        ValueError: if this function does not know the class of the vocabulary.
    """
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        model = vocabulary.tokenizer
        return list(model.id_to_piece(list(range(model.get_piece_size()))))
    if isinstance(vocabulary, seqio.ByteVocabulary):
        special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        return special + [f"<extra_id_{i}>" for i in range(vocabulary.extra_ids)]
    if isinstance(vocabulary, WordVocabulary | TokenizerVocabulary):
        return list(vocabulary.pieces)
    raise ValueError(
        "expected a SentencePieceVocabulary, ByteVocabulary, WordVocabulary or a folder's, "
        f"got {type(vocabulary).__name__}"
    )


def content_hash(vocabulary: seqio.Vocabulary) -> str:
    """Returns a SHA-256 that is equal for vocabularies that turn every text into the same ids.

    The hash covers the pieces and, for a folder's `tokenizer.json`, also the merges, the normalizer
    and the pre-tokenizer. It does not depend on the path or the format of the files.
    """
    if isinstance(vocabulary, TokenizerVocabulary):
        return vocabulary.content_hash
    return tokenizer_folder.hash_pieces(pieces(vocabulary))


def short_name(vocabulary: seqio.Vocabulary) -> str:
    """Returns 12 characters that tell a vocabulary from others, without reading a remote file."""
    if is_remote(vocabulary):
        path = f"{location(vocabulary)}:{vocabulary.extra_ids}"
        return hashlib.sha256(path.encode()).hexdigest()[:12]
    return content_hash(vocabulary)[:12]


def same(one: seqio.Vocabulary, other: seqio.Vocabulary) -> bool:
    """Returns whether two vocabularies turn every text into the same ids.

    If both are the same SentencePiece file with the same number of sentinel ids, the file is not
    read. An `Unread` vocabulary is the same as itself alone.
    """
    if isinstance(one, Unread) or isinstance(other, Unread):
        return one is other
    paths = [getattr(x, "sentencepiece_model_file", None) for x in (one, other)]
    if paths[0] is not None and paths[0] == paths[1] and one.extra_ids == other.extra_ids:
        return True
    return content_hash(one) == content_hash(other)


def shared_pieces(
    student: seqio.Vocabulary, teacher: seqio.Vocabulary, *, student_name: str, teacher_name: str
) -> int:
    """Returns how many ids, counted from 0, mean the same token to a student and a teacher.

    The divergence compares the probabilities of both models id by id, over these ids. Two
    tokenizers agree if they make ids in the same way and have the same tokens, where one of them
    may have further tokens at the end. The number of embedding rows is not compared: two sizes of
    one model family may have 151,936 and 152,064 rows for the same 151,665 tokens.

    Raises:
        ValueError: if the tokenizers do not agree. The message names the first id that differs and
            suggests SeqKD, which works with different tokenizers.
    """
    if content_hash(student) == content_hash(teacher):
        return len(pieces(student))
    ours, theirs = (tokenizer_folder.comparable(pieces(one)) for one in (student, teacher))
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
        f"{student_name!r} and {teacher_name!r} have different tokenizers: "
        f"{where}. Their probabilities cannot be compared token by token. SeqKD works: let the "
        "teacher write the targets (gkd-jax infer --gin_file=gin/infer.gin) and train the student "
        "on them (gin/seqkd.gin; docs/your_own_data.md has the commands)"
    )


def arithmetic() -> WordVocabulary:
    """Returns the vocabulary of the task `arithmetic`, in which every number is one token."""
    return WordVocabulary(known_sizes.ARITHMETIC_WORDS)
