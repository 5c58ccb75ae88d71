"""Boxes of answers against those of references, by intersection over union.

Boxes of an answer and of a reference are matched one to one so that the sum of their IoU is largest. What is
left over on either side counts 0, as all does where a box of the answer is malformed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metalm.errors import DataError
from metalm.modalities.boxes import boxes_in
from metalm.tasks.metrics.metric import Answered, mean_of
from metalm.tasks.metrics.optional import optional

FOUND = 0.5
"""A box is found by one whose IoU with it is above this (PASCAL VOC)."""


def _ious(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes [n, 4] and [m, 4]: left, top, right, bottom."""
    shared = np.minimum(given[:, None, 2:], wanted[None, :, 2:])
    shared = (shared - np.maximum(given[:, None, :2], wanted[None, :, :2])).clip(min=0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (given, wanted)]
    return shared / (areas[0][:, None] + areas[1][None, :] - shared)


def _scipy_optimize() -> Any:
    return optional("scipy.optimize")


def _matched(prediction: str, reference: str) -> np.ndarray:
    """IoU of each pair of boxes, and 0 for each that is left over."""
    wanted = boxes_in(reference)
    if not wanted:
        raise DataError(f"box_iou and box_accuracy: the reference {reference!r} holds no boxes")
    given = boxes_in(prediction)
    if not given:
        return np.zeros(len(wanted))
    ious = _ious(np.array(given), np.array(wanted))
    rows, columns = _scipy_optimize().linear_sum_assignment(ious, maximize=True)
    return np.pad(ious[rows, columns], (0, max(ious.shape) - len(rows)))


def _best(score: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sequence[Answered]], list[float]]:
    """Scores of examples by their best reference."""
    return lambda answered: [
        max(float(score(_matched(example.prediction, reference)).mean()) for reference in example.references)
        for example in answered
    ]


BOXES = [
    mean_of("box_iou", _best(lambda ious: ious), require=_scipy_optimize),
    mean_of("box_accuracy", _best(lambda ious: ious > FOUND), require=_scipy_optimize),
]
