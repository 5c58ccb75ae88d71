"""What crosses between the ranks of a TP group inside the step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.batch import SemiCausalBatch, count_bytes, from_bytes, to_bytes
from metalm.parallel.topology import Topology


class _GatherEncoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        gathered = mine.new_empty((ctx.size * mine.shape[0], *mine.shape[1:]))
        dist.all_gather(list(gathered.chunk(ctx.size)), mine.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.size)[ctx.rank] * ctx.size, None


def gather_encoded(mine: Tensor, topology: Topology) -> Tensor:
    """All ranks' span vectors from each rank's share, [L, D] to [T * L, D].

    The backward takes this rank's slice times T: the decoder's input gradient is whole on every TP
    rank, and the encoder engine averages over the world although a micro-batch's spans are split
    over the TP group.

    Collective: the TP group.
    """
    return _GatherEncoded.apply(mine, topology.tensor_group)


def gather_last_dimension(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., V/tp] of every rank, side by side as [..., V]; without gradients.

    Collective: all ranks of `group`.
    """
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.detach().contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def broadcast_batches(batches: list[SemiCausalBatch] | None, topology: Topology) -> list[SemiCausalBatch]:
    """TP rank 0's micro-batches (None elsewhere), on every rank of the TP group, in host memory.

    Collective: the TP group.
    """
    if topology.tensor_size == 1:
        assert batches is not None
        return batches
    source = dist.get_global_rank(topology.tensor_host_group, 0)
    structure, content = (None, None) if batches is None else to_bytes(batches)
    received = [structure]
    dist.broadcast_object_list(
        received, src=source, group=topology.tensor_host_group, device=torch.device("cpu")
    )
    if content is None:
        content = torch.empty(count_bytes(received[0]), dtype=torch.uint8)
    dist.broadcast(content, src=source, group=topology.tensor_host_group)
    return batches if batches is not None else from_bytes(received[0], content)
