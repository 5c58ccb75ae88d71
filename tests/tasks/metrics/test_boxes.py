"""IoU of boxes is that of the cells that they cover."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from metalm.errors import DataError
from metalm.tasks.metrics import METRICS, Answered

Lines = tuple[int, int, int, int]


def text(*boxes: Lines) -> str:
    return " ".join(f"<box> {' '.join(map(str, box))} </box>" for box in boxes)


def counted(one: Lines, other: Lines) -> float:
    """By cells."""
    covered = np.zeros((2, 32, 32), bool)
    for cells, (left, top, right, bottom) in zip(covered, (one, other), strict=True):
        cells[top:bottom, left:right] = True
    return float(covered.all(axis=0).sum() / covered.any(axis=0).sum())


def drawn(count: int, seed: int) -> list[Lines]:
    generator = np.random.default_rng(seed)
    corners = [sorted(generator.choice(33, 2, replace=False)) for _ in range(2 * count)]
    pairs = zip(corners[::2], corners[1::2], strict=True)
    return [(int(x[0]), int(y[0]), int(x[1]), int(y[1])) for x, y in pairs]


def score(name: str, prediction: str, *references: str) -> float:
    return METRICS[name].score([Answered(prediction, references)])


def test_one_box_is_scored_by_the_cells_it_shares() -> None:
    for given, wanted in zip(drawn(100, 1), drawn(100, 2), strict=True):
        expected = counted(given, wanted)
        assert score("box_iou", text(given), text(wanted)) == pytest.approx(expected)
        assert score("box_accuracy", text(given), text(wanted)) == (expected > 0.5)


def test_half_is_not_above_half() -> None:
    assert score("box_iou", text((0, 0, 16, 32)), text((0, 0, 32, 32))) == 0.5
    assert score("box_accuracy", text((0, 0, 16, 32)), text((0, 0, 32, 32))) == 0
    assert score("box_accuracy", text((0, 0, 17, 32)), text((0, 0, 32, 32))) == 1


def test_boxes_of_a_set_are_matched_in_the_best_way_and_what_is_left_over_counts_nothing() -> None:
    for seed, (num_given, num_wanted) in enumerate(itertools.product((1, 2, 3), repeat=2)):
        given, wanted = drawn(num_given, seed), drawn(num_wanted, 100 + seed)
        few, many = sorted((given, wanted), key=len)
        best = max(
            sum(counted(one, other) for one, other in zip(few, chosen, strict=False))
            for chosen in itertools.permutations(many)
        )
        expected = best / max(num_given, num_wanted)
        assert score("box_iou", text(*given), text(*wanted)) == pytest.approx(expected)
    two = (0, 0, 8, 8), (16, 16, 32, 32)
    assert score("box_accuracy", f"here {text(*two[::-1])}.", text(*two)) == 1
    assert score("box_accuracy", text(two[0]), text(*two)) == 0.5
    assert score("box_accuracy", text(*two, (8, 8, 16, 16)), text(*two)) == pytest.approx(2 / 3)


def test_the_best_reference_counts() -> None:
    assert score("box_iou", text((0, 0, 8, 8)), text((8, 8, 16, 16)), text((0, 0, 8, 8))) == 1


@pytest.mark.parametrize(
    "prediction", ["", "left", "<box> 0 0 8", "<box> 8 0 0 8 </box>", "<box> 0 0 8 8 </box> <box>"]
)
def test_a_malformed_answer_counts_nothing(prediction: str) -> None:
    for name in ("box_iou", "box_accuracy"):
        assert score(name, prediction, text((0, 0, 8, 8))) == 0


def test_a_reference_without_a_box_is_refused() -> None:
    with pytest.raises(DataError, match="'left' holds no boxes"):
        score("box_iou", text((0, 0, 8, 8)), "left")
