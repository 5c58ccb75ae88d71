"""The same file gives the same pixels in training and in the shipped processor, whatever way it comes in."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metalm.conversion.shipped.image_processing_metalm import MetaLMImageProcessor
from metalm.modalities.image import decode_image

SIDE = 16
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 28, 4), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(PIXELS[..., :3]), "JPEG", exif=exif, quality=95)


RGB, RGBA = Image.fromarray(PIXELS[..., :3]), Image.fromarray(PIXELS)
FORMS: dict[str, bytes] = {
    "jpeg": saved(RGB, "JPEG"),
    "grey jpeg": saved(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": saved(RGB.convert("CMYK"), "JPEG"),
    "jpeg with another behind it": saved(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)]),
    **{f"turned jpeg {number}": turned(number) for number in range(1, 9)},
    "png": saved(RGB, "PNG"),
    "transparent png": saved(RGBA, "PNG"),
    "grey png with alpha": saved(RGBA.convert("LA"), "PNG"),
    "palette": saved(RGB.convert("P"), "PNG"),
    "transparent palette": saved(RGB.convert("P"), "PNG", transparency=3),
    "1 bit": saved(RGB.convert("1"), "PNG"),
    "16 bits": saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "webp": saved(RGBA, "WEBP", lossless=True),
    "moving webp": saved(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(180)]),
}
WAYS: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, folder: data,
    "path": lambda data, folder: _file(data, folder),
    "name": lambda data, folder: str(_file(data, folder)),
    "data URI": lambda data, folder: "data:image/any;base64," + base64.b64encode(data).decode(),
    "opened": lambda data, folder: Image.open(io.BytesIO(data)),
}


def _file(data: bytes, folder: Path) -> Path:
    (folder / "image").write_bytes(data)
    return folder / "image"


def processed(image: Any) -> np.ndarray:
    pixels = (MetaLMImageProcessor(SIDE).prepare_image(image) + 1) * 127.5
    return np.rint(pixels.permute(1, 2, 0).numpy()).astype(np.uint8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_processor_sees_what_training_sees(form: str, way: str, tmp_path: Path) -> None:
    data = FORMS[form]
    np.testing.assert_array_equal(processed(WAYS[way](data, tmp_path)), decode_image(data, image_size=SIDE))


def test_all_ways_of_turning_give_one_picture() -> None:
    """What a camera stores lying on a side, and says how to turn."""
    upright = decode_image(FORMS["turned jpeg 1"])
    back = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    for number, undo in back.items():
        np.testing.assert_array_equal(undo(decode_image(FORMS[f"turned jpeg {number}"])), upright)


def test_deep_and_transparent_images_keep_their_meaning() -> None:
    deep = decode_image(FORMS["16 bits"])
    np.testing.assert_array_equal(deep[..., 0], PIXELS[..., 0])
    alpha = PIXELS[..., 3:].astype(float) / 255
    expected = PIXELS[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(decode_image(FORMS["transparent png"]), expected, atol=1)


@pytest.mark.parametrize(
    "image",
    [
        PIXELS[..., 0],
        PIXELS[..., :1],
        PIXELS[..., 0].astype(np.uint16) * 257,
        PIXELS[..., 0].astype(np.int64),
        PIXELS[..., 0] / 255,
    ],
    ids=["grey", "one channel", "uint16", "int64", "floats"],
)
def test_arrays_of_one_picture_are_equal(image: np.ndarray) -> None:
    expected = decode_image(saved(Image.fromarray(PIXELS[..., 0]), "PNG"), image_size=SIDE)
    np.testing.assert_array_equal(processed(image), expected)


@pytest.mark.parametrize("image", [PIXELS * 1.0, PIXELS.astype(int) * 2, b"no image", saved(RGB, "BMP")])
def test_what_is_no_image_of_ours_is_refused(image: Any) -> None:
    with pytest.raises((ValueError, OSError)):
        processed(image)
