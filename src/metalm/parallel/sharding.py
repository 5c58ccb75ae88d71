"""How a parameter is cut over tensor-parallel ranks, as Megatron marks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalm.errors import FaultError

_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride")


@dataclass(frozen=True)
class Sharding:
    """A parameter that is split over the TP group."""

    dimension: int
    stride: int
    """Interleaved parts along the dimension that are each cut by themselves (2 for SwiGLU's input)."""


def sharding_of(parameter: Any) -> Sharding | None:
    """The sharding of a parameter, None where it is whole on every rank.

    Raises:
        FaultError: Megatron marks it, but by other names: it would count as whole, and be lost on all ranks
            but one.
    """
    marks = [name for name in _MARKS if hasattr(parameter, name)]
    if marks and len(marks) < len(_MARKS):
        missing = ", ".join(name for name in _MARKS if name not in marks)
        raise FaultError(f"Megatron marks a parameter by {', '.join(marks)}, without {missing}")
    if not marks or not parameter.tensor_model_parallel:
        return None
    return Sharding(parameter.partition_dim, parameter.partition_stride)


def whole_shape(shard_shape: tuple[int, ...], sharding: Sharding | None, tensor_size: int) -> tuple[int, ...]:
    """Shape of the parameter that shards of a shape make up."""
    shape = list(shard_shape)
    if sharding is not None:
        shape[sharding.dimension] *= tensor_size
    return tuple(shape)


def cut_shard(whole: Tensor, sharding: Sharding | None, tensor_rank: int, tensor_size: int) -> Tensor:
    """One rank's shard of a whole parameter."""
    if sharding is None or tensor_size == 1:
        return whole
    strips = whole.chunk(sharding.stride, sharding.dimension)
    own = [strip.chunk(tensor_size, sharding.dimension)[tensor_rank] for strip in strips]
    return torch.cat(own, sharding.dimension)
