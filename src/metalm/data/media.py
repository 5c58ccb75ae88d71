"""What an encoder reads of the images or clips of a source of pairs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from metalm.config.schema import MEDIA_OF_KIND, EncoderConfig, ImageConfig, RunConfig, SourceConfig
from metalm.data.audio import ClipReader
from metalm.data.images import cut_patches, decode_image
from metalm.errors import ConfigError


class MediaReader(Protocol):
    """Bytes of a pair's main member to what stands in `RowSpans.media`."""

    max_patches: int
    """Vectors of the largest member."""

    def count_patches(self, data: bytes | memoryview) -> int:
        """Vectors of a member, found out without decoding it."""
        ...

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """The decoded member: its patches [n, ...], or its features as one row [1, ...]."""
        ...


class ImageReader:
    """Patches of images, all of one number."""

    def __init__(self, image: ImageConfig) -> None:
        self._image = image
        self.max_patches = image.num_patches

    def count_patches(self, _: bytes | memoryview) -> int:
        """Patches of one image."""
        return self._image.num_patches

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """Patches [num_patches, patch_size * patch_size * 3] uint8.

        Raises:
            BadSample: as `decode_image`.
        """
        return cut_patches(decode_image(data, image_size=self._image.image_size), self._image)


def pair_encoder(config: RunConfig, source_name: str, source: SourceConfig) -> EncoderConfig:
    """The encoder of a source of pairs.

    Raises:
        ConfigError: the source names no encoder of its kind.
    """
    encoder = config.model.encoders.get(source.encoder or "")
    wanted = MEDIA_OF_KIND[source.kind]
    if encoder is None or getattr(encoder, wanted) is None:
        raise ConfigError(
            f"source {source_name} is {source.kind}: its encoder must be one of the model's with {wanted}, "
            f"not {source.encoder!r}"
        )
    return encoder


def media_reader(encoder: EncoderConfig) -> MediaReader:
    """The reader of an encoder of images or audio.

    Raises:
        ConfigError: as `ClipReader`.
    """
    return ImageReader(encoder.image) if encoder.image is not None else clip_reader(encoder)


def clip_reader(encoder: EncoderConfig) -> ClipReader:
    """The reader of an encoder of audio.

    Raises:
        ConfigError: as `ClipReader`.
    """
    assert encoder.audio is not None and encoder.pretrained is not None
    return ClipReader(encoder.audio, encoder.pretrained.processor)
