"""The layout of the ranks: tensor-, context- and data-parallel groups of the decoder.

The ranks of a tensor-parallel group hold parts of the weights; those of a context-parallel group hold the
same part, and parts of the same rows. Both together work on one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Topology:
    """Where this rank stands.

    World rank = (data_rank * context_size + context_rank) * tensor_size + tensor_rank.
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup
    rows_group: dist.ProcessGroup
    """Ranks that work on the same rows: tensor x context, context ranks outermost."""
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    """Ranks with other rows, and the same share of them."""
    replica_group: dist.ProcessGroup
    """Ranks that hold the same part of the decoder's weights: data x context, data ranks outermost."""
    alone_group: dist.ProcessGroup
    """Holds this rank only: the model-parallel group of the encoders."""
    world_group: dist.ProcessGroup
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


def build_topology(tensor_size: int, device: torch.device, *, context_size: int = 1) -> Topology:
    """Split the open process group into Megatron's groups.

    Collective: every rank of the job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Megatron would open further gloo groups beside these, for checkpoints of its own.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_size,
        context_parallel_size=context_size,
        create_gloo_process_groups=False,
    )
    alone_groups = [dist.new_group([member]) for member in range(world_size)]
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    data_group = parallel_state.get_data_parallel_group()
    rows_group, replica_group = tensor_group, data_group
    if context_size > 1:
        rows_group = parallel_state.get_tensor_and_context_parallel_group()
        replica_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return Topology(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor_size,
        tensor_group=tensor_group,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=context_size,
        context_group=parallel_state.get_context_parallel_group(),
        rows_group=rows_group,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=data_group,
        replica_group=replica_group,
        alone_group=alone_groups[rank],
        world_group=dist.distributed_c10d._get_default_group(),
        device=device,
    )


def close_topology() -> None:
    """Forget the groups and leave the process group."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
