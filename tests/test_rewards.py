"""Rewards give the documented numbers; the entailment score is the model's own logits."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params, tiny_t5
import seqio

from gkd_jax import losses
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate, rewards
from gkd_jax.input import named_tasks
from gkd_jax.input.data import DataConfig
from gkd_jax.input.split import Split
from gkd_jax.models import t5
from gkd_jax.storage import saved_model
from gkd_jax.storage.pretrained import ModelConfig
import gkd_jax.tasks.rte  # noqa: F401
from gkd_jax.text import vocabularies


PROMPTS = ["p", "q", "r"]


def test_exact_answer():
    outputs = ["2 + 2 = 4. The answer is 4.", "The answer is 5.", "no answer"]
    references = ["The answer is 4.0.", "The answer is 4.", "The answer is 4."]
    assert rewards.exact_answer(PROMPTS, outputs, references).tolist() == [1.0, 0.0, 0.0]
    # A reference that was cut before its answer rewards nothing.
    assert rewards.exact_answer(["p"], ["nothing"], ["cut off"]).tolist() == [0.0]


def test_rouge2():
    # Bigrams: 2 of 3 and 2 of 2; none; empty.
    outputs = ["the cat sat", "a dog", ""]
    references = ["the cat sat down", "the cat", "the cat"]
    np.testing.assert_allclose(rewards.rouge2(PROMPTS, outputs, references), [0.8, 0.0, 0.0])


def test_brevity():
    got = rewards.Brevity(limit=1)(PROMPTS, ["one", "one two three", ""], PROMPTS)
    assert got.tolist() == [0.0, -2.0, 0.0]
    words = ["word " * 30, "word " * 31]
    assert rewards.brevity()(PROMPTS[:2], words, words).tolist() == [0.0, -1.0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(folder, config, params) of a small random T5 over bytes."""
    folder = str(tmp_path_factory.mktemp("nli") / "model")
    config = tiny_t5(384)
    params = random_params(config)
    saved_model.write_params(folder, config, params, "")
    return folder, config, params


def test_entailment_is_the_log_probability_of_the_label(classifier):
    folder, config, params = classifier
    score = rewards.Entailment(
        model=ModelConfig(checkpoint=folder),
        vocabulary="bytes",
        label="yes",
        prefix="summarize: ",
        length=80,
        batch_size=8,
    )
    premises = [f"document {i}" for i in range(9)]  # more than one batch
    outputs = [f"output {i * i}" for i in range(9)]
    got = score([f"summarize: {premise}" for premise in premises], outputs, outputs)
    vocabulary = vocabularies.load("bytes")
    label = [*vocabulary.encode("yes"), 1]
    for premise, output, value in zip(premises, outputs, got, strict=True):
        text = f"premise: {premise} hypothesis: {output}"
        inputs, targets = jnp.array([[*vocabulary.encode(text), 1]]), jnp.array([label])
        batch = Batch(inputs, targets, jnp.ones(targets.shape))
        logits = t5.logits(config, params, batch)[..., : vocabulary.vocab_size]
        expected = -losses.cross_entropy(logits, targets).sum()
        np.testing.assert_allclose(value, expected, atol=1e-4)


def test_entailment_points_count_the_outputs_that_are_called_entailed(classifier):
    score = rewards.Entailment(model=ModelConfig(checkpoint=classifier[0]), vocabulary="bytes")
    # "1" more probable than all else together: 0.51 and 0.9, but not 0.5 and 0.49.
    found = score.report(np.log([0.51, 0.9, 0.5, 0.49]))
    assert found["entailed"] == 50.0
    assert found["entailment"] == pytest.approx(np.log([0.51, 0.9, 0.5, 0.49]).mean())
    assert score.label == "1"


def test_an_evaluation_reports_both_numbers_of_a_classifier(classifier):
    class Known(rewards.Entailment):
        def __call__(self, prompts, outputs, references):
            return np.log([0.75 if output == "yes" else 0.25 for output in outputs])

    known = Known(model=ModelConfig(checkpoint=classifier[0]), vocabulary="bytes")
    texts = {"inputs_pretokenized": "p", "targets_pretokenized": "yes"}
    rows = [evaluate.DecodedRow(texts, output, [1], None) for output in ("yes", "no", "yes", "yes")]
    settings = evaluate.EvalConfig(rewards=(known, rewards.Brevity()))
    values = evaluate.compute_metrics(seqio.TaskRegistry.get("rte"), rows, settings)
    assert values == {
        "exact_match": 75.0,
        "entailment": pytest.approx((3 * np.log(0.75) + np.log(0.25)) / 4),
        "entailed": 75.0,
        "brevity": 0.0,
    }


