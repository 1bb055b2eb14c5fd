"""Small sources are shuffled whole: a pass is a permutation, and a restored stream continues."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax.input import data, in_memory, streams
from gkd_jax.tasks import arithmetic, features


SIZE = 700


def _numbers(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    texts = [f"{i}" for i in range(SIZE)]
    return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})


@pytest.fixture
def task():
    name = "numbers_in_memory"
    yield features.register(
        name,
        source=seqio.FunctionDataSource(_numbers, splits=["train"]),
        preprocessors=[],
        metric_fns=[],
        vocabulary=seqio.ByteVocabulary(),
    )
    seqio.TaskRegistry.remove(name)


def stream(task, shard=data.WHOLE, **changes):
    settings = {"feature_lengths": {"inputs": 4, "targets": 4}, "batch_size": 10, **changes}
    return streams.TrainIterator(task, data.DataConfig(task=task.name, **settings), shard)


def numbers(batches, count) -> list[int]:
    """The texts of a number of batches, converted to the numbers that they spell."""
    decode = seqio.ByteVocabulary().decode
    rows = np.concatenate([next(batches).inputs for _ in range(count)])
    return [int(decode([token for token in row if token > 1])) for row in rows.tolist()]


@pytest.mark.parametrize("limit", [None, 120])
def test_each_pass_has_all_examples_in_an_order_of_its_own(task, limit):
    size = limit or SIZE
    batches = stream(task, num_examples=limit)
    passes = [numbers(batches, size // 10) for _ in range(3)]
    for one in passes:
        assert sorted(one) == list(range(size))
        # Far from the source's order at once, where seqio's window would give small numbers first.
        assert abs(np.mean(one[: size // 4]) - (size - 1) / 2) < size / 8
    assert passes[0] != passes[1] != passes[2]
    assert numbers(stream(task, num_examples=limit), size // 10) == passes[0]
    assert numbers(stream(task, num_examples=limit, seed=1), size // 10) != passes[0]


def test_orders_are_uniform(task):
    """A chi-square test of the position of one example over many passes, in ten parts."""
    examples = in_memory.Examples(task.get_dataset(None, split="train", shuffle=False))
    order = examples.endless(3).map(
        lambda x: tf.strings.reduce_join(tf.strings.as_string(x["inputs"]))
    )
    passes = np.array(list(order.take(SIZE * 40).as_numpy_iterator())).reshape(40, SIZE)
    first = passes[0, :20]
    places = np.array([np.flatnonzero(one == value)[0] for one in passes for value in first])
    counts = np.bincount(places * 10 // SIZE, minlength=10)
    expected = len(places) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 0.1 % of chi-square with 9


def test_shards_part_the_examples(task):
    parts = [numbers(stream(task, data.Shard(i, 2, i), batch_size=20), 35) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(SIZE))


def test_a_saved_stream_is_small_and_goes_on_where_it_was(task, tmp_path):
    batches = stream(task)
    numbers(batches, 93)  # into the second pass
    batches.save(tmp_path)
    expected = numbers(batches, 80)
    resumed = stream(task)
    resumed.restore(tmp_path)
    assert numbers(resumed, 80) == expected
    # A few examples on their way through the tokenizer, and no window of a thousand.
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 200_000


def test_large_and_unknown_sources_keep_seqio_s_window(task, monkeypatch):
    monkeypatch.setattr(in_memory, "LARGEST", 100)
    monkeypatch.setattr(in_memory, "Examples", None)  # is not asked for
    # seqio repeats first and shuffles then: an example may come twice within a pass.
    assert set(numbers(stream(task), 70)) <= set(range(SIZE))
    assert sorted(numbers(stream(task, num_examples=650), 65)) == list(range(650))


def test_the_number_of_examples_is_the_source_s():
    task = seqio.TaskRegistry.get("arithmetic")
    assert in_memory.number_of_examples(task, "train", None) == arithmetic.SIZES["train"]
    assert in_memory.number_of_examples(task, "train", 2500) == 2500
    assert in_memory.number_of_examples(task, "validation", 2500) == 512
