"""What RandAugment's operations do to pixels."""

from __future__ import annotations

import numpy as np
import pytest

from metalm.config import AugmentationConfig
from metalm.config.model_schema import ImageConfig
from metalm.modalities.augmentation import OPERATIONS, RandAugment
from metalm.modalities.image import cut_patches, join_patches

PIXELS = np.random.default_rng(2).integers(20, 220, (24, 24, 3), np.uint8)


def apply(name: str, magnitude: float, sign: float = 0.0, pixels: np.ndarray = PIXELS) -> np.ndarray:
    config = AugmentationConfig(operations=1, magnitude=magnitude, choices=(name,))
    return RandAugment(config).apply(pixels, [0.5, sign])


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_keeps_the_shape_and_grows_with_the_magnitude(name: str) -> None:
    weak, strong = apply(name, 0), apply(name, 10)
    assert weak.shape == strong.shape == PIXELS.shape and strong.dtype == np.uint8
    if name in ("identity", "autocontrast", "equalize"):
        assert np.array_equal(weak, strong)
    else:
        assert np.array_equal(weak, PIXELS) and not np.array_equal(strong, PIXELS)


def test_translations_move_by_the_share_of_the_side_and_signs_turn_them() -> None:
    moved = apply("translate_x", 10 / 0.45 / 24 * 3)  # three pixels
    assert np.array_equal(moved[:, :-3], PIXELS[:, 3:]) and np.all(moved[:, -2:] == 128)
    back = apply("translate_y", 10 / 0.45 / 24 * 3, sign=0.9)
    assert np.array_equal(back[3:], PIXELS[:-3]) and np.all(back[:2] == 128)


def test_brightness_and_solarize_by_their_formulas() -> None:
    assert np.abs(apply("brightness", 10, sign=0.9) - 0.1 * PIXELS).max() <= 1
    assert np.array_equal(apply("solarize", 5), np.where(PIXELS < 128, PIXELS, 255 - PIXELS))
    assert np.array_equal(apply("posterize", 10), PIXELS & 0xF0)


def test_draws_choose_the_operations_one_after_another() -> None:
    augment = RandAugment(AugmentationConfig(operations=2, magnitude=10, choices=("posterize", "solarize")))
    assert augment.num_draws == 4
    found = augment.apply(PIXELS, [0.2, 0.0, 0.7, 0.0])
    assert np.array_equal(found, apply("solarize", 10, pixels=apply("posterize", 10)))


def test_patches_come_together_as_they_were_cut() -> None:
    config = ImageConfig(image_size=24, patch_size=8)
    assert np.array_equal(join_patches(cut_patches(PIXELS, config), config), PIXELS[None])
