"""What a metric is, and its standard error.

Every metric here is a function of *sums of statistics of single examples*: an accuracy of the sum of scores
and the count, BLEU of sums of n-gram counts and lengths, a macro-F1 of counts per label. So one bootstrap
serves all: it draws examples with replacement, adds up their statistics and takes the value again, scoring no
text twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metalm.errors import DataError


class Answered(NamedTuple):
    """One example, answered.

    Attributes:
        prediction: what the model said, or the option it chose.
        references: the acceptable answers; all that were given, doubles too, where a metric counts them.
        group: what examples that depend on each other have in common, such as the image of several questions;
            an example without a group stands alone. The bootstrap draws whole groups.
    """

    prediction: str
    references: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Score:
    """A metric on a set of examples.

    Attributes:
        value: in the metric's own scale: 0 to 1, except `bleu` (0 to 100) and `cider_d` (0 to 10).
        standard_error: of the value, in its scale; NaN where fewer than two groups leave it unknown.
        count: examples.
    """

    value: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Metric:
    """A number for a set of answered examples; the higher, the better.

    Attributes:
        name: as task files name it.
        statistics: examples to float64 [n, k]: what is added up over them.
        value: sums [r, k] to the metric of each of r sets, float64 [r].
        require: raises ConfigError where a package or a program that the metric needs is missing. To be
            called before answers are made, which takes longest.
    """

    name: str
    statistics: Callable[[Sequence[Answered]], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    require: Callable[[], object] = lambda: None

    def score(self, answered: Sequence[Answered]) -> float:
        """The metric of all examples together.

        Raises:
            DataError: there are no examples, or one has no reference.
        """
        check(self.name, answered)
        return float(self.value(self.statistics(answered).sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class MeanMetric(Metric):
    """A metric that is the mean over examples. Made by `mean_of`."""

    def per_example(self, answered: Sequence[Answered]) -> np.ndarray:
        """Scores of the examples, float64 [n], whose mean is the metric.

        Raises:
            DataError: there are no examples, or one has no reference.
        """
        check(self.name, answered)
        return self.statistics(answered)[:, 0]


def mean_of(
    name: str,
    scores: Callable[[Sequence[Answered]], Sequence[float]],
    require: Callable[[], object] = lambda: None,
) -> MeanMetric:
    """The metric that is the mean of `scores`, which gives one score an example."""

    def statistics(answered: Sequence[Answered]) -> np.ndarray:
        return np.stack([np.asarray(scores(answered), np.float64), np.ones(len(answered))], axis=1)

    return MeanMetric(name, statistics, lambda sums: sums[:, 0] / sums[:, 1], require)


def best_of(score: Callable[[str, str], float]) -> Callable[[Sequence[Answered]], list[float]]:
    """Scores of examples, each that of its best reference, from `score(prediction, reference)`."""
    return lambda answered: [
        max(score(example.prediction, reference) for reference in example.references) for example in answered
    ]


def check(name: str, answered: Sequence[Answered]) -> None:
    """Refuse what no metric is defined on.

    Raises:
        DataError: there are no examples, or one has no reference.
    """
    if not answered:
        raise DataError(f"{name} of no examples: the set that was answered is empty")
    for position, example in enumerate(answered):
        if not example.references:
            raise DataError(
                f"{name}: example {position} (answered {example.prediction[:80]!r}) has no reference; give "
                'it its acceptable answers, or "" where no answer is the right one'
            )


def bootstrap(metric: Metric, answered: Sequence[Answered], *, resamples: int, seed: int) -> Score:
    """The metric with its standard error by `resamples` draws of groups with replacement.

    The same seed gives the same error. What a metric takes from the whole set at once (CIDEr-D's document
    frequencies) stays that of the whole set.

    Raises:
        DataError: there are no examples, or one has no reference.
    """
    check(metric.name, answered)
    statistics = metric.statistics(answered)
    value = float(metric.value(statistics.sum(axis=0, keepdims=True))[0])
    of_groups = _sums_of_groups(statistics, [example.group for example in answered])
    num_groups = len(of_groups)
    if num_groups < 2:
        return Score(value, float("nan"), len(answered))
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, statistics.shape[1]))
    for draw in range(resamples):
        times = np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups)
        sums[draw] = times @ of_groups
    return Score(value, float(np.std(metric.value(sums), ddof=1)), len(answered))


def group_numbers(groups: Sequence[str]) -> np.ndarray:
    """A number for each example's group, int64 [n], from 0; an example without a group has one of its own."""
    numbers: dict[str | int, int] = {}
    return np.array([numbers.setdefault(group or at, len(numbers)) for at, group in enumerate(groups)])


def _sums_of_groups(statistics: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Statistics [n, k] of examples, added up within groups: [g, k]."""
    numbers = group_numbers(groups)
    sums = np.zeros((numbers.max() + 1, statistics.shape[1]))
    np.add.at(sums, numbers, statistics)
    return sums
