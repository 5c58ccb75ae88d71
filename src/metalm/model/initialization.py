"""Initial weights that depend on the seed and the parameter's name alone.

Every weight is drawn whole from a stream of its own and then cut to this rank's shard: the same model
on every topology, and adding an encoder changes no other parameter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from metalm.parallel.sharding import cut_shard, sharding_of, whole_shape

Draw = Callable[[Tensor, torch.Generator], object]
"""Fills a whole parameter in place."""


def initialize_parameters(
    module: nn.Module,
    component: str,
    seed: int,
    draw_for: Callable[[str], Draw],
    tensor_rank: int,
    tensor_size: int,
    given: Collection[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> None:
    """Give every parameter of `module` its values, drawn on the CPU in float32.

    Each is moved before the next one is drawn: no rank ever holds a whole model in float32, on the host or on
    the device, unless it trains in float32.

    Args:
        module: holds this rank's shards; marked as Megatron marks them.
        component: names the stream beside the parameter's name.
        seed: of the run.
        draw_for: what to do for a parameter name.
        tensor_rank: which part of each sharded parameter is kept.
        tensor_size: number of parts.
        given: parameters whose values come from elsewhere: NaN until then, so that a gap cannot go unseen.
        dtype: of the parameters afterwards.
        device: of the parameters afterwards; None for the CPU.
    """
    for name, parameter in module.named_parameters():
        if name in given:
            parameter.data = torch.full(parameter.shape, math.nan, dtype=dtype, device=device)
            continue
        digest = hashlib.sha256(f"init/{seed}/{component}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        sharding = sharding_of(parameter)
        whole = torch.empty(whole_shape(tuple(parameter.shape), sharding, tensor_size))
        draw_for(name)(whole, generator)
        shard = cut_shard(whole, sharding, tensor_rank, tensor_size)
        parameter.data = torch.empty(shard.shape, dtype=dtype, device=device).copy_(shard)


def normal(std: float) -> Draw:
    """Normal with mean 0."""
    return lambda whole, generator: whole.normal_(0.0, std, generator=generator)


def constant(value: float) -> Draw:
    """One value everywhere."""
    return lambda whole, generator: whole.fill_(value)


def mirrored(whole: Tensor, generator: torch.Generator) -> None:
    """1 and -1 in turn along the last dimension."""
    whole.fill_(1.0)
    whole[..., 1::2] = -1.0


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of Xavier's normal initialisation."""
    return (2.0 / (fan_in + fan_out)) ** 0.5
