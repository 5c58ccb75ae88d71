"""What DeepSpeed asks of a model-parallel unit, answered once per engine.

DeepSpeed calls names that Megatron's `parallel_state` lacks, and the two engines have different
answers: the decoder's is split over TP and sharded over data and context ranks, the encoders' is not split
and sharded over the world. To DeepSpeed a context-parallel rank is one more data-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from metalm.parallel.topology import Topology


@dataclass(frozen=True)
class Mpu:
    """One engine's view of the groups."""

    model_rank: int
    model_size: int
    model_group: dist.ProcessGroup
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup

    def get_model_parallel_rank(self) -> int:
        return self.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self.model_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.model_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.model_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group


def decoder_mpu(topology: Topology) -> Mpu:
    """Split over the TP group, ZeRO-sharded over the ranks with the same split."""
    return Mpu(
        topology.tensor_rank,
        topology.tensor_size,
        topology.tensor_group,
        topology.replica_rank,
        topology.replica_size,
        topology.replica_group,
    )


def encoders_mpu(topology: Topology) -> Mpu:
    """Not split, ZeRO-sharded over all ranks."""
    return Mpu(0, 1, topology.alone_group, topology.rank, topology.world_size, topology.world_group)
