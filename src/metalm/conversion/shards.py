"""Write safetensors shards tensor by tensor: no shard is ever held in memory.

The library's own writer wants all tensors of a file at once. The format makes streaming easy: the
header gives every tensor's place in advance, and the contents follow end to end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from metalm.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8

Shape = tuple[int, ...]


def plan_shards(shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    """Tensor names by shard, in the order given; a tensor above `max_bytes` has a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    max_bytes: int,
) -> list[Path]:
    """Write tensors to one file, or to several with an index.

    Args:
        folder: where to.
        tensors: by name, in the order of `shapes`; each is asked for when it is written.
        shapes: of all tensors, by name.
        dtype: that they are written in.
        max_bytes: contents of one file.

    Returns:
        The weight files.

    Raises:
        CheckpointError: the tensors are not those of `shapes`, or are not finite in `dtype`.
    """
    shards = plan_shards(shapes, dtype, max_bytes)
    if len(shards) == 1:
        paths = [folder / WEIGHTS_NAME]
    else:
        paths = [
            folder / f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
    stream = iter(tensors)
    for path, names in zip(paths, shards, strict=True):
        write_safetensors(path, stream, {name: shapes[name] for name in names}, dtype)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return paths


def write_safetensors(
    path: Path, tensors: Iterator[tuple[str, Tensor]], shapes: Mapping[str, Shape], dtype: torch.dtype
) -> None:
    """Write one file: as many tensors of the stream as `shapes` has; see `write_shards`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            found, tensor = next(tensors)
            if found != name or tuple(tensor.shape) != shape:
                raise CheckpointError(f"{name} is {list(shape)}, not {found} of {list(tensor.shape)}")
            stored = tensor.to(dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise CheckpointError(f"{name} holds values that are not finite in {dtype}")
            file.write(stored.view(torch.uint8).numpy().data)
