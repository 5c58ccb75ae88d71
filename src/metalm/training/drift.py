"""Find replicas of a parameter that are no longer equal: a broken chip, a cosmic ray, a bug."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.parallel.sharding import sharding_of
from metalm.parallel.topology import Topology
from metalm.training.engines import Engines
from metalm.training.owned_ranges import is_partitioned

_CHUNK = 2**20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_drift(engines: Engines, topology: Topology) -> list[str]:
    """Compare the working weights that several ranks hold a copy of, by their bits.

    What ZeRO 3 has taken apart exists once and is not compared.

    Returns:
        A line for each parameter that differs, naming the ranks whose copy is in the minority; the
        same on all ranks.

    Collective: all ranks.
    """
    names, hashes = [], []
    for name, parameter in _replicated(engines):
        # Shards differ between tensor ranks by right: those are compared among equals alone.
        names.append((name, sharding_of(parameter) is not None))
        hashes.append(_bits_hash(parameter.detach()))
    if not names:
        return []
    own = torch.stack(hashes).cpu()
    gathered = [torch.empty_like(own) for _ in range(topology.world_size)]
    dist.all_gather(gathered, own)
    found = torch.stack(gathered)  # [ranks, parameters]
    problems = []
    for number, (name, is_sharded) in enumerate(names):
        groups = topology.tensor_size if is_sharded else 1
        for group in range(groups):
            ranks = range(group, topology.world_size, groups)  # tensor ranks are the innermost
            if odd := _minority({rank: int(found[rank, number]) for rank in ranks}):
                problems.append(f"{name} on rank {', '.join(map(str, odd))} of ranks {list(ranks)}")
    return problems


def _replicated(engines: Engines) -> Iterator[tuple[str, Any]]:
    for component, engine in engines.by_component().items():
        if not is_partitioned(engine):
            for name, parameter in engine.module.named_parameters():
                yield f"{component}.{name}", parameter


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
