"""Macro-F1 and Matthews' correlation, of single labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metalm.errors import DataError
from metalm.tasks.metrics.metric import Answered, Metric


def _counts(answered: Sequence[Answered]) -> np.ndarray:
    """For each of C labels whether an example has it rightly predicted, has it predicted, has it: [n, 3 C].

    The labels are those of the references, and a last one for every prediction that is none of them.

    Raises:
        DataError: an example has several references.
    """
    for position, example in enumerate(answered):
        if len(example.references) != 1:
            raise DataError(
                f"macro_f1 and matthews: example {position} has {len(example.references)} references "
                f"({', '.join(map(repr, example.references[:3]))}), expected one label; use exact_match"
            )
    wanted = [example.references[0].strip() for example in answered]
    number = {label: at for at, label in enumerate(sorted(set(wanted)))}
    labels = np.eye(len(number) + 1)
    true = labels[[number[label] for label in wanted]]
    predicted = labels[[number.get(example.prediction.strip(), -1) for example in answered]]
    return np.concatenate([true * predicted, predicted, true], axis=1)


def _by_label(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [r, C] of labels rightly predicted, predicted, true."""
    right, predicted, true = np.split(sums, 3, axis=1)
    return right, predicted, true


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of F1 over the labels that the references have."""
    right, predicted, true = _by_label(sums)
    there = true > 0
    f1 = np.divide(2 * right, predicted + true, out=np.zeros_like(right), where=there)
    return f1.sum(axis=1) / there.sum(axis=1)


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews' correlation of any number of labels (Gorodkin 2004); 0 where a side has one label only."""
    right, predicted, true = _by_label(sums)
    count = true.sum(axis=1)
    covariance = right.sum(axis=1) * count - (predicted * true).sum(axis=1)
    spread = (count**2 - (predicted**2).sum(axis=1)) * (count**2 - (true**2).sum(axis=1))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros_like(count), where=spread > 0)


LABELS = [Metric("macro_f1", _counts, _macro_f1), Metric("matthews", _counts, _matthews)]
