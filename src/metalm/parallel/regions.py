"""What crosses inside the step between the ranks that work on the same rows: tensor and context ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.batch import SemiCausalBatch, count_bytes, from_bytes, to_bytes
from metalm.parallel.topology import Topology


class _GatherEncoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, topology: Topology) -> Tensor:
        ctx.topology, size = topology, topology.rows_size
        gathered = mine.new_empty((size * mine.shape[0], *mine.shape[1:]))
        dist.all_gather(list(gathered.chunk(size)), mine.contiguous(), group=topology.rows_group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        topology, tensor_size = ctx.topology, ctx.topology.tensor_size
        shares = gradients[0].unflatten(0, (topology.context_size, tensor_size, -1))
        of_mine = shares[:, topology.tensor_rank]  # [C, L, D]: what this rank has for each context rank
        if topology.context_size > 1:
            of_mine = _exchange(of_mine, topology.context_group)
        return of_mine.sum(dim=0) * tensor_size, None


def gather_encoded(mine: Tensor, topology: Topology) -> Tensor:
    """All span vectors of a micro-batch from each rank's share, [L, D] to [C * T * L, D].

    The backward sums this rank's slice over the context ranks, each of which docks the vectors of its own
    positions alone, and multiplies it by T: the decoder's input gradient is whole on every TP rank, and the
    encoder engine averages over the world although a micro-batch's spans are split over its ranks.

    Collective: the ranks with the same rows; backward the context group.
    """
    return _GatherEncoded.apply(mine, topology)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradients[0], ctx.group), None


def all_to_all(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part r of [C, ...] goes to rank r of the group; answers the parts that are for this rank, [C, ...].

    Collective: all ranks of `group`, forward and backward.
    """
    exchanged: Tensor = _AllToAll.apply(parts, group)
    return exchanged


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def gather_positions(mine: Tensor, positions: Tensor, topology: Topology) -> Tensor:
    """Vectors of some positions, of which each context rank holds an equal run; without gradients.

    Args:
        mine: [P / C, D], of this rank's run of P positions.
        positions: [M] int64, among all P.

    Returns:
        [M, D].

    Collective: the context group.
    """
    mine = mine.detach()
    if topology.context_size == 1:
        return mine.index_select(0, positions)
    own = positions - topology.context_rank * mine.shape[0]
    is_held = (own >= 0) & (own < mine.shape[0])
    found = mine.index_select(0, torch.where(is_held, own, 0)) * is_held[:, None]
    dist.all_reduce(found, group=topology.context_group)
    return found


def gather_last_dimension(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., V/tp] of every rank, side by side as [..., V]; without gradients.

    Collective: all ranks of `group`.
    """
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.detach().contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def broadcast_batches(batches: list[SemiCausalBatch] | None, topology: Topology) -> list[SemiCausalBatch]:
    """The first rank's micro-batches (None elsewhere), on every rank with the same rows, in host memory.

    Collective: the ranks with the same rows.
    """
    if topology.rows_size == 1:
        assert batches is not None
        return batches
    source = dist.get_global_rank(topology.rows_host_group, 0)
    structure, content = (None, None) if batches is None else to_bytes(batches)
    received = [structure]
    dist.broadcast_object_list(
        received, src=source, group=topology.rows_host_group, device=torch.device("cpu")
    )
    if content is None:
        content = torch.empty(count_bytes(received[0]), dtype=torch.uint8)
    dist.broadcast(content, src=source, group=topology.rows_host_group)
    return batches if batches is not None else from_bytes(received[0], content)
