"""Images as training prepares them, by themselves for `AutoImageProcessor` and as a part of the processor."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from transformers import BatchFeature, ImageProcessingMixin

try:  # in a try, or transformers asks for Pillow before it loads this file
    from PIL import Image, ImageCms
except ImportError:  # for text it is not needed
    Image = ImageCms = None


FORMATS = ("JPEG", "PNG", "WEBP")
"""Of files; those that training reads."""
EXIF_ORIENTATION = 0x0112
MAX_PROFILE_BYTES = 4 << 20
SAME_COLOURS = 2
"""A profile that changes no value by more than this, of 255, is one of sRGB."""
MAX_FILE_BYTES, URL_TIMEOUT_S = 256 << 20, 60


class MetaLMImageProcessor(ImageProcessingMixin):
    """Images to `pixel_values`."""

    model_input_names = ("pixel_values",)

    def __init__(self, image_size: int, **kwargs: Any) -> None:
        """Made by `AutoImageProcessor.from_pretrained`.

        Args:
            image_size: pixels per side.
            kwargs: what transformers keeps beside.
        """
        super().__init__(**kwargs)
        self.image_size = image_size

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Prepare one image or several.

        Args:
            images: as `prepare_image` takes them.
            return_tensors: "pt", "np" or None for a list.

        Returns:
            `pixel_values` [images, 3, image_size, image_size] float32.
        """
        several = images if isinstance(images, list | tuple) else [images]
        pixels = [self.prepare_image(image).numpy() for image in several]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def prepare_image(self, image: Any) -> torch.Tensor:
        """One image as in training: upright, opaque sRGB, resized to a square, x / 127.5 - 1.

        Args:
            image: a PIL image; an array [height, width] or [height, width, channels], of uint8, of uint16 in
                one channel or of floats in 0..1; bytes or path of a JPEG, PNG or WebP file, or its URL.

        Returns:
            [3, image_size, image_size] float32.

        Raises:
            ImportError: Pillow is not installed.
            ValueError: the values of an array are out of range, or the file cannot be read.
        """
        if Image is None:
            raise ImportError("images need Pillow: pip install pillow")
        side = self.image_size
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            with urlopen(image, timeout=URL_TIMEOUT_S) as response:
                image = response.read(MAX_FILE_BYTES)
        if isinstance(image, str | Path | bytes):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
            if image.format in ("JPEG", "MPO"):
                image.draft("RGB", (side, side))
        elif not isinstance(image, Image.Image):
            image = _from_array(np.asarray(image))
        profile = image.info.get("icc_profile")
        image = _opaque(_srgb(_eight_bits(_upright(image)), profile))
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32) / 127.5 - 1.0


def _from_array(values: np.ndarray) -> Any:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if np.issubdtype(values.dtype, np.floating):
        if not (values >= 0).all() or not (values <= 1).all():
            raise ValueError("an image of floats must have values in 0..1")
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype == np.uint16:
        values = _scaled(values)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"an image of {values.dtype} must have values in 0..255")
        values = values.astype(np.uint8)
    return Image.fromarray(values)


def _upright(image: Any) -> Any:
    """The image as it is looked at. Pillow's own way fails where another EXIF field is odd."""
    turns = Image.Transpose
    try:
        turn = {
            2: turns.FLIP_LEFT_RIGHT,
            3: turns.ROTATE_180,
            4: turns.FLIP_TOP_BOTTOM,
            5: turns.TRANSPOSE,
            6: turns.ROTATE_270,
            7: turns.TRANSVERSE,
            8: turns.ROTATE_90,
        }.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # of damaged EXIF, whatever its parser raises; the pixels may be sound
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Any) -> Any:
    """Greys of 16 bits as greys of 8: Pillow's conversion would clip them to white."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(_scaled(np.clip(np.asarray(image).astype(np.int64), 0, 65535)))


def _scaled(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def _srgb(image: Any, profile: Any) -> Any:
    """The image with the colours that it has by its profile."""
    if not profile or len(profile) > MAX_PROFILE_BYTES or image.mode == "1":
        return image
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image if alpha is None else image.convert(image.mode.removesuffix("A"))
    transform = _to_srgb(profile, colours.mode)
    if transform is None:
        return image
    converted: Any = ImageCms.applyTransform(colours, transform)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """From the colours of a profile to sRGB; None if that is what they are, or nothing can be made of it."""
    steps = np.stack(np.meshgrid(*[np.linspace(0, 255, 9)] * 3), -1).astype(np.uint8)
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
        probe = Image.fromarray(steps.reshape(27, 27, 3)).convert(mode)
        converted = ImageCms.applyTransform(probe, transform)
    except Exception:  # of what is no profile, or one of another mode, whatever its parser raises
        return None
    change = np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB"))
    return None if mode != "CMYK" and abs(change).max() <= SAME_COLOURS else transform


def _opaque(image: Any) -> Any:
    """RGB, with white behind what is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


__all__ = ["MetaLMImageProcessor"]
