"""Image bytes to pixels to patches, with caps that hold before anything is decoded.

Images are resized straight to a square, without cropping: a caption may name what stands at the edge.
JPEGs are decoded at the smallest of libjpeg's scales that is still at least the wanted size.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from metalm.config.schema import ImageConfig
from metalm.data.failures import BadSample

DECODERS = ("JPEG", "PNG", "WEBP")
"""Pillow's names of the only formats that are ever tried, whatever a member is called."""
MAX_PIXELS = 50_000_000


def decode_image(data: bytes | memoryview, *, image_size: int | None = None) -> np.ndarray:
    """Decodes to [height, width, 3] uint8; transparent parts become white.

    Args:
        image_size: resize to a square of this many pixels a side; None keeps the image's own size.

    Raises:
        BadSample: `image_bomb` (more than MAX_PIXELS by its header) or `undecodable_image`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=DECODERS)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("image_bomb")
        if image_size is not None and image.format == "JPEG":
            image.draft("RGB", (image_size, image_size))
        return _resized(_opaque(image), image_size)
    except Image.DecompressionBombError:
        raise BadSample("image_bomb") from None
    except (OSError, ValueError, SyntaxError, IndexError, EOFError):
        # What Pillow raises on damaged files: UnidentifiedImageError is an OSError.
        raise BadSample("undecodable_image") from None


def fit_patches(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Patches of an image [height, width, 3] uint8 of any size, resized as by `decode_image`."""
    return cut_patches(_resized(Image.fromarray(pixels), config.image_size), config)


def cut_patches(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Cuts [image_size, image_size, 3] into patches [num_patches, patch_size * patch_size * 3].

    Patches are in row-major order of the grid; in a patch the order is row, column, channel.
    """
    patch = config.patch_size
    grid = config.image_size // patch
    cells = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(grid * grid, patch * patch * 3)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _resized(image: Image.Image, image_size: int | None) -> np.ndarray:
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image)
