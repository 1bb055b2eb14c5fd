"""The numbers of Agarwal et al. (2024), ICLR camera-ready, by figure.

Values printed in the paper are exact; those read off its vector graphics are good to 0.02, those of
Fig. 5 to 0.3. Figures of improvements (6, 7, A.11, A.14, A.15) are kept as printed: the gain over
the student before distillation, which `START` holds.
"""

from collections.abc import Iterable, Iterator
import re
from typing import NamedTuple


class Number(NamedTuple):
    """One number of the paper.

    Attributes:
        figure: where it stands, such as "Fig. 1".
        task: "xsum", "wmt", "gsm8k", "mmlu" or "bbh".
        decoding: "greedy", "beam" or "sample" (at temperature 1).
        size: of the student: "small", "base", "large", "xl".
        method: "sft", "seqkd" or the divergence's name with its beta, such as "jsd(0.1)".
        on_policy_fraction: the paper's lambda.
        value: the metric, in percent.
        gain: what the figure prints where it shows improvements.
        self_distilled: the teacher is as large as the student.
    """

    figure: str
    task: str
    decoding: str
    size: str
    method: str
    on_policy_fraction: float
    value: float
    gain: float | None = None
    self_distilled: bool = False


METRIC = {
    "xsum": ("rouge2",),
    "wmt": ("bleu",),
    "gsm8k": ("accuracy_with_calculator", "accuracy"),
    "mmlu": ("accuracy",),
    "bbh": ("accuracy_23_tasks", "accuracy"),
}
DIVERGENCES = ("forward_kl", "jsd(0.1)", "jsd(0.5)", "jsd(0.9)", "reverse_kl")
# The student before distillation; what the gains are relative to.
START = {
    ("xsum", "small"): 13.45,
    ("xsum", "base"): 17.94,
    ("xsum", "large"): 19.62,
    ("wmt", "small"): 25.58,
    ("wmt", "base"): 26.98,
    ("wmt", "large"): 27.43,
    ("gsm8k", "small"): 4.58,
    ("gsm8k", "base"): 10.16,
    ("gsm8k", "large"): 20.50,
    ("mmlu", "base"): 35.6,
    ("bbh", "base"): 31.25,
}
TEACHER = {"xsum": 22.04, "wmt": 28.07, "gsm8k": 27.9, "mmlu": 52.4, "bbh": 41.0}

_METHODS = {
    "SFT": ("sft", 0.0),
    "SeqKD": ("seqkd", 0.0),
    "Supervised KD": ("forward_kl", 0.0),
    "Supervised GKD, RKL": ("reverse_kl", 0.0),
    "ImitKD": ("forward_kl", 0.5),
    "f-distill": ("total_variation", 0.5),
    "GKD, FKL": ("forward_kl", 1.0),
    "GKD, JSD(0.1)": ("jsd(0.1)", 1.0),
    "GKD, JSD(0.9)": ("jsd(0.9)", 1.0),
    "GKD, RKL": ("reverse_kl", 1.0),
}

