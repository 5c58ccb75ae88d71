"""Pixels as Pillow alone gives them, and nothing decoded that should not be."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metalm.config.model_schema import ImageConfig
from metalm.errors import BadSample
from metalm.modalities.image import (
    MAX_PIXELS,
    ImageReader,
    caption_picture,
    cut_patches,
    decode_image,
    encode_png,
)


def photograph(size: tuple[int, int]) -> Image.Image:
    """Smooth content, as photographs have."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1]))
    channels = [np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)]
    return Image.fromarray(((np.stack(channels, -1) + 1) * 127).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_images_keep_their_pixels(format: str) -> None:
    image = photograph((37, 23))
    data = encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(decode_image(data), np.asarray(image))


@pytest.mark.parametrize("size", [(300, 200), (640, 480), (1024, 768), (100, 90)])
def test_scaled_decoding_differs_little_from_full_decoding(size: tuple[int, int]) -> None:
    data = encoded(photograph(size), "JPEG", quality=92)
    full = Image.open(io.BytesIO(data)).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
    pixels = decode_image(data, image_size=96)
    assert pixels.shape == (96, 96, 3)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(float) - np.asarray(full, float))
    assert difference.mean() < 1.5


def test_images_are_squeezed_not_cropped() -> None:
    wide = np.zeros((20, 80, 3), np.uint8)
    wide[:, :8] = 255
    wide[:, -8:] = 255
    data = encode_png(wide)
    whole = ImageReader(ImageConfig(image_size=20, patch_size=20)).read(data).reshape(20, 20, 3)
    for pixels in (whole, decode_image(data, image_size=20)):
        assert pixels[:, 0].mean() > 200
        assert pixels[:, -1].mean() > 200
        assert pixels[:, 10].mean() < 20


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = photograph((24, 16)).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert decode_image(data, image_size=8).shape == (8, 8, 3)


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    pixels = decode_image(encoded(image, "PNG"))
    assert pixels[0, 0].tolist() == [0, 0, 200]
    assert pixels[0, 7].tolist() == [255, 255, 255]
    keyed = image.convert("RGB")
    pixels = decode_image(encoded(keyed, "PNG", transparency=(200, 0, 0)))
    assert pixels[0, 0].tolist() == [0, 0, 200]
    assert pixels[0, 7].tolist() == [255, 255, 255]


def test_patches_are_cut_row_by_row_channels_last() -> None:
    config = ImageConfig(image_size=6, patch_size=2)
    pixels = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    patches = cut_patches(pixels, config)
    assert patches.shape == (9, 12)
    for number, patch in enumerate(patches):
        row, column = divmod(number, 3)
        expected = [
            pixels[row * 2 + y, column * 2 + x, c] for y in range(2) for x in range(2) for c in range(3)
        ]
        assert patch.tolist() == expected


def png_of_stated_size(width: int, height: int) -> bytes:
    """A PNG whose header promises far more than its few bytes hold."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 12_000, 60_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(BadSample) as failure:
        decode_image(png_of_stated_size(side, side))
    assert failure.value.cause == "image_bomb"


GOOD = encoded(photograph((64, 48)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        GOOD[: len(GOOD) // 2],
        GOOD[:10],
        encoded(photograph((8, 8)), "GIF"),
        encoded(photograph((8, 8)), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(calc) run\n",
        png_of_stated_size(64, 64),
    ],
    ids=["empty", "text", "cut in half", "cut in header", "gif", "tiff", "postscript", "png without pixels"],
)
def test_what_is_no_image_of_a_known_format_is_refused(data: bytes) -> None:
    with pytest.raises(BadSample) as failure:
        decode_image(data, image_size=16)
    assert failure.value.cause == "undecodable_image"


@pytest.mark.parametrize(
    ("size", "shown"),
    [((600, 1), (256, 1)), ((1, 600), (256, 1024)), ((10, 20_000), (256, 1024)), ((300, 600), (256, 512))],
)
def test_an_image_of_any_size_is_shown_over_its_caption(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    picture = caption_picture(pixels, ["a fox", "<box> 0 0 32 32 </box>"])
    width, height = shown
    assert picture.shape[1] == width and height < len(picture) < height + 100
    assert (picture[0, 5] != 255).any() and (picture[height, 5] == 255).all()
