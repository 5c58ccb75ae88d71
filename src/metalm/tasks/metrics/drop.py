"""DROP's exact match and F1: an answer is a set of spans, each a set of words, aligned to the reference's.

Predictions and references are texts: the spans of one answer are joined by `SPAN_SEPARATOR`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metalm.tasks.metrics.metric import Answered, mean_of
from metalm.tasks.metrics.optional import optional
from metalm.tasks.metrics.squad import ARTICLES, WITHOUT_PUNCTUATION

SPAN_SEPARATOR = " | "
"""Between the spans of one answer: a sign that DROP's passages do not have."""


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _normalized_word(word: str) -> str:
    """In lower case, without punctuation and articles, a number in one way of writing: 1.50 is 1.5."""
    word = word.lower()
    if _number(word) is None:
        word = word.translate(WITHOUT_PUNCTUATION)
    number = _number(word)
    return " ".join(ARTICLES.sub(" ", word if number is None else str(number)).split())


def _spans(answer: str) -> list[str]:
    """An answer's spans, normalised; hyphens part words."""
    return [
        " ".join(kept for word in re.split("[ -]", span) if (kept := _normalized_word(word)))
        for span in answer.split(SPAN_SEPARATOR.strip())
    ]


def _f1_of_words(given: set[str], wanted: set[str]) -> float:
    """F1 of two sets of words; 0 where the reference has numbers and none of them was given."""
    numbers = {word for word in wanted if _number(word) is not None}
    if numbers and not numbers & given:
        return 0.0
    shared = len(given & wanted)
    precision = shared / len(given) if given else 1.0
    recall = shared / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _em(given: list[str], wanted: list[str]) -> float:
    return float(set(given) == set(wanted) and len(given) == len(wanted))


def _scipy_optimize() -> Any:
    return optional("scipy.optimize")


def _f1(given: list[str], wanted: list[str]) -> float:
    """Mean F1 of the best alignment of spans, 0 for those left over; to two decimals, as DROP's own."""
    assign = _scipy_optimize().linear_sum_assignment
    pairs = np.array([[_f1_of_words(set(a.split()), set(b.split())) for a in given] for b in wanted])
    rows, columns = assign(pairs, maximize=True)
    return float(np.round(pairs[rows, columns].sum() / max(pairs.shape), 2))


def _best(score: Callable[[list[str], list[str]], float]) -> Callable[[Sequence[Answered]], list[float]]:
    """Scores of examples by their best reference; a reference whose first span is empty counts 0."""

    def scores(answered: Sequence[Answered]) -> list[float]:
        found = []
        for example in answered:
            given = _spans(example.prediction)
            wanted = [
                _spans(text) for text in example.references if text.split(SPAN_SEPARATOR.strip())[0].strip()
            ]
            found.append(max((score(given, reference) for reference in wanted), default=0.0))
        return found

    return scores


DROP = [mean_of("drop_em", _best(_em)), mean_of("drop_f1", _best(_f1), require=_scipy_optimize)]
