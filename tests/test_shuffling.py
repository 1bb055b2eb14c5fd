"""Small sources are shuffled whole: a pass is a permutation, and a restored stream continues."""

import json

import jax
import numpy as np
import pytest
import seqio
import small_tokenizers
import tensorflow as tf

from gkd_jax.input import data, shuffling, streams
from gkd_jax.input.split import Split
from gkd_jax.tasks import arithmetic, features, multi30k
from gkd_jax.text import vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


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
    return streams.TrainIterator(
        {task.name: task}, data.DataConfig(task=task.name, **settings), shard
    )


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
    stream = shuffling.InMemory([{"number": i} for i in range(SIZE)], seed=3, rows_at_once=SIZE)
    passes = np.array([[row["number"] for row in next(stream)] for _ in range(40)])
    first = passes[0, :20]
    places = np.array([np.flatnonzero(one == value)[0] for one in passes for value in first])
    counts = np.bincount(places * 10 // SIZE, minlength=10)
    expected = len(places) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 0.1 % of chi-square with 9


def passes(size, count, seed=0, shard=data.WHOLE) -> np.ndarray:
    """The orders of the first passes over the numbers below `size`, one a row."""
    examples = [{"number": i} for i in range(size)]
    stream = shuffling.InMemory(examples, seed, size // shard.num_shards, shard)
    return np.array([[row["number"] for row in next(stream)] for _ in range(count)])


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65_536, 65_537, 99_999])
def test_a_pass_has_all_examples_at_any_size(size):
    for order in passes(size, 2, seed=2**32 - 1):
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_orders_do_not_come_again():
    """Neither after many passes, nor for other seeds or shards of as many examples."""
    seeds = [0, 1, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    later = np.concatenate([passes(50, 600, seed) for seed in seeds])
    assert len({order.tobytes() for order in later}) == 600 * len(seeds)
    first, second = (passes(100, 5, shard=data.Shard(i, 2, i)) // 2 for i in range(2))
    assert not (first == second).all(axis=1).any()


def test_small_orders_are_all_as_frequent():
    """A chi-square test of the 24 orders of four examples, over 2400 passes."""
    _, counts = np.unique(passes(4, 2400), axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 49.8  # 0.1 % of chi-square with 23


def test_shards_part_the_examples(task):
    parts = [numbers(stream(task, data.Shard(i, 2, i), batch_size=20), 35) for i in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(SIZE))


RESUMED = {
    "examples": {},
    "buckets": {"length_buckets": (2, 3)},
    "texts": {"task": "arithmetic"},
    "texts in buckets": {"task": "arithmetic", "length_buckets": (24, 32)},
    "two tasks": {"task": {"arithmetic": 6, "arithmetic_backwards": 4}},
    "large": {"task": "arithmetic", "num_examples": 101},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_saved_stream_goes_on_where_it_was(task, tmp_path, monkeypatch, case):
    if case == "large":
        monkeypatch.setattr(shuffling, "LARGEST", 100)
    settings = {"task": task.name, "batch_size": 10, **RESUMED[case]}
    settings["feature_lengths"] = dict.fromkeys(
        ["inputs", "targets"], 4 if settings["task"] == task.name else 40
    )
    config = data.DataConfig(**settings)
    tasks = {name: seqio.TaskRegistry.get(name) for name in config.task_rows}
    batches, resumed = streams.TrainIterator(tasks, config), streams.TrainIterator(tasks, config)
    for _ in range(93):
        next(batches)
    batches.save(tmp_path)
    expected = [next(batches) for _ in range(30)]
    resumed.restore(tmp_path)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)
    if not config.length_buckets and case != "large":
        # The position of a task is a number: no window of a thousand.
        positions = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
        taken = {"two tasks": [4 * 93, 6 * 93]}.get(case, [10 * 93])
        assert sorted(position["rows_taken"] for position in positions) == taken


@pytest.mark.parametrize("taken", [-10, 2.5, "7", None])
def test_a_damaged_position_is_refused(task, tmp_path, taken):
    batches = stream(task)
    batches.save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"rows_taken": taken}))
    with pytest.raises(ValueError, match=f"damaged position.*{file.name}.*rows_taken {taken!r}"):
        batches.restore(tmp_path)


