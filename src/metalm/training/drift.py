"""Find replicas of a parameter that are no longer equal: a broken chip, a cosmic ray, a bug.

They are compared by their bits. In a healthy run those are equal: data-parallel ranks gather the same updated
weights, and tensor-parallel ranks update their copies of what is not cut by one gradient (see `replicas`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.parallel.sharding import sharding_of
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.owned_ranges import is_partitioned, owned_part

_CHUNK = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Replica:
    """What this rank holds a copy of."""

    name: str
    values: Tensor
    among: str
    """Which ranks hold the same: `data`, `tensor` or `world`."""


def find_drift(engines: Engines, topology: Topology) -> list[str]:
    """Compare the working weights that several ranks hold a copy of, by their bits.

    Healthy ranks tell each other the least and the greatest hash of each parameter, however many they are;
    all hashes are gathered only where some differ.

    Returns:
        A line for each parameter that differs, naming the ranks whose copy is in the minority; the
        same on all ranks.

    Collective: all ranks.
    """
    replicas = list(_replicas(engines))
    own = (
        torch.stack([_bits_hash(one.values) for one in replicas]).cpu() if replicas else torch.empty(0).long()
    )
    differ = False
    for among, group in (("data", topology.replica_host_group), ("tensor", topology.tensor_host_group)):
        differ |= _any_differs(own[[one.among == among for one in replicas]], False, group)
    shared = own[[one.among == "world" for one in replicas]]
    if not _any_differs(shared, differ, topology.world_group):
        return []
    gathered = [torch.empty_like(own) for _ in range(topology.world_size)]
    dist.all_gather(gathered, own)
    found = torch.stack(gathered)  # [ranks, parameters]
    return [
        f"{one.name} on rank {', '.join(map(str, odd))} of ranks {list(ranks)}"
        for number, one in enumerate(replicas)
        for ranks in _groups_of(one.among, topology)
        if (odd := _minority({rank: int(found[rank, number]) for rank in ranks}))
    ]


def _replicas(engines: Engines) -> Iterator[_Replica]:
    for component, engine in engines.by_component().items():
        for name, parameter in engine.module.named_parameters():
            is_whole = component == "encoders" or sharding_of(parameter) is None
            full_name = f"{component}.{name}"
            if not is_partitioned(engine):
                yield _Replica(full_name, parameter.detach(), "world" if is_whole else "data")
            elif component == "decoder" and is_whole:
                # Taken apart over the data-parallel ranks, each tensor-parallel rank's copy by itself.
                yield _Replica(full_name, owned_part(engine, parameter), "tensor")


def _any_differs(hashes: Tensor, differ_elsewhere: bool, group: dist.ProcessGroup) -> bool:
    """Whether a group's ranks have different hashes, or one of them knows of others that differ.

    Collective: the group.
    """
    # The least of all is found as the greatest complement.
    extremes = torch.cat([hashes, ~hashes, torch.tensor([int(differ_elsewhere)])])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    greatest, least = extremes[: len(hashes)], ~extremes[len(hashes) : -1]
    return bool((greatest != least).any() or extremes[-1])


def _groups_of(among: str, topology: Topology) -> Sequence[range]:
    """The groups of ranks that hold copies of the same; tensor ranks are the innermost."""
    tensor_size, world_size = topology.tensor_size, topology.world_size
    if among == "world":
        return [range(world_size)]
    if among == "data":
        return [range(first, world_size, tensor_size) for first in range(tensor_size)]
    return [range(first, first + tensor_size) for first in range(0, world_size, tensor_size)]


def _minority(values: dict[int, int]) -> list[int]:
    ((usual, _),) = Counter(values.values()).most_common(1)
    return [rank for rank, value in values.items() if value != usual]


def _bits_hash(tensor: Tensor) -> Tensor:
    """A hash of a tensor's bits and their places, modulo 2**64, computed where the tensor is."""
    bits = tensor.contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    # Odd multipliers: a change of any one element changes the sum.
    odd = torch.arange(_CHUNK, device=tensor.device) * 2 * 0x1E3779B97F4A7C15 + 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        total = total * 31 + (chunk.to(torch.int64) * odd[: len(chunk)]).sum() + number
    return total
