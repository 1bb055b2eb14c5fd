from fractions import Fraction

import pytest
from rouge_score import rouge_scorer
import sacrebleu

from gkd_jax.text import text_metrics


REFERENCES = ["The cat sat on the mat .", "He bought 3 apples , two pears .", "Nothing new here ."]
GUESSES = ["The cat is on the mat .", "He bought three apples and pears .", "Something new there ."]


# BLEU and ROUGE -----------------------------------------------------------------------------------


def test_bleu_is_sacrebleu_with_t5_settings():
    references, guesses = [*REFERENCES, "„Ja“, sagt er."], [*GUESSES, "„Ja“ sagt er."]
    expected = sacrebleu.corpus_bleu(guesses, [references], tokenize="intl").score
    other = sacrebleu.corpus_bleu(guesses, [references], tokenize="13a").score
    assert abs(expected - other) > 0.1
    value = text_metrics.bleu(references, guesses)["bleu"]
    assert type(value) is float
    assert value == pytest.approx(expected, abs=1e-9)
    assert 0 < value < 100


def test_bleu_by_hand():
    # 5 of 6 unigrams, 3 of 5 bigrams, 1 of 4 trigrams, and no 4-gram of 3: smoothed to 1/(2*3).
    value = text_metrics.bleu(["a b c d e f"], ["a b c x e f"])["bleu"]
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert value == pytest.approx(expected, rel=1e-9)


def test_bleu_takes_several_references_of_any_number():
    guesses = ["a b c d e", "v w x y z"]
    assert text_metrics.bleu([["q", "a b c d e"], ["v w x y z"]], guesses)["bleu"] == pytest.approx(
        100
    )
    assert text_metrics.bleu([["q"], ["v w x y z"]], guesses)["bleu"] < 60


def test_bleu_keeps_case():
    assert text_metrics.bleu(["A B C D"], ["a b c d"])["bleu"] == 0.0


def test_rouge_is_the_mean_of_rouge_score():
    names = ["rouge1", "rouge2", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names)
    values = text_metrics.rouge(REFERENCES, GUESSES)
    for name in names:
        scores = [
            scorer.score(a, b)[name].fmeasure for a, b in zip(REFERENCES, GUESSES, strict=True)
        ]
        assert type(values[name]) is float
        assert values[name] == pytest.approx(100 * sum(scores) / 3)


def test_rouge_by_hand():
    # Unigrams: 2 of 4 and of 2; bigrams: 1 of 3 and of 1. F1 = 2PR / (P + R).
    values = text_metrics.rouge(["a b c d"], ["a b"])
    assert values["rouge1"] == pytest.approx(100 * 2 * 0.5 / 1.5)
    assert values["rouge2"] == pytest.approx(100 * 2 * (1 / 3) / (4 / 3))
    assert text_metrics.rouge(["apples"], ["apple"])["rouge1"] == 0.0  # words are not stemmed


def test_rouge_lsum_takes_spaced_periods_as_ends_of_sentences():
    # Sentence by sentence, both are found whole; as one sequence, only one of them is in order.
    values = text_metrics.rouge(["a b c . d e f"], ["d e f . a b c"])
    assert values["rougeLsum"] == pytest.approx(100.0)
    assert text_metrics.rouge(["a b c d e f"], ["d e f a b c"])["rougeLsum"] == pytest.approx(50.0)


def test_rouge_scores_against_the_reference_with_the_best_rouge1():
    # The second reference shares more words but no pair of words.
    values = text_metrics.rouge([["a b x y", "c b a d"]], ["a b c d"])
    assert values["rouge1"] == pytest.approx(100.0)
    assert values["rouge2"] == 0.0


@pytest.mark.parametrize(
    "metric", [text_metrics.bleu, text_metrics.rouge, text_metrics.exact_match]
)
def test_empty_predictions_score_zero(metric):
    values = metric(REFERENCES, ["", " ", ""])
    assert set(values.values()) == {0.0}
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize(
    "metric",
    [text_metrics.bleu, text_metrics.rouge, text_metrics.exact_match, text_metrics.answer_accuracy],
)
def test_lists_of_different_lengths_are_refused(metric):
    with pytest.raises(ValueError, match="got 2 and 1"):
        metric(["The answer is 1."] * 2, ["The answer is 1."])
    with pytest.raises(ValueError, match="got 0 and 0"):
        metric([], [])


