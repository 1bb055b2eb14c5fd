"""What a step trains on: its batch and its sample, with the sample's own reward and advantage."""

import types
from typing import Any

import jax
import numpy as np
import pytest

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
    of_data = rollout._replace(sample=None)
    assert rollouts._with_rewards(of_data) is of_data


def faked(ids, fraction, drawn):
    """Rollouts over one-row batches of these ids; `drawn` gets what each sample is drawn from."""
    rollouts: Any = object.__new__(Rollouts)
    recipe = types.SimpleNamespace(
        train=types.SimpleNamespace(seed=7),
        data=types.SimpleNamespace(feature_lengths={"targets": 3}),
    )
    rollouts._program = types.SimpleNamespace(
        recipe=recipe,
        method=gkd.GKDConfig(on_policy_fraction=fraction),
        models=types.SimpleNamespace(num_pieces=50),
    )
    full = [np.full((1, 2), i, np.int32) for i in ids]
    rollouts._stream = iter([Batch(x, x, np.ones((1, 2), np.float32)) for x in full])
    rollouts._ahead, rollouts._cache, rollouts._is_sharded = None, None, False
    rollouts._place = lambda batch: batch
    rollouts._clock = types.SimpleNamespace(seconds=lambda began, result: None)

    def sample(params, batch, key):
        drawn.append((params["step"], int(batch.inputs[0, 0]), batch.targets.shape, key))
        return batch, Sample(batch.targets, batch.weights, batch.weights)

    parts = types.SimpleNamespace(sample=sample, update_samples="samples", update_dataset="dataset")
    rollouts._steps = {(2, 3): None, (2, 2): parts}
    return rollouts


def test_the_sample_of_a_step_has_the_key_of_this_step_and_is_drawn_once():
    """It may be as long as targets of the longest bucket."""
    drawn: list[Any] = []
    rollouts = faked([10, 11, 12, 13], 1.0, drawn)
    found = [rollouts.draw(s, {"step": s}, draw_next=s < 2) for s in range(4)]
    assert [int(rollout.rows.inputs[0, 0]) for rollout in found] == [10, 11, 12, 13]
    assert [rollout.is_early for rollout in found] == [False, True, True, False]
    assert {rollout.update for rollout in found} == {"samples"}
    assert [one[:3] for one in drawn] == [
        (0, 10, (1, 3)),
        (0, 11, (1, 3)),
        (1, 12, (1, 3)),
        (3, 13, (1, 3)),
    ]
    for step, (rollout, one) in enumerate(zip(found, drawn, strict=True)):
        assert rollout.keys == gkd.step_keys(7, step)
        assert one[3] == rollout.keys.sampling


def test_a_step_on_the_data_set_draws_nothing():
    rollouts = faked([10], 0.0, None)
    found = rollouts.draw(0, {}, draw_next=False)
    assert (found.sample, found.update, found.batch.targets.shape) == (None, "dataset", (1, 2))


def test_a_token_that_the_models_lack_is_refused():
    with pytest.raises(ValueError, match="have the id 50, and the vocabulary and the models share"):
        faked([50], 0.0, None).draw(0, {}, draw_next=False)
