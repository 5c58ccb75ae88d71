"""The one writer of safetensors files: streamed tensor by tensor, hashed in the same pass, forced to disk.

The library's own `save_file` wants all tensors at once, copies them, and leaves the hash to a second pass.
The format makes streaming easy: the header gives every tensor's place in advance, and the contents follow
end to end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from metalm.checkpoint.manifest import FileRecord
from metalm.errors import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8

Shape = tuple[int, ...]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous float32 host tensors without copying them; see `write_stream`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return write_stream(path, tensors.items(), shapes, torch.float32)


def write_stream(
    path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Shape], dtype: torch.dtype
) -> FileRecord:
    """Write one file of tensors that are asked for one at a time; answer its size and hash.

    Args:
        path: of the file.
        tensors: by name, in the order of `shapes`, on the host; the stream may hold more than these.
        shapes: of all tensors of this file.
        dtype: of every tensor.

    Raises:
        CheckpointError: the stream gives other tensors.
        OSError: the disk is full, for example; the file is then incomplete.
    """
    stream, digest, size = iter(tensors), hashlib.sha256(), 0
    with path.open("wb", buffering=0) as handle, ThreadPoolExecutor(1) as pool:
        hashing: Future[None] = pool.submit(digest.update, header := _header(shapes, dtype))
        size += _write_all(handle.fileno(), memoryview(header))
        for name, shape in shapes.items():
            found, tensor = next(stream, ("nothing", torch.empty(0)))
            if found != name or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {dtype} {list(shape)}, not {found} of {tensor.dtype} {list(tensor.shape)}"
                )
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            hashing.result()
            hashing = pool.submit(digest.update, content)  # hashing and writing both release the GIL
            size += _write_all(handle.fileno(), content)
        hashing.result()
        os.fsync(handle.fileno())
    return FileRecord(size, digest.hexdigest())


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _write_all(descriptor: int, content: memoryview) -> int:
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])
    return written