def test_rows_without_a_target_do_not_count_in_a_reward_that_compares(tmp_path):
    """As in the metrics of the task; the others count them."""
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"inputs": "one", "targets": "the cat sat"}\n{"inputs": "two"}\n'
        '{"inputs": "three", "targets": "The answer is 3."}\n'
    )
    lengths = {"inputs": 8, "targets": 32}
    config = DataConfig(task=str(file), vocabulary="bytes", feature_lengths=lengths, batch_size=1)
    task, _ = named_tasks.open_task(config)
    texts = ["the cat sat", "the cat sat", "The answer is 3."]
    rows = [
        evaluate.DecodedRow(example, text, [], None)
        for example, text in zip(Split.of(task, config).in_order(), texts, strict=True)
    ]

    @functools.wraps(rewards.exact_answer)  # as gin wraps a function
    def exact_answer(*texts):
        return rewards.exact_answer(*texts)

    @rewards.compares
    def of_a_user(prompts, outputs, references):
        assert all(references)
        return rewards.exact_answer(prompts, outputs, references)

    class Whole:
        compares_with_references = True

        def __call__(self, prompts, outputs, references):
            return np.array([float(a == b) for a, b in zip(outputs, references, strict=True)])

    chosen = (rewards.rouge2, exact_answer, of_a_user, Whole(), rewards.Brevity(limit=2))
    settings = evaluate.EvalConfig(rewards=chosen)
    expected = {"exact_match": 100.0, "rouge2": 1.0, "exact_answer": 0.5, "brevity": -4 / 3}
    expected |= {"of_a_user": 0.5, "whole": 1.0}
    assert evaluate.compute_metrics(task, rows, settings) == pytest.approx(expected)
    none = evaluate.compute_metrics(task, rows[1:2], settings)
    assert none == {"brevity": -1.0}


def test_a_long_premise_is_cut_and_the_hypothesis_kept(classifier):
    folder, _, _ = classifier
    score = rewards.Entailment(model=ModelConfig(checkpoint=folder), vocabulary="bytes", length=61)
    ids = score._encode("word " * 100, "the hypothesis")
    assert len(ids) == 61  # five words fit exactly
    text = vocabularies.load("bytes").decode(ids[:-1])
    assert text.startswith("premise: word word")
    assert text.endswith(" hypothesis: the hypothesis")


def test_the_template_and_the_end_stay_where_the_hypothesis_alone_is_too_long(classifier):
    template = "premise: {premise} hypothesis: {hypothesis} true?"
    score = rewards.Entailment(
        model=ModelConfig(checkpoint=classifier[0]),
        vocabulary="bytes",
        template=template,
        length=50,
    )
    vocabulary = vocabularies.load("bytes")
    for premise, hypothesis in (("a premise", "0123456789" * 9), ("", "ab" * 40)):
        ids = score._encode(premise, hypothesis)
        assert (len(ids), ids[-1]) == (50, 1)
        kept = hypothesis[: 49 - len("premise:  hypothesis:  true?")]
        assert vocabulary.decode(ids[:-1]) == f"premise:  hypothesis: {kept} true?"
    short = rewards.Entailment(
        model=ModelConfig(checkpoint=classifier[0]),
        vocabulary="bytes",
        template=template,
        length=20,
    )
    with pytest.raises(ValueError, match="29 tokens without its texts, got 20"):
        short._encode("a premise", "a hypothesis")


def test_a_long_premise_without_spaces_keeps_its_beginning(classifier):
    score = rewards.Entailment(
        model=ModelConfig(checkpoint=classifier[0]), vocabulary="bytes", length=40
    )
    ids = score._encode("0123456789" * 9, "the end")
    text = vocabularies.load("bytes").decode(ids[:-1])
    assert text == "premise: 0123456789 hypothesis: the end"


def test_bad_settings_are_refused(classifier):
    model = ModelConfig(checkpoint=classifier[0])
    with pytest.raises(ValueError, match="template must contain"):
        rewards.Entailment(model=model, vocabulary="bytes", template="{premise}")
    with pytest.raises(ValueError, match="length must be a positive integer, got 0"):
        rewards.Entailment(model=model, vocabulary="bytes", length=0)
