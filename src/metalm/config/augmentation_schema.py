"""How a source's images are changed in training."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from metalm.config.section import PositiveInt, Section

STRONGEST = 10
"""The largest magnitude."""

Operation = Literal[
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "sharpness",
    "color",
    "posterize",
    "solarize",
]

_OF_COLOURS = ("color", "contrast", "posterize", "solarize")


class AugmentationConfig(Section):
    """RandAugment (arXiv 1909.13719), in training alone. Number and magnitude are *open* in the paper."""

    operations: PositiveInt = 2
    """Applied to each image, one after another."""
    magnitude: Annotated[float, Field(ge=0, le=STRONGEST)] = 9
    """From 0, which changes next to nothing, to 10."""
    choices: Annotated[tuple[Operation, ...], Field(min_length=1)] = tuple(
        name for name in get_args(Operation) if name not in _OF_COLOURS
    )
    """What is drawn from. The default leaves out `color`, `contrast`, `posterize` and `solarize`, after which
    a caption's or a question's colours may no longer be right."""
