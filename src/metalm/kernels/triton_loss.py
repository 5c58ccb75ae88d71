"""The passes over a chunk of logits in Triton: one for the loss, one that turns them into their gradient."""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 4096
NUM_WARPS = 8


@triton.jit
def logits_loss_kernel(
    logits_ptr, labels_ptr, log_sum_ptr, target_ptr, stride, num_columns, BLOCK: tl.constexpr
):
    """Log-sum-exp of each row's first `num_columns`, and its label's logit, 0 for a negative label."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    largest, total = float("-inf"), 0.0
    for first in tl.range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), 0)
        largest = new_largest
    label = tl.load(labels_ptr + row)
    target = tl.load(logits_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(log_sum_ptr + row, largest + tl.log(total))
    tl.store(target_ptr + row, target)


@triton.jit
def logits_gradient_kernel(
    logits_ptr, labels_ptr, log_sum_ptr, grad_ptr, stride, num_columns, width, BLOCK: tl.constexpr
):
    """Puts (softmax - one at the label) * grad in the place of a row's logits, zeros beyond the columns."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    log_sum, grad = tl.load(log_sum_ptr + row), tl.load(grad_ptr + row)
    label = tl.load(labels_ptr + row)
    for first in tl.range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(logits - log_sum) - tl.where(columns == label, 1.0, 0.0)) * grad
        tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < width)


def logits_loss(logits: Tensor, labels: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the labels' logits, float32 [N] each.

    Args:
        logits: [N, V] contiguous, of which the first `num_columns` count.
        labels: int64 [N], columns, or negative.
    """
    num_rows, width = logits.shape
    log_sum, target = torch.empty(2, num_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        logits_loss_kernel[(num_rows,)](
            logits, labels, log_sum, target, width, num_columns, BLOCK=BLOCK_SIZE, num_warps=NUM_WARPS
        )
    return log_sum, target


def into_gradients(logits: Tensor, labels: Tensor, log_sum: Tensor, grad: Tensor, num_columns: int) -> Tensor:
    """The logits' own memory, with their gradients; `log_sum` and `grad` are float32 [N]."""
    num_rows, width = logits.shape
    with torch.cuda.device_of(logits):
        logits_gradient_kernel[(num_rows,)](
            logits, labels, log_sum, grad, width, num_columns, width, BLOCK=BLOCK_SIZE, num_warps=NUM_WARPS
        )
    return logits
