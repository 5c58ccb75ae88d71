"""The output layer and its cross entropy in one, vocabulary-parallel, without ever holding all logits.

Positions are taken in chunks: a chunk's logits `[chunk, V/tp]` live only while its maximum, sum and target
are read off, and again in the backward, which recomputes them. What lasts is a few numbers per position.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Loss of each position under logits `hidden @ weight.T`, whose vocabulary is split over a group.

    Rank r of the group holds rows `[r * V/tp, (r + 1) * V/tp)` of the weight. The backward gives each rank
    the gradient of its own rows, and all ranks the whole gradient of the hidden states: it sums their partial
    gradients over the group, so no further collective is needed before this call.

    Collective: all ranks of `group`, with the same hidden states and labels, forward and backward.

    Args:
        hidden: floating `[N, D]`, the same on all ranks of the group.
        weight: `[V/tp, D]` of the same dtype, this rank's rows.
        labels: int64 `[N]`, numbers in the whole vocabulary. A negative label has loss 0 and no gradient.
        group: tensor-parallel group; None when this rank holds the whole vocabulary.
        vocab_size: true size of the whole vocabulary; rows of the weight beyond it are padding, take no part,
            and have zero gradient. All rows count by default.
        chunk_size: positions per chunk; transient memory is a few times `chunk_size * V/tp` floats.

    Returns:
        float32 `[N]` (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes do not fit, or `vocab_size` or `chunk_size` is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}: expected [N, D] and [V/tp, D]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: expected one dtype")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} for hidden {list(hidden.shape)}: expected [N]")
    if chunk_size < 1 or (vocab_size is not None and vocab_size < 1):
        raise ValueError(f"chunk_size is {chunk_size}, vocab_size is {vocab_size}: expected at least 1")
    first_row = weight.shape[0] * (dist.get_rank(group) if group is not None else 0)
    num_rows = weight.shape[0]
    if vocab_size is not None:
        num_rows = min(max(vocab_size - first_row, 0), num_rows)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, group, first_row, num_rows, chunk_size)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        first_row: int,
        num_rows: int,
        chunk_size: int,
    ) -> Tensor:
        local_labels, owned = _local_labels(labels, first_row, num_rows)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_positions = hidden.shape[0]
        maximum = torch.full((num_positions,), float("-inf"), dtype=dtype, device=hidden.device)
        sum_and_target = torch.zeros((2, num_positions), dtype=dtype, device=hidden.device)
        for chunk in _chunks(num_positions, chunk_size) if num_rows else ():
            logits = (hidden[chunk] @ weight[:num_rows].T).to(dtype)
            target = logits.gather(1, local_labels[chunk, None]).squeeze(1)
            maximum[chunk] = logits.amax(1)
            sum_and_target[0, chunk] = logits.sub_(maximum[chunk, None]).exp_().sum(1)
            sum_and_target[1, chunk] = torch.where(owned[chunk], target, 0)
        if group is not None:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
            sum_and_target[0] *= torch.exp(local_maximum - maximum)
            dist.all_reduce(sum_and_target, group=group)
        log_sum = maximum + sum_and_target[0].log()
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.group, ctx.first_row, ctx.num_rows, ctx.chunk_size = group, first_row, num_rows, chunk_size
        return torch.where(labels >= 0, log_sum - sum_and_target[1], 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        local_labels, owned = _local_labels(labels, ctx.first_row, ctx.num_rows)
        grad_losses = torch.where(labels >= 0, grads[0], 0)
        rows = weight[: ctx.num_rows]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Many chunks are added up: in the losses' precision.
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype) if needs_weight else None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_size) if ctx.num_rows else ():
            grad_logits = (hidden[chunk] @ rows.T).to(log_sum.dtype).sub_(log_sum[chunk, None]).exp_()
            grad_logits.scatter_add_(1, local_labels[chunk, None], -owned[chunk, None].to(log_sum.dtype))
            grad_logits = grad_logits.mul_(grad_losses[chunk, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_logits @ rows
            if grad_weight is not None:
                grad_weight[: ctx.num_rows] += grad_logits.T @ hidden[chunk]
        if grad_hidden is not None and ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _local_labels(labels: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Each label as a row of this rank (0 where another rank holds it), and whether this rank holds it."""
    owned = (labels >= first_row) & (labels < first_row + num_rows)
    return torch.where(owned, labels - first_row, 0), owned


def _chunks(num_positions: int, chunk_size: int) -> list[slice]:
    return [slice(first, first + chunk_size) for first in range(0, num_positions, chunk_size)]
