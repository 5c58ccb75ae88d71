"""What of each parameter a ZeRO engine keeps on this rank, read and written without gathering.

ZeRO 1 and 2 keep flat fragments of parameters (`_hp_mapping`); ZeRO 3 keeps equal partitions of every
parameter, the last ones padded. A frozen parameter has no master and no moments: what is kept is the
weight that the model works with, at ZeRO 1 and 2 whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from metalm.checkpoint.format import AVERAGE, STATES
from metalm.checkpoint.layout import ShardLayout
from metalm.parallel.sharding import sharding_of, whole_shape
from metalm.parallel.topology import Topology
from metalm.training.frozen_engine import FrozenEngine


@dataclass(frozen=True)
class OwnedRange:
    """A flat range of this rank's tensor-parallel shard of a parameter, and the states kept for it."""

    start: int
    states: dict[str, Tensor]
    """One-dimensional, all of the range's length, by state name; the weight alone where it is frozen."""

    @property
    def size(self) -> int:
        """Elements of the range."""
        return self.states[STATES[0]].numel()


def is_partitioned(engine: Any) -> bool:
    """Whether the engine shards the parameters themselves (ZeRO 3)."""
    return engine.zero_optimization_stage() == 3


def shard_layouts(engine: Any, topology: Topology) -> dict[str, ShardLayout]:
    """How each parameter is cut over the TP group, also where ZeRO 3 has taken it apart."""
    layouts = {}
    for name, parameter in engine.module.named_parameters():
        sharding = sharding_of(parameter)
        own = tuple(parameter.ds_shape if is_partitioned(engine) else parameter.shape)
        shape = whole_shape(own, sharding, topology.tensor_size)
        layouts[name] = (
            ShardLayout(shape)
            if sharding is None
            else ShardLayout(shape, sharding.dimension, sharding.stride, topology.tensor_size)
        )
    return layouts


def gradients_in_partition(optimizer: Any, group: int) -> Iterator[tuple[Any, Tensor]]:
    """Parameters of a group in this rank's partition at ZeRO 1 or 2, and what they are updated by."""
    gradients = (
        gradient
        for gradient in optimizer.averaged_gradients[group]
        if not getattr(gradient, "_zero_padding", False)
    )
    # Padding at the end has no mark and no parameter.
    return zip(optimizer.params_in_partition[group], gradients, strict=False)


def create_optimizer_state(engine: Any, *, with_average: bool) -> None:
    """Make Adam's moments, which torch makes at the first step only, so that they can be read and set.

    A moving average of the weights is one more state of the optimizer, which Adam leaves alone. Must come
    before the first step: DeepSpeed then links the states to the parameters once, while those of later
    parameter groups do not exist yet.
    """
    optimizer = engine.optimizer
    for flat in _flat_masters(engine):
        state = optimizer.optimizer.state[flat]
        if "exp_avg" not in state:
            step = torch.zeros((), dtype=torch.float32, device=flat.device if flat.is_cuda else "cpu")
            state.update(step=step, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        if with_average:
            state[AVERAGE] = flat.detach().clone()
    if not is_partitioned(engine):
        optimizer._lazy_init_hp_params_optimizer_state()


def owned_ranges(engine: Any) -> Iterator[tuple[str, Any, OwnedRange]]:
    """Every range that this rank writes, with its parameter: together the ranks write everything once."""
    for name, parameter, kept in kept_ranges(engine):
        if parameter.requires_grad or is_partitioned(engine):
            yield name, parameter, kept
        elif (own := _part_of_whole(engine, kept)).size:
            yield name, parameter, own


def kept_ranges(engine: Any) -> Iterator[tuple[str, Any, OwnedRange]]:
    """Every range that this rank keeps, with its parameter."""
    for name, parameter in engine.module.named_parameters():
        if is_partitioned(engine):
            kept = _partition_of(engine, parameter)
        elif parameter.requires_grad:
            kept = _fragment_of(engine, parameter)
        else:
            kept = OwnedRange(0, {"master": parameter.data.flatten()})
        if kept is not None:
            yield name, parameter, kept


def set_state(engine: Any, parameter: Any, state: str, values: Tensor) -> None:
    """Set what this rank keeps of a parameter: as many values as its range in `kept_ranges` has."""
    if is_partitioned(engine):
        padded = torch.zeros(parameter.ds_tensor.numel())
        padded[: values.numel()] = values
        if not parameter.requires_grad:
            parameter.ds_tensor.data.copy_(padded)
        elif state == "master":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, state)
    elif not parameter.requires_grad:
        parameter.data.copy_(values.view_as(parameter))
    else:
        fragment = parameter._hp_mapping.get_hp_fragment(None if state == "master" else state)
        fragment.data.copy_(values.view_as(fragment))


