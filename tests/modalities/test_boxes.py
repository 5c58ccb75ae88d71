"""Boxes as texts, and drawn."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from metalm.conversion.shipped import boxes_metalm
from metalm.modalities.boxes import GRID, box_text, boxes_in, draw_boxes, pointed_at
from metalm.modalities.image import caption_picture

SHARES = strategies.floats(0, 1)
RED = (255, 0, 0)


@hypothesis.given(across=strategies.tuples(SHARES, SHARES), down=strategies.tuples(SHARES, SHARES))
def test_a_box_comes_back_within_a_cell_and_with_an_area(
    across: tuple[float, float], down: tuple[float, float]
) -> None:
    (left, right), (top, bottom) = sorted(across), sorted(down)
    hypothesis.assume(left < right and top < bottom)
    (box,) = boxes_in(f"It is {box_text([left, top, right, bottom])}.") or []
    assert 0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1
    for found, given in zip(box, (left, top, right, bottom), strict=True):
        assert abs(found - given) <= 1 / GRID
    if min(right - left, bottom - top) > 1 / GRID:  # at the lines next to it
        assert max(abs(np.array(box) - (left, top, right, bottom))) <= 0.5 / GRID + 1e-9


def test_the_whole_image_and_lines_are_exact() -> None:
    assert box_text([0, 0, 1, 1]) == "<box> 0 0 32 32 </box>"
    assert boxes_in("<box> 0 0 32 32 </box> and <box> 8 4 16 12 </box>") == [
        (0, 0, 1, 1),
        (0.25, 0.125, 0.5, 0.375),
    ]
    assert box_text([1.0000001, 0, 1.0000004, 1]) == "<box> 31 0 32 32 </box>"


@pytest.mark.parametrize(
    "corners",
    [
        [0, 0, 1], [0.5, 0, 0.5, 1], [0.6, 0, 0.5, 1], [0, 0.6, 1, 0.5], [-0.1, 0, 1, 1], [0, 0, 1, 1.1],
        [3, 4, 200, 300], ["0", 0, 1, 1], [True, 0, 1, 1], [float("nan"), 0, 1, 1], [0, 0, float("inf"), 1],
    ],
)  # fmt: skip
def test_what_is_no_box_is_refused(corners: list[float]) -> None:
    with pytest.raises(ValueError, match="is no box"):
        box_text(corners)


@pytest.mark.parametrize(
    "text",
    [
        "<box>", "</box>", "<box> 1 2 3 </box>", "<box> 1 2 3 4", "<box>1 2 3 4</box>",
        "<box> 1 2 33 4 </box>", "<box> 3 2 3 4 </box>", "<box> 5 2 3 4 </box>", "<box> 01 2 3 4 </box>",
        "<box> 1 2 3 4 5 </box>", "<box> 1 2 3 4 </box> <box> 1", "<box> 1  2 3 4 </box>",
        "<box> -1 2 3 4 </box>", "<box> 1 2 3 400 </box>",
    ],
)  # fmt: skip
def test_what_is_malformed_is_no_box(text: str) -> None:
    assert boxes_in(text) is None
    assert boxes_metalm.boxes_in(text) is None


@hypothesis.given(strategies.lists(strategies.lists(strategies.integers(0, 34), min_size=4, max_size=4)))
def test_exports_read_boxes_alike(lines: list[list[int]]) -> None:
    text = "so ".join(f"<box> {' '.join(map(str, one))} </box>" for one in lines)
    assert boxes_metalm.GRID == GRID
    assert boxes_metalm.boxes_in(text) == boxes_in(text)


def test_an_outline_is_drawn_at_its_lines() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    drawn = draw_boxes(pixels, boxes_in("<box> 8 8 24 16 </box>") or [], "red")
    rows, columns = np.nonzero((drawn == RED).all(axis=-1))
    assert (rows.min(), rows.max()) == (16, 32)
    assert (columns.min(), columns.max()) == (32, 95)
    assert not drawn[20:30, 40:90].any()
    assert not pixels.any()


def test_a_small_image_is_enlarged_to_be_pointed_at() -> None:
    small = pointed_at(np.zeros((48, 30, 3), np.uint8), boxes_in("<box> 0 0 9 9 </box>") or [])
    assert small.shape == (288, 180, 3)
    assert small.any()
    assert pointed_at(np.zeros((300, 200, 3), np.uint8), []).shape == (300, 200, 3)


def test_the_boxes_of_a_caption_are_drawn_each_line_in_its_colour() -> None:
    black = np.zeros((48, 48, 3), np.uint8)
    lines = ["generated: <box> 0 0 16 16 </box>", "reference: <box> 16 16 31 31 </box>", "no <box> here"]
    picture = caption_picture(black, lines)
    plain = caption_picture(black, [line.replace("<box>", "(box)") for line in lines])
    assert picture.shape == plain.shape
    corners = (picture[:120, :120], picture[140:256, 140:256])
    first, second = ({tuple(pixel) for pixel in part.reshape(-1, 3)} - {(0, 0, 0)} for part in corners)
    assert len(first) == len(second) == 1
    assert first != second
    assert not plain[:256].any()
