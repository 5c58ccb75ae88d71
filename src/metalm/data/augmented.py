"""Images of training samples, augmented by draws that belong to the sample's place in its lane."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metalm.config import AugmentationConfig, EncoderConfig
from metalm.data.order.streams import Stream
from metalm.document import Part, ReadPart
from metalm.modalities import MEDIA
from metalm.modalities.augmentation import RandAugment
from metalm.modalities.image import cut_patches, join_patches


class ImageAugmenter:
    """Augments the images of the samples of one source in one lane."""

    def __init__(
        self, config: AugmentationConfig, encoders: Mapping[str, EncoderConfig], draws: Stream
    ) -> None:
        self._augment, self._encoders, self._draws = RandAugment(config), encoders, draws

    def reading(self, read: ReadPart, ordinal: int) -> ReadPart:
        """What reads the parts of one sample, in their order, and augments those that are images.

        Args:
            read: decodes a part.
            ordinal: of the sample's place.
        """
        num_images = 0

        def read_augmented(part: Part) -> np.ndarray:
            nonlocal num_images
            patches = read(part)
            if part.modality != MEDIA["image"].name:
                return patches
            assert part.reader is not None
            image = self._encoders[part.reader].image
            assert image is not None
            first = num_images * self._augment.num_draws
            num_images += 1
            drawn = self._draws.uniforms(ordinal, first + self._augment.num_draws)[first:]
            pixels = self._augment.apply(join_patches(patches, image)[0], drawn.tolist())
            return cut_patches(pixels, image)

        return read_augmented
