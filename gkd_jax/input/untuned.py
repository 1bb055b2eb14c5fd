"""`untuned`: the options of every tf.data dataset that is read here."""

import tensorflow as tf


def untuned(dataset: tf.data.Dataset, *, num_threads: int | None = None) -> tf.data.Dataset:
    """Returns a dataset with a deterministic order, which tf.data does not tune while it is read.

    tf.data tunes its parallelism in a thread that sleeps longer and longer between its rounds, up
    to a minute, and nothing wakes it: an iterator that is closed waits until the thread has slept.
    A run of a minute ended up to a minute late. The datasets here have few stages, whose
    parallelism is set.

    Args:
        dataset: any dataset.
        num_threads: the threads of this dataset alone; None takes those that all datasets share.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    if num_threads is not None:
        options.threading.private_threadpool_size = num_threads
    return dataset.with_options(options)