def push_masters(engine: Any) -> None:
    """Make the working weights follow what was set.

    Collective: the engine's data-parallel group.
    """
    if isinstance(engine, FrozenEngine):
        engine.forget_gathered()
        return
    optimizer = engine.optimizer
    if not is_partitioned(engine):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()
    for parameter in engine.module.parameters():
        # A node's copy (`zero_hpz_partition_size`): DeepSpeed lets go of those of trained parameters alone.
        parameter.ds_secondary_tensor = None


def optimizer_step(engine: Any) -> float:
    """How many updates Adam has made."""
    if isinstance(engine, FrozenEngine):
        return 0.0
    return float(engine.optimizer.optimizer.state[_flat_masters(engine)[0]]["step"])


def set_optimizer_step(engine: Any, step: float) -> None:
    """Set Adam's count of updates, on which its bias correction depends."""
    if isinstance(engine, FrozenEngine):
        return
    for flat in _flat_masters(engine):
        engine.optimizer.optimizer.state[flat]["step"].fill_(step)


def averaged_masters(engine: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's flat masters of an engine, each with the moving average of its weights; none without it."""
    if isinstance(engine, FrozenEngine):
        return
    for flat in _flat_masters(engine):
        state = engine.optimizer.optimizer.state[flat]
        if AVERAGE in state:
            yield flat.detach(), state[AVERAGE]


def states_of(engine: Any) -> tuple[str, ...]:
    """What is kept of a trained parameter."""
    has_average = next(averaged_masters(engine), None) is not None
    return (*STATES, AVERAGE) if has_average else STATES


def _flat_masters(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    return (
        optimizer.fp32_partitioned_groups_flat
        if is_partitioned(engine)
        else optimizer.single_partition_of_fp32_groups
    )


def _data_group(engine: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup = (
        engine.data_group if isinstance(engine, FrozenEngine) else engine.optimizer.dp_process_group
    )
    return group


def owned_part(engine: Any, parameter: Any) -> Tensor:
    """The weights that ZeRO 3 keeps here of a parameter, without the padding that nothing is written to."""
    _, size = _partition(engine, parameter)
    part: Tensor = parameter.ds_tensor.detach()[: max(size, 0)]
    return part


def _partition_of(engine: Any, parameter: Any) -> OwnedRange | None:
    """What ZeRO 3 keeps here of a parameter."""
    start, size = _partition(engine, parameter)
    if size <= 0:
        return None
    if not parameter.requires_grad:
        return OwnedRange(start, {"master": owned_part(engine, parameter)})
    states = {
        state: (
            safe_get_local_fp32_param(parameter)
            if state == "master"
            else safe_get_local_optimizer_state(parameter, state)
        )[:size]
        for state in states_of(engine)
    }
    return OwnedRange(start, states)


def _fragment_of(engine: Any, parameter: Any) -> OwnedRange | None:
    """What ZeRO 1 and 2 keep here of a trained parameter."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    states = {
        state: mapping.get_hp_fragment(None if state == "master" else state).flatten()
        for state in states_of(engine)
    }
    return OwnedRange(mapping.lp_fragment_address.start, states)


def _part_of_whole(engine: Any, whole: OwnedRange) -> OwnedRange:
    """This rank's equal part of what every rank of the data-parallel group keeps whole."""
    group = _data_group(engine)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start, end = rank * whole.size // ranks, (rank + 1) * whole.size // ranks
    return OwnedRange(start, {state: values[start:end] for state, values in whole.states.items()})


def _partition(engine: Any, parameter: Any) -> tuple[int, int]:
    """Start and true size of this rank's ZeRO 3 partition of a parameter's shard."""
    partition_size = parameter.ds_tensor.numel()
    start = dist.get_rank(_data_group(engine)) * partition_size
    return start, min(parameter.ds_numel - start, partition_size)
