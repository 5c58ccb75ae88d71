"""Fashion-MNIST: pictures of clothes as yes/no questions, with the owner's split.

The owner has no validation split: it is taken from the training pictures, of which those that are the same as
one of the test are left out.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from metalm.errors import DataError
from metalm.modalities.image import encode_png
from metalm.reproduction.data.archives import read_members
from metalm.reproduction.data.packages import FASHION_MNIST
from metalm.reproduction.data.photographs import yes_no
from metalm.reproduction.data.set_folder import SetFolder
from metalm.reproduction.data.splitting import owners_split

PACKAGES = (FASHION_MNIST,)
KINDS = (
    "a T-shirt or top",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
"""By the owner's number."""
_FILES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 8
"""The type of all numbers in its files."""


def write(files: dict[str, Path], folder: SetFolder) -> None:
    """Write the task and its pictures."""
    found = {
        Path(name).name: gzip.decompress(content)
        for name, content in read_members(files[FASHION_MNIST.name], lambda name: name.endswith("-ubyte.gz"))
    }
    pictures: dict[str, bytes] = {}
    records = {}
    for split, prefix in _FILES.items():
        pixels = _read_idx(f"{prefix}-images-idx3-ubyte.gz", found)
        labels = _read_idx(f"{prefix}-labels-idx1-ubyte.gz", found)
        named = {f"{split}/{n:05d}.png": encode_png(one) for n, one in enumerate(pixels)}
        pictures |= named
        records[split] = [
            record
            for (name, png), label in zip(named.items(), labels, strict=True)
            for record in yes_no(name, png, KINDS[label], KINDS)
        ]
    folder.write_task("fashion_mnist_yes_no", owners_split(**records), "label")
    folder.write_zip("images.zip", pictures.items())


def _read_idx(name: str, found: dict[str, bytes]) -> np.ndarray:
    """The numbers of an IDX file: 0, 0, their type, the number of dimensions, then each size in 4 bytes."""
    try:
        content = found[name]
        kind, dimensions = content[2], content[3]
        start = 4 + 4 * dimensions
        sizes = np.frombuffer(content[4:start], ">u4").astype(int)
        if content[:2] != b"\0\0" or kind != _UNSIGNED_BYTES:
            raise ValueError("it does not begin with 0, 0, 8")
        return np.frombuffer(content, np.uint8, offset=start).reshape(sizes)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"{name} is no IDX file of bytes: {error!r}") from None
