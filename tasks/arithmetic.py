"""The task `arithmetic`: generated word problems with step-by-step answers; nothing to download.

    inputs:  Ada has 7 eggs. Ada buys 5 more eggs. Ada doubles the number of eggs. How many ...?
    targets: 7 + 5 = 12. 12 * 2 = 24. The answer is 24.

Problems have two or three steps. They are graded like GSM8K, by the number at the end of a chain of
thought, so a model has to get every step right. The default vocabulary is "arithmetic". With it, in
one run, a T5 of 0.8 M parameters that was trained from scratch for 900 steps with batches of 64
problems (gin/quickstart.gin) answered 96 % of the validation split correctly; a T5 of 0.15 M
parameters answered 9 % correctly after 400 steps. The longest input has 34 tokens and the longest
target has 24 tokens, including EOS.

The task `arithmetic_hints` has every problem twice: as it is, and with its solution behind the
question. A model that is trained on it can read solutions, as a teacher that is shown them must
(gin/self_distillation_hints.gin). Its first 2 n examples are made from the first n problems.

The task `arithmetic_backwards` is one of texts, without calculation: it gives a problem without its
question, and asks for the sentences in reverse order. A student can learn it beside `arithmetic`,
from a teacher of its own (gin/two_teachers.gin).

    inputs:  Ada has 7 eggs. Ada buys 5 more eggs. Ada doubles the number of eggs.
    targets: Ada doubles the number of eggs. Ada buys 5 more eggs. Ada has 7 eggs.
"""

from collections.abc import Callable, Sequence
import functools
import random

from gkd_jax.tasks import features
from gkd_jax.text import text_metrics, vocabularies


SIZES = {"train": 50_000, "validation": 512, "test": 1024}
SEED = 0

_MAX_START = 20
_MAX_OPERAND = 9
# The bound on products keeps all numbers below 50. A model has to learn each sum of two numbers
# separately, because every number is a token of its own.
_MAX_PRODUCT = 30
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ivy")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "stones")
_GAINS = ("gets", "finds", "buys", "wins")
_LOSSES = ("gives away", "loses", "sells", "drops")
_FACTORS = {2: "doubles", 3: "triples"}


@functools.cache
def problems(seed: int = SEED) -> dict[str, list[tuple[str, str]]]:
    """Returns pairs of a question and a chain of thought for each split.

    All questions in all splits are different.

    Args:
        seed: the seed of the problems. The same seed gives the same problems on every machine.
    """
    # `random()` is the only method whose results Python promises to keep the same in new versions.
    draw = random.Random(seed).random
    below = lambda limit: int(draw() * limit)  # noqa: E731
    seen: dict[str, str] = {}
    total = sum(SIZES.values())
    while len(seen) < total:
        question, chain = _problem(below)
        seen.setdefault(question, chain)
    pairs = iter(seen.items())
    return {split: [next(pairs) for _ in range(size)] for split, size in SIZES.items()}


def _problem(below: Callable[[int], int]) -> tuple[str, str]:
    """Returns a random question and its chain of thought; `below(n)` draws a number below n."""
    name, thing = _NAMES[below(len(_NAMES))], _THINGS[below(len(_THINGS))]
    value = 1 + below(_MAX_START)
    sentences, steps = [f"{name} has {value} {thing}."], []
    for _ in range(2 + below(2)):
        kind, operand = below(5), 1 + below(_MAX_OPERAND)
        factor = 2 + below(2)
        if kind == 4 and value * factor <= _MAX_PRODUCT:
            sentences.append(f"{name} {_FACTORS[factor]} the number of {thing}.")
            result, step = value * factor, f"{value} * {factor}"
        elif kind in (2, 3) and operand <= value:
            sentences.append(f"{name} {_LOSSES[below(4)]} {operand} {thing}.")
            result, step = value - operand, f"{value} - {operand}"
        else:
            sentences.append(f"{name} {_GAINS[below(4)]} {operand} more {thing}.")
            result, step = value + operand, f"{value} + {operand}"
        steps.append(f"{step} = {result}.")
        value = result
    question = f"How many {thing} are there now?"
    return " ".join([*sentences, question]), " ".join([*steps, f"The answer is {value}."])


def _columns(split: str) -> dict[str, Sequence[str]]:
    questions, chains = zip(*problems()[split], strict=True)
    return {"inputs": questions, "targets": chains}


def _columns_with_hints(split: str) -> dict[str, list[str]]:
    rows = problems()[split]
    return {
        "inputs": [x for question, chain in rows for x in (question, f"{question} {chain}")],
        "targets": [chain for _, chain in rows for _ in range(2)],
    }


def _columns_backwards(split: str) -> dict[str, list[str]]:
    told = [question.split(". ")[:-1] for question, _ in problems()[split]]
    return {
        "inputs": [". ".join(sentences) + "." for sentences in told],
        "targets": [". ".join(reversed(sentences)) + "." for sentences in told],
    }


_SIZES_WITH_HINTS = {split: 2 * size for split, size in SIZES.items()}
for _name, _read, _sizes, _metric in (
    ("arithmetic", _columns, SIZES, text_metrics.answer_accuracy),
    ("arithmetic_hints", _columns_with_hints, _SIZES_WITH_HINTS, text_metrics.answer_accuracy),
    ("arithmetic_backwards", _columns_backwards, SIZES, text_metrics.exact_match),
):
    features.register(
        _name,
        source=features.Table(_read, SIZES, _sizes),
        metric_fns=[_metric],
        vocabulary=vocabularies.arithmetic(),
    )
