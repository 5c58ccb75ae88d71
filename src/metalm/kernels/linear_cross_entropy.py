"""The output layer and its cross entropy in one, vocabulary-parallel, without holding many logits.

Positions are taken in chunks, of so many logits as are kept without harm. Where one chunk holds all
positions, its logits wait for the backward, which the loss begins; else they are computed again. Without
Triton and in the losses' own dtype their exponentials wait in their place.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from metalm.loss_chunks import chunk_positions

Backend = Literal["triton", "torch"]
_CACHED = 1 << 17
"""Logits that take half a mebibyte when they are widened."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: Backend | None = None,
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
        chunk_size: positions per chunk; by default as many as `chunk_positions` gives.
        backend: forces "triton" (CUDA, or Triton's interpreter), which goes over a chunk's logits once in
            each direction, or "torch" (any device), which holds them a few times; by default triton on CUDA,
            but for float64.

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
    if chunk_size is None:
        chunk_size = chunk_positions(weight.shape[0], weight.dtype.itemsize, on_cpu=not weight.is_cuda)
    if chunk_size < 1 or (vocab_size is not None and vocab_size < 1):
        raise ValueError(f"chunk_size is {chunk_size}, vocab_size is {vocab_size}: expected at least 1")
    first_row = weight.shape[0] * (dist.get_rank(group) if group is not None else 0)
    num_rows = weight.shape[0]
    if vocab_size is not None:
        num_rows = min(max(vocab_size - first_row, 0), num_rows)
    if backend is None:
        fits = weight.is_cuda and weight.dtype != torch.float64 and importlib.util.find_spec("triton")
        backend = "triton" if fits else "torch"
    options = _Options(group, first_row, num_rows, chunk_size, backend)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, options)
    return losses


