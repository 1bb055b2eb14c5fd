"""Decoding by likeliest choice picks what the model's logits of the first token say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, tiny_t5
import seqio
import tokenizers

from gkd_jax import gkd, sharding
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate, rewards
from gkd_jax.input import padded_batches
from gkd_jax.models import t5
from gkd_jax.text import vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary


CONFIG = tiny_t5(384)


def decoder(vocabulary, choices=("A", "B", "C", "D")):
    evaluation = evaluate.EvalConfig(decoding="likeliest", choices=choices)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    return evaluate.make_decoder(
        CONFIG,
        evaluation,
        vocabulary=vocabulary,
        num_pieces=vocabulary.vocab_size,
        mesh=mesh,
        length=4,
    )


def test_fewer_rows_at_a_time_give_the_same_rows():
    """The 14 examples of a batch of 16, two samples of each, in 8 rows of the cache."""
    vocabulary = vocabularies.load("bytes")
    params, teacher_params = (random_params(CONFIG, seed) for seed in (1, 2))
    ids = np.random.default_rng(0).integers(3, 259, (14, 6)).tolist()
    rows = [{"inputs": row, "targets": [1]} for row in ids]
    batch = padded_batches.fill_batch(rows, {"inputs": 6, "targets": 4}, 16)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:2])
    pair = gkd.ModelPair(student=CONFIG, teacher=CONFIG, num_pieces=vocabulary.vocab_size)
    teacher = evaluate.Teacher(evaluate.teacher_divergence(pair, mesh), teacher_params)
    decoded = []
    for decode_rows in (None, 8):
        decode = evaluate.make_decoder(
            CONFIG,
            evaluate.EvalConfig(decoding="sample", num_samples=2, decode_rows=decode_rows),
            vocabulary=vocabulary,
            num_pieces=vocabulary.vocab_size,
            mesh=mesh,
            length=4,
        )
        decoded.append(list(decode(params, [batch], teacher=teacher)))
    whole, in_parts = decoded
    assert len(whole) == 28
    assert [row.tokens for row in in_parts] == [row.tokens for row in whole]
    for one, other in zip(in_parts, whole, strict=True):
        np.testing.assert_allclose(one.divergence, other.divergence, atol=1e-5)


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [("greedy", [False, True, False, False]), ("likeliest", [False] * 4)],
)
def test_a_text_without_an_end_is_truncated(decoding, expected, monkeypatch):
    tokens = np.array([[70, 1, 0, 0], [70, 71, 72, 73], [70, 71, 72, 1], [1, 0, 0, 0]])
    monkeypatch.setattr(evaluate, "_decode_fn", lambda *_: lambda *_: tokens)
    decode = evaluate.make_decoder(
        CONFIG,
        evaluate.EvalConfig(decoding=decoding),
        vocabulary=vocabularies.load("bytes"),
        num_pieces=259,
        mesh=sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
        length=4,
    )
    rows = [{"inputs": [70, 1], "targets": [1]}] * 4
    batch = padded_batches.fill_batch(rows, {"inputs": 2, "targets": 4}, 4)
    assert [row.truncated for row in decode(None, [batch])] == expected


def test_two_rewards_of_one_name_are_refused():
    """Only one of the two numbers would be reported."""
    both = (rewards.Brevity(limit=3), rewards.Brevity(limit=5))
    with pytest.raises(ValueError, match=r"got \['brevity', 'brevity'\]"):
        evaluate.EvalConfig(rewards=both)


@pytest.mark.parametrize("how", [{"decoding": "beam"}, {"calculator": True}])
def test_beams_and_the_calculator_decode_whole_batches(how):
    with pytest.raises(ValueError, match=r"decode_rows=8 with .* would decode whole batches"):
        evaluate.EvalConfig(decode_rows=8, **how)


def test_likeliest_takes_the_choice_with_the_largest_first_logit():
    vocabulary = vocabularies.load("bytes")
    # Large weights, so that the likeliest choice differs between inputs.
    params = jax.tree.map(lambda x: 20 * x, random_params(CONFIG, 1))
    ids = np.random.default_rng(0).integers(3, 259, (16, 24)).tolist()
    rows = [{"inputs": row, "targets": [1]} for row in ids]
    batch = padded_batches.fill_batch(rows, {"inputs": 24, "targets": 4}, 16)
    found = [row.prediction for row in decoder(vocabulary)(params, [batch])]
    inputs, targets = jnp.asarray(batch.batch.inputs), jnp.zeros((16, 1), int)
    first = Batch(inputs, targets, jnp.ones((16, 1)))
    logits = np.asarray(t5.logits(CONFIG, params, first))[:, 0]
    letters = [vocabulary.encode(letter)[0] for letter in "ABCD"]
    expected = ["ABCD"[index] for index in logits[:, letters].argmax(1)]
    assert found == expected
    assert len(set(expected)) > 1
    assert not set(logits.argmax(1).tolist()) <= set(letters)  # greedy would write something else


def test_a_choice_behind_a_space_counts_too(shared):
    """After "Answer:" a model writes " B", which is a token of its own to Qwen 3 and Llama 3."""
    for name in ("qwen3", "llama3_1"):
        folder = shared / "tokenizers" / name
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        after, alone = (
            {theirs.encode(space + letter, add_special_tokens=False).ids[-1] for letter in "ABCD"}
            for space in ("Answer: ", "")
        )
        assert not after & alone
        found = evaluate._single_tokens(TokenizerVocabulary(folder), tuple("ABCD"))
        assert found == after | alone


def test_choices_of_several_tokens_or_of_the_same_are_refused():
    vocabulary = vocabularies.load("bytes")
    for choices in (("yes", "no"), ("A", "A"), ()):
        with pytest.raises(ValueError, match="needs choices of one token each, all different"):
            decoder(vocabulary, choices)


def test_t5_s_vocabulary_has_a_token_for_each_letter(shared):
    path = str(shared / "data" / "t5_vocab" / "spiece.model")
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=100)
    assert len(evaluate._single_tokens(vocabulary, ("A", "B", "C", "D"))) == 4
