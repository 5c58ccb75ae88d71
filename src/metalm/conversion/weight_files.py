"""Write a model's weights as Hugging Face lays them out: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from metalm.checkpoint.writer import Shape, write_stream
from metalm.errors import CheckpointError
from metalm.progress import Phase

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
    with Phase("writing weights", len(shapes), "tensors") as phase:
        stream = phase.each(_stored(tensors, dtype))
        for path, names in zip(paths, shards, strict=True):
            write_stream(path, stream, {name: shapes[name] for name in names}, dtype)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    return paths


def _stored(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        stored = tensor.to(dtype)
        if not torch.isfinite(stored).all():
            raise CheckpointError(f"{name} holds values that are not finite in {dtype}")
        yield name, stored