# task, decoding -> method -> small, base, large.
_FIGURE_1 = {
    ("xsum", "greedy"): {
        "SFT": (13.45, 17.94, 19.62),
        "Supervised KD": (15.15, 17.89, 20.60),
        "SeqKD": (15.10, 18.23, 20.11),
        "GKD, FKL": (16.34, 18.84, 21.18),
    },
    ("wmt", "beam"): {
        "SFT": (25.58, 26.98, 27.43),
        "Supervised KD": (25.66, 27.20, 27.62),
        "SeqKD": (26.20, 27.29, 27.41),
        "GKD, JSD(0.1)": (26.43, 27.69, 27.82),
    },
    ("gsm8k", "greedy"): {
        "SFT": (4.58, 10.16, 20.50),
        "Supervised KD": (7.08, 14.86, 25.50),
        "SeqKD": (7.88, 16.44, 23.96),
        "GKD, FKL": (11.18, 18.96, 29.20),
    },
}
# decoding -> method -> large.
_FIGURE_2 = {
    "sample": {
        "Supervised KD": 18.63,
        "ImitKD": 19.34,
        "f-distill": 19.46,
        "GKD, FKL": 19.22,
        "GKD, JSD(0.9)": 20.33,
    },
    "greedy": {
        "Supervised KD": 20.60,
        "ImitKD": 20.92,
        "f-distill": 20.93,
        "GKD, FKL": 21.21,
        "GKD, JSD(0.9)": 21.18,
    },
}
# Method -> examples -> ROUGE-2 of XSum, small, sampled at temperature 1; None is all of them.
DATA_SCALING: dict[str, dict[int | None, float]] = {
    "Supervised KD": {1000: 11.23, 10000: 11.76, 50000: 12.35, None: 13.11},
    "ImitKD": {1000: 10.98, 10000: 11.68, 50000: 12.26, None: 13.14},
    "GKD (Supervised)": {1000: 11.59, 10000: 12.49, 50000: 13.17, None: 14.34},
    "GKD (On-policy)": {1000: 12.40, 10000: 12.91, 50000: 13.75, None: 15.13},
}
# Divergence -> temperature -> (Self-BLEU, ROUGE-2), on-policy GKD, XSum, small.
QUALITY_DIVERSITY = {
    "forward_kl": {0.1: (85.0, 16.38), 0.3: (61.0, 15.91), 0.5: (43.4, 15.11), 1.0: (14.4, 10.27)},
    "jsd(0.1)": {0.1: (86.5, 16.52), 0.3: (64.2, 16.14), 0.5: (47.4, 15.46), 1.0: (18.6, 11.58)},
    "jsd(0.5)": {0.1: (88.1, 16.51), 0.3: (67.7, 16.18), 0.5: (51.9, 15.69), 1.0: (23.5, 12.49)},
    "jsd(0.9)": {0.1: (89.1, 16.30), 0.3: (70.1, 16.11), 0.5: (55.1, 15.59), 1.0: (27.2, 13.03)},
    "reverse_kl": {0.1: (89.1, 15.59), 0.3: (70.1, 15.42), 0.5: (55.3, 15.00), 1.0: (28.5, 12.87)},
}
# Point -> gain in (ROUGE-2, entailment), XSum, base, JSD(0.9), lambda = 1.
RL_TRADE_OFF = {
    "RLEF*": (3.17, 44.8),
    "alpha 0.05": (3.56, 42.0),
    "alpha 0.1": (4.06, 33.2),
    "alpha 0.25": (4.63, 25.9),
    "alpha 0.5": (4.72, 21.7),
    "teacher": (8.70, 17.2),
}
# Figure, task, decoding, size -> lambda -> one number a divergence, as printed.
_GAIN_MAPS = {
    ("Fig. 6", "wmt", "beam", "small"): {
        1.0: (0.55, 0.85, 0.77, 0.79, 0.46),
        0.5: (0.5, 0.71, 0.57, 0.43, 0.38),
        0.0: (0.08, 0.28, 0.26, 0.29, 0.27),
    },
    ("Fig. 6", "wmt", "beam", "base"): {
        1.0: (0.55, 0.71, 0.58, 0.58, 0.47),
        0.5: (0.52, 0.48, 0.54, 0.4, 0.34),
        0.0: (0.22, 0.38, 0.17, 0.11, 0.02),
    },
    ("Fig. 7", "gsm8k", "greedy", "small"): {
        1.0: (6.6, 4.7, 3.8, 4.9, 5.5),
        0.5: (4.2, 3.8, 3.6, 3.2, 4.5),
        0.0: (2.5, 3.1, 2.9, 2.9, 3.8),
    },
    ("Fig. 7", "gsm8k", "greedy", "base"): {
        1.0: (8.8, 7.6, 7.0, 6.7, 8.0),
        0.5: (6.8, 6.2, 6.4, 5.9, 6.9),
        0.0: (4.7, 5.1, 5.1, 5.0, 5.7),
    },
    ("Fig. A.14", "gsm8k", "greedy", "large"): {
        1.0: (8.7, 6.8, 5.7, 6.5, 8.7),
        0.5: (5.7, 5.3, 4.8, 6.5, 4.3),
        0.0: (5.0, 3.9, 3.9, 3.7, 4.5),
    },
}
_VALUE_MAPS = {
    ("Fig. A.12", "xsum", "sample", "small"): {
        1.0: (13.2, 15.1, 15.5, 15.2, 14.5),
        0.5: (13.1, 15.0, 15.5, 15.2, 14.5),
        0.0: (13.1, 14.3, 14.9, 15.0, 14.4),
    },
    ("Fig. A.12", "xsum", "sample", "base"): {
        1.0: (16.5, 17.5, 18.0, 18.0, 18.2),
        0.5: (16.4, 17.5, 17.8, 17.9, 17.9),
        0.0: (16.7, 17.1, 17.3, 17.4, 17.6),
    },
    ("Fig. A.12", "xsum", "sample", "large"): {
        1.0: (19.2, 19.9, 20.1, 20.3, 19.8),
        0.5: (19.3, 19.9, 20.0, 19.8, 19.3),
        0.0: (18.6, 19.1, 19.3, 19.3, 19.1),
    },
    ("Fig. A.13", "xsum", "greedy", "small"): {
        1.0: (16.4, 16.6, 16.6, 16.3, 15.6),
        0.5: (16.3, 16.4, 16.2, 16.2, 15.2),
        0.0: (15.2, 15.4, 15.5, 15.6, 15.1),
    },
    ("Fig. A.13", "xsum", "greedy", "base"): {
        1.0: (18.6, 18.7, 18.7, 18.8, 18.5),
        0.5: (18.4, 18.5, 18.5, 18.5, 18.2),
        0.0: (17.9, 18.1, 18.1, 18.0, 18.0),
    },
    ("Fig. A.13", "xsum", "greedy", "large"): {
        1.0: (21.2, 21.2, 21.1, 21.2, 21.1),
        0.5: (20.9, 21.0, 21.0, 20.8, 20.6),
        0.0: (20.6, 20.5, 20.3, 20.5, 20.2),
    },
}
# Divergence -> lambda -> accuracy, GSM8K, small.
_FIGURE_8 = {
    "forward_kl": {
        0.0: 7.13,
        0.1: 6.86,
        0.25: 7.12,
        0.5: 8.81,
        0.75: 9.24,
        0.9: 9.66,
        1.0: 11.20,
    },
    "reverse_kl": {
        0.0: 8.36,
        0.1: 7.92,
        0.25: 7.96,
        0.5: 9.04,
        0.75: 9.17,
        0.9: 9.44,
        1.0: 10.13,
    },
}
# Method -> small, base, large, GSM8K.
_FIGURE_9 = {
    "SeqKD": (6.50, 12.90, 22.36),
    "Supervised KD": (7.08, 14.85, 25.50),
    "f-distill": (8.11, 14.63, 24.86),
    "Supervised GKD, RKL": (8.38, 15.86, 25.00),
    "ImitKD": (8.78, 16.96, 26.20),
    "GKD, FKL": (11.18, 18.96, 29.20),
}
# Method -> accuracy, GSM8K, large from large; the student starts at 14.4, the teacher has 20.5.
_FIGURE_A10 = {
    "Supervised KD": 24.56,
    "GKD, FKL": 24.94,
    "ImitKD": 25.40,
    "f-distill": 25.78,
    "GKD, JSD(0.9)": 26.16,
}
# Method -> gain in (MMLU, BBH), base from XL.
_FIGURE_A11 = {
    "GKD, FKL": (-0.49, 0.65),
    "ImitKD": (-0.25, 0.46),
    "Supervised KD": (0.31, 0.49),
    "Supervised GKD, RKL": (1.30, 0.23),
    "GKD, RKL": (1.97, 1.13),
}
# Method -> gain in BLEU of small, base.
_FIGURE_A15 = {
    "f-distill": (0.30, 0.295),
    "ImitKD": (0.50, 0.52),
    "GKD, JSD(0.1)": (0.85, 0.71),
}
_SIZES = ("small", "base", "large")


