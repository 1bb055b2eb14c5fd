"""`Split`: the examples of one split of a task, which are read in their own order."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from gkd_jax.input.data import DataConfig
from gkd_jax.input.untuned import untuned
from gkd_jax.tasks import features  # pyright: ignore[reportMissingImports]


_ROWS_AT_ONCE = 256


class Split(NamedTuple):
    """The examples of one split of a task, or the first of them, cut to feature lengths.

    Attributes:
        task: a seqio task or mixture.
        name: the name of the split.
        lengths: the largest number of tokens of each feature.
        num_examples: how many of the first examples are read; None means all.
        use_cached: whether the task is read from seqio's cache.
        seed: the seed of tasks whose examples depend on a seed.
    """

    task: Any
    name: str
    lengths: Mapping[str, int]
    num_examples: int | None = None
    use_cached: bool = False
    seed: int | None = None

    @classmethod
    def of(cls, task: Any, config: DataConfig) -> "Split":
        """Returns the split of a task that a run is trained on."""
        return cls(
            task,
            config.split,
            config.feature_lengths,
            config.num_examples,
            config.use_cached,
            config.seed,
        )

    def in_order(self) -> Iterator[dict[str, Any]]:
        """Yields the examples once, as NumPy arrays."""
        texts = self.texts()
        if texts is None:
            examples: Any = untuned(self.dataset())
            yield from examples.as_numpy_iterator()
            return
        # seqio traces a graph for each preprocessor, and calls it for each example.
        for some in untuned(texts.batch(_ROWS_AT_ONCE)):
            columns = {name: list(values.numpy()) for name, values in self.tokenize(some).items()}
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))

    def dataset(self) -> tf.data.Dataset:
        """Returns seqio's dataset of the tokenized examples."""
        return self.read(shuffle=False, num_epochs=1).take(self._limit)

    def read(self, **settings: Any) -> tf.data.Dataset:
        """Returns seqio's dataset of the whole split, with more arguments of `get_dataset`."""
        return self.task.get_dataset(
            dict(self.lengths),
            split=self.name,
            use_cached=self.use_cached,
            seed=self.seed,
            try_in_mem_cache=False,
            **settings,
        )

    def texts(self) -> tf.data.Dataset | None:
        """Returns the examples before they are tokenized; None if `tokenize` cannot do that."""
        texts = features.source_texts(self.task, self.name, use_cached=self.use_cached)
        return None if texts is None else texts.take(self._limit)

    def tokenize(self, texts: Mapping[str, tf.Tensor]) -> dict[str, Any]:
        """Returns the tokenized examples of some of `texts` (see `features.tokenize_rows`)."""
        return features.tokenize_rows(
            texts, output_features=self.task.output_features, lengths=self.lengths
        )

    @property
    def _limit(self) -> int:
        return -1 if self.num_examples is None else self.num_examples
