"""Boxes in texts: where something stands in an image, told by lines of a grid.

    <box> 3 5 12 20 </box>      left, top, right, bottom: lines of 32 x 32 cells, 0 at the left and at the top

A box is text like any other; the chat template and the processor write and read it.
"""

from __future__ import annotations

import re

GRID = 32
"""Cells across and down an image."""

_NUMBER = r"(0|[1-9]\d?)"
_BOX = re.compile(rf"<box> {_NUMBER} {_NUMBER} {_NUMBER} {_NUMBER} </box>")

PixelBox = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def boxes_in(text: str, height: float = 1.0, width: float = 1.0) -> list[PixelBox] | None:
    """The boxes of a text in turn, by an image's pixels, or by shares of its sides.

    None where one is malformed: half a box, no area, lines that are not there.
    """
    found = [[int(number) for number in numbers] for numbers in _BOX.findall(text)]
    rest = _BOX.sub("", text)
    if "<box>" in rest or "</box>" in rest:
        return None
    if any(not (left < right <= GRID and top < bottom <= GRID) for left, top, right, bottom in found):
        return None
    return [
        (left * width / GRID, top * height / GRID, right * width / GRID, bottom * height / GRID)
        for left, top, right, bottom in found
    ]
