"""Rotary positions in Triton: a pass that reads heads where they stand, and one back by the other sign."""

# A kernel's arguments have Triton's own types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 1024
"""That a program turns, about."""


@triton.jit
def turn_kernel(
    heads_ptr,
    cosines_ptr,
    sines_ptr,
    out_ptr,
    stride_vector,
    stride_head,
    num_heads,
    sign,
    NUM_PAIRS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Grid: (vectors, blocks of heads). The output is contiguous, and so are cosines and sines."""
    vector = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pairs = tl.arange(0, BLOCK_P)
    cosines = tl.load(cosines_ptr + vector * NUM_PAIRS + pairs, mask=pairs < NUM_PAIRS, other=0.0)
    sines = tl.load(sines_ptr + vector * NUM_PAIRS + pairs, mask=pairs < NUM_PAIRS, other=0.0) * sign
    inside = (heads < num_heads)[:, None] & (pairs < NUM_PAIRS)[None, :]
    heads_ptr += vector * stride_vector + heads[:, None] * stride_head
    out_ptr += vector * num_heads * HEAD_SIZE + heads[:, None] * HEAD_SIZE
    element = out_ptr.dtype.element_ty
    first = tl.load(heads_ptr + pairs[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads_ptr + NUM_PAIRS + pairs[None, :], mask=inside, other=0.0).to(tl.float32)
    turned_first = first * cosines[None, :] - second * sines[None, :]
    turned_second = second * cosines[None, :] + first * sines[None, :]
    tl.store(out_ptr + pairs[None, :], turned_first.to(element), mask=inside)
    tl.store(out_ptr + NUM_PAIRS + pairs[None, :], turned_second.to(element), mask=inside)
    if HEAD_SIZE > 2 * NUM_PAIRS:
        rest = 2 * NUM_PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        inside = (heads < num_heads)[:, None] & (rest < HEAD_SIZE)
        tl.store(out_ptr + rest, tl.load(heads_ptr + rest, mask=inside, other=0.0), mask=inside)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _turn(heads, rotation, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rotation,) = ctx.saved_tensors
        return _turn(grads[0], rotation, -1.0), None


def triton_turn(heads: Tensor, rotation: Tensor) -> Tensor:
    """`[T, H, K]`; see `turn`."""
    out: Tensor = _Turn.apply(heads, rotation)
    return out


def _turn(heads: Tensor, rotation: Tensor, sign: float) -> Tensor:
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    num_vectors, num_heads, head_size = heads.shape
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    num_pairs = rotation.shape[-1]
    if out.numel():
        with torch.cuda.device_of(heads):
            sizes = block_sizes(num_heads, num_pairs, head_size)
            turn_kernel[num_vectors, triton.cdiv(num_heads, sizes["BLOCK_H"])](
                heads,
                *rotation,
                out,
                heads.stride(0),
                heads.stride(1),
                num_heads,
                sign,
                NUM_PAIRS=num_pairs,
                HEAD_SIZE=head_size,
                **sizes,
            )
    return out


def block_sizes(num_heads: int, num_pairs: int, head_size: int) -> dict[str, int]:
    """Sides of a program's tile, and of what it copies."""
    pairs = triton.next_power_of_2(num_pairs)
    heads = min(max(1, _PAIRS // pairs), triton.next_power_of_2(num_heads))
    rest = triton.next_power_of_2(max(1, head_size - 2 * num_pairs))
    return {"BLOCK_H": heads, "BLOCK_P": pairs, "BLOCK_REST": rest}
