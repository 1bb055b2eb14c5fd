"""The tokenizer of a Hugging Face folder as a seqio vocabulary.

The library `tokenizers` reads `tokenizer.json`, which decides how texts become ids. The other files
of the folder complete it: `tokenizer_config.json` names special tokens and holds the chat template,
and `generation_config.json` (or else `config.json`) states the ids that end a text, of which there
may be several. Ids, texts and rendered chats equal those of transformers 5. Unlike in T5's
vocabularies, id 0 is an ordinary token.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import copy
import functools
import hashlib
from itertools import takewhile
import json
import os
from typing import Any

from etils import epath
import numpy as np
import seqio
import tensorflow as tf
import tokenizers

from gkd_jax.text import files, special_ids
from gkd_jax.text.chat_template import ChatTemplate


TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"


class TokenizerVocabulary(seqio.Vocabulary):
    """The tokenizer of a folder with `tokenizer.json`, as a seqio vocabulary.

    seqio expects that `encode` adds no special tokens to a text. The tokens that the tokenizer
    itself puts around a text (BOS for Llama and Gemma, none for Qwen, EOS at the end for T5) are
    added by `encode_prompt`, and by `encode` of the vocabulary that `for_prompts` returns. The name
    of a special token inside a text is read as that token, as in transformers, unless the
    configuration has `split_special_tokens`. `decode` stops at the first of `eos_ids` and skips
    special tokens.

    Attributes:
        folder: the folder from which the tokenizer was read.
        eos_ids: the ids that end a text; the first of them is `eos_id`.
        chat_template: the template that renders messages; None if the folder has no template.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads the tokenizer.

        Raises:
            FileNotFoundError: if the folder has no `tokenizer.json`.
            ValueError: if a file is not as expected; the message names the file.
        """
        super().__init__(extra_ids=0)
        self.folder = os.fspath(folder)
        config = files.read_json_in(self.folder, CONFIG_FILE)
        names = _special_tokens(self.folder, config)
        self._tokenizer = _read_tokenizer(self.folder, config, names)
        self._ids = {
            name: self._tokenizer.token_to_id(names[f"{name}_token"])
            for name in ("bos", "eos", "pad", "unk")
            if f"{name}_token" in names
        }
        stated = special_ids.stated(self.folder)
        self.eos_ids = _end_ids(self.folder, stated.get("eos_token_id"), self._ids.get("eos"))
        pad = stated.get("pad_token_id")
        self._pad_id = self._ids.get("pad", pad if isinstance(pad, int) else None)
        self._adds_specials = False
        self.chat_template = _read_template(self.folder, config, names)

    @property
    def bos_id(self) -> int | None:
        return self._ids.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.eos_ids[0] if self.eos_ids else None

    @property
    def pad_id(self) -> int:
        """The id that pads rows: the folder's pad id, or else the first of `eos_ids`.

        The same id may also end texts (Qwen). Which tokens of a row count is therefore decided by
        lengths and weights, never by this id.
        """
        return self._pad_id if self._pad_id is not None else (self.eos_id or 0)

    @property
    def unk_id(self) -> int | None:
        return self._ids.get("unk")

    @property
    def _base_vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """The token of each id; "" for an id without a token."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = [""] * (max(ids.values(), default=-1) + 1)
        for token, index in ids.items():
            tokens[index] = token
        return tuple(tokens)

    @functools.cached_property
    def _around(self) -> list[int]:
        """The ids that the tokenizer puts around a text."""
        return self._tokenizer.encode("", add_special_tokens=True).ids

    @functools.cached_property
    def ends_prompts(self) -> bool:
        """Whether the tokenizer puts EOS after a text, as the tokenizer of T5 does."""
        whole, bare = (
            self._tokenizer.encode("a", add_special_tokens=adds).ids for adds in (True, False)
        )
        # EOS must be at the end: a tokenizer whose BOS equals its EOS (GPT-2) may put it in front.
        return whole[-1:] != bare[-1:] and whole[-1] in self.eos_ids

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text with the special tokens that the tokenizer puts around it.

        The ids equal those of transformers' `tokenizer(text)`, with one exception: if the text
        itself begins with the special tokens (a rendered chat that begins with BOS), they are not
        added again.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=True).ids
        count = len(self._around) - self.ends_prompts
        before = self._around[:count]
        return ids[count:] if before and ids[count : 2 * count] == before else ids

    def for_prompts(self) -> "TokenizerVocabulary":
        """Returns a copy whose `encode` adds the special tokens before a text.

        EOS after the text is not added, because seqio adds it.
        """
        prompts = copy.copy(self)
        prompts._adds_specials = True
        return prompts

    def piece(self, token: int) -> str:
        """Returns a readable form of a token, with "▁" for a space.

        A token that is only a part of a character is returned as the tokenizer stores it.
        """
        if token >= len(self.pieces):
            return f"<{token}>"
        text = self._tokenizer.decode([token], skip_special_tokens=False).replace(" ", "▁")
        return self.pieces[token] if not text or "\ufffd" in text else text

    @functools.cached_property
    def rules(self) -> str:
        """A hash of the rules by which texts become ids.

        The hash covers the kind of the model, its merges, the normalizer and the pre-tokenizer, and
        whether the names of special tokens are split. For unigram models (T5) the value is
        "unigram": they are compared by their pieces alone, as SentencePiece files are.
        """
        model = files.read_json_in(self.folder, TOKENIZER_FILE)["model"]
        if model.get("type") == "Unigram":
            return "unigram"
        parts: list[Any] = [model.get("type"), _merges(model)]
        parts += [bool(model.get(name)) for name in ("byte_fallback", "ignore_merges")]
        for part in (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer):
            state = b"null" if part is None else part.__getstate__()
            parts.append(json.loads(state, object_hook=_without_offsets))
        if self._tokenizer.encode_special_tokens:
            parts.append("split_special_tokens")
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def content_hash(self) -> str:
        """A SHA-256 of everything that decides ids: all tokens and `rules`."""
        if self.rules == "unigram":
            return hash_pieces(self.pieces)
        return hash_pieces([*self.pieces, self.rules])

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to the first of `eos_ids`.

        Special tokens, and ids that have no token, are left out.
        """
        return self._decode(takewhile(lambda token: token not in self.eos_ids, map(int, ids)))

    def decode_prompt(self, ids: Iterable[int]) -> str:
        """Returns the text of a whole prompt, in which `eos_ids` may end the turns of a chat.

        Special tokens, and ids that have no token, are left out.
        """
        return self._decode(map(int, ids))

    def _encode(self, s: str | bytes) -> Sequence[int]:
        text = s.decode() if isinstance(s, bytes) else s
        if not self._adds_specials:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = self.encode_prompt(text)
        return ids[:-1] if self.ends_prompts else ids

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Returns the ids of a text, or the ragged rows of ids of a vector of texts."""

        def encode(texts):
            rows = [self._encode(text) for text in np.atleast_1d(texts).tolist()]
            ids = np.array([token for row in rows for token in row], np.int32)
            return ids, np.array([len(row) for row in rows], np.int64)

        # The result depends on the texts only. TensorFlow saves the position of an iterator only if
        # its functions are declared stateless.
        ids, sizes = tf.numpy_function(encode, [s], (tf.int32, tf.int64), stateful=False)
        ids = tf.ensure_shape(ids, [None])
        if s.shape.rank == 0:
            return ids
        ragged: Any = tf.RaggedTensor  # pyright does not see its class methods
        return ragged.from_row_lengths(ids, tf.ensure_shape(sizes, [None]), validate=False)

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows):
            rows = np.asarray(rows)
            if rows.ndim == 1:
                return self.decode(rows.tolist()).encode()
            return np.array([self.decode(row).encode() for row in rows.tolist()], object)

        return tf.numpy_function(decode, [ids], tf.string, stateful=False)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenizerVocabulary)
            and (self._adds_specials, self.eos_ids) == (other._adds_specials, other.eos_ids)
            and (self.folder == other.folder or self.content_hash == other.content_hash)
        )

    def __hash__(self) -> int:
        return hash((self.pieces[:100], self._adds_specials))


