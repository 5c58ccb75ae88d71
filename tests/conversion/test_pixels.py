"""The same file gives the same pixels in training and in the shipped processor, whatever way it comes in."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from metalm.conversion.shipped.image_processing_metalm import MetaLMImageProcessor
from metalm.modalities.image import decode_image, prepare_image

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


def icc_profile(gamma: float, primaries: np.ndarray | None) -> bytes:
    """A profile of one gamma: of RGB whose primaries are the columns [XYZ, 3] at D50, or of greys."""

    def numbers(kind: bytes, *values: float) -> bytes:
        return kind + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": numbers(b"XYZ ", *D50), b"cprt": b"text" + bytes(4) + b"none\0\0\0\0"}
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78)
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip("rgb", primaries.T, strict=True):
            tags[f"{name}XYZ".encode()] = numbers(b"XYZ ", *column)
            tags[f"{name}TRC".encode()] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    space = b"GRAY" if primaries is None else b"RGB "
    header = struct.pack(">I4sI", 132 + 12 * len(tags) + len(body) - 4, bytes(4), 0x02100000)
    header += b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(24 + 4)
    header += b"".join(struct.pack(">i", round(value * 65536)) for value in D50)
    size = 128 + len(table) + len(body)
    return (struct.pack(">I", size) + header[4:]).ljust(128, b"\0") + table + body


D50 = (0.9642, 1.0, 0.8249)
SRGB_D50 = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
"""Columns: the primaries of sRGB at D50. What follows are sRGB's green and red in each other's place."""
STRANGE = icc_profile(1.8, SRGB_D50[:, [1, 0, 2]])
STRANGE_GREY = icc_profile(1.8, None)


def by_profile(pixels: np.ndarray, gamma: float) -> np.ndarray:
    """sRGB of values 0..255 of that gamma, by the formula of IEC 61966-2-1."""
    linear = (pixels / 255) ** gamma
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


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
    "profile": saved(RGB, "PNG", icc_profile=STRANGE),
    "jpeg with profile": saved(RGB, "JPEG", icc_profile=STRANGE),
    "webp with profile": saved(RGBA, "WEBP", lossless=True, icc_profile=STRANGE),
    "palette with profile": saved(RGB.convert("P"), "PNG", icc_profile=STRANGE),
    "transparent palette with profile": saved(RGB.convert("P"), "PNG", transparency=3, icc_profile=STRANGE),
    "transparent colour with profile": saved(RGB, "PNG", transparency=(1, 2, 3), icc_profile=STRANGE),
    "grey with profile": saved(RGB.convert("L"), "PNG", icc_profile=STRANGE_GREY),
    "grey alpha with profile": saved(RGBA.convert("LA"), "PNG", icc_profile=STRANGE_GREY),
    "transparent grey with profile": saved(RGB.convert("L"), "PNG", transparency=5, icc_profile=STRANGE_GREY),
    "16 bits with profile": saved(
        Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG", icc_profile=STRANGE_GREY
    ),
    "1 bit with profile": saved(RGB.convert("1"), "PNG", icc_profile=STRANGE_GREY),
    "cmyk with a profile of RGB": saved(RGB.convert("CMYK"), "JPEG", icc_profile=STRANGE),
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


def test_colours_are_those_of_the_embedded_profile() -> None:
    """Against formulas; a file that says nothing, or sRGB, or nonsense keeps its values to the bit."""
    expected = by_profile(PIXELS[..., [1, 0, 2]], 1.8)
    np.testing.assert_allclose(decode_image(FORMS["profile"]), expected, atol=2.5)
    grey = decode_image(FORMS["16 bits with profile"])
    np.testing.assert_allclose(grey, by_profile(PIXELS[..., :1], 1.8).repeat(3, 2), atol=2.5)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (
        None,
        own,
        STRANGE_GREY,
        b"nonsense",
        STRANGE[:200],
        bytes(132),
        STRANGE[:128] + b"\xff" * 400,
    ):
        found = decode_image(saved(RGB, "PNG", icc_profile=profile))
        np.testing.assert_array_equal(found, PIXELS[..., :3])


def test_prepared_images_keep_their_profile() -> None:
    _, content = prepare_image(saved(RGB.resize((64, 64)), "JPEG", icc_profile=STRANGE, quality=95), 32)
    assert Image.open(io.BytesIO(content)).info["icc_profile"] == STRANGE


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