def _numbers() -> Iterator[Number]:
    """Of all figures, the main one first: `find` returns the first that fits."""
    for (task, decoding), methods in _FIGURE_1.items():
        for name, values in methods.items():
            for size, value in zip(_SIZES, values, strict=True):
                yield Number("Fig. 1", task, decoding, size, *_METHODS[name], value)
        yield Number("Fig. 1", task, decoding, "xl", "sft", 0.0, TEACHER[task])
    for decoding, bars in _FIGURE_2.items():
        for name, value in bars.items():
            yield Number("Fig. 2", "xsum", decoding, "large", *_METHODS[name], value)
    for (figure, task, decoding, size), rows in _VALUE_MAPS.items():
        for fraction, divergence, value in _cells(rows):
            yield Number(figure, task, decoding, size, divergence, fraction, value)
    for divergence, curve in _FIGURE_8.items():
        for fraction, value in curve.items():
            yield Number("Fig. 8", "gsm8k", "greedy", "small", divergence, fraction, value)
    for name, values in _FIGURE_9.items():
        for size, value in zip(_SIZES, values, strict=True):
            yield Number("Fig. 9", "gsm8k", "greedy", size, *_METHODS[name], value)
    for (figure, task, decoding, size), rows in _GAIN_MAPS.items():
        for fraction, divergence, gain in _cells(rows):
            yield _gained(figure, task, decoding, size, (divergence, fraction), gain)
    for name, value in _FIGURE_A10.items():
        yield Number(
            "Fig. A.10", "gsm8k", "greedy", "large", *_METHODS[name], value, self_distilled=True
        )
    for name, (mmlu, bbh) in _FIGURE_A11.items():
        yield _gained("Fig. A.11", "mmlu", "greedy", "base", _METHODS[name], mmlu)
        yield _gained("Fig. A.11", "bbh", "greedy", "base", _METHODS[name], bbh)
    for name, (small, base) in _FIGURE_A15.items():
        yield _gained("Fig. A.15", "wmt", "beam", "small", _METHODS[name], small)
        yield _gained("Fig. A.15", "wmt", "beam", "base", _METHODS[name], base)


