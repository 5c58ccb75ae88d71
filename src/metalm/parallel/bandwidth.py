"""How fast ranks sum tensors and how far their clocks differ: measured before a run, to find a bad node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_ROUNDS = 4
_FEW, _LATENCY_ROUNDS = 256, 20


@dataclass(frozen=True)
class LinkSpeeds:
    """What one rank measured; bus bandwidths in GiB/s, as NCCL's own tests count them."""

    clock_s: float
    """Ahead of rank 0's clock."""
    within_gib_s: float | None
    """None on a node with one rank."""
    across_gib_s: float | None
    """The better of the two neighbours in the ring of nodes: a slow node makes both of its links slow, and
    leaves its neighbours the other one. None on one node."""
    within_latency_s: float | None = None
    """What the sum of a few numbers takes within the node."""
    across_latency_s: float | None = None
    """And with a neighbouring node."""


def measure_links(nodes: Sequence[Sequence[int]], device: torch.device, mebibytes: int) -> LinkSpeeds:
    """All-reduce tensors within each node, and between neighbouring nodes.

    Args:
        nodes: the ranks of each node.
        mebibytes: size of the tensor.

    Collective: all ranks.
    """
    rank = dist.get_rank()
    clock_s = _clock_difference()
    (own,) = (ranks for ranks in nodes if rank in ranks)
    within, within_latency = _all_reduce(own, device, mebibytes) if len(own) > 1 else (None, None)
    across = [
        _all_reduce([*nodes[one], *nodes[other]], device, mebibytes)
        for one, other in _ring(len(nodes))
        if rank in nodes[one] or rank in nodes[other]
    ]
    speed = max((speed for speed, _ in across), default=None)
    latency = min((latency for _, latency in across), default=None)
    return LinkSpeeds(clock_s, within, speed, within_latency, latency)


def _ring(num_nodes: int) -> list[tuple[int, int]]:
    """Neighbours in an order in which most pairs are measured at once: even ones, then odd ones."""
    if num_nodes < 2:
        return []
    if num_nodes == 2:
        return [(0, 1)]
    pairs = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    return pairs[::2] + pairs[1::2]


def _all_reduce(ranks: Sequence[int], device: torch.device, mebibytes: int) -> tuple[float, float]:
    """GiB/s, and the seconds of a small one.

    Collective: these ranks.
    """
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    seconds = []
    for size, rounds in ((mebibytes * 2**18, _ROUNDS), (_FEW, _LATENCY_ROUNDS)):
        values = torch.ones(size, dtype=torch.float32, device=device)
        dist.all_reduce(values, group=group)  # connects
        _wait(device)
        began = time.perf_counter()
        for _ in range(rounds):
            dist.all_reduce(values, group=group)
        _wait(device)
        seconds.append((time.perf_counter() - began) / rounds)
    dist.destroy_process_group(group)
    return 2 * (len(ranks) - 1) / len(ranks) * mebibytes / 1024 / seconds[0], seconds[1]


def _clock_difference() -> float:
    """The least difference to rank 0's clock over some rounds: ranks leave a barrier at almost one time.

    Collective: all ranks, over gloo.
    """
    least = float("inf")
    for _ in range(_ROUNDS):
        dist.all_reduce(torch.zeros(1))  # a barrier over gloo
        gathered = [torch.zeros((), dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, torch.tensor(time.time(), dtype=torch.float64))
        difference = float(gathered[dist.get_rank()] - gathered[0])
        least = min(least, difference, key=abs)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
