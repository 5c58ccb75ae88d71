"""Means with 95% intervals over seeds, and the rule by which a claim is judged.

The rule was written before the runs. The better arm's interval above the worse one's: *shown*. Below it:
*contradicted*. Intervals that touch, or of fewer than two seeds: *not shown*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from metalm.tasks.metrics.optional import optional

LEVEL = 0.95
Verdict = Literal["shown", "not shown", "contradicted"]
Chance = Literal["at chance", "below chance", "above chance", "one seed"]
"""Of an arm that can know nothing. `one seed` tells nothing of how far seeds are apart."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and how far its interval reaches to both sides."""

    mean: float
    half_width: float
    """Infinite where one seed says nothing of how far seeds are apart."""
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, with its 95% interval by Student's t distribution.

    Raises:
        ConfigError: scipy is not installed.
    """
    assert values
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.inf, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = float(optional("scipy.stats").t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, quantile * math.sqrt(variance / len(values)), len(values))


def judge(better: Interval, worse: Interval) -> Verdict:
    """Whether one arm is better than another, as claimed."""
    if better.low > worse.high:
        return "shown"
    return "contradicted" if better.high < worse.low else "not shown"


def judge_all(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a claim of several comparisons: shown if all are, contradicted if one is."""
    found = set(verdicts)
    if "contradicted" in found:
        return "contradicted"
    return "shown" if found == {"shown"} else "not shown"


def chance_of(scores: Interval, chance: float, num_questions: int) -> Chance:
    """Where accuracies are, as to `chance`: the share of the most frequent answer, or of a guess.

    They are at it if the interval over seeds touches what such guesses reach on so many questions, two
    standard errors to both sides: all seeds are scored on the same questions. Below it is an arm that often
    gives another answer than the most frequent one.
    """
    if scores.count < 2:
        return "one seed"
    reach = 2 * math.sqrt(chance * (1 - chance) / num_questions)
    if scores.low > chance + reach:
        return "above chance"
    return "below chance" if scores.high < chance - reach else "at chance"
