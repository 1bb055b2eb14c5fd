"""The task `multi30k_ende`: image captions, English to German (Multi30k, Elliott et al., 2016).

DATA_DIR must hold {train,val,test_2016_flickr}.{en,de}, plain or as `.gz`: the raw files of task 1
from https://github.com/multi30k/dataset. This command makes a joint vocabulary from the training
files:

    python -m gkd_jax.tasks.multi30k --data_dir=DIR --output=multi30k.model --vocab_size=4000
"""

import argparse
from collections.abc import Sequence

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, folder
from gkd_jax.text import text_metrics, vocabularies


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


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # The dataset is a table in memory, which its reader shuffles.
    english, german = read_pairs(folder.data_dir(TASK), split)
    return tf.data.Dataset.from_tensor_slices({"inputs": english, "targets": german})


features.register(
    TASK,
    source=seqio.FunctionDataSource(_dataset, splits=list(FILES)),
    metric_fns=[text_metrics.bleu],
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a joint vocabulary on the training files, as the command line states."""
    parser = argparse.ArgumentParser(prog="python -m gkd_jax.tasks.multi30k", description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of train.en and train.de")
    parser.add_argument("--output", required=True, help="the SentencePiece file to write")
    parser.add_argument("--vocab_size", type=int, default=4000)
    values = parser.parse_args(arguments)
    try:
        english, german = read_pairs(values.data_dir, "train")
        vocabularies.train_sentencepiece(
            [*english, *german], values.output, vocab_size=values.vocab_size
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {values.output}: {values.vocab_size} pieces")


if __name__ == "__main__":
    main()
