"""Stores on disk a teacher's top-k probabilities at every target position of a data set.

`gkd-jax score` writes the cache once; training steps on the data set's targets (lambda < 1) then
need no teacher. For each position the cache has what `gkd_jax.divergences.top_k` computes: the k
most probable ids, their log-probabilities, and the log of the probability mass of all other ids.

The folder of a cache holds `about.json` and these files. A file is a flat array in native byte
order, with one entry for each row of the split or for each target token of each row:

| file | one entry per | entry |
|---|---|---|
| `keys` | row | uint64: the `row_key` |
| `lengths` | row | int32: the number of target tokens |
| `ids` | target token | k x uint16, or int32 for a larger vocabulary; most probable first |
| `log_probs` | target token | k x float32, in nats |
| `tails` | target token | float32: log of the mass of all other ids, in nats; -inf for k = V |
"""

import hashlib
import pathlib
from typing import Any

import numpy as np

from gkd_jax.batch import Batch, TopK
from gkd_jax.text import files


_PER_ROW = {"keys": np.uint64, "lengths": np.int32}
_PER_TOKEN = TopK._fields
ABOUT = "about.json"  # says what a cache was made from
DONE = "num_rows"  # the field of about.json that a whole cache has


def row_key(*features: np.ndarray) -> int:
    """Returns a 64-bit hash of the ids of a row, from which the row's scores are looked up.

    Args:
        *features: the ids of inputs and targets, and of the teacher's own prompt where there is
            one, without padding.
    """
    digest = hashlib.blake2b(digest_size=8)
    for ids in features:
        digest.update(np.asarray(ids, np.int32).tobytes() + b"|")
    return int.from_bytes(digest.digest(), "little")


def _real_ids(batch: Batch, row: int) -> tuple[np.ndarray, ...]:
    """Returns the ids of a row as `row_key` takes them."""
    target = int(batch.weights[row].sum())
    assert batch.input_lengths is not None
    ids = batch.inputs[row, : int(batch.input_lengths[row])], batch.targets[row, :target]
    if batch.teacher_inputs is None:
        return ids
    assert batch.teacher_input_lengths is not None
    return *ids, batch.teacher_inputs[row, : int(batch.teacher_input_lengths[row])]


class Writer:
    """Appends batches to a cache, and continues an interrupted cache after its last whole batch.

    Args:
        folder: the folder of the cache. If it holds a cache, this was made from the same, which
            the caller has checked (`evaluation.made_by.check_scores`).
        about: what the cache is made from; see `evaluation.score`.

    Attributes:
        num_rows: the number of rows in the cache.

    Raises:
        ValueError: if the cache in the folder is damaged.
    """

    def __init__(self, folder: str, about: dict[str, Any]):
        self._folder, self._about = pathlib.Path(folder), about
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / ABOUT
        if not path.exists():
            files.write_record(path, about)
        self.num_rows = self._keep_whole_batches()

    def _keep_whole_batches(self) -> int:
        """Truncates the files to whole batches and returns the number of rows that remain.

        `append` writes the keys last, so the number of keys tells how many batches are whole.
        """
        keys, lengths = (self._folder / name for name in _PER_ROW)
        rows = tokens = 0
        if keys.exists():
            batch = self._about["batch_size"]
            rows = keys.stat().st_size // 8 // batch * batch
            tokens = int(np.fromfile(lengths, np.int32, rows).sum())
        for name in (*_PER_TOKEN, *_PER_ROW):
            path = self._folder / name
            if path.exists():
                dtype, width = _layout(name, self._about)
                size = (tokens if name in _PER_TOKEN else rows) * width * dtype.itemsize
                if path.stat().st_size < size:
                    raise ValueError(f"damaged teacher cache: {path} should have {size} bytes")
                with path.open("r+b") as file:
                    file.truncate(size)
        return rows

    def append(self, batch: Batch, scores: TopK, num_rows: int) -> None:
        """Appends the first `num_rows` rows of a batch; only the last batch may have fewer rows."""
        real = [_real_ids(batch, row) for row in range(num_rows)]
        lengths = [len(targets) for _, targets, *_ in real]
        arrays = {
            name: np.concatenate([x[row, :length] for row, length in enumerate(lengths)])
            for name, x in scores._asdict().items()
        }
        arrays["lengths"] = np.asarray(lengths)
        arrays["keys"] = np.asarray([row_key(*ids) for ids in real], np.uint64)
        for name, values in arrays.items():
            path = self._folder / name
            with files.naming(path), path.open("ab") as file:
                file.write(values.astype(_layout(name, self._about)[0]).tobytes())
        self.num_rows += num_rows

    def finish(self) -> float:
        """Marks the cache as complete and returns the mean probability mass of the tails."""
        tails = self._folder / "tails"
        mass = np.exp(np.fromfile(tails, np.float32)) if tails.exists() else np.zeros(0)
        files.write_record(self._folder / ABOUT, {**self._about, DONE: self.num_rows})
        return float(mass.mean()) if mass.size else 0.0


