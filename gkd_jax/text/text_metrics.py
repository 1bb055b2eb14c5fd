"""Metrics of decoded text: BLEU, ROUGE, exact match, accuracy of stated answers, Self-BLEU.

Every function of targets and predictions is a seqio `metric_fn`: it takes the reference (or a list
of references) and the decoded text of each example, and returns a dict of Python floats. All values
are percentages. An empty prediction counts as a wrong prediction. ValueError is raised for lists
that are empty or differ in length.
"""

from collections.abc import Sequence
import re

import sacrebleu

from gkd_jax.text import calculator


References = Sequence[str] | Sequence[Sequence[str]]

_TOKENIZE = "intl"
_ROUGE_TYPES = ("rouge1", "rouge2", "rougeLsum")
_STATED = re.compile(r"the answer is:?\s*", re.I)
_ANSWER = re.compile(r"the answer is:?\s*(-?)\s*[$€£]?\s*(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)", re.I)


def bleu(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns corpus BLEU as T5 computes it: sacreBLEU with case and with exponential smoothing.

    The tokenizer is T5's too, sacreBLEU's "intl". Published tables of WMT mostly use "13a".

    Returns:
        {"bleu": a number from 0 to 100}.
    """
    references = _references(targets, predictions)
    most = max(len(row) for row in references)
    # sacreBLEU takes one list per position of a reference; None stands for a missing reference.
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    score = sacrebleu.corpus_bleu(
        list(predictions),
        columns,  # pyright: ignore[reportArgumentType]
        smooth_method="exp",
        lowercase=False,
        tokenize=_TOKENIZE,
    )
    return {"bleu": float(score.score)}


def rouge(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 over examples of ROUGE-1, ROUGE-2 and ROUGE-Lsum, without stemming.

    As in T5, " . " ends a sentence for ROUGE-Lsum. T5 reports the middle of a bootstrap resampling,
    which equals this mean up to the noise of the resampling. If an example has several references,
    the reference with the largest ROUGE-1 counts for all three values, as in the evaluation of
    SciTLDR (Cachola et al., 2020).

    Returns:
        The values "rouge1", "rouge2" and "rougeLsum", numbers from 0 to 100.
    """
    references = _references(targets, predictions)
    from rouge_score import rouge_scorer  # Imported here because importing nltk takes 0.6 s.

    scorer = rouge_scorer.RougeScorer(list(_ROUGE_TYPES))
    best = [
        max(
            (scorer.score(_one_sentence_a_line(x), _one_sentence_a_line(text)) for x in row),
            key=lambda score: score["rouge1"].fmeasure,
        )
        for row, text in zip(references, predictions, strict=True)
    ]
    totals = {name: sum(score[name].fmeasure for score in best) for name in _ROUGE_TYPES}
    return {name: 100.0 * float(total) / len(best) for name, total in totals.items()}


def exact_match(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Returns {"exact_match": the percentage of predictions that equal a reference}.

    White space at the ends of predictions and references does not count.
    """
    references = _references(targets, predictions)
    hits = sum(
        prediction.strip() in [reference.strip() for reference in row]
        for row, prediction in zip(references, predictions, strict=True)
    )
    return {"exact_match": 100.0 * hits / len(references)}


def grouped_exact_match(
    targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns the exact match within each group, averaged over groups of equal weight.

    MMLU is averaged over its subjects in this way, and BIG-Bench Hard over its tasks.

    Args:
        targets: the group and the correct text of each example.
        predictions: the decoded text of each example. White space at the ends of texts does not
            count.

    Returns:
        {"accuracy": a number from 0 to 100}.
    """
    _check_lengths(targets, predictions)
    hits: dict[str, list[bool]] = {}
    for (group, target), prediction in zip(targets, predictions, strict=True):
        hits.setdefault(group, []).append(prediction.strip() == target.strip())
    shares = [sum(group) / len(group) for group in hits.values()]
    return {"accuracy": 100.0 * sum(shares) / len(shares)}


def answer_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the percentage of chains of thought with the correct answer, as GSM8K is graded.

    The answer is the number after the last `The answer is`. Numbers are compared by their exact
    values, so `$1,200.00` equals `1200`. For `accuracy_with_calculator`, the equations of the
    prediction are corrected first (see `calculator.correct`).

    Args:
        targets: texts that state the correct answer in the same form.

    Returns:
        The values "accuracy" and "accuracy_with_calculator", numbers from 0 to 100.

    Raises:
        ValueError: if a target states no answer.
    """
    _check_lengths(targets, predictions)
    hits = hits_calculator = 0
    for target, prediction in zip(targets, predictions, strict=True):
        wanted = answer(target)
        if wanted is None:
            raise ValueError(f"a target must say 'The answer is <number>', got {target!r}")
        hits += answer(prediction) == wanted
        hits_calculator += answer(calculator.correct(prediction)) == wanted
    count = len(targets)
    return {
        "accuracy": 100.0 * hits / count,
        "accuracy_with_calculator": 100.0 * hits_calculator / count,
    }


def answer(text: str) -> calculator.Number | None:
    """Returns the number after the last `The answer is`; None if there is no such number."""
    found = _ANSWER.findall(text)
    if not found:
        return None
    minus, other_minus, digits = found[-1]
    value = calculator.number(digits.rstrip(","))
    return None if value is None else -value if minus or other_minus else value


def stated_answer(text: str) -> str | None:
    """Returns the text after the last `the answer is`, without a period at the end.

    For example, the stated answer of `So the answer is (B).` is `(B)`. The result is None if the
    text states no answer.
    """
    parts = _STATED.split(text)
    return (parts[-1].strip().removesuffix(".").strip() or None) if len(parts) > 1 else None


def self_bleu(samples: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns Self-BLEU (Zhu et al., 2018), which measures how similar samples for one input are.

    Each sample is scored by sentence BLEU-4, with the other samples of its input as references. The
    scores are averaged over the samples of an input, then over inputs. The value is 100 if all
    samples of an input are the same, and 0 if they have nothing in common.

    Args:
        samples: at least two sampled texts for each input.

    Returns:
        {"self_bleu": a number from 0 to 100}.

    Raises:
        ValueError: if there are no inputs, or if an input has fewer than two samples.
    """
    if not samples:
        raise ValueError("self_bleu needs samples of at least one input, got none")
    metric = sacrebleu.BLEU(tokenize=_TOKENIZE, effective_order=True)
    total = 0.0
    for index, row in enumerate(samples):
        if len(row) < 2:
            raise ValueError(
                f"self_bleu needs two samples or more an input, input {index} has {len(row)}"
            )
        scores = [
            metric.sentence_score(text, [*row[:i], *row[i + 1 :]]).score
            if text.strip()
            # BLEU does not define the score of an empty text. Two empty texts are a perfect match.
            else 100.0 * any(not other.strip() for j, other in enumerate(row) if j != i)
            for i, text in enumerate(row)
        ]
        total += sum(scores) / len(scores)
    return {"self_bleu": float(total / len(samples))}


def _one_sentence_a_line(text: str) -> str:
    """Returns a text in the form that ROUGE-Lsum expects, with a newline after each sentence."""
    return text.replace(" . ", " .\n")


def _references(targets: References, predictions: Sequence[str]) -> list[list[str]]:
    """Returns the list of references of each example; checks the lengths of both lists."""
    _check_lengths(targets, predictions)
    rows = [[target] if isinstance(target, str) else list(target) for target in targets]
    if not all(rows):
        raise ValueError(f"every example needs a reference, example {rows.index([])} has none")
    return rows


def _check_lengths(targets: Sequence[object], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions) or not targets:
        raise ValueError(
            "targets and predictions must be of one length, and not empty; "
            f"got {len(targets)} and {len(predictions)}"
        )
