"""A source of examples that reads a split from TFDS, or from a JSONL file if there is one.

If DATA_DIR, or the folder of the task's family in DATA_DIR (`xsum`, `wmt`, `gsm8k`), has a file
`<split>.jsonl`, plain or as `.gz`, the split is read from this file. Any other split comes from
TFDS. Each line of a file is an object with `inputs` and `targets`, or with the names that TFDS uses
(`document` and `summary` for XSum). The texts are those of the data set; the task adds its prefix
or prompt.

Files have two uses. One split can be replaced while the other splits remain; for example, chains of
thought of a larger model can replace the training answers of GSM8K. And a data set that TFDS cannot
download automatically can be used without TFDS.
"""

from collections.abc import Iterable, Mapping

import seqio
import tensorflow as tf

from gkd_jax.tasks import features, folder
from gkd_jax.text import files


SPLITS = ("train", "validation", "test")


class TfdsOrFiles(seqio.TfdsDataSource):
    """A TFDS data set, of which JSONL files may replace some or all splits."""

    def __init__(self, tfds_name: str, *, family: str, fields: Mapping[str, str], hint: str = ""):
        """Describes the data set; files and TFDS are not accessed yet.

        Args:
            tfds_name: the name, configuration and version of the data set in TFDS.
            family: the folder in DATA_DIR in which files are looked for first.
            fields: the names in TFDS of `inputs` and `targets`.
            hint: for a data set that TFDS cannot download automatically, how to prepare the data
                set. The hint is part of an error message, and TFDS does not try to download. "" if
                TFDS can download the data set.
        """
        super().__init__(tfds_name=tfds_name, read_only=bool(hint))
        self._name = tfds_name
        self._family = family
        self._fields = dict(fields)
        self._hint = hint

    @property
    def splits(self) -> Iterable[str]:
        """The splits that have files, and the splits of TFDS."""
        found = [split for split in SPLITS if self._file(split) is not None]
        # TFDS is asked only if a file is missing, because TFDS may not have the data set.
        if len(found) == len(SPLITS):
            return found
        return [*found, *(split for split in super().splits if split not in found)]

    def get_dataset(
        self,
        split: str | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **settings,
    ) -> tf.data.Dataset:
        """Returns the examples of a split, with the names of features in TFDS.

        Raises:
            FileNotFoundError: if neither DATA_DIR nor TFDS has the split; the message says what to
                do.
            ValueError: if a line of a file is not as expected; the message names the file and the
                line.
        """
        chosen = split or "train"
        path = self._file(chosen)
        if path is not None:
            return self._table(path)
        try:
            return super().get_dataset(chosen, shuffle, seed, shard_info, **settings)
        except (AssertionError, tf.errors.NotFoundError) as error:
            raise FileNotFoundError(
                f"TFDS has no {self._name!r} here. {self._hint}Or put {chosen}.jsonl (objects with "
                f"{self._expected()}) into the folder {self._family!r} of DATA_DIR. TFDS says: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of examples in TFDS; None if a file replaces the split.

        The number of examples in a file is known only after the file has been read.
        """
        return None if self._file(split) is not None else super().num_input_examples(split)

    def list_shards(self, split: str) -> list[str]:
        """Returns the shards of a split; a JSONL file is one shard."""
        path = self._file(split)
        return list(super().list_shards(split)) if path is None else [path]

    def _file(self, split: str) -> str | None:
        """Returns the file that replaces a split; None if there is none.

        Raises:
            ValueError: if there is a file and `split` is only a part of it, such as "train[:10%]".
        """
        base = split.split("[")[0]
        path = folder.find(self._family, f"{base}.jsonl")
        if path is not None and base != split:
            raise ValueError(f"{path} is read whole: expected the split {base!r}, got {split!r}")
        return path

    def _table(self, path: str) -> tf.data.Dataset:
        """Reads a JSONL file; the first row decides by which names the features are read."""
        rows = files.read_objects(path)
        own = "inputs" not in rows[0] and self._fields["inputs"] in rows[0]
        columns: dict[str, list[str]] = {theirs: [] for theirs in self._fields.values()}
        for number, row in enumerate(rows, start=1):
            with files.faults_in(path, number):
                features.check_complete(row)
                for ours, theirs in self._fields.items():
                    name = theirs if own else ours
                    if name not in row:
                        raise ValueError(f"key {name!r} is missing: expected {self._expected()}")
                    columns[theirs].append(files.string(row, name))
        return tf.data.Dataset.from_tensor_slices(columns)

    def _expected(self) -> str:
        """Returns the keys of a row of a file, for messages."""
        return "'inputs' and 'targets', or '{inputs}' and '{targets}'".format(**self._fields)
