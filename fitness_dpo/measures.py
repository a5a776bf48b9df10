"""Statistics of an evaluation in plain numpy: intervals, paired tests and how an answer degenerates. Imports no torch."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
"""The ends of a 95% interval then move by about a hundredth of its width from one seed to the next."""
CHUNK = 500


class Interval(NamedTuple):
    value: float
    low: float
    """With `high` the 95% interval."""
    high: float


def bootstrap(values: ArrayLike, groups: Sequence[str], seed: int = 0) -> Interval:
    """The mean of `values` with its percentile bootstrap interval (Efron 1979), resampling whole groups.

    values: (items,); groups: (items,), items that share a name are drawn together. A paired difference of two systems is
    the mean of their per-item differences. An empty sample has no mean: all three are NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan)
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(which, weights=array)
    sizes = np.bincount(which).astype(np.float64)
    draw = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // CHUNK):
        picked = draw.integers(0, len(sums), (CHUNK, len(sums)))
        means.append(sums[picked].sum(1) / sizes[picked].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(array.mean()), float(low), float(high))


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """The two-sided exact p-value (McNemar 1947) that two systems right on the same items as given are equally good.

    Only items where they disagree count: the smaller of the two counts is binomial(n, 1/2).
    """
    one, other = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    lost, won = int((one & ~other).sum()), int((~one & other).sum())
    total = lost + won
    tail = sum(math.comb(total, count) for count in range(min(lost, won) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def ngrams(text: str, length: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[start : start + length]) for start in range(len(found) - length + 1)]


def distinct(text: str, length: int = 2) -> float:
    """The share of an answer's n-grams that are different ones (Li et al. 2016, distinct-n); 1 where it has none."""
    grams = ngrams(text, length)
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated(text: str, length: int = 4) -> float:
    """The share of an answer's n-grams that stand in it more than once; 0 where it has none."""
    grams = ngrams(text, length)
    counts: dict[tuple[str, ...], int] = {}
    for gram in grams:
        counts[gram] = counts.get(gram, 0) + 1
    return sum(counts[gram] > 1 for gram in grams) / len(grams) if grams else 0.0


def per_answer(texts: Sequence[str], ended: Sequence[bool]) -> dict[str, NDArray[np.float64]]:
    """What tells a degenerate answer, for each answer: its words, distinct-2, repeated 4-grams, and whether it ended by
    itself or is empty."""
    columns = {
        "words": [len(words(text)) for text in texts],
        "distinct_2": [distinct(text) for text in texts],
        "repeated_4grams": [repeated(text) for text in texts],
        "ended": ended,
        "empty": [not text.strip() for text in texts],
    }
    return {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
