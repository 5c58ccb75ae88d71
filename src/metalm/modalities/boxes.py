"""Boxes in texts: where something stands in an image, told by lines of a grid.

    <box> 3 5 12 20 </box>      left, top, right, bottom: lines of 32 x 32 cells, 0 at the left and at the top

A box is text like any other: it needs no tokens of its own, so that every tokenizer has it, a user may type
it, and it stands in prompts, answers, captions and references alike. A tokenizer that was trained on texts
with boxes makes one token of each number.

`conversion/shipped/boxes_metalm.py` is the same for exported folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw

GRID = 32
"""Cells across and down an image."""
OPEN, CLOSE = "<box>", "</box>"

_NUMBER = r"(0|[1-9]\d?)"
_BOX = re.compile(rf"{OPEN} {_NUMBER} {_NUMBER} {_NUMBER} {_NUMBER} {CLOSE}")
COLOURS = ("#c4005f", "#00764a", "#004fb0", "#9a4d00")
"""Of boxes that are to be told apart."""

_SMALLEST_SHOWN = 256
_ROUNDING = 1e-6
"""Shares may be outside of the image by so much."""


class Box(NamedTuple):
    """A box by shares of its image's width and height, 0 to 1 from the left and from the top."""

    left: float
    top: float
    right: float
    bottom: float


def box_text(corners: Sequence[float]) -> str:
    """A box as it stands in texts, at the lines next to it; it has at least one cell.

    Args:
        corners: left, top, right, bottom, as of `Box`.

    Raises:
        ValueError: they are no box inside the image.
    """
    if len(corners) != 4 or not all(isinstance(one, Real) and not isinstance(one, bool) for one in corners):
        raise ValueError(f"{corners!r} is no box: expected left, top, right and bottom as shares, 0 to 1")
    left, top, right, bottom = (float(one) for one in corners)
    inside = min(left, top) >= -_ROUNDING and max(right, bottom) <= 1 + _ROUNDING
    if not (inside and left < right and top < bottom):
        raise ValueError(
            f"{corners!r} is no box inside the image: expected 0 <= left < right <= 1 and "
            "0 <= top < bottom <= 1 (shares of its width and height, not pixels)"
        )
    across, down = _lines(left, right), _lines(top, bottom)
    return f"{OPEN} {across[0]} {down[0]} {across[1]} {down[1]} {CLOSE}"


def boxes_in(text: str) -> list[Box] | None:
    """The boxes of a text in turn.

    None where one is malformed: half a box, no area, lines that are not there.
    """
    found = [[int(number) for number in numbers] for numbers in _BOX.findall(text)]
    rest = _BOX.sub("", text)
    if OPEN in rest or CLOSE in rest:
        return None
    if any(not (left < right <= GRID and top < bottom <= GRID) for left, top, right, bottom in found):
        return None
    return [Box(*(line / GRID for line in lines)) for lines in found]


def draw_boxes(pixels: np.ndarray, boxes: Iterable[Box], colour: str) -> np.ndarray:
    """An image [height, width, 3] uint8 with the outlines of boxes."""
    image = Pillow.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    thickness = max(1, round(min(image.size) / 100))
    for box in boxes:
        left, right = (round(share * (image.width - 1)) for share in (box.left, box.right))
        top, bottom = (round(share * (image.height - 1)) for share in (box.top, box.bottom))
        draw.rectangle((left, top, right, bottom), outline=colour, width=thickness)
    return np.asarray(image)


def pointed_at(pixels: np.ndarray, boxes: Iterable[Box]) -> np.ndarray:
    """An image to look at, with boxes; a small one is enlarged."""
    factor = -(-_SMALLEST_SHOWN // max(pixels.shape[:2]))
    return draw_boxes(pixels.repeat(factor, axis=0).repeat(factor, axis=1), boxes, COLOURS[0])


def _lines(low: float, high: float) -> tuple[int, int]:
    """The lines next to two shares."""
    first, last = round(low * GRID), round(high * GRID)
    if first == last:
        first = min(int(low * GRID), GRID - 1)
        last = first + 1
    return first, last
