"""Megatron-core's process groups, told instead of opened.

Its `initialize_model_parallel` opens all groups of all ranks, some thousands at a thousand ranks, most of
them for kinds of parallelism that a run has not, and there is no public way to hand it groups that are there.
So its own variables are set, which is held to their names. Megatron is imported where it is told: what runs
without it knows the layout of the ranks, too.
"""

from __future__ import annotations

import torch.distributed as dist

from metalm.errors import FaultError


def tell_groups(
    *,
    tensor: dist.ProcessGroup,
    context: dist.ProcessGroup,
    rows: dist.ProcessGroup,
    data: dist.ProcessGroup,
    replica: dist.ProcessGroup,
    alone: dist.ProcessGroup,
) -> None:
    """Have Megatron's layers find the groups of this rank.

    Args:
        tensor: of its tensor-parallel ranks.
        context: of its context-parallel ranks.
        rows: of both, which work on the same rows.
        data: of the ranks with other rows, and the same share of them.
        replica: of the ranks with the same weights: its data- and context-parallel ones.
        alone: of this rank only, for pipeline parallelism.

    Raises:
        FaultError: Megatron keeps its groups elsewhere.
    """
    from megatron.core import parallel_state

    groups = {
        "_TENSOR_MODEL_PARALLEL_GROUP": tensor,
        "_MODEL_PARALLEL_GROUP": tensor,
        "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": rows,
        "_DATA_PARALLEL_GROUP": data,
        "_DATA_PARALLEL_GROUP_WITH_CP": replica,
        "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": replica,
        "_CONTEXT_PARALLEL_GROUP": context,
        "_PIPELINE_MODEL_PARALLEL_GROUP": alone,
        "_EMBEDDING_GROUP": alone,
        "_POSITION_EMBEDDING_GROUP": alone,
    }
    if unknown := groups.keys() - vars(parallel_state).keys():
        raise FaultError(
            f"this version of Megatron-core keeps its groups elsewhere: it has no {min(unknown)}"
        )
    vars(parallel_state).update(groups)
    parallel_state._set_global_memory_buffer()


def forget_groups() -> None:
    """Have Megatron forget them."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
