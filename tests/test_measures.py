"""The statistics of an evaluation against scipy, hand counts and what they must do."""

import math

import numpy as np
import pytest
import scipy.stats

from fitness_dpo.measures import bootstrap, distinct, mcnemar, per_answer, repeated


def test_the_bootstrap_interval_is_scipys() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 150)
    ours = bootstrap(values, [str(place) for place in range(150)])
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_groups_are_resampled_whole() -> None:
    """Each value twice under one name is the information of one value: the interval must not shrink."""
    values = np.random.default_rng(1).normal(size=60)
    alone = bootstrap(values, [str(place) for place in range(60)])
    doubled = bootstrap(np.repeat(values, 2), [str(place // 2) for place in range(120)])
    apart = bootstrap(np.repeat(values, 2), [str(place) for place in range(120)])
    assert doubled == pytest.approx(alone)
    assert apart.high - apart.low < 0.8 * (alone.high - alone.low)


def test_groups_of_unlike_size_weigh_by_their_items() -> None:
    interval = bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert interval == (0.75, 0.0, 1.0)


def test_no_items_give_no_interval() -> None:
    assert all(map(math.isnan, bootstrap([], [])))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (3, 9), (12, 12), (40, 17), (0, 20)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    before = [True] * lost + [False] * won + [True, False]
    after = [False] * lost + [True] * won + [True, False]
    expected = scipy.stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(before, after) == pytest.approx(expected)


def test_repetition_by_hand() -> None:
    text = "One two three four, one two THREE four five."
    assert repeated(text) == pytest.approx(2 / 6), "of six 4-grams the one that opens the text stands there twice"
    assert distinct(text) == pytest.approx(5 / 8)
    assert (repeated("too short"), distinct("one"), repeated("")) == (0.0, 1.0, 0.0)


def test_what_is_measured_of_each_answer() -> None:
    columns = per_answer(["Rest well.", " "], [True, False])
    assert columns["words"].tolist() == [2, 0]
    assert columns["ended"].tolist() == [1, 0]
    assert columns["empty"].tolist() == [0, 1]
