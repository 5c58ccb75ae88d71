"""The layout of the ranks: decoder tensor-parallel groups, and data-parallel groups across them.

A rank opens the groups that it is in, and no others: Megatron's own set-up opens every group of every rank,
one after the other. Groups that device tensors cross are of NCCL alone where there is CUDA, since a gloo
group keeps a connection to each of its members; what lies in host memory crosses one gloo group each over the
world, the data-parallel and the tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from metalm.parallel.megatron_groups import forget_groups, tell_groups


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. World rank = data_rank * tensor_size + tensor_rank."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    tensor_host_group: dist.ProcessGroup
    """The same ranks, for tensors in host memory."""
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    data_host_group: dist.ProcessGroup
    """The same ranks, for tensors in host memory."""
    alone_group: dist.ProcessGroup
    """Holds this rank only: the model-parallel group of the encoders."""
    world_group: dist.ProcessGroup
    """For device tensors and for those in host memory."""
    device: torch.device

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.world_size} rank(s): decoder tensor {self.tensor_size} x data {self.data_size}, "
            f"encoders over all ranks, {self.device.type}"
        )


def build_topology(tensor_size: int, device: torch.device, timeout: timedelta | None = None) -> Topology:
    """Split the open process group, and tell Megatron of the groups.

    Args:
        tensor_size: ranks that hold a decoder together.
        device: of this rank.
        timeout: of a collective; None for torch's own.

    Collective: every rank of the job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_rank, tensor_rank = divmod(rank, tensor_size)

    def open_group(ranks: Sequence[int], backend: str | None) -> dist.ProcessGroup:
        """Collective: these ranks, which open their groups in the same order."""
        group: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True
        )
        return group

    tensor_ranks = range(data_rank * tensor_size, (data_rank + 1) * tensor_size)
    data_ranks = range(tensor_rank, world_size, tensor_size)
    of_device = "nccl" if device.type == "cuda" else None
    tensor_group = tensor_host_group = open_group(tensor_ranks, of_device)
    data_group = data_host_group = open_group(data_ranks, of_device)
    alone_group = open_group([rank], of_device)
    if of_device is not None:
        tensor_host_group, data_host_group = open_group(tensor_ranks, "gloo"), open_group(data_ranks, "gloo")
    tell_groups(tensor=tensor_group, data=data_group, alone=alone_group)
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        tensor_group=tensor_group,
        tensor_host_group=tensor_host_group,
        data_rank=data_rank,
        data_size=world_size // tensor_size,
        data_group=data_group,
        data_host_group=data_host_group,
        alone_group=alone_group,
        world_group=dist.distributed_c10d._get_default_group(),
        device=device,
    )


def close_topology() -> None:
    """Forget the groups and leave the process group."""
    forget_groups()
    dist.destroy_process_group()
