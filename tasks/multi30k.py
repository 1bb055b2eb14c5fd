"""The task `multi30k_ende`: image captions, English to German (Multi30k, Elliott et al., 2016).

DATA_DIR must hold {train,val,test_2016_flickr}.{en,de}, plain or as `.gz`: the raw files of task 1
from https://github.com/multi30k/dataset. This command makes a joint vocabulary from the training
files:

    python -m gkd_jax.tasks.multi30k --data_dir=DIR --output=multi30k.model --vocab_size=4000
"""

import argparse
from collections.abc import Iterable, Sequence
import io
import os
import pathlib

import sentencepiece

from gkd_jax.tasks import features, folder
from gkd_jax.text import files, text_metrics
from gkd_jax.text.word_vocabulary import EOS_ID, PAD_ID, UNK_ID


TASK = "multi30k_ende"
FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


def read_pairs(data_dir: str, split: str) -> tuple[list[str], list[str]]:
    """Returns the English and the German sentences of a split.

    Raises:
        FileNotFoundError: if a file is missing; the message names the file and the folder.
        ValueError: if the English and the German file have different numbers of lines.
    """
    stem = FILES[split]
    english, german = (folder.read_lines(data_dir, f"{stem}.{code}") for code in ("en", "de"))
    if len(english) != len(german):
        raise ValueError(
            f"{stem}.en and {stem}.de in {data_dir!r} must have as many lines, "
            f"got {len(english)} and {len(german)}"
        )
    return english, german


def _columns(split: str) -> dict[str, list[str]]:
    english, german = read_pairs(folder.data_dir(TASK), split)
    return {"inputs": english, "targets": german}


features.register(
    TASK,
    source=features.Table(_columns, FILES),
    metric_fns=[text_metrics.bleu],
)


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike, *, vocab_size: int) -> None:
    """Trains a SentencePiece unigram vocabulary and writes it to a file.

    Special ids are those of T5: pad 0, EOS 1, unknown 2 and no BOS. The same texts give the same
    file.

    Args:
        texts: the sentences to train on.
        path: the local `.model` file, which is written atomically. Its folder is created.
        vocab_size: the number of pieces, including special ones. Every character gets a piece.

    Raises:
        ValueError: if the texts do not suffice for this many pieces, or if the path is remote.
    """
    if files.is_remote(path):
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
            character_coverage=1.0,
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a joint vocabulary on the training files, as the command line states."""
    parser = argparse.ArgumentParser(prog="python -m gkd_jax.tasks.multi30k", description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of train.en and train.de")
    parser.add_argument("--output", required=True, help="the SentencePiece file to write")
    parser.add_argument("--vocab_size", type=int, default=4000)
    values = parser.parse_args(arguments)
    try:
        english, german = read_pairs(values.data_dir, "train")
        train_sentencepiece([*english, *german], values.output, vocab_size=values.vocab_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {values.output}: {values.vocab_size} pieces")


if __name__ == "__main__":
    main()
