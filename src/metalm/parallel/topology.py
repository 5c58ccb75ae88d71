"""The layout of the ranks: decoder tensor-parallel groups, and data-parallel groups across them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. World rank = data_rank * tensor_size + tensor_rank."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    alone_group: dist.ProcessGroup
    """Holds this rank only: the model-parallel group of the encoders."""
    world_group: dist.ProcessGroup
    device: torch.device

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.world_size} rank(s): decoder tensor {self.tensor_size} x data {self.data_size}, "
            f"encoders over all ranks, {self.device.type}"
        )


def build_topology(tensor_size: int, device: torch.device) -> Topology:
    """Split the open process group into Megatron's groups.

    Collective: every rank of the job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Megatron would open further gloo groups beside these, for checkpoints of its own.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size, create_gloo_process_groups=False
    )
    alone_groups = [dist.new_group([member]) for member in range(world_size)]
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        alone_group=alone_groups[rank],
        world_group=dist.distributed_c10d._get_default_group(),
        device=device,
    )


def close_topology() -> None:
    """Forget the groups and leave the process group."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
