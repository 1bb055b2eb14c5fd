"""The reward of a sample sees the texts of its own prompt, and its advantage is among its own."""

import types
from typing import Any

import jax
import numpy as np

from gkd_jax import gkd, rl, sharding
from gkd_jax.batch import Batch
from gkd_jax.sampling import Sample
from gkd_jax.text import vocabularies
from gkd_jax.training.rollouts import Rollout, Rollouts


def test_a_sample_is_rewarded_beside_its_prompt_and_compared_with_the_others_of_this_prompt():
    vocabulary = vocabularies.load("bytes")
    prompts, references = ["one", "two?"], ["first", "2nd"]
    outputs = ["a", "bb", "ccc", "d"]  # two samples a prompt

    def padded(texts, width):
        """The ids of texts that end in EOS, and their numbers, with rubbish behind them."""
        ids = np.full((len(texts), width), vocabulary.encode("x")[0], np.int32)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text) + 1] = [*vocabulary.encode(text), 1]
        lengths = np.asarray([len(text) + 1 for text in texts], np.int32)
        return ids, lengths, (np.arange(width) < lengths[:, None]).astype(np.float32)

    seen = []

    def reward(*texts):
        seen.extend(zip(*texts, strict=True))
        return np.asarray([0.0, 1.0, 5.0, 3.0])

    inputs, lengths, _ = padded(prompts, 8)
    targets, _, weights = padded(references, 7)
    tokens, _, drawn = padded(outputs, 6)
    method = gkd.GKDConfig(num_samples=2, rl=rl.RLConfig(reward=reward, alpha=0.5))
    rollouts: Any = object.__new__(Rollouts)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2), jax.devices()[:2])
    rollouts._program = types.SimpleNamespace(method=method, mesh=mesh)
    rollouts._source = types.SimpleNamespace(vocabulary=vocabulary)
    unused: Any = None
    rows = Batch(inputs, targets, weights, input_lengths=lengths)
    sample = Sample(tokens, drawn, np.zeros_like(drawn))
    rollout = Rollout(rows, unused, unused, unused, 0.0, sample)
    found = rollouts._with_rewards(rollout)
    assert seen == [
        ("one", "a", "first"),
        ("one", "bb", "first"),
        ("two?", "ccc", "2nd"),
        ("two?", "d", "2nd"),
    ]
    np.testing.assert_array_equal(found.rewards, [0.0, 1.0, 5.0, 3.0])
    np.testing.assert_array_equal(found.advantages, [-1.0, 1.0, 2.0, -2.0])