def _layout(name: str, about: dict[str, Any]) -> tuple[np.dtype, int]:
    """Returns the dtype of a file and how many numbers one entry has."""
    if name in _PER_ROW:
        return np.dtype(_PER_ROW[name]), 1
    if name == "ids":
        return np.dtype(np.uint16 if about["num_pieces"] <= 2**16 else np.int32), about["k"]
    return np.dtype(np.float32), about["k"] if name == "log_probs" else 1


def read_about(folder: str) -> dict[str, Any]:
    """Returns what a cache was made from: the content of its `about.json`.

    Raises:
        FileNotFoundError: if the folder holds no cache.
        ValueError: if the cache is not complete.
    """
    path = pathlib.Path(folder) / ABOUT
    if not path.exists():
        raise FileNotFoundError(f"no teacher cache at {folder!r}: it has no {ABOUT}")
    about = files.read_json_object(path)
    if DONE not in about:
        raise ValueError(
            f"the teacher cache {folder!r} is not whole: run `gkd-jax score` to its end"
        )
    return about


class TeacherCache:
    """Looks up the scores of a batch's rows. The files stay on disk, mapped into memory.

    Raises:
        FileNotFoundError: if the folder holds no cache.
        ValueError: if the cache is not complete or a file has the wrong size.
    """

    def __init__(self, folder: str):
        self.about = read_about(folder)
        self._folder = folder
        rows = self.about[DONE]
        self._lengths = self._map("lengths", rows)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        tokens = int(self._starts[-1])
        self._ids, self._log_probs, self._tails = (self._map(name, tokens) for name in _PER_TOKEN)
        keys = np.asarray(self._map("keys", rows))[:, 0]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def _map(self, name: str, entries: int) -> np.ndarray:
        path = pathlib.Path(self._folder) / name
        dtype, width = _layout(name, self.about)
        expected = entries * width * dtype.itemsize
        if not path.exists() or path.stat().st_size != expected:
            size = path.stat().st_size if path.exists() else "no file"
            raise ValueError(f"damaged teacher cache: {path} should have {expected} bytes: {size}")
        if not entries:
            return np.zeros((0, width), dtype)
        return np.memmap(path, dtype, "r", shape=(entries, width))

    def attach(self, batch: Batch) -> Batch:
        """Returns a batch of the data set (NumPy arrays) with the teacher's scores of its targets.

        Raises:
            ValueError: if the cache lacks a row of the batch.
        """
        k, shape = self.about["k"], batch.targets.shape
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy()
        # Padding has weight 0, so any finite scores will do; these are a uniform distribution.
        log_probs = np.full((*shape, k), -np.log(k + 1.0), np.float32)
        tails = np.full(shape, -np.log(k + 1.0), np.float32)
        for row in range(shape[0]):
            found = self._find(*_real_ids(batch, row))
            length = int(self._lengths[found, 0])
            part = slice(self._starts[found], self._starts[found] + length)
            ids[row, :length] = self._ids[part]
            log_probs[row, :length] = self._log_probs[part]
            tails[row, :length] = self._tails[part, 0]
        return batch._replace(teacher_scores=TopK(ids, log_probs, tails))

    def _find(self, inputs: np.ndarray, targets: np.ndarray, *teacher_inputs: np.ndarray) -> int:
        """Returns the index in the cache of a row, whose ids are given without padding."""
        key = np.uint64(row_key(inputs, targets, *teacher_inputs))
        place = int(np.searchsorted(self._keys, key))
        if place < len(self._keys) and self._keys[place] == key:
            found = int(self._order[place])
            if self._lengths[found, 0] == len(targets):
                return found
        raise ValueError(
            f"the teacher cache {self._folder!r} (task {self.about['task']!r}, split "
            f"{self.about['split']!r}, lengths {self.about['feature_lengths']}) lacks a row of the "
            f"training data: inputs {inputs.tolist()}, targets {targets.tolist()}"
        )
