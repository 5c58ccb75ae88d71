"""Images as training prepares them, by themselves for `AutoImageProcessor` and as a part of the processor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ImageProcessingMixin
from transformers.image_utils import load_image

try:  # in a try, or transformers asks for Pillow before it loads this file
    from PIL import Image
except ImportError:  # for text it is not needed
    Image = None


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
        """One image as in training: opaque RGB, resized to a square, x / 127.5 - 1.

        Args:
            image: a PIL image, [height, width, 3] uint8, the bytes or the path of an image file, or a URL.

        Returns:
            [3, image_size, image_size] float32.

        Raises:
            ImportError: Pillow is not installed.
        """
        if Image is None:
            raise ImportError("images need Pillow: pip install pillow")
        side = self.image_size
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
            image = load_image(image)
        elif isinstance(image, str | Path | bytes):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            if image.format == "JPEG":
                image.draft("RGB", (side, side))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        if image.mode != "RGB":
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            image = image.convert("RGB")
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.to(torch.float32) / 127.5 - 1.0


__all__ = ["MetaLMImageProcessor"]
