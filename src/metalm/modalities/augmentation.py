"""RandAugment (arXiv 1909.13719): some operations, drawn anew for each image, of one strength.

What is drawn is given, so that an image of a sample is changed alike on any topology and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps

from metalm.config.augmentation_schema import STRONGEST, AugmentationConfig, Operation

DRAWS_PER_OPERATION = 2
"""Which operation, and its sign."""
_GREY = (128, 128, 128)
_LARGEST_SHIFT = 0.45
"""Of the side."""


class RandAugment:
    """Changes the pixels of images."""

    def __init__(self, config: AugmentationConfig) -> None:
        self._config = config

    @property
    def num_draws(self) -> int:
        """Draws that one image needs."""
        return DRAWS_PER_OPERATION * self._config.operations

    def apply(self, pixels: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        """Pixels [height, width, 3] uint8 to the same.

        Args:
            draws: `num_draws` values in [0, 1).
        """
        image = Pillow.fromarray(pixels)
        choices, strength = self._config.choices, self._config.magnitude / STRONGEST
        for which, sign in zip(draws[::2], draws[1::2], strict=True):
            operation = OPERATIONS[choices[int(which * len(choices))]]
            image = operation(image, strength if sign < 0.5 else -strength)
        return np.asarray(image)


def _affine(image: Pillow.Image, matrix: tuple[float, ...]) -> Pillow.Image:
    return image.transform(
        image.size, Pillow.Transform.AFFINE, matrix, Pillow.Resampling.BILINEAR, fillcolor=_GREY
    )


def _enhanced(
    enhancer: Callable[[Pillow.Image], ImageEnhance._Enhance],
) -> Callable[[Pillow.Image, float], Pillow.Image]:
    return lambda image, s: enhancer(image).enhance(1 + 0.9 * s)


OPERATIONS: Mapping[Operation, Callable[[Pillow.Image, float], Pillow.Image]] = {
    "identity": lambda image, s: image,
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "rotate": lambda image, s: image.rotate(30 * s, Pillow.Resampling.BILINEAR, fillcolor=_GREY),
    "shear_x": lambda image, s: _affine(image, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, _LARGEST_SHIFT * s * image.width, 0, 1, 0)),
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, _LARGEST_SHIFT * s * image.height)),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - round(256 * abs(s))),
}
"""By name, of an image and a strength from -1 to 1."""