def comparable(pieces: Iterable[str]) -> list[str]:
    """Returns pieces with T5's extra ids without a word mark, in which libraries differ."""
    return [piece.replace("▁<extra_id_", "<extra_id_") for piece in pieces]


def hash_pieces(pieces: Iterable[str]) -> str:
    """Returns a SHA-256 of `comparable` pieces in the order of ids."""
    digest = hashlib.sha256()
    for piece in comparable(pieces):
        encoded = piece.encode()
        digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return digest.hexdigest()


def _read_tokenizer(
    folder: str, config: Mapping[str, Any], names: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Returns the tokenizer in `tokenizer.json`, with a folder's added and special tokens."""
    path = os.path.join(folder, TOKENIZER_FILE)
    text = files.read_text(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises no more precise exception.
        files.fault(path, None, f"expected a tokenizer of the library tokenizers: {error}")
    # Padding and truncation are stored in the file if it was saved after a call that used them.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    # As in transformers, the properties that the configuration gives a token replace the file's.
    added = config.get("added_tokens_decoder") or {}
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(**{k: v for k, v in token.items() if k != "id"})
            for _, token in sorted(added.items(), key=lambda item: int(item[0]))
        ]
    )
    tokenizer.add_special_tokens(list(names.values()))
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [token for token in _further_tokens(folder, config) if token.content not in known]
    )
    return tokenizer