@pytest.mark.parametrize("largest", [100, -1])  # -1 gives every source to seqio's window
@pytest.mark.parametrize("buckets", [(), (2, 3)])
def test_an_empty_split_is_refused_by_its_name(monkeypatch, largest, buckets):
    monkeypatch.setattr(shuffling, "LARGEST", largest)

    def source(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        empty = tf.constant([], tf.string)
        return tf.data.Dataset.from_tensor_slices({"inputs": empty, "targets": empty})

    nothing = seqio.Task(
        "nothing",
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=features.TOKENIZE,
        output_features=features.output_features(vocabularies.arithmetic()),
    )
    batches = stream(nothing, length_buckets=buckets)
    with pytest.raises(ValueError, match="training task 'nothing', split 'train', has no examples"):
        next(batches)
    one = stream(nothing, data.Shard(1, 2, 1))
    with pytest.raises(ValueError, match="has no examples for shard 1 of 2"):
        next(one)


@pytest.mark.parametrize(
    "lengths", [{"inputs": 40, "targets": 24}, {"inputs": 6, "targets": 5}, {"inputs": 6}]
)
@pytest.mark.parametrize("kind", ["words", "sentencepiece", "tokenizer"])
def test_many_texts_are_tokenized_as_seqio_tokenizes_each(tmp_path, kind, lengths):
    if kind == "words":
        vocabulary = vocabularies.arithmetic()
    elif kind == "sentencepiece":
        problems = [question for question, _ in arithmetic.problems()["validation"]]
        multi30k.train_sentencepiece(problems, tmp_path / "spiece.model", vocab_size=60)
        vocabulary = vocabularies.load(str(tmp_path / "spiece.model"))
    else:
        vocabulary = TokenizerVocabulary(small_tokenizers.write(tmp_path / "llama", "llama"))
    texts = ["Ada has 7 eggs.", "", "naïve 東京 eggs, 12?", "a " * 50]
    columns = {"inputs": texts, "targets": texts[::-1], "chat": texts, "number": [1, 2, 3, 4]}

    def source(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(columns)

    task = seqio.Task(
        "texts",
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=features.TOKENIZE,
        output_features=features.output_features(vocabulary),
    )
    ours = list(Split(task, "train", lengths).in_order())
    theirs = list(task.get_dataset(lengths, split="train", shuffle=False).as_numpy_iterator())
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert {"inputs_pretokenized", "targets_tokens", "chat", "number"} < mine.keys()
        for name, value in other.items():
            assert np.asarray(mine[name]).dtype == np.asarray(value).dtype
            np.testing.assert_array_equal(mine[name], value)
    assert len(list(Split(task, "train", lengths, num_examples=3).in_order())) == 3


def test_sources_with_vectors_are_left_to_seqio():
    def source(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        rows = tf.ragged.constant([[1], [2, 3]])
        examples = {"inputs": ["7", "7 eggs"], "targets": ["1", "2"], "choices": rows}
        return tf.data.Dataset.from_tensor_slices(examples)

    task = seqio.Task(
        "vectors",
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=features.TOKENIZE,
        output_features=features.output_features(vocabularies.arithmetic()),
    )
    lengths = {"inputs": 4, "targets": 4}
    split = Split(task, "train", lengths)
    assert split.source_rows() is None
    assert len(list(split.in_order())) == 2
    config = data.DataConfig(task="vectors", feature_lengths=lengths, batch_size=2)
    batch = next(streams.TrainIterator({task.name: task}, config))
    assert sorted(batch.input_lengths) == [2, 3]


def test_rows_of_one_known_length_make_batches_too(monkeypatch):
    def source(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        rows = np.arange(24, dtype=np.int32).reshape(6, 4) + 1
        return tf.data.Dataset.from_tensor_slices({"inputs": rows, "targets": rows[:, :3]})

    task = seqio.Task(
        "rows",
        source=seqio.FunctionDataSource(source, splits=["train"]),
        preprocessors=[],
        output_features=features.output_features(seqio.PassThroughVocabulary(100)),
    )
    config = data.DataConfig(task="rows", feature_lengths={"inputs": 5, "targets": 3}, batch_size=6)
    whole = next(streams.TrainIterator({task.name: task}, config))
    assert sorted(whole.inputs[:, 0]) == [1, 5, 9, 13, 17, 21]
    assert set(whole.input_lengths) == {4}
    np.testing.assert_array_equal(whole.inputs[:, :3], whole.targets)
    np.testing.assert_array_equal(whole.inputs[:, 4], 0)
    monkeypatch.setattr(shuffling, "LARGEST", 1)
    window = next(streams.TrainIterator({task.name: task}, config))
    np.testing.assert_array_equal(window.inputs[:, :3], window.targets)


def test_large_and_unknown_sources_keep_seqio_s_window(task, monkeypatch):
    monkeypatch.setattr(shuffling, "LARGEST", 100)
    monkeypatch.setattr(shuffling, "InMemory", None)  # is not asked for
    # seqio repeats first and shuffles then: an example may come twice within a pass.
    assert set(numbers(stream(task), 70)) <= set(range(SIZE))
    assert sorted(numbers(stream(task, num_examples=650), 65)) == list(range(650))


def test_the_number_of_examples_is_the_source_s():
    task = seqio.TaskRegistry.get("arithmetic")
    assert shuffling.number_of_examples(Split(task, "train", {}, None)) == arithmetic.SIZES["train"]
    assert shuffling.number_of_examples(Split(task, "train", {}, 2500)) == 2500
    assert shuffling.number_of_examples(Split(task, "validation", {}, 2500)) == 512