@dataclass(frozen=True)
class _Options:
    group: dist.ProcessGroup | None
    first_row: int
    num_rows: int
    """Of this rank's weight that are no padding."""
    chunk_size: int
    backend: Backend

    def rows(self, weight: Tensor) -> Tensor:
        """The rows that are multiplied: on CUDA with the padding, without which memory is out of line."""
        return weight if self.backend == "triton" else weight[: self.num_rows]

    def keep(self, logits: Tensor) -> _Kept:
        """What the backward takes, in the memory of a chunk's logits."""
        if self.backend == "triton" or logits.dtype != torch.promote_types(logits.dtype, torch.float32):
            return _Kept(logits, None)
        largest = logits.amax(dim=1)
        return _Kept(logits.sub_(largest[:, None]).exp_(), largest)

    def loss(self, logits: Tensor, labels: Tensor, *, keeps: bool) -> tuple[Tensor, Tensor, _Kept | None]:
        """Log-sum-exp and the labels' logits of a chunk, and what its backward takes if it keeps anything."""
        if self.backend == "triton":
            from metalm.kernels.triton_loss import logits_loss

            log_sum, target = logits_loss(logits, labels, self.num_rows)
            return log_sum, target, self.keep(logits) if keeps else None
        target = torch.where(labels >= 0, logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0)
        kept = self.keep(logits) if keeps else None
        if kept is not None and kept.largest is not None:
            return kept.largest + kept.values.sum(dim=1).log(), target, kept
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_sum = torch.cat([logits[rows].to(dtype).logsumexp(1) for rows in _row_blocks(logits)])
        return log_sum, target.to(dtype), kept

    def gradients(
        self, kept: _Kept, labels: Tensor, log_sum: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Of a chunk's logits, in their dtype, and what each row is still to be multiplied by.

        What is kept is gone: its memory holds the gradients.
        """
        if self.backend == "triton":
            from metalm.kernels.triton_loss import into_gradients

            return into_gradients(kept.values, labels, log_sum, grad, self.num_rows), None
        column, has_one = labels.clamp(min=0)[:, None], (labels >= 0)[:, None]
        if kept.largest is None:
            ones = -has_one.to(log_sum.dtype)
            for rows in _row_blocks(kept.values):
                found = (kept.values[rows] - log_sum[rows, None]).exp_()
                found.scatter_add_(1, column[rows], ones[rows])
                kept.values[rows] = found.mul_(grad[rows, None])
            return kept.values, None
        # Other ranks may have the sum almost alone: nothing is divided by what has underflowed.
        share = (kept.largest - log_sum).clamp(min=-80.0).exp()
        kept.values.scatter_add_(1, column, torch.where(has_one, -1.0 / share[:, None], 0.0))
        return kept.values, (share * grad)[:, None]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A chunk's logits; or their exponentials over that of the largest of their row."""

    values: Tensor
    largest: Tensor | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, options: _Options) -> Tensor:
        own_labels = _own_labels(labels, options)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_positions = hidden.shape[0]
        log_sum = torch.full((num_positions,), float("-inf"), dtype=dtype, device=hidden.device)
        target = torch.zeros_like(log_sum)
        chunks = _chunks(num_positions, options.chunk_size) if options.num_rows else ()
        ctx.kept = None
        keeps = len(chunks) == 1 and any(ctx.needs_input_grad[:2])
        for chunk in chunks:
            logits = hidden[chunk] @ options.rows(weight).T
            log_sum[chunk], target[chunk], ctx.kept = options.loss(logits, own_labels[chunk], keeps=keeps)
        if options.group is not None:
            maximum = log_sum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=options.group)
            together = torch.stack([torch.exp(log_sum - maximum), target])
            dist.all_reduce(together, group=options.group)
            log_sum, target = maximum + together[0].log(), together[1]
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.options = options
        return torch.where(labels >= 0, log_sum - target, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        options, kept = ctx.options, ctx.kept
        ctx.kept = None  # its memory is about to hold the gradients
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        own_labels = _own_labels(labels, options)
        grad_losses = torch.where(labels >= 0, grads[0], 0)
        rows = options.rows(weight)
        chunks = _chunks(hidden.shape[0], options.chunk_size) if options.num_rows else ()
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Many chunks are added up in the losses' precision; one needs no sum.
        grad_weight = None
        if needs_weight:
            grad_weight = torch.zeros_like(weight, dtype=weight.dtype if len(chunks) == 1 else log_sum.dtype)
        for chunk in chunks:
            inputs = hidden[chunk]
            kept = kept or options.keep(inputs @ rows.T)
            grad_logits, factor = options.gradients(
                kept, own_labels[chunk], log_sum[chunk], grad_losses[chunk]
            )
            kept = None
            if grad_hidden is not None:
                _multiply_into(grad_hidden[chunk], grad_logits, rows)
            if factor is not None:  # of narrower tensors than the logits are
                inputs = inputs * factor
                if grad_hidden is not None:
                    grad_hidden[chunk] *= factor
            if grad_weight is not None and len(chunks) == 1:
                _multiply_into(grad_weight[: len(rows)], grad_logits.T, inputs)
            elif grad_weight is not None:
                grad_weight[: len(rows)] += grad_logits.T @ inputs
        if grad_hidden is not None and options.group is not None:
            dist.all_reduce(grad_hidden, group=options.group)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _row_blocks(logits: Tensor) -> list[slice]:
    """Rows that are widened at once: on CPU few enough to stay in a core's cache."""
    num_rows = max(1, _CACHED // logits.shape[1]) if logits.is_cpu else len(logits)
    return _chunks(len(logits), num_rows)


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write a product where it belongs; on CPU by a copy, since what is fast there has no `out`."""
    if out.is_cpu:
        out.copy_(left @ right)
    else:
        torch.mm(left, right, out=out)


def _own_labels(labels: Tensor, options: _Options) -> Tensor:
    """Each label as a row of this rank, -1 where another rank holds it, or none."""
    owned = (labels >= options.first_row) & (labels < options.first_row + options.num_rows)
    return torch.where(owned, labels - options.first_row, -1)


def _chunks(num_positions: int, chunk_size: int) -> list[slice]:
    return [slice(first, first + chunk_size) for first in range(0, num_positions, chunk_size)]