def test_exact_match_ignores_outer_space_only():
    values = text_metrics.exact_match(["yes", "no", ["a", "b"]], [" yes\n", "No", "b"])
    assert values == {"exact_match": pytest.approx(200 / 3)}


def test_grouped_exact_match_gives_every_group_the_same_weight():
    targets = [("a", "A"), ("a", "B"), ("a", "C"), ("a", "D"), ("b", "A")]
    guesses = ["A", " A", "", "C", " A\n"]
    values = text_metrics.grouped_exact_match(targets, guesses)
    assert values == {"accuracy": pytest.approx((25 + 100) / 2)}
    with pytest.raises(ValueError, match="got 0 and 0"):
        text_metrics.grouped_exact_match([], [])
    with pytest.raises(ValueError, match="got 5 and 1"):
        text_metrics.grouped_exact_match(targets, ["A"])


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("It is. So the answer is (B).", "(B)"),
        ("So the answer is valid", "valid"),
        ("So THE answer is: ] ) > .", "] ) >"),
        ("The answer is a. No, the answer is it&t oven.", "it&t oven"),
        ("So the answer is -219.", "-219"),
        ("So the answer is.", None),
        ("The answer is ", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_stated_answer(text, stated):
    assert text_metrics.stated_answer(text) == stated


def test_self_bleu_ranges_from_all_different_to_all_the_same():
    same = [["a b c d e"] * 3, ["x"] * 2]
    assert text_metrics.self_bleu(same)["self_bleu"] == pytest.approx(100.0)
    assert text_metrics.self_bleu([["a b c d e", "v w x y z"]])["self_bleu"] == 0.0
    assert text_metrics.self_bleu([["", ""], ["", "a"]])["self_bleu"] == pytest.approx(50.0)


def test_self_bleu_is_the_mean_of_sentence_bleu_against_the_others():
    row = ["the cat sat on the mat", "the cat sat on a mat", "a dog lay on the mat"]
    expected = [
        sacrebleu.sentence_bleu(text, row[:i] + row[i + 1 :], tokenize="intl").score
        for i, text in enumerate(row)
    ]
    value = text_metrics.self_bleu([row])["self_bleu"]
    assert value == pytest.approx(sum(expected) / 3)
    with pytest.raises(ValueError, match="input 1 has 1"):
        text_metrics.self_bleu([["a", "b"], ["a"]])


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7. The answer is 7.", 7),
        ("The answer is $1,200.00.", 1200),
        ("The answer is -5", -5),
        ("The answer is $-5.", -5),
        ("The answer is €7, or £6.", 7),
        ("the answer is: -$5.50 dollars", Fraction(-11, 2)),
        ("The answer is 1. No. The answer is 2.", 2),
        ("The answer is 70,000, I think", 70000),
        ("The answer is .5", Fraction(1, 2)),
        ("The answer is seven.", None),
        ("7", None),
        ("The answer is " + "9" * 5000, None),
        ("", None),
    ],
)
def test_answer(text, value):
    assert text_metrics.answer(text) == value


def test_answer_accuracy_with_and_without_the_calculator():
    targets = ["The answer is 7.", "The answer is 24.", "The answer is 3.", "The answer is 4."]
    guesses = [
        "3 + 4 = 7. The answer is 7.0",
        "7 + 5 = 11. 11 * 2 = 21. The answer is 21.",
        "3",
        "",
    ]
    values = text_metrics.answer_accuracy(targets, guesses)
    assert values == {"accuracy": 25.0, "accuracy_with_calculator": 50.0}
    with pytest.raises(ValueError, match="no number here"):
        text_metrics.answer_accuracy(["no number here"], ["The answer is 1."])
