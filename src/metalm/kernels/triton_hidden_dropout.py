"""Dropout of hidden vectors in one pass over memory: random words live in registers, and none are stored."""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZE = 1024


@triton.jit
def is_kept(seed, position, first, site, threshold, BLOCK: tl.constexpr):
    """Which of a vector's BLOCK elements from `first` on are kept; see `dropout.HiddenPattern`."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros_like(group)
    word0, word1, word2, word3 = tl.philox(seed, zero + group, zero + position, zero + site, zero + 1)
    words = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), (BLOCK,))
    return words >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold", "site"])
def hidden_dropout_kernel(
    hidden_ptr, out_ptr, seeds_ptr, positions_ptr, width, threshold, keep_scale, site, BLOCK: tl.constexpr
):
    """Grid: (vectors, blocks of a vector)."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    keep = is_kept(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), first, site, threshold, BLOCK)
    hidden = tl.load(hidden_ptr + row * width + columns, mask=columns < width, other=0.0)
    kept = tl.where(keep, hidden.to(tl.float32) * keep_scale, 0.0)
    tl.store(out_ptr + row * width + columns, kept.to(hidden.dtype), mask=columns < width)


class _HiddenDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, seeds: Tensor, positions: Tensor, threshold: int, scale: float, site: int
    ) -> Tensor:
        ctx.save_for_backward(seeds, positions)
        ctx.scalars = (threshold, scale, site)
        return _drop(hidden, seeds, positions, *ctx.scalars)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _drop(grads[0], *ctx.saved_tensors, *ctx.scalars), None, None, None, None, None


def triton_hidden_dropout(
    hidden: Tensor, seeds: Tensor, positions: Tensor, threshold: int, scale: float, site: int
) -> Tensor:
    """`hidden` `[..., D]`, whose vectors' seeds (int64) and positions (int32) are `[...]`, like it."""
    out: Tensor = _HiddenDropout.apply(hidden, seeds, positions, threshold, scale, site)
    return out


def _drop(
    hidden: Tensor, seeds: Tensor, positions: Tensor, threshold: int, scale: float, site: int
) -> Tensor:
    hidden = hidden.contiguous()
    out, width = torch.empty_like(hidden), hidden.shape[-1]
    block = min(BLOCK_SIZE, max(16, triton.next_power_of_2(width)))
    if seeds.numel():
        with torch.cuda.device_of(hidden):
            hidden_dropout_kernel[seeds.numel(), triton.cdiv(width, block)](
                hidden, out, seeds, positions, width, threshold, scale, site, BLOCK=block
            )
    return out
