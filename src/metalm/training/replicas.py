"""Gradients of the parameters that every tensor-parallel rank holds a copy of, made one before each update.

Norms, biases of row-parallel layers and learned positions are not cut over tensor-parallel ranks: each
updates a copy of its own, by a gradient that its own data-parallel group has summed. No library promises two
groups one order of summation, so such gradients may differ in their last bits; the copies would drift apart
for good, and a checkpoint, which holds the first one, would not be what the other ranks trained on. Hence all
take the first rank's gradient. What still differs is a fault, which `find_drift` may compare bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.parallel.sharding import sharding_of
from metalm.parallel.topology import Topology
from metalm.training.frozen_engine import FrozenEngine
from metalm.training.owned_ranges import gradients_in_partition, is_partitioned


def unify_gradients(engine: Any, topology: Topology) -> None:
    """Give all tensor-parallel ranks the first one's gradient of what is not cut over them.

    Must be called once per optimizer step, between the boundary's backward and the measuring of the norm.

    Args:
        engine: of the decoder.
        topology: this rank's place.

    Collective: the TP group.
    """
    if topology.tensor_size == 1 or isinstance(engine, FrozenEngine):
        return
    gradients = [
        gradient.view(-1)
        for parameter, gradient in _owned_gradients(engine.optimizer, is_partitioned(engine))
        if sharding_of(parameter) is None
    ]
    if not gradients:  # of this data-parallel rank: alike on its TP group, whose shards are of one size
        return
    group = topology.tensor_group
    if gradients[0].device.type == "cpu":
        group = topology.tensor_host_group
        if topology.device.type == "cuda":  # offloaded: the copies to host memory may still run
            torch.cuda.synchronize(topology.device)
    together = torch.cat(gradients)
    dist.broadcast(together, group=group, group_src=0)
    if topology.tensor_rank:
        for gradient, received in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(received)


def _owned_gradients(optimizer: Any, partitioned: bool) -> Iterator[tuple[Any, Tensor]]:
    """Trained parameters and what this rank updates them by, as views of a ZeRO optimizer's tensors."""
    if partitioned:
        for group in optimizer.fp16_groups:
            for parameter in group:
                yield (
                    parameter,
                    optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0],
                )
    elif optimizer.cpu_offload:
        for number, group in enumerate(optimizer.bit16_groups):
            flat = optimizer.single_partition_of_fp32_groups[number].grad
            for parameter in group:
                if parameter._hp_mapping is not None:
                    place = parameter._hp_mapping.hp_fragment_address
                    yield parameter, flat.narrow(0, place.start, place.numel)
    else:
        for group in range(len(optimizer.params_in_partition)):
            yield from gradients_in_partition(optimizer, group)
