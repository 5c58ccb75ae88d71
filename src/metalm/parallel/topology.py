"""The layout of the ranks: tensor-, context- and data-parallel groups of the decoder.

The ranks of a tensor-parallel group hold parts of the weights; those of a context-parallel group hold the
same part, and parts of the same rows. Both together work on one micro-batch.

A rank opens the groups that it is in, and no others: Megatron's own set-up opens every group of every rank,
one after the other. Groups that device tensors cross are of NCCL alone where there is CUDA, since a gloo
group keeps a connection to each of its members; what lies in host memory crosses one gloo group each over the
world, the tensor-parallel ranks, those with the same rows and those with the same weights.
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
    """Where this rank stands.

    World rank = (data_rank * context_size + context_rank) * tensor_size + tensor_rank. A `..._host_group` has
    the same ranks as the group before it, for tensors in host memory.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    tensor_host_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    rows_group: dist.ProcessGroup
    """Ranks that work on the same rows: tensor x context, context ranks outermost."""
    rows_host_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    """Ranks with other rows, and the same share of them."""
    replica_group: dist.ProcessGroup
    """Ranks that hold the same part of the decoder's weights: data x context, data ranks outermost."""
    replica_host_group: dist.ProcessGroup
    alone_group: dist.ProcessGroup
    """Holds this rank only: the model-parallel group of the encoders."""
    world_group: dist.ProcessGroup
    """For device tensors and for those in host memory."""
    device: torch.device

    @property
    def rows_rank(self) -> int:
        """In `rows_group`, whose first rank reads the rows."""
        return self.context_rank * self.tensor_size + self.tensor_rank

    @property
    def rows_size(self) -> int:
        """Of `rows_group`."""
        return self.context_size * self.tensor_size

    @property
    def replica_rank(self) -> int:
        """In `replica_group`."""
        return self.data_rank * self.context_size + self.context_rank

    @property
    def replica_size(self) -> int:
        """Of `replica_group`."""
        return self.data_size * self.context_size

    def describe(self) -> str:
        """One line for the log."""
        context = f"context {self.context_size} x " if self.context_size > 1 else ""
        return (
            f"{self.world_size} rank(s): decoder tensor {self.tensor_size} x {context}data {self.data_size}, "
            f"encoders over all ranks, {self.device.type}"
        )


def build_topology(
    tensor_size: int, device: torch.device, timeout: timedelta | None = None, *, context_size: int = 1
) -> Topology:
    """Split the open process group, and tell Megatron of the groups.

    Args:
        tensor_size: ranks that hold a decoder together.
        device: of this rank.
        timeout: of a collective; None for torch's own.
        context_size: ranks that share the positions of the same rows.

    Collective: every rank of the job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows_size = tensor_size * context_size
    replica_rank, tensor_rank = divmod(rank, tensor_size)
    data_rank, context_rank = divmod(replica_rank, context_size)

    def open_group(ranks: Sequence[int], backend: str | None) -> dist.ProcessGroup:
        """Collective: these ranks, which open their groups in the same order."""
        group: dist.ProcessGroup = dist.new_group(
            list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True
        )
        return group

    of_device = "nccl" if device.type == "cuda" else None

    def open_pair(ranks: Sequence[int]) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """For device tensors, and for those in host memory."""
        group = open_group(ranks, of_device)
        return group, group if of_device is None else open_group(ranks, "gloo")

    first_of_rows = data_rank * rows_size
    tensor_group, tensor_host_group = open_pair(
        range(replica_rank * tensor_size, (replica_rank + 1) * tensor_size)
    )
    replica_group, replica_host_group = open_pair(range(tensor_rank, world_size, tensor_size))
    alone_group = open_group([rank], of_device)
    context_group, data_group = alone_group, replica_group
    rows_group, rows_host_group = tensor_group, tensor_host_group
    if context_size > 1:
        context_group = open_group(
            range(first_of_rows + tensor_rank, first_of_rows + rows_size, tensor_size), of_device
        )
        data_group = open_group(range(rank - first_of_rows, world_size, rows_size), of_device)
        rows_group, rows_host_group = open_pair(range(first_of_rows, first_of_rows + rows_size))
    tell_groups(
        tensor=tensor_group,
        context=context_group,
        rows=rows_group,
        data=data_group,
        replica=replica_group,
        alone=alone_group,
    )
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=tensor_rank,
        tensor_size=tensor_size,
        tensor_group=tensor_group,
        tensor_host_group=tensor_host_group,
        context_rank=context_rank,
        context_size=context_size,
        context_group=context_group,
        rows_group=rows_group,
        rows_host_group=rows_host_group,
        data_rank=data_rank,
        data_size=world_size // rows_size,
        data_group=data_group,
        replica_group=replica_group,
        replica_host_group=replica_host_group,
        alone_group=alone_group,
        world_group=dist.distributed_c10d._get_default_group(),
        device=device,
    )


def close_topology() -> None:
    """Forget the groups and leave the process group."""
    forget_groups()
    dist.destroy_process_group()
