"""Pictures for people: an image with what was said about it written underneath."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH = 256
_LINE = 15
_MARGIN = 6


def caption_picture(pixels: np.ndarray, lines: list[str]) -> np.ndarray:
    """Draw an image enlarged to a fixed width, and text below it, wrapped.

    Args:
        pixels: [height, width, 3] uint8.
        lines: paragraphs of text.

    Returns:
        [height', 256, 3] uint8.
    """
    image = Image.fromarray(pixels)
    image = image.resize((_WIDTH, round(_WIDTH * image.height / image.width)), Image.Resampling.NEAREST)
    wrapped = [part for line in lines for part in textwrap.wrap(line, 40) or [""]]
    picture = Image.new("RGB", (_WIDTH, image.height + 2 * _MARGIN + _LINE * len(wrapped)), "white")
    picture.paste(image, (0, 0))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for number, line in enumerate(wrapped):
        draw.text((_MARGIN, image.height + _MARGIN + _LINE * number), line, fill="black", font=font)
    return np.asarray(picture)
