"""`arithmetic`: generated word problems, answered step by step; nothing to download.

    inputs:  Ada has 7 eggs. Ada buys 5 more eggs. Ada doubles the number of eggs. How many ...?
    targets: 7 + 5 = 12. 12 * 2 = 24. The answer is 24.

Problems have two or three steps, and are graded as GSM8K is: by the number at the end of a chain of
thought that a model has to get right step by step. With the vocabulary "arithmetic" (the default
here), a T5 of 0.8 M parameters trained from scratch for 900 steps of 64 (gin/quickstart.gin)
answered 96 % of the validation split right, in one run; one of 0.15 M, after 400 steps, 9 %.
The longest input has 34 tokens and the longest target 24, EOS included.
"""

from collections.abc import Callable
import functools
import random

import seqio
import tensorflow as tf

from gkd_jax.tasks import features
from gkd_jax.text import text_metrics, vocabularies


TASK = "arithmetic"
SIZES = {"train": 50_000, "validation": 512, "test": 1024}
SEED = 0

_MAX_START = 20
_MAX_OPERAND = 9
_MAX_PRODUCT = 30  # numbers stay below 50: each sum of two is an own fact to learn
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ivy")
_THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "stones")
_GAINS = ("gets", "finds", "buys", "wins")
_LOSSES = ("gives away", "loses", "sells", "drops")
_FACTORS = {2: "doubles", 3: "triples"}


@functools.cache
def problems(seed: int = SEED) -> dict[str, list[tuple[str, str]]]:
    """(question, chain of thought) pairs of each split; no question occurs twice in all splits.

    Args:
        seed: the same seed gives the same problems on every machine.
    """
    # Only `random()`, the one draw that Python promises to keep the same between versions.
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


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # the problems are fixed; seqio shuffles them
    questions, chains = zip(*problems()[split], strict=True)
    # From tensors: a Python generator's position could not be saved with the iterator.
    return tf.data.Dataset.from_tensor_slices({"inputs": list(questions), "targets": list(chains)})


features.register(
    TASK,
    source=seqio.FunctionDataSource(_dataset, splits=list(SIZES), num_input_examples=SIZES),
    preprocessors=[],
    metric_fns=[text_metrics.answer_accuracy],
    vocabulary=vocabularies.arithmetic(),
)
