"""Intervals and verdicts of a reproduction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from metalm.reproduction.intervals import Interval, chance_of, interval, judge, judge_all


@pytest.mark.parametrize("values", [[0.7, 0.8], [0.61, 0.64, 0.6], [0.5, 0.9, 0.4, 0.8, 0.6]])
def test_an_interval_is_scipys(values: list[float]) -> None:
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_says_nothing_of_how_far_seeds_are_apart() -> None:
    assert math.isinf(interval([0.9]).half_width)
    assert judge(interval([0.9]), interval([0.1])) == "not shown"


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        (Interval(0.80, 0.04, 3), Interval(0.70, 0.05, 3), "shown"),
        (Interval(0.80, 0.05, 3), Interval(0.70, 0.05, 3), "not shown"),  # they touch
        (Interval(0.72, 0.05, 3), Interval(0.70, 0.05, 3), "not shown"),
        (Interval(0.60, 0.05, 3), Interval(0.71, 0.05, 3), "contradicted"),
    ],
)
def test_a_comparison_is_judged_by_whether_intervals_touch(
    better: Interval, worse: Interval, verdict: str
) -> None:
    assert judge(better, worse) == verdict


def test_a_claim_is_shown_by_all_of_its_comparisons_and_contradicted_by_one() -> None:
    assert judge_all(["shown", "shown"]) == "shown"
    assert judge_all(["shown", "not shown"]) == "not shown"
    assert judge_all(["shown", "contradicted", "not shown"]) == "contradicted"
    assert judge_all([]) == "not shown"


def test_guesses_are_at_chance_and_knowledge_is_not() -> None:
    draws = np.random.default_rng(0).binomial(1000, 0.5, size=3) / 1000
    assert chance_of(interval(list(draws)), 0.5, 1000) == "at chance"
    assert chance_of(interval([0.60, 0.61, 0.62]), 0.5, 1000) == "above chance"
    assert chance_of(interval([0.40, 0.41, 0.39]), 0.5, 1000) == "below chance"
    assert chance_of(interval([0.99]), 0.5, 1000) == "one seed"
