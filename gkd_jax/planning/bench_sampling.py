"""Times sampling beside the plain loop, on answers whose lengths differ.

Random weights write no text, so no EOS ends an answer: the benchmark gives each row a limit, and
the row ends there. The limits have a geometric distribution, cut off at the target length, or all
are the target length. Both loops draw the same answers from the same keys and limits, in turn.
"""

import functools
import time
from typing import Any

import jax
import numpy as np

from gkd_jax import sharding
from gkd_jax.batch import Batch
from gkd_jax.models import decode_loop, lm
from gkd_jax.sampling import Sample, sample
from gkd_jax.training.program import Program


_WARMUP_RUNS = 1


def measure(
    built: Program, params: lm.Params, batch: Batch, runs: int, mean_length: int | float | None
) -> dict[str, Any]:
    """Returns tokens per second of both loops, and how far their samples and memory differ.

    `runs` batches are drawn and timed, after one that is not timed. The lengths of the answers are
    geometric with the mean `mean_length`; if it is None, every answer has the full length.
    """
    sampled, found = {}, {}
    draws = [_limits(built, turn, mean_length) for turn in range(_WARMUP_RUNS + runs)]
    for name, plain in (("sample", False), ("sample_plain", True)):
        began = time.perf_counter()
        function = jax.jit(functools.partial(_sample, built, plain))
        sampled[name] = function.lower(params, batch, jax.random.key(0), draws[0]).compile()
        found[f"{name}_compile_s"] = time.perf_counter() - began
        memory = sampled[name].memory_analysis()
        found[f"{name}_temporary_mb"] = memory.temp_size_in_bytes / 2**20
    seconds, tokens, differing = dict.fromkeys(sampled, 0.0), 0, 0
    for turn, limits in enumerate(draws):
        drawn: list[Sample] = []
        for name, function in sampled.items():
            began = time.perf_counter()
            drawn.append(
                jax.block_until_ready(function(params, batch, jax.random.key(turn), limits))
            )
            seconds[name] += (time.perf_counter() - began) * (turn >= _WARMUP_RUNS)
        tokens += int(np.sum(limits)) * (turn >= _WARMUP_RUNS)
        ours, plain = (np.asarray(sample.tokens) for sample in drawn)
        differing += int(np.sum(np.any(ours != plain, axis=1)))
    found |= {f"{name}_tokens_per_s": tokens / spent for name, spent in seconds.items()}
    return found | {"sample_differing_rows": differing}


def least_bytes(built: Program) -> float:
    """Returns the bytes that sampling answers of full length reads at least, on all devices.

    Each token reads the weights of the decoder, and the KV cache as far as it is written. An
    embedding that is not the output head is left out, since a token reads only one row of it.
    Where `decode_rows` is fewer than the rows, their answers are decoded one part after the other.
    """
    config, method = built.recipe.data, built.learner.config
    shape = built.batch(config.batch_size, config.shapes()[-1])

    def sizes(length: int) -> tuple[int, int]:
        """Returns the bytes of the weights, and those of the cache for `length` tokens."""
        start = functools.partial(
            decode_loop.start, built.models.student, length=length, copies=method.num_samples
        )
        with sharding.use(built.mesh):
            started = jax.eval_shape(start, built.state.params, shape.inputs, shape.input_lengths)
        params = dict(started.params)
        if "logits_dense" in params["decoder"]:
            del params["token_embedder"]
        return num_bytes(params), num_bytes(started.cache)

    def num_bytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # The cache grows by the same number of bytes at each token.
    length = config.shapes()[-1][1]
    (weights, first), (_, last) = sizes(1), sizes(length)
    rows = config.batch_size * method.num_samples
    parts = max(1.0, rows / (method.decode_rows or rows))
    return length * (parts * weights + (first + last) / 2)


def _sample(
    built: Program, plain: bool, params: lm.Params, batch: Batch, key: jax.Array, limits: jax.Array
) -> Sample:
    method = built.learner.config
    with sharding.use(built.mesh):
        return sample(
            built.models.student,
            params,
            batch.inputs,
            key,
            max_length=batch.targets.shape[1],
            input_lengths=batch.input_lengths,
            sampling=built.models.student_sampling(method.sampling),
            num_samples=method.num_samples,
            limits=limits,
            plain=plain,
            decode_rows=None if plain else method.decode_rows,
        )


def _limits(built: Program, turn: int, mean_length: int | float | None) -> np.ndarray:
    """Returns the lengths of the answers of one batch."""
    config = built.recipe.data
    rows = config.batch_size * built.learner.config.num_samples
    longest = config.shapes()[-1][1]
    if mean_length is None:
        return np.full(rows, longest, np.int32)
    generator = np.random.Generator(np.random.Philox(turn))
    return np.minimum(generator.geometric(1 / mean_length, rows), longest).astype(np.int32)