def _cells(rows: dict[float, tuple[float, ...]]) -> Iterator[tuple[float, str, float]]:
    for fraction, values in rows.items():
        for divergence, value in zip(DIVERGENCES, values, strict=True):
            yield fraction, divergence, value


def _gained(
    figure: str, task: str, decoding: str, size: str, method: tuple[str, float], gain: float
) -> Number:
    value = round(START[task, size] + gain, 3)
    return Number(figure, task, decoding, size, *method, value, gain=gain)


NUMBERS: tuple[Number, ...] = tuple(_numbers())


def task_of(name: str) -> str | None:
    """The paper's task behind a task's name, such as "wmt" for "wmt_t2t_ende_v003"."""
    patterns = {
        "xsum": "xsum(_.*)?",
        "wmt": "wmt.*en_?de.*",
        "gsm8k": "gsm8k(_cot)?",
        "mmlu": "mmlu",
        "bbh": "bbh(_direct)?",
    }
    return next((task for task, one in patterns.items() if re.fullmatch(one, name)), None)


def find(
    *,
    task: str,
    metric: str,
    decoding: str | None,
    size: str | None,
    method: str,
    on_policy_fraction: float,
    self_distilled: bool = False,
    among: Iterable[Number] = NUMBERS,
) -> Number | None:
    """The paper's number of the same task, metric, decoding, size and method.

    Args:
        task: a task's name here, such as "wmt_t2t_ende_v003".
        metric: a metric's name here, such as "rouge2".
        decoding: None fits any, for runs that did not record theirs.
        size: of the student.
        method: as in `Number`.
        on_policy_fraction: lambda.
        self_distilled: as in `Number`.
        among: the numbers to look at.
    """
    known = task_of(task)
    if known is None or metric not in METRIC[known] or size is None:
        return None
    wanted = (known, size.lower(), method, on_policy_fraction, self_distilled)
    for number in among:
        has = (number.task, number.size, number.method, number.on_policy_fraction)
        if (*has, number.self_distilled) == wanted and decoding in (None, number.decoding):
            return number
    return None
