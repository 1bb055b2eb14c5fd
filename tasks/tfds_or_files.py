"""The source of tasks that TFDS has, for which files of one's own can stand in.

Where DATA_DIR, or its folder of the task's family (`xsum`, `wmt`, `gsm8k`), holds `<split>.jsonl`,
plain or `.gz`, that split is read from there; any other comes from TFDS. A line is an object with
`inputs` and `targets`, or with TFDS's names (`document` and `summary` for XSum): texts as the data
set has them, to which the task adds its prefix or prompt. So a split can be replaced, as GSM8K's
training answers by the chains of thought of a larger model, while the others stay; and a data set
that TFDS cannot download by itself can be used without it.
"""

from collections.abc import Iterable, Mapping
import os

import seqio
import tensorflow as tf

from gkd_jax.tasks import few_shot, folder
from gkd_jax.text import files


SPLITS = ("train", "validation", "test")


class TfdsOrFiles(seqio.TfdsDataSource):
    """A TFDS data set, or the JSONL files that stand in for its splits."""

    def __init__(self, tfds_name: str, *, family: str, fields: Mapping[str, str], hint: str = ""):
        """Reads nothing yet.

        Args:
            tfds_name: name, configuration and version.
            family: the folder of DATA_DIR in which files are looked for first.
            fields: TFDS's names of `inputs` and `targets`.
            hint: how a data set that TFDS cannot download by itself is prepared, for messages; TFDS
                does not try then. Empty where it can.
        """
        super().__init__(tfds_name=tfds_name, read_only=bool(hint))
        self._name = tfds_name
        self._family = family
        self._fields = dict(fields)
        self._hint = hint

    @property
    def splits(self) -> Iterable[str]:
        """Those of the files and those of TFDS."""
        found = [split for split in SPLITS if self._file(split) is not None]
        # TFDS is asked only where something is missing: it may not have the data set.
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
        """Examples with TFDS's names.

        Raises:
            FileNotFoundError: saying what to do, where neither files nor TFDS have the split.
            ValueError: naming the file, the line and what is wrong with it.
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
                f"'inputs' and 'targets') into the folder {self._family!r} of DATA_DIR. TFDS says: "
                f"{' '.join(str(error).split())[:200]}"
            ) from None

    def num_input_examples(self, split: str) -> int | None:
        """TFDS's number; None for a file, which knows it when it is read."""
        return None if self._file(split) is not None else super().num_input_examples(split)

    def list_shards(self, split: str) -> list[str]:
        """One for a file."""
        path = self._file(split)
        return list(super().list_shards(split)) if path is None else [path]

    def _file(self, split: str) -> str | None:
        """The file of a split, if there is one."""
        base = split.split("[")[0]
        for name in (f"{base}.jsonl", f"{base}.jsonl.gz"):
            try:
                where = few_shot.family_folder(self._name, self._family, name)
            except ValueError:  # no DATA_DIR
                return None
            path = os.path.join(where, name)
            if tf.io.gfile.exists(path):
                if base != split:
                    raise ValueError(
                        f"{path} is read whole: expected the split {base!r}, got {split!r}"
                    )
                return path
        return None

    def _table(self, path: str) -> tf.data.Dataset:
        rows = files.parse_objects(folder.read_lines(*os.path.split(path)), path)
        own = "inputs" not in rows[0] and self._fields["inputs"] in rows[0]
        columns = {
            theirs: [
                files.string(row, theirs if own else ours, path, number)
                for number, row in enumerate(rows, start=1)
            ]
            for ours, theirs in self._fields.items()
        }
        return tf.data.Dataset.from_tensor_slices(columns)