def _special_tokens(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of special tokens by name, such as `eos_token`.

    `tokenizer_config.json` overrides the older file `special_tokens_map.json`.
    """
    found: dict[str, str] = {}
    extra = config.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    for values in (files.read_json_in(folder, "special_tokens_map.json"), extra, config):
        for name, value in values.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
            elif name.endswith("_token") and value is None:
                found.pop(name, None)
    return found


def _further_tokens(folder: str, config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """Returns the special tokens that a configuration lists without a name for each."""
    for values in (config, files.read_json_in(folder, "special_tokens_map.json")):
        for key in ("extra_special_tokens", "additional_special_tokens"):
            if values.get(key) and isinstance(values[key], list):
                fields = [{"content": x} if isinstance(x, str) else x for x in values[key]]
                fields = [{k: v for k, v in one.items() if k != "__type"} for one in fields]
                return [tokenizers.AddedToken(**{**one, "special": True}) for one in fields]
    return []


def _end_ids(folder: str, stated: Any, named: int | None) -> tuple[int, ...]:
    """Returns the ids that end a text.

    The first is the tokenizer's own EOS (`named`), if it has one. The others are those at which
    transformers' `generate` stops (`stated`: an id, a list of ids, or None).
    """
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(index) is int and index >= 0 for index in listed):
        files.fault(
            folder,
            None,
            "generation_config.json, or else config.json, must have an id or a list of ids as its "
            f"eos_token_id, got {stated!r}",
        )
    return tuple(dict.fromkeys([*([] if named is None else [named]), *listed]))


def _read_template(
    folder: str, config: Mapping[str, Any], names: Mapping[str, str]
) -> ChatTemplate | None:
    """Returns the chat templates of a folder; None if there are none.

    As in transformers, template files override the templates in `tokenizer_config.json`.
    """
    source = os.path.join(folder, CONFIG_FILE)
    templates: dict[str, str] = {}
    match config.get("chat_template"):
        case str(text):
            templates["default"] = text
        case list(items):
            for item in items:
                if not (isinstance(item, dict) and {"name", "template"} <= set(item)):
                    files.fault(source, None, "expected chat templates with 'name' and 'template'")
                templates[item["name"]] = item["template"]
    path = os.path.join(folder, TEMPLATE_FILE)
    with contextlib.suppress(FileNotFoundError):
        templates, source = {"default": files.read_text(path)}, path
    more = epath.Path(folder) / MORE_TEMPLATES
    if more.is_dir():
        for file in sorted(more.iterdir()):
            if file.suffix == ".jinja":
                templates[file.stem] = files.read_text(file)
    return ChatTemplate(templates, dict(names), source) if templates else None


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """Returns the pairs of tokens that are merged; older files store a pair as one string."""
    return [
        merge.split(" ", 1) if isinstance(merge, str) else merge
        for merge in model.get("merges") or []
    ]


def _without_offsets(part: dict[str, Any]) -> dict[str, Any]:
    """Returns settings without the one that changes character offsets but no ids.

    Versions of the library write it differently.
    """
    return {name: value for name, value in part.items() if name != "trim_offsets"}
