"""Images: bytes to pixels to patches, with caps that hold before anything is decoded.

There is one way from a file to pixels, wherever it comes from. Images are resized straight to a square,
without cropping: a caption may name what stands at the edge. JPEGs are decoded at the smallest of libjpeg's
scales that is still at least the wanted size.
"""

from __future__ import annotations

import functools
import io
import itertools
import textwrap
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image as Pillow
from PIL import ImageCms, ImageDraw, ImageFont

from metalm.config.model_schema import EncoderConfig, ImageConfig
from metalm.errors import BadSample
from metalm.modalities.boxes import COLOURS, boxes_in, draw_boxes
from metalm.modalities.modality import Board, Convert, Media

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from metalm.batch import EncoderShare

DECODERS = ("JPEG", "PNG", "WEBP")
"""Pillow's names of the only formats that are ever tried, whatever a member is called."""
MAX_PIXELS = 50_000_000
JPEG_QUALITY = 95
EXIF_ORIENTATION = 0x0112
MAX_PROFILE_BYTES = 4 << 20
SAME_COLOURS = 2
"""A profile that changes no value by more than this, of 255, is one of sRGB."""
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

_JPEG = ("JPEG", "MPO")
"""What Pillow calls an opened JPEG; MPO has more images behind the first, as cameras and phones write it."""
_TURNS = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""By EXIF orientation, what makes an image upright."""
_SHOWN_WIDTH, _LINE, _MARGIN = 256, 15, 6
_LARGEST_RATIO = 4
"""Of the height to the width of an image that is shown; a higher one is squeezed."""


class Image(Media):
    """Images of three channels, cut into square patches."""

    name = "image"
    kind = "image_text"
    noun = "image"
    exported_name = "pixel_values"
    formats: ClassVar = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
    other_suffixes = frozenset(
        (
            *("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl"),
            *("pbm", "pgm", "ppm", "psd", "svg", "tga", "tif", "tiff"),
        )
    )

    def reader(self, encoder: EncoderConfig) -> ImageReader:
        return ImageReader(_section(encoder))

    def no_media(self, encoder: EncoderConfig) -> np.ndarray:
        return np.empty((0, 3 * _section(encoder).patch_size ** 2), np.uint8)

    def max_vectors(self, encoder: EncoderConfig) -> int:
        return _section(encoder).num_patches

    def weights_per_vector(self, encoder: EncoderConfig) -> int:
        return 3 * _section(encoder).patch_size ** 2 * encoder.hidden_size

    def embedding_modules(self, encoder: EncoderConfig) -> dict[str, Any]:
        from torch import nn

        image = _section(encoder)
        return {
            "patch_embedding": nn.Linear(3 * image.patch_size**2, encoder.hidden_size),
            "image_positions": nn.Embedding(image.num_patches, encoder.hidden_size),
        }

    def embed(self, modules: Any, share: EncoderShare, hidden: Tensor) -> Tensor:
        pixels = share.media.to(hidden.dtype) / 127.5 - 1.0
        grid_positions = share.positions.index_select(0, share.patch_slots)
        patches = modules.patch_embedding(pixels) + modules.image_positions(grid_positions)
        return hidden.index_copy(0, share.patch_slots, patches)

    def encode(self, model: Any, share: EncoderShare, encoder: EncoderConfig, dtype: torch.dtype) -> Tensor:
        pixels = normalised_pixels(share.media, encoder).to(dtype)
        vectors = model(pixel_values=pixels).last_hidden_state
        return vectors[:, -_section(encoder).num_patches :].flatten(0, 1)

    def try_out(self, model: Any, encoder: EncoderConfig, generator: torch.Generator) -> Tensor:
        import torch

        size = _section(encoder).image_size
        return model(pixel_values=torch.rand(1, 3, size, size, generator=generator)).last_hidden_state

    def vectors_of_zeros(self, model: Any, encoder: EncoderConfig) -> Tensor:
        import torch

        image = _section(encoder)
        found = model(pixel_values=torch.zeros(1, 3, image.image_size, image.image_size))
        return found.last_hidden_state[:, -image.num_patches :]

    def describe_input(self, encoder: EncoderConfig) -> str:
        image = _section(encoder)
        side = image.image_size
        return f"images of {side} x {side} in {image.num_patches} patches"

    def embedding_shapes(self, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
        image, hidden = _section(encoder), encoder.hidden_size
        return {
            "patch_embedding.weight": (hidden, 3 * image.patch_size**2),
            "patch_embedding.bias": (hidden,),
            "image_positions.weight": (image.num_patches, hidden),
        }

    def exported_settings(self, encoder: EncoderConfig) -> dict[str, Any]:
        image = _section(encoder)
        return {"image_size": image.image_size, "patch_size": image.patch_size}

    def exported_media(self, media: np.ndarray, encoder: EncoderConfig) -> np.ndarray:
        """[images, 3, height, width], x / 127.5 - 1 of 8-bit pixels."""
        pixels = join_patches(media, _section(encoder)).transpose(0, 3, 1, 2)
        return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)

    def proof_file(self, encoder: EncoderConfig) -> bytes:
        """A picture of 260 x 200."""
        rows, columns = np.mgrid[0:200, 0:260]
        channels = (rows * columns // 97, rows * 2 + columns, 7 * rows ^ 3 * columns)
        return encode_png(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8))

    def decode(self, data: bytes | memoryview) -> np.ndarray:
        return decode_image(data)

    def show(
        self, board: Board, step: int, name: str, media: Any, lines: Sequence[str], *, first: bool
    ) -> None:
        board.write_picture(step, name, caption_picture(media, lines))

    def add_preparation_options(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--resize",
            type=int,
            metavar="PIXELS",
            help="shrink larger images to this on their shorter side",
        )

    def preparation_settings(self, options: Namespace) -> dict[str, int | float | None]:
        return {"shorter_side": options.resize}

    def convert(self, **settings: Any) -> Convert:
        return functools.partial(prepare_image, **settings)


class ImageReader:
    """Patches of images, all of one number."""

    def __init__(self, image: ImageConfig) -> None:
        self._image = image
        self.max_vectors = image.num_patches

    def count_vectors(self, _: bytes | memoryview) -> int:
        """Patches of one image."""
        return self._image.num_patches

    def read(self, data: bytes | memoryview) -> np.ndarray:
        """Patches [num_patches, patch_size * patch_size * 3] uint8.

        Raises:
            BadSample: as `decode_image`.
        """
        return cut_patches(decode_image(data, image_size=self._image.image_size), self._image)


def decode_image(data: bytes | memoryview, *, image_size: int | None = None) -> np.ndarray:
    """Decodes to sRGB [height, width, 3] uint8: upright (EXIF), 16 bits scaled to 8, transparent parts white.

    Of a file with several images, the first is taken. Colours of an embedded profile are converted; without
    one, and where it is damaged or of another kind of image, they are taken as sRGB.

    Args:
        image_size: resize to a square of this many pixels a side; None keeps the image's own size.

    Raises:
        BadSample: `image_bomb` (more than MAX_PIXELS by its header) or `undecodable_image`.
    """
    with _damage_is_a_bad_sample():
        image = _open(data)
        if image_size is not None and image.format in _JPEG:
            image.draft("RGB", (image_size, image_size))
        profile = image.info.get("icc_profile")
        return _resized(_opaque(_srgb(_eight_bits(_upright(image)), profile)), image_size)


def normalised_pixels(patches: Tensor, encoder: EncoderConfig) -> Tensor:
    """[P, patch * patch * 3] uint8 to images [I, 3, H, W] as an encoder of transformers takes them, float32.

    Where P is 0, one image of zeros.
    """
    import torch

    image, pretrained = _section(encoder), encoder.pretrained
    assert pretrained is not None
    if not len(patches):
        patches = patches.new_zeros(image.num_patches, patches.shape[1])
    grid, side = image.image_size // image.patch_size, image.patch_size
    cells = patches.view(-1, grid, grid, side, side, 3).permute(0, 5, 1, 3, 2, 4)
    pixels = cells.reshape(-1, 3, image.image_size, image.image_size).float() / 255
    assert pretrained.image_mean is not None and pretrained.image_std is not None
    channels = [
        (channel - mean) / deviation
        for channel, mean, deviation in zip(
            pixels.unbind(1), pretrained.image_mean, pretrained.image_std, strict=True
        )
    ]
    return torch.stack(channels, 1)


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels [height, width, 3] uint8 as a file that loses nothing."""
    buffer = io.BytesIO()
    Pillow.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cut_patches(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Cuts [image_size, image_size, 3] into patches [num_patches, patch_size * patch_size * 3].

    Patches are in row-major order of the grid; in a patch the order is row, column, channel.
    """
    patch = config.patch_size
    grid = config.image_size // patch
    cells = pixels.reshape(grid, patch, grid, patch, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(grid * grid, patch * patch * 3)


def join_patches(patches: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Puts the patches of whole images together again: [images, image_size, image_size, 3]."""
    patch = config.patch_size
    grid = config.image_size // patch
    cells = patches.reshape(-1, grid, grid, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, config.image_size, config.image_size, 3)


def prepare_image(data: bytes, shorter_side: int | None) -> tuple[str, bytes]:
    """Decodes an image in full, and gives the suffix and the content of its shard member.

    The bytes stay as they are unless the image must be turned upright (EXIF), has others behind it or is
    larger than wanted: then its shorter side becomes `shorter_side` pixels and it is encoded again, in its
    own format.

    Raises:
        BadSample: `undecodable_image` (also: of another format) or `image_bomb`.
    """
    with _damage_is_a_bad_sample():
        image = _open(data)
        kind = "JPEG" if image.format in _JPEG else str(image.format)
        shrinks = shorter_side is not None and min(image.size) > shorter_side
        upright = _upright(image)
        if not shrinks and upright is image and image.format == kind:
            image.load()
            return SUFFIXES[kind], data
        if shorter_side is not None and shrinks:
            scale = shorter_side / min(upright.size)
            size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
            if upright.mode in ("P", "1"):
                upright = upright.convert("RGBA")
            upright = upright.resize(size, Pillow.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        upright.info.pop("exif", None)  # it would have the image turned once more
        upright.save(buffer, kind, quality=JPEG_QUALITY, icc_profile=image.info.get("icc_profile"))
        return SUFFIXES[kind], buffer.getvalue()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write pixels [height, width, 3] uint8 to a file."""
    Pillow.fromarray(pixels).save(path, "PNG")


def caption_picture(pixels: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Draw an image enlarged to a fixed width, and text below it, wrapped.

    Boxes that a line tells are drawn, in the colour of the line. One that is more than four times as high as
    wide is squeezed to that, and one that is hardly a line high has one.

    Args:
        pixels: [height, width, 3] uint8.
        lines: paragraphs of text.

    Returns:
        [height', 256, 3] uint8.
    """
    image = Pillow.fromarray(pixels)
    height = min(round(_SHOWN_WIDTH * image.height / image.width), _LARGEST_RATIO * _SHOWN_WIDTH)
    image = image.resize((_SHOWN_WIDTH, max(1, height)), Pillow.Resampling.NEAREST)
    wrapped: list[tuple[str, str]] = []
    colours = itertools.cycle(COLOURS)
    for line in lines:
        boxes = boxes_in(line)
        colour = next(colours) if boxes else "black"
        image = Pillow.fromarray(draw_boxes(np.asarray(image), boxes or (), colour))
        wrapped += [(part, colour) for part in textwrap.wrap(line, 40) or [""]]
    size = (_SHOWN_WIDTH, image.height + 2 * _MARGIN + _LINE * len(wrapped))
    picture = Pillow.new("RGB", size, "white")
    picture.paste(image, (0, 0))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=11)
    for number, (line, colour) in enumerate(wrapped):
        draw.text((_MARGIN, image.height + _MARGIN + _LINE * number), line, fill=colour, font=font)
    return np.asarray(picture)


def _section(encoder: EncoderConfig) -> ImageConfig:
    assert encoder.image is not None
    return encoder.image


@contextmanager
def _damage_is_a_bad_sample() -> Iterator[None]:
    try:
        yield
    except BadSample:
        raise
    except Pillow.DecompressionBombError:
        raise BadSample("image_bomb") from None
    except Exception:
        # Pillow's plug-ins raise what their parsers do: OSError, SyntaxError, KeyError, struct.error, ...
        raise BadSample("undecodable_image") from None


def _open(data: bytes | memoryview) -> Pillow.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large sizes and odd EXIF fields
        image = Pillow.open(io.BytesIO(data), formats=DECODERS)
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("image_bomb")
    return image


def _upright(image: Pillow.Image) -> Pillow.Image:
    """The image as it is looked at; itself, if it need not be turned.

    Pillow's own `exif_transpose` writes the other fields anew, and fails where one of them is odd.
    """
    try:
        turn = _TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # of damaged EXIF, whatever its parser raises; the pixels may be sound
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Pillow.Image) -> Pillow.Image:
    """Greys of 16 bits as greys of 8: Pillow's conversion would clip them to white."""
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    greys = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Pillow.fromarray(((greys * 255 + 32767) // 65535).astype(np.uint8))


def _srgb(image: Pillow.Image, profile: bytes | None) -> Pillow.Image:
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
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
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
        probe = Pillow.fromarray(steps.reshape(27, 27, 3)).convert(mode)
        converted = ImageCms.applyTransform(probe, transform)
    except Exception:  # of what is no profile, or one of another mode, whatever its parser raises
        return None
    change = np.asarray(converted).astype(int) - np.asarray(probe.convert("RGB"))
    return None if mode != "CMYK" and abs(change).max() <= SAME_COLOURS else transform


def _opaque(image: Pillow.Image) -> Pillow.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Pillow.alpha_composite(Pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _resized(image: Pillow.Image, image_size: int | None) -> np.ndarray:
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Pillow.Resampling.BICUBIC)
    return np.asarray(image)
