"""Checks an image file, and turns it into what a shard holds."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from metalm.data.failures import BadSample
from metalm.data.images import DECODERS, MAX_PIXELS

JPEG_QUALITY = 95
EXIF_ORIENTATION = 0x0112
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def prepare_image(data: bytes, shorter_side: int | None) -> tuple[str, bytes]:
    """Decodes an image in full, and gives the suffix and the content of its shard member.

    The bytes stay as they are unless the image must be turned upright (EXIF) or is larger than wanted:
    then its shorter side becomes `shorter_side` pixels and it is encoded again in its own format.

    Raises:
        BadSample: `undecodable_image` (also: of another format) or `image_bomb`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=DECODERS)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample("image_bomb")
        assert image.format is not None
        kind = image.format
        shrinks = shorter_side is not None and min(image.size) > shorter_side
        turns = image.getexif().get(EXIF_ORIENTATION, 1) != 1
        if not shrinks and not turns:
            image.load()
            return SUFFIXES[kind], data
        upright = ImageOps.exif_transpose(image)
        if shorter_side is not None and shrinks:
            scale = shorter_side / min(upright.size)
            size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
            if upright.mode in ("P", "1"):
                upright = upright.convert("RGBA")
            upright = upright.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        upright.save(buffer, kind, quality=JPEG_QUALITY)
        return SUFFIXES[kind], buffer.getvalue()
    except Image.DecompressionBombError:
        raise BadSample("image_bomb") from None
    except (OSError, ValueError, SyntaxError, IndexError, EOFError):
        raise BadSample("undecodable_image") from None
