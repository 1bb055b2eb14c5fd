"""Tells whether the student's samples go wrong, by statistics of their tokens."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def sample_statistics(
    tokens: np.ndarray, weights: np.ndarray, eos_ids: Sequence[int]
) -> dict[str, float]:
    """Returns statistics that show whether samples go wrong.

    Args:
        tokens: sampled ids [N, T].
        weights: an array [N, T] that is 1 where a token counts, 0 elsewhere.
        eos_ids: the ids that end a sample; without any, every sample is truncated.

    Returns:
        `length`, the mean number of tokens of a sample; `truncated_fraction`, the share of samples
        of which no token that counts is one of `eos_ids`; and `distinct_2`, the share of distinct
        bigrams.
    """
    # An id that pads rows may be one that ends texts, so the weights must say which tokens count.
    ends = np.isin(tokens, eos_ids) & (weights > 0)
    return {
        "length": float(weights.sum(1).mean()),
        "truncated_fraction": float((~ends.any(1)).mean()),
        "distinct_2": _distinct_bigrams(tokens, weights),
    }


def _distinct_bigrams(tokens: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of distinct bigrams within a sample, averaged over samples.

    The share falls when samples repeat themselves. It is 1 if no sample has a bigram.
    """
    pairs = np.maximum(weights.sum(1).astype(int) - 1, 0)
    codes = (tokens[:, :-1].astype(np.int64) << 32) | tokens[:, 1:]
    codes[np.arange(codes.shape[1]) >= pairs[:, None]] = -1
    # In a sorted row each code that differs from the one before it is a new one; -1 does not count.
    distinct = (np.diff(np.sort(codes, axis=1), axis=1, prepend=-1) != 0).sum(1)
    has_pairs = pairs > 0
    return float(np.mean(distinct[has_pairs] / pairs[has_pairs])) if has_pairs.any() else 1.0


class SampleWatch:
    """Warns when the student's samples grow, are truncated, repeat themselves or lose entropy.

    These are the ways in which on-policy training goes wrong. The means over the latest `window`
    sampled steps are compared with those over the first. Each kind of warning is given once.
    """

    def __init__(self, window: int = 50):
        self._window = window
        self._first: dict[str, float] | None = None
        self._latest: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=window)
        self._said: set[str] = set()

    def see(self, values: Mapping[str, Any]) -> list[str]:
        """Takes the numbers of one more step and returns the new warnings."""
        if "train/sample_length" not in values:
            return []
        self._latest.append(values)
        if len(self._latest) < self._window:
            return []
        now = {
            name: sum(line[f"train/{name}"] for line in self._latest) / self._window
            for name in ("sample_length", "truncated_fraction", "sample_entropy", "distinct_2")
        }
        first = self._first = self._first or now
        found = {
            "samples grow": (
                now["sample_length"] > 1.5 * first["sample_length"],
                "{sample_length:.1f} tokens",
            ),
            "most samples reach the target length before they end": (
                now["truncated_fraction"] > 0.5,
                "{truncated_fraction:.0%}",
            ),
            "samples repeat themselves": (
                now["distinct_2"] < 0.6 * first["distinct_2"],
                "{distinct_2:.2f} of their bigrams are distinct",
            ),
            "the student's entropy collapses": (
                now["sample_entropy"] < 0.1 * first["sample_entropy"],
                "{sample_entropy:.3f} nats a token",
            ),
        }
        warnings = []
        for fault, (is_wrong, number) in found.items():
            if is_wrong and fault not in self._said:
                self._said.add(fault)
                warnings.append(
                    f"{fault}: {number.format(**now)} in the last {self._window} sampled steps; "
                    f"{number.format(**first)} in the first"
                )
        return warnings
