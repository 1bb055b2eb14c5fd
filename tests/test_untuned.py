"""The options of tf.data datasets: a fixed order, and no thread that outlives the last example."""

import numpy as np
from small_runs import LENGTHS
import tensorflow as tf

from gkd_jax.input import named_tasks, shuffling
from gkd_jax.input.data import DataConfig
from gkd_jax.input.split import Split, untuned
import gkd_jax.tasks.arithmetic  # noqa: F401


def test_the_elements_stay_and_nothing_is_tuned():
    numbers = (
        tf.data.Dataset.range(20)
        .shuffle(20, seed=3, reshuffle_each_iteration=False)
        .map(lambda x: 2 * x)
    )
    plain = untuned(numbers, num_threads=1)
    np.testing.assert_array_equal(
        list(plain.as_numpy_iterator()), list(numbers.as_numpy_iterator())
    )
    options = plain.options()
    assert options.deterministic
    assert not options.autotune.enabled
    assert options.threading.private_threadpool_size == 1
    assert untuned(numbers).options().threading.private_threadpool_size is None


def test_the_window_of_a_large_source_is_not_tuned(monkeypatch):
    monkeypatch.setattr(shuffling, "LARGEST", 1)
    config = DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=4, num_examples=8)
    task, _ = named_tasks.open_task(config)
    window = shuffling.shuffled(Split.of(task, config), config.features(), 0, 4)
    assert not window._iterator._dataset.options().autotune.enabled
