"""Metrics of decoded text: BLEU, ROUGE, exact match, stated answers, Self-BLEU.

Every function of targets and predictions is a seqio `metric_fn`: lists of strings in, a dict of
Python floats out. All values are percentages. An empty prediction is a wrong prediction, not an
error; an empty list is an error.
"""

from collections.abc import Sequence
import re

import sacrebleu

from gkd_jax.text import calculator


References = Sequence[str] | Sequence[Sequence[str]]

_ROUGE_TYPES = ("rouge1", "rouge2", "rougeLsum")
_STATED = re.compile(r"the answer is:?\s*", re.I)
_ANSWER = re.compile(r"the answer is:?\s*(-?)\s*[$€£]?\s*(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)", re.I)


def bleu(
    targets: References, predictions: Sequence[str], *, tokenize: str = "intl"
) -> dict[str, float]:
    """Corpus BLEU as T5 computes it: sacreBLEU, case kept, exponential smoothing.

    Args:
        targets: one reference an example, or a list of references an example.
        predictions: decoded texts.
        tokenize: sacreBLEU's tokenizer; T5 uses "intl", the WMT tables "13a".

    Returns:
        `bleu`, 0 to 100.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    references = _references(targets, predictions)
    most = max(len(row) for row in references)
    # sacreBLEU wants one list a reference position; None marks a reference that is not there.
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    score = sacrebleu.corpus_bleu(
        list(predictions),
        columns,  # pyright: ignore[reportArgumentType]
        smooth_method="exp",
        lowercase=False,
        tokenize=tokenize,
    )
    return {"bleu": float(score.score)}


def rouge(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum: mean F1 over the examples, without stemming.

    As T5 does, " . " ends a sentence for ROUGE-Lsum. T5 reports the middle of a bootstrap
    resampling, which is this mean up to the resampling's noise.

    Of several references, the one with the largest ROUGE-1 counts for all three values, as in the
    evaluation of SciTLDR (Cachola et al., 2020).

    Args:
        targets: one reference an example, or a list of references an example.
        predictions: decoded texts.

    Returns:
        `rouge1`, `rouge2` and `rougeLsum`, 0 to 100.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    references = _references(targets, predictions)
    from rouge_score import rouge_scorer  # 0.6 s, for nltk: only those who ask for it wait

    scorer = rouge_scorer.RougeScorer(list(_ROUGE_TYPES))
    totals = dict.fromkeys(_ROUGE_TYPES, 0.0)
    for row, prediction in zip(references, predictions, strict=True):
        scores = [
            scorer.score(_one_sentence_a_line(x), _one_sentence_a_line(prediction)) for x in row
        ]
        best = max(scores, key=lambda score: score["rouge1"].fmeasure)
        for name in _ROUGE_TYPES:
            totals[name] += best[name].fmeasure
    return {name: 100.0 * float(total) / len(references) for name, total in totals.items()}


def exact_match(targets: References, predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions that equal a reference, white space at the ends aside."""
    references = _references(targets, predictions)
    hits = sum(
        prediction.strip() in [reference.strip() for reference in row]
        for row, prediction in zip(references, predictions, strict=True)
    )
    return {"exact_match": 100.0 * hits / len(references)}


def grouped_exact_match(
    targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
    """Exact match within each group, averaged over the groups, each with the same weight.

    So MMLU is averaged over subjects and BIG-Bench Hard over tasks.

    Args:
        targets: (group, right text) of each example.
        predictions: decoded texts; white space at their ends does not count.

    Returns:
        `accuracy`, 0 to 100.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    _check_lengths(targets, predictions)
    hits: dict[str, list[bool]] = {}
    for (group, target), prediction in zip(targets, predictions, strict=True):
        hits.setdefault(group, []).append(prediction.strip() == target.strip())
    shares = [sum(group) / len(group) for group in hits.values()]
    return {"accuracy": 100.0 * sum(shares) / len(shares)}


def answer_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of chains of thought that end in the right number, as GSM8K is graded.

    The answer is the number after the last `The answer is`. Numbers are compared exactly, so
    `$1,200.00` equals `1200`. `accuracy_with_calculator` corrects the equations of the prediction
    first (see `calculator.correct`).

    Args:
        targets: texts that hold the right answer in the same form.
        predictions: decoded texts.

    Returns:
        `accuracy` and `accuracy_with_calculator`, 0 to 100.

    Raises:
        ValueError: if a target has no answer, or if the lists are empty or differ in length.
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
    """The number after the last `The answer is`; None where there is none."""
    found = _ANSWER.findall(text)
    if not found:
        return None
    minus, other_minus, digits = found[-1]
    value = calculator.number(digits.rstrip(","))
    return None if value is None else -value if minus or other_minus else value


def stated_answer(text: str) -> str | None:
    """What follows the last `the answer is`, without a period at the end; None where nothing does.

    Of `So the answer is (B).` it is `(B)`.
    """
    parts = _STATED.split(text)
    return (parts[-1].strip().removesuffix(".").strip() or None) if len(parts) > 1 else None


def self_bleu(samples: Sequence[Sequence[str]], *, tokenize: str = "intl") -> dict[str, float]:
    """Self-BLEU (Zhu et al., 2018): how alike several samples for the same input are.

    Each sample is scored against the other samples of its input by sentence BLEU-4; the mean over
    samples, then inputs. 100 means that all are the same, 0 that they share nothing.

    Args:
        samples: for each input, at least two sampled texts.
        tokenize: sacreBLEU's tokenizer.

    Returns:
        `self_bleu`, 0 to 100.

    Raises:
        ValueError: if there are no inputs, or one has fewer than two samples.
    """
    if not samples:
        raise ValueError("self_bleu needs samples of at least one input, got none")
    metric = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
    total = 0.0
    for index, row in enumerate(samples):
        if len(row) < 2:
            raise ValueError(
                f"self_bleu needs two samples or more an input, input {index} has {len(row)}"
            )
        scores = [
            metric.sentence_score(text, [*row[:i], *row[i + 1 :]]).score
            if text.strip()
            # Nothing against nothing is a perfect match, which BLEU does not define.
            else 100.0 * any(not other.strip() for j, other in enumerate(row) if j != i)
            for i, text in enumerate(row)
        ]
        total += sum(scores) / len(scores)
    return {"self_bleu": float(total / len(samples))}


def _one_sentence_a_line(text: str) -> str:
    return text.replace(" . ", " .\n")


def _references(targets: References, predictions: Sequence[str]) -> list[list[str]]:
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
